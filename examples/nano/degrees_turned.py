"""Say in words what the quickstart taught: how far the sprites of its sample videos go around the middle.

    python examples/nano/degrees_turned.py outputs/quickstart/lora

A prompt that begins with "orbit" asks for one turn, 360 degrees clockwise. The samples of all steps start from the
same noise, so what differs between step 0 and the last one is what training did. The numbers go to
`degrees_turned.json` in the folder too.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from motion_metrics import measure
from sprites import ORBIT

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # gallery.py, videos.py: examples/ is folders of scripts, not a package

from gallery import find_samples, held_out_errors, prompt_of
from videos import read_video

ASKED = 360  # degrees


def measure_samples(output_dir: Path) -> dict[int, list[float]]:
    """Return the degrees turned by each sample that should: step -> a number a prompt.

    Raise `ValueError` where there are no such samples.
    """
    samples = find_samples(output_dir)
    prompts = samples.settings.get("validation_prompt") or []
    degrees = {}
    for name, steps in samples.videos.items():
        prompt = prompt_of(name, prompts, {})
        if not prompt.startswith(f"{ORBIT},"):
            continue
        for step, path in sorted(steps.items()):
            turned = measure(read_video(path), prompt)["degrees_turned"]
            degrees.setdefault(step, []).append(turned)
    if not degrees:
        raise ValueError(f"{output_dir}/samples holds no video of a prompt that begins with {ORBIT!r}")
    return degrees


def in_words(degrees: dict[int, list[float]], errors: dict[int, float]) -> list[str]:
    """Write the three sentences that the quickstart ends with. `errors` is step -> error on held-out clips."""
    first = min(degrees)
    last = max(degrees)
    count = len(degrees[last])
    before = np.mean(degrees[first])
    after = np.mean(degrees[last])
    sentences = [
        f"Asked to go once around the middle, {ASKED} degrees, the sprites of {count} videos turned by {before:.0f}"
        " degrees on average before training.",
        f"After {last} steps they turned by {after:.0f} degrees.",
    ]
    if len(errors) > 1:
        start = errors[min(errors)]
        end = errors[max(errors)]
        sentences.append(f"The error on clips that training never saw went from {start:.3f} to {end:.3f}.")
    return sentences


def parse_args(input_args=None):
    """Parse the command line, or `input_args` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="of a training run on clips of sprites.py --mix orbit")
    return parser.parse_args(input_args)


def main(args):
    """Print the sentences, one a line, and keep the numbers."""
    try:
        degrees = measure_samples(args.output_dir)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    errors = held_out_errors(args.output_dir)
    numbers = {"asked": ASKED, "degrees": degrees, "held_out_mse": errors}
    (args.output_dir / "degrees_turned.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print("\n".join(in_words(degrees, errors)))


if __name__ == "__main__":
    main(parse_args())
