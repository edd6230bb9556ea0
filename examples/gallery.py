"""Side-by-side videos, filmstrips and a page to look through, of folders that `generate.py` made: its `--compare`."""

import html
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from tqdm.auto import tqdm
from videos import contact_sheet, labelled_row, read_video, write_video

logger = logging.getLogger(__name__)

MODEL = ("model", "revision", "transformer", "lora")  # the settings in which folders that are compared should differ
STRIP_COLUMNS = 6  # frames
STRIP_WIDTH = 416  # pixels that a frame may be wide

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 110rem; padding: 0 1rem }
h2 { font-size: 1rem; margin: 2rem 0 .3rem }
video, section img { display: block; width: 100%; height: auto; max-width: max(45rem, ${width}px); margin: .3rem 0 }
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
""")
SECTION = Template("""<section>
<h2>$prompt</h2>
<video src="$video" width="$width" height="$height" controls loop muted playsinline preload="none"></video>
<img src="$strip" loading="lazy" alt="frames of each model's video, a row each">
</section>""")


def read_records(folders: list[str]) -> list[dict]:
    """Read the `generation.json` of each folder. Raises `ValueError` unless their videos pair up."""
    records = []
    for folder in folders:
        path = Path(folder, "generation.json")
        if not path.is_file():
            raise ValueError(f"--compare {folder}: no generation.json; is it a folder that generate.py made?")
        records.append(json.loads(path.read_text(encoding="utf-8")))
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

    for name in ("videos", "strips"):
        (output_dir / name).mkdir(parents=True, exist_ok=True)
    sections = []
    for name, entry in tqdm(chosen.items(), desc="comparing", unit="prompt"):
        clips = [read_video(Path(folder, name)) for folder in folders]  # (F, H, W, 3) each
        rows = [labelled_row(pictures, labels) for pictures in zip(*clips, strict=True)]
        frames = np.stack(rows)  # (F, H + bar, N * W + margins, 3)
        video = output_dir / "videos" / name
        write_video(frames, video, fps)

        strip = output_dir / "strips" / f"{Path(name).stem}.jpg"
        scale = min(1, STRIP_WIDTH / clips[0].shape[2])
        contact_sheet(clips, labels, STRIP_COLUMNS, scale).save(strip, quality=90)

        prompt = entry["prompt"]
        if num_samples > 1:
            prompt += f" (sample {entry['sample']})"
        section = SECTION.substitute(
            prompt=html.escape(prompt),
            video=html.escape(quote(f"videos/{video.name}")),
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
        width=frames.shape[2],
    )
    page = output_dir / "index.html"
    partial = page.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, page)
    return page
