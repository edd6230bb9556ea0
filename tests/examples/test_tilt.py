"""The exact minimizer is what it says, the arms weigh as they are called, and the report follows from its lines."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import sprites
import tilt
import torch
from diffusers import WanPipeline, WanTransformer3DModel

import train_ltd
from ltd_loss import ltd_weights

ROOT = Path(__file__).resolve().parents[2]
FEW_CLIPS = {"clips_a_kind": 1, "held_out_a_kind": 1, "seed": 3}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """The experiment's clips, one of each direction and speed."""
    folder = tmp_path_factory.mktemp("tilt") / "clips"
    tilt.write_clips(folder, FEW_CLIPS)
    return folder


def read_table(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def random_clips(count=3, shape=(2, 3, 2, 2), spread=1.0):
    """Return a set of latents `(N, C, F, H, W)` and weights `(N, F, H, W)`, float64."""
    generator = torch.Generator().manual_seed(0)
    clips = spread * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    weights = 0.5 + 3 * torch.rand(count, *shape[1:], generator=generator, dtype=torch.float64)
    return clips, weights


# ------------------------------------------------------------------------------------------------ the minimizer


@pytest.mark.parametrize("sigma", [0.3, 0.7, 0.97])
def test_the_minimizer_is_the_weighted_posterior_mean(sigma):
    """Transcribed number by number: E[w_j (noise - z)_j | noisy] / E[w_j | noisy]."""
    clips, weights = random_clips()
    noise = torch.randn(clips.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = (1 - sigma) * clips[1] + sigma * noise
    flow = tilt.minimizing_flow(noisy[None], sigma, clips, weights)[0]
    densities = []
    for clip in clips:
        of_clip = (noisy - (1 - sigma) * clip) / sigma
        densities.append(math.exp(-sum(value**2 for value in of_clip.flatten().tolist()) / 2))
    assert max(densities) < 0.999 * sum(densities) or sigma < 0.5  # more than one clip may be meant
    for place in np.ndindex(*noisy.shape):
        above = below = 0.0
        for number in range(len(clips)):
            weight = weights[(number, *place[1:])].item()
            clip = clips[(number, *place)].item()
            of_clip = (noisy[place].item() - (1 - sigma) * clip) / sigma
            above += densities[number] * weight * (of_clip - clip)
            below += densities[number] * weight
        assert flow[place].item() == pytest.approx(above / below, rel=1e-9)


def test_the_minimizer_has_the_smallest_weighted_error():
    """A network that is free at every noisy latent comes to it: the weighted error's gradient there is zero."""
    clips, weights = random_clips()
    sigma = 0.9
    noisy = torch.randn(1, *clips.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    flow = tilt.minimizing_flow(noisy, sigma, clips, weights).requires_grad_()
    of_clips = (noisy - (1 - sigma) * clips) / sigma
    likelihood = torch.exp(-of_clips.square().sum(dim=(1, 2, 3, 4)) / 2)
    error = weights[:, None] * (flow - (of_clips - clips)).square()
    (likelihood / likelihood.sum() * error.sum(dim=(1, 2, 3, 4))).sum().backward()
    assert flow.grad.abs().max() < 1e-12


def test_a_weight_a_clip_is_a_clip_repeated():
    clips, _ = random_clips()
    weights = torch.ones_like(clips[:, 0])
    weights[2] = 3
    noisy = torch.randn(4, *clips.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    repeated = clips[[0, 1, 2, 2, 2]]
    expected = tilt.minimizing_flow(noisy, 0.9, repeated, torch.ones_like(repeated[:, 0]))
    torch.testing.assert_close(tilt.minimizing_flow(noisy, 0.9, clips, weights), expected)
    plain = tilt.minimizing_flow(noisy, 0.9, clips, torch.ones_like(weights))
    assert not torch.allclose(plain, expected)


class MinimizerModel(WanTransformer3DModel):
    """A transformer for the stock pipeline that answers with the exact minimizer."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, **kwargs):
        flow = tilt.minimizing_flow(hidden_states.double(), timestep[0].item() / 1000, *self.known)
        return (flow.float(),)


def test_the_minimizer_is_sampled_as_the_pipeline_samples(tiny_wan):
    """Same noise from the same seed, same steps, same end: float32 against float64."""
    config = WanTransformer3DModel.load_config(tiny_wan, subfolder="transformer")
    model = MinimizerModel.from_config(config)
    clips, weights = random_clips(shape=(16, 3, 4, 6), spread=0.3)
    model.known = (clips, weights)
    pipeline = WanPipeline.from_pretrained(tiny_wan, transformer=model)
    pipeline.register_modules(scheduler=tilt.build_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    seeds = [5, 6]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = pipeline(
        prompt=["a"] * 2,
        generator=generators,
        height=32,
        width=48,
        num_frames=9,
        output_type="latent",
        num_inference_steps=tilt.SAMPLING["num_inference_steps"],
        guidance_scale=tilt.SAMPLING["guidance_scale"],
    ).frames
    noise = [torch.randn(clips.shape[1:], generator=torch.Generator().manual_seed(seed)).double() for seed in seeds]
    sampled = tilt.sample_minimizer(torch.stack(noise), tilt.build_scheduler(), clips, weights)
    torch.testing.assert_close(latents.double(), sampled, rtol=1e-3, atol=1e-3)
    distance = torch.cdist(sampled.flatten(1), clips.flatten(1)).min(dim=1).values
    assert distance.max() < 0.05 * clips[0].norm()  # it ends at a clip


def test_a_prediction_is_the_speed_of_the_clip_it_ends_at(clip_folder, monkeypatch):
    """One clip a caption: there is no choice. Two: a heavy weight on fast ones makes all of them fast."""
    captions = ["open, to the right", "open, to the left"]
    clips = []
    for number, speed in enumerate(("slowly", "quickly", "quickly")):
        clip = type("Clip", (), {"name": f"{speed}-{number}.mp4", "captions": [captions[number == 2]]})()
        clips.append(clip)
    generator = torch.Generator().manual_seed(99)  # of no video's noise
    latents = torch.randn(3, 16, 3, 4, 6, generator=generator)

    class Dataset:
        def __init__(self):
            self.clips = clips

        def load_fixed(self, index):
            return {"latents": latents[index]}

    asked = [captions[number % 2] for number in range(16)]
    monkeypatch.setattr(tilt, "video_captions", lambda arm, count: (asked, asked))
    speeds = {}
    for weight in (1e-9, 1.0, 1e9):
        arm = tilt.Arm("", fast_weight=weight)
        speeds[weight] = tilt.predict(arm, 0, Dataset(), tilt.build_scheduler(), 16)
        assert speeds[weight][1::2] == [tilt.FAST] * 8
    assert speeds[1e-9][::2] == [tilt.SLOW] * 8 and speeds[1e9][::2] == [tilt.FAST] * 8
    assert set(speeds[1.0][::2]) == {tilt.SLOW, tilt.FAST}


# ------------------------------------------------------------------------------------------------ arms and clips


@pytest.fixture(scope="module")
def batch():
    """Four clips, wilder from one to the next, as a batch of training."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(4, 16, 5, 6, 6, generator=generator) * torch.linspace(0.1, 0.6, 4).view(-1, 1, 1, 1, 1)
    names = ["slowly-left-0.mp4", "quickly-left-0.mp4", "slowly-top-0.mp4", "quickly-top-0.mp4"]
    return {"latents": steps.cumsum(dim=2), "name": names}


def test_arms_weigh_as_they_are_called(batch):
    ltd = ltd_weights(batch["latents"])
    expected = {
        "mse": torch.ones_like(ltd),
        "ltd": ltd,
        "ltd_cubed": ltd**3,
        "ltd_inverse": 1 / ltd,
        "mse_words": torch.ones_like(ltd),
        "ltd_words": ltd,
        "fast_weighted": torch.tensor([1.0, 3.0, 1.0, 3.0])[:, None, None, None].expand_as(ltd),
        "fast_repeated": torch.ones_like(ltd),
    }
    assert list(expected) != list(tilt.ARMS) and expected.keys() == tilt.ARMS.keys()
    for name, arm in tilt.ARMS.items():
        torch.testing.assert_close(tilt.arm_weights(batch["latents"], batch["name"], arm), expected[name])


@pytest.mark.parametrize("name", ["mse", "ltd"])
def test_two_arms_are_the_scripts_own_losses(name, batch):
    generator = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(2, *batch["latents"].shape, generator=generator)
    args = train_ltd.parse_args([f"--train_data_dir={ROOT}", f"--loss={name}"])
    losses, gradients = [], []
    for compute_loss in (train_ltd.compute_loss, functools.partial(tilt.arm_loss, arm=tilt.ARMS[name])):
        leaf = prediction.clone().requires_grad_()
        loss = compute_loss(leaf, target, batch, args)
        loss.backward()
        losses.append(loss.item())
        gradients.append(leaf.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*gradients)


def test_captions_leave_the_speed_open_and_nothing_else(clip_folder):
    rows = read_table(clip_folder / "training.jsonl")
    repeated = [row["file_name"] for row in read_table(clip_folder / "repeated.jsonl")]
    assert len(rows) == len(repeated) == 16  # as many updates an epoch
    assert len({row["file_name"] for row in rows}) == 4 and len(read_table(clip_folder / "held_out.jsonl")) == 4
    speeds = {}
    for row in rows:
        words = sprites.parse_caption(row["words"])["sprites"][0]
        assert row["file_name"].startswith(words["speed"])
        speeds.setdefault(row["text"], []).append(words["speed"])
    assert len(speeds) == 2
    assert all(sorted(of_caption) == 4 * ["quickly"] + 4 * ["slowly"] for of_caption in speeds.values())
    assert sum(tilt.clip_is_fast(name) for name in repeated) == 12
    assert {row["file_name"] for row in rows} == set(repeated)


def test_videos_are_asked_for_in_the_words_of_the_clips(clip_folder):
    rows = read_table(clip_folder / "training.jsonl")
    prompts, asked = tilt.video_captions(tilt.ARMS["mse"], 32)
    assert set(prompts) == {row["text"] for row in rows}
    assert [tilt.without_speed(text) for text in asked] == prompts
    with_words, also_asked = tilt.video_captions(tilt.ARMS["ltd_words"], 32)
    assert with_words == asked == also_asked
    assert sorted(with_words) == sorted(2 * [row["words"] for row in rows])  # each as often


# ------------------------------------------------------------------------------------------------ measuring


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("direction", tilt.TILT_DIRECTIONS)
def test_the_net_speed_of_a_true_clip(which, direction):
    speed = tilt.TILT_SPEEDS[which]
    word = tilt.SPEED_WORDS[speed]
    for seed in range(2):
        spec = tilt.draw_pair(direction, np.random.default_rng(seed))[which]
        video = sprites.render_clip(spec, tilt.TILT_FRAMES)[0][:, tilt.ROWS]
        # The word in the caption is not used: both give the same.
        for text in (sprites.caption(spec), sprites.caption(spec).replace(f" {word} ", " steadily ")):
            measured, error, persistence, drift = tilt.score_video(video, text)
            assert measured == pytest.approx(speed, rel=0.03)
            assert error < 2 and persistence == 1 and drift < 0.5


def test_a_video_without_the_sprite_has_no_speed():
    spec, _ = tilt.draw_pair("left", np.random.default_rng(0))
    background, _ = sprites.render_background(spec)
    video = np.repeat(background.round().astype(np.uint8), tilt.TILT_FRAMES, axis=0)
    speed, error, persistence, drift = tilt.score_video(video, sprites.caption(spec))
    assert math.isnan(speed) and math.isnan(error) and persistence == 0 and drift == 0


def test_metrics_of_a_run():
    rows = [[0.7, 10.0, 1.0, 2.0], [2.1, 20.0, 0.5, 4.0], [1.4, 30.0, 1.0, 3.0], [None, None, 0.0, 3.0]]
    assert tilt.video_metrics(rows) == pytest.approx(
        {
            "videos/speed": 4.2 / 3,
            "videos/share_fast": 2 / 3,
            "videos/share_between": 1 / 3,
            "videos/direction_error": 20.0,
            "videos/persistence": 0.625,
            "videos/background_drift": 3.0,
        }
    )
    assert tilt.video_metrics([[0.7], [2.1]]) == pytest.approx(
        {"videos/speed": 1.4, "videos/share_fast": 0.5, "videos/share_between": 0.0}
    )


# ------------------------------------------------------------------------------------------------ statistics


def lines_of(speeds: dict[str, list[list[float]]], **more) -> list[dict]:
    """Return a line for each arm and seed, from the speeds of its videos."""
    lines = []
    for arm, seeds in speeds.items():
        for seed, videos in enumerate(seeds):
            rows = [[speed, 5.0, 1.0, 2.0] for speed in videos]
            scores = {"held_out/mse_object": 0.5, "held_out/mse_background": 0.1}
            lines.append({"arm": arm, "seed": seed, "settings": {}, "scores": scores, "videos": rows} | more)
    return lines


def test_videos_are_paired_by_noise():
    lines = lines_of({"ltd": [[0.8, 2.0, None], [1.0, 1.0, 1.0]], "mse": [[0.7, 2.1, 9.0], [0.7, 0.8, 0.9]]})
    found = tilt.differences_by_seed(lines, "ltd", "mse")
    assert found[0] == pytest.approx((0.0, 0.1)) and found[1] == pytest.approx((0.2, 0.1 / math.sqrt(3)))


def test_the_gate_asks_for_two_modes_of_equal_share():
    two_modes = [[0.7] * 45 + [2.1] * 55]
    assert tilt.gate(lines_of({"mse": two_modes}))["passed"]
    assert not tilt.gate(lines_of({"mse": [[0.7] * 35 + [2.1] * 65]}))["passed"]
    one_mode = tilt.gate(lines_of({"mse": [[1.3] * 50 + [1.5] * 50]}))
    assert one_mode["share_between"] == 1 and not one_mode["passed"]
    assert tilt.gate(lines_of({"ltd": two_modes})) == {}


def test_the_words_check_is_a_difference_of_differences():
    speeds = {
        "mse": [[1.0, 1.2], [1.0, 1.4]],
        "ltd": [[1.2, 1.4], [1.3, 1.7]],
        "mse_words": [[1.0, 1.0], [1.0, 1.0]],
        "ltd_words": [[1.1, 1.1], [1.0, 1.0]],
    }
    mean, low, high = tilt.words_check(lines_of(speeds))
    half = 12.706204736 * 0.1 / 1  # t of one degree of freedom, standard error of 0.1 and 0.3
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))


@pytest.mark.parametrize(
    ("cubed", "inverse", "expected"),
    [(0.1, -0.1, True), (0.1, 0.1, False), (-0.1, -0.1, False), (0.03, -0.1, False), (0.1, -0.03, False)],
)
def test_the_verdict_needs_both_signs_beyond_the_smallest_effect(cubed, inverse, expected):
    noise = np.array([0.01, -0.01, 0.01, -0.01])  # its interval reaches 0.018 to both sides
    speeds = {
        "mse": [[1.4, 1.4]] * 4,
        "ltd_cubed": [[1.4 + cubed + value] * 2 for value in noise],
        "ltd_inverse": [[1.4 + inverse + value] * 2 for value in noise],
    }
    assert tilt.summarize(lines_of(speeds), [])["borne_out"] is expected
    one_seed = {arm: seeds[:1] for arm, seeds in speeds.items()}
    assert tilt.summarize(lines_of(one_seed), [])["borne_out"] is None


def test_the_report_follows_from_the_lines(tmp_path):
    speeds = {"mse": [[0.7, 2.1], [0.8, 2.0]], "ltd_cubed": [[0.9, 2.2], [0.9, 2.2]]}
    for line in lines_of(speeds, guided=[[2.0, 5.0, 1.0, 2.0]]):
        tilt.append(tmp_path / "runs.jsonl", line)
    for line in lines_of({"mse": [[0.7, 2.1]], "ltd_cubed": [[2.1, 2.1]]}):
        tilt.append(tmp_path / "predictions.jsonl", line)
    tilt.report(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    row = next(row for row in results["contrasts"] if row["arm"] == "ltd_cubed" and row["metric"] == "videos/speed")
    assert row["difference"][0] == pytest.approx(0.15) and row["predicted"][0] == pytest.approx(0.7)
    assert row["guided"][0] == 0 and row["p"] == row["p_holm"]  # one test only
    assert not any("p" in row for row in results["contrasts"] if row["metric"] != "videos/speed")
    table = (tmp_path / "table.md").read_text()
    assert "| ltd_cubed - mse | 2 | +0.150 (+0.150 to +0.150) | +0.700 |" in table
    assert "50.0% fast, 0.0% between the modes: passed" in table and "not decided yet" in table
    assert (tmp_path / "tilt.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no finished run"):
        tilt.report(tmp_path / "nothing")


def test_the_readmes_say_what_the_runs_say():
    """From the lines to the table, its rows in the README beside the experiment, and the figures in the first one."""
    record = ROOT / "examples/nano/tilt"
    results = tilt.summarize(tilt.read_runs(record / "runs.jsonl"), tilt.read_runs(record / "predictions.jsonl"))
    table = (record / "table.md").read_text()
    assert table == tilt.write_table(results)
    readme = (ROOT / "examples/nano/README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- tilt -->\n")[1].split("<!-- /tilt -->")[0]
    assert shown and table.startswith(shown)
    first = (ROOT / "README.md").read_text(encoding="utf-8")
    speed = results["arms"]["mse"]["measured"]["videos/speed"][0]
    background = results["arms"]["mse"]["measured"]["held_out/mse_background"][0]
    rows = {(row["arm"], row["control"], row["metric"]): row for row in results["contrasts"]}
    for arm, digits in (("ltd_inverse", 1), ("ltd", 1), ("ltd_cubed", 0)):
        row = rows[arm, "mse", "videos/speed"]
        errors = rows[arm, "mse", "held_out/mse_background"]["difference"]
        cells = [
            f"{100 * row['difference'][0] / speed:+.{digits}f} %",
            tilt.bracketed(row["difference"]),
            f"{row['predicted'][0]:+.3f}",
            f"{100 * errors[0] / background:+.1f} %",
        ]
        assert f"| {' | '.join(cells)} |" in first
    with_words = rows["ltd_words", "mse_words", "videos/speed"]["difference"][0]
    assert f"With the speed in the captions, the paper's weight adds {with_words:.3f} px a frame." in first


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds=0"], "must be at least 1"),
        (["--guided_videos=9", "--num_videos=8"], "--guided_videos must be from 0 to --num_videos, 8"),
        (["--arms", "nothing"], "invalid choice"),
    ],
)
def test_flags_are_checked(flags, message, capsys):
    with pytest.raises(SystemExit):
        tilt.parse_args(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command(tmp_path, monkeypatch):
    """A step of each kind of arm on the nano Wan; then nothing is left to do, and the report can be made again."""
    monkeypatch.setattr(tilt, "TILT_CLIPS", FEW_CLIPS)
    monkeypatch.setattr(tilt, "TILT", tilt.TILT | {"lr_warmup_steps": 0})
    monkeypatch.setattr(tilt, "SAMPLING", tilt.SAMPLING | {"num_inference_steps": 2})
    arms = ["mse", "ltd_cubed", "ltd_words", "fast_repeated"]
    line = ["--output_dir", str(tmp_path), "--steps=1", "--num_videos=4", "--guided_videos=2", "--seeds=1"]
    args = tilt.parse_args([*line, "--arms", *arms])
    tilt.main(args)
    runs = tilt.read_runs(tmp_path / "runs.jsonl")
    assert [run["arm"] for run in runs] == arms
    for run in runs:
        assert len(run["videos"]) == 4 and ("guided" in run) == (run["arm"] in tilt.GUIDED_ARMS)
        assert run["scores"]["held_out/mse_object"] > 2 * run["scores"]["held_out/mse_background"]
    assert len({run["scores"]["held_out/mse_object"] for run in runs}) == 4
    predictions = {line["arm"]: line["videos"] for line in tilt.read_runs(tmp_path / "predictions.jsonl")}
    # With speed words there is one clip a caption: the prediction is what was asked.
    assert predictions["ltd_words"] == [[tilt.SLOW], [tilt.SLOW], [tilt.FAST], [tilt.FAST]]
    assert not list(tmp_path.glob("mse-0"))
    before = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "table.md").unlink()
    tilt.main(args)
    assert (tmp_path / "runs.jsonl").read_text() == before and "ltd_cubed - mse" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="other settings"):
        tilt.main(tilt.parse_args(["--output_dir", str(tmp_path), "--steps=2"]))
