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

from tqdm.auto import tqdm

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # videos.py and others: examples/ is folders of scripts, not a package

from mistakes import run_script
from videos import describe_video, find_videos, read_video, write_video

PAGE_VERSION = 1
REASONS = ["motion", "text match", "appearance", "overall"]
SAME_DATE = 946684800  # 2000-01-01: what is written first would otherwise show in Last-Modified
BOX_HEAD = 8  # bytes of an mp4 box before its content


def parse_args(input_args=None) -> argparse.Namespace:
    """Parse the command line, or `input_args` instead of it, and name what was not named."""
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
    if not args.labels:
        args.labels = [folder.resolve().name for folder in args.folders]
    if not args.key:
        args.key = args.output_dir.with_name(f"{args.output_dir.name}_key.json")
    return args


def read_prompts(path: Path) -> dict[str, str]:
    """Read file name -> prompt, from JSON of such or from JSON lines of `file_name` and `text`.

    Raise `SystemExit` for a file that holds something else.
    """
    text = path.read_text(encoding="utf-8-sig")
    prompts = {}
    try:
        if path.suffix == ".jsonl":
            for line in text.splitlines():
                if line.strip():
                    row = json.loads(line)
                    prompts[row["file_name"]] = row["text"]
        else:
            for name, prompt in json.loads(text).items():
                prompts[str(name)] = str(prompt)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        message = f"--prompts {path}: expected file names and prompts ({type(error).__name__}: {error})"
        raise SystemExit(message) from None
    return prompts


def read_generation(folder: Path) -> dict:
    """Read what `generate.py` wrote about a folder: `settings`, and `videos` with prompt and seed.

    Both are empty if it wrote nothing.
    """
    path = folder / "generation.json"
    if not path.is_file():
        return {"settings": {}, "videos": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def check_pairs(folders: list[Path], prompts: dict[str, str], records: list[dict]) -> tuple[dict, list[str]]:
    """Pair the videos of two folders by file name.

    Return the pairs by name, see `check_pair`, and a line for everything that is wrong.
    """
    first_names, second_names = ({path.name for path in find_videos(folder)} for folder in folders)
    problems = []
    for name in sorted(first_names - second_names):
        problems.append(f"{name}: in {folders[0]}, but not in {folders[1]}")
    for name in sorted(second_names - first_names):
        problems.append(f"{name}: in {folders[1]}, but not in {folders[0]}")
    pairs = {}
    for name in sorted(first_names & second_names):
        pair, pair_problems = check_pair(name, folders, prompts, records)
        problems += pair_problems
        if pair is not None:
            pairs[name] = pair
    if not first_names and not second_names:
        problems.append(f"no mp4 files in {folders[0]} and {folders[1]}")
    return pairs, problems


def check_pair(
    name: str, folders: list[Path], prompts: dict[str, str], records: list[dict]
) -> tuple[dict | None, list[str]]:
    """Compare the two videos called `name`, and what the records say about them.

    Return the pair with what `describe_video` says, `prompt` and `seed`, or None if it cannot be played; and a line
    for everything that is wrong.
    """
    problems = []
    descriptions = []
    for folder in folders:
        path = folder / name
        try:
            descriptions.append(describe_video(path))
        except ValueError as error:
            problems.append(str(error))
    if len(descriptions) < 2:
        return None, problems
    first, second = descriptions
    for key, value in first.items():
        if value != second[key]:
            problems.append(f"{name}: {key} {value} in {folders[0]}, but {second[key]} in {folders[1]}")
    if first["width"] % 2 or first["height"] % 2:
        problems.append(f"{name}: H.264 for browsers needs an even width and height")
    first_entry, second_entry = (record["videos"].get(name, {}) for record in records)
    for key in ("prompt", "seed"):
        if key not in first_entry or key not in second_entry:
            continue
        first_value = first_entry[key]
        second_value = second_entry[key]
        if first_value != second_value:
            problems.append(f"{name}: {key} {first_value!r} in {folders[0]}, but {second_value!r} in {folders[1]}")
    prompt = prompts.get(name) or first_entry.get("prompt") or second_entry.get("prompt")
    if not prompt:
        problems.append(f"{name}: no prompt; is there a generation.json? Else pass --prompts")
    seed = None  # nobody can say that they agree
    if "seed" in second_entry:
        seed = first_entry.get("seed")
    pair = {**first, "prompt": prompt, "seed": seed}
    return pair, problems


def encode(source: Path, target: Path, fps: Fraction, crf: int) -> tuple[int, str]:
    """Write the pictures of `source` alone as H.264, frame by frame at `fps`. Return their number and a hash."""
    frames = read_video(source, "yuv420p")  # the file's own pixels: nothing is converted
    write_video(frames, target, fps, "yuv420p", codec={"crf": str(crf)})
    return len(frames), hashlib.sha256(frames).hexdigest()


def equalize(paths: list[Path]) -> None:
    """Pad mp4 files to one number of bytes by an empty `free` box at the end, and give them one date."""
    largest = max(path.stat().st_size for path in paths)
    size = largest + BOX_HEAD
    for path in paths:
        missing = size - path.stat().st_size
        length = missing.to_bytes(4, "big")
        with path.open("ab") as file:
            file.write(length + b"free" + bytes(missing - BOX_HEAD))
        os.utime(path, (SAME_DATE, SAME_DATE))


def encode_pairs(pairs: dict[str, dict], args: argparse.Namespace, folder: Path) -> tuple[list[str], list[str]]:
    """Make `clips/` and note the two random names of each pair in it, as `clips`.

    Return lines of what is wrong, and the pairs whose videos show the same.
    """
    problems = []
    alike = []
    clips_folder = folder / "clips"
    clips_folder.mkdir(parents=True)
    for name, pair in tqdm(pairs.items(), desc="encoding pairs"):
        pair["clips"] = [secrets.token_hex(8) for _ in args.folders]
        targets = [clips_folder / f"{clip}.mp4" for clip in pair["clips"]]
        sides = list(zip(args.folders, targets, strict=True))
        # The order of creation would tell.
        if secrets.choice((False, True)):
            sides.reverse()
        hashes = []
        for source_folder, target in sides:
            source = source_folder / name
            try:
                count, digest = encode(source, target, pair["fps"], args.crf)
            except ValueError as error:
                problems.append(str(error))
                continue
            pair["frames"] = pair["frames"] or count  # a header need not say
            if count == 0 or count != pair["frames"]:
                problems.append(f"{source}: {count} of {pair['frames']} frames can be played")
            hashes.append(digest)
        if len(hashes) == 2:
            equalize(targets)
            if hashes[0] == hashes[1]:
                alike.append(name)
    return problems, alike


def make_study(pairs: dict[str, dict], labels: list[str], practice: int, repeats: int) -> tuple[dict, dict]:
    """Return what the page is told, without models, and the private key.

    Neighbors in the page's list hold the two models in opposite order, at random which: a page that swaps both or
    neither shows each model once on the left.
    """
    names = sorted(pairs)
    secrets.SystemRandom().shuffle(names)
    study = {
        "study": secrets.token_hex(6),
        "page": PAGE_VERSION,
        "reasons": REASONS,
        "repeats": repeats,
        "practice": [],
        "pairs": [],
    }
    key = {
        "study": study["study"],
        "labels": labels,
        "pairs": {},
    }
    swapped = False
    for index, name in enumerate(names):
        pair = pairs[name]
        pair_id = secrets.token_hex(8)
        is_practice = index < practice
        listed = study["practice"] if is_practice else study["pairs"]
        has_neighbor_before = len(listed) % 2 == 1
        if has_neighbor_before:
            swapped = not swapped
        else:
            swapped = secrets.randbelow(2) == 1
        clips = list(pair["clips"])
        if swapped:
            clips.reverse()
        listed.append({"pair": pair_id, "prompt": pair["prompt"], "clips": clips})
        key["pairs"][pair_id] = {
            "file_name": name,
            "prompt": pair["prompt"],
            "seed": pair["seed"],
            "practice": is_practice,
            "clips": dict(zip(labels, pair["clips"], strict=True)),
        }
    return study, key


def write_page(study: dict, folder: Path) -> None:
    """Write `index.html`: the template with the study's data in it."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    data = json.dumps(study).replace("<", "\\u003c")  # a prompt may hold </script>
    page = template.replace(">STUDY<", f">{data}<")
    (folder / "index.html").write_text(page, encoding="utf-8")


def refuse(problems: list[str]) -> None:
    """Raise `SystemExit` with all problems, if there are any."""
    if problems:
        raise SystemExit(f"No study was built, {len(problems)} problem(s):\n- " + "\n- ".join(problems))


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `SystemExit` for paths and labels that cannot make a blind study."""
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
    """Return the pairs of the study, see `check_pair`. Print what may surprise, and refuse what is wrong."""
    records = [read_generation(folder) for folder in args.folders]
    prompts = {}
    if args.prompts:
        prompts = read_prompts(args.prompts)
    pairs, problems = check_pairs(args.folders, prompts, records)
    refuse(problems)
    for folder, record in zip(args.folders, records, strict=True):
        absent = [name for name in record["videos"] if name not in pairs]
        if absent:
            print(f"{len(absent)} of {folder / 'generation.json'} are not there yet: {', '.join(absent)}")
    first_settings, second_settings = (record["settings"] for record in records)
    differing = []
    for key in {**first_settings, **second_settings}:
        if first_settings.get(key) != second_settings.get(key):
            differing.append(key)
    if differing:
        print(f"The folders were made with different settings: {', '.join(differing)}")
    if any(pair["seed"] is None for pair in pairs.values()):
        print("That the seeds are the same on both sides was not checked: not all are in a generation.json")
    if args.num_pairs is None:
        return pairs
    if not 0 < args.num_pairs <= len(pairs):
        raise SystemExit(f"--num_pairs {args.num_pairs}: there are {len(pairs)}")
    names = secrets.SystemRandom().sample(sorted(pairs), args.num_pairs)
    return {name: pairs[name] for name in names}


def write_key(key: dict, path: Path) -> None:
    """Write the private key, readable by its owner alone. Raise `FileExistsError` if there is one."""
    # The mode is set before there is anything to read.
    path.touch(mode=0o600, exist_ok=False)
    text = json.dumps(key, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    """Build the study, or leave nothing behind; print what it holds and how to go on."""
    check_arguments(args)
    folder = args.output_dir
    pairs = read_pairs(args)
    counted = len(pairs) - args.practice
    if args.practice < 0 or counted < 1:
        raise SystemExit(f"--practice {args.practice}: there are {len(pairs)} pairs, and one at least must count")
    repeats = args.repeats
    if repeats is None:
        repeats = round(counted * 0.05)
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
        write_key(key, args.key)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    size = sum(path.stat().st_size for path in folder.rglob("*.*"))
    once = sum(pair["frames"] / pair["fps"] for pair in pairs.values())
    seconds = once * (1 + repeats / len(pairs))
    print(
        f"{folder}: {counted} pairs, {args.practice} to practise, {repeats} seen twice; {size / 1e6:.0f} MB\n"
        f"{args.key}: the key, not for annotators\n"
        f"An annotator watches for at least {float(seconds) / 60:.1f} minutes.\n"
        f"Open {folder}/index.html, or gather votes over HTTP:\n"
        f"  python examples/human_eval/collect.py {folder} --votes {folder}_votes.jsonl"
    )


if __name__ == "__main__":
    run_script(main, parse_args)
