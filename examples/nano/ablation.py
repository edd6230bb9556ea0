"""What does the LTD weight do? Fine-tune one base model again and again, with nothing but the weight changed.

    python examples/nano/ablation.py --output_dir outputs/ablation --arms mse ltd --seeds 2 --steps 20 --num_videos 2
    python examples/nano/ablation.py --output_dir outputs/ablation                      # the key arms, 8 seeds
    python examples/nano/ablation.py --output_dir outputs/ablation --arms exploratory --seeds 3

By default on the nano Wan, whose true motion is known. Flags that this script does not know go to `train_ltd.py`, so
the same question can be asked of any Wan model and data:

    python examples/nano/ablation.py --output_dir outputs/mine --arms mse ltd --seeds 3 --steps 500 \\
        --config examples/recipes/lora_1.3b.yaml --train_data_dir my_clips --validation_split 0.1

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
from accelerate.state import AcceleratorState, GradientState
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
    "pretrained_model_name_or_path": str(ROOT / "examples/nano/wan-nano"), "height": 96, "width": 96,
    "num_frames": 33, "fps": 16, "train_type": "full", "train_batch_size": 8, "mixed_precision": "bf16",
    "learning_rate": 2e-4, "lr_warmup_steps": 5, "lr_scheduler": "cosine", "flow_shift": 3.0,
    "validation_split": 0.1667, "gradient_checkpointing": "none",
}  # fmt: skip
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
FIXED_FLAGS = ("--seed", "--loss", "--max_train_steps", "--num_train_epochs", "--resume_from_checkpoint", "--dry_run")
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
    """The weights called `name` of a batch of clips, `(B, F, H, W)` float32; `data` is from `training_set`."""
    latents = batch["latents"]
    if name == "mse":
        return torch.ones_like(latents[:, 0])
    if name in data["maps"]:
        return torch.stack([data["maps"][name][clip].float() for clip in batch["name"]]).to(latents.device)
    if name == "without_gap_0":
        later = latent_temporal_discrepancy(latents[:, :, 1:])
        # The second frame's stands in for the first's, whose only gap it is.
        return 2 + torch.log1p(torch.cat([later[:, :1], later], dim=1) / math.e)
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
        return data["ltd_profile"].to(weights.device)[None, :, None, None].expand_as(weights)
    if name == "per_frame":
        return weights.mean(dim=(2, 3), keepdim=True).expand_as(weights)
    if name == "per_clip":
        return weights.mean(dim=(1, 2, 3), keepdim=True).expand_as(weights)
    if name != "ltd":
        raise ValueError(f"no weights are called {name!r}")
    return weights


def arm_weights(batch: dict, args: argparse.Namespace, *, arm: Arm, data: dict) -> torch.Tensor:
    """What `train_ltd.LOSS_WEIGHTS` expects of a function, for one arm."""
    weights = raw_weights(arm.weights, batch, data)
    if arm.matched:
        mean, std = data["moments"][arm.weights]
        weights = (weights - mean) * (data["ltd_std"] / std) + data["ltd_mean"]
        # Of a heavy tail only; a voxel must not be pushed away from its target.
        weights = weights.clamp(min=0)
    return weights


# --- The training set as the arms need it ----------------------------------------------------------------------------


def pixel_maps(frames: np.ndarray, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Three maps of motion in pixel space, averaged onto the latent grid `shape` `(F, H, W)`.

    `frames` are uint8 `(F, H, W, 3)`. `frame_residual`: mean absolute difference to the frame before, over 255;
    `flow`: 1 + m^2, m being the length of DIS flow over the clip's longest; `motion_mask`: above 1 px.
    """
    import cv2

    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.stack([np.linalg.norm(dis.calc(a, b, None), axis=-1) for a, b in itertools.pairwise(gray)])
    residual = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=-1) / 255
    maps = {"frame_residual": residual, "flow": 1 + (flow / max(flow.max(), 1e-6)) ** 2, "motion_mask": flow > 1.0}
    # Latent frame 0 is one picture, the others four each: the motion into each of them, and out of the first.
    return {name: _to_latent_grid(torch.from_numpy(value.astype(np.float32)), shape) for name, value in maps.items()}


def _to_latent_grid(motion: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    pooled = F.adaptive_avg_pool3d(motion[None], (shape[0] - 1, *shape[1:]))[0]
    return torch.cat([pooled[:1], pooled])


def training_set(args: argparse.Namespace, names: set[str]) -> dict:
    """What some arms have to know of all training clips: mean, spread and profile of LTD's weights, maps by clip."""
    accelerator = train_ltd.build_accelerator(args)
    clips, held_out, captions = train_ltd.prepare_data(args, accelerator)
    dataset = train_ltd.LatentDataset(clips, captions, args)
    data = {"maps": {}, "moments": {}, "clips": dataset, "held_out": train_ltd.LatentDataset(held_out, captions, args)}
    rows = [dataset.load(clip, clip["captions"][0], torch.Generator())["latents"] for clip in clips]
    ltd = torch.cat([ltd_weights(row[None]) for row in rows])  # (N, F, H, W)
    data |= {"ltd_mean": ltd.mean().item(), "ltd_std": ltd.std().item(), "ltd_profile": ltd.mean(dim=(0, 2, 3))}
    if names & PIXEL_MAPS:
        folder = Path(args.train_data_dir)
        for clip in clips:
            for name, value in pixel_maps(read_video(folder / clip["name"])[: args.num_frames], ltd.shape[1:]).items():
                data["maps"].setdefault(name, {})[clip["name"]] = value
    for name in names:
        batches = [{"latents": row[None], "name": [clip["name"]]} for row, clip in zip(rows, clips, strict=True)]
        values = torch.cat([raw_weights(name, batch, data) for batch in batches])
        data["moments"][name] = (values.mean().item(), values.std().item())
    return data


# --- One run ---------------------------------------------------------------------------------------------------------


def run_flags(args: argparse.Namespace, passed: list[str], arm: Arm, seed: int, folder: Path) -> list[str]:
    """The command line of `train_ltd.py` for one run."""
    flags = {} if args.own_data else NANO | {"train_data_dir": args.output_dir / "clips"}
    run = {"cache_dir": args.output_dir / "cache", "seed": seed, "output_dir": folder, "report_to": "none"}
    run |= {"max_train_steps": args.steps, "checkpointing_steps": 10**9, "checkpoints_total_limit": 1}
    run |= {"max_eval_clips": 1, "eval_steps": 10**9}  # this script looks at held-out clips more closely itself
    run |= arm.flags | {"loss": "ablation"}
    # What makes the run comes last, so that no other flag can change it.
    return command_line(flags) + passed + command_line(run)


def command_line(flags: dict) -> list[str]:
    line = []
    for key, value in flags.items():
        line += [f"--{key}" if value else f"--no-{key}"] if isinstance(value, bool) else [f"--{key}={value}"]
    return line


def reset_accelerate() -> None:
    """Several runs in one process: each builds an `Accelerator` of its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def time_weights(dataset: train_ltd.LatentDataset, args: argparse.Namespace) -> float:
    """Median milliseconds that the weights of one batch take (of pixel maps, made beforehand, the lookup alone)."""
    rows = [dataset[i] for i in range(args.train_batch_size)]
    batch = {"latents": torch.stack([row["latents"] for row in rows]), "name": [row["name"] for row in rows]}
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        train_ltd.LOSS_WEIGHTS[args.loss](batch, args)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def load_model(arm_name: str, args: argparse.Namespace) -> WanTransformer3DModel:
    """The tuned transformer of a run, in float32; of the arm "base" the one that all start from."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = args.pretrained_model_name_or_path
    if arm_name not in UNTRAINED and args.train_type == "full":
        base = args.output_dir
    transformer = WanTransformer3DModel.from_pretrained(base, subfolder="transformer", dtype=torch.float32)
    if arm_name not in UNTRAINED and args.train_type == "lora":
        transformer.load_lora_adapter(args.output_dir, weight_name=train_ltd.LORA_FILE)
    return transformer.to(device).eval()


@torch.no_grad()
def held_out_errors(transformer, data: dict, run_args: argparse.Namespace, args: argparse.Namespace) -> dict:
    """Squared errors of held-out clips at fixed noise and sigmas: by motion, by true object, by latent frame."""
    device, rows, frames, ltd = transformer.device, [], [], []
    held_out = data["held_out"]
    thresholds = np.quantile([clip["ltd_quantiles"] for clip in data["clips"].clips], train_ltd.MOTION_QUANTILES)
    for index, clip in enumerate(held_out.clips):
        batch = clip_batch(held_out, clip, train_ltd.sample_seed("ablation", run_args.seed, index), device)
        errors = []
        for sigma in train_ltd.EVAL_SIGMAS:
            batch["sigmas"] = torch.tensor([sigma], device=device)
            errors.append(train_ltd.flow_matching_error(transformer, batch).mean(dim=1)[0])
        error = torch.stack(errors).mean(dim=0).cpu()  # (F, H, W), averaged over sigmas
        motion = latent_temporal_discrepancy(batch["latents"], train_ltd.STATS_WINDOW)[0].cpu()
        row = {"mse": error.mean(), "mse_motion": masked_mean(error, motion > thresholds[1])}
        row["mse_static"] = masked_mean(error, motion < thresholds[0])
        truth = Path(run_args.train_data_dir or "", clip["name"]).with_suffix(".npz")
        if not args.own_data:
            objects = latent_mask(np.load(truth)["mask"] > 0, error.shape)
            row |= {"mse_object": masked_mean(error, objects), "mse_background": masked_mean(error, ~objects)}
        rows.append({key: float(value) for key, value in row.items()})
        frames.append(error.mean(dim=(1, 2)))
        ltd.append(motion.mean(dim=(1, 2)))
    result = {f"held_out/{key}": float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
    profile, ltd = torch.stack(frames).mean(0), torch.stack(ltd).mean(0)
    result["frames/peak_over_mean"] = (profile.max() / profile.mean()).item()
    result["frames/spread_over_mean"] = (profile.std() / profile.mean()).item()
    result["frames/correlation_with_ltd"] = torch.corrcoef(torch.stack([profile, ltd]))[0, 1].item()
    return result | {"training/variance_over_clips": training_variance(transformer, data["clips"], run_args)}


def clip_batch(dataset: train_ltd.LatentDataset, clip: dict, seed: int, device) -> dict:
    """One clip with the noise of `seed` and its first caption, as a batch of one."""
    batch = dataset.load(clip, clip["captions"][0], torch.Generator().manual_seed(seed))
    return {key: value[None].to(device) for key, value in batch.items()}


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values[mask].mean()  # NaN where the mask is empty


def latent_mask(mask: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Pixel mask `(F, H, W)` on the latent grid: true where objects cover more than a quarter of a voxel."""
    mask = torch.from_numpy(mask.astype(np.float32))
    first, later = mask[None, :1], mask[None, 1:]
    pooled = [F.adaptive_avg_pool3d(first, (1, *shape[1:])), F.adaptive_avg_pool3d(later, (shape[0] - 1, *shape[1:]))]
    return torch.cat(pooled, dim=1)[0] > 0.25


@torch.no_grad()
def training_variance(transformer, dataset: train_ltd.LatentDataset, args: argparse.Namespace) -> float:
    """Variance over training clips of the unweighted loss at one sigma, after training."""
    losses = []
    for index, clip in enumerate(dataset.clips[:VARIANCE_CLIPS]):
        batch = clip_batch(dataset, clip, train_ltd.sample_seed("variance", args.seed, index), transformer.device)
        batch["sigmas"] = torch.tensor([VARIANCE_SIGMA], device=transformer.device)
        losses.append(train_ltd.flow_matching_error(transformer, batch).mean().item())
    return float(np.var(losses))


# --- Generated videos ------------------------------------------------------------------------------------------------


def video_scores(arm_name: str, seed: int, data: dict, run_args: argparse.Namespace, args: argparse.Namespace) -> dict:
    """
    Scores of videos generated for held-out captions: on the nano Wan against their captions, dynamic ones of one
    sprite, and half as many calm ones for what was forgotten; of another model only what needs no ground truth.
    """
    # The text encoder of a real Wan takes 11 GB in bfloat16 and twice that in float32.
    dtype = torch.bfloat16 if args.own_data else torch.float32
    pipeline = WanPipeline.from_pretrained(run_args.pretrained_model_name_or_path, transformer=None, dtype=dtype)
    pipeline.register_modules(transformer=load_model(arm_name, run_args))
    pipeline.vae.float()
    pipeline.to(pipeline.transformer.device)
    if args.own_data:
        prompts = [clip["captions"][0] for clip in data["held_out"].clips[: args.num_videos]]
        shape = {key: getattr(run_args, key) for key in ("height", "width", "num_frames")}
        videos = generate(pipeline, prompts, [1000 * seed + i for i in range(len(prompts))], batch_size=1, **shape)
        rows = [
            {"temporal_flickering": temporal_flickering(v), "dis_dynamic_degree": dis_dynamic_degree(v, run_args.fps)}
            for v in videos
        ]
        return {f"videos/{key}": value for key, value in mean_scores(rows).items()}
    result = {}
    # Seeds take turns in the held-out captions, so that an arm sees as many different ones as it has videos.
    for prefix, mix, count in (("videos/", "dynamic", args.num_videos), ("calm/", "calm", args.num_videos // 2)):
        specs = held_out_specs(mix, (seed + 1) * count, single_sprite=True)[seed * count :]
        prompts = [caption(spec) for spec in specs]
        if arm_name == "vae_round_trip":
            videos = [round_trip(pipeline.vae, render_clip(spec)[0]) for spec in specs]
        else:
            videos = generate(pipeline, prompts, [1000 * seed + i for i in range(count)], **NANO_SAMPLING)
        rows = [score(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
        result |= {prefix + key: value for key, value in mean_scores(rows).items()}
    return result


# --- Results ---------------------------------------------------------------------------------------------------------


def read_runs(path: Path) -> list[dict]:
    """The finished runs, one of each arm and seed; a line that a crash cut short does not count."""
    runs = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            run = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs.setdefault((run["arm"], run["seed"]), run)
    return list(runs.values())


def paired(runs: list[dict], arm: str, control: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of two arms over the seeds that both have, in the same order."""
    values = {(run["arm"], run["seed"]): run["scores"].get(metric) for run in runs}
    seeds = sorted({s for a, s in values if a == arm} & {s for a, s in values if a == control})
    pairs = [(values[arm, s], values[control, s]) for s in seeds]
    pairs = [pair for pair in pairs if None not in pair]
    return tuple(np.array(pairs, dtype=np.float64).reshape(-1, 2).T)


def confidence(values: np.ndarray) -> list[float]:
    """Mean and 95 % confidence interval by Student's t, `[mean, low, high]`; NaN bounds for fewer than two values."""
    if len(values) < 2:
        return [float(values.mean()) if len(values) else math.nan, math.nan, math.nan]
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


def contrast(runs: list[dict], arm: str, control: str, metric: str) -> dict:
    """Paired difference `arm - control`: its interval, the p value of a paired t test, and the number of seeds."""
    values, controls = paired(runs, arm, control, metric)
    differences = values - controls
    varies = len(differences) > 1 and np.ptp(differences) > 0  # there is no t of differences that are all the same
    p = float(stats.ttest_rel(values, controls).pvalue) if varies else math.nan
    relative = confidence(differences / np.abs(controls).mean()) if len(controls) else [math.nan] * 3
    row = {"arm": arm, "control": control, "metric": metric, "seeds": len(differences), "p": p}
    return row | {"difference": confidence(differences), "relative": relative}


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction of several p values; NaN, where there was no test, stays and does not count."""
    corrected, largest = np.full(len(p_values), math.nan), 0.0
    order = [index for index in np.argsort(p_values) if not math.isnan(p_values[index])]
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def summarise(runs: list[dict]) -> dict:
    """Everything in `results.json`: every arm's means, all differences to mse, the primary contrasts."""
    arms = [name for name in ARMS if any(run["arm"] == name for run in runs)]
    metrics = [*dict.fromkeys(key for run in runs for key in run["scores"])]
    values = {arm: [run["scores"] for run in runs if run["arm"] == arm] for arm in arms}
    missing = {  # how many seeds have a value, where it is fewer than the arm has
        arm: {m: count for m in metrics if 0 < (count := sum(row.get(m) is not None for row in rows)) < len(rows)}
        for arm, rows in values.items()
    }
    means = {
        arm: {m: confidence(np.array([row[m] for row in rows if row.get(m) is not None])) for m in metrics}
        for arm, rows in values.items()
    }
    primary = [contrast(runs, *pair, metric) for metric in PRIMARY_METRICS for pair in PRIMARY_CONTRASTS]
    primary = [row for row in primary if row["seeds"] > 1]
    for row, corrected in zip(primary, holm([row["p"] for row in primary]), strict=True):
        row["p_holm"] = corrected
    pairs = [(arm, "mse") for arm in arms if arm not in (*UNTRAINED, "mse")]
    pairs += [(arm.replace("mse", "ltd"), arm) for arm in arms if arm.startswith("mse_")]
    pairs += [(arm + rate, control + rate) for rate in ("", *OTHER_RATES) for arm, control in PRIMARY_CONTRASTS]
    pairs = [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(arms)]
    differences = [contrast(runs, *pair, metric) for pair in pairs for metric in metrics]
    for row in differences:  # a p value would invite to pick the smallest of hundreds
        del row["p"]
    return {
        "settings": runs[0]["settings"],
        "questions": {arm: ARMS[arm].question for arm in arms},
        "exploratory": [arm for arm in arms if not ARMS[arm].key],
        "seeds": {arm: len(rows) for arm, rows in values.items()},
        "means": means,
        "fewer_seeds": missing,
        "primary_contrasts": primary,
        "differences": differences,
    }


def interval(values: list[float], counted: int | None = None, digits: int = 4) -> str:
    """`mean ± half width` of what `confidence` returned; `n=` where fewer seeds have a value than the arm has."""
    if math.isnan(values[0]):
        return "-"
    half = "" if math.isnan(values[1]) else f" ± {(values[2] - values[1]) / 2:.{digits}f}"
    return f"{values[0]:.{digits}f}{half}" + (f" (n={counted})" if counted else "")


def without_nan(value):
    """`value` with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def difference_cells(row: dict) -> list[str]:
    """A paired difference as cells of a table: contrast, metric, seeds, interval, per cent of the control."""
    mean, low, high = row["difference"]
    cells = [f"{row['arm']} - {row['control']}", row["metric"], f"{row['seeds']}"]
    return [*cells, f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", f"{row['relative'][0]:+.2%}"]


def write_table(results: dict) -> str:
    """Markdown: primary contrasts, those at other learning rates, means of key arms, exploratory differences."""
    lines = ["| contrast | metric | seeds | difference (95 % CI) | relative | p | p (Holm) |", "|---" * 7 + "|"]
    for row in results["primary_contrasts"]:
        cells = difference_cells(row)
        cells += ["< 0.001" if p < 0.001 else f"{p:.3f}" for p in (row["p"], row["p_holm"])]
        lines.append("| " + " | ".join(cells) + " |")
    rates = [row for row in results["differences"] if row["control"].endswith(OTHER_RATES)]
    if rates:
        heads = "| at other learning rates | metric | seeds | difference (95 % CI) | relative |"
        lines += ["", heads, "|---" * 5 + "|"]
    for row in [row for row in rates if row["metric"] in PRIMARY_METRICS]:
        lines.append("| " + " | ".join(difference_cells(row)) + " |")
    means, exploratory = results["means"], results["exploratory"]
    if arms := [arm for arm in means if arm not in exploratory]:
        lines += ["", "| mean ± half of the 95 % CI | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
        lines.append("| seeds | " + " | ".join(str(results["seeds"][arm]) for arm in arms) + " |")
        fewer = results["fewer_seeds"]
        for m in means[arms[0]]:
            if m != "seconds":  # of the wall: on a machine that has other work they say nothing of an arm
                lines.append(f"| {m} | " + " | ".join(interval(means[a][m], fewer[a].get(m)) for a in arms) + " |")
    metrics = [metric for metric in (*PRIMARY_METRICS, *SECONDARY_METRICS) if metric in next(iter(means.values()))]
    rows = {(row["arm"], row["control"], row["metric"]): row for row in results["differences"]}
    pairs = [pair for pair in dict.fromkeys(key[:2] for key in rows) if pair[0] in exploratory]
    if pairs := [pair for pair in pairs if not pair[0].endswith(OTHER_RATES)]:
        lines += ["", "| exploratory, % of the control (95 % CI) | seeds | " + " | ".join(metrics) + " |"]
        lines.append("|---" * (len(metrics) + 2) + "|")
    for arm, control in pairs:
        cells = [f"{arm} - {control}", f"{rows[arm, control, metrics[0]]['seeds']}"]
        for metric in metrics:
            mean, low, high = (100 * value for value in rows[arm, control, metric]["relative"])
            cells.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """Paired differences to each control, in per cent of its mean, with 95 % intervals: one panel a primary metric."""
    metrics = [m for m in PRIMARY_METRICS if m in next(iter(results["means"].values()))] or ["held_out/mse"]
    size = (8, 1.2 + 0.3 * len(results["means"]))
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        rows = [row for row in results["differences"] if row["metric"] == metric and row["seeds"] > 1][::-1]
        for number, row in enumerate(rows):
            mean, low, high = (100 * value for value in row["relative"])
            color = "#0072B2" if ARMS[row["arm"]].key else "#999999"
            axis.plot([low, high], [number, number], color=color, linewidth=2)
            axis.plot(mean, number, "o", color=color)
        names = [f"{row['arm']} - {row['control']}" for row in rows]
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(metric, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    title = "Paired differences in % of the control, 95 % CI; left of 0 is better"
    title += "; gray: exploratory" * bool(results["exploratory"])
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- The run ---------------------------------------------------------------------------------------------------------


def run_once(arm_name: str, seed: int, args: argparse.Namespace, passed: list[str]) -> dict:
    """One line of `runs.jsonl`: train, look at held-out clips, generate and score."""
    arm, folder = ARMS[arm_name], args.output_dir / f"{arm_name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    # Known to the parser before the data is there on which some weights rest
    train_ltd.LOSS_WEIGHTS["ablation"] = train_ltd.LOSS_WEIGHTS["mse"]
    run_args = train_ltd.parse_args(run_flags(args, passed, arm, seed, folder))
    run_args.learning_rate *= arm.rate
    reset_accelerate()
    data = training_set(run_args, {arm.weights} if arm.matched else set())
    train_ltd.LOSS_WEIGHTS["ablation"] = functools.partial(arm_weights, arm=arm, data=data)
    scores = {}
    reset_accelerate()
    if arm_name not in UNTRAINED:
        scores["weight_ms"] = time_weights(data["clips"], run_args)
        started = time.perf_counter()
        train_ltd.main(run_args)
        scores["seconds"] = time.perf_counter() - started
    if arm_name != "vae_round_trip":
        scores |= held_out_errors(load_model(arm_name, run_args), data, run_args, args)
    scores |= video_scores(arm_name, seed, data, run_args, args)
    if not args.keep_weights:
        shutil.rmtree(folder, ignore_errors=True)
    scores = {key: None if math.isnan(value) else value for key, value in scores.items()}
    return {"arm": arm_name, "seed": seed, "settings": settings(args, passed), "scores": scores}


def settings(args: argparse.Namespace, passed: list[str]) -> dict:
    """What all runs of one file must share."""
    shared = {"steps": args.steps, "num_videos": args.num_videos, "flags": passed, "recipe": args.recipe}
    if not args.own_data:
        base = Path(NANO["pretrained_model_name_or_path"])
        weights = (base / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        shared |= NANO | {"pretrained_model_name_or_path": str(base.relative_to(ROOT)), "clips": NANO_CLIPS}
        shared |= {"sampling": NANO_SAMPLING, "transformer_sha256": hashlib.sha256(weights).hexdigest()}
    return json.loads(json.dumps(shared))


def parse_args(input_args: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--arms", nargs="+", default=["key"], metavar="ARM",
                        help=f"key, exploratory, or names: {', '.join(ARMS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=8, help="runs of each arm")
    parser.add_argument("--first_seed", type=int, default=0, help="for several processes that share the seeds")
    parser.add_argument("--steps", type=int, default=120, help="updates of a run")
    parser.add_argument("--num_videos", type=int, default=16, help="dynamic videos generated a run, half as many calm")
    parser.add_argument("--report_only", action="store_true", help="make the report from runs.jsonl, run nothing")
    parser.add_argument("--keep_weights", action="store_true", help="do not delete a run's folder after scoring")
    args, passed = parser.parse_known_args(input_args)
    groups = {"key": [a for a in ARMS if ARMS[a].key], "exploratory": [a for a in ARMS if not ARMS[a].key]}
    args.arms = [*dict.fromkeys(arm for name in args.arms for arm in groups.get(name, [name]))]
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"--arms: {', '.join(unknown)} is not one of key, exploratory, {', '.join(ARMS)}")
    if args.seeds < 1 or args.steps < 1 or args.num_videos < 2:
        parser.error("--seeds and --steps must be at least 1, --num_videos at least 2")
    if fixed := [flag for flag in passed if flag.split("=")[0] in FIXED_FLAGS]:
        parser.error(f"{', '.join(fixed)}: this script sets it; use --seeds, --first_seed, --steps, --arms")
    trainer = train_ltd.build_parser()
    given = trainer.parse_args(passed)
    if given.config:
        given = trainer.parse_args(train_ltd.recipe_flags(given.config, trainer, passed) + passed)
    args.recipe = Path(given.config).read_text(encoding="utf-8") if given.config else ""
    args.own_data = bool(given.dataset_name or given.train_data_dir)
    ltd_flags = [name for name in vars(given) if name.startswith("ltd_")]
    if bent := [name for name in ltd_flags if getattr(given, name) != trainer.get_default(name)]:
        parser.error(
            f"--{', --'.join(bent)}: the arms set LTD's form; take one of scale_4, normalized, ... or add one"
        )
    if other := [name for name in ("transformer_path", "init_lora", "revision", "variant") if getattr(given, name)]:
        parser.error(f"--{', --'.join(other)}: not supported here; give a pipeline as --pretrained_model_name_or_path")
    if args.own_data:
        args.arms = [arm for arm in args.arms if arm != "vae_round_trip"]  # a ceiling of scores that need the truth
    if args.own_data and (pixels := [arm for arm in args.arms if ARMS[arm].weights in PIXEL_MAPS]):
        # Their maps are made from a file's own frames, which are other ones at another rate, size or window.
        parser.error(f"--arms {' '.join(pixels)}: only for the nano Wan's clips")
    if args.own_data and not given.validation_split:
        parser.error("own data need --validation_split: held-out clips are what is compared")
    if args.own_data and given.train_batch_size < 2 and "other_clip" in {ARMS[arm].weights for arm in args.arms}:
        parser.error(
            "other_clip takes the weights of another clip of the batch: --train_batch_size must be at least 2"
        )
    return args, passed


def write_clips(folder: Path) -> None:
    """The nano Wan's training clips, complete or not at all; several processes may ask for them at once."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}-{os.getpid()}")
    write_dataset(partial, **NANO_CLIPS)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


def main(args: argparse.Namespace, passed: list[str]) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "runs.jsonl"
    if any(run["settings"] != settings(args, passed) for run in read_runs(path)):
        raise ValueError(f"{path} holds runs of other settings; choose another --output_dir")
    if not args.own_data and not args.report_only:
        write_clips(args.output_dir / "clips")
    try:
        # Seeds outside, arms inside: stopped early, all arms have equally many.
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for arm in () if args.report_only else args.arms:
                if (arm, seed) not in {(run["arm"], run["seed"]) for run in read_runs(path)}:
                    line = json.dumps(run_once(arm, seed, args, passed))
                    with open(path, "a") as file:
                        file.write("\n" + line + "\n")  # on a line of its own, even after one that was cut short
    finally:
        train_ltd.LOSS_WEIGHTS.pop("ablation", None)  # the script's own choices again
    if not (runs := read_runs(path)):
        raise ValueError(f"{path} holds no finished run")
    results = summarise(runs)
    table = write_table(results)
    (args.output_dir / "results.json").write_text(json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n")
    (args.output_dir / "table.md").write_text(table)
    draw(results, args.output_dir / "ablation.png")
    print(table)


if __name__ == "__main__":
    main(*parse_args())
