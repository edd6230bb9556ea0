"""The READMEs: their links lead somewhere, and the files, commands and flags that they name exist."""

import re
import runpy
from pathlib import Path

import pytest

import train_ltd

ROOT = Path(__file__).resolve().parents[2]
READMES = sorted([ROOT / "README.md", *ROOT.glob("examples/**/README.md")])
LAUNCHER_FLAGS = {"config_file", "multi_gpu", "num_processes", "num_machines", "machine_rank", "main_process_ip"}
LAUNCHER_FLAGS |= {"main_process_port"}

each_readme = pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def links_of(path: Path) -> list[str]:
    """Return the targets of all Markdown links and pictures, outside of code."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors_of(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(kept.replace(" ", "-"))
    return anchors


def test_every_folder_of_examples_is_explained():
    for name in ("recipes", "accelerate", "benchmark", "scores", "human_eval", "nano"):
        assert ROOT / "examples" / name / "README.md" in READMES
        assert f"]({name}/README.md)" in (ROOT / "examples/README.md").read_text(encoding="utf-8")


@each_readme
def test_every_relative_link_resolves(path):
    broken = []
    for link in links_of(path):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else path.parent / name
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors_of(target):
            broken.append(link)
    assert broken == []


@each_readme
def test_every_file_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:examples|tests)/[\w./-]+\.(?:py|sh|yaml|png|md|jsonl?)\b", text))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@each_readme
def test_commands_of_the_training_script_have_its_flags(path):
    flags = set()
    for command in re.findall(r"train_ltd\.py[^\n]*(?:\\\n[^\n]*)*", path.read_text(encoding="utf-8")):
        flags |= set(re.findall(r"--(?:no-)?(\w+)", command))
    known = {action.dest for action in train_ltd.build_parser()._actions}
    assert sorted(flags - LAUNCHER_FLAGS - known) == []


def test_the_main_readme_has_both_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash examples/quickstart.sh" in text and "bash tests/run.sh" in text


def test_the_flags_are_listed_as_they_are(monkeypatch):
    script = str(ROOT / "examples/recipes/flags.py")
    monkeypatch.setattr("sys.argv", [script, "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 0, "examples/recipes/README.md is out of date: python examples/recipes/flags.py"
