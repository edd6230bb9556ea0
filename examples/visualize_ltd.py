"""Pictures of the Latent Temporal Discrepancy (LTD), after Figs. 1 and 3 of https://huggingface.co/papers/2601.20504.

report: how much the clips of a dataset move, the stillest, the wildest, suspected cuts. Needs no model but the VAE.
curves: LTD and error over latent frames (Fig. 3), of the base and of each tuned model given.
maps: video, ln(e + D), noise prediction and squared error of one clip (Fig. 1), as a strip and an mp4.

    python examples/visualize_ltd.py report --train_data_dir my_clips --output_dir my_lora
    python examples/visualize_ltd.py curves --train_data_dir my_clips --output_dir my_lora --lora my_lora
    python examples/visualize_ltd.py maps --video dog.mp4 --prompt "a dog jumps over a fence" --lora my_lora
    python examples/visualize_ltd.py maps --latents latents.safetensors --ltd_only  # without any model

All flags of train_ltd.py can be given as well, `--config` too. With those of a training run its cache is read, and
what is encoded here training finds there. Videos of base and tuned models (Fig. 5): examples/generate.py --compare.
"""

import argparse
import itertools
import json
import logging
import math
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from diffusers.training_utils import free_memory
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train_ltd.py is a script in the repository's root, not an installed module

from videos import labelled_row, write_video

import train_ltd
from ltd_loss import latent_temporal_discrepancy

WIDTH, DPI = 8, 100  # inches and pixels an inch: a README shows 800 px
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, too light for a line
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLUMNS = 5  # pictures side by side
VIDEO_WIDTH = 400  # pixels of each row in the mp4


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """The flags below and all those of train_ltd.py, in one namespace."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", required=True)
    style["epilog"] = "All flags of train_ltd.py can be given as well; see its --help."
    commands.add_parser("report", help="histogram of LTD, stillest and wildest clips, suspected cuts", **style)
    curves = commands.add_parser("curves", help="Fig. 3: LTD and error over latent frames", **style)
    maps = commands.add_parser("maps", help="Fig. 1: video, LTD, noise prediction, squared error", **style)
    levels, repeatable = {curves: list(train_ltd.EVAL_SIGMAS), maps: [0.5]}, {curves: "; repeatable", maps: ""}
    for command in (curves, maps):
        add, more, default = command.add_argument, repeatable[command], levels[command]
        add("--lora", action="append", default=[], help=f"tuned: LoRA (file, folder or Hub id) on the base{more}")
        add("--transformer", action="append", default=[], help=f"tuned: a fine-tune in the base's place{more}")
        text = f"noise level in (0, 1), where 1 would be pure noise (default: {' '.join(map(str, default))})"
        add("--sigma", type=float, nargs="+" if command is curves else 1, default=default, help=text)
    source = maps.add_mutually_exclusive_group(required=True)
    source.add_argument("--video", help="clip, cut to size as for training: --height, --width, --num_frames, --fps")
    source.add_argument("--latents", help="safetensors with normalised `latents`, (C, F, H, W) or (B, C, F, H, W)")
    maps.add_argument("--prompt", default="", help="caption of the clip")
    maps.add_argument("--ltd_only", action="store_true", help="leave out what needs a transformer")

    own, rest = parser.parse_known_args(input_args)
    if own.command != "report":
        most = len(COLOURS) - 1 if own.command == "curves" else 1
        if len(own.lora + own.transformer) > most:
            parser.error(f"{own.command} takes at most {most} of --lora and --transformer")
        if not all(0 < sigma < 1 for sigma in own.sigma):
            parser.error(f"--sigma must lie in (0, 1), got {own.sigma}")
    if own.command == "maps":
        flag, path = ("--video", own.video) if own.video else ("--latents", own.latents)
        if not Path(path).is_file():
            parser.error(f"{flag} {path} is not a file")
        rest += ["--train_data_dir", path]  # the clip is all the data there is
    return argparse.Namespace(**vars(train_ltd.parse_args([*rest, "--no-torch_compile"])), **vars(own))


# --- Models ----------------------------------------------------------------------------------------------------------


def check_models(args: argparse.Namespace) -> None:
    """Refuse what is no Wan2.1 model or no LoRA before anything is encoded."""
    train_ltd.check_model(args)
    for name in args.transformer:
        train_ltd.check_model(argparse.Namespace(**vars(args) | {"transformer_path": name}))
    for name in args.lora:
        try:
            train_ltd.read_lora(name)
        except (OSError, ValueError, SafetensorError, *train_ltd.HUB_ERRORS) as error:
            raise ValueError(f"--lora {name} cannot be used: {error}") from error


def load_model(args: argparse.Namespace, device: torch.device, lora="", transformer="") -> WanTransformer3DModel:
    """The base, `lora` on it, or `transformer` in its place. Raises `ValueError` when the LoRA does not fit."""
    own = {"init_lora": lora, "rank": None, "lora_alpha": None, "lora_target_modules": None}
    own["transformer_path"] = transformer or args.transformer_path
    args = argparse.Namespace(**vars(args) | own)
    model = train_ltd.load_transformer(args)
    if lora:
        train_ltd.add_lora(model, args)
    return model.to(device).eval()


# --- maps: Fig. 1 ----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of Fig. 1: pictures `(N, H, W, 3)` in [0, 1], or values `(F, h, w)` and their colours."""

    label: str
    values: np.ndarray
    colours: ScalarMappable | None = None
    over_video: bool = False


def read_latents(path: str) -> torch.Tensor:
    """`(C, F, H, W)` float32; the first clip of a batch, or of an entry of the training cache."""
    try:
        with safe_open(path, framework="pt") as file:
            if "latents" not in file.keys():
                raise ValueError(f"--latents {path} has no tensor `latents`, but {', '.join(file.keys())}")
            latents = file.get_tensor("latents").float()
    except SafetensorError as error:
        raise ValueError(f"--latents {path} is not a safetensors file: {error}") from error
    if latents.ndim not in (4, 5):
        raise ValueError(f"--latents {path}: (C, F, H, W) or (B, C, F, H, W) is needed, got {tuple(latents.shape)}")
    return latents[0] if latents.ndim == 5 else latents


@torch.no_grad()
def predict_noise(transformer: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Eq. 1's noise prediction, from a flow model's v: z_t + (1 - sigma) v. Takes what `train_ltd.flow_matching_error`
    takes; the squared error of what it returns, `(B, C, F, H, W)` float32, is (1 - sigma)^2 times that function's.
    """
    sigmas = batch["sigmas"].view(-1, 1, 1, 1, 1)
    noisy_latents = (1 - sigmas) * batch["latents"] + sigmas * batch["noise"]
    inputs = {"timestep": 1000 * batch["sigmas"], "encoder_hidden_states": batch["prompt_embeds"]}
    flow = transformer(hidden_states=noisy_latents, **inputs, return_dict=False)[0]
    return noisy_latents + (1 - sigmas) * flow.float()


def main_component(latents: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    """Projection of `values` `(C, F, H, W)` on the latents' first principal component over channels: `(F, H, W)`."""
    direction = torch.linalg.eigh(latents.flatten(1).cov()).eigenvectors[:, -1]
    return torch.einsum("c,cfhw->fhw", direction * direction.sum().sign(), values).numpy()


def heat(values: np.ndarray, low: float, name: str) -> ScalarMappable:
    """
    Colours of `(F, h, w)` from `low` to the 99 % quantile of latent frames 2 and on: the first two hold the first gap,
    which a causal VAE inflates, and would darken all others.
    """
    high = np.quantile(values[2:] if len(values) > 2 else values, 0.99)
    return ScalarMappable(Normalize(low, max(high, low + 1e-6)), name)


def paint(row: Row, pictures: np.ndarray, index: int) -> np.ndarray:
    """What a row shows at picture `index` of the video: `(H, W, 3)` in [0, 1]."""
    if row.colours is None:
        return row.values[index]
    # Latent frame 0 holds the first picture alone, each other one as many as the next (4, or 1 of a latent preview).
    frame = math.ceil(index * (len(row.values) - 1) / max(1, len(pictures) - 1))
    colours, factor = row.colours.to_rgba(row.values[frame])[..., :3], pictures.shape[1] // row.values.shape[1]
    colours = colours.repeat(factor, axis=0).repeat(factor, axis=1)
    return 0.75 * colours + 0.25 * pictures[index].mean(-1, keepdims=True) if row.over_video else colours


def draw_strip(rows: list[Row], title: str, fps: float) -> Figure:
    """Latent frames spread over the clip, a column each, with the last picture of each."""
    pictures, frames = rows[0].values, len(rows[1].values)
    chosen = np.unique(np.linspace(0, frames - 1, COLUMNS).round().astype(int))
    panel = (WIDTH - 1.2) / len(chosen) * pictures.shape[1] / pictures.shape[2]  # inches
    size = WIDTH, len(rows) * (panel + 0.05) + 0.2 * (4 + title.count("\n"))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for frame, axis in zip(chosen, line, strict=True):
            index = frame * (len(pictures) - 1) // max(1, frames - 1)
            axis.imshow(paint(row, pictures, index), vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row is rows[0]:
                axis.set_title(f"latent frame {frame}\n{index / fps:.2f} s", fontsize=10)
        line[0].set_ylabel(row.label, fontsize=10)
        if row.colours:
            extend = "max" if row.colours.norm.vmin >= 0 else "both"
            figure.colorbar(row.colours, ax=list(line), aspect=10, pad=0.01, extend=extend)
    return figure


def video_frames(rows: list[Row]) -> np.ndarray:
    """All pictures with the rows side by side: `(N, H, W, 3)` uint8 of even H and W."""
    pictures, frames = rows[0].values, []
    size = VIDEO_WIDTH, round(VIDEO_WIDTH * pictures.shape[1] / pictures.shape[2] / 2) * 2
    for index in range(len(pictures)):
        panels = [Image.fromarray(np.uint8(255 * paint(row, pictures, index))) for row in rows]
        panels = [
            np.asarray(panel.resize(size, Image.Resampling.BOX)) for panel in panels
        ]  # voxels stay sharp squares
        labels = [row.label.replace("\n", " ") for row in rows]
        frames.append(labelled_row(panels, labels))
    return np.stack(frames)


def make_maps(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """
    `ltd_maps.png` and `ltd_maps.mp4` of one clip. With `--latents` their main component stands for the video; it is
    also what is shown of the noise prediction. The error is that of the flow, which training minimises.
    """
    folder, fps = Path(args.output_dir), args.fps
    if args.latents:
        latents, fps = read_latents(args.latents), args.fps / 4
        gray = main_component(latents, latents)
        low, high = np.quantile(gray, [0.01, 0.99])
        pictures = np.clip((gray - low) / max(high - low, 1e-6), 0, 1)[..., None].repeat(3, axis=-1)
    else:
        try:
            frames = train_ltd.read_clips(args.video, args)[0][0]
        except (OSError, ValueError) as error:
            raise ValueError(f"--video {args.video}: {error}; see --num_frames and --fps") from error
        latents = train_ltd.encode_clip(train_ltd.load_vae(args, accelerator.device), frames).cpu()
        pictures = frames.permute(0, 2, 3, 1).numpy() / np.float32(255)
    ltd = torch.log(math.e + latent_temporal_discrepancy(latents[None])[0]).numpy()
    title = [f"“{args.prompt}”" if args.prompt else Path(args.video or args.latents).name]
    spread = f"{ltd.min():.2f} to {ltd.max():.2f}, mean {ltd.mean():.2f}"
    title += [f"ln(e + D): {spread} (frames 0 and 1 hold the VAE's inflated first gap)"]
    rows = [Row("latents" if args.latents else "video", pictures)]
    rows += [Row("ln(e + D)", ltd, heat(ltd, 1, "magma"), over_video=True)]
    if not args.ltd_only:
        caption = train_ltd.with_trigger(args, args.prompt)
        files, _ = train_ltd.cache_captions(args, accelerator, {caption})
        tuned = {"lora": args.lora, "transformer": args.transformer}
        model = load_model(args, accelerator.device, **{flag: names[0] for flag, names in tuned.items() if names})
        if model.config.in_channels != len(latents):
            raise ValueError(f"--latents has {len(latents)} channels, the model {model.config.in_channels}")
        batch = {"latents": latents, "prompt_embeds": train_ltd.load_prompt(args, files[caption])}
        batch["noise"] = torch.randn(latents.shape, generator=torch.Generator().manual_seed(args.seed))
        batch = {k: v[None].to(accelerator.device) for k, v in batch.items()}
        batch["sigmas"] = torch.tensor(args.sigma, device=accelerator.device)
        with accelerator.autocast():
            noise = predict_noise(model, batch)
        error = ((noise - batch["noise"]) / (1 - args.sigma[0])).square().mean(dim=1)[0].cpu().numpy()
        shown = main_component(latents, noise[0].cpu())
        rows += [Row("noise\nprediction", shown, ScalarMappable(Normalize(-3, 3), "gray"))]
        rows += [Row("squared\nerror", error, heat(error, 0, "viridis"))]
        name = [*args.lora, *args.transformer, args.pretrained_model_name_or_path][0]
        settings = f"sigma {args.sigma[0]:g}, noise of seed {args.seed}"
        title += [f"{name}: {settings}, mean squared error of the flow {error.mean():.3f}"]
    title = "\n".join(textwrap.fill(line, 100) for line in title)
    draw_strip(rows, title, fps).savefig(folder / "ltd_maps.png")
    write_video(video_frames(rows), folder / "ltd_maps.mp4", fps)
    print(f"wrote {folder}/ltd_maps.png and ltd_maps.mp4")


# --- curves: Fig. 3 --------------------------------------------------------------------------------------------------


@torch.no_grad()
def error_per_frame(model, dataset: train_ltd.LatentDataset, args: argparse.Namespace, accelerator) -> np.ndarray:
    """The squared error of `train_ltd.evaluate`, at its fixed noise: mean over `--sigma` and voxels, `(clips, F)`."""
    rows = []
    for index, clip in enumerate(tqdm(dataset.clips, desc="measuring", unit="clip")):
        generator = torch.Generator().manual_seed(train_ltd.sample_seed("eval", args.seed, index))
        batch = dataset.load(clip, clip["captions"][0], generator)
        batch, errors = {k: v[None].to(accelerator.device) for k, v in batch.items()}, []
        for sigma in args.sigma:
            batch["sigmas"] = torch.tensor([sigma], device=accelerator.device)
            with accelerator.autocast():
                errors.append(train_ltd.flow_matching_error(model, batch).mean(dim=(0, 1, 3, 4)))
        rows.append(torch.stack(errors).mean(dim=0).cpu().numpy())
    return np.stack(rows)


def draw_curves(ltd: np.ndarray, errors: dict[str, np.ndarray], title: str) -> Figure:
    """LTD on the left, the error of each model on the right, `(clips, F)`: mean as a line, middle half as a band."""
    figure = Figure(figsize=(WIDTH, 3.4 + 0.2 * len(errors)), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = zip(figure.subplots(1, 2), ("LTD", "squared error"), ({"LTD": ltd}, errors), strict=True)
    for axes, quantity, lines in panels:
        for colour, (name, values) in zip(COLOURS, lines.items(), strict=False):
            low, high = np.quantile(values, [0.25, 0.75], axis=0)
            axes.fill_between(np.arange(len(low)), low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(values.mean(axis=0), color=colour, marker=".", label=name)
        axes.set(xlabel="latent frame (0: one picture, then four each)", ylabel=f"{quantity}, mean over voxels")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    return figure


def make_curves(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """`ltd_curves.png` and its numbers, `ltd_curves.json`; of held-out clips if `--validation_split` leaves any."""
    clips, held_out, captions = train_ltd.prepare_data(args, accelerator)
    dataset = train_ltd.LatentDataset((held_out or clips)[: args.max_eval_clips], captions, args)
    ltd, errors = np.array([clip["ltd_per_frame"] for clip in dataset.clips]), {}
    numbers = {"clips": [clip["name"] for clip in dataset.clips], "held_out": bool(held_out), "sigma": args.sigma}
    numbers |= {"seed": args.seed, "base": args.pretrained_model_name_or_path, "ltd": ltd.tolist(), "mse": {}}
    models = {"base": {}} | {n: {"lora": n} for n in args.lora} | {n: {"transformer": n} for n in args.transformer}
    for name, kwargs in models.items():
        model = load_model(args, accelerator.device, **kwargs)
        errors[name] = error_per_frame(model, dataset, args, accelerator)
        del model
        free_memory()
        numbers["mse"][name] = errors[name].tolist()
        Path(args.output_dir, "ltd_curves.json").write_text(json.dumps(numbers, indent=1))
        print(f"{name}: mean squared error {errors[name].mean():.4f}")
    title = f"mean and middle half of {len(ltd)} {'held-out ' if held_out else ''}clips; "
    title += f"sigma {', '.join(f'{sigma:g}' for sigma in args.sigma)}; noise of seed {args.seed}"
    draw_curves(ltd, errors, title).savefig(Path(args.output_dir, "ltd_curves.png"))
    print(f"wrote {args.output_dir}/ltd_curves.png and ltd_curves.json")


# --- report ----------------------------------------------------------------------------------------------------------


def largest_jump(gaps: list[float]) -> tuple[float, int]:
    """The largest of a clip's gaps but the first, which a causal VAE inflates, as a multiple of their median, and the
    latent frame before it; `(0, 0)` for a clip too short to tell."""
    later = gaps[1:]
    if len(later) < 3:
        return 0.0, 0
    return max(later) / max(sorted(later)[len(later) // 2], 1e-9), 1 + int(np.argmax(later))


def list_clips(videos: list[dict]) -> list[dict]:
    """The clips, that is windows, of `train_ltd.cache_videos`' videos, from the stillest to the wildest."""
    clips = []
    for video in (v for v in videos if "reason" not in v):
        statistics, windows = video["statistics"], len(video["statistics"]["ltd"])
        for window in range(windows):
            jump, frame = largest_jump(statistics["gaps"][window])
            clip = {"name": video["file"] + f"#{window}" * (windows > 1), "number": video["number"], "window": window}
            clip |= {"ltd": statistics["ltd"][window], "jump": jump, "jump_frame": frame}
            clips.append(clip | {"cut_suspected": jump > train_ltd.CUT_RATIO})
    return sorted(clips, key=lambda clip: clip["ltd"])


def read_pictures(args: argparse.Namespace, clips: list[dict], indices: Iterable[int]) -> list[np.ndarray]:
    """For each clip the picture of that index, as training sees it: `(H, W, 3)` uint8."""
    (dataset, *where), pictures = train_ltd.open_dataset(args, args.dataset_split), []
    for clip, index in zip(clips, indices, strict=True):
        row = next(iter(dataset.skip(clip["number"])))  # a stream has no other access
        frames, *_ = train_ltd.read_clips(train_ltd.clip_source(row["video"], *where, args), args)
        pictures.append(frames[clip["window"], index].permute(1, 2, 0).numpy())
    return pictures


def draw_report(args: argparse.Namespace, clips: list[dict]) -> Figure:
    """Histogram of the clips' mean LTD, above thumbnails of the two ends and of the largest jumps."""
    count = min(2 * COLUMNS, math.ceil(len(clips) / 2))
    sections = []
    for title, ends in (("stillest", clips[:count]), ("wildest", clips[: -count - 1 : -1])):
        pictures = read_pictures(args, ends, [args.num_frames // 2] * count)
        labels = [f"{clip['ltd']:.3f}\n{clip['name'][-20:]}" for clip in ends]
        sections.append((f"the {count} {title} clips, by their mean LTD", pictures, labels))
    jumps = [clip for clip in sorted(clips, key=lambda clip: -clip["jump"])[:COLUMNS] if clip["jump"]]
    if jumps:
        # Latent frame f ends with picture 4f: these lie on either side, wherever in frames f and f + 1 the jump is.
        sides = [read_pictures(args, jumps, [4 * clip["jump_frame"] + step for clip in jumps]) for step in (-3, 4)]
        labels = [f"{c['jump']:.1f} x, {4 * c['jump_frame'] / args.fps:.1f} s\n{c['name'][-20:]}" for c in jumps]
        title = "largest jumps, as multiples of the clip's median gap, before and after; "
        title += f"above {train_ltd.CUT_RATIO:g} a cut is suspected"
        sections.append((title, [np.vstack(pair) for pair in zip(*sides, strict=True)], labels))
    heights = [2.6]
    for _, pictures, _ in sections:
        panel = WIDTH / COLUMNS * pictures[0].shape[0] / pictures[0].shape[1] + 0.4  # inches
        heights.append(math.ceil(len(pictures) / COLUMNS) * panel + 0.3)
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    top, *others = figure.subfigures(len(heights), 1, height_ratios=heights)
    axes = top.subplots()
    values = [[clip["ltd"] for clip in clips if clip["cut_suspected"] == cut] for cut in (False, True)]
    style = {"color": COLOURS[1:3], "label": ["no cut suspected", "cut suspected"], "edgecolor": "white"}
    axes.hist(values, bins="auto", stacked=True, **style)
    axes.set(xlabel="mean LTD of a clip", ylabel="clips")
    axes.legend()
    for part, (title, pictures, labels) in zip(others, sections, strict=True):
        part.suptitle(title, fontsize=10)
        panels = part.subplots(math.ceil(len(pictures) / COLUMNS), COLUMNS, squeeze=False).ravel()
        for axes, picture, label in itertools.zip_longest(panels, pictures, labels):
            axes.axis("off")
            if picture is not None:
                axes.imshow(picture)
                axes.set_title(label, fontsize=9)
    return figure


def make_report(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """`ltd_report.png`, and every clip in `ltd_report.json`."""
    videos, folder = train_ltd.cache_videos(args, accelerator, args.dataset_split, None), Path(args.output_dir)
    clips, skipped = list_clips(videos), {v["file"]: v["reason"] for v in videos if "reason" in v}
    if not clips:
        raise ValueError(f"none of the {len(videos)} videos can be used: {json.dumps(skipped)[:300]}")
    (folder / "ltd_report.json").write_text(json.dumps({"clips": clips, "skipped": skipped}, indent=1))
    draw_report(args, clips).savefig(folder / "ltd_report.png")
    low, median, high = np.quantile([clip["ltd"] for clip in clips], [0.1, 0.5, 0.9])
    print(f"{len(clips)} clips of {len(videos)} videos; {len(skipped)} videos cannot be used")
    print(f"mean LTD: a tenth of the clips below {low:.3f}, half below {median:.3f}, a tenth above {high:.3f}")
    cuts = [clip["name"] for clip in clips if clip["cut_suspected"]]
    print(f"a cut is suspected in {len(cuts)} clips (--drop_cuts)", *cuts)
    print(f"wrote {folder}/ltd_report.png and ltd_report.json")


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if args.command == "curves" or (args.command == "maps" and not args.ltd_only):
        check_models(args)
    {"report": make_report, "curves": make_curves, "maps": make_maps}[args.command](args, accelerator)


if __name__ == "__main__":
    main(parse_args())
