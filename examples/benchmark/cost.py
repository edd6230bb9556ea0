"""Time and cost of the paper's recipe on 1, 8 and 64 GPUs, from the measured time of a step on one.

    python examples/benchmark/benchmark.py --model 1.3b --train_type full
    python examples/benchmark/cost.py outputs/benchmark/1.3b.json --price_per_gpu_hour 2.50
    python examples/benchmark/cost.py 6.5

The recipe is section 3.1 of the LTD paper (https://huggingface.co/papers/2601.20504): 2 epochs over 3,860 clips of 81
frames of 832x480, batch 16. That batch has no work for more than 16 GPUs, so 64 of them take one clip each, which is
another batch than the paper's. The table holds training only, without caching, and assumes that nothing is lost to
communication: measure a few steps on your machines before you rent them for long.
"""

import argparse
import json
from pathlib import Path

CLIPS = 3860
EPOCHS = 2
BATCH = 16
SETTINGS = {"model": "1.3b", "train_type": "full", "num_frames": 81, "height": 480, "width": 832}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("step", help="JSON of benchmark.py, or the seconds that one clip takes on one GPU")
    parser.add_argument("--price_per_gpu_hour", type=float, help="in your currency")
    return parser.parse_args(input_args)


def seconds_per_clip(step: str) -> float:
    """Read what a clip takes from a measurement of `benchmark.py`, or from a number.

    Raises `ValueError` when `step` is neither a file nor a number, or was measured with another recipe.
    """
    if not Path(step).is_file():
        try:
            return float(step)
        except ValueError:
            raise ValueError(f"{step} is neither a file nor a number of seconds") from None
    run = json.loads(Path(step).read_text())
    measured = run.get("settings", {}) | {"model": run["model"]}
    mismatches = []
    for name, value in SETTINGS.items():
        if measured.get(name) != value:
            mismatches.append(f"{name} {measured.get(name)} instead of {value}")
    if mismatches:
        raise ValueError(f"{step} was not measured with the paper's recipe: {', '.join(mismatches)}")
    return 1 / run["step"]["results"]["train_ltd.py"]["clips_per_second"]


def cost_table(seconds: float, price: float | None) -> str:
    """Write a Markdown table from seconds a clip and the price of a GPU hour, if it is known."""
    lines = ["| GPUs | clips an update | updates | hours | GPU hours | cost |", "|---|---|---|---|---|---|"]
    for gpus in (1, 8, 64):
        batch = max(BATCH, gpus)
        updates = EPOCHS * (CLIPS // batch)
        hours = updates * batch / gpus * seconds / 3600
        cost = "-"
        if price is not None:
            cost = f"{hours * gpus * price:,.2f}"
        lines.append(f"| {gpus} | {batch} | {updates} | {hours:.2f} | {hours * gpus:.1f} | {cost} |")
    return "\n".join(lines)


if __name__ == "__main__":
    args = parse_args()
    print(cost_table(seconds_per_clip(args.step), args.price_per_gpu_hour))
