"""Measure a training step of `train_ltd.py`, LTD's share of it, caching and start-up, on random weights of true shape.

    python examples/benchmark/benchmark.py --model nano
    python examples/benchmark/benchmark.py --model 1.3b --train_type full --gradient_checkpointing none
    python examples/benchmark/benchmark.py --model 1.3b --sweep
    python examples/benchmark/benchmark.py --model a14b --expert low

Nothing is downloaded. Flags that are not listed below go to `train_ltd.py`, so any setting of a run can be measured;
with `--config recipe.yaml` the clips have the recipe's size. Of `a14b` (Wan2.2-T2V-A14B) one expert is trained, the
one for high noise unless `--expert` is given; `5b` is Wan2.2-TI2V-5B, and `i2v-14b` is image-to-video,
Wan2.1-I2V-14B, with a CLIP of two layers. What is timed is the script itself: its `main()` runs, with clocks around
the library calls that it makes and around the loss that it is given, and is stopped after the last measured step. On a
GPU each clock waits for the GPU.

What is compared takes turns: in each round everyone makes one step, in random order, between two steps of the script's
own loop. So a machine that is busy is busy for all. What is told is the ratio to the bare loop of the same round: its
median, its quartiles, and an interval that holds the true median 95 times in 100; by the wall clock, and by the
seconds that the CPUs spent on this process, which others on the machine lengthen less. All models lie in memory at
once; where that is too much, measure `--parts step` alone.

The parts (`--parts`):
    step   the script: forward, loss, backward, clipping, optimizer, data wait; useful FLOP/s, memory
    bare   the same weights, batches and targets in a loop of a dozen lines, and in other trainers (below)
    operators  torch's operators in a step of each, and the functions that call them: what the time goes to on a CPU
    ltd    `ltd_loss` against `F.mse_loss`, eager and compiled, beside one read of its inputs at memory bandwidth
    cache  decoding, VAE and text encoder a clip; the VAE in bfloat16 against float32
    start  seconds from the call of the script to the end of its first step, without and with a cache
    profile  what the device's time in one step goes to, by kind of kernel, and its longest kernels

`--adapter file.py` compares another trainer. The file defines a class `Trainer` as `BareLoop` is one:
`__init__(settings)`, where `settings` are the flags of `train_ltd.py` and `settings.pretrained_model_name_or_path` is
the folder with the weights; `model`, the module whose forward pass is to have a clock; and `step(batch)`, which makes
one update on `batch`, the CPU tensors `latents`, `noise`, `sigmas` and `prompt_embeds`, and returns the loss before.
An adapter that fails is named with its error, and the others go on. If all train the same, their first losses, plain
MSE on the first batch, and their numbers of trained parameters are equal.
"""

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import free_memory
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.data.dataloader import _BaseDataLoaderIter

ROOT = Path(__file__).resolve().parents[2]
# train_ltd.py is a script in the repository's root, and examples/ is folders of scripts: neither is a package.
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from small_wan import FORMS, PRESETS, build_small_wan, smooth_videos
from videos import write_video

import train_ltd
from ltd_loss import ltd_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NANO = ROOT / "examples/nano/wan-nano"
SHAPES = {
    "tiny": PRESETS["tiny"],
    "nano": PRESETS["small"] | {"num_attention_heads": 6, "attention_head_dim": 32},
    "1.3b": PRESETS["1.3b"],
    "14b": PRESETS["1.3b"] | {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
    "5b": {
        **PRESETS["1.3b"],
        **FORMS["5b"],
        "base_dim": 160,
        "decoder_base_dim": 256,
        "dim_mult": (1, 2, 4, 4),
        "num_attention_heads": 24,
        "ffn_dim": 14336,
    },
}
SHAPES["a14b"] = SHAPES["14b"]  # each of its two experts
SHAPES["i2v-14b"] = SHAPES["14b"] | FORMS["i2v-14b"]
SIZES = {  # frames, height, width: what Wan's own configurations sample
    "tiny": (9, 32, 48),
    "nano": (33, 96, 96),
    "1.3b": (81, 480, 832),
    "14b": (81, 480, 832),
    "a14b": (81, 480, 832),
    "i2v-14b": (81, 480, 832),
    "5b": (121, 704, 1280),
}
NUM_CLIPS = 4
TEXT_TOKENS = 512  # that Wan pads a caption to
IMAGE_TOKENS = 257  # of CLIP, for Wan2.1 I2V
LTD_SHAPES = [(1, 16, 21, 60, 104), (1, 16, 21, 90, 160), (4, 16, 21, 60, 104)]  # 480p, 720p and four clips; 81 frames
TINY_LTD_SHAPES = [(1, 16, 3, 4, 6)]  # of the model tiny
PACKAGES = ("torch", "diffusers", "accelerate", "peft", "transformers", "torchao", "bitsandbytes", "flash-attn-4")
PARTS = ["step", "bare", "operators", "ltd", "cache", "start", "profile"]
SWEEP = [
    "gradient_checkpointing=none,selective,full,offload",
    "attention_backend=native,_native_cudnn",
    "torch_compile=false,true",
    "train_batch_size=1,2",
]
SCRIPT = "train_ltd.py"
BARE = "bare loop"
WALL, CPU = 0, 1  # the two clocks
WORK = ["forward", "backward", "clipping", "optimizer"]
LABELS = [*WORK, "data wait", "loss", "rest of loop"]  # seconds each
KERNELS = {  # kind -> pattern of a kernel's name, the first that fits
    "attention": "flash|fmha|attention|sdpa",
    "matrix products": "gemm|nvjet|cutlass|mm$",
    "copies": "memcpy|memset",
}
# Pattern of a GPU's name, the first that fits -> dense bf16 FLOP/s of its data sheet
DATA_SHEETS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100|H200|GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
BACKWARD = "backward pass"
MODEL_PACKAGES = ("diffusers:", "peft:")
PRODUCTS = re.compile(r"mm|convolution|scaled_dot_product")  # operators that are matrix products
TORCH_FOLDER = str(Path(torch.__file__).parent)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what is not listed here is left in `train_flags`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", choices=SHAPES, default="nano", help="shape of the model; nano is for CPUs, tiny for tests")
    parts = ["step", "bare", "ltd"]
    add("--parts", nargs="+", choices=PARTS, default=parts, help=f"what to measure (default: {' '.join(parts)})")
    add("--steps", type=int, default=20, help="measured rounds, of which medians are given")
    add("--warmup_steps", type=int, default=3, help="rounds before them")
    add("--adapter", action="append", default=[], help="Python file with another trainer; repeatable")
    what = f"time all combinations of flags of train_ltd.py, the best at the end (default: {' '.join(SWEEP)})"
    add("--sweep", nargs="*", metavar="FLAG=VALUE,VALUE", help=what)
    add("--work_dir", default="outputs/benchmark", help="random weights, clips and cache, for later runs too")
    add("--output_file", help="JSON of all results (default: WORK_DIR/MODEL.json)")
    args, args.train_flags = parser.parse_known_args(input_args)
    args.output_file = Path(args.output_file or Path(args.work_dir, f"{args.model}.json"))
    if args.sweep is not None:
        args.parts = ["sweep"]
    if args.steps < 1 or args.warmup_steps < 1:
        parser.error("--steps and --warmup_steps must be positive: a first step is never typical")
    if Path(args.work_dir).is_file() or args.output_file.is_dir():
        parser.error(f"--work_dir {args.work_dir} must be a folder, --output_file {args.output_file} a file")
    compares = "step" in args.parts or "operators" in args.parts
    if (args.adapter or "bare" in args.parts) and not compares:
        parser.error("--parts bare and --adapter are compared with the script: add step or operators")
    return args


# --- What is measured on: random weights, synthetic clips ------------------------------------------------------------


def build_pipeline(args: argparse.Namespace) -> Path:
    """Build a pipeline folder with a random transformer and VAE of true shape; its text encoder has one layer only."""
    if args.model == "a14b":
        return build_experts(args)
    folder = Path(args.work_dir, f"wan-{args.model}")
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shape = SHAPES[args.model]
    build_small_wan(partial, **shape | {"num_layers": 1})
    config = json.loads((partial / "transformer/config.json").read_text())
    config["num_layers"] = shape["num_layers"]
    # bfloat16: 28 GB of disk for 14B, not 57
    dtype = torch.float32 if args.model in ("tiny", "nano") else torch.bfloat16
    if args.model == "nano":
        if (NANO / "transformer/config.json").is_file():
            config = json.loads((NANO / "transformer/config.json").read_text())
        if (NANO / "vae").is_dir():
            shutil.copytree(NANO / "vae", partial / "vae", dirs_exist_ok=True)
    device = torch.device("cpu")
    if args.model in ("14b", "i2v-14b", "5b") and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2**35:
        device = DEVICE  # a CPU takes minutes to draw 14 billion numbers
    torch.set_default_dtype(dtype)
    with device:
        transformer = WanTransformer3DModel.from_config(config)
    torch.set_default_dtype(torch.float32)
    shutil.rmtree(partial / "transformer")
    transformer.save_pretrained(partial / "transformer")
    return partial.rename(folder)


def build_experts(args: argparse.Namespace) -> Path:
    """Build a pipeline folder of two experts: links to the parts of 14B, whose shape both have, in place of 57 GB."""
    folder = Path(args.work_dir, "wan-a14b")
    if folder.is_dir():
        return folder
    whole = build_pipeline(argparse.Namespace(**vars(args) | {"model": "14b"}))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for part in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer"):
        (partial / part).symlink_to(Path("..", whole.name, part))
    (partial / "transformer_2").symlink_to(Path("..", whole.name, "transformer"))
    index = json.loads((whole / "model_index.json").read_text())
    index |= FORMS["a14b"] | {"transformer_2": index["transformer"]}
    (partial / "model_index.json").write_text(json.dumps(index, indent=2))
    return partial.rename(folder)


def write_clips(args: argparse.Namespace, settings: argparse.Namespace) -> Path:
    """Write captioned mp4 clips of smooth random motion; returns their folder."""
    size = (settings.num_frames, settings.height, settings.width)
    folder = Path(args.work_dir, "clips-" + "x".join(map(str, size)))
    if (folder / "metadata.jsonl").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(NUM_CLIPS):
        video = smooth_videos(1, *size)[0].permute(1, 2, 3, 0) / 2 + 0.5  # (F, H, W, 3)
        frames = (video * 255).round().byte().numpy()
        write_video(frames, folder / f"{number}.mp4", settings.fps)
        row = {"file_name": f"{number}.mp4", "text": f"a smooth video, number {number}"}
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def is_given(flag: str, args: argparse.Namespace) -> bool:
    """Tell whether the user gave a flag of `train_ltd.py`."""
    return any(given.startswith(flag) for given in args.train_flags)


def script_flags(args: argparse.Namespace) -> list[str]:
    """Build the command line of `train_ltd.py`: the user's flags, between what a measurement needs."""
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    flags = []
    if not is_given("--config", args):
        num_frames, height, width = SIZES[args.model]
        flags += [f"--num_frames={num_frames}", f"--height={height}", f"--width={width}"]
    if not is_given("--pretrained_model_name_or_path", args):
        flags.append(f"--pretrained_model_name_or_path={build_pipeline(args)}")
    if args.model == "a14b" and not is_given("--expert", args):
        flags.append("--expert=high")
    flags += args.train_flags
    flags += [
        f"--max_train_steps={args.warmup_steps + args.steps + 1}",  # it is stopped in the last of them
        "--lr_warmup_steps=0",
        "--lr_scheduler=constant",
        "--gradient_accumulation_steps=1",
        "--report_to=none",
        f"--cache_dir={args.work_dir}/cache",
    ]
    size = parse_settings([*flags, f"--train_data_dir={args.work_dir}"])  # any folder: the clips' size makes its name
    clips = write_clips(args, size)
    return [*flags, f"--train_data_dir={clips}"]


def parse_settings(flags: list[str]) -> argparse.Namespace:
    """Read the script's command line, and let it settle what has its default from the model, such as the rate."""
    settings = train_ltd.parse_args(flags)
    train_ltd.identify_wan(settings)
    return settings


# --- Clocks ----------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Takes the seconds, by both clocks, in each labelled call without those in labelled calls inside it."""

    def __init__(self):
        self.open = []  # label, start and seconds in inner calls, of each call that has not ended
        self.begin_lap()

    def begin_lap(self) -> None:
        """Forget what was taken, and start the clock of all that follows."""
        self.seconds = {}
        self.started = now()

    def lap(self) -> dict[str, np.ndarray]:
        """Return the seconds of each label since `begin_lap`, and of all, `step`, without the benchmark's own work."""
        seconds = dict(self.seconds)
        seconds["step"] = now() - self.started - seconds.pop("benchmark", 0)
        return seconds

    def start(self, label: str, *_) -> None:
        """Start a clock; also a hook of modules and optimizers, whose arguments are ignored."""
        self.open.append([label, now(), 0])

    def stop(self, *_) -> None:
        """Stop the clock that was started last; also a hook."""
        label, started, inside = self.open.pop()
        elapsed = now() - started
        if self.open:
            self.open[-1][2] += elapsed
        self.seconds[label] = self.seconds.get(label, 0) + elapsed - inside

    @contextlib.contextmanager
    def measure(self, label: str) -> Iterator[None]:
        """Time what is done inside."""
        self.start(label)
        try:
            yield
        finally:
            self.stop()

    def timed(self, function: Callable, label: str) -> Callable:
        """Return the same function with a clock around it."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            with self.measure(label):
                return function(*args, **kwargs)

        return wrapper

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put clocks on the calls that any trainer of Wan makes through torch and diffusers."""
        watched = [
            (WanTransformer3DModel, "forward", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "clipping"),
            (_BaseDataLoaderIter, "__next__", "data wait"),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, label in watched:
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), label)))
            stack.callback(register_optimizer_step_pre_hook(functools.partial(self.start, "optimizer")).remove)
            stack.callback(register_optimizer_step_post_hook(self.stop).remove)
            yield


def now() -> np.ndarray:
    """Return the seconds of the wall clock and of this process's CPUs, when the GPU has done all that it was asked."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def reset_peak_memory() -> None:
    """Forget the GPU's peak so far; a process cannot forget its own."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Return the peak in GiB: of the GPU, or of the process where there is none."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- Loops -----------------------------------------------------------------------------------------------------------


class BareLoop:
    """The least that trains the same model on the same batches, with plain MSE; the pattern of an adapter."""

    def __init__(self, settings: argparse.Namespace):
        self.settings = settings
        self.wan = train_ltd.identify_wan(settings)
        torch.manual_seed(settings.seed)
        self.model = train_ltd.load_transformer(settings, self.wan)
        if settings.train_type == "lora":
            train_ltd.add_lora(self.model, settings)
        if settings.torch_compile:
            self.model.compile_repeated_blocks()
        self.model.to(DEVICE)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            weight_decay=settings.adam_weight_decay,
            fused=DEVICE.type == "cuda",
        )

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Make one update on a batch on the CPU; returns the loss before it, a scalar."""
        batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        sigmas = batch["sigmas"].view(-1, 1, 1, 1, 1)
        noisy_latents = (1 - sigmas) * batch["latents"] + sigmas * batch["noise"]
        target = batch["noise"] - batch["latents"]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16"):
            prediction = train_ltd.predict_flow(self.wan, self.model, noisy_latents, batch)
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def load_adapter(path: str, settings: argparse.Namespace):
    """Build the `Trainer` of a file."""
    return runpy.run_path(path)["Trainer"](settings)


def find_trainers(args: argparse.Namespace) -> dict[str, Callable]:
    """Return what is compared with the script: name -> function that builds it from the script's settings."""
    trainers = {}
    if "bare" in args.parts:
        trainers[BARE] = BareLoop
    for path in args.adapter:
        trainers[Path(path).stem] = functools.partial(load_adapter, path)
    return trainers


def draw_turns(names: list[str], rounds: int, seed: int) -> list[tuple[int, str]]:
    """Draw each round's order. In the first the script is alone: the others train on the batch of the round before."""
    generator = random.Random(seed)
    turns = [(0, SCRIPT)]
    for number in range(1, rounds):
        order = list(names)
        generator.shuffle(order)
        turns += [(number, name) for name in order]
    return turns


@dataclass
class Contender:
    """A trainer, and what was measured of it."""

    build: Callable | None = None  # of the script there is nothing to build: it runs
    trainer: object = None
    laps: list[dict[str, np.ndarray]] = field(default_factory=list)  # of the measured rounds: label -> seconds
    losses: list[torch.Tensor] = field(default_factory=list)
    first_loss: torch.Tensor | None = None  # plain MSE
    trained_parameters: int = 0
    held: int = 0  # bytes of the GPU that it keeps between its steps
    peak: float = 0.0  # GiB of the GPU, without what others keep
    inspector: contextlib.AbstractContextManager | None = None  # around its last step
    error: str = ""


class Enough(Exception):
    """Ends the script's run after the last round."""


class Comparison:
    """Runs the script's `main()`, and the others in turn between two steps of its loop.

    A step of the script ends with its optimizer's. `inspect` makes a context manager for each measured step.
    """

    def __init__(
        self,
        settings: argparse.Namespace,
        trainers: dict[str, Callable],
        warmup: int,
        steps: int,
        inspect: Callable = contextlib.nullcontext,
    ):
        self.settings = settings
        self.inspect = inspect
        self.contenders = {SCRIPT: Contender()}
        for name, build in trainers.items():
            self.contenders[name] = Contender(build)
        self.warmup = warmup + bool(trainers)
        turns = draw_turns(list(self.contenders), self.warmup + steps, settings.seed)
        self.turns = iter(turns)
        self.batches = []
        self.watch = Stopwatch()

    def run(self) -> dict[str, Contender]:
        """Run all rounds; no model is left afterwards."""
        with tempfile.TemporaryDirectory() as folder, self.watch.installed():
            hook = register_optimizer_step_post_hook(self.after_optimizer)  # after the clock's own
            args = argparse.Namespace(**vars(self.settings) | {"output_dir": folder})
            self.begin_step(*next(self.turns))
            with contextlib.suppress(Enough):
                train_ltd.main(args, compute_loss=self.compute_loss)
            hook.remove()
        for contender in self.contenders.values():
            contender.trainer = None
        free_memory()
        return self.contenders

    def begin_step(self, number: int, name: str) -> None:
        """Start a contender's clock in a round, and forget the memory's peak."""
        self.number = number
        self.name = name
        if number >= self.warmup:
            self.contenders[name].inspector = self.inspect()
            self.contenders[name].inspector.__enter__()
        self.memory = torch.cuda.memory_allocated()
        reset_peak_memory()
        self.watch.begin_lap()

    def end_step(self) -> None:
        """Keep what a step took."""
        lap = self.watch.lap()
        contender = self.contenders[self.name]
        of_others = self.memory - contender.held
        contender.held += torch.cuda.memory_allocated() - self.memory
        if self.number >= self.warmup:
            contender.inspector.__exit__(None, None, None)
            contender.laps.append(lap)
            if DEVICE.type == "cuda":
                contender.peak = max(contender.peak, peak_memory() - of_others / 2**30)
        if DEVICE.type == "cpu" and self.number == 0:
            contender.peak = peak_memory()  # of the process, which no other has raised yet

    def after_optimizer(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """Let the others make their steps once the script has made one: a hook of the optimizers of all.

        Raises `Enough` after the last turn.
        """
        trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        self.contenders[self.name].trained_parameters = trained
        if self.name != SCRIPT:
            return
        self.end_step()
        for number, name in self.turns:
            if name == SCRIPT:
                self.begin_step(number, name)
                return
            if not self.contenders[name].error:
                self.step_of_other(number, name)
        raise Enough

    def step_of_other(self, number: int, name: str) -> None:
        """Let another trainer make its step on the batch of the round before; if it fails, it is out."""
        contender = self.contenders[name]
        try:
            self.begin_step(number, name)
            if not contender.trainer:
                contender.trainer = contender.build(copy.copy(self.settings))
                clock = functools.partial(self.watch.start, "forward")
                contender.trainer.model.register_forward_pre_hook(clock)
                contender.trainer.model.register_forward_hook(self.watch.stop)
            contender.losses.append(contender.trainer.step(self.batches[number - 1]))
            contender.first_loss = contender.losses[0]
            self.end_step()
        except (Exception, SystemExit) as error:  # whatever another trainer does must not end the others
            contender.error = f"{type(error).__name__}: {error}"
            print(f"{name} is out of the comparison, in round {number}: {contender.error}", flush=True)
            contender.trainer = None
            if contender.inspector:
                contender.inspector.__exit__(None, None, None)
            self.watch.open.clear()
            free_memory()

    def compute_loss(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        batch: dict[str, torch.Tensor],
        args: argparse.Namespace,
    ) -> torch.Tensor:
        """Compute the script's own loss, and keep it and the batch."""
        script = self.contenders[SCRIPT]
        with self.watch.measure("benchmark"):
            self.batches.append({name: value.cpu() for name, value in batch.items() if torch.is_tensor(value)})
            if script.first_loss is None:
                script.first_loss = mse_loss(prediction.detach(), target, batch["latents"])
        with self.watch.measure("loss"):
            loss = train_ltd.compute_loss(prediction, target, batch, args)
        script.losses.append(loss.detach())
        return loss


def summarize(contender: Contender) -> dict:
    """Return medians over the measured steps: seconds of a step and of each label, overhead as a share of a step."""
    if contender.error:
        return {"error": contender.error}
    rows = []
    for lap in contender.laps:
        row = {label: value for label, value in lap.items() if label != "step"}
        row["rest of loop"] = lap["step"] - sum(row.values())
        row["seconds_per_step"] = lap["step"]
        row["overhead"] = 1 - sum(row.get(label, 0) for label in WORK) / lap["step"]
        rows.append(row)
    medians = {}
    for label in rows[0]:
        medians[label] = np.median([row.get(label, np.zeros(2)) for row in rows], axis=0).tolist()
    result = {label: value[WALL] for label, value in medians.items()}
    result["cpu"] = {label: value[CPU] for label, value in medians.items()}
    result["wall_seconds"] = [lap["step"][WALL] for lap in contender.laps]
    result["cpu_seconds"] = [lap["step"][CPU] for lap in contender.laps]
    result["trained_parameters"] = contender.trained_parameters
    result["first_loss"] = float(contender.first_loss)
    result["losses"] = [float(loss) for loss in contender.losses]
    if contender.peak:
        result["peak_memory_gib"] = contender.peak
    return result


def paired_ratio(contender: Contender, bare: Contender, clock: int) -> dict:
    """Return the ratio of a step to the bare loop's of the same round, over the measured rounds.

    `interval` holds the true median with a probability of at least 95 %: from one of the sorted ratios to another, by
    the binomial distribution. `of_totals` also counts what a median hides, work that is done once in a while.
    """
    own = np.array([lap["step"][clock] for lap in contender.laps])
    other = np.array([lap["step"][clock] for lap in bare.laps])
    ratios = np.sort(own / other)
    half = 0.98 * math.sqrt(len(ratios))
    low = max(math.floor(len(ratios) / 2 - half), 0)
    high = min(math.ceil(len(ratios) / 2 + half), len(ratios) - 1)
    return {
        "median": float(np.median(ratios)),
        "quartiles": np.quantile(ratios, (0.25, 0.75)).tolist(),
        "interval": [float(ratios[low]), float(ratios[high])],
        "of_totals": float(own.sum() / other.sum()),
    }


def calling_function() -> str:
    """Name the innermost function, neither torch's nor a clock's, with its package or file; or the backward pass."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(TORCH_FOLDER) or frame.f_code.co_qualname.startswith("Stopwatch."):
        if frame.f_code.co_name == "_engine_run_backward":
            return BACKWARD
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    place = path.stem
    if "site-packages" in path.parts:
        place = path.parts[path.parts.index("site-packages") + 1]
    return f"{place}: {frame.f_code.co_qualname}"


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that reach the device, with their CPU seconds, by the function that called them."""

    def __init__(self):
        super().__init__()
        self.rows = {}  # function, operator -> calls, seconds

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        started = time.process_time()
        result = operator(*args, **(kwargs or {}))
        elapsed = time.process_time() - started
        row = self.rows.setdefault((calling_function(), str(operator)), np.zeros(2))
        row += (1, elapsed)
        return result

    def total(self, kept: Callable = lambda function, operator: True) -> dict:
        """Return the calls and seconds of the rows that `kept(function, operator)` keeps."""
        rows = [row for key, row in self.rows.items() if kept(*key)]
        calls, elapsed = sum(rows, np.zeros(2))
        return {"calls": int(calls), "seconds": float(elapsed)}


# --- What the hardware could do --------------------------------------------------------------------------------------


def training_flops(settings: argparse.Namespace, latents_shape: tuple[int, ...]) -> dict[str, float]:
    """
    Count the matrix-multiply FLOPs of one step on latents `(B, C, F, H, W)`: `forward`, the `attention` in it,
    `useful` (forward and backward), and `hardware` (with the recomputation of checkpointed blocks).

    A layer's backward pass costs as much as its forward for the gradient of its input, which nobody needs before the
    first trained layer (of text and timestep too), and as much for that of its weights, unless they are frozen.
    """
    path = settings.pretrained_model_name_or_path
    lora = settings.train_type == "lora"
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(path, subfolder="transformer"))
        model.requires_grad_(not lora)
        if lora:
            train_ltd.add_lora(model, copy.copy(settings))
    tokens = math.prod(latents_shape[2:]) // math.prod(model.config.patch_size)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    image_tokens = IMAGE_TOKENS if model.config.image_dim else 0
    attended = tokens + TEXT_TOKENS + image_tokens
    attention = 4.0 * tokens * attended * width * model.config.num_layers
    self_attention = 4.0 * tokens * tokens * width * model.config.num_layers
    forward = attention
    blocks = attention
    useful = 3 * attention
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv3d):
            continue
        of_text = any(part in name for part in ("attn2.to_k", "attn2.to_v", "text_embedder"))
        of_image = any(part in name for part in ("add_k_proj", "add_v_proj", "image_embedder"))
        of_time = "time_" in name and not of_text
        rows = tokens
        if of_text:
            rows = TEXT_TOKENS
        elif of_image:
            rows = image_tokens
        elif of_time:
            rows = 1
        flops = 2.0 * rows * layer.weight.numel()
        forward += flops
        if name.startswith("blocks."):
            blocks += flops

        useful += flops
        first = name == "patch_embedding" or name.endswith("_embedder.linear_1")
        # Under a LoRA all that comes before the blocks is frozen.
        input_is_frozen = lora and (of_text or of_image or of_time) and ".lora_B" not in name
        if not first and not input_is_frozen:
            useful += flops
        if layer.weight.requires_grad:
            useful += flops
    recomputed = {"none": 0.0, "selective": blocks - self_attention, "full": blocks, "offload": blocks}
    hardware = useful + recomputed[settings.gradient_checkpointing]
    flops = {"forward": forward, "attention": attention, "useful": useful, "hardware": hardware}
    return {name: latents_shape[0] * value for name, value in flops.items()}


def seconds(statement: str, **names) -> float:
    """Time a statement: the median over a second of runs, after one that warms up."""
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return timer.blocked_autorange(min_run_time=1).median


def matmul_peak(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / seconds("a @ b", a=a, b=b)


def data_sheet_peak() -> float | None:
    """Return the dense bf16 FLOP/s that the GPU's maker states, if it is one of those in the table."""
    if DEVICE.type == "cuda":
        for pattern, peak in DATA_SHEETS.items():
            if re.search(pattern, torch.cuda.get_device_name()):
                return peak
    return None


def memory_bandwidth() -> float:
    """Measure the bytes a second, read and written, of a copy that fits no cache."""
    a = torch.ones(2**28 if DEVICE.type == "cuda" else 2**26, device=DEVICE)
    return 2 * a.nbytes / seconds("b.copy_(a)", a=a, b=torch.empty_like(a))


def peak_bytes(function: Callable, *args) -> int:
    """Measure the most that a call holds of what it allocates."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*args)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        function(*args)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events))


# --- The parts -------------------------------------------------------------------------------------------------------


def measure_steps(args: argparse.Namespace, settings: argparse.Namespace) -> dict:
    """Measure the parts `step` and `bare`: the script and other loops, and the peaks that they are held against."""
    comparison = Comparison(settings, find_trainers(args), args.warmup_steps, args.steps)
    contenders = comparison.run()
    shape = comparison.batches[0]["latents"].shape
    flops = training_flops(settings, shape)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    peak = matmul_peak(dtype)
    sheet = data_sheet_peak() if dtype == torch.bfloat16 else None
    results = {}
    for name, contender in contenders.items():
        result = summarize(contender)
        results[name] = result
        if contender.error:
            continue
        elapsed = result["seconds_per_step"]
        result["clips_per_second"] = shape[0] / elapsed
        result["tflops"] = flops["useful"] / elapsed / 1e12
        result["mfu"] = flops["useful"] / elapsed / peak
        result["hfu"] = flops["hardware"] / elapsed / peak
        if sheet:
            result["mfu_of_data_sheet"] = flops["useful"] / elapsed / sheet
        bare = contenders.get(BARE)
        if bare and not bare.error and name != BARE:
            ratios = {"wall": paired_ratio(contender, bare, WALL), "cpu": paired_ratio(contender, bare, CPU)}
            result["ratio_to_bare_loop"] = ratios
    return {
        "results": results,
        "rounds": args.steps,
        "latents": list(shape),
        "flops": flops,
        "matmul_flops_per_second": peak,
        "data_sheet_flops_per_second": sheet,
    }


def print_steps(step: dict) -> None:
    """Print a column a loop, then the ratios to the bare loop, and what failed."""
    formats = dict.fromkeys(["seconds_per_step", *LABELS, "first_loss"], "{:.5f}")
    formats |= dict.fromkeys(["overhead", "mfu", "mfu_of_data_sheet", "hfu"], "{:.1%}")
    formats |= dict.fromkeys(["clips_per_second", "tflops", "peak_memory_gib"], "{:.3f}")
    formats["trained_parameters"] = "{:,}"
    results = step["results"]
    print(" " * 20, *(f"{name:>15}" for name in results))
    for row, text in formats.items():
        cells = []
        for result in results.values():
            cell = text.format(result[row]) if row in result else "-"
            cells.append(f"{cell:>15}")
        print(f"{row:20}", *cells)
    print(f"TFLOP/s of a large matrix product: {step['matmul_flops_per_second'] / 1e12:.3f}")
    for name, result in results.items():
        if "error" in result:
            print(f"{name} failed: {result['error']}")
        for clock, ratio in result.get("ratio_to_bare_loop", {}).items():
            interval = "{:.4f}-{:.4f}".format(*ratio["interval"])
            quartiles = "{:.4f}-{:.4f}".format(*ratio["quartiles"])
            print(
                f"{name} / {BARE}, {clock}: median of {step['rounds']} rounds {ratio['median']:.4f} "
                f"(95 %: {interval}), quartiles {quartiles}, of totals {ratio['of_totals']:.4f}"
            )


def measure_operators(args: argparse.Namespace, settings: argparse.Namespace) -> dict:
    """Measure the part `operators`: of one step of each contender, what calls how many operators for how long."""
    contenders = Comparison(settings, find_trainers(args), 1, 1, OperatorCounter).run()
    results = {}
    for name, contender in contenders.items():
        results[name] = {"error": contender.error} if contender.error else summarize_operators(contender.inspector)
    return results


def summarize_operators(counter: OperatorCounter) -> dict:
    """Return calls and CPU seconds: of all, of the model, of the functions and the operators, the longest first.

    The model is the code in diffusers and peft, recomputation included; the backward pass has no functions, only
    operators. Matrix products and attention are counted apart from the rest.
    """
    result = {
        "all": counter.total(),
        "model": counter.total(lambda function, operator: function.startswith(MODEL_PACKAGES)),
        "backward": counter.total(lambda function, operator: function == BACKWARD),
        "products": counter.total(lambda function, operator: bool(PRODUCTS.search(operator))),
    }
    functions = {}
    operators = {}
    for key in counter.rows:
        function, operator = key
        if PRODUCTS.search(operator):
            continue
        functions[function] = counter.total(lambda f, o, wanted=function: f == wanted and not PRODUCTS.search(o))
        operators[operator] = counter.total(lambda f, o, wanted=operator: o == wanted)
    result["functions_without_products"] = longest_first(functions)
    result["operators_without_products"] = longest_first(operators)
    return result


def longest_first(rows: dict[str, dict]) -> dict[str, dict]:
    """Return the fifteen rows that took most seconds."""
    names = sorted(rows, key=lambda name: -rows[name]["seconds"])
    return {name: rows[name] for name in names[:15]}


def print_operators(results: dict) -> None:
    """Print a column a contender: calls and milliseconds of its step, and of what takes longest but the products."""
    results = {name: result for name, result in results.items() if "error" not in result}
    print(f"{'operator calls, ms':60}", *(f"{name:>18}" for name in results))
    groups = {}
    for result in results.values():
        for group in ("all", "model", "backward", "products"):
            groups[group] = None
        groups |= dict.fromkeys(result["functions_without_products"])
    for group in groups:
        cells = []
        for result in results.values():
            row = result.get(group) or result["functions_without_products"].get(group)
            cell = f"{row['calls']:,} {1000 * row['seconds']:8.2f}" if row else "-"
            cells.append(f"{cell:>18}")
        print(f"{group:60}", *cells)


def mse_loss(prediction: torch.Tensor, target: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return the plain loss, called as `ltd_loss` is; the latents do not matter."""
    return F.mse_loss(prediction.float(), target.float())


def loss_and_gradient(loss: Callable, prediction: torch.Tensor, target: torch.Tensor, latents: torch.Tensor) -> None:
    """Compute a loss of three tensors `(B, C, F, H, W)`, and its gradient by the first."""
    torch.autograd.grad(loss(prediction, target, latents), prediction)


def measure_ltd(args: argparse.Namespace, step: dict | None) -> dict:
    """Measure the part `ltd`: both losses on float32 tensors; `floor` is the seconds of one read of the three."""
    bandwidth = memory_bandwidth()
    shapes = list(TINY_LTD_SHAPES if args.model == "tiny" else LTD_SHAPES)
    if step:
        shapes.insert(0, tuple(step["latents"]))
    rows = []
    for shape in dict.fromkeys(shapes):
        tensors = torch.randn(3, *shape, device=DEVICE).unbind()
        tensors[0].requires_grad_()
        for loss, compiled in itertools.product((mse_loss, ltd_loss), (False, True)):
            function = torch.compile(loss, dynamic=False) if compiled else loss
            row = {
                "shape": list(shape),
                "loss": loss.__name__,
                "compiled": compiled,
                "floor": sum(tensor.nbytes for tensor in tensors) / bandwidth,
                "forward": seconds("f(*tensors)", f=function, tensors=tensors),
                "with_gradient": seconds("g(f, *tensors)", g=loss_and_gradient, f=function, tensors=tensors),
                "peak_bytes": peak_bytes(loss_and_gradient, function, *tensors),
            }
            if step and step["latents"] == list(shape):
                row["share_of_step"] = row["with_gradient"] / step["results"]["train_ltd.py"]["seconds_per_step"]
            rows.append(row)
    return {"copy_bytes_per_second": bandwidth, "rows": rows}


@torch.no_grad()
def encode_in_bfloat16(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    """Encode frames `(F, 3, H, W)` uint8 as `train_ltd.encode_clip` does, but in bfloat16, which that never does."""
    pixels = frames.to(vae.device, torch.bfloat16).div(127.5).sub(1)
    pixels = pixels.transpose(0, 1)[None]  # (1, 3, F, H, W)
    latents = vae.encode(pixels).latent_dist.mode()[0].float()  # (C, F', H/8, W/8)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=vae.device).view(-1, 1, 1, 1)
    return (latents - mean) / std


def measure_stages(settings: argparse.Namespace) -> dict:
    """Measure each stage of caching alone: median seconds a clip, and what the VAE in bfloat16 would change."""
    path = settings.pretrained_model_name_or_path
    size = (settings.num_frames, settings.height, settings.width)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    with_condition = train_ltd.identify_wan(settings).first_frame == "channels"
    half = AutoencoderKLWan.from_pretrained(path, subfolder="vae", dtype=torch.bfloat16).to(DEVICE)
    text = WanPipeline.from_pretrained(path, dtype=dtype, transformer=None, vae=None).to(DEVICE)
    vae = train_ltd.load_vae(settings, DEVICE)
    reset_peak_memory()
    watch = Stopwatch()
    laps = []
    squares = []
    powers = []
    largest = 0.0
    for clip in sorted(Path(settings.train_data_dir).glob("*.mp4")):
        watch.begin_lap()
        with watch.measure("decode"):
            clips, _ = train_ltd.read_clip(str(clip), size, settings.fps)
        with watch.measure("VAE float32"):
            latents = train_ltd.encode_clip(vae, clips[0], with_condition)["latents"]
        with watch.measure("VAE bfloat16"):
            difference = encode_in_bfloat16(half, clips[0]) - latents
        with watch.measure("text"):
            text.encode_prompt(clip.name, None, False, max_sequence_length=TEXT_TOKENS)
        laps.append(watch.lap())
        squares.append(difference.square().mean().item())
        powers.append(latents.square().mean().item())
        largest = max(largest, difference.abs().max().item())
    stages = {}
    for label in watch.seconds:
        stages[label] = statistics.median(lap[label][WALL] for lap in laps)
    return {
        "seconds_per_clip": stages,
        "parameters": {"VAE": vae.num_parameters(), "text": text.text_encoder.num_parameters()},
        "bfloat16_relative_rms": math.sqrt(sum(squares) / sum(powers)),
        "bfloat16_largest": largest,
        "peak_memory_gib": peak_memory(),
    }


def measure_caching(settings: argparse.Namespace) -> dict:
    """Measure the part `cache`: each stage alone, and the script's own caching, loading included."""
    result = measure_stages(settings)
    free_memory()
    with tempfile.TemporaryDirectory() as folder:
        args = argparse.Namespace(**vars(settings) | {"output_dir": folder, "cache_dir": folder})
        accelerator = train_ltd.build_accelerator(args)
        started = time.perf_counter()
        clips, _, _ = train_ltd.prepare_data(args, accelerator, wan=train_ltd.identify_wan(args))
        elapsed = time.perf_counter() - started
    result["script"] = {"clips": len(clips), "seconds": elapsed, "clips_per_second": len(clips) / elapsed}
    return result


def kernel_kind(name: str) -> str:
    """Sort a kernel by its name."""
    for kind, pattern in KERNELS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def measure_profile(args: argparse.Namespace, settings: argparse.Namespace) -> dict:
    """Measure the part `profile`: shares of the device's time in a step."""
    gpu = DEVICE.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    inspect = functools.partial(torch.profiler.profile, activities=[activity])
    contenders = Comparison(settings, {}, args.warmup_steps, 1, inspect).run()
    profiler = contenders[SCRIPT].inspector
    times = {}
    for event in profiler.key_averages():
        elapsed = event.self_device_time_total if gpu else event.self_cpu_time_total
        times[event.key] = times.get(event.key, 0.0) + elapsed
    total = sum(times.values())
    kinds = dict.fromkeys([*KERNELS, "other"], 0.0)
    for name, elapsed in times.items():
        kinds[kernel_kind(name)] += elapsed / total
    longest = {}
    for name in sorted(times, key=times.get, reverse=True)[:15]:
        longest[name[:120]] = times[name] / total
    return {"seconds": total / 1e6, "kinds": kinds, "longest": longest}


def run_python(*command) -> None:
    """Run Python in a process of its own. Raises `RuntimeError` with the last line that it printed."""
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if result.returncode:
        output = result.stderr.strip() or f"exit code {result.returncode}"
        raise RuntimeError(output.splitlines()[-1])


def measure_start(flags: list[str]) -> dict:
    """Measure the part `start`: seconds from the call of the script to the end of its first step."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            ours = [f"--output_dir={folder}/{name}", f"--cache_dir={folder}/cache", "--max_train_steps=1"]
            started = time.time()
            run_python(ROOT / "train_ltd.py", *flags, *ours)
            results[name] = Path(folder, name, "metrics.jsonl").stat().st_mtime - started
    return results


def sweep_flag(name: str, value: str) -> str:
    """Write a flag with its value, or a switch."""
    if value == "true":
        return f"--{name}"
    if value == "false":
        return f"--no-{name}"
    return f"--{name}={value}"


def sweep(args: argparse.Namespace) -> list[dict]:
    """Measure the part `step` of every combination, each in a process of its own; returns the fastest first."""
    names = []
    axes = []
    for axis in args.sweep or SWEEP:
        name, _, values = axis.partition("=")
        names.append(name)
        axes.append(values.split(","))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        output_file = Path(folder, "run.json")
        command = [__file__, "--model", args.model, "--parts", "step", "--work_dir", args.work_dir]
        command += ["--steps", args.steps, "--warmup_steps", args.warmup_steps, "--output_file", output_file]
        command += args.train_flags
        for values in itertools.product(*axes):
            combination = list(zip(names, values, strict=True))
            recipe = [f"{name}: {value}" for name, value in combination]
            flags = [sweep_flag(name, value) for name, value in combination]
            try:
                run_python(*command, *flags)
            except RuntimeError as error:
                message = str(error)
                row = {"error": message, "clips_per_second": 0.0}
            else:
                row = json.loads(output_file.read_text())["step"]["results"]["train_ltd.py"]
                message = f"{row['clips_per_second']:.3f} clips/s, {row['peak_memory_gib']:.1f} GiB"
            print(f"{', '.join(recipe)}: {message}", flush=True)
            rows.append({"recipe": recipe} | row)
    rows.sort(key=lambda row: -row["clips_per_second"])
    best = "best recipe:" if rows[0]["clips_per_second"] else "no combination ran; the first was:"
    print(best, *rows[0]["recipe"], sep="\n")
    return rows


def device_name() -> str:
    """Return the GPU's name, or the CPU's where there is no GPU."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return f"{platform.machine()} CPU"


def environment() -> dict:
    """Collect what the numbers depend on."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": shlex.join(["python", "examples/benchmark/benchmark.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "versions": versions,
        "commit": commit,
    }


def main(args: argparse.Namespace) -> None:
    """Measure the parts one after the other. Each is printed, and written to the file of results, once it is done."""
    flags = script_flags(args)
    settings = parse_settings(flags)
    if "operators" in args.parts and settings.torch_compile:
        raise ValueError("--parts operators counts what --torch_compile fuses: add --no-torch_compile")
    # Whatever may be a path of this machine is left out; the command above tells the model.
    published = {name: value for name, value in vars(settings).items() if os.sep not in str(value)}
    results = {"model": args.model, "environment": environment(), "settings": published}
    for part in args.parts:
        if part == "sweep":
            results[part] = sweep(args)
        elif part == "step":
            results[part] = measure_steps(args, settings)
            results["environment"]["load_average_after"] = os.getloadavg()[0]
            print_steps(results[part])
        elif part == "operators":
            results[part] = measure_operators(args, settings)
            print_operators(results[part])
        elif part == "ltd":
            results[part] = measure_ltd(args, results.get("step"))
        elif part == "cache":
            results[part] = measure_caching(settings)
        elif part == "start":
            results[part] = measure_start(flags)
        elif part == "profile":
            results[part] = measure_profile(args, settings)
        if part in ("ltd", "cache", "start", "profile"):
            print(part, json.dumps(results[part], indent=1), flush=True)
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        args.output_file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    train_ltd.run_script(main, parse_args)
