"""Clips that the data tests need: frames that say their own number, odd containers, and files that are broken.

A frame of `numbered` shows its number as sixteen black or white blocks, two rows of eight, so that whatever a
decoder, a resize or a codec does to the picture, `numbers_of` reads the number back.
"""

import json
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
LOW, HIGH = 40, 215


def numbered(number: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A picture of `number`, below 65,536: `(height, width, 3)` uint8."""
    bits = np.array([number >> bit & 1 for bit in range(16)], np.uint8).reshape(2, 8)
    blocks = np.where(bits, HIGH, LOW).astype(np.uint8)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 8 // width
    return np.repeat(blocks[rows][:, columns, None], 3, axis=2)


def numbers_of(frames: torch.Tensor) -> list[int]:
    """The number in each of `(F, 3, H, W)` frames."""
    gray = frames.float().mean(dim=1)
    height, width = gray.shape[1:]
    rows = torch.arange(2) * height // 2 + height // 4
    columns = torch.arange(8) * width // 8 + width // 16
    bits = (gray[:, rows][:, :, columns] > (LOW + HIGH) / 2).flatten(1).long()
    return (bits * 2 ** torch.arange(16)).sum(dim=1).tolist()


def write_video(path, frames, fps=16, times=None, codec="libx264", pix_fmt="yuv420p", options=None) -> Path:
    """
    Encode `(H, W, 3)` uint8 frames, displayed at `times` in seconds (default: `number / fps`).

    libx264's defaults are kept: it reorders frames, as real files do. MPEG codecs count in whole frames only.
    """
    tick = 1 / Fraction(fps) if codec.startswith("mpeg") else Fraction(1, 90000)
    times = [Fraction(n) / Fraction(fps) for n in range(len(frames))] if times is None else times
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = tick
        for picture, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def write_numbered(path, count: int, fps=16, first: int = 0, **kwargs) -> Path:
    """`count` frames with the numbers `first`, `first + 1`, ..."""
    return write_video(path, [numbered(first + n) for n in range(count)], fps, **kwargs)


def ffmpeg(*arguments) -> bytes:
    """Run ffmpeg and return what it writes to its standard output."""
    command = [FFMPEG, "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def ffmpeg_frames(path, height: int, width: int) -> torch.Tensor:
    """What ffmpeg itself shows of a file, turned upright, at its own size: `(F, 3, height, width)` uint8."""
    raw = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-")
    return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3).copy()).permute(0, 3, 1, 2)


def write_audio(path, seconds: float = 1.0, *arguments) -> Path:
    """A tone, with further ffmpeg arguments before the output."""
    ffmpeg("-f", "lavfi", "-i", f"sine=duration={seconds}", *arguments, path)
    return Path(path)


def truncate(source: Path, path: Path, share: float) -> Path:
    """The first part of a file."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def moving_square(number: int, frames: int = 12, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """A clip whose content depends on `number` in colour, place and speed."""
    random = np.random.default_rng(number)
    ground, square = random.integers(0, 256, (2, 3))
    speed, top = random.integers(1, 4), random.integers(0, height - 12)
    video = np.tile(ground.astype(np.uint8), (frames, height, width, 1))
    for n in range(frames):
        left = int(n * speed) % (width - 12)
        video[n, top : top + 12, left : left + 12] = square
    return list(video)


# --- Broken and odd files --------------------------------------------------------------------------------------------


def _corrupt_middle(path: Path, good: Path) -> None:
    data = bytearray(good.read_bytes())
    start = data.index(b"mdat") + 4
    data[start + 40 : start + 4000] = bytes(len(data[start + 40 : start + 4000]))
    path.write_bytes(data)


def _truncated_mkv(path: Path, good: Path) -> None:
    whole = path.with_name("whole.mkv")
    ffmpeg("-i", good, "-c", "copy", whole)
    truncate(whole, path, 0.3)
    whole.unlink()


def _cover_art(path: Path, good: Path) -> None:
    cover = path.with_name("cover.png")
    Image.fromarray(numbered(5)).save(cover)
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-i", cover, "-map", 0, "-map", 1, "-c:v", "copy",
           "-disposition:v:0", "attached_pic", path)  # fmt: skip
    cover.unlink()


def _one_colour(path: Path, height: int, width: int) -> None:
    write_video(path, [np.full((height, width, 3), 90, np.uint8)] * 12, codec="ffv1", pix_fmt="bgr0")


def _header_only(path: Path, good: Path) -> None:
    """A proper mp4 with a video track and not one frame in it."""
    ffmpeg("-f", "lavfi", "-i", "color=size=48x32:rate=16", "-frames:v", 0, "-c:v", "libx264", path)


# name -> function of (path, good mp4) that writes the file, and a pattern for the reason to skip it (None: it is fine)
CORPUS = {
    "zero_bytes.mp4": (lambda path, good: path.write_bytes(b""), "empty"),
    "text.mp4": (lambda path, good: path.write_text("this is no video\n" * 50), "cannot be read"),
    "noise.mp4": (lambda path, good: path.write_bytes(np.random.default_rng(0).bytes(20000)), "cannot be read"),
    "no_moov.mp4": (lambda path, good: truncate(good, path, 0.4), "cannot be read"),
    "truncated.mkv": (_truncated_mkv, "damaged|short|cannot be read"),
    "corrupt_middle.mp4": (_corrupt_middle, "damaged|short|cannot be read"),
    "header_only.mp4": (_header_only, "short|no video stream|cannot be read"),
    "audio_only.mp4": (lambda path, good: write_audio(path, 1, "-c:a", "aac"), "no video stream"),
    "song.mp3": (lambda path, good: write_audio(path, 1), "no video stream"),
    "cover_art.m4a": (_cover_art, "no video stream"),
    "too_short.mp4": (lambda path, good: write_numbered(path, 5), "too short"),
    "one_frame.mp4": (lambda path, good: write_numbered(path, 1), "too short"),
    "still.png": (lambda path, good: Image.fromarray(numbered(3)).save(path), "too short"),
    "missing.mp4": (lambda path, good: None, "not found"),
    "folder.mp4": (lambda path, good: path.mkdir(), "no regular file"),
    "dead_link.mp4": (lambda path, good: path.symlink_to("nowhere.mp4"), "not found"),
    "good.mp4": (lambda path, good: path.write_bytes(good.read_bytes()), None),
    "mp4_inside.avi": (lambda path, good: path.write_bytes(good.read_bytes()), None),
    "no_extension": (lambda path, good: path.write_bytes(good.read_bytes()), None),
    "two words.mp4": (lambda path, good: path.write_bytes(good.read_bytes()), None),
    "ünï©ødé 動画 🎬.mp4": (lambda path, good: path.write_bytes(good.read_bytes()), None),
    "100%_#1?.mp4": (lambda path, good: path.write_bytes(good.read_bytes()), None),
    "one_pixel.mkv": (lambda path, good: _one_colour(path, 1, 1), None),
    "thin.mkv": (lambda path, good: _one_colour(path, 500, 2), None),
    "odd_size.mkv": (lambda path, good: _one_colour(path, 37, 53), None),
}


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


def caption_dataset(folder: Path, captions: list) -> dict:
    folder.mkdir()
    write_video(folder / "a.mp4", moving_square(0))
    rows = [{"video": "a.mp4", "text": caption} for caption in captions]
    return {"train_data_dir": write_metadata(folder, rows, "rows.jsonl")}


NAMES = [f"clip{n}.mp4" for n in range(4)]
CAPTIONS = ["a red square", 'she says: "go, go"', "ein Bär läuft 🐻", "the last one"]


def cache_files(args) -> dict[str, bytes]:
    """Relative path -> content of every entry of the cache."""
    folder = Path(args.cache_dir)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}


def alike(clips: list) -> list:
    """The clips as another start has them: only which of the starts encoded them is left out."""
    return [replace(clip, encoded=False) for clip in clips]
