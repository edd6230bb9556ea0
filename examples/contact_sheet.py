"""One picture of many videos: a row a video, frames evenly spread over it.

python examples/contact_sheet.py --output samples.png outputs/quickstart/lora/samples/*.mp4
"""

import argparse
from pathlib import Path

import av
from PIL import Image, ImageDraw

MARGIN, LABEL = 2, 12  # pixels


def read_frames(path: Path, columns: int) -> list[Image.Image]:
    """`columns` frames of a video, the first and the last among them."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    return [frames[round(i * (len(frames) - 1) / max(1, columns - 1))] for i in range(columns)]


def contact_sheet(paths: list[Path], columns: int) -> Image.Image:
    """A grid with the file's name above each row; all videos are shown at the size of the first."""
    rows = [read_frames(path, columns) for path in paths]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (columns * (width + MARGIN), len(rows) * (height + LABEL + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (path, row) in enumerate(zip(paths, rows, strict=True)):
        top = y * (height + LABEL + MARGIN)
        draw.text((0, top), path.stem, fill="black")
        for x, frame in enumerate(row):
            sheet.paste(frame.resize((width, height)), (x * (width + MARGIN), top + LABEL))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path, help="video files, one row each")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--columns", type=int, default=5, help="frames a row")
    args = parser.parse_args()
    contact_sheet(args.videos, args.columns).save(args.output)


if __name__ == "__main__":
    main()
