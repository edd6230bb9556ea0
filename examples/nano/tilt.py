"""Does the LTD weight change what is generated? Where the caption leaves the speed open, predict and measure it.

    python examples/nano/tilt.py --output_dir outputs/tilt --predict_only       # what theory says, without a network
    python examples/nano/tilt.py --output_dir outputs/tilt                      # all arms, 4 seeds
    python examples/nano/tilt.py --output_dir outputs/small --arms mse ltd --seeds 1 --steps 2 --num_videos 8

A weight that depends on the clean latents moves the minimizer of the loss: at voxel j it is the mean of the flow over
the clips that a noisy latent may come from, each counted w_j times. So the weights tilt what is generated towards
motion, where the caption leaves motion open. The clips are one sprite in two directions, each at two speeds, with
captions that name no speed. Over a finite set of latents the minimizer is a softmax: its videos need no network and
are predicted from the same noises that the fine-tuned nano Wan starts from. PLAN_TILT.md says what is compared.

Finished predictions and runs are lines in `predictions.jsonl` and `runs.jsonl`, with the scores of every video; the
same command goes on where it stopped. `results.json`, `table.md` and `tilt.png` are made from these files.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from ablation import (
    NANO,
    changed,
    command_line,
    common_flags,
    confidence,
    contrast,
    held_out_errors,
    holm,
    load_model,
    noise_seeds,
    p_value,
    read_runs,
    table_head,
    table_line,
    without_nan,
)
from accelerate import Accelerator
from diffusers import SchedulerMixin, UniPCMultistepScheduler, WanPipeline
from motion_metrics import AREA_SEEN, FEWEST_SIGHTS, asked_sprite, background_drift, direction_error, soft_masks, track
from score_model import NANO_SAMPLING, generate
from sprites import (
    CODEC,
    FPS,
    SIZE,
    SIZES,
    Clip,
    Sprite,
    caption,
    parse_caption,
    render_clip,
    sample_waves,
    unit_vector,
)
from videos import write_video

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # train_ltd.py is a script in the repository's root

import train_ltd
from ltd_loss import ltd_weights

# Clips, rate and steps were chosen on runs of the arm mse alone, see PLAN_TILT.md.
TILT_CLIPS = {"clips_a_kind": 1, "held_out_a_kind": 8, "seed": 3}
ROWS_A_CLIP = 4  # an epoch is two batches; each row has its own noise
TILT_FRAMES = 9
TILT_HEIGHT = 32  # px: the rows in which sprites move; the others would cost two thirds of the time
ROWS = slice((SIZE - TILT_HEIGHT) // 2, (SIZE + TILT_HEIGHT) // 2)
TILT_DIRECTIONS = ("right", "left")
SLOW, FAST = TILT_SPEEDS = (0.35, 2.1)  # px a frame
SPEED_WORDS = {SLOW: "slowly", FAST: "quickly"}
FAST_SPEED = (SLOW + FAST) / 2  # what moves faster is counted as fast
MIDDLE = 6.0  # px from the picture's middle to that of a path, at most
# What is slow and what is fast is decided at sigmas from 0.8 to 0.95, where the usual shift of 3 comes less often.
TILT = NANO | {
    "num_frames": TILT_FRAMES,
    "height": TILT_HEIGHT,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 20,
    "flow_shift": 5.0,
    "max_grad_norm": 0,
    "mixed_precision": "no",  # on the CPU the faster one at this size
}
del TILT["validation_fraction"]  # the held-out clips have a table of their own
SAMPLING = NANO_SAMPLING | {"guidance_scale": 1.0, "num_frames": TILT_FRAMES, "height": TILT_HEIGHT}
SAMPLING_SHIFT = 5.0
GUIDANCE = 4.0
GUIDED_ARMS = ("mse", "ltd_cubed")
# The rules of PLAN_TILT.md
BETWEEN = tuple(np.linspace(SLOW, FAST, 4)[1:3])  # the middle third, px a frame
GATE_SHARE = 0.1  # of the share of fast from a half
GATE_BETWEEN = 0.2  # share of videos in the middle third between the two speeds
SMALLEST_EFFECT = 0.0175  # px a frame: one video in a hundred fast instead of slow
PRIMARY_METRIC = "videos/speed"
PRIMARY_ARMS = ("ltd_cubed", "ltd", "ltd_inverse")
METRICS = (
    "videos/speed",
    "videos/share_fast",
    "videos/share_between",
    "videos/persistence",
    "videos/background_drift",
    "videos/direction_error",
    "held_out/mse_object",
    "held_out/mse_background",
)
CONTRASTED = [metric for metric in METRICS if metric != "videos/share_between"]
CONTROLS = {
    "ltd_cubed": "mse",
    "ltd": "mse",
    "ltd_inverse": "mse",
    "ltd_words": "mse_words",
    "fast_weighted": "mse",
    "fast_repeated": "fast_weighted",
}


# --- Arms ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """One loss on one set of clips.

    The weight of a voxel is LTD's to the `power`, times `fast_weight` in fast clips. `table` lists the clips, and
    `captions` is its column of captions.
    """

    question: str
    power: float = 0.0
    fast_weight: float = 1.0
    table: str = "training"
    captions: str = "text"


# In this order
ARMS = {
    "mse": Arm("plain MSE: where does the model itself stand?"),
    "ltd_cubed": Arm("(1 + ln(e + D)) ** 3: a strong tilt to motion", power=3),
    "ltd": Arm("1 + ln(e + D), the paper's", power=1),
    "ltd_inverse": Arm("(1 + ln(e + D)) ** -1: slower by tilt, not by faster learning", power=-1),
    "mse_words": Arm("plain MSE, captions that name the speed", captions="words"),
    "ltd_words": Arm("the paper's, captions that name the speed: nothing to tilt", power=1, captions="words"),
    "fast_weighted": Arm("the weight 3 for fast clips, 1 for slow ones: 75 % expected", fast_weight=3),
    "fast_repeated": Arm("plain MSE on a table that lists fast clips three times as often", table="repeated"),
}


def clip_is_fast(name: str) -> bool:
    """Return whether a clip, by its file's name, is one of the fast ones."""
    return name.startswith(SPEED_WORDS[FAST])


def arm_weights(latents: torch.Tensor, names: list[str], arm: Arm) -> torch.Tensor:
    """Return an arm's weights of clips, `(B, F, H, W)` in float32, from their latents `(B, C, F, H, W)` and names."""
    weights = ltd_weights(latents) ** arm.power
    fast = torch.tensor([clip_is_fast(name) for name in names], device=latents.device)
    factor = torch.where(fast, arm.fast_weight, 1.0)  # (B,)
    return weights * factor[:, None, None, None]


def arm_loss(
    prediction: torch.Tensor, target: torch.Tensor, batch: dict, args: argparse.Namespace, *, arm: Arm
) -> torch.Tensor:
    """Return an arm's loss, a scalar, in place of `train_ltd.compute_loss`."""
    weights = arm_weights(batch["latents"], batch["name"], arm)
    error = (prediction.float() - target.float()).square()  # (B, C, F, H, W)
    return (weights[:, None] * error).mean()


# --- Clips -----------------------------------------------------------------------------------------------------------


def clip_spec(direction: str, speed: float, middle: np.ndarray, waves: tuple) -> Clip:
    """Describe a clip of a small white circle that comes through `middle` half-way."""
    velocity = unit_vector(direction) * speed
    start = middle - velocity * (TILT_FRAMES - 1) / 2
    sprite = Sprite(
        size="small",
        color="white",
        shape="circle",
        speed=SPEED_WORDS[speed],
        direction=direction,
        path="",
        spin=False,
        dynamics="",
        to_color="",
        radius=SIZES["small"],
        start=tuple(start),
        velocity=tuple(velocity),
        angle=0.0,
        angular_speed=0.0,
        period=0.0,
        phase=0.0,
    )
    return Clip((sprite,), "blue", "gradient", "", waves)


def draw_pair(direction: str, rng: np.random.Generator) -> list[Clip]:
    """Describe a slow and a fast clip that differ in nothing else: the middle of the path and the waves are drawn."""
    middle = SIZE / 2 + rng.uniform(-MIDDLE, MIDDLE, 2)
    waves = sample_waves(rng, "gradient")
    return [clip_spec(direction, speed, middle, waves) for speed in TILT_SPEEDS]


def without_speed(text: str) -> str:
    """Take the speed word out of a caption: "a small white circle moves to the left over a blue gradient"."""
    for word in SPEED_WORDS.values():
        text = text.replace(f" {word} ", " ")
    return text


def write_clips(folder: Path, settings: dict) -> None:
    """Write the clips and their tables, complete or not at all; several processes may ask for them at once."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}-{os.getpid()}")
    partial.mkdir(parents=True)
    tables = {"training": [], "repeated": [], "held_out": []}
    rng = np.random.default_rng(settings["seed"])
    for table, count in (("training", settings["clips_a_kind"]), ("held_out", settings["held_out_a_kind"])):
        for direction in TILT_DIRECTIONS:
            for number in range(count):
                for speed, spec in zip(TILT_SPEEDS, draw_pair(direction, rng), strict=True):
                    name = f"{SPEED_WORDS[speed]}-{direction}-{table}-{number}"
                    video, truth = render_clip(spec, TILT_FRAMES)
                    write_video(video[:, ROWS], partial / f"{name}.mp4", FPS, codec=CODEC)
                    np.savez_compressed(partial / f"{name}.npz", mask=truth["mask"][:, ROWS])
                    words = caption(spec)
                    row = {"file_name": f"{name}.mp4", "text": without_speed(words), "words": words}
                    tables[table].append(json.dumps(row))
    for line in tables["training"]:
        repeats = 3 if clip_is_fast(json.loads(line)["file_name"]) else 1
        tables["repeated"] += [line] * (repeats * ROWS_A_CLIP // 2)
    # As many rows as the other table has, so that an update and an epoch are the same in all arms
    tables["training"] *= ROWS_A_CLIP
    for table, lines in tables.items():
        (partial / f"{table}.jsonl").write_text("\n".join(lines) + "\n")
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


def video_captions(arm: Arm, count: int) -> tuple[list[str], list[str]]:
    """Return the prompts of `count` videos, and the captions with a speed word that they are measured by.

    Directions take turns, and after each round of them speeds, so that arms with and without speed words agree.
    """
    prompts = []
    asked = []
    for number in range(count):
        direction = TILT_DIRECTIONS[number % len(TILT_DIRECTIONS)]
        speed = TILT_SPEEDS[number // len(TILT_DIRECTIONS) % 2]
        words = caption(clip_spec(direction, speed, middle=np.zeros(2), waves=()))  # which no caption tells
        asked.append(words)
        prompts.append(words if arm.captions == "words" else without_speed(words))
    return prompts, asked


# --- The exact minimizer ---------------------------------------------------------------------------------------------


def minimizing_flow(
    noisy_latents: torch.Tensor, sigma: float, clips: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the flow at `noisy_latents` `(B, C, F, H, W)` that minimizes the weighted error over a set of clips.

    `clips` is `(N, C, F, H, W)`, `weights` `(N, F, H, W)`. The noisy latents are (1 - sigma) z + sigma noise, and
    noise - z is (noisy - z) / sigma: so it is the weighted mean of z over the clips that is sought. A clip counts by
    how likely the noisy latents come from it, and at each voxel by its weight there.
    """
    noisy = noisy_latents.flatten(1)
    scaled = (1 - sigma) * clips.flatten(1)
    # The square of the distance, without the part that all clips share
    log_likelihood = (noisy @ scaled.T - scaled.square().sum(dim=1) / 2) / sigma**2  # (B, N)
    posterior = torch.softmax(log_likelihood, dim=1)
    weighted_clips = (weights[:, None] * clips).flatten(1)
    sums = (posterior @ weighted_clips).view_as(noisy_latents)
    weight = (posterior @ weights.flatten(1)).view(-1, 1, *weights.shape[1:])  # (B, 1, F, H, W)
    return (noisy_latents - sums / weight) / sigma


def sample_minimizer(
    noise: torch.Tensor, scheduler: SchedulerMixin, clips: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Follow `minimizing_flow` from `noise` `(B, C, F, H, W)` to latents, as the pipeline follows its network."""
    scheduler.set_timesteps(SAMPLING["num_inference_steps"])
    latents = noise
    for timestep in scheduler.timesteps:
        flow = minimizing_flow(latents, timestep.item() / 1000, clips, weights)
        latents = scheduler.step(flow, timestep, latents, return_dict=False)[0]
    return latents


def predict(arm: Arm, seed: int, dataset: train_ltd.LatentDataset, scheduler: SchedulerMixin, count: int) -> list:
    """Predict the speed in px a frame of each of a run's videos: that of the clip its latents arrive at."""
    by_caption = {}
    for index, clip in enumerate(dataset.clips):
        latents = dataset.load_fixed(index)["latents"]
        weights = arm_weights(latents[None], [clip.name], arm)[0]
        speed = FAST if clip_is_fast(clip.name) else SLOW
        by_caption.setdefault(clip.captions[0], []).append((latents, weights, speed))
    prompts, _ = video_captions(arm, count)
    speeds = [0.0] * count
    for text, members in by_caption.items():
        numbers = [number for number, prompt in enumerate(prompts) if prompt == text]
        if not numbers:
            continue
        # In float64: at low sigmas the exponents are in the thousands.
        clips = torch.stack([latents for latents, _, _ in members]).double()
        weights = torch.stack([weights for _, weights, _ in members]).double()
        noise = []
        for number in numbers:
            generator = torch.Generator().manual_seed(noise_seeds(seed, count)[number])
            noise.append(torch.randn(clips.shape[1:], generator=generator).double())
        latents = sample_minimizer(torch.stack(noise), scheduler, clips, weights)
        nearest = torch.cdist(latents.flatten(1), clips.flatten(1)).argmin(dim=1)
        for number, clip in zip(numbers, nearest.tolist(), strict=True):
            speeds[number] = members[clip][2]
    return speeds


# --- One run ---------------------------------------------------------------------------------------------------------


def run_flags(args: argparse.Namespace, arm: Arm, seed: int, folder: Path) -> list[str]:
    """Return the command line of `train_ltd.py` for one run."""
    own = {
        "train_data_dir": args.output_dir / "clips" / f"{arm.table}.jsonl",
        "caption_column": arm.captions,
        "loss": "ltd" if arm.power else "mse",  # the nearest name: what is computed is `arm_loss`
    }
    return command_line(TILT | common_flags(args, seed, folder) | own)


def load_data(run_args: argparse.Namespace, accelerator: Accelerator) -> dict[str, train_ltd.LatentDataset]:
    """Load an arm's clips and the held-out ones, as `ablation.held_out_errors` wants them."""
    clips, _, captions = train_ltd.prepare_data(run_args, accelerator)
    table = Path(run_args.train_data_dir).with_name("held_out.jsonl")
    held_out, _, more_captions = train_ltd.prepare_data(changed(run_args, train_data_dir=str(table)), accelerator)
    captions |= more_captions
    return {
        "clips": train_ltd.LatentDataset(clips, captions, run_args),
        "held_out": train_ltd.LatentDataset(held_out, captions, run_args),
    }


def build_scheduler() -> UniPCMultistepScheduler:
    """Load the nano Wan's scheduler with the shift that all videos are sampled with."""
    return UniPCMultistepScheduler.from_pretrained(
        NANO["pretrained_model_name_or_path"], subfolder="scheduler", flow_shift=SAMPLING_SHIFT
    )


def score_video(video: np.ndarray, text: str) -> list[float]:
    """Return net speed (px a frame), direction error (degrees), persistence and background drift of a video.

    `video` is uint8 `(F, H, W, 3)`; `text` is a caption with a speed word, of which the word is not used. The net
    speed is the slope of the sprite's position over time, NaN where it is seen in too few frames.
    """
    words = parse_caption(text)["sprites"][0]
    masks, foreground = soft_masks(video, [words])
    position, _, radius = track(masks[0])
    area = np.nan_to_num(math.pi * radius**2)
    present = area > AREA_SEEN * math.pi * asked_sprite(words).radius ** 2
    seen = np.flatnonzero(present)
    speed = math.nan
    error = math.nan
    if len(seen) >= FEWEST_SIGHTS:
        slope = np.polyfit(seen, position[seen], 1)[0]  # (2,)
        speed = float(np.linalg.norm(slope))
        error = direction_error(position, seen, words)
    drift = background_drift(video, foreground, pan="")
    return [speed, error, float(present.mean()), drift]


def score_videos(transformer: torch.nn.Module, arm: Arm, seed: int, count: int, guidance: float) -> list[list]:
    """Generate and score `count` videos of a run: rows of `score_video`, rounded, None for NaN."""
    base = NANO["pretrained_model_name_or_path"]
    pipeline = WanPipeline.from_pretrained(base, transformer=None, dtype=torch.float32)
    pipeline.register_modules(transformer=transformer, scheduler=build_scheduler())
    prompts, asked = video_captions(arm, count)
    videos = generate(pipeline, prompts, noise_seeds(seed, count), **SAMPLING | {"guidance_scale": guidance})
    rows = []
    for video, text in zip(videos, asked, strict=True):
        row = [round(value, 4) for value in score_video(video, text)]
        rows.append([None if math.isnan(value) else value for value in row])
    return rows


def run_once(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Make one line of `runs.jsonl`: train, measure held-out clips, generate and score."""
    arm = ARMS[name]
    folder = args.output_dir / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    run_args = train_ltd.parse_args(run_flags(args, arm, seed, folder))
    train_ltd.main(run_args, compute_loss=functools.partial(arm_loss, arm=arm))
    wan = train_ltd.identify_wan(run_args)
    accelerator = train_ltd.build_accelerator(run_args)
    data = load_data(run_args, accelerator)
    transformer = load_model(name, wan, run_args, accelerator.device)
    # The ground truth lies beside the clips, in the folder of the table.
    at_folder = changed(run_args, train_data_dir=args.output_dir / "clips")
    scores = held_out_errors(wan, transformer, data, accelerator, at_folder, changed(args, own_data=False))
    row = {"arm": name, "seed": seed, "settings": settings(args), "scores": without_nan(scores)}
    row["videos"] = score_videos(transformer, arm, seed, args.num_videos, SAMPLING["guidance_scale"])
    if name in GUIDED_ARMS and args.guided_videos:
        row["guided"] = score_videos(transformer, arm, seed, args.guided_videos, GUIDANCE)
    if not args.keep_weights:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def settings(args: argparse.Namespace) -> dict:
    """Return what all lines of one folder must share."""
    base = Path(NANO["pretrained_model_name_or_path"])
    weights = (base / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    clips = TILT_CLIPS | {
        "rows_a_clip": ROWS_A_CLIP,
        "directions": TILT_DIRECTIONS,
        "speeds": TILT_SPEEDS,
        "middle": MIDDLE,
    }
    shared = TILT | {
        "pretrained_model_name_or_path": str(base.relative_to(ROOT)),
        "transformer_sha256": hashlib.sha256(weights).hexdigest(),
        "clips": clips,
        "sampling": SAMPLING | {"flow_shift": SAMPLING_SHIFT, "guided": GUIDANCE},
        "steps": args.steps,
        "num_videos": args.num_videos,
    }
    return json.loads(json.dumps(shared))


# --- Results ---------------------------------------------------------------------------------------------------------


def video_metrics(rows: list[list]) -> dict[str, float]:
    """Average the rows of `score_video` of a run's videos; predicted rows hold nothing but a speed."""
    columns = np.array(rows, dtype=np.float64).T  # None is NaN; (4 or 1, N)
    speeds = columns[0][np.isfinite(columns[0])]
    if not len(speeds):
        return {}
    scores = {
        "videos/speed": float(speeds.mean()),
        "videos/share_fast": float((speeds > FAST_SPEED).mean()),
        "videos/share_between": float(((speeds > BETWEEN[0]) & (speeds < BETWEEN[1])).mean()),
    }
    for name, column in zip(("direction_error", "persistence", "background_drift"), columns[1:], strict=False):
        if np.isfinite(column).any():
            scores[f"videos/{name}"] = float(np.nanmean(column))
    return scores


def scored(lines: list[dict], key: str) -> list[dict]:
    """Return lines whose `scores` hold the metrics of the videos under `key`, for `ablation.contrast`."""
    result = []
    for line in lines:
        if key in line:
            scores = line.get("scores", {}) | video_metrics(line[key])
            result.append({"arm": line["arm"], "seed": line["seed"], "scores": scores})
    return result


def differences_by_seed(lines: list[dict], arm: str, control: str) -> dict[int, tuple[float, float]]:
    """Return the mean difference in speed of videos that start from the same noise, and its standard error, a seed."""
    speeds = {arm: {}, control: {}}
    for line in lines:
        if line["arm"] in speeds:
            speeds[line["arm"]][line["seed"]] = np.array([row[0] for row in line["videos"]], dtype=np.float64)
    result = {}
    for seed in sorted(speeds[arm].keys() & speeds[control].keys()):
        difference = speeds[arm][seed] - speeds[control][seed]
        difference = difference[np.isfinite(difference)]
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        result[seed] = (float(difference.mean()), float(error))
    return result


def gate(runs: list[dict]) -> dict:
    """Say whether plain MSE's speeds have two modes and the share of fast is near a half, over all seeds."""
    rows = []
    for run in runs:
        if run["arm"] == "mse":
            rows += run["videos"]
    scores = video_metrics(rows) if rows else {}
    if not scores:
        return {}
    near_half = abs(scores["videos/share_fast"] - 0.5) <= GATE_SHARE
    two_modes = scores["videos/share_between"] <= GATE_BETWEEN
    return {
        "share_fast": scores["videos/share_fast"],
        "share_between": scores["videos/share_between"],
        "passed": near_half and two_modes,
    }


def words_check(runs: list[dict]) -> list[float]:
    """Return by how much more `ltd` adds to the speed of plain MSE without speed words than with them."""
    without = differences_by_seed(runs, "ltd", "mse")
    named = differences_by_seed(runs, "ltd_words", "mse_words")
    seeds = sorted(without.keys() & named.keys())
    return confidence(np.array([without[seed][0] - named[seed][0] for seed in seeds]))


def guidance_adds(runs: list[dict]) -> dict[str, list[float]]:
    """Return what guidance adds to the mean speed and the share of fast of plain MSE's videos, at equal noise."""
    added = {"videos/speed": [], "videos/share_fast": []}
    for run in runs:
        if run["arm"] == "mse" and run.get("guided"):
            guided = video_metrics(run["guided"])
            plain = video_metrics(run["videos"][: len(run["guided"])])
            if guided and plain:  # of videos in which the sprite is seen
                for metric, values in added.items():
                    values.append(guided[metric] - plain[metric])
    return {metric: confidence(np.array(values)) for metric, values in added.items()}


def summarize(runs: list[dict], predictions: list[dict]) -> dict:
    """Compute everything in `results.json` from the lines of both files."""
    measured = scored(runs, "videos")
    guided = scored(runs, "guided")
    predicted = scored(predictions, "videos")
    results = {
        "settings": (runs or predictions)[0]["settings"],
        "questions": {name: arm.question for name, arm in ARMS.items()},
        "gate": gate(runs),
        "arms": {},
    }
    for name in ARMS:
        results["arms"][name] = {
            "measured": means(measured, name),
            "predicted": means(predicted, name),
            "guided": means(guided, name),
        }
    results["contrasts"] = []
    for name, control in CONTROLS.items():
        for metric in CONTRASTED:
            row = contrast(measured, name, control, metric)
            del row["relative"]  # a share may be zero
            row["by_seed"] = {}
            row["predicted"] = contrast(predicted, name, control, metric)["difference"]
            row["guided"] = contrast(guided, name, control, metric)["difference"]
            if metric == PRIMARY_METRIC:
                row["by_seed"] = differences_by_seed(runs, name, control)
            if not (metric == PRIMARY_METRIC and name in PRIMARY_ARMS):
                del row["p"]  # it would invite to pick the smallest of many
            results["contrasts"].append(row)
    tested = [row for row in results["contrasts"] if "p" in row]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    results["words_check"] = words_check(runs)
    results["guidance_adds"] = guidance_adds(runs)
    results["borne_out"] = borne_out(results)
    return results


def means(lines: list[dict], arm: str) -> dict[str, list[float]]:
    """Return mean and 95 % interval over seeds of each metric of an arm."""
    rows = [line["scores"] for line in lines if line["arm"] == arm]
    result = {"seeds": len(rows)}
    for metric in METRICS:
        values = [row[metric] for row in rows if row.get(metric) is not None]
        result[metric] = confidence(np.array(values))
    return result


def borne_out(results: dict) -> bool | None:
    """Say whether the third power is faster and the inverse slower than plain MSE, beyond the smallest effect."""
    intervals = {}
    for row in results["contrasts"]:
        if row["metric"] == PRIMARY_METRIC and row["control"] == "mse":
            intervals[row["arm"]] = row["difference"]
    _, low, _ = intervals["ltd_cubed"]
    _, _, high = intervals["ltd_inverse"]
    if math.isnan(low) or math.isnan(high):
        return None
    return low > SMALLEST_EFFECT and high < -SMALLEST_EFFECT


# --- Table and picture -----------------------------------------------------------------------------------------------


def bracketed(values: list[float], digits: int = 3, sign: str = "+") -> str:
    """Write `[mean, low, high]` as "mean (low to high)"; the bounds are left out where there are none."""
    mean, low, high = values
    if math.isnan(mean):
        return "-"
    text = f"{mean:{sign}.{digits}f}"
    if not math.isnan(low):
        text += f" ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"
    return text


def contrasts_table(results: dict) -> list[str]:
    """Write the differences in mean speed, measured beside predicted."""
    cells = ["speed", "seeds", "measured (95 % CI)", "predicted", "p", "p (Holm)", "a seed (SE over videos)"]
    lines = table_head(cells)
    for row in results["contrasts"]:
        if row["metric"] != PRIMARY_METRIC or not row["seeds"]:
            continue
        seeds = [f"{mean:+.3f} ({error:.3f})" for mean, error in row["by_seed"].values()]
        tests = ["", ""]
        if "p" in row:
            tests = [p_value(row["p"]), p_value(row["p_holm"])]
        lines.append(
            table_line(
                [
                    f"{row['arm']} - {row['control']}",
                    str(row["seeds"]),
                    bracketed(row["difference"]),
                    f"{row['predicted'][0]:+.3f}",
                    *tests,
                    ", ".join(seeds),
                ]
            )
        )
    return lines


def arms_table(results: dict) -> list[str]:
    """Write the means of every arm that has run or been predicted."""
    names = [metric.split("/")[1] for metric in METRICS]
    lines = ["", *table_head(["arm", "seeds", "predicted speed", "predicted share_fast", *names])]
    for name, arm in results["arms"].items():
        measured = arm["measured"]
        cells = [name, str(measured["seeds"])]
        for metric in ("videos/speed", "videos/share_fast"):
            cells.append(bracketed(arm["predicted"][metric][:1] + [math.nan] * 2, sign=""))
        for metric in METRICS:
            cells.append(bracketed(measured[metric], sign=""))
        lines.append(table_line(cells))
    return lines


def checks_table(results: dict) -> list[str]:
    """Write what the plan asks besides: the gate, speed words, the known weight, guidance."""
    lines = ["", *table_head(["check", "value"])]
    found = results["gate"]
    if found:
        verdict = "passed" if found["passed"] else "not passed"
        text = f"{found['share_fast']:.1%} fast, {found['share_between']:.1%} between the modes: {verdict}"
        lines.append(table_line(["gate: speeds of plain MSE", text]))
    lines.append(table_line(["ltd - mse without speed words, less that with them", bracketed(results["words_check"])]))
    for row in results["contrasts"]:
        pair = f"{row['arm']} - {row['control']}"
        if row["arm"] == "fast_repeated" and row["metric"] == "videos/share_fast":
            lines.append(table_line([f"{pair}, share of fast", bracketed(row["difference"])]))
        if row["arm"] in GUIDED_ARMS and row["metric"] == PRIMARY_METRIC:
            lines.append(table_line([f"{pair} at guidance {GUIDANCE:g}, speed", bracketed(row["guided"])]))
    for metric, values in results["guidance_adds"].items():
        lines.append(table_line([f"guidance {GUIDANCE:g} itself adds to mse, {metric}", bracketed(values)]))
    verdict = {True: "yes", False: "no", None: "not decided yet"}[results["borne_out"]]
    lines.append(table_line(["ltd_cubed faster and ltd_inverse slower, beyond the smallest effect", verdict]))
    return lines


def write_table(results: dict) -> str:
    """Write Markdown: differences in speed, means of all arms, checks."""
    lines = contrasts_table(results) + arms_table(results) + checks_table(results)
    return "\n".join(lines) + "\n"


def draw(results: dict, runs: list[dict], path: Path) -> None:
    """Draw the speeds of four arms, and beside them the differences to plain MSE, predicted and measured."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    bins = np.arange(0, 3.01, 0.1)
    colors = {"ltd_inverse": "#0072B2", "mse": "#555555", "ltd": "#E69F00", "ltd_cubed": "#D55E00"}
    for name, color in colors.items():
        speeds = []
        for run in runs:
            if run["arm"] == name:
                speeds += [row[0] for row in run["videos"] if row[0] is not None]
        if speeds:
            share = np.full(len(speeds), 1 / len(speeds))
            left.hist(speeds, bins, weights=share, histtype="step", color=color, label=name)
            left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.36, 1))  # between the two modes
    left.set_xlabel("net speed of a video, px a frame", fontsize=8)
    left.set_ylabel("share of videos", fontsize=8)
    names = []
    for row in results["contrasts"]:
        if row["metric"] != PRIMARY_METRIC or math.isnan(row["predicted"][0]):
            continue
        height = -len(names)
        mean, low, high = row["difference"]
        right.plot(row["predicted"][0], height, "o", color="black", fillstyle="none")
        right.plot([low, high], [height, height], color="#D55E00", linewidth=2)
        right.plot(mean, height, "o", color="#D55E00", markersize=4)
        names.append(f"{row['arm']} - {row['control']}")
    right.set_yticks(range(0, -len(names), -1), names, fontsize=8)
    right.axvline(0, color="black", linewidth=0.8)
    right.grid(axis="x", alpha=0.3)
    label = "difference in mean speed, px a frame\nopen: predicted; filled: measured, 95 % CI over seeds"
    right.set_xlabel(label, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- The command -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/tilt"), help="where everything is written")
    add("--record_dir", type=Path, help="where lines and report are kept (default: OUTPUT_DIR)")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="in this order (default: all)")
    add("--seeds", type=int, default=4, help="runs of each arm")
    add("--first_seed", type=int, default=0, help="for several processes that share the seeds")
    add("--steps", type=int, default=500, help="updates of a run")
    add("--num_videos", type=int, default=192, help="videos generated a run")
    add("--guided_videos", type=int, default=96, help="and with guidance, in two arms")
    add("--predict_only", action="store_true", help="predict, and run nothing")
    add("--report_only", action="store_true", help="make the report from what is there")
    add("--keep_weights", action="store_true", help="do not delete a run's folder after scoring")
    return parser


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Exits for what cannot work."""
    parser = build_parser()
    args = parser.parse_args(input_args)
    if args.seeds < 1 or args.steps < 1 or args.num_videos < 1:
        parser.error("--seeds, --steps and --num_videos must be at least 1")
    if not 0 <= args.guided_videos <= args.num_videos:
        parser.error(f"--guided_videos must be from 0 to --num_videos, {args.num_videos}")
    args.record_dir = args.record_dir or args.output_dir
    return args


def append(path: Path, row: dict) -> None:
    """Append a line to a file, on a line of its own even after one that was cut short."""
    with open(path, "a") as file:
        file.write("\n" + json.dumps(row) + "\n")


def missing(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield the arms and seeds that have no line in a file yet: arms outside, in the order of the plan."""
    for name in args.arms:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            finished = [(line["arm"], line["seed"]) for line in read_runs(path)]  # other processes write there too
            if (name, seed) not in finished:
                yield name, seed


def predict_missing(path: Path, args: argparse.Namespace) -> None:
    """Make the predictions that are not there yet."""
    scheduler = build_scheduler()
    for name, seed in missing(path, args):
        arm = ARMS[name]
        folder = args.output_dir / "predictions"
        run_args = train_ltd.parse_args(run_flags(args, arm, seed, folder))
        folder.mkdir(exist_ok=True)
        data = load_data(run_args, train_ltd.build_accelerator(run_args))
        speeds = predict(arm, seed, data["clips"], scheduler, args.num_videos)
        row = {"arm": name, "seed": seed, "settings": settings(args), "videos": [[speed] for speed in speeds]}
        append(path, row)


def main(args: argparse.Namespace) -> None:
    """Make the predictions and runs that are missing, and the report of all.

    Raises `ValueError` for lines of other settings in the folder, and when there is none to report.
    """
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.record_dir.mkdir(parents=True, exist_ok=True)
    runs_path = args.record_dir / "runs.jsonl"
    predictions_path = args.record_dir / "predictions.jsonl"
    if not args.report_only:
        for path in (runs_path, predictions_path):
            if any(line["settings"] != settings(args) for line in read_runs(path)):
                raise ValueError(f"{path} holds lines of other settings; choose another --output_dir")
        write_clips(args.output_dir / "clips", TILT_CLIPS)
        predict_missing(predictions_path, args)
        if not args.predict_only:
            for name, seed in missing(runs_path, args):
                append(runs_path, run_once(name, seed, args))
                report(args.record_dir)
    report(args.record_dir)


def report(folder: Path) -> None:
    """Write `results.json`, `table.md` and `tilt.png` from a folder's lines. Raises `ValueError` without any."""
    runs = read_runs(folder / "runs.jsonl")
    predictions = read_runs(folder / "predictions.jsonl")
    if not runs and not predictions:
        raise ValueError(f"{folder} holds no finished run and no prediction")
    if not all(line.get("videos") for line in runs + predictions):
        raise ValueError(f"{folder} holds lines of another experiment; give the folder of this one")
    results = summarize(runs, predictions)
    table = write_table(results)
    text = json.dumps(without_nan(results), indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n")
    (folder / "table.md").write_text(table)
    draw(results, runs, folder / "tilt.png")
    print(table)


if __name__ == "__main__":
    train_ltd.run_script(main, parse_args)
