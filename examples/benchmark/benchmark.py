"""Measure a training step of `train_ltd.py`, LTD's share of it, caching and start-up, on random weights of true shape.

    python examples/benchmark/benchmark.py --model nano
    python examples/benchmark/benchmark.py --model 1.3b --train_type full --gradient_checkpointing none
    python examples/benchmark/benchmark.py --model 1.3b --sweep

Nothing is downloaded. Flags that are not listed below go to `train_ltd.py`, so any setting of a run can be measured;
with `--config recipe.yaml` the clips have the recipe's size. What is timed is the script itself: its `main()` runs,
with clocks around the library calls that it makes, and is stopped after the last measured step. On a GPU each clock
waits for the GPU.

The parts (`--parts`):
    step   the script: forward, backward, clipping, optimizer, data wait, LTD weights; useful FLOP/s, memory
    bare   the same weights, batches and targets in a loop of a dozen lines, and in other trainers (below)
    ltd    `ltd_loss` against `F.mse_loss`, eager and compiled, beside one read of its inputs at memory bandwidth
    cache  decoding, VAE and text encoder a clip; the VAE in bfloat16 against float32
    start  seconds from the call of the script to the end of its first step, without and with a cache
    profile  what the device's time in one step goes to, by kind of kernel, and its longest kernels

`--adapter file.py` compares another trainer. The file defines a class `Trainer` with the two methods of `BareLoop`:
`__init__(settings)`, where `settings` are the flags of `train_ltd.py` and `settings.pretrained_model_name_or_path` is
the folder with the weights, and `step(batch)`, which makes one update on `batch`, the CPU tensors `latents`, `noise`,
`sigmas` and `prompt_embeds`, and returns the loss before it. With `--loss mse` the first losses must be equal.
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
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.benchmark import Timer
from torch.utils.data.dataloader import _BaseDataLoaderIter

ROOT = Path(__file__).resolve().parents[2]
# train_ltd.py is a script in the repository's root, and examples/ is folders of scripts: neither is a package.
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from small_wan import PRESETS, build_small_wan, smooth_videos
from videos import write_video

import train_ltd
from ltd_loss import ltd_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NANO = ROOT / "examples/nano/wan-nano"
SHAPES = {
    "nano": PRESETS["small"] | {"num_attention_heads": 6, "attention_head_dim": 32},
    "1.3b": PRESETS["1.3b"],
    "14b": PRESETS["1.3b"] | {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
}
SIZES = {"nano": (33, 96, 96), "1.3b": (81, 480, 832), "14b": (81, 480, 832)}  # frames, height, width
NUM_CLIPS = 4
LTD_SHAPES = [(1, 16, 21, 60, 104), (1, 16, 21, 90, 160), (4, 16, 21, 60, 104)]  # 480p, 720p and four clips; 81 frames
SWEEP = ["gradient_checkpointing=none,selective,full", "attention_backend=native,_native_cudnn"]
SWEEP += ["torch_compile=false,true", "train_batch_size=1,2"]
WORK = ["forward", "backward", "clipping", "optimizer"]
KERNELS = {  # kind -> pattern of a kernel's name, the first that fits
    "attention": "flash|fmha|attention|sdpa",
    "matrix products": "gemm|nvjet|cutlass|mm$",
    "copies": "memcpy|memset",
}
LABELS = [*WORK, "data wait", "LTD weights", "noise and loss", "rest of loop"]  # seconds each


def parse_args(input_args=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add, parts = parser.add_argument, ["step", "bare", "ltd", "cache", "start", "profile"]
    add("--model", choices=SHAPES, default="nano", help="shape of the model; nano is for CPUs")
    add("--parts", nargs="+", choices=parts, default=parts[:3], help="what to measure (default: step bare ltd)")
    add("--steps", type=int, default=20, help="measured steps, of which medians are given")
    add("--warmup_steps", type=int, default=3, help="steps before them")
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
    if (args.adapter or "bare" in args.parts) and "step" not in args.parts:
        parser.error("--parts bare and --adapter train on the batches of the part step: add step")
    return args


# --- What is measured on: random weights, synthetic clips ------------------------------------------------------------


def build_pipeline(args: argparse.Namespace) -> Path:
    """A pipeline folder with a random transformer and VAE of true shape; its text encoder has one layer only."""
    folder, shape = Path(args.work_dir, f"wan-{args.model}"), SHAPES[args.model]
    partial = folder.with_name(f".{folder.name}.partial")
    if folder.is_dir():
        return folder
    build_small_wan(partial, **shape | {"num_layers": 1})
    config = json.loads((partial / "transformer/config.json").read_text()) | {"num_layers": shape["num_layers"]}
    if args.model == "nano" and (NANO / "transformer/config.json").is_file():
        config = json.loads((NANO / "transformer/config.json").read_text())
    if args.model == "nano" and (NANO / "vae").is_dir():
        shutil.copytree(NANO / "vae", partial / "vae", dirs_exist_ok=True)
    torch.set_default_dtype(torch.float32 if args.model == "nano" else torch.bfloat16)  # 28 GB of disk for 14B, not 57
    big = args.model == "14b" and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2**35
    with DEVICE if big else contextlib.nullcontext():  # a CPU takes minutes to draw 14 billion numbers
        transformer = WanTransformer3DModel.from_config(config)
    torch.set_default_dtype(torch.float32)
    shutil.rmtree(partial / "transformer")
    transformer.save_pretrained(partial / "transformer")
    return partial.rename(folder)


def write_clips(args: argparse.Namespace, settings: argparse.Namespace) -> Path:
    """Captioned mp4 clips of smooth random motion."""
    size = (settings.num_frames, settings.height, settings.width)
    folder = Path(args.work_dir, "clips-" + "x".join(map(str, size)))
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(NUM_CLIPS):
            video = smooth_videos(1, *size)[0].permute(1, 2, 3, 0) / 2 + 0.5  # (F, H, W, 3)
            frames = (video * 255).round().byte().numpy()
            write_video(frames, folder / f"{number}.mp4", settings.fps)
        rows = [{"file_name": f"{n}.mp4", "text": f"a smooth video, number {n}"} for n in range(NUM_CLIPS)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def script_flags(args: argparse.Namespace) -> list[str]:
    """The command line of `train_ltd.py`: the user's flags, with what a measurement needs before and after them."""
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    size = zip(("num_frames", "height", "width"), SIZES[args.model], strict=True)
    flags = ["--skip_vae_check"]
    if not any(flag.startswith("--config") for flag in args.train_flags):
        flags += [f"--{name}={value}" for name, value in size]
    if not any(flag.startswith("--pretrained_model_name_or_path") for flag in args.train_flags):
        flags.append(f"--pretrained_model_name_or_path={build_pipeline(args)}")
    flags += [*args.train_flags, f"--max_train_steps={args.warmup_steps + args.steps + 1}", "--lr_warmup_steps=0"]
    flags += ["--lr_scheduler=constant", "--gradient_accumulation_steps=1", "--report_to=none"]
    flags += [f"--cache_dir={args.work_dir}/cache", f"--train_data_dir={args.work_dir}"]
    return [*flags, f"--train_data_dir={write_clips(args, train_ltd.parse_args(flags))}"]


# --- Clocks ----------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends the script's run after the last measured step."""


class Stopwatch:
    """Seconds in each labelled call without those in labelled calls inside it; a step ends with the optimizer's."""

    def __init__(self, warmup: int = 0, steps: int = 0, profiler: torch.profiler.profile | None = None):
        self.warmup, self.wanted, self.profiler = warmup, warmup + steps, profiler
        self.open, self.spans, self.batches, self.losses = [], [], [], []

    def start(self, label: str, *_) -> None:
        self.open.append([label, now(), 0.0])

    def stop(self, *_) -> None:
        ended, (label, started, inside) = now(), self.open.pop()
        if self.open:
            self.open[-1][2] += ended - started
        self.spans.append((label, ended, ended - started - inside))

    @contextlib.contextmanager
    def measure(self, label: str):
        self.start(label)
        try:
            yield
        finally:
            self.stop()

    def timed(self, function, label: str):
        """The same function with a clock around it."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            with self.measure(label):
                return function(*args, **kwargs)

        return wrapper

    @contextlib.contextmanager
    def installed(self):
        """Clocks on the calls that any trainer of Wan makes through torch and diffusers, and on our loss."""
        watched = [
            (WanTransformer3DModel, "forward", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "clipping"),
            (_BaseDataLoaderIter, "__next__", "data wait"),
            (train_ltd, "ltd_weights", "LTD weights"),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, label in watched:
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), label)))
            loss = functools.partial(self.training_loss, train_ltd.training_loss)
            stack.enter_context(patch.object(train_ltd, "training_loss", loss))
            stack.callback(register_optimizer_step_pre_hook(functools.partial(self.start, "optimizer")).remove)
            stack.callback(register_optimizer_step_post_hook(self.stop).remove)
            yield

    def training_loss(self, original, transformer, batch: dict, *rest):
        """The script's own, which leaves its batches and losses here."""
        if len(self.batches) == self.wanted:
            raise Enough
        with self.measure("benchmark"):
            if len(self.batches) == self.warmup:
                train_ltd.reset_peak_memory(DEVICE)
                if self.profiler:
                    self.profiler.start()
            self.batches.append({k: v.cpu() for k, v in batch.items() if isinstance(v, torch.Tensor)})
        with self.measure("noise and loss"):
            result = original(transformer, batch, *rest)
        self.losses.append(result[0].detach())
        return result

    def summary(self) -> dict:
        """Medians over the measured steps: seconds of a step and of each label, overhead as a share of the step."""
        steps, ends, current = [], [], {}
        for label, ended, elapsed in self.spans:
            current[label] = current.get(label, 0.0) + elapsed
            if label == "optimizer":
                steps.append(current)
                ends.append(ended)
                current = {}
        steps = steps[self.warmup :]
        for step, (before, end) in zip(steps, itertools.pairwise(ends[self.warmup - 1 :]), strict=True):
            total = end - before - step.pop("benchmark", 0.0)
            step["rest of loop"] = total - sum(step.values())
            step |= {"seconds_per_step": total, "overhead": 1 - sum(step.get(k, 0.0) for k in WORK) / total}
        medians = {k: statistics.median(step.get(k, 0.0) for step in steps) for k in steps[0]}
        return medians | {"losses": [float(loss) for loss in self.losses]}


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- Loops -----------------------------------------------------------------------------------------------------------


class BareLoop:
    """The least that trains the same model on the same batches, with plain MSE; the pattern of an adapter."""

    def __init__(self, settings: argparse.Namespace):
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.model = train_ltd.load_transformer(settings)
        if settings.train_type == "lora":
            train_ltd.add_lora(self.model, settings)
        if settings.torch_compile:
            self.model.compile_repeated_blocks()
        self.model.to(DEVICE)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        kwargs = {"weight_decay": settings.adam_weight_decay, "fused": DEVICE.type == "cuda"}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, **kwargs)

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = {k: v.to(DEVICE) for k, v in batch.items()}
        sigmas, target = batch["sigmas"].view(-1, 1, 1, 1, 1), batch["noise"] - batch["latents"]
        noisy_latents = (1 - sigmas) * batch["latents"] + sigmas * batch["noise"]
        inputs = {"timestep": 1000 * batch["sigmas"], "encoder_hidden_states": batch["prompt_embeds"]}
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16"):
            prediction = self.model(hidden_states=noisy_latents, **inputs, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def time_script(settings: argparse.Namespace, warmup: int, steps: int, profiler=None) -> Stopwatch:
    """Run `train_ltd.main()` up to the last measured step."""
    watch = Stopwatch(warmup, steps, profiler)
    with tempfile.TemporaryDirectory() as folder, watch.installed(), contextlib.suppress(Enough):
        train_ltd.main(argparse.Namespace(**vars(settings) | {"output_dir": folder}))
    return watch


def time_trainer(trainer, batches: list[dict], warmup: int) -> Stopwatch:
    """An adapter's `Trainer`, or `BareLoop`, on recorded batches."""
    watch = Stopwatch(warmup)
    with watch.installed():
        for number, batch in enumerate(batches):
            if number == warmup:
                train_ltd.reset_peak_memory(DEVICE)
            watch.losses.append(trainer.step(batch))
    return watch


# --- What the hardware could do --------------------------------------------------------------------------------------


def training_flops(settings: argparse.Namespace, latents_shape: tuple[int, ...]) -> dict[str, float]:
    """
    Matrix-multiply FLOPs of one step on latents `(B, C, F, H, W)`: `forward`, the `attention` in it, `useful` (forward
    and backward), and `hardware` (with the recomputation of checkpointed blocks).

    A layer's backward pass costs as much as its forward for the gradient of its input, which nobody needs before the
    first trained layer (of text and timestep too), and as much for that of its weights, unless they are frozen.
    """
    path = settings.pretrained_model_name_or_path
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(path, subfolder="transformer"))
        model.requires_grad_(settings.train_type == "full")
        if settings.train_type == "lora":
            train_ltd.add_lora(model, copy.copy(settings))
    tokens, text = math.prod(latents_shape[2:]) // math.prod(model.config.patch_size), train_ltd.MAX_SEQUENCE_LENGTH
    width = model.config.num_attention_heads * model.config.attention_head_dim
    attention = 4.0 * tokens * (tokens + text) * width * model.config.num_layers
    forward, blocks, useful = attention, attention, 3 * attention
    for name, layer in model.named_modules():
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv3d)):
            continue
        of_text = any(part in name for part in ("attn2.to_k", "attn2.to_v", "text_embedder"))
        rows = text if of_text else 1 if "time_" in name else tokens
        first = name == "patch_embedding" or name.endswith("_embedder.linear_1")
        # Under a LoRA all that comes before the blocks is frozen.
        frozen_input = first or ((of_text or rows == 1) and settings.train_type == "lora" and ".lora_B" not in name)
        flops = 2.0 * rows * layer.weight.numel()
        forward += flops
        blocks += flops * name.startswith("blocks.")
        useful += flops * (1 + (not frozen_input) + layer.weight.requires_grad)
    recomputed = {"none": 0.0, "selective": blocks - attention, "full": blocks}
    hardware = useful + recomputed[settings.gradient_checkpointing]
    flops = {"forward": forward, "attention": attention, "useful": useful, "hardware": hardware}
    return {name: latents_shape[0] * value for name, value in flops.items()}


def seconds(statement: str, **names) -> float:
    """Median over a second of runs, after one that warms up."""
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return timer.blocked_autorange(min_run_time=1).median


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / seconds("a @ b", a=a, b=b)


def memory_bandwidth() -> float:
    """Bytes a second, read and written, of a copy that fits no cache."""
    a = torch.ones(2**28 if DEVICE.type == "cuda" else 2**26, device=DEVICE)
    return 2 * a.nbytes / seconds("b.copy_(a)", a=a, b=torch.empty_like(a))


def peak_bytes(function, *args) -> int:
    """The most that a call holds of what it allocates."""
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
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in events))


# --- The parts -------------------------------------------------------------------------------------------------------


def measure_steps(args: argparse.Namespace, settings: argparse.Namespace) -> dict:
    """Parts `step` and `bare`: the script and other loops side by side, and the peaks that they are held against."""
    watch = time_script(settings, args.warmup_steps, args.steps)
    results = {"train_ltd.py": watch.summary() | {"peak_memory_gib": train_ltd.peak_memory(DEVICE)}}
    trainers = {"bare loop": BareLoop} if "bare" in args.parts else {}
    trainers |= {Path(path).stem: runpy.run_path(path)["Trainer"] for path in args.adapter}
    for name, trainer in trainers.items():
        train_ltd.free_memory()
        results[name] = time_trainer(trainer(copy.copy(settings)), watch.batches, args.warmup_steps).summary()
        if DEVICE.type == "cuda":  # on a CPU the peak is the process's, hence that of whatever ran before
            results[name]["peak_memory_gib"] = train_ltd.peak_memory(DEVICE)
    shape = watch.batches[0]["latents"].shape
    flops = training_flops(settings, shape)
    peaks = {str(d).removeprefix("torch."): matmul_peak(d) for d in (torch.bfloat16, torch.float32)}
    peak = peaks["bfloat16" if settings.mixed_precision == "bf16" else "float32"]
    for result in results.values():
        elapsed = result["seconds_per_step"]
        result |= {"clips_per_second": shape[0] / elapsed, "tflops": flops["useful"] / elapsed / 1e12}
        result |= {"mfu": flops["useful"] / elapsed / peak, "hfu": flops["hardware"] / elapsed / peak}
    return {"results": results, "latents": list(shape), "flops": flops, "matmul_flops_per_second": peaks}


def print_steps(step: dict) -> None:
    formats = dict.fromkeys(["seconds_per_step", *LABELS], "{:.5f}")
    formats |= dict.fromkeys(["overhead", "mfu", "hfu"], "{:.1%}")
    formats |= dict.fromkeys(["clips_per_second", "tflops", "peak_memory_gib"], "{:.3f}")
    print(" " * 20, *(f"{name:>15}" for name in step["results"]))
    for row, text in formats.items():
        print(f"{row:20}", *(f"{text.format(r[row]) if row in r else '-':>15}" for r in step["results"].values()))
    peaks = {k: round(v / 1e12, 3) for k, v in step["matmul_flops_per_second"].items()}
    print("TFLOP/s of a large matrix product:", peaks)


def mse_loss(prediction: torch.Tensor, target: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(prediction.float(), target.float())


def loss_and_gradient(loss, prediction: torch.Tensor, target: torch.Tensor, latents: torch.Tensor) -> None:
    torch.autograd.grad(loss(prediction, target, latents), prediction)


def measure_ltd(step: dict | None) -> dict:
    """Part `ltd`: seconds and bytes of both losses on float32 tensors; `floor` is one read of the three."""
    bandwidth, rows = memory_bandwidth(), []
    for shape in dict.fromkeys(([tuple(step["latents"])] if step else []) + LTD_SHAPES):
        tensors = torch.randn(3, *shape, device=DEVICE).unbind()
        tensors[0].requires_grad_()
        for loss, compiled in itertools.product((mse_loss, ltd_loss), (False, True)):
            function = torch.compile(loss, dynamic=False) if compiled else loss
            names = {"f": function, "g": loss_and_gradient, "t": tensors}
            row = {"shape": list(shape), "loss": loss.__name__, "compiled": compiled}
            row |= {"floor": sum(t.nbytes for t in tensors) / bandwidth, "forward": seconds("f(*t)", **names)}
            row |= {"with_gradient": seconds("g(f, *t)", **names)}
            row |= {"peak_bytes": peak_bytes(loss_and_gradient, function, *tensors)}
            if step and step["latents"] == list(shape):
                row["share_of_step"] = row["with_gradient"] / step["results"]["train_ltd.py"]["seconds_per_step"]
            rows.append(row)
    return {"copy_bytes_per_second": bandwidth, "rows": rows}


@torch.no_grad()
def encode(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    """As `train_ltd.encode_clip`, but in the VAE's own dtype."""
    pixels = frames.to(vae.device, vae.dtype).div(127.5).sub(1).transpose(0, 1)[None]  # (1, 3, F, H, W)
    mean, std = train_ltd.latent_constants(vae)
    return ((vae.encode(pixels).latent_dist.mode().float() - mean) / std)[0]


def measure_caching(settings: argparse.Namespace) -> dict:
    """Part `cache`: median seconds a clip of each stage alone; the script's own caching, loading included."""
    path, watch, differences = settings.pretrained_model_name_or_path, Stopwatch(), []
    half = AutoencoderKLWan.from_pretrained(path, subfolder="vae", dtype=torch.bfloat16).to(DEVICE)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    text = WanPipeline.from_pretrained(path, dtype=dtype, transformer=None, vae=None).to(DEVICE)
    vae = train_ltd.load_vae(settings, DEVICE)
    train_ltd.reset_peak_memory(DEVICE)
    for clip in sorted(Path(settings.train_data_dir).glob("*.mp4")):
        with watch.measure("decode"):
            frames = train_ltd.read_clips(str(clip), settings)[0][0]
        with watch.measure("VAE float32"):
            latents = encode(vae, frames)
        with watch.measure("VAE bfloat16"):
            difference = encode(half, frames) - latents
        with watch.measure("text"):
            text.encode_prompt(clip.name, None, False, max_sequence_length=train_ltd.MAX_SEQUENCE_LENGTH)
        differences.append([difference.square().mean(), latents.square().mean(), difference.abs().max()])
    parameters = {"VAE": vae.num_parameters(), "text": text.text_encoder.num_parameters()}
    stages = {label: [s for name, _, s in watch.spans if name == label] for label, _, _ in watch.spans}
    square, power, largest = torch.tensor(differences).T
    peak = train_ltd.peak_memory(DEVICE)
    del half, vae, text
    with tempfile.TemporaryDirectory() as folder:
        fresh = argparse.Namespace(**vars(settings) | {"output_dir": folder, "cache_dir": folder})
        accelerator, started = train_ltd.build_accelerator(fresh), time.perf_counter()
        train_ltd.prepare_data(fresh, accelerator)
        elapsed = time.perf_counter() - started
    return {
        "seconds_per_clip": {label: statistics.median(values) for label, values in stages.items()},
        "parameters": parameters,
        "bfloat16_relative_rms": float((square.mean() / power.mean()).sqrt()),
        "bfloat16_largest": float(largest.max()),
        "peak_memory_gib": peak,
        "script": {"clips": len(differences), "seconds": elapsed, "clips_per_second": len(differences) / elapsed},
    }


def measure_profile(args: argparse.Namespace, settings: argparse.Namespace) -> dict:
    """Part `profile`: shares of the device's time in the step after the warm-up."""
    gpu = DEVICE.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[activity])
    time_script(settings, args.warmup_steps, 1, profiler)
    profiler.stop()
    rows = [(e.key, e.self_device_time_total if gpu else e.self_cpu_time_total) for e in profiler.key_averages()]
    total, kinds = sum(elapsed for _, elapsed in rows), dict.fromkeys([*KERNELS, "other"], 0.0)
    for name, elapsed in rows:
        kind = next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
        kinds[kind] += elapsed / total
    longest = sorted(rows, key=lambda row: -row[1])[:15]
    return {"seconds": total / 1e6, "kinds": kinds, "longest": {name[:120]: t / total for name, t in longest}}


def run_python(*command) -> None:
    """In a process of its own. Raises `RuntimeError` with the last line that it printed."""
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1])


def measure_start(flags: list[str]) -> dict:
    """Part `start`: seconds from the call of the script to the end of its first step."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            ours = [f"--output_dir={folder}/{name}", f"--cache_dir={folder}/cache", "--max_train_steps=1"]
            started = time.time()
            run_python(ROOT / "train_ltd.py", *flags, *ours)
            results[name] = Path(folder, name, "metrics.jsonl").stat().st_mtime - started
    return results


def sweep(args: argparse.Namespace) -> list[dict]:
    """Part `step` of every combination, each in a process of its own; the fastest first."""
    axes, rows = [], []
    for axis in args.sweep or SWEEP:
        name, _, values = axis.partition("=")
        switches = {"true": f"--{name}", "false": f"--no-{name}"}
        axes.append([(f"{name}: {value}", switches.get(value, f"--{name}={value}")) for value in values.split(",")])
    with tempfile.TemporaryDirectory() as folder:
        common = ["--model", args.model, "--steps", args.steps, "--warmup_steps", args.warmup_steps, "--parts", "step"]
        common += ["--work_dir", args.work_dir, "--output_file", f"{folder}/run.json", *args.train_flags]
        for combination in itertools.product(*axes):
            recipe, flags = zip(*combination, strict=True)
            try:
                run_python(__file__, *common, *flags)
                row = json.loads(Path(folder, "run.json").read_text())["step"]["results"]["train_ltd.py"]
                message = f"{row['clips_per_second']:.3f} clips/s, {row['peak_memory_gib']:.1f} GiB"
            except RuntimeError as error:
                row, message = {"error": str(error), "clips_per_second": 0.0}, str(error)
            print(f"{', '.join(recipe)}: {message}", flush=True)
            rows.append({"recipe": list(recipe)} | row)
    rows.sort(key=lambda row: -row["clips_per_second"])
    best = "best recipe:" if rows[0]["clips_per_second"] else "no combination ran; the first was:"
    print(best, *rows[0]["recipe"], sep="\n")
    return rows


def environment() -> dict:
    """What the numbers depend on."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    names = ("torch", "diffusers", "accelerate", "peft")
    return {
        "command": shlex.join(["python", "examples/benchmark/benchmark.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()} CPU",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()},
        "commit": commit,
    }


def main(args: argparse.Namespace) -> None:
    flags = script_flags(args)
    settings = train_ltd.parse_args(flags)
    results = {"model": args.model, "environment": environment(), "settings": train_ltd.published_settings(settings)}
    for part in args.parts:
        if part == "sweep":
            results[part] = sweep(args)
        elif part == "step":
            results[part] = measure_steps(args, settings)
            print_steps(results[part])
        elif part == "ltd":
            results[part] = measure_ltd(results.get("step"))
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
    main(parse_args())
