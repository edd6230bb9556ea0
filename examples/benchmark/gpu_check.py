"""Run on a GPU, in at most eight minutes, what this repository has only computed or only tested on a CPU.

    python examples/benchmark/gpu_check.py

In order of worth: the LoRA of 14B with a 4-bit base and the blocks' inputs in RAM at 832x480 with 81 frames (peak and
seconds a step); the tests of that copying; ten LoRA steps of an expert of Wan2.2-T2V-A14B and of TI2V-5B; a base in 8
bits; and last the first item without the inputs in RAM, to compare. Weights are random and of true shape, nothing is
downloaded. It takes 45 GB of disk and 64 GB of RAM, and for all items an 80 GB card.

The versions are printed first. An item whose packages are missing is named and left out, and so are the last ones when
the time is up. Each item is a command, printed as it starts, whose results are a JSON file in `--output_dir`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # mistakes.py: examples/ is folders of scripts, not a package

from mistakes import run_script

MINUTES = 8
PACKAGES = ("torch", "diffusers", "accelerate", "peft", "transformers", "datasets", "av", "bitsandbytes", "torchao")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "LTD_TEST_CUDA": "1"}  # of every item; the second is for the tests


@dataclass(frozen=True)
class Item:
    """A command after `python`, and the packages that it needs beyond those that training always needs."""

    name: str
    command: str
    packages: tuple[str, ...] = ()


BENCHMARK = "examples/benchmark/benchmark.py --parts step"
NF4 = f"{BENCHMARK} --model 14b --steps 2 --warmup_steps 1 --quantization nf4 --torch_compile"
ITEMS = (
    Item("14b_nf4_offload", f"{NF4} --gradient_checkpointing offload", ("bitsandbytes",)),
    Item("tests", "-m pytest -q -m cuda tests/test_wan.py -k offloaded", ("pytest", "bitsandbytes")),
    Item("a14b_lora", f"{BENCHMARK} --model a14b --steps 9 --warmup_steps 1 --num_frames 33 --torch_compile"),
    Item("5b_lora", f"{BENCHMARK} --model 5b --steps 9 --warmup_steps 1 --num_frames 49 --torch_compile"),
    Item("int8", f"{BENCHMARK} --model 1.3b --steps 3 --warmup_steps 1 --quantization int8", ("torchao",)),
    Item("14b_nf4_full", f"{NF4} --gradient_checkpointing full", ("bitsandbytes",)),
)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--items", nargs="+", choices=[item.name for item in ITEMS], help="only these")
    add("--minutes", type=float, default=MINUTES, help=f"for all of them together (default: {MINUTES})")
    add("--work_dir", default="outputs/benchmark", help="random weights, clips and cache, for later runs too")
    add("--output_dir", default="outputs/gpu_check", help="results, a JSON file an item")
    return parser.parse_args(input_args)


def print_environment() -> None:
    """Print the GPU, Python and the packages, those that are missing too."""
    print(f"date {time.strftime('%Y-%m-%d')}, Python {platform.python_version()}")
    for name in PACKAGES:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is missing")
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        print(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip(), flush=True)
    except (OSError, subprocess.CalledProcessError):
        print("no NVIDIA GPU answers", flush=True)


def has_gpu() -> bool:
    """Tell whether torch is there and finds a GPU; in a process of its own, which takes no memory of it for long."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def run_item(item: Item, args: argparse.Namespace, seconds: float) -> str:
    """Run an item for `seconds` at most; returns what came of it, in one line."""
    command = [sys.executable, *shlex.split(item.command)]
    result_file = Path(args.output_dir, f"{item.name}.json").resolve()
    if item.command.startswith(BENCHMARK):
        command += ["--work_dir", str(Path(args.work_dir).resolve()), "--output_file", str(result_file)]
    print(f"\n{item.name}, {seconds:.0f} s left: {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return "stopped: the time was up"
    elapsed = time.perf_counter() - started
    if code:
        return f"failed with exit code {code} after {elapsed:.0f} s: see above"
    if not result_file.is_file():
        return f"passed in {elapsed:.0f} s"
    result = json.loads(result_file.read_text())["step"]["results"]["train_ltd.py"]
    losses = result["losses"]
    return (
        f"{result['seconds_per_step']:.2f} s/step, peak {result['peak_memory_gib']:.1f} GiB, loss {losses[0]:.3f} to "
        f"{losses[-1]:.3f}, MFU {result['mfu']:.0%}; {elapsed:.0f} s in all"
    )


def main(args: argparse.Namespace) -> dict[str, str]:
    """Run the items one after the other while there is time; returns a line on each, which is printed too."""
    print_environment()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + 60 * args.minutes
    gpu = has_gpu()
    lines = {}
    for item in ITEMS:
        if args.items and item.name not in args.items:
            continue
        missing = [name for name in item.packages if not importlib.util.find_spec(name)]
        left = deadline - time.perf_counter()
        if not gpu:
            lines[item.name] = "left out: torch finds no GPU"
        elif missing:
            lines[item.name] = f"left out: pip install {' '.join(missing)}"
        elif left <= 0:
            lines[item.name] = "left out: the time was up"
        else:
            lines[item.name] = run_item(item, args, left)
    print()
    for name, line in lines.items():
        print(f"{name:16} {line}")
    return lines


if __name__ == "__main__":
    run_script(main, parse_args)
