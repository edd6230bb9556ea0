"""What does the LTD weight do? Fine-tune one base model again and again, with nothing but the weight changed.

    python examples/nano/ablation.py --output_dir outputs/ablation --arms mse ltd --seeds 2 --steps 20 --num_videos 2
    python examples/nano/ablation.py --output_dir outputs/ablation                      # the key arms, 8 seeds
    python examples/nano/ablation.py --output_dir outputs/ablation --arms exploratory --seeds 3

By default on the nano Wan, whose true motion is known. Flags that this script does not know go to `train_ltd.py`, so
the same question can be asked of any Wan model and data:

    python examples/nano/ablation.py --output_dir outputs/mine --arms mse ltd --seeds 3 --steps 500 \\
        --config examples/recipes/lora_1.3b.yaml --train_data_dir my_clips --validation_fraction 0.1

A seed fixes the order of the clips, every noise and timestep, the held-out clips and the noise of generated videos, so
arms of one seed differ in the weight alone: differences are paired by seed, and the seed is the unit that is counted.
Every finished run is a line in `runs.jsonl`; the same command goes on where it stopped. `results.json`, `table.md` and
`ablation.png` are made from that file. Several processes, each with its own `--first_seed`, may share a folder; give
them different seeds, for two that run the same one would get into each other's way.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import WanPipeline, WanTransformer3DModel
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
# train_ltd.py is a script in the repository's root, and examples/ is folders of scripts: neither is a package.
sys.path[:0] = [str(ROOT), str(EXAMPLES), str(EXAMPLES / "scores")]

from motion_metrics import mean_scores, round_trip
from score_model import NANO_SAMPLING, generate, held_out_specs, score
from sprites import caption, render_clip, write_dataset
from video_metrics import dis_dynamic_degree, temporal_flickering
from videos import read_video

import train_ltd
from ltd_loss import latent_temporal_discrepancy, ltd_weights

# Learning rate, schedule, steps and shift were chosen on runs of the arm mse alone, see PLAN.md.
NANO = {
    "pretrained_model_name_or_path": str(ROOT / "examples/nano/wan-nano"),
    "height": 96,
    "width": 96,
    "num_frames": 33,
    "fps": 16,
    "train_type": "full",
    "train_batch_size": 8,
    "mixed_precision": "bf16",
    "learning_rate": 2e-4,
    "lr_warmup_steps": 5,
    "lr_scheduler": "cosine",
    "flow_shift": 3.0,
    "validation_fraction": 0.1667,
    "gradient_checkpointing": "none",
}
NANO_CLIPS = {"mix": "dynamic", "count": 384, "seed": 1}
LORA = {"train_type": "lora", "rank": 16}
LORA_RATE = 5.0  # times the learning rate of full fine-tuning, as LoRA's fresh weights need it
PRIMARY_METRICS = ("held_out/mse_object", "videos/direction_error")
SECONDARY_METRICS = ("held_out/mse", "held_out/mse_motion", "held_out/mse_static", "videos/dis_dynamic_degree")
PRIMARY_CONTRASTS = (("ltd", "mse"), ("ltd", "other_clip"), ("ltd", "position_only"))
OTHER_RATES = ("_half_rate", "_double_rate")
UNTRAINED = ("base", "vae_round_trip")
PIXEL_MAPS = {"frame_residual", "flow", "motion_mask"}
# A run's own
FIXED_FLAGS = ("--seed", "--loss", "--max_train_steps", "--num_train_epochs", "--resume_from_checkpoint")
UNSUPPORTED_FLAGS = ("transformer_path", "init_lora", "revision", "variant")
NEVER = 10**9  # a number of steps that no run has
VARIANCE_SIGMA = 0.5
VARIANCE_CLIPS = 64


# --- Arms ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to weigh the squared error.

    `weights` is a name that `raw_weights` knows. With `matched` they are stretched linearly to the mean and spread of
    LTD's. `rate` multiplies the learning rate, `flags` go to train_ltd.py; `key` arms are those of the plan.
    """

    weights: str
    question: str
    key: bool = False
    matched: bool = False
    rate: float = 1.0
    flags: dict = dataclasses.field(default_factory=dict)


ARMS = {
    "base": Arm("mse", "where we start: the base model, not trained", key=True),
    "vae_round_trip": Arm("mse", "the ceiling: true clips of the same captions through the VAE", key=True),
    "mse": Arm("mse", "the paper's w/o LTD", key=True),
    "ltd": Arm("ltd", "the paper's: 1 + ln(e + D)", key=True),
    "ltd_unit_mean": Arm("ltd_unit_mean", "is it only a bigger loss? divided by its mean over the data", key=True),
    "other_clip": Arm("other_clip", "is it this clip's motion? the weights of another clip of the batch", key=True),
    "position_only": Arm("position_only", "is it the profile over time? the mean weight per latent frame", key=True),
    "mse_no_clipping": Arm("mse", "mse without gradient clipping", flags={"max_grad_norm": 0}),
    "ltd_no_clipping": Arm("ltd", "ltd without gradient clipping", flags={"max_grad_norm": 0}),
    "ltd_unit_mean_no_clipping": Arm("ltd_unit_mean", "the same, divided by its mean", flags={"max_grad_norm": 0}),
    "mse_lora": Arm("mse", "mse, as a LoRA", rate=LORA_RATE, flags=LORA),
    "ltd_lora": Arm("ltd", "ltd, as a LoRA", rate=LORA_RATE, flags=LORA),
    "per_frame": Arm("per_frame", "ltd averaged over each latent frame", matched=True),
    "per_clip": Arm("per_clip", "ltd averaged over each clip", matched=True),
    "normalized": Arm("normalized", "ltd divided by its mean over the clip", matched=True),
    "without_gap_0": Arm("without_gap_0", "ltd without the first causal gap", matched=True),
    "scale_4": Arm("scale_4", "ln(e + 4 D)", matched=True),
    "scale_16": Arm("scale_16", "ln(e + 16 D)", matched=True),
    "scale_64": Arm("scale_64", "ln(e + 64 D)", matched=True),
    "frame_residual": Arm("frame_residual", "pixel differences of frames, on the latent grid", matched=True),
    "flow": Arm("flow", "1 + m^2 of DIS optical flow m, in the manner of MotiF", matched=True),
    "motion_mask": Arm("motion_mask", "1 where DIS flow exceeds a pixel a frame, else 0", matched=True),
    "mse_half_rate": Arm("mse", "mse at half the learning rate", rate=0.5),
    "ltd_half_rate": Arm("ltd", "ltd at half the learning rate", rate=0.5),
    "other_clip_half_rate": Arm("other_clip", "other_clip at half the learning rate", rate=0.5),
    "position_only_half_rate": Arm("position_only", "position_only at half the learning rate", rate=0.5),
    "mse_double_rate": Arm("mse", "mse at twice the learning rate", rate=2.0),
    "ltd_double_rate": Arm("ltd", "ltd at twice the learning rate", rate=2.0),
    "other_clip_double_rate": Arm("other_clip", "other_clip at twice the learning rate", rate=2.0),
    "position_only_double_rate": Arm("position_only", "position_only at twice the learning rate", rate=2.0),
}


def raw_weights(name: str, batch: dict, data: dict) -> torch.Tensor:
    """Return the weights called `name` of a batch of clips, `(B, F, H, W)` float32; `data` is from `training_set`.

    Raises `ValueError` for a name that there is not.
    """
    latents = batch["latents"]
    if name == "mse":
        return torch.ones_like(latents[:, 0])
    if name in data["maps"]:
        maps = [data["maps"][name][clip].float() for clip in batch["name"]]
        return torch.stack(maps).to(latents.device)
    if name == "without_gap_0":
        later = latent_temporal_discrepancy(latents[:, :, 1:])
        # The second frame's stands in for the first's, whose only gap it is.
        discrepancy = torch.cat([later[:, :1], later], dim=1)
        return 2 + torch.log1p(discrepancy / math.e)
    if name.startswith("scale_"):
        return ltd_weights(latents, scale=float(name.removeprefix("scale_")))
    if name == "normalized":
        return ltd_weights(latents, normalize=True)
    weights = ltd_weights(latents)
    if name == "ltd_unit_mean":
        return weights / data["ltd_mean"]
    if name == "other_clip":
        return weights.roll(1, dims=0)
    if name == "position_only":
        profile = data["ltd_profile"].to(weights.device)  # (F,)
        return profile[None, :, None, None].expand_as(weights)
    if name == "per_frame":
        return weights.mean(dim=(2, 3), keepdim=True).expand_as(weights)
    if name == "per_clip":
        return weights.mean(dim=(1, 2, 3), keepdim=True).expand_as(weights)
    if name != "ltd":
        raise ValueError(f"no weights are called {name!r}")
    return weights


def arm_weights(batch: dict, arm: Arm, data: dict) -> torch.Tensor:
    """Return an arm's weights of a batch, `(B, F, H, W)` float32, of which none is negative."""
    weights = raw_weights(arm.weights, batch, data)
    if arm.matched:
        mean, std = data["moments"][arm.weights]
        weights = (weights - mean) * (data["ltd_std"] / std) + data["ltd_mean"]
        # Of a heavy tail only; a voxel must not be pushed away from its target.
        weights = weights.clamp(min=0)
    return weights


def arm_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    batch: dict,
    args: argparse.Namespace,
    *,
    arm: Arm,
    data: dict,
) -> torch.Tensor:
    """Return an arm's loss, a scalar: `train_ltd.compute_loss` with other weights, and the same for mse and ltd."""
    weights = arm_weights(batch, arm, data)
    error = (prediction.float() - target.float()).square()  # (B, C, F, H, W)
    return (weights[:, None] * error).mean()


# --- The training set as the arms need it ----------------------------------------------------------------------------


def pixel_maps(frames: np.ndarray, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Make three maps of motion in pixel space, averaged onto the latent grid `shape` `(F, H, W)`.

    `frames` are uint8 `(F, H, W, 3)`. `frame_residual`: mean absolute difference to the frame before, over 255;
    `flow`: 1 + m^2, m being the length of DIS flow over the clip's longest; `motion_mask`: above 1 px.
    """
    import cv2

    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    lengths = []
    for before, after in itertools.pairwise(gray):
        flow = dis.calc(before, after, None)
        lengths.append(np.linalg.norm(flow, axis=-1))
    lengths = np.stack(lengths)
    differences = np.abs(np.diff(frames.astype(np.float32), axis=0))
    maps = {
        "frame_residual": differences.mean(axis=-1) / 255,
        "flow": 1 + (lengths / max(lengths.max(), 1e-6)) ** 2,
        "motion_mask": lengths > 1.0,
    }
    return {name: _to_latent_grid(value, shape) for name, value in maps.items()}


def _to_latent_grid(motion: np.ndarray, shape: tuple[int, int, int]) -> torch.Tensor:
    """Average motion between pictures `(N - 1, H, W)` onto the latent grid.

    Latent frame 0 is one picture, the others four each: the motion into each of them, and out of the first.
    """
    motion = torch.from_numpy(motion.astype(np.float32))
    pooled = F.adaptive_avg_pool3d(motion[None], (shape[0] - 1, *shape[1:]))[0]
    return torch.cat([pooled[:1], pooled])


def training_set(args: argparse.Namespace, accelerator: Accelerator, names: set[str]) -> dict:
    """Collect what some arms have to know of all training clips.

    That is the datasets `clips` and `held_out`, mean, spread and profile of LTD's weights, `maps` by name and clip,
    and `moments`, the mean and spread of the weights called `names`.
    """
    clips, held_out, captions = train_ltd.prepare_data(args, accelerator)
    dataset = train_ltd.LatentDataset(clips, captions, args)
    batches = []
    for index, clip in enumerate(clips):
        latents = dataset.load_fixed(index)["latents"]
        batches.append({"latents": latents[None], "name": [clip.name]})
    ltd = torch.cat([ltd_weights(batch["latents"]) for batch in batches])  # (N, F, H, W)
    data = {
        "clips": dataset,
        "held_out": train_ltd.LatentDataset(held_out, captions, args),
        "ltd_mean": ltd.mean().item(),
        "ltd_std": ltd.std().item(),
        "ltd_profile": ltd.mean(dim=(0, 2, 3)),
        "maps": {},
        "moments": {},
    }
    if names & PIXEL_MAPS:
        data["maps"] = {name: {} for name in PIXEL_MAPS}
        for clip in clips:
            frames = read_video(Path(args.train_data_dir, clip.name))[: args.num_frames]
            for name, value in pixel_maps(frames, ltd.shape[1:]).items():
                data["maps"][name][clip.name] = value
    for name in names:
        values = torch.cat([raw_weights(name, batch, data) for batch in batches])
        data["moments"][name] = (values.mean().item(), values.std().item())
    return data


# --- One run ---------------------------------------------------------------------------------------------------------


def common_flags(args: argparse.Namespace, seed: int, folder: Path) -> dict:
    """Return the flags of every run: it has `args.output_dir`'s cache, and keeps its last weights alone."""
    return {
        "cache_dir": args.output_dir / "cache",
        "seed": seed,
        "output_dir": folder,
        "report_to": "none",
        "max_train_steps": args.steps,
        "checkpointing_steps": NEVER,
        "checkpoints_total_limit": 1,
    }


def run_flags(args: argparse.Namespace, arm: Arm, seed: int, folder: Path) -> list[str]:
    """Return the command line of `train_ltd.py` for one run."""
    flags = {}
    if not args.own_data:
        flags = NANO | {"train_data_dir": args.output_dir / "clips"}
    run = common_flags(args, seed, folder) | {
        "max_eval_clips": 1,  # this script measures held-out clips more closely itself
        "eval_steps": NEVER,
        **arm.flags,
        "loss": "mse" if arm.weights == "mse" else "ltd",  # the nearest name: what is computed is `arm_loss`
    }
    # What makes the run comes last, so that no other flag can change it.
    return command_line(flags) + args.passed + command_line(run)


def command_line(flags: dict) -> list[str]:
    """Write flags as a command line."""
    return [f"--{name}={value}" for name, value in flags.items()]


def changed(args: argparse.Namespace, **values) -> argparse.Namespace:
    """Return a copy of the arguments with other values."""
    return argparse.Namespace(**vars(args) | values)


def time_weights(arm: Arm, data: dict, batch_size: int) -> float:
    """Return the median milliseconds that the weights of one batch take.

    Of pixel maps, which are made beforehand, it is the lookup alone.
    """
    rows = [data["clips"][index] for index in range(batch_size)]
    latents = torch.stack([row["latents"] for row in rows])
    batch = {"latents": latents, "name": [row["name"] for row in rows]}
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        arm_weights(batch, arm, data)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def load_model(arm_name: str, wan, run_args: argparse.Namespace, device: torch.device) -> WanTransformer3DModel:
    """Load the tuned transformer of a run, in float32; of an untrained arm the one that all start from."""
    args = changed(run_args, mixed_precision="no")  # under bf16 a LoRA's base would be in bfloat16
    trained = arm_name not in UNTRAINED
    if trained and args.train_type == "full":
        args.transformer_path = args.output_dir
    transformer = train_ltd.load_transformer(args, wan)
    if trained and args.train_type == "lora":
        args.init_lora = args.output_dir
        train_ltd.add_lora(transformer, args)
    return transformer.to(device).eval()


def error_map(prediction: torch.Tensor, target: torch.Tensor, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """Measure, for `train_ltd.evaluate`, the squared error of each voxel of a clip, `(F, H, W)`."""
    error = (prediction.float() - target.float()).square()  # (1, C, F, H, W)
    return {"map": error.mean(dim=1)[0]}


def held_out_errors(
    wan,
    transformer: WanTransformer3DModel,
    data: dict,
    accelerator: Accelerator,
    run_args: argparse.Namespace,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Measure held-out clips at fixed noise and sigmas: by motion, by true object, by latent frame.

    A clip's error is averaged over sigmas, and a mean over clips leaves out those that have no such voxel.
    """
    held_out = data["held_out"]
    bounds = data["clips"].motion_bounds(accelerator.device)
    all_clips = changed(run_args, max_eval_clips=len(held_out))
    measured = train_ltd.evaluate(wan, transformer, held_out, bounds, accelerator, all_clips, measure=error_map)
    rows = []
    profiles = []
    for index, of_clip in itertools.groupby(measured, key=lambda row: row["clip"]):
        row, error = clip_errors(list(of_clip))
        if not args.own_data:
            name = held_out.clips[index].name
            truth = np.load(Path(run_args.train_data_dir, name).with_suffix(".npz"))
            objects = latent_mask(truth["mask"] > 0, error.shape)
            row["mse_object"] = error[objects].mean()  # NaN where the mask is empty, as are means by motion
            row["mse_background"] = error[~objects].mean()
        rows.append(row)
        profiles.append(error.mean(dim=(1, 2)))
    result = {}
    for name in rows[0]:
        result[f"held_out/{name}"] = float(np.nanmean([row[name].item() for row in rows]))
    profile = torch.stack(profiles).mean(dim=0)  # (F,)
    ltd = torch.tensor([clip.ltd_per_frame for clip in held_out.clips]).mean(dim=0)  # (F,)
    result["frames/peak_over_mean"] = (profile.max() / profile.mean()).item()
    result["frames/spread_over_mean"] = (profile.std() / profile.mean()).item()
    result["frames/correlation_with_ltd"] = torch.corrcoef(torch.stack([profile, ltd]))[0, 1].item()
    result["training/variance_over_clips"] = training_variance(wan, transformer, data, accelerator, run_args)
    return result


def clip_errors(rows: list[dict]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Average the rows of `train_ltd.evaluate` of one clip: its mean errors, and the error's map `(F, H, W)`."""
    columns = {}
    for name in rows[0]:
        if name not in ("clip", "sigma"):
            columns[name] = torch.stack([row[name] for row in rows]).mean(dim=0)
    errors = {
        "mse": columns["mse"],
        "mse_motion": columns["motion_error"] / columns["motion_voxels"],
        "mse_static": columns["static_error"] / columns["static_voxels"],
    }
    return errors, columns["map"]


def latent_mask(mask: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Put a pixel mask `(F, H, W)` on the latent grid: true where objects cover more than a quarter of a voxel."""
    mask = torch.from_numpy(mask.astype(np.float32))[None]
    first = F.adaptive_avg_pool3d(mask[:, :1], (1, *shape[1:]))
    later = F.adaptive_avg_pool3d(mask[:, 1:], (shape[0] - 1, *shape[1:]))
    return torch.cat([first, later], dim=1)[0] > 0.25


def training_variance(
    wan, transformer: WanTransformer3DModel, data: dict, accelerator: Accelerator, run_args: argparse.Namespace
) -> float:
    """Measure the variance over training clips of the unweighted loss at one sigma, after training."""
    bounds = data["clips"].motion_bounds(accelerator.device)
    args = changed(run_args, max_eval_clips=VARIANCE_CLIPS)
    sigmas = (VARIANCE_SIGMA,)
    rows = train_ltd.evaluate(wan, transformer, data["clips"], bounds, accelerator, args, sigmas=sigmas)
    return float(np.var([row["mse"].item() for row in rows]))


# --- Generated videos ------------------------------------------------------------------------------------------------


def video_scores(
    arm_name: str,
    seed: int,
    transformer: WanTransformer3DModel,
    data: dict,
    run_args: argparse.Namespace,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Score videos that are generated for held-out captions.

    Those of the nano Wan against their captions: dynamic ones of one sprite, and half as many calm ones for what was
    forgotten. Those of another model only by what needs no ground truth.
    """
    # The text encoder of a real Wan takes 11 GB in bfloat16 and twice that in float32.
    dtype = torch.bfloat16 if args.own_data else torch.float32
    pipeline = WanPipeline.from_pretrained(run_args.pretrained_model_name_or_path, transformer=None, dtype=dtype)
    pipeline.register_modules(transformer=transformer)
    pipeline.vae.float()
    pipeline.to(transformer.device)
    if args.own_data:
        return own_video_scores(pipeline, seed, data, run_args, args)
    result = {}
    # Seeds take turns in the held-out captions, so that an arm sees as many different ones as it has videos.
    for prefix, mix, count in (("videos/", "dynamic", args.num_videos), ("calm/", "calm", args.num_videos // 2)):
        specs = held_out_specs(mix, (seed + 1) * count, single_sprite=True)[seed * count :]
        prompts = [caption(spec) for spec in specs]
        if arm_name == "vae_round_trip":
            videos = [round_trip(pipeline.vae, render_clip(spec)[0]) for spec in specs]
        else:
            videos = generate(pipeline, prompts, noise_seeds(seed, count), **NANO_SAMPLING)
        rows = [score(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
        for name, value in mean_scores(rows).items():
            result[prefix + name] = value
    return result


def own_video_scores(
    pipeline: WanPipeline, seed: int, data: dict, run_args: argparse.Namespace, args: argparse.Namespace
) -> dict[str, float]:
    """Score videos of a model whose true motion nobody knows, by flicker and DIS dynamic degree."""
    clips = data["held_out"].clips[: args.num_videos]
    videos = generate(
        pipeline,
        [clip.captions[0] for clip in clips],
        noise_seeds(seed, len(clips)),
        batch_size=1,
        height=run_args.height,
        width=run_args.width,
        num_frames=run_args.num_frames,
    )
    rows = []
    for video in videos:
        dynamic_degree = dis_dynamic_degree(video, run_args.fps)
        rows.append({"temporal_flickering": temporal_flickering(video), "dis_dynamic_degree": dynamic_degree})
    return {f"videos/{name}": value for name, value in mean_scores(rows).items()}


def noise_seeds(seed: int, count: int) -> list[int]:
    """Return the seeds of the noise that a run's videos start from."""
    return [1000 * seed + number for number in range(count)]


# --- Results ---------------------------------------------------------------------------------------------------------


def read_runs(path: Path) -> list[dict]:
    """Read the finished runs, one of each arm and seed; a line that a crash cut short does not count.

    Raises `ValueError` for a line that is no run.
    """
    if not path.is_file():
        return []
    runs = {}
    for line in path.read_text().splitlines():
        try:
            run = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not (isinstance(run, dict) and {"arm", "seed", "settings"} <= run.keys()):
            raise ValueError(f"{path} has a line that is no run: {line[:60]}")
        runs.setdefault((run["arm"], run["seed"]), run)
    return list(runs.values())


def paired(runs: list[dict], arm: str, control: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of two arms over the seeds that both have, in the same order."""
    values = {arm: {}, control: {}}
    for run in runs:
        value = run["scores"].get(metric)
        if run["arm"] in values and value is not None:
            values[run["arm"]][run["seed"]] = value
    seeds = sorted(values[arm].keys() & values[control].keys())
    columns = []
    for name in (arm, control):
        columns.append(np.array([values[name][seed] for seed in seeds], dtype=np.float64))
    return tuple(columns)


def confidence(values: np.ndarray) -> list[float]:
    """Return mean and 95 % confidence interval by Student's t, `[mean, low, high]`.

    The bounds of fewer than two values are NaN.
    """
    mean = float(values.mean()) if len(values) else math.nan
    if len(values) < 2:
        return [mean, math.nan, math.nan]
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return [mean, float(mean - half), float(mean + half)]


def contrast(runs: list[dict], arm: str, control: str, metric: str) -> dict:
    """Compare two arms: the paired difference `arm - control`, the p value of a paired t test, the number of seeds."""
    values, controls = paired(runs, arm, control, metric)
    differences = values - controls
    p = math.nan
    if len(differences) > 1 and np.ptp(differences) > 0:  # there is no t of differences that are all the same
        p = float(stats.ttest_rel(values, controls).pvalue)
    relative = [math.nan] * 3
    if len(controls):
        relative = confidence(differences / np.abs(controls).mean())
    return {
        "arm": arm,
        "control": control,
        "metric": metric,
        "seeds": len(differences),
        "p": p,
        "difference": confidence(differences),
        "relative": relative,
    }


def holm(p_values: list[float]) -> list[float]:
    """Correct several p values by Holm's step-down; NaN, where there was no test, stays and does not count."""
    tests = [index for index in np.argsort(p_values) if not math.isnan(p_values[index])]
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(tests):
        value = min(1.0, (len(tests) - rank) * p_values[index])
        largest = max(largest, value)
        corrected[index] = largest
    return corrected


def contrasted_pairs(arms: list[str]) -> list[tuple[str, str]]:
    """Return which arm is compared with which: all with mse, ltd with its kind of mse, and the primary contrasts."""
    pairs = []
    for arm in arms:
        if arm not in (*UNTRAINED, "mse"):
            pairs.append((arm, "mse"))
    for arm in arms:
        if arm.startswith("mse_"):
            pairs.append((arm.replace("mse", "ltd"), arm))
    for rate in ("", *OTHER_RATES):
        for arm, control in PRIMARY_CONTRASTS:
            pairs.append((arm + rate, control + rate))
    return [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(arms)]


def summarize(runs: list[dict]) -> dict:
    """Compute everything in `results.json`: every arm's means, all differences to mse, the primary contrasts."""
    arms = [name for name in ARMS if any(run["arm"] == name for run in runs)]
    metrics = {}  # as an ordered set
    for run in runs:
        metrics.update(dict.fromkeys(run["scores"]))
    seeds = {}
    means = {}
    fewer_seeds = {}  # how many have a value, where it is fewer than the arm has
    for arm in arms:
        rows = [run["scores"] for run in runs if run["arm"] == arm]
        seeds[arm] = len(rows)
        means[arm] = {}
        fewer_seeds[arm] = {}
        for metric in metrics:
            values = [row[metric] for row in rows if row.get(metric) is not None]
            means[arm][metric] = confidence(np.array(values))
            if 0 < len(values) < len(rows):
                fewer_seeds[arm][metric] = len(values)

    primary = []
    for metric in PRIMARY_METRICS:
        for arm, control in PRIMARY_CONTRASTS:
            row = contrast(runs, arm, control, metric)
            if row["seeds"] > 1:
                primary.append(row)
    corrected = holm([row["p"] for row in primary])
    for row, p in zip(primary, corrected, strict=True):
        row["p_holm"] = p
    differences = []
    for arm, control in contrasted_pairs(arms):
        for metric in metrics:
            row = contrast(runs, arm, control, metric)
            del row["p"]  # it would invite to pick the smallest of hundreds
            differences.append(row)
    return {
        "settings": runs[0]["settings"],
        "questions": {arm: ARMS[arm].question for arm in arms},
        "exploratory": [arm for arm in arms if not ARMS[arm].key],
        "seeds": seeds,
        "means": means,
        "fewer_seeds": fewer_seeds,
        "primary_contrasts": primary,
        "differences": differences,
    }


def without_nan(value):
    """Return `value` with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


# --- Table and picture -----------------------------------------------------------------------------------------------


def table_line(cells: list[str]) -> str:
    """Write a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table_head(cells: list[str]) -> list[str]:
    """Write the head of a Markdown table, and the rule below it."""
    return [table_line(cells), "|---" * len(cells) + "|"]


def interval(values: list[float], counted: int | None = None, digits: int = 4) -> str:
    """Write `mean ± half width` of what `confidence` returned; `n=` where fewer seeds have a value than the arm."""
    mean, low, high = values
    if math.isnan(mean):
        return "-"
    text = f"{mean:.{digits}f}"
    if not math.isnan(low):
        text += f" ± {(high - low) / 2:.{digits}f}"
    if counted:
        text += f" (n={counted})"
    return text


def p_value(p: float) -> str:
    """Write a p value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def difference_cells(row: dict) -> list[str]:
    """Write a paired difference as cells of a table: contrast, metric, seeds, interval, per cent of the control."""
    mean, low, high = row["difference"]
    return [
        f"{row['arm']} - {row['control']}",
        row["metric"],
        str(row["seeds"]),
        f"{mean:+.4f} ({low:+.4f} to {high:+.4f})",
        f"{row['relative'][0]:+.2%}",
    ]


def primary_table(results: dict) -> list[str]:
    """Write the primary contrasts with their tests, and those at other learning rates without."""
    cells = ["metric", "seeds", "difference (95 % CI)", "relative"]
    lines = table_head(["contrast", *cells, "p", "p (Holm)"])
    for row in results["primary_contrasts"]:
        lines.append(table_line([*difference_cells(row), p_value(row["p"]), p_value(row["p_holm"])]))
    rates = [row for row in results["differences"] if row["control"].endswith(OTHER_RATES)]
    if rates:
        lines += ["", *table_head(["at other learning rates", *cells])]
    for row in rates:
        if row["metric"] in PRIMARY_METRICS:
            lines.append(table_line(difference_cells(row)))
    return lines


def means_table(results: dict) -> list[str]:
    """Write the means of the key arms, a metric a row."""
    means = results["means"]
    arms = [arm for arm in means if arm not in results["exploratory"]]
    if not arms:
        return []
    lines = ["", *table_head(["mean ± half of the 95 % CI", *arms])]
    lines.append(table_line(["seeds", *(str(results["seeds"][arm]) for arm in arms)]))
    for metric in means[arms[0]]:
        if metric == "seconds":  # of the wall: on a machine that has other work they say nothing of an arm
            continue
        cells = [metric]
        for arm in arms:
            cells.append(interval(means[arm][metric], results["fewer_seeds"][arm].get(metric)))
        lines.append(table_line(cells))
    return lines


def exploratory_table(results: dict) -> list[str]:
    """Write the differences of exploratory arms to their controls, a pair a row."""
    known = next(iter(results["means"].values()))
    metrics = [metric for metric in (*PRIMARY_METRICS, *SECONDARY_METRICS) if metric in known]
    pairs = {}  # of arm and control -> differences by metric
    for row in results["differences"]:
        if row["arm"] in results["exploratory"] and not row["arm"].endswith(OTHER_RATES):
            pairs.setdefault((row["arm"], row["control"]), {})[row["metric"]] = row
    if not pairs:
        return []
    lines = ["", *table_head(["exploratory, % of the control (95 % CI)", "seeds", *metrics])]
    for (arm, control), rows in pairs.items():
        cells = [f"{arm} - {control}", str(rows[metrics[0]]["seeds"])]
        for metric in metrics:
            mean, low, high = (100 * value for value in rows[metric]["relative"])
            cells.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(table_line(cells))
    return lines


def write_table(results: dict) -> str:
    """Write Markdown: primary contrasts, those at other learning rates, means of key arms, exploratory differences."""
    lines = primary_table(results) + means_table(results) + exploratory_table(results)
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """Draw paired differences to each control, in per cent of its mean, with 95 % intervals: a panel a metric."""
    known = next(iter(results["means"].values()))
    metrics = [metric for metric in PRIMARY_METRICS if metric in known]
    if not metrics:
        metrics = ["held_out/mse"]
    size = (8, 1.2 + 0.3 * len(results["means"]))
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        names = []
        for row in reversed(results["differences"]):
            if row["metric"] != metric or row["seeds"] < 2:
                continue
            mean, low, high = (100 * value for value in row["relative"])
            color = "#0072B2" if ARMS[row["arm"]].key else "#999999"
            height = len(names)
            axis.plot([low, high], [height, height], color=color, linewidth=2)
            axis.plot(mean, height, "o", color=color)
            names.append(f"{row['arm']} - {row['control']}")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(metric, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    title = "Paired differences in % of the control, 95 % CI; left of 0 is better"
    if results["exploratory"]:
        title += "; gray: exploratory"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- The run ---------------------------------------------------------------------------------------------------------


def run_once(arm_name: str, seed: int, args: argparse.Namespace) -> dict:
    """Make one line of `runs.jsonl`: train, measure held-out clips, generate and score."""
    arm = ARMS[arm_name]
    folder = args.output_dir / f"{arm_name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    run_args = train_ltd.parse_args(run_flags(args, arm, seed, folder))
    run_args.learning_rate *= arm.rate
    wan = train_ltd.identify_wan(run_args)  # what cannot be trained is refused before anything is encoded
    accelerator = train_ltd.build_accelerator(run_args)
    names = {arm.weights} if arm.matched else set()
    data = training_set(run_args, accelerator, names)
    scores = {}
    if arm_name not in UNTRAINED:
        scores["weight_ms"] = time_weights(arm, data, run_args.train_batch_size)
        started = time.perf_counter()
        train_ltd.main(run_args, compute_loss=functools.partial(arm_loss, arm=arm, data=data))
        scores["seconds"] = time.perf_counter() - started
    transformer = load_model(arm_name, wan, run_args, accelerator.device)
    if arm_name != "vae_round_trip":
        scores.update(held_out_errors(wan, transformer, data, accelerator, run_args, args))
    scores.update(video_scores(arm_name, seed, transformer, data, run_args, args))
    if not args.keep_weights:
        shutil.rmtree(folder, ignore_errors=True)
    return {"arm": arm_name, "seed": seed, "settings": settings(args), "scores": without_nan(scores)}


def settings(args: argparse.Namespace) -> dict:
    """Return what all runs of one file must share."""
    shared = {"steps": args.steps, "num_videos": args.num_videos, "flags": args.passed, "recipe": args.recipe}
    if not args.own_data:
        base = Path(NANO["pretrained_model_name_or_path"])
        weights = (base / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        shared.update(NANO)
        shared["pretrained_model_name_or_path"] = str(base.relative_to(ROOT))
        shared["clips"] = NANO_CLIPS
        shared["sampling"] = NANO_SAMPLING
        shared["transformer_sha256"] = hashlib.sha256(weights).hexdigest()
    return json.loads(json.dumps(shared))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags that train_ltd.py does not get."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/ablation"), help="where everything is written")
    add("--arms", nargs="+", default=["key"], metavar="ARM", help=f"key, exploratory, or names: {', '.join(ARMS)}")
    add("--seeds", type=int, default=8, help="runs of each arm")
    add("--first_seed", type=int, default=0, help="for several processes that share the seeds")
    add("--steps", type=int, default=120, help="updates of a run")
    add("--num_videos", type=int, default=16, help="dynamic videos generated a run, half as many calm")
    add("--config", help="recipe for train_ltd.py")
    add("--report_only", action="store_true", help="make the report from runs.jsonl, run nothing")
    add("--keep_weights", action="store_true", help="do not delete a run's folder after scoring")
    return parser


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read this script's flags; `passed` has those that train_ltd.py gets. Exits for what cannot work."""
    parser = build_parser()
    args, passed = parser.parse_known_args(input_args)
    args.arms = arm_names(args.arms)
    unknown = [arm for arm in args.arms if arm not in ARMS]
    if unknown:
        parser.error(f"--arms: {', '.join(unknown)} is not one of key, exploratory, {', '.join(ARMS)}")
    if args.seeds < 1 or args.steps < 1 or args.num_videos < 2:
        parser.error("--seeds and --steps must be at least 1, --num_videos at least 2")
    names = [flag.split("=")[0] for flag in passed]
    fixed = [flag for flag, name in zip(passed, names, strict=True) if name in FIXED_FLAGS]
    if fixed:
        parser.error(f"{', '.join(fixed)}: this script sets it; use --seeds, --first_seed, --steps, --arms")
    args.recipe = ""
    if args.config:
        if not Path(args.config).is_file():
            parser.error(f"--config {args.config} is not a file")
        args.recipe = Path(args.config).read_text(encoding="utf-8")
        passed = [f"--config={args.config}", *passed]
    args.passed = passed
    data_in_recipe = re.search("^(dataset_name|train_data_dir):", args.recipe, re.MULTILINE)
    args.own_data = bool(data_in_recipe) or "--dataset_name" in names or "--train_data_dir" in names
    if args.own_data:
        args.arms = [arm for arm in args.arms if arm != "vae_round_trip"]  # a ceiling of scores that need the truth
    try:
        check_passed(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def arm_names(names: list[str]) -> list[str]:
    """Return the arms that are asked for by name or group, each once."""
    chosen = []
    for name in names:
        if name == "key":
            chosen += [arm for arm in ARMS if ARMS[arm].key]
        elif name == "exploratory":
            chosen += [arm for arm in ARMS if not ARMS[arm].key]
        else:
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def check_passed(args: argparse.Namespace) -> None:
    """Refuse flags of train_ltd.py that do not go with the arms. Raises `ValueError`; argparse itself exits with 2."""
    any_folder = [f"--train_data_dir={ROOT}"]  # the nano Wan's clips are made later
    defaults = train_ltd.parse_args(any_folder)
    given = train_ltd.parse_args(args.passed if args.own_data else any_folder + args.passed)
    bent = []
    for name in vars(given):
        if name.startswith("ltd_") and getattr(given, name) != getattr(defaults, name):
            bent.append(f"--{name}")
    if bent:
        raise ValueError(
            f"{', '.join(bent)}: the arms set LTD's form; take one of scale_4, normalized, ... or add one"
        )
    other = [f"--{name}" for name in UNSUPPORTED_FLAGS if getattr(given, name)]
    if other:
        raise ValueError(f"{', '.join(other)}: not supported here; give a pipeline as --pretrained_model_name_or_path")
    if not args.own_data:
        return
    pixels = [arm for arm in args.arms if ARMS[arm].weights in PIXEL_MAPS]
    if pixels:
        # Their maps are made from a file's own frames, which are other ones at another rate, size or window.
        raise ValueError(f"--arms {' '.join(pixels)}: only for the nano Wan's clips")
    if not (given.validation_fraction or given.validation_split):
        raise ValueError("own data need --validation_fraction: held-out clips are what is compared")
    rolls = any(ARMS[arm].weights == "other_clip" for arm in args.arms)
    if rolls and given.train_batch_size < 2:
        raise ValueError(
            "other_clip takes the weights of another clip of the batch: --train_batch_size must be at least 2"
        )


def write_clips(folder: Path) -> None:
    """Write the nano Wan's training clips, complete or not at all; several processes may ask for them at once."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}-{os.getpid()}")
    write_dataset(partial, **NANO_CLIPS)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


def run_missing(path: Path, args: argparse.Namespace) -> None:
    """Make the runs that are not in `runs.jsonl` yet: seeds outside, arms inside, so that a stop leaves pairs."""
    if not args.own_data:
        write_clips(args.output_dir / "clips")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for arm in args.arms:
            finished = [(run["arm"], run["seed"]) for run in read_runs(path)]  # other processes write there too
            if (arm, seed) in finished:
                continue
            line = json.dumps(run_once(arm, seed, args))
            with open(path, "a") as file:
                file.write("\n" + line + "\n")  # on a line of its own, even after one that was cut short


def main(args: argparse.Namespace) -> None:
    """Make the runs that are missing, and the report of all.

    Raises `ValueError` for runs of other settings in the folder, and when there is none to report.
    """
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "runs.jsonl"
    runs = read_runs(path)
    shared = settings(args)
    if args.report_only and runs:
        shared = runs[0]["settings"]  # records of an earlier version can still be reported
    if any(run["settings"] != shared for run in runs):
        raise ValueError(f"{path} holds runs of other settings; choose another --output_dir")
    if not args.report_only:
        run_missing(path, args)
    runs = read_runs(path)
    if not runs:
        raise ValueError(f"{path} holds no finished run")
    results = summarize(runs)
    table = write_table(results)
    text = json.dumps(without_nan(results), indent=1, allow_nan=False)
    (args.output_dir / "results.json").write_text(text + "\n")
    (args.output_dir / "table.md").write_text(table)
    draw(results, args.output_dir / "ablation.png")
    print(table)


if __name__ == "__main__":
    train_ltd.run_script(main, parse_args)
