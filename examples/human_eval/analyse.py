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
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

NEITHER = "indistinguishable"
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
    """Two-sided exact p-value of the sign test, ties left out: the chance of a split at least as uneven at 50:50."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


def wilson_interval(part: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927). `total` must be positive."""
    share, shrink = part / total, 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_difference(first: int, second: int, total: int, draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of `(second - first) / total` when the pairs are drawn again with replacement."""
    shares = np.array([first, second, total - first - second]) / total
    drawn = np.random.default_rng(0).multinomial(total, shares, size=draws)
    low, high = np.percentile((drawn[:, 1] - drawn[:, 0]) / total, [2.5, 97.5])
    return float(low), float(high)


def fleiss_kappa(counts: np.ndarray) -> float:
    """
    Agreement beyond chance (Fleiss 1971): 1 is perfect, 0 is what the answers' frequencies alone would give.

    Args:
        counts (`np.ndarray`): Shape `(pairs, answers)`: votes for each answer, as many a pair, at least two.

    Returns:
        `float`: The kappa; NaN if all votes are for one answer, since chance then agrees as well.
    """
    votes = counts.sum(1)
    if len(set(votes)) != 1 or votes[0] < 2:
        raise ValueError("Fleiss' kappa needs the same number of votes for every pair, at least two")
    agreement = ((counts**2).sum(1) - votes) / (votes * (votes - 1))
    chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((agreement.mean() - chance) / (1 - chance)) if chance < 1 else math.nan


def majority(answers: list[str]) -> str | None:
    """The answer of more than half, or None."""
    answer, count = Counter(answers).most_common(1)[0]
    return answer if 2 * count > len(answers) else None


# --- Votes -----------------------------------------------------------------------------------------------------------


def unblind(vote: dict, key: dict) -> dict:
    """`vote` with `left_model`, `right_model` and `answer`, which is a model or `indistinguishable`."""
    models = {clip: label for label, clip in key["pairs"][vote["pair"]]["clips"].items()}
    left, right = models[vote["left"]], models[vote["right"]]
    answer = {"left": left, "right": right, NEITHER: NEITHER}[vote["choice"]]
    return vote | {"left_model": left, "right_model": right, "answer": answer}


def read_votes(paths: list[Path], key: dict) -> tuple[list[dict], list[str]]:
    """
    Unblinded votes, the first one where an annotator has several on the same item; and lines on what was left out.
    Votes of another study, or real and synthetic ones together, are an error.
    """
    votes, remarks = {}, []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                vote = json.loads(line)
            except ValueError:
                remarks.append(f"{path}, line {number}: cut off, left out")
                continue
            if not isinstance(vote, dict) or vote.get("study") != key["study"]:
                raise SystemExit(f"{path}, line {number}: not a vote of study {key['study']}, which --key is of")
            try:
                vote = unblind(vote, key)
                first = votes.setdefault((vote["annotator"], vote["kind"], vote["pair"]), vote)
            except KeyError as error:
                raise SystemExit(f"{path}, line {number}: {error} is missing, or unknown to --key") from None
            if first["answer"] != vote["answer"]:
                remarks.append(
                    f"{path}, line {number}: {vote['annotator']} had voted otherwise on this pair; left out"
                )
    if not any(vote["kind"] == "main" for vote in votes.values()):
        raise SystemExit(f"no votes that count in {', '.join(map(str, paths))}")
    if len({vote["synthetic"] for vote in votes.values()}) > 1:
        raise SystemExit("some of these votes are real and some synthetic: analyse them apart")
    return list(votes.values()), remarks


def demo_votes(key: dict, annotators: int) -> list[dict]:
    """Invented votes, for neither model: pairs differ at random in quality, which annotators see through noise."""
    rng, votes = np.random.default_rng(1), []
    pairs = {pair_id: pair for pair_id, pair in key["pairs"].items() if not pair["practice"]}
    quality = dict(zip(pairs, rng.normal(0, 0.7, len(pairs)), strict=True))
    for number in range(annotators):
        kinds = [(pair_id, "main") for pair_id in pairs] + [(pair_id, "repeat") for pair_id in list(pairs)[::20]]
        for pair_id, kind in kinds:
            seen, (left, right) = quality[pair_id] + rng.normal(0, 0.7), rng.permutation(key["labels"])
            better = key["labels"][int(seen > 0)]
            choice = NEITHER if abs(seen) < 0.4 else "left" if better == left else "right"
            clips, seconds = pairs[pair_id]["clips"], round(float(rng.lognormal(2.3, 0.3)), 2)
            vote = {"study": key["study"], "annotator": f"demo{number + 1}", "kind": kind, "pair": pair_id,
                    "left": clips[left], "right": clips[right], "choice": choice, "seconds_to_unlock": seconds,
                    "seconds_to_vote": round(seconds + float(rng.lognormal(1.0, 0.5)), 2), "replays": 0,
                    "reasons": [] if choice == NEITHER else ["motion"] * (rng.random() < 0.5),
                    "time": "", "synthetic": True}  # fmt: skip
            votes.append(unblind(vote, key))
    return votes


# --- Report ----------------------------------------------------------------------------------------------------------


def share_answers(answers: list[str], labels: list[str]) -> dict:
    """Counts and percentages of both models and `indistinguishable`."""
    counts = {answer: answers.count(answer) for answer in (*labels, NEITHER)}
    return {"votes": len(answers), "counts": counts,
            "percent": {answer: 100 * count / len(answers) for answer, count in counts.items()}}  # fmt: skip


def left_bias(votes: list[dict]) -> dict:
    """How often the left one was taken where one was, and the exact p-value of that at 50:50."""
    left, right = (sum(vote["choice"] == side for vote in votes) for side in ("left", "right"))
    return {"left": left, "right": right, "percent_left": 100 * left / (left + right) if left + right else None,
            "p": sign_test(left, right)}  # fmt: skip


def self_consistency(votes: list[dict]) -> dict:
    """How often an annotator gave the same answer when the pair came back with its sides swapped."""
    answers = {(vote["annotator"], vote["kind"], vote["pair"]): vote["answer"] for vote in votes}
    twice = [
        (answer, answers[annotator, "main", pair])
        for (annotator, kind, pair), answer in answers.items()
        if kind == "repeat" and (annotator, "main", pair) in answers
    ]
    return {"same": sum(first == second for first, second in twice), "repeats": len(twice)}


def median_seconds(votes: list[dict]) -> dict:
    """Medians of the time from the opening of a pair to the vote, and of the part of it after the buttons unlocked."""
    to_vote = np.array([vote["seconds_to_vote"] for vote in votes])
    after = to_vote - [vote["seconds_to_unlock"] for vote in votes]
    return {"to_vote": float(np.median(to_vote)), "after_unlock": float(np.median(after))}


def count_majority(pairs: list[list[str]], labels: list[str]) -> dict:
    """Majority votes on `pairs`, each a list of answers: shares, intervals, test of one model against the other."""
    decided = [majority(answers) for answers in pairs]
    result = share_answers([answer or NEITHER for answer in decided], labels)
    first, second = (result["counts"][label] for label in labels)
    low, high = bootstrap_difference(first, second, len(pairs))
    return {
        "pairs": result.pop("votes"),
        **result,
        "percent_95": {
            answer: [100 * bound for bound in wilson_interval(count, len(pairs))]
            for answer, count in result["counts"].items()
        },
        "without_majority": decided.count(None),
        "difference": 100 * (second - first) / len(pairs),
        "difference_95": [100 * low, 100 * high],
        "sign_test_p": sign_test(second, first),
    }


def analyse(votes: list[dict], key: dict, min_votes: int) -> dict:
    """Everything that `report.json` holds. `votes` are unblinded; those on practice pairs do not count."""
    labels, answers_of = key["labels"], {}
    main = [vote for vote in votes if vote["kind"] == "main"]
    for vote in main:
        answers_of.setdefault(vote["pair"], []).append(vote["answer"])
    enough = [answers for answers in answers_of.values() if len(answers) >= min_votes]
    sizes = Counter(len(answers) for answers in answers_of.values() if len(answers) > 1)
    size = max(sizes, key=lambda number: (sizes[number], number), default=0)
    rated = [answers for answers in answers_of.values() if len(answers) == size]
    counts = np.array([[answers.count(answer) for answer in (*labels, NEITHER)] for answers in rated])
    kappa = fleiss_kappa(counts) if rated else math.nan
    annotators = {}
    for annotator in sorted({vote["annotator"] for vote in main}):
        own = [vote for vote in main if vote["annotator"] == annotator]
        annotators[annotator] = {
            **share_answers([vote["answer"] for vote in own], labels),
            "left_bias": left_bias(own),
            "self_consistency": self_consistency([vote for vote in votes if vote["annotator"] == annotator]),
            "median_seconds": median_seconds(own),
        }
    reasons = {
        label: dict(Counter(reason for vote in main if vote["answer"] == label for reason in vote["reasons"]))
        for label in labels
    }
    return {
        "study": key["study"],
        "synthetic": main[0]["synthetic"],
        "labels": labels,
        "pairs": sum(not pair["practice"] for pair in key["pairs"].values()),
        "pairs_by_votes": {
            str(number): count for number, count in sorted(Counter(map(len, answers_of.values())).items())
        },
        "annotators": annotators,
        "all_votes": share_answers([vote["answer"] for vote in main], labels),
        "majority_rule": RULE,
        "min_votes": min_votes,
        "majority": count_majority(enough, labels) if enough else None,
        "fleiss_kappa": {"kappa": None if math.isnan(kappa) else kappa, "pairs": len(rated), "votes_per_pair": size},
        "left_bias": left_bias(main),
        "self_consistency": self_consistency(votes),
        "median_seconds": median_seconds(main),
        "reasons": reasons,
    }


def write_report(report: dict, remarks: list[str]) -> str:
    """The report in Markdown."""
    first, second = report["labels"]
    columns = [second, first, NEITHER]
    lines = [f"# {second} against {first}: blind preferences\n"]
    lines += [f"**{SYNTHETIC}**\n"] * report["synthetic"]
    lines += [f"Study `{report['study']}`, {report['pairs']} pairs, {len(report['annotators'])} annotator(s)."]
    by_votes = ", ".join(f"{count} with {number}" for number, count in report["pairs_by_votes"].items())
    lines += [f"Pairs by number of votes: {by_votes}.\n"]
    lines += [
        f"| | votes | {' | '.join(f'{column} %' for column in columns)} | left % | same when repeated | median s |"
    ]
    lines += ["|---|" + "---:|" * 7]
    for name, row in (report["annotators"] | {"all votes": report}).items():
        shares = report["all_votes"] if row is report else row
        cells = [f"{shares['percent'][column]:.2f}" for column in columns]
        left, again = row["left_bias"]["percent_left"], row["self_consistency"]
        cells += ["-" if left is None else f"{left:.1f}", f"{again['same']} of {again['repeats']}"]
        lines += [f"| {name} | {shares['votes']} | {' | '.join(cells)} | {row['median_seconds']['to_vote']:.1f} |"]
    result = report["majority"]
    lines += ["\n## Majority vote\n", f"The rule: {report['majority_rule']}. {PAPER}\n"]
    if result is None:
        lines += [f"No pair has {report['min_votes']} votes yet (`--min_votes`)."]
    else:
        lines += [f"{result['pairs']} pairs with at least {report['min_votes']} votes:\n"]
        lines += ["| | pairs | % | 95 % interval (Wilson) |", "|---|---:|---:|---:|"]
        for column in columns:
            low, high = result["percent_95"][column]
            cells = f"{result['counts'][column]} | {result['percent'][column]:.2f} | {low:.2f} to {high:.2f}"
            lines += [f"| {column} | {cells} |"]
        low, high = result["difference_95"]
        lines += [f"\nOf the indistinguishable, {result['without_majority']} had no majority."]
        difference = (
            f"{result['difference']:+.2f} points, 95 % bootstrap interval over pairs {low:+.2f} to {high:+.2f}"
        )
        lines += [f"{second} minus {first}: {difference}."]
        lines += [f"Sign test without ties, two-sided: p = {result['sign_test_p']:.3g}."]
    kappa, bias = report["fleiss_kappa"], report["left_bias"]
    value = "undefined" if kappa["kappa"] is None else f"{kappa['kappa']:.3f}"
    lines += ["\n## How far to trust it\n"]
    lines += [f"- Fleiss' kappa: {value} ({kappa['pairs']} pairs with {kappa['votes_per_pair']} votes each)."]
    lines += [
        f"- Left taken {bias['left']} times, right {bias['right']} times: exact test of 50:50, p = {bias['p']:.3g}."
    ]
    times = report["median_seconds"]
    lines += [
        f"- Median time for a vote: {times['to_vote']:.1f} s, {times['after_unlock']:.1f} s of it after watching."
    ]
    lines += ["- Who the annotators are and what they knew is not in the votes: say it where you publish this."]
    lines += [f"- {remark}" for remark in remarks]
    lines += ["\n## Reasons ticked by those who preferred a model\n"]
    for label in (second, first):
        ticked = ", ".join(f"{reason} {count}" for reason, count in report["reasons"][label].items())
        lines += [f"- {label}: {ticked or 'none'}"]
    return "\n".join(lines) + "\n"


def draw_preferences(report: dict) -> Figure:
    """Stacked bars of the preference ratios of each annotator, and of the majority vote: the paper's Fig. 4."""
    first, second = report["labels"]
    bars = {name: row["percent"] for name, row in report["annotators"].items()}
    if report["majority"]:
        bars[f"majority\n({report['majority']['pairs']} pairs)"] = report["majority"]["percent"]
    figure = Figure(figsize=(7, 1.6 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    start = np.zeros(len(bars))
    for answer, colour in ((second, "#d97706"), (NEITHER, "#c8c8c8"), (first, "#4b83c4")):
        shares = np.array([percent[answer] for percent in bars.values()])
        drawn = axes.barh(list(bars), shares, left=start, color=colour, label=answer, height=0.7)
        axes.bar_label(drawn, [f"{share:.1f}" if share >= 5 else "" for share in shares], label_type="center")
        start += shares
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of pairs")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    if report["synthetic"]:
        axes.set_title(SYNTHETIC, color="#b00020", weight="bold")
    return figure


def write_csv(path: Path, votes: list[dict], key: dict) -> None:
    """Unblinded votes, practice included."""
    columns = ["annotator", "kind", "pair", "file_name", "prompt", "seed", "left_model", "right_model", "choice"]
    columns += ["answer", "reasons", "seconds_to_unlock", "seconds_to_vote", "replays", "time", "synthetic"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for vote in votes:
            writer.writerow(key["pairs"][vote["pair"]] | vote | {"reasons": ", ".join(vote["reasons"])})


def main(args: argparse.Namespace) -> None:
    key = json.loads(args.key.read_text(encoding="utf-8"))
    if args.min_votes < 1 or (args.demo is not None and args.demo < 1):
        raise SystemExit("--demo and --min_votes are at least 1")
    votes, remarks = (demo_votes(key, args.demo), []) if args.demo else read_votes(args.votes, key)
    report = analyse(votes, key, args.min_votes)
    there = args.output_dir / "report.json"
    if there.is_file() and json.loads(there.read_text(encoding="utf-8"))["synthetic"] != report["synthetic"]:
        raise SystemExit(f"{there} is of the other kind, real or synthetic votes: give another --output_dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    text = write_report(report, remarks)
    (args.output_dir / "report.md").write_text(text, encoding="utf-8")
    (args.output_dir / "report.json").write_text(
        json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    write_csv(args.output_dir / "votes.csv", votes, key)
    draw_preferences(report).savefig(args.output_dir / "preferences.png", dpi=110)
    print(f"{text}\n{args.output_dir}: report.md, report.json, preferences.png, votes.csv")


if __name__ == "__main__":
    main(parse_args())
