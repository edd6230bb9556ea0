"""Save and go on, bit for bit: other settings, signals, kill -9, files that rot, disks that are full."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, STEPS, launch, launcher, run_script, wait_for
from helpers import assert_same, checkpoints, flip, kill, run_in_a_process, same_weights, strike, weights
from safetensors.torch import load_file

import train_ltd

# --- Resume ----------------------------------------------------------------------------------------------------------


def test_resume_by_path_equals_latest(run, tmp_path):
    straight = run(max_train_steps=3, checkpointing_steps=1)
    other = run(output_dir=tmp_path / "other", max_train_steps=3, resume_from_checkpoint=straight / "checkpoint-1")
    assert_same(weights(straight, "lora"), weights(other, "lora"))


def test_resume_of_a_finished_run_changes_nothing(run):
    first = weights(run(), "lora")
    assert_same(first, weights(run(resume_from_checkpoint="latest"), "lora"))


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_resume_with_two_processes(flags, tmp_path, train_type):
    kwargs = {"train_type": train_type, "rank": 4 if train_type == "lora" else None, "max_train_steps": 4}
    kwargs |= {"checkpointing_steps": 2, "gradient_accumulation_steps": 1, "use_ema": True}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    result = launch(flags(output_dir=straight, **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    assert "| hardware | 2 x" in (straight / "README.md").read_text()
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {p.name for p in (resumed / "checkpoint-2").iterdir()}
    result = launch(flags(output_dir=resumed, resume_from_checkpoint="latest", **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    assert_same(weights(straight, train_type), weights(resumed, train_type))


def test_checkpoints_rotate_and_hold_ready_weights(run):
    output = run(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(p.name for p in output.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]
    names = {p.name for p in (output / "checkpoint-5").iterdir()}
    assert names == {
        *(train_ltd.LORA_FILE, "run.safetensors", "settings.json", train_ltd.SUMS_FILE),
        *("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "metrics.jsonl"),
    }
    assert_same(load_file(output / train_ltd.LORA_FILE), load_file(output / "checkpoint-5" / train_ltd.LORA_FILE))


def test_incomplete_checkpoint_is_ignored(run, caplog):
    output = run(max_train_steps=1)
    (output / "checkpoint-9").mkdir()
    (output / ".checkpoint-8.partial").mkdir()
    with caplog.at_level(logging.INFO):
        run(max_train_steps=2, resume_from_checkpoint="latest")
    assert any("resumed" in r.message and "checkpoint-1" in r.message for r in caplog.records)


def test_nothing_to_resume_starts_afresh(run, caplog):
    run(resume_from_checkpoint="latest")
    assert any("starting from step 0" in r.message for r in caplog.records)


# --- Signals and the clock -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", train_ltd.STOP_SIGNALS)
def test_signal_stops_with_a_checkpoint(run, straight, monkeypatch, name):
    """In the middle of the third update: its first half is dropped, and the resumed run makes it again."""
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        strike(patch, train_ltd, "predict_flow", 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            run(**STEPS | {"checkpointing_steps": 100})
    assert stop.value.code == train_ltd.EXIT_STOPPED == 75
    assert signal.getsignal(number) == before
    folder = run(**STEPS, resume_from_checkpoint="latest")
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-3"] and same_weights(folder, straight)


def test_a_signal_that_is_ignored_from_the_start_stays_so(run, straight, monkeypatch):
    """`nohup` ignores SIGHUP: the run that it starts outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            strike(patch, train_ltd, "predict_flow", 5, lambda: os.kill(os.getpid(), signal.SIGHUP))
            folder = run(**STEPS)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoints(folder)[-1] == "checkpoint-3" and same_weights(folder, straight)


def test_clock_stops_with_a_checkpoint(run, straight):
    with pytest.raises(SystemExit) as stop:
        run(**STEPS, max_train_hours=1e-9)
    assert stop.value.code == 75
    folder = run(**STEPS, resume_from_checkpoint="latest")
    assert checkpoints(folder)[0] == "checkpoint-0" and same_weights(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("strikes_at", ["evaluation", "samples"])
def test_notice_during_validation(run, monkeypatch, tmp_path, strikes_at):
    """The next sample is left out, the checkpoint written; the resumed run makes what lacks, and ends the same."""
    looks = {"validation_fraction": 0.3, "eval_steps": 2, "validation_steps": 2, "validation_prompt": ["a", "b"]}
    kwargs = STEPS | looks | {"max_train_steps": 4, "validation_num_inference_steps": 1}
    whole = run(output_dir=tmp_path / "whole", **kwargs)
    name, call = {"evaluation": ("motion_errors", 16), "samples": ("export_to_video", 3)}[strikes_at]  # both at step 2
    with monkeypatch.context() as patch:
        strike(patch, train_ltd, name, call, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            run(**kwargs)
    folder = tmp_path / "run"
    assert stop.value.code == 75 and checkpoints(folder)[-1] == "checkpoint-2"
    looked = [row["step"] for row in train_ltd.read_metrics(folder) if "val/mse" in row]
    assert looked == [0, 2]  # held-out errors are quick, and are finished
    samples = [path.stem for path in sorted((folder / "samples").glob("step-000002-*"))]
    assert samples == ([] if strikes_at == "evaluation" else ["step-000002-0-a"])
    run(**kwargs, resume_from_checkpoint="latest")
    assert same_weights(folder, whole)
    rows = [[r for r in train_ltd.read_metrics(f) if "val/mse" in r] for f in (folder, whole)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [0, 2, 4]
    videos = [sorted((f / "samples").iterdir()) for f in (folder, whole)]
    assert [v.read_bytes() for v in videos[0]] == [v.read_bytes() for v in videos[1]] and len(videos[0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_launcher_that_is_terminated(run, flags, tmp_path, processes):
    """Only the launcher gets the signal. With one process it dies of it at once, and passes nothing on."""
    folder = tmp_path / "run"
    kwargs = {"checkpointing_steps": 100_000, "lr_scheduler": "constant"}  # others depend on the number of steps
    command = launcher(processes) + flags(max_train_steps=100_000, **kwargs)
    env = os.environ | CPU
    with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: len(lines(folder)) >= 2, process)
        process.terminate()
        said = process.stderr.read()  # ends when the last process that holds the pipe has ended
    assert process.returncode != 0
    (name,) = checkpoints(folder)
    assert f"stopped at step {name.split('-')[1]}; to go on, add --resume_from_checkpoint latest" in said
    assert train_ltd.is_intact(folder / name)
    saved = json.loads((folder / name / "settings.json").read_text())
    assert saved["settings"]["samples_per_update"] == processes
    # Two processes are two micro-batches: one goes on where they stopped, to where it would have come alone.
    step = saved["state"]["step"] + 1
    kwargs |= {"max_train_steps": step, "gradient_accumulation_steps": processes}
    resumed = run(resume_from_checkpoint="latest", **kwargs)
    assert same_weights(resumed, run(output_dir=tmp_path / "alone", **kwargs))


def lines(folder: Path) -> list[str]:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.is_file() else []


# --- Processes that die ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_while_an_old_checkpoint_is_removed(run, flags, forks, straight, tmp_path):
    """What is left of it must not look like a checkpoint."""
    kwargs, folder = STEPS | {"checkpoints_total_limit": 1}, tmp_path / "run"
    process = forks.Process(target=killed_in_removal, args=(flags(**kwargs),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoints(folder) == ["checkpoint-2"] and list(folder.glob(".checkpoint-1.*"))
    assert same_weights(run(**kwargs, resume_from_checkpoint="latest"), straight)
    assert checkpoints(folder) == ["checkpoint-3"] and not list(folder.glob(".checkpoint-*"))


def killed_in_removal(line: list[str]) -> None:
    strike(pytest.MonkeyPatch(), shutil, "rmtree", 1, kill)
    run_in_a_process(line)


def killed_by_its_own_clock(line: list[str], checkpoint: int, seconds: float) -> None:
    """After so many seconds of computing, counted from its start or from when it has written `checkpoint` ones."""

    def start_the_clock():
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal nobody catches

    if checkpoint:
        strike(pytest.MonkeyPatch(), train_ltd, "save_checkpoint", checkpoint + 1, start_the_clock)
    else:
        start_the_clock()
    run_in_a_process(line)


@pytest.mark.slow
def test_kill_at_random_moments(run, flags, forks, tmp_path):
    """Again and again, wherever it strikes: while it starts, or soon after one of the next steps."""
    moments, folder = random.Random(0), tmp_path / "run"
    kwargs = STEPS | {"max_train_steps": 24}
    line = flags(**kwargs, resume_from_checkpoint="latest")
    for steps in (0, 1, 2, 3, 0, 4):
        seconds = moments.uniform(0.001, 0.05 if steps else 0.5)
        process = forks.Process(target=killed_by_its_own_clock, args=(line, steps, seconds))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGPROF
        assert all(train_ltd.is_intact(c) for c in train_ltd.list_checkpoints(folder))
    assert 10 <= len(checkpoints(folder)) < 24
    straight = run(output_dir=tmp_path / "straight", **kwargs)
    assert same_weights(run(**kwargs, resume_from_checkpoint="latest"), straight)
    assert not list(folder.glob(".checkpoint-*"))


@pytest.mark.slow
def test_loader_process_that_dies(run, straight, monkeypatch):
    with monkeypatch.context() as patch:
        strike(patch, train_ltd.LatentDataset, "__getitem__", 5, kill)
        with pytest.raises(RuntimeError, match=r"DataLoader worker .* is killed by signal: Killed"):
            run(**STEPS, dataloader_num_workers=1)
    assert same_weights(run(**STEPS, dataloader_num_workers=1, resume_from_checkpoint="latest"), straight)


# --- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("flip", "optimizer.bin"),
        ("flip", "settings.json"),
        ("truncate", "settings.json"),
        ("truncate", train_ltd.LORA_FILE),
        ("remove", "scheduler.bin"),
    ],
)
def test_damaged_checkpoint_is_left_out(run, straight, caplog, damage, name):
    caplog.set_level("INFO")
    newest, before = straight / "checkpoint-3", weights(straight)
    path = newest / name
    if damage == "flip":
        flip(path, path.stat().st_size // 2)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint .*checkpoint-3 is damaged"):
        run(output_dir=straight, **STEPS, resume_from_checkpoint=newest)
    run(output_dir=straight, **STEPS, resume_from_checkpoint="latest")
    assert any(f"checkpoint-3 is damaged and left out: {name}" in r.message for r in caplog.records)
    assert any("resumed" in r.message and "checkpoint-2" in r.message for r in caplog.records)
    assert len(list(straight.glob("checkpoint-3.damaged-*"))) == 1
    assert all(torch.equal(v, before[k]) for k, v in weights(straight).items()) and train_ltd.is_intact(newest)


def test_sums_are_those_of_sha256sum(straight):
    folder = straight / "checkpoint-3"
    files = {path.name: path for path in folder.iterdir() if path.name != train_ltd.SUMS_FILE}
    rows = [line.split("  ") for line in (folder / train_ltd.SUMS_FILE).read_text().splitlines()]
    assert {name for _, name in rows} == set(files)
    assert all(hashlib.sha256(files[name].read_bytes()).hexdigest() == value for value, name in rows)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_nothing_is_unpickled_from_a_checkpoint(run, straight, tmp_path, monkeypatch, name):
    """Whoever writes a checkpoint can write its sums, too."""
    monkeypatch.chdir(tmp_path)
    folder = straight / "checkpoint-3"
    assert (folder / name).is_file()
    (folder / name).write_bytes(pickle.dumps(Evil()))
    sums = train_ltd.file_sums(folder).items()
    (folder / train_ltd.SUMS_FILE).write_text("".join(f"{value}  {name}\n" for name, value in sums))
    # accelerate itself goes on without random states that it cannot read
    with contextlib.nullcontext() if "random" in name else pytest.raises(pickle.UnpicklingError):
        run(output_dir=straight, **STEPS | {"max_train_steps": 4}, resume_from_checkpoint="latest")
    assert not (tmp_path / "executed").exists()


# --- Disks and folders -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3_000, 30_000], ids=["a cache entry", "a checkpoint"])
def test_full_disk(run, flags, forks, straight, tmp_path, limit):
    """A limit on the size of a file stands for it: the same calls fail, and with as little of an `OSError`.

    What is written is complete or absent, so that the same command goes on once there is room.
    """
    kwargs = {"cache_dir": tmp_path / "small", "resume_from_checkpoint": "latest"}
    process = forks.Process(target=run_on_a_small_disk, args=(limit, flags(**STEPS, **kwargs), tmp_path / "said"))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert not checkpoints(tmp_path / "run")
    assert bool(list((tmp_path / "small/text").glob("*.safetensors"))) == (limit == 30_000)
    resumed = run(**STEPS, **kwargs)
    assert same_weights(resumed, straight)
    assert not list(resumed.glob(".checkpoint-*"))


def run_on_a_small_disk(limit: int, line: list[str], said: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    run_script(line, CPU, said)


def test_older_checkpoints_outlive_a_full_disk(run, straight, monkeypatch):
    """The fourth checkpoint fails halfway, as torch.save does."""

    def full():
        raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file")

    with monkeypatch.context() as patch:
        strike(patch, train_ltd, "save_weights", 1, full)
        with pytest.raises(RuntimeError, match="PytorchStreamWriter failed"):
            run(output_dir=straight, **STEPS | {"max_train_steps": 4}, resume_from_checkpoint="latest")
    assert checkpoints(straight) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert train_ltd.is_intact(straight / "checkpoint-3")
    run(output_dir=straight, **STEPS | {"max_train_steps": 4}, resume_from_checkpoint="latest")
    assert checkpoints(straight)[-1] == "checkpoint-4"


@pytest.mark.parametrize("what", ["save_weights", "model_card", "log_metrics"])
def test_disk_that_fills_at_the_end(run, straight, monkeypatch, tmp_path, what):
    """Weights, card or a line of the log: the system's message gets through, and `latest` mends it."""
    calls = {"save_weights": 4, "model_card": 1, "log_metrics": 3}

    def full():
        raise OSError(28, "No space left on device")

    owner, name = {"log_metrics": (train_ltd.Accelerator, "log")}.get(what, (train_ltd, what))
    with monkeypatch.context() as patch:
        strike(patch, owner, name, calls[what], full)
        with pytest.raises(OSError, match="No space left on device"):
            run(**STEPS)
    assert checkpoints(tmp_path / "run") == [f"checkpoint-{n}" for n in range(1, 3 + (what != "log_metrics"))]
    assert same_weights(run(**STEPS, resume_from_checkpoint="latest"), straight)
    assert (tmp_path / "run/README.md").is_file()


def test_second_run_into_one_folder_is_refused(run, tmp_path):
    folder = run(max_train_steps=1)
    with open(folder / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"--output_dir .*: another run is writing there"):
            run(max_train_steps=1, overwrite_output_dir=True)
    assert checkpoints(folder) == ["checkpoint-1"]
    run(max_train_steps=1, overwrite_output_dir=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_with_checkpoints_is_refused(run, straight):
    """Two runs in one folder would be one in the eyes of `latest`. Nothing in it is touched."""
    before = files(straight)
    with pytest.raises(ValueError) as error:
        run(output_dir=straight, **STEPS)
    message = str(error.value)
    for part in (f"{straight} holds checkpoint-3 of an earlier run", "--resume_from_checkpoint latest"):
        assert part in message
    assert "another folder" in message and "--overwrite_output_dir" in message
    with pytest.raises(ValueError, match="holds checkpoint-3 of an earlier run"):  # whose path lies ahead of this one
        run(output_dir=straight, **STEPS, resume_from_checkpoint=straight / "checkpoint-1")
    assert files(straight) == before


def test_an_earlier_run_is_overwritten(run, straight, caplog):
    """The limit must not drop the new run's checkpoints for the old one's, nor `latest` go back to those."""
    caplog.set_level("INFO")
    (straight / "samples").mkdir()
    (straight / "samples/step-000009-0.mp4").touch()
    kwargs = STEPS | {"output_dir": straight, "checkpoints_total_limit": 1}
    run(**kwargs | {"max_train_steps": 2}, overwrite_output_dir=True)
    assert checkpoints(straight) == ["checkpoint-2"] and not list(straight.glob(".checkpoint-*"))
    assert [row["step"] for row in train_ltd.read_metrics(straight)] == [1, 2]
    assert not (straight / "samples").exists()
    assert sum("it is deleted" in r.message for r in caplog.records) == 3
    run(**kwargs, resume_from_checkpoint="latest")
    assert any("checkpoint-2, step 2" in r.message for r in caplog.records)


def test_an_earlier_run_is_overwritten_from_an_older_checkpoint(run, straight, tmp_path):
    """One of its own, or one of another folder, where then none of the earlier run is left."""
    before = weights(straight)
    kwargs = STEPS | {"overwrite_output_dir": True}
    run(output_dir=straight, **kwargs, resume_from_checkpoint=straight / "checkpoint-2")
    assert checkpoints(straight) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert_same(weights(straight), before)
    other = run(output_dir=tmp_path / "other", **STEPS | {"max_train_steps": 2}, learning_rate=1e-3)
    (other / "samples").mkdir()
    (other / "samples/step-000001-0.mp4").touch()
    run(output_dir=other, **kwargs, resume_from_checkpoint=straight / "checkpoint-2")
    assert checkpoints(other) == ["checkpoint-3"] and not (other / "samples").exists()
    assert [row["step"] for row in train_ltd.read_metrics(other)] == [3]
    assert_same(weights(other), before)


@pytest.mark.parametrize("asked", ["latest", "checkpoint-3"])
def test_a_checkpoint_of_an_earlier_version_is_refused(run, straight, asked):
    """In one line that says what can be done with it; a fresh run over it is no matter."""
    path = straight / "checkpoint-3/settings.json"
    contents = json.loads(path.read_text())
    assert contents.pop("format") == train_ltd.CHECKPOINT_FORMAT
    path.write_text(json.dumps(contents))
    kwargs = STEPS | {"output_dir": straight}
    with pytest.raises(ValueError) as error:
        run(**kwargs, resume_from_checkpoint=asked if asked == "latest" else straight / asked)
    message = str(error.value)
    assert "checkpoint-3 was made by an earlier version" in message and "\n" not in message
    assert "--init_lora" in message and "--transformer_path" in message
    run(**kwargs, overwrite_output_dir=True)
