"""Data too big for one disk, machine or day: streams split by rank, many entries, a cache that travels."""

import gc
import json
import logging
import resource
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import HEIGHT, NUM_FRAMES, WIDTH, launch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

import train_ltd

ENTRIES = 10_000


@pytest.fixture
def prepare(flags):
    """Function that caches everything: `(clips, held-out clips, caption files, args)`."""

    def function(**kwargs):
        args = train_ltd.parse_args(flags(**kwargs))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return *train_ltd.prepare_data(args, train_ltd.build_accelerator(args)), args

    return function


@pytest.fixture
def no_models(monkeypatch):
    """Function after which loading the VAE or the text encoder is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    return lambda: [
        monkeypatch.setattr(model, "from_pretrained", refuse) for model in (AutoencoderKLWan, UMT5EncoderModel)
    ]


def write_shards(clips: Path, folder: Path, sizes: list[int]) -> Path:
    """The clips embedded in so many parquet files."""
    rows = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    rows = [{"video": {"bytes": (clips / r["file_name"]).read_bytes(), "path": None}, "text": r["text"]} for r in rows]
    folder.mkdir()
    for shard, size in enumerate(sizes):
        part, rows = rows[:size], rows[size:]
        name = f"train-{shard:05d}-of-{len(sizes):05d}.parquet"
        datasets.Dataset.from_list(part).to_parquet(folder / name)
    return folder


def entries(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def number_shards(folder: Path, sizes: list[int]) -> datasets.IterableDataset:
    folder.mkdir()
    start = 0
    for shard, size in enumerate(sizes):
        rows = [{"number": start + i} for i in range(size)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{shard:05d}.parquet")
        start += size
    return datasets.load_dataset(str(folder), split="train", streaming=True)


@pytest.mark.parametrize("sizes", [[2, 3, 1, 4], [7], [1] * 17], ids=["4 shards", "1 shard", "17 shards"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_stream_is_split_into_the_same_order_for_any_number_of_ranks(tmp_path, sizes, world):
    stream = number_shards(tmp_path / "data", sizes)
    assert stream.num_shards == len(sizes)
    parts = [list(train_ltd.stream_rows(stream, rank, world)) for rank in range(world)]
    rows = sorted((number, row["number"]) for part in parts for number, row in part)
    assert [row for _, row in rows] == list(range(sum(sizes)))
    assert len({number for number, _ in rows}) == sum(sizes)
    if sizes != [7]:
        assert all(parts)


def test_a_rank_opens_only_its_own_shards(tmp_path):
    stream = number_shards(tmp_path / "data", [2, 2])
    (tmp_path / "data" / "00001.parquet").write_bytes(b"not parquet")
    assert [row["number"] for _, row in train_ltd.stream_rows(stream, 0, 2)] == [0, 1]
    with pytest.raises(Exception, match=r"(?i)parquet"):
        list(train_ltd.stream_rows(stream, 1, 2))


def test_a_stream_cut_short_goes_on_where_it_stopped(prepare, clips, tmp_path, monkeypatch, caplog):
    data = {"train_data_dir": None, "dataset_name": write_shards(clips, tmp_path / "data", [3, 4]), "streaming": True}
    encode, calls = train_ltd.encode_clip, []

    def cut(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(train_ltd, "encode_clip", cut)
    with pytest.raises(KeyboardInterrupt):
        prepare(**data)
    done = entries(tmp_path / "cache")
    assert len(done) == 2
    resumed = prepare(**data)
    files = {p.name for p in (tmp_path / "cache/latents").glob("*.safetensors")}
    assert len(calls) == 1 + len(files)  # one call was cut; each different clip was encoded once
    assert done.items() <= entries(tmp_path / "cache").items()
    assert resumed[0] == prepare(**data, cache_dir=tmp_path / "straight")[0]


@pytest.mark.slow
def test_two_processes_stream_what_one_does(run, flags, clips, tmp_path):
    """Each takes a shard; the clips' order, and so the weights, are those of one process."""
    data = {"train_data_dir": None, "dataset_name": write_shards(clips, tmp_path / "data", [3, 4]), "streaming": True}
    data |= {"max_train_steps": 3}
    one = run(**data, output_dir=tmp_path / "one", cache_dir=tmp_path / "one/cache", gradient_accumulation_steps=2)
    result = launch(flags(**data, output_dir=tmp_path / "two", cache_dir=tmp_path / "two/cache"), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert entries(tmp_path / "two/cache") == entries(tmp_path / "one/cache")
    a, b = (load_file(folder / train_ltd.LORA_FILE) for folder in (one, tmp_path / "two"))
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []


def test_the_cache_travels(prepare, no_models, clips, tiny_wan, tmp_path, caplog):
    """To a machine where model, clips and cache lie elsewhere; nothing in it names a folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    for source, name in ((tiny_wan, "model"), (clips, "clips")):
        shutil.copytree(source, here / name)

    def places(root: Path) -> dict:
        folders = {"pretrained_model_name_or_path": "model", "train_data_dir": "clips", "cache_dir": "cache"}
        return {k: root / v for k, v in (folders | {"output_dir": "run"}).items()}

    cold = prepare(**places(here))
    assert all(str(tmp_path).encode() not in data for data in entries(here / "cache").values())
    assert {p.suffix for p in (here / "cache").rglob("*") if p.is_file()} == {".safetensors"}
    here.rename(there)
    no_models()
    with caplog.at_level(logging.INFO):
        warm = prepare(**places(there))
    assert any("warm start" in record.message for record in caplog.records)
    assert warm[:3] == cold[:3]


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_entries_start_without_their_latents_and_in_little_memory(prepare, no_models, tmp_path, monkeypatch):
    """The entries are made by the script itself, but for the decoder and the VAE, which would take days."""
    data, frames = tmp_path / "data", torch.zeros(1, NUM_FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    data.mkdir()
    rows = [{"file_name": f"{number}.mp4", "text": "a square"} for number in range(ENTRIES)]
    for row in rows:
        (data / row["file_name"]).write_text(row["file_name"])
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with monkeypatch.context() as patch:
        patch.setattr(train_ltd, "read_clips", lambda source, args: (frames, 0.0, False))
        patch.setattr(train_ltd, "encode_clip", lambda vae, clip: torch.randn(16, 21, HEIGHT // 8, WIDTH // 8))
        patch.setattr(train_ltd, "check_vae", lambda *args: None)
        prepare(train_data_dir=data)
    assert len(list((tmp_path / "cache/latents").iterdir())) == ENTRIES
    no_models()
    names, read, before = set(), train_ltd.read_checked, resident()
    monkeypatch.setattr(
        train_ltd, "read_checked", lambda file, name, *rows: names.add(name) or read(file, name, *rows)
    )
    warm = prepare(train_data_dir=data)
    assert len(warm[0]) == ENTRIES and "ltd" in names and "latents" not in names
    assert (resident() - before) / ENTRIES < 2**14
