"""A user's mistake ends each script in a message that begins with `error:` and has the remedy, and in exit code 2."""

import importlib.util
import os
import subprocess
import sys

import cost
import degrees_turned
import evaluate
import gallery
import generate
import mistakes
import motion_metrics
import pytest
import videos
import visualize_ltd
from conftest import CPU, ROOT
from human_eval import analyse, build, collect

import train_ltd

NO_NETWORK = "this is not in the Hub's cache, and HF_HUB_OFFLINE forbids to download it"
SMALL = ["--height", "32", "--width", "48", "--num_frames", "9"]
GENERATE = ["--preset", "nano", "--prompt", "a dog", "--output_dir", "out"]
MAPS = ["maps", "--output_dir", "out", *SMALL]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: an empty folder, notes that are nothing else, and results that are cut off."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    names = ["notes.txt", "notes.mp4", "notes.safetensors", "cut/generation.json", "cut/samples/step-000000-0.mp4"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"cut o')
    (tmp_path / "latin.txt").write_bytes("ein schöner Hund".encode("latin-1"))
    return tmp_path


def end_of(run_script, module, words, monkeypatch, capsys) -> str:
    """Run a script's command line as its `__main__` does; returns the message."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        run_script(module.main, module.parse_args)
    error = capsys.readouterr().err
    message = error[error.index("error: ") :]
    assert stop.value.code == 2 and "Traceback" not in error
    return message


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        (gallery, "none", "there is no folder none; give the --output_dir of a training run"),
        (gallery, "empty", "empty/samples holds no videos"),
        (gallery, "cut", "step-000000-0.mp4: cannot be played: Invalid data"),
        (videos, "none.mp4 --output a.png", "none.mp4: cannot be played: No such file"),
        (evaluate, "offline none", "none has no .mp4 in it; examples/generate.py makes such folders"),
        (evaluate, "report a=empty b=none --output_dir out", "there is no folder none"),
        (evaluate, "report a=cut b=empty --output_dir out", "cut has no scores yet"),
        (cost, "none", "none is neither a folder, nor a file, nor a number of seconds"),
        (cost, "empty", "empty has no estimate.json"),
        (cost, "notes.txt", "notes.txt is no measurement of benchmark.py"),
        (build, "empty none --output_dir study --key key.json --labels a b", "none is no folder"),
        (collect, "empty --votes votes.jsonl", "empty/index.html is not a page that build.py made"),
        (analyse, "--key none --votes none --output_dir out", "none: No such file"),
        (analyse, "--key notes.txt --votes none --output_dir out", "notes.txt is no JSON; give the key"),
        (motion_metrics, "empty", "empty/metadata.jsonl: No such file"),
        (degrees_turned, "none empty", "training_settings.json is missing: is empty the output folder"),
    ],
)
def test_scripts_without_a_model(folder, monkeypatch, capsys, module, line, message):
    assert message in end_of(mistakes.run_script, module, line.split(), monkeypatch, capsys)


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        (generate, [*GENERATE, "--perset", "wan"], "unrecognized arguments: --perset wan"),
        (generate, [*GENERATE, "--pretrained_model_name_or_path", "some/wan"], NO_NETWORK),
        (generate, [*GENERATE, "--pretrained_model_name_or_path", "empty"], "--pretrained_model_name_or_path empty"),
        (generate, [*GENERATE, "--output_dir", "notes.txt"], "--output_dir notes.txt is a file; give a folder"),
        (generate, [*GENERATE, "--height", "50"], "must be a multiple of 16, got 50; try 48"),
        (generate, [*GENERATE, "--lora", "none"], "--lora none cannot be used"),
        (generate, [*GENERATE, "--lora", "notes.safetensors"], "notes.safetensors cannot be used"),
        (generate, [*GENERATE, "--image", "notes.txt"], "takes none; leave it out"),
        (generate, ["--prompt_file", "none", "--output_dir", "out"], "--prompt_file none: no such file"),
        (generate, [*GENERATE[:2], *GENERATE[4:], "--prompt_file", "latin.txt"], "latin.txt is not text in UTF-8"),
        (generate, [*GENERATE[:2], *GENERATE[4:], "--dataset_name", "some/clips"], "--dataset_name some/clips cannot"),
        (generate, [*GENERATE[:4], "--output_dir", "cut"], "cut/generation.json is damaged, remove it"),
        (generate, ["--compare", "empty", "none", "--output_dir", "out"], "--compare empty: no generation.json"),
        (generate, ["--compare", "cut", "none", "--output_dir", "out"], "cut/generation.json is damaged"),
        (visualize_ltd, [*MAPS, "--video", "none.mp4"], "--video none.mp4 is not a file"),
        (
            visualize_ltd,
            [*MAPS, "--video", "notes.mp4", "--ltd_only"],
            "--video notes.mp4: cannot be read: Invalid data",
        ),
        (visualize_ltd, [*MAPS, "--latents", "notes.txt", "--ltd_only"], "notes.txt is not a safetensors file"),
        (visualize_ltd, [*MAPS, "--video", "notes.mp4", "--lora", "none"], "--lora none cannot be used"),
        (
            visualize_ltd,
            [*MAPS, "--video", "notes.mp4", "--height", "50"],
            "must be a multiple of 16, got 50; try 48",
        ),
        (visualize_ltd, ["report", "--train_data_dir", "empty", "--output_dir", "out"], "empty holds no clips"),
        (visualize_ltd, ["report", "--output_dir", "out"], "--train_data_dir"),
    ],
)
def test_scripts_of_a_model(folder, tiny_wan, monkeypatch, capsys, module, line, message):
    if "--pretrained_model_name_or_path" not in line and "--compare" not in line:
        line = [*line, "--pretrained_model_name_or_path", tiny_wan]
    assert message in end_of(train_ltd.run_script, module, line, monkeypatch, capsys)


@pytest.mark.parametrize("run_script", [mistakes.run_script, train_ltd.run_script])
@pytest.mark.parametrize("fault", [lambda: int("three"), lambda: {}["b"], lambda: sys.exit(75)])
def test_a_fault_of_ours_keeps_its_traceback(run_script, fault):
    with pytest.raises((ValueError, KeyError, SystemExit)) as error:
        run_script(print, fault)
    assert getattr(error.value, "code", 75) == 75


@pytest.mark.parametrize("fault", [lambda: train_ltd.positive_int("three"), lambda: videos.contact_sheet([], "a", 1)])
def test_value_errors_of_python_are_faults_of_ours(fault):
    """They come from a statement of ours all the same: a number cannot be read, two lists differ in length."""
    with pytest.raises(ValueError) as error:
        fault()
    assert train_ltd.user_message(error.value) is None and mistakes.user_message(error.value) is None


def test_mistakes_in_a_folder_that_is_reached_by_a_link(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    spec = importlib.util.spec_from_file_location("by_link", tmp_path / "link/examples/gallery.py")
    by_link = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(by_link)
    with pytest.raises(ValueError) as error:
        by_link.build_samples_page(tmp_path / "none")
    for message in (train_ltd.user_message(error.value), mistakes.user_message(error.value)):
        assert message == str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gallery.py none", "generate.py --prompt a --output_dir out --lora none"])
def test_as_a_process(tmp_path, script):
    name, *words = script.split()
    command = [sys.executable, ROOT / "examples" / name, *words]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | CPU, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
