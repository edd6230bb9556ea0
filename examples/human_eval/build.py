"""Build a blind study from two models' videos: a folder with a page for annotators, and a private key.

    python examples/human_eval/build.py outputs/base outputs/ltd --labels Wan2.1 LTD --output_dir study

The folders hold mp4 files of equal names, as `examples/generate.py` makes them. Open `study/index.html` from the disk,
give the folder to annotators, put it on any static host, or serve it with `collect.py`, which gathers the votes. Keep
`study_key.json` to yourself: it says which video is whose, and `analyse.py` needs it. To try the page, add
`?synthetic` to its address: the votes are then marked as such.

Clips are encoded again with equal settings, under random names, without metadata, with one date, and padded so that
both of a pair have as many bytes. What the pictures show cannot be hidden: a watermark, or a look that tells.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
from tqdm.auto import tqdm

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # videos.py: examples/ is folders of scripts, not a package

from videos import describe_video, find_videos, read_video, write_video

PAGE_VERSION = 1
REASONS = ["motion", "text match", "appearance", "overall"]
SAME_DATE = 946684800  # 2000-01-01: what is written first would otherwise show in Last-Modified


def parse_args(input_args=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs=2, type=Path, metavar="DIR", help="the two models' videos, the baseline first")
    add("--labels", nargs=2, metavar="NAME", help="the models' names (default: those of the folders)")
    add("--output_dir", required=True, type=Path, help="folder to make: all of it is for annotators")
    add("--key", type=Path, help="private file to write (default: OUTPUT_DIR_key.json, beside it)")
    add("--prompts", type=Path, help="where the folders have no generation.json: JSON of file name to prompt, or JSON"
        " lines of file_name and text")  # fmt: skip
    add("--num_pairs", type=int, help="take this many, drawn at random (default: all)")
    add("--practice", type=int, default=2, help="pairs to practise on, that do not count (default: %(default)s)")
    add("--repeats", type=int, help="pairs that each annotator sees twice (default: 5 %% of the pairs that count)")
    add(
        "--crf",
        type=int,
        default=16,
        help="x264's CRF for the clips: lower is better and larger (default: %(default)s)",
    )
    args = parser.parse_args(input_args)
    args.labels = args.labels or [folder.resolve().name for folder in args.folders]
    args.key = args.key or args.output_dir.with_name(f"{args.output_dir.name}_key.json")
    return args


def read_prompts(path: Path) -> dict[str, str]:
    """File name -> prompt, from JSON of such or from JSON lines of `file_name` and `text`."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return {row["file_name"]: row["text"] for row in rows}
        return {str(name): str(prompt) for name, prompt in json.loads(text).items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        message = f"--prompts {path}: expected file names and prompts ({type(error).__name__}: {error})"
        raise SystemExit(message) from None


def read_generation(folder: Path) -> dict:
    """What `generate.py` wrote about a folder: `settings`, and `videos` with prompt and seed; empty if it did not."""
    path = folder / "generation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"settings": {}, "videos": {}}


def check_pairs(folders: list[Path], prompts: dict[str, str], records: list[dict]) -> tuple[dict, list[str]]:
    """Pairs by file name, each with `prompt`, `seed`, `fps` and `frames`; and a line for everything that is wrong."""
    names = [{path.name for path in find_videos(folder)} for folder in folders]
    problems = [
        f"{name}: in {folders[side]}, but not in {folders[1 - side]}"
        for side in (0, 1)
        for name in sorted(names[side] - names[1 - side])
    ]
    pairs = {}
    for name in sorted(names[0] & names[1]):
        described = []
        for folder in folders:
            try:
                described.append(describe_video(folder / name))
            except (av.FFmpegError, ValueError) as error:
                problems.append(f"{folder / name}: cannot be played: {error}")
        if len(described) < 2:
            continue
        for key, value in described[0].items():
            if value != described[1][key]:
                problems.append(f"{name}: {key} {value} in {folders[0]}, but {described[1][key]} in {folders[1]}")
        if described[0]["width"] % 2 or described[0]["height"] % 2:
            problems.append(f"{name}: H.264 for browsers needs an even width and height")
        entries = [record["videos"].get(name, {}) for record in records]
        for key in ("prompt", "seed"):
            if all(key in entry for entry in entries) and entries[0][key] != entries[1][key]:
                there, here = entries[0][key], entries[1][key]
                problems.append(f"{name}: {key} {there!r} in {folders[0]}, but {here!r} in {folders[1]}")
        prompt = prompts.get(name) or entries[0].get("prompt") or entries[1].get("prompt")
        if not prompt:
            problems.append(f"{name}: no prompt; is there a generation.json? Else pass --prompts")
        seed = entries[0].get("seed") if "seed" in entries[1] else None  # None: nobody can say that they agree
        pairs[name] = described[0] | {"prompt": prompt, "seed": seed}
    if not names[0] | names[1]:
        problems.append(f"no mp4 files in {folders[0]} and {folders[1]}")
    return pairs, problems


def encode(source: Path, target: Path, fps: Fraction, crf: int) -> tuple[int, str]:
    """Write the pictures of `source` alone as H.264, frame by frame at `fps`. Returns their number and a hash."""
    frames = read_video(source, "yuv420p")  # the file's own pixels: nothing is converted
    write_video(frames, target, fps, "yuv420p", codec={"crf": str(crf)})
    return len(frames), hashlib.sha256(frames).hexdigest()


def equalise(paths: list[Path]) -> None:
    """Pad mp4 files to one number of bytes by an empty `free` box at the end, and give them one date."""
    size = max(path.stat().st_size for path in paths) + 8  # a box's head has 8 bytes
    for path in paths:
        missing = size - path.stat().st_size
        with path.open("ab") as file:
            file.write(missing.to_bytes(4, "big") + b"free" + bytes(missing - 8))
        os.utime(path, (SAME_DATE, SAME_DATE))


def encode_pairs(pairs: dict[str, dict], args: argparse.Namespace, folder: Path) -> tuple[list[str], list[str]]:
    """Make `clips/` and note the two random names of each pair. Lines of what is wrong; pairs that look the same."""
    problems, alike = [], []
    (folder / "clips").mkdir(parents=True)
    for name, pair in tqdm(pairs.items(), desc="encoding pairs"):
        pair["clips"] = [secrets.token_hex(8) for _ in args.folders]
        paths = [folder / "clips" / f"{clip}.mp4" for clip in pair["clips"]]
        hashes = []
        both = list(zip(args.folders, paths, strict=True))
        for source, path in both[:: secrets.choice((1, -1))]:  # the order of creation would tell
            try:
                count, digest = encode(source / name, path, pair["fps"], args.crf)
            except (av.FFmpegError, ValueError) as error:
                problems.append(f"{source / name}: cannot be played: {error}")
                continue
            pair["frames"] = pair["frames"] or count  # a header need not say
            if count == 0 or count != pair["frames"]:
                problems.append(f"{source / name}: {count} of {pair['frames']} frames can be played")
            hashes.append(digest)
        if len(hashes) == 2:
            equalise(paths)
            alike += [name] * (hashes[0] == hashes[1])
    return problems, alike


def make_study(pairs: dict[str, dict], labels: list[str], practice: int, repeats: int) -> tuple[dict, dict]:
    """
    What the page is told, without models, and the private key. Neighbours in the page's list hold the two models in
    opposite order, at random which: a page that swaps both or neither shows each model once on the left.
    """
    names = sorted(pairs)
    secrets.SystemRandom().shuffle(names)
    study = {"study": secrets.token_hex(6), "page": PAGE_VERSION, "reasons": REASONS, "repeats": repeats}
    study |= {"practice": [], "pairs": []}
    key = {"study": study["study"], "labels": labels, "pairs": {}}
    for index, name in enumerate(names):
        pair, pair_id = pairs[name], secrets.token_hex(8)
        kind = "practice" if index < practice else "pairs"
        if len(study[kind]) % 2 == 0:
            swap = secrets.randbelow(2)
        clips = pair["clips"][:: -1 if swap != len(study[kind]) % 2 else 1]
        study[kind].append({"pair": pair_id, "prompt": pair["prompt"], "clips": clips})
        key["pairs"][pair_id] = {"file_name": name, "prompt": pair["prompt"], "seed": pair["seed"]}
        key["pairs"][pair_id] |= {"practice": index < practice, "clips": dict(zip(labels, pair["clips"], strict=True))}
    return study, key


def write_page(study: dict, folder: Path) -> None:
    """Write `index.html`: the template with the study's data in it."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    data = json.dumps(study).replace("<", "\\u003c")  # a prompt may hold </script>
    (folder / "index.html").write_text(template.replace(">STUDY<", f">{data}<"), encoding="utf-8")


def refuse(problems: list[str]) -> None:
    if problems:
        raise SystemExit(f"No study was built, {len(problems)} problem(s):\n- " + "\n- ".join(problems))


def check_arguments(args: argparse.Namespace) -> None:
    for path in (args.output_dir, args.key):
        if path.exists():
            raise SystemExit(f"{path} exists; a study is never overwritten")
    if args.output_dir.resolve() in args.key.resolve().parents:
        raise SystemExit(f"--key {args.key} lies in --output_dir, which annotators get")
    if args.labels[0] == args.labels[1]:
        raise SystemExit(f"both models would be called {args.labels[0]}: pass two --labels")
    for folder in args.folders:
        if not folder.is_dir():
            raise SystemExit(f"{folder} is no folder")


def read_pairs(args: argparse.Namespace) -> dict[str, dict]:
    """The pairs of the study, see `check_pairs`; prints what is odd about them, and refuses what is wrong."""
    records = [read_generation(folder) for folder in args.folders]
    pairs, problems = check_pairs(args.folders, read_prompts(args.prompts) if args.prompts else {}, records)
    refuse(problems)
    for folder, record in zip(args.folders, records, strict=True):
        absent = [name for name in record["videos"] if name not in pairs]
        if absent:
            print(f"{len(absent)} of {folder / 'generation.json'} are not there yet: {', '.join(absent)}")
    settings = [record["settings"] for record in records]
    differing = [key for key in settings[0] | settings[1] if settings[0].get(key) != settings[1].get(key)]
    if differing:
        print(f"The folders were made with different settings: {', '.join(differing)}")
    if any(pair["seed"] is None for pair in pairs.values()):
        print("That the seeds are the same on both sides was not checked: not all are in a generation.json")
    if args.num_pairs is None:
        return pairs
    if not 0 < args.num_pairs <= len(pairs):
        raise SystemExit(f"--num_pairs {args.num_pairs}: there are {len(pairs)}")
    return {name: pairs[name] for name in secrets.SystemRandom().sample(sorted(pairs), args.num_pairs)}


def main(args: argparse.Namespace) -> None:
    check_arguments(args)
    folder, key_path = args.output_dir, args.key
    pairs = read_pairs(args)
    counted = len(pairs) - args.practice
    if args.practice < 0 or counted < 1:
        raise SystemExit(f"--practice {args.practice}: there are {len(pairs)} pairs, and one at least must count")
    repeats = round(counted * 0.05) if args.repeats is None else args.repeats
    if not 0 <= repeats <= counted // 2:
        raise SystemExit(f"--repeats {repeats}: at most half of the {counted} pairs that count")

    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        problems, alike = encode_pairs(pairs, args, partial)
        refuse(problems)
        if alike:
            print(f"Warning: both videos are the same in {len(alike)} pair(s): {', '.join(alike)}")
        study, key = make_study(pairs, args.labels, args.practice, repeats)
        write_page(study, partial)
        key_path.touch(mode=0o600, exist_ok=False)
        key_path.write_text(json.dumps(key, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    megabytes = sum(path.stat().st_size for path in folder.rglob("*.*")) / 1e6
    seconds = sum(pair["frames"] / pair["fps"] for pair in pairs.values()) * (1 + repeats / len(pairs))
    print(
        f"{folder}: {counted} pairs, {args.practice} to practise, {repeats} seen twice; {megabytes:.0f} MB\n"
        f"{key_path}: the key, not for annotators\n"
        f"An annotator watches for at least {float(seconds) / 60:.1f} minutes.\n"
        f"Open {folder}/index.html, or gather votes over HTTP:\n"
        f"  python examples/human_eval/collect.py {folder} --votes {folder}_votes.jsonl"
    )


if __name__ == "__main__":
    main(parse_args())
