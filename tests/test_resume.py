"""What a resumed run may change, what it may not, and how it ends when nobody asked for it."""

import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, STEPS, run_script, tiny_run, train_here, wait_for, write_line
from corpus import make_videos
from diffusers import WanTransformer3DModel
from helpers import assert_same, checkpoints, metrics, weights

import train_ltd

SHORT = {"max_train_steps": 2, "checkpointing_steps": 2, "lr_scheduler": "constant"}


@pytest.fixture(scope="module")
def begun_run(tiny_wan, clips, filled_cache, tmp_path_factory):
    values = tiny_run(tiny_wan, clips, tmp_path_factory.mktemp("begun")) | {"cache_dir": filled_cache}
    return train_here(write_line(**values | SHORT))


@pytest.fixture
def begun(begun_run, tmp_path):
    """The output folder of a run of two steps, to go on with."""
    return shutil.copytree(begun_run, tmp_path / "run")


def resume(run, **kwargs):
    return run(**SHORT | {"max_train_steps": 3, "resume_from_checkpoint": "latest"} | kwargs)


# --- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 8, "lora_alpha": 4}, "rank 4 -> 8"),
        ({"lora_alpha": 2}, "lora_alpha 4 -> 2"),
        ({"lora_target_modules": ["to_q"]}, "lora_target_modules"),
        ({"train_type": "full", "rank": None}, "train_type lora -> full"),
        ({"use_ema": True}, "use_ema False -> True"),
        ({"loss": "mse"}, "loss ltd -> mse"),
        ({"flow_shift": 1.0}, "flow_shift 3.0 -> 1.0"),
        ({"min_sigma": 0.1}, "min_sigma 0.0 -> 0.1"),
        ({"max_sigma": 0.9}, "max_sigma 1.0 -> 0.9"),
        ({"weighting_scheme": "none"}, "weighting_scheme logit_normal -> none"),
        ({"fps": 8.0}, "fps 16.0 -> 8.0"),
        ({"height": 48}, "height 32 -> 48"),
        ({"num_frames": 5}, "num_frames 9 -> 5"),
        ({"caption_dropout": 0.5}, "caption_dropout 0.1 -> 0.5"),
        ({"lora_dropout": 0.5}, "lora_dropout 0.0 -> 0.5"),
        ({"ltd_window": 5}, "ltd_window 3 -> 5"),
        ({"ltd_scale": 2.0}, "ltd_scale 1.0 -> 2.0"),
        ({"ltd_strength": 3.0}, "ltd_strength 1.0 -> 3.0"),
        ({"ltd_normalize": True}, "ltd_normalize False -> True"),
        ({"trigger_word": "ohwx"}, "trigger_word None -> ohwx"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler constant -> cosine"),
        ({"adam_weight_decay": 0.5}, "adam_weight_decay 0.01 -> 0.5"),
        ({"max_grad_norm": 0.5}, "max_grad_norm 1.0 -> 0.5"),
        ({"optimizer": "adamw8bit"}, "optimizer adamw -> adamw8bit"),
        ({"seed": 4}, "seed 3 -> 4"),
        ({"cache_dtype": "float32"}, "cache_dtype float16 -> float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_before_anything_is_encoded(run, begun, monkeypatch, change, named):
    monkeypatch.setattr(train_ltd, "prepare_data", lambda *args: pytest.fail("clips were encoded"))
    with pytest.raises(ValueError, match="was made with other settings") as error:
        resume(run, **change)
    assert named in str(error.value)
    assert "--init_lora" in str(error.value)


def test_all_differences_are_named_at_once(run, begun):
    with pytest.raises(ValueError) as error:
        resume(run, loss="mse", seed=4, fps=8)
    for part in ("loss ltd -> mse", "seed 3 -> 4", "fps 16.0 -> 8.0"):
        assert part in str(error.value)


def test_another_base_model_is_refused(run, begun, tiny_wan, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_wan, other)
    resume(run, pretrained_model_name_or_path=other, output_dir=shutil.copytree(begun, tmp_path / "same"))
    transformer = WanTransformer3DModel.from_pretrained(other, subfolder="transformer")
    with torch.no_grad():
        transformer.proj_out.weight.mul_(1.01)
    transformer.save_pretrained(other / "transformer")
    with pytest.raises(ValueError, match="another base model"):
        resume(run, pretrained_model_name_or_path=other)


def test_other_captions_or_clips_are_refused(run, clips, tmp_path):
    data = shutil.copytree(clips, tmp_path / "data")
    run(train_data_dir=data, **SHORT)
    moved = shutil.copytree(data, tmp_path / "moved")
    same = shutil.copytree(tmp_path / "run", tmp_path / "same")
    resume(run, train_data_dir=moved, output_dir=same)
    table = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(table.replace("number 3", "number three"))
    with pytest.raises(ValueError, match="other training clips or captions"):
        resume(run, train_data_dir=data)
    (data / "metadata.jsonl").write_text(table)
    names = make_videos(data, count=1, first=50)
    shutil.move(data / names[0], data / "3.mp4")
    with pytest.raises(ValueError, match="other training clips or captions"):
        resume(run, train_data_dir=data)


# --- Allowed ---------------------------------------------------------------------------------------------------------


def test_what_may_change_freely_changes_nothing(run, begun, tmp_path):
    straight = run(output_dir=tmp_path / "straight", **SHORT | {"max_train_steps": 3})
    resumed = resume(
        run,
        logging_steps=2,
        checkpoints_total_limit=5,
        validation_prompt="a square",
        validation_num_inference_steps=1,
        max_skipped=0.5,
        report_to="none",
        max_train_hours=9,
        license="mit",
    )
    # The number of steps is a change with effect; on a constant schedule it has none.
    assert_same(weights(straight), weights(resumed))


def test_switches_of_memory_are_logged(run, begun, tmp_path, caplog):
    straight = run(output_dir=tmp_path / "straight", **SHORT | {"max_train_steps": 3})
    with caplog.at_level(logging.WARNING):
        resumed = resume(run, gradient_checkpointing="none")
    assert any("no longer exact to the bit" in r.message and "full -> none" in r.message for r in caplog.records)
    for key, value in weights(straight).items():
        torch.testing.assert_close(weights(resumed)[key], value, rtol=0, atol=1e-5)


def test_learning_rate_is_applied(run, begun, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        resumed = resume(run, learning_rate=5e-3)
    assert metrics(resumed, "lr")[3] == 5e-3
    assert any("learning_rate 0.01 -> 0.005" in r.message for r in caplog.records)
    card = (resumed / "README.md").read_text()
    assert "from step 2 on: learning_rate 0.01 -&gt; 0.005" in card
    state = torch.load(resumed / "checkpoint-3/optimizer.bin", weights_only=True)
    assert {group["lr"] for group in state["param_groups"]} == {5e-3}


def test_learning_rate_of_a_schedule_is_its_base(run):
    """The rate of a resumed step is that of the new base at the same place of the schedule."""
    kwargs = {"lr_scheduler": "linear", "lr_warmup_steps": 0, "checkpointing_steps": 2, "max_train_steps": 4}
    folder = run(**kwargs)
    before = metrics(folder, "lr")
    shutil.rmtree(folder / "checkpoint-4")
    resumed = run(**kwargs, learning_rate=2e-2, resume_from_checkpoint="latest")
    assert metrics(resumed, "lr")[3] == pytest.approx(2 * before[3])


def test_stretched_schedule_is_a_warning(run, caplog):
    kwargs = {"lr_scheduler": "cosine", "lr_warmup_steps": 0, "checkpointing_steps": 2}
    run(max_train_steps=2, **kwargs)
    with caplog.at_level(logging.WARNING):
        run(max_train_steps=4, resume_from_checkpoint="latest", **kwargs)
    assert any("--lr_scheduler cosine is stretched" in record.message for record in caplog.records)


def test_batch_and_accumulation_may_trade_places(run, begun):
    folder = begun
    shutil.rmtree(folder)
    run(**SHORT, gradient_accumulation_steps=2)
    resumed = resume(run, train_batch_size=2)
    assert checkpoints(resumed) == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(ValueError, match="samples_per_update 2 -> 3"):
        resume(run, train_batch_size=3, max_train_steps=4)


def test_other_versions_are_a_warning(run, begun, caplog):
    path = begun / "checkpoint-2/settings.json"
    text = path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.9.0"')
    path.write_text(text)
    sums = train_ltd.file_sums(path.parent).items()
    (path.parent / train_ltd.SUMS_FILE).write_text("".join(f"{value}  {name}\n" for name, value in sums))
    with caplog.at_level(logging.WARNING):
        resume(run)
    assert any("2.9.0" in record.message for record in caplog.records)


def test_a_checkpoint_of_before_a_flag_was_made_with_its_default(run, begun):
    path = begun / "checkpoint-2/settings.json"
    contents = json.loads(path.read_text())
    for name in ("ltd_strength", "first_frame_share", "sizes"):
        del contents["settings"]["flags"][name]
    path.write_text(json.dumps(contents))
    sums = train_ltd.file_sums(path.parent).items()
    (path.parent / train_ltd.SUMS_FILE).write_text("".join(f"{value}  {name}\n" for name, value in sums))
    with pytest.raises(ValueError, match=r"other settings: ltd_strength 1\.0 -> 3\.0\."):
        resume(run, ltd_strength=3)
    resume(run)


def test_checkpoint_holds_no_path_of_this_machine(begun, tmp_path):
    text = (begun / "checkpoint-2/settings.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["settings"]["flags"]["rank"] == 4


def test_hours_of_all_parts_are_added(run, begun):
    path = begun / "checkpoint-2/settings.json"
    contents = json.loads(path.read_text())
    assert 0 < contents["state"]["hours"] < 1
    contents["state"]["hours"] += 41
    path.write_text(json.dumps(contents))
    sums = train_ltd.file_sums(path.parent).items()
    (path.parent / train_ltd.SUMS_FILE).write_text("".join(f"{value}  {name}\n" for name, value in sums))
    resumed = resume(run)
    assert ", 41." in (resumed / "README.md").read_text()


def test_curves_go_on_on_another_machine(run, tmp_path):
    """Which has the checkpoint alone, as `--resume_from_checkpoint hub` fetches it."""
    kwargs = STEPS | {"validation_fraction": 0.2, "eval_steps": 1, "lr_scheduler": "constant"}
    first = run(**kwargs | {"max_train_steps": 2})
    shutil.copytree(first / "checkpoint-2", tmp_path / "fresh/checkpoint-2")
    run(**kwargs, output_dir=tmp_path / "fresh", resume_from_checkpoint="latest")
    evaluated = [row["step"] for row in train_ltd.read_metrics(tmp_path / "fresh") if "val/mse" in row]
    assert evaluated == [0, 1, 2, 3]


def test_a_renamed_copy_leaves_the_checkpoint_alone(run, tmp_path):
    run(**STEPS)
    best = shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "run/best")
    run(**STEPS, resume_from_checkpoint=best, overwrite_output_dir=True)
    assert checkpoints(tmp_path / "run") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not list((tmp_path / "run").glob("*damaged*"))


def test_a_checkpoint_beyond_the_last_step_is_refused(run, tmp_path):
    run(**STEPS)
    with pytest.raises(ValueError, match=r"checkpoint-3 is of step 3, and the run ends at step 2: give more by"):
        run(**STEPS | {"max_train_steps": 2}, resume_from_checkpoint="latest")


def test_another_commit_of_the_base_is_refused_with_its_remedy(run, tmp_path):
    folder = run(**STEPS) / "checkpoint-3"
    settings = train_ltd.read_checkpoint(folder)["settings"]
    saved = json.loads((folder / "settings.json").read_text())
    saved["settings"]["base"] = "Wan-AI/Wan@1234:None"
    (folder / "settings.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="--revision 1234 takes that of then"):
        train_ltd.compare_settings(folder, settings | {"base": "Wan-AI/Wan@5678:None"})


# --- Ends that nobody asked for --------------------------------------------------------------------------------------


def endless(flags) -> list[str]:
    command = [sys.executable, str(ROOT / "train_ltd.py")]
    return command + flags(max_train_steps=100_000, checkpointing_steps=100_000, lr_scheduler="constant")


def has_logged(folder, count: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.is_file() and len(path.read_text().splitlines()) >= count


@pytest.mark.slow
def test_a_lost_reader_does_not_end_training(flags, warm_cache, tmp_path):
    """As after `2>&1 | tee log`, when `tee` is gone: it trains on, and a signal still leaves a checkpoint."""
    folder = tmp_path / "run"
    with subprocess.Popen(
        endless(flags), env=os.environ | CPU, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        wait_for(lambda: has_logged(folder, 1), process)
        process.stdout.close()
        count = len((folder / "metrics.jsonl").read_text().splitlines())
        wait_for(lambda: has_logged(folder, count + 3), process)
        process.send_signal(signal.SIGINT)
        process.wait()
    assert process.returncode == train_ltd.EXIT_STOPPED
    (name,) = checkpoints(folder)
    assert train_ltd.is_intact(folder / name)


@pytest.mark.slow
def test_ctrl_c_under_tee_in_a_terminal(flags, warm_cache, tmp_path):
    """A real terminal sends the signal to the whole group: `tee` dies of it first."""
    folder = tmp_path / "run"
    words = " ".join(f"'{word}'" for word in endless(flags))
    script = f"set -o pipefail; {words} 2>&1 | tee {tmp_path}/log"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe("bash", ["bash", "-c", script], os.environ | CPU)
    try:
        while not has_logged(folder, 1):
            os.read(terminal, 1024)  # else `tee` would wait for us
        os.write(terminal, b"\x03")
        status = None
        while status is None:
            try:
                os.read(terminal, 1024)
            except OSError:  # the terminal is closed when all processes have ended
                status = os.waitpid(pid, 0)[1]
    finally:
        os.close(terminal)
    (name,) = checkpoints(folder)
    assert train_ltd.is_intact(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_with_a_checkpoint_unless_nohup(flags, warm_cache, forks, tmp_path, ignored):
    folder = tmp_path / "run"
    line = endless(flags)[2:]
    process = forks.Process(target=run_without_a_terminal, args=(line, ignored, tmp_path / "said"), daemon=True)
    process.start()
    wait_for(lambda: has_logged(folder, 1), process)
    os.kill(process.pid, signal.SIGHUP)
    if ignored:
        count = len((folder / "metrics.jsonl").read_text().splitlines())
        wait_for(lambda: has_logged(folder, count + 3), process)
        process.terminate()
    process.join()
    assert process.exitcode == train_ltd.EXIT_STOPPED
    assert len(checkpoints(folder)) == 1


def run_without_a_terminal(line: list[str], ignored: bool, said: Path) -> None:
    # Said in both cases: pytest itself may have been started by nohup.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    run_script(line, CPU, said)


def test_accelerates_own_dynamo_is_refused(run, monkeypatch):
    """As `accelerate launch --dynamo_backend inductor` asks for it."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="use --torch_compile"):
        run()


# --- Nothing is lost -------------------------------------------------------------------------------------------------


def test_a_file_of_somebody_elses_does_no_harm(run, begun):
    """A preview, a note, a file manager's own: what was written is whole."""
    (begun / "checkpoint-2/Thumbs.db").write_bytes(b"pictures")
    assert checkpoints(resume(run)) == ["checkpoint-2", "checkpoint-3"]


def test_a_damaged_checkpoint_is_kept_aside(run):
    folder = run(max_train_steps=3, checkpointing_steps=1, lr_scheduler="constant")
    (folder / "checkpoint-3/optimizer.bin").write_bytes(b"damage")
    run(max_train_steps=3, checkpointing_steps=1, lr_scheduler="constant", resume_from_checkpoint="latest")
    (aside,) = folder.glob("checkpoint-3.damaged-*")
    assert (aside / "optimizer.bin").read_bytes() == b"damage"
    assert checkpoints(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_no_intact_checkpoint_is_an_error_and_not_a_new_run(run, begun):
    (begun / "checkpoint-2/optimizer.bin").write_bytes(b"damage")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* is intact"):
        resume(run)
    assert (begun / "checkpoint-2").is_dir() and (begun / "metrics.jsonl").read_text()


def test_a_checkpoint_that_lies_elsewhere_by_a_link(run, begun, tmp_path):
    shutil.move(begun / "checkpoint-2", tmp_path / "big disk")
    (begun / "checkpoint-2").symlink_to(tmp_path / "big disk")
    resumed = resume(run, checkpoints_total_limit=1)
    assert checkpoints(resumed) == ["checkpoint-3"] and [2, 3] == sorted(metrics(resumed))[-2:]
    assert train_ltd.is_intact(tmp_path / "big disk")


def test_finished_results_without_checkpoints_are_not_replaced_by_latest(run, begun):
    shutil.rmtree(begun / "checkpoint-2")
    before = (begun / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="holds the results of a finished run"):
        resume(run)
    assert (begun / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_longer_run_does_not_warm_up_again(run):
    kwargs = {"lr_scheduler": "constant_with_warmup", "checkpointing_steps": 20}
    folder = run(max_train_steps=20, logging_steps=20, **kwargs)
    resumed = run(
        max_train_steps=100, max_train_hours=None, resume_from_checkpoint="latest", **kwargs | {"logging_steps": 1}
    )
    assert resumed == folder and metrics(resumed, "lr")[21] == 1e-2
    saved = json.loads((folder / "checkpoint-100/settings.json").read_text())["settings"]["flags"]
    assert saved["lr_warmup_steps"] == 1
