"""Pages to look through: the samples of a training run, and two models side by side.

    python examples/gallery.py my_lora

writes `my_lora/samples.html`: a row a prompt, a video a step, the one before training first, with the curve of the
run and where LTD sees motion in one clip. It opens without a network, on a phone too, while the run still goes on or
after it; keep it beside its videos. The page that puts models side by side is made by `generate.py --compare`.
"""

import argparse
import html
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from huggingface_hub import ModelCard
from mistakes import run_script
from PIL import Image
from tqdm.auto import tqdm
from videos import contact_sheet, labelled_row, read_video, write_video

logger = logging.getLogger(__name__)

MODEL = ("model", "revision", "transformer", "lora")  # the settings in which folders that are compared should differ
STRIP_COLUMNS = 6  # frames
STRIP_WIDTH = 416  # pixels that a frame may be wide
POSTER_WIDTH = 640  # pixels at most
LEAST_WIDTH = 170  # CSS pixels of a sample on a page that has room: small videos are shown larger
MOST_WIDTH = 420

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.4 system-ui, sans-serif; margin: 1rem; color: #222; background: #fff }"""
PAGE = Template(
    HEAD
    + """
h2 { font-size: 1rem; margin: 2rem 0 .3rem }
video { display: block; width: 100%; height: auto; max-height: 85vh; object-fit: contain; background: #eee }
section img { display: block; width: 100%; height: auto; margin: .3rem 0 }
details { overflow-x: auto }
table { border-collapse: collapse; font-size: .8rem }
td, th { border: 1px solid #ccc; padding: .1rem .4rem; text-align: left }
td { overflow-wrap: anywhere }
tr.differs { background: #fff3c4 }
input { font: inherit; width: 100%; max-width: 30rem }
</style>
<h1>$title</h1>
<p>$count. Videos play while they are in view. Same noise for all models.</p>
<details><summary>Settings; what differs is marked</summary>
<table>$settings</table></details>
<p><input type="search" placeholder="show prompts that contain ..." aria-label="filter"></p>
$sections
<script>
const seen = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) isIntersecting ? target.play().catch(() => {}) : target.pause();
});
document.querySelectorAll("video").forEach(video => seen.observe(video));
document.querySelector("input").addEventListener("input", event => {
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector("h2").textContent.toLowerCase().includes(event.target.value.toLowerCase());
});
</script>
</html>
"""
)
SECTION = Template("""<section>
<h2>$prompt</h2>
<video src="$video" width="$width" height="$height" poster="$poster" controls loop muted playsinline
  preload="none"></video>
<img src="$strip" loading="lazy" alt="frames of each model's video, a row each">
</section>""")


def read_record(path: Path) -> dict:
    """Read a `generation.json`. Raises `ValueError` for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, remove it and generate its folder anew: {error}") from error


def read_records(folders: list[str]) -> list[dict]:
    """Read the `generation.json` of each folder. Raises `ValueError` unless their videos pair up."""
    records = []
    for folder in folders:
        path = Path(folder, "generation.json")
        if not path.is_file():
            raise ValueError(f"--compare {folder}: no generation.json; is it a folder that generate.py made?")
        records.append(read_record(path))
    names = {}  # a dict, since it keeps the order
    for record in records:
        names |= dict.fromkeys(record["videos"])

    problems = []
    for name in names:
        if Path(name).name != name:
            problems.append(f"{name} is no name of a video")
    for folder, record in zip(folders, records, strict=True):
        problems += find_differences(folder, record, folders[0], records[0], names)
    if problems:
        raise ValueError("\n- ".join(["these folders do not pair up; generate what is missing first:", *problems]))
    return records


def find_differences(folder: str, record: dict, first_folder: str, first: dict, names: Iterable[str]) -> list[str]:
    """Say what keeps the videos of a folder from pairing up with those of the first one; `names` is what it needs."""
    problems = []
    missing = []
    for name in names:
        if name not in record["videos"] or not Path(folder, name).is_file():
            missing.append(name)
    if missing:
        shown = ", ".join(missing[:5])
        if len(missing) > 5:
            shown += ", ..."
        problems.append(f"{folder} lacks {len(missing)} of {len(names)} videos: {shown}")
    other = []
    for name, entry in record["videos"].items():
        if first["videos"].get(name, entry) != entry:
            other.append(name)
    if other:
        problems.append(f"{folder} has another prompt or seed than {first_folder} for {', '.join(other[:5])}")
    for key in ("height", "width", "num_frames", "fps"):
        value = record["settings"][key]
        first_value = first["settings"][key]
        if value != first_value:
            problems.append(f"{folder} has --{key} {value}, but {first_folder} {first_value}")
    return problems


def settings_table(records: list[dict], labels: list[str]) -> str:
    """
    Write an HTML table with a column for each folder. Warn of differences that are not the model's, since then the
    comparison is not of models.
    """
    head = "<tr><th>"
    for label in labels:
        head += f"<th>{html.escape(label)}"
    rows = [head]
    for key in [*records[0]["settings"], "versions", "earlier_versions"]:
        values = []
        for record in records:
            value = (record["settings"] | record).get(key)
            values.append(json.dumps(value, ensure_ascii=False))
        row = "<tr>"
        if len(set(values)) > 1:
            row = "<tr class=differs>"
            if key not in MODEL:
                logger.warning(f"these folders differ in more than the model: {key} is {' and '.join(values)}")
        row += f"<th>{html.escape(key)}"
        for value in values:
            row += f"<td>{html.escape(value)}"
        rows.append(row)
    return "\n".join(rows)


def build_gallery(folders: list[str], labels: list[str], output_dir: str, num_samples: int) -> Path:
    """
    Write `videos/`, `strips/` and `index.html` for the first `num_samples` videos of each prompt. Returns the page.
    Raises `ValueError` unless the folders pair up.
    """
    output_dir = Path(output_dir)
    records = read_records(folders)
    settings = settings_table(records, labels)
    fps = records[0]["settings"]["fps"]
    chosen = {}
    for name, entry in records[0]["videos"].items():
        if entry["sample"] < num_samples:
            chosen[name] = entry

    for name in ("videos", "posters", "strips"):
        (output_dir / name).mkdir(parents=True, exist_ok=True)
    sections = []
    for name, entry in tqdm(chosen.items(), desc="comparing", unit="prompt"):
        clips = [read_video(Path(folder, name)) for folder in folders]  # (F, H, W, 3) each
        rows = [labelled_row(pictures, labels) for pictures in zip(*clips, strict=True)]
        frames = np.stack(rows)  # (F, H + bar, N * W + margins, 3)
        video = output_dir / "videos" / name
        write_video(frames, video, fps)
        poster = output_dir / "posters" / f"{Path(name).stem}.jpg"
        write_poster(frames, poster)

        strip = output_dir / "strips" / f"{Path(name).stem}.jpg"
        scale = min(1, STRIP_WIDTH / clips[0].shape[2])
        contact_sheet(clips, labels, STRIP_COLUMNS, scale).save(strip, quality=90)

        prompt = entry["prompt"]
        if num_samples > 1:
            prompt += f" (sample {entry['sample']})"
        section = SECTION.substitute(
            prompt=html.escape(prompt),
            video=html.escape(quote(f"videos/{video.name}")),
            poster=html.escape(quote(f"posters/{poster.name}")),
            strip=html.escape(quote(f"strips/{strip.name}")),
            height=frames.shape[1],
            width=frames.shape[2],
        )
        sections.append(section)

    text = PAGE.substitute(
        title=html.escape(" | ".join(labels)),
        count=f"{len(chosen)} videos of each",
        settings=settings,
        sections="\n".join(sections),
    )
    return write_page(text, output_dir / "index.html")


def write_page(text: str, path: Path) -> Path:
    """Write a page, which is whole or not there. Returns its path."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def write_poster(frames: np.ndarray, path: Path) -> None:
    """Write the middle one of `frames` `(F, H, W, 3)`: what a page shows until the video plays."""
    picture = Image.fromarray(frames[len(frames) // 2])
    picture.thumbnail((POSTER_WIDTH, POSTER_WIDTH))
    picture.save(path, quality=80)


# --- The samples of a run --------------------------------------------------------------------------------------------

SAMPLES_PAGE = Template(
    HEAD
    + """
h1 { font-size: 1.4rem; margin: 0 0 .5rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
h3 { font-size: 1rem; font-weight: 600; margin: .8rem 0 .3rem }
.prompts { display: grid; gap: .4rem 2rem }
.prompts { grid-template-columns: repeat(auto-fit, minmax(min(var(--row), 100%), 1fr)) }
ul { padding-left: 1.2rem }
.steps { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(min(${least}px, 45%), 1fr)) }
figure { margin: 0; max-width: 28rem }
figcaption { font-size: .85rem }
video, img { display: block; width: 100%; height: auto; background: #eee }
figure.wide { max-width: 60rem }
</style>
<h1>$title</h1>
<ul>
$facts
</ul>
$sections
<script>
// The videos of a row start together, so that the eye can compare them.
const seen = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries)
    for (const video of target.querySelectorAll("video")) {
      if (!isIntersecting) { video.pause(); continue; }
      video.currentTime = 0;
      video.play().catch(() => {});
    }
});
document.querySelectorAll(".steps, .wide").forEach(row => seen.observe(row));
</script>
</html>
"""
)
SAMPLE_VIDEO = Template('<video src="$video" poster="$poster" controls loop muted playsinline preload="none"></video>')
WIDE_FIGURE = Template("""<h2>$title</h2>
<figure class="wide">$media<figcaption>$text</figcaption></figure>""")
CURVE_TEXT = "Error over the steps. The held-out one is the curve to look at: training's own is mostly noise."
MAP_TEXT = (
    "Left: a training clip. Right: LTD on it; bright is what moves between latent frames, and what the loss weighs"
    " more. The first two latent frames are bright all over, since the autoencoder codes the first picture by itself."
)
PARTS = {
    "measured": "Measured: each with noise of its own",  # by examples/nano/degrees_turned.py
    ".": "",
    "high_noise": "The expert for high noise",
    "low_noise": "The expert for low noise",
}  # folder of results in the output folder -> title


@dataclass
class Samples:
    """What a folder of results holds: the settings of its run, and its sample videos."""

    folder: Path  # of the results: the output folder, or an expert's in it
    settings: dict
    videos: dict[str, dict[int, Path]]  # what a file name says of the prompt -> step -> file


def find_samples(folder: Path) -> Samples:
    """Find the videos `samples/step-STEP-PROMPT.mp4`, and the settings, which are there once the run has ended."""
    settings = {}
    path = folder / "training_settings.json"
    if path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is no JSON ({error}); without it, the page has prompts by their files' names"
            ) from error
    videos = {}
    for path in sorted(folder.glob("samples/step-*.mp4")):
        parts = re.fullmatch(r"step-(\d+)-(.+)", path.stem)
        if parts:
            step = int(parts[1])
            videos.setdefault(parts[2], {})[step] = path
    return Samples(folder, settings, videos)


def prompts_of_card(output_dir: Path) -> dict[str, str]:
    """Read from the model card which prompt a sample is of: what its file name says of the prompt -> the prompt."""
    path = output_dir / "README.md"
    if not path.is_file():
        return {}
    prompts = {}
    for entry in ModelCard.load(path, ignore_metadata_errors=True).data.get("widget") or []:
        url = (entry.get("output") or {}).get("url") or ""
        parts = re.fullmatch(r"step-\d+-(.+)", Path(url).stem)
        if parts and "text" in entry:
            prompts[parts[1]] = entry["text"]
    return prompts


def plain(text: str) -> str:
    """Return the letters and digits of a text, with a hyphen between words: what is sure to be in a file name."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


def prompt_of(name: str, prompts: list[str], of_card: dict[str, str]) -> str:
    """Return the prompt of a sample: by its number, by the card, by its words, or else what its name says."""
    if re.fullmatch(r"\d{1,6}", name) and int(name) < len(prompts):
        return prompts[int(name)]
    if name in of_card:
        return of_card[name]
    words = re.sub(r"-\d+$", "", plain(name))  # without a number that tells equal names apart
    for prompt in prompts:
        if plain(prompt).startswith(words):
            return prompt
    return name.replace("-", " ")


def samples_section(samples: Samples, output_dir: Path, title: str) -> str:
    """Write a row a prompt with a video a step, the first one first."""
    parts = []
    if title:
        parts.append(f"<h2>{html.escape(title)}</h2>")
    prompts = samples.settings.get("validation_prompt") or []
    of_card = prompts_of_card(output_dir)
    posters = samples.folder / "samples" / "posters"
    posters.mkdir(exist_ok=True)
    rows = []
    for name, steps in samples.videos.items():
        prompt = prompt_of(name, prompts, of_card)
        place = prompts.index(prompt) if prompt in prompts else len(prompts)
        rows.append((place, prompt, steps))
    rows.sort(key=lambda row: row[0])  # which keeps the order of names where there is no other
    most = max(len(steps) for steps in samples.videos.values())
    # As many prompts side by side as have room for all their steps
    parts.append(f'<div class="prompts" style="--row: {most * (LEAST_WIDTH + 10)}px">')
    for _, prompt, steps in rows:
        figures = []
        for step, path in sorted(steps.items()):
            poster = posters / f"{path.stem}.jpg"
            write_poster(read_video(path), poster)
            label = "before training (step 0)" if step == 0 else f"after step {step}"
            video = SAMPLE_VIDEO.substitute(video=address(path, output_dir), poster=address(poster, output_dir))
            figure = f"<figure><figcaption>{label}</figcaption>{video}</figure>"
            figures.append(figure)
        row = f'<div class="steps">{"".join(figures)}</div>'
        parts.append(f"<div><h3>{html.escape(prompt)}</h3>\n{row}</div>")
    parts.append("</div>")
    return "\n".join(parts)


def address(path: Path, folder: Path) -> str:
    """Return the address of a file for a page in `folder`, as it stands in an attribute."""
    return html.escape(quote(path.relative_to(folder).as_posix()))


def held_out_errors(output_dir: Path) -> dict[int, float]:
    """Read from `metrics.jsonl` the mean squared error on held-out clips: step -> error."""
    errors = {}
    path = output_dir / "metrics.jsonl"
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a last line that a run is writing
                continue
            if "val/mse" in row:
                errors[row["step"]] = row["val/mse"]
    return errors


def run_facts(output_dir: Path, runs: list[Samples]) -> list[str]:
    """Say in sentences what was trained, and how the error on held-out clips went."""
    facts = []
    for samples in runs:
        settings = samples.settings
        if "train_type" in settings:
            kind = "all weights"
            if settings["train_type"] == "lora":
                kind = f"a LoRA of rank {settings['rank']}"
            base = settings["pretrained_model_name_or_path"]
            facts.append(f"Trained: {kind} of {base}, {settings['max_train_steps']} steps, loss {settings['loss']}.")
    errors = held_out_errors(output_dir)
    if len(errors) > 1:
        first = min(errors)
        last = max(errors)
        facts.append(
            f"Error on clips that training never saw: {errors[first]:.3f} at step {first},"
            f" {errors[last]:.3f} at step {last}."
        )
    return facts


def draw_map(output_dir: Path) -> Path | None:
    """Return the video of LTD on one clip, which is drawn from the run's own cache if it is not there; else `None`."""
    path = output_dir / "ltd_maps.mp4"
    entries = sorted(output_dir.glob("cache/latents/*.safetensors"))
    if path.is_file() or not entries:
        return path if path.is_file() else None
    script = Path(__file__).with_name("visualize_ltd.py")
    command = [sys.executable, script, "maps", "--ltd_only", "--latents", entries[0], "--output_dir", output_dir]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        logger.warning(f"LTD's map could not be drawn: {result.stderr.strip().splitlines()[-1]}")
        return None
    return path


def build_samples_page(output_dir: Path, notes: Iterable[str] = ()) -> Path:
    """Write `samples.html` of a run, with `notes` as its first sentences. Returns the page.

    Raises `ValueError` where there are no samples.
    """
    runs = {title: find_samples(output_dir / name) for name, title in PARTS.items()}
    runs = {title: samples for title, samples in runs.items() if samples.videos}
    if len(runs) > 1 and "" in runs:
        runs["Sampled while it trained"] = runs.pop("")
    if not output_dir.is_dir():
        raise ValueError(f"there is no folder {output_dir}; give the --output_dir of a training run")
    if not runs:
        raise ValueError(
            f"{output_dir}/samples holds no videos step-*.mp4; was --validation_prompt given in training?"
        )
    sections = []
    for title, samples in runs.items():
        sections.append(samples_section(samples, output_dir, title))
        curves = samples.folder / "curves.png"
        if curves.is_file():
            media = f'<img src="{address(curves, output_dir)}" alt="error over the steps of training">'
            sections.append(WIDE_FIGURE.substitute(title="The curve", media=media, text=CURVE_TEXT))
    ltd_map = draw_map(output_dir)
    if ltd_map:
        poster = output_dir / "ltd_maps.jpg"
        write_poster(read_video(ltd_map), poster)
        media = SAMPLE_VIDEO.substitute(video=address(ltd_map, output_dir), poster=address(poster, output_dir))
        sections.append(WIDE_FIGURE.substitute(title="Where LTD sees motion", media=media, text=MAP_TEXT))

    facts = [*notes, *run_facts(output_dir, list(runs.values()))]
    videos = [path for samples in runs.values() for steps in samples.videos.values() for path in steps.values()]
    width = read_video(videos[0]).shape[2]
    text = SAMPLES_PAGE.substitute(
        title=html.escape(f"Samples of {output_dir.resolve().name}"),
        facts="\n".join(f"<li>{html.escape(fact)}" for fact in facts),
        sections="\n".join(sections),
        least=max(LEAST_WIDTH, min(width, MOST_WIDTH)),
    )
    return write_page(text, output_dir / "samples.html")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="of a training run")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the top of the page; repeatable")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Write the page and say where it is. Raises `ValueError` where there is nothing to show."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    page = build_samples_page(args.output_dir, args.note)
    print(f"Open {page}")


if __name__ == "__main__":
    run_script(main, parse_args)
