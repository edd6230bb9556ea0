"""Say in words what the quickstart taught: how far the sprites of generated videos go around the middle.

    python examples/nano/degrees_turned.py examples/nano/wan-nano outputs/quickstart/lora

Captions of `sprites.py --mix orbit` that training did not have ask for one turn, 360 degrees, either way round. Each
is made into a video without and with the LoRA, from the same noise, so what differs is what training did; each caption
has noise of its own. Videos and numbers go to `measured/` in the folder of the LoRA, where `gallery.py` finds them.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from motion_metrics import measure
from score_model import NANO_SAMPLING, generate, held_out_specs, load_pipeline
from sprites import CODEC, FPS, ORBIT, caption

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # gallery.py and others: examples/ is folders of scripts, not a package

from gallery import held_out_errors
from mistakes import run_script
from videos import write_video

ASKED = 360  # degrees


def write_samples(videos, folder, step):
    """Write videos under the names that training gives its samples."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for number, video in enumerate(videos):
        write_video(video, folder / "samples" / f"step-{step:06d}-{number}.mp4", FPS, codec=CODEC)


def degrees_of(videos, prompts):
    """Measure by how many degrees the sprite of each video turned about the middle, either way."""
    return [measure(video, prompt)["degrees_turned"] for video, prompt in zip(videos, prompts, strict=True)]


def in_words(before, after, steps, errors):
    """Write the three sentences that the quickstart ends with.

    `before` and `after` are degrees, a number a video; `errors` is step -> error on held-out clips.
    """
    start = errors[min(errors)]
    end = errors[max(errors)]
    return [
        f"Before training: asked to go once around the middle, {ASKED} degrees, the sprites of {len(before)} videos"
        f" turned by {np.mean(before):.0f} degrees on average.",
        f"After {steps} steps, from the same noise: by {np.mean(after):.0f} degrees.",
        f"The error on clips that training never saw went from {start:.3f} to {end:.3f}.",
    ]


def parse_args(input_args=None):
    """Parse the command line, or `input_args` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the pipeline")
    parser.add_argument("lora", type=Path, help="output folder of a run on clips of sprites.py --mix orbit")
    parser.add_argument("--count", type=int, default=8, help="number of captions")
    parser.add_argument("--num_inference_steps", type=int, default=NANO_SAMPLING["num_inference_steps"])
    parser.add_argument("--guidance_scale", type=float, default=NANO_SAMPLING["guidance_scale"])
    return parser.parse_args(input_args)


def main(args):
    """Generate, measure, print the sentences, one a line, and keep the videos and the numbers."""
    settings_path = args.lora / "training_settings.json"
    if not settings_path.is_file():
        raise SystemExit(f"{settings_path} is missing: is {args.lora} the output folder of a run that has ended?")
    steps = json.loads(settings_path.read_text(encoding="utf-8"))["max_train_steps"]
    prompts = [caption(spec) for spec in held_out_specs(ORBIT, args.count)]
    seeds = list(range(args.count))
    sampling = NANO_SAMPLING | {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
    }
    folder = args.lora / "measured"
    pipeline = load_pipeline(args.model)
    before = generate(pipeline, prompts, seeds, **sampling)
    write_samples(before, folder, 0)
    pipeline.load_lora_weights(args.lora)
    after = generate(pipeline, prompts, seeds, **sampling)
    write_samples(after, folder, steps)

    errors = held_out_errors(args.lora)
    numbers = {
        "asked": ASKED,
        "before": degrees_of(before, prompts),
        "after": degrees_of(after, prompts),
        "held_out_mse": errors,
    }
    (folder / "degrees_turned.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (folder / "training_settings.json").write_text(json.dumps({"validation_prompt": prompts}, indent=1) + "\n")
    print("\n".join(in_words(numbers["before"], numbers["after"], steps, errors)))


if __name__ == "__main__":
    run_script(main, parse_args)
