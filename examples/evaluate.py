"""Score folders of generated videos with VBench and VMBench, and put models side by side as in the paper's Table 1.

    python examples/evaluate.py vbench outputs/base --vbench_python vbench-env/bin/python
    python examples/evaluate.py vbench outputs/ltd --vbench_python vbench-env/bin/python
    python examples/evaluate.py report base=outputs/base ltd=outputs/ltd --output_dir outputs/report

`vbench` and `vmbench` need environments of their own and say how to make them; `offline` needs neither weights nor a
GPU. Scores are kept in `scores/` beside the videos, so every command can be run again and goes on where it stopped.
The folders are those of `generate.py`, whose `generation.json` tells the report of unsound comparisons.
"""

import argparse
import math
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

SCORES = Path(__file__).resolve().parent / "scores"
sys.path.insert(0, str(SCORES))  # examples/ is folders of scripts, not a package

from mistakes import run_script
from score_report import (
    DIMENSIONS,
    LABELS,
    VMBENCH,
    average_of_five,
    compare,
    find_warnings,
    list_videos,
    load_scores,
    quality_score,
    read_json,
    save_score,
    total_of_four,
    update_card,
    write_report,
)
from video_metrics import OPENCV_COLORS, PROXIES, temporal_flickering
from videos import describe_video, read_video

# torch below 2.6: `motion_smoothness` reads its weights with torch.load's old default (VBench pull request 115).
VBENCH_SETUP = """\
VBench pins transformers 4.33 and numpy 1, so it needs an environment of its own (Python 3.11, 6.4 GB):

    python3.11 -m venv vbench-env
    vbench-env/bin/pip install torch==2.5.1 torchvision==0.20.1
    vbench-env/bin/pip install vbench==0.1.5

and then --vbench_python vbench-env/bin/python. All dimensions but temporal_flickering fetch their weights on first use
into ~/.cache; that takes internet, wget, unzip and git. A GPU newer than Hopper needs a newer torch, and then
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment for motion_smoothness."""
VMBENCH_PROMPTS = 1050
VMBENCH_SETUP = """\
VMBench (https://github.com/AMAP-ML/VMBench) needs an environment of its own with Python 3.10, CUDA and a dozen models.
Its README says how to make it, and that 1,050 videos take 6 h 45 min."""


def videos_of(folder):
    videos = list_videos(folder)
    if not videos:
        raise SystemExit(f"{folder} has no .mp4 in it; examples/generate.py makes such folders")
    return videos


# --- VBench ----------------------------------------------------------------------------------------------------------


def run_vbench(args):
    """Score the folder dimension by dimension; returns 1 if one failed. Finished ones are skipped."""
    if not args.vbench_python or not Path(args.vbench_python).is_file():
        missing = f"--vbench_python {args.vbench_python}: no such file.\n" if args.vbench_python else ""
        raise SystemExit(missing + VBENCH_SETUP)
    if args.static_filter and args.mode != "standard":
        raise SystemExit("--static_filter goes with --mode standard: it chooses among VBench's flicker prompts")
    inputs, source, failed = videos_of(args.videos_dir), f"vbench_{args.mode}", {}
    for dimension in args.dimensions:
        static = args.static_filter and dimension == "temporal_flickering"
        old = read_json(Path(args.videos_dir, "scores", f"{source}.json")).get(dimension, {})
        if "score" in old and old["inputs"] == inputs and old["static_filter"] == static:
            print(f"{dimension}: {100 * old['score']:.2f} (there already)")
            continue
        start = time.monotonic()
        entry = score_dimension(args, dimension, inputs, static)
        entry |= {"inputs": inputs, "static_filter": static, "seconds": round(time.monotonic() - start, 1)}
        if "error" not in entry or "score" not in old:  # a failure does not cost the score of before
            save_score(args.videos_dir, source, dimension, entry)
        if "error" in entry:
            failed[dimension] = entry["error"]
        else:
            count = f"{len(entry['videos'])} of {entry['expected']} videos"
            print(f"{dimension}: {100 * entry['score']:.2f} ({count}, {entry['seconds']:.0f} s)", flush=True)
    for dimension, error in failed.items():
        print(f"{dimension} FAILED: {error}", file=sys.stderr)
    if failed:
        print("The same command tries these again and keeps the others.", file=sys.stderr)
    entries = read_json(Path(args.videos_dir, "scores", f"{source}.json"))
    scores = {dimension: entry["score"] for dimension, entry in entries.items() if "score" in entry}
    if len(scores) == len(DIMENSIONS):
        print(f"{LABELS['quality_score']}: {100 * quality_score(scores):.2f}")
    return int(bool(failed))


def score_dimension(args, dimension, names, static):
    """One dimension by VBench, in a process of its environment: a crash costs this dimension only."""
    with tempfile.TemporaryDirectory() as work:
        # VBench takes its file suffix from whatever the folder lists first, so it gets the videos alone.
        staged = Path(work, "videos")
        staged.mkdir()
        for name in names:
            (staged / name).symlink_to(Path(args.videos_dir, name).resolve())
        # -I, since the script's folder, whose modules have common names, would come before the environment's packages.
        command = [args.vbench_python, "-I", SCORES / "run_vbench.py", staged, "--output_dir", work]
        command += ["--dimension", dimension, "--mode", {"standard": "vbench_standard"}.get(args.mode, args.mode)]
        code = subprocess.run([*command, *(["--static_filter"] if static else [])]).returncode
        outcome = read_json(Path(work, "outcome.json"))
        if not outcome:
            return {"error": f"its process ended with code {code}; what it printed is above"}
        if outcome["error"]:
            return outcome
        score, rows = read_json(Path(work, f"{dimension}_eval_results.json"))[dimension]
        kept = original_names(read_json(Path(work, "static.json")))
        info = read_json(Path(work, f"{dimension}_full_info.json"))
    if not rows or not math.isfinite(score):
        return {"error": "VBench found no video to score; standard mode wants files called PROMPT-0.mp4 to -4.mp4"}
    scale = 100 if dimension == "imaging_quality" else 1  # per video 0..100, in total 0..1
    videos = [(Path(row["video_path"]).name, float(row["video_results"]) / scale) for row in rows]
    videos = {kept.get(name, name): value for name, value in videos}
    expected = len(names) if args.mode == "custom_input" else 5 * sum(dimension in row["dimension"] for row in info)
    return {"score": float(score), "videos": videos, "expected": expected, "by": outcome["by"]}


def original_names(static):
    """The static filter numbers the videos that it keeps anew: new name -> the name before."""
    kept = {prompt: row["static_path"] for prompt, row in static.items()}
    return {f"{prompt}-{i}.mp4": Path(path).name for prompt, paths in kept.items() for i, path in enumerate(paths)}


# --- Without weights -------------------------------------------------------------------------------------------------


def run_offline(args):
    """VBench's temporal flickering and the proxies, video by video; values of unchanged videos are kept."""
    inputs, folder, entries = videos_of(args.videos_dir), Path(args.videos_dir), {}
    known = read_json(folder / "scores" / "offline.json")
    for metric in args.metrics:
        old = known.get(metric, {"videos": {}})
        kept = {name: value for name, value in old["videos"].items() if inputs.get(name) == old["inputs"][name]}
        entries[metric] = {"videos": kept, "inputs": inputs, "expected": len(inputs), "by": "video_metrics.py"}
    for number, name in enumerate(tqdm(inputs, desc="scoring", unit="video"), start=1):
        if missing := [metric for metric in args.metrics if name not in entries[metric]["videos"]]:
            fps = float(describe_video(folder / name)["fps"])
            video = read_video(folder / name, **OPENCV_COLORS)
        for metric in missing:
            value = temporal_flickering(video) if metric == "temporal_flickering" else PROXIES[metric](video, fps)
            entries[metric]["videos"][name] = value
        if number == len(inputs) or (missing and number % 20 == 0):
            for metric, entry in entries.items():
                entry["score"] = float(np.mean(list(entry["videos"].values())))
                save_score(folder, "offline", metric, entry)
    for metric, entry in entries.items():
        print(f"{LABELS.get(metric, metric)}: {100 * entry['score']:.2f}")
    return 0


# --- VMBench ---------------------------------------------------------------------------------------------------------


def run_vmbench(args):
    """Read VMBench's results; or lay the videos out as it wants them and print the command."""
    if args.results:
        return read_vmbench(args.videos_dir, Path(args.results))
    prompts = read_json(Path(args.vmbench_dir, "prompts", "prompts.json")) if args.vmbench_dir else None
    if not prompts:
        raise SystemExit(f"give --results, or --vmbench_dir with prompts/prompts.json in it.\n{VMBENCH_SETUP}")
    folder, found = lay_out_vmbench(Path(args.videos_dir), prompts)
    if not found:
        raise SystemExit(f"{args.videos_dir} has no video of a VMBench prompt: no 0001.mp4, none by generation.json")
    clone, here = shlex.quote(args.vmbench_dir), shlex.quote(args.videos_dir)
    print(f"{found} of {len(prompts)} prompts have a video. {VMBENCH_SETUP}\nIn that environment:\n")
    print(f"    cd {clone} && bash evaluate.sh {shlex.quote(str(folder.resolve()))}\n\nand then here:\n")
    print(f"    python examples/evaluate.py vmbench {here} --results {clone}/eval_results/TIME/results.json")
    return 0


def lay_out_vmbench(folder, prompts):
    """A folder with `0001.mp4` and so on, and how many there are: this one, or links by the prompts that made them."""
    made = read_json(folder / "generation.json").get("videos", {})
    wanted = {f"{row['index']}.mp4": row["prompt"] for row in prompts}
    if present := [name for name in wanted if (folder / name).is_file()]:
        if wrong := [name for name in present if name in made and made[name]["prompt"] != wanted[name]]:
            raise SystemExit(f"{folder}: by generation.json {wrong[0]} was made for another prompt than VMBench's")
        return folder, len(present)
    by_prompt = {video["prompt"]: name for name, video in made.items() if video["sample"] == 0}
    links = {name: by_prompt[prompt] for name, prompt in wanted.items() if prompt in by_prompt}
    (folder / "vmbench").mkdir(exist_ok=True)
    for name, source in links.items():
        (folder / "vmbench" / name).unlink(missing_ok=True)
        (folder / "vmbench" / name).symlink_to(Path("..", source))
    return folder / "vmbench", len(links)


def read_vmbench(videos_dir, path):
    """Take over `results.json`, and print both totals; returns 1 if a metric is missing."""
    rows = read_json(path)
    if not isinstance(rows, list) or not rows or not all("index" in row for row in rows):
        raise SystemExit(f"--results {path} is not VMBench's results.json: a list of prompts with index and scores")
    scores = {}
    for metric, label in VMBENCH.items():
        videos = {f"{row['index']}.mp4": float(row[metric]) for row in rows if row.get(metric) is not None}
        if videos:
            scores[metric] = float(np.mean(list(videos.values())))
            entry = {"score": scores[metric], "videos": videos, "expected": VMBENCH_PROMPTS, "by": "VMBench"}
            print(f"{label}: {100 * scores[metric]:.2f} ({len(videos)} videos)")
        else:
            entry = {"error": f"{path} has no {metric}"}
            print(f"{label} MISSING: {entry['error']}", file=sys.stderr)
        save_score(videos_dir, "vmbench", metric, entry)
    if len(scores) < len(VMBENCH):
        return 1
    for total in (average_of_five, total_of_four):
        print(f"{LABELS[total.__name__]}: {100 * total(scores):.2f}")
    return 0


# --- Report ----------------------------------------------------------------------------------------------------------


def run_report(args):
    """Compare scored folders, write the report, update a card."""
    folders = {}
    for model in args.models:
        name, _, folder = model.partition("=") if "=" in model else ("", "", model)
        if not Path(folder).is_dir():
            raise SystemExit(f"there is no folder {folder}; models are given as NAME=FOLDER")
        folders[name or Path(folder).name] = folder
    if len(folders) < len(args.models):
        raise SystemExit("the models' names must differ: NAME=FOLDER")
    card_model, _, card = (args.card or "").partition("=")
    if args.card and (card_model not in folders or not card):
        raise SystemExit(f"--card wants NAME=README.md with a NAME of {', '.join(folders)}; got {args.card}")
    loaded = {name: load_scores(folder) for name, folder in folders.items()}
    models, errors = ({name: pair[i] for name, pair in loaded.items()} for i in (0, 1))
    if bare := [folders[name] for name in folders if not models[name]]:
        raise SystemExit(f"{bare[0]} has no scores yet: python examples/evaluate.py vbench {bare[0]} (or offline)")
    settings = {name: read_json(Path(folder, "generation.json")).get("settings") for name, folder in folders.items()}
    rows, warnings = compare(models, args.bootstrap), find_warnings(folders, models, errors)
    print(write_report(Path(args.output_dir), rows, warnings, settings))
    if card:
        update_card(card, [row for row in rows if row["model"] == card_model])
    return 0


# fmt: off
def parse_args(input_args=None):
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("vbench", help="VBench's seven quality dimensions", epilog=VBENCH_SETUP, **style)
    command.add_argument("videos_dir", help="folder of .mp4; standard mode: PROMPT-0.mp4 to PROMPT-4.mp4")
    command.add_argument("--vbench_python", metavar="PYTHON", help="of VBench's environment, see below")
    command.add_argument("--mode", choices=["standard", "custom_input"], default="standard",
        help="VBench's own prompts (default), or any videos: not comparable with a leaderboard")
    command.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS), metavar="DIMENSION",
        help=f"only these of {', '.join(DIMENSIONS)}")
    command.add_argument("--static_filter", action="store_true", help="temporal_flickering as VBench defines it: only"
        " the first five of 25 samples a prompt that RAFT finds static; wants CUDA")
    command.set_defaults(run=run_vbench)

    command = commands.add_parser("offline", help="what needs no weights: VBench's flickering, and rough CPU proxies")
    command.add_argument("videos_dir", help="folder of .mp4")
    choices = ["temporal_flickering", *PROXIES]
    command.add_argument("--metrics", nargs="+", choices=choices, default=choices[:-1], metavar="METRIC",
        help=f"some of {', '.join(choices)} (default: all but the last, whose network is a package of its own)")
    command.set_defaults(run=run_offline)

    command = commands.add_parser("vmbench", help="lay videos out for VMBench, or read its results",
        epilog=VMBENCH_SETUP, **style)
    command.add_argument("videos_dir", help="folder of 0001.mp4 and so on, or of videos of VMBench's prompts")
    command.add_argument("--vmbench_dir", metavar="DIR", help="clone of VMBench: lay out, print the command to run")
    command.add_argument("--results", metavar="JSON", help="its eval_results/TIME/results.json: read the scores")
    command.set_defaults(run=run_vmbench)

    command = commands.add_parser("report", help="one table and chart of any number of models, and the paper's rows")
    command.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="scored folders; the first is the base")
    command.add_argument("--output_dir", required=True, help="report.md, .csv, .json and .png go here")
    command.add_argument("--bootstrap", type=int, default=2000, metavar="DRAWS", help="resamplings (default: 2000)")
    command.add_argument("--card", metavar="NAME=CARD", help="add that model's VBench and VMBench scores to the"
        " model-index of its card: a README.md or its folder, or a Hub id, to which it is pushed")
    command.set_defaults(run=run_report)
    return parser.parse_args(input_args)


# fmt: on
def main(args):
    """Run the command. Exits with 1 if something could not be scored."""
    code = args.run(args)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_script(main, parse_args)
