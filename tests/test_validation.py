"""Errors on held-out clips, samples, and where both are logged."""

import json
import logging
import re
from typing import ClassVar

import av
import numpy as np
import pytest
import torch
from conftest import HEIGHT, NUM_FRAMES, WIDTH, launch
from helpers import LOOKS, strike

import train_ltd


def test_held_out_errors_repeat_to_the_last_digit(run, tmp_path):
    kwargs = {"validation_fraction": 0.4, "eval_steps": 1, "max_train_steps": 2}
    first, second = (run(output_dir=tmp_path / name, **kwargs) for name in "ab")
    rows = [
        [line for line in (f / "metrics.jsonl").read_text().splitlines() if "val/mse" in line] for f in (first, second)
    ]
    assert len(rows[0]) == 3 and rows[0] == rows[1]
    row = json.loads(rows[0][0])
    assert {f"val/mse_sigma_{s}" for s in train_ltd.EVAL_SIGMAS} < set(row)
    assert row["val/mse"] == pytest.approx(sum(row[f"val/mse_sigma_{s}"] for s in train_ltd.EVAL_SIGMAS) / 5)


def test_rows_of_evaluate_are_clips_and_sigmas(prepare):
    """For programs that measure by it: any sigmas, and `measure`'s own tensors in the row."""
    _, held_out, files, args = prepare(validation_fraction=0.4)
    wan = train_ltd.identify_wan(args)
    dataset = train_ltd.LatentDataset(held_out, files, args)
    model = train_ltd.load_transformer(args, wan)
    bounds = dataset.motion_bounds(torch.device("cpu"))
    accelerator = train_ltd.build_accelerator(args)

    def measure(prediction, target, latents):
        return {"largest": (prediction - target).abs().max(), "shape": torch.tensor(latents.shape)}

    rows = train_ltd.evaluate(wan, model, dataset, bounds, accelerator, args, sigmas=(0.2, 0.6), measure=measure)
    assert [(row["clip"], row["sigma"]) for row in rows] == [(n, s) for n in range(2) for s in (0.2, 0.6)]
    for row in rows:
        assert row["shape"].tolist() == [1, 16, 3, HEIGHT // 8, WIDTH // 8] and row["largest"] ** 2 > row["mse"]
    values = train_ltd.held_out_metrics(rows, held_out, args)
    assert values["val/mse"] == pytest.approx(np.mean([row["mse"] for row in rows]))
    # One sample by hand: fixed noise, rectified flow, the timestep 1000 sigma.
    sample = {name: tensor[None] for name, tensor in dataset.load_fixed(1).items()}
    with torch.no_grad():
        prediction = model.eval()(
            0.4 * sample["latents"] + 0.6 * sample["noise"], torch.tensor([600.0]), sample["prompt_embeds"]
        ).sample
    error = (prediction - sample["noise"] + sample["latents"]).square()
    assert rows[3]["mse"] == pytest.approx(error.mean().item(), rel=1e-5)


@pytest.mark.slow
def test_held_out_errors_in_two_processes_are_those_of_one(run, flags, tmp_path):
    kwargs = {"validation_fraction": 0.4, "eval_steps": 1, "max_train_steps": 2}
    one = run(output_dir=tmp_path / "one", **kwargs)
    result = launch(flags(output_dir=tmp_path / "two", **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    rows = [
        [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "val/mse" in line]
        for folder in (one, tmp_path / "two")
    ]
    assert rows[0][0] == rows[1][0]


@pytest.mark.slow
def test_samples_are_playable_and_keep_the_pipelines_shift(run, tmp_path):
    """Before step 1 the video depends on the base only: training's --flow_shift must not leak into it."""
    kwargs = {"max_train_steps": 2, **LOOKS}
    first = run(output_dir=tmp_path / "a", flow_shift=1.0, **kwargs) / "samples"
    second = run(output_dir=tmp_path / "b", flow_shift=9.0, **kwargs) / "samples"
    names = [f"step-00000{step}-{name}.mp4" for step in (0, 2) for name in ("0-a", "1-b")]
    assert sorted(p.name for p in first.iterdir()) == names
    assert (first / names[0]).read_bytes() == (second / names[0]).read_bytes()
    with av.open(str(first / names[0])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.width, stream.height, stream.average_rate) == (NUM_FRAMES, WIDTH, HEIGHT, 16)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A dog, jumps!", "0-a-dog-jumps"),
        ('../"quoted"\\ 100 %?', "0-quoted-100"),
        ("一只狗跳起来", "0"),
        ("long " * 50, "0-" + "-".join(["long"] * 12)[:58].strip("-")),
        ("", "0"),
    ],
)
def test_samples_are_named_by_their_prompts(flags, tmp_path, prompt, name):
    """By what every file system and URL takes; the number keeps apart what has the same words."""
    args = train_ltd.parse_args(flags(validation_prompt=[prompt, prompt]))
    first, second = train_ltd.sample_paths(7, args)
    assert first == tmp_path / f"run/samples/step-000007-{name}.mp4" and len(first.name) < 80
    assert second.name == f"step-000007-1{name[1:]}.mp4"


# --- While one waits -------------------------------------------------------------------------------------------------


class Bars(train_ltd.tqdm):
    """The script's bars, kept for a look at them."""

    made: ClassVar[list] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made.append(self)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(train_ltd, "tqdm", Bars)
    yield Bars.made
    for bar in Bars.made:
        bar.close()  # else the screen has a line less for the next test
    Bars.made.clear()


@pytest.mark.slow
def test_the_time_that_is_left_counts_no_pauses(run, monkeypatch, bars, clock):
    """A step takes a second; a sample, held-out errors and a checkpoint a thousand each."""

    def one_second(*args):
        clock.seconds += 1
        return train_ltd.compute_loss(*args)

    for name in ("save_checkpoint", "evaluate", "sample_videos"):
        strike(monkeypatch, train_ltd, name, None, lambda: clock.pass_time(1000))
    run(one_second, **LOOKS, validation_fraction=0.2, checkpointing_steps=3, max_train_steps=6)
    (training,) = [bar for bar in bars if bar.desc == "training"]
    assert training.n == 6 and clock.seconds > 1e6 + 10_000
    assert training.format_dict["elapsed"] == pytest.approx(6, abs=1e-6)


def test_held_out_errors_and_samples_have_bars(run, bars, monkeypatch):
    shown = []
    configure = train_ltd.WanPipeline.set_progress_bar_config

    def record(self, **config):
        shown.append(config)
        configure(self, **config)

    monkeypatch.setattr(train_ltd.WanPipeline, "set_progress_bar_config", record)
    run(validation_fraction=0.3, max_train_steps=1, **LOOKS)
    held_out = [bar for bar in bars if bar.desc == "held-out clips"]
    assert [(bar.total, bar.n) for bar in held_out] == [(2, 2)] * 2
    assert [(config["desc"], config["disable"]) for config in shown] == [
        ("sample 1 of 2", False),
        ("sample 2 of 2", False),
    ] * 2


def test_a_line_of_the_log_is_no_part_of_a_bar(run, capsys, monkeypatch):
    """Each line begins where a line begins, although a bar stands there; one process has no rank."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's, with which the script would set up none
    monkeypatch.setattr(root, "level", root.level)
    run(validation_fraction=0.3, max_train_steps=3, checkpointing_steps=1, **LOOKS)
    error = capsys.readouterr().err
    shown = [line.rsplit("\r", 1)[-1] for line in error.split("\n")]
    logged = [line for line in shown if " INFO " in line]
    assert len(logged) > 15 and "training" in error and "[RANK" not in error
    assert [line for line in logged if not re.match(r"\d\d:\d\d:\d\d INFO ", line)] == []


# --- Trackers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_gets_scalars_frames_and_prompts(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run(report_to="tensorboard", validation_fraction=0.2, checkpointing_steps=1, max_train_steps=3, **LOOKS)
    run(
        report_to="tensorboard",
        validation_fraction=0.2,
        resume_from_checkpoint=output / "checkpoint-1",
        overwrite_output_dir=True,
        max_train_steps=3,
        **LOOKS,
    )
    events = EventAccumulator(str(output / "logs/ltd-wan"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    wanted = {"val/mse", "val/mse_motion", "val/mse_static"}
    wanted |= {f"val/mse_sigma_{sigma}" for sigma in train_ltd.EVAL_SIGMAS}
    assert set(tags["scalars"]) == wanted | set(train_ltd.TRACKED.values())
    assert {tag.split("/")[0] for tag in tags["scalars"]} == {"train", "val", "time"}
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert set(tags["images"]) == {"samples/0-a", "samples/1-b"}
    pictures = events.Images("samples/0-a")
    assert [image.step for image in pictures] == [0, 2, 3]
    assert {image.width * image.height for image in pictures} == {train_ltd.STRIP_FRAMES * WIDTH * HEIGHT}
    (prompts,) = events.Tensors("prompts/text_summary")[0].tensor_proto.string_val
    assert prompts == b"- samples/0-a: a\n- samples/1-b: b"


@pytest.mark.slow
def test_wandb_goes_on_with_its_run(run, monkeypatch):
    """What it is given: one name, the settings, each value at its step, the videos. How it stores them is its own."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows, configs, log, update = [], [], wandb.Run.log, wandb.Config.update

    def record_row(self, row, step=None, **kwargs):
        rows.append(row | {"step": step})
        return log(self, row, step=step, **kwargs)

    def record_config(self, config, **kwargs):
        configs.append(config)
        return update(self, config, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", record_row)
    monkeypatch.setattr(wandb.Config, "update", record_config)
    kwargs = {"report_to": "wandb", "logging_steps": 1, "max_train_steps": 3, **LOOKS}
    output = run(checkpointing_steps=1, **kwargs)
    run(resume_from_checkpoint=output / "checkpoint-1", overwrite_output_dir=True, **kwargs)
    name = json.loads((output / "checkpoint-1/settings.json").read_text())["state"]["tracker_run"]
    assert [path.stem for path in output.glob("wandb/offline-run-*/run-*.wandb")] == [f"run-{name}"] * 2
    assert [(config["rank"], config["max_train_steps"]) for config in configs if "rank" in config] == [(4, 3)] * 2
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 2, 3]
    assert any("samples/0-a" in row for row in rows)
    assert list(output.glob("wandb/offline-run-*/files/media/videos/**/*.mp4"))


@pytest.mark.slow
def test_trackio_goes_on_with_its_run(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    kwargs = {"report_to": "trackio", "logging_steps": 1, "max_train_steps": 3, **LOOKS}
    output = run(checkpointing_steps=1, **kwargs)
    run(resume_from_checkpoint=output / "checkpoint-1", overwrite_output_dir=True, **kwargs)
    (name,) = storage.get_runs("ltd-wan")
    assert name == json.loads((output / "checkpoint-1/settings.json").read_text())["state"]["tracker_run"]
    rows = storage.get_logs("ltd-wan", name)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 2, 3]
    assert any("samples/0-a" in row for row in rows) and list((tmp_path / "trackio").rglob("*.mp4"))
