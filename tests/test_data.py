"""Data: which frames are picked, what is skipped, where datasets come from, what the cache holds, what is drawn."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from conftest import HEIGHT, NUM_FRAMES, ROOT, WIDTH, launch
from corpus import (
    CORPUS,
    ffmpeg,
    ffmpeg_frames,
    moving_square,
    numbered,
    numbers_of,
    truncate,
    write_audio,
    write_numbered,
    write_video,
)
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

import train_ltd


@pytest.fixture
def read(flags):
    """Function that reads the clips of one file: frames `(clips, F, 3, H, W)`, crop share, turned."""

    def function(path, **kwargs):
        return train_ltd.read_clips(
            path if isinstance(path, bytes) else str(path), train_ltd.parse_args(flags(**kwargs))
        )

    return function


@pytest.fixture
def prepare(flags):
    """Function that caches everything: `(clips, held-out clips, caption files, args)`."""

    def function(**kwargs):
        args = train_ltd.parse_args(flags(**kwargs))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return *train_ltd.prepare_data(args, train_ltd.build_accelerator(args)), args

    return function


@pytest.fixture(scope="module")
def loaded_pipeline(tiny_wan):
    return WanPipeline.from_pretrained(tiny_wan, transformer=None, vae=None)


@pytest.fixture
def one_text_encoder(monkeypatch, loaded_pipeline):
    """For tests that prepare often and are not about the text encoder: it is loaded once and kept."""
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda *args, **kwargs: loaded_pipeline)


@pytest.fixture
def log(caplog):
    """Function that returns the messages logged so far, at a level or all."""
    caplog.set_level(logging.INFO)
    rank = re.compile(r"^\[RANK \d+\] ")
    return lambda level=None: [rank.sub("", r.getMessage()) for r in caplog.records if level in (None, r.levelname)]


def make_videos(folder: Path, count: int = 4, first: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"clip{first + n}.mp4" for n in range(count)]
    for n, name in enumerate(names):
        write_video(folder / name, moving_square(first + n))
    return names


def write_metadata(folder: Path, rows: list[dict], name: str = "metadata.jsonl") -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def cache_files(args) -> dict[str, bytes]:
    """Relative path -> content of every file in the cache."""
    folder = Path(args.cache_dir)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def encode_counts(messages: list[str]) -> tuple[int, int]:
    """Videos and captions that the last preparation encoded, from its log line."""
    found = [re.search(r"encoded now: (\d+) videos?, (\d+) captions?", message) for message in messages]
    return tuple(map(int, [match for match in found if match][-1].groups()))


# --- Frames by presentation time -------------------------------------------------------------------------------------


def on_display(times, at) -> int:
    """Number of the frame that is on display at a time; `times` and `at` are exact fractions."""
    return max(n for n, time in enumerate(times) if time - times[0] <= at)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "mov", "avi"])
@pytest.mark.parametrize("source_fps", [30, 25, 24, 16, 10, Fraction(30000, 1001), 12.5])
def test_constant_rates(read, tmp_path, suffix, source_fps):
    """The frame on display at k/16 s, whatever the rate and however coarsely the container rounds times."""
    source_fps = Fraction(source_fps)
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = write_numbered(tmp_path / f"a.{suffix}", math.ceil(source_fps) + 5, source_fps, codec=codec)
    times = [n / source_fps for n in range(math.ceil(source_fps) + 5)]
    wanted = [Fraction(k, 16) for k in range(17)]
    frames, cropped, turned = read(path, num_frames=17)
    assert frames.shape == (1, 17, 3, HEIGHT, WIDTH) and frames.dtype == torch.uint8
    got = numbers_of(frames[0])
    assert got[0] == 0
    for number, at in zip(got, wanted, strict=True):
        early = on_display(times, at)  # a frame less than 2 ms ahead (15 at 29.97 fps, at 0.5005 s) may stand for now
        assert number in {early, early if at in times else on_display(times, at + Fraction(2, 1000))}
    assert (cropped, turned) == (0, False)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "webm"])
def test_the_clips_own_rate_gives_each_frame_once(read, tmp_path, suffix):
    """Matroska's milliseconds make 16 fps uneven (0, 63, 125, 188 ms): no frame may double or go missing."""
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    path = write_numbered(tmp_path / f"a.{suffix}", 33, 16, codec=codec)
    assert numbers_of(read(path, num_frames=33)[0][0]) == list(range(33))


@pytest.mark.parametrize(
    ("fps", "expected"), [(8, range(0, 34, 2)), (4, range(0, 68, 4)), (32, [n // 2 for n in range(17)])]
)
def test_fps(read, tmp_path, fps, expected):
    path = write_numbered(tmp_path / "a.mp4", 70, 16)
    assert numbers_of(read(path, num_frames=17, fps=fps)[0][0]) == list(expected)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(read, tmp_path, suffix):
    random = np.random.default_rng(1)
    steps = [Fraction(int(n), 1000) for n in random.choice([7, 20, 33, 41, 90, 250], 60)]
    times = [sum(steps[:n], Fraction(0)) for n in range(len(steps))]
    path = write_video(tmp_path / f"a.{suffix}", [numbered(n) for n in range(60)], 25, times)
    # Wanted times a millisecond beside a frame's own are left out of the comparison: containers round.
    wanted = [Fraction(k, 16) for k in range(33)]
    got = numbers_of(read(path, num_frames=33)[0][0])
    for k, at in enumerate(wanted):
        assert got[k] in {on_display(times, max(at - Fraction(2, 1000), 0)), on_display(times, at + Fraction(2, 1000))}
    exact = [k for k, at in enumerate(wanted) if min(abs(at - time) for time in times) > Fraction(2, 1000)]
    assert len(exact) > 25
    assert [got[k] for k in exact] == [on_display(times, wanted[k]) for k in exact]


@pytest.mark.parametrize("suffix", ["mkv", "ts", "mp4"])
def test_non_zero_start(read, tmp_path, suffix):
    """Time counts from the video's first frame."""
    write_numbered(tmp_path / "a.mp4", 40, 24)
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-output_ts_offset", 5, "-avoid_negative_ts", "disabled",
           tmp_path / f"late.{suffix}")  # fmt: skip
    frames = read(tmp_path / f"late.{suffix}", num_frames=17)[0]
    assert numbers_of(frames[0]) == [k * 24 // 16 for k in range(17)]
    if suffix != "mp4":  # mp4 players skip the empty edit, and so does the demuxer's start time
        with av.open(str(tmp_path / f"late.{suffix}")) as container:
            assert next(container.decode(video=0)).time >= 5


def test_the_last_frame_lasts_its_own_duration(read, tmp_path):
    """10 frames at 8 fps are 1.25 s, which is 20 frames at 16 fps: 17 fit, 21 do not."""
    path = write_numbered(tmp_path / "a.mp4", 10, 8)
    assert numbers_of(read(path, num_frames=17)[0][0]) == [n // 2 for n in range(17)]
    with pytest.raises(train_ltd.ClipError, match="too short: 20 frames at 16 fps, 21 needed") as error:
        read(path, num_frames=21)
    assert error.value.num_frames == 20


# --- Rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(read, tmp_path, degrees):
    """As ffmpeg turns it by itself."""
    write_video(tmp_path / "a.mp4", [numbered(n * 523 + 77) for n in range(9)], options={"qp": "0"})
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    size = (48, 32) if degrees % 180 else (32, 48)
    expected = ffmpeg_frames(tmp_path / "turned.mp4", *size)
    frames, _, turned = read(tmp_path / "turned.mp4", height=size[0], width=size[1])
    plain = read(tmp_path / "a.mp4")[0][0]
    assert (frames[0].float() - expected.float()).abs().mean() < 2
    assert frames[0].shape != plain.shape or (frames[0].float() - plain.float()).abs().mean() > 20
    assert not turned
    assert read(tmp_path / "turned.mp4")[2] == bool(degrees % 180)  # a portrait clip in a landscape crop


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation(read, tmp_path, orientation):
    """All eight, the mirrored ones included, as PIL turns them."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(numbered(12345)).save(tmp_path / "a.jpg", exif=exif, quality=98, subsampling=0)
    expected = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB"))
    height, width = expected.shape[:2]
    frames = read(tmp_path / "a.jpg", num_frames=1, height=height, width=width)[0]
    assert np.abs(frames[0, 0].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 4


# --- Resize and crop -------------------------------------------------------------------------------------------------


def ramp(height: int, width: int) -> np.ndarray:
    """Red tells the row and green the column, each as a share of 200 levels."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.round((np.arange(height) + 0.5) / height * 200)[:, None]
    picture[..., 1] = np.round((np.arange(width) + 0.5) / width * 200)
    return picture


@pytest.mark.parametrize(
    "size",
    [(64, 96), (96, 64), (90, 90), (64, 400), (300, 48), (16, 24), (10, 40), (17, 13)],
    ids=["same", "portrait", "square", "wide", "tall", "upscaled", "wide-upscaled", "odd-upscaled"],
)
def test_cover_and_centre_crop(read, tmp_path, size):
    """Where in the source the corners of the result come from, and the share that is lost."""
    Image.fromarray(ramp(*size)).save(tmp_path / "a.png")
    frames, cropped, turned = read(tmp_path / "a.png", num_frames=1)
    frame = frames[0, 0].float()
    assert frame.shape == (3, HEIGHT, WIDTH)
    scale = max(HEIGHT / size[0], WIDTH / size[1])
    kept = (HEIGHT / (size[0] * scale), WIDTH / (size[1] * scale))  # share of the source's height and width
    for axis, (channel, share) in enumerate(zip((0, 1), kept, strict=True)):
        position = (torch.arange((HEIGHT, WIDTH)[axis]) + 0.5) / (HEIGHT, WIDTH)[axis]
        expected = ((1 - share) / 2 + position * share) * 200
        profile = frame[channel].mean(dim=1 - axis)
        inside = slice(2, -2)  # at the border bicubic sees its own edge
        pixel = 200 / (size[axis] * scale)  # half a pixel may go to rounding, and one level to 8 bits
        assert (profile - expected)[inside].abs().max() < 0.8 * pixel + 1.5
    assert cropped == pytest.approx(1 - kept[0] * kept[1], abs=1e-6)
    assert turned == (size[0] > size[1])


def test_antialiasing(read, tmp_path):
    """A checkerboard of single pixels, shrunk four and a half times, is grey; without antialiasing it is a moire."""
    board = (np.indices((144, 216)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    frame = read(tmp_path / "a.png", num_frames=1)[0][0, 0].float()
    assert frame.mean() == pytest.approx(127.5, abs=2)
    assert frame.std() < 3


def test_crop_share_and_portrait_warning(prepare, log, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_video(folder / "wide.mp4", moving_square(1))
    write_video(folder / "tall.mp4", moving_square(2, height=96, width=32))
    write_metadata(folder, [{"file_name": name, "text": "a"} for name in ("wide.mp4", "tall.mp4")])
    prepare(train_data_dir=folder)
    # 48 x 32 out of 48 x 144 keeps two ninths.
    share = round(100 * (0 + 7 / 9) / 2)
    assert [m for m in log() if "crop:" in m] == [f"crop: {share}% of the picture is thrown away"]
    (warning,) = [m for m in log("WARNING") if "portrait" in m]
    assert "tall.mp4" in warning and "wide.mp4" not in warning


# --- Windows and stills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "ts", "mpg"])
@pytest.mark.parametrize("source_fps", [25, 24])
def test_windows_are_evenly_spread(read, tmp_path, suffix, source_fps):
    """Four windows of 9 of a long clip: the first from the start, the last to the end, key frames or not."""
    codec = {"webm": "libvpx-vp9", "mpg": "mpeg2video"}.get(suffix, "libx264")
    count = 10 * source_fps
    path = write_numbered(tmp_path / f"a.{suffix}", count, source_fps, codec=codec, options={"g": "50"})
    frames = read(path, clips_per_video=4)[0]
    got = [numbers_of(clip) for clip in frames]
    assert len(got) == 4
    assert got[0] == [k * source_fps // 16 for k in range(9)]
    for clip, start in zip(got, np.linspace(0, 10 - 9 / 16, 4), strict=True):
        shown = np.floor((start + np.arange(9) / 16) * source_fps + 0.01)
        assert np.abs(clip - shown).max() <= 1 and (np.diff(clip) > 0).all()
    assert got[-1][-1] >= count - 3


@pytest.mark.parametrize(
    ("count", "asked", "windows"), [(40, 1, 1), (9, 5, 1), (17, 5, 1), (18, 5, 2), (40, 5, 4), (90, 5, 5)]
)
def test_no_more_windows_than_fit(read, tmp_path, count, asked, windows):
    """They do not overlap; one window is the start of the video, as the paper truncates."""
    path = write_numbered(tmp_path / "a.mp4", count)
    got = [numbers_of(clip) for clip in read(path, clips_per_video=asked)[0]]
    assert len(got) == windows
    assert got[0] == list(range(9))
    shown = [number for clip in got for number in clip]
    assert shown == sorted(set(shown))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_windows_of_a_late_video_and_longer_audio(read, tmp_path, suffix):
    """The windows follow the video, not the container: it starts at 3 s, and its sound goes on for 10 s more."""
    write_numbered(tmp_path / "a.mp4", 64, 16)
    write_audio(tmp_path / "a.wav", 14)
    late = ["-output_ts_offset", 3, "-avoid_negative_ts", "disabled"]
    ffmpeg("-i", tmp_path / "a.mp4", "-i", tmp_path / "a.wav", "-map", "0:v", "-map", "1:a", "-c:v", "copy",
           "-c:a", "aac", *late, tmp_path / f"late.{suffix}")  # fmt: skip
    got = [numbers_of(clip) for clip in read(tmp_path / f"late.{suffix}", clips_per_video=3)[0]]
    assert [clip[0] for clip in got] == pytest.approx([0, 27, 55], abs=1)
    assert got[0] == list(range(9)) and got[-1][-1] >= 62


def images():
    rgb = numbered(4711, 64, 96)
    gray = rgb[..., 0]
    alpha = np.dstack([rgb, np.full(gray.shape, 255, np.uint8)])
    return {
        "rgb.png": Image.fromarray(rgb),
        "rgb.jpg": Image.fromarray(rgb),
        "gray.png": Image.fromarray(gray),
        "gray.jpg": Image.fromarray(gray),
        "sixteen_bit.png": Image.fromarray(gray.astype(np.uint16) * 257),
        "gray_alpha.png": Image.fromarray(alpha[..., 2:]),
        "alpha.png": Image.fromarray(alpha),
        "palette.png": Image.fromarray(rgb).quantize(8),
        "bilevel.png": Image.fromarray(gray > 128),
        "picture.webp": Image.fromarray(rgb),
        "picture.gif": Image.fromarray(rgb).quantize(8),
        "upper.JPEG": Image.fromarray(rgb),
    }


@pytest.mark.parametrize("name", images())
def test_images(read, tmp_path, name):
    picture = images()[name]
    picture.save(tmp_path / name, **({"quality": 95} if name.lower().endswith(("jpg", "jpeg")) else {}))
    frames, cropped, _ = read(tmp_path / name, num_frames=1)
    assert frames.shape == (1, 1, 3, HEIGHT, WIDTH)
    assert numbers_of(frames[0]) == [4711]
    middle = frames[0, 0, :, 4:12, 2:4].float().mean()  # the first block is white: 4711 is odd
    assert middle == pytest.approx(255 if name == "bilevel.png" else 215, abs=6)
    assert cropped == 0


def test_one_frame_of_a_video(read, tmp_path):
    path = write_numbered(tmp_path / "a.mp4", 30)
    assert numbers_of(read(path, num_frames=1)[0][0]) == [0]
    got = [numbers_of(clip)[0] for clip in read(path, num_frames=1, clips_per_video=3)[0]]
    assert got == pytest.approx([0, 14.5, 29], abs=0.6)


def test_images_train(run, tmp_path):
    """A folder of pictures and captions through the whole script, with the weight 2 that a still has."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n, (name, picture) in enumerate(images().items()):
        picture.save(folder / f"{n}_{name}")
        (folder / f"{n}_{name}").with_suffix(".txt").write_text(f"picture {n}")
    output = run(train_data_dir=folder, num_frames=1, max_train_steps=1, caption_dropout=0)
    assert (output / "pytorch_lora_weights.safetensors").is_file()


# --- Pixel formats ---------------------------------------------------------------------------------------------------

PIXEL_FORMATS = {
    "gray.mkv": ("ffv1", "gray"),
    "gray10.mkv": ("ffv1", "gray10le"),
    "ten_bit.mp4": ("libx264", "yuv420p10le"),
    "ten_bit_422.mp4": ("libx264", "yuv422p10le"),
    "full_range.mp4": ("libx264", "yuvj420p"),
    "motion_jpeg.avi": ("mjpeg", "yuvj444p"),
    "alpha.webm": ("libvpx-vp9", "yuva420p"),
    "alpha.mov": ("qtrle", "argb"),
    "png.mov": ("png", "rgba"),
    "lossless.mp4": ("libx264", "yuv444p"),
    "rgb.mkv": ("ffv1", "bgr0"),
    "sixteen_bit.mkv": ("ffv1", "gray16le"),
    "animation.gif": ("gif", "rgb8"),
}


@pytest.mark.parametrize("name", PIXEL_FORMATS)
def test_pixel_formats(read, tmp_path, name):
    """Made by ffmpeg from raw frames; levels and numbers survive."""
    codec, pix_fmt = PIXEL_FORMATS[name]
    raw = tmp_path / "a.raw"
    raw.write_bytes(b"".join(numbered(10 * n + 1).tobytes() for n in range(9)))
    # GIF counts in hundredths of a second: 20 fps is its own.
    fps = 20 if name.endswith("gif") else 16
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "48x32", "-r", fps, "-i", raw, "-c:v", codec,
           "-pix_fmt", pix_fmt, tmp_path / name)  # fmt: skip
    frames = read(tmp_path / name, fps=fps)[0][0]
    assert numbers_of(frames) == [10 * n + 1 for n in range(9)]
    first_block = frames[:, :, 4:12, 2:4].float()
    assert first_block.mean() == pytest.approx(215, abs=8)
    assert first_block.mean(dim=(0, 2, 3)).std() < 6  # no colour cast


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory) -> Path:
    """The corpus in one folder, with a row for each and one with nothing in the column."""
    folder = tmp_path_factory.mktemp("bad")
    good = write_video(folder / "source.mp4", moving_square(0))
    for name, (make, _) in CORPUS.items():
        make(folder / name, good)
    rows = [{"video": name, "text": f"caption of {name}"} for name in CORPUS] + [{"video": None, "text": "nothing"}]
    write_metadata(folder, rows, "table.jsonl")
    return folder


def test_corpus_is_big_enough():
    assert sum(reason is not None for _, reason in CORPUS.values()) >= 15


@pytest.mark.parametrize("name", CORPUS)
def test_bad_input_alone(flags, tmp_path, bad_folder, log, name):
    """Each file by itself: one warning with file and reason, or frames."""
    reason = CORPUS[name][1]
    table = write_metadata(tmp_path, [{"video": str(bad_folder / name), "text": "a"}], "one.jsonl")
    args = train_ltd.parse_args(flags(train_data_dir=table))
    (video,) = train_ltd.cache_videos(args, train_ltd.build_accelerator(args), "train", None)
    warnings = [message for message in log("WARNING") if name in message]
    if reason is None:
        assert "reason" not in video and not warnings
        assert load_file(Path(args.cache_dir, video["path"]))["latents"].shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
    else:
        assert re.search(reason, video["reason"])
        assert len(warnings) == 1 and re.search(reason, warnings[0])
        assert not list(Path(args.cache_dir).rglob("*.safetensors"))


def test_bad_input_together(prepare, log, bad_folder):
    """All of them in one dataset: one line each, a count, `skipped.jsonl`, and the good ones train."""
    bad = {name for name, (_, reason) in CORPUS.items() if reason is not None}
    clips, _, _, args = prepare(train_data_dir=bad_folder / "table.jsonl", max_skipped=0.9)
    assert {clip["name"] for clip in clips} == set(CORPUS) - bad
    assert all(clip["captions"] == [f"caption of {clip['name']}"] for clip in clips)
    lines = [json.loads(line) for line in Path(args.output_dir, "skipped.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == len(bad) + 1 and all(line["reason"] for line in lines)
    assert bad <= {line["file"] for line in lines}
    (nothing,) = [line for line in lines if line["file"] not in bad]
    assert str(len(CORPUS)) in nothing["file"]  # the row without a file is named by its number
    warnings = [m for m in log("WARNING") if m.startswith("skipped ")]
    assert len(warnings) == len(lines) and all("\n" not in warning for warning in warnings)
    for line in lines:
        assert sum(line["file"] in w and line["reason"] in w for w in warnings) == 1
    assert any(f"{len(lines)} of {len(CORPUS) + 1} videos" in m for m in log("WARNING"))
    again = prepare(train_data_dir=bad_folder / "table.jsonl", max_skipped=0.9)[0]  # a second run starts a new list
    assert [clip["name"] for clip in again] == [clip["name"] for clip in clips]
    assert len(Path(args.output_dir, "skipped.jsonl").read_text("utf-8").splitlines()) == len(lines)


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize(
    ("bad", "limit", "stops"), [(1, None, False), (2, None, True), (3, 0.3, False), (4, 0.3, True), (10, 1.0, True)]
)
def test_max_skipped(prepare, tmp_path, bad, limit, stops):
    """Ten videos: one may be bad by default, and all of them never."""
    names = make_videos(tmp_path / "data", 10 - bad) + [f"missing{n}.mp4" for n in range(bad)]
    write_metadata(tmp_path / "data", [{"file_name": name, "text": "a"} for name in names])
    kwargs = {"train_data_dir": tmp_path / "data"} | ({} if limit is None else {"max_skipped": limit})
    if not stops:
        assert len(prepare(**kwargs)[0]) == 10 - bad
        return
    with pytest.raises(ValueError, match=rf"{bad} of 10 videos.*missing0\.mp4.*file not found.*--max_skipped"):
        prepare(**kwargs)
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == bad
    if bad < 10:
        assert prepare(**kwargs, dry_run=True)  # of the few that it looks at, one is a large share


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize(
    ("lengths", "advice"),
    [
        ([12] * 10, 9),
        ([30] * 5 + [20] * 4 + [5], 17),  # 9 of 10 have 20 frames
        ([30] * 8 + [8, 5], 5),  # 9 of 10 have 8
        ([30] * 8 + [13, 0], 13),  # the unreadable one counts as lost
        ([30] * 8 + [0, 0], None),  # no length keeps 90 %
    ],
)
def test_too_short_names_a_length(prepare, tmp_path, lengths, advice):
    """The largest 4k+1 that would keep 90 %; a length of 0 is a missing file."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n, length in enumerate(lengths):
        if length:
            write_numbered(folder / f"{n}.mp4", length, first=n * 100)
    write_metadata(folder, [{"file_name": f"{n}.mp4", "text": "a"} for n in range(len(lengths))])
    with pytest.raises(ValueError) as error:
        prepare(train_data_dir=folder, num_frames=25)
    if advice is None:
        assert "--num_frames" not in str(error.value)
    else:
        assert f"--num_frames {advice} would keep 90 %" in str(error.value)
        assert len(prepare(train_data_dir=folder, num_frames=advice)[0]) >= 9


def test_windows_that_cannot_be_reached_do_not_lose_the_video(read, tmp_path):
    """A file cut off in its second half still gives its first window when several are asked for."""
    whole = write_numbered(tmp_path / "a.mkv", 160, options={"g": "16"})
    path = truncate(whole, tmp_path / "cut.mkv", 0.6)
    assert numbers_of(read(path)[0][0]) == list(range(9))
    got = [numbers_of(clip) for clip in read(path, clips_per_video=4)[0]]
    assert got[0] == list(range(9)) and 2 <= len(got) <= 4


# --- Hostile rows ----------------------------------------------------------------------------------------------------


def test_metadata_stays_in_its_folder(flags, tmp_path):
    """Paths upwards, absolute ones, links and URLs that lead out are skipped; a link within the folder is followed."""
    folder = tmp_path / "data"
    make_videos(folder, 1)
    outside = write_video(tmp_path / "private.mp4", moving_square(5))
    (folder / "out.mp4").symlink_to(outside)
    (folder / "in.mp4").symlink_to("clip0.mp4")
    (folder / "up").symlink_to(tmp_path)
    good = ["clip0.mp4", "in.mp4", str(folder / "clip0.mp4"), "up/data/clip0.mp4"]
    bad = ["../private.mp4", str(outside), "out.mp4", "up/private.mp4", f"file://{outside}", "http://localhost/a.mp4"]
    bad += [f"file://{outside}::hf://datasets/a/b.mp4", f"simplecache::file://{outside}::hf://datasets/a/b.mp4"]
    write_metadata(folder, [{"file_name": name, "text": "a"} for name in good + bad])
    args = train_ltd.parse_args(flags(train_data_dir=folder))
    videos = train_ltd.cache_videos(args, train_ltd.build_accelerator(args), "train", None)
    assert [v.get("reason") for v in videos] == [None] * len(good) + ["leads out of the dataset's folder"] * len(bad)


def test_a_playlist_is_no_video(read, tmp_path):
    """It could name any file of the machine."""
    write_video(tmp_path / "private.ts", moving_square(5))
    entries = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path / 'private.ts'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(entries)
    with pytest.raises((train_ltd.ClipError, OSError, train_ltd.av.FFmpegError)):
        read(tmp_path / "list.m3u8")


@pytest.mark.usefixtures("one_text_encoder")
def test_symbolic_links_beside_their_captions_are_followed(prepare, originals, tmp_path):
    """A folder of pairs is what its owner put there."""
    (tmp_path / "data").mkdir()
    for name in NAMES:
        (tmp_path / "data" / name).symlink_to(originals / name)
        (tmp_path / "data" / name).with_suffix(".txt").write_text("a")
    assert len(prepare(train_data_dir=tmp_path / "data")[0]) == len(NAMES)


@pytest.mark.parametrize("value", ["a\0b.mp4", "hf://x", "hf://", 7, [1], "zip://a.mp4::no.zip", "ftp://x"])
def test_odd_rows_are_skipped(tmp_path, flags, value):
    args = train_ltd.parse_args(flags())
    for folder in (tmp_path, Path("somebody/clips")):
        with pytest.raises(train_ltd.ClipError):
            train_ltd.clip_source(value, folder, False, args)


def test_rows_of_a_hub_dataset_stay_in_its_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(train_ltd, "HUB_CACHES", (tmp_path / "hub", tmp_path / "datasets"))
    (tmp_path / "datasets").mkdir()
    for path in (tmp_path / "private.mp4", tmp_path / "datasets" / "a.mp4"):
        path.write_bytes(b"a clip")
    name, args = Path("somebody/clips"), train_ltd.parse_args(["--dataset_name=somebody/clips", "--report_to=none"])
    assert not name.is_dir()
    cached = str(tmp_path / "datasets" / "a.mp4")
    assert train_ltd.clip_source(cached, name, False, args) == cached
    bad = [str(tmp_path / "private.mp4"), str(tmp_path / "hub/../private.mp4"), "http://localhost/a.mp4"]
    for value in [*bad, f"file://{tmp_path}/private.mp4::hf://datasets/a/b.mp4"]:
        for row in (value, {"path": value, "bytes": None}):
            with pytest.raises(train_ltd.ClipError, match="leads out of the dataset's folder"):
                train_ltd.clip_source(row, name, False, args)


def test_a_stray_text_file_makes_no_folder_of_pairs(prepare, originals, tmp_path):
    """Of clips with a caption each, or of parquet files, in whose place nothing would be found."""
    for make in (embedded_by_datasets, lambda *where: metadata_folder(*where, "metadata.jsonl")):
        folder = tmp_path / make.__name__.strip("<>")
        make(originals, folder)
        (folder / "LICENSE.txt").write_text("anybody may do anything")
        assert len(prepare(train_data_dir=folder)[0]) == len(NAMES)


def test_limits_before_decoding(read, monkeypatch, tmp_path):
    path = write_numbered(tmp_path / "a.mp4", 20)
    with monkeypatch.context() as patch:
        patch.setattr(train_ltd, "MAX_PIXELS", 32 * 48 - 1)
        with pytest.raises(train_ltd.ClipError, match="too large: 48 x 32 pixels"):
            read(path)
    monkeypatch.setattr(train_ltd, "MAX_SECONDS", 1)
    read(path)  # only its start is decoded
    with pytest.raises(train_ltd.ClipError, match="too long"):
        read(path, clips_per_video=2)


def test_endless_caption_is_cut(prepare, log, tmp_path):
    clips = prepare(**caption_dataset(tmp_path / "data", ["endless " * 100_000, "short"]))[0]
    assert len(clips[0]["captions"][0]) == train_ltd.MAX_CHARACTERS - 1  # and a space at the end
    assert len([m for m in log("WARNING") if "a.mp4: caption cut to 10000 characters" in m]) == 1


# --- Sources ---------------------------------------------------------------------------------------------------------

NAMES = [f"clip{n}.mp4" for n in range(4)]
CAPTIONS = ["a red square", 'she says: "go, go"', "ein Bär läuft 🐻", "the last one"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Four different clips, without captions."""
    folder = tmp_path_factory.mktemp("originals")
    make_videos(folder)
    return folder


@pytest.fixture(scope="module")
def expected_latents(tiny_wan, originals) -> list[torch.Tensor]:
    """What each clip must be in the cache, encoded here from frames decoded here."""
    vae = AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae")
    return [reference_latents(vae, ffmpeg_frames(originals / name, HEIGHT, WIDTH)[:NUM_FRAMES]) for name in NAMES]


@torch.no_grad()
def reference_latents(vae, frames: torch.Tensor) -> torch.Tensor:
    """Normalised mode of the posterior of `(F, 3, H, W)` uint8 frames, by diffusers' own video processor."""
    from diffusers.video_processor import VideoProcessor

    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    mode = vae.encode(VideoProcessor(vae_scale_factor=8).preprocess_video(pictures)).latent_dist.mode()
    mean, std = (torch.tensor(c).view(1, -1, 1, 1, 1) for c in (vae.config.latents_mean, vae.config.latents_std))
    return ((mode - mean) / std)[0]


def copy_clips(originals: Path, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes((originals / name).read_bytes())
    return [folder / name for name in NAMES]


def with_key(key: str, prefix: str = "", caption: str = "text") -> list[dict]:
    return [{key: prefix + name, caption: text} for name, text in zip(NAMES, CAPTIONS, strict=True)]


def metadata_folder(originals, folder, name):
    copy_clips(originals, folder)
    write_metadata(folder, with_key("file_name"), name)
    return {"train_data_dir": folder}


def table_of_paths(originals, folder, name):
    copy_clips(originals, folder / "media" / "deep")
    return {"train_data_dir": write_metadata(folder, with_key("video", "media/deep/"), name)}


def absolute_paths(originals, folder, prefix=""):
    paths = copy_clips(originals, folder / "elsewhere")
    (folder / "tables").mkdir()
    rows = [{"video": f"{prefix}{p}", "text": t} for p, t in zip(paths, CAPTIONS, strict=True)]
    return {"train_data_dir": write_metadata(folder / "tables", rows, "a.jsonl")}


def own_columns(originals, folder):
    copy_clips(originals, folder)
    write_metadata(folder, with_key("clip", caption="what is seen"), "rows.csv")
    return {"train_data_dir": folder / "rows.csv", "video_column": "clip", "caption_column": "what is seen"}


def embedded(originals, folder, plain):
    folder.mkdir()
    data = [(originals / name).read_bytes() for name in NAMES]
    videos = data if plain else [{"bytes": d, "path": n} for d, n in zip(data, NAMES, strict=True)]
    rows = [{"video": v, "text": t} for v, t in zip(videos, CAPTIONS, strict=True)]
    return {"train_data_dir": write_metadata(folder, rows, "all.parquet")}


def embedded_by_datasets(originals, folder):
    """A repository of parquet files with a Video feature, as `push_to_hub` makes them, on the local disk."""
    import datasets

    (folder / "data").mkdir(parents=True)
    rows = {"video": [str(originals / name) for name in NAMES], "text": CAPTIONS}
    dataset = datasets.Dataset.from_dict(rows).cast_column("video", datasets.Video(decode=False))
    dataset = dataset.map(lambda row: {"video": {"bytes": Path(row["video"]["path"]).read_bytes(), "path": None}})
    dataset.cast_column("video", datasets.Video()).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return {"train_data_dir": folder}


def pairs(originals, folder, encoding="utf-8"):
    for clip, text in zip(copy_clips(originals, folder), CAPTIONS, strict=True):
        clip.with_suffix(".txt").write_text(text + "\n", encoding=encoding)
    return {"train_data_dir": folder}


def nested_pairs(originals, folder):
    for clip, text in zip(copy_clips(originals, folder / "x" / "y"), CAPTIONS, strict=True):
        clip.with_suffix(".txt").write_text(text)
    (folder / "x" / "notes.md").write_text("no clip")
    (folder / "x" / "y" / NAMES[3]).rename(folder / "x" / "y" / "clip3.MP4")
    return {"train_data_dir": folder}


def split_folder(originals, folder, layout):
    layout(originals, folder / "train")
    write_video((folder / "validation").mkdir() or folder / "validation" / "other.mp4", moving_square(77))
    write_metadata(folder / "validation", [{"file_name": "other.mp4", "text": "held out"}])
    return {"train_data_dir": folder}


SOURCES = {
    "metadata.jsonl": lambda o, f: metadata_folder(o, f, "metadata.jsonl"),
    "metadata.csv": lambda o, f: metadata_folder(o, f, "metadata.csv"),
    "metadata.parquet": lambda o, f: metadata_folder(o, f, "metadata.parquet"),
    "json": lambda o, f: table_of_paths(o, f, "clips.json"),
    "jsonl": lambda o, f: table_of_paths(o, f, "clips.jsonl"),
    "csv": lambda o, f: table_of_paths(o, f, "clips.csv"),
    "parquet": lambda o, f: table_of_paths(o, f, "clips.parquet"),
    "absolute paths": absolute_paths,
    "file URLs": lambda o, f: absolute_paths(o, f, "file://"),
    "own columns": own_columns,
    "embedded struct": lambda o, f: embedded(o, f, plain=False),
    "embedded bytes": lambda o, f: embedded(o, f, plain=True),
    "embedded by datasets": embedded_by_datasets,
    "pairs": pairs,
    "pairs with BOM": lambda o, f: pairs(o, f, "utf-8-sig"),
    "nested pairs": nested_pairs,
    "split of metadata": lambda o, f: split_folder(o, f, SOURCES["metadata.jsonl"]),
    "split of pairs": lambda o, f: split_folder(o, f, pairs),
}


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("source", SOURCES)
def test_sources(prepare, originals, expected_latents, tmp_path, source):
    """Every layout gives the same four clips, in the same order, with the same captions."""
    clips, held_out, _, args = prepare(**SOURCES[source](originals, tmp_path / "data"), cache_dtype="float32")
    assert [clip["captions"] for clip in clips] == [[text] for text in CAPTIONS]
    assert not held_out
    for clip, expected in zip(clips, expected_latents, strict=True):
        latents = load_file(Path(args.cache_dir, clip["path"]))["latents"]
        torch.testing.assert_close(latents, expected[None], rtol=0, atol=1e-5)


def test_pair_without_text_has_an_empty_caption(prepare, log, originals, tmp_path):
    kwargs = pairs(originals, tmp_path / "data")
    (tmp_path / "data" / "clip1.txt").unlink()
    clips = prepare(**kwargs)[0]
    assert [clip["captions"] for clip in clips] == [["a red square"], [""], [CAPTIONS[2]], [CAPTIONS[3]]]
    assert len([message for message in log("WARNING") if "clip1.txt" in message]) == 1
    assert "captions: 4, 1 of them empty" in log()


def test_text_that_is_not_utf8_is_named(prepare, originals, tmp_path):
    kwargs = pairs(originals, tmp_path / "data")
    (tmp_path / "data" / "clip2.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(ValueError, match=r"clip2\.txt.*UTF-8"):
        prepare(**kwargs)


@pytest.mark.parametrize(("flag", "value"), [("video_column", "film"), ("caption_column", "prompt")])
def test_missing_column_lists_the_others(prepare, originals, tmp_path, flag, value):
    kwargs = table_of_paths(originals, tmp_path / "data", "clips.csv")
    with pytest.raises(ValueError, match=rf"--{flag} {value}.*video, text"):
        prepare(**kwargs | {flag: value})


def test_table_of_an_unknown_kind(prepare, tmp_path):
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"table\.xlsx.*\.jsonl"):
        prepare(train_data_dir=tmp_path / "table.xlsx")


HUB_SCRIPT = """
import json, sys
from pathlib import Path
from accelerate.state import AcceleratorState, GradientState
import train_ltd

for line in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train_ltd.main(train_ltd.parse_args(line))
"""


def test_hub_dataset_and_streaming(flags, originals, expected_latents, tmp_path):
    """A Hub name, as videofolder, parquet, csv with relative paths, downloaded and streamed: one cache and order."""
    metadata_folder(originals, tmp_path / "folder", "metadata.jsonl")
    embedded_by_datasets(originals, tmp_path / "parquet")
    table_of_paths(originals, tmp_path / "table", "rows.csv")
    card = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n---\n"
    (tmp_path / "table" / "README.md").write_text(card)
    runs = [(repo, streaming) for repo in ("folder", "parquet", "table") for streaming in (False, True)]
    lines = []
    for repo, streaming in runs:
        output = tmp_path / f"{repo}-{streaming}"
        kwargs = {"dataset_name": f"somebody/{repo}", "train_data_dir": None, "streaming": streaming}
        kwargs |= {"output_dir": output, "cache_dir": output / "cache", "max_train_steps": 5, "cache_dtype": "float32"}
        lines.append(flags(**kwargs))
    with HubServer(tmp_path / "hub") as hub:
        for repo in ("folder", "parquet", "table"):
            hub.add(f"somebody/{repo}", tmp_path / repo, repo_type="dataset")
        command = [sys.executable, "-c", HUB_SCRIPT, json.dumps(lines)]
        result = subprocess.run(command, env=os.environ | hub.env(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    caches, weights = [], []
    for repo, streaming in runs:
        output = tmp_path / f"{repo}-{streaming}"
        caches.append(cache_files(SimpleNamespace(cache_dir=output / "cache")))
        weights.append(load_file(output / "pytorch_lora_weights.safetensors"))
    assert len([name for name in caches[0] if name.startswith("latents")]) == len(NAMES)
    assert all(cache == caches[0] for cache in caches)
    assert all(torch.equal(weight[key], weights[0][key]) for weight in weights for key in weights[0])
    got = [
        load_file(tmp_path / "folder-True" / "cache" / name)["latents"][0] for name in caches[0] if "latents" in name
    ]
    for expected in expected_latents:
        assert min((latents - expected).abs().max() for latents in got) < 1e-5


# --- Captions --------------------------------------------------------------------------------------------------------


def caption_dataset(folder: Path, captions: list) -> dict:
    folder.mkdir()
    write_video(folder / "a.mp4", moving_square(0))
    rows = [{"video": "a.mp4", "text": caption} for caption in captions]
    return {"train_data_dir": write_metadata(folder, rows, "rows.jsonl")}


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two   spaces \n and a line ", "two spaces and a line"),
        ("fish &amp; chips", "fish & chips"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("caf&eacute; Ünïcödé 動画 🎬", "café Ünïcödé 動画 🎬"),
        ('--- "quoted": {yes}', '--- "quoted": {yes}'),
        ("", ""),
        (None, ""),
    ],
)
def test_captions_are_cleaned(prepare, tmp_path, raw, clean):
    clips, _, files, _ = prepare(**caption_dataset(tmp_path / "data", [raw, "b"]))
    assert clips[0]["captions"] == [clean] == [prompt_clean(raw or "")]
    assert clean in files and "" in files


def test_empty_captions_are_counted(prepare, log, tmp_path):
    prepare(**caption_dataset(tmp_path / "data", ["a", "", None, "  ", ["b", ""], []]))
    assert "captions: 7, 5 of them empty" in log()


def test_trigger_word(prepare, tmp_path, log):
    """Before every caption, the empty one too, and before validation prompts."""
    data = caption_dataset(tmp_path / "data", ["a dog", "", ["one", "two"]])
    clips, _, files, args = prepare(**data, trigger_word="ohwx", validation_prompt=["a cat", "ohwx, again"])
    assert [clip["captions"] for clip in clips] == [["ohwx a dog"], ["ohwx"], ["ohwx one", "ohwx two"]]
    assert args.validation_prompt[0] == "ohwx a cat"
    assert set(files) >= {"ohwx a dog", "ohwx", "ohwx one", "ohwx two", "ohwx a cat", ""}
    assert "a cat" not in files
    assert "captions: 4, 1 of them empty" in log()


def drawn_captions(clips, files, args, epochs: int) -> list[list[str]]:
    """The caption that each clip gets in each epoch, told by its embedding."""
    dataset = train_ltd.LatentDataset(clips, files, args)
    known = {train_ltd.load_prompt(args, file).numpy().tobytes(): caption for caption, file in files.items()}
    assert len(known) == len(files)
    drawn = []
    for epoch in range(epochs):
        dataset.epoch = epoch
        drawn.append([known[dataset[n]["prompt_embeds"].numpy().tobytes()] for n in range(len(clips))])
    return drawn


def test_lists_of_captions_are_drawn_per_epoch(prepare, tmp_path):
    texts = ["one", "two", "three"]
    clips, _, files, args = prepare(**caption_dataset(tmp_path / "data", [texts, texts, "alone"]), caption_dropout=0)
    assert [clip["captions"] for clip in clips] == [texts, texts, ["alone"]]
    drawn = drawn_captions(clips, files, args, 60)
    assert drawn == drawn_captions(clips, files, args, 60)
    for n in (0, 1):
        counts = [sum(row[n] == text for row in drawn) for text in texts]
        assert sum(counts) == 60 and min(counts) >= 10
    assert [row[0] for row in drawn] != [row[1] for row in drawn]
    assert {row[2] for row in drawn} == {"alone"}


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_caption_dropout(prepare, tmp_path, share):
    """That share of the samples gets the encoded "", without the trigger word."""
    data = caption_dataset(tmp_path / "data", ["a", "b", "c", "d"])
    clips, _, files, args = prepare(**data, caption_dropout=share, trigger_word="ohwx")
    drawn = [caption for row in drawn_captions(clips, files, args, 100) for caption in row]
    assert {c for c in drawn if c} == ({"ohwx a", "ohwx b", "ohwx c", "ohwx d"} if share < 1 else set())
    assert drawn.count("") / len(drawn) == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)


# --- Cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_golden_text(prepare, tiny_wan, tmp_path, dtype):
    """The cached caption, padded, is what the stock pipeline encodes; on disk it has its true length."""
    long = " ".join(f"word{n} moves" for n in range(400))
    captions = ["", "a", "a red square moves right", "x" * 300, "Ünïcödé &amp; 🐻 動画", long]
    clips, _, files, args = prepare(**caption_dataset(tmp_path / "data", captions), cache_dtype=dtype)
    pipeline = WanPipeline.from_pretrained(tiny_wan, transformer=None, vae=None)
    lengths = []
    for clip, raw in zip(clips, captions, strict=True):
        with torch.no_grad():
            expected = pipeline.encode_prompt(raw, None, False, max_sequence_length=512)[0][0]
        tokens = len(pipeline.tokenizer(prompt_clean(raw), truncation=True, max_length=512).input_ids)
        file = files[clip["captions"][0]]
        on_disk = load_file(Path(args.cache_dir, file))
        assert list(on_disk) == ["prompt_embeds"]
        assert on_disk["prompt_embeds"].shape == (tokens, 32)
        assert on_disk["prompt_embeds"].dtype == getattr(torch, dtype)
        padded = train_ltd.load_prompt(args, file)
        assert padded.shape == (512, 32) and padded.dtype == torch.float32
        assert torch.equal(padded, expected.to(getattr(torch, dtype)).float())
        lengths.append(tokens)
    assert lengths[0] == 1 and max(lengths) == 512 and len(set(lengths)) >= 5


def test_long_captions_are_warned_about(prepare, log, tmp_path):
    prepare(**caption_dataset(tmp_path / "data", ["long " * 600, "short"]))
    (warning,) = [message for message in log("WARNING") if "512" in message]
    assert "long long" in warning


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_golden_latents(prepare, tiny_wan, originals, expected_latents, tmp_path, dtype):
    """The mode of the VAE's posterior, normalised; decoded, it is the VAE's own reconstruction."""
    clips, _, _, args = prepare(**metadata_folder(originals, tmp_path / "data", "metadata.csv"), cache_dtype=dtype)
    vae = AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae")
    mean, std = (torch.tensor(c).view(1, -1, 1, 1, 1) for c in (vae.config.latents_mean, vae.config.latents_std))
    for clip, name, expected in zip(clips, NAMES, expected_latents, strict=True):
        latents = load_file(Path(args.cache_dir, clip["path"]))["latents"]
        assert latents.dtype == getattr(torch, dtype) and latents.shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
        tolerance = 1e-5 if dtype == "float32" else 5e-3
        torch.testing.assert_close(latents[0].float(), expected, rtol=0, atol=tolerance)
        pixels = ffmpeg_frames(originals / name, HEIGHT, WIDTH)[:NUM_FRAMES].float().div(127.5).sub(1)
        with torch.no_grad():
            own = vae(pixels.transpose(0, 1)[None]).sample
            decoded = vae.decode(latents.float() * std + mean).sample
        assert (decoded - own).abs().mean() < 2 * tolerance
    item = train_ltd.LatentDataset(clips, prepare(train_data_dir=tmp_path / "data", cache_dtype=dtype)[2], args)[2]
    stored = load_file(Path(args.cache_dir, clips[2]["path"]))["latents"][0]
    assert torch.equal(item["latents"], stored.float())


def test_only_safetensors(run, clips, tmp_path):
    run(cache_dtype="float16", max_train_steps=1)
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert files and {p.suffix for p in files} == {".safetensors"}


@pytest.fixture
def no_models(monkeypatch):
    """Function after which loading the VAE (and, by default, the text encoder) is an error."""

    def forbid(vae=True, text=True):
        def refuse(*args, **kwargs):
            raise AssertionError("a model was loaded")

        for model in [AutoencoderKLWan] * vae + [UMT5EncoderModel] * text:
            monkeypatch.setattr(model, "from_pretrained", refuse)

    return forbid


def test_warm_start_loads_no_model(prepare, no_models, log, originals, tmp_path):
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    cold = prepare(**data)
    assert encode_counts(log()) == (4, 5) and not [m for m in log() if "warm start" in m]
    before = cache_files(cold[3])
    no_models()
    warm = prepare(**data, output_dir=tmp_path / "other run", cache_dir=tmp_path / "cache")
    assert encode_counts(log()) == (0, 0)
    assert len([m for m in log() if "warm start" in m]) == 1
    assert warm[:3] == cold[:3]
    assert cache_files(cold[3]) == before
    with pytest.raises(AssertionError, match="a model was loaded"):  # the test itself works
        prepare(**data, cache_dir=tmp_path / "cold")


def test_moved_and_touched_folder_is_still_warm(prepare, no_models, log, originals, tmp_path):
    prepare(**metadata_folder(originals, tmp_path / "data", "metadata.jsonl"))
    (tmp_path / "data").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, (1, 1))
    no_models()
    prepare(train_data_dir=tmp_path / "moved")
    assert encode_counts(log()) == (0, 0)


def test_edited_caption_recomputes_only_itself(prepare, no_models, log, originals, tmp_path):
    prepare(**metadata_folder(originals, tmp_path / "data", "metadata.jsonl"))
    before = cache_files(prepare(train_data_dir=tmp_path / "data")[3])
    rows = with_key("file_name")
    rows[2]["text"] = "edited"
    write_metadata(tmp_path / "data", rows)
    no_models(text=False)
    clips, _, files, args = prepare(train_data_dir=tmp_path / "data")
    assert encode_counts(log()) == (0, 1)
    assert clips[2]["captions"] == ["edited"]
    after = cache_files(args)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {files["edited"]}


def test_edited_clip_recomputes_only_itself(prepare, no_models, log, originals, tmp_path):
    prepare(**metadata_folder(originals, tmp_path / "data", "metadata.jsonl"))
    write_video(tmp_path / "data" / NAMES[1], moving_square(50))
    no_models(vae=False)
    prepare(train_data_dir=tmp_path / "data")
    assert encode_counts(log()) == (1, 0)


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"height": 48}, (4, 0)),
        ({"width": 32}, (4, 0)),
        ({"num_frames": 13, "fps": 20}, (4, 0)),
        ({"fps": 14}, (4, 0)),
        ({"clips_per_video": 2}, (4, 0)),
        ({"cache_dtype": "float32"}, (4, 5)),
        ({"mixed_precision": "bf16"}, None),
        ({"learning_rate": 1e-3, "rank": 2, "loss": "mse", "seed": 9, "flow_shift": 1, "min_ltd": 0.01}, (0, 0)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_changes_the_cache(prepare, log, originals, tmp_path, change, counts):
    """And what does not."""
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    before = cache_files(prepare(**data)[3])
    args = prepare(**data, **change)[3]
    got = encode_counts(log())
    assert got == counts if counts else got[0] == 0
    after = cache_files(args)
    assert {name: after[name] for name in before} == before  # the other cache stays usable
    assert len(after) == len(before) + sum(got)


def test_another_model_has_its_own_cache(prepare, log, tiny_wan, originals, tmp_path):
    """Same folder, other weights: of the VAE, then of the text encoder."""
    import shutil

    from safetensors.torch import save_file

    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    prepare(**data)
    model = tmp_path / "model"
    shutil.copytree(tiny_wan, model)
    prepare(**data, pretrained_model_name_or_path=model)
    assert encode_counts(log()) == (0, 0)  # a copy of the model is the same model
    for component, counts in (("vae", (4, 0)), ("text_encoder", (0, 5))):
        (path,) = (model / component).glob("*.safetensors")
        weights = load_file(path)
        save_file({key: value * 1.01 for key, value in weights.items()}, path, {"format": "pt"})
        prepare(**data, pretrained_model_name_or_path=model)
        assert encode_counts(log()) == counts


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("left", ["half", "nothing"])
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_damaged_entry_is_made_again(prepare, log, originals, tmp_path, kind, left):
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    args = prepare(**data)[3]
    before = cache_files(args)
    path = min(Path(args.cache_dir, kind).iterdir())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if left == "half" else 0])
    prepare(**data)
    assert encode_counts(log()) == ((1, 0) if kind == "latents" else (0, 1))
    assert cache_files(args) == before


def test_interrupted_write_leaves_no_entry(prepare, log, monkeypatch, originals, tmp_path):
    """Stopped between the third entry's bytes and its name."""
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    names = []

    def replace(source, target, real=os.replace):
        names.append(target)
        if len(names) == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            prepare(**data)
    assert len(names) == 3 and not Path(names[2]).exists()
    prepare(**data)
    assert encode_counts(log()) == (2, 5)


def test_killed_run_resumes(flags, prepare, log, tmp_path):
    """SIGKILL in the middle of caching: the next run does the rest, and the cache is as if nothing had happened."""
    names = make_videos(tmp_path / "data", 40)
    write_metadata(tmp_path / "data", [{"file_name": name, "text": name} for name in names])
    command = [sys.executable, str(ROOT / "train_ltd.py"), *flags(train_data_dir=tmp_path / "data")]
    process = subprocess.Popen(command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, stderr=subprocess.DEVNULL)
    entries, deadline = tmp_path / "cache" / "latents", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if entries.is_dir() and len(list(entries.glob("*.safetensors"))) >= 5:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path: path.read_bytes() for path in entries.glob("*.safetensors") if not path.name.startswith(".")}
    assert 5 <= len(done) < 40
    for path in done:
        assert load_file(path)["latents"].shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
    clips = prepare(train_data_dir=tmp_path / "data")[0]
    assert encode_counts(log())[0] == 40 - len(done)
    assert all(path.read_bytes() == data for path, data in done.items())
    straight = prepare(train_data_dir=tmp_path / "data", cache_dir=tmp_path / "straight")[0]
    assert clips == straight


def test_two_processes_share_the_work(flags, prepare, log, originals, tmp_path):
    """Both really run, each encodes a part, and the cache is that of one process."""
    copy_clips(originals, tmp_path / "data")
    rows = with_key("file_name") + [{"file_name": f"gone{n}.mp4", "text": "gone"} for n in range(2)]
    write_metadata(tmp_path / "data", rows)
    kwargs = {"train_data_dir": tmp_path / "data", "max_skipped": 0.5, "max_train_steps": 1}
    one = cache_files(prepare(**kwargs, cache_dir=tmp_path / "one")[3])
    expected = encode_counts(log())
    result = launch(flags(**kwargs), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "updates: 1 of 2 clips" in result.stderr  # one clip for each of two processes
    assert len(re.findall(r"RANK 0\].* gone0.mp4", result.stderr)) == 1
    assert len(re.findall(r"RANK 1\].* gone1.mp4", result.stderr)) == 1
    assert encode_counts(result.stderr.splitlines()) == expected == (4, 6 - 1)
    two = cache_files(SimpleNamespace(cache_dir=tmp_path / "cache"))
    assert two == one
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 2


def test_progress_and_summary(prepare, log, capfd, originals, tmp_path):
    """A bar with a rate and an estimate; at the end the count, the size on disk, the latents' mean and spread."""
    clips, _, _, args = prepare(
        **metadata_folder(originals, tmp_path / "data", "metadata.jsonl"), cache_dtype="float32"
    )
    bar = capfd.readouterr().err
    assert re.search(r"4/4 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ ?(video|clip)s?/s", bar)
    latents = torch.cat([load_file(Path(args.cache_dir, clip["path"]))["latents"] for clip in clips])
    (line,) = [message for message in log() if message.startswith("latents:")]
    mean, std = map(float, re.findall(r"-?[\d.]+\d", line))
    assert mean == pytest.approx(latents.mean().item(), abs=2e-3)
    assert std == pytest.approx(latents.std().item(), rel=0.05)
    (line,) = [message for message in log() if message.startswith("cache:")]
    size = sum(path.stat().st_size for path in Path(args.cache_dir, "latents").iterdir())
    assert f"{size / 2**20:.1f} MiB" in line and "4 training" in line


@pytest.mark.parametrize(("factor", "outcome"), [(4, "warning"), (1000, "error"), (1, None)])
def test_unusual_latents(prepare, log, tiny_wan, originals, tmp_path, factor, outcome):
    """A VAE whose `latents_std` is wrong: warned about when odd, refused at gross bounds."""
    import shutil

    model = shutil.copytree(tiny_wan, tmp_path / "model")
    config = json.loads((model / "vae" / "config.json").read_text())
    config["latents_std"] = [value * factor for value in config["latents_std"]]
    (model / "vae" / "config.json").write_text(json.dumps(config))
    kwargs = metadata_folder(originals, tmp_path / "data", "metadata.jsonl") | {"pretrained_model_name_or_path": model}
    if outcome == "error":
        with pytest.raises(ValueError, match="latents"):
            prepare(**kwargs)
        return
    prepare(**kwargs)
    assert len([m for m in log("WARNING") if "latents" in m]) == (outcome == "warning")


# --- The VAE check ---------------------------------------------------------------------------------------------------


class PerfectVAE:
    """Reproduces whatever it is given; its latents are the pixels."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(latents_mean=[0.1, -0.2, 0.3], latents_std=[2.0, 0.5, 1.5])

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels))

    def decode(self, latents, return_dict=False):
        return (latents,)


@pytest.fixture
def frames(originals) -> torch.Tensor:
    return ffmpeg_frames(originals / NAMES[0], HEIGHT, WIDTH)[:NUM_FRAMES]


def test_vae_check_passes_a_good_vae(flags, log, frames):
    vae, args = PerfectVAE(), train_ltd.parse_args(flags(skip_vae_check=False))
    train_ltd.build_accelerator(args)
    latents = train_ltd.encode_clip(vae, frames)
    assert latents.shape == (3, NUM_FRAMES, HEIGHT, WIDTH)
    mean, std = (torch.tensor(c).view(-1, 1, 1, 1) for c in (vae.config.latents_mean, vae.config.latents_std))
    pixels = frames.transpose(0, 1).float() / 255 * 2 - 1
    torch.testing.assert_close(latents, (pixels - mean) / std, rtol=0, atol=1e-5)
    train_ltd.check_vae(vae, frames, latents, args)
    (line,) = [message for message in log() if "dB" in message]
    assert float(re.search(r"([\d.]+) dB", line)[1]) > 60


@pytest.mark.parametrize("wrong", ["range", "channels", "normalisation", "frames"])
def test_vae_check_refuses(flags, frames, wrong):
    """Pixels in [0, 1], BGR, latents that were not normalised, frames in the wrong order."""
    vae, args = PerfectVAE(), train_ltd.parse_args(flags(skip_vae_check=False))
    train_ltd.build_accelerator(args)
    noisy = torch.randint(0, 256, frames.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    frames = frames if wrong in ("range", "normalisation") else noisy
    mean, std = (torch.tensor(c).view(-1, 1, 1, 1) for c in (vae.config.latents_mean, vae.config.latents_std))
    latents = {
        "range": (frames.transpose(0, 1).float() / 255 - mean) / std,
        "channels": train_ltd.encode_clip(vae, frames.flip(1)),
        "normalisation": frames.transpose(0, 1).float() / 127.5 - 1,
        "frames": train_ltd.encode_clip(vae, frames.flip(0)),
    }[wrong]
    with pytest.raises(ValueError, match=r"dB.*--skip_vae_check"):
        train_ltd.check_vae(vae, frames, latents, args)
    args.skip_vae_check = True
    train_ltd.check_vae(vae, frames, latents, args)


def test_untrained_vae_is_refused(prepare, tmp_path):
    """Before anything is written, with its PSNR and the way on."""
    with pytest.raises(ValueError, match=r"tiny-wan.* \d\.\d dB.*--skip_vae_check"):
        prepare(skip_vae_check=False)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# --- LTD: summary, selection, cuts -----------------------------------------------------------------------------------


def slow_discrepancy(latents: np.ndarray) -> np.ndarray:
    """Eq. 2 with the window 3, literally, in float64: `(C, F, H, W)` to `(F, H, W)`."""
    gaps = np.sqrt((np.diff(latents.astype(np.float64), axis=1) ** 2).sum(0))
    count = latents.shape[1]
    return np.stack([gaps[max(0, f - 1) : min(count - 1, f + 1)].mean(0) for f in range(count)])


@pytest.mark.usefixtures("one_text_encoder")
def test_ltd_summary_and_bounds(prepare, log, tmp_path):
    names = make_videos(tmp_path / "data", 6)
    write_metadata(tmp_path / "data", [{"file_name": name, "text": "a"} for name in names])
    clips, _, _, args = prepare(train_data_dir=tmp_path / "data", cache_dtype="float32")
    maps = [slow_discrepancy(load_file(Path(args.cache_dir, c["path"]))["latents"][0].numpy()) for c in clips]
    means = np.array([m.mean() for m in maps])
    lines = [message for message in log() if message.startswith("LTD:")]
    numbers = [float(n) for line in lines for n in re.findall(r"\d+\.\d+", line)]
    expected = [means.mean(), *np.quantile(means, [0, 0.1, 0.5, 0.9, 1]), *np.mean(maps, axis=(0, 2, 3))]
    assert numbers == pytest.approx(expected, abs=2e-3)

    low, high = (np.sort(means)[[1, 4]] + np.sort(means)[[0, 3]]) / 2
    kept = [c["name"] for c in prepare(train_data_dir=tmp_path / "data", cache_dtype="float32", min_ltd=low)[0]]
    assert kept == [name for name, mean in zip(names, means, strict=True) if mean >= low] and len(kept) == 5
    kept = [c["name"] for c in prepare(train_data_dir=tmp_path / "data", cache_dtype="float32", max_ltd=high)[0]]
    assert kept == [name for name, mean in zip(names, means, strict=True) if mean <= high] and len(kept) == 4
    kept = prepare(train_data_dir=tmp_path / "data", cache_dtype="float32", min_ltd=low, max_ltd=high)[0]
    assert len(kept) == 3
    assert any("dropped 3 of 6" in message for message in log())
    with pytest.raises(ValueError, match="min_ltd"):
        prepare(train_data_dir=tmp_path / "data", cache_dtype="float32", min_ltd=1000)


def made_up_video(name: str, *gaps: list[float]) -> dict:
    """A cached video with the given gaps between the latent frames of its windows."""
    statistics = {"gaps": list(gaps), "ltd": [float(np.mean(g)) for g in gaps]}
    return {"file": name, "path": "x", "captions": ["a"], "identity": name, "encoded": False, "statistics": statistics}


@pytest.mark.parametrize(
    ("gaps", "cut"),
    [
        ([1.0, 1.0, 1.1, 0.9, 6.0, 1.0, 1.2], True),
        ([1.0, 1.0, 1.1, 0.9, 1.0, 1.2, 8.0], True),
        ([9.0, 1.0, 1.1, 0.9, 1.0, 1.0, 1.2], False),  # only the first, which the causal VAE inflates
        ([1.0, 1.5, 2.0, 2.5, 2.0, 1.5, 1.0], False),
        ([2.0, 0.5, 1.5, 0.7, 1.8, 0.6, 1.2], False),
    ],
)
def test_cuts(flags, log, gaps, cut):
    args = train_ltd.parse_args(flags())
    train_ltd.build_accelerator(args)
    videos = [made_up_video("plain.mp4", [1.0] * 7), made_up_video("tested.mp4", gaps)]
    assert len(train_ltd.select_clips(args, videos)) == 2
    assert len([m for m in log("WARNING") if "tested.mp4" in m]) == cut
    assert not [m for m in log("WARNING") if "plain.mp4" in m]
    args.drop_cuts = True
    assert [c["name"] for c in train_ltd.select_clips(args, videos)] == ["plain.mp4", "tested.mp4"][: 2 - cut]


class PoolingVAE(torch.nn.Module):
    """Sees what there is to see: latents are the pixels, averaged over 8 x 8 of them and, but the first, 4 frames."""

    device, config = torch.device("cpu"), SimpleNamespace(latents_mean=[0.0] * 3, latents_std=[0.5] * 3)

    def encode(self, pixels):
        first, rest = F.avg_pool3d(pixels[:, :, :1], (1, 8, 8)), F.avg_pool3d(pixels[:, :, 1:], (4, 8, 8))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.cat([first, rest], dim=2)))

    def decode(self, latents, return_dict=False):
        video = latents.repeat_interleave(8, 3).repeat_interleave(8, 4)
        return (torch.cat([video[:, :, :1], video[:, :, 1:].repeat_interleave(4, 2)], dim=2),)


@pytest.mark.usefixtures("one_text_encoder")
def test_real_cut(prepare, log, monkeypatch, tmp_path):
    """Two scenes in one file; a clip that only moves has no cut. And a sane VAE passes the VAE check."""
    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", lambda *args, **kwargs: PoolingVAE())
    folder = tmp_path / "data"
    folder.mkdir()
    scenes = [np.full((HEIGHT, WIDTH, 3), colour, np.uint8) for colour in (30, 220)]
    for scene in scenes:
        scene[8:24, 8:24, 0] = 128
    write_video(folder / "cut.mp4", [np.roll(scenes[n >= 21], n, axis=1) for n in range(33)])
    write_video(folder / "moves.mp4", [np.roll(scenes[0], n, axis=1) for n in range(33)])
    write_metadata(folder, [{"file_name": f"{name}.mp4", "text": "a"} for name in ("moves", "cut")])
    kwargs = {"train_data_dir": folder, "num_frames": 33, "skip_vae_check": False}
    assert len(prepare(**kwargs)[0]) == 2
    warnings = [message for message in log("WARNING") if "cut" in message]
    assert len(warnings) == 1 and "cut.mp4" in warnings[0]
    assert [clip["name"] for clip in prepare(**kwargs, drop_cuts=True)[0]] == ["moves.mp4"]


# --- Held-out split --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_text_encoder")
def test_fraction_is_held_out(prepare, tmp_path):
    """Always the same videos; the windows and the copies of one stay on one side."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(5):
        write_numbered(folder / f"{n}.mp4", 28, first=1000 * n)
        (folder / f"copy of {n}.mp4").write_bytes((folder / f"{n}.mp4").read_bytes())
    names = sorted(path.name for path in folder.iterdir())
    kwargs = {"train_data_dir": write_metadata(folder, [{"video": n, "text": "a"} for n in names], "rows.jsonl")}
    kwargs |= {"clips_per_video": 3, "validation_split": 0.4}
    clips, held_out, _, _ = prepare(**kwargs)
    assert len(clips) == 18 and len(held_out) == 12

    def sources(clips):
        return {re.search(r"(\d)\.mp4", clip["name"])[1] for clip in clips}

    assert len(sources(clips)) == 3 and len(sources(held_out)) == 2
    assert not sources(clips) & sources(held_out)
    assert prepare(**kwargs)[:2] == (clips, held_out)
    others = [sources(prepare(**kwargs, seed=seed)[1]) for seed in (4, 5, 6)]
    assert any(other != sources(held_out) for other in others)
    backwards = write_metadata(folder, [{"video": n, "text": "a"} for n in names[::-1]], "backwards.jsonl")
    assert sources(prepare(**kwargs | {"train_data_dir": backwards})[1]) == sources(held_out)


def test_at_least_one_is_held_out_and_one_is_left(prepare, originals, tmp_path):
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    assert [len(part) for part in prepare(**data, validation_split=0.01)[:2]] == [3, 1]
    with pytest.raises(ValueError, match="validation_split"):
        prepare(**data, validation_split=0.99)


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("layout", ["split of metadata", "split of pairs"])
def test_named_split_is_held_out(prepare, originals, tmp_path, layout):
    data = SOURCES[layout](originals, tmp_path / "data")
    clips, held_out, files, _ = prepare(**data, validation_split="validation")
    assert [clip["captions"] for clip in clips] == [[text] for text in CAPTIONS]
    assert [(Path(clip["name"]).name, clip["captions"]) for clip in held_out] == [("other.mp4", ["held out"])]
    assert "held out" in files


@pytest.mark.parametrize(
    "source",
    ["split of metadata", "metadata.jsonl", "pairs", "csv"],
)
def test_split_that_does_not_exist(prepare, originals, tmp_path, source):
    """It must not quietly be the training clips again."""
    data = SOURCES[source](originals, tmp_path / "data")
    with pytest.raises(ValueError, match="holdout"):
        prepare(**data, validation_split="holdout")


# --- Batches: what is drawn for a sample -----------------------------------------------------------------------------


@pytest.fixture
def latent_dataset(prepare, originals, tmp_path):
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    clips, _, files, args = prepare(**data, caption_dropout=0.5)

    def build(**changes):
        return train_ltd.LatentDataset(clips, files, SimpleNamespace(**vars(args) | changes))

    return build


def same(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_a_sample_depends_on_seed_epoch_and_index_only(latent_dataset):
    one, two = latent_dataset(), latent_dataset()
    for epoch in (0, 3):
        one.epoch = two.epoch = epoch
        torch.manual_seed(epoch)
        items = [one[n] for n in range(4)]
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert all(same(items[n], two[n]) for n in (3, 1, 0, 2))  # in any order
        assert torch.equal(torch.get_rng_state(), before)  # and the run's own random state is left alone
    first = one[0]["noise"]
    assert not torch.equal(first, one[1]["noise"])
    one.epoch = 4
    assert not torch.equal(first, one[0]["noise"]) and one[0]["sigmas"] != two[0]["sigmas"]
    other = latent_dataset(seed=4)
    other.epoch = 3
    assert not torch.equal(first, other[0]["noise"])


def test_all_draws_differ(latent_dataset):
    dataset = latent_dataset()
    noises, sigmas = set(), set()
    for epoch in range(50):
        dataset.epoch = epoch
        for n in range(4):
            item = dataset[n]
            noises.add(item["noise"].numpy().tobytes())
            sigmas.add(item["sigmas"].item())
    assert len(noises) == len(sigmas) == 200


def test_noise_is_standard_normal(latent_dataset):
    dataset = latent_dataset()
    noise = []
    for epoch in range(40):
        dataset.epoch = epoch
        noise += [dataset[n]["noise"] for n in range(4)]
    assert noise[0].shape == (16, 3, HEIGHT // 8, WIDTH // 8) and noise[0].dtype == torch.float32
    noise = torch.stack(noise).double()
    draws = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(draws)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / draws)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / draws)
    flat = noise.flatten(1)  # no two samples share noise, and neither do neighbours within one
    between = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert between.abs().max() < 6 / math.sqrt(flat.shape[1])
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 4 / math.sqrt(draws)


def sigma_cdf(sigma: np.ndarray, scheme: str, shift: float) -> np.ndarray:
    """`sigma = shift u / (1 + (shift - 1) u)`, solved for `u`, whose density is uniform or logit-normal."""
    u = torch.from_numpy(np.clip(sigma / (shift - (shift - 1) * sigma), 1e-12, 1 - 1e-12))
    return (u if scheme == "none" else torch.special.ndtr(torch.logit(u))).numpy()


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize(
    "settings",
    [
        {"weighting_scheme": "none", "flow_shift": 1.0},
        {"weighting_scheme": "none", "flow_shift": 5.0},
        {"weighting_scheme": "logit_normal", "flow_shift": 3.0},
        {"weighting_scheme": "logit_normal", "flow_shift": 1.0},
        {"weighting_scheme": "none", "flow_shift": 1.0, "min_sigma": 0.2, "max_sigma": 0.5},
        {"weighting_scheme": "logit_normal", "flow_shift": 3.0, "min_sigma": 0.875},
        {"weighting_scheme": "logit_normal", "flow_shift": 3.0, "max_sigma": 0.3},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_sigma_density(latent_dataset, settings):
    """Kolmogorov and Smirnov at one in a thousand, against the formula, truncated to the bounds."""
    dataset = latent_dataset(**settings)
    sigmas = []
    for epoch in range(250):
        dataset.epoch = epoch
        sigmas += [dataset[n]["sigmas"].item() for n in range(4)]
    low, high = settings.get("min_sigma", 0.0), settings.get("max_sigma", 1.0)
    sigmas = np.sort(sigmas)
    assert low <= sigmas[0] and sigmas[-1] <= high
    shape = (settings["weighting_scheme"], settings["flow_shift"])
    ends = sigma_cdf(np.array([low, high]), *shape)
    cdf = (sigma_cdf(sigmas, *shape) - ends[0]) / (ends[1] - ends[0])
    steps = np.arange(len(sigmas) + 1) / len(sigmas)
    distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(sigmas))


def test_default_density_is_shifted_logit_normal(flags):
    args = train_ltd.parse_args(flags())
    sigmas = train_ltd.sigmas_in_range(args, torch.Generator().manual_seed(0))
    # The median of u is 1/2, and a shift of 3 takes it to 3/4.
    assert sigmas.median() == pytest.approx(0.75, abs=0.03) and sigmas.dtype == torch.float32


def test_prompt_of_a_sample_is_padded_with_zeros(latent_dataset):
    item = latent_dataset(caption_dropout=0.0)[0]
    assert item["prompt_embeds"].shape == (512, 32)
    length = int(item["prompt_embeds"].any(dim=-1).sum())
    assert 1 < length < 60
    assert torch.equal(item["prompt_embeds"], F.pad(item["prompt_embeds"][:length], (0, 0, 0, 512 - length)))


def test_windows_are_samples(prepare, tmp_path):
    """Each window of a video is a sample with its own latents."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_numbered(folder / "a.mp4", 60)
    write_metadata(folder, [{"file_name": "a.mp4", "text": "a"}])
    clips, _, files, args = prepare(train_data_dir=folder, clips_per_video=3, caption_dropout=0)
    assert len(clips) == 3 and len({clip["name"] for clip in clips}) == 3
    dataset = train_ltd.LatentDataset(clips, files, args)
    stored = load_file(Path(args.cache_dir, clips[0]["path"]))["latents"].float()
    assert stored.shape == (3, 16, 3, HEIGHT // 8, WIDTH // 8)
    assert all(torch.equal(dataset[n]["latents"], stored[n]) for n in range(3))
    assert not torch.equal(stored[0], stored[1]) and not torch.equal(stored[1], stored[2])
