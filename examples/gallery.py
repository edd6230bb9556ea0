"""Side-by-side videos, filmstrips and a page to look through, of folders that `generate.py` made: its `--compare`."""

import html
import json
import logging
import os
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from tqdm.auto import tqdm
from videos import contact_sheet, labelled_row, read_video, write_video

logger = logging.getLogger(__name__)

MODEL = ("model", "revision", "transformer", "lora")  # the settings in which folders that are compared should differ
STRIP_COLUMNS, STRIP_WIDTH = 6, 416  # frames, and pixels that a frame may be wide

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
    """The `generation.json` of each folder. Raises `ValueError` unless their videos pair up."""
    records = []
    for folder in folders:
        path = Path(folder, "generation.json")
        if not path.is_file():
            raise ValueError(f"--compare {folder}: no generation.json; is it a folder that generate.py made?")
        records.append(json.loads(path.read_text(encoding="utf-8")))
    names, problems = list(dict.fromkeys(name for record in records for name in record["videos"])), []
    problems += [f"{name} is no name of a video" for name in names if Path(name).name != name]
    for folder, record in zip(folders, records, strict=True):
        missing = [name for name in names if name not in record["videos"] or not Path(folder, name).is_file()]
        if missing:
            shown = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
            problems.append(f"{folder} lacks {len(missing)} of {len(names)} videos: {shown}")
        first = records[0]
        other = [name for name, entry in record["videos"].items() if first["videos"].get(name, entry) != entry]
        if other:
            problems.append(f"{folder} has another prompt or seed than {folders[0]} for {', '.join(other[:5])}")
        for key in ("height", "width", "num_frames", "fps"):
            if record["settings"][key] != first["settings"][key]:
                there, here = first["settings"][key], record["settings"][key]
                problems.append(f"{folder} has --{key} {here}, but {folders[0]} {there}")
    if problems:
        raise ValueError("\n- ".join(["these folders do not pair up; generate what is missing first:", *problems]))
    return records


def settings_table(records: list[dict], labels: list[str]) -> str:
    """A column a folder. Warns of differences that are not the model's, since then the comparison is not of models."""
    rows = ["<tr><th>" + "".join(f"<th>{html.escape(label)}" for label in labels)]
    for key in records[0]["settings"] | {"versions": None, "earlier_versions": None}:
        values = [json.dumps((record["settings"] | record).get(key), ensure_ascii=False) for record in records]
        differs = len(set(values)) > 1
        if differs and key not in MODEL:
            logger.warning(f"these folders differ in more than the model: {key} is {' and '.join(values)}")
        cells = "".join(f"<td>{html.escape(value)}" for value in values)
        rows.append(f"<tr{' class=differs' * differs}><th>{html.escape(key)}{cells}")
    return "\n".join(rows)


def build_gallery(folders: list[str], labels: list[str], output_dir: str, num_samples: int) -> Path:
    """
    Write `videos/`, `strips/` and `index.html` for the first `num_samples` videos of each prompt; returns the page.
    Raises `ValueError` unless the folders pair up.
    """
    records, sections, output_dir = read_records(folders), [], Path(output_dir)
    settings = settings_table(records, labels)
    for name in ("videos", "strips"):
        (output_dir / name).mkdir(parents=True, exist_ok=True)
    chosen = {k: entry for k, entry in records[0]["videos"].items() if entry["sample"] < num_samples}
    for name, entry in tqdm(chosen.items(), desc="comparing", unit="prompt"):
        clips = [read_video(Path(folder, name)) for folder in folders]
        frames = np.stack([labelled_row(pictures, labels) for pictures in zip(*clips, strict=True)])
        video, strip = output_dir / "videos" / name, output_dir / "strips" / f"{Path(name).stem}.jpg"
        write_video(frames, video, records[0]["settings"]["fps"])
        scale = min(1, STRIP_WIDTH / clips[0].shape[2])
        contact_sheet(clips, labels, STRIP_COLUMNS, scale).save(strip, quality=90)
        values = {"prompt": entry["prompt"] + f" (sample {entry['sample']})" * (num_samples > 1)}
        values |= {"video": quote(f"videos/{video.name}"), "strip": quote(f"strips/{strip.name}")}
        values |= {"height": frames.shape[1], "width": frames.shape[2]}
        sections.append(SECTION.substitute({key: html.escape(str(value)) for key, value in values.items()}))
    page = output_dir / "index.html"
    values = {"title": html.escape(" | ".join(labels)), "count": f"{len(chosen)} videos of each"}
    text = PAGE.substitute(values, settings=settings, sections="\n".join(sections), width=frames.shape[2])
    page.with_suffix(".partial").write_text(text, encoding="utf-8")
    os.replace(page.with_suffix(".partial"), page)
    return page
