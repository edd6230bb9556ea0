"""From a checkpoint to tables and charts, by the commands that the README names: eight prompts, two models."""

import json

import evaluate
import generate
import pytest
from human_eval import analyse
from test_human_eval import Annotator, build_study

pytest_plugins = ["browser"]

PROMPTS = [f"a square moves, number {number}" for number in range(8)]


def command(module, *words):
    """What `python examples/MODULE.py WORDS` does."""
    return module.main(module.parse_args([str(word) for word in words]))


@pytest.mark.slow
def test_generate_compare_score_and_vote(run, tiny_wan, chromium, tmp_path):
    pytest.importorskip("cv2", reason="the DIS proxies need opencv-python-headless")
    lora, folders = run(), {"base": tmp_path / "base", "LTD": tmp_path / "tuned"}
    size = ["--preset", "nano", "--height", 32, "--width", 48, "--num_frames", 9, "--num_inference_steps", 2]
    model = ["--pretrained_model_name_or_path", tiny_wan, *(f"--prompt={prompt}" for prompt in PROMPTS)]
    command(generate, *model, *size, "--output_dir", folders["base"])
    command(generate, *model, *size, "--output_dir", folders["LTD"], "--lora", lora)
    compared = tmp_path / "compare"
    command(generate, "--compare", *folders.values(), "--labels", *folders, "--output_dir", compared)

    page = chromium.new_page()
    page.set_default_timeout(180_000)  # the machine may be busy
    page.goto((compared / "index.html").as_uri())
    assert page.locator("h2").all_text_contents() == PROMPTS
    page.locator("video").nth(7).scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('video')[7].played.length > 0")
    page.close()

    for folder in folders.values():
        command(evaluate, "offline", folder)
    pairs = [f"{name}={folder}" for name, folder in folders.items()]
    command(evaluate, "report", *pairs, "--output_dir", tmp_path / "report")
    scores = {name: json.loads((folder / "scores/offline.json").read_text()) for name, folder in folders.items()}
    table = (tmp_path / "report" / "report.md").read_text()
    for name in folders:
        assert f"{100 * scores[name]['temporal_flickering']['score']:.2f}" in table and name in table
        assert len(scores[name]["temporal_flickering"]["videos"]) == 8
    assert (tmp_path / "report" / "report.png").stat().st_size > 10_000

    study, votes = tmp_path / "study", []
    _, key = build_study(folders.values(), study, "--labels", *folders, "--practice", "1", "--repeats", "1")
    for name in ("anna", "ben"):
        answers = {pair["file_name"]: "LTD" for pair in key["pairs"].values()}
        someone = Annotator(chromium, (study / "index.html").as_uri(), name, key, answers)
        someone.vote_all()
        votes.append(someone.export(tmp_path))
        someone.context.close()
    result = tmp_path / "votes"
    command(analyse, "--key", f"{study}_key.json", "--votes", *votes, "--output_dir", result, "--min_votes", 2)
    report = json.loads((result / "report.json").read_text())
    assert report["pairs"] == 7 and report["majority"]["counts"]["LTD"] == 7
