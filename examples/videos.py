"""Read and write videos as arrays of pixels, and show many of them in one picture.

The command draws a row a video, with frames evenly spread over it:

    python examples/videos.py --output samples.png outputs/quickstart/lora/samples/*.mp4
"""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from mistakes import run_script
from PIL import Image, ImageDraw, ImageFont

CODEC = {"crf": "10"}  # as Wan's own generate.py, which writes with imageio's quality 8
MAX_DENOMINATOR = 1001  # of a frame rate: that of NTSC's 30000/1001
MARGIN = 2  # pixels between the pictures of a row


# --- Files -----------------------------------------------------------------------------------------------------------


def find_videos(folder: Path | str) -> list[Path]:
    """List the mp4 files of a folder by name. Hidden ones are left out: `write_video` has not finished them."""
    paths = sorted(Path(folder).glob("*.mp4"))
    return [path for path in paths if not path.name.startswith(".")]


@contextmanager
def open_video(path: Path | str) -> Iterator[av.container.InputContainer]:
    """Open a file that has a picture. Raises `ValueError`, then and while it is decoded, if it cannot be played."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: cannot be played: it has no picture")
            yield container
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be played: {error.strerror}") from error


def describe_video(path: Path | str) -> dict:
    """
    Read a file's header, without decoding a frame.

    Returns:
        `dict`: `width`, `height` and `frames` (`int`, 0 frames if the header does not say), `fps` and `pixel_aspect`
        (`Fraction`). Raises `ValueError` for a file that is no video.
    """
    with open_video(path) as container:
        stream = container.streams.video[0]
        if not stream.average_rate or not stream.width:
            raise ValueError(f"{path}: cannot be played: it has no frame rate or size")
        return {
            "width": stream.width,
            "height": stream.height,
            "frames": stream.frames,
            "fps": Fraction(stream.average_rate).limit_denominator(MAX_DENOMINATOR),
            "pixel_aspect": Fraction(stream.sample_aspect_ratio or 1),
        }


def read_video(path: Path | str, pixel_format: str = "rgb24", **conversion) -> np.ndarray:
    """
    Decode all frames of a video.

    Args:
        pixel_format: FFmpeg's name of it. "rgb24" gives uint8 of shape `(F, H, W, 3)`; "yuv420p", which H.264 files
            hold, uint8 of shape `(F, 3 * H / 2, W)`, the planes below each other.
        conversion: More for `av.VideoFrame.reformat`, such as `width`, `height` and `src_colorspace`.

    Raises `ValueError` for a file without a frame that can be decoded.
    """
    frames = []
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format=pixel_format, **conversion))
    if not frames:
        raise ValueError(f"{path}: cannot be played: no frame of it can be decoded")
    return np.stack(frames)


def write_video(
    frames: Sequence[np.ndarray],
    path: Path | str,
    fps: float | Fraction,
    pixel_format: str = "rgb24",
    codec: dict[str, str] = CODEC,
) -> None:
    """
    Write H.264 that browsers play. The file exists only when it is complete.

    By PyAV, since diffusers' `export_to_video` returns as if nothing were wrong when the disk is full.

    Args:
        frames: uint8 as `read_video` returns it: `(F, H, W, 3)` for "rgb24". H and W must be even.
        codec: Options of x264.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    rate = Fraction(fps).limit_denominator(MAX_DENOMINATOR)
    try:
        with av.open(str(partial), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options=codec)
            stream.pix_fmt = "yuv420p"
            first = av.VideoFrame.from_ndarray(frames[0], format=pixel_format)
            stream.width = first.width
            stream.height = first.height
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format=pixel_format)
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_animation(frames: Sequence[np.ndarray], path: Path | str, fps: float) -> None:
    """Write frames `(H, W, 3)`, uint8, as an animated WebP: it moves in a README, where no video plays."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=75)


# --- Pictures of videos ----------------------------------------------------------------------------------------------


def labelled_row(pictures: Sequence[np.ndarray], labels: Iterable[str]) -> np.ndarray:
    """
    Put pictures of one size side by side, under a bar with a label for each, or for the first ones only.

    Args:
        pictures: N arrays of shape `(H, W, 3)`, uint8.

    Returns:
        `np.ndarray`: uint8 of shape `(H + bar, N * W + margins, 3)`, even in height if H is, as videos need it.
    """
    height, width = pictures[0].shape[:2]
    bar = max(12, len(pictures) * width // 64) // 2 * 2
    row = Image.new("RGB", (len(pictures) * (width + MARGIN), height + bar + MARGIN), "white")
    for column, picture in enumerate(pictures):
        row.paste(Image.fromarray(picture), (column * (width + MARGIN), bar))
    draw = ImageDraw.Draw(row)
    font = ImageFont.load_default(bar - 3)
    for column, label in enumerate(labels):
        draw.text((column * (width + MARGIN), 0), label, fill="black", font=font)
    return np.asarray(row)


def contact_sheet(videos: Iterable[np.ndarray], labels: Sequence[str], columns: int, scale: float = 1) -> Image.Image:
    """
    Draw a grid with `columns` frames of each video, the first and the last among them.

    Args:
        videos: Arrays of shape `(F, H, W, 3)`, uint8. All are drawn in the size of the first one, times `scale`.
        labels: One for each video, written above its row.
    """
    rows = []
    size = None
    for frames, label in zip(videos, labels, strict=True):
        if size is None:
            height, width = frames.shape[1:3]
            size = (round(width * scale), round(height * scale))
        pictures = []
        for column in range(columns):
            index = round(column * (len(frames) - 1) / max(1, columns - 1))
            picture = Image.fromarray(frames[index]).resize(size)
            pictures.append(np.asarray(picture))
        rows.append(labelled_row(pictures, [label]))
    return Image.fromarray(np.concatenate(rows))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path, help="video files, one row each")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--columns", type=int, default=5, help="frames a row")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Draw the picture."""
    videos = map(read_video, args.videos)
    labels = [path.stem for path in args.videos]
    contact_sheet(videos, labels, args.columns).save(args.output)


if __name__ == "__main__":
    run_script(main, parse_args)
