"""The figures of LTD show what is known of sprite clips, and the numbers that training measures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sprites
import torch
import visualize_ltd
from conftest import HEIGHT, NUM_FRAMES, WIDTH
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from safetensors.torch import save_file
from videos import describe_video, read_video, write_video

import train_ltd
from ltd_loss import latent_temporal_discrepancy

ROOT = Path(__file__).resolve().parents[2]

NANO = ROOT / "examples/nano/wan-nano"  # its VAE is trained, so that latents mean something
NANO_FLAGS = [f"--pretrained_model_name_or_path={NANO}", "--height=96", "--width=96", "--num_frames=33"]


def visualize(*command_line) -> None:
    visualize_ltd.main(visualize_ltd.parse_args([str(argument) for argument in command_line]))


def find_clips(count: int, speed: str) -> list[tuple[np.ndarray, dict]]:
    """Sprite clips `(video, truth)` in which one sprite, and nothing else, changes."""
    specs = (sprites.clip_spec("dynamic", 0, "heldout", index) for index in range(1000))
    plain = (s for s in specs if len(s.sprites) == 1 and not (s.pan or s.sprites[0].dynamics or s.sprites[0].spin))
    chosen = [spec for spec in plain if spec.sprites[0].speed == speed][:count]
    assert len(chosen) == count
    return [sprites.render_clip(spec) for spec in chosen]


def moving_pixels(mask: np.ndarray, frame: int) -> np.ndarray:
    """Where the object of `(N, H, W)` comes or goes between the latent frames that D compares, in whole voxels."""
    window = mask[max(0, 4 * frame - 7) : 4 * frame + 5] > 0
    moves = (window.any(0) & ~window.all(0)).reshape(12, 8, 12, 8).any(axis=(1, 3))
    return np.kron(moves, np.ones((8, 8), bool))


# --- maps ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKLWan.from_pretrained(NANO, subfolder="vae", dtype=torch.float32)


@pytest.mark.parametrize("number", range(3))
def test_heat_is_brightest_where_the_object_moves(vae, number):
    video, truth = find_clips(3, "quickly")[number]
    latents = train_ltd.encode_clip(vae, torch.from_numpy(video).permute(0, 3, 1, 2))
    ltd = latent_temporal_discrepancy(latents[None])[0].numpy()
    row, black = visualize_ltd.Row("", ltd, visualize_ltd.heat(ltd, 0, "magma")), np.zeros((33, 96, 96, 3))
    for picture in range(5, 33):  # the first two latent frames hold the inflated first gap
        bright = visualize_ltd.paint(row, black, picture).mean(-1)
        moves = moving_pixels(truth["mask"], -(-picture // 4))
        assert moves.flat[bright.argmax()] and bright[moves].mean() > 2 * bright[~moves].mean()


def test_a_picture_gets_the_colours_of_its_latent_frame():
    values = np.arange(3.0)[:, None, None].repeat(2, 1).repeat(3, 2)  # (F, h, w)
    row = visualize_ltd.Row("", values, visualize_ltd.heat(values, 0, "gray"))
    shown = [visualize_ltd.paint(row, np.ones((9, 16, 24, 3)), index) for index in range(9)]
    assert {picture.shape for picture in shown} == {(16, 24, 3)}
    levels = [float(picture.mean()) for picture in shown]
    assert levels == sorted(levels) and [levels.count(level) for level in sorted(set(levels))] == [1, 4, 4]


def test_noise_prediction_fits_the_training_error(tiny_wan):
    model, generator = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer"), torch.Generator()
    latents, noise = torch.randn(2, 2, 16, 3, 4, 6, generator=generator.manual_seed(0))
    batch = {"latents": latents, "noise": noise, "sigmas": torch.tensor([0.3, 0.8])}
    batch["prompt_embeds"] = torch.randn(2, 512, 32, generator=generator)
    error = (visualize_ltd.predict_noise(model, batch) - noise).square()
    factor = (1 - batch["sigmas"]).square().view(2, 1, 1, 1, 1)
    torch.testing.assert_close(error, factor * train_ltd.flow_matching_error(model, batch).detach())


def test_maps_of_a_clip(flags, clips, tmp_path):
    visualize("maps", f"--video={clips / '1.mp4'}", "--prompt=a square moves", "--sigma=0.7", *flags(rank=None))
    args = train_ltd.parse_args(flags())
    wanted = train_ltd.read_clips(str(clips / "1.mp4"), args)[0][0].permute(0, 2, 3, 1).numpy()
    with Image.open(tmp_path / "run/ltd_maps.png") as strip:
        assert strip.width == 800
    shown = read_video(tmp_path / "run/ltd_maps.mp4")
    rate = describe_video(tmp_path / "run/ltd_maps.mp4")["fps"]
    assert (len(shown), rate) == (NUM_FRAMES, 16)
    height = round(400 * HEIGHT / WIDTH / 2) * 2
    bar = shown.shape[1] - height - 2  # the labels'
    for row in range(4):
        panel = shown[:, bar : bar + height, row * 402 : row * 402 + 400]
        small = np.stack([np.asarray(Image.fromarray(p).resize((WIDTH, HEIGHT), Image.Resampling.BOX)) for p in panel])
        difference = np.abs(small.astype(float) - wanted).mean()
        assert difference < 8 if row == 0 else difference > 20


def test_maps_of_latents_load_no_model(monkeypatch, tmp_path):
    monkeypatch.setattr(train_ltd, "load_vae", None)
    monkeypatch.setattr(train_ltd, "load_transformer", None)
    latents = torch.randn(1, 16, 5, 6, 10, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents.bfloat16()}, tmp_path / "latents.safetensors")
    visualize("maps", f"--latents={tmp_path / 'latents.safetensors'}", "--ltd_only", f"--output_dir={tmp_path}")
    shown = read_video(tmp_path / "ltd_maps.mp4")
    rate = describe_video(tmp_path / "ltd_maps.mp4")["fps"]
    assert (len(shown), rate) == (5, 4) and (tmp_path / "ltd_maps.png").is_file()


def test_maps_of_a_cache_entry(run, flags, tmp_path):
    """The cache of a run holds latents, and its LoRA predicts another noise from them than the base."""
    folder, videos = run(max_train_steps=10), []
    entry = f"--latents={min((tmp_path / 'cache/latents').glob('*'))}"
    for lora in ([], [f"--lora={folder}"]):
        visualize("maps", entry, *lora, *flags())
        videos.append(read_video(folder / "ltd_maps.mp4").astype(float))
    changes = [np.abs(videos[1] - videos[0])[:, :, row * 402 : row * 402 + 400].mean() for row in range(4)]
    assert max(changes[:2]) < 0.5 and min(changes[2:]) > 1.5


# --- curves ----------------------------------------------------------------------------------------------------------


def test_curves_are_the_held_out_errors_of_training(run, flags, tiny_wan, tmp_path):
    folder = run(validation_split="0.4", eval_steps=2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row["val/mse"] for row in rows if "val/mse" in row]
    comfyui = folder / f"{folder.name}.safetensors"
    tuned = [f"--lora={folder}", f"--lora={comfyui}", f"--transformer={tiny_wan}"]
    visualize("curves", *tuned, *flags(validation_split="0.4"))
    numbers = json.loads((folder / "ltd_curves.json").read_text())
    mse = {name: np.array(values) for name, values in numbers["mse"].items()}
    shape = len(numbers["clips"]), 1 + NUM_FRAMES // 4
    assert numbers["held_out"] and len(mse) == 4
    assert {values.shape for values in (*mse.values(), np.array(numbers["ltd"]))} == {shape}
    assert mse["base"].mean() == pytest.approx(trained[0], rel=1e-5)
    assert mse[str(folder)].mean() == pytest.approx(trained[-1], rel=1e-5)
    assert trained[0] != pytest.approx(trained[-1], rel=1e-3)
    np.testing.assert_allclose(mse[str(comfyui)], mse[str(folder)], rtol=1e-5)
    np.testing.assert_array_equal(mse[str(tiny_wan)], mse["base"])
    with Image.open(folder / "ltd_curves.png") as figure:
        assert figure.width == 800


# --- report ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known_clips(tmp_path_factory) -> Path:
    """Two still sprites, three fast ones, a hard cut between still ones at picture 14, and a file that is no video."""
    folder, rows = tmp_path_factory.mktemp("sprites"), []
    still, fast = find_clips(2, "still"), find_clips(3, "quickly")
    videos = {f"still-{i}": video for i, (video, _) in enumerate(still)}
    videos |= {f"fast-{i}": video for i, (video, _) in enumerate(fast)}
    videos["cut"] = np.concatenate([still[0][0][:14], still[1][0][14:]])
    for name, video in videos.items():
        write_video(video, folder / f"{name}.mp4", sprites.FPS, codec=sprites.CODEC)
    (folder / "broken.mp4").write_bytes(b"no video")
    rows = [{"file_name": f"{name}.mp4", "text": name} for name in ("fast-0", "cut", "still-0", "broken", "still-1")]
    rows += [{"file_name": f"fast-{i}.mp4", "text": ""} for i in (1, 2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_report_knows_still_wild_and_cut(known_clips, tmp_path, monkeypatch, capsys):
    command_line = ["report", f"--train_data_dir={known_clips}", f"--output_dir={tmp_path}", *NANO_FLAGS]
    visualize(*command_line)
    report = json.loads((tmp_path / "ltd_report.json").read_text())
    names = [clip["name"] for clip in report["clips"]]
    assert {name[:5] for name in names[:2]} == {"still"} and len(names) == 6
    assert [clip["ltd"] for clip in report["clips"]] == sorted(clip["ltd"] for clip in report["clips"])
    cuts = [(clip["name"], clip["jump_frame"]) for clip in report["clips"] if clip["cut_suspected"]]
    assert cuts == [("cut.mp4", 3)]  # pictures 9 to 12, before 13 to 16
    assert list(report["skipped"]) == ["broken.mp4"]
    assert "cut is suspected in 1 clips (--drop_cuts) cut.mp4" in capsys.readouterr().out

    # The same clips as training drops, from the same cache, without the VAE
    monkeypatch.setattr(train_ltd, "load_vae", None)
    visualize(*command_line)
    assert json.loads((tmp_path / "ltd_report.json").read_text()) == report
    args = visualize_ltd.parse_args([*command_line, "--drop_cuts"])
    videos = train_ltd.cache_videos(args, visualize_ltd.Accelerator(), "train", None)
    kept = train_ltd.select_clips(args, [video for video in videos if "reason" not in video])
    assert sorted(clip["name"] for clip in kept) == sorted(set(names) - {"cut.mp4"})
    with Image.open(tmp_path / "ltd_report.png") as figure:
        assert figure.width == 800


def test_report_shows_the_pictures_of_each_window(known_clips, tmp_path):
    flags = [f"--train_data_dir={known_clips}", f"--output_dir={tmp_path}", *NANO_FLAGS[:3], "--num_frames=9"]
    args = visualize_ltd.parse_args(["report", *flags, "--clips_per_video=3"])
    clips = [{"number": 1, "window": window} for window in (0, 1, 2)]
    shown = visualize_ltd.read_pictures(args, clips, [8, 0, 8])
    frames = train_ltd.read_clips(str(known_clips / "cut.mp4"), args)[0].permute(0, 1, 3, 4, 2).numpy()
    assert np.array_equal(np.stack(shown), np.stack([frames[0, 8], frames[1, 0], frames[2, 8]]))


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command_line, message",
    [
        (["maps"], "one of the arguments --video --latents is required"),
        (["maps", "--video=none.mp4"], "--video none.mp4 is not a file"),
        (["maps", "--latents=none.safetensors"], "--latents none.safetensors is not a file"),
        (["maps", f"--latents={__file__}", "--lora=a", "--transformer=b"], "maps takes at most 1 of --lora"),
        (["maps", f"--latents={__file__}", "--sigma=1"], r"--sigma must lie in (0, 1), got [1.0]"),
        (["curves", *["--lora=a"] * 7], "curves takes at most 6 of --lora and --transformer"),
        (["report", "--lora=a"], "unrecognized arguments: --lora=a"),
    ],
)
def test_refuses_the_command_line(command_line, message, clips, capsys):
    with pytest.raises(SystemExit):
        visualize_ltd.parse_args([*command_line, f"--train_data_dir={clips}"])
    assert message in capsys.readouterr().err


def test_refuses_before_anything_is_encoded(flags, clips, monkeypatch, tmp_path):
    monkeypatch.setattr(train_ltd, "prepare_data", None)
    (tmp_path / "empty").mkdir()
    for flag in ("lora", "transformer"):
        with pytest.raises(ValueError, match=f"--{flag}.*{tmp_path}/empty"):
            visualize("curves", f"--{flag}={tmp_path / 'empty'}", *flags())


def test_refuses_what_is_no_clip(flags, clips, tmp_path):
    for tensors, message in (
        ({"z": torch.zeros(2)}, "has no tensor `latents`, but z"),
        ({"latents": torch.zeros(2, 3)}, r"is needed, got \(2, 3\)"),
        ({"latents": torch.randn(4, 3, 4, 6)}, "has 4 channels, the model 16"),
    ):
        save_file(tensors, tmp_path / "latents.safetensors")
        with pytest.raises(ValueError, match=message):
            visualize("maps", f"--latents={tmp_path / 'latents.safetensors'}", *flags())
    for flag in ("latents", "video"):
        with pytest.raises(ValueError, match=f"--{flag} .*metadata.jsonl"):
            visualize("maps", f"--{flag}={clips / 'metadata.jsonl'}", "--ltd_only", *flags())
    with pytest.raises(ValueError, match=r"0\.mp4: too short: 24 frames at 16 fps, 49 needed; see --num_frames"):
        visualize("maps", f"--video={clips / '0.mp4'}", "--ltd_only", *flags(num_frames=49))


def test_a_recipe_that_compiles_needs_no_compiler_here(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    recipe = ROOT / "examples/recipes/lora_1.3b.yaml"
    line = ["report", f"--config={recipe}", f"--train_data_dir={tmp_path}"]
    assert visualize_ltd.parse_args(line).torch_compile is False
    with pytest.raises(ValueError, match="needs a C compiler"):
        train_ltd.parse_args(line[1:])
