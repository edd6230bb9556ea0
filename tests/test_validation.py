"""Errors on held-out clips, samples, and where both are logged."""

import json
import time
from pathlib import Path

import av
import pytest
from conftest import HEIGHT, NUM_FRAMES, WIDTH, launch
from helpers import LOOKS

import train_ltd


def test_held_out_errors_repeat_to_the_last_digit(run, flags, tmp_path):
    kwargs = {"validation_split": 0.4, "eval_steps": 1, "max_train_steps": 2}
    first, second = (run(output_dir=tmp_path / name, **kwargs) for name in "ab")
    rows = [
        [line for line in (f / "metrics.jsonl").read_text().splitlines() if "val/mse" in line] for f in (first, second)
    ]
    assert len(rows[0]) == 3 and rows[0] == rows[1]
    row = json.loads(rows[0][0])
    assert {f"val/mse_sigma_{s}" for s in train_ltd.EVAL_SIGMAS} < set(row)
    assert row["val/mse"] == pytest.approx(sum(row[f"val/mse_sigma_{s}"] for s in train_ltd.EVAL_SIGMAS) / 5)
    result = launch(flags(output_dir=tmp_path / "two", **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    two = [line for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines() if "val/mse" in line]
    assert two[0] == rows[0][0]


def test_samples_are_playable_and_keep_the_pipelines_shift(run, tmp_path):
    """Before step 1 the video depends on the base only: training's --flow_shift must not leak into it."""
    kwargs = {"max_train_steps": 2, **LOOKS}
    first = run(output_dir=tmp_path / "a", flow_shift=1.0, **kwargs) / "samples"
    second = run(output_dir=tmp_path / "b", flow_shift=9.0, **kwargs) / "samples"
    names = [f"step-00000{step}-{i}.mp4" for step in (0, 2) for i in (0, 1)]
    assert sorted(p.name for p in first.iterdir()) == names
    assert (first / names[0]).read_bytes() == (second / names[0]).read_bytes()
    with av.open(str(first / names[0])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.width, stream.height, stream.average_rate) == (NUM_FRAMES, WIDTH, HEIGHT, 16)


# --- Trackers --------------------------------------------------------------------------------------------------------

def test_tensorboard_gets_scalars_and_moving_pictures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run(report_to="tensorboard", validation_split=0.2, checkpointing_steps=1, max_train_steps=3, **LOOKS)
    run(
        report_to="tensorboard",
        validation_split=0.2,
        resume_from_checkpoint=output / "checkpoint-1",
        max_train_steps=3,
        **LOOKS,
    )
    events = EventAccumulator(str(output / "logs/ltd-wan"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    wanted = "loss mse mse_motion mse_static weight_mean weight_max lr grad_norm seconds_per_step clips_per_second"
    assert {*wanted.split(), "peak_memory_gib", "val/mse", "val/mse_motion", "val/mse_static"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert set(tags["images"]) == {"sample/0", "sample/1"}
    assert events.Images("sample/0")[0].encoded_image_string.startswith(b"GIF89a")


def wandb_records(path: Path) -> list:
    """What an offline run has written: a LevelDB log of protobuf records behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:  # no header is split over two blocks
            position += room
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):  # still being written
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb_goes_on_with_its_run(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    kwargs = {"report_to": "wandb", "logging_steps": 1, "max_train_steps": 3, **LOOKS}
    output = run(checkpointing_steps=1, **kwargs)
    run(resume_from_checkpoint=output / "checkpoint-1", **kwargs)
    files = sorted(output.glob("wandb/offline-run-*/run-*.wandb"))
    name = json.loads((output / "checkpoint-1/settings.json").read_text())["state"]["name"]
    assert [path.stem for path in files] == [f"run-{name}"] * 2
    deadline = time.monotonic() + 60  # its own process writes the end of a file when it likes
    while not all(any(r.HasField("exit") for r in wandb_records(path)) for path in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    records = [record for path in files for record in wandb_records(path)]
    rows = [{item.key or item.nested_key[0]: item.value_json for item in r.history.item} for r in records]
    assert [int(row["_step"]) for row in rows if "loss" in row] == [1, 2, 3, 2, 3]
    assert any("sample/0" in row for row in rows)
    assert list(output.glob("wandb/offline-run-*/files/media/videos/**/*.mp4"))


def test_trackio_goes_on_with_its_run(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    kwargs = {"report_to": "trackio", "logging_steps": 1, "max_train_steps": 3, **LOOKS}
    output = run(checkpointing_steps=1, **kwargs)
    run(resume_from_checkpoint=output / "checkpoint-1", **kwargs)
    (name,) = storage.get_runs("ltd-wan")
    assert name == json.loads((output / "checkpoint-1/settings.json").read_text())["state"]["name"]
    rows = storage.get_logs("ltd-wan", name)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 2, 3]
    assert any("sample/0" in row for row in rows) and list((tmp_path / "trackio").rglob("*.mp4"))
