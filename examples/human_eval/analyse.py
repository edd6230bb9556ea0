"""Unblind the votes of a study that `build.py` made, and say which model people prefer and how sure that is.

    python examples/human_eval/analyse.py --key study_key.json --votes study_votes.jsonl --output_dir study_report

`--votes` takes the file of `collect.py`, the files that annotators downloaded, or both; a vote in several of them
counts once. The folder gets `report.md`, `report.json`, `preferences.png` (the paper's Fig. 4) and `votes.csv`.

`--demo 3` invents the votes of three annotators, to see what a report looks like. Everything made of them is marked
SYNTHETIC.
"""

import argparse
import csv
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # mistakes.py: examples/ is folders of scripts, not a package

from mistakes import run_script

NEITHER = "indistinguishable"
FORMULA = re.compile(r"[\s\x00-\x1f\ufeff]*[=+@-]")  # how a cell begins that a spreadsheet runs
SYNTHETIC = "SYNTHETIC votes, not given by people"
RULE = (
    "a pair goes to the answer that more than half of its votes give; where there is none (1-1-1 of three votes, or"
    " 1-1 of two) it counts as indistinguishable"
)
PAPER = (
    "The paper (https://huggingface.co/papers/2601.20504, section 3.3) reports 37.42 % for its method and 29.11 % for"
    " Wan2.1, by majority vote of three annotators on 460 pairs. No whole number of 460 pairs gives either: 172 are"
    " 37.39 %, 134 are 29.13 %."
)


def parse_args(input_args=None) -> argparse.Namespace:
    """Parse the command line, or `input_args` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--key", type=Path, required=True, help="the private key that build.py wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--votes", type=Path, nargs="+", metavar="FILE", help="JSON lines of votes")
    source.add_argument("--demo", type=int, metavar="N", help="no votes: invent those of N annotators")
    add("--output_dir", type=Path, required=True, help="where the report goes")
    add(
        "--min_votes", type=int, default=3, help="votes that a pair needs for the majority vote (default: %(default)s)"
    )
    return parser.parse_args(input_args)


# --- Statistics ------------------------------------------------------------------------------------------------------


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided exact p-value of the sign test, ties left out.

    It is the chance of a split at least as uneven at 50:50.
    """
    count = wins + losses
    fewer = min(wins, losses)
    tail = sum(math.comb(count, part) for part in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def wilson_interval(part: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson 1927). `total` must be positive."""
    share = part / total
    shrink = 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / shrink
    variance = share * (1 - share) / total + z**2 / (4 * total**2)
    half = z / shrink * math.sqrt(variance)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_difference(first: int, second: int, total: int, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % percentile interval of `(second - first) / total` over pairs drawn again with replacement."""
    neither = total - first - second
    shares = np.array([first, second, neither]) / total
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(total, shares, size=draws)  # (draws, 3)
    differences = (drawn[:, 1] - drawn[:, 0]) / total
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def fleiss_kappa(counts: np.ndarray) -> float:
    """Return the agreement beyond chance (Fleiss 1971): 1 is perfect, 0 is what the answers' frequencies would give.

    Args:
        counts (`np.ndarray`): Shape `(pairs, answers)`: votes for each answer, as many a pair, at least two.

    Returns:
        `float`: The kappa; NaN if all votes are for one answer, since chance then agrees as well.

    Raises:
        `ValueError`: If the pairs have different numbers of votes, or fewer than two.
    """
    votes = counts.sum(1)
    if len(set(votes)) != 1 or votes[0] < 2:
        raise ValueError("Fleiss' kappa needs the same number of votes for every pair, at least two")
    agreeing = (counts**2).sum(1) - votes
    agreement = agreeing / (votes * (votes - 1))
    frequencies = counts.sum(0) / counts.sum()
    chance = (frequencies**2).sum()
    if chance >= 1:
        return math.nan
    return float((agreement.mean() - chance) / (1 - chance))


def majority(answers: list[str]) -> str | None:
    """Return the answer of more than half, or None."""
    answer, count = Counter(answers).most_common(1)[0]
    if 2 * count > len(answers):
        return answer
    return None


# --- Votes -----------------------------------------------------------------------------------------------------------


def check_vote(vote, key: dict) -> None:
    """Raise `ValueError` with what is wrong with a vote, which may come from anywhere and be anything.

    The message holds no word of the vote: it goes into `report.md`, where a picture could be loaded by it.
    """
    if not isinstance(vote, dict):
        raise ValueError("not a vote")
    if vote.get("study") != key["study"]:
        raise ValueError(f"not a vote of study {key['study']}, which --key is of")
    for name in ("annotator", "kind", "pair", "left", "right", "choice", "time"):
        if not isinstance(vote.get(name), str):
            raise ValueError(f"{name} is missing, or no text")
    if not re.fullmatch(r"[a-z0-9_-]{1,32}", vote["annotator"]):
        raise ValueError("annotator is not 1 to 32 of a-z, 0-9, - and _")
    if vote["kind"] not in ("main", "repeat", "practice"):
        raise ValueError("kind is unknown")
    if vote["pair"] not in key["pairs"]:
        raise ValueError("pair is none of --key's")
    pair = key["pairs"][vote["pair"]]
    if (vote["kind"] == "practice") != pair["practice"]:
        raise ValueError("kind is another than that of the pair")
    if vote["left"] == vote["right"]:
        raise ValueError("the same clip is on both sides")
    for side in ("left", "right"):
        if vote[side] not in pair["clips"].values():
            raise ValueError(f"{side} is no clip of this pair")
    if vote["choice"] not in ("left", "right", NEITHER):
        raise ValueError("choice is unknown")
    for name in ("seconds_to_unlock", "seconds_to_vote", "replays"):
        number = vote.get(name)
        # A bool is an int, and NaN compares as false.
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 1e9:
            raise ValueError(f"{name} is missing, or no number of a vote")
    reasons = vote.get("reasons")
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        raise ValueError("reasons is missing, or no list of texts")
    if not all(re.fullmatch(r"[\w -]{1,40}", reason) for reason in reasons):
        raise ValueError("a reason is none of the page's")
    if not isinstance(vote.get("synthetic"), bool):
        raise ValueError("synthetic is missing, or neither true nor false")


def unblind(vote: dict, key: dict) -> dict:
    """Return `vote`, one that `check_vote` accepts, with `left_model`, `right_model` and `answer`.

    The answer is a model or `indistinguishable`.
    """
    clips = key["pairs"][vote["pair"]]["clips"]
    models = {clip: label for label, clip in clips.items()}
    left = models[vote["left"]]
    right = models[vote["right"]]
    answers = {"left": left, "right": right, NEITHER: NEITHER}
    return {
        **vote,
        "left_model": left,
        "right_model": right,
        "answer": answers[vote["choice"]],
    }


def read_lines(path: Path) -> list[bytes]:
    """Read the lines of a file of votes; only a line feed ends one. Raise `SystemExit` if it cannot be read."""
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise SystemExit(f"--votes {path}: {error.strerror}") from None


def read_votes(paths: list[Path], key: dict) -> tuple[list[dict], list[str]]:
    """Read and unblind votes, the first one where an annotator has several on the same item.

    Return them and a line on each that was left out. Raise `SystemExit` where no vote is left, and for real and
    synthetic ones together.
    """
    votes = {}
    remarks = []
    for path in paths:
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                blind = json.loads(line)
            except (ValueError, RecursionError):  # of bytes that are no text, too
                remarks.append(f"{place}: cut off, or no JSON; left out")
                continue
            try:
                check_vote(blind, key)
            except ValueError as error:
                remarks.append(f"{place}: {error}; left out")
                continue
            vote = unblind(blind, key)
            item = (vote["annotator"], vote["kind"], vote["pair"])
            first = votes.setdefault(item, vote)
            if first["answer"] != vote["answer"]:
                remarks.append(f"{place}: {vote['annotator']} had voted otherwise on this pair; left out")
    if not any(vote["kind"] == "main" for vote in votes.values()):
        shown = "".join(f"\n- {remark}" for remark in remarks[:10])
        raise SystemExit(f"no votes that count in {', '.join(map(str, paths))}{shown}")
    origins = {vote["synthetic"] for vote in votes.values()}
    if len(origins) > 1:
        raise SystemExit("some of these votes are real and some synthetic: analyse them apart")
    return list(votes.values()), remarks


def demo_votes(key: dict, annotators: int) -> list[dict]:
    """Invent votes, for neither model: pairs differ at random in quality, which annotators see through noise."""
    rng = np.random.default_rng(1)
    pairs = [pair_id for pair_id, pair in key["pairs"].items() if not pair["practice"]]
    # Above 0 the second model is the better one.
    quality = dict(zip(pairs, rng.normal(0, 0.7, len(pairs)), strict=True))
    items = [(pair_id, "main") for pair_id in pairs]
    items += [(pair_id, "repeat") for pair_id in pairs[::20]]
    votes = []
    for number in range(annotators):
        for pair_id, kind in items:
            vote = demo_vote(rng, key, pair_id, quality[pair_id])
            vote["annotator"] = f"demo{number + 1}"
            vote["kind"] = kind
            votes.append(unblind(vote, key))
    return votes


def demo_vote(rng: np.random.Generator, key: dict, pair_id: str, quality: float) -> dict:
    """Invent one vote on a pair, without the annotator and the kind."""
    seen = quality + rng.normal(0, 0.7)
    left, right = rng.permutation(key["labels"])
    worse, better = key["labels"]
    if seen <= 0:
        better = worse
    if abs(seen) < 0.4:
        choice = NEITHER
    elif better == left:
        choice = "left"
    else:
        choice = "right"
    seconds_to_unlock = round(float(rng.lognormal(2.3, 0.3)), 2)
    seconds_after = float(rng.lognormal(1.0, 0.5))
    reasons = []
    if choice != NEITHER and rng.random() < 0.5:
        reasons = ["motion"]
    clips = key["pairs"][pair_id]["clips"]
    return {
        "study": key["study"],
        "pair": pair_id,
        "left": clips[left],
        "right": clips[right],
        "choice": choice,
        "seconds_to_unlock": seconds_to_unlock,
        "seconds_to_vote": round(seconds_to_unlock + seconds_after, 2),
        "replays": 0,
        "reasons": reasons,
        "time": "",
        "synthetic": True,
    }


# --- Report ----------------------------------------------------------------------------------------------------------


def share_answers(answers: list[str], labels: list[str]) -> dict:
    """Return counts and percentages of both models and `indistinguishable`."""
    counts = {}
    percent = {}
    for answer in (*labels, NEITHER):
        count = answers.count(answer)
        counts[answer] = count
        percent[answer] = 100 * count / len(answers)
    return {"votes": len(answers), "counts": counts, "percent": percent}


def left_bias(votes: list[dict]) -> dict:
    """Return how often the left one was taken where one was, and the exact p-value of that at 50:50."""
    choices = [vote["choice"] for vote in votes]
    left = choices.count("left")
    right = choices.count("right")
    percent_left = None
    if left + right:
        percent_left = 100 * left / (left + right)
    return {
        "left": left,
        "right": right,
        "percent_left": percent_left,
        "p": sign_test(left, right),
    }


def self_consistency(votes: list[dict]) -> dict:
    """Return how often an annotator gave the same answer when the pair came back with its sides swapped."""
    first_answers = {}
    repeated_answers = {}
    for vote in votes:
        item = (vote["annotator"], vote["pair"])
        if vote["kind"] == "main":
            first_answers[item] = vote["answer"]
        elif vote["kind"] == "repeat":
            repeated_answers[item] = vote["answer"]
    same = 0
    repeats = 0
    for item, answer in repeated_answers.items():
        if item not in first_answers:
            continue
        repeats += 1
        if answer == first_answers[item]:
            same += 1
    return {"same": same, "repeats": repeats}


def median_seconds(votes: list[dict]) -> dict:
    """Return the median time from the opening of a pair to the vote, and of its part after the buttons unlocked."""
    to_vote = np.array([vote["seconds_to_vote"] for vote in votes])
    to_unlock = np.array([vote["seconds_to_unlock"] for vote in votes])
    after_unlock = to_vote - to_unlock
    return {
        "to_vote": float(np.median(to_vote)),
        "after_unlock": float(np.median(after_unlock)),
    }


def count_majority(pairs: list[list[str]], labels: list[str]) -> dict:
    """Count majority votes on `pairs`, each a list of answers.

    Return shares, intervals and the test of one model against the other.
    """
    total = len(pairs)
    decided = [majority(answers) for answers in pairs]
    shares = share_answers([answer or NEITHER for answer in decided], labels)
    counts = shares["counts"]
    intervals = {}
    for answer, count in counts.items():
        low, high = wilson_interval(count, total)
        intervals[answer] = [100 * low, 100 * high]
    first, second = (counts[label] for label in labels)
    low, high = bootstrap_difference(first, second, total)
    return {
        "pairs": total,
        "counts": counts,
        "percent": shares["percent"],
        "percent_95": intervals,
        "without_majority": decided.count(None),
        "difference": 100 * (second - first) / total,
        "difference_95": [100 * low, 100 * high],
        "sign_test_p": sign_test(second, first),
    }


def agreement_of_annotators(pairs: list[list[str]], labels: list[str]) -> dict:
    """Return Fleiss' kappa over the pairs that have the most common number of votes, two or more.

    The kappa is None where it is undefined.
    """
    sizes = Counter(len(answers) for answers in pairs if len(answers) > 1)
    # Of equally common numbers the larger one
    size = max(sizes, key=lambda number: (sizes[number], number), default=0)
    rows = []
    for answers in pairs:
        if len(answers) == size:
            rows.append([answers.count(answer) for answer in (*labels, NEITHER)])
    kappa = math.nan
    if rows:
        kappa = fleiss_kappa(np.array(rows))
    return {
        "kappa": None if math.isnan(kappa) else kappa,
        "pairs": len(rows),
        "votes_per_pair": size,
    }


def summarize_annotators(votes: list[dict], labels: list[str]) -> dict:
    """Return annotator -> shares of answers, bias, consistency and time."""
    main = [vote for vote in votes if vote["kind"] == "main"]
    summaries = {}
    for annotator in sorted({vote["annotator"] for vote in main}):
        own = [vote for vote in votes if vote["annotator"] == annotator]
        own_main = [vote for vote in main if vote["annotator"] == annotator]
        answers = [vote["answer"] for vote in own_main]
        summaries[annotator] = {
            **share_answers(answers, labels),
            "left_bias": left_bias(own_main),
            "self_consistency": self_consistency(own),
            "median_seconds": median_seconds(own_main),
        }
    return summaries


def count_reasons(votes: list[dict], labels: list[str]) -> dict:
    """Return model -> reason -> how often those who preferred the model ticked it."""
    reasons = {}
    for label in labels:
        ticked = Counter()
        for vote in votes:
            if vote["answer"] == label:
                ticked.update(vote["reasons"])
        reasons[label] = dict(ticked)
    return reasons


def analyse(votes: list[dict], key: dict, min_votes: int) -> dict:
    """Return all that `report.json` holds. `votes` are unblinded; those on practice pairs do not count."""
    labels = key["labels"]
    main = [vote for vote in votes if vote["kind"] == "main"]
    answers_of = {}
    for vote in main:
        answers_of.setdefault(vote["pair"], []).append(vote["answer"])
    pairs = list(answers_of.values())
    numbers = Counter(len(answers) for answers in pairs)
    pairs_by_votes = {str(number): numbers[number] for number in sorted(numbers)}
    enough = [answers for answers in pairs if len(answers) >= min_votes]
    counted_pairs = [pair for pair in key["pairs"].values() if not pair["practice"]]
    return {
        "study": key["study"],
        "synthetic": main[0]["synthetic"],
        "labels": labels,
        "pairs": len(counted_pairs),
        "pairs_by_votes": pairs_by_votes,
        "annotators": summarize_annotators(votes, labels),
        "all_votes": share_answers([vote["answer"] for vote in main], labels),
        "majority_rule": RULE,
        "min_votes": min_votes,
        "majority": count_majority(enough, labels) if enough else None,
        "fleiss_kappa": agreement_of_annotators(pairs, labels),
        "left_bias": left_bias(main),
        "self_consistency": self_consistency(votes),
        "median_seconds": median_seconds(main),
        "reasons": count_reasons(main, labels),
    }


def write_report(report: dict, remarks: list[str]) -> str:
    """Return the report in Markdown."""
    first, second = report["labels"]
    by_votes = ", ".join(f"{count} with {number}" for number, count in report["pairs_by_votes"].items())
    lines = [f"# {second} against {first}: blind preferences\n"]
    if report["synthetic"]:
        lines.append(f"**{SYNTHETIC}**\n")
    lines += [
        f"Study `{report['study']}`, {report['pairs']} pairs, {len(report['annotators'])} annotator(s).",
        f"Pairs by number of votes: {by_votes}.\n",
        *annotator_lines(report),
        "\n## Majority vote\n",
        f"The rule: {report['majority_rule']}. {PAPER}\n",
        *majority_lines(report),
        "\n## How far to trust it\n",
        *trust_lines(report),
    ]
    lines += [f"- {remark}" for remark in remarks]
    lines.append("\n## Reasons ticked by those who preferred a model\n")
    for label in (second, first):
        counts = report["reasons"][label]
        ticked = ", ".join(f"{reason} {count}" for reason, count in counts.items())
        lines.append(f"- {label}: {ticked or 'none'}")
    return "\n".join(lines) + "\n"


def answer_columns(report: dict) -> list[str]:
    """Return the answers in the order of the tables: the new model, the baseline, neither."""
    first, second = report["labels"]
    return [second, first, NEITHER]


def annotator_lines(report: dict) -> list[str]:
    """Write the table of annotators, with all votes together at its end."""
    columns = answer_columns(report)
    headings = " | ".join(f"{column} %" for column in columns)
    lines = [
        f"| | votes | {headings} | left % | same when repeated | median s |",
        "|---|" + "---:|" * 7,
    ]
    rows = dict(report["annotators"])
    rows["all votes"] = {
        **report["all_votes"],
        "left_bias": report["left_bias"],
        "self_consistency": report["self_consistency"],
        "median_seconds": report["median_seconds"],
    }
    for name, row in rows.items():
        shares = " | ".join(f"{row['percent'][column]:.2f}" for column in columns)
        percent_left = row["left_bias"]["percent_left"]
        left = "-" if percent_left is None else f"{percent_left:.1f}"
        repeated = row["self_consistency"]
        same = f"{repeated['same']} of {repeated['repeats']}"
        seconds = row["median_seconds"]["to_vote"]
        lines.append(f"| {name} | {row['votes']} | {shares} | {left} | {same} | {seconds:.1f} |")
    return lines


def majority_lines(report: dict) -> list[str]:
    """Write the table of majority votes and what follows from it."""
    result = report["majority"]
    if result is None:
        return [f"No pair has {report['min_votes']} votes yet (`--min_votes`)."]
    lines = [
        f"{result['pairs']} pairs with at least {report['min_votes']} votes:\n",
        "| | pairs | % | 95 % interval (Wilson) |",
        "|---|---:|---:|---:|",
    ]
    for column in answer_columns(report):
        count = result["counts"][column]
        percent = result["percent"][column]
        low, high = result["percent_95"][column]
        lines.append(f"| {column} | {count} | {percent:.2f} | {low:.2f} to {high:.2f} |")
    first, second = report["labels"]
    low, high = result["difference_95"]
    interval = f"95 % bootstrap interval over pairs {low:+.2f} to {high:+.2f}"
    lines += [
        f"\nOf the indistinguishable, {result['without_majority']} had no majority.",
        f"{second} minus {first}: {result['difference']:+.2f} points, {interval}.",
        f"Sign test without ties, two-sided: p = {result['sign_test_p']:.3g}.",
    ]
    return lines


def trust_lines(report: dict) -> list[str]:
    """Write what tells how reliable the votes are."""
    agreement = report["fleiss_kappa"]
    kappa = "undefined"
    if agreement["kappa"] is not None:
        kappa = f"{agreement['kappa']:.3f}"
    rated = f"{agreement['pairs']} pairs with {agreement['votes_per_pair']} votes each"
    bias = report["left_bias"]
    times = report["median_seconds"]
    return [
        f"- Fleiss' kappa: {kappa} ({rated}).",
        f"- Left taken {bias['left']} times, right {bias['right']} times: exact test of 50:50, p = {bias['p']:.3g}.",
        f"- Median time for a vote: {times['to_vote']:.1f} s, {times['after_unlock']:.1f} s of it after watching.",
        "- Who the annotators are and what they knew is not in the votes: say it where you publish this.",
    ]


def draw_preferences(report: dict) -> Figure:
    """Draw stacked bars of each annotator's preferences, and of the majority vote: the paper's Fig. 4."""
    first, second = report["labels"]
    colors = {
        second: "#d97706",
        NEITHER: "#c8c8c8",
        first: "#4b83c4",
    }
    bars = {}
    for name, row in report["annotators"].items():
        bars[name] = row["percent"]
    result = report["majority"]
    if result:
        bars[f"majority\n({result['pairs']} pairs)"] = result["percent"]
    height = 1.6 + 0.5 * len(bars)
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    names = list(bars)
    start = np.zeros(len(bars))
    for answer, color in colors.items():
        shares = np.array([percent[answer] for percent in bars.values()])
        drawn = axes.barh(names, shares, left=start, color=color, label=answer, height=0.7)
        # A narrow bar has no room for its number.
        numbers = [f"{share:.1f}" if share >= 5 else "" for share in shares]
        axes.bar_label(drawn, numbers, label_type="center")
        start += shares
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of pairs")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    if report["synthetic"]:
        axes.set_title(SYNTHETIC, color="#b00020", weight="bold")
    return figure


CSV_COLUMNS = (
    "annotator",
    "kind",
    "pair",
    "file_name",
    "prompt",
    "seed",
    "left_model",
    "right_model",
    "choice",
    "answer",
    "reasons",
    "seconds_to_unlock",
    "seconds_to_vote",
    "replays",
    "time",
    "synthetic",
)


def harmless(value):
    """Return what stands in a cell: text that a spreadsheet would run as a formula gets an apostrophe before it."""
    # NFKC, since some spreadsheets take the wide forms of these signs as well
    if isinstance(value, str) and FORMULA.match(unicodedata.normalize("NFKC", value)):
        return f"'{value}"
    return value


def write_csv(path: Path, votes: list[dict], key: dict) -> None:
    """Write unblinded votes, practice included."""
    with path.open("w", encoding="utf-8", newline="") as file:
        # Text in quotes stays one cell where a semicolon or a tab ends one.
        writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore", quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        for vote in votes:
            pair = key["pairs"][vote["pair"]]
            reasons = ", ".join(vote["reasons"])
            row = {**pair, **vote, "reasons": reasons}
            writer.writerow({column: harmless(row.get(column, "")) for column in CSV_COLUMNS})


def main(args: argparse.Namespace) -> None:
    """Write the report and print it. Raise `SystemExit` rather than mix real and synthetic votes in one folder."""
    try:
        key = json.loads(args.key.read_text(encoding="utf-8"))
    except ValueError:
        raise SystemExit(f"--key {args.key} is no JSON; give the key that build.py wrote") from None
    if args.min_votes < 1 or (args.demo is not None and args.demo < 1):
        raise SystemExit("--demo and --min_votes are at least 1")
    if args.demo:
        votes = demo_votes(key, args.demo)
        remarks = []
    else:
        votes, remarks = read_votes(args.votes, key)
    report = analyse(votes, key, args.min_votes)
    report_path = args.output_dir / "report.json"
    if report_path.is_file():
        previous = json.loads(report_path.read_text(encoding="utf-8"))
        if previous["synthetic"] != report["synthetic"]:
            message = "is of the other kind, real or synthetic votes: give another --output_dir"
            raise SystemExit(f"{report_path} {message}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    text = write_report(report, remarks)
    (args.output_dir / "report.md").write_text(text, encoding="utf-8")
    report_text = json.dumps(report, indent=1, ensure_ascii=False)
    report_path.write_text(report_text + "\n", encoding="utf-8")
    write_csv(args.output_dir / "votes.csv", votes, key)
    draw_preferences(report).savefig(args.output_dir / "preferences.png", dpi=110)
    print(f"{text}\n{args.output_dir}: report.md, report.json, preferences.png, votes.csv")


if __name__ == "__main__":
    run_script(main, parse_args)
