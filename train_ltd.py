#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Fine-tune Wan text-to-video or image-to-video with the Latent Temporal Discrepancy (LTD) loss, as a LoRA or in full.

It trains Wan2.1 (1.3B, 14B, I2V-14B) and Wan2.2 (TI2V-5B, and T2V-A14B and I2V-A14B one `--expert` a run).

A LoRA of the 1.3B model on one GPU, from a folder of `clip.mp4` + `clip.txt` pairs or one with a `metadata.jsonl`:

    accelerate launch -q train_ltd.py --train_data_dir my_clips --output_dir my_lora --validation_prompt "a dog jumps"

All the DiT's weights, with the paper's settings, on eight GPUs:

    accelerate launch --multi_gpu --num_processes 8 train_ltd.py --config examples/recipes/paper_full.yaml \\
        --dataset_name user/clips --output_dir my_wan

Data flows one way, and this file reads in that order: arguments -> the Wan family -> clips -> cache -> batches -> loss
-> weights -> checkpoints -> validation -> card and Hub -> the run. `train` at the end shows the whole step, `main` the
order of everything.

Other programs may import these names: parse_args, build_accelerator, identify_wan, prepare_data, read_clip,
encode_clip, cache_captions, LatentDataset, load_vae, load_transformer, add_lora, predict_flow, evaluate and main.
`main(args, compute_loss=my_loss)` trains with another loss, which is called, and may call, as `compute_loss` below.
This repository's own examples take a few more, which may change; tests/test_style.py lists them.
"""

import argparse
import collections
import contextlib
import csv
import ctypes
import difflib
import functools
import glob
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("loading libraries", file=sys.stderr, flush=True)  # which takes half a minute on a cold disk

import av
import datasets
import diffusers
import fsspec
import huggingface_hub
import imageio.v3 as iio
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.logging import MultiProcessAdapter
from accelerate.utils import (
    AutocastKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from accelerate.utils.fsdp_utils import load_fsdp_optimizer, save_fsdp_optimizer
from datasets.distributed import split_dataset_by_node
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.training_utils import (
    EMAModel,
    cast_training_params,
    compute_density_for_timestep_sampling,
    free_memory,
)
from diffusers.utils import check_min_version, export_to_video
from diffusers.video_processor import VideoProcessor
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import LocalEntryNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, httpx, validate_repo_id
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from PIL import ExifTags, Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ltd_loss import latent_temporal_discrepancy, ltd_loss, ltd_weights

check_min_version("0.42.0")


class RankLogger(MultiProcessAdapter):
    """accelerate's logger, without the number of the rank where there is but one."""

    def process(self, msg, kwargs):
        if PartialState().num_processes > 1:
            return super().process(msg, kwargs)
        return msg, kwargs


logger = RankLogger(logging.getLogger(__name__), {})

# --- Constants -------------------------------------------------------------------------------------------------------
# Models
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
MAX_SEQUENCE_LENGTH = 512  # what WanPipeline.__call__ pads to; encode_prompt's own default is 226
EMA_DECAY = 0.999  # reached gradually
# torch's operators in which its attention ends: what selective checkpointing keeps
KEPT_OPERATORS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
)


class FlashAttention(NamedTuple):
    """A kernel of Hopper GPUs that torch can put in the place of its own flash attention."""

    name: str  # torch's
    module: str
    install: str


FLASH_ATTENTION = {
    "flash_3": FlashAttention("FA3", "flash_attn_interface", "build hopper/ of github.com/Dao-AILab/flash-attention"),
    "flash_4": FlashAttention("FA4", "flash_attn.cute", "pip install flash-attn-4==4.0.0b18"),
}
# Where a pipeline has its transformer, by `--expert`: Wan2.2 A14B has one for high noise and one for low noise
SUBFOLDERS = {None: "transformer", "high": "transformer", "low": "transformer_2"}
OTHER_EXPERT = {"high": "low", "low": "high"}
EXPERT_IN_NAME = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)  # as files of LoRAs are called
# In single files: layers for CLIP's features, and those of models that this script does not train
IMAGE_KEYS = "img_emb|k_img"
UNSUPPORTED_KEYS = "vace_|control_adapter|ref_conv|emb_pos|audio|motion_encoder|face_|pose_"
# Of fp8 files, whose weights mean nothing without their scales
SCALE_KEYS = "scale_weight|weight_scale|scaled_fp8|comfy_quant"
# diffusers' names -> those of the original Wan code, which ComfyUI expects; applied in this order
ORIGINAL_NAMES = {
    "image_embedder.norm1": "img_emb.proj.0",
    "image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "image_embedder.ff.net.2": "img_emb.proj.3",
    "image_embedder.norm2": "img_emb.proj.4",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "attn1.to_out.0": "self_attn.o",
    "attn1.to_": "self_attn.",
    "attn1.": "self_attn.",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.to_": "cross_attn.",
    "attn2.": "cross_attn.",
    "norm2.": "norm3.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
    "condition_embedder.": "",
    "time_proj": "time_projection.1",
    "time_embedder.linear_1": "time_embedding.0",
    "time_embedder.linear_2": "time_embedding.2",
    "text_embedder.linear_1": "text_embedding.0",
    "text_embedder.linear_2": "text_embedding.2",
    "scale_shift_table": "modulation",
}
# Keys of LoRA files: the layer, after any prefix of a dialect, and what of it
LORA_KEY = re.compile(
    r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|pipe\.dit\.|transformer\.|lora_unet__?)*"
    r"(?P<layer>.+)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight|alpha)"
)
ZERO_DIFFERENCE = re.compile(r".+\.(diff|diff_b|diff_m|lora_B\.bias)")  # adds nothing if it is zero
LORA_DIALECTS = (
    "diffusers (transformer.), ComfyUI (diffusion_model.), DiffSynth (pipe.dit., .default.), musubi (lora_unet_), "
    "bare keys, peft folders; plain LoRA on linear layers, with lora_A and lora_B or lora_down and lora_up"
)

# Clips
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MEDIA_SUFFIXES = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".gif", ".png", ".jpg", ".jpeg", ".webp"}
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
DATA_SUFFIXES = {*TABLE_BUILDERS, ".arrow", ".zip", ".tar", ".tgz", ".gz", ".zst", ".bz2", ".xz"}  # may hold clips
ARCHIVES = ("zip://", "tar://", "gzip://")
STILL_FORMATS = ("_pipe", "image2")  # ends of FFmpeg's names of the formats of pictures
HDR_TRANSFERS = (16, 18)  # PQ and HLG, as ITU-T H.273 numbers them
# EXIF orientation -> `matrix` of `displayed_picture`
EXIF_MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
TIME_TOLERANCE = 1e-3  # seconds; Matroska rounds presentation times to milliseconds
MAX_PIXELS = 2**26  # of a picture, twice those of 8K: decoding more is refused
MAX_REMOTE_BYTES = 2**30  # of a clip that is read into memory, on the Hub or in an archive
MAX_SECONDS = 6 * 3600  # of a video of which more than its start is asked for
SETTLING_SECONDS = 2  # until a file's times tell its states apart: FAT counts in steps of two seconds
MAX_CHARACTERS = 10_000  # of a caption; the text encoder reads 512 tokens

# Cache and statistics
CACHE_FORMAT = 3  # part of every entry's key: raise it when what is cached changes
HUB_CACHES = (huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
# What an entry says of its clip, beside the big tensors
STATISTICS = (
    "ltd",
    "ltd_per_frame",
    "ltd_quantiles",
    "gaps",
    "mean",
    "std",
    "height",
    "width",
    "crop_fraction",
    "enlargement",
    "orientation_differs",
    "repeated_fraction",
    "interlaced",
    "hdr",
    "windows",  # how many clips the video has
)
DECODERS = 4  # threads of a rank that read videos, and how many videos wait for the VAE
DAMAGE = (SafetensorError, ValueError, KeyError, TypeError)  # what reading a damaged cache entry raises
STATS_WINDOW = 3  # the window of the LTD statistics, whatever --ltd_window, so that runs stay comparable
MOTION_QUANTILES = (0.5, 0.9)  # of the dataset's LTD: voxels below the first are "static", above the second "motion"
MAX_ENLARGEMENT = 1.5  # of a picture, before it is warned about
CUT_RATIO = 4.0  # a gap this many times the clip's median gap is taken for a hard cut

# Training
SIGMA_DRAWS = 1024
EVAL_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of held-out errors, as shares of the range that is trained
MAX_BAD_STEPS = 10
ESTIMATE_STEPS = 5  # of which the first is left out: it compiles, and fills caches
STRIP_FRAMES = 8  # of a sample in tensorboard
# What of metrics.jsonl trackers get beside `val/`, and by which name: few curves, in groups
TRACKED = {
    "loss": "train/loss",
    "mse": "train/mse",
    "mse_motion": "train/mse_motion",
    "mse_static": "train/mse_static",
    "weight": "train/weight",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "skipped_steps": "train/skipped_steps",
    "seconds_per_step": "time/seconds_per_step",
    "peak_memory_gib": "time/peak_memory_gib",
}
STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")  # spot notice, Slurm, Ctrl-C, a closed terminal
SECONDS_TO_END = 30  # that the launcher has to end a process before it repeats the error of the machine's first one
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped early with a checkpoint, start again

# Files, card and Hub
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
TRIAL_FILE = "trial_skipped.jsonl"  # what a trial says of the videos that it does not train on
ESTIMATE_FILE = "estimate.json"  # examples/benchmark/cost.py reads it
MAX_FILE_NAME = 200  # bytes; file systems take 255
MAX_SAMPLE_NAME = 60  # characters of a prompt in the name of its sample
SUMS_FILE = "SHA256SUMS"  # in a checkpoint, as `sha256sum -c` reads it
CHECKPOINT_BRANCH = "checkpoints"  # of the Hub's repository; experts have one each, with -high and -low
HUB_ID = r"[\w.-]+/[\w.-]+"  # user/name of a repository
WRAPPERS = (RuntimeError, LocalEntryNotFoundError)  # around errors that the Hub's client met
HUB_ERRORS = (HfHubHTTPError, httpx.HTTPError, ConnectionError, *WRAPPERS)
PASSING = (429, *range(500, 600))  # HTTP states worth another try
RETRY_DELAYS = (1, 2, 4, 8, 16)  # seconds between tries at the Hub
MAX_RETRY_DELAY = 600  # seconds, whatever the Hub asks for
CHECKPOINT_FORMAT = 2  # raise it when `load_checkpoint` could not read an older one
CARD_SETTINGS = (
    "pretrained_model_name_or_path",
    "transformer_path",
    "init_lora",
    "expert",
    "train_type",
    "quantization",
    "rank",
    "lora_alpha",
    "dataset_name",
    "width",
    "height",
    "num_frames",
    "sizes",
    "fps",
    "first_frame_share",
    "loss",
    "ltd_window",
    "ltd_scale",
    "ltd_strength",
    "ltd_normalize",
    "weighting_scheme",
    "flow_shift",
    "min_sigma",
    "max_sigma",
    "learning_rate",
    "lr_scheduler",
    "optimizer",
    "mixed_precision",
    "seed",
)
# What a resumed run may change: where things lie, what is looked at, how often, by how many, for how long. Data and
# local models are compared by their contents, wherever they lie; those of the Hub by name and commit.
FREE_SETTINGS = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "transformer_path",
    "init_lora",
    "dataset_name",
    "dataset_config_name",
    "dataset_revision",
    "dataset_split",
    "streaming",
    "video_column",
    "caption_column",
    "max_skipped",
    "max_train_samples",
    "validation_fraction",
    "validation_split",
    "max_train_hours",
    "dataloader_num_workers",
    "overwrite_output_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "eval_steps",
    "max_eval_clips",
    "validation_prompt",
    "validation_steps",
    "validation_num_inference_steps",
    "validation_guidance_scale",
    "validation_negative_prompt",
    "logging_steps",
    "report_to",
    "push_to_hub",
    "push_checkpoints_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "license",
)
# What it may change too, but not without losing the last bits: memory, speed, and the shape of an update
INEXACT_SETTINGS = (
    "gradient_checkpointing",
    "torch_compile",
    "attention_backend",
    "train_batch_size",
    "gradient_accumulation_steps",
)
# What it may change with effect
LASTING_SETTINGS = ("learning_rate", "max_train_steps", "num_train_epochs")
DECAYING_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial")
# Flags that take several values
LIST_FLAGS = (
    "dataset_name",
    "train_data_dir",
    "sizes",
    "lora_target_modules",
    "validation_prompt",
    "validation_image",
)
FLAGS_OF_ONE_SIZE = ("height", "width", "num_frames")  # in place of which --sizes may stand
# Flags of earlier versions, and what took their place
REMOVED_FLAGS = {
    "min_ltd": "filter the table by `examples/visualize_ltd.py report --write_metadata kept.jsonl --min_ltd ...`",
    "max_ltd": "filter the table by `examples/visualize_ltd.py report --write_metadata kept.jsonl --max_ltd ...`",
    "drop_cuts": "filter the table by `examples/visualize_ltd.py report --write_metadata kept.jsonl --drop_cuts`",
    "dry_run": "try a small run: --max_train_samples 8 --max_train_steps 3",
    "skip_vae_check": "leave it out, there is no such check any more",
}
# Not for the card, and free to change when a run is resumed
LOCAL_SETTINGS = (
    "output_dir",
    "output_name",
    "cache_dir",
    "config",
    "resume_from_checkpoint",
    "train_data_dir",
    "sources",
    "validation_prompts_file",
    "validation_image",
)
CITATION = """@article{wu2026ltd, title={Latent Temporal Discrepancy as Motion Prior}, year={2026},
  author={Wu, Meiqi and Song, Bingze and Lin, Ruimin and Zhu, Chen and Feng, Xiaokun and Wu, Jiahong and others},
  journal={arXiv preprint arXiv:2601.20504}}"""


# --- 1. Arguments ----------------------------------------------------------------------------------------------------
def positive_int(text: str) -> int:
    """Read a whole number above 0, for argparse."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def positive_float(text: str) -> float:
    """Read a finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def non_negative_int(text: str) -> int:
    """Read a whole number of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def non_negative_float(text: str) -> float:
    """Read a finite number of at least 0, for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def exponent(text: str) -> float:
    """Read a power that leaves weights finite and above 0, for argparse."""
    value = float(text)
    if not -10 <= value <= 10:
        raise argparse.ArgumentTypeError(f"must lie in [-10, 10], got {text}")
    return value


def seed(text: str) -> int:
    """Read a seed that every library takes, for argparse."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must lie in [0, 2**32 - 1], got {text}")
    return value


def share(text: str) -> float:
    """Read a number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def size(text: str) -> str:
    """Check that a size is written as `WxHxF`, for argparse."""
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"must be width x height x frames, such as 832x480x81, got {text}")
    return text


class Bucket(NamedTuple):
    """The size of a clip in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


class Source(NamedTuple):
    """Where clips come from, with what a recipe may say of each of several sources."""

    path: str | None = None  # a --train_data_dir
    name: str | None = None  # a --dataset_name
    repeats: int = 1  # how many samples an epoch has of each clip, each with noise of its own
    caption_column: str | None = None  # in place of the flag, as is the next
    video_column: str | None = None

    @property
    def place(self) -> str:
        """The folder or the dataset, as the user has named it."""
        return self.path or self.name


def user_path(text: str) -> str:
    """Read a path or a name on the Hub, for argparse. No shell expands the `~` of `--output_dir=~/run` or a recipe."""
    return os.path.expanduser(text)


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors are one line each: the usage of so many flags would push them off the screen."""

    def error(self, message: str):
        end_with(message)


# fmt: off

def build_parser() -> argparse.ArgumentParser:
    """Build the parser, a flag a line. `examples/recipes/flags.py` makes the table of flags from it."""
    formatter = argparse.RawDescriptionHelpFormatter
    switch = argparse.BooleanOptionalAction
    parser = FlagParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--config", type=user_path,
        help="YAML file with any of the flags below; the command line overrides it")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", type=user_path, default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        help="folder or Hub id")
    add("--revision", help="branch, tag or commit of it on the Hub")
    add("--variant", help="variant of its weight files, such as fp16")
    add("--transformer_path", type=user_path,
        help="other transformer: diffusers folder, Hub id, .safetensors in original Wan keys")
    add("--init_lora", type=user_path,
        help="go on training this LoRA (file, folder or Hub id; keys of diffusers, ComfyUI and others)")
    add("--expert", choices=["high", "low"], help="the one of Wan2.2 A14B's two transformers to train: for high noise"
        " (layout and motion) or for low noise (detail); samples use both")
    add("--train_type", choices=["lora", "full"], default="lora", help="train an adapter, or all weights of the DiT")
    add("--quantization", choices=["int8", "nf4"],
        help="a LoRA's frozen base in 8 bits by torchao, in 4 by bitsandbytes (on a GPU); use checkpointing too")
    add("--rank", type=positive_int, help="LoRA rank (default: 32, enough for motion; 175 MB for 1.3B)")
    add("--lora_alpha", type=positive_float, help="LoRA alpha (default: the rank, a scale of 1 in every program)")
    add("--lora_dropout", type=share, default=0.0, help="dropout on the adapter's input")
    add("--lora_target_modules", nargs="+", action="extend", help="modules (default: of attention and feed-forward)")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", action="append",
        help="dataset on the Hub with a video column and a caption column; repeatable")
    add("--dataset_config_name", help="configuration of it")
    add("--dataset_revision", help="branch, tag or commit of it")
    add("--dataset_split", default="train", help="split to train on")
    add("--max_train_samples", type=positive_int, help="use only the first so many rows, for a trial")
    add("--streaming", action=switch, default=False, help="cache a Hub dataset without downloading it first")
    add("--train_data_dir", action="append", type=user_path,
        help="folder with metadata.jsonl/csv/parquet or clip.mp4 + clip.txt pairs, or such a file; repeatable (a"
        " recipe's `sources` have columns and repeats of their own)")
    add("--video_column", default="video", help="column of the clips: paths, embedded bytes, or a Video feature")
    add("--caption_column", default="text", help="captions: a string, or a list of which one is drawn per epoch")
    add("--trigger_word", help="put before every caption and validation prompt; the card's instance_prompt")
    add("--height", type=int, help="pixels, a multiple of 16, or of 32 for TI2V-5B; clips are resized to cover, then"
        " cropped (defaults of size and rate: 832x480, 81 frames at 16 a second; TI2V-5B 1280x704, 121 at 24: those of"
        " Wan's own configurations)")
    add("--width", type=int, help="pixels, a multiple of the same")
    add("--num_frames", type=int, help="frames of a clip, 4k+1; 1 trains on images")
    add("--sizes", nargs="+", action="extend", type=size, metavar="WxHxF",
        help="several sizes in place of these, such as 832x480x81 480x832x81 832x480x1: a clip takes the nearest"
        " aspect, then the longest that it fills, a picture one frame; samples take the first")
    add("--fps", type=positive_float, help="frames a second that clips are sampled at")
    add("--clips_per_video", type=positive_int, default=1, help="windows of a long video, evenly spread; 1: its start")
    add("--max_skipped", type=share, default=0.1, help="stop when more than this share of the videos is unusable")
    add("--caption_dropout", type=share, default=0.1, help="share of samples with an empty caption; guidance needs it")
    add("--first_frame_share", type=share, help="share of samples that are given their first frame, which is left out"
        " of the loss: TI2V-5B trained as image-to-video (default: 0; I2V models are always given it)")
    add("--validation_fraction", type=share, help="hold out this share of the videos, such as 0.1; 0: none")
    add("--validation_split", help="hold out this split of the dataset")
    add("--cache_dir", type=user_path,
        help="encoded clips and captions, reusable by other runs (default: OUTPUT_DIR/cache)")
    add("--cache_dtype", choices=["float16", "float32"], default="float16", help="precision of the cache")

    add = parser.add_argument_group("loss and noise").add_argument
    add("--loss", choices=["ltd", "mse"], default="ltd", help="weight on the squared error; mse is the weight 1")
    add("--ltd_window", type=int, default=3, help="the paper's tau in latent frames, at least 2")
    add("--ltd_scale", type=non_negative_float, default=1.0, help="s in 1 + ln(e + s D); 1 is the paper's")
    add("--ltd_strength", type=exponent, default=1.0, help="power of that weight; 1 is the paper's, 0 plain MSE, 3"
        " favors motion, below 0 stillness. The loss grows with it: AdamW does not mind, --max_grad_norm does")
    add("--ltd_normalize", action=switch, default=False, help="divide each sample's weights by their mean")
    add("--weighting_scheme", choices=["none", "logit_normal"], default="logit_normal", help="density of timesteps")
    add("--flow_shift", type=positive_float, default=3.0, help="shift of training sigmas; 3: motion, 1: detail")
    add("--min_sigma", type=float, default=0.0, help="train on noise levels from here, 0 is clean,")
    add("--max_sigma", type=float, default=1.0, help="to here, 1 is pure noise; an expert has its own range within")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=positive_int, default=1, help="clips a device and micro-batch; one fills a GPU")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches an update")
    add("--num_train_epochs", type=positive_int, help="passes over the data (default for full: 2, as in the paper)")
    add("--max_train_steps", type=positive_int, help="updates, instead of epochs (default for lora: 1000)")
    add("--max_train_hours", type=positive_float, help="stop by the clock, with a checkpoint and exit code 75")
    add("--learning_rate", type=positive_float, help="default: 1e-4 for lora, 2e-5 for full, as in the paper")
    add("--lr_scheduler", choices=[s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT],
        default="constant_with_warmup", help="diffusers' schedules; the paper keeps the rate fixed")
    add("--lr_warmup_steps", type=non_negative_int, help="default: 5 %% of the updates, at most 100")
    add("--optimizer", choices=["adamw", "adamw8bit"], default="adamw", help="adamw8bit needs bitsandbytes")
    add("--adam_weight_decay", type=non_negative_float, default=1e-2, help="decoupled weight decay")
    add("--max_grad_norm", type=non_negative_float, default=1.0, help="clip the gradient's norm; 0: never")
    add("--gradient_checkpointing", nargs="?", const="full", choices=["none", "selective", "full", "offload"],
        default="full", help="recompute activations (81 frames fit); selective keeps self-attention's, which cost most"
        " to recompute; offload is full with the blocks' inputs in RAM (14B, 81 frames: 12.5 GiB)")
    add("--attention_backend", help="diffusers' name of a kernel, such as _native_cudnn, or flash_3 or flash_4 on a"
        " Hopper GPU, whose gradients are not the same to the bit each time (default: torch chooses)")
    add("--mixed_precision", choices=["no", "bf16"], help="default: bf16 on a GPU, where no is TF32; no on a CPU")
    add("--torch_compile", action=switch, default=False, help="compile the transformer's repeated block")
    add("--use_ema", action=switch, default=False, help="keep, validate and publish an average (decay 0.999)")
    add("--dataloader_num_workers", type=non_negative_int, default=0, help="processes that read clips and noise ahead")
    add("--seed", type=seed, default=0, help="of everything random")

    add = parser.add_argument_group("checkpoints, validation, logging").add_argument
    add("--output_dir", type=user_path, default="outputs", help="where everything is written")
    add("--output_name", help="name of the file for ComfyUI, without .safetensors (default: the output folder's)")
    add("--overwrite_output_dir", action=switch, default=False, help="delete the checkpoints of an earlier run in it")
    add("--checkpointing_steps", type=positive_int, default=250, help="write checkpoint-STEP every so many updates")
    add("--checkpoints_total_limit", type=positive_int, help="keep only so many checkpoints, the newest")
    add("--resume_from_checkpoint", type=user_path, help="'latest', 'hub' (the newest there), or the path of one")
    add("--eval_steps", type=positive_int, default=250, help="held-out errors every so many updates, and at first")
    add("--max_eval_clips", type=positive_int, default=32, help="held-out clips used for them")
    add("--validation_prompt", action="append", help="sample this prompt while training; repeatable")
    add("--validation_prompts_file", type=user_path, help="text file with a prompt a line; those after # are left out")
    add("--validation_image", action="append", type=user_path,
        help="picture that a sample of image-to-video starts from, one a prompt; repeatable (default: first frames of"
        " held-out clips, or else of training clips, as the VAE decodes them)")
    add("--validation_steps", type=positive_int, default=250, help="sample every so many updates, and at first")
    add("--validation_num_inference_steps", type=positive_int, default=30, help="denoising steps of a sample")
    add("--validation_guidance_scale", type=float, default=5.0, help="guidance of a sample")
    add("--validation_negative_prompt", default="", help="negative prompt of a sample")
    add("--logging_steps", type=positive_int, default=10, help="log every so many updates")
    add("--report_to", choices=["tensorboard", "wandb", "trackio", "none"], default="tensorboard", help="tracker")

    add = parser.add_argument_group("Hub (log in with `hf auth login` or HF_TOKEN)").add_argument
    add("--push_to_hub", action=switch, default=False, help="create the repository first, upload to it at the end")
    add("--push_checkpoints_to_hub", action=switch, default=False,
        help="in the background, to the branch checkpoints, or checkpoints-high and checkpoints-low of experts")
    add("--hub_model_id", help="repository, user/name (default: the name of the output folder)")
    add("--hub_private_repo", action=switch, default=False, help="create it private")
    add("--license", default="apache-2.0", help="for the card; apache-2.0 is Wan2.1's, your clips may ask for another")
    return parser


# fmt: on
def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, over `--config`, over the defaults.

    Raises `ValueError` with everything that is wrong at once, each with its remedy; argparse itself exits with 2.
    """
    command_line = sys.argv[1:] if input_args is None else [str(argument) for argument in input_args]
    for argument in command_line:
        name = argument.split("=")[0].removeprefix("--").removeprefix("no-")
        if argument.startswith("--") and name in REMOVED_FLAGS:
            raise ValueError(f"--{name} is gone: {REMOVED_FLAGS[name]}")
    parser = build_parser()
    args, unknown = parser.parse_known_args(command_line)
    if unknown:
        parser.error(describe_unknown(unknown[0], command_line, parser))
    if args.config:
        recipe = read_recipe(args.config, parser)
        if args.num_train_epochs or args.max_train_steps:
            # Both say how long a run is: what the command line says counts.
            recipe.pop("num_train_epochs", None)
            recipe.pop("max_train_steps", None)
        if args.validation_split or args.validation_fraction is not None:
            recipe.pop("validation_split", None)
            recipe.pop("validation_fraction", None)
        if args.sizes:
            for name in FLAGS_OF_ONE_SIZE:
                recipe.pop(name, None)
        elif any(getattr(args, name) is not None for name in FLAGS_OF_ONE_SIZE):
            recipe.pop("sizes", None)
        for name in LIST_FLAGS:
            if getattr(args, name):
                recipe.pop(name, None)  # argparse would add the command line's to them
        if args.train_data_dir or args.dataset_name:
            for name in ("train_data_dir", "dataset_name", "sources"):
                recipe.pop(name, None)
        parser.set_defaults(**recipe)
        args = parser.parse_args(command_line)

    settle_sources(args)
    if args.learning_rate is None:
        args.learning_rate = 2e-5 if args.train_type == "full" else 1e-4
    settle_length(args)
    if not args.cache_dir:
        args.cache_dir = os.path.join(args.output_dir, "cache")
    if args.output_name is None:
        args.output_name = Path(args.output_dir).resolve().name.removesuffix(".safetensors")
    if not args.mixed_precision:
        args.mixed_precision = "bf16" if torch.cuda.is_available() else "no"
    args.trigger_word = with_trigger(args, "") or None
    prompts = args.validation_prompt or []
    if args.validation_prompts_file:
        prompts = prompts + read_prompts(args.validation_prompts_file)
    args.validation_prompt = [with_trigger(args, prompt) for prompt in prompts]
    args.validation_negative_prompt = prompt_clean(args.validation_negative_prompt)
    check_args(args)
    return args


def settle_length(args: argparse.Namespace) -> None:
    """Settle how long the run is, if neither the command line nor a recipe has said so."""
    if args.max_train_steps or args.num_train_epochs:
        return
    if args.train_type == "full":
        args.num_train_epochs = 2
    else:
        args.max_train_steps = 1000


def settle_sources(args: argparse.Namespace) -> None:
    """Gather where clips come from in `args.sources`; if it is one, `train_data_dir` or `dataset_name` has it too."""
    sources = list(getattr(args, "sources", []))
    sources += [Source(path=path) for path in args.train_data_dir or []]
    sources += [Source(name=name) for name in args.dataset_name or []]
    args.sources = sources
    only = sources[0] if len(sources) == 1 else Source()
    args.train_data_dir = only.path
    args.dataset_name = only.name


def of_source(args: argparse.Namespace, source: Source) -> argparse.Namespace:
    """Return a copy of the arguments that reads one source."""
    own = argparse.Namespace(**vars(args))
    own.train_data_dir = source.path
    own.dataset_name = source.name
    own.caption_column = source.caption_column or args.caption_column
    own.video_column = source.video_column or args.video_column
    return own


def training_buckets(args: argparse.Namespace) -> list[Bucket]:
    """Return the sizes that clips may take."""
    if not args.sizes:
        return [Bucket(args.num_frames, args.height, args.width)]
    buckets = []
    for text in args.sizes:
        width, height, frames = text.split("x")
        buckets.append(Bucket(int(frames), int(height), int(width)))
    return buckets


def read_sources(items: list, path: str) -> list[Source]:
    """Read a recipe's list of sources. Raises `ValueError` for a key or a value that they do not take."""
    sources = []
    for item in items if isinstance(items, list) else [items]:
        if not isinstance(item, dict) or not set(item) <= set(Source._fields) or ("path" in item) == ("name" in item):
            raise ValueError(
                f"--config {path}: each of `sources` is a mapping with a `path` or a `name`, and if you like "
                f"`repeats`, `caption_column`, `video_column`; got {item}"
            )
        values = dict(item)
        if "path" in values:
            values["path"] = user_path(values["path"])
        if "repeats" in values:
            try:
                values["repeats"] = positive_int(values["repeats"])
            except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"--config {path}: `repeats` of {item} must be a whole number above 0") from error
        sources.append(Source(**values))
    return sources


def describe_unknown(argument: str, command_line: list[str], parser: argparse.ArgumentParser) -> str:
    """Say what may have been meant by an argument that belongs to no flag."""
    if argument.startswith("-"):
        name = argument.split("=")[0]
        options = [option for action in parser._actions for option in action.option_strings]
        nearest = difflib.get_close_matches("--" + name.strip("-").replace("-", "_"), options, n=1)
        if nearest:
            return f"there is no flag {name}; the nearest is {nearest[0]}"
        return f"there is no flag {name}; --help lists all that there are"
    before = command_line[: command_line.index(argument)]
    flags = [word for word in before if word.startswith("--")]
    if not flags:
        return f"`{argument}` belongs to no flag; a folder of clips goes with --train_data_dir"
    flag = flags[-1].split("=")[0]
    return f'`{argument}` belongs to no flag; if it belongs to {flag}, put quotes around all of it: {flag} "..."'


def read_prompts(path: str) -> list[str]:
    """Read a text file of a prompt a line, without empty lines and those after a `#`. Raises `ValueError`."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--validation_prompts_file {path} cannot be read as UTF-8: {error}") from error
    prompts = []
    for line in lines:
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--validation_prompts_file {path} holds no prompt; write one a line")
    return prompts


def find_recipe(path: str) -> Path:
    """Find a recipe by its path from here or from beside this script, or by its name in `examples/recipes`.

    Raises `ValueError`.
    """
    home = Path(__file__).resolve().parent
    recipes = home / "examples" / "recipes"
    for place in (Path(path), home / path, recipes / path):
        if place.is_file():
            return place
    names = ", ".join(recipe.name for recipe in sorted(recipes.glob("*.yaml")))
    raise ValueError(f"--config {path}: there is no such file; {recipes} has {names or 'none either'}")


def read_recipe(path: str, parser: argparse.ArgumentParser) -> dict:
    """Read a YAML file of `flag: value` lines.

    Raises `ValueError` for a name that is no flag, with the nearest, for one that is given twice, and for a value that
    the flag does not take.
    """
    file = find_recipe(path)
    try:
        # Nodes hold each value as it is written: `no`, `007` and `1e-4` are not what YAML makes of them.
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path} must hold lines of `flag: value`")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    given = set()
    values = {}
    for key, node in root.value:
        name = str(key.value)
        if name in REMOVED_FLAGS:
            raise ValueError(f"--config {path}: `{name}` is gone: {REMOVED_FLAGS[name]}")
        if name not in actions and name != "sources":
            nearest = difflib.get_close_matches(name, actions, n=1, cutoff=0)[0]
            raise ValueError(f"--config {path}: there is no flag `{name}`; the nearest is `{nearest}`")
        if name in given:
            line = key.start_mark.line + 1
            raise ValueError(f"--config {path}: line {line} gives `{name}` once more; keep one of them")
        given.add(name)
        if name == "sources":
            values[name] = read_sources(yaml.load(yaml.serialize(node), Loader=yaml.BaseLoader), path)
            continue
        plain = isinstance(node, yaml.ScalarNode) and not node.style
        if node.value == "" or (plain and node.value in ("null", "~")):
            continue
        try:
            if name in LIST_FLAGS:
                items = node.value if isinstance(node, yaml.SequenceNode) else [node]
                values[name] = [recipe_value(actions[name], item) for item in items]
            else:
                values[name] = recipe_value(actions[name], node)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"--config {path}: `{name}`: {error}") from error
    return values


def recipe_value(action: argparse.Action, node: yaml.Node):
    """Convert a recipe's text to what its flag holds. Raises `ValueError` for what the flag does not take."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("takes one value, and not several")
    text = node.value
    if isinstance(action, argparse.BooleanOptionalAction):
        if text not in ("true", "false"):
            raise ValueError(f"must be true or false, got {text}")
        return text == "true"
    is_word = action.type in (None, user_path) and not action.choices
    if is_word and not node.style and text.lower() in ("true", "false"):
        raise ValueError(f"takes a word, got {text}; put quotes around it if that is the word")
    value = action.type(text) if action.type else text
    if action.choices and value not in action.choices:
        raise ValueError(f"must be one of {', '.join(action.choices)}, got {text}")
    return value


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that cannot work. Looks at files, packages and the GPU, and loads nothing.

    Raises `ValueError` with every problem and its remedy.
    """
    problems = []

    # Model
    base = args.pretrained_model_name_or_path
    if not os.path.isdir(base) and not re.fullmatch(HUB_ID, base):
        problems.append(
            f"--pretrained_model_name_or_path {base} is neither a folder nor a name on the Hub, user/model"
        )
    single_file = bool(args.transformer_path) and args.transformer_path.endswith(".safetensors")
    if single_file and not os.path.isfile(args.transformer_path):
        problems.append(f"--transformer_path {args.transformer_path} does not exist")
    if args.train_type == "full":
        for name in ("init_lora", "quantization"):
            if getattr(args, name):
                problems.append(f"--{name} goes with --train_type lora")
    if args.quantization and single_file:
        problems.append("--quantization: diffusers leaves a single file in floats, give a folder")
    if args.quantization == "nf4" and not torch.cuda.is_available():
        problems.append("--quantization nf4 needs a GPU; try int8")
    if (args.quantization or args.optimizer == "adamw8bit") and fsdp_is_asked():
        problems.append("--quantization and adamw8bit go with one GPU or DDP, not with FSDP")

    # Clips
    if not args.sources:
        problems.append("give the clips, by --train_data_dir or --dataset_name")
    for source in args.sources:
        if source.path and not os.path.exists(source.path):
            problems.append(f"--train_data_dir {source.path} does not exist")
    places = [source.place for source in args.sources]
    for place in sorted(set(places)):
        if places.count(place) > 1:
            problems.append(f"{place} is given more than once; to train on it more often, give `repeats` in a recipe")
    if args.sizes:
        for name in FLAGS_OF_ONE_SIZE:
            if getattr(args, name) is not None:
                problems.append(f"give --sizes or --{name}, not both")
        if len(set(args.sizes)) < len(args.sizes):
            problems.append("--sizes has a size twice")
    if args.streaming and any(source.path for source in args.sources):
        problems.append("--streaming goes with --dataset_name; a local folder needs none")
    if args.validation_fraction == 1:
        problems.append("--validation_fraction 1 leaves no video to train on; hold out less, or 0 for none")
    if args.validation_fraction and args.validation_split:
        problems.append("give one of --validation_fraction and --validation_split")
    if args.validation_split and re.fullmatch(r"[\d.]+", args.validation_split):
        problems.append(
            f"--validation_split is the name of a split: try --validation_fraction {args.validation_split}"
        )

    # Loss and noise
    if args.ltd_window < 2:
        problems.append(f"--ltd_window must be at least 2 to hold a pair of frames, got {args.ltd_window}")
    if not 0 <= args.min_sigma < args.max_sigma <= 1:
        problems.append(
            f"--min_sigma {args.min_sigma} and --max_sigma {args.max_sigma}: 0 <= min < max <= 1 is needed"
        )

    # Samples
    images = args.validation_image or []
    if images and len(images) != len(args.validation_prompt):
        problems.append(
            f"give a --validation_image for each prompt: there are {len(images)} for {len(args.validation_prompt)}"
        )
    for image in images:
        if not os.path.isfile(image):
            problems.append(f"--validation_image {image} does not exist")

    # Machine and packages
    packages = []
    if args.report_to != "none":
        packages.append(args.report_to)
    if args.optimizer == "adamw8bit" or args.quantization == "nf4":
        packages.append("bitsandbytes")
    if args.quantization == "int8":
        packages.append("torchao")
    for package in packages:
        if not importlib.util.find_spec(package):
            problems.append(f"a package is missing: pip install {package}")
    if args.attention_backend in FLASH_ATTENTION:
        problems += flash_attention_problems(args.attention_backend)
    elif args.attention_backend and args.attention_backend not in [name.value for name in AttentionBackendName]:
        problems.append(f"--attention_backend {args.attention_backend}: diffusers knows no kernel of that name")
    elif args.attention_backend and "sage" in args.attention_backend:
        problems.append("--attention_backend: sage has no backward pass, and to_q, to_k, to_v would not be trained")
    elif args.attention_backend == "_flash_3":
        problems.append("--attention_backend: _flash_3 has no backward pass in diffusers; use flash_3")
    elif args.attention_backend:
        try:
            _check_attention_backend_requirements(AttentionBackendName(args.attention_backend))
        except (RuntimeError, ImportError) as error:
            problems.append(f"--attention_backend {args.attention_backend}: {error}")
    if args.mixed_precision == "bf16" and torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            problems.append("--mixed_precision bf16: this GPU has no bf16; use no")

    # Files
    name = args.output_name
    plain = name not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f]|\.safetensors$", name)
    if not plain or len(name.encode()) > MAX_FILE_NAME or name.lower().endswith(Path(LORA_FILE).stem):
        problems.append(f"--output_name {name}: give a plain, short name without .safetensors, other than {LORA_FILE}")

    # Checkpoints and Hub
    checkpoint = args.resume_from_checkpoint
    if checkpoint not in (None, "latest", "hub") and not Path(checkpoint, "settings.json").is_file():
        problems.append(
            f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint (it has no settings.json)"
        )
    if checkpoint == "hub" and not args.push_checkpoints_to_hub:
        problems.append("--resume_from_checkpoint hub goes with --push_checkpoints_to_hub")
    try:
        if args.hub_model_id:
            validate_repo_id(args.hub_model_id)
        elif args.push_to_hub or args.push_checkpoints_to_hub:
            validate_repo_id(Path(args.output_dir).resolve().name)
    except HFValidationError as error:
        problems.append(f"--hub_model_id: {error}")

    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError("\n- ".join(["these settings do not work:", *problems]))


def flash_attention_problems(backend: str) -> list[str]:
    """Say what keeps this machine from using `flash_3` or `flash_4`: the GPU, torch, or the package."""
    if not torch.cuda.is_available():
        return [f"--attention_backend {backend} needs a GPU of the Hopper generation or newer"]
    if torch.cuda.get_device_capability() < (9, 0):
        return [f"--attention_backend {backend}: {torch.cuda.get_device_name()} is older than Hopper; leave it out"]
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return [f"--attention_backend {backend}: torch {torch.__version__} cannot; pip install -U 'torch<2.14'"]
    kernel = FLASH_ATTENTION[backend]
    try:
        found = importlib.util.find_spec(kernel.module)
    except ImportError:  # of its package: there is none, or it was built for another torch
        found = None
    if not found:
        return [f"--attention_backend {backend}: a package is missing: {kernel.install}"]
    return []


def with_trigger(args: argparse.Namespace, caption: str) -> str:
    """Clean a caption as the stock pipeline does, after the trigger word, unless it has that already."""
    trigger = args.trigger_word or ""
    if trigger and re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return prompt_clean(caption)
    return prompt_clean(f"{trigger} {caption}")


# --- 2. The Wan family -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Wan:
    """What differs between the models of the Wan family. Read from their configs, never guessed from a name."""

    subfolder: str  # of the pipeline's folder, where the transformer to train is
    boundary_ratio: float | None  # the sigma from which on the pipeline samples with its expert for high noise
    sigma_range: tuple[float, float]  # (0, 1), or the share of the chosen expert
    first_frame: str | None  # how a given first frame enters: None, by more "channels" (I2V), or "replaced" (TI2V-5B)
    image_embeds: bool  # Wan2.1 I2V also attends to CLIP's features of it
    timestep_per_token: bool  # TI2V-5B's pipeline gives each token a timestep; for text all are equal, and one serves
    patch_size: tuple[int, int, int]  # latent frames, rows and columns of a token
    architecture: str  # "wan2.1" or "wan2.2", for the metadata of files
    scheduler: str  # class of the pipeline's own scheduler, by which samples are made
    size_multiple: int  # of height and width, in pixels: what one token covers
    frame_multiple: int  # a clip has a multiple of this many frames, and one more
    defaults: Bucket  # what Wan's own configuration samples
    fps: float  # at this rate


def identify_wan(args: argparse.Namespace) -> Wan:
    """Read the configurations of the base and of `--transformer_path`, before anything big is downloaded.

    Settles in `args` what has its default from the model: `height`, `width`, `num_frames`, `fps`, `first_frame_share`,
    and the range of `min_sigma` and `max_sigma`. Raises `ValueError` for what is no Wan model that is trained here, by
    the name of what gives it away, for what cannot be read, for a wrong `--expert`, for a first frame that the model
    does not take, and for a size that it cannot make.
    """
    base = args.pretrained_model_name_or_path
    path = args.transformer_path
    subfolder = SUBFOLDERS[args.expert]
    keys = []
    patch_shape = None
    try:
        index = WanPipeline.load_config(base, revision=args.revision)
        transformer = WanTransformer3DModel.load_config(base, subfolder="transformer", revision=args.revision)
        vae = AutoencoderKLWan.load_config(base, subfolder="vae", revision=args.revision)
        configs = [index, transformer]
        if path and path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                for key in keys:
                    if key.endswith("patch_embedding.weight"):
                        patch_shape = tuple(file.get_slice(key).get_shape())
        elif path:
            configs.append(WanTransformer3DModel.load_config(path, subfolder=transformer_subfolder(path, subfolder)))
    except (OSError, SafetensorError, HFValidationError, *HUB_ERRORS) as error:
        names = f"--pretrained_model_name_or_path {base}"
        if path:
            names += f" or --transformer_path {path}"
        raise ValueError(f"{names}: {network_fault(error) or error}") from error

    image_to_video = index["_class_name"] == "WanImageToVideoPipeline"
    image_embeds = bool(transformer.get("image_dim"))
    frame_multiple = vae.get("scale_factor_temporal", 4)
    in_channels = transformer["out_channels"]
    if image_to_video:
        # Noisy latents, a mask with a channel for each frame of a latent frame, and the condition
        in_channels = 2 * transformer["out_channels"] + frame_multiple
    unsupported = []
    for key in keys:
        if re.search(SCALE_KEYS, key):
            raise ValueError(
                f"--transformer_path {path} holds weights in scaled fp8 (the key {key}), which diffusers would load "
                "without their scales; take the file in bf16 or fp16"
            )
        if re.search(UNSUPPORTED_KEYS, key) or (re.search(IMAGE_KEYS, key) and not image_embeds):
            unsupported.append(f"the key {key}")
    if keys and image_embeds and not any(re.search(IMAGE_KEYS, key) for key in keys):
        unsupported.append("no img_emb, as the base has")
    for config in configs:
        if config["_class_name"] not in ("WanPipeline", "WanImageToVideoPipeline", "WanTransformer3DModel"):
            unsupported.append(f"the class {config['_class_name']}")
        if config.get("pos_embed_seq_len"):
            unsupported.append("FLF2V's pos_embed_seq_len")
        if config.get("image_dim") and not image_to_video:
            unsupported.append("I2V's image_dim")
    if transformer["in_channels"] != in_channels:
        found = "I2V's in_channels"
        if image_to_video:
            found = f"{transformer['in_channels']} in_channels, where I2V has {in_channels}"
        unsupported.append(found)
    for config in configs[2:]:
        if config["in_channels"] != transformer["in_channels"]:
            unsupported.append(f"{config['in_channels']} channels for the base's {transformer['in_channels']}")
        if config.get("image_dim") != transformer.get("image_dim"):
            unsupported.append(f"the image_dim {config.get('image_dim')} for the base's {transformer['image_dim']}")
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    expected = (width, transformer["in_channels"], *transformer["patch_size"])
    if patch_shape and patch_shape != expected:
        unsupported.append(f"patch_embedding.weight of shape {patch_shape}, for the base's {expected}")
    if unsupported:
        names = " or ".join(name for name in (base, path) if name)
        raise ValueError(
            f"{names} is no Wan model that this script trains (text-to-video or image-to-video of Wan2.1, of Wan2.2 "
            f"A14B, and TI2V-5B): it has {unsupported[0]}"
        )

    boundary_ratio = expert_boundary(index)
    if boundary_ratio and not args.expert:
        raise ValueError(f"{base} has two experts, and a run trains one: give --expert high or --expert low")
    if args.expert and not boundary_ratio:
        raise ValueError(f"--expert {args.expert}: {base} has one transformer alone; leave the flag out")
    sigma_range = (0.0, 1.0)
    if args.expert == "high":
        sigma_range = (boundary_ratio, 1.0)
    elif args.expert == "low":
        sigma_range = (0.0, boundary_ratio)
    architecture = "wan2.2" if boundary_ratio else "wan2.1"
    defaults = Bucket(frames=81, height=480, width=832)
    fps = 16.0
    if vae.get("scale_factor_spatial", 8) == 16:
        # Wan2.2's VAE of stronger compression, for which alone Wan has a configuration of 24 frames a second.
        architecture = "wan2.2"
        defaults = Bucket(frames=121, height=704, width=1280)
        fps = 24.0
    timestep_per_token = bool(index.get("expand_timesteps"))
    first_frame = None
    if image_to_video:
        first_frame = "channels"
    elif timestep_per_token:
        first_frame = "replaced"
    wan = Wan(
        subfolder=subfolder,
        boundary_ratio=boundary_ratio,
        sigma_range=sigma_range,
        first_frame=first_frame,
        image_embeds=image_embeds,
        timestep_per_token=timestep_per_token,
        patch_size=tuple(transformer["patch_size"]),
        architecture=architecture,
        scheduler=index["scheduler"][1],
        size_multiple=vae.get("scale_factor_spatial", 8) * transformer["patch_size"][1],
        frame_multiple=frame_multiple,
        defaults=defaults,
        fps=fps,
    )
    settle_defaults(args, wan)
    settle_first_frame(args, wan)
    check_size(args, wan)
    return wan


def expert_boundary(index: dict) -> float | None:
    """Return the sigma at which a pipeline of two experts changes them, by its `model_index.json`."""
    # A Wan2.1 that was converted anew may carry a boundary without a second transformer.
    if index.get("transformer_2") in (None, [None, None]):
        return None
    return index.get("boundary_ratio")


def settle_defaults(args: argparse.Namespace, wan: Wan) -> None:
    """Fill in what the flags leave to the model, and narrow the noise levels to those of the expert."""
    first = training_buckets(args)[0] if args.sizes else wan.defaults
    defaults = {"num_frames": first.frames, "height": first.height, "width": first.width, "fps": wan.fps}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    lowest, highest = wan.sigma_range
    args.min_sigma = max(args.min_sigma, lowest)
    args.max_sigma = min(args.max_sigma, highest)


def settle_first_frame(args: argparse.Namespace, wan: Wan) -> None:
    """Settle how many samples are given their first frame: all, where the model has no other input.

    Raises `ValueError` for flags of a first frame that the model does not take.
    """
    base = args.pretrained_model_name_or_path
    if wan.first_frame == "channels":
        if args.first_frame_share not in (None, 1):
            raise ValueError(f"--first_frame_share: {base} is given the first frame of all clips; leave the flag out")
        args.first_frame_share = 1.0
    if args.first_frame_share and not wan.first_frame:
        raise ValueError(f"--first_frame_share: {base} takes no image; take TI2V-5B, or leave the flag out")
    if args.validation_image and not args.first_frame_share:
        raise ValueError(
            f"--validation_image: {base} is trained from text here; take an I2V model, or TI2V-5B with "
            "--first_frame_share"
        )


def check_size(args: argparse.Namespace, wan: Wan) -> None:
    """Refuse a size that the model cannot make, with the nearest that it can. Raises `ValueError`."""
    for bucket in training_buckets(args):
        of_list = f" of --sizes {bucket}" if args.sizes else ""
        for name in ("height", "width"):
            value = getattr(bucket, name)
            nearest = max(1, round(value / wan.size_multiple)) * wan.size_multiple
            if value != nearest:
                raise ValueError(
                    f"--{name}{of_list} must be a multiple of {wan.size_multiple}, got {value}; try {nearest}"
                )
        nearest = max(0, round((bucket.frames - 1) / wan.frame_multiple)) * wan.frame_multiple + 1
        if bucket.frames != nearest:
            raise ValueError(
                f"--num_frames{of_list} must be {wan.frame_multiple}k+1, for the VAE would drop the rest; got "
                f"{bucket.frames}, try {nearest}"
            )
        if bucket.frames == 1 and wan.first_frame == "channels":
            raise ValueError(
                f"--num_frames{of_list}: one frame is all given to an image-to-video model, which learns nothing from "
                f"it; try {1 + wan.frame_multiple}"
            )


def transformer_subfolder(path: str, subfolder: str) -> str | None:
    """Return `subfolder` if `path` is a pipeline, or a fine-tune of this script, and `None` if it is a bare model."""
    try:
        WanTransformer3DModel.load_config(path, subfolder=subfolder)
    except OSError:
        return None
    return subfolder


def load_vae(args: argparse.Namespace, device: torch.device) -> AutoencoderKLWan:
    """Load the VAE, frozen and in float32: latents are made once and used in every step."""
    vae = AutoencoderKLWan.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder="vae",
        revision=args.revision,
        variant=args.variant,
        dtype=torch.float32,
    )
    return vae.requires_grad_(False).to(device)


def load_image_encoder(args: argparse.Namespace, device: torch.device) -> "diffusers.WanImageToVideoPipeline":
    """Load CLIP, frozen and in float32, as a pipeline of nothing else: its `encode_image` prepares pictures too."""
    # Named in full, so that it is imported only here: without torchvision that import warns.
    pipeline = diffusers.WanImageToVideoPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype=torch.float32,
        tokenizer=None,
        text_encoder=None,
        transformer=None,
        transformer_2=None,
        vae=None,
    )
    return pipeline.to(device)


@torch.no_grad()
def encode_clip(
    vae: AutoencoderKLWan,
    frames: torch.Tensor,
    with_condition: bool = False,
    image_encoder: "diffusers.WanImageToVideoPipeline | None" = None,
) -> dict[str, torch.Tensor]:
    """Encode frames `(F, 3, H, W)` uint8 to the tensors that training needs of a clip, float32.

    That is `latents` `(C, F', H/8, W/8)`; for I2V also, `with_condition`, `condition` of the same shape, and of an
    `image_encoder` (`load_image_encoder`) `image_embeds` `(257, D)`, CLIP's features of the first frame.
    """
    pixels = frames.to(vae.device, torch.float32).div(127.5).sub(1)
    pixels = pixels.transpose(0, 1)[None]  # (1, 3, F, H, W)
    tensors = {"latents": encode_pixels(vae, pixels)[0]}
    if with_condition:
        # Gray after the first frame, as the stock pipeline has it. The VAE sees the clip whole: later frames of the
        # condition depend on the first one too.
        given = torch.zeros_like(pixels)
        given[:, :, 0] = pixels[:, :, 0]
        tensors["condition"] = encode_pixels(vae, given)[0]
    if image_encoder:
        tensors["image_embeds"] = image_encoder.encode_image(to_image(frames[0]))[0]
    return tensors


def encode_pixels(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels `(B, 3, F, H, W)` in [-1, 1] to latents `(B, C, F', H/8, W/8)`: the mode, normalized."""
    latents = vae.encode(pixels).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=vae.device).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


@torch.no_grad()
def decode_first_frame(vae: AutoencoderKLWan, latents: torch.Tensor) -> np.ndarray:
    """Decode the first frame of latents `(C, F, H, W)` to a picture `(8H, 8W, 3)` uint8: it depends on no other."""
    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    first = latents[:, :1] * std + mean
    video = vae.decode(first[None].to(vae.device)).sample
    (picture,) = VideoProcessor().postprocess_video(video)[0]
    return np.uint8(255 * picture + 0.5)


def to_image(picture: torch.Tensor) -> Image.Image:
    """Turn a picture `(3, H, W)` uint8 into one that pipelines take."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def load_transformer(args: argparse.Namespace, wan: Wan) -> WanTransformer3DModel:
    """Load the model to train on the CPU, with its memory and speed switches set.

    Full fine-tuning trains float32 weights. Under a LoRA the base is frozen; with `--mixed_precision bf16` it is
    loaded in bfloat16, since autocast would work in that anyway.
    """
    base = args.pretrained_model_name_or_path
    path = args.transformer_path
    dtype = torch.float32
    if args.train_type == "lora" and args.mixed_precision == "bf16":
        dtype = torch.bfloat16
    quantization_config = None
    if args.quantization == "int8":
        torchao = importlib.import_module("torchao.quantization")
        quantization_config = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    elif args.quantization == "nf4":
        quantization_config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )

    if path and path.endswith(".safetensors"):
        # Without the base's config it would guess one by the width, and go to the Hub for it.
        transformer = WanTransformer3DModel.from_single_file(
            path, config=base, subfolder=wan.subfolder, revision=args.revision, dtype=dtype
        )
    elif path:
        transformer = WanTransformer3DModel.from_pretrained(
            path,
            subfolder=transformer_subfolder(path, wan.subfolder),
            dtype=dtype,
            quantization_config=quantization_config,
        )
    else:
        transformer = WanTransformer3DModel.from_pretrained(
            base,
            subfolder=wan.subfolder,
            revision=args.revision,
            variant=args.variant,
            dtype=dtype,
            quantization_config=quantization_config,
        )

    if args.gradient_checkpointing == "full":
        transformer.enable_gradient_checkpointing()
    elif args.gradient_checkpointing == "selective":
        context_fn = functools.partial(create_selective_checkpoint_contexts, keep_self_attention)
        transformer.enable_gradient_checkpointing(
            functools.partial(checkpoint, context_fn=context_fn, use_reentrant=False)
        )
    elif args.gradient_checkpointing == "offload":
        transformer.enable_gradient_checkpointing(checkpoint_in_ram)
    if args.attention_backend in FLASH_ATTENTION:
        # They take the place of torch's own flash kernel, behind the same operator.
        torch.nn.attention.activate_flash_attention_impl(FLASH_ATTENTION[args.attention_backend].name)
        transformer.set_attention_backend("_native_flash")
    elif args.attention_backend:
        transformer.set_attention_backend(args.attention_backend)
    return transformer.train().requires_grad_(args.train_type == "full")


def keep_self_attention(
    context: SelectiveCheckpointContext, operator: torch._ops.OpOverload, *args, **kwargs
) -> CheckpointPolicy:
    """Keep the result of self-attention, and compute all else once more.

    Cross-attention, to the caption's 512 tokens, takes as much memory and costs little to compute again. They are
    told apart by the lengths of query and key, the operator's first arguments, `(B, heads, length, width)`.
    """
    if operator in KEPT_OPERATORS and args[0].shape[-2] == args[1].shape[-2]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_in_ram(
    block: torch.nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Run a block of the transformer as full checkpointing does, with its input kept in RAM.

    `hidden_states` are `(B, tokens, width)`, as is what is returned. It is the only input that every block has for
    itself. What the blocks share goes in by name, since autograd, and so the hooks, get the inputs by position only.
    """
    with torch.autograd.graph.saved_tensors_hooks(copy_to_ram, copy_from_ram):
        return checkpoint(
            block,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            temb=temb,
            rotary_emb=rotary_emb,
            use_reentrant=False,
        )


@functools.cache
def offload_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU that copies to RAM while the current one computes."""
    return torch.cuda.Stream(device)


def copy_to_ram(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.device]:
    """Copy a tensor, of equal strides, to RAM; returns it with the device that `copy_from_ram` brings it back to.

    A GPU goes on computing meanwhile, which takes pinned RAM.
    """
    in_ram = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    if not tensor.is_cuda:
        return in_ram.copy_(tensor), tensor.device
    stream = offload_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))  # until the tensor is computed
    tensor.record_stream(stream)  # so that its memory is not reused before it is copied
    with torch.cuda.stream(stream):
        in_ram.copy_(tensor, non_blocking=True)
    return in_ram, tensor.device


def copy_from_ram(saved: tuple[torch.Tensor, torch.device]) -> torch.Tensor:
    """Copy a tensor back to its device, on the stream that goes on with it."""
    in_ram, device = saved
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(offload_stream(device))
    return in_ram.to(device, non_blocking=True)


def predict_flow(
    wan: Wan, transformer: torch.nn.Module, noisy_latents: torch.Tensor, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Predict the flow `noise - latents` at `noisy_latents` `(B, C, F, H, W)`; returns the same shape.

    Of `batch` it reads `sigmas` `(B,)` and `prompt_embeds` `(B, 512, D)`; the model's timestep is 1000 times sigma. A
    batch for image-to-video has more:
    - I2V: `condition` `(B, C, F, H, W)`, and of Wan2.1 `image_embeds` `(B, 257, D)`;
    - TI2V-5B: `first_frame_given` `(B,)` bool, and `latents`, whose first frame then takes the place of the noisy one,
      at timestep 0. What is predicted for it means nothing.
    """
    hidden_states = noisy_latents
    timestep = 1000 * batch["sigmas"]
    if "condition" in batch:
        condition = batch["condition"]
        mask = torch.zeros_like(condition[:, : wan.frame_multiple])  # a channel for each frame of a latent frame
        mask[:, :, 0] = 1
        hidden_states = torch.cat([noisy_latents, mask, condition], dim=1)
    given = batch.get("first_frame_given")
    if given is not None and given.any():
        hidden_states = noisy_latents.clone()
        hidden_states[given, :, 0] = batch["latents"][given, :, 0]
        frames = noisy_latents.shape[2]
        tokens = noisy_latents[0, 0].numel() // math.prod(wan.patch_size)
        timestep = timestep[:, None].repeat(1, tokens)  # (B, tokens), the first frame's first
        timestep[given, : tokens // frames] = 0
    return transformer(
        hidden_states=hidden_states,
        timestep=timestep,
        encoder_hidden_states=batch["prompt_embeds"],
        encoder_hidden_states_image=batch.get("image_embeds"),
        return_dict=False,
    )[0]


# --- 3. Clips: dataset -> clips -> frames ----------------------------------------------------------------------------
@dataclass(frozen=True)
class ClipFacts:
    """What a clip was before it was brought to size and rate. It is stored in the cache, for warnings."""

    height: int  # of the picture as it is shown, in pixels, as is `width`
    width: int
    crop_fraction: float  # share of the picture that the crop throws away
    enlargement: float  # how many times larger its pictures became
    orientation_differs: bool  # a portrait video meets a landscape crop, or the other way round
    repeated_fraction: float  # share of the frames that repeat the one before: the video has fewer than `--fps`
    interlaced: bool
    hdr: bool  # its brightness is coded as PQ or HLG


class Picture(NamedTuple):
    """A picture as a player shows it, and what is to be known of the frame that it comes from."""

    pixels: np.ndarray  # (H, W, 3) uint8
    frame: int  # number of the frame in the video
    still: bool  # the file is a picture, and no video
    interlaced: bool
    hdr: bool


class ClipError(ValueError):
    """A clip cannot be used, and why. `num_frames` is how many frames there were, when they were too few."""

    def __init__(self, reason: str, num_frames: int | None = None):
        super().__init__(reason)
        self.num_frames = num_frames


def describe_fault(error: ClipError | OSError | av.FFmpegError) -> str:
    """Say for `skipped.jsonl` why a video cannot be used."""
    if isinstance(error, ClipError):
        return str(error)
    return f"cannot be read: {error.strerror or error}"


def open_dataset(args: argparse.Namespace, split: str) -> tuple[datasets.Dataset | datasets.IterableDataset, Path]:
    """Open a split of `--train_data_dir` or `--dataset_name`.

    Returns the rows with undecoded `video` and `text`, and the folder that relative paths start from. A row that
    cannot be used may have a `reason`. Raises `ValueError` for a split or a column that is not there, and for a folder
    whose name `datasets` would take for a pattern.
    """
    root = Path(args.train_data_dir or args.dataset_name)
    folder = root
    one_table = any((root / name).is_file() for name in METADATA_FILES)
    if (root / split).is_dir() and not one_table:
        folder = root / split
    table = folder  # `--train_data_dir` may be a table itself
    for name in METADATA_FILES:
        if (folder / name).is_file():
            table = folder / name
            break
    media = []
    if folder.is_dir() and not table.is_file():
        media = find_media(folder, args)
    pairs = any(clip.with_suffix(".txt").is_file() for clip in media)
    if folder == root and split != args.dataset_split and (table.is_file() or pairs):
        raise ValueError(
            f"--validation_split {split}: {root} has no such folder; --validation_fraction 0.1 needs none"
        )
    if folder.is_dir() and not table.is_file() and not media:
        check_folder(folder)

    if table.is_file():
        if table.suffix not in TABLE_BUILDERS:
            raise ValueError(f"--train_data_dir {table} is no folder and none of {', '.join(TABLE_BUILDERS)}")
        options = {}
        if table.suffix == ".csv":
            # As text: `None`, `007` and `3.10` are captions, and not what pandas makes of them.
            with open(table, encoding="utf-8-sig", newline="") as file:
                columns = next(csv.reader(file), [])
            options["features"] = datasets.Features({column: datasets.Value("string") for column in columns})
            options["keep_default_na"] = False
        # Named by its contents: `datasets` remembers a table by its time alone. Its name may look like a pattern.
        dataset = datasets.load_dataset(
            TABLE_BUILDERS[table.suffix],
            name=content_hash(str(table), args),
            data_files=glob.escape(str(table)),
            split="train",
            **options,
        )
        folder = table.parent
    elif pairs:
        return pair_clips_with_captions(media, folder), folder
    else:
        real_name = os.path.realpath(folder)
        if folder.is_dir() and glob.escape(real_name) != real_name:
            raise ValueError(
                f"--train_data_dir {real_name}: `datasets` takes [ ] * ? in a folder's name for a pattern. Rename the "
                "folder, or list its clips in a metadata.jsonl"
            )
        dataset = datasets.load_dataset(
            str(folder) if folder.is_dir() else args.dataset_name,
            args.dataset_config_name,
            split=split,
            revision=args.dataset_revision,
            streaming=args.streaming,
        )

    # Frames are decoded by `read_clip`, at the times that training asks for.
    if args.streaming:
        dataset = dataset.decode(False)  # before select_columns: after it, it has no effect on a Hub's files
    columns = dataset.column_names
    if columns is None:  # a stream that has not been looked into
        columns = list(next(iter(dataset)))
    video_column = args.video_column
    if video_column == "video" and "video" not in columns and "file_name" in columns:
        video_column = "file_name"
    caption_column = args.caption_column
    if caption_column not in columns:
        caption_column = caption_column.split(".")[0]  # a field of it, which `read_captions` takes out
    for flag, column in (("--video_column", video_column), ("--caption_column", caption_column)):
        if column not in columns:
            if flag == "--caption_column" and media:
                raise ValueError(
                    f"--train_data_dir {folder}: its clips have no captions. Write the one of {media[0].name} into "
                    f"{media[0].with_suffix('.txt').name} beside it, and so on, or all into a metadata.jsonl of lines "
                    f'like {{"file_name": "{media[0].relative_to(folder)}", "{column}": "a dog jumps"}}'
                )
            raise ValueError(f"{flag} {column}: there is no such column; the dataset has {', '.join(columns)}")
    dataset = dataset.select_columns([video_column, caption_column])
    if not args.streaming:
        feature = dataset.features[video_column]
        if isinstance(feature, datasets.Video | datasets.Image):
            dataset = dataset.cast_column(video_column, type(feature)(decode=False))
    if video_column != "video":
        dataset = dataset.rename_column(video_column, "video")
    if caption_column != "text":
        dataset = dataset.rename_column(caption_column, "text")
    return dataset, folder


def check_folder(folder: Path) -> None:
    """Refuse a folder without clips that has no table or archive either. Raises `ValueError`."""
    for path in folder.rglob("[!.]*"):
        if path.suffix.lower() in DATA_SUFFIXES:
            return
    raise ValueError(
        f"--train_data_dir {folder} holds no clips (files that end in {', '.join(sorted(MEDIA_SUFFIXES))}). Put clips "
        "and captions there in pairs: dog.mp4 and dog.txt, cat.mp4 and cat.txt, and so on"
    )


def find_media(folder: Path, args: argparse.Namespace) -> list[Path]:
    """Find the videos and pictures in a folder by their suffix, and in folders that it links to, each once.

    Names that begin with a dot are a system's own; what this script has written into the folder is no data.
    """
    own = {os.path.realpath(args.output_dir), os.path.realpath(args.cache_dir)}
    seen = set()
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or real in own:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in MEDIA_SUFFIXES:
                found.append(Path(parent, name))
    videos = {path.with_suffix("") for path in found if path.suffix.lower() not in PICTURE_SUFFIXES}
    # A picture that is called as a video is its thumbnail.
    found = [
        path for path in found if path.suffix.lower() not in PICTURE_SUFFIXES or path.with_suffix("") not in videos
    ]
    return sorted(found)


def pair_clips_with_captions(clips: list[Path], folder: Path) -> datasets.Dataset:
    """Read the community's layout: each of the `clips` in a folder beside a text file of the same name.

    The rows have a `reason` why the clip cannot be used, or `None`. Raises `ValueError` for a caption that is not
    UTF-8.
    """
    rows = []
    for clip in clips:
        path = str(clip.relative_to(folder))
        name = printable(path)
        text = ""
        reason = None
        if name != path:
            reason = "its name is not UTF-8: rename it"
        else:
            try:
                text = read_caption_file(clip.with_suffix(".txt"))
            except ClipError as error:
                reason = str(error)
        rows.append({"video": name, "text": text, "reason": reason})
    return datasets.Dataset.from_list(rows)


def printable(name: str) -> str:
    r"""Write the bytes of a name that are not UTF-8 as `\udcff`, for such a name fits in no table and no log."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def read_caption_file(path: Path) -> str:
    """Read a caption, which is empty where there is no file.

    Raises `ClipError` for what is no file, such as a pipe, from which reading might never end, and `ValueError` for
    one that is not UTF-8.
    """
    if not path.exists():
        logger.warning(f"{path.name} is missing: the caption of its clip is empty")
        return ""
    if not path.is_file():
        raise ClipError(f"its caption {path.name} is no regular file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read(MAX_CHARACTERS + 1)  # one more, so that `read_captions` says that it was cut
    except OSError as error:
        raise ClipError(f"its caption cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def locate_clip(value: str | dict | bytes | None, folder: Path, args: argparse.Namespace) -> str | bytes:
    """Return the path or the bytes of a clip, from whatever the video column holds.

    Rows may be hostile: those of a folder must stay in it, those of a Hub's dataset on the Hub; both may lead into the
    caches of the libraries. Raises `ClipError`.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ClipError("no video in this row")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or "\0" in value:
        raise ClipError("neither a path nor bytes")
    on_hub = not folder.is_dir()
    if on_hub and "://" not in value and not os.path.isabs(value):
        revision = urllib.parse.quote(args.dataset_revision or "main", safe="")
        value = f"hf://datasets/{args.dataset_name}@{revision}/{value}"
    if "://" in value:
        *archives, target = value.split("::")  # as in zip://clip.mp4::hf://datasets/user/clips/all.zip
        known = all(archive.startswith(ARCHIVES) for archive in archives)
        if not (on_hub and known and target.startswith("hf://")):
            raise ClipError("leads out of the dataset's folder")
        return read_remote(value)
    # By its words: a link inside the folder is the user's own, and may lead anywhere.
    path = Path(os.path.abspath(folder / value))
    if not any(path.is_relative_to(os.path.abspath(root)) for root in (folder, *HUB_CACHES)):
        raise ClipError("leads out of the dataset's folder")
    if not path.exists():
        raise ClipError("file not found")
    if not path.is_file():
        raise ClipError("no regular file")  # reading a pipe or a device might never end
    if not path.stat().st_size:
        raise ClipError("file is empty")
    return str(path)


def read_remote(url: str) -> bytes:
    """Read a file on the Hub, or a member of an archive there, into memory. Raises `ClipError`, also above a size."""
    try:
        with fsspec.open(url, "rb") as file:
            size = getattr(file, "size", None)  # which some archives do not know beforehand
            data = b""
            if size is None or size <= MAX_REMOTE_BYTES:
                data = file.read(MAX_REMOTE_BYTES + 1)
                size = len(data)
    except Exception as error:  # of any file system and archive that there is
        raise ClipError(f"cannot be read: {error}") from error
    if size > MAX_REMOTE_BYTES:
        raise ClipError(f"larger than {MAX_REMOTE_BYTES // 2**20} MiB, which is too much to read into memory")
    return data


def content_hash(source: str | bytes, args: argparse.Namespace) -> str:
    """Identify a file by all of its contents, wherever it lies.

    The hash of a path is remembered in the cache folder, so that a start reads no file for it that is as it was. A
    record is named by the path and the state of the file, and never changes: any number of ranks and runs may write
    it.
    """
    new_hash = functools.partial(hashlib.blake2b, digest_size=16)
    if isinstance(source, bytes):
        return new_hash(source).hexdigest()
    state = file_state(os.stat(source))
    record = Path(args.cache_dir, "identities", cache_key(os.path.abspath(source), state))
    with contextlib.suppress(OSError, UnicodeDecodeError):
        identity = record.read_text(encoding="ascii")
        if len(identity) == 2 * new_hash().digest_size:  # a killed run may leave an empty record
            return identity
    with open(source, "rb") as file:
        identity = hashlib.file_digest(file, new_hash).hexdigest()
        status = os.fstat(file.fileno())
    # A file that was written a moment ago may be written once more within one tick of the file system's clock.
    settled = time.time() - status.st_ctime > SETTLING_SECONDS
    if settled and file_state(status) == state:
        with contextlib.suppress(OSError):  # a cache that may only be read is of use all the same
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(identity, encoding="ascii")
    return identity


def file_state(status: os.stat_result) -> list[int]:
    """Return what changes when a file does: `cp -p` and `rsync -t` restore its times, but for that of the inode."""
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def open_source(source: str | bytes) -> io.IOBase:
    """Open a path, or bytes, for reading. FFmpeg, if it opened a path, would take `%d` in it for a number to count."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return open(source, "rb")


def read_clip(
    source: str | bytes, bucket: Bucket | tuple[int, int, int], fps: float, clips_per_video: int = 1
) -> tuple[torch.Tensor, ClipFacts]:
    """Decode a clip from the start of a video, or an image; or several clips, evenly spread over the video.

    `bucket` is the size in frames, height and width. Returns frames `(clips, F, 3, H, W)` uint8 and what the clips
    were before. Raises `ClipError` without a video stream or with too few frames, and `av.FFmpegError` for what cannot
    be decoded.
    """
    bucket = Bucket(*bucket)
    starts = np.zeros(1)
    if clips_per_video > 1:
        span = bucket.frames / fps
        seconds = video_seconds(source)
        count = min(clips_per_video, max(1, int(seconds / span + TIME_TOLERANCE)))
        starts = np.linspace(0, max(0, seconds - span), count)
    times = np.add.outer(starts, np.arange(bucket.frames) / fps).ravel()
    frames = []
    numbers = []  # of the frames in the video
    interlaced = False
    hdr = False
    height, width = 0, 0
    for picture in frames_at(source, times):
        height, width = picture.pixels.shape[:2]
        frames.append(resize_and_crop(picture.pixels, bucket.height, bucket.width))
        numbers.append(picture.frame)
        interlaced = interlaced or picture.interlaced
        hdr = hdr or picture.hdr
    if len(frames) < bucket.frames:
        raise ClipError(f"too short: {len(frames)} frames at {fps:g} fps, {bucket.frames} needed", len(frames))

    count = len(frames) // bucket.frames
    frames = torch.stack(frames[: count * bucket.frames]).unflatten(0, (count, bucket.frames))
    scale = max(bucket.height / height, bucket.width / width)
    kept_area = (bucket.height / scale) * (bucket.width / scale)
    repeated = sum(before == after for before, after in itertools.pairwise(numbers))
    facts = ClipFacts(
        height=height,
        width=width,
        crop_fraction=max(0.0, 1 - kept_area / (height * width)),
        enlargement=scale,
        orientation_differs=(height - width) * (bucket.height - bucket.width) < 0,
        repeated_fraction=repeated / len(numbers),
        interlaced=interlaced,
        hdr=hdr,
    )
    return frames, facts


def choose_buckets(picture: Picture, buckets: list[Bucket]) -> list[Bucket]:
    """Return the sizes for a clip, whose first picture this is: those of the nearest aspect, the longest first.

    A still takes one frame, and a video never does. Raises `ClipError` when no size is left.
    """
    fitting = [bucket for bucket in buckets if (bucket.frames == 1) == picture.still]
    if not fitting and picture.still:
        raise ClipError("a picture, and --sizes has none of one frame", num_frames=1)
    if not fitting:
        raise ClipError("a video, and --sizes has pictures alone")
    height, width = picture.pixels.shape[:2]
    distances = [abs(math.log(bucket.width / bucket.height * height / width)) for bucket in fitting]
    nearest = [
        bucket
        for bucket, distance in zip(fitting, distances, strict=True)
        if math.isclose(distance, min(distances), abs_tol=1e-9)
    ]
    return sorted(nearest, reverse=True)


@contextlib.contextmanager
def open_video(source: str | bytes) -> Iterator[av.container.InputContainer]:
    """Open a path, or bytes, for decoding, and nothing else: a playlist may name any file of this machine."""
    options = {"max_pixels": str(MAX_PIXELS), "protocol_whitelist": "none"}  # by which other files are opened
    with open_source(source) as file:
        # A title that is not UTF-8 is no reason to refuse a clip.
        with av.open(file, metadata_errors="ignore", options=options) as container:
            yield container


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Return the first video stream that is not the cover of a sound file. Raises `ClipError` when there is none."""
    for stream in container.streams.video:
        if stream.disposition & av.stream.Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise ClipError("its codec is unknown")
        check_pixels(stream.width, stream.height)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # whatever size the stream changes to
        stream.thread_type = "AUTO"
        return stream
    raise ClipError("no video stream")


def check_pixels(width: float, height: float) -> None:
    """Refuse a picture that would take gigabytes. Raises `ClipError`."""
    if width * height > MAX_PIXELS:
        raise ClipError(f"too large: {width:.0f} x {height:.0f} pixels")


def video_seconds(source: str | bytes) -> float:
    """Measure a video by its packets: the container's own duration may be the sound's, or that of a longer file."""
    with open_video(source) as container:
        stream = video_stream(container)
        if (container.duration or 0) / av.time_base > MAX_SECONDS:
            raise ClipError(f"too long: more than {MAX_SECONDS // 3600} hours")
        starts = []
        ends = []
        for packet in container.demux(stream):
            if packet.pts is not None:
                starts.append(packet.pts)
                ends.append(packet.pts + (packet.duration or 0))
        if not starts:
            return 0.0
        return float((max(ends) - min(starts)) * stream.time_base)


def frames_at(source: str | bytes, times: np.ndarray) -> Iterator[Picture]:
    """Yield the pictures on display at ascending times, in seconds after the first picture.

    They are as a player shows them: upright, with square pixels. Ends with the video, whether or not all times have
    come. Raises `ClipError` for a frame that the decoder marks as corrupt, or that is too large.
    """
    shown = None  # the picture on display since `start`
    start = 0.0
    origin = None  # presentation time of the first picture
    interval = 0.0  # how long the picture on display claims to last
    number = 0
    with open_video(source) as container:
        stream = video_stream(container)
        is_still = container.format.name.endswith(STILL_FORMATS)
        matrix = exif_matrix(source) if is_still else None
        for index, frame in enumerate(itertools.chain(container.decode(stream), [None])):
            if frame is not None and frame.is_corrupt:
                raise ClipError("damaged: the decoder marks frames as corrupt")
            if frame is None:  # the last picture stays for its own duration; a still has none
                end = start + max(interval, 2 * TIME_TOLERANCE)
            else:
                presented = frame.time
                if presented is None:
                    presented = index / (stream.average_rate or 25)
                if origin is None:
                    origin = float(presented)
                end = float(presented) - origin
            while shown is not None and number < len(times) and times[number] < end - TIME_TOLERANCE:
                pixels = displayed_picture(shown, stream, matrix or display_matrix(shown))
                interlaced = shown.interlaced_frame and not is_still  # the lines of a PNG are of one moment
                hdr = stream.codec_context.color_trc in HDR_TRANSFERS
                yield Picture(pixels, index - 1, is_still, interlaced, hdr)
                number += 1
            if frame is None or number == len(times):
                return
            interval = float(frame.duration * frame.time_base) if frame.duration else end - start
            shown = frame
            start = end


def exif_matrix(source: str | bytes) -> tuple[int, int, int, int]:
    """Return how a picture asks to be turned and mirrored, as `displayed_picture` takes it.

    PyAV cannot read the side data of a frame that brings an EXIF block along.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        orientation = 1
    return EXIF_MATRICES.get(orientation, EXIF_MATRICES[1])


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return how a video asks to be turned and mirrored, as `displayed_picture` takes it."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return EXIF_MATRICES[1]
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d


def displayed_picture(frame: av.VideoFrame, stream: av.VideoStream, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Return a frame `(H, W, 3)` uint8 as a player shows it: with square pixels, turned and mirrored.

    `matrix` is `(a, b, c, d)` of x' = a x + c y and y' = b x + d y, from the frame's axes to the display's.
    """
    pixel_aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
    width = max(1, round(frame.width * pixel_aspect))
    check_pixels(width, frame.height)
    if width == frame.width:
        picture = frame.to_ndarray(format="rgb24")
    else:
        square = frame.reformat(width=width, height=frame.height, interpolation="BICUBIC")
        picture = square.to_ndarray(format="rgb24")
    a, b, c, d = matrix
    x_axis, y_axis = a, d
    if abs(c) > abs(a):  # the axes trade places
        picture = picture.swapaxes(0, 1)
        x_axis, y_axis = c, b
    if x_axis < 0:
        picture = np.fliplr(picture)
    if y_axis < 0:
        picture = np.flipud(picture)
    return picture


def resize_and_crop(picture: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Resize a picture `(H, W, 3)` with antialiasing to cover the size, and keep the center: `(3, H, W)` uint8.

    Raises `ClipError` for a picture so narrow that it would have to be huge to cover it.
    """
    picture = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    scale = max(height / picture.shape[1], width / picture.shape[2])
    covering_height = max(height, round(picture.shape[1] * scale))
    covering_width = max(width, round(picture.shape[2] * scale))
    check_pixels(covering_width, covering_height)
    picture = F.interpolate(picture[None], (covering_height, covering_width), mode="bicubic", antialias=True)[0]
    top = (covering_height - height) // 2
    left = (covering_width - width) // 2
    return picture[:, top : top + height, left : left + width].contiguous()


# --- 4. Cache: frames -> latents, captions -> prompt_embeds ----------------------------------------------------------
@dataclass(frozen=True)
class Clip(ClipFacts):
    """A clip as training knows it: a window of a video, or an image. Its large tensors are in the cache."""

    order: tuple[int, int, int]  # shard, row and window: sorts clips as the dataset has them
    name: str  # its file, with #0, #1, ... after it for the windows of a video that has several
    captions: list[str]
    identity: str  # hash of the video's contents, which its copies and windows share
    path: str  # of its entry, in the cache folder
    bucket: Bucket  # its size in training
    encoded: bool  # by this start; else it was in the cache already
    ltd: float  # mean over voxels, of LTD with the window STATS_WINDOW, as all that follows
    ltd_per_frame: list[float]
    ltd_quantiles: list[float]  # over voxels, at 0, 5, ... 100 %
    gaps: list[float]  # mean distance of each latent frame to the next
    mean: float  # of the latents, as is `std`
    std: float
    source: int = 0  # number of the source that it comes from
    # What encoding it took in this run; loading the VAE, which is done once, is no part of it.
    seconds: float = field(default=0.0, compare=False)

    def largest_jump(self) -> tuple[float, int]:
        """Find the largest gap as a multiple of their median, and the latent frame before it.

        The first gap does not count: latent frame 0 is one picture and not four, so a causal VAE inflates it. Returns
        `(0, 0)` for a clip too short to tell.
        """
        gaps = self.gaps[1:]
        if len(gaps) < 3:
            return 0.0, 0
        median = max(sorted(gaps)[len(gaps) // 2], 1e-9)
        return max(gaps) / median, 1 + gaps.index(max(gaps))

    def cut_is_suspected(self) -> bool:
        """Tell whether a gap is so large that there may be a hard cut."""
        return self.largest_jump()[0] > CUT_RATIO


@dataclass
class Video:
    """A row of the dataset on its way into the cache."""

    order: tuple[int, int]  # shard and row
    name: str
    text: str | list | dict | None  # its captions, as the dataset has them
    identity: str = ""
    statistics: list[dict] = field(default_factory=list)  # of its clips, when they are in the cache
    frames: torch.Tensor | None = None  # (clips, F, 3, H, W) uint8, when they are not
    bucket: Bucket | None = None
    facts: ClipFacts | None = None  # of the frames
    reason: str | None = None  # why it cannot be used
    num_frames: int | None = None  # how many frames there were, when they were too few
    damage: list[str] = field(default_factory=list)  # warnings of its entries in the cache


def cache_key(*parts) -> str:
    """Hash whatever an entry depends on to the name of its file."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def model_identity(args: argparse.Namespace, *subfolders: str) -> str:
    """Return what the cache knows a component by: Hub id and commit, or the contents of a local folder.

    The first start reads a local model's files for it; later ones remember.
    """
    path = args.pretrained_model_name_or_path
    if not os.path.isdir(path):
        _, commit = WanPipeline.load_config(path, revision=args.revision, return_commit_hash=True)
        return f"{path}@{commit}:{args.variant}"
    hashes = []
    for subfolder in subfolders:
        for file in sorted(Path(path, subfolder).glob("*")):
            if file.is_file():
                hashes.append((file.name, content_hash(str(file), args)))
    return cache_key(hashes)


def save_entry(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a cache entry: beside, then renamed, so that a killed run leaves no half of one."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # machines that share a cache may share a pid
    path.parent.mkdir(parents=True, exist_ok=True)
    # `save_file` needs `set_mode`, which changes the umask of other threads for a moment.
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # a full disk would fill up with halves


def set_mode(path: Path) -> None:
    """Give a file the mode that the umask leaves to new ones: safetensors writes 0600, which locks out a group."""
    umask = os.umask(0)  # which cannot be read otherwise
    os.umask(umask)
    with contextlib.suppress(PermissionError):  # some mounted file systems have no modes
        path.chmod(0o666 & ~umask)


def load_statistics(path: Path, warn: Callable[[str], None]) -> dict | None:
    """Load the small tensors of an entry, as numbers and lists; `None` when it is absent, damaged or not readable.

    Calls `warn` with what is to be said of the damage.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).tolist() for name in file.keys() if name in STATISTICS}
    except FileNotFoundError:
        return None
    except (OSError, *DAMAGE) as error:
        # The caller would take an `OSError` for one of the clip.
        warn(f"cache entry {path} is damaged and encoded again: {error}")
        return None


def load_entry(args: argparse.Namespace, file: str) -> dict[str, torch.Tensor]:
    """Load the big tensors of an entry, as float32. Raises `RuntimeError` with the remedy for a damaged one."""
    path = Path(args.cache_dir, file)
    try:
        with safe_open(path, framework="pt") as entry:
            return {name: entry.get_tensor(name).float() for name in entry.keys() if name not in STATISTICS}
    except DAMAGE as error:
        path.unlink(missing_ok=True)
        raise RuntimeError(
            f"cache entry {path} is damaged: {error}. It was removed; start again with "
            "--resume_from_checkpoint latest, and it is encoded again."
        ) from error


def latent_statistics(latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the statistics of latents `(C, F, H, W)` that are stored with each cache entry."""
    latents = latents.float()
    ltd = latent_temporal_discrepancy(latents[None], STATS_WINDOW)[0]  # (F, H, W)
    quantiles = np.quantile(ltd.flatten().cpu().numpy(), np.linspace(0, 1, 21))
    return {
        "ltd": ltd.mean(),
        "ltd_per_frame": ltd.mean(dim=(1, 2)),
        "ltd_quantiles": torch.from_numpy(quantiles),
        "gaps": torch.linalg.vector_norm(latents.diff(dim=1), dim=0).mean(dim=(1, 2)),
        "mean": latents.mean(),
        "std": latents.std(),
    }


class ClipReader:
    """Reads this rank's rows of a split: the cached statistics, or decoded frames of what is not cached."""

    def __init__(self, args: argparse.Namespace, split: str, accelerator: Accelerator, wan: Wan | None = None):
        self.args = args
        self.with_condition = wan is not None and wan.first_frame == "channels"
        self.with_image_embeds = wan is not None and wan.image_embeds
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        self.dataset, self.folder = open_dataset(args, split)
        self.streaming = isinstance(self.dataset, datasets.IterableDataset)
        self.buckets = training_buckets(args)
        encoders = ["vae"]
        if self.with_image_embeds:
            encoders += ["image_encoder", "image_processor"]
        identity = model_identity(args, *encoders)
        if self.with_condition:
            identity = f"{identity} with condition"
        self.keys = {}  # of the entries of each size: its own counts, and not the list
        for bucket in self.buckets:
            self.keys[bucket] = cache_key(
                CACHE_FORMAT, identity, bucket, args.fps, args.clips_per_video, args.cache_dtype
            )

    def count(self) -> int | None:
        """Return how many rows this rank reads; `None` for a stream."""
        if self.streaming:
            return None
        rows = min(len(self.dataset), self.args.max_train_samples or len(self.dataset))
        return len(range(self.rank, rows, self.world))

    def rows(self) -> Iterator[tuple[tuple[int, int], dict]]:
        """Yield this rank's rows with their place, `(shard, row)`."""
        if self.streaming and self.args.max_train_samples:
            first_rows = enumerate(self.dataset)
            for number, row in itertools.islice(first_rows, self.rank, self.args.max_train_samples, self.world):
                yield (0, number), row
        elif self.streaming:
            yield from stream_rows(self.dataset, self.rank, self.world)
        else:
            for position in range(self.count()):
                number = self.rank + position * self.world
                yield (0, number), self.dataset[number]

    def read_ahead(self) -> Iterator[Video]:
        """Yield this rank's videos in the dataset's order, while threads read the next ones.

        Nothing is logged there, so that what is logged has the order of the videos too.
        """
        threads = ThreadPoolExecutor(DECODERS)
        ahead = collections.deque()
        try:
            for order, row in self.rows():
                ahead.append(threads.submit(self.read, order, row))
                if len(ahead) > DECODERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def read(self, order: tuple[int, int], row: dict) -> Video:
        """Read a row. What makes its video unusable is the result's `reason`, and no exception."""
        value = row["video"]
        name = value.get("path") if isinstance(value, dict) else value
        if not isinstance(name, str):
            name = f"row {order}"
        name = printable(name)
        video = Video(order, name, row["text"])
        try:
            if row.get("reason"):
                raise ClipError(row["reason"])
            source = locate_clip(value, self.folder, self.args)
            video.identity = content_hash(source, self.args)
            if len(self.buckets) == 1:
                self.read_as(self.buckets[0], source, video)
            else:
                self.read_by_size(source, video)
        except (ClipError, OSError, av.FFmpegError) as error:
            video.reason = describe_fault(error)
            video.num_frames = getattr(error, "num_frames", None)
        return video

    def read_as(self, bucket: Bucket, source: str | bytes, video: Video) -> None:
        """Fill in a video's clips of this size, from the cache or decoded."""
        video.bucket = bucket
        video.statistics = self.cached_statistics(video)
        if not video.statistics:
            video.frames, video.facts = read_clip(source, bucket, self.args.fps, self.args.clips_per_video)

    def read_by_size(self, source: str | bytes, video: Video) -> None:
        """Fill in a video's clips of the best size of several. Raises `ClipError` when it fills none.

        Which that is depends on the first picture, and on how many frames can be decoded: what a header says of their
        number is an estimate. What was chosen before is remembered, so that a warm start decodes nothing.
        """
        record = Path(self.args.cache_dir, "sizes", cache_key(self.buckets, self.args.fps, video.identity))
        with contextlib.suppress(OSError, ValueError):
            self.read_as(self.buckets[int(record.read_text(encoding="ascii"))], source, video)
            return
        too_short = ClipError("no picture")
        for picture in frames_at(source, np.zeros(1)):
            for bucket in choose_buckets(picture, self.buckets):
                try:
                    self.read_as(bucket, source, video)
                except ClipError as error:
                    if error.num_frames is None:
                        raise
                    too_short = error
                    continue
                with contextlib.suppress(OSError):  # that of a full disk is not the clip's fault
                    record.parent.mkdir(parents=True, exist_ok=True)
                    record.write_text(str(self.buckets.index(bucket)), encoding="ascii")
                return
        raise too_short

    def entry_path(self, video: Video, window: int) -> str:
        """Name the cache entry of a clip, relative to the cache folder."""
        return f"latents/{cache_key(self.keys[video.bucket], video.identity, window)}.safetensors"

    def cached_statistics(self, video: Video) -> list[dict]:
        """Load the statistics of all clips of a video; none when one of them is not in the cache."""
        statistics = []
        windows = 1  # how many there are stands in the first entry
        while len(statistics) < windows:
            path = Path(self.args.cache_dir, self.entry_path(video, len(statistics)))
            entry = load_statistics(path, video.damage.append)
            if entry is None:
                return []
            windows = entry.pop("windows")
            statistics.append(entry)
        return statistics


def stream_rows(dataset: datasets.IterableDataset, rank: int, world: int) -> Iterator[tuple[tuple[int, int], dict]]:
    """Yield a rank's rows with their place `(shard, row)`, which sorts into the dataset's order whatever the ranks.

    They are whole shards, of which nobody else downloads anything, unless those are too few to share evenly.
    """
    shards = dataset.num_shards
    if shards % world and shards < 8 * world:
        for number, row in itertools.islice(enumerate(dataset), rank, None, world):
            yield (0, number), row
    else:
        for shard in range(rank, shards, world):
            for number, row in enumerate(split_dataset_by_node(dataset, shard, shards)):
                yield (shard, number), row


def read_captions(value: str | list | None, name: str, args: argparse.Namespace) -> list[str]:
    """Return the captions of a row, with the trigger word: at least one, which may be empty.

    Raises `ValueError` for a column of fields of which `--caption_column` names none.
    """
    fields = args.caption_column.split(".")[1:]
    while isinstance(value, dict) and fields and fields[0] in value:
        value = value[fields.pop(0)]
    if isinstance(value, dict):
        names = ", ".join(value)
        raise ValueError(
            f"--caption_column {args.caption_column} holds the fields {names}: take one, such as "
            f"--caption_column {args.caption_column.split('.')[0]}.{next(iter(value))}"
        )
    values = value if isinstance(value, list) else [value]
    captions = []
    for text in values or [""]:
        text = "" if text is None else str(text)
        if len(text) > MAX_CHARACTERS:
            logger.warning(f"{name}: caption cut to {MAX_CHARACTERS} characters", main_process_only=False)
        captions.append(with_trigger(args, text[:MAX_CHARACTERS]))
    return captions


def encode_video(
    vae: AutoencoderKLWan,
    image_encoder: "diffusers.WanImageToVideoPipeline | None",
    video: Video,
    reader: ClipReader,
    args: argparse.Namespace,
) -> dict[Path, dict[str, torch.Tensor]]:
    """Encode the clips of a video, and leave their statistics in it. Returns the cache entries, by their places."""
    entries = {}
    for frames in video.frames:
        tensors = encode_clip(vae, frames, reader.with_condition, image_encoder)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            video.reason = "the VAE returned values that are not finite"
            return {}
        entry = latent_statistics(tensors["latents"])
        for name, value in asdict(video.facts).items():
            entry[name] = torch.tensor(value)
        entry["windows"] = torch.tensor(len(video.frames))
        for name, tensor in tensors.items():
            entry[name] = tensor.to(getattr(torch, args.cache_dtype))
        path = Path(args.cache_dir, reader.entry_path(video, len(entries)))
        entries[path] = {name: tensor.cpu() for name, tensor in entry.items()}
    for entry in entries.values():
        statistics = {name: entry[name].tolist() for name in STATISTICS}
        del statistics["windows"]
        video.statistics.append(statistics)
    return entries


def cache_clips(
    args: argparse.Namespace, accelerator: Accelerator, split: str, wan: Wan | None = None
) -> tuple[list[Clip], list[Video]]:
    """Encode each video of a split that is not in the cache yet; the ranks share the work.

    Returns on every rank all clips, and the videos that cannot be used, each with its `reason`; both in the dataset's
    order.
    """
    reader = ClipReader(args, split, accelerator, wan)
    vae = None
    image_encoder = None
    encoded = {}  # statistics of what is encoded now, by its identity
    writes = ()  # of the newest entries
    clips = []
    skipped = []
    progress = tqdm(total=reader.count(), desc=f"caching {split}", unit="video", disable=reader.rank > 0)
    done = time.perf_counter()  # when the video before was
    # Whatever ends this, the bar goes first: an error is the last line.
    with contextlib.closing(reader.read_ahead()) as videos, ThreadPoolExecutor(1) as writer, progress:
        for video in videos:
            captions = read_captions(video.text, video.name, args)
            encodes = video.frames is not None
            if encodes and encoded.get(video.identity):  # a copy, read before the first one was in the cache
                video.statistics = encoded[video.identity]
                encodes = False
            elif video.damage:
                logger.warning("; ".join(video.damage), main_process_only=False)
            if encodes:
                if vae is None:
                    logger.info("loading the VAE")
                    vae = load_vae(args, accelerator.device)
                    if reader.with_image_embeds:
                        image_encoder = load_image_encoder(args, accelerator.device)
                    done = time.perf_counter()
                entries = encode_video(vae, image_encoder, video, reader, args)
                encoded[video.identity] = video.statistics
                list(writes)  # waits for those of the video before, or raises why they could not be written
                writes = writer.map(save_entry, entries.values(), entries.keys())
            video.frames = None
            seconds = time.perf_counter() - done
            done += seconds
            if video.reason:
                logger.warning(f"skipped {video.name}: {video.reason}", main_process_only=False)
                skipped.append(video)
            for window, statistics in enumerate(video.statistics):
                clip = Clip(
                    order=(*video.order, window),
                    name=f"{video.name}#{window}" if len(video.statistics) > 1 else video.name,
                    captions=captions,
                    identity=video.identity,
                    path=reader.entry_path(video, window),
                    bucket=video.bucket,
                    encoded=encodes,
                    seconds=seconds / len(video.statistics) if encodes else 0.0,
                    **statistics,
                )
                clips.append(clip)
            progress.update()
        list(writes)
    del vae, image_encoder
    free_memory()
    clips = sorted(gather_object(clips), key=lambda clip: clip.order)
    skipped = sorted(gather_object(skipped), key=lambda video: video.order)
    return clips, skipped


@torch.no_grad()
def cache_captions(args: argparse.Namespace, accelerator: Accelerator, captions: set[str]) -> dict[str, str]:
    """Encode each caption that is not in the cache yet. Returns the file of each, relative to the cache folder."""
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    identity = model_identity(args, "text_encoder", "tokenizer")
    key = cache_key(CACHE_FORMAT, identity, str(dtype), args.cache_dtype)
    files = {caption: f"text/{cache_key(key, caption)}.safetensors" for caption in sorted(captions)}
    missing = [
        caption
        for caption, file in files.items()
        if load_statistics(Path(args.cache_dir, file), logger.warning) is None
    ]
    accelerator.wait_for_everyone()  # every rank has looked before any writes
    if missing:
        logger.info(f"loading the text encoder, for {len(missing)} captions")
        pipeline = WanPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            dtype=dtype,
            transformer=None,
            transformer_2=None,
            vae=None,
        ).to(accelerator.device)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        for caption in tqdm(mine, desc="caching captions", disable=not accelerator.is_main_process):
            prompt_embeds, _ = pipeline.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
            )
            prompt_embeds = prompt_embeds[0]  # (512, D)
            length = int(prompt_embeds.any(dim=-1).nonzero().max()) + 1  # the rest is the pipeline's zero padding
            if length == MAX_SEQUENCE_LENGTH:
                logger.warning(f"caption cut to {length} tokens: {caption[:60]}...", main_process_only=False)
            prompt_embeds = prompt_embeds[:length].to(getattr(torch, args.cache_dtype))
            save_entry({"prompt_embeds": prompt_embeds}, Path(args.cache_dir, files[caption]))
        del pipeline
        free_memory()
    accelerator.wait_for_everyone()
    logger.info(f"captions: {len(files)}, of which {len(missing)} were encoded now")
    return files


def usable_clips(args: argparse.Namespace, accelerator: Accelerator, split: str, wan: Wan | None) -> list[list[Clip]]:
    """Return the clips of a split of each source, and list the videos that cannot be used in `skipped.jsonl`.

    Raises `ValueError` when those are more than `--max_skipped` allows.
    """
    clips_of_sources = []
    for number, source in enumerate(args.sources):
        clips, skipped = cache_clips(of_source(args, source), accelerator, split, wan)
        if not clips and not skipped:
            raise ValueError(f"there is no video in the split {split} of {source.place}")
        count = len({clip.order[:2] for clip in clips}) + len(skipped)
        if skipped and accelerator.is_main_process:
            logger.warning(f"{len(skipped)} of {count} videos of {source.place} were skipped; see skipped.jsonl")
            with open(Path(args.output_dir, "skipped.jsonl"), "a", encoding="utf-8") as file:
                for video in skipped:
                    line = json.dumps({"file": video.name, "reason": video.reason}, ensure_ascii=False)
                    file.write(line + "\n")
        if not clips or len(skipped) > args.max_skipped * count:
            raise ValueError(skipped_message(skipped, count, args))
        clips_of_sources.append([replace(clip, source=number) for clip in clips])
    return clips_of_sources


def skipped_message(skipped: list[Video], count: int, args: argparse.Namespace) -> str:
    """Say why too many of a source's `count` videos cannot be used, and what would help."""
    examples = "; ".join(f"{video.name}: {video.reason}" for video in skipped[:3])
    message = f"{len(skipped)} of {count} videos cannot be used ({examples}; all in skipped.jsonl). "
    buckets = training_buckets(args)
    pictures = [video for video in skipped if video.num_frames == 1]
    beside_videos = len(pictures) < count and buckets[0].frames > 1
    if pictures and beside_videos:
        message += (
            f"{len(pictures)} are pictures beside videos, which take a size of one frame, such as "
            f"--sizes {buckets[0]} {buckets[0]._replace(frames=1)}. "
        )
    shortest = min(bucket.frames for bucket in buckets)
    lengths = [shortest] * (count - len(skipped))
    for video in skipped:
        if not (beside_videos and video in pictures):
            lengths.append(video.num_frames or 0)
    lengths.sort(reverse=True)
    length_of_most = lengths[math.ceil(0.9 * len(lengths)) - 1] if lengths else 0
    if 0 < length_of_most < shortest:
        num_frames = (length_of_most - 1) // 4 * 4 + 1
        flag = f"--sizes with one of {num_frames} frames" if args.sizes else f"--num_frames {num_frames}"
        message += f"{flag} would keep 90 % of them. "
    return f"{message}Repair them, or raise --max_skipped {args.max_skipped:g}."


def prepare_data(
    args: argparse.Namespace,
    accelerator: Accelerator,
    with_captions: bool = True,
    wan: Wan | None = None,
    per_update: int = 1,
) -> tuple[list[Clip], list[Clip], dict[str, str]]:
    """Return the training clips, the held-out clips and the file of every caption's embedding, all of them cached.

    `identify_wan` comes before it, and settles the clips' size and rate in `args`; the `wan` that it returns is needed
    for I2V alone, whose clips have more tensors in the cache. Without `with_captions` no text encoder is loaded, and
    there are no files. Raises `ValueError` when too few videos can be used, or none is left to train on, or there are
    fewer samples of a size than the `per_update` that make one update of the weights.
    """
    Path(args.output_dir, "skipped.jsonl").unlink(missing_ok=True)
    clips_of_sources = usable_clips(args, accelerator, args.dataset_split, wan)
    held_out_of_sources = []
    if args.validation_fraction:
        parts = [hold_out(clips, args) for clips in clips_of_sources]
        held_out_of_sources = [held_out for _, held_out in parts]
        # Of all sources: a copy in another one would be trained on.
        chosen = {clip.identity for held_out in held_out_of_sources for clip in held_out}
        clips_of_sources = [[clip for clip in training if clip.identity not in chosen] for training, _ in parts]
        if not any(clips_of_sources):
            raise ValueError(
                f"--validation_fraction {args.validation_fraction} leaves no video to train on: sources share their "
                "videos; 0 holds out none"
            )
    elif args.validation_split:
        held_out_of_sources = usable_clips(args, accelerator, args.validation_split, wan)
    clips = list(itertools.chain(*clips_of_sources))
    # In turn, since the first --max_eval_clips of them are measured.
    in_turn = itertools.chain(*itertools.zip_longest(*held_out_of_sources))
    held_out = [clip for clip in in_turn if clip is not None]
    both = clips + held_out
    encoded = sum(clip.encoded for clip in both)
    mebibytes = cached_bytes(both, args) / 2**20
    logger.info(
        f"cache: {len(clips)} training and {len(held_out)} held-out clips, {mebibytes:.1f} MiB in {args.cache_dir}; "
        f"{encoded} were encoded now"
    )
    summarize(args, clips)
    check_counts(clips, per_update, args)
    if not with_captions:
        return clips, held_out, {}
    captions = {"", args.validation_negative_prompt, *args.validation_prompt}
    for clip in both:
        captions.update(clip.captions)
    return clips, held_out, cache_captions(args, accelerator, captions)


def repeated(clips: list[Clip], args: argparse.Namespace) -> list[Clip]:
    """Return the samples of an epoch: each clip as often as its source's `repeats` say."""
    samples = []
    for clip in clips:
        samples += [clip] * args.sources[clip.source].repeats
    return samples


def check_counts(clips: list[Clip], per_update: int, args: argparse.Namespace) -> None:
    """Refuse a size of which there are fewer samples than one update takes. Raises `ValueError`."""
    counts = collections.Counter(clip.bucket for clip in repeated(clips, args))
    for bucket, count in counts.items():
        if count >= per_update:
            continue
        of_size = ""
        more = "add clips"
        if args.sizes:
            of_size = f" of {bucket}"
            more = "take the size off --sizes, or give its clips `repeats` in a recipe"
        a_rank = args.train_batch_size * args.gradient_accumulation_steps
        factors = {
            "--gradient_accumulation_steps": args.gradient_accumulation_steps,
            "--train_batch_size": args.train_batch_size,
            "--num_processes": per_update // a_rank,
        }
        large = [f"{flag} {number}" for flag, number in factors.items() if number > 1]
        raise ValueError(
            f"{count} clips{of_size} are fewer than the {per_update} of one update; lower {' or '.join(large)}, "
            f"or {more}"
        )


def cached_bytes(clips: list[Clip], args: argparse.Namespace) -> int:
    """Add up the sizes of the clips' entries in the cache."""
    return sum(Path(args.cache_dir, clip.path).stat().st_size for clip in clips)


def hold_out(clips: list[Clip], args: argparse.Namespace) -> tuple[list[Clip], list[Clip]]:
    """Split off `--validation_fraction` of the videos, by their contents: copies and windows stay on one side."""
    # The 1 is that of earlier versions: who is held out must not change.
    identities = sorted({clip.identity for clip in clips}, key=lambda identity: cache_key(1, args.seed, identity))
    count = max(1, round(args.validation_fraction * len(identities)))
    if count == len(identities):
        raise ValueError(
            f"--validation_fraction {args.validation_fraction} leaves no video to train on; 0 holds out none"
        )
    chosen = set(identities[:count])
    training = [clip for clip in clips if clip.identity not in chosen]
    held_out = [clip for clip in clips if clip.identity in chosen]
    return training, held_out


def summarize(args: argparse.Namespace, clips: list[Clip]) -> None:
    """Log captions, crop, latents and LTD of the training clips, with the warnings that save money.

    Raises `ValueError` for latents that cannot be right.
    """
    captions = [caption for clip in clips for caption in clip.captions]
    mean = float(np.mean([clip.mean for clip in clips]))
    std = math.sqrt(np.mean([clip.std**2 for clip in clips]))
    ltd = [clip.ltd for clip in clips]
    quantiles = " ".join(f"{value:.3f}" for value in np.quantile(ltd, [0, 0.1, 0.5, 0.9, 1]))
    logger.info(f"captions: {len(captions)}, {captions.count(with_trigger(args, ''))} of them empty")
    for bucket in training_buckets(args):
        own = [clip for clip in clips if clip.bucket == bucket]
        if not own:
            logger.warning(f"--sizes {bucket}: no clip takes this size")
            continue
        crop_fraction = np.mean([clip.crop_fraction for clip in own])
        enlargement = np.mean([clip.enlargement for clip in own])
        per_frame = " ".join(f"{value:.3f}" for value in np.mean([clip.ltd_per_frame for clip in own], axis=0))
        logger.info(
            f"{bucket}: {len(own)} clips; {crop_fraction:.0%} of the picture is cropped away, the rest is scaled by "
            f"{enlargement:.2f}; LTD over latent frames {per_frame}"
        )
    if len(args.sources) > 1:
        for number, source in enumerate(args.sources):
            own = [clip.ltd for clip in clips if clip.source == number]
            logger.info(
                f"{source.place}: {len(own)} clips, {source.repeats} times an epoch; LTD mean {np.mean(own):.3f}"
            )
    logger.info(f"latents: mean {mean:.3f}, std {std:.3f}")
    logger.info(f"LTD: mean {np.mean(ltd):.3f}; over clips (0, 10, 50, 90, 100 %) {quantiles}")
    portrait = [clip.name for clip in clips if clip.orientation_differs]
    slow = [clip.name for clip in clips if clip.repeated_fraction > 0]
    enlarged = [clip.name for clip in clips if clip.enlargement > MAX_ENLARGEMENT]
    interlaced = [clip.name for clip in clips if clip.interlaced]
    hdr = [clip.name for clip in clips if clip.hdr]
    cuts = [clip.name for clip in clips if clip.cut_is_suspected()]
    concerns = {
        "portrait clips in a landscape crop, or the other way round": portrait,
        f"below --fps {args.fps:g}, so that frames are repeated, which looks like stop-and-go to LTD": slow,
        f"pictures are enlarged more than {MAX_ENLARGEMENT:g} times": enlarged,
        "interlaced, deinterlace these clips": interlaced,
        "HDR (PQ or HLG) is trained as it is coded, with dull colors; convert these clips to SDR": hdr,
        "a hard cut is suspected, cut these clips into shots": cuts,
    }
    for concern, names in concerns.items():
        if names:
            logger.warning(f"{concern}: {', '.join(names)}")
    if not 0.02 < std < 50 or abs(mean) > 10:
        raise ValueError(f"latents of mean {mean:.3g} and std {std:.3g} cannot be right; is this the model's own VAE?")
    if abs(mean) > 0.5 or not 0.5 < std < 1.5:
        logger.warning("latents should have a mean near 0 and a std near 1: check the VAE and the clips")


# --- 5. Batches: everything random about a sample is drawn here ------------------------------------------------------
def sample_seed(*parts: int | str) -> int:
    """Hash the parts to a seed of 32 bits, all that a CPU generator looks at."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def draw_sigmas(args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Draw from the shifted density of noise levels; those outside of `--min_sigma` .. `--max_sigma` are left out."""
    u = compute_density_for_timestep_sampling(
        args.weighting_scheme, SIGMA_DRAWS, logit_mean=0.0, logit_std=1.0, generator=generator
    )
    sigmas = args.flow_shift * u / (1 + (args.flow_shift - 1) * u)
    return sigmas[(sigmas >= args.min_sigma) & (sigmas <= args.max_sigma)]


def check_sigmas(args: argparse.Namespace) -> None:
    """Refuse a range that is hardly ever drawn from. Raises `ValueError`."""
    if len(draw_sigmas(args, torch.Generator().manual_seed(0))) < 0.02 * SIGMA_DRAWS:
        of_expert = f", of the {args.expert} expert," if args.expert else ""
        raise ValueError(
            f"--min_sigma {args.min_sigma:g} to --max_sigma {args.max_sigma:g}{of_expert} have under 2 % of the "
            "timesteps: widen them, or use --flow_shift"
        )


class LatentDataset(torch.utils.data.Dataset):
    """Cached clips, each with its sigma, caption and noise, drawn from a generator seeded by (seed, epoch, index).

    So ranks differ, batches of any shape agree, and a resumed run goes on exactly.
    """

    def __init__(self, clips: list[Clip], captions: dict[str, str], args: argparse.Namespace):
        self.clips = clips
        self.captions = captions  # caption -> file of its embedding
        self.args = args
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        seed = sample_seed(self.args.seed, self.epoch, index)
        generator = torch.Generator().manual_seed(seed)
        clip = self.clips[index]
        sigma = draw_sigmas(self.args, generator)[0]
        caption = clip.captions[torch.randint(len(clip.captions), (), generator=generator)]
        if torch.rand((), generator=generator) < self.args.caption_dropout:
            caption = ""
        sample = self.load(clip, caption, generator)
        # The seed is text, so that the collate function leaves it on the CPU.
        return sample | {"sigmas": sigma, "seed": str(seed), "name": clip.name}

    def load(self, clip: Clip, caption: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Load a clip's tensors, such as `latents` `(C, F, H, W)`, and `prompt_embeds` `(512, D)`, and draw `noise`.

        All are float32; the noise has the shape of the latents. Where `--first_frame_share` is TI2V-5B's, it draws
        `first_frame_given` too, a bool: last, so that all else is drawn as it is for text.
        """
        sample = load_entry(self.args, clip.path)
        sample["noise"] = torch.randn(sample["latents"].shape, generator=generator)
        sample["prompt_embeds"] = self.load_prompt(caption)
        if self.args.first_frame_share and "condition" not in sample:
            given = torch.rand((), generator=generator) < self.args.first_frame_share
            is_video = sample["latents"].shape[1] > 1  # of a still nothing would be left to train
            sample["first_frame_given"] = given & is_video
        return sample

    def motion_bounds(self, device: torch.device) -> torch.Tensor:
        """Return the LTD below which a voxel is static and that above which it is in motion, `(2,)` float32."""
        clips = [clip for clip in self.clips if clip.bucket.frames > 1] or self.clips  # pictures have no motion
        quantiles = np.array([clip.ltd_quantiles for clip in clips])
        voxels = np.array([len(clip.ltd_per_frame) * clip.bucket.height * clip.bucket.width for clip in clips])
        if len(set(voxels.tolist())) == 1:
            # Clips have equally many voxels, so their quantiles pool into the dataset's.
            bounds = np.quantile(quantiles, MOTION_QUANTILES)
        else:
            weights = voxels.repeat(quantiles.shape[1])
            bounds = np.quantile(quantiles.ravel(), MOTION_QUANTILES, weights=weights, method="inverted_cdf")
        return torch.tensor(bounds, dtype=torch.float32, device=device)

    def load_fixed(self, index: int) -> dict[str, torch.Tensor]:
        """Load a clip with its first caption and always the same noise, to measure held-out errors."""
        clip = self.clips[index]
        generator = torch.Generator().manual_seed(sample_seed("eval", self.args.seed, index))
        return self.load(clip, clip.captions[0], generator)

    def load_prompt(self, caption: str) -> torch.Tensor:
        """Load a cached caption as the stock pipeline pads it, with zeros: `(512, D)` float32."""
        prompt_embeds = load_entry(self.args, self.captions[caption])["prompt_embeds"]
        return F.pad(prompt_embeds, (0, 0, 0, MAX_SEQUENCE_LENGTH - len(prompt_embeds)))


class BucketSampler(torch.utils.data.Sampler):
    """Orders an epoch so that the samples of each update have one size, and none comes twice.

    The order depends on the seed and the epoch alone, whatever the number of ranks and the batch size. What does not
    fill an update is left out, other samples in each epoch. With one size it is torch's `RandomSampler`.
    """

    def __init__(self, clips: list[Clip], samples_per_update: int, seed: int):
        self.buckets = [clip.bucket for clip in clips]
        self.counts = collections.Counter(self.buckets)
        self.samples_per_update = samples_per_update
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of `epoch`; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        updates = sum(count // self.samples_per_update for count in self.counts.values())
        return updates * self.samples_per_update

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        waiting = {bucket: [] for bucket in self.counts}
        for index in torch.randperm(len(self.buckets), generator=generator).tolist():
            samples = waiting[self.buckets[index]]
            samples.append(index)
            if len(samples) == self.samples_per_update:
                yield from samples
                samples.clear()


# --- 6. Loss ---------------------------------------------------------------------------------------------------------
def compute_loss(
    prediction: torch.Tensor, target: torch.Tensor, batch: dict[str, torch.Tensor], args: argparse.Namespace
) -> torch.Tensor:
    """Return the loss of a micro-batch, a scalar: Eq. 3 of the LTD paper on the flow-matching error, or plain MSE.

    `prediction` and `target` are `(B, C, F, H, W)`. Another loss for `main` takes the same arguments; `batch` also
    holds the clean `latents`, `noise`, `sigmas`, `prompt_embeds` and the clips' names, `name`; for I2V `condition`,
    and for TI2V-5B `first_frame_given`, `(B,)`: of a frame that is given the prediction means nothing.
    """
    trained = trained_frames(batch)
    if trained is not None:
        return loss_of_frames(prediction, target, batch["latents"], trained, args)
    if args.loss == "mse":
        return F.mse_loss(prediction.float(), target.float())
    options = ltd_options(args)
    return ltd_loss(prediction, target, batch["latents"], normalize=args.ltd_normalize, **options)


def ltd_options(args: argparse.Namespace) -> dict[str, float]:
    """Return what shapes the weights, for `ltd_loss` and `ltd_weights`."""
    return {"window": args.ltd_window, "scale": args.ltd_scale, "strength": args.ltd_strength}


def trained_frames(batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Tell which latent frames have a loss, `(B, F)` bool: not a first one that TI2V-5B is given. `None`: all have."""
    if "first_frame_given" not in batch:
        return None
    latents = batch["latents"]
    trained = torch.ones(len(latents), latents.shape[2], dtype=torch.bool, device=latents.device)
    trained[:, 0] = ~batch["first_frame_given"]
    return trained


def mean_of_frames(values: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """Average `values` `(B, C, F, H, W)` over the `trained` frames `(B, F)` of each sample: `(B,)`."""
    kept = trained[:, None, :, None, None].expand_as(values)
    return (values * kept).sum(dim=(1, 2, 3, 4)) / kept.sum(dim=(1, 2, 3, 4))


def loss_of_frames(
    prediction: torch.Tensor,
    target: torch.Tensor,
    latents: torch.Tensor,
    trained: torch.Tensor,
    args: argparse.Namespace,
) -> torch.Tensor:
    """Return the loss of the `trained` frames `(B, F)`, a scalar: each sample counts the same.

    LTD still looks at all frames: the first gap moves the second frame too.
    """
    if args.loss == "mse":
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return mean_of_frames(errors, trained).mean()
    options = ltd_options(args)
    errors = ltd_loss(prediction, target, latents, reduction="none", **options)
    losses = mean_of_frames(errors, trained)
    if args.ltd_normalize:
        weights = ltd_weights(latents, **options)
        losses = losses / mean_of_frames(weights[:, None], trained)
    return losses.mean()


@torch.no_grad()
def motion_errors(
    prediction: torch.Tensor,
    target: torch.Tensor,
    latents: torch.Tensor,
    motion_bounds: torch.Tensor,
    trained: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Sum the unweighted squared error of a batch by how much each voxel moves.

    Voxels whose LTD is above the upper of the two `motion_bounds` are in motion, those below the lower one static.
    Only the `trained` frames `(B, F)` count, if they are given.
    Returns scalars: `mse` is a mean, `motion_error` and `static_error` are sums over `motion_voxels` and
    `static_voxels`. `mean_errors` turns any number of them into means.
    """
    error = (prediction.float() - target.float()).square().mean(dim=1)  # (B, F, H, W)
    ltd = latent_temporal_discrepancy(latents, STATS_WINDOW)  # (B, F, H, W)
    static_bound, motion_bound = motion_bounds
    motion = ltd > motion_bound
    static = ltd < static_bound
    mse = error.mean()
    if trained is not None:
        motion &= trained[:, :, None, None]
        static &= trained[:, :, None, None]
        mse = mean_of_frames(error[:, None], trained).mean()
    return {
        "mse": mse,
        "motion_error": (error * motion).sum(),
        "motion_voxels": motion.sum().float(),
        "static_error": (error * static).sum(),
        "static_voxels": static.sum().float(),
    }


def mean_errors(columns: dict[str, torch.Tensor]) -> dict[str, float]:
    """Average what `motion_errors` returned, a column `(N,)` a name. A mean that no voxel belongs to is left out."""
    columns = {name: column.double() for name, column in columns.items()}
    means = {
        "mse": columns["mse"].mean(),
        "mse_motion": columns["motion_error"].sum() / columns["motion_voxels"].sum(),
        "mse_static": columns["static_error"].sum() / columns["static_voxels"].sum(),
    }
    return {name: mean.item() for name, mean in means.items() if not mean.isnan()}


# --- 7. Weights ------------------------------------------------------------------------------------------------------
class LoraLayer(NamedTuple):
    """What a LoRA file has of a layer. It adds `alpha / rank * up @ down` to the layer's weight."""

    down: torch.Tensor  # (rank, in), float32; peft's lora_A
    up: torch.Tensor  # (out, rank), float32; peft's lora_B
    alpha: float


def check_lora(args: argparse.Namespace, wan: Wan) -> None:
    """Try the adapter on an empty copy of the model, before anything is encoded.

    Settles `rank`, `lora_alpha` and `lora_target_modules` in `args`. Raises `ValueError` for all that `add_lora`
    refuses, and for modules whose file other programs could not load.
    """
    if args.train_type != "lora":
        return
    path = args.transformer_path
    if path and not path.endswith(".safetensors"):
        config = WanTransformer3DModel.load_config(path, subfolder=transformer_subfolder(path, wan.subfolder))
    else:
        config = WanTransformer3DModel.load_config(
            args.pretrained_model_name_or_path, subfolder=wan.subfolder, revision=args.revision
        )
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(config)
        add_lora(transformer, args)
    state_dict = get_peft_model_state_dict(transformer)
    try:
        loaded = WanPipeline.lora_state_dict(comfyui_state_dict(state_dict, args.rank, args.lora_alpha))
    except (ValueError, KeyError):
        loaded = {}  # its converter fails on a file without any block
    lost = sorted(key for key in state_dict if f"transformer.{key}" not in loaded)
    if lost:
        raise ValueError(
            f"--lora_target_modules: other programs could not load a file with {lost[0]}; add modules of the blocks, "
            "such as to_q"
        )


def add_lora(transformer: WanTransformer3DModel, args: argparse.Namespace) -> None:
    """Add an adapter in float32, fresh or that of `--init_lora`.

    Settles `rank`, `lora_alpha` and `lora_target_modules` in `args`. Raises `ValueError` when the LoRA does not fit
    the model, or the flags do not fit the LoRA or the model.
    """
    state_dict = {}
    if args.init_lora:
        state_dict, found = init_weights(transformer, args)
        for key in ("rank", "lora_alpha"):
            if getattr(args, key) not in (None, found[key]):
                raise ValueError(f"--{key} {getattr(args, key)} clashes with --init_lora, which has {found[key]}")
        if args.lora_target_modules:
            for target in args.lora_target_modules:
                if not any(f".{layer}".endswith(f".{target}") for layer in found["lora_target_modules"]):
                    raise ValueError(f"--lora_target_modules clashes with --init_lora, which does not adapt {target}")
            asked = tuple(f".{target}" for target in args.lora_target_modules)
            for target in found["lora_target_modules"]:
                if not f".{target}".endswith(asked):
                    raise ValueError(f"--lora_target_modules clashes with --init_lora, which adapts {target} too")
        vars(args).update(found)
    if args.rank is None:
        args.rank = 32
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    args.lora_target_modules = sorted(args.lora_target_modules or LORA_TARGETS)
    layers = set(lora_layers(transformer).values())
    for target in args.lora_target_modules:
        # peft is silent about a target that matches nothing, as long as another one does.
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            raise ValueError(f"--lora_target_modules {target}: this model has no linear layer of that name")
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
    )
    transformer.add_adapter(config)
    cast_training_params(transformer, dtype=torch.float32)
    if args.quantization:
        # DDP cannot send such weights, and need not: each rank has read the base itself.
        frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
    if state_dict and transformer.device.type != "meta":
        result = set_peft_model_state_dict(transformer, state_dict)
        # Every key must match, which peft leaves to its caller.
        mismatched = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
        if mismatched:
            raise ValueError(f"--init_lora {args.init_lora} does not fit this model; it differs in {mismatched[0]}")


def init_weights(transformer: WanTransformer3DModel, args: argparse.Namespace) -> tuple[dict[str, torch.Tensor], dict]:
    """Read `--init_lora`: its weights in peft's keys, and its rank, alpha and target modules.

    An alpha that all layers share is kept, others are folded into the weights. Raises `ValueError` when the file
    cannot be used, or has several ranks.
    """
    try:
        layers = read_lora(args.init_lora, transformer, args.expert)
    except ValueError as error:
        raise ValueError(f"--init_lora {error}") from error
    ranks = sorted({len(layer.down) for layer in layers.values()})
    if len(ranks) > 1:
        raise ValueError(
            f"--init_lora {args.init_lora}: a LoRA with one rank for all its layers is needed, found ranks {ranks}"
        )
    alpha = ranks[0]
    alphas = {layer.alpha for layer in layers.values()}
    if len(alphas) == 1 and min(alphas) > 0:
        alpha = alphas.pop()
    state_dict = {}
    for name, layer in layers.items():
        state_dict[f"{name}.lora_A.weight"] = layer.down
        state_dict[f"{name}.lora_B.weight"] = layer.up * (layer.alpha / alpha)
    return state_dict, {"rank": ranks[0], "lora_alpha": alpha, "lora_target_modules": sorted(layers)}


def read_lora(name: str, transformer: torch.nn.Module, expert: str | None = None) -> dict[str, LoraLayer]:
    """Read the LoRA `name`, a file, folder or Hub id, by diffusers' names of the layers of `transformer`.

    It starts from the file's own keys, for diffusers' converters drop some of them in silence. Raises `ValueError`,
    one line that names the dialects that work, for everything that is no plain LoRA of this model, or of this expert.
    """
    try:
        weights, config = find_lora(name, expert)
        with safe_open(weights, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
        if expert:
            check_expert(weights, metadata, expert)
        text = metadata.get("lora_adapter_metadata", "{}")
        if config:
            text = config.read_text(encoding="utf-8")
        return lora_from_tensors(tensors, json.loads(text), transformer)
    except (OSError, *DAMAGE, *HUB_ERRORS) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be used: {reason}. LoRA files that work: {LORA_DIALECTS}.") from error


def check_expert(weights: Path, metadata: dict[str, str], expert: str) -> None:
    """Refuse a LoRA of the other expert: it would load without a message, and spoil the samples.

    The metadata say whose it is, or else the name of the file. Raises `ValueError`.
    """
    named = EXPERT_IN_NAME.search(weights.name)
    trained = metadata.get("expert") or (named and named[1].lower())
    if not trained:
        logger.info(f"{weights.name} names no expert: it is taken for one of the {expert} expert")
    elif trained != expert:
        raise ValueError(f"{weights.name} is of the {trained} expert, and the {expert} one is to take it")


def find_lora(name: str, expert: str | None = None) -> tuple[Path, Path | None]:
    """Find the weights of a LoRA, of `expert` if there are both, and peft's configuration if that is beside them.

    Downloads both when `name` is a Hub id. Raises `ValueError` when there are none, or several to choose from.
    """
    path = Path(name)
    if path.is_file():
        names = [path.name]
        if path.name == PEFT_FILE:
            names.append(PEFT_CONFIG)
        path = path.parent
    elif path.is_dir():
        names = os.listdir(path)
    elif name.endswith(".safetensors") or not re.fullmatch(HUB_ID, name):
        raise ValueError("there is no such file or folder")
    else:
        try:
            names = huggingface_hub.list_repo_files(name)
        except HUB_ERRORS as error:
            reason = network_fault(error) or error
            raise ValueError(f"it is no path, and no repository of the Hub that can be read: {reason}") from error
    candidates = [file for file in names if file.endswith(".safetensors") and "/" not in file]
    for usual in (lora_file(expert), lora_file(OTHER_EXPERT.get(expert)), LORA_FILE, PEFT_FILE):
        if usual in candidates:
            candidates = [usual]
    if len(candidates) != 1:
        raise ValueError(f"it holds {', '.join(sorted(candidates)) or 'no .safetensors file'}; give the path of one")
    wanted = candidates
    if candidates[0] == PEFT_FILE:
        wanted = [PEFT_FILE, PEFT_CONFIG]  # which alone knows the strength
    if path.is_dir():
        paths = [path / file for file in wanted]
    else:
        paths = [Path(huggingface_hub.hf_hub_download(name, file)) for file in wanted]
    return paths[0], paths[1] if len(paths) > 1 else None


def lora_layers(transformer: torch.nn.Module) -> dict[str, str]:
    """Map what the dialects call a linear layer, after their prefixes, to diffusers' name of it."""
    layers = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            name = name.removesuffix(".base_layer")  # another adapter is on it
            original = original_name(name)
            for alias in (name, original, original.replace(".", "_")):
                layers[alias] = name
    return layers


def lora_from_tensors(
    tensors: dict[str, torch.Tensor], config: dict, transformer: torch.nn.Module
) -> dict[str, LoraLayer]:
    """Sort the tensors of a LoRA file by layers, each at the strength that the file or peft's `config` says.

    Raises `ValueError` for the first key that is no part of a plain LoRA of this model, by its name.
    """
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    aliases = lora_layers(transformer)
    found = {}  # by layer: the name that the file has for it, and its tensors
    for key, tensor in sorted(tensors.items()):
        match = LORA_KEY.fullmatch(key)
        if not match or match["layer"] not in aliases:
            if ZERO_DIFFERENCE.fullmatch(key) and not tensor.float().any():
                continue
            raise ValueError(f"{key} fits no LoRA of this model")
        part = {"lora_down": "lora_A", "lora_up": "lora_B", None: "alpha"}.get(match["part"], match["part"])
        parts = found.setdefault(aliases[match["layer"]], {"name": match["layer"]})
        if part in parts:
            raise ValueError(f"{key} is there under another name too")
        parts[part] = tensor.float()

    layers = {}
    for name, parts in found.items():
        for part in ("lora_A", "lora_B"):
            if part not in parts:
                raise ValueError(f"{name} has no {part}")
        down = parts["lora_A"]
        up = parts["lora_B"]
        layer = transformer.get_submodule(name)
        if down.ndim != 2 or up.shape != (layer.out_features, len(down)) or down.shape[1] != layer.in_features:
            raise ValueError(
                f"{name} has {tuple(up.shape)} x {tuple(down.shape)} for a layer of "
                f"({layer.out_features}, {layer.in_features})"
            )
        alpha = float(len(down))  # the scale is 1, where no file says otherwise
        if config:
            alpha = peft_alpha(config, parts["name"], len(down))
        if "alpha" in parts:
            if config and parts["alpha"].item() != alpha:
                raise ValueError(f"{name} has the alpha {parts['alpha'].item():g}, and {alpha:g} in the metadata")
            alpha = parts["alpha"].item()
        layers[name] = LoraLayer(down, up, alpha)
    if not layers:
        raise ValueError("there is no LoRA in it")
    return layers


def peft_alpha(config: dict, name: str, rank: int) -> float:
    """Return the alpha of a layer by peft's configuration: that by which `alpha / rank` is its scale."""
    patterns = config.get("alpha_pattern") or {}
    default = config.get("lora_alpha", LoraConfig().lora_alpha)
    alpha = patterns.get(get_pattern_key(patterns, name), default)
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)
    return float(alpha)


def trainable_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return what is trained. Under FSDP, reshard first: a forward pass alone leaves some parameters gathered."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def original_name(name: str) -> str:
    """Turn diffusers' name of a layer or tensor into that of the original Wan code."""
    for own, original in ORIGINAL_NAMES.items():
        name = name.replace(own, original)
    if name == "modulation":
        return "head.modulation"  # the blocks have one each, and the head
    return name


def comfyui_state_dict(state_dict: dict[str, torch.Tensor], rank: int, alpha: float) -> dict[str, torch.Tensor]:
    """Rename peft's keys to ComfyUI's dialect, with alpha folded into `lora_B`.

    A key `.alpha` would do for ComfyUI, but other readers of the dialect refuse it or leave it out.
    """
    converted = {}
    for key, value in state_dict.items():
        if ".lora_B." in key:
            value = value * (alpha / rank)
        converted[f"diffusion_model.{original_name(key)}"] = value
    return converted


def expert_suffix(expert: str | None) -> str:
    """Return what the names of an expert's files end in, for each program loads one file into each expert."""
    return f"_{expert}_noise" if expert else ""


def lora_file(expert: str | None) -> str:
    """Return the name of the file that diffusers loads."""
    return LORA_FILE.replace(".", f"{expert_suffix(expert)}.")


def comfyui_file(folder: Path, args: argparse.Namespace) -> Path:
    """Return the file in a folder that is for ComfyUI."""
    return folder / f"{args.output_name}{expert_suffix(args.expert)}.safetensors"


def file_metadata(wan: Wan, args: argparse.Namespace, step: int) -> dict[str, str]:
    """Describe the weights in the fields that ComfyUI and galleries of models show; no path gets into them."""
    settings = published_settings(args)
    base = settings["transformer_path"] or settings["pretrained_model_name_or_path"]
    loss = args.loss
    if args.loss == "ltd":
        loss += f" (window {args.ltd_window}, scale {args.ltd_scale:g}, strength {args.ltd_strength:g},"
        loss += f" normalize {args.ltd_normalize})"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": wan.architecture,
        "modelspec.implementation": f"https://github.com/Wan-Video/{wan.architecture.capitalize()}",
        "modelspec.title": args.output_name,
        "modelspec.description": f"Trained by train_ltd.py on {base}, {step} steps, loss {loss}",
        "modelspec.resolution": f"{args.width}x{args.height}",
        "modelspec.license": args.license,
        "ss_output_name": args.output_name,
        "ss_base_model_version": wan.architecture,
        "ss_sd_model_name": base,
        "ss_steps": str(step),
        "ss_learning_rate": str(args.learning_rate),
        "ss_seed": str(args.seed),
        "ss_loss_type": args.loss,
        "ss_training_comment": f"loss {loss}",
    }
    if args.expert:
        metadata["expert"] = args.expert
        metadata["modelspec.description"] += f", {args.expert}-noise expert"
    if args.trigger_word:
        metadata["modelspec.trigger_phrase"] = args.trigger_word
    if args.train_type == "lora":
        metadata["modelspec.architecture"] += "/lora"
        metadata["ss_network_module"] = "networks.lora"
        metadata["ss_network_dim"] = str(args.rank)
        metadata["ss_network_alpha"] = str(args.rank)  # alpha is folded into the weights
    return metadata


def lora_metadata(transformer: WanTransformer3DModel, args: argparse.Namespace) -> dict[str, str]:
    """Return what diffusers needs to know of the adapter, in its own form, and whose expert it is.

    Without the alpha every user would have to know the scale. The rest of peft's configuration stays out: an older
    peft refuses the fields that it does not know.
    """
    config = transformer.peft_config["default"].to_dict()
    defaults = LoraConfig().to_dict()
    adapter = {}
    for name, value in config.items():
        if name in ("r", "lora_alpha", "target_modules") or value != defaults[name]:
            adapter[f"transformer.{name}"] = value
    adapter["transformer.target_modules"] = sorted(adapter["transformer.target_modules"])
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True)}
    if args.expert:
        metadata["expert"] = args.expert
    return metadata


def gather_weights(
    accelerator: Accelerator, transformer: torch.nn.Module, args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """Gather what is trained, called by all ranks: whole on the main one's CPU, a LoRA in peft's keys."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state_dict = get_model_state_dict(transformer, options=options)
    if args.train_type == "lora":
        state_dict = get_peft_model_state_dict(accelerator.unwrap_model(transformer), state_dict=state_dict)
    return state_dict


def save_weights(run: "Run", folder: Path, args: argparse.Namespace) -> None:
    """Write what others load, called by all ranks: a LoRA for diffusers and for ComfyUI, or the transformer."""
    state_dict = gather_weights(run.accelerator, run.transformer, args)
    if not run.accelerator.is_main_process:
        return
    model = run.accelerator.unwrap_model(run.transformer)
    folder.mkdir(parents=True, exist_ok=True)
    if args.train_type == "lora":
        if not state_dict:
            raise RuntimeError("the LoRA has no tensors: report this, with your command line")
        name = lora_file(args.expert)
        # With a function of our own, for diffusers' writes no metadata but the adapter's.
        save_function = functools.partial(save_file, metadata=lora_metadata(model, args))
        WanPipeline.save_lora_weights(folder, state_dict, weight_name=name, save_function=save_function)
        set_mode(folder / name)
        comfyui = comfyui_state_dict(state_dict, args.rank, args.lora_alpha)
        save_file(comfyui, comfyui_file(folder, args), file_metadata(run.wan, args, run.state.step))
        set_mode(comfyui_file(folder, args))
    else:
        config = dict(model.config)
        config.pop("_name_or_path", None)  # a path of this machine
        with torch.device("meta"):
            copy = WanTransformer3DModel.from_config(config)
        copy.load_state_dict(state_dict, assign=True)
        copy.save_pretrained(folder / SUBFOLDERS[args.expert])
        for path in folder.glob(f"{SUBFOLDERS[args.expert]}/*.safetensors"):
            set_mode(path)


def save_single_file(run: "Run", folder: Path, args: argparse.Namespace) -> None:
    """Write the transformer once more, as one file in the keys of the original Wan code, for ComfyUI and others."""
    state_dict = {}
    for path in sorted(folder.glob(f"{SUBFOLDERS[args.expert]}/*.safetensors")):
        for key, value in load_file(path).items():
            state_dict[original_name(key)] = value
    save_file(state_dict, comfyui_file(folder, args), file_metadata(run.wan, args, run.state.step))
    set_mode(comfyui_file(folder, args))


def load_weights(transformer: torch.nn.Module, folder: Path, args: argparse.Namespace) -> None:
    """Load what `save_weights` wrote into the live model, sharded or not."""
    if args.train_type == "lora":
        state_dict = {}
        for key, value in load_file(folder / lora_file(args.expert)).items():
            key = key.removeprefix("transformer.")
            state_dict[key.replace(".weight", ".default.weight")] = value  # peft's name of the adapter
    else:
        state_dict = WanTransformer3DModel.from_pretrained(folder / SUBFOLDERS[args.expert]).state_dict()
    options = StateDictOptions(full_state_dict=True, strict=args.train_type == "full")
    result = set_model_state_dict(transformer, state_dict, options=options)
    mismatched = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
    if mismatched:
        raise RuntimeError(f"{folder} does not fit this model; it differs in {mismatched[0]}")


@contextlib.contextmanager
def averaged_weights(transformer: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Put the EMA's weights, if there is one, in place of the live ones."""
    if ema:
        ema.store(trainable_parameters(transformer))
        ema.copy_to(trainable_parameters(transformer))
    try:
        yield
    finally:
        if ema:
            ema.restore(trainable_parameters(transformer))


# --- 8. Checkpoints --------------------------------------------------------------------------------------------------
@dataclass
class TrainState:
    """What a checkpoint restores besides weights and optimizer."""

    tracker_run: str  # name of the tracker's run, which a resumed run continues
    step: int = 0
    skipped_steps: int = 0  # in all
    bad_steps: int = 0  # in a row
    ema_step: int = 0  # the EMA's own count of updates
    hours: float = 0.0  # from the start of the script, of all parts of the run
    changes: list[str] = field(default_factory=list)  # what resumes have changed, for the card
    pushed: list[str] = field(default_factory=list)  # names of the checkpoints that this run has sent to the Hub


def list_checkpoints(output_dir: str) -> list[Path]:
    """Find the complete checkpoints of a folder, oldest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*/settings.json"):
        if re.fullmatch(r"checkpoint-\d+", path.parent.name):
            found.append(path.parent)
    return sorted(found, key=lambda folder: checkpoint_step(folder.name))


def checkpoint_step(name: str) -> int:
    """Read the step from the name of a checkpoint."""
    return int(name.removeprefix("checkpoint-"))


def file_sums(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of every file of a checkpoint, by name."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS_FILE:
            with open(path, "rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def is_intact(folder: Path) -> bool:
    """Tell whether a checkpoint's files are those that were written; log which are not."""
    if not (folder / SUMS_FILE).is_file():
        logger.warning(f"{folder} is damaged and left out: it has no {SUMS_FILE}")
        return False
    wanted = {}
    for line in (folder / SUMS_FILE).read_text(errors="replace").splitlines():
        wanted[line[66:]] = line[:64]
    found = file_sums(folder)
    # Of those that were written: a file manager's or the user's own beside them do no harm.
    damaged = [name for name, digest in wanted.items() if found.get(name) != digest]
    if damaged:
        logger.warning(f"{folder} is damaged and left out: {', '.join(damaged)}")
    return not damaged


def save_checkpoint(run: "Run", args: argparse.Namespace) -> None:
    """Write a checkpoint, called by all ranks. It is complete or absent: written beside and renamed.

    checkpoint-STEP/
        settings.json               what `compare_settings` compares, and the `TrainState`
        optimizer.bin, scheduler.bin, random_states_RANK.pkl
        pytorch_lora_weights.safetensors, NAME.safetensors    of a LoRA, for diffusers and for ComfyUI
        transformer/                of full fine-tuning, in place of the two
        (an expert's are ..._high_noise.safetensors, and transformer_2/ for low)
        live/                       the same once more under EMA, whose averages are those above
        SHA256SUMS
    """
    accelerator = run.accelerator
    folder = Path(args.output_dir, f"checkpoint-{run.state.step}")
    if run.saved == folder:
        return
    partial = folder.with_name(f".{folder.name}.partial")
    started = time.perf_counter()
    if accelerator.is_main_process:
        for stale in folder.parent.glob(".checkpoint-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
    accelerator.wait_for_everyone()
    # Not `save_state`, which writes the whole model too, frozen base and all: save_weights does that part.
    partial.mkdir(parents=True, exist_ok=True)
    optimizers = [] if accelerator.is_fsdp2 else [run.optimizer]
    save_accelerator_state(partial, [], optimizers, [run.lr_scheduler], [], accelerator.process_index, step=0)
    if accelerator.is_fsdp2 and run.optimizer.state:  # empty before the first update
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, run.optimizer, run.transformer, partial)
    if run.ema:
        save_weights(run, partial / "live", args)
        run.state.ema_step = run.ema.optimization_step
    with averaged_weights(run.transformer, run.ema):
        save_weights(run, partial, args)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.state.hours = run.hours()
        if Path(args.output_dir, "metrics.jsonl").is_file():  # so that the curves go on on another machine
            shutil.copy(Path(args.output_dir, "metrics.jsonl"), partial)
        contents = {"format": CHECKPOINT_FORMAT, "settings": run.settings, "state": asdict(run.state)}
        (partial / "settings.json").write_text(json.dumps(contents, indent=2))
        lines = [f"{digest}  {name}\n" for name, digest in file_sums(partial).items()]
        (partial / SUMS_FILE).write_text("".join(lines))
        partial.rename(folder)
        drop_checkpoints(run, args)
    run.saved = folder
    logger.info(f"{folder} written in {time.perf_counter() - started:.1f} s")
    if run.checkpoint_repo:
        push_checkpoint(run, folder, args)
    accelerator.wait_for_everyone()


def drop_checkpoints(run: "Run", args: argparse.Namespace) -> None:
    """Delete the oldest checkpoints beyond the limit, but not what is being uploaded."""
    if not args.checkpoints_total_limit:
        return
    for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
        uploading = run.upload and not run.upload.done() and old.name == run.state.pushed[-1]
        if not uploading:
            remove_checkpoint(old)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. Rename first, so that a half-deleted one is never resumed. Errors do not stop training."""
    try:
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.partial")))
    except OSError as error:
        logger.warning(f"{folder} could not be deleted: {error}")


def push_checkpoint(run: "Run", folder: Path, args: argparse.Namespace) -> None:
    """Start to upload a checkpoint in the background; it is left out while an earlier one is under way."""
    if run.upload and not run.upload.done():
        logger.warning(f"{folder.name} is not uploaded yet: the network is busy with {run.state.pushed[-1]}")
        return
    # The newest upload comes last, also when the Hub has one of that name, of a way that was given up.
    run.state.pushed = [name for name in run.state.pushed if name != folder.name] + [folder.name]
    run.upload = huggingface_hub.run_as_future(
        upload_checkpoint,
        run.checkpoint_repo,
        checkpoint_branch(args),
        folder,
        list(run.state.pushed),
        args.checkpoints_total_limit,
    )


def checkpoint_branch(args: argparse.Namespace) -> str:
    """Name the branch of the repository for checkpoints: experts have one each, to share a repository."""
    return f"{CHECKPOINT_BRANCH}-{args.expert}" if args.expert else CHECKPOINT_BRANCH


def upload_checkpoint(repo_id: str, branch: str, folder: Path, own: list[str], limit: int | None) -> None:
    """Upload a checkpoint. Then delete from this run's `own` those beyond the limit, and those of later steps.

    Later ones are of a way that was given up by going back to an earlier step. Errors are logged, and do not stop
    training.
    """
    try:
        with_retries(
            huggingface_hub.upload_folder,
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=folder.name,
            revision=branch,
            commit_message=f"Upload {folder.name}",
        )
        step = checkpoint_step(folder.name)
        present = [name for name in hub_checkpoints(repo_id, branch) if name in own]
        later = [name for name in present if checkpoint_step(name) > step]
        earlier = [name for name in present if checkpoint_step(name) <= step]
        beyond_limit = earlier[:-limit] if limit else []
        for name in later + beyond_limit:
            with_retries(
                huggingface_hub.delete_folder,
                path_in_repo=name,
                repo_id=repo_id,
                revision=branch,
                commit_message=f"Delete {name}",
            )
    except Exception as error:
        logger.warning(f"the upload of {folder.name} failed, training goes on: {error}")


def hub_checkpoints(repo_id: str, branch: str) -> dict[str, list[str]]:
    """List the files of each checkpoint on a branch that has its sums, the oldest first."""
    found = {}
    for file in with_retries(huggingface_hub.list_repo_files, repo_id, revision=branch):
        name = file.split("/")[0]
        if re.fullmatch(r"checkpoint-\d+", name):
            found.setdefault(name, []).append(file)
    complete = [name for name, files in found.items() if f"{name}/{SUMS_FILE}" in files]
    return {name: found[name] for name in sorted(complete, key=checkpoint_step)}


def check_hub_checkpoints(repo_id: str, args: argparse.Namespace) -> None:
    """Refuse to upload among the checkpoints of another run. Raises `ValueError` with the ways out."""
    asked = args.resume_from_checkpoint
    if asked == "hub":
        return
    folders = list_checkpoints(args.output_dir) if asked else []
    if asked not in (None, "latest"):
        folders.append(Path(asked))
    known = set()
    for folder in folders:
        known.add(folder.name)
        with contextlib.suppress(json.JSONDecodeError):  # it is damaged, and `resume` will leave it out
            state = read_checkpoint(folder)["state"]
            known.add(f"checkpoint-{state['step']}")
            known.update(state["pushed"])
    others = [name for name in hub_checkpoints(repo_id, checkpoint_branch(args)) if name not in known]
    if others:
        raise ValueError(
            f"--push_checkpoints_to_hub: {repo_id} has {others[-1]} of another run. Resume that by "
            "--resume_from_checkpoint hub, or give another --hub_model_id."
        )


def fetch_checkpoint(repo_id: str, branch: str, output_dir: str) -> None:
    """Download the newest intact checkpoint of a branch to `output_dir`, unless it is there already."""
    for name, files in reversed(hub_checkpoints(repo_id, branch).items()):
        folder = Path(output_dir, name)
        if not folder.is_dir() or not is_intact(folder):
            fetched = Path(output_dir, ".fetched")  # beside, then renamed: complete or absent
            # Not `snapshot_download`, which takes what happens to be there for whole when the Hub fails.
            for file in files:
                with_retries(
                    huggingface_hub.hf_hub_download,
                    repo_id,
                    file,
                    revision=branch,
                    local_dir=fetched,
                )
            shutil.rmtree(folder, ignore_errors=True)
            (fetched / name).rename(folder)
        if is_intact(folder):
            return


def check_output_dir(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Refuse to mix two runs in one folder or replace a README, and a checkpoint that cannot be resumed.

    Raises `ValueError`. Settles `lr_warmup_steps` in `args`, whose default follows from how long the run was to be
    when it began.
    """
    readme = Path(args.output_dir, "README.md")
    if readme.is_file() and not args.overwrite_output_dir:
        if "diffusers-training" not in readme.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(
                f"--output_dir {args.output_dir} holds a README.md of something else, which the model card would "
                "replace. Take another folder, or let it be replaced by --overwrite_output_dir."
            )
    asked = args.resume_from_checkpoint
    existing = list_checkpoints(args.output_dir)
    by_name = asked not in (None, "latest", "hub")
    if asked == "hub" and not existing:
        return
    resumed = None
    if by_name:
        resumed = Path(asked)
    elif asked and existing:
        resumed = existing[-1]
    from_elsewhere = True
    first_of_another_run = 0 if by_name or not resumed else math.inf
    if resumed:
        current = {
            "flags": published_settings(args),
            "base": base_identity(args),
            "samples_per_update": samples_per_update(args, accelerator),
        }
        from_elsewhere = resumed.parent.resolve() != Path(args.output_dir).resolve()
        try:
            compare_settings(resumed, current)
            settle_warmup(args, resumed)
            if by_name and not from_elsewhere:
                first_of_another_run = read_checkpoint(resumed)["state"]["step"] + 1
        except json.JSONDecodeError as error:
            if by_name:  # else `resume` leaves the damaged one out
                raise ValueError(
                    f"--resume_from_checkpoint {asked} is damaged; take an older one, or latest"
                ) from error
    others = [path.name for path in existing if checkpoint_step(path.name) >= first_of_another_run]
    if others and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {args.output_dir} holds {others[-1]} of an earlier run. Resume that by "
            "--resume_from_checkpoint latest, take another folder, or replace it by --overwrite_output_dir."
        )
    finished = (results_folder(args) / "training_settings.json").is_file()
    if finished and from_elsewhere and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {args.output_dir} holds the results of a finished run. Take another folder, or "
            "replace them by --overwrite_output_dir."
        )


def settle_warmup(args: argparse.Namespace, folder: Path) -> None:
    """Take the default number of warmup steps from a checkpoint: a longer run does not warm up once more."""
    if args.lr_warmup_steps is None:
        args.lr_warmup_steps = read_checkpoint(folder)["settings"]["flags"]["lr_warmup_steps"]


def read_checkpoint(folder: Path) -> dict:
    """Read `settings` and `state` of a checkpoint. Raises `ValueError` for one of an earlier version."""
    checkpoint = json.loads((folder / "settings.json").read_text(errors="replace"))
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{folder} was made by an earlier version, and only that can resume it. Start a new run from its weights "
            "by --init_lora, or by --transformer_path after full fine-tuning."
        )
    return checkpoint


def resume(run: "Run", args: argparse.Namespace) -> None:
    """Restore the newest intact checkpoint that `--resume_from_checkpoint` names, called by all ranks.

    Raises `ValueError` when a checkpoint given by its path is damaged, or was made with other settings.
    """
    accelerator = run.accelerator
    asked = args.resume_from_checkpoint
    by_name = asked not in (None, "latest", "hub")
    candidates = []
    if by_name:
        candidates = [Path(asked)]
    elif asked:
        candidates = list_checkpoints(args.output_dir)
    folder = None
    if accelerator.is_main_process:
        for candidate in reversed(candidates):
            if is_intact(candidate):
                folder = candidate
                break
    (folder,) = broadcast_object_list([folder])  # one process reads all files, and all take the same checkpoint
    if folder:
        load_checkpoint(run, folder, args)
    elif by_name:
        raise ValueError(f"--resume_from_checkpoint {asked} is damaged; take an older one, or latest")
    elif candidates and not args.overwrite_output_dir:
        raise ValueError(
            f"--resume_from_checkpoint {asked}: none of the checkpoints in {args.output_dir} is intact; the log says "
            "what is damaged. Start over by --overwrite_output_dir."
        )
    elif asked:
        logger.warning(f"no checkpoint in {args.output_dir} to resume from: starting from step 0")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        remove_later(run, args)


def remove_later(run: "Run", args: argparse.Namespace) -> None:
    """Clear the output folder of checkpoints that are newer than the resumed step.

    A run that comes from no checkpoint of this folder clears it of all of them, and of earlier samples and curves.
    `latest` must not go back to them, nor the limit count them. Damaged ones are renamed, all others were given up by
    `--overwrite_output_dir`.
    """
    # Unless this run comes from a checkpoint of this very folder, all that is in it is of another.
    step = run.state.step if run.saved else 0
    for path in list_checkpoints(args.output_dir):
        if checkpoint_step(path.name) <= step:
            continue
        if args.overwrite_output_dir:
            logger.warning(f"{path} is of the run that is overwritten: it is deleted")
            remove_checkpoint(path)
        else:
            damaged = path.rename(path.with_name(f"{path.name}.damaged-{int(time.time())}"))
            logger.warning(f"{path} is damaged: it is {damaged.name} now")
    if not run.saved:
        folder = results_folder(args) / "samples"
        for path in folder.glob("*.mp4"):
            if re.fullmatch(r"\.?step-\d{6}-.+", path.name):  # all else in such a folder is the user's
                path.unlink()
        with contextlib.suppress(OSError):  # there is none, or it is not empty
            folder.rmdir()
        Path(args.output_dir, "metrics.jsonl").unlink(missing_ok=True)


def compare_settings(folder: Path, current: dict) -> tuple[list[str], list[str]]:
    """Compare the settings of a checkpoint with the `current` ones, as far as those are known yet.

    Returns what has changed with effect, and what costs the last bits, each as `name then -> now`. Raises `ValueError`
    with everything else that has changed.
    """
    saved = read_checkpoint(folder)["settings"]
    parser = build_parser()
    pairs = {}
    for name, value in current["flags"].items():
        # A version that had not this flag yet did what is its default now; `None` is settled by the model.
        then = saved["flags"].get(name, parser.get_default(name))
        known = name in saved["flags"] or then is not None
        settled = name in ("rank", "lora_alpha", "lora_target_modules", "lr_warmup_steps")
        if known and not (settled and value is None):  # which they are in the first look
            pairs[name] = (then, value)
    for name in ("fsdp", "samples_per_update"):
        if name in current:
            pairs[name] = (saved[name], current[name])
    lasting = []
    inexact = []
    refused = []
    if current.get("base", saved["base"]) != saved["base"]:
        change = f"another base model, {saved['base']} -> {current['base']}"
        name, _, commit = saved["base"].partition("@")
        if commit and current["base"].startswith(f"{name}@"):
            revision = commit.split(":")[0]
            change += f" (another commit of it; --revision {revision} takes that of then)"
        refused.append(change)
    if current.get("data", saved["data"]) != saved["data"]:
        refused.append("other training clips or captions")
    for name, (then, now) in pairs.items():
        if then == now or name in FREE_SETTINGS:
            continue
        change = f"{name} {then} -> {now}"
        if name in LASTING_SETTINGS:
            lasting.append(change)
        elif name in INEXACT_SETTINGS:
            inexact.append(change)
        else:
            refused.append(change)
    if refused:
        flag = "--init_lora" if saved["flags"]["train_type"] == "lora" else "--transformer_path"
        raise ValueError(
            f"--resume_from_checkpoint {folder} was made with other settings: {'; '.join(refused)}. Go on with those "
            f"of then, or start a new run from its weights by {flag} {folder}."
        )
    return lasting, inexact


def load_checkpoint(run: "Run", folder: Path, args: argparse.Namespace) -> None:
    """Restore weights, optimizer, schedule, EMA, random states and the position in the data.

    Raises `ValueError` when the checkpoint was made with other settings, and names all of them, and when it is of a
    step beyond the last.
    """
    accelerator = run.accelerator
    lasting, inexact = compare_settings(folder, run.settings)
    checkpoint = read_checkpoint(folder)
    versions = checkpoint["settings"]["versions"]
    if versions != run.settings["versions"]:
        logger.warning(f"{folder} was made with {versions}, now there are {run.settings['versions']}")
    run.state = TrainState(**checkpoint["state"])
    if run.state.step > run.max_steps:
        raise ValueError(
            f"{folder} is of step {run.state.step}, and the run ends at step {run.max_steps}: give more by "
            "--max_train_steps, or an older checkpoint"
        )
    run.resumed_at = run.state.step
    run.earlier_hours = run.state.hours
    if folder.parent.resolve() == Path(args.output_dir).resolve():
        run.saved = Path(args.output_dir, folder.name)
    live_weights = folder
    if run.ema:
        load_weights(run.transformer, folder, args)
        run.ema.shadow_params = [p.detach().clone() for p in trainable_parameters(run.transformer)]
        run.ema.optimization_step = run.state.ema_step
        live_weights = folder / "live"
    load_weights(run.transformer, live_weights, args)
    optimizers = [] if accelerator.is_fsdp2 else [run.optimizer]
    load_accelerator_state(folder, [], optimizers, [run.lr_scheduler], [], accelerator.process_index)
    if accelerator.is_fsdp2 and (folder / "optimizer.bin").is_file():
        load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, run.optimizer, run.transformer, folder)
    logger.info(f"resumed {folder}, step {run.state.step}")
    if inexact:
        logger.warning(f"no longer exact to the bit, for a change of {'; '.join(inexact)}")
    if lasting:
        set_learning_rate(run, args.learning_rate)
        logger.warning(f"from step {run.state.step} on: {'; '.join(lasting)}")
        longer_or_shorter = any(not change.startswith("learning_rate") for change in lasting)
        if longer_or_shorter and args.lr_scheduler in DECAYING_SCHEDULES:
            logger.warning(f"--lr_scheduler {args.lr_scheduler} is stretched to the new number of steps")
    for change in lasting + inexact:
        run.state.changes.append(f"from step {run.state.step} on: {change}")


def set_learning_rate(run: "Run", learning_rate: float) -> None:
    """Give a resumed schedule another base rate, in place of the one in the checkpoint."""
    scheduler = run.lr_scheduler.scheduler  # torch's own, in accelerate's
    scheduler.base_lrs = [learning_rate for _ in scheduler.base_lrs]
    rates = [learning_rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = rates
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["initial_lr"] = learning_rate
        group["lr"] = rate


# --- 9. Validation and logs; nothing here touches the random state of training ---------------------------------------
def split_between_ranks(accelerator: Accelerator, count: int) -> list[tuple[int, bool]]:
    """Return this rank's part of `count` items: the index of each, and whether it counts."""
    items = []
    for start in range(0, count, accelerator.num_processes):
        index = start + accelerator.process_index
        # Sharded weights need every rank in each forward pass: a surplus rank repeats an item that does not count.
        items.append((index % count, index < count))
    return items


def eval_sigmas(args: argparse.Namespace) -> list[float]:
    """Return the noise levels of held-out errors: `EVAL_SIGMAS`, as shares of the range that is trained."""
    return [args.min_sigma + share * (args.max_sigma - args.min_sigma) for share in EVAL_SIGMAS]


@torch.no_grad()
def evaluate(
    wan: Wan,
    transformer: torch.nn.Module,
    dataset: LatentDataset,
    motion_bounds: torch.Tensor,
    accelerator: Accelerator,
    args: argparse.Namespace,
    sigmas: Sequence[float] | None = None,
    measure: Callable[..., dict[str, torch.Tensor]] | None = None,
) -> list[dict]:
    """Measure the error of the first `--max_eval_clips` clips at fixed noise and sigmas; the ranks share them.

    The sigmas are those of `eval_sigmas`, unless others are given.

    Returns a row for each clip and sigma, in that order and on every rank: `clip` (its index), `sigma`, and the
    scalars of `motion_errors`. `measure(prediction, target, latents)`, of three tensors `(1, C, F, H, W)`, may return
    more named tensors for the row. All are on the CPU.
    """
    if sigmas is None:
        sigmas = eval_sigmas(args)
    rows = []
    model = accelerator.unwrap_model(transformer).eval()
    items = split_between_ranks(accelerator, min(len(dataset), args.max_eval_clips))
    hidden = not accelerator.is_main_process
    for index, counts in tqdm(items, desc="held-out clips", unit="clip", leave=False, disable=hidden):
        batch = {}
        for name, tensor in dataset.load_fixed(index).items():
            batch[name] = tensor[None].to(accelerator.device)
        latents, noise = batch["latents"], batch["noise"]  # (1, C, F, H, W)
        target = noise - latents
        for sigma in sigmas:
            batch["sigmas"] = torch.tensor([sigma], device=accelerator.device)
            noisy_latents = (1 - batch["sigmas"]) * latents + batch["sigmas"] * noise
            prediction = predict_flow(wan, model, noisy_latents, batch)
            if not counts:
                continue
            measured = motion_errors(prediction, target, latents, motion_bounds, trained_frames(batch))
            if measure:
                measured |= measure(prediction, target, latents)
            row = {"clip": index, "sigma": sigma}
            for name, value in measured.items():
                row[name] = value.cpu()
            rows.append(row)
    return sorted(gather_object(rows), key=lambda row: (row["clip"], row["sigma"]))


def held_out_metrics(rows: list[dict], clips: list[Clip], args: argparse.Namespace) -> dict[str, float]:
    """Average the rows of `evaluate`: the error in all, of moving and static voxels, at each sigma, of each source."""
    columns = {}
    for name in rows[0]:
        if name not in ("clip", "sigma"):
            columns[name] = torch.stack([row[name] for row in rows])
    metrics = {f"val/{name}": value for name, value in mean_errors(columns).items()}
    for sigma in sorted({row["sigma"] for row in rows}):
        errors = torch.stack([row["mse"] for row in rows if row["sigma"] == sigma])
        metrics[f"val/mse_sigma_{sigma:.4g}"] = errors.double().mean().item()
    sources = sorted({clips[row["clip"]].source for row in rows})
    for number in sources if len(sources) > 1 else []:
        errors = torch.stack([row["mse"] for row in rows if clips[row["clip"]].source == number])
        metrics[f"val/mse_{Path(args.sources[number].place).name}"] = errors.double().mean().item()
    return metrics


def results_folder(args: argparse.Namespace) -> Path:
    """Return where samples, curves and settings go: an expert's apart, since two runs may share a repository."""
    folder = Path(args.output_dir)
    return folder / f"{args.expert}_noise" if args.expert else folder


def sample_names(args: argparse.Namespace) -> list[str]:
    """Name the samples by their prompts: a number, and the words as far as every file system and URL takes them."""
    names = []
    for i, prompt in enumerate(args.validation_prompt):
        words = re.findall(r"[a-z0-9]+", prompt.lower())
        names.append("-".join([str(i), *words])[:MAX_SAMPLE_NAME].strip("-"))
    return names


def sample_paths(step: int, args: argparse.Namespace) -> list[Path]:
    """Return where the sample videos of a step go, one a prompt."""
    folder = results_folder(args) / "samples"
    return [folder / f"step-{step:06d}-{name}.mp4" for name in sample_names(args)]


def sampling_experts(
    run: "Run", model: WanTransformer3DModel, args: argparse.Namespace
) -> dict[str, WanTransformer3DModel]:
    """Return the pipeline's transformers: the live one, and the frozen other expert if the pipeline has two."""
    if not args.expert:
        return {"transformer": model}
    device = run.accelerator.device
    other_subfolder = SUBFOLDERS[OTHER_EXPERT[args.expert]]
    # In the live one's dtype: the pipeline casts the latents once, for both.
    other = WanTransformer3DModel.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder=other_subfolder,
        revision=args.revision,
        variant=args.variant,
        dtype=model.dtype,
    )
    other.requires_grad_(False).eval()
    if device.type == "cuda":
        # Both experts do not fit beside each other: its blocks come to the GPU one by one, the next one ahead.
        other.enable_group_offload(
            device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
            low_cpu_mem_usage=True,
        )
    return {run.wan.subfolder: model, other_subfolder: other}


def read_image(path: str, args: argparse.Namespace) -> Image.Image:
    """Read a picture, or a video's first one, cropped to the samples' size as clips are. Raises `ValueError`."""
    try:
        clips, _ = read_clip(path, Bucket(1, args.height, args.width), args.fps)
    except (OSError, ClipError, av.FFmpegError) as error:
        raise ValueError(f"the picture {path} cannot be read ({error}); give another, such as a PNG") from error
    return to_image(clips[0, 0])


def sample_image(run: "Run", vae: AutoencoderKLWan, number: int, args: argparse.Namespace) -> Image.Image:
    """Return the picture that the sample of a prompt starts from: its `--validation_image`, or that of a clip."""
    if args.validation_image:
        return read_image(args.validation_image[number], args)
    clips = run.held_out.clips or run.dataset.clips
    latents = load_entry(args, clips[number % len(clips)].path)["latents"]
    # Of several sizes, the clip may have another than the samples.
    return to_image(resize_and_crop(decode_first_frame(vae, latents), args.height, args.width))


@torch.no_grad()
def sample_videos(run: "Run", args: argparse.Namespace) -> None:
    """Write one mp4 a prompt, by the stock pipeline and its own scheduler around the live transformer.

    With a `first_frame_share` they start from an image. The ranks share the prompts.
    """
    accelerator = run.accelerator
    paths = sample_paths(run.state.step, args)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    model = accelerator.unwrap_model(run.transformer).eval()
    vae = load_vae(args, accelerator.device)
    scheduler = getattr(diffusers, run.wan.scheduler).from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision
    )
    pipeline_class = WanPipeline
    image_components = {}
    if args.first_frame_share:
        pipeline_class = diffusers.WanImageToVideoPipeline
    if run.wan.image_embeds:
        encoder = load_image_encoder(args, accelerator.device)
        image_components = {"image_encoder": encoder.image_encoder, "image_processor": encoder.image_processor}
        del encoder
    pipeline = pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler,
        **sampling_experts(run, model, args),
        **image_components,
        boundary_ratio=run.wan.boundary_ratio,
        expand_timesteps=run.wan.timestep_per_token,
    )
    negative_prompt_embeds = run.dataset.load_prompt(args.validation_negative_prompt)[None]
    for i, counts in split_between_ranks(accelerator, len(paths)):
        if stop_is_asked(run):
            break
        pipeline.set_progress_bar_config(
            desc=f"sample {i + 1} of {len(paths)}", unit="step", leave=False, disable=not accelerator.is_main_process
        )
        prompt_embeds = run.dataset.load_prompt(args.validation_prompt[i])[None]
        image = {}
        if args.first_frame_share:
            image = {"image": sample_image(run, vae, i, args)}
        video = pipeline(
            **image,
            prompt_embeds=prompt_embeds.to(accelerator.device),
            negative_prompt_embeds=negative_prompt_embeds.to(accelerator.device),
            height=args.height,
            width=args.width,
            num_frames=args.num_frames,
            guidance_scale=args.validation_guidance_scale,
            num_inference_steps=args.validation_num_inference_steps,
            generator=torch.Generator().manual_seed(args.seed),
        ).frames[0]
        if counts:
            partial = paths[i].with_name(f".{paths[i].name}")  # with the suffix that chooses the format
            export_to_video(video, str(partial), fps=args.fps)
            partial.replace(paths[i])
    del pipeline, vae, image_components
    free_memory()
    accelerator.wait_for_everyone()
    log_samples(accelerator, paths, run.state.step, args)


def log_samples(accelerator: Accelerator, paths: list[Path], step: int, args: argparse.Namespace) -> None:
    """Send the sample videos that were written to the tracker; to tensorboard, which has no videos, as frames."""
    names = sample_names(args)
    for tracker, (i, path) in itertools.product(accelerator.trackers, enumerate(paths)):
        if not path.is_file():
            continue
        tag = f"samples/{names[i]}"
        if tracker.name == "tensorboard":
            frames = iio.imread(path, plugin="pyav")  # (F, H, W, 3)
            shown = np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)
            tracker.writer.add_images(tag, frames[shown], step, dataformats="NHWC")
        else:
            video = importlib.import_module(tracker.name).Video(str(path), caption=args.validation_prompt[i])
            tracker.log({tag: video}, step=step)


def validate(run: "Run", args: argparse.Namespace) -> None:
    """Measure held-out clips and sample videos, by the EMA if there is one.

    That is done before the first step, every so many steps, and after the last. A resumed run does not repeat what
    was done at its step already, except for the final samples. A stop that is asked for comes first.
    """
    step = run.state.step
    last = step >= run.max_steps
    evaluates = len(run.held_out) > 0 and (step % args.eval_steps == 0 or last)
    samples = len(args.validation_prompt) > 0 and (step % args.validation_steps == 0 or last)
    if run.resumed_at == step:
        evaluated = any("val/mse" in row and row["step"] == step for row in read_metrics(args.output_dir))
        sampled = not last and all(path.is_file() for path in sample_paths(step, args))
        evaluated, sampled = broadcast_object_list([evaluated, sampled])  # of the main process, which has the files
        evaluates = evaluates and not evaluated
        samples = samples and not sampled
    if not (evaluates or samples) or stop_is_asked(run):
        return
    with averaged_weights(run.transformer, run.ema):
        if evaluates:
            started = time.perf_counter()
            rows = evaluate(run.wan, run.transformer, run.held_out, run.motion_bounds, run.accelerator, args)
            metrics = held_out_metrics(rows, run.held_out.clips, args)
            log_metrics(run.accelerator, metrics, step, args)
            logger.info(f"step {step}: held-out mse {metrics['val/mse']:.4f}")
            run.seconds["evaluating"] = time.perf_counter() - started
        if samples and not stop_is_asked(run):
            logger.info(
                f"step {step}: sampling {len(args.validation_prompt)} prompts into {results_folder(args)}/samples"
            )
            started = time.perf_counter()
            sample_videos(run, args)
            run.seconds["sampling"] = time.perf_counter() - started
    run.accelerator.unwrap_model(run.transformer).train()


def start_trackers(run: "Run", args: argparse.Namespace) -> None:
    """Start the tracker; a resumed run continues its tracker's run, and `metrics.jsonl` up to its step."""
    step = run.state.step
    if run.accelerator.is_main_process:
        lines = []
        rows = read_metrics(args.output_dir)
        if not rows and run.saved:
            rows = read_metrics(run.saved)  # of a checkpoint that the Hub or another machine has brought
        for row in rows:
            if run.resumed_at is not None and row["step"] <= step:
                lines.append(json.dumps(row) + "\n")
        Path(args.output_dir, "metrics.jsonl").write_text("".join(lines))
    name = run.state.tracker_run
    init_kwargs = {
        "wandb": {"name": name, "id": name, "resume": "allow", "dir": args.output_dir},
        "trackio": {"name": name, "resume": "allow"},
        "tensorboard": {"purge_step": step + 1},
    }
    config = {}
    for key, value in published_settings(args).items():
        if isinstance(value, bool | int | float | str):  # all that tensorboard takes
            config[key] = value
    run.accelerator.init_trackers("ltd-wan", config, init_kwargs=init_kwargs)
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard" and args.validation_prompt:
            names_and_prompts = zip(sample_names(args), args.validation_prompt, strict=True)
            lines = [f"- samples/{name}: {prompt}" for name, prompt in names_and_prompts]
            tracker.writer.add_text("prompts", "\n".join(lines), step)


def log_metrics(accelerator: Accelerator, metrics: dict[str, float], step: int, args: argparse.Namespace) -> None:
    """Log to the tracker, in groups, and to `metrics.jsonl`, from which the card's curves are drawn."""
    tracked = {}
    for name, value in metrics.items():
        if name.startswith("val/"):
            tracked[name] = value
        elif name in TRACKED:
            tracked[TRACKED[name]] = value
    accelerator.log(tracked, step=step)
    if accelerator.is_main_process:
        with open(Path(args.output_dir, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")


def read_metrics(output_dir: str) -> list[dict]:
    """Read the rows of `metrics.jsonl`, without a last one that a full disk or a dead machine cut short."""
    path = Path(output_dir, "metrics.jsonl")
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def peak_memory(device: torch.device) -> float:
    """Return the peak in GiB: of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil  # which accelerate needs

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory(device: torch.device) -> None:
    """Forget the GPU's peak so far; a process cannot forget its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# --- 10. Card and Hub ------------------------------------------------------------------------------------------------
def hub_id(name: str | None) -> str | None:
    """Return `name` if it is a repository's, and not a local path, which must not get into a card."""
    if name and not os.path.exists(name) and re.fullmatch(HUB_ID, name):
        return name
    return None


def published_settings(args: argparse.Namespace) -> dict:
    """Return the flags without any path of this machine: a local model or dataset goes by its last name."""
    settings = {name: value for name, value in vars(args).items() if name not in LOCAL_SETTINGS}
    for name in ("pretrained_model_name_or_path", "transformer_path", "init_lora", "dataset_name"):
        if settings[name] and not hub_id(settings[name]):
            settings[name] = Path(settings[name]).resolve().name
    for name in ("dataset_split", "validation_split"):  # of a local dataset, either may be a folder
        if settings[name]:
            settings[name] = Path(settings[name]).name
    return settings


def usage_code(args: argparse.Namespace, repo_id: str, with_other_expert: bool = False) -> str:
    """Write Python that samples from the published weights, if need be with the other expert's; a test runs it."""
    settings = published_settings(args)
    lora = args.train_type == "lora"
    pipeline_class = "WanPipeline"
    image_argument = ""
    image_lines = ""
    if args.first_frame_share:
        pipeline_class = "WanImageToVideoPipeline"
        image_argument = "    image,\n"
        image_lines = (
            "# The picture to start from, cropped as the clips were\n"
            f'image = ImageOps.fit(load_image("first_frame.png"), ({args.width}, {args.height}))\n'
        )
    prompt = next(iter([*args.validation_prompt, args.trigger_word or "a dog runs"]))
    version = ""
    for name in ("revision", "variant"):
        if settings[name]:
            version += f', {name}="{settings[name]}"'
    experts = [args.expert]
    if with_other_expert:
        experts = ["high", "low"]

    # A LoRA may sit on a transformer other than the base's; a fine-tune is one itself.
    components = "vae=vae"
    load_transformer_lines = ""
    for expert in experts:
        subfolder = SUBFOLDERS[expert]
        source = repo_id
        if lora:
            source = settings["transformer_path"] if expert == args.expert else None
        if not source:
            continue
        components += f", {subfolder}={subfolder}"
        if lora and source.endswith(".safetensors"):
            call = f'from_single_file({json.dumps(source)}, config=base, subfolder="{subfolder}"'
        elif not lora or transformer_subfolder(args.transformer_path, subfolder):
            call = f'from_pretrained({json.dumps(source)}, subfolder="{subfolder}"'
        else:
            call = f"from_pretrained({json.dumps(source)}"
        load_transformer_lines += f"{subfolder} = WanTransformer3DModel.{call}, dtype=torch.bfloat16)\n"
    load_lora_lines = []
    if lora:
        for expert in experts:
            options = f', weight_name="{lora_file(expert)}"' if expert else ""
            if expert == "low":
                options += ", load_into_transformer_2=True"
            load_lora_lines.append(f'pipe.load_lora_weights("{repo_id}"{options})')
    load_lora_lines = "\n".join(load_lora_lines)

    imports = f"from diffusers import AutoencoderKLWan, {pipeline_class}, WanTransformer3DModel\n"
    imports += "from diffusers.utils import export_to_video"
    if args.first_frame_share:
        imports += ", load_image\nfrom PIL import ImageOps"
    return f"""import torch
{imports}

base = {json.dumps(settings["pretrained_model_name_or_path"])}
vae = AutoencoderKLWan.from_pretrained(base, subfolder="vae", dtype=torch.float32{version})
{load_transformer_lines}pipe = {pipeline_class}.from_pretrained(base, {components}, dtype=torch.bfloat16{version})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
{load_lora_lines}
{image_lines}video = pipe(
{image_argument}    {json.dumps(prompt, ensure_ascii=False)},
    height={args.height}, width={args.width}, num_frames={args.num_frames},
    num_inference_steps={args.validation_num_inference_steps}, guidance_scale={args.validation_guidance_scale},
).frames[0]
export_to_video(video, "output.mp4", fps={args.fps:g})"""


def card_data(args: argparse.Namespace, model_name: str, samples: list[str], scores: list | None) -> ModelCardData:
    """Fill in the card's front matter, by which the Hub finds and shows a model. `scores` become its model-index."""
    lora = args.train_type == "lora"
    tasks = []
    if args.first_frame_share:
        tasks.append("image-to-video")
    if args.first_frame_share != 1:
        tasks.append("text-to-video")
    tags = [*tasks, "diffusers-training", "diffusers", "wan", "wan-diffusers"]
    if args.loss == "ltd":
        tags.append("ltd")
    if lora:
        tags += ["lora", "template:sd-lora"]
    bases = []
    for name in (args.transformer_path or args.pretrained_model_name_or_path, args.init_lora):
        if hub_id(name):
            bases.append(name)
    relation = None
    if bases:
        relation = "adapter" if lora else "finetune"
    widget = []
    for prompt, sample in zip(args.validation_prompt, samples, strict=True):
        widget.append({"text": prompt, "output": {"url": sample}})
    on_hub = [source.name for source in args.sources if hub_id(source.name)]
    return ModelCardData(
        base_model=bases if len(bases) > 1 else next(iter(bases), None),
        base_model_relation=relation,
        library_name="diffusers",
        pipeline_tag=tasks[0],
        license=args.license,
        datasets=on_hub or None,
        instance_prompt=args.trigger_word if lora else None,
        tags=tags,
        widget=widget or None,
        model_name=model_name if scores else None,
        eval_results=scores,
    )


def settings_table(args: argparse.Namespace, facts: dict) -> str:
    """Write the card's table of settings and facts, in Markdown."""
    settings = published_settings(args)
    table = {}
    for name in CARD_SETTINGS:
        of_another_loss = name.startswith("ltd_") and args.loss != "ltd"
        if settings[name] is not None and not of_another_loss:
            table[name] = settings[name]
    table |= facts
    versions = [f"{module.__name__} {module.__version__}" for module in (diffusers, transformers, peft, torch)]
    table["libraries"] = ", ".join(versions)
    lines = ["| setting | value |", "|---|---|"]
    for name, value in table.items():
        if isinstance(value, list):
            value = " ".join(value)
        text = html.escape(str(value)).replace("|", "\\|")
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


def model_card(
    args: argparse.Namespace,
    repo_id: str,
    samples: list[str],
    facts: dict,
    scores: list | None = None,
    with_other_expert: bool = False,
) -> ModelCard:
    """Write the card: front matter, code that works, the settings and the held-out curves."""
    name = repo_id.split("/")[-1]
    lora = args.train_type == "lora"
    results = results_folder(args).relative_to(args.output_dir)
    introduction = "A LoRA for" if lora else "A fine-tune of"
    introduction += f" Wan {'image' if args.first_frame_share else 'text'}-to-video, trained with `train_ltd.py`."
    if with_other_expert:
        introduction += (
            " There is one for each of the two experts. What follows the code is of the one for "
            f"{args.expert} noise; `{OTHER_EXPERT[args.expert]}_noise/` has the other's settings, curves and samples."
        )
    elif args.expert:
        introduction += f" It is for the expert for {args.expert} noise; the base's own does the rest."
    if args.loss == "ltd":
        paper = "[Latent Temporal Discrepancy](https://huggingface.co/papers/2601.20504)"
        introduction += (
            f" The squared error of each voxel was weighted by its motion, the {paper} of the clip. Such a weight"
            " moves accuracy from what rests to what moves (on a small Wan, 0.8 % of the error), and videos towards"
            " motion where the prompt leaves it open (there, 8 % of the speed, with `ltd_strength` 1)."
        )
    body = [
        f"---\n{card_data(args, name, samples, scores).to_yaml()}\n---",
        f"# {name}",
        introduction,
    ]
    if samples:
        body.append("<Gallery />")
    body.append(f"## How to use\n\n```python\n{usage_code(args, repo_id, with_other_expert)}\n```")
    comfyui = comfyui_file(Path(), args)
    if lora:
        text = (
            f"diffusers, with peft 0.18 or newer, loads `{lora_file(args.expert)}`. For ComfyUI and WanVideoWrapper, "
            f"put `{comfyui}` into `models/loras`, and not the file of diffusers: there it loads nothing, or half, "
            "without a message."
        )
    else:
        text = (
            f"diffusers loads `{SUBFOLDERS[args.expert]}/`. For ComfyUI, put `{comfyui}` into "
            "`models/diffusion_models`; DiffSynth-Studio and musubi-tuner load that file too. Both are the "
            "transformer alone."
        )
    if args.expert:
        text += f" It goes to the model for {args.expert} noise, and not to the other one."
    body.append(text)
    if args.trigger_word:
        body.append(f"Put <code>{html.escape(args.trigger_word)}</code> before the prompt.")
    body += [
        "## Training",
        settings_table(args, facts),
        f"Every flag is in `{results / 'training_settings.json'}`. The base model's license and the rights in the "
        "clips apply too.",
        f"![training and held-out error over the steps]({results / 'curves.png'})",
        f"## Citation\n\n```bibtex\n{CITATION}\n```\n",
    ]
    return ModelCard("\n\n".join(body))


def draw_curves(rows: list[dict], path: Path) -> None:
    """Draw training and held-out error over the steps, from the rows of `metrics.jsonl`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, color in (("mse", "0.7"), ("val/mse", "C0"), ("val/mse_motion", "C1"), ("val/mse_static", "C2")):
        steps = [row["step"] for row in rows if name in row]
        errors = [row[name] for row in rows if name in row]
        if steps:
            axes.plot(steps, errors, color, marker="." if "val" in name else "", label=name)
    axes.set(xlabel="optimizer step", ylabel="unweighted squared error")
    axes.legend()
    figure.savefig(path)


def with_retries(call: Callable, *args, **kwargs):
    """Call the Hub once more after a passing fault (429, 5xx, a broken connection); raise all others at once.

    The Hub's client does so itself for most of what it reads and uploads, but not when it creates or commits.
    """
    for delay in RETRY_DELAYS:
        try:
            return call(*args, **kwargs)
        except HUB_ERRORS as error:
            fault = error
            if isinstance(error, WRAPPERS) and error.__cause__:
                fault = error.__cause__
            response = fault.response if isinstance(fault, HfHubHTTPError) else None
            if not isinstance(fault, HUB_ERRORS) or (response is not None and response.status_code not in PASSING):
                raise
            asked = response.headers.get("retry-after", "") if response is not None else ""
            if asked.isdigit():
                delay = min(max(delay, int(asked)), MAX_RETRY_DELAY)
            logger.warning(f"the Hub failed ({type(fault).__name__}); trying again in {delay} s")
            time.sleep(delay)
    return call(*args, **kwargs)


def create_hub_repo(args: argparse.Namespace) -> str:
    """Create the repository before any time is spent, and have the Hub check a draft of the card. Returns the full id.

    Raises `ValueError` when the token may not write, the card is not valid, or checkpoints of another run are there.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        url = with_retries(huggingface_hub.create_repo, name, private=args.hub_private_repo or None, exist_ok=True)
        with_retries(huggingface_hub.auth_check, url.repo_id, write=True)
        if args.push_checkpoints_to_hub:
            branch = checkpoint_branch(args)
            with_retries(huggingface_hub.create_branch, url.repo_id, branch=branch, exist_ok=True)
        public = args.hub_private_repo and not with_retries(huggingface_hub.model_info, url.repo_id).private
        samples = [path.relative_to(args.output_dir).as_posix() for path in sample_paths(0, args)]
        draft = model_card(args, url.repo_id, samples, facts={})
        with_retries(draft.validate)
    except (*HUB_ERRORS, LocalTokenNotFoundError) as error:
        remedy = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access, and check --hub_model_id"
        raise ValueError(f"--push_to_hub: cannot write to {name} ({error}). {remedy}.") from error
    except ValueError as error:  # all that the Hub has to say of a card
        raise ValueError(f"--push_to_hub: the Hub refuses the card: {error}. Check --license.") from error
    if args.push_checkpoints_to_hub:
        check_hub_checkpoints(url.repo_id, args)
    if public:
        raise ValueError(f"--hub_private_repo: {url.repo_id} is there and public; change that, or --hub_model_id")
    return url.repo_id


def publish(args: argparse.Namespace, repo_id: str, files: list[Path]) -> None:
    """Upload a clean folder of just these files. Raises `RuntimeError` with the command that uploads it by hand."""
    staging = Path(args.output_dir, ".upload")
    samples = (results_folder(args) / "samples").relative_to(args.output_dir).as_posix()
    shutil.rmtree(staging, ignore_errors=True)
    for file in files:
        target = staging / file.relative_to(args.output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file.resolve())
    try:
        url = with_retries(
            huggingface_hub.upload_folder,
            repo_id=repo_id,
            folder_path=staging,
            commit_message="Upload weights, card and samples",
            # Those of earlier runs; what else a repository has there is the user's.
            delete_patterns=[f"{samples}/step-*.mp4"],
        )
    except Exception as error:  # whatever a Hub or a proxy answers, hours of training must not end in a riddle
        command = f"hf upload {repo_id} {shlex.quote(str(staging))} ."
        raise RuntimeError(f"the upload failed ({error}). Nothing is lost; type: {command}") from error
    shutil.rmtree(staging)
    logger.info(f"published: {url}")


def has_other_expert(repo_id: str, args: argparse.Namespace) -> bool:
    """Tell whether the repository has the other expert's weights of this kind, by an earlier run."""
    other = OTHER_EXPERT[args.expert]
    file = lora_file(other) if args.train_type == "lora" else f"{SUBFOLDERS[other]}/config.json"
    try:
        return file in with_retries(huggingface_hub.list_repo_files, repo_id)
    except HUB_ERRORS as error:
        logger.warning(f"the card's code loads one expert: {repo_id} cannot be looked into ({error})")
        return False


def save_and_publish(run: "Run", repo_id: str | None, args: argparse.Namespace) -> None:
    """Write the final weights, card, settings and curves to the output folder, and to the Hub if asked for."""
    folder = Path(args.output_dir)
    with averaged_weights(run.transformer, run.ema):
        save_weights(run, folder, args)
    if not run.accelerator.is_main_process:
        return
    if args.train_type == "full":
        save_single_file(run, folder, args)
    samples = [path.relative_to(folder).as_posix() for path in sample_paths(run.state.step, args)]
    facts = run.facts | {"steps": run.state.step}
    results = results_folder(args)
    results.mkdir(exist_ok=True)
    draw_curves(read_metrics(args.output_dir), results / "curves.png")
    settings = json.dumps(published_settings(args), indent=2, ensure_ascii=False)
    (results / "training_settings.json").write_text(settings + "\n", encoding="utf-8")
    scores = None
    card_path = folder / "README.md"
    if run.resumed_at == run.max_steps and card_path.is_file():
        scores = ModelCard.load(card_path).data.eval_results  # of these very weights: this run has not moved them
    with_other_expert = bool(repo_id and args.expert) and has_other_expert(repo_id, args)
    card = model_card(args, repo_id or folder.resolve().name, samples, facts, scores, with_other_expert)
    card.save(card_path)
    if repo_id:
        if args.train_type == "lora":
            files = [folder / lora_file(args.expert)]
        else:
            files = sorted(folder.glob(f"{SUBFOLDERS[args.expert]}/*"))
        files.append(comfyui_file(folder, args))
        files += [card_path, results / "training_settings.json", results / "curves.png"]
        files += [folder / name for name in samples]
        publish(args, repo_id, files)


# --- 11. The run -----------------------------------------------------------------------------------------------------
def fsdp_is_asked() -> bool:
    """Tell whether `accelerate launch` asks for FSDP, whatever comes of it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set up processes, precision, accumulation and logging, and make the folders of output and cache.

    Raises `ValueError` when FSDP was asked for in a form whose checkpoints would be pickles, for accelerate's own
    dynamo, and for a folder that cannot be made.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        # PR_SET_PDEATHSIG: accelerate's launcher of one process dies of a signal and passes nothing on.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    accumulation = GradientAccumulationPlugin(
        args.gradient_accumulation_steps,
        sync_with_dataloader=False,
        sync_each_batch=fsdp_is_asked(),  # between two updates each GPU would hold all gradients whole
    )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=accumulation,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, "logs")),
        step_scheduler_with_optimizer=False,  # the schedule counts updates, whatever the number of processes
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # ranks wait for each other's encoding and uploads
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else DDP holds the gradients twice
            # Else bfloat16 copies of all trained weights stay until the forward pass ends, which uses each once.
            AutocastKwargs(cache_enabled=False),
        ],
    )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        # Its wrapper stays around the model, whose LoRA peft then does not find.
        raise ValueError(
            "accelerate's own dynamo is not supported: launch with --dynamo_backend no, use --torch_compile"
        )
    if fsdp_is_asked():
        # A sharded state dict would be pickles; examples/accelerate/fsdp2.yaml has all that is needed.
        if not accelerator.is_fsdp2 or accelerator.state.fsdp_plugin.state_dict_type.name != "FULL_STATE_DICT":
            raise ValueError(
                f"FSDP was asked for, but accelerate set up {accelerator.distributed_type}; "
                "fsdp_version: 2 with fsdp_state_dict_type: FULL_STATE_DICT on GPUs is needed"
            )
        # Its own one would round timesteps and sums of gradients to bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    for name in ("output_dir", "cache_dir"):
        folder = getattr(args, name)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{name} {folder} cannot be made: {error.strerror}; take another") from error
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("httpx", "httpx2", "accelerate.checkpointing", "accelerate.accelerator", "accelerate.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each line would come twice
    return accelerator


@dataclass
class Run:
    """What training works with, prepared by accelerate. `set_up` builds it."""

    accelerator: Accelerator
    wan: Wan
    transformer: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    dataloader: torch.utils.data.DataLoader
    dataset: LatentDataset
    held_out: LatentDataset
    motion_bounds: torch.Tensor  # (2,): LTD below which a voxel is static, above which it is in motion
    ema: EMAModel | None
    samples_per_update: int
    updates_per_epoch: int
    max_steps: int
    settings: dict  # what a checkpoint says of the run that made it
    facts: dict  # what the log and the card say of this run
    state: TrainState
    notice: "StopNotice"
    started: float = 0.0  # of time.monotonic()
    earlier_hours: float = 0.0  # of the parts before this start
    deadline: float = math.inf  # of time.monotonic()
    checkpoint_repo: str | None = None  # where checkpoints are uploaded to
    resumed_at: int | None = None  # step of the checkpoint that was loaded
    saved: Path | None = None  # the newest checkpoint
    upload: Future | None = None  # of the newest of state.pushed
    seconds: dict[str, float] = field(default_factory=dict)  # caching, evaluating and sampling took, the last time
    rows: int | None = None  # of the whole dataset, in a trial on the first ones

    def hours(self) -> float:
        """Return the hours of all parts of the run until now."""
        return self.earlier_hours + (time.monotonic() - self.started) / 3600


class StopNotice:
    """The handler of a signal: it only notes that the signal came."""

    received = False

    def __call__(self, number: int, frame) -> None:
        self.received = True


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a run to stop: those that this system has, and that are not ignored (`nohup`)."""
    numbers = [signal.Signals[name] for name in STOP_SIGNALS if name in signal.Signals.__members__]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def noted_signals() -> Iterator[StopNotice]:
    """Let a run stop where it asks `stop_is_asked`; outside of this, signals do what they always do."""
    notice = StopNotice()
    before = {number: signal.signal(number, notice) for number in stop_signals()}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_is_asked(run: Run) -> bool:
    """Tell whether a signal to any rank, or the clock, asks for a stop; all ranks agree."""
    if run.notice.received or time.monotonic() > run.deadline:
        run.accelerator.set_trigger()
    return run.accelerator.check_trigger()


def ignore_signals(worker: int) -> None:
    """Let a loader process end when its parent says so: a signal to the whole group must not take it first."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def lock_folder(accelerator: Accelerator, folder: str) -> io.IOBase:
    """Return an open file that is this run's lock on its output folder; the system drops it with the process.

    Raises `ValueError` when another run holds it, or nothing can be written there.
    """
    try:
        file = open(Path(folder, ".lock"), "w")
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to: {error.strerror}; take another") from error
    try:
        import fcntl
    except ImportError:
        return file  # Windows has none
    try:
        if accelerator.is_main_process:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"--output_dir {folder}: another run is writing there; end it or take another") from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}): take care that no other run writes there")
    return file


def samples_per_update(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Return how many clips make one update of the weights."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def set_up(args: argparse.Namespace, accelerator: Accelerator, wan: Wan) -> Run:
    """Prepare data, model, optimizer and schedule. Raises `ValueError` when the clips are too few for one update."""
    # Data
    rows = None
    if args.max_train_samples and len(args.sources) == 1 and not args.streaming and accelerator.is_main_process:
        rows = survey(of_source(args, args.sources[0]))
    started = time.perf_counter()
    per_update = samples_per_update(args, accelerator)
    clips, held_out, captions = prepare_data(args, accelerator, wan=wan, per_update=per_update)
    caching = time.perf_counter() - started
    samples = repeated(clips, args)
    dataset = LatentDataset(samples, captions, args)
    sampler = BucketSampler(samples, per_update, args.seed)
    updates_per_epoch = len(sampler) // per_update
    dataloader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        sampler=sampler,
        num_workers=args.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )
    max_steps = args.max_train_steps or args.num_train_epochs * updates_per_epoch

    # Model
    set_seed(args.seed)
    logger.info("loading the transformer")
    transformer = load_transformer(args, wan)
    if args.train_type == "lora":
        add_lora(transformer, args)
    if args.torch_compile:
        torch._dynamo.config.optimize_ddp = False  # it would split checkpointed blocks, which the compiler refuses
        transformer.compile_repeated_blocks()
    if accelerator.is_fsdp2:
        # FSDP2 moves block by block what it shards, and leaves autocast to its caller.
        autocast = torch.autocast(
            accelerator.device.type,
            dtype=torch.bfloat16,
            enabled=args.mixed_precision == "bf16",
            cache_enabled=False,
        )
        transformer.forward = autocast(transformer.forward)
    else:
        transformer.to(accelerator.device)
    if accelerator.device.type == "cpu":
        for parameter in transformer.parameters():
            # Memory-mapped parameters are unaligned, and round otherwise than DDP's copies.
            parameter.data = parameter.data.clone()

    # Optimizer and schedule
    if args.optimizer == "adamw8bit":
        optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(
            trainable_parameters(transformer), lr=args.learning_rate, weight_decay=args.adam_weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(
            trainable_parameters(transformer),
            lr=args.learning_rate,
            weight_decay=args.adam_weight_decay,
            fused=torch.cuda.is_available(),
        )
    if args.lr_warmup_steps is None:
        args.lr_warmup_steps = min(100, max_steps // 20)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_steps
    )
    transformer, optimizer, dataloader, lr_scheduler = accelerator.prepare(
        transformer, optimizer, dataloader, lr_scheduler
    )
    ema = None
    if args.use_ema:
        ema = EMAModel(trainable_parameters(transformer), decay=EMA_DECAY)

    settings = {
        "flags": published_settings(args),
        "base": base_identity(args),
        "data": cache_key([(clip.identity, clip.captions) for clip in samples]),
        "samples_per_update": per_update,
        "fsdp": accelerator.is_fsdp2,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers, peft)},
    }
    run = Run(
        accelerator=accelerator,
        wan=wan,
        transformer=transformer,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        dataloader=dataloader,
        dataset=dataset,
        held_out=LatentDataset(held_out, captions, args),
        motion_bounds=dataset.motion_bounds(accelerator.device),
        ema=ema,
        samples_per_update=per_update,
        updates_per_epoch=updates_per_epoch,
        max_steps=max_steps,
        settings=settings,
        facts={},
        state=TrainState(tracker_run=f"{Path(args.output_dir).resolve().name}-{int(time.time())}"),
        notice=StopNotice(),
        seconds={"caching": caching},
        rows=rows,
    )
    run.facts = run_facts(run, args)
    logger.info("; ".join(f"{name}: {value}" for name, value in run.facts.items()))
    return run


def survey(args: argparse.Namespace) -> int:
    """Say before a trial which videos of the whole folder would be skipped, and if the whole run would refuse that.

    That is told by their packets; nothing is decoded, and nothing downloaded. Returns how many rows there are.
    """
    dataset, folder = open_dataset(args, args.dataset_split)
    if not folder.is_dir():
        logger.info(f"of the {len(dataset)} videos of {args.dataset_name} only those of this trial were looked at")
        return len(dataset)
    lines = []
    for row in tqdm(dataset, desc="looking through all videos", unit="video", leave=False):
        reason = row.get("reason") or find_fault(row["video"], folder, args)
        if reason:
            lines.append({"file": str(row["video"]), "reason": reason})
    rows = len(dataset)
    if not lines:
        logger.info(f"all {rows} videos, and not only those of this trial, look as if they can be used")
        return rows
    with open(Path(args.output_dir, TRIAL_FILE), "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    allowed = len(lines) < rows and len(lines) <= args.max_skipped * rows
    verdict = "go on without them" if allowed else "refuse"
    examples = "; ".join(f"{line['file']}: {line['reason']}" for line in lines[:3])
    logger.warning(
        f"of all {rows} videos, {len(lines)} would be skipped, and the whole run, with --max_skipped "
        f"{args.max_skipped:g}, would {verdict}: {examples}; all in {TRIAL_FILE}"
    )
    return rows


def find_fault(value: str | dict | bytes | None, folder: Path, args: argparse.Namespace) -> str | None:
    """Say why a video cannot be used, as far as its packets tell."""
    try:
        seconds = video_seconds(locate_clip(value, folder, args))
    except (ClipError, OSError, av.FFmpegError) as error:
        return describe_fault(error)
    frames = max(1, int(seconds * args.fps + TIME_TOLERANCE))
    shortest = min(bucket.frames for bucket in training_buckets(args))
    if frames < shortest:
        return f"too short: {frames} frames at {args.fps:g} fps, {shortest} needed"
    return None


def base_identity(args: argparse.Namespace) -> str:
    """Return what the weights that training starts from are known by, wherever they lie."""
    path = args.transformer_path
    subfolder = SUBFOLDERS[args.expert]
    if not path:
        return model_identity(args, subfolder)
    if os.path.isfile(path):
        return content_hash(path, args)
    transformer = argparse.Namespace(
        pretrained_model_name_or_path=path, revision=None, variant=None, cache_dir=args.cache_dir
    )
    return model_identity(transformer, transformer_subfolder(path, subfolder) or ".")


def run_facts(run: Run, args: argparse.Namespace) -> dict:
    """Collect what the log and the card say of a run."""
    accelerator = run.accelerator
    samples = run.dataset.clips
    clips = {(clip.source, clip.order): clip for clip in samples}.values()
    repeated = ""
    if len(samples) > len(clips):
        repeated = f", {len(samples)} samples an epoch"
    transformer = accelerator.unwrap_model(run.transformer)
    shapes = []
    for clip in {clip.bucket: clip for clip in samples}.values():
        shape = load_entry(args, clip.path)["latents"].shape  # (C, F, H, W)
        tokens = math.prod(shape[1:]) // math.prod(transformer.config.patch_size)
        shapes.append(f"{tuple(shape)}, {tokens:,} tokens per clip")
    trainable = sum(parameter.numel() for parameter in trainable_parameters(transformer))
    device = f"{platform.machine()} CPU"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name()
    return {
        "clips": f"{len(clips)}, and {len(run.held_out)} held out{repeated}",
        "captions": sum(len(clip.captions) for clip in clips),
        "latents": "; ".join(shapes),
        "updates": f"{run.max_steps} of {run.samples_per_update} clips, {run.updates_per_epoch} an epoch",
        "trainable parameters": f"{trainable:,}",
        "hardware": f"{accelerator.num_processes} x {device}",
    }


def train(run: Run, args: argparse.Namespace, compute_loss: Callable) -> None:
    """Train to the last step, or until a stop is asked for, which leaves a checkpoint.

    Raises `RuntimeError` when ten steps in a row have a loss or gradient that is not finite.
    """
    accelerator = run.accelerator
    transformer = run.transformer
    state = run.state
    progress = tqdm(total=run.max_steps, initial=state.step, desc="training", disable=not accelerator.is_main_process)
    reset_peak_memory(accelerator.device)  # what encoding took does not matter any more
    batches_to_skip = state.step % run.updates_per_epoch * args.gradient_accumulation_steps
    first_epoch = state.step // run.updates_per_epoch
    history = []  # of the finite micro-batches since the last log line: loss and errors
    micro_batches = []  # the same of this update
    names = []  # of this update's clips
    step_seconds = []  # of the first updates
    estimate_step = min(state.step + ESTIMATE_STEPS, run.max_steps)
    started = time.perf_counter()
    step_started = started
    for epoch in range(first_epoch, math.ceil(run.max_steps / run.updates_per_epoch)):
        run.dataset.epoch = epoch
        run.dataloader.set_epoch(epoch)
        dataloader = run.dataloader
        if batches_to_skip:
            dataloader = accelerator.skip_first_batches(dataloader, batches_to_skip)
            batches_to_skip = 0
        for batch in dataloader:
            if stop_is_asked(run):  # what has accumulated is dropped
                save_checkpoint(run, args)
                return

            # ---- one micro-batch ----
            torch.manual_seed(int(batch["seed"][0]))  # LoRA dropout: tied to the sample, like all that is random
            with accelerator.accumulate(transformer):
                latents, noise = batch["latents"], batch["noise"]  # (B, C, F, H, W)
                sigmas = batch["sigmas"].view(-1, 1, 1, 1, 1)
                noisy_latents = (1 - sigmas) * latents + sigmas * noise
                target = noise - latents  # rectified flow: the velocity from clip to noise

                prediction = predict_flow(run.wan, transformer, noisy_latents, batch)
                loss = compute_loss(prediction, target, batch, args)  # ltd_loss, unless --loss mse
                accelerator.backward(loss)

                trained = trained_frames(batch)
                errors = motion_errors(prediction, target, latents, run.motion_bounds, trained)
                micro_batches.append({"loss": loss.detach(), **errors})
                names += batch["name"]
                if accelerator.sync_gradients:
                    grad_norm = clip_gradients(accelerator, run.optimizer, args.max_grad_norm)
                    # Every rank sees the same norm of averaged gradients: all skip the step, or none does.
                    finite = bool(grad_norm.isfinite())
                    learning_rate = run.lr_scheduler.get_last_lr()[0]  # the scheduler goes on to that of the next step
                    if finite:
                        run.optimizer.step()
                    run.lr_scheduler.step()
                    run.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            # ---- once an update ----
            state.step += 1
            progress.update()
            if finite:
                history += micro_batches
                state.bad_steps = 0
                if run.ema:
                    run.ema.step(trainable_parameters(transformer))
            else:
                state.skipped_steps += 1
                state.bad_steps += 1
                clips = ", ".join(gather_object(names))
                logger.warning(f"step {state.step} skipped: its loss or gradient is not finite; its clips: {clips}")
                if state.bad_steps == MAX_BAD_STEPS:
                    raise RuntimeError(
                        f"{MAX_BAD_STEPS} steps in a row were not finite; clips of the last one: {clips}"
                    )
            micro_batches = []
            names = []
            last = state.step == run.max_steps
            step_seconds.append(time.perf_counter() - step_started)

            # ---- once in a while: log, checkpoint, validate ----
            if history and (state.step % args.logging_steps == 0 or last):
                updates = len(history) / args.gradient_accumulation_steps
                seconds = (time.perf_counter() - started) / updates
                metrics = average(accelerator, history) | {
                    "grad_norm": grad_norm.item(),
                    "lr": learning_rate,
                    "epoch": epoch,
                    "seconds_per_step": seconds,
                    "clips_per_second": run.samples_per_update / seconds,
                    "peak_memory_gib": max(gather_object([peak_memory(accelerator.device)])),
                    "skipped_steps": state.skipped_steps,
                    "hours": run.hours(),
                }
                log_metrics(accelerator, metrics, state.step, args)
                progress.set_postfix(loss=f"{metrics['loss']:.4f}", mse=f"{metrics['mse']:.4f}")
                history = []
                started = time.perf_counter()
            if state.step == estimate_step:
                log_estimate(run, step_seconds, args)
            paused = time.perf_counter()
            if state.step % args.checkpointing_steps == 0 or last:
                save_checkpoint(run, args)
            validate(run, args)
            pause = time.perf_counter() - paused
            started += pause
            if not progress.disable:
                # The time that is left is told from the rate, to which a pause does not belong.
                progress.start_t += pause
                progress.last_print_t += pause
            step_started = time.perf_counter()
            if last:
                return


def estimate_run(run: Run, step_seconds: list[float], args: argparse.Namespace) -> dict:
    """Compute from its first steps what the run takes in hours and GiB; of a trial, what the whole folder takes."""
    both = {clip.path: clip for clip in run.dataset.clips + run.held_out.clips}.values()  # of those with repeats one
    clips = len(both)
    cache = cached_bytes(both, args)
    encoded = sum(clip.encoded for clip in both)
    updates_per_epoch = run.updates_per_epoch
    length = args
    caching = run.seconds["caching"]
    evaluating = run.seconds.get("evaluating", 0)
    if run.rows:
        length = whole_length(args)
        share_tried = min(1, args.max_train_samples / run.rows)
        clips = round(clips / share_tried)
        cache /= share_tried
        updates_per_epoch = round(len(run.dataset) / share_tried) // run.samples_per_update
        encoding = sum(clip.seconds for clip in both) / run.accelerator.num_processes
        caching += encoding * (clips / max(encoded, 1) - 1)  # models are loaded once, however many clips there are
        if len(run.held_out) and args.validation_fraction:
            held_out = max(1, round(args.validation_fraction * clips))
            evaluating *= min(held_out, args.max_eval_clips) / min(len(run.held_out), args.max_eval_clips)
    steps = length.max_train_steps or length.num_train_epochs * updates_per_epoch

    measured = step_seconds[1:] or step_seconds
    seconds = sum(measured) / len(measured)
    hours = {
        "caching": caching / 3600,
        "training": steps * seconds / 3600,
        # Before the first step, every so many, and after the last
        "evaluating": evaluating * (1 + math.ceil(steps / args.eval_steps)) / 3600,
        "sampling": run.seconds.get("sampling", 0) * (1 + math.ceil(steps / args.validation_steps)) / 3600,
    }
    checkpoints = math.ceil(steps / args.checkpointing_steps)
    if args.checkpoints_total_limit:
        checkpoints = min(checkpoints, args.checkpoints_total_limit)
    checkpoint = checkpoint_bytes(run, args)
    return {
        "seconds_per_step": seconds,
        "measured_steps": len(measured),
        "steps": steps,
        "updates_per_epoch": updates_per_epoch,
        "processes": run.accelerator.num_processes,
        "hours": hours,
        "total_hours": sum(hours.values()),
        "clips": clips,
        "cache_gib": cache / 2**30,
        "checkpoints": checkpoints,
        "checkpoint_gib": checkpoint / 2**30,
    }


def whole_length(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with the length of the run that a trial is for: its recipe's, or the default.

    A trial of more steps than that, and one that counts in epochs, has that length itself.
    """
    whole = argparse.Namespace(**vars(args))
    if not args.max_train_steps:
        return whole
    recipe = {}
    if args.config:
        recipe = read_recipe(args.config, build_parser())
    whole.max_train_steps = recipe.get("max_train_steps")
    whole.num_train_epochs = recipe.get("num_train_epochs")
    settle_length(whole)
    if whole.max_train_steps:
        whole.max_train_steps = max(whole.max_train_steps, args.max_train_steps)
    return whole


def log_estimate(run: Run, step_seconds: list[float], args: argparse.Namespace) -> None:
    """Say what `estimate_run` computes, and write it to `estimate.json`; called by all ranks."""
    device = run.accelerator.device
    peak = max(gather_object([peak_memory(device)]))
    if not run.accelerator.is_main_process:
        return
    estimate = estimate_run(run, step_seconds, args) | {"peak_memory_gib": peak}
    if run.rows and not any(clip.encoded for clip in run.dataset.clips):
        logger.warning("the trial's clips were in the cache: what encoding all of them takes is not in what follows")
    path = results_folder(args) / ESTIMATE_FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(estimate, indent=2) + "\n")

    seconds = estimate["seconds_per_step"]
    parts = [f"{name} {clock_time(3600 * hours)}" for name, hours in estimate["hours"].items() if hours]
    total = clock_time(3600 * estimate["total_hours"])
    epoch = clock_time(seconds * estimate["updates_per_epoch"])
    whole = "the whole run"
    if args.max_train_samples:
        whole = f"all {run.rows} videos" if run.rows else "this trial"
    logger.info(
        f"computed for {whole} from {estimate['measured_steps']} steps of {seconds:.3g} s: {estimate['steps']} steps "
        f"in {total} ({', '.join(parts)}); an epoch of {estimate['updates_per_epoch']} trains {epoch}, 1000 steps "
        f"{clock_time(1000 * seconds)}"
    )
    checkpoints = estimate["checkpoints"] * estimate["checkpoint_gib"]
    free = shutil.disk_usage(args.output_dir).free / 2**30
    memory = f"{peak:.1f} GiB"
    if device.type == "cuda":
        memory += f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f}"
    logger.info(
        f"computed for {whole}: {estimate['checkpoints']} x {estimate['checkpoint_gib']:.3g} GiB of checkpoints and "
        f"{estimate['cache_gib']:.3g} GiB of cache; {free:.1f} GiB are free; peak memory of training {memory}"
    )
    if checkpoints > free:
        logger.warning("the checkpoints will not fit on the disk: --checkpoints_total_limit 2 keeps but two of them")


def clock_time(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def checkpoint_bytes(run: Run, args: argparse.Namespace) -> int:
    """Compute the size of a checkpoint from the number of trained parameters, all of them float32."""
    trainable = sum(parameter.numel() for parameter in trainable_parameters(run.transformer))
    weights = 8 if args.train_type == "lora" else 4  # a LoRA is written for diffusers and for ComfyUI
    if args.use_ema:
        weights *= 2  # the live ones too
    moments = 2 if args.optimizer == "adamw8bit" else 8
    return trainable * (weights + moments)


def clip_gradients(accelerator: Accelerator, optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Clip the gradient's norm to `max_norm`, or not at all if that is 0; returns the norm before, a scalar."""
    # Not by transformer.parameters(): to walk its thousands of modules in every step takes longer than to clip.
    (group,) = optimizer.param_groups
    grad_norm = accelerator.clip_grad_norm_(group["params"], max_norm or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    return grad_norm


def average(accelerator: Accelerator, history: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Average loss and errors over micro-batches and ranks. `weight` is the loss's mean weight, loss over error."""
    names = list(history[0])
    table = torch.stack([torch.stack([row[name] for name in names]) for row in history])
    table = accelerator.gather(table)  # (micro-batches of all ranks, names)
    columns = dict(zip(names, table.T, strict=True))
    metrics = {"loss": columns.pop("loss").mean().item(), **mean_errors(columns)}
    metrics["weight"] = metrics["loss"] / metrics["mse"]
    return metrics


def end(run: Run, args: argparse.Namespace) -> None:
    """Wait for the upload of a checkpoint, and end the trackers.

    The interpreter, once it shuts down, starts no more threads, which the upload would need. The last checkpoint
    follows here, if the network was busy when it was written.
    """
    if run.upload:
        run.upload.result()
        if run.saved.name != run.state.pushed[-1]:
            push_checkpoint(run, run.saved, args)
            run.upload.result()
        drop_checkpoints(run, args)
    run.accelerator.wait_for_everyone()  # a launcher ends all others once one has ended with an error
    run.accelerator.end_training()


def main(args: argparse.Namespace, compute_loss: Callable = compute_loss) -> None:
    """Train. `compute_loss(prediction, target, batch, args)` may be another loss than this file's."""
    started = time.monotonic()
    accelerator = build_accelerator(args)
    # Lines of the log go above the bars, and not into them.
    with logging_redirect_tqdm(tqdm_class=tqdm), lock_folder(accelerator, args.output_dir):
        # 1. What can be refused is refused before anything is paid for
        logger.info(f"reading the configuration of {args.pretrained_model_name_or_path}")
        wan = identify_wan(args)
        check_sigmas(args)
        check_lora(args, wan)
        for image in args.validation_image or []:
            read_image(image, args)
        repo_id = None
        if (args.push_to_hub or args.push_checkpoints_to_hub) and accelerator.is_main_process:
            repo_id = create_hub_repo(args)
        if args.resume_from_checkpoint == "hub" and accelerator.is_main_process:
            fetch_checkpoint(repo_id, checkpoint_branch(args), args.output_dir)
        accelerator.wait_for_everyone()
        check_output_dir(args, accelerator)

        # 2. Data, model, optimizer
        run = set_up(args, accelerator, wan)
        if args.push_checkpoints_to_hub:
            run.checkpoint_repo = repo_id
        run.started = started
        if args.max_train_hours:
            run.deadline = started + 3600 * args.max_train_hours

        # 3. From where a checkpoint stopped, or from a first look at the untrained model
        with noted_signals() as run.notice:
            resume(run, args)
            if run.checkpoint_repo:
                run.state.pushed = list(hub_checkpoints(run.checkpoint_repo, checkpoint_branch(args)))
            start_trackers(run, args)
            validate(run, args)
            if run.state.step < run.max_steps:
                train(run, args, compute_loss)
            stopped = run.state.step < run.max_steps or stop_is_asked(run)
        if stopped:
            logger.warning(f"stopped at step {run.state.step}; to go on, add --resume_from_checkpoint latest")
            end(run, args)
            sys.exit(EXIT_STOPPED)

        if args.torch_compile:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            logger.info(f"compiled graphs: {graphs}, for {len(training_buckets(args))} sizes")

        # 4. Weights, card, Hub
        run.facts["hardware"] += f", {run.hours():.2f} h"
        if run.state.changes:
            run.facts["changes on resume"] = "; ".join(run.state.changes)
        save_and_publish(run, repo_id if args.push_to_hub else None, args)
        end(run, args)
        log_what_next(run, args)


def best_checkpoint(args: argparse.Namespace) -> tuple[Path, float] | None:
    """Return the checkpoint of the lowest `val/mse`, and that, among those that are still there and were evaluated."""
    errors = {row["step"]: row["val/mse"] for row in read_metrics(args.output_dir) if "val/mse" in row}
    evaluated = []
    for folder in list_checkpoints(args.output_dir):
        step = checkpoint_step(folder.name)
        if step in errors:
            evaluated.append((errors[step], step, folder))
    if not evaluated:
        return None
    error, _, folder = min(evaluated)
    return folder, error


def log_what_next(run: Run, args: argparse.Namespace) -> None:
    """Say which weights are the best, what to open and what to type next; the gallery's command is the last line."""
    examples = os.path.relpath(Path(__file__).with_name("examples"))
    output_dir = shlex.quote(args.output_dir)
    logger.info(f"done; look into {args.output_dir}: README.md has the code that uses it, curves.png the errors")
    weights = args.output_dir
    best = best_checkpoint(args)
    if best:
        folder, error = best
        logger.info(f"the lowest held-out error of a checkpoint, val/mse {error:.4f}, is that of {folder}")
        if checkpoint_step(folder.name) != run.state.step:
            weights = str(folder)

    source = "--lora" if args.train_type == "lora" else "--transformer"
    if args.expert == "low":
        source += "_2"
    model = f"--pretrained_model_name_or_path {shlex.quote(args.pretrained_model_name_or_path)}"
    if args.expert:
        model += " --preset wan22-i2v" if args.first_frame_share else " --preset wan22-t2v"
    elif run.wan.architecture == "wan2.2":
        model += " --preset ti2v-5b"
    if args.first_frame_share:
        image = args.validation_image[0] if args.validation_image else "first_frame.png"
        model += f" --image {shlex.quote(image)}"
    prompt = args.validation_prompt[0] if args.validation_prompt else run.dataset.clips[0].captions[0]
    generate = f"python {examples}/generate.py {model} --prompt {shlex.quote(prompt)}"
    videos = shlex.quote(os.path.join(args.output_dir, "videos"))
    logger.info(f"to use it: {generate} {source} {shlex.quote(weights)} --output_dir {videos}/tuned")
    logger.info(
        f"to compare it: the same without {source}, into {videos}/base; then python {examples}/generate.py "
        f"--compare {videos}/base {videos}/tuned --output_dir {videos}/compare"
    )
    if not args.push_to_hub:
        logger.info("to push it: the command of this run with --push_to_hub --resume_from_checkpoint latest")
    logger.info(f"to see the samples: python {examples}/gallery.py {output_dir}")


class LastingStream:
    """Standard output or error that outlives whoever reads it.

    Ctrl-C ends `tee` in `2>&1 | tee log` first, and a closed terminal reads no more: the next line of the progress bar
    would end training without a checkpoint.
    """

    def __init__(self, stream: io.TextIOBase):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        """Send all that is still to come nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def network_fault(error: BaseException) -> str | None:
    """Say that the Hub could not be reached, if that is among the causes of an error, and what to do."""
    cause = error
    while cause is not None:
        of_datasets = type(cause) is ConnectionError  # its subclasses are those of pipes and sockets
        if of_datasets or isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError)):
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                return "this is not in the Hub's cache, and HF_HUB_OFFLINE forbids to download it: unset that"
            return "the Hub cannot be reached: check the network and its proxy, or give a folder that is here"
        cause = cause.__cause__ or cause.__context__
    return None


def user_message(error: Exception) -> str | None:
    """Return what is to be said of a user's mistake or a lack of network; `None` for all that needs a traceback.

    A `ValueError` is a user's mistake if this file or one of its examples has raised it; its message has the remedy.
    """
    raised_at = traceback.extract_tb(error.__traceback__)[-1]
    raised_in = Path(raised_at.filename).resolve()
    script = Path(__file__).resolve()
    if raised_in == script or raised_in.is_relative_to(script.with_name("examples")):
        # Python raises it too, where numbers cannot be unpacked: that is a fault of ours.
        is_mistake = isinstance(error, ValueError) and raised_at.line.startswith("raise ")
        return str(error) if is_mistake else None
    return network_fault(error)


def end_with(message: str) -> NoReturn:
    """End the program with the line `error: message` and exit code 2.

    Of several processes most make the same mistake. The first one of a machine speaks at once, and the launcher ends
    the others while they wait; what another one alone has found it says with its rank.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(SECONDS_TO_END)
        message = f"rank {os.environ['RANK']}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def run_script(main: Callable, parse_args: Callable) -> None:
    """Run a program. A user's mistake ends it with one line, without a traceback."""
    try:
        main(parse_args())
    except KeyboardInterrupt:
        # Die of it, at once: an exit in order waits for threads, which may read long videos.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        end_with(message)


if __name__ == "__main__":
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)
    run_script(main, parse_args)
