"""One picture of many videos: a row a video, frames evenly spread over it.

python examples/contact_sheet.py --output samples.png outputs/quickstart/lora/samples/*.mp4
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

MARGIN = 2  # pixels


def read_frames(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def labelled_row(pictures: list[Image.Image], labels: Iterable[str]) -> Image.Image:
    """Pictures of one size side by side, under a bar with a label for each, or for the first ones only."""
    width, height = pictures[0].size
    bar = max(12, len(pictures) * width // 64) // 2 * 2  # even, so that the row can be a frame of a video
    row = Image.new("RGB", (len(pictures) * (width + MARGIN), height + bar + MARGIN), "white")
    for x, picture in enumerate(pictures):
        row.paste(picture, (x * (width + MARGIN), bar))
    for x, label in enumerate(labels):
        position, font = (x * (width + MARGIN), 0), ImageFont.load_default(bar - 3)
        ImageDraw.Draw(row).text(position, label, fill="black", font=font)
    return row


def contact_sheet(videos: Iterable[list[Image.Image]], labels: list[str], columns: int, scale: float = 1):
    """A grid of `columns` frames a video, the first and the last among them; all in the size of the first video."""
    rows, size = [], None
    for frames, label in zip(videos, labels, strict=True):
        size = size or (round(frames[0].width * scale), round(frames[0].height * scale))
        picked = [frames[round(i * (len(frames) - 1) / max(1, columns - 1))] for i in range(columns)]
        rows.append(labelled_row([frame.resize(size) for frame in picked], [label]))
    sheet = Image.new("RGB", (rows[0].width, len(rows) * rows[0].height))
    for y, row in enumerate(rows):
        sheet.paste(row, (0, y * row.height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path, help="video files, one row each")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--columns", type=int, default=5, help="frames a row")
    args = parser.parse_args()
    videos, labels = (read_frames(path) for path in args.videos), [path.stem for path in args.videos]
    contact_sheet(videos, labels, args.columns).save(args.output)


if __name__ == "__main__":
    main()
