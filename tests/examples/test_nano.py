"""The sprite videos say the truth about themselves, and the motion metrics notice every way of departing from it."""

import contextlib
import json
from pathlib import Path

import motion_metrics as metrics
import numpy as np
import pytest
import sprites
import torch
import train_vae
from videos import read_video

pytestmark = pytest.mark.slow  # a model is trained and generates

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clips():
    """Eight held-out clips with one sprite, nothing occluded: `(spec, video, truth, caption)`."""
    specs = (sprites.clip_spec("dynamic", 0, "heldout", index) for index in range(100))
    chosen = [spec for spec in specs if len(spec.sprites) == 1 and spec.sprites[0].speed in ("steadily", "quickly")]
    return [(spec, *sprites.render_clip(spec), sprites.caption(spec)) for spec in chosen[:8]]


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share out, and two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scores(clips):
    return metrics.mean_scores([metrics.measure(video, text) for _, video, _, text in clips])


def changed(clips, change):
    """Mean scores of the clips after `change(video)`, against their captions."""
    return metrics.mean_scores([metrics.measure(change(video), text) for _, video, _, text in clips])


def find_clip(mix, wanted):
    """The first clip with one sprite for which `wanted(sprite)` holds: `(spec, video, truth)`."""
    for index in range(1000):
        spec = sprites.clip_spec(mix, 3, "heldout", index)
        if len(spec.sprites) == 1 and wanted(spec.sprites[0]):
            return spec, *sprites.render_clip(spec)
    raise AssertionError("no such clip")


# ------------------------------------------------------------------------------------------------ sprites


@pytest.mark.parametrize("mix", ["calm", "dynamic"])
def test_captions_can_be_read_back(mix):
    seen = set()
    for index in range(400):
        spec = sprites.clip_spec(mix, 0, "train", index)
        text = sprites.caption(spec)
        assert sprites.parse_caption(text) == sprites.caption_words(spec)
        seen |= set(text.replace(",", "").split())
    # Every word occurs in both mixes, so that fine-tuning meets none for the first time.
    for words in (sprites.SHAPES, sprites.COLORS, sprites.SIZES, sprites.SPEEDS, sprites.BACKGROUNDS):
        assert set(words) <= seen
    for phrases in (sprites.PATHS, sprites.DYNAMICS, sprites.PATTERNS):
        assert {word for phrase in phrases for word in phrase.split()} <= seen


def test_a_caption_says_it_all():
    text = "a large red circle moves quickly to the left over a blue gradient"
    words = sprites.parse_caption(text)
    sprite = metrics.asked_sprite(words["sprites"][0])
    assert sprite.velocity == (-sprites.SPEEDS["quickly"], 0)
    clip = sprites.Clip((sprite,), "blue", "gradient", "", ((0.03, 0.0, 0.0),))
    assert sprites.caption(clip) == text


def test_not_a_caption_is_an_error():
    with pytest.raises(ValueError, match="not a sprite caption"):
        sprites.parse_caption("a corgi on a surfboard")


def test_clips_follow_from_their_seed():
    first, again = (sprites.render_clip(sprites.clip_spec("dynamic", 5, "train", 7))[0] for _ in range(2))
    other = sprites.render_clip(sprites.clip_spec("dynamic", 5, "heldout", 7))[0]
    assert first.shape == (33, 96, 96, 3) and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any()


def test_truth_agrees_with_itself():
    for index in range(40):
        _, truth = sprites.render_clip(sprites.clip_spec("dynamic", 0, "train", index))
        # A bounce turns the velocity within a frame; elsewhere the central difference is the velocity.
        difference = (truth["position"][:, 2:] - truth["position"][:, :-2]) / 2
        off = np.abs(difference - truth["velocity"][:, 1:-1]).max(axis=-1) > 0.05
        assert off.sum(axis=1).max() <= 4
        # The centre never leaves the screen.
        assert truth["position"].min() > 0 and truth["position"].max() < sprites.SIZE


@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_size_means_the_same_area_for_every_shape(shape):
    alpha = sprites.coverage(shape, np.array([[48.0, 48.0]]), np.array([17.0]), np.array([0.4]))
    assert alpha.sum() == pytest.approx(np.pi * 17**2, rel=0.02)


def test_mask_covers_the_sprite():
    spec, video, truth = find_clip("calm", lambda sprite: sprite.dynamics == "" and sprite.shape == "square")
    solid = truth["mask"][0] == 1
    color = sprites.COLORS[spec.sprites[0].color]
    assert np.abs(np.median(video[0][solid], axis=0) - color).max() <= 1
    assert solid.sum() == pytest.approx(np.pi * truth["radius"][0, 0] ** 2, rel=0.05)


def test_dataset_is_a_videofolder(tmp_path):
    sprites.write_dataset(tmp_path, "dynamic", 3, seed=1)
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset("videofolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "c"))
    data = data.cast_column("video", datasets.Video(decode=False))
    assert len(data) == 3
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    for line, row in zip(lines, data, strict=True):
        assert row["text"] == line["text"]
        sprites.parse_caption(line["text"])
    index = 0
    video, truth = sprites.render_clip(sprites.clip_spec("dynamic", 1, "train", index))
    read = read_video(tmp_path / lines[index]["file_name"])
    assert read.shape == video.shape
    assert np.abs(read.astype(float) - video).mean() < 2.5
    with np.load((tmp_path / lines[index]["file_name"]).with_suffix(".npz")) as saved:
        assert (saved["mask"] == truth["mask"]).all()
        assert np.allclose(saved["position"], truth["position"])


@pytest.fixture(scope="module")
def orbits():
    """Eight clips of the mix that the quickstart teaches: `(spec, video, truth, caption)`."""
    specs = [sprites.clip_spec("orbit", 0, "train", index) for index in range(8)]
    return [(spec, *sprites.render_clip(spec), sprites.caption(spec)) for spec in specs]


def test_an_orbit_goes_once_around_the_middle_and_comes_back(orbits):
    starts = set()
    senses = []
    for spec, _, truth, text in orbits:
        (position,) = truth["position"] - sprites.SIZE / 2
        assert np.hypot(*position.T) == pytest.approx(sprites.ORBIT_RADIUS, abs=1e-3)
        starts.add(round(float(np.degrees(np.arctan2(*position[0])))))
        x, y = position[0]
        clockwise = position[8] == pytest.approx((-y, x), abs=1e-3)  # a quarter; on the screen, where y points down
        assert clockwise or position[8] == pytest.approx((y, -x), abs=1e-3)
        senses.append(clockwise)
        assert position[16] == pytest.approx((-x, -y), abs=1e-3)
        assert position[-1] == pytest.approx(position[0], abs=1e-3)
        assert spec.sprites[0].radius + np.abs(position).max() < sprites.SIZE / 2  # all of it stays on the screen
        difference = (position[2:] - position[:-2]) / 2
        assert np.abs(difference - truth["velocity"][0, 1:-1]).max() < 0.05
        assert text.startswith("orbit, a ") and sprites.parse_caption(text) == sprites.caption_words(spec)
    assert len(starts) == len(orbits) and set(senses) == {True, False}
    with pytest.raises(ValueError, match="not a sprite caption"):
        sprites.parse_caption("orbit, a large red circle moves quickly to the left over a blue gradient")


# ------------------------------------------------------------------------------------------------ metrics


def test_degrees_turned(orbits, clips):
    def turned(change):
        return changed(orbits, change)["degrees_turned"]

    assert turned(lambda video: video) == pytest.approx(360, abs=3)
    assert turned(lambda video: video[::-1]) == pytest.approx(360, abs=3)
    assert turned(lambda video: np.concatenate([video[:17], video[16::-1]])) == pytest.approx(0, abs=3)  # and back
    assert turned(lambda video: video[:17]) == pytest.approx(180, abs=3)
    assert turned(lambda video: np.repeat(video[:1], 33, axis=0)) == 0
    assert turned(np.zeros_like) == 0  # nothing to be seen
    whole = changed(orbits, lambda video: video)
    assert whole["speed_error"] < 0.1 and np.isnan(whole["trajectory_error"])  # of a way round that is not asked
    _, video, truth, text = orbits[0]
    assert metrics.measure(video, text, truth)["trajectory_error"] < 1
    _, video, _, text = clips[0]
    assert np.isnan(metrics.measure(video, text)["degrees_turned"])  # not asked


def test_the_quickstart_says_its_numbers_in_words(orbits):
    import degrees_turned

    prompts = [text for *_, text in orbits]
    before = degrees_turned.degrees_of([np.repeat(video[:1], 33, axis=0) for _, video, _, _ in orbits], prompts)
    after = degrees_turned.degrees_of([video for _, video, _, _ in orbits], prompts)
    first, second, third = degrees_turned.in_words(before, after, 150, {0: 0.28, 50: 0.2, 150: 0.17})
    assert "360 degrees, the sprites of 8 videos turned by 0 degrees on average" in first
    assert second == "After 150 steps, from the same noise: by 360 degrees."
    assert third == "The error on clips that training never saw went from 0.280 to 0.170."


def test_before_and_after_start_from_the_same_noise(tmp_path, capsys, monkeypatch):
    """With a LoRA that does nothing both videos are the same, and the gallery finds them with their prompts."""
    import degrees_turned
    import gallery
    from diffusers import WanPipeline

    monkeypatch.setattr(WanPipeline, "load_lora_weights", lambda pipeline, folder: None)
    with pytest.raises(SystemExit, match=r"training_settings\.json is missing"):
        degrees_turned.main(degrees_turned.parse_args([str(ROOT / "examples/nano/wan-nano"), str(tmp_path)]))
    (tmp_path / "training_settings.json").write_text(json.dumps({"max_train_steps": 150}))
    rows = [{"step": 0, "val/mse": 0.28}, {"step": 150, "val/mse": 0.17}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [str(ROOT / "examples/nano/wan-nano"), str(tmp_path), "--count", "2", "--num_inference_steps", "2"]
    degrees_turned.main(degrees_turned.parse_args(words))
    assert capsys.readouterr().out.splitlines()[1].startswith("After 150 steps")
    samples = gallery.find_samples(tmp_path / "measured")
    assert samples.videos.keys() == {"0", "1"}
    for number, steps in samples.videos.items():
        assert np.array_equal(read_video(steps[0]), read_video(steps[150]))
        assert gallery.prompt_of(number, samples.settings["validation_prompt"], {}).startswith("orbit, a ")
    assert "Measured: each with noise of its own" in gallery.build_samples_page(tmp_path).read_text()


def test_true_videos_score_near_perfect(scores):
    assert scores["persistence"] > 0.99
    assert scores["color_right"] > 0.98
    assert scores["shape_right"] > 0.95
    assert scores["background_right"] == 1
    assert scores["direction_error"] < 3
    assert scores["speed_error"] < 0.12  # the caption's word leaves 10 % open
    assert scores["trajectory_error"] < 1.5
    assert scores["size_drift"] < 0.05
    assert scores["background_drift"] < 0.5


def test_truth_is_a_sharper_reference_than_the_caption(clips):
    exact = metrics.mean_scores([metrics.measure(video, text, truth) for _, video, truth, text in clips])
    assert exact["speed_error"] < 0.05
    assert exact["trajectory_error"] < 0.8


def test_frozen_video_has_no_motion(clips, scores):
    frozen = changed(clips, lambda video: np.repeat(video[:1], len(video), axis=0))
    assert frozen["speed_error"] > 0.95
    assert frozen["direction_error"] == pytest.approx(90)
    assert frozen["temporal_flickering"] == 1 > scores["temporal_flickering"]


def test_reversed_video_goes_the_wrong_way(clips, scores):
    backwards = changed(clips, lambda video: video[::-1])
    assert backwards["direction_error"] > 120
    # At the right speed, and looking right.
    assert backwards["speed_error"] < scores["speed_error"] + 0.1
    assert backwards["shape_right"] > 0.9


def test_shuffled_video_has_no_trajectory(clips, scores):
    order = np.random.default_rng(0).permutation(33)
    shuffled = changed(clips, lambda video: video[order])
    assert shuffled["speed_error"] > scores["speed_error"] + 1
    assert shuffled["trajectory_error"] > scores["trajectory_error"] + 8
    assert shuffled["temporal_flickering"] < scores["temporal_flickering"]
    assert shuffled["persistence"] > 0.9


def test_noisy_video_flickers_and_drifts(clips, scores):
    rng = np.random.default_rng(0)
    noisy = changed(clips, lambda video: np.clip(video + rng.normal(0, 12, video.shape), 0, 255).astype(np.uint8))
    assert noisy["temporal_flickering"] < scores["temporal_flickering"] - 0.03
    assert noisy["background_drift"] > scores["background_drift"] + 5
    # The object is still found where it is.
    assert noisy["direction_error"] < 15


def test_missing_object_and_wrong_color(clips, scores):
    gone = changed(clips, lambda video: np.concatenate([video[:12], np.zeros_like(video[12:])]))
    assert gone["persistence"] < 0.5
    swapped = changed(clips, lambda video: video[..., [2, 0, 1]])
    assert swapped["color_right"] < 0.3


@pytest.mark.parametrize("dynamics", sprites.DYNAMICS)
def test_modulation_is_measured(dynamics):
    spec, video, _ = find_clip("dynamic", lambda sprite: sprite.dynamics == dynamics and sprite.path != "bouncing")
    text = sprites.caption(spec)
    right = metrics.measure(video, text)
    assert right["modulation_amplitude"] == pytest.approx(1, abs=0.2)
    if dynamics in metrics.AMPLITUDES:
        assert right["modulation_period_error"] < 0.15
    else:
        frozen = metrics.measure(np.repeat(video[16:17], 33, axis=0), text)
        assert abs(frozen["modulation_amplitude"]) < 0.1
    if dynamics in metrics.AMPLITUDES:
        frozen = metrics.measure(np.repeat(video[16:17], 33, axis=0), text)
        assert frozen["modulation_amplitude"] < 0.1


def test_camera_pan_is_not_drift():
    for index in range(1000):
        spec = sprites.clip_spec("dynamic", 4, "heldout", index)
        if spec.pan and len(spec.sprites) == 1 and spec.pattern == "clouds" and not spec.sprites[0].dynamics:
            break
    video, _ = sprites.render_clip(spec)
    assert metrics.measure(video, sprites.caption(spec))["background_drift"] < 1
    still = np.repeat(video[:1], 33, axis=0)
    assert metrics.measure(still, sprites.caption(spec))["background_drift"] > 3


def test_temporal_flickering_by_hand():
    video = np.zeros((3, 2, 2, 3), np.uint8)
    video[1] = 51  # two changes of 51 out of 255
    assert metrics.temporal_flickering(video) == pytest.approx(0.8)


def test_dis_dynamic_degree(clips):
    pytest.importorskip("cv2")
    fast = next(
        video for spec, video, _, _ in clips if spec.sprites[0].speed == "quickly" and spec.sprites[0].path == ""
    )
    assert metrics.dis_dynamic_degree(fast) == 1
    assert metrics.dis_dynamic_degree(np.repeat(fast[:1], 33, axis=0)) == 0


# ------------------------------------------------------------------------------------------------ VAE


def test_two_chunks_are_the_stock_vae():
    torch.manual_seed(0)
    vae = train_vae.build_vae(train_vae.parse_args(["--base_dim", "4", "--dim_mult", "1", "2", "2"]))
    for parameter in vae.parameters():
        if parameter.count_nonzero() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    video = train_vae.render_batch(0, "train", 0, 1, num_frames=13)[..., :32, :32]
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        assert latents.shape == (1, 16, 4, 4, 4)
        assert torch.allclose(train_vae.encode_moments(vae, video)[0], latents, atol=1e-5)
        restored = train_vae.decode_unclamped(vae, latents)
        assert torch.allclose(restored.clamp(-1, 1), vae.decode(latents).sample, atol=1e-5)


def test_vae_training_resumes_exactly(tmp_path, monkeypatch):
    for name in ("EVALUATION_CLIPS", "FINAL_CLIPS", "STATISTICS_CLIPS", "QUICK_STATISTICS_CLIPS"):
        monkeypatch.setattr(train_vae, name, 1)
    small = ["--base_dim", "4", "--dim_mult", "1", "2", "2", "--short_steps", "3",
             "--lr_warmup_steps", "1", "--mixed_precision", "no", "--checkpointing_steps", "2",
             "--evaluation_steps", "100"]  # fmt: skip
    learning_rate = train_vae.learning_rate

    def killed_at_step_3(step, args):
        if step == 3:
            raise KeyboardInterrupt
        return learning_rate(step, args)

    for run, attempts in {"once": [learning_rate], "twice": [killed_at_step_3, learning_rate]}.items():
        folders = ["--output_dir", str(tmp_path / run / "vae"), "--checkpoint_dir", str(tmp_path / run)]
        for attempt in attempts:
            monkeypatch.setattr(train_vae, "learning_rate", attempt)
            with pytest.raises(KeyboardInterrupt) if attempt is killed_at_step_3 else contextlib.nullcontext():
                train_vae.main(train_vae.parse_args([*small, "--steps", "4", *folders]))
    once, twice = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("once", "twice"))
    assert once["step"] == twice["step"] == 4
    for key, value in once["vae"].items():
        assert torch.equal(value, twice["vae"][key])
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(tmp_path / "once" / "vae")
    assert vae.dtype == torch.float32 and all(std > 0 for std in vae.config.latents_std)


def test_shipped_vae_restores_clips():
    from diffusers import AutoencoderKLWan

    folder = ROOT / "examples" / "nano" / "wan-nano" / "vae"
    vae = AutoencoderKLWan.from_pretrained(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    psnr = train_vae.held_out_psnr(vae, 2)
    assert min(psnr.values()) > 25
    # Normalised latents are about standard normal, as the diffusion model expects them.
    mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = vae.encode(train_vae.render_batch(0, "heldout", 0, 2)).latent_dist.mode()
    normalised = (latents - mean) / std
    assert normalised.mean().abs() < 0.2 and 0.7 < normalised.std() < 1.3


# ------------------------------------------------------------------------------------------------ the shipped model


@pytest.fixture(scope="module")
def generated():
    """Scores of eight videos that the shipped pipeline makes for calm captions of one moving sprite."""
    import score_model
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(ROOT / "examples/nano/wan-nano")
    specs = [s for s in score_model.held_out_specs("calm", 40, single_sprite=True) if s.sprites[0].speed != "still"]
    prompts = [sprites.caption(spec) for spec in specs[:8]]
    videos = score_model.generate(pipeline, prompts, list(range(8)), **score_model.NANO_SAMPLING)
    return metrics.mean_scores([score_model.score(*pair) for pair in zip(videos, prompts, strict=True)])


def test_the_shipped_pipeline_is_small():
    files = [path for path in (ROOT / "examples/nano/wan-nano").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_the_shipped_pipeline_draws_what_is_asked(generated):
    assert generated["color_right"] >= 0.75
    assert generated["background_right"] >= 0.75
    assert generated["persistence"] >= 0.75


def test_the_shipped_pipeline_moves_where_it_is_asked(generated):
    assert generated["direction_within_45"] >= 0.6


def test_text_encoder_tells_captions_apart():
    """The embedding of the sprite's noun follows the words elsewhere in its phrase, and in no other phrase."""
    import build
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = ROOT / "examples/nano/wan-nano"
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    ids, mask, answers = build.caption_batch(np.random.default_rng(5), tokenizer, 4)
    assert answers.shape[:2] == ids.shape and (answers[mask == 0] == -100).all()
    texts = ["a large red circle moves quickly to the left over a blue gradient",
             "a large red circle moves quickly to the right over a blue gradient",
             "a large red circle moves quickly to the left over a green gradient"]  # fmt: skip
    inputs = tokenizer(texts, return_tensors="pt")
    with torch.no_grad():
        noun = encoder(**inputs).last_hidden_state[:, inputs.tokens().index("▁circle")]
    similar = torch.nn.functional.cosine_similarity(noun[:1], noun[1:])
    assert similar[0] < 0.9 < similar[1], similar
