"""Generate videos with Wan, base or fine-tuned: for a look, for VBench or for VMBench; compare folders of them.

    python examples/generate.py --prompt "a dog jumps over a fence" --output_dir outputs/base
    python examples/generate.py --prompt "a dog jumps over a fence" --lora my_lora --output_dir outputs/tuned
    python examples/generate.py --compare outputs/base outputs/tuned --labels Wan2.1 LTD --output_dir outputs/compare

Wan2.2 T2V-A14B, with a LoRA for each of its experts, of which the second samples the lower noise levels:

    python examples/generate.py --preset wan22-t2v --lora my_lora_high --lora_2 my_lora_low \\
        --prompt "a dog jumps over a fence" --output_dir outputs/tuned

Image-to-video, from a picture for all prompts or one for each (also TI2V-5B, and Wan2.1 I2V by its name):

    python examples/generate.py --preset wan22-i2v --image dog.png --prompt "the dog jumps over the fence" \\
        --output_dir outputs/from_image

VBench's seven quality dimensions with its own settings for Wan2.1, on eight GPUs (the JSON is in the package vbench):

    accelerate launch --multi_gpu --num_processes 8 examples/generate.py --vbench VBench_full_info.json \\
        --output_dir outputs/base

The noise of a video follows from (seed, prompt, sample) alone, so the folders of two models pair up whatever the batch
size and the number of GPUs. The same command run again goes on where it stopped. `generation.json` beside the videos
says how they were made, and which prompt and seed each file has.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from datasets import load_dataset
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train_ltd.py is a script in the repository's root, not an installed module

from gallery import build_gallery, read_record
from videos import find_videos, write_video

import train_ltd

logger = get_logger(__name__)

# Wan's own (wan/configs/shared_config.py there), with commas as the pipeline's prompt_clean leaves them. It asks
# for no still picture, among much else.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽,过曝,静态,细节模糊不清,字幕,风格,作品,画作,画面,静止,整体发灰,最差质量,低质量,JPEG压缩残留,"
    "丑陋的,残缺的,多余的手指,画得不好的手部,画得不好的脸部,畸形的,毁容的,形态畸形的肢体,手指融合,"
    "静止不动的画面,杂乱的背景,三条腿,背景人很多,倒着走"
)
WAN_1_3B = {
    "pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "fps": 16.0,
}
# What a preset leaves `None` is the model's own; every value has a flag of its name
PRESETS = {
    # VBench's, of the Wan2.1-T2V-1.3B videos on its leaderboard (sampled_videos/README.md there)
    "wan": {
        **WAN_1_3B,
        "scheduler": "unipc",
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "flow_shift": 3.0,
        "negative_prompt": WAN_NEGATIVE_PROMPT,
    },
    # Wan2.2's own (wan/configs/wan_t2v_A14B.py there); the first guidance is that of the expert for high noise
    "wan22-t2v": {
        **WAN_1_3B,
        "pretrained_model_name_or_path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "scheduler": "unipc",
        "num_inference_steps": 40,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "flow_shift": 12.0,
        "negative_prompt": WAN_NEGATIVE_PROMPT,
    },
    # Wan2.2's own (wan/configs/wan_i2v_A14B.py there)
    "wan22-i2v": {
        **WAN_1_3B,
        "pretrained_model_name_or_path": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "scheduler": "unipc",
        "num_inference_steps": 40,
        "guidance_scale": 3.5,
        "guidance_scale_2": 3.5,
        "flow_shift": 5.0,
        "negative_prompt": WAN_NEGATIVE_PROMPT,
    },
    # Wan2.2's own (wan/configs/wan_ti2v_5B.py there)
    "ti2v-5b": {
        "pretrained_model_name_or_path": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "height": 704,
        "width": 1280,
        "num_frames": 121,
        "fps": 24.0,
        "scheduler": "unipc",
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "flow_shift": 5.0,
        "negative_prompt": WAN_NEGATIVE_PROMPT,
    },
    # Section 3.1 has DDIM: first order and deterministic, and so is Euler's method on the flow
    "paper": {
        **WAN_1_3B,
        "scheduler": "euler",
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "flow_shift": None,
        "negative_prompt": "",
    },
    # The small Wan that was trained in examples/nano
    "nano": {
        "pretrained_model_name_or_path": str(ROOT / "examples/nano/wan-nano"),
        "height": 96,
        "width": 96,
        "num_frames": 33,
        "fps": 16.0,
        "scheduler": "unipc",
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "flow_shift": None,
        "negative_prompt": "",
    },
}
# Those of VBench's Quality Score
VBENCH_DIMENSIONS = [
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
]
VBENCH_SAMPLES = 5
VBENCH_FLICKER_SAMPLES = 25  # flicker is measured on those of them that turn out static
MAX_STEM = 230  # bytes; a file name may have 255
QUANTIZATION = {"int8": "torchao", "nf4": "bitsandbytes"}  # -> the package that does it
SIZE = ("height", "width", "num_frames", "fps")
PROMPT_SOURCES = ("prompt", "prompt_file", "dataset_name", "vbench", "vmbench")
FILES = ("prompt_file", "vbench", "augmented_prompts", "vmbench")
POSITIVE = ("num_samples", "max_prompts", "num_inference_steps", "flow_shift", "fps", "batch_size")
# As the pipeline calls them
SAMPLING = ("num_inference_steps", "guidance_scale", "guidance_scale_2", "height", "width", "num_frames")
OF_SECOND_EXPERT = ("transformer_2", "lora_2", "lora_2_scale", "guidance_scale_2")  # flags
VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "peft")


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """Build the parser, a flag a line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = train_ltd.FlagParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, help="where videos and generation.json, or the gallery, go")

    add = parser.add_argument_group("prompts (one source)").add_argument
    add("--prompt", action="append", help="a prompt; repeatable")
    add("--prompt_file", help="text file, a prompt a line")
    add("--dataset_name", help="captions of a dataset: Hub id, folder, or .jsonl/.json/.csv/.parquet file")
    add("--dataset_config_name", help="configuration of it")
    add("--dataset_split", default="train", help="split of it")
    add("--caption_column", default="text", help="column of it; of a list of captions the first is taken")
    add("--vbench", metavar="JSON", help="VBench_full_info.json; files are called as VBench wants them")
    add("--dimensions", nargs="+", default=VBENCH_DIMENSIONS, help="of VBench (default: the seven of quality)")
    add("--augmented_prompts", metavar="TXT", help="what the model is given instead, a line for each of VBench's 946"
        " entries, such as its all_dimension_aug_wanx_seed42.txt; files keep the names of the short prompts")
    add("--vmbench", metavar="JSON", help="VMBench's prompts.json; files are called 0001.mp4 and so on")
    add("--image", action="append", default=[],
        help="picture to start from, for a model that takes one: one for all prompts, or one a prompt; repeatable")
    add("--num_samples", type=int, help="videos a prompt (default: 1; for VBench 5, and 25 for temporal_flickering)")
    add("--max_prompts", type=int, help="only the first so many, for a trial")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="folder or Hub id (default: the preset's)")
    add("--revision", help="branch, tag or commit of it on the Hub")
    add("--variant", help="variant of its weight files, such as fp16")
    add("--transformer", "--transformer_path", dest="transformer_path",
        help="fine-tuned transformer: diffusers folder, Hub id, .safetensors in original Wan keys")
    add("--lora", action="append", default=[], help="folder, file or Hub id; repeatable")
    add("--lora_scale", action="append", type=float, help="one a --lora (default: 1)")
    add("--transformer_2", help="the same as --transformer, of Wan2.2's expert for low noise")
    add("--lora_2", action="append", default=[], help="the same as --lora, for that expert")
    add("--lora_2_scale", action="append", type=float, help="one a --lora_2 (default: 1)")

    add = parser.add_argument_group("sampling (defaults are the preset's)").add_argument
    add("--preset", choices=PRESETS, default="wan", help="wan: as VBench samples Wan2.1; wan22-t2v, wan22-i2v,"
        " ti2v-5b: as Wan2.2's own configurations; paper: as the LTD paper's section 3.1; nano: for"
        " examples/nano/wan-nano")
    add("--scheduler", choices=["unipc", "euler"], help="unipc: second order; euler: first, the counterpart of DDIM")
    add("--num_inference_steps", type=int, help="denoising steps")
    add("--guidance_scale", type=float, help="classifier-free guidance; 1 = none")
    add("--guidance_scale_2", type=float, help="that of the expert for low noise (default: the same)")
    add("--flow_shift", type=float, help="shift of the noise levels (default of paper, nano: the model's own)")
    add("--negative_prompt", help="what guidance leads away from")
    add("--height", type=int, help="pixels, a multiple of 16 (this and the next three: by default what the first"
        " --lora was trained on, if it says so; for VBench and VMBench the preset's)")
    add("--width", type=int, help="pixels, a multiple of 16")
    add("--num_frames", type=int, help="4k+1")
    add("--fps", type=float, help="frames a second of the files")
    add("--seed", type=int, default=0, help="the same for all models that are to be compared")

    add = parser.add_argument_group("running").add_argument
    add("--batch_size", type=int, default=1, help="videos at once on a device")
    add("--mixed_precision", choices=["no", "bf16"], help="bf16: all but the VAE in bfloat16 (default on a GPU)")
    add("--offload", choices=["model", "group"], help="keep weights in RAM until needed: whole models, or layers ahead"
        " of time, which is slower and smaller; not the text encoder, which runs first and alone")
    add("--quantization", choices=QUANTIZATION, help="weights of the transformer in 8 or 4 bits, as in train_ltd.py:"
        " int8 by torchao, nf4 by bitsandbytes on a GPU")
    add("--cache_dir", help="prompt embeddings; give all models' runs the same (default: OUTPUT_DIR/cache)")

    add = parser.add_argument_group("comparison").add_argument
    add("--compare", nargs="+", metavar="DIR", help="no generation: side-by-side videos, filmstrips and index.html of"
        " two or more folders that this script made; the first --num_samples of each prompt (default: 1)")
    add("--labels", nargs="+", help="a name for each folder (default: the folders')")
    return parser


# fmt: on
def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, over what the LoRA was trained on, over the preset.

    Raises `ValueError` with everything that is wrong at once.
    """
    args = build_parser().parse_args(input_args)
    if not args.vbench and not args.vmbench:  # which have sizes of their own
        for lora in (*args.lora, *args.lora_2):
            for name, value in trained_size(lora).items():
                if getattr(args, name) is None:
                    setattr(args, name, value)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.mixed_precision:
        args.mixed_precision = "bf16" if torch.cuda.is_available() else "no"
    if not args.lora_scale:
        args.lora_scale = [1.0] * len(args.lora)
    if not args.lora_2_scale:
        args.lora_2_scale = [1.0] * len(args.lora_2)
    if not args.cache_dir:
        args.cache_dir = os.path.join(args.output_dir, "cache")
    if args.compare and not args.labels:
        args.labels = [Path(folder).resolve().name for folder in args.compare]

    # What train_ltd.py's functions read besides: a frozen model as it is, embeddings that are the stock pipeline's
    args.train_type = "lora"
    args.gradient_checkpointing = "none"
    args.attention_backend = None
    args.cache_dtype = "float32"
    args.min_sigma = 0.0
    args.max_sigma = 1.0
    args.sizes = None
    args.first_frame_share = None
    args.validation_image = None

    problems = find_comparison_problems(args) if args.compare else find_problems(args)
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError("\n- ".join(["these settings do not work:", *problems]))
    return args


def trained_size(lora: str) -> dict[str, float]:
    """Return the height, width, frames and fps that a LoRA was trained on, as far as it says.

    That is in the `training_settings.json` beside it, or else, without frames and fps, in the file's metadata.
    """
    path = Path(lora)
    folder = path
    weights = []
    if path.is_file():
        folder = path.parent
        weights = [path]
    elif path.is_dir():
        weights = sorted(path.glob("*.safetensors"))
    elif "/" not in lora:  # no name on the Hub either
        return {}  # `find_lora` will say that it is nowhere
    settings = {}
    for name in ("training_settings.json", "high_noise/training_settings.json", "low_noise/training_settings.json"):
        file = folder / name
        try:
            if not path.exists():
                file = Path(hf_hub_download(lora, name))
            settings = json.loads(file.read_text(encoding="utf-8"))
            break
        except (OSError, ValueError, HfHubHTTPError):  # there is none, or it is no JSON
            continue
    size = {}
    for name in SIZE:
        value = settings.get(name) if isinstance(settings, dict) else None
        if isinstance(value, int | float) and value > 0:
            size[name] = value
    for file in weights:
        resolution = re.fullmatch(r"(\d{1,5})x(\d{1,5})", resolution_of(file))
        if resolution and "height" not in size:
            size["width"] = int(resolution[1])
            size["height"] = int(resolution[2])
    return size


def resolution_of(file: Path) -> str:
    """Return the resolution that the metadata of a weights file names, such as "832x480"; "" if it names none."""
    try:
        with safe_open(file, framework="pt") as weights:
            return (weights.metadata() or {}).get("modelspec.resolution", "")
    except (OSError, SafetensorError):  # said later, by what loads it
        return ""


def given_sources(args: argparse.Namespace) -> list[str]:
    """Name the flags that give prompts."""
    return [f"--{name}" for name in PROMPT_SOURCES if getattr(args, name)]


def find_comparison_problems(args: argparse.Namespace) -> list[str]:
    """Name every setting of a comparison that cannot work."""
    problems = []
    if len(args.compare) < 2:
        problems.append("--compare needs two folders or more")
    if len(args.labels) != len(args.compare):
        problems.append(f"{len(args.labels)} --labels for {len(args.compare)} folders")
    if len(set(args.labels)) < len(args.labels):
        problems.append("--labels must differ")
    sources = given_sources(args)
    if sources:
        problems.append(f"--compare and {', '.join(sources)} exclude each other")
    return problems


def find_problems(args: argparse.Namespace) -> list[str]:
    """Name every setting that cannot work. Sizes are checked later, by `identify_wan`: they depend on the model."""
    problems = []
    if Path(args.output_dir).exists() and not os.path.isdir(args.output_dir):
        problems.append(f"--output_dir {args.output_dir} is a file; give a folder")

    # Prompts
    sources = given_sources(args)
    if len(sources) != 1:
        problems.append(f"give one of {', '.join(f'--{name}' for name in PROMPT_SOURCES)}; got {len(sources)}")
    for name in FILES:
        path = getattr(args, name)
        if path and not os.path.isfile(path):
            problems.append(f"--{name} {path}: no such file")
    if not all(prompt.strip() for prompt in args.prompt or []):
        problems.append("--prompt must not be empty")
    if args.augmented_prompts and not args.vbench:
        problems.append("--augmented_prompts goes with --vbench")
    if args.vmbench and (args.num_samples or 1) > 1:
        problems.append("--vmbench wants one video a prompt: no --num_samples")
    if args.labels:
        problems.append("--labels goes with --compare")
    for image in args.image:
        if not os.path.isfile(image):
            problems.append(f"--image {image}: no such file")
    if args.image and args.batch_size > 1:
        problems.append("--image goes with --batch_size 1: the pipeline takes one picture a call")

    # Model and sampling
    if len(args.lora_scale) != len(args.lora):
        problems.append(f"{len(args.lora_scale)} --lora_scale for {len(args.lora)} --lora")
    if len(args.lora_2_scale) != len(args.lora_2):
        problems.append(f"{len(args.lora_2_scale)} --lora_2_scale for {len(args.lora_2)} --lora_2")
    if args.quantization:
        package = QUANTIZATION[args.quantization]
        if not importlib.util.find_spec(package):
            problems.append(f"--quantization {args.quantization}: pip install {package}")
        for name in ("transformer_path", "transformer_2"):
            if (getattr(args, name) or "").endswith(".safetensors"):
                problems.append("--quantization: diffusers leaves a single file in floats, give a folder")
    if args.quantization == "nf4" and not torch.cuda.is_available():
        problems.append("--quantization nf4 needs a GPU; try int8")
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            problems.append(f"--{name} must be positive, got {value}")
    return problems


# --- Prompts ---------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """A prompt of which videos are wanted."""

    prompt: str  # names the file
    text: str  # what the model is given for it
    count: int  # how many videos


def read_lines(path: str, flag: str) -> list[str]:
    """Read the lines of a text file. Raises `ValueError` for one that is not in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path} is not text in UTF-8: save it as that ({error})") from error


def read_json(path: str, flag: str, keys: set[str]) -> list[dict]:
    """Read a list of objects. Raises `ValueError` when the file holds anything else, or an object lacks a key."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag} {path} is not JSON: {error}") from error
    complete = isinstance(rows, list) and bool(rows)
    complete = complete and all(isinstance(row, dict) and keys <= set(row) for row in rows)
    if not complete:
        raise ValueError(f"{flag} {path} must be a list of objects with {', '.join(sorted(keys))}")
    return rows


def vbench_requests(args: argparse.Namespace) -> list[Request]:
    """Read VBench's prompts of `--dimensions`, each once. Raises `ValueError` for a dimension that is not there."""
    rows = read_json(args.vbench, "--vbench", {"prompt_en", "dimension"})
    known = set()
    for row in rows:
        known.update(row["dimension"])
    for dimension in args.dimensions:
        if dimension not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"--dimensions {dimension}: there is no such dimension; there are {names}")
    texts = [row["prompt_en"] for row in rows]
    if args.augmented_prompts:
        texts = read_lines(args.augmented_prompts, "--augmented_prompts")
        if len(texts) != len(rows):
            raise ValueError(f"--augmented_prompts has {len(texts)} lines for the {len(rows)} entries of --vbench")

    requests = {}
    for row, text in zip(rows, texts, strict=True):
        prompt = row["prompt_en"]
        dimensions = set(row["dimension"]) & set(args.dimensions)
        if not dimensions:
            continue
        count = VBENCH_SAMPLES
        if "temporal_flickering" in dimensions:
            count = VBENCH_FLICKER_SAMPLES
        if prompt in requests:  # several entries may have it
            text = requests[prompt].text
            count = max(count, requests[prompt].count)
        if args.num_samples:
            count = args.num_samples
        requests[prompt] = Request(prompt, text, count)
    return list(requests.values())


def dataset_prompts(args: argparse.Namespace) -> Iterator[str]:
    """Yield captions in the dataset's order; it is streamed, and its clips stay undecoded.

    Raises `ValueError` when there is no such dataset, and when it has no `--caption_column`.
    """
    path = Path(args.dataset_name)
    try:
        if path.is_file():
            rows = load_dataset(str(path.parent), data_files=path.name, split="train", streaming=True)
        else:
            rows = load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split, streaming=True)
            rows = rows.decode(False)
    except (OSError, ValueError) as error:
        reason = train_ltd.network_fault(error) or error
        raise ValueError(f"--dataset_name {args.dataset_name} cannot be read: {reason}") from error
    for row in rows:
        if args.caption_column not in row:
            raise ValueError(f"--caption_column {args.caption_column}: the dataset has {', '.join(row)}")
        caption = row[args.caption_column]
        if isinstance(caption, list):
            caption = caption[0] if caption else None
        yield caption or ""


def read_requests(args: argparse.Namespace) -> Iterator[Request]:
    """Read prompts from any source but `--vmbench`, whose files are called otherwise."""
    if args.vbench:
        yield from vbench_requests(args)
        return
    if args.dataset_name:
        prompts = dataset_prompts(args)
    elif args.prompt_file:
        prompts = read_lines(args.prompt_file, "--prompt_file")
    else:
        prompts = args.prompt
    for prompt in prompts:
        prompt = prompt.strip()
        if prompt:
            yield Request(prompt, prompt, args.num_samples or 1)


def file_stem(prompt: str) -> str:
    """Return the prompt, as VBench has it; where a file cannot be called so, what is left of it and a hash."""
    stem = re.sub(r'^\.|[/"\x00-\x1f]', "_", prompt)
    if stem == prompt and len(prompt.encode()) <= MAX_STEM:
        return prompt
    shortened = stem.encode()[: MAX_STEM - 9].decode(errors="ignore")
    return f"{shortened}-{digest(prompt)[:8]}"


def video_seed(seed: int, prompt: str, sample: int) -> int:
    """Hash what the noise of a video depends on to 32 bits, all that a CPU generator looks at."""
    parts = (seed, prompt, sample)
    hashed = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(hashed, "little")


def plan_videos(args: argparse.Namespace) -> dict[str, dict]:
    """Plan a file for each video: its `prompt`, `text` (what the model is given), `sample` and `seed`.

    The first samples of all prompts come first. Raises `ValueError` when there is no prompt.
    """
    videos = {}
    if args.vmbench:
        for row in islice(read_json(args.vmbench, "--vmbench", {"prompt", "index"}), args.max_prompts):
            if not re.fullmatch(r"\d+", str(row["index"])):
                raise ValueError(f"--vmbench {args.vmbench}: {row['index']!r} is no index such as 0001")
            videos[f"{row['index']}.mp4"] = {"prompt": row["prompt"], "text": row["prompt"], "sample": 0}
    else:
        requests = list(islice(read_requests(args), args.max_prompts))
        most = max((request.count for request in requests), default=0)
        for sample in range(most):
            for request in requests:
                if sample < request.count:
                    name = f"{file_stem(request.prompt)}-{sample}.mp4"
                    videos[name] = {"prompt": request.prompt, "text": request.text, "sample": sample}
    if not videos:
        raise ValueError("there is no prompt in the source that was given")
    for entry in videos.values():
        entry["seed"] = video_seed(args.seed, entry["prompt"], entry["sample"])
    if args.image:
        assign_images(videos, args)
    return videos


def assign_images(videos: dict[str, dict], args: argparse.Namespace) -> None:
    """Give each video the label of its picture, `image`. Raises `ValueError` when pictures and prompts do not pair."""
    prompts = list(dict.fromkeys(entry["prompt"] for entry in videos.values()))
    labels = list(image_labels(args))
    if len(labels) == 1:
        labels = labels * len(prompts)
    if len(labels) != len(prompts):
        raise ValueError(f"--image: {len(labels)} pictures for {len(prompts)} prompts; give one for all, or one each")
    label_of = dict(zip(prompts, labels, strict=True))
    for entry in videos.values():
        entry["image"] = label_of[entry["prompt"]]


def image_labels(args: argparse.Namespace) -> dict[str, str]:
    """Map a label of each `--image`, of its order, name and contents, to its path."""
    labels = {}
    for number, path in enumerate(args.image):
        hashed = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
        labels[f"{number} {Path(path).name} {hashed}"] = path
    return labels


# --- What is recorded ------------------------------------------------------------------------------------------------


def digest(*parts) -> str:
    """Hash the parts. The 1 is that of earlier versions: their folders shall be gone on with."""
    return hashlib.blake2b(json.dumps([1, *parts]).encode(), digest_size=16).hexdigest()


def hash_files(files: list[Path]) -> str:
    """Hash local files, of each its name, its size, and 64 KiB of its head, middle and tail: models are large."""
    length = 2**16
    hashes = []
    for path in files:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            hashed = hashlib.blake2b(str(size).encode(), digest_size=16)
            for start in (0, size // 2, max(0, size - length)):
                file.seek(start)
                hashed.update(file.read(length))
        hashes.append((path.name, hashed.hexdigest()))
    return digest(hashes)


def base_revision(args: argparse.Namespace) -> str:
    """Identify the base by its Hub id, commit and variant, or by the files of a local folder."""
    base = args.pretrained_model_name_or_path
    if not os.path.isdir(base):
        _, commit = WanPipeline.load_config(base, revision=args.revision, return_commit_hash=True)
        return f"{base}@{commit}:{args.variant}"
    files = []
    for part in ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "image_encoder"):
        files += sorted(path for path in Path(base, part).glob("*") if path.is_file())
    return hash_files(files)


def transformer_revision(name: str, subfolder: str) -> str:
    """Identify a fine-tuned transformer by its local files, or by its commit on the Hub."""
    if os.path.isfile(name):
        return hash_files([Path(name)])
    if os.path.isdir(name):
        folder = Path(name, subfolder)
        if not folder.is_dir():
            folder = Path(name)
        return hash_files(sorted(folder.glob("*.*")))
    try:
        _, commit = WanTransformer3DModel.load_config(name, subfolder=subfolder, return_commit_hash=True)
    except OSError:
        _, commit = WanTransformer3DModel.load_config(name, return_commit_hash=True)
    return commit


def lora_revision(name: str, expert: str | None) -> str:
    """Hash the file of a LoRA, and the configuration beside it. Raises `ValueError` when there is none."""
    try:
        files = train_ltd.find_lora(name, expert)
    except ValueError as error:
        raise ValueError(f"--lora {name} cannot be used: {error}") from error
    hashed = hashlib.blake2b(digest_size=16)
    for file in files:
        if file:
            hashed.update(file.read_bytes())
    return hashed.hexdigest()


def load_scheduler(args: argparse.Namespace) -> UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    """Load `--scheduler` with the model's own settings; settles `args.flow_shift`."""
    config = UniPCMultistepScheduler.load_config(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision
    )
    if args.flow_shift is None:
        args.flow_shift = config.get("flow_shift", config.get("shift", 1.0))
    if args.scheduler == "euler":
        return FlowMatchEulerDiscreteScheduler(config["num_train_timesteps"], shift=args.flow_shift)
    return UniPCMultistepScheduler.from_config(
        config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=args.flow_shift
    )


def public_name(name: str) -> str:
    """Return a Hub id as it is, and the last part of a local path."""
    if os.path.exists(name):
        return Path(name).resolve().name
    return name


class Model(NamedTuple):
    """A transformer of the pipeline, which may have two."""

    wan: train_ltd.Wan
    args: argparse.Namespace  # this script's, with its own `expert`, `transformer_path`, `lora` and `lora_scale`


def identify_models(args: argparse.Namespace) -> list[Model]:
    """Return the pipeline's one transformer, or its experts for high and for low noise.

    Raises `ValueError` for what is no such model, and for flags of a second expert that is not there.
    """
    base = args.pretrained_model_name_or_path
    try:
        index = WanPipeline.load_config(base, revision=args.revision)
    except (OSError, HFValidationError) as error:
        reason = train_ltd.network_fault(error) or error
        raise ValueError(f"--pretrained_model_name_or_path {base} cannot be read: {reason}") from error
    args.expert = None
    if not train_ltd.expert_boundary(index):
        given = [f"--{name}" for name in OF_SECOND_EXPERT if getattr(args, name)]
        if given:
            raise ValueError(f"{given[0]}: {base} has one transformer alone")
        return check_image([Model(train_ltd.identify_wan(args), args)])
    args.expert = "high"
    low = argparse.Namespace(**vars(args))
    low.expert = "low"
    low.transformer_path = args.transformer_2
    low.lora = args.lora_2
    low.lora_scale = args.lora_2_scale
    return check_image([Model(train_ltd.identify_wan(one), one) for one in (args, low)])


def check_image(models: list[Model]) -> list[Model]:
    """Return the models. Raises `ValueError` for a picture that they do not take, or lack, or that cannot be read."""
    wan, args = models[0]
    base = args.pretrained_model_name_or_path
    if args.image and not wan.first_frame:
        raise ValueError(f"--image: {base} takes none; leave it out, or see --preset wan22-i2v")
    if wan.first_frame == "channels" and not args.image:
        raise ValueError(f"--image: {base} starts from a picture; give one")
    for path in args.image:
        train_ltd.read_image(path, args)
    return models


def describe(args: argparse.Namespace, models: list[Model], scheduler) -> dict:
    """Collect all that a video depends on, apart from its prompt and sample; no path of this machine."""
    settings = {
        "model": public_name(args.pretrained_model_name_or_path),
        "revision": base_revision(args),
    }
    for suffix, (wan, own) in zip(("", "_2"), models, strict=False):
        transformer = None
        if own.transformer_path:
            transformer = {
                "name": public_name(own.transformer_path),
                "revision": transformer_revision(own.transformer_path, wan.subfolder),
            }
        loras = []
        for name, scale in zip(own.lora, own.lora_scale, strict=True):
            loras.append({"name": public_name(name), "revision": lora_revision(name, own.expert), "scale": scale})
        settings[f"transformer{suffix}"] = transformer
        settings[f"lora{suffix}"] = loras
    settings |= {
        "preset": args.preset,
        "scheduler": type(scheduler).__name__,
        "flow_shift": args.flow_shift,
    }
    for name in (*SAMPLING, "negative_prompt", "fps", "seed", "mixed_precision", "quantization"):
        settings[name] = getattr(args, name)
    return settings


def find_differences(record: dict, settings: dict, made: dict[str, dict], videos: dict[str, dict]) -> list[str]:
    """Name what the videos `made` so far, and the settings in their `record`, have otherwise than those to come."""
    differences = []
    recorded = record["settings"]
    for name in recorded | settings:
        then = recorded.get(name)
        now = settings.get(name)
        if then != now:
            differences.append(f"{name}: {then!r} then, {now!r} now")
    for name, entry in videos.items():
        if name in made and made[name] != entry:
            differences.append(f"{name}: {made[name]!r} then, {entry!r} now")
    return differences


def prepare_folder(
    args: argparse.Namespace, settings: dict, videos: dict[str, dict], accelerator: Accelerator
) -> None:
    """Write `generation.json`. Raises `ValueError` when the folder holds videos that were made otherwise."""
    folder = Path(args.output_dir)
    path = folder / "generation.json"
    record = {"videos": {}}
    if path.is_file():
        record = read_record(path)
    made = {name: entry for name, entry in record["videos"].items() if (folder / name).is_file()}
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        versions[name] = version(name)

    # What was made otherwise cannot be gone on with
    earlier_versions = []
    differences = []
    if made:
        differences = find_differences(record, settings, made, videos)
        earlier_versions = record.get("earlier_versions", [])
        if record["versions"] != versions:
            logger.warning(f"videos so far were made with {record['versions']}, those to come with {versions}")
            earlier_versions.append(record["versions"])
    elif find_videos(folder):
        differences.append("it holds videos, but no generation.json that says how they were made")
    if differences:
        message = f"--output_dir {folder} was made otherwise; take another folder, or the same settings"
        raise ValueError("\n- ".join([message, *differences[:10]]))
    if not accelerator.is_main_process:
        return

    folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in folder.glob(".partial-*"):
        left_by_a_kill.unlink()
    record = {
        "settings": settings,
        "versions": versions,
        "earlier_versions": earlier_versions,
        "videos": made | videos,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    for name, value in settings.items():
        print(f"{name:20} {value}")


# --- Generation ------------------------------------------------------------------------------------------------------


def load_pipeline(args: argparse.Namespace, models: list[Model], scheduler, accelerator: Accelerator) -> WanPipeline:
    """Load the stock pipeline without its text encoder, on this rank's device or offloaded from it."""
    device = accelerator.device
    components = {}
    for wan, own in models:
        transformer = train_ltd.load_transformer(own, wan).eval()
        components[wan.subfolder] = transformer
    if wan.image_embeds:
        encoder = train_ltd.load_image_encoder(args, torch.device("cpu"))
        components["image_encoder"] = encoder.image_encoder
        components["image_processor"] = encoder.image_processor
    pipeline_class = WanPipeline
    if args.image:
        pipeline_class = diffusers.WanImageToVideoPipeline  # without torchvision its import warns
    pipeline = pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=train_ltd.load_vae(args, torch.device("cpu")),
        scheduler=scheduler,
        **components,
        boundary_ratio=wan.boundary_ratio,
        expand_timesteps=wan.timestep_per_token,
    )
    add_loras(pipeline, models)
    if args.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif args.offload == "group":
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipeline.to(device)
    pipeline.set_progress_bar_config(desc="steps", leave=False, disable=not accelerator.is_main_process)
    return pipeline


def read_lora(name: str, transformer: WanTransformer3DModel, expert: str | None = None) -> dict[str, torch.Tensor]:
    """Read a LoRA by its file's own keys, into those of diffusers, with each layer's scale folded into `lora_B`.

    diffusers' own converters drop some keys in silence, and scale others wrongly. Raises `ValueError` for what is no
    plain LoRA of the model, by name.
    """
    try:
        layers = train_ltd.read_lora(name, transformer, expert)
    except ValueError as error:
        flag = "--lora_2" if expert == "low" else "--lora"
        raise ValueError(f"{flag} {error}") from error
    state_dict = {}
    for layer, part in layers.items():
        rank = len(part.down)
        state_dict[f"transformer.{layer}.lora_A.weight"] = part.down
        state_dict[f"transformer.{layer}.lora_B.weight"] = part.up * (part.alpha / rank)
    return state_dict


def add_loras(pipeline: WanPipeline, models: list[Model]) -> None:
    """Load each LoRA with its scale. Raises `ValueError` for one that does not fit the model in all its parts."""
    scales = {}
    for wan, own in models:
        transformer = getattr(pipeline, wan.subfolder)
        for lora, scale in zip(own.lora, own.lora_scale, strict=True):
            name = f"lora_{len(scales)}"
            pipeline.load_lora_weights(
                read_lora(lora, transformer, own.expert),
                adapter_name=name,
                load_into_transformer_2=own.expert == "low",
            )
            scales[name] = scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))


@torch.no_grad()
def sample(
    pipeline: WanPipeline, entries: list[dict], captions: dict[str, str], args: argparse.Namespace
) -> np.ndarray:
    """Sample videos `(B, F, H, W, 3)`, float32 in [0, 1]; `captions` has the file of each prompt's embedding.

    Raises `RuntimeError` when the model returns values that are not finite.
    """
    device = pipeline._execution_device
    embeddings = train_ltd.LatentDataset([], captions, args)
    prompt_embeds = torch.stack([embeddings.load_prompt(entry["text"]) for entry in entries]).to(device)  # (B, 512, D)
    negative_prompt_embeds = embeddings.load_prompt(args.negative_prompt).to(device).expand_as(prompt_embeds)
    image = {}
    if args.image:
        path = image_labels(args)[entries[0]["image"]]
        image = {"image": train_ltd.read_image(path, args)}
    videos = pipeline(
        **image,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        generator=[torch.Generator().manual_seed(entry["seed"]) for entry in entries],
        **{name: getattr(args, name) for name in SAMPLING},
    ).frames
    if not np.isfinite(videos).all():
        texts = [entry["text"] for entry in entries]
        raise RuntimeError(f"the model returned values that are not finite for one of {texts}")
    return videos


def main(args: argparse.Namespace) -> None:
    """Generate what is missing of the videos, or compare folders of them."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.compare:
        page = build_gallery(args.compare, args.labels, args.output_dir, args.num_samples or 1)
        print(f"Open {page}")
        return

    # 1. What can be refused is refused before anything is loaded
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    rank = accelerator.process_index
    world = accelerator.num_processes
    folder = Path(args.output_dir)
    models = identify_models(args)
    scheduler = load_scheduler(args)
    videos = plan_videos(args)
    prepare_folder(args, describe(args, models, scheduler), videos, accelerator)
    missing = [name for name in videos if not (folder / name).is_file()]

    # 2. Embeddings of all prompts that are still needed; then the text encoder is gone
    captions = {}
    if missing:
        texts = {videos[name]["text"] for name in missing}
        captions = train_ltd.cache_captions(args, accelerator, texts | {args.negative_prompt})

    # 3. This rank's share of the videos
    mine = missing[rank::world]
    logger.info(f"rank {rank} of {world}: {len(mine)} of {len(missing)} missing videos", main_process_only=False)
    pipeline = None
    if mine:
        pipeline = load_pipeline(args, models, scheduler, accelerator)
    progress = tqdm(
        total=len(videos),
        initial=len(videos) - len(missing),
        desc="generating",
        unit="video",
        disable=not accelerator.is_main_process,
    )
    for start in range(0, len(mine), args.batch_size):
        names = mine[start : start + args.batch_size]
        frames = sample(pipeline, [videos[name] for name in names], captions, args)
        for name, video in zip(names, frames, strict=True):
            write_video((video * 255).round().astype(np.uint8), folder / name, args.fps)
        made_by_all = len(names) * world
        progress.update(min(made_by_all, progress.total - progress.n))
    progress.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    train_ltd.run_script(main, parse_args)
