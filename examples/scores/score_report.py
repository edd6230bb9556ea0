"""Scores of generated videos: how they are kept, the benchmarks' totals, the comparison, its table, chart and card.

The command line is `evaluate.py`.
"""

import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from huggingface_hub import EvalResult, ModelCard
from video_metrics import PROXIES
from videos import describe_video, find_videos


class Dimension(NamedTuple):
    """Describe a dimension of VBench: the range that its score is scaled by, and its weight in the Quality Score."""

    heading: str
    lowest: float
    highest: float
    weight: float


# The numbers of VBench's `scripts/constant.py`. Order and headings are the paper's.
DIMENSIONS = {
    "aesthetic_quality": Dimension("Aesthetic Quality", 0.0, 1.0, 1.0),
    "background_consistency": Dimension("Background Consistency", 0.2615, 1.0, 1.0),
    "dynamic_degree": Dimension("Dynamic Degree", 0.0, 1.0, 0.5),
    "imaging_quality": Dimension("Image Quality", 0.0, 1.0, 1.0),
    "motion_smoothness": Dimension("Motion Smoothness", 0.706, 0.9975, 1.0),
    "subject_consistency": Dimension("Subject Consistency", 0.1462, 1.0, 1.0),
    "temporal_flickering": Dimension("Temporal Flickering", 0.6293, 1.0, 1.0),
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
# The first that has a metric counts.
SOURCES = (
    "vbench_standard",
    "vbench_custom_input",
    "offline",
    "vmbench",
)
# Settings in which models may differ
PUBLISHED_SOURCES = ("vbench_standard", "vbench_custom_input", "vmbench")
ON_PURPOSE = {
    "model",
    "revision",
    "transformer",
    "lora",
    "preset",
}


# --- Totals ----------------------------------------------------------------------------------------------------------


def quality_score(scores):
    """Return VBench's Quality Score: the weighted mean of the seven dimensions, each scaled by its range, not clipped.

    Args:
        scores (`dict`): All of `DIMENSIONS` as fractions, not percent: floats, or arrays of one shape.

    Return the score as a fraction. Raise `ValueError` for a missing dimension or percentages. Source:
    `scripts/cal_final_score.py` of https://github.com/Vchitect/VBench.
    """
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing:
        raise ValueError(f"the Quality Score needs all seven dimensions; {', '.join(missing)} missing")
    parts = []
    weights = []
    for name, dimension in DIMENSIONS.items():
        score = scores[name]
        if np.max(score) > 1.5:  # a still video may be 1 + 1e-7
            raise ValueError(f"scores are fractions of 1; {name} is {np.max(score):g}")
        above_lowest = score - dimension.lowest
        width = dimension.highest - dimension.lowest
        parts.append(dimension.weight * above_lowest / width)
        weights.append(dimension.weight)
    return sum(parts) / sum(weights)


def average_of_five(scores):
    """Return the mean of VMBench's five metrics."""
    values = [scores[name] for name in VMBENCH]
    return sum(values) / len(values)


def total_of_four(scores):
    """Return the `Total Score` of VMBench's `scores.csv`, which `calculate_score.py` there computes without PAS.

    It looks for PAS under a misspelt key.
    """
    values = [scores[name] for name in VMBENCH if name != "perceptible_amplitude_score"]
    return sum(values) / len(values)


class Section(NamedTuple):
    """Describe a section of the report: its metrics, and what is computed from all of them."""

    metrics: tuple
    totals: dict


SECTIONS = {
    "VBench": Section(tuple(DIMENSIONS), {"quality_score": quality_score}),
    "VMBench": Section(
        tuple(VMBENCH),
        {"average_of_five": average_of_five, "total_of_four": total_of_four},
    ),
    "Offline proxies (not VBench)": Section(tuple(PROXIES), {}),
}
LABELS = {
    **{name: dimension.heading for name, dimension in DIMENSIONS.items()},
    **VMBENCH,
    "quality_score": "Quality Score",
    "average_of_five": "Average of five",
    "total_of_four": "VMBench's own total (no PAS)",
    "dis_flow_speed": "DIS flow, % of the height a second",  # a speed: unlike the others it may exceed 100
}


# --- Scores on disk --------------------------------------------------------------------------------------------------


def read_json(path):
    """Read a JSON file; an empty dict if there is none. Raises `ValueError` for a file that holds something else."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON; remove it and make it anew: {error}") from error


def write_json(path, content):
    """Write JSON as people read it, see `write_text`."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_text(path, text + "\n")


def write_text(path, text):
    """Write beside and rename, so that what was there before stays whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def list_videos(folder):
    """Return name -> size and time of change of every mp4 in a folder."""
    videos = {}
    for path in find_videos(folder):
        stat = path.stat()
        videos[path.name] = [stat.st_size, stat.st_mtime_ns]
    return videos


def save_score(folder, source, metric, entry):
    """Keep one metric's score in `scores/SOURCE.json` beside the videos.

    An entry has `score`, `videos` (name -> score) and `expected` (their number by the protocol), or else `error`; and
    `by` (what computed it), `inputs` (see `list_videos`). All scores are fractions.
    """
    path = Path(folder, "scores", f"{source}.json")
    entries = read_json(path)
    entries[metric] = entry
    write_json(path, entries)


def load_scores(folder):
    """Return metric -> entry with its `source`; and what could not be scored at all, metric -> reason."""
    entries = {}
    errors = {}
    for source in SOURCES:
        saved = read_json(Path(folder, "scores", f"{source}.json"))
        for metric, entry in saved.items():
            if "error" in entry:
                errors[metric] = entry["error"]
            elif metric not in entries:
                entries[metric] = {**entry, "source": source}
    unscored = {metric: reason for metric, reason in errors.items() if metric not in entries}
    return entries, unscored


# --- Comparison ------------------------------------------------------------------------------------------------------


def resampled_means(scores, names, counts):
    """Return metric -> its mean over each resampling of the videos, `(draws,)`. `counts` is `(draws, len(names))`."""
    column = {name: index for index, name in enumerate(names)}
    means = {}
    for metric, videos in scores.items():
        columns = [column[name] for name in videos]
        weights = counts[:, columns]  # (draws, videos)
        values = np.array(list(videos.values()), float)
        with np.errstate(invalid="ignore"):  # a draw without any of a metric's videos says nothing of it: NaN
            means[metric] = weights @ values / weights.sum(axis=1)
    return means


def bootstrap_differences(scores, base, totals, draws=2000, seed=0):
    """Return 95 % percentile bootstrap intervals of `scores - base`, metric -> [low, high].

    Videos are drawn by name, the same for both models and all metrics: pairs stay pairs, and totals are recomputed
    from each draw.

    Args:
        scores, base (`dict`): Metric -> name of a video -> score.
        totals (`dict`): Name -> function of a dict of all metrics' means, such as `quality_score`.
    """
    found = set()
    for model in (scores, base):
        for videos in model.values():
            found.update(videos)
    names = sorted(found)
    rng = np.random.default_rng(seed)
    even = np.full(len(names), 1 / len(names))
    counts = rng.multinomial(len(names), even, size=draws)
    ours = resampled_means(scores, names, counts)
    theirs = resampled_means(base, names, counts)
    for name, total in totals.items():
        ours[name] = total(ours)
        theirs[name] = total(theirs)
    intervals = {}
    for metric in ours:
        if metric in theirs:
            differences = ours[metric] - theirs[metric]
            intervals[metric] = np.nanpercentile(differences, [2.5, 97.5]).tolist()
    return intervals


def compare(models, draws=2000):
    """Return one row (a dict) for each section, model and metric.

    `models` is name -> entries; the first is the base.
    """
    base = next(iter(models))
    rows = []
    for section, (metrics, all_totals) in SECTIONS.items():
        base_entries = {}
        base_scores = {}
        for name, entries in models.items():
            own_entries = {metric: entries[metric] for metric in metrics if metric in entries}
            complete = len(own_entries) == len(metrics)
            totals = all_totals if complete else {}
            scores = {metric: entry["score"] for metric, entry in own_entries.items()}
            totals_scores = {total: function(scores) for total, function in totals.items()}
            scores |= totals_scores
            intervals = {}
            if name == base:
                base_entries = own_entries
                base_scores = scores
            else:
                shared_totals = {total: totals[total] for total in totals if total in base_scores}
                intervals = difference_intervals(own_entries, base_entries, shared_totals, draws)
            sources = {entry["source"] for entry in own_entries.values()}
            total_source = sources.pop() if len(sources) == 1 else "mixed"
            for metric, score in scores.items():
                entry = own_entries.get(metric, {"source": total_source})
                row = {
                    "section": section,
                    "model": name,
                    "metric": metric,
                    "score": score,
                    "source": entry["source"],
                    "videos": len(entry["videos"]) if "videos" in entry else None,
                    "expected": entry.get("expected"),
                    "static_filter": entry.get("static_filter"),
                    "difference": None,
                    "ci_low": None,
                    "ci_high": None,
                }
                if metric in intervals:
                    row["difference"] = score - base_scores[metric]
                    row["ci_low"], row["ci_high"] = intervals[metric]
                rows.append(row)
    return rows


def difference_intervals(entries, base_entries, totals, draws):
    """Return the bootstrap intervals of the metrics that both models have, and of `totals`."""
    both = [metric for metric in entries if metric in base_entries]
    if not both:
        return {}
    videos = {metric: entries[metric]["videos"] for metric in both}
    base_videos = {metric: base_entries[metric]["videos"] for metric in both}
    return bootstrap_differences(videos, base_videos, totals, draws)


def find_warnings(folders, models, errors):
    """Say what makes the comparison unsound, a sentence each. All arguments go by model; the first is the base."""
    base = next(iter(folders))
    made = {}
    formats = {}
    for name, folder in folders.items():
        made[name] = read_json(Path(folder, "generation.json"))
        formats[name] = video_formats(folder)
    warnings = []
    for name, entries in models.items():
        for metric, reason in errors[name].items():
            warnings.append(f"{name}: {metric} could not be scored ({reason})")
        if not made[name]:
            warnings.append(f"{name} has no generation.json: prompts, seeds and sampling cannot be checked")
        if len(formats[name]) > 1:
            warnings.append(f"{name}: the videos differ in frame rate, number of frames or size")
        if name != base:
            if formats[name] != formats[base]:
                warnings.append(f"{name} and {base} differ in frame rate, number of frames or size of their files")
            differences = unequal_making(made[name], made[base])
            differences += unequal_scoring(entries, models[base])
            for difference in differences:
                warnings.append(f"{name} and {base} {difference}")
        for departure in departures(folders[name], entries):
            warnings.append(f"{name}: {departure}")
    return warnings


def video_formats(folder):
    """Return all combinations of size, number of frames and frame rate of a folder's videos, a set of tuples."""
    formats = set()
    for path in find_videos(folder):
        formats.add(tuple(describe_video(path).values()))
    return formats


def unequal_making(made, base):
    """Say how two `generation.json` differ where they should not."""
    if not made or not base:
        return []
    found = []
    settings = made.get("settings", {})
    base_settings = base.get("settings", {})
    for key in {**settings, **base_settings}:
        value = settings.get(key)
        base_value = base_settings.get(key)
        if key not in ON_PURPOSE and value != base_value:
            found.append(f"differ in {key}: {value!r} and {base_value!r}")
    videos = made.get("videos", {})
    base_videos = base.get("videos", {})
    unlike = [name for name in videos if name in base_videos and videos[name] != base_videos[name]]
    if unlike:
        found.append(f"have other prompts or seeds for {len(unlike)} videos of the same name, such as {unlike[0]}")
    return found


def unequal_scoring(entries, base):
    """Name the scores of two models by different protocols, or of different videos."""
    found = []
    for metric, entry in entries.items():
        if metric not in base:
            continue
        base_entry = base[metric]
        protocols = [scoring_protocol(entry), scoring_protocol(base_entry)]
        if protocols[0] != protocols[1]:
            found.append(f"have {metric} by different protocols: (source, static filter) = {protocols}")
        videos = set(entry["videos"])
        base_videos = set(base_entry["videos"])
        common = videos & base_videos
        if len(common) < max(len(videos), len(base_videos)):
            found.append(f"have only {len(common)} videos in common for {metric}")
    return found


def scoring_protocol(entry):
    """Return what a score was computed by, and whether after VBench's static filter."""
    return entry["source"], entry.get("static_filter", False)


def departures(folder, entries):
    """Say how one model's scores depart from VBench's protocol, and so from the paper's rows."""
    found = []
    videos = list_videos(folder)
    if videos:
        stale = [metric for metric, entry in entries.items() if entry.get("inputs", videos) != videos]
        if stale:
            found.append(f"videos have changed (or were copied) since these were scored: {', '.join(stale)}")
    other = []
    for metric in DIMENSIONS:
        if metric in entries and entries[metric]["source"] != "vbench_standard":
            other.append(metric)
    if other:
        found.append(f"not by VBench's standard protocol, hence no leaderboard numbers: {', '.join(other)}")
    short = []
    for metric in (*DIMENSIONS, *VMBENCH):
        if metric not in entries:
            continue
        count = len(entries[metric]["videos"])
        expected = entries[metric]["expected"]
        if count < expected:
            short.append(f"{metric} {count} of {expected}")
    if short:
        found.append(f"fewer videos than the protocol asks for: {', '.join(short)}")
    flickering = entries.get("temporal_flickering")
    if flickering is not None and not flickering.get("static_filter"):
        found.append("temporal flickering without VBench's static filter: every motion lowers it")
    return found


# --- Output ----------------------------------------------------------------------------------------------------------


def paper_notes():
    """Say which of the paper's Quality Scores do not follow from the paper's own columns."""
    notes = []
    for name, (*percentages, printed) in PAPER.items():
        scores = {}
        for dimension, percentage in zip(DIMENSIONS, percentages, strict=True):
            scores[dimension] = percentage / 100
        computed = 100 * quality_score(scores)
        if abs(computed - printed) > 0.0101:  # columns and score are rounded to 0.01
            notes.append(f"{name}: {printed:.2f} printed, {computed:.2f} by VBench's formula from the same row")
    return notes


def markdown(rows, warnings):
    """Write the report: a table for each section with the paper's rows under VBench's, notes, warnings."""
    lines = [
        "# Evaluation",
        "",
        "Percent; differences to the first model with 95 % bootstrap intervals over videos.",
    ]
    for section in SECTIONS:
        section_rows = [row for row in rows if row["section"] == section]
        if not section_rows:
            continue
        lines += ["", f"## {section}", ""]
        lines += table_lines(section, section_rows)
        if section == "VBench":
            lines += paper_lines()
    if warnings:
        lines += ["", "## Warnings", ""]
        lines += [f"- {warning}" for warning in warnings]
    return "\n".join(lines) + "\n"


def table_lines(section, rows):
    """Write the table of one section: a line for each model, and one for its differences to the first."""
    metrics, totals = SECTIONS[section]
    columns = [*metrics, *totals]
    # VBench's keep the paper's columns, for the paper's rows below.
    if section != "VBench":
        scored = {row["metric"] for row in rows}
        columns = [metric for metric in columns if metric in scored]
    headings = [LABELS.get(metric, f"`{metric}`") for metric in columns]
    lines = [
        table_line("model", headings),
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, model_rows in itertools.groupby(rows, key=lambda row: row["model"]):
        row_of = {row["metric"]: row for row in model_rows}
        scores = [score_text(row_of.get(metric)) for metric in columns]
        lines.append(table_line(name, scores))
        differences = [difference_text(row_of.get(metric)) for metric in columns]
        if any(differences):
            lines.append(table_line("*difference*", differences))
    return lines


def paper_lines():
    """Write the paper's rows of the VBench table, and what must be known to read them."""
    lines = []
    for name, percentages in PAPER.items():
        cells = [f"{percentage:.2f}" for percentage in percentages]
        lines.append(table_line(f"*paper: {name}*", cells))
    lines += [
        "",
        "The paper's rows are its Tables 1 and 2 (https://huggingface.co/papers/2601.20504). Some of"
        " its Quality Scores do not follow from its columns:",
        "",
    ]
    lines += [f"- {note}" for note in paper_notes()]
    lines += [
        "",
        "Smoothness and flickering reward still videos; the dynamic degree is a yes or no for each"
        " video and counts camera motion.",
    ]
    return lines


def table_line(first, cells):
    """Write one line of a Markdown table."""
    return f"| {' | '.join([first, *cells])} |"


def score_text(row):
    """Write a row's score in percent; nothing without a row."""
    if row is None:
        return ""
    return f"{100 * row['score']:.2f}"


def difference_text(row):
    """Write a row's difference and its interval in percent; nothing where there is none."""
    if row is None or row["difference"] is None:
        return ""
    difference, low, high = difference_percent(row)
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"


def difference_percent(row):
    """Return a row's difference and the two ends of its interval, in percent."""
    return 100 * row["difference"], 100 * row["ci_low"], 100 * row["ci_high"]


def draw_chart(rows, path):
    """Draw bars of the scores, and the differences with their intervals: a line of two plots for each section."""
    rows_of = {}
    models = []
    for row in rows:
        rows_of.setdefault(row["section"], []).append(row)
        if row["model"] not in models:
            models.append(row["model"])
    heights = [1 + 0.22 * len(section_rows) for section_rows in rows_of.values()]
    figure, axes = plt.subplots(
        nrows=len(rows_of),
        ncols=2,
        squeeze=False,
        sharey="row",
        height_ratios=heights,
        figsize=(11, sum(heights)),
        layout="constrained",
    )
    for (left, right), (section, section_rows) in zip(axes, rows_of.items(), strict=True):
        draw_section(left, right, section_rows, models)
        left.set_title(f"{section}, %")
        right.set_title(f"difference to {models[0]}, 95 % interval")
        right.set_visible(len(models) > 1)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(models))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_section(left, right, rows, models):
    """Draw one section's scores on the axes `left`, and its differences to the first model on `right`."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    middle_model = (len(models) - 1) / 2
    for number, model in enumerate(models):
        model_rows = [row for row in rows if row["model"] == model]
        # All bars of a metric together are 0.8 wide.
        offset = (number - middle_model) * 0.8 / len(models)
        places = [metrics.index(row["metric"]) + offset for row in model_rows]
        percentages = [100 * row["score"] for row in model_rows]
        bars = left.barh(places, percentages, 0.75 / len(models), label=model)
        left.bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
        for place, row in zip(places, model_rows, strict=True):
            if row["difference"] is None:
                continue
            difference, low, high = difference_percent(row)
            # A line with a marker on its second point, the difference itself
            right.plot(
                [low, difference, high],
                [place, place, place],
                color=f"C{number}",
                marker="o",
                markevery=[1],
            )
    headings = [LABELS.get(metric, metric) for metric in metrics]
    left.set_yticks(range(len(metrics)), headings)
    left.invert_yaxis()
    left.margins(x=0.15)
    right.axvline(0, color="gray", linewidth=0.8)


def write_report(output_dir, rows, warnings, settings):
    """Write `report.md`, `.csv`, `.json` and `.png`; return the first's text.

    `settings` is how each model sampled.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_text(output_dir / "report.csv", table.getvalue())
    record = {
        "models": settings,
        "rows": rows,
        "warnings": warnings,
        "paper": {"rows": PAPER, "notes": paper_notes()},
    }
    write_json(output_dir / "report.json", record)
    draw_chart(rows, output_dir / "report.png")
    text = markdown(rows, warnings)
    write_text(output_dir / "report.md", text + "\n![the same as a chart](report.png)\n")
    return text


def eval_result(row):
    """Return a row as `EvalResult`; the protocol is part of the data set's name."""
    benchmark = row["section"]
    source = row["source"]
    protocol = source.removeprefix("vbench_").replace("_", " ")
    metric_args = {}
    for key in ("videos", "expected", "static_filter"):
        if row[key] is not None:
            metric_args[key] = row[key]
    return EvalResult(
        task_type="text-to-video",
        dataset_type=benchmark.lower(),
        dataset_name=f"{benchmark} ({protocol})",
        dataset_config=source,
        metric_type=row["metric"],
        metric_name=f"{LABELS[row['metric']]} (%)",
        metric_value=round(100 * row["score"], 2),
        metric_args=metric_args or None,
    )


def update_card(where, rows):
    """Put a model's benchmark scores into the `model-index` of a card: a README.md, its folder, or a Hub id.

    Results of the same benchmark and metric are replaced, others kept. Raise `ValueError` if there is no card, or if
    there are no scores to put there.
    """
    path = Path(where)
    if path.is_dir():
        path = path / "README.md"
    on_hub = not path.is_file()
    if on_hub and (path.suffix == ".md" or where.count("/") != 1):
        raise ValueError(f"--card: there is no file {path}, and {where} is no Hub id such as user/model")
    card = ModelCard.load(where if on_hub else path)
    # Flickering that was computed offline, and totals of mixed sources, are no scores of the benchmark.
    results = [eval_result(row) for row in rows if row["source"] in PUBLISHED_SOURCES]
    if not results:
        raise ValueError(f"--card {where}: this model has no VBench or VMBench scores to put there")
    replaced = {result_identity(result) for result in results}
    kept = []
    for result in card.data.eval_results or []:
        if result_identity(result) not in replaced:
            kept.append(result)
    card.data.eval_results = kept + results
    if not card.data.model_name:
        # A model-index needs a name.
        card.data.model_name = where.split("/")[1] if on_hub else path.resolve().parent.name
    if on_hub:
        card.push_to_hub(where, commit_message="Evaluation results")
    else:
        write_text(path, str(card))


def result_identity(result):
    """Return what two results of one benchmark and metric have in common."""
    return result.unique_identifier, result.metric_type
