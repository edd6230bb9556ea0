"""Which clips a dataset holds, and what is read of a file: frames by time, upright, cropped, or why it is skipped."""

import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
from conftest import HEIGHT, NUM_FRAMES, WIDTH
from corpus import (
    CAPTIONS,
    CORPUS,
    NAMES,
    alike,
    caption_dataset,
    copy_clips,
    embedded_by_datasets,
    ffmpeg,
    ffmpeg_frames,
    make_videos,
    metadata_folder,
    moving_square,
    numbered,
    numbers_of,
    pairs,
    table_of_paths,
    truncate,
    with_key,
    write_audio,
    write_metadata,
    write_numbered,
    write_video,
)
from PIL import ExifTags, Image, ImageOps

import train_ltd


def read(path, num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH, fps=16, clips_per_video=1):
    """Read the clips of one file: frames `(clips, F, 3, H, W)`, and what they were before."""
    return train_ltd.read_clip(str(path), (num_frames, height, width), fps, clips_per_video)


# --- Frames by presentation time -------------------------------------------------------------------------------------


def on_display(times, at) -> int:
    """Number of the frame that is on display at a time; `times` and `at` are exact fractions."""
    return max(n for n, time in enumerate(times) if time - times[0] <= at)


NTSC = Fraction(30000, 1001)
RATES = [(30, "mp4"), (30, "avi"), (25, "mkv"), (24, "mov"), (16, "ts"), (10, "avi"), (NTSC, "mp4"), (NTSC, "mkv")]


@pytest.mark.parametrize(("source_fps", "suffix"), [*RATES, (12.5, "ts")])
def test_constant_rates(tmp_path, suffix, source_fps):
    """The frame on display at k/16 s, whatever the rate and however coarsely the container rounds times."""
    source_fps = Fraction(source_fps)
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = write_numbered(tmp_path / f"a.{suffix}", math.ceil(source_fps) + 5, source_fps, codec=codec)
    times = [n / source_fps for n in range(math.ceil(source_fps) + 5)]
    wanted = [Fraction(k, 16) for k in range(17)]
    frames, facts = read(path, num_frames=17)
    assert frames.shape == (1, 17, 3, HEIGHT, WIDTH) and frames.dtype == torch.uint8
    got = numbers_of(frames[0])
    assert got[0] == 0
    for number, at in zip(got, wanted, strict=True):
        early = on_display(times, at)  # a frame less than 2 ms ahead (15 at 29.97 fps, at 0.5005 s) may stand for now
        assert number in {early, early if at in times else on_display(times, at + Fraction(2, 1000))}
    assert (facts.crop_fraction, facts.orientation_differs) == (0, False)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "webm"])
def test_the_clips_own_rate_gives_each_frame_once(tmp_path, suffix):
    """Matroska's milliseconds make 16 fps uneven (0, 63, 125, 188 ms): no frame may double or go missing."""
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    path = write_numbered(tmp_path / f"a.{suffix}", 33, 16, codec=codec)
    assert numbers_of(read(path, num_frames=33)[0][0]) == list(range(33))


@pytest.mark.parametrize(
    ("fps", "expected"), [(8, range(0, 34, 2)), (4, range(0, 68, 4)), (32, [n // 2 for n in range(17)])]
)
def test_fps(tmp_path, fps, expected):
    path = write_numbered(tmp_path / "a.mp4", 70, 16)
    assert numbers_of(read(path, num_frames=17, fps=fps)[0][0]) == list(expected)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path, suffix):
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
def test_non_zero_start(tmp_path, suffix):
    """Time counts from the video's first frame."""
    write_numbered(tmp_path / "a.mp4", 40, 24)
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-output_ts_offset", 5, "-avoid_negative_ts", "disabled",
           tmp_path / f"late.{suffix}")  # fmt: skip
    frames = read(tmp_path / f"late.{suffix}", num_frames=17)[0]
    assert numbers_of(frames[0]) == [k * 24 // 16 for k in range(17)]
    if suffix != "mp4":  # mp4 players skip the empty edit, and so does the demuxer's start time
        with av.open(str(tmp_path / f"late.{suffix}")) as container:
            assert next(container.decode(video=0)).time >= 5


def test_the_last_frame_lasts_its_own_duration(tmp_path):
    """10 frames at 8 fps are 1.25 s, which is 20 frames at 16 fps: 17 fit, 21 do not."""
    path = write_numbered(tmp_path / "a.mp4", 10, 8)
    assert numbers_of(read(path, num_frames=17)[0][0]) == [n // 2 for n in range(17)]
    with pytest.raises(train_ltd.ClipError, match="too short: 20 frames at 16 fps, 21 needed") as error:
        read(path, num_frames=21)
    assert error.value.num_frames == 20


# --- Rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(tmp_path, degrees):
    """As ffmpeg turns it by itself."""
    write_video(tmp_path / "a.mp4", [numbered(n * 523 + 77) for n in range(9)], options={"qp": "0"})
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    size = (48, 32) if degrees % 180 else (32, 48)
    expected = ffmpeg_frames(tmp_path / "turned.mp4", *size)
    frames, facts = read(tmp_path / "turned.mp4", height=size[0], width=size[1])
    plain = read(tmp_path / "a.mp4")[0][0]
    assert (frames[0].float() - expected.float()).abs().mean() < 2
    assert frames[0].shape != plain.shape or (frames[0].float() - plain.float()).abs().mean() > 20
    assert not facts.orientation_differs
    assert read(tmp_path / "turned.mp4")[1].orientation_differs == bool(
        degrees % 180
    )  # a portrait clip in a landscape crop


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation(tmp_path, orientation):
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
def test_cover_and_centre_crop(tmp_path, size):
    """Where in the source the corners of the result come from, and the share that is lost."""
    Image.fromarray(ramp(*size)).save(tmp_path / "a.png")
    frames, facts = read(tmp_path / "a.png", num_frames=1)
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
    assert facts.crop_fraction == pytest.approx(1 - kept[0] * kept[1], abs=1e-6)
    assert facts.orientation_differs == (size[0] > size[1])


def test_antialiasing(tmp_path):
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
    (line,) = [m for m in log() if "cropped away" in m]
    assert f"2 clips; {share}% of the picture is cropped away" in line
    (warning,) = [m for m in log("WARNING") if "portrait" in m]
    assert "tall.mp4" in warning and "wide.mp4" not in warning


# --- Windows and stills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "ts", "mpg"])
@pytest.mark.parametrize("source_fps", [25, 24])
def test_windows_are_evenly_spread(tmp_path, suffix, source_fps):
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
def test_no_more_windows_than_fit(tmp_path, count, asked, windows):
    """They do not overlap; one window is the start of the video, as the paper truncates."""
    path = write_numbered(tmp_path / "a.mp4", count)
    got = [numbers_of(clip) for clip in read(path, clips_per_video=asked)[0]]
    assert len(got) == windows
    assert got[0] == list(range(9))
    shown = [number for clip in got for number in clip]
    assert shown == sorted(set(shown))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_windows_of_a_late_video_and_longer_audio(tmp_path, suffix):
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
def test_images(tmp_path, name):
    picture = images()[name]
    picture.save(tmp_path / name, **({"quality": 95} if name.lower().endswith(("jpg", "jpeg")) else {}))
    frames, facts = read(tmp_path / name, num_frames=1)
    assert frames.shape == (1, 1, 3, HEIGHT, WIDTH)
    assert numbers_of(frames[0]) == [4711]
    middle = frames[0, 0, :, 4:12, 2:4].float().mean()  # the first block is white: 4711 is odd
    assert middle == pytest.approx(255 if name == "bilevel.png" else 215, abs=6)
    assert facts.crop_fraction == 0


def test_one_frame_of_a_video(tmp_path):
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
def test_pixel_formats(tmp_path, name):
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
def test_bad_input_alone(flags, bad_folder, log, name):
    """Each file by itself: one warning with file and reason, or frames."""
    reason = CORPUS[name][1]
    table = write_metadata(bad_folder, [{"video": name, "text": "a"}], "one.jsonl")
    args = train_ltd.parse_args(flags(train_data_dir=table))
    clips, skipped = train_ltd.cache_clips(args, train_ltd.build_accelerator(args), "train")
    warnings = [message for message in log("WARNING") if name in message]
    if reason is None:
        assert len(clips) == 1 and not skipped and not warnings
        assert train_ltd.load_entry(args, clips[0].path)["latents"].shape == (16, 3, HEIGHT // 8, WIDTH // 8)
    else:
        (video,) = skipped
        assert not clips and video.name == name and re.search(reason, video.reason)
        assert len(warnings) == 1 and re.search(reason, warnings[0])
        assert not list(Path(args.cache_dir).rglob("*.safetensors"))


def test_bad_input_together(prepare, log, bad_folder):
    """All of them in one dataset: one line each, a count, `skipped.jsonl`, and the good ones train."""
    bad = {name for name, (_, reason) in CORPUS.items() if reason is not None}
    clips, _, _, args = prepare(train_data_dir=bad_folder / "table.jsonl", max_skipped=0.9)
    assert {clip.name for clip in clips} == set(CORPUS) - bad
    assert all(clip.captions == [f"caption of {clip.name}"] for clip in clips)
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
    assert [clip.name for clip in again] == [clip.name for clip in clips]
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


def test_windows_that_cannot_be_reached_do_not_lose_the_video(tmp_path):
    """A file cut off in its second half still gives its first window when several are asked for."""
    whole = write_numbered(tmp_path / "a.mkv", 160, options={"g": "16"})
    path = truncate(whole, tmp_path / "cut.mkv", 0.6)
    assert numbers_of(read(path)[0][0]) == list(range(9))
    got = [numbers_of(clip) for clip in read(path, clips_per_video=4)[0]]
    assert got[0] == list(range(9)) and 2 <= len(got) <= 4


# --- Hostile rows ----------------------------------------------------------------------------------------------------


def test_metadata_stays_in_its_folder(flags, tmp_path):
    """Paths upwards, absolute ones and URLs that lead out are skipped; a link in the folder is its owner's own."""
    folder = tmp_path / "data"
    make_videos(folder, 1)
    outside = write_video(tmp_path / "private.mp4", moving_square(5))
    (folder / "out.mp4").symlink_to(outside)
    (folder / "in.mp4").symlink_to("clip0.mp4")
    (folder / "up").symlink_to(tmp_path)
    good = ["clip0.mp4", "in.mp4", "out.mp4", str(folder / "clip0.mp4"), "up/data/clip0.mp4", "up/private.mp4"]
    bad = ["../private.mp4", "up/../../private.mp4", str(outside), f"{folder}/../private.mp4", f"{folder}2/a.mp4"]
    bad += [f"file://{outside}", f"file://{folder}/clip0.mp4", "http://localhost/a.mp4", "hf://datasets/a/b/c.mp4"]
    bad += [f"file://{outside}::hf://datasets/a/b.mp4", f"simplecache::file://{outside}::hf://datasets/a/b.mp4"]
    bad += [f"zip://a.mp4::{folder}/all.zip", "zip://a.mp4::hf://datasets/a/b/all.zip"]
    write_metadata(folder, [{"file_name": name, "text": "a"} for name in good + bad])
    args = train_ltd.parse_args(flags(train_data_dir=folder))
    clips, skipped = train_ltd.cache_clips(args, train_ltd.build_accelerator(args), "train")
    assert [clip.name for clip in clips] == good
    assert [video.name for video in skipped] == bad
    assert {video.reason for video in skipped} == {"leads out of the dataset's folder"}


def test_a_playlist_is_no_video(tmp_path):
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
            train_ltd.locate_clip(value, folder, args)


def test_rows_of_a_hub_dataset_stay_in_its_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(train_ltd, "HUB_CACHES", (tmp_path / "hub", tmp_path / "datasets"))
    (tmp_path / "datasets").mkdir()
    for path in (tmp_path / "private.mp4", tmp_path / "datasets" / "a.mp4"):
        path.write_bytes(b"a clip")
    name, args = Path("somebody/clips"), train_ltd.parse_args(["--dataset_name=somebody/clips", "--report_to=none"])
    assert not name.is_dir()
    cached = str(tmp_path / "datasets" / "a.mp4")
    assert train_ltd.locate_clip(cached, name, args) == cached
    bad = [str(tmp_path / "private.mp4"), str(tmp_path / "hub/../private.mp4"), "http://localhost/a.mp4"]
    for value in [*bad, f"file://{tmp_path}/private.mp4::hf://datasets/a/b.mp4"]:
        for row in (value, {"path": value, "bytes": None}):
            with pytest.raises(train_ltd.ClipError, match="leads out of the dataset's folder"):
                train_ltd.locate_clip(row, name, args)


def test_rows_of_a_hub_dataset_name_files_and_archives_on_the_hub(monkeypatch):
    monkeypatch.setattr(train_ltd.fsspec, "open", lambda url, mode: io.BytesIO(url.encode()))
    name, args = Path("somebody/clips"), train_ltd.parse_args(["--dataset_name=somebody/clips", "--report_to=none"])
    opened = {
        "a/b.mp4": b"hf://datasets/somebody/clips@main/a/b.mp4",
        "hf://datasets/somebody/clips/a.mp4": b"hf://datasets/somebody/clips/a.mp4",
    }
    for archive in ("zip://a.mp4", "tar://a.mp4", "gzip://"):
        value = f"{archive}::hf://datasets/somebody/clips/all"
        opened[value] = value.encode()
    for value, url in opened.items():
        assert train_ltd.locate_clip(value, name, args) == url
    for value in ("file:///a.mp4", "zip://a.mp4::file:///all.zip", "filecache://a::hf://datasets/a/b/c", "local://a"):
        with pytest.raises(train_ltd.ClipError, match="leads out"):
            train_ltd.locate_clip(value, name, args)


def test_a_stray_text_file_makes_no_folder_of_pairs(prepare, originals, tmp_path):
    """Of clips with a caption each, or of parquet files, in whose place nothing would be found."""
    for make in (embedded_by_datasets, lambda *where: metadata_folder(*where, "metadata.jsonl")):
        folder = tmp_path / make.__name__.strip("<>")
        make(originals, folder)
        (folder / "LICENSE.txt").write_text("anybody may do anything")
        assert len(prepare(train_data_dir=folder)[0]) == len(NAMES)


def test_limits_before_decoding(monkeypatch, tmp_path):
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
    assert len(clips[0].captions[0]) == train_ltd.MAX_CHARACTERS - 1  # and a space at the end
    assert len([m for m in log("WARNING") if "a.mp4: caption cut to 10000 characters" in m]) == 1


# --- Layouts of datasets ---------------------------------------------------------------------------------------------


def absolute_paths(originals, folder):
    paths = copy_clips(originals, folder / "deep")
    rows = [{"video": str(path), "text": text} for path, text in zip(paths, CAPTIONS, strict=True)]
    return {"train_data_dir": write_metadata(folder, rows, "a.jsonl")}


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


@pytest.mark.parametrize("source", SOURCES)
def test_sources(flags, originals, tmp_path, source):
    """Every layout gives the same four clips, in the same order, with the same captions."""
    args = train_ltd.parse_args(flags(**SOURCES[source](originals, tmp_path / "data")))
    dataset, where = train_ltd.open_dataset(args, "train")
    assert [train_ltd.with_trigger(args, row["text"]) for row in dataset] == CAPTIONS
    clips = [train_ltd.locate_clip(row["video"], where, args) for row in dataset]
    clips = [clip if isinstance(clip, bytes) else Path(clip).read_bytes() for clip in clips]
    assert clips == [(originals / name).read_bytes() for name in NAMES]


def test_pair_without_text_has_an_empty_caption(prepare, log, originals, tmp_path):
    kwargs = pairs(originals, tmp_path / "data")
    (tmp_path / "data" / "clip1.txt").unlink()
    clips = prepare(**kwargs)[0]
    assert [clip.captions for clip in clips] == [["a red square"], [""], [CAPTIONS[2]], [CAPTIONS[3]]]
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
    kwargs |= {"clips_per_video": 3, "validation_fraction": 0.4}
    clips, held_out, _, _ = prepare(**kwargs)
    assert len(clips) == 18 and len(held_out) == 12

    def sources(clips):
        return {re.search(r"(\d)\.mp4", clip.name)[1] for clip in clips}

    assert len(sources(clips)) == 3 and len(sources(held_out)) == 2
    assert not sources(clips) & sources(held_out)
    assert [alike(part) for part in prepare(**kwargs)[:2]] == [alike(clips), alike(held_out)]
    others = [sources(prepare(**kwargs, seed=seed)[1]) for seed in (4, 5, 6)]
    assert any(other != sources(held_out) for other in others)
    backwards = write_metadata(folder, [{"video": n, "text": "a"} for n in names[::-1]], "backwards.jsonl")
    assert sources(prepare(**kwargs | {"train_data_dir": backwards})[1]) == sources(held_out)


def test_at_least_one_is_held_out_and_one_is_left(prepare, originals, tmp_path):
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    assert [len(part) for part in prepare(**data, validation_fraction=0.01)[:2]] == [3, 1]
    with pytest.raises(ValueError, match="validation_fraction"):
        prepare(**data, validation_fraction=0.99)


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("layout", ["split of metadata", "split of pairs"])
def test_named_split_is_held_out(prepare, originals, tmp_path, layout):
    data = SOURCES[layout](originals, tmp_path / "data")
    clips, held_out, files, _ = prepare(**data, validation_split="validation")
    assert [clip.captions for clip in clips] == [[text] for text in CAPTIONS]
    assert [(Path(clip.name).name, clip.captions) for clip in held_out] == [("other.mp4", ["held out"])]
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


# --- The clip that is trained is the clip that people see ------------------------------------------------------------


def first_picture(path) -> np.ndarray:
    return next(train_ltd.frames_at(str(path), np.zeros(1))).pixels


def corners(height: int = 40, width: int = 64) -> np.ndarray:
    """A picture whose four quarters differ, so that each way to turn or mirror it shows."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = 30
    picture[: height // 2, width // 2 :] = 90
    picture[height // 2 :, : width // 2] = 150
    picture[height // 2 :, width // 2 :] = 210
    return picture


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_of_a_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(corners()).save(tmp_path / "picture.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "picture.jpg") as picture:
        wanted = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    shown = first_picture(tmp_path / "picture.jpg")
    assert shown.shape == wanted.shape
    assert np.abs(shown.astype(int) - wanted).mean() < 2


@pytest.mark.parametrize("options", [["-display_hflip"], ["-display_vflip"], ["-display_rotation", "90"]])
def test_display_matrix_of_a_video(tmp_path, options):
    """As ffmpeg itself shows it."""
    write_video(tmp_path / "plain.mp4", [corners()] * 4)
    ffmpeg(*options, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    shown = first_picture(tmp_path / "turned.mp4")
    height, width = shown.shape[:2]
    wanted = ffmpeg_frames(tmp_path / "turned.mp4", height, width)[0].permute(1, 2, 0).numpy()
    assert np.abs(shown.astype(int) - wanted).mean() < 1
    assert np.abs(shown.astype(int).mean() - corners().mean()) < 2
    assert not np.array_equal(shown, first_picture(tmp_path / "plain.mp4"))


@pytest.mark.parametrize(("aspect", "shape"), [("16/9", (40, 114)), ("1/2", (40, 32))])
def test_pixels_that_are_not_square(tmp_path, aspect, shape):
    """The crop's statistics are those of the displayed size."""
    write_video(tmp_path / "plain.mkv", [corners()] * 16)
    ffmpeg("-i", tmp_path / "plain.mkv", "-vf", f"setsar={aspect}", tmp_path / "clip.mp4")
    shown = first_picture(tmp_path / "clip.mp4")
    assert shown.shape[:2] == shape
    _, facts = read(tmp_path / "clip.mp4")
    scale = max(HEIGHT / shape[0], WIDTH / shape[1])
    kept = HEIGHT * WIDTH / (scale**2 * shape[0] * shape[1])
    assert facts.crop_fraction == pytest.approx(1 - kept, abs=1e-6)
    assert (
        abs(shown[:20, : shape[1] // 2 - 4].mean() - 30) < 4 and abs(shown[24:, shape[1] // 2 + 4 :].mean() - 210) < 4
    )


def marks_of_damage(path) -> int:
    """Count the frames that the decoder marks as corrupt; none when it does not get that far."""
    try:
        with av.open(str(path)) as container:
            return sum(frame.is_corrupt for frame in container.decode(video=0))
    except av.FFmpegError:
        return 0


def test_frames_that_the_decoder_marks_as_corrupt(tmp_path):
    """A flipped byte that the container does not notice: the pictures are there, and wrong."""
    frames = [frame for number in range(6) for frame in moving_square(number, frames=4, height=64, width=96)]
    good = write_video(tmp_path / "good.mp4", frames)
    read(good, num_frames=21)
    data = good.read_bytes()
    start = data.index(b"mdat") + 4
    bad = tmp_path / "bad.mp4"
    for position in range(start + 800, len(data), 53):
        bad.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        if marks_of_damage(bad):
            break
    assert marks_of_damage(bad)
    with pytest.raises(train_ltd.ClipError, match="damaged: the decoder marks frames as corrupt"):
        read(bad, num_frames=21)


def test_an_unknown_codec_is_one_clip_skipped(tmp_path):
    good = write_numbered(tmp_path / "good.mp4", 16)
    data = good.read_bytes()
    assert data.count(b"avc1") >= 1
    (tmp_path / "odd.mp4").write_bytes(data.replace(b"avc1", b"zz99"))
    with pytest.raises((train_ltd.ClipError, av.FFmpegError)):
        read(tmp_path / "odd.mp4")


def test_a_title_that_is_not_utf8_is_no_reason_to_skip(tmp_path):
    write_numbered(tmp_path / "plain.mp4", 16)
    ffmpeg("-i", tmp_path / "plain.mp4", "-c", "copy", "-metadata", "title=TITLE", tmp_path / "titled.mp4")
    data = (tmp_path / "titled.mp4").read_bytes()
    (tmp_path / "latin1.mp4").write_bytes(data.replace(b"TITLE", b"caf\xe9s"))
    assert torch.equal(read(tmp_path / "latin1.mp4")[0], read(tmp_path / "plain.mp4")[0])


def test_a_picture_that_would_cover_gigabytes_is_skipped(tmp_path):
    Image.new("RGB", (60000, 2)).save(tmp_path / "thin.png")
    with pytest.raises(train_ltd.ClipError, match="too large"):
        read(tmp_path / "thin.png", num_frames=1, height=480, width=832)


def paired_names(folder, flags, **kwargs) -> list[str]:
    args = train_ltd.parse_args(flags(train_data_dir=folder, **kwargs))
    return [row["video"] for row in train_ltd.open_dataset(args, "train")[0]]


def test_names_that_begin_with_a_dot_are_not_looked_at(originals, flags, tmp_path):
    """macOS's `._*` and Jupyter's `.ipynb_checkpoints`."""
    folder = tmp_path / "data"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for path in (folder / "a.mp4", folder / "._a.mp4", folder / ".ipynb_checkpoints/b.mp4"):
        path.write_bytes((originals / NAMES[0]).read_bytes())
        path.with_suffix(".txt").write_bytes(b"a caption" if path.name == "a.mp4" else b"\xff\xfe")
    assert paired_names(folder, flags) == ["a.mp4"]


def test_what_a_run_wrote_into_the_data_is_no_data(originals, flags, tmp_path):
    folder = tmp_path / "data"
    (folder / "out/samples").mkdir(parents=True)
    for path in (folder / "a.mp4", folder / "out/samples/step-000000-0.mp4"):
        path.write_bytes((originals / NAMES[0]).read_bytes())
        path.with_suffix(".txt").write_text("a caption")
    assert paired_names(folder, flags, output_dir=folder / "out") == ["a.mp4"]


def test_a_linked_folder_is_followed_once(originals, flags, tmp_path):
    folder = tmp_path / "data"
    other = tmp_path / "other disk"
    folder.mkdir()
    other.mkdir()
    (other / "a.mp4").write_bytes((originals / NAMES[0]).read_bytes())
    (other / "a.txt").write_text("a caption")
    (folder / "linked").symlink_to(other)
    (other / "back").symlink_to(folder)
    (folder / "itself.mp4").symlink_to(folder / "itself.mp4")
    (folder / "itself.txt").write_text("a caption")
    assert paired_names(folder, flags) == ["itself.mp4", "linked/a.mp4"]


@pytest.mark.usefixtures("one_text_encoder")
def test_captions_of_a_csv_are_words_as_written(prepare, originals, tmp_path):
    folder = tmp_path / "data"
    copy_clips(originals, folder)
    texts = ["None", "NA", "007", "3.10"]
    lines = [f"{name},{text}" for name, text in zip(NAMES, texts, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    clips, *_ = prepare(train_data_dir=folder)
    assert [clip.captions for clip in clips] == [[text] for text in texts]


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a dog", "ohwx a dog"),
        ("ohwx a dog", "ohwx a dog"),
        ("a dog, ohwx style", "a dog, ohwx style"),
        ("ohwxy", "ohwx ohwxy"),
        ("", "ohwx"),
    ],
)
def test_a_trigger_word_is_not_doubled(flags, caption, wanted):
    assert train_ltd.with_trigger(train_ltd.parse_args(flags(trigger_word="ohwx")), caption) == wanted


@pytest.mark.usefixtures("one_text_encoder")
def test_a_column_of_fields_is_refused_with_its_names(prepare, originals, tmp_path, capsys):
    """As the json of a webdataset is; a caption was `{'caption': ...}` once."""
    folder = tmp_path / "data"
    copy_clips(originals, folder)
    rows = [{"video": str(folder / name), "json": {"caption": f"clip {name}", "score": 1}} for name in NAMES]
    datasets.Dataset.from_list(rows).to_parquet(folder / "table.parquet")
    kwargs = {"train_data_dir": folder / "table.parquet"}
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"holds the fields caption, score: take one, such as .*json\.caption"):
        prepare(**kwargs, caption_column="json")
    assert capsys.readouterr().err.endswith("\n")  # the bar is closed, and the error is the last line
    clips, *_ = prepare(**kwargs, caption_column="json.caption")
    assert [clip.captions for clip in clips] == [[f"clip {name}"] for name in NAMES]


def test_a_picture_that_is_called_as_a_video_is_its_thumbnail(originals, flags, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.mp4").write_bytes((originals / NAMES[0]).read_bytes())
        Image.fromarray(corners()).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text("a caption")
    assert paired_names(folder, flags) == ["a.mp4", "b.mp4"]


@pytest.mark.usefixtures("one_text_encoder")
def test_pictures_beside_videos_are_no_reason_for_one_frame(prepare, originals, tmp_path):
    folder = tmp_path / "data"
    copy_clips(originals, folder)
    Image.fromarray(corners()).save(folder / "other.jpg")
    write_metadata(folder, [{"file_name": name, "text": "a"} for name in [*NAMES, "other.jpg"]])
    with pytest.raises(ValueError, match="1 are pictures beside videos") as error:
        prepare(train_data_dir=folder)
    assert "--num_frames 1 " not in str(error.value)


# --- Names are names -------------------------------------------------------------------------------------------------


def embedded_shards(originals, folder):
    return embedded(originals, folder, plain=False)


@pytest.mark.parametrize("name", ["clips [ab]", "clips ?", "cl*", "clips %d", "{clips,a}"])
@pytest.mark.parametrize("layout", ["metadata.jsonl", "pairs", "csv"])
def test_a_folder_is_called_what_it_is_called(flags, originals, tmp_path, name, layout):
    """Beside one that the name would match as a pattern, with other captions."""
    make_videos(tmp_path / "clips a", 1)
    write_metadata(tmp_path / "clips a", [{"file_name": "clip0.mp4", "text": "of the other folder"}])
    write_metadata(tmp_path / "clips a", [{"video": "clip0.mp4", "text": "of the other folder"}], "clips.csv")
    args = train_ltd.parse_args(flags(**SOURCES[layout](originals, tmp_path / name)))
    dataset, where = train_ltd.open_dataset(args, "train")
    assert [row["text"].strip() for row in dataset] == CAPTIONS
    assert {Path(train_ltd.locate_clip(row["video"], where, args)).parts[-2 - (layout == "csv")] for row in dataset}
    assert all((tmp_path / name) in Path(where, row["video"]).parents for row in dataset)


@pytest.mark.parametrize("name", ["clips [ab]", "clips ?", "cl*"])
def test_a_folder_of_shards_that_datasets_would_take_for_a_pattern(flags, originals, tmp_path, name):
    """It read another folder's files once."""
    embedded_shards(originals, tmp_path / "clips a")
    (tmp_path / "clips a").rename(tmp_path / name)
    args = train_ltd.parse_args(flags(train_data_dir=tmp_path / name))
    with pytest.raises(ValueError, match=r"takes \[ \] \* \? in a folder's name for a pattern\. Rename the folder"):
        train_ltd.open_dataset(args, "train")


@pytest.mark.parametrize(
    "name", ["clip%d.mp4", "clip%03d.gif", "a%d.png", "a%02d.jpg", "a*.png", "a?.webp", "[a].png"]
)
def test_a_file_is_called_what_it_is_called(tmp_path, name):
    """Beside those that the name would match as a pattern."""
    for other in ("clip1.mp4", "clip001.gif", "a1.png", "a01.jpg", "ab.png", "ab.webp", "a.png"):
        if Path(other).suffix == Path(name).suffix:
            write_picture_or_video(tmp_path / other, 1)
    write_picture_or_video(tmp_path / name, 4711)
    assert numbers_of(read(tmp_path / name, num_frames=1)[0][0]) == [4711]


def write_picture_or_video(path: Path, number: int) -> None:
    if path.suffix == ".mp4":
        write_numbered(path, 2, first=number)
    else:
        image = Image.fromarray(numbered(number))
        with open(path, "wb") as file:
            image.save(file, {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:]))


# --- One clip is skipped, and the run goes on ------------------------------------------------------------------------


def skipped_reasons(flags, folder) -> tuple[list[str], dict[str, str]]:
    """The names of the clips of a folder that are read, and the reasons of the others."""
    args = train_ltd.parse_args(flags(train_data_dir=folder))
    clips, skipped = train_ltd.cache_clips(args, train_ltd.build_accelerator(args), "train")
    return [clip.name for clip in clips], {video.name: video.reason for video in skipped}


@pytest.fixture
def one_pair(originals, tmp_path) -> Path:
    """A folder with a clip and its caption."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.mp4").write_bytes((originals / NAMES[0]).read_bytes())
    (folder / "good.txt").write_text("a good clip")
    return folder


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("suffix", [".txt", ".mp4"])
def test_what_is_no_file_is_not_read(flags, one_pair, kind, suffix):
    """Reading a pipe or a device might never end."""
    for other in {".txt", ".mp4"} - {suffix}:
        (one_pair / f"bad{other}").write_bytes((one_pair / f"good{other}").read_bytes())
    path = one_pair / f"bad{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    reason = "its caption bad.txt is no regular file" if suffix == ".txt" else "no regular file"
    if suffix == ".mp4" and kind == "folder":  # which is looked into for clips, and holds none
        assert skipped_reasons(flags, one_pair) == (["good.mp4"], {})
    else:
        assert skipped_reasons(flags, one_pair) == (["good.mp4"], {"bad.mp4": reason})


def test_an_endless_caption_file_is_read_in_part(flags, one_pair, log):
    with open(one_pair / "good.txt", "w") as file:
        file.truncate(2**40)  # of zeros, which take no space
    assert skipped_reasons(flags, one_pair)[0] == ["good.mp4"]
    assert [m for m in log("WARNING") if "good.mp4: caption cut to 10000 characters" in m]


@pytest.mark.usefixtures("one_text_encoder")
def test_a_name_that_is_not_utf8(prepare, one_pair):
    """It is one clip skipped, and its name can be read in `skipped.jsonl`."""
    for suffix in (".mp4", ".txt"):
        Path(os.fsdecode(os.fsencode(one_pair) + b"/caf\xe9" + suffix.encode())).write_bytes(
            (one_pair / f"good{suffix}").read_bytes()
        )
    clips, _, _, args = prepare(train_data_dir=one_pair, max_skipped=0.5)
    assert [clip.name for clip in clips] == ["good.mp4"]
    (line,) = Path(args.output_dir, "skipped.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == {"file": r"caf\udce9.mp4", "reason": "its name is not UTF-8: rename it"}


def test_a_stream_that_grows_after_its_header(tmp_path, monkeypatch):
    """The decoder itself refuses the larger pictures, so that they take no memory."""
    parts = []
    for height, width in ((32, 48), (240, 320)):
        raw = tmp_path / f"{height}.h264"
        write_video(tmp_path / "part.mp4", moving_square(0, 20, height, width), options={"bf": "0"})
        ffmpeg("-i", tmp_path / "part.mp4", "-c", "copy", "-bsf:v", "h264_mp4toannexb", raw)
        parts.append(raw.read_bytes())
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    path = tmp_path / "grows.mkv"
    ffmpeg("-r", 16, "-probesize", 1000, "-i", tmp_path / "both.h264", "-c", "copy", path)
    with av.open(str(path)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (48, 32)
    assert read(path, num_frames=37)[0].shape[1] == 37
    monkeypatch.setattr(train_ltd, "MAX_PIXELS", 100 * 100)
    assert read(path, num_frames=17)[0].shape[1] == 17
    with pytest.raises(av.FFmpegError):
        read(path, num_frames=37)


@pytest.mark.parametrize(("packed", "says"), [(True, 5000), (False, 5000), (True, 10)])
def test_what_is_read_into_memory_has_a_limit(monkeypatch, tmp_path, packed, says):
    """A member of an archive is refused by its size, whether or not the archive tells it."""
    opened = []
    data = b"x" * 5000

    class File(io.BytesIO):
        def read(self, size=-1):
            opened.append(size)
            return super().read(size)

    def open_remote(url, mode):
        file = File(data)
        if packed:
            file.size = says
        return file

    monkeypatch.setattr(train_ltd.fsspec, "open", open_remote)
    name, args = Path("somebody/clips"), train_ltd.parse_args(["--dataset_name=somebody/clips", "--report_to=none"])
    url = "zip://a.mp4::hf://datasets/somebody/clips/all.zip"
    assert train_ltd.locate_clip(url, name, args) == data
    opened.clear()
    monkeypatch.setattr(train_ltd, "MAX_REMOTE_BYTES", 4999)
    with pytest.raises(train_ltd.ClipError, match="larger than 0 MiB"):
        train_ltd.locate_clip(url, name, args)
    assert opened == ([] if packed and says > 4999 else [5000])


def test_a_real_archive_tells_the_size_of_a_member(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.mp4", bytes(10**6))
        archive.writestr("small.mp4", b"small")
    real = train_ltd.fsspec.open

    def open_local(url, *rest, **options):
        return real(url.replace("hf://datasets/a/b", f"file://{tmp_path}"), *rest, **options)

    monkeypatch.setattr(train_ltd.fsspec, "open", open_local)
    monkeypatch.setattr(train_ltd, "MAX_REMOTE_BYTES", 10**5)
    name, args = Path("somebody/clips"), train_ltd.parse_args(["--dataset_name=somebody/clips", "--report_to=none"])
    assert train_ltd.locate_clip("zip://small.mp4::hf://datasets/a/b/all.zip", name, args) == b"small"
    with pytest.raises(train_ltd.ClipError, match="larger than"):
        train_ltd.locate_clip("zip://bomb.mp4::hf://datasets/a/b/all.zip", name, args)


@pytest.mark.parametrize("name", ["private.mp4", "{folder}/private.ts"])
def test_what_a_file_refers_to_is_not_opened(monkeypatch, tmp_path, name):
    """The file that is checked is the only one that is opened."""
    monkeypatch.chdir(tmp_path)  # FFmpeg looks here for what an unnamed file refers to
    write_video(tmp_path / "private.mp4", moving_square(5, frames=20))
    write_video(tmp_path / "private.ts", moving_square(5, frames=20))
    name = name.format(folder=tmp_path)
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {name}\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n")
    for playlist in ("concat.mp4", "list.m3u8"):
        with pytest.raises(av.FFmpegError):
            read(tmp_path / playlist)


# --- Warnings, with names --------------------------------------------------------------------------------------------


def transfer(name: str) -> list:
    return ["-vf", f"setparams=color_trc={name}", "-c:v", "libx264"]


# Of each of the seven passes over a PNG: the first line and column, and the steps down and to the right
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
CONCERNS = {
    "plain.mp4": None,
    "faster.mp4": None,
    "slow.mp4": "below --fps 16",
    "small.mp4": "enlarged more than 1.5 times",
    "interlaced.mpg": "interlaced",
    "pq.mp4": "HDR",
    "hlg.mkv": "HDR",
}


@pytest.mark.usefixtures("one_text_encoder")
def test_clips_that_need_a_look_are_named(prepare, log, tmp_path):
    """Each warning names its clips and no other, from the cache as well."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_numbered(folder / "plain.mp4", 20)
    write_numbered(folder / "faster.mp4", 40, 30)
    write_numbered(folder / "slow.mp4", 20, 15)
    write_video(folder / "small.mp4", moving_square(1, 20, 20, 30))
    ffmpeg("-i", folder / "plain.mp4", "-vf", "setfield=tff", "-c:v", "mpeg2video", "-r", 25, "-flags", "+ilme+ildct",
           folder / "interlaced.mpg")  # fmt: skip
    ffmpeg("-i", folder / "plain.mp4", *transfer("smpte2084"), folder / "pq.mp4")
    ffmpeg("-i", folder / "plain.mp4", *transfer("arib-std-b67"), folder / "hlg.mkv")
    write_metadata(folder, [{"file_name": name, "text": "a"} for name in CONCERNS])
    for _ in ("encoded", "cached"):
        before = len(log("WARNING"))
        clips, *_ = prepare(train_data_dir=folder)
        warnings = log("WARNING")[before:]
        for name, concern in CONCERNS.items():
            said = [warning for warning in warnings if name in warning]
            assert len(said) == (concern is not None)
            assert concern is None or concern in said[0]
    facts = {clip.name: clip for clip in clips}
    assert facts["slow.mp4"].repeated_fraction == pytest.approx(1 / 9)
    assert facts["small.mp4"].enlargement == pytest.approx(1.6)


def test_an_interlaced_png_is_no_interlaced_video(tmp_path):
    """Its lines come in another order, and all are of one moment. PIL writes none: all of this one is black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b""
    for top, left, down, right in ADAM7:
        width = len(range(left, WIDTH, right))
        lines += (bytes(1) + bytes(3 * width)) * len(range(top, HEIGHT, down))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with av.open(str(tmp_path / "a.png")) as container:
        assert next(container.decode(video=0)).interlaced_frame
    frames, facts = read(tmp_path / "a.png", num_frames=1)
    assert not frames.any() and not facts.interlaced


@pytest.mark.parametrize(("fps", "repeated"), [(8, 4), (12, 2), (16, 0), (30, 0)])
def test_repeated_frames_are_counted(tmp_path, fps, repeated):
    """Of nine frames at 16 a second: 0 0 1 1 2 2 3 3 4 at 8, 0 0 1 2 3 3 4 5 6 at 12."""
    write_numbered(tmp_path / "a.mp4", 2 * fps, fps)
    frames, facts = read(tmp_path / "a.mp4")
    assert facts.repeated_fraction == repeated / 9
    assert 9 - len(set(numbers_of(frames[0]))) == repeated
