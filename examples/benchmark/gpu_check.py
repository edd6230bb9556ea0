"""Run on one GPU, in at most eight minutes, what this repository has only computed or only tested on a CPU.

    python examples/benchmark/gpu_check.py                  # speed
    python examples/benchmark/gpu_check.py --check memory   # little memory, Wan2.2
    python examples/benchmark/gpu_check.py --small          # the same items with a tiny model, on a CPU too

Each check is a list of items, in order of worth. `speed`: the LoRA of 14B with selective beside full checkpointing;
1.3B without recomputation, where the memory allows; LTD compiled; caching by stages; 1.3B with cuDNN's attention and
with FlashAttention 4, its gradients, and 14B with it. `memory`: the LoRA of 14B with a 4-bit base and the blocks'
inputs in RAM; the tests of that copying; ten LoRA steps of an expert of Wan2.2-T2V-A14B and of TI2V-5B; a base in 8
bits; and the first item without the inputs in RAM. Weights are random and of true shape, nothing is downloaded. It
takes 45 GB of disk and 64 GB of RAM, and for all items an 80 GB card, for 1.3B without recomputation a larger one.

Python, the packages and the GPU are printed first. An item whose packages or memory are missing is named and left out,
and so are the last ones when the time is up; one that fails or hangs is named, and the others go on. Each is a
process, whose output is `ITEM.log` in `--output_dir`. After each item `results.json` there is written anew.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
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
PACKAGES = (
    "torch",
    "diffusers",
    "accelerate",
    "peft",
    "transformers",
    "datasets",
    "av",
    "bitsandbytes",
    "torchao",
    "flash-attn-4",
)
INSTALL = {"flash_attn.cute": "flash-attn-4==4.0.0b18"}  # module -> what pip calls it, where that differs
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "LTD_TEST_CUDA": "1"}  # of every item; the second is for the tests
# What a tiny model, which a CPU must do too, is spared; and the model itself
SMALL = ((" --torch_compile", ""), (" --attention_backend _native_cudnn", ""), (r" --num_frames \d+", ""))
SMALL_MODEL = (r"--model \S+", "--model tiny")
GPU_CODE = """
import json, torch
facts = {}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    facts = {"name": properties.name, "memory_gib": properties.total_memory / 2**30}
    facts["capability"] = torch.cuda.get_device_capability()
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Item:
    """A command after `python`, and what it needs beyond that which training always needs."""

    name: str
    command: str
    packages: tuple[str, ...] = ()  # as they are imported
    goal: float | None = None  # MFU
    memory_gib: float = 0.0  # of the GPU
    seconds: float = 150.0  # at most, so that one that hangs leaves time for the others


BENCHMARK = "examples/benchmark/benchmark.py"
TESTS = "-m pytest -q -m cuda tests/test_wan.py -k"
STEP = f"{BENCHMARK} --parts step --warmup_steps 1 --torch_compile"
CUDNN = "--attention_backend _native_cudnn"
FLASH = "--attention_backend flash_4"
SPEED_14B = f"{STEP} --steps 1 --model 14b"  # a step takes ten seconds, and compiling the first one longer
SPEED_1B = f"{STEP} --steps 3 --model 1.3b"
NF4 = f"{STEP} --steps 2 --model 14b --quantization nf4"
TEN = f"{STEP} --steps 9"
CHECKS = {
    "speed": (
        Item("14b_selective", f"{SPEED_14B} --gradient_checkpointing selective {CUDNN}", goal=0.62, seconds=240),
        Item("14b_full", f"{SPEED_14B} --gradient_checkpointing full {CUDNN}"),
        Item("1.3b_none", f"{SPEED_1B} --gradient_checkpointing none {CUDNN}", goal=0.64, memory_gib=100),
        Item("ltd_compiled", f"{BENCHMARK} --parts ltd --model 1.3b", seconds=90),
        Item("caching", f"{BENCHMARK} --parts cache --model 1.3b", seconds=90),
        Item("1.3b_cudnn", f"{SPEED_1B} --gradient_checkpointing selective {CUDNN}"),
        Item(
            "1.3b_flash_4",
            f"{SPEED_1B} --gradient_checkpointing selective {FLASH}",
            packages=("flash_attn.cute",),
            goal=0.63,
        ),
        Item("flash_gradients", f"{TESTS} gradients_of_torchs_own", packages=("pytest", "flash_attn.cute")),
        Item(
            "14b_flash_4",
            f"{SPEED_14B} --gradient_checkpointing selective {FLASH}",
            packages=("flash_attn.cute",),
            goal=0.67,
        ),
        Item(
            "1.3b_none_flash_4",
            f"{SPEED_1B} --gradient_checkpointing none {FLASH}",
            packages=("flash_attn.cute",),
            goal=0.70,
            memory_gib=100,
        ),
    ),
    "memory": (
        Item("14b_nf4_offload", f"{NF4} --gradient_checkpointing offload", packages=("bitsandbytes",), seconds=240),
        Item("offload_tests", f"{TESTS} offloaded", packages=("pytest", "bitsandbytes")),
        Item("a14b_lora", f"{TEN} --model a14b --num_frames 33"),
        Item("5b_lora", f"{TEN} --model 5b --num_frames 49"),
        Item(
            "int8",
            f"{BENCHMARK} --parts step --model 1.3b --steps 3 --warmup_steps 1 --quantization int8",
            packages=("torchao",),
        ),
        Item("14b_nf4_full", f"{NF4} --gradient_checkpointing full", packages=("bitsandbytes",)),
    ),
}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Ends with an error for items that the check does not have."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--check", choices=CHECKS, default="speed", help="default: speed")
    add("--items", nargs="+", help="only these of the check")
    add("--small", action="store_true", help="with a tiny model, not compiled, to try this script; runs on a CPU")
    add("--minutes", type=float, default=MINUTES, help=f"for all of them together (default: {MINUTES})")
    add("--work_dir", default="outputs/benchmark", help="random weights, clips and cache, for later runs too")
    add("--output_dir", default="outputs/gpu_check", help="results.json, and a log an item")
    args = parser.parse_args(input_args)
    names = [item.name for item in CHECKS[args.check]]
    for name in args.items or []:
        if name not in names:
            parser.error(f"--items: {name} is not one of {', '.join(names)}, which --check {args.check} has")
    return args


def environment() -> dict:
    """Collect and print Python, the packages, also those that are missing, and the GPU, by a process of its own."""
    facts = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "packages": {}}
    print(f"{facts['date']}, Python {facts['python']}")
    for name in PACKAGES:
        try:
            facts["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts["packages"][name] = None
        print(name, facts["packages"][name] or "is missing")
    result = subprocess.run([sys.executable, "-c", GPU_CODE], capture_output=True, text=True)
    facts["gpu"] = json.loads(result.stdout) if result.returncode == 0 else {}
    print("GPU:", facts["gpu"] or "torch finds none", flush=True)
    return facts


def is_missing(module: str) -> bool:
    """Tell whether a module, or its package, is not installed, or cannot be imported."""
    try:
        return importlib.util.find_spec(module) is None
    except ImportError:  # of the package: there is none, or it was built for another torch
        return True


def reason_to_leave_out(item: Item, gpu: dict, small: bool, left: float) -> str | None:
    """Say what keeps an item from being run, if anything does; `left` are seconds."""
    missing = [INSTALL.get(module, module) for module in item.packages if is_missing(module)]
    if not gpu and not small:
        return "torch finds no GPU"
    if missing:
        return f"pip install {' '.join(missing)}"
    if not small and gpu["memory_gib"] < item.memory_gib:
        return f"needs {item.memory_gib:.0f} GiB of GPU memory, this one has {gpu['memory_gib']:.0f}"
    if left <= 0:
        return "the time was up"
    return None


def command_of(item: Item, args: argparse.Namespace, result_file: Path) -> list[str]:
    """Build an item's command line."""
    text = item.command
    if args.small:
        for pattern, replacement in (*SMALL, SMALL_MODEL):
            text = re.sub(pattern, replacement, text)
    command = [sys.executable, *shlex.split(text)]
    if item.command.startswith(BENCHMARK):
        command += ["--work_dir", str(Path(args.work_dir).resolve()), "--output_file", str(result_file)]
    return command


def run_item(item: Item, args: argparse.Namespace, left: float) -> dict:
    """Run an item for `left` seconds at most; returns its command, what came of it in a line, and its measurements."""
    result_file = Path(args.output_dir, f"{item.name}.json").resolve()
    result_file.unlink(missing_ok=True)  # of an earlier run
    log = Path(args.output_dir, f"{item.name}.log")
    command = command_of(item, args, result_file)
    row = {"command": shlex.join(["python", *command[1:]])}
    seconds = left if args.small else min(left, item.seconds)  # a GPU's limits are not those of a CPU
    print(f"\n{item.name}, {seconds:.0f} s at most: {row['command']}", flush=True)
    started = time.perf_counter()
    try:
        with log.open("w") as output:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        row["seconds"] = time.perf_counter() - started
        if code:
            lines = log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            row["line"] = f"failed with exit code {code} after {row['seconds']:.0f} s: {last}"
        elif result_file.is_file():
            row["record"] = json.loads(result_file.read_text())
            row["line"] = f"{describe(row['record'], item.goal)}; {row['seconds']:.0f} s in all"
        else:
            row["line"] = f"passed in {row['seconds']:.0f} s"
    except subprocess.TimeoutExpired:
        row["line"] = f"stopped after {seconds:.0f} s"
    except Exception as error:  # whatever an item leaves behind must not end the others
        row["line"] = f"failed: {type(error).__name__}: {error}"
    return row


def describe(record: dict, goal: float | None) -> str:
    """Write in one line what `benchmark.py` has measured."""
    parts = []
    if "step" in record:
        result = record["step"]["results"]["train_ltd.py"]
        losses = result["losses"]
        parts.append(f"{result['seconds_per_step']:.3g} s/step, peak {result['peak_memory_gib']:.1f} GiB")
        parts.append(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, MFU {result['mfu']:.0%}")
        if goal:
            parts.append(f"goal {goal:.0%}")
        if "mfu_of_data_sheet" in result:
            parts.append(f"{result['mfu_of_data_sheet']:.0%} of the data sheet's peak")
    for row in record.get("ltd", {}).get("rows", []):
        if row["compiled"] and row["loss"] == "ltd_loss":
            times = row["with_gradient"] / row["floor"]
            shape = "x".join(map(str, row["shape"]))
            parts.append(f"LTD of {shape} {1000 * row['with_gradient']:.2f} ms, {times:.1f} reads")
    if "cache" in record:
        for stage, seconds in record["cache"]["seconds_per_clip"].items():
            parts.append(f"{stage} {seconds:.2f} s")
        parts.append(f"script {record['cache']['script']['clips_per_second']:.2f} clips/s")
    return ", ".join(parts)


def main(args: argparse.Namespace) -> dict[str, str]:
    """Run the items one after the other while there is time; returns a line on each, which is printed too."""
    started = time.perf_counter()
    facts = environment()
    results = {"check": args.check, "small": args.small, "environment": facts, "items": {}}
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for item in CHECKS[args.check]:
        if args.items and item.name not in args.items:
            continue
        left = 60 * args.minutes - (time.perf_counter() - started)
        reason = reason_to_leave_out(item, facts["gpu"], args.small, left)
        row = {"line": f"left out: {reason}"} if reason else run_item(item, args, left)
        results["items"][item.name] = row
        print(f"{item.name}: {row['line']}", flush=True)
        (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = {name: row["line"] for name, row in results["items"].items()}
    print()
    for name, line in lines.items():
        print(f"{name:18} {line}")
    return lines


if __name__ == "__main__":
    run_script(main, parse_args)
