"""Pictures of the Latent Temporal Discrepancy (LTD), after Figs. 1 and 3 of https://huggingface.co/papers/2601.20504.

report: how much the clips of a dataset move, the stillest, the wildest, suspected cuts. Needs no model but the VAE.
curves: LTD and error over latent frames (Fig. 3), of the base and of each tuned model given.
maps: video, ln(e + D), noise prediction and squared error of one clip (Fig. 1), as a strip, an mp4 and an animation.

    python examples/visualize_ltd.py report --train_data_dir my_clips --output_dir my_lora
    python examples/visualize_ltd.py curves --train_data_dir my_clips --output_dir my_lora --lora my_lora
    python examples/visualize_ltd.py maps --video dog.mp4 --prompt "a dog jumps over a fence" --lora my_lora
    python examples/visualize_ltd.py maps --latents latents.safetensors --ltd_only  # without any model

The report also filters: a table of the clips that move enough and have no cut, to train on instead of the folder.

    python examples/visualize_ltd.py report --train_data_dir my_clips --output_dir my_lora \\
        --write_metadata my_clips/kept.jsonl --min_ltd 0.2 --drop_cuts
    accelerate launch -q train_ltd.py --train_data_dir my_clips/kept.jsonl --output_dir my_lora

All flags of train_ltd.py can be given as well, `--config` too. With those of a training run its cache is read, and
what is encoded here training finds there. Videos of base and tuned models (Fig. 5): examples/generate.py --compare.
"""

import argparse
import functools
import itertools
import json
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node
from diffusers import WanTransformer3DModel
from diffusers.training_utils import free_memory
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from safetensors import SafetensorError, safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train_ltd.py is a script in the repository's root, not an installed module

from videos import labelled_row, write_animation, write_video

import train_ltd
from ltd_loss import latent_temporal_discrepancy

WIDTH = 8  # inches
DPI = 100  # pixels an inch: a README shows 800 px
# Okabe and Ito's colors, which the color-blind can tell apart, without the yellow, too light for a line
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLUMNS = 5  # pictures side by side
VIDEO_WIDTH = 400  # pixels of each row in the mp4
MOST_TUNED = {"curves": len(COLORS) - 1, "maps": 1}  # models that a picture has room for
MIN_COVERED = 0.95  # of the clips, by the sizes that are proposed
MAX_CROPPED = 0.1  # of a picture, by its size
FEWEST_BINS = 20  # of the histogram
STRENGTHS = (0, 1, 3)  # of the weight: plain MSE, the paper's, and one that leans to motion
FRAME_PICTURES = 4  # of the video in a latent frame; the first holds one alone


# --- Arguments -------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags that train_ltd.py does not have."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = train_ltd.FlagParser(description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", required=True)
    style["epilog"] = "All flags of train_ltd.py can be given as well; see its --help."

    report = commands.add_parser(
        "report", help="histogram of LTD, stillest and wildest clips, suspected cuts", **style
    )
    add = report.add_argument
    add("--write_metadata", type=Path, metavar="KEPT.JSONL", help="write a table of the clips to train on")
    add("--min_ltd", type=float, help="keep no clip in it whose mean LTD is below this")
    add("--max_ltd", type=float, help="keep no clip in it whose mean LTD is above this")
    add("--drop_cuts", action="store_true", help="keep no clip in it in which a hard cut is suspected")

    curves = commands.add_parser("curves", help="Fig. 3: LTD and error over latent frames", **style)
    maps = commands.add_parser("maps", help="Fig. 1: video, LTD, noise prediction, squared error", **style)
    for command in (curves, maps):
        add = command.add_argument
        add("--lora", action="append", default=[], help="tuned: LoRA (file, folder or Hub id) on the base; repeatable")
        add("--transformer", action="append", default=[], help="tuned: a fine-tune in the base's place; repeatable")
    text = "noise level in (0, 1), where 1 would be pure noise (default: "
    curves.add_argument("--sigma", type=float, nargs="+", help=text + "those of training's held-out errors)")
    maps.add_argument("--sigma", type=float, nargs=1, help=text + "the middle of what is trained)")
    source = maps.add_mutually_exclusive_group(required=True)
    source.add_argument("--video", help="clip, cut to size as for training: --height, --width, --num_frames, --fps")
    source.add_argument("--latents", help="safetensors with normalized `latents`, (C, F, H, W) or (B, C, F, H, W)")
    maps.add_argument("--prompt", default="", help="caption of the clip")
    maps.add_argument("--ltd_only", action="store_true", help="leave out what needs a transformer")
    return parser


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the flags of this script and all those of train_ltd.py into one namespace.

    Raises `ValueError` for what train_ltd.py refuses; argparse itself exits with 2.
    """
    parser = build_parser()
    own, rest = parser.parse_known_args(input_args)
    if own.command == "report":
        filters = own.drop_cuts or own.min_ltd is not None or own.max_ltd is not None
        if filters and not own.write_metadata:
            parser.error("--min_ltd, --max_ltd and --drop_cuts need --write_metadata, the table that they filter")
    else:
        most = MOST_TUNED[own.command]
        if len(own.lora) + len(own.transformer) > most:
            parser.error(f"{own.command} takes at most {most} of --lora and --transformer")
        if not all(0 < sigma < 1 for sigma in own.sigma or []):
            parser.error(f"--sigma must lie in (0, 1), got {own.sigma}")
    if own.command == "maps":
        path = own.video or own.latents
        if not Path(path).is_file():
            flag = "--video" if own.video else "--latents"
            parser.error(f"{flag} {path} is not a file")
        rest.append(f"--train_data_dir={path}")  # the clip is all the data there is
        rest.append(f"--validation_prompt={own.prompt}")  # which cleans it, and puts the trigger word before it
    args = train_ltd.parse_args(rest)
    if len(args.sources) > 1 and own.command != "maps":
        parser.error("give one --train_data_dir or --dataset_name; look at several sources one by one")
    vars(args).update(vars(own))
    return args


def changed(args: argparse.Namespace, **values) -> argparse.Namespace:
    """Return a copy of the arguments with other values."""
    return argparse.Namespace(**vars(args) | values)


# --- Models ----------------------------------------------------------------------------------------------------------


def with_lora(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """Return a copy of the arguments with a finished LoRA, which brings its own rank, alpha and modules."""
    return changed(args, init_lora=name, rank=None, lora_alpha=None, lora_target_modules=None)


def check_models(args: argparse.Namespace):
    """Return the `Wan` of the base, and refuse tuned models that do not fit before anything is encoded.

    Settles `--sigma`. Raises `ValueError` for what is no Wan text-to-video model, and for what is no LoRA of it.
    """
    wan = train_ltd.identify_wan(args)
    if not args.sigma:
        args.sigma = train_ltd.eval_sigmas(args)
        if args.command == "maps":
            args.sigma = [(args.min_sigma + args.max_sigma) / 2]
    for name in args.transformer:
        train_ltd.identify_wan(changed(args, transformer_path=name))
    for name in args.lora:
        with torch.device("meta"):
            transformer = WanTransformer3DModel.from_config(read_config(args))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # weights that are copied to the meta device are lost
                train_ltd.add_lora(transformer, with_lora(args, name))
        except Exception as error:  # of any file, and of the Hub
            reason = str(error).removeprefix(f"--init_lora {name} cannot be used: ")
            reason = textwrap.shorten(reason, 300)  # else torch lists every weight
            raise ValueError(f"--lora {name} cannot be used: {reason}") from error
    return wan


def read_config(args: argparse.Namespace) -> dict:
    """Read the configuration of the transformer that LoRAs are put on. A single file has that of the base."""
    path = args.transformer_path
    if not path or path.endswith(".safetensors"):
        return WanTransformer3DModel.load_config(
            args.pretrained_model_name_or_path, subfolder="transformer", revision=args.revision
        )
    try:
        return WanTransformer3DModel.load_config(path, subfolder="transformer")
    except OSError:
        return WanTransformer3DModel.load_config(path)


def load_model(
    args: argparse.Namespace, wan, device: torch.device, lora: str = "", transformer: str = ""
) -> WanTransformer3DModel:
    """Load the base, `lora` on it, or `transformer` in its place. Raises `ValueError` when the LoRA does not fit."""
    if transformer:
        args = changed(args, transformer_path=transformer)
    model = train_ltd.load_transformer(args, wan)
    if lora:
        train_ltd.add_lora(model, with_lora(args, lora))
    return model.to(device).eval()


# --- maps: Fig. 1 ----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of Fig. 1: pictures `(N, H, W, 3)` in [0, 1], or values `(F, h, w)` and their colors."""

    label: str
    values: np.ndarray
    colors: ScalarMappable | None = None
    over_video: bool = False


def read_latents(path: str) -> torch.Tensor:
    """Read latents `(C, F, H, W)` float32: the first clip of a batch, or those of an entry of the training cache.

    Raises `ValueError` for a file that has none of this shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if "latents" not in file.keys():
                raise ValueError(f"--latents {path} has no tensor `latents`, but {', '.join(file.keys())}")
            latents = file.get_tensor("latents").float()
    except SafetensorError as error:
        raise ValueError(f"--latents {path} is not a safetensors file: {error}") from error
    if latents.ndim == 5:
        return latents[0]
    if latents.ndim != 4:
        raise ValueError(f"--latents {path}: (C, F, H, W) or (B, C, F, H, W) is needed, got {tuple(latents.shape)}")
    return latents


def picture_latents(latents: torch.Tensor) -> np.ndarray:
    """Draw latents `(C, F, H, W)` in gray by their main component: `(F, H, W, 3)` in [0, 1]."""
    gray = main_component(latents, latents)
    low, high = np.quantile(gray, [0.01, 0.99])
    gray = (gray - low) / max(high - low, 1e-6)
    return gray.clip(0, 1)[..., None].repeat(3, axis=-1)


def encode_video(args: argparse.Namespace, wan, device: torch.device) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Read `--video` as training does: its tensors, and pictures `(N, H, W, 3)` float32 in [0, 1].

    Raises `ValueError` for what is no video, or too short a one.
    """
    size = (args.num_frames, args.height, args.width)
    try:
        frames = train_ltd.read_clip(args.video, size, args.fps)[0][0]  # (N, 3, H, W)
    except (OSError, ValueError, av.FFmpegError) as error:
        reason = train_ltd.describe_fault(error)
        raise ValueError(f"--video {args.video}: {reason}; see --num_frames and --fps") from error
    vae = train_ltd.load_vae(args, device)
    encoder = None
    if wan.image_embeds and not args.ltd_only:
        encoder = train_ltd.load_image_encoder(args, device)
    tensors = train_ltd.encode_clip(vae, frames, wan.first_frame == "channels", encoder)
    pictures = frames.permute(0, 2, 3, 1).numpy() / np.float32(255)
    return {name: tensor.cpu() for name, tensor in tensors.items()}, pictures


@torch.no_grad()
def predict_noise(wan, transformer: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return Eq. 1's noise prediction, `(B, C, F, H, W)` float32, which a flow model gives as z_t + (1 - sigma) v.

    z_t is the noisy latents and v the predicted flow from clip to noise. `batch` holds `latents`, `noise`, `sigmas`,
    `prompt_embeds`, and what image-to-video takes besides. The squared error of the noise is (1 - sigma)^2 times that
    of the flow.
    """
    sigmas = batch["sigmas"].view(-1, 1, 1, 1, 1)
    noisy_latents = (1 - sigmas) * batch["latents"] + sigmas * batch["noise"]
    flow = train_ltd.predict_flow(wan, transformer, noisy_latents, batch)
    return noisy_latents + (1 - sigmas) * flow.float()


def main_component(latents: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    """Project `values` `(C, F, H, W)` on the latents' first principal component over channels: `(F, H, W)`."""
    covariance = latents.flatten(1).cov()  # (C, C)
    direction = torch.linalg.eigh(covariance).eigenvectors[:, -1]
    direction = direction * direction.sum().sign()
    return torch.einsum("c,cfhw->fhw", direction, values).numpy()


def heat(values: np.ndarray, low: float, name: str) -> ScalarMappable:
    """Make colors for `(F, h, w)`, from `low` to the 99 % quantile of latent frames 2 and on.

    The first two hold the first gap, which a causal VAE inflates, and would darken all others.
    """
    later = values
    if len(values) > 2:
        later = values[2:]
    high = max(np.quantile(later, 0.99), low + 1e-6)
    return ScalarMappable(Normalize(low, high), name)


def paint(row: Row, pictures: np.ndarray, index: int) -> np.ndarray:
    """Return what a row shows at picture `index` of the video: `(H, W, 3)` in [0, 1]."""
    if row.colors is None:
        return row.values[index]
    # Latent frame 0 holds the first picture alone, each other one as many as the next (4, or 1 of a latent preview).
    frame = math.ceil(index * (len(row.values) - 1) / max(1, len(pictures) - 1))
    factor = pictures.shape[1] // row.values.shape[1]
    colors = row.colors.to_rgba(row.values[frame])[..., :3]
    colors = colors.repeat(factor, axis=0).repeat(factor, axis=1)
    if row.over_video:
        gray = pictures[index].mean(-1, keepdims=True)
        return 0.75 * colors + 0.25 * gray
    return colors


def draw_strip(rows: list[Row], title: str, fps: float, first_is_given: bool = False) -> Figure:
    """Draw latent frames spread over the clip, a column each, with the last picture of each."""
    pictures = rows[0].values
    frames = len(rows[1].values)
    chosen = np.unique(np.linspace(0, frames - 1, COLUMNS).round().astype(int))
    panel_width = (WIDTH - 1.2) / len(chosen)  # inches
    panel_height = panel_width * pictures.shape[1] / pictures.shape[2] + 0.05
    height = len(rows) * panel_height + 0.2 * (4 + title.count("\n"))
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for frame, axis in zip(chosen, line, strict=True):
            index = frame * (len(pictures) - 1) // max(1, frames - 1)
            axis.imshow(paint(row, pictures, index), vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row is rows[0]:
                given = ", given" if first_is_given and frame == 0 else ""
                axis.set_title(f"latent frame {frame}{given}\n{index / fps:.2f} s", fontsize=10)
        line[0].set_ylabel(row.label, fontsize=10)
        if row.colors:
            extend = "max" if row.colors.norm.vmin >= 0 else "both"
            figure.colorbar(row.colors, ax=list(line), aspect=10, pad=0.01, extend=extend)
    return figure


def video_frames(rows: list[Row]) -> np.ndarray:
    """Draw all pictures with the rows side by side: `(N, H, W, 3)` uint8 of even H and W."""
    pictures = rows[0].values
    height = round(VIDEO_WIDTH * pictures.shape[1] / pictures.shape[2] / 2) * 2
    labels = [row.label.replace("\n", " ") for row in rows]
    frames = []
    for index in range(len(pictures)):
        panels = []
        for row in rows:
            panel = Image.fromarray(np.uint8(255 * paint(row, pictures, index)))
            panel = panel.resize((VIDEO_WIDTH, height), Image.Resampling.BOX)  # voxels stay sharp squares
            panels.append(np.asarray(panel))
        frames.append(labelled_row(panels, labels))
    return np.stack(frames)


def predict(
    args: argparse.Namespace, wan, accelerator: Accelerator, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, np.ndarray]:
    """Predict a clip's noise at `--sigma`: `(C, F, H, W)`, and the squared error of the flow: `(F, H, W)`.

    `tensors` are those of `encode_clip`. The error is the one that training minimizes. Raises `ValueError` for latents
    that are not this model's.
    """
    caption = args.validation_prompt[-1]
    files = train_ltd.cache_captions(args, accelerator, {caption})
    tuned = {}
    if args.lora:
        tuned["lora"] = args.lora[0]
    if args.transformer:
        tuned["transformer"] = args.transformer[0]
    model = load_model(args, wan, accelerator.device, **tuned)
    latents = tensors["latents"]
    if model.config.out_channels != len(latents):
        raise ValueError(f"--latents has {len(latents)} channels, the model {model.config.out_channels}")
    generator = torch.Generator().manual_seed(args.seed)
    sample = tensors | {
        "noise": torch.randn(latents.shape, generator=generator),
        "prompt_embeds": train_ltd.LatentDataset([], files, args).load_prompt(caption),
    }
    if args.first_frame_share and wan.first_frame == "replaced":
        sample["first_frame_given"] = torch.tensor(True)
    batch = {name: tensor[None].to(accelerator.device) for name, tensor in sample.items()}
    batch["sigmas"] = torch.tensor(args.sigma, device=accelerator.device)
    with accelerator.autocast():
        noise = predict_noise(wan, model, batch)
    flow_error = (noise - batch["noise"]) / (1 - args.sigma[0])
    return noise[0].cpu(), flow_error.square().mean(dim=1)[0].cpu().numpy()


def make_maps(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Write `ltd_maps.png` of one clip, and `ltd_maps.mp4` and `ltd_maps.webp`, which move.

    With `--latents` their main component stands for the video; it is also what is shown of the noise prediction.
    """
    # What can be refused is refused first. Latents need no model, unless noise is to be predicted.
    wan = None
    if not args.ltd_only:
        wan = check_models(args)
    elif args.video:
        wan = train_ltd.identify_wan(args)
    if args.latents:
        if wan and wan.first_frame == "channels":
            raise ValueError("--latents: an image-to-video model is given the picture too; give --video")
        latents = read_latents(args.latents)
        tensors = {"latents": latents}
        pictures = picture_latents(latents)
        fps = (args.fps or 16.0) / FRAME_PICTURES  # no model is asked, and 16 is the rate of most
        label = "latents"
    else:
        tensors, pictures = encode_video(args, wan, accelerator.device)
        latents = tensors["latents"]
        fps = args.fps
        label = "video"

    ltd = latent_temporal_discrepancy(latents[None])[0]  # (F, H, W)
    ltd = torch.log(math.e + ltd).numpy()
    rows = [Row(label, pictures), Row("ln(e + D)", ltd, heat(ltd, 1, "magma"), over_video=True)]
    name = f"“{args.prompt}”"
    if not args.prompt:
        name = Path(args.video or args.latents).name
    spread = f"{ltd.min():.2f} to {ltd.max():.2f}, mean {ltd.mean():.2f}"
    lines = [name, f"ln(e + D): {spread} (frames 0 and 1 hold the VAE's inflated first gap)"]
    if args.first_frame_share:
        lines.append("image-to-video: latent frame 0 is given, and its weight falls on what the model is told")
    if not args.ltd_only:
        noise, error = predict(args, wan, accelerator, tensors)
        colors = ScalarMappable(Normalize(-3, 3), "gray")
        rows.append(Row("noise\nprediction", main_component(latents, noise), colors))
        rows.append(Row("squared\nerror", error, heat(error, 0, "viridis")))
        model = [*args.lora, *args.transformer, args.pretrained_model_name_or_path][0]
        settings = f"sigma {args.sigma[0]:g}, noise of seed {args.seed}"
        lines.append(f"{model}: {settings}, mean squared error of the flow {error.mean():.3f}")

    folder = Path(args.output_dir)
    title = "\n".join(textwrap.fill(line, 100) for line in lines)
    draw_strip(rows, title, fps, first_is_given=bool(args.first_frame_share)).savefig(folder / "ltd_maps.png")
    frames = video_frames(rows)
    write_video(frames, folder / "ltd_maps.mp4", fps)
    write_animation(frames, folder / "ltd_maps.webp", fps)
    print(f"wrote {folder}/ltd_maps.png, ltd_maps.mp4 and ltd_maps.webp")


# --- curves: Fig. 3 --------------------------------------------------------------------------------------------------


def frame_errors(prediction: torch.Tensor, target: torch.Tensor, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """Measure, for `train_ltd.evaluate`, the squared error of each latent frame, `(F,)`."""
    error = (prediction.float() - target.float()).square()  # (1, C, F, H, W)
    return {"frames": error.mean(dim=(0, 1, 3, 4))}


def error_per_frame(
    args: argparse.Namespace, wan, model: torch.nn.Module, dataset: train_ltd.LatentDataset, accelerator: Accelerator
) -> np.ndarray:
    """Measure the first `--max_eval_clips` clips as training does, averaged over `--sigma`: `(clips, F)`."""
    bounds = dataset.motion_bounds(accelerator.device)
    with accelerator.autocast():
        rows = train_ltd.evaluate(
            wan, model, dataset, bounds, accelerator, args, sigmas=args.sigma, measure=frame_errors
        )
    errors = torch.stack([row["frames"] for row in rows])
    errors = errors.unflatten(0, (-1, len(args.sigma)))  # (clips, sigmas, F): the rows are sorted so
    return errors.mean(dim=1).numpy()


def draw_lines(axes: Axes, lines: dict[str, np.ndarray], quantity: str) -> None:
    """Draw values `(clips, F)` over latent frames: their mean as a line, their middle half as a band."""
    for color, (name, values) in zip(COLORS, lines.items(), strict=False):
        low, high = np.quantile(values, [0.25, 0.75], axis=0)
        axes.fill_between(np.arange(len(low)), low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(values.mean(axis=0), color=color, marker=".", label=name)
    axes.set_xlabel("latent frame (0: one picture, then four each)")
    axes.set_ylabel(f"{quantity}, mean over voxels")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_curves(ltd: np.ndarray, errors: dict[str, np.ndarray], title: str) -> Figure:
    """Draw LTD on the left and the error of each model on the right, all `(clips, F)`."""
    figure = Figure(figsize=(WIDTH, 3.4 + 0.2 * len(errors)), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    draw_lines(left, {"LTD": ltd}, "LTD")
    draw_lines(right, errors, "squared error")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center")
    return figure


def make_curves(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Write `ltd_curves.png` and its numbers, `ltd_curves.json`; of held-out clips if training leaves any."""
    wan = check_models(args)
    clips, held_out, captions = train_ltd.prepare_data(args, accelerator, wan=wan)
    shown = (held_out or clips)[: args.max_eval_clips]
    # TI2V-5B is measured from text: the error of a frame that it is given would mean nothing.
    dataset = train_ltd.LatentDataset(shown, captions, changed(args, first_frame_share=None))
    ltd = np.array([clip.ltd_per_frame for clip in shown])
    numbers = {
        "clips": [clip.name for clip in shown],
        "held_out": bool(held_out),
        "sigma": args.sigma,
        "seed": args.seed,
        "base": args.pretrained_model_name_or_path,
        "ltd": ltd.tolist(),
        "mse": {},
    }
    models = {"base": {}}
    for name in args.lora:
        models[name] = {"lora": name}
    for name in args.transformer:
        models[name] = {"transformer": name}
    folder = Path(args.output_dir)
    errors = {}
    for name, tuned in models.items():
        model = load_model(args, wan, accelerator.device, **tuned)
        errors[name] = error_per_frame(args, wan, model, dataset, accelerator)
        del model
        free_memory()
        numbers["mse"][name] = errors[name].tolist()
        (folder / "ltd_curves.json").write_text(json.dumps(numbers, indent=1))
        print(f"{name}: mean squared error {errors[name].mean():.4f}")
    kind = "held-out clip" if held_out else "clip"
    sigmas = ", ".join(f"{sigma:g}" for sigma in args.sigma)
    title = f"mean and middle half of {counted(len(ltd), kind)}; sigma {sigmas}; noise of seed {args.seed}"
    draw_curves(ltd, errors, title).savefig(folder / "ltd_curves.png")
    print(f"wrote {folder}/ltd_curves.png and ltd_curves.json")


# --- report ----------------------------------------------------------------------------------------------------------


def describe(clip) -> dict:
    """Say of a clip what `ltd_report.json` lists."""
    jump, frame = clip.largest_jump()
    return {
        "name": clip.name,
        "order": clip.order,
        "ltd": clip.ltd,
        "jump": jump,
        "jump_frame": frame,
        "cut_suspected": clip.cut_is_suspected(),
    }


def describe_tilt(clips: Sequence, strength: float) -> dict[str, float]:
    """Say how much of what is generated would look like the wildest and the stillest tenth of the clips.

    With one weight a clip, the loss teaches a model of the clips that counts each by its weight, where the caption
    leaves open which is meant. The weights of LTD differ within a clip: here each clip has their mean. `clips` go
    from the stillest to the wildest.
    """
    weights = []
    for clip in clips:
        # Every twentieth of the voxels, by the middle of its bounds
        weight = (1 + np.log(np.e + np.array(clip.ltd_quantiles))) ** strength
        weights.append((weight[1:] + weight[:-1]).mean() / 2)
    shares = np.array(weights) / sum(weights)
    tenth = math.ceil(len(clips) / 10)
    return {
        "strength": strength,
        "wildest_tenth": shares[-tenth:].sum(),
        "stillest_tenth": shares[:tenth].sum(),
        "effective_clips": 1 / np.square(shares).sum(),
    }


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless there is one of it."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def read_pictures(args: argparse.Namespace, clips: Iterable, indices: Iterable[int]) -> list[np.ndarray]:
    """Read for each clip the picture of that index, as training sees it: `(H, W, 3)` uint8."""
    dataset, folder = train_ltd.open_dataset(args, args.dataset_split)
    pictures = []
    for clip, index in zip(clips, indices, strict=True):
        shard, number, window = clip.order
        if isinstance(dataset, datasets.IterableDataset):
            rows = split_dataset_by_node(dataset, shard, dataset.num_shards)
            row = next(iter(rows.skip(number)))  # a stream has no other access
        else:
            row = dataset[number]
        source = train_ltd.locate_clip(row["video"], folder, args)
        frames = train_ltd.read_clip(source, clip.bucket, args.fps, args.clips_per_video)[0]
        pictures.append(frames[window, index].permute(1, 2, 0).numpy())
    return pictures


@dataclass
class Section:
    """Thumbnails `(H, W, 3)` uint8 of one size, with a label each, under a title."""

    title: str
    pictures: list[np.ndarray]
    labels: list[str]

    def lines(self) -> int:
        """Return how many lines of thumbnails there are."""
        return math.ceil(len(self.pictures) / COLUMNS)

    def height(self) -> float:
        """Return the height in inches."""
        height, width = self.pictures[0].shape[:2]
        panel = WIDTH / COLUMNS * height / width + 0.4
        return self.lines() * panel + 0.3


def section_of_ends(args: argparse.Namespace, title: str, clips: Sequence) -> Section:
    """Show the middle picture of the stillest or of the wildest clips."""
    pictures = read_pictures(args, clips, [clip.bucket.frames // 2 for clip in clips])
    labels = [f"{clip.ltd:.3f}\n{clip.name[-20:]}" for clip in clips]
    shown = f"the {len(clips)} {title} clips" if len(clips) > 1 else f"the {title} clip"
    return Section(f"{shown}, by mean LTD", pictures, labels)


def section_of_jumps(args: argparse.Namespace, clips: Sequence) -> Section:
    """Show the pictures before and after the largest jump of each clip, one above the other."""
    before = []
    after = []
    labels = []
    for clip in clips:
        jump, frame = clip.largest_jump()
        # Latent frame f ends with picture 4f: these lie on either side, wherever in frames f and f + 1 the jump is.
        last = FRAME_PICTURES * frame
        before.append(last - 3)
        after.append(last + 4)
        mark = ", a cut?" if clip.cut_is_suspected() else ""
        labels.append(f"{jump:.1f} x, {last / args.fps:.1f} s{mark}\n{clip.name[-20:]}")
    pairs = zip(read_pictures(args, clips, before), read_pictures(args, clips, after), strict=True)
    pictures = [np.vstack(pair) for pair in pairs]
    return Section("largest jumps, as multiples of the clip's median gap, before and after", pictures, labels)


def draw_report(args: argparse.Namespace, clips: Sequence) -> Figure:
    """Draw the histogram of the clips' mean LTD, above thumbnails of both ends and of the largest jumps.

    `clips` go from the stillest to the wildest.
    """
    count = min(2 * COLUMNS, math.ceil(len(clips) / 2))
    wildest = list(reversed(clips))[:count]
    sections = [section_of_ends(args, "stillest", clips[:count]), section_of_ends(args, "wildest", wildest)]
    by_jump = sorted(clips, key=lambda clip: clip.largest_jump(), reverse=True)
    jumps = [clip for clip in by_jump[:COLUMNS] if clip.largest_jump()[0]]
    if jumps:
        sections.append(section_of_jumps(args, jumps))

    heights = [2.6, *(section.height() for section in sections)]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    top, *others = figure.subfigures(len(heights), 1, height_ratios=heights)
    axes = top.subplots()
    values = {False: [], True: []}
    for clip in clips:
        values[clip.cut_is_suspected()].append(clip.ltd)
    edges = np.histogram_bin_edges([clip.ltd for clip in clips], bins="auto")
    if len(edges) <= FEWEST_BINS:  # as of few clips: bars as wide as half the picture say nothing
        edges = np.linspace(edges[0], edges[-1], FEWEST_BINS + 1)
    axes.hist(
        [values[False], values[True]],
        bins=edges,
        stacked=True,
        color=COLORS[1:3],
        label=["no cut suspected", "cut suspected"],
        edgecolor="white",
    )
    axes.set(xlabel="mean LTD of a clip", ylabel="clips")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    for part, section in zip(others, sections, strict=True):
        part.suptitle(section.title, fontsize=10)
        panels = part.subplots(section.lines(), COLUMNS, squeeze=False).ravel()
        for panel, picture, label in itertools.zip_longest(panels, section.pictures, section.labels):
            panel.axis("off")
            if picture is not None:
                panel.imshow(picture)
                panel.set_title(label, fontsize=9)
    return figure


def make_report(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Write `ltd_report.png`, every clip in `ltd_report.json`, and the table of `--write_metadata`."""
    wan = train_ltd.identify_wan(args)
    if args.write_metadata:
        check_table(args)
    # The whole split, whatever training holds out or would refuse
    whole = changed(args, validation_fraction=None, validation_split=None, max_skipped=1.0)
    clips, _, _ = train_ltd.prepare_data(whole, accelerator, with_captions=False, wan=wan)
    folder = Path(args.output_dir)
    skipped = {}
    if (folder / "skipped.jsonl").is_file():
        for line in (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            skipped[row["file"]] = row["reason"]
    clips.sort(key=lambda clip: clip.ltd)
    tilts = [describe_tilt(clips, strength) for strength in STRENGTHS]
    report = {"clips": [describe(clip) for clip in clips], "skipped": skipped, "tilts": tilts}
    (folder / "ltd_report.json").write_text(json.dumps(report, indent=1))
    draw_report(args, clips).savefig(folder / "ltd_report.png")

    videos = len({clip.order[:2] for clip in clips}) + len(skipped)
    low, median, high = np.quantile([clip.ltd for clip in clips], [0.1, 0.5, 0.9])
    cuts = [clip.name for clip in clips if clip.cut_is_suspected()]
    unusable = f"{counted(len(skipped), 'video')} cannot be used"
    print(f"{counted(len(clips), 'clip')} of {counted(videos, 'video')}; {unusable}")
    print(f"mean LTD: a tenth of the clips below {low:.3f}, half below {median:.3f}, a tenth above {high:.3f}")
    print(f"a cut is suspected in {counted(len(cuts), 'clip')} (--drop_cuts)", *cuts)
    print("if one caption fitted all clips, the share of the videos generated for it that is like (computed):")
    for tilt in tilts:
        print(
            f"  --ltd_strength {tilt['strength']:g}: the wildest tenth {tilt['wildest_tenth']:.1%}, the stillest "
            f"{tilt['stillest_tenth']:.1%}; effective number of clips {tilt['effective_clips']:.1f}"
        )
    print(propose_sizes(measure_media(args), args, wan.size_multiple))
    print(f"wrote {folder}/ltd_report.png and ltd_report.json")
    if args.write_metadata:
        write_table(args, clips, skipped)


# --- report: which --sizes fit ---------------------------------------------------------------------------------------


class Media(NamedTuple):
    """What a clip could give: its pictures as they are shown, in pixels, and how many there are at `--fps`."""

    width: int
    height: int
    frames: int  # 1 of a still; of a video an estimate, from its packets


def measure_media(args: argparse.Namespace) -> list[Media]:
    """Measure every clip that can be read, of which only the first picture is decoded."""
    dataset, folder = train_ltd.open_dataset(args, args.dataset_split)
    measured = []
    for row in dataset:
        try:
            source = train_ltd.locate_clip(row["video"], folder, args)
            picture = next(train_ltd.frames_at(source, np.zeros(1)), None)
            if picture is None:
                continue
            height, width = picture.pixels.shape[:2]
            frames = 1
            if not picture.still:
                frames = int(train_ltd.video_seconds(source) * args.fps + 0.5)
            measured.append(Media(width, height, frames))
        except (OSError, ValueError, av.FFmpegError):
            continue  # the report has named it among those that cannot be used
    return measured


def ideal_size(media: Media, args: argparse.Namespace, multiple: int) -> tuple[int, int]:
    """Return the width and height of a clip's aspect, in multiples, with about the area of the flags' size."""
    aspect = media.width / media.height
    height = math.sqrt(args.height * args.width / aspect)
    return (
        max(1, round(height * aspect / multiple)) * multiple,
        max(1, round(height / multiple)) * multiple,
    )


def cropped_share(media: Media, size: tuple[int, int]) -> float:
    """Return the share of a clip's picture that the crop to a width and height throws away."""
    ratio = (media.width / media.height) / (size[0] / size[1])
    return 1 - min(ratio, 1 / ratio)


def choose_aspects(measured: list[Media], args: argparse.Namespace, multiple: int) -> list[tuple[int, int]]:
    """Return few widths and heights to which 95 % of the clips can be cropped and lose at most a tenth each.

    Each is the one that fits most of the clips that those before do not fit.
    """
    chosen = []
    rest = set(measured)
    left_over = (1 - MIN_COVERED) * len(measured)
    while sum(media in rest for media in measured) > left_over:
        best = set()
        for size in sorted({ideal_size(media, args, multiple) for media in rest}):
            fits = {media for media in rest if cropped_share(media, size) <= MAX_CROPPED}
            if len(fits) > len(best):
                best = fits
                best_size = size
        if not best:
            break
        chosen.append(best_size)
        rest -= best
    return chosen


def choose_lengths(own: list[Media], args: argparse.Namespace) -> set[int]:
    """Return the frames of one width and height: what its longest clip fills, what nearly all do, 1 for stills."""
    lengths = set()
    videos = sorted(media.frames for media in own if media.frames > 1)
    if videos:
        for frames in (videos[-1], videos[int((1 - MIN_COVERED) * len(videos))]):
            lengths.add(min(args.num_frames, (frames - 1) // 4 * 4 + 1))
    lengths.discard(1)
    if any(media.frames == 1 for media in own):
        lengths.add(1)
    return lengths


def propose_sizes(measured: list[Media], args: argparse.Namespace, multiple: int) -> str:
    """Write in a sentence which `--sizes` fit the clips, and what is lost to them."""
    aspects = choose_aspects(measured, args, multiple)
    own = {size: [] for size in aspects}
    for media in measured if aspects else []:
        own[min(aspects, key=functools.partial(cropped_share, media))].append(media)
    sizes = []
    cropped = []
    for size, clips in own.items():
        lengths = choose_lengths(clips, args)
        sizes += [f"{size[0]}x{size[1]}x{frames}" for frames in sorted(lengths, reverse=True)]
        for media in clips:
            fills = 1 in lengths
            if media.frames > 1:
                fills = any(1 < frames <= media.frames for frames in lengths)
            if fills:
                cropped.append(cropped_share(media, size))
    if not cropped:
        return "no --sizes to propose: no clip fills five frames"
    return (
        f"--sizes {' '.join(sizes)} would take {len(cropped)} of {len(measured)} clips and crop away "
        f"{np.mean(cropped):.0%} of the picture on average"
    )


# --- report --write_metadata -----------------------------------------------------------------------------------------


def check_table(args: argparse.Namespace) -> None:
    """Refuse a table that could not be trained on before anything is encoded. Raises `ValueError`."""
    table = args.write_metadata
    if args.dataset_name:
        raise ValueError(f"--write_metadata is for clips in a local folder; filter {args.dataset_name} on the Hub")
    if table.suffix != ".jsonl":
        raise ValueError(f"--write_metadata {table} must end in .jsonl")
    _, folder = train_ltd.open_dataset(args, args.dataset_split)
    if not is_within(folder, table.parent):
        raise ValueError(f"--write_metadata {table}: {remedy(table, folder)}")
    is_source = table.resolve() == Path(args.train_data_dir).resolve()
    if is_source or (table.name == "metadata.jsonl" and table.exists()):
        raise ValueError(f"--write_metadata {table} would overwrite the dataset's own table; take another name")


def is_within(path: Path, folder: Path) -> bool:
    """Tell whether a path lies in a folder, by its words, as train_ltd.py reads them."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def remedy(table: Path, folder: Path) -> str:
    """Say where a table must lie."""
    return f"its rows may not lead out of its folder, so write it where the clips are: {folder / table.name}"


def reason_to_drop(clip, args: argparse.Namespace) -> str | None:
    """Say why `--min_ltd`, `--max_ltd` or `--drop_cuts` drops a clip; `None` when it is kept."""
    if args.min_ltd is not None and clip.ltd < args.min_ltd:
        return f"mean LTD {clip.ltd:.4f} is below --min_ltd {args.min_ltd:g}"
    if args.max_ltd is not None and clip.ltd > args.max_ltd:
        return f"mean LTD {clip.ltd:.4f} is above --max_ltd {args.max_ltd:g}"
    if args.drop_cuts and clip.cut_is_suspected():
        jump, frame = clip.largest_jump()
        seconds = FRAME_PICTURES * frame / args.fps
        return f"a cut is suspected at {seconds:.1f} s, a jump of {jump:.1f} times the median gap (--drop_cuts)"
    return None


def write_table(args: argparse.Namespace, clips: Sequence, skipped: dict[str, str]) -> None:
    """Write a metadata.jsonl of the videos that are kept, and print which are dropped and why.

    A video of several windows is kept when all its windows are. The columns have the names that the dataset's have,
    so that the same flags train on it. Raises `ValueError` when no video is left, or one is no file in the folder.
    """
    dropped = {}  # number of the row -> why
    for clip in sorted(clips, key=lambda clip: clip.order):
        reason = reason_to_drop(clip, args)
        if reason:
            dropped.setdefault(clip.order[1], f"{clip.name}: {reason}")
    numbers = {clip.order[1] for clip in clips}
    kept = sorted(numbers - dropped.keys())
    for reason in dropped.values():
        print(f"dropped {reason}")
    for name, reason in skipped.items():
        print(f"dropped {name}: {reason}")
    if not kept:
        raise ValueError(f"--write_metadata {args.write_metadata}: no video is left; widen --min_ltd and --max_ltd")

    table = args.write_metadata
    dataset, folder = train_ltd.open_dataset(args, args.dataset_split)
    video_column = args.video_column
    if video_column == "video":
        video_column = "file_name"
    lines = []
    for number in kept:
        row = dataset[number]
        source = train_ltd.locate_clip(row["video"], folder, args)
        if isinstance(source, bytes):
            raise ValueError("--write_metadata is for clips that are files in a local folder; these lie in a table")
        if not is_within(source, table.parent):
            raise ValueError(f"--write_metadata {table}: {source} is elsewhere; {remedy(table, folder)}")
        file_name = Path(os.path.relpath(source, table.parent)).as_posix()
        line = {video_column: file_name, args.caption_column: row["text"]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    table.write_text("".join(lines), encoding="utf-8")
    videos = counted(len(numbers) + len(skipped), "video")
    print(f"kept {len(kept)} of {videos}; train on them by --train_data_dir {table}")


COMMANDS = {"report": make_report, "curves": make_curves, "maps": make_maps}


def main(args: argparse.Namespace) -> None:
    """Make the picture of one command."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    accelerator = train_ltd.build_accelerator(args)
    COMMANDS[args.command](args, accelerator)


if __name__ == "__main__":
    train_ltd.run_script(main, parse_args)
