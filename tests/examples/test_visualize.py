"""The figures of LTD show what is known of sprite clips, and the numbers that training measures."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
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

pytestmark = pytest.mark.slow  # models, and reports on clips

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
    latents = train_ltd.encode_clip(vae, torch.from_numpy(video).permute(0, 3, 1, 2))["latents"]
    ltd = latent_temporal_discrepancy(latents[None])[0].numpy()
    row, black = visualize_ltd.Row("", ltd, visualize_ltd.heat(ltd, 0, "magma")), np.zeros((33, 96, 96, 3))
    for picture in range(5, 33):  # the first two latent frames hold the inflated first gap
        bright = visualize_ltd.paint(row, black, picture).mean(-1)
        moves = moving_pixels(truth["mask"], -(-picture // 4))
        assert moves.flat[bright.argmax()] and bright[moves].mean() > 2 * bright[~moves].mean()


def test_a_picture_gets_the_colors_of_its_latent_frame():
    values = np.arange(3.0)[:, None, None].repeat(2, 1).repeat(3, 2)  # (F, h, w)
    row = visualize_ltd.Row("", values, visualize_ltd.heat(values, 0, "gray"))
    shown = [visualize_ltd.paint(row, np.ones((9, 16, 24, 3)), index) for index in range(9)]
    assert {picture.shape for picture in shown} == {(16, 24, 3)}
    levels = [float(picture.mean()) for picture in shown]
    assert levels == sorted(levels) and [levels.count(level) for level in sorted(set(levels))] == [1, 4, 4]


def test_noise_prediction_fits_the_training_error(flags):
    args = train_ltd.parse_args(flags())
    wan = train_ltd.identify_wan(args)
    model = train_ltd.load_transformer(args, wan)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 16, 3, 4, 6, generator=generator)
    batch = {"latents": latents, "noise": noise, "sigmas": torch.tensor([0.3, 0.8])}
    batch["prompt_embeds"] = torch.randn(2, 512, 32, generator=generator)
    error = (visualize_ltd.predict_noise(wan, model, batch) - noise).square()
    sigmas = batch["sigmas"].view(2, 1, 1, 1, 1)
    noisy_latents = (1 - sigmas) * latents + sigmas * noise
    flow = train_ltd.predict_flow(wan, model, noisy_latents, batch).detach()
    torch.testing.assert_close(error, (1 - sigmas).square() * (flow - (noise - latents)).square())


def test_maps_of_a_clip(flags, clips, tmp_path):
    visualize("maps", f"--video={clips / '1.mp4'}", "--prompt=a square moves", "--sigma=0.7", *flags(rank=None))
    args = train_ltd.parse_args(flags())
    frames = train_ltd.read_clip(str(clips / "1.mp4"), (NUM_FRAMES, HEIGHT, WIDTH), args.fps)[0]
    wanted = frames[0].permute(0, 2, 3, 1).numpy()
    with Image.open(tmp_path / "run/ltd_maps.png") as strip:
        assert strip.width == 800
    shown = read_video(tmp_path / "run/ltd_maps.mp4")
    rate = describe_video(tmp_path / "run/ltd_maps.mp4")["fps"]
    with Image.open(tmp_path / "run/ltd_maps.webp") as animation:
        assert (animation.n_frames, animation.height, animation.width) == shown.shape[:3]
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


@pytest.mark.parametrize("ltd_only", [True, False])
def test_maps_mark_the_frame_that_is_given(flags, clips, tmp_path, tiny_i2v, monkeypatch, ltd_only):
    """Of image-to-video, whose picture goes in as in training."""
    titles = []
    set_title = visualize_ltd.Axes.set_title

    def keep(axes, text, **kwargs):
        titles.append(text)
        return set_title(axes, text, **kwargs)

    monkeypatch.setattr(visualize_ltd.Axes, "set_title", keep)
    line = flags(rank=None, pretrained_model_name_or_path=tiny_i2v)
    visualize("maps", f"--video={clips / '1.mp4'}", *["--ltd_only"] * ltd_only, *line)
    assert titles[0].startswith("latent frame 0, given\n") and titles[1].startswith("latent frame 1\n")
    if not ltd_only:
        visualize("curves", *flags(pretrained_model_name_or_path=tiny_i2v))
        (errors,) = json.loads((tmp_path / "run/ltd_curves.json").read_text())["mse"].values()
        assert np.array(errors).shape == (7, 1 + NUM_FRAMES // 4)


def test_maps_of_image_to_video_need_the_picture(flags, tmp_path, tiny_i2v):
    save_file({"latents": torch.zeros(16, 3, 4, 6)}, tmp_path / "latents.safetensors")
    with pytest.raises(ValueError, match="is given the picture too; give --video"):
        line = flags(rank=None, pretrained_model_name_or_path=tiny_i2v)
        visualize("maps", f"--latents={tmp_path / 'latents.safetensors'}", *line)


# --- curves ----------------------------------------------------------------------------------------------------------


def test_curves_are_the_held_out_errors_of_training(run, flags, tiny_wan, tmp_path):
    folder = run(validation_fraction=0.4, eval_steps=2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row["val/mse"] for row in rows if "val/mse" in row]
    comfyui = folder / f"{folder.name}.safetensors"
    tuned = [f"--lora={folder}", f"--lora={comfyui}", f"--transformer={tiny_wan}"]
    visualize("curves", *tuned, *flags(validation_fraction=0.4))
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
    said = capsys.readouterr().out
    assert "6 clips of 7 videos; 1 video cannot be used" in said
    assert "cut is suspected in 1 clip (--drop_cuts) cut.mp4" in said
    plain, paper, cubed = report["tilts"]
    assert plain == {
        "strength": 0,
        "wildest_tenth": pytest.approx(1 / 6),
        "stillest_tenth": pytest.approx(1 / 6),
        "effective_clips": pytest.approx(6),
    }
    assert 1 / 6 < paper["wildest_tenth"] < cubed["wildest_tenth"]
    assert paper["stillest_tenth"] > cubed["stillest_tenth"]
    assert f"3: the wildest tenth {cubed['wildest_tenth']:.1%}" in said

    # The same from the cache, without any model, and of all clips, whatever training holds out
    monkeypatch.setattr(train_ltd, "load_vae", None)
    monkeypatch.setattr(train_ltd, "cache_captions", None)
    visualize(*command_line, "--validation_fraction=0.5")
    assert json.loads((tmp_path / "ltd_report.json").read_text()) == report
    with Image.open(tmp_path / "ltd_report.png") as figure:
        assert figure.width == 800


@pytest.mark.parametrize("ltds", [[0.1, 0.11, 0.2, 0.2, 0.3, 0.5, 0.9, 1.3], [0.4]])
def test_a_histogram_of_few_clips_shows_each(monkeypatch, ltds):
    """Bars that are narrower than what lies between the clips, counted in whole clips."""
    picture = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(visualize_ltd, "read_pictures", lambda args, clips, indices: [picture] * len(clips))
    clips = []
    for number, ltd in enumerate(ltds):
        cut = number == 3
        clip = SimpleNamespace(ltd=ltd, name=f"{number}.mp4", order=(0, number, 0))
        clip.bucket = train_ltd.Bucket(9, 8, 8)
        clip.largest_jump = lambda: (1.5, 1)
        clip.cut_is_suspected = lambda cut=cut: cut
        clips.append(clip)
    args = SimpleNamespace(num_frames=9, fps=16)
    figure = visualize_ltd.draw_report(args, clips)
    figure.draw_without_rendering()
    axes = figure.subfigs[0].axes[0]
    bars = [bar for bar in axes.patches if bar.get_height()]
    assert sum(bar.get_height() for bar in bars) == len(ltds)
    assert max(bar.get_width() for bar in bars) < 0.06 * max(1, ltds[-1] - ltds[0])
    assert all(tick == round(tick) for tick in axes.get_yticks())
    title = figure.subfigs[1].get_suptitle()
    assert title == ("the 4 stillest clips, by mean LTD" if len(ltds) > 1 else "the stillest clip, by mean LTD")


def test_tilts_are_those_of_the_mean_weights():
    """By clips whose voxels all move alike: a weight a clip, known beforehand."""
    rates = [0.0, 1.0, 9.0]
    clips = [SimpleNamespace(ltd_quantiles=[rate] * 21) for rate in rates]
    weights = [(1 + math.log(math.e + rate)) ** 3 for rate in rates]
    tilt = visualize_ltd.describe_tilt(clips, 3)
    assert tilt["wildest_tenth"] == pytest.approx(weights[-1] / sum(weights))
    assert tilt["stillest_tenth"] == pytest.approx(weights[0] / sum(weights))
    assert tilt["effective_clips"] == pytest.approx(sum(weights) ** 2 / sum(weight**2 for weight in weights))


def test_report_shows_the_pictures_of_each_window(known_clips, tmp_path):
    flags = [f"--train_data_dir={known_clips}", f"--output_dir={tmp_path}", *NANO_FLAGS[:3], "--num_frames=9"]
    args = visualize_ltd.parse_args(["report", *flags, "--clips_per_video=3", "--fps=16"])
    bucket = train_ltd.Bucket(9, 96, 96)
    windows = [SimpleNamespace(order=(0, 1, window), bucket=bucket) for window in (0, 1, 2)]
    shown = visualize_ltd.read_pictures(args, windows, [8, 0, 8])
    frames = train_ltd.read_clip(str(known_clips / "cut.mp4"), (9, 96, 96), 16, 3)[0].permute(0, 1, 3, 4, 2).numpy()
    assert np.array_equal(np.stack(shown), np.stack([frames[0, 8], frames[1, 0], frames[2, 8]]))


def test_report_finds_the_pictures_of_a_stream(flags, clips, monkeypatch):
    """Of several shards, whose rows are counted in each."""
    args = visualize_ltd.parse_args(["report", *flags()])
    dataset, folder = train_ltd.open_dataset(args, "train")
    stream = dataset.to_iterable_dataset(num_shards=3)
    monkeypatch.setattr(train_ltd, "open_dataset", lambda args, split: (stream, folder))
    cached, _, _ = train_ltd.prepare_data(args, train_ltd.build_accelerator(args), with_captions=False)
    assert len(cached) == 7 and len({clip.order[0] for clip in cached}) == 3
    shown = visualize_ltd.read_pictures(args, cached, [0] * 7)
    for clip, picture in zip(cached, shown, strict=True):
        frames = train_ltd.read_clip(str(clips / clip.name), (NUM_FRAMES, HEIGHT, WIDTH), args.fps)[0]
        assert np.array_equal(picture, frames[0, 0].permute(1, 2, 0).numpy())


# --- report --write_metadata -----------------------------------------------------------------------------------------


def training_clips(*command_line) -> list:
    """The clips that train_ltd.py would train on."""
    args = train_ltd.parse_args([str(argument) for argument in command_line])
    train_ltd.identify_wan(args)
    return train_ltd.prepare_data(args, train_ltd.build_accelerator(args), with_captions=False)[0]


def test_what_is_kept_is_what_trains(known_clips, tmp_path, capsys):
    """Still clips, the cut and what cannot be read are dropped, each with its reason; captions stay as they were."""
    folder = shutil.copytree(known_clips, tmp_path / "clips")
    out = [f"--output_dir={tmp_path / 'out'}", *NANO_FLAGS, "--trigger_word=sprite,"]
    table = folder / "kept.jsonl"
    line = ["report", f"--train_data_dir={folder}", *out, f"--write_metadata={table}"]
    visualize(*line)
    report = json.loads((tmp_path / "out/ltd_report.json").read_text())
    ltd = {clip["name"]: clip["ltd"] for clip in report["clips"]}
    everything = ["fast-0.mp4", "cut.mp4", "still-0.mp4", "still-1.mp4", "fast-1.mp4", "fast-2.mp4"]
    trained = training_clips(f"--train_data_dir={table}", *out)
    assert [clip.name for clip in trained] == everything
    assert [clip.captions for clip in trained[:2]] == [["sprite, fast-0"], ["sprite, cut"]]

    fast = sorted((name for name in ltd if name.startswith("fast")), key=ltd.get)
    low = (ltd["still-0.mp4"] + ltd["still-1.mp4"] + 2 * ltd[fast[0]]) / 4
    low = max(low, ltd["still-0.mp4"] + 1e-6, ltd["still-1.mp4"] + 1e-6)
    high = (ltd[fast[1]] + ltd[fast[2]]) / 2
    capsys.readouterr()
    visualize(*line, f"--min_ltd={low}", f"--max_ltd={high}", "--drop_cuts")
    trained = training_clips(f"--train_data_dir={table}", *out)
    assert sorted(clip.name for clip in trained) == sorted(fast[:2])
    assert all(not clip.encoded for clip in trained)
    said = capsys.readouterr().out
    for name in ("still-0", "still-1"):
        assert f"dropped {name}.mp4: mean LTD {ltd[f'{name}.mp4']:.4f} is below --min_ltd" in said
    assert f"dropped {fast[2]}: mean LTD" in said and "above --max_ltd" in said
    assert "dropped broken.mp4: cannot be read" in said
    assert f"kept 2 of 7 videos; train on them by --train_data_dir {table}" in said

    visualize(*line, "--drop_cuts")
    assert {clip.name for clip in training_clips(f"--train_data_dir={table}", *out)} == set(everything) - {"cut.mp4"}
    assert "dropped cut.mp4: a cut is suspected at 0.8 s" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no video is left"):
        visualize(*line, f"--min_ltd={max(ltd.values()) + 1}")


def test_a_table_above_the_clips_keeps_captions_and_columns(flags, clips, tmp_path):
    """As a folder's metadata.jsonl, of clips in a folder of it, with lists of captions in columns of other names."""
    folder = shutil.copytree(clips, tmp_path / "data/clips")
    rows = [{"path": f"{i}.mp4", "captions": [f"one, {i}", f"zwei, ä {i}"]} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"video_column": "path", "caption_column": "captions"}
    table = tmp_path / "data/metadata.jsonl"
    line = flags(train_data_dir=folder, max_train_samples=2, **columns)
    visualize("report", *line, f"--write_metadata={table}")
    trained = training_clips(*flags(train_data_dir=table.parent, **columns))
    assert [clip.name for clip in trained] == ["clips/0.mp4", "clips/1.mp4"]
    assert [clip.captions for clip in trained] == [row["captions"] for row in rows[:2]]
    with pytest.raises(ValueError, match="would overwrite the dataset's own table"):
        visualize("report", *line, f"--write_metadata={table}")


def test_a_video_is_kept_with_all_its_windows(known_clips, tmp_path, capsys):
    """The sprite of `turns` is still in its first window, and fast in the second."""
    folder = tmp_path / "clips"
    folder.mkdir()
    still, fast = find_clips(1, "still")[0][0], find_clips(1, "quickly")[0][0]
    for name, parts in {"turns": [still, fast], "fast": [fast, fast]}.items():
        write_video(np.concatenate(parts), folder / f"{name}.mp4", sprites.FPS, codec=sprites.CODEC)
        (folder / f"{name}.txt").write_text(name)
    out = [f"--output_dir={tmp_path / 'out'}", *NANO_FLAGS, "--clips_per_video=2"]
    line = ["report", f"--train_data_dir={folder}", *out]
    visualize(*line)
    report = json.loads((tmp_path / "out/ltd_report.json").read_text())
    ltd = {clip["name"]: clip["ltd"] for clip in report["clips"]}
    assert min(ltd, key=ltd.get) == "turns.mp4#0" and len(ltd) == 4
    others = min(value for name, value in ltd.items() if name != "turns.mp4#0")
    visualize(*line, f"--write_metadata={folder / 'kept.jsonl'}", f"--min_ltd={(ltd['turns.mp4#0'] + others) / 2}")
    trained = training_clips(f"--train_data_dir={folder / 'kept.jsonl'}", *out)
    assert [clip.name for clip in trained] == ["fast.mp4#0", "fast.mp4#1"]
    assert "dropped turns.mp4#0: mean LTD" in capsys.readouterr().out


def test_refuses_a_table_that_could_not_be_trained_on(flags, clips, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(train_ltd, "prepare_data", None)  # before anything is encoded
        for table, message in (
            (tmp_path / "kept.csv", "must end in .jsonl"),
            (tmp_path / "kept.jsonl", f"write it where the clips are: {clips}/kept.jsonl"),
            (clips / "metadata.jsonl", "would overwrite the dataset's own table"),
        ):
            with pytest.raises(ValueError, match=message):
                visualize("report", *flags(), f"--write_metadata={table}")
        with pytest.raises(ValueError, match=r"for clips in a local folder; filter user/clips on the Hub"):
            line = flags(train_data_dir=None, dataset_name="user/clips")
            visualize("report", *line, f"--write_metadata={clips / 'kept.jsonl'}")

    rows = {"video": [(clips / f"{i}.mp4").read_bytes() for i in range(2)], "text": ["", ""]}
    (tmp_path / "bytes").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "bytes/metadata.parquet")
    with pytest.raises(ValueError, match="these lie in a table"):
        line = flags(train_data_dir=tmp_path / "bytes")
        visualize("report", *line, f"--write_metadata={tmp_path / 'bytes/kept.jsonl'}")
    assert not list(tmp_path.rglob("kept.*"))


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
        (["report", "--lora=a"], "there is no flag --lora; the nearest is --init_lora"),
        (["report", "--min_ltd=1"], "--min_ltd, --max_ltd and --drop_cuts need --write_metadata"),
    ],
)
def test_refuses_the_command_line(command_line, message, clips, capsys):
    with pytest.raises(SystemExit):
        visualize_ltd.parse_args([*command_line, f"--train_data_dir={clips}"])
    assert message in capsys.readouterr().err


def test_refuses_before_anything_is_encoded(run, flags, clips, monkeypatch, tmp_path):
    folder = run(max_train_steps=1)
    monkeypatch.setattr(train_ltd, "prepare_data", None)
    wanted = rf"--lora {folder} cannot be used: .*for a layer of"  # it is of another model
    with pytest.raises(ValueError, match=wanted):
        visualize("curves", f"--lora={folder}", *flags(pretrained_model_name_or_path=NANO))
    with pytest.raises(ValueError, match="--height must be a multiple of 16, got 40"):
        visualize("report", *flags(height=40))
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


def test_a_recipe_that_compiles_needs_no_compiler_here(flags, clips, monkeypatch):
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", None)
    monkeypatch.setattr(WanTransformer3DModel, "compile", None)
    visualize("maps", f"--video={clips / '1.mp4'}", *flags(torch_compile=True, rank=None))
