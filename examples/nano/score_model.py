"""Generate videos for held-out sprite captions and score them against these captions.

    python examples/nano/score_model.py examples/nano/wan-nano --mix calm --count 64

Beside the model's scores stand those of true clips of the same captions, and of their round trips through the model's
VAE: the ceiling. `direction within 45 degrees` counts only sprites that shall move.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from motion_metrics import dis_dynamic_degree, mean_scores, measure, round_trip
from sprites import CODEC, FPS, FRAMES, SIZE, caption, clip_spec, render_clip
from tqdm.auto import tqdm

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # videos.py and others: examples/ is folders of scripts, not a package

from mistakes import run_script
from videos import write_video

# Guidance 4 did a little better than 7 on 32 calm captions; the steps are not tuned.
NANO_SAMPLING = {"num_inference_steps": 20, "guidance_scale": 4.0, "height": SIZE, "width": SIZE, "num_frames": FRAMES}


def held_out_specs(mix, count, start=0, single_sprite=False):
    """Describe `count` held-out clips of a mix from number `start` on, or only those with one sprite."""
    specs = []
    index = start
    while len(specs) < count:
        spec = clip_spec(mix, 0, "heldout", index)
        index += 1
        if len(spec.sprites) == 1 or not single_sprite:
            specs.append(spec)
    return specs


def generate(pipeline, prompts, seeds, batch_size=16, **sampling):
    """Generate a video a prompt, uint8 `(F, H, W, 3)`; prompt i starts from the noise of seed i, whatever the batch.

    `sampling` goes to the pipeline: height, width, num_frames, num_inference_steps, guidance_scale.
    """
    pipeline.set_progress_bar_config(disable=True)
    videos = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="generating", leave=False):
        chosen = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[chosen]]
        frames = pipeline(prompt=prompts[chosen], generator=generators, output_type="np", **sampling).frames
        videos += list((frames * 255).round().astype(np.uint8))  # (B, F, H, W, 3)
    return videos


def score(video, text):
    """Score a generated or real video, uint8 `(F, H, W, 3)`, against its caption; returns a flat dict."""
    scores = measure(video, text)
    error = scores["direction_error"]
    scores["direction_within_45"] = np.nan  # NaN, as its error is, where nothing shall move
    if error >= 0:
        scores["direction_within_45"] = float(error <= 45)
    scores["dis_dynamic_degree"] = dis_dynamic_degree(video)
    return scores


def score_all(videos, prompts):
    """Average the scores of videos against their captions."""
    rows = [score(video, text) for video, text in zip(videos, prompts, strict=True)]
    return mean_scores(rows)


def load_pipeline(path, transformer=None):
    """Load the pipeline in `path` in float32, with another transformer's folder if one is given.

    Raises `ValueError` when there is no pipeline.
    """
    if not Path(path, "model_index.json").is_file():
        raise ValueError(f"{path} is no folder of a pipeline: there is no model_index.json in it")
    if transformer:
        model = WanTransformer3DModel.from_pretrained(transformer, dtype=torch.float32)
        return WanPipeline.from_pretrained(path, transformer=model, dtype=torch.float32)
    return WanPipeline.from_pretrained(path, dtype=torch.float32)


def parse_args(input_args=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the pipeline")
    parser.add_argument("--transformer", help="folder of another transformer for it")
    parser.add_argument("--lora", help="folder or file of a LoRA for it")
    parser.add_argument("--mix", choices=["calm", "dynamic", "orbit"], default="calm", help="of the held-out captions")
    parser.add_argument("--count", type=int, default=64, help="number of captions")
    parser.add_argument("--single_sprite", action="store_true", help="only captions of one sprite")
    parser.add_argument("--num_inference_steps", type=int, default=NANO_SAMPLING["num_inference_steps"])
    parser.add_argument("--guidance_scale", type=float, default=NANO_SAMPLING["guidance_scale"])
    parser.add_argument("--output_dir", help="keep videos and metadata.jsonl here")
    return parser.parse_args(input_args)


def write_results(folder, videos, prompts, table):
    """Write the videos as a `videofolder`, and the table of scores beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        name = f"{number:04d}.mp4"
        write_video(video, folder / name, FPS, codec=CODEC)
        lines.append(json.dumps({"file_name": name, "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "scores.json").write_text(json.dumps(table, indent=2) + "\n")


def main(args):
    """Generate, score and print, and keep the videos if a folder is given."""
    pipeline = load_pipeline(args.model, args.transformer)
    if args.lora:
        pipeline.load_lora_weights(args.lora)
    specs = held_out_specs(args.mix, args.count, single_sprite=args.single_sprite)
    prompts = [caption(spec) for spec in specs]
    true = [render_clip(spec)[0] for spec in specs]
    sampling = NANO_SAMPLING | {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
    }
    generated = generate(pipeline, prompts, list(range(args.count)), **sampling)
    table = {
        "generated": score_all(generated, prompts),
        "true clips": score_all(true, prompts),
        "VAE round trip": score_all([round_trip(pipeline.vae, video) for video in true], prompts),
    }
    print(f"{'':24}" + "".join(f"{name:>18}" for name in table))
    for key in table["generated"]:
        cells = [f"{scores[key]:18.3f}" for scores in table.values()]
        print(f"{key:24}" + "".join(cells))
    if args.output_dir:
        write_results(Path(args.output_dir), generated, prompts, table)


if __name__ == "__main__":
    run_script(main, parse_args)
