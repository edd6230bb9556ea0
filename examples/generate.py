"""Generate videos with Wan2.1, base or fine-tuned: for a look, for VBench or for VMBench; compare folders of them.

    python examples/generate.py --prompt "a dog jumps over a fence" --output_dir outputs/base
    python examples/generate.py --prompt "a dog jumps over a fence" --lora my_lora --output_dir outputs/tuned
    python examples/generate.py --compare outputs/base outputs/tuned --labels Wan2.1 LTD --output_dir outputs/compare

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

import diffusers
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from datasets import load_dataset
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train_ltd.py is a script in the repository's root, not an installed module

from gallery import build_gallery
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
WAN_1_3B = {"pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "height": 480, "width": 832, "num_frames": 81, "fps": 16.0}  # fmt: skip
# What a preset leaves `None` is the model's own; every value has a flag of its name
PRESETS = {
    # VBench's, of the Wan2.1-T2V-1.3B videos on its leaderboard (sampled_videos/README.md there)
    "wan": WAN_1_3B | {"scheduler": "unipc", "num_inference_steps": 50, "guidance_scale": 6.0, "flow_shift": 3.0,
                       "negative_prompt": WAN_NEGATIVE_PROMPT},
    # Section 3.1 has DDIM: first order and deterministic, and so is Euler's method on the flow
    "paper": WAN_1_3B | {"scheduler": "euler", "num_inference_steps": 50, "guidance_scale": 7.5, "flow_shift": None,
                         "negative_prompt": ""},
    # The small Wan that was trained in examples/nano
    "nano": {"pretrained_model_name_or_path": str(ROOT / "examples/nano/wan-nano"),
             "height": 96, "width": 96, "num_frames": 33, "fps": 16.0, "scheduler": "unipc",
             "num_inference_steps": 20, "guidance_scale": 4.0, "flow_shift": None, "negative_prompt": ""},
}  # fmt: skip
VBENCH_DIMENSIONS = """subject_consistency background_consistency temporal_flickering motion_smoothness dynamic_degree
    aesthetic_quality imaging_quality""".split()  # those of the Quality Score
VBENCH_SAMPLES, VBENCH_FLICKER_SAMPLES = 5, 25  # flicker is measured on those of 25 that turn out static
MAX_STEM = 230  # bytes; a file name may have 255
QUANTIZE = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}  # names in torchao.quantization
PROMPT_SOURCES = ("prompt", "prompt_file", "dataset_name", "vbench", "vmbench")
SAMPLING = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames")  # as the pipeline calls them
VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "peft")


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
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

    add = parser.add_argument_group("sampling (defaults are the preset's)").add_argument
    add("--preset", choices=PRESETS, default="wan", help="wan: as VBench samples Wan2.1; paper: as the LTD paper's"
        " section 3.1; nano: for examples/nano/wan-nano")
    add("--scheduler", choices=["unipc", "euler"], help="unipc: second order; euler: first, the counterpart of DDIM")
    add("--num_inference_steps", type=int, help="denoising steps")
    add("--guidance_scale", type=float, help="classifier-free guidance; 1 = none")
    add("--flow_shift", type=float, help="shift of the noise levels (default of paper, nano: the model's own)")
    add("--negative_prompt", help="what guidance leads away from")
    add("--height", type=int, help="pixels, a multiple of 16")
    add("--width", type=int, help="pixels, a multiple of 16")
    add("--num_frames", type=int, help="4k+1")
    add("--fps", type=float, help="frames a second of the files")
    add("--seed", type=int, default=0, help="the same for all models that are to be compared")

    add = parser.add_argument_group("running").add_argument
    add("--batch_size", type=int, default=1, help="videos at once on a device")
    add("--mixed_precision", choices=["no", "bf16"], help="bf16: all but the VAE in bfloat16 (default on a GPU)")
    add("--offload", choices=["model", "group"], help="keep weights in RAM until needed: whole models, or layers ahead"
        " of time, which is slower and smaller; not the text encoder, which runs first and alone")
    add("--quantize", choices=QUANTIZE, help="weights of the transformer in 8 bits, by torchao")
    add("--cache_dir", help="prompt embeddings; give all models' runs the same (default: OUTPUT_DIR/cache)")

    add = parser.add_argument_group("comparison").add_argument
    add("--compare", nargs="+", metavar="DIR", help="no generation: side-by-side videos, filmstrips and index.html of"
        " two or more folders that this script made; the first --num_samples of each prompt (default: 1)")
    add("--labels", nargs="+", help="a name for each folder (default: the folders')")
    return parser


# fmt: on
def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Command line over preset. Raises `ValueError` with everything that is wrong at once."""
    args = build_parser().parse_args(input_args)
    for key, value in PRESETS[args.preset].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.mixed_precision = args.mixed_precision or ("bf16" if torch.cuda.is_available() else "no")
    args.lora_scale = args.lora_scale or [1.0] * len(args.lora)
    args.cache_dir = args.cache_dir or os.path.join(args.output_dir, "cache")
    args.cache_dtype = "float32"  # of the cached embeddings, so that they are the stock pipeline's to the bit
    if args.compare and not args.labels:
        args.labels = [Path(folder).resolve().name for folder in args.compare]
    if problems := find_problems(args):
        raise ValueError("\n- ".join(["these settings do not work:", *problems]))
    return args


def find_problems(args: argparse.Namespace) -> list[str]:
    values, sources = vars(args), [f"--{s}" for s in PROMPT_SOURCES if getattr(args, s)]
    if args.compare:
        checks = [
            (len(args.compare) < 2, "--compare needs two folders or more"),
            (len(args.labels) != len(args.compare), f"{len(args.labels)} --labels for {len(args.compare)} folders"),
            (len(set(args.labels)) < len(args.labels), "--labels must differ"),
            (sources, f"--compare and {', '.join(sources)} exclude each other"),
        ]
        return [message for wrong, message in checks if wrong]
    positive = "num_samples max_prompts num_inference_steps flow_shift fps batch_size".split()
    near = {k: max(16, round(values[k] / 16) * 16) for k in ("height", "width")}
    frames = max(1, round((args.num_frames - 1) / 4) * 4 + 1)
    files = ("prompt_file", "vbench", "augmented_prompts", "vmbench")
    checks = [
        (len(sources) != 1, f"give one of {', '.join(f'--{s}' for s in PROMPT_SOURCES)}; got {len(sources)}"),
        *((values[k] and not os.path.isfile(values[k]), f"--{k} {values[k]}: no such file") for k in files),
        (not all(p.strip() for p in args.prompt or []), "--prompt must not be empty"),
        (args.augmented_prompts and not args.vbench, "--augmented_prompts goes with --vbench"),
        (args.vmbench and (args.num_samples or 1) > 1, "--vmbench wants one video a prompt: no --num_samples"),
        (len(args.lora_scale) != len(args.lora), f"{len(args.lora_scale)} --lora_scale for {len(args.lora)} --lora"),
        *((values[k] is not None and not values[k] > 0, f"--{k} must be positive, got {values[k]}") for k in positive),
        *((values[k] != near[k], f"--{k} must be a multiple of 16, got {values[k]}; try {near[k]}") for k in near),
        (args.num_frames != frames, f"--num_frames must be 4k+1, got {args.num_frames}; try {frames}"),
        (args.labels, "--labels goes with --compare"),
        (args.quantize and not importlib.util.find_spec("torchao"), "--quantize: pip install torchao"),
    ]
    return [message for wrong, message in checks if wrong]


# --- Prompts ---------------------------------------------------------------------------------------------------------


def read_json(path: str, flag: str, keys: set[str]) -> list[dict]:
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag} {path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and keys <= set(r) for r in rows):
        raise ValueError(f"{flag} {path} must be a list of objects with {', '.join(sorted(keys))}")
    return rows


def vbench_prompts(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Prompt, what the model is given for it, and number of samples, once for each prompt of the dimensions."""
    rows = read_json(args.vbench, "--vbench", {"prompt_en", "dimension"})
    known = sorted({d for row in rows for d in row["dimension"]})
    if odd := [d for d in args.dimensions if d not in known]:
        raise ValueError(f"--dimensions {odd[0]}: there is no such dimension; there are {', '.join(known)}")
    texts = [row["prompt_en"] for row in rows]
    if args.augmented_prompts:
        texts = Path(args.augmented_prompts).read_text(encoding="utf-8").splitlines()
        if len(texts) != len(rows):
            raise ValueError(f"--augmented_prompts has {len(texts)} lines for the {len(rows)} entries of --vbench")
    wanted = {}
    for row, text in zip(rows, texts, strict=True):
        if dimensions := set(row["dimension"]) & set(args.dimensions):
            count = VBENCH_FLICKER_SAMPLES if "temporal_flickering" in dimensions else VBENCH_SAMPLES
            text, before = wanted.get(row["prompt_en"], (text, 0))
            wanted[row["prompt_en"]] = text, max(count, before)
    for prompt, (text, count) in wanted.items():
        yield prompt, text, args.num_samples or count


def dataset_prompts(args: argparse.Namespace) -> Iterator[str]:
    """Captions in the dataset's order; it is streamed, and its clips stay undecoded."""
    path = Path(args.dataset_name)
    if path.is_file():
        if path.suffix not in train_ltd.TABLE_BUILDERS:
            raise ValueError(f"--dataset_name {path} is none of {', '.join(train_ltd.TABLE_BUILDERS)}")
        rows = load_dataset(train_ltd.TABLE_BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
    else:
        rows = load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split, streaming=True)
        rows = rows.decode(False)
    for row in rows:
        if args.caption_column not in row:
            raise ValueError(f"--caption_column {args.caption_column}: the dataset has {', '.join(row)}")
        captions = row[args.caption_column]
        caption = (captions or [""])[0] if isinstance(captions, list) else captions
        if caption and caption.strip():
            yield caption.strip()


def read_prompts(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Prompt, what the model is given for it, and number of samples, from any source but `--vmbench`."""
    if args.vbench:
        return vbench_prompts(args)
    lines = args.prompt or []
    if args.prompt_file:
        lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").splitlines()
    prompts = dataset_prompts(args) if args.dataset_name else (line.strip() for line in lines if line.strip())
    return ((prompt, prompt, args.num_samples or 1) for prompt in prompts)


def file_stem(prompt: str) -> str:
    """The prompt, as VBench has it; where a file cannot be called so, what is left of it and a hash."""
    stem = re.sub(r"^\.|[/\x00-\x1f]", "_", prompt)
    if stem == prompt and len(prompt.encode()) <= MAX_STEM:
        return prompt
    return f"{stem.encode()[: MAX_STEM - 9].decode(errors='ignore')}-{train_ltd.digest(prompt)[:8]}"


def plan_videos(args: argparse.Namespace) -> dict[str, dict]:
    """File name -> `prompt`, `text` (what the model is given), `sample`, `seed`; first samples of all come first."""
    videos = {}
    if args.vmbench:
        for row in islice(read_json(args.vmbench, "--vmbench", {"prompt", "index"}), args.max_prompts):
            if not re.fullmatch(r"\d+", str(row["index"])):
                raise ValueError(f"--vmbench {args.vmbench}: {row['index']!r} is no index such as 0001")
            videos[f"{row['index']}.mp4"] = {"prompt": row["prompt"], "text": row["prompt"], "sample": 0}
    else:
        prompts = list(islice(read_prompts(args), args.max_prompts))
        for sample in range(max((count for *_, count in prompts), default=0)):
            for prompt, text, count in prompts:
                if sample < count:
                    entry = {"prompt": prompt, "text": text, "sample": sample}
                    videos[f"{file_stem(prompt)}-{sample}.mp4"] = entry
    if not videos:
        raise ValueError("there is no prompt in the source that was given")
    for entry in videos.values():
        entry["seed"] = train_ltd.sample_seed(args.seed, entry["prompt"], entry["sample"])
    return videos


# --- What is recorded ------------------------------------------------------------------------------------------------


def transformer_revision(path: str) -> str:
    """A hash of the local file or folder, or the commit on the Hub."""
    subfolder = None if os.path.isfile(path) else train_ltd.transformer_subfolder(path)
    if os.path.exists(path):
        files = [Path(path)] if os.path.isfile(path) else sorted(Path(path, subfolder or "").glob("*.*"))
        return train_ltd.digest([(file.name, train_ltd.content_hash(str(file))) for file in files])
    return WanTransformer3DModel.load_config(path, subfolder=subfolder, return_commit_hash=True)[1]


def lora_revision(name: str) -> str:
    """Hash the file of a LoRA, and the configuration beside it. Raises `ValueError` when there is none."""
    try:
        files = train_ltd.find_lora(name)
    except ValueError as error:
        raise ValueError(f"--lora {name} cannot be used: {error}") from error
    hashed = hashlib.blake2b(digest_size=16)
    for file in files:
        if file:
            hashed.update(file.read_bytes())
    return hashed.hexdigest()


def load_scheduler(args: argparse.Namespace) -> UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    """`--scheduler` with the model's own settings; settles `args.flow_shift`."""
    folder = {"subfolder": "scheduler", "revision": args.revision}
    config = UniPCMultistepScheduler.load_config(args.pretrained_model_name_or_path, **folder)
    if args.flow_shift is None:
        args.flow_shift = config.get("flow_shift", config.get("shift", 1.0))
    if args.scheduler == "euler":
        return FlowMatchEulerDiscreteScheduler(config["num_train_timesteps"], shift=args.flow_shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": args.flow_shift}
    return UniPCMultistepScheduler.from_config(config, **flow)


def describe(args: argparse.Namespace, scheduler) -> dict:
    """All that a video depends on, apart from its prompt and sample; no path of this machine."""
    own, same = args.transformer_path, ("negative_prompt", "fps", "seed", "mixed_precision", "quantize")
    loras = zip(args.lora, args.lora_scale, strict=True)
    return {
        "model": public_name(args.pretrained_model_name_or_path),
        "revision": train_ltd.model_identity(args, "transformer", "vae", "text_encoder", "tokenizer"),
        "transformer": own and {"name": public_name(own), "revision": transformer_revision(own)},
        "lora": [{"name": public_name(n), "revision": lora_revision(n), "scale": scale} for n, scale in loras],
        "preset": args.preset,
        "scheduler": type(scheduler).__name__,
        "flow_shift": args.flow_shift,
    } | {key: getattr(args, key) for key in (*SAMPLING, *same)}


def public_name(name: str) -> str:
    return train_ltd.hub_id(name) or Path(name).resolve().name


def prepare_folder(args, settings: dict, videos: dict[str, dict], accelerator: Accelerator) -> None:
    """Write `generation.json`. Raises `ValueError` when the folder holds videos that were made otherwise."""
    folder, differences = Path(args.output_dir), []
    path = folder / "generation.json"
    versions = {"python": platform.python_version()} | {name: version(name) for name in VERSIONS}
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"videos": {}}
    made = {name: entry for name, entry in old["videos"].items() if (folder / name).is_file()}
    earlier = old.get("earlier_versions", []) if made else []
    if made:
        pairs = {key: (old["settings"].get(key), settings.get(key)) for key in old["settings"] | settings}
        pairs |= {name: (made[name], videos[name]) for name in videos if name in made}
        differences = [f"{key}: {then!r} then, {now!r} now" for key, (then, now) in pairs.items() if then != now]
        if old["versions"] != versions:
            logger.warning(f"videos so far were made with {old['versions']}, those to come with {versions}")
            earlier.append(old["versions"])
    elif find_videos(folder):
        differences = ["it holds videos, but no generation.json that says how they were made"]
    if differences:
        message = f"--output_dir {folder} was made otherwise; take another folder, or the same settings"
        raise ValueError("\n- ".join([message, *differences[:10]]))
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in folder.glob(".partial-*"):
            left_by_a_kill.unlink()
        record = {"settings": settings, "versions": versions, "earlier_versions": earlier, "videos": made | videos}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
        print("\n".join(f"{key:20} {value}" for key, value in settings.items()))


# --- Generation ------------------------------------------------------------------------------------------------------


def load_pipeline(args: argparse.Namespace, scheduler, accelerator: Accelerator) -> WanPipeline:
    """The stock pipeline without its text encoder, on this rank's device or offloaded from it."""
    device = accelerator.device
    base, path, kwargs = args.pretrained_model_name_or_path, args.transformer_path, {"subfolder": "transformer"}
    kwargs["dtype"] = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    if args.quantize:
        torchao = importlib.import_module("torchao.quantization")
        kwargs["quantization_config"] = diffusers.TorchAoConfig(getattr(torchao, QUANTIZE[args.quantize])())
    if path and path.endswith(".safetensors"):
        transformer = WanTransformer3DModel.from_single_file(path, config=base, revision=args.revision, **kwargs)
    else:
        base_only = {"revision": args.revision, "variant": args.variant}
        kwargs |= {"subfolder": train_ltd.transformer_subfolder(path)} if path else base_only
        transformer = WanTransformer3DModel.from_pretrained(path or base, **kwargs)
    vae = train_ltd.load_vae(args, torch.device("cpu"))
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, transformer=transformer, vae=vae, scheduler=scheduler)
    add_loras(pipeline, args)
    if args.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif args.offload == "group":
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipeline.to(device)
    pipeline.set_progress_bar_config(desc="steps", leave=False, disable=not accelerator.is_main_process)
    return pipeline


def read_lora(name: str, transformer: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """Read a LoRA by its file's own keys, into those of diffusers, with each layer's scale folded into `lora_B`.

    diffusers' own converters drop some keys in silence, and scale others wrongly. Raises `ValueError` for what is no
    plain LoRA of the model, by name.
    """
    try:
        layers = train_ltd.read_lora(name, transformer)
    except ValueError as error:
        raise ValueError(f"--lora {error}") from error
    state_dict = {}
    for layer, part in layers.items():
        rank = len(part.down)
        state_dict[f"transformer.{layer}.lora_A.weight"] = part.down
        state_dict[f"transformer.{layer}.lora_B.weight"] = part.up * (part.alpha / rank)
    return state_dict


def add_loras(pipeline: WanPipeline, args: argparse.Namespace) -> None:
    """Load each LoRA with its scale. Raises `ValueError` for one that does not fit the model in all its parts."""
    names = []
    for number, lora in enumerate(args.lora):
        name = f"lora_{number}"
        pipeline.load_lora_weights(read_lora(lora, pipeline.transformer), adapter_name=name)
        names.append(name)
    if names:
        pipeline.set_adapters(names, args.lora_scale)


@torch.no_grad()
def sample(pipeline: WanPipeline, entries: list[dict], captions: dict[str, str], args) -> np.ndarray:
    """Videos `(B, F, H, W, 3)`, float32 in [0, 1]; `captions` has the file of each prompt's embedding."""
    device = pipeline._execution_device
    prompts = torch.stack([train_ltd.load_prompt(args, captions[entry["text"]]) for entry in entries]).to(device)
    negative = train_ltd.load_prompt(args, captions[args.negative_prompt]).to(device).expand_as(prompts)
    videos = pipeline(
        prompt_embeds=prompts,
        negative_prompt_embeds=negative,
        generator=[torch.Generator().manual_seed(entry["seed"]) for entry in entries],
        **{key: getattr(args, key) for key in SAMPLING},
    ).frames
    if not np.isfinite(videos).all():
        raise RuntimeError(f"the model returned values that are not finite for one of {[e['text'] for e in entries]}")
    return videos


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.compare:
        page = build_gallery(args.compare, args.labels, args.output_dir, args.num_samples or 1)
        print(f"Open {page}")
        return

    # 1. What can be refused is refused before anything is loaded
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    rank, world, folder = accelerator.process_index, accelerator.num_processes, Path(args.output_dir)
    train_ltd.check_model(args)
    scheduler = load_scheduler(args)
    videos = plan_videos(args)
    prepare_folder(args, describe(args, scheduler), videos, accelerator)
    missing = [name for name in videos if not (folder / name).is_file()]

    # 2. Embeddings of all prompts that are still needed; then the text encoder is gone
    texts = {videos[name]["text"] for name in missing}
    captions, _ = train_ltd.cache_captions(args, accelerator, texts | {args.negative_prompt}) if missing else ({}, 0)

    # 3. This rank's share of the videos
    mine = missing[rank::world]
    logger.info(f"rank {rank} of {world}: {len(mine)} of {len(missing)} missing videos", main_process_only=False)
    pipeline = load_pipeline(args, scheduler, accelerator) if mine else None
    count = {"total": len(videos), "initial": len(videos) - len(missing), "unit": "video"}
    bar = tqdm(desc="generating", disable=not accelerator.is_main_process, **count)
    for start in range(0, len(mine), args.batch_size):
        names = mine[start : start + args.batch_size]
        frames = sample(pipeline, [videos[name] for name in names], captions, args)
        for name, video in zip(names, frames, strict=True):
            write_video((video * 255).round().astype(np.uint8), folder / name, args.fps)
        bar.update(min(len(names) * world, bar.total - bar.n))
    bar.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
