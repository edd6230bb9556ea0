"""Score a folder of videos on one dimension of VBench; `evaluate.py` runs this in VBench's environment.

VBench's Python API is used because its command line wants CUDA whatever the dimension. What went wrong is written to
`outcome.json` in the output folder rather than raised.
"""

import argparse
import importlib.metadata
import json
import os

import torch
import vbench
from vbench.utils import init_submodules


def keep_static(videos_dir, output_dir, device):
    """VBench's static filter: copies of the first five static videos of each flicker prompt, in a folder of their own.

    Its command line wants CUDA, and RAFT's weights, which another dimension fetches.
    """
    from vbench.cli import static_filter

    static_filter.DEVICE = device
    model = init_submodules(["dynamic_degree"])["dynamic_degree"]["model"]
    settings = {"small": False, "mixed_precision": False, "alternate_corr": False, "store_name": "static.json"}
    settings |= {"videos_path": videos_dir, "result_path": output_dir, "filter_scope": "temporal_flickering"}
    static_filter.static_filter(argparse.Namespace(model=model, **settings))
    kept = os.path.join(output_dir, "filtered_videos")
    if not os.listdir(kept):
        raise ValueError("VBench's static filter finds none of the flicker prompts' videos static")
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos_dir")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dimension", required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--static_filter", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = importlib.metadata.version("vbench")
    outcome = {"by": f"vbench {version}, torch {torch.__version__}, {device}", "error": None}
    try:
        videos_dir = args.videos_dir
        if args.static_filter:
            videos_dir = keep_static(videos_dir, args.output_dir, device)
        prompts = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
        bench = vbench.VBench(torch.device(device), prompts, args.output_dir)
        bench.evaluate(videos_dir, args.dimension, dimension_list=[args.dimension], mode=args.mode)
    except Exception as error:  # of any library that a dimension uses
        outcome["error"] = f"{type(error).__name__}: {error}"
    with open(os.path.join(args.output_dir, "outcome.json"), "w", encoding="utf-8") as file:
        json.dump(outcome, file)


if __name__ == "__main__":
    main()
