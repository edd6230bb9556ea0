"""The ablation's weights are what their names say, its statistics are right, and a run can be taken up again."""

import functools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import ablation
import numpy as np
import pytest
import sprites
import torch

import train_ltd
from ltd_loss import latent_temporal_discrepancy, ltd_weights

pytestmark = pytest.mark.slow  # runs of many arms

ROOT = Path(__file__).resolve().parents[2]

EXPLORATORY_MAPS = ["per_frame", "per_clip", "normalized", "without_gap_0", "scale_4", "scale_16", "scale_64"]
OWN = f"--train_data_dir={ROOT}"  # any folder that exists
PIXEL_MAPS = ["frame_residual", "flow", "motion_mask"]


@pytest.fixture(scope="module")
def batches():
    """Twelve clips of latents as batches of one, wilder from clip to clip, and their names."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(12, 16, 9, 6, 6, generator=generator) * torch.linspace(0.1, 0.6, 12).view(-1, 1, 1, 1, 1)
    latents = torch.randn(12, 16, 1, 6, 6, generator=generator) + steps.cumsum(dim=2)
    return [{"latents": clip[None], "name": [str(number)]} for number, clip in enumerate(latents)]


@pytest.fixture(scope="module")
def data(batches):
    """What `training_set` measures on a data set."""
    ltd = torch.cat([ltd_weights(batch["latents"]) for batch in batches])
    data = {"ltd_mean": ltd.mean().item(), "ltd_std": ltd.std().item(), "ltd_profile": ltd.mean(dim=(0, 2, 3))}
    frames = np.random.default_rng(0).integers(0, 255, (33, 48, 48, 3)).astype(np.uint8)
    maps = {str(i): ablation.pixel_maps(np.roll(frames, i, axis=1), (9, 6, 6)) for i in range(12)}
    data["maps"] = {name: {clip: maps[clip][name] for clip in maps} for name in PIXEL_MAPS}
    data["moments"] = {}
    for name in EXPLORATORY_MAPS + PIXEL_MAPS:
        values = torch.cat([ablation.raw_weights(name, batch, data) for batch in batches])
        data["moments"][name] = (values.mean().item(), values.std().item())
    return data


@pytest.fixture(scope="module")
def batch(batches):
    return {key: torch.cat([b[key] for b in batches]) for key in ("latents",)} | {
        "name": [b["name"][0] for b in batches]
    }


def test_key_arms_are_what_they_are_called(batch, data):
    ltd = ablation.raw_weights("ltd", batch, data)
    assert torch.equal(ltd, ltd_weights(batch["latents"]))
    assert torch.equal(ablation.raw_weights("mse", batch, data), torch.ones_like(ltd))
    assert ablation.raw_weights("ltd_unit_mean", batch, data).mean() == pytest.approx(1, abs=1e-5)
    other = ablation.raw_weights("other_clip", batch, data)
    assert torch.equal(other[1:], ltd[:-1]) and torch.equal(other[0], ltd[-1])
    position = ablation.raw_weights("position_only", batch, data)
    torch.testing.assert_close(position.mean(dim=(2, 3)), ltd.mean(dim=(0, 2, 3)).expand(12, 9))
    assert torch.equal(position.amax(dim=(0, 2, 3)), position.amin(dim=(0, 2, 3)))


@pytest.mark.parametrize("name", [arm for arm in ablation.ARMS if ablation.ARMS[arm].matched])
def test_exploratory_maps_have_the_mean_and_spread_of_ltd(name, batch, data):
    weights = ablation.arm_weights(batch, ablation.ARMS[name], data)
    assert weights.shape == batch["latents"][:, 0].shape and weights.min() >= 0
    if weights.min() > 0:  # nothing was clamped
        assert weights.mean() == pytest.approx(data["ltd_mean"], rel=1e-3)
        assert weights.std() == pytest.approx(data["ltd_std"], rel=1e-2)


@pytest.mark.parametrize("name", ["mse", "ltd"])
def test_the_scripts_own_weights_give_its_own_loss(name, batch, data):
    """Loss and gradient are those of `train_ltd.compute_loss`."""
    generator = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(2, *batch["latents"].shape, generator=generator)
    args = train_ltd.parse_args([f"--train_data_dir={ROOT}", f"--loss={name}"])
    losses, gradients = [], []
    for compute_loss in (
        train_ltd.compute_loss,
        functools.partial(ablation.arm_loss, arm=ablation.ARMS[name], data=data),
    ):
        leaf = prediction.clone().requires_grad_()
        loss = compute_loss(leaf, target, batch, args)
        loss.backward()
        losses.append(loss.item())
        gradients.append(leaf.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.equal(*gradients)


def test_the_loss_is_the_arms_weights_times_the_squared_error(batch, data):
    prediction, target = torch.randn(2, *batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    arm = ablation.ARMS["motion_mask"]
    loss = ablation.arm_loss(prediction, target, batch, None, arm=arm, data=data)
    error = (prediction - target).square().mean(dim=1)
    wanted = (ablation.arm_weights(batch, arm, data) * error).mean()
    assert loss.shape == () and loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_maps_without_space_or_time(batch, data):
    per_frame = ablation.raw_weights("per_frame", batch, data)
    assert torch.equal(per_frame[..., 0, 0], per_frame[..., -1, -1])
    per_clip = ablation.raw_weights("per_clip", batch, data)
    assert torch.equal(per_clip[:, 0], per_clip[:, -1]) and not torch.equal(per_clip[0], per_clip[-1])


def test_without_gap_0_ignores_the_first_frame(batch, data):
    changed = batch["latents"].clone()
    changed[:, :, 0] += 10
    before = ablation.raw_weights("without_gap_0", batch, data)
    assert torch.equal(before, ablation.raw_weights("without_gap_0", batch | {"latents": changed}, data))


def test_unknown_weights_are_refused(batch, data):
    with pytest.raises(ValueError, match="no_such"):
        ablation.raw_weights("no_such", batch, data)


def test_pixel_maps_lie_where_the_object_moves():
    for index in range(100):
        spec = sprites.clip_spec("dynamic", 0, "heldout", index)
        if len(spec.sprites) == 1 and spec.sprites[0].speed == "quickly" and not spec.pan:
            break
    video, truth = sprites.render_clip(spec)
    objects = ablation.latent_mask(truth["mask"] > 0, (9, 12, 12))
    for name, value in ablation.pixel_maps(video, (9, 12, 12)).items():
        assert value.shape == (9, 12, 12)
        value = value - value.min()  # MotiF adds 1 everywhere
        assert value[objects].mean() > 3 * value[~objects].mean(), name


def test_latent_mask_keeps_the_first_frame_apart():
    mask = np.zeros((5, 16, 16), bool)
    mask[0, :8, :8] = True  # one picture, one latent frame
    mask[1:3, 8:, 8:] = True  # half of the four pictures of the second
    expected = torch.zeros(2, 2, 2, dtype=torch.bool)
    expected[0, 0, 0] = expected[1, 1, 1] = True
    assert torch.equal(ablation.latent_mask(mask, (2, 2, 2)), expected)


# ------------------------------------------------------------------------------------------------ statistics


def test_holm_on_a_worked_example():
    # 0.01 * 4; max(0.03 * 3, .); max(0.03 * 3, 0.04 * 2); 0.05 stays behind
    assert ablation.holm([0.04, 0.01, 0.03, 0.05]) == pytest.approx([0.09, 0.04, 0.09, 0.09])
    assert ablation.holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = ablation.holm([0.02, math.nan, 0.01])  # no test is no chance to err
    assert corrected[::2] == pytest.approx([0.02, 0.02]) and math.isnan(corrected[1])


def runs_of(values: dict[str, list[float]]) -> list[dict]:
    return [
        {"arm": arm, "seed": seed, "settings": {}, "scores": {"held_out/mse_object": value}}
        for arm, column in values.items()
        for seed, value in enumerate(column)
    ]


def test_contrast_is_paired_by_seed():
    mse, gain = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.1, 0.2, 0.1, 0.2])
    runs = runs_of({"ltd": list(mse - gain), "mse": list(mse)})[::-1]
    row = ablation.contrast(runs, "ltd", "mse", "held_out/mse_object")
    half = 3.182446305284263 * gain.std(ddof=1) / 2  # t of 3 degrees of freedom at 97.5 %
    assert row["seeds"] == 4
    assert row["difference"] == pytest.approx([-0.15, -0.15 - half, -0.15 + half])
    assert row["relative"][0] == pytest.approx(-0.15 / 2.5)
    assert row["p"] == pytest.approx(0.0138, abs=2e-4)


def test_contrast_without_seeds_in_common_says_nothing():
    runs = [run for run in runs_of({"ltd": [1, 2], "mse": [1, 2]}) if (run["arm"] == "ltd") == (run["seed"] == 0)]
    row = ablation.contrast(runs, "ltd", "mse", "held_out/mse_object")
    assert row["seeds"] == 0 and math.isnan(row["p"])


def test_a_missing_value_leaves_its_pair_out():
    runs = runs_of({"ltd": [1.0, 2.0, 3.0], "mse": [1.5, 2.2, None]})
    row = ablation.contrast(runs, "ltd", "mse", "held_out/mse_object")
    assert row["seeds"] == 2 and row["difference"][0] == pytest.approx(-0.35)


def test_the_table_shows_what_results_hold(tmp_path):
    values = {"mse": [1.0, 1.1, 1.2], "ltd": [0.9, 1.05, 1.0], "other_clip": [1, 1, 1], "position_only": [1, 1, 2]}
    results = ablation.summarize(runs_of(values))
    assert [row["control"] for row in results["primary_contrasts"]] == ["mse", "other_clip", "position_only"]
    table = ablation.write_table(results)
    for row in results["primary_contrasts"]:
        assert f"| {row['arm']} - {row['control']} | {row['metric']} | 3 | {row['difference'][0]:+.4f}" in table
    assert "| held_out/mse_object | 1.1000 ± 0.2484 |" in table
    ablation.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_contrasts_at_other_rates_stand_beside(tmp_path):
    names = ("mse", "ltd", "other_clip", "position_only")
    arms = [arm + rate for rate in ("", *ablation.OTHER_RATES) for arm in names]
    results = ablation.summarize(runs_of({arm: [1.0 + i, 2.0 - 0.1 * i] for i, arm in enumerate(arms)}))
    table = ablation.write_table(results)
    for rate in ablation.OTHER_RATES:
        for control in ("mse", "other_clip", "position_only"):
            assert f"| ltd{rate} - {control}{rate} | held_out/mse_object | 2 |" in table
    assert ("ltd", "other_clip") in {(row["arm"], row["control"]) for row in results["differences"]}
    assert not any("p" in row for row in results["differences"])
    assert len(results["primary_contrasts"]) == 3  # other rates are no further chances


def test_a_line_that_a_crash_cut_short_does_not_count(tmp_path):
    first, second = runs_of({"mse": [1.0, 2.0]})
    path = tmp_path / "runs.jsonl"
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)[:20]}\n{json.dumps(second)}\n{json.dumps(first)}\n")
    assert ablation.read_runs(path) == [first, second]


def test_results_are_json_that_others_can_read():
    results = ablation.without_nan(ablation.summarize(runs_of({"mse": [1.0], "ltd": [2.0]})))
    assert json.loads(json.dumps(results, allow_nan=False))["means"]["ltd"]["held_out/mse_object"] == [2.0, None, None]


# ------------------------------------------------------------------------------------------------ runs


def test_arms_by_group_and_by_name():
    args = ablation.parse_args(["--arms", "key", "scale_16", "--learning_rate=1e-3"])
    assert args.arms == [
        "base",
        "vae_round_trip",
        "mse",
        "ltd",
        "ltd_unit_mean",
        "other_clip",
        "position_only",
        "scale_16",
    ]
    assert args.passed == ["--learning_rate=1e-3"] and not args.own_data
    with pytest.raises(SystemExit):
        ablation.parse_args(["--arms", "nothing"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds=0"], "--seeds and --steps must be at least 1"),
        (["--seed=42"], "--seed=42: this script sets it"),
        (["--max_train_steps", "9"], "--max_train_steps: this script sets it"),
        ([OWN], "own data need --validation_fraction"),
        ([OWN, "--validation_fraction=0.1", "--arms", "other_clip"], "--train_batch_size"),
        ([OWN, "--validation_fraction=0.1", "--arms", "flow"], "only for the nano Wan's clips"),
        (["--train_data_dir=x"], "--train_data_dir x does not exist"),
        (["--drop_cuts"], "--drop_cuts is gone"),
        (["--config=none.yaml"], "--config none.yaml is not a file"),
        (["--transformer_path=x"], "--transformer_path: not supported here"),
        (["--ltd_scale=4"], "--ltd_scale: the arms set LTD's form"),
        (["--learning_rat=1"], "there is no flag --learning_rat; the nearest is --learning_rate"),
    ],
)
def test_flags_are_checked_before_anything_runs(flags, message, capsys):
    with pytest.raises(SystemExit):
        ablation.parse_args(flags)
    assert message in capsys.readouterr().err


def test_data_in_a_recipe_are_own_data(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train_data_dir: {tmp_path}\nvalidation_fraction: 0.1\n")
    args = ablation.parse_args(["--config", str(recipe), "--arms", "mse"])
    assert args.own_data and args.passed == [f"--config={recipe}"] and args.recipe == recipe.read_text()


def test_a_run_cannot_be_bent_by_other_flags(tmp_path):
    args = ablation.parse_args(["--max_grad_norm=5", f"--output_dir={tmp_path}"])
    line = ablation.run_flags(args, ablation.ARMS["ltd_no_clipping"], 3, tmp_path / "run")
    assert line.index("--max_grad_norm=5") < line.index("--max_grad_norm=0") and "--loss=ltd" in line


@pytest.fixture
def small_ablation(tiny_wan, clips, tmp_path):
    """Command line of an ablation of a tiny model on real clips, as users have them."""
    flags = {"pretrained_model_name_or_path": tiny_wan, "train_data_dir": clips, "validation_fraction": 0.3}
    flags |= {"height": 32, "width": 48, "num_frames": 9, "rank": 4, "learning_rate": 1e-2, "train_batch_size": 2}
    line = [f"--{key}={value}" for key, value in flags.items()]
    return ["--output_dir", str(tmp_path / "out"), "--steps", "1", "--num_videos", "2", *line]


def test_own_model_and_data(small_ablation, tmp_path):
    small_ablation = [*small_ablation, "--steps=2"]  # after one of Adam's, all weights may differ by their signs alone
    pytest.importorskip("cv2", reason="the DIS dynamic degree needs opencv-python-headless")
    ablation.main(ablation.parse_args([*small_ablation, "--arms", "base", "mse", "ltd", "scale_16", "--seeds", "1"]))
    runs = ablation.read_runs(tmp_path / "out" / "runs.jsonl")
    assert [run["arm"] for run in runs] == ["base", "mse", "ltd", "scale_16"]
    scores = {run["arm"]: run["scores"] for run in runs}
    assert all(np.isfinite(scores[arm]["held_out/mse"]) for arm in scores)
    assert len({scores[arm]["held_out/mse"] for arm in scores}) == 4  # one weight, one result
    assert "videos/temporal_flickering" in scores["ltd"] and "held_out/mse_object" not in scores["ltd"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["means"]["ltd"]["held_out/mse"][0] == scores["ltd"]["held_out/mse"]

    # The same command does nothing again; one seed more adds its runs only.
    before = (tmp_path / "out" / "runs.jsonl").read_text()
    ablation.main(ablation.parse_args([*small_ablation, "--arms", "base", "--seeds", "2"]))
    assert (tmp_path / "out" / "runs.jsonl").read_text().startswith(before)
    assert len(ablation.read_runs(tmp_path / "out" / "runs.jsonl")) == 5
    with pytest.raises(ValueError, match="other settings"):
        ablation.main(ablation.parse_args([*small_ablation, "--arms", "base", "--rank=8"]))


@torch.no_grad()
def test_held_out_errors_are_means_over_clips(flags, clips, tmp_path):
    """By hand: averaged over sigmas, then over the voxels of each kind, then over the clips that have any."""
    folder = shutil.copytree(clips, tmp_path / "clips")
    for number in range(7):
        mask = np.zeros((9, 32, 48), np.uint8)
        mask[:, : 8 * (number % 4), :16] = 1  # in some clips nothing
        np.savez(folder / f"{number}.npz", mask=mask)
    run_args = train_ltd.parse_args(flags(train_data_dir=folder, validation_fraction=0.6, max_eval_clips=1))
    wan, accelerator = train_ltd.identify_wan(run_args), train_ltd.build_accelerator(run_args)
    data = ablation.training_set(run_args, accelerator, set())
    model = ablation.load_model("base", wan, run_args, accelerator.device)
    scores = ablation.held_out_errors(wan, model, data, accelerator, run_args, SimpleNamespace(own_data=False))

    held_out = data["held_out"]
    static_bound, motion_bound = data["clips"].motion_bounds(accelerator.device)
    rows, profiles = [], []
    for index, clip in enumerate(held_out.clips):
        batch = {name: tensor[None] for name, tensor in held_out.load_fixed(index).items()}
        errors = []
        for sigma in train_ltd.EVAL_SIGMAS:
            noisy = (1 - sigma) * batch["latents"] + sigma * batch["noise"]
            flow = train_ltd.predict_flow(wan, model, noisy, batch | {"sigmas": torch.tensor([sigma])})
            errors.append((flow - batch["noise"] + batch["latents"]).square().mean(dim=1)[0])
        error = torch.stack(errors).mean(dim=0)
        ltd = latent_temporal_discrepancy(batch["latents"])[0]
        objects = ablation.latent_mask(np.load(folder / f"{clip.name[0]}.npz")["mask"] > 0, error.shape)
        masks = {"mse_motion": ltd > motion_bound, "mse_static": ltd < static_bound, "mse_object": objects}
        masks |= {"mse": torch.ones_like(objects), "mse_background": ~objects}
        rows.append({name: error[mask].mean().item() for name, mask in masks.items()})
        profiles.append(error.mean(dim=(1, 2)))
    assert np.isnan([row["mse_object"] for row in rows]).any() and not np.isnan(scores["held_out/mse_object"])
    for name in rows[0]:
        assert scores[f"held_out/{name}"] == pytest.approx(np.nanmean([row[name] for row in rows]), rel=1e-4), name
    profile = torch.stack(profiles).mean(dim=0)
    assert scores["frames/peak_over_mean"] == pytest.approx((profile.max() / profile.mean()).item(), rel=1e-4)
    assert scores["training/variance_over_clips"] > 0


def test_the_nano_wan_and_its_ground_truth(tmp_path, monkeypatch):
    """One step each on twelve clips: errors under the true masks, scores against captions, the ceiling, all rates."""
    rates, train = [], train_ltd.main

    def spy(args, compute_loss):
        rates.append(args.learning_rate)
        train(args, compute_loss=compute_loss)

    monkeypatch.setattr(train_ltd, "main", spy)
    monkeypatch.setattr(ablation, "NANO_CLIPS", ablation.NANO_CLIPS | {"count": 12})
    monkeypatch.setattr(ablation, "NANO_SAMPLING", ablation.NANO_SAMPLING | {"num_inference_steps": 2})
    arms = ["base", "vae_round_trip", "ltd", "motion_mask", "ltd_half_rate", "ltd_lora"]
    line = ["--output_dir", str(tmp_path), "--steps", "1", "--num_videos", "2", "--seeds", "1", "--arms", *arms]
    line += ["--lr_warmup_steps=0"]
    ablation.main(ablation.parse_args(line))
    scores = {run["arm"]: run["scores"] for run in ablation.read_runs(tmp_path / "runs.jsonl")}
    assert list(scores) == arms
    rate = ablation.NANO["learning_rate"]
    assert rates == pytest.approx([rate, rate, rate / 2, 5 * rate])
    errors = {arm: scores[arm].get("held_out/mse_object") for arm in arms}
    assert errors.pop("vae_round_trip") is None and len(set(errors.values())) == 5
    # The objects are what moves: their error is several times that of the rest, and the mean lies between the two.
    base = scores["base"]
    assert base["held_out/mse_object"] > 2 * base["held_out/mse_background"]
    assert base["held_out/mse_background"] < base["held_out/mse"] < base["held_out/mse_object"]
    ceiling = scores["vae_round_trip"]
    assert ceiling["videos/direction_error"] < 15 and ceiling["calm/color_right"] > 0.9
    before = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "table.md").unlink()
    ablation.main(ablation.parse_args(["--report_only", *line]))
    assert (tmp_path / "runs.jsonl").read_text() == before and "vae_round_trip" in (tmp_path / "table.md").read_text()


def test_equal_seeds_see_equal_noise_whatever_the_weight(small_ablation, tmp_path):
    """Arm `mse` is the script's own --loss mse, to the bit."""
    args = ablation.parse_args([*small_ablation, "--arms", "mse", "--seeds", "1", "--keep_weights"])
    ablation.main(args)
    ours = train_ltd.load_file(tmp_path / "out" / "mse-0" / train_ltd.LORA_FILE)
    folders = [f"--output_dir={tmp_path / 'plain'}", f"--cache_dir={tmp_path / 'out' / 'cache'}"]
    line = [*args.passed, *folders, "--loss=mse"]
    train_ltd.main(train_ltd.parse_args([*line, "--max_train_steps=1", "--seed=0", "--report_to=none"]))
    theirs = train_ltd.load_file(tmp_path / "plain" / train_ltd.LORA_FILE)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ------------------------------------------------------------------------------------------------ what is reported


def table_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|") and "---" not in line]


def assert_close(a, b) -> None:
    """Nested dictionaries and lists, floats to rounding."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, dict | list):
        for x, y in zip(*((v.values() if isinstance(v, dict) else v) for v in (a, b)), strict=True):
            assert_close(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-9, abs=1e-12) if isinstance(b, float) else b)


def test_the_readme_says_what_the_runs_say():
    """From the runs to `results.json`, the table, and the rows of it in the README."""
    folder = ROOT / "examples" / "nano" / "ablation"
    results = ablation.summarize(ablation.read_runs(folder / "runs.jsonl"))
    kept = json.loads((folder / "results.json").read_text())
    assert_close(kept, ablation.without_nan(results))
    table = table_rows(ablation.write_table(results))
    assert table_rows((folder / "table.md").read_text()) == table
    readme = (ROOT / "examples/nano/README.md").read_text(encoding="utf-8")
    shown = table_rows(readme.split("<!-- ablation -->")[1].split("<!-- /ablation -->")[0])
    assert shown and set(shown) <= set(table)
    for number in range(1 + len(results["primary_contrasts"])):  # all of them, whatever they say
        assert table[number] in shown
    mean, low, high = (-100 * value for value in results["primary_contrasts"][0]["relative"])
    said = f"{mean:.2f} % lower than with plain MSE (95 % CI {high:.2f} to {low:.2f} %"
    assert said in " ".join(readme.split()) and not re.search("@[A-Z]+@", readme)


def test_the_record_of_an_earlier_version_can_be_reported(tmp_path):
    """By `examples/nano/figures.sh`; but no run of today is added to it."""
    record = ROOT / "examples/nano/ablation"
    shutil.copy(record / "runs.jsonl", tmp_path)
    ablation.main(ablation.parse_args([f"--output_dir={tmp_path}", "--report_only"]))
    assert_close(
        json.loads((tmp_path / "results.json").read_text()), json.loads((record / "results.json").read_text())
    )
    with pytest.raises(ValueError, match="other settings"):
        ablation.main(ablation.parse_args([f"--output_dir={tmp_path}"]))
