"""Time and cost of a training run, from its output folder or from the measured time of a step on one GPU.

    python examples/benchmark/cost.py my_lora --price_per_gpu_hour 2.50

A run, or a trial of a few steps, writes `estimate.json` into its output folder after its first steps: hours that are
computed for the whole run, caching, held-out errors and samples included. Beside them stand the hours until its last
line of `metrics.jsonl`, which are measured.

Without a run:

    python examples/benchmark/benchmark.py --model 1.3b --train_type full
    python examples/benchmark/cost.py outputs/benchmark/1.3b.json --price_per_gpu_hour 2.50
    python examples/benchmark/cost.py 6.5
    python examples/benchmark/benchmark.py --model a14b --num_frames 33
    python examples/benchmark/cost.py outputs/benchmark/a14b.json --price_per_gpu_hour 2.50

A full fine-tune of 1.3B is taken for the paper's recipe, section 3.1 of https://huggingface.co/papers/2601.20504: 2
epochs over 3,860 clips of 81 frames of 832x480, batch 16, on 1, 8 and 64 GPUs. That batch has no work for more than 16
GPUs, so 64 of them take one clip each, which is another batch than the paper's. A LoRA is taken for a recipe of
examples/recipes: 1,000 updates of 4 clips, on 1, 2 and 4 GPUs, and twice that for Wan2.2-T2V-A14B, whose two experts
are two runs. `--recipe` says which of them a plain number of seconds is for.

That table holds training only, without caching, and assumes that nothing is lost to communication: measure a few steps
on your machines before you rent them for long.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # mistakes.py: examples/ is folders of scripts, not a package

from mistakes import run_script

# What the paper's recipe must have been measured with
SETTINGS = {"model": "1.3b", "train_type": "full", "num_frames": 81, "height": 480, "width": 832}


@dataclass(frozen=True)
class Recipe:
    """How long is trained, and on how many GPUs."""

    clips: int
    epochs: int
    batch: int  # clips an update
    gpus: tuple[int, ...]
    runs: int = 1


RECIPES = {
    "paper": Recipe(clips=3860, epochs=2, batch=16, gpus=(1, 8, 64)),
    "lora": Recipe(clips=4, epochs=1000, batch=4, gpus=(1, 2, 4)),
    "lora_a14b": Recipe(clips=4, epochs=1000, batch=4, gpus=(1, 2, 4), runs=2),
}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "step", help="output folder of a run, JSON of benchmark.py, or the seconds that one clip takes on one GPU"
    )
    parser.add_argument("--price_per_gpu_hour", type=float, help="in your currency")
    parser.add_argument("--recipe", choices=RECIPES, help="default: the measured one, or the paper's for a number")
    return parser.parse_args(input_args)


def read_step(step: str) -> tuple[float, str]:
    """Read the seconds that a clip takes, and the recipe, from a measurement of `benchmark.py` or from a number.

    Raises `ValueError` when `step` is neither a file nor a number, or is a full fine-tune that is not the paper's.
    """
    if not Path(step).is_file():
        try:
            return float(step), "paper"
        except ValueError:
            raise ValueError(f"{step} is neither a folder, nor a file, nor a number of seconds") from None
    try:
        run = json.loads(Path(step).read_text())
        measured = run.get("settings", {}) | {"model": run["model"]}
        seconds = 1 / run["step"]["results"]["train_ltd.py"]["clips_per_second"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{step} is no measurement of benchmark.py with the part `step`") from error
    if measured.get("train_type") == "lora":
        recipe = "lora_a14b" if run["model"] == "a14b" else "lora"
        return seconds, recipe
    mismatches = []
    for name, value in SETTINGS.items():
        if measured.get(name) != value:
            mismatches.append(f"{name} {measured.get(name)} instead of {value}")
    if mismatches:
        raise ValueError(f"{step} was not measured with the paper's recipe: {', '.join(mismatches)}")
    return seconds, "paper"


def cost_table(seconds: float, price: float | None, recipe: Recipe = RECIPES["paper"]) -> str:
    """Write a Markdown table from seconds a clip and the price of a GPU hour, if it is known."""
    lines = ["| GPUs | clips an update | updates | hours | GPU hours | cost |", "|---|---|---|---|---|---|"]
    for gpus in recipe.gpus:
        batch = max(recipe.batch, gpus)
        updates = recipe.runs * recipe.epochs * (recipe.clips // batch)
        hours = updates * batch / gpus * seconds / 3600
        cost = "-"
        if price is not None:
            cost = f"{hours * gpus * price:,.2f}"
        lines.append(f"| {gpus} | {batch} | {updates} | {hours:.2f} | {hours * gpus:.1f} | {cost} |")
    return "\n".join(lines)


def run_table(folder: str, price: float | None) -> str:
    """Write a Markdown table of what a run takes, from its output folder and the price of a GPU hour, if it is known.

    Raises `ValueError` when the folder has no `estimate.json`.
    """
    estimate = None
    for place in (".", "high_noise", "low_noise"):  # an expert of Wan2.2 has a folder of its own
        path = Path(folder, place, "estimate.json")
        if path.is_file():
            estimate = json.loads(path.read_text())
    if estimate is None:
        raise ValueError(f"{folder} has no estimate.json, which train_ltd.py writes after its first steps")
    rows = [("the whole run, computed", estimate["steps"], estimate["total_hours"])]
    if estimate["steps"] < 1000:  # a trial
        hours = 1000 * estimate["seconds_per_step"] / 3600
        rows.append(("1000 steps without the rest, computed", 1000, hours))
    metrics = Path(folder, "metrics.jsonl")
    if metrics.is_file():
        for line in reversed(metrics.read_text().splitlines()):
            row = json.loads(line)
            if "hours" in row:
                rows.append(("until its last line, measured", row["step"], row["hours"]))
                break
    gpus = estimate["processes"]
    lines = ["| | steps | hours | GPUs | GPU hours | cost |", "|---|---|---|---|---|---|"]
    for name, steps, hours in rows:
        cost = "-"
        if price is not None:
            cost = f"{hours * gpus * price:,.2f}"
        lines.append(f"| {name} | {steps} | {hours:.2f} | {gpus} | {hours * gpus:.2f} | {cost} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Print the table of a run or of a recipe."""
    if Path(args.step).is_dir():
        print(run_table(args.step, args.price_per_gpu_hour))
        return
    seconds, recipe = read_step(args.step)
    print(cost_table(seconds, args.price_per_gpu_hour, RECIPES[args.recipe or recipe]))


if __name__ == "__main__":
    run_script(main, parse_args)
