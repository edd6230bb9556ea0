"""Scores of generated videos: how they are kept, the benchmarks' totals, the comparison, its table, chart and card.

The command line is `evaluate.py`.
"""

import csv
import io
import itertools
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from huggingface_hub import EvalResult, ModelCard
from video_metrics import PROXIES
from videos import describe_video, find_videos

# VBench's `scripts/constant.py`: the range that a score is scaled by, and its weight in the Quality Score. Order and
# headings are the paper's.
DIMENSIONS = {
    "aesthetic_quality": ("Aesthetic Quality", 0.0, 1.0, 1.0),
    "background_consistency": ("Background Consistency", 0.2615, 1.0, 1.0),
    "dynamic_degree": ("Dynamic Degree", 0.0, 1.0, 0.5),
    "imaging_quality": ("Image Quality", 0.0, 1.0, 1.0),
    "motion_smoothness": ("Motion Smoothness", 0.706, 0.9975, 1.0),
    "subject_consistency": ("Subject Consistency", 0.1462, 1.0, 1.0),
    "temporal_flickering": ("Temporal Flickering", 0.6293, 1.0, 1.0),
}
VMBENCH = {
    "perceptible_amplitude_score": "PAS",
    "object_integrity_score": "OIS",
    "temporal_coherence_score": "TCS",
    "commonsense_adherence_score": "CAS",
    "motion_smoothness_score": "MSS",
}
# Tables 1 and 2 of https://huggingface.co/papers/2601.20504 in percent: DIMENSIONS in order, then the Quality Score.
PAPER = {
    "VideoCrafter": (63.13, 98.22, 42.50, 67.22, 97.73, 96.85, 98.41, 82.20),
    "Wan2.1 (Base)": (64.41, 96.26, 70.83, 65.06, 97.88, 93.49, 99.51, 83.76),
    "CogVideoX": (60.82, 96.63, 59.86, 61.68, 97.73, 96.78, 98.89, 81.43),
    "Hunyuan": (65.24, 93.08, 87.50, 61.59, 98.34, 88.60, 98.38, 82.87),
    "OpenSora": (64.33, 98.00, 20.74, 65.62, 99.49, 98.75, 99.40, 80.14),
    "OpenSora-Plan": (56.85, 96.73, 47.72, 62.28, 98.28, 95.73, 99.03, 80.91),
    "w/o LTD Loss": (61.51, 96.68, 61.11, 67.83, 97.95, 96.00, 99.40, 83.52),
    "Ours (w/ LTD Loss)": (65.80, 97.16, 68.06, 67.85, 98.39, 95.65, 99.69, 85.11),
    "Wan2.1 (Base), VMBench prompts": (65.02, 91.57, 33.33, 62.85, 97.50, 90.11, 73.40, 77.27),
    "Ours, VMBench prompts": (55.25, 92.59, 78.10, 66.40, 97.93, 91.90, 80.36, 80.85),
}
SOURCES = ("vbench_standard", "vbench_custom_input", "offline", "vmbench")  # the first that has a metric counts
ON_PURPOSE = {"model", "revision", "transformer", "lora", "preset"}  # settings in which models may differ


# --- Totals ----------------------------------------------------------------------------------------------------------


def quality_score(scores):
    """VBench's Quality Score: the weighted mean of the seven dimensions, each scaled by its own range, not clipped.

    Args:
        scores (`dict`): All of `DIMENSIONS` as fractions, not percent: floats, or arrays of one shape.

    Returns the score as a fraction. Raises `ValueError` for a missing dimension or percentages. Source:
    `scripts/cal_final_score.py` of https://github.com/Vchitect/VBench.
    """
    if missing := [name for name in DIMENSIONS if name not in scores]:
        raise ValueError(f"the Quality Score needs all seven dimensions; {', '.join(missing)} missing")
    if high := [name for name in DIMENSIONS if np.max(scores[name]) > 1.5]:  # a still video may be 1 + 1e-7
        raise ValueError(f"scores are fractions of 1; {high[0]} is {np.max(scores[high[0]]):g}")
    parts = [weight * (scores[name] - low) / (top - low) for name, (_, low, top, weight) in DIMENSIONS.items()]
    return sum(parts) / sum(weight for *_, weight in DIMENSIONS.values())


def average_of_five(scores):
    """Mean of VMBench's five metrics."""
    return sum(scores[name] for name in VMBENCH) / len(VMBENCH)


def total_of_four(scores):
    """`Total Score` in VMBench's `scores.csv`: `calculate_score.py` there looks for PAS under a misspelt key."""
    return sum(scores[name] for name in VMBENCH if name != "perceptible_amplitude_score") / (len(VMBENCH) - 1)


# Heading -> metrics, and what is computed from all of them
SECTIONS = {
    "VBench": (tuple(DIMENSIONS), {"quality_score": quality_score}),
    "VMBench": (tuple(VMBENCH), {"average_of_five": average_of_five, "total_of_four": total_of_four}),
    "Offline proxies (not VBench)": (tuple(PROXIES), {}),
}
LABELS = {name: value[0] for name, value in DIMENSIONS.items()} | VMBENCH | {"quality_score": "Quality Score"}
LABELS |= {"average_of_five": "Average of five", "total_of_four": "VMBench's own total (no PAS)"}


# --- Scores on disk --------------------------------------------------------------------------------------------------


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_text(path, text):
    """Written beside and renamed: what was there before stays whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def list_videos(folder):
    """Name -> size and time of change of every mp4 in a folder."""
    videos = {path.name: path.stat() for path in find_videos(folder)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in videos.items()}


def save_score(folder, source, metric, entry):
    """Keep one metric's score in `scores/SOURCE.json` beside the videos.

    An entry has `score`, `videos` (name -> score) and `expected` (their number by the protocol), or else `error`; and
    `by` (what computed it), `inputs` (see `list_videos`). All scores are fractions.
    """
    path = Path(folder, "scores", f"{source}.json")
    write_text(path, json.dumps(read_json(path) | {metric: entry}, indent=1, ensure_ascii=False) + "\n")


def load_scores(folder):
    """Metric -> entry with its `source`; and what could not be scored at all, metric -> reason."""
    entries, errors = {}, {}
    for source in SOURCES:
        for metric, entry in read_json(Path(folder, "scores", f"{source}.json")).items():
            if "error" in entry:
                errors[metric] = entry["error"]
            elif metric not in entries:
                entries[metric] = entry | {"source": source}
    return entries, {metric: reason for metric, reason in errors.items() if metric not in entries}


# --- Comparison ------------------------------------------------------------------------------------------------------


def resampled_means(scores, names, counts):
    """Metric -> its mean over each resampling of the videos, `(draws,)`. `counts` is `(draws, len(names))`."""
    means, column = {}, {name: i for i, name in enumerate(names)}
    for metric, videos in scores.items():
        weights = counts[:, [column[name] for name in videos]]
        with np.errstate(invalid="ignore"):  # a draw without any of a metric's videos says nothing of it: NaN
            means[metric] = weights @ np.array(list(videos.values()), float) / weights.sum(axis=1)
    return means


def bootstrap_differences(scores, base, totals, draws=2000, seed=0):
    """95 % percentile bootstrap intervals of `scores - base`, metric -> (low, high).

    Videos are drawn by name, the same for both models and all metrics: pairs stay pairs, and totals are recomputed
    from each draw.

    Args:
        scores, base (`dict`): Metric -> name of a video -> score.
        totals (`dict`): Name -> function of a dict of all metrics' means, such as `quality_score`.
    """
    names = sorted({name for model in (scores, base) for videos in model.values() for name in videos})
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    ours, theirs = resampled_means(scores, names, counts), resampled_means(base, names, counts)
    for name, total in totals.items():
        ours[name], theirs[name] = total(ours), total(theirs)
    return {m: np.nanpercentile(ours[m] - theirs[m], [2.5, 97.5]).tolist() for m in ours if m in theirs}


def compare(models, draws=2000):
    """One row (a dict) for each section, model and metric. `models` is name -> entries; the first is the base."""
    rows, base = [], next(iter(models))
    for section, (metrics, all_totals) in SECTIONS.items():
        base_scores = {}
        for name, entries in models.items():
            part = {metric: entries[metric] for metric in metrics if metric in entries}
            totals = all_totals if len(part) == len(metrics) else {}
            scores = {metric: entry["score"] for metric, entry in part.items()}
            scores |= {total: function(scores) for total, function in totals.items()}
            if name == base:
                base_scores = scores
            intervals = {}
            if name != base and (both := [metric for metric in part if metric in base_scores]):
                videos = [{m: models[n][m]["videos"] for m in both} for n in (name, base)]
                totals = {total: f for total, f in totals.items() if total in base_scores}
                intervals = bootstrap_differences(*videos, totals, draws)
            sources = {entry["source"] for entry in part.values()}
            source = sources.pop() if len(sources) == 1 else "mixed"  # of the totals
            for metric, score in scores.items():
                entry = part.get(metric, {"source": source})
                row = {"section": section, "model": name, "metric": metric, "score": score, "source": entry["source"]}
                row["videos"] = len(entry["videos"]) if "videos" in entry else None
                row |= {key: entry.get(key) for key in ("expected", "static_filter")}
                row["difference"] = score - base_scores[metric] if metric in intervals else None
                row["ci_low"], row["ci_high"] = intervals.get(metric, (None, None))
                rows.append(row)
    return rows


def find_warnings(folders, models, errors):
    """What makes the comparison unsound, a sentence each. All arguments go by model; the first is the base."""
    warnings, base = [], next(iter(folders))
    made = {name: read_json(Path(folder, "generation.json")) for name, folder in folders.items()}
    formats = {name: video_formats(folder) for name, folder in folders.items()}
    for name, entries in models.items():
        warnings += [f"{name}: {metric} could not be scored ({reason})" for metric, reason in errors[name].items()]
        if not made[name]:
            warnings.append(f"{name} has no generation.json: prompts, seeds and sampling cannot be checked")
        if len(formats[name]) > 1:
            warnings.append(f"{name}: the videos differ in frame rate, number of frames or size")
        if name != base:
            if formats[name] != formats[base]:
                warnings.append(f"{name} and {base} differ in frame rate, number of frames or size of their files")
            warnings += [f"{name} and {base} {what}" for what in unequal_making(made[name], made[base])]
            warnings += [f"{name} and {base} {what}" for what in unequal_scoring(entries, models[base])]
        warnings += [f"{name}: {what}" for what in departures(folders[name], entries)]
    return warnings


def video_formats(folder):
    """All combinations of size, number of frames and frame rate of the videos in a folder, a set of tuples."""
    formats = set()
    for path in find_videos(folder):
        formats.add(tuple(describe_video(path).values()))
    return formats


def unequal_making(made, base):
    """How two `generation.json` differ where they should not."""
    if not made or not base:
        return []
    settings, theirs = made.get("settings", {}), base.get("settings", {})
    keys = [key for key in {**settings, **theirs} if key not in ON_PURPOSE and settings.get(key) != theirs.get(key)]
    found = [f"differ in {key}: {settings.get(key)!r} and {theirs.get(key)!r}" for key in keys]
    videos, others = made.get("videos", {}), base.get("videos", {})
    if unlike := [name for name in videos if name in others and videos[name] != others[name]]:
        found.append(f"have other prompts or seeds for {len(unlike)} videos of the same name, such as {unlike[0]}")
    return found


def unequal_scoring(entries, base):
    """Scores of two models by different protocols, or of different videos."""
    found = []
    for metric in [metric for metric in entries if metric in base]:
        ours, theirs = entries[metric], base[metric]
        protocols = [(entry["source"], entry.get("static_filter", False)) for entry in (ours, theirs)]
        if protocols[0] != protocols[1]:
            found.append(f"have {metric} by different protocols: (source, static filter) = {protocols}")
        common = set(ours["videos"]) & set(theirs["videos"])
        if len(common) < max(len(ours["videos"]), len(theirs["videos"])):
            found.append(f"have only {len(common)} videos in common for {metric}")
    return found


def departures(folder, entries):
    """How one model's scores depart from VBench's protocol, and so from the paper's rows."""
    found, videos = [], list_videos(folder)
    if stale := [m for m, entry in entries.items() if videos and entry.get("inputs", videos) != videos]:
        found.append(f"videos have changed (or were copied) since these were scored: {', '.join(stale)}")
    used = {metric: entries[metric] for metric in DIMENSIONS if metric in entries}
    benchmarks = used | {metric: entries[metric] for metric in VMBENCH if metric in entries}
    if other := [metric for metric, entry in used.items() if entry["source"] != "vbench_standard"]:
        found.append(f"not by VBench's standard protocol, hence no leaderboard numbers: {', '.join(other)}")
    counts = {metric: (len(entry["videos"]), entry["expected"]) for metric, entry in benchmarks.items()}
    if short := [f"{metric} {count} of {wanted}" for metric, (count, wanted) in counts.items() if count < wanted]:
        found.append(f"fewer videos than the protocol asks for: {', '.join(short)}")
    if "temporal_flickering" in used and not used["temporal_flickering"].get("static_filter"):
        found.append("temporal flickering without VBench's static filter: every motion lowers it")
    return found


# --- Output ----------------------------------------------------------------------------------------------------------


def paper_notes():
    """Which of the paper's Quality Scores do not follow from the paper's own columns."""
    notes = []
    for name, (*values, printed) in PAPER.items():
        computed = 100 * quality_score({m: v / 100 for m, v in zip(DIMENSIONS, values, strict=True)})
        if abs(computed - printed) > 0.0101:  # columns and score are rounded to 0.01
            notes.append(f"{name}: {printed:.2f} printed, {computed:.2f} by VBench's formula from the same row")
    return notes


def markdown(rows, warnings):
    """The report: a table for each section with the paper's rows under VBench's, notes, warnings."""
    lines = ["# Evaluation", "", "Percent; differences to the first model with 95 % bootstrap intervals over videos."]
    for section, (metrics, totals) in SECTIONS.items():
        mine = [row for row in rows if row["section"] == section]
        if not mine:
            continue
        scored = {row["metric"] for row in mine}
        columns = [metric for metric in (*metrics, *totals) if section == "VBench" or metric in scored]
        headings = [LABELS.get(metric, f"`{metric}`") for metric in columns]
        lines += ["", f"## {section}", "", table_line("model", headings), "|---" * (len(columns) + 1) + "|"]
        for name, group in itertools.groupby(mine, key=lambda row: row["model"]):
            cells = {row["metric"]: row for row in group}
            lines.append(table_line(name, [f"{100 * cells[m]['score']:.2f}" if m in cells else "" for m in columns]))
            if any(cell["difference"] is not None for cell in cells.values()):
                lines.append(table_line("*difference*", [difference_text(cells.get(metric)) for metric in columns]))
        if section == "VBench":
            lines += [table_line(f"*paper: {name}*", [f"{v:.2f}" for v in values]) for name, values in PAPER.items()]
            lines += ["", "The paper's rows are its Tables 1 and 2 (https://huggingface.co/papers/2601.20504). Some of"
                      " its Quality Scores do not follow from its columns:", ""]  # fmt: skip
            lines += [f"- {note}" for note in paper_notes()]
            lines += ["", "Smoothness and flickering reward still videos; the dynamic degree is a yes or no for each"
                      " video and counts camera motion."]  # fmt: skip
    if warnings:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in warnings)]
    return "\n".join(lines) + "\n"


def table_line(first, cells):
    return f"| {' | '.join([first, *cells])} |"


def difference_text(row):
    if row is None or row["difference"] is None:
        return ""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * row[key] for key in ("difference", "ci_low", "ci_high")))


def draw_chart(rows, path):
    """Bars of the scores, and the differences with their intervals, a line of two plots for each section."""
    sections, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("section", "model"))
    heights = [1 + 0.22 * sum(row["section"] == section for row in rows) for section in sections]
    figure, axes = plt.subplots(len(sections), 2, squeeze=False, sharey="row", height_ratios=heights,
                                figsize=(11, sum(heights)), layout="constrained")  # fmt: skip
    for (left, right), section in zip(axes, sections, strict=True):
        mine = [row for row in rows if row["section"] == section]
        metrics = list(dict.fromkeys(row["metric"] for row in mine))
        for i, model in enumerate(models):
            group = [row for row in mine if row["model"] == model]
            offset = (i - (len(models) - 1) / 2) * 0.8 / len(models)
            places = [metrics.index(row["metric"]) + offset for row in group]
            bars = left.barh(places, [100 * row["score"] for row in group], 0.75 / len(models), label=model)
            left.bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
            for place, row in zip(places, group, strict=True):
                if row["difference"] is not None:
                    middle, low, high = (100 * row[key] for key in ("difference", "ci_low", "ci_high"))
                    right.plot([low, middle, high], [place] * 3, color=f"C{i}", marker="o", markevery=[1])
        left.set_yticks(range(len(metrics)), [LABELS.get(metric, metric) for metric in metrics])
        left.set_title(f"{section}, %")
        left.invert_yaxis()
        left.margins(x=0.15)
        right.axvline(0, color="gray", linewidth=0.8)
        right.set_title(f"difference to {models[0]}, 95 % interval")
        right.set_visible(len(models) > 1)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(output_dir, rows, warnings, settings):
    """`report.md`, `.csv`, `.json` and `.png`; returns the first's text. `settings` is how each model sampled."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_text(output_dir / "report.csv", table.getvalue())
    record = {"models": settings, "rows": rows, "warnings": warnings, "paper": {"rows": PAPER, "notes": paper_notes()}}
    write_text(output_dir / "report.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    draw_chart(rows, output_dir / "report.png")
    text = markdown(rows, warnings)
    write_text(output_dir / "report.md", text + "\n![the same as a chart](report.png)\n")
    return text


def eval_result(row):
    """A row as `EvalResult`; the protocol is part of the data set's name."""
    benchmark, source = row["section"], row["source"]
    return EvalResult(
        task_type="text-to-video",
        dataset_type=benchmark.lower(),
        dataset_name=f"{benchmark} ({source.removeprefix('vbench_').replace('_', ' ')})",
        dataset_config=source,
        metric_type=row["metric"],
        metric_name=f"{LABELS[row['metric']]} (%)",
        metric_value=round(100 * row["score"], 2),
        metric_args={key: row[key] for key in ("videos", "expected", "static_filter") if row[key] is not None} or None,
    )


def update_card(where, rows):
    """Put a model's benchmark scores into the `model-index` of a card: a README.md, its folder, or a Hub id.

    Results of the same benchmark and metric are replaced, others kept. Raises `ValueError` if there is no card.
    """
    path = Path(where, "README.md") if Path(where).is_dir() else Path(where)
    on_hub = not path.is_file()
    if on_hub and (path.suffix == ".md" or where.count("/") != 1):
        raise ValueError(f"--card: there is no file {path}, and {where} is no Hub id such as user/model")
    card = ModelCard.load(where if on_hub else path)
    results = [eval_result(row) for row in rows if row["section"] in ("VBench", "VMBench")]
    if not results:
        raise ValueError(f"--card {where}: this model has no VBench or VMBench scores to put there")
    new = {(result.unique_identifier, result.metric_type) for result in results}
    old = [r for r in card.data.eval_results or [] if (r.unique_identifier, r.metric_type) not in new]
    card.data.eval_results = old + results
    card.data.model_name = card.data.model_name or (where.split("/")[1] if on_hub else path.resolve().parent.name)
    if on_hub:
        card.push_to_hub(where, commit_message="Evaluation results")
    else:
        write_text(path, str(card))
