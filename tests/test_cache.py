"""Clips and captions are encoded once: what is stored, when it is made again, streams, big data, the summary."""

import concurrent.futures
import contextlib
import gc
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, HEIGHT, HOUR, NUM_FRAMES, ROOT, WIDTH, launch, launcher, wait_for
from corpus import (
    NAMES,
    alike,
    cache_files,
    caption_dataset,
    copy_clips,
    embedded_by_datasets,
    make_videos,
    metadata_folder,
    moving_square,
    table_of_paths,
    with_key,
    write_metadata,
    write_numbered,
    write_video,
)
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from helpers import encoded, kill, run_in_a_process, strike
from hub_server import HubServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_ltd


def encode_counts(messages: list[str]) -> tuple[int, int]:
    """Clips and captions that the last preparation encoded, from its log lines."""
    clips = [message for message in messages if "MiB in" in message][-1]
    captions = [message for message in messages if "captions: " in message and "encoded now" in message][-1]
    return tuple(int(re.search(r"(\d+) were encoded now", message)[1]) for message in (clips, captions))


# --- Captions --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two   spaces \n and a line ", "two spaces and a line"),
        ("fish &amp; chips", "fish & chips"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("caf&eacute; Ünïcödé 動画 🎬", "café Ünïcödé 動画 🎬"),
        ('--- "quoted": {yes}', '--- "quoted": {yes}'),
        ("", ""),
        (None, ""),
    ],
)
def test_captions_are_cleaned(prepare, tmp_path, raw, clean):
    clips, _, files, _ = prepare(**caption_dataset(tmp_path / "data", [raw, "b"]))
    assert clips[0].captions == [clean] == [prompt_clean(raw or "")]
    assert clean in files and "" in files


def test_empty_captions_are_counted(prepare, log, tmp_path):
    prepare(**caption_dataset(tmp_path / "data", ["a", "", None, "  ", ["b", ""], []]))
    assert "captions: 7, 5 of them empty" in log()


def test_trigger_word(prepare, tmp_path, log):
    """Before every caption, the empty one too, and before validation prompts."""
    data = caption_dataset(tmp_path / "data", ["a dog", "", ["one", "two"]])
    clips, _, files, args = prepare(**data, trigger_word="ohwx", validation_prompt=["a cat", "ohwx, again"])
    assert [clip.captions for clip in clips] == [["ohwx a dog"], ["ohwx"], ["ohwx one", "ohwx two"]]
    assert args.validation_prompt[0] == "ohwx a cat"
    assert set(files) >= {"ohwx a dog", "ohwx", "ohwx one", "ohwx two", "ohwx a cat", ""}
    assert "a cat" not in files
    assert "captions: 4, 1 of them empty" in log()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_golden_text(prepare, tiny_wan, tmp_path, dtype):
    """The cached caption, padded, is what the stock pipeline encodes; on disk it has its true length."""
    long = " ".join(f"word{n} moves" for n in range(400))
    captions = ["", "a", "a red square moves right", "x" * 300, "Ünïcödé &amp; 🐻 動画", long]
    clips, _, files, args = prepare(**caption_dataset(tmp_path / "data", captions), cache_dtype=dtype)
    pipeline = WanPipeline.from_pretrained(tiny_wan, transformer=None, vae=None)
    lengths = []
    for clip, raw in zip(clips, captions, strict=True):
        with torch.no_grad():
            expected = pipeline.encode_prompt(raw, None, False, max_sequence_length=512)[0][0]
        tokens = len(pipeline.tokenizer(prompt_clean(raw), truncation=True, max_length=512).input_ids)
        file = files[clip.captions[0]]
        on_disk = load_file(Path(args.cache_dir, file))
        assert list(on_disk) == ["prompt_embeds"]
        assert on_disk["prompt_embeds"].shape == (tokens, 32)
        assert on_disk["prompt_embeds"].dtype == getattr(torch, dtype)
        padded = train_ltd.LatentDataset([], files, args).load_prompt(clip.captions[0])
        assert padded.shape == (512, 32) and padded.dtype == torch.float32
        assert torch.equal(padded, expected.to(getattr(torch, dtype)).float())
        lengths.append(tokens)
    assert lengths[0] == 1 and max(lengths) == 512 and len(set(lengths)) >= 5


def test_long_captions_are_warned_about(prepare, log, tmp_path):
    prepare(**caption_dataset(tmp_path / "data", ["long " * 600, "short"]))
    (warning,) = [message for message in log("WARNING") if "512" in message]
    assert "long long" in warning


# --- What is stored, and when it is made again -----------------------------------------------------------------------


def test_only_safetensors(run, clips, tmp_path):
    run(cache_dtype="float16", max_train_steps=1, cache_dir=tmp_path / "cold")
    files = [p for p in (tmp_path / "cold").rglob("*") if p.is_file()]
    assert {p.suffix for p in files if p.parent.name in ("latents", "text")} == {".safetensors"}
    assert {p.parent.name for p in files} <= {"latents", "text", "identities"}


def test_warm_start_loads_no_model(prepare, no_models, log, originals, tmp_path):
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    cold = prepare(**data)
    assert encode_counts(log()) == (4, 5)
    before = cache_files(cold[3])
    no_models()
    warm = prepare(**data, output_dir=tmp_path / "other run", cache_dir=tmp_path / "cache")
    assert encode_counts(log()) == (0, 0)
    assert alike(warm[0]) == alike(cold[0]) and warm[1:3] == cold[1:3]
    assert cache_files(cold[3]) == before
    with pytest.raises(AssertionError, match="a model was loaded"):  # the test itself works
        prepare(**data, cache_dir=tmp_path / "cold")


def test_moved_and_touched_folder_is_still_warm(prepare, no_models, log, originals, tmp_path):
    prepare(**metadata_folder(originals, tmp_path / "data", "metadata.jsonl"))
    (tmp_path / "data").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, (1, 1))
    no_models()
    prepare(train_data_dir=tmp_path / "moved")
    assert encode_counts(log()) == (0, 0)


def test_edited_caption_recomputes_only_itself(prepare, no_models, log, originals, tmp_path):
    prepare(**metadata_folder(originals, tmp_path / "data", "metadata.jsonl"))
    before = cache_files(prepare(train_data_dir=tmp_path / "data")[3])
    rows = with_key("file_name")
    rows[2]["text"] = "edited"
    write_metadata(tmp_path / "data", rows)
    no_models(text=False)
    clips, _, files, args = prepare(train_data_dir=tmp_path / "data")
    assert encode_counts(log()) == (0, 1)
    assert clips[2].captions == ["edited"]
    after = cache_files(args)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {files["edited"]}


def test_edited_clip_recomputes_only_itself(prepare, no_models, log, originals, tmp_path):
    prepare(**metadata_folder(originals, tmp_path / "data", "metadata.jsonl"))
    write_video(tmp_path / "data" / NAMES[1], moving_square(50))
    no_models(vae=False)
    prepare(train_data_dir=tmp_path / "data")
    assert encode_counts(log()) == (1, 0)


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"height": 48}, (4, 0)),
        ({"width": 32}, (4, 0)),
        ({"num_frames": 13, "fps": 20}, (4, 0)),
        ({"fps": 14}, (4, 0)),
        ({"clips_per_video": 2}, (4, 0)),
        ({"cache_dtype": "float32"}, (4, 5)),
        ({"mixed_precision": "bf16"}, None),
        ({"learning_rate": 1e-3, "rank": 2, "loss": "mse", "seed": 9, "flow_shift": 1}, (0, 0)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_changes_the_cache(prepare, log, originals, tmp_path, change, counts):
    """And what does not."""
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    before = cache_files(prepare(**data)[3])
    args = prepare(**data, **change)[3]
    got = encode_counts(log())
    assert got == counts if counts else got[0] == 0
    after = cache_files(args)
    assert {name: after[name] for name in before} == before  # the other cache stays usable
    assert len(after) == len(before) + sum(got)


@pytest.mark.slow
def test_another_model_has_its_own_cache(prepare, log, tiny_wan, originals, tmp_path):
    """Same folder, other weights: of the VAE, then of the text encoder."""
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    prepare(**data)
    model = tmp_path / "model"
    shutil.copytree(tiny_wan, model)
    prepare(**data, pretrained_model_name_or_path=model)
    assert encode_counts(log()) == (0, 0)  # a copy of the model is the same model
    for component, counts in (("vae", (4, 0)), ("text_encoder", (0, 5))):
        (path,) = (model / component).glob("*.safetensors")
        weights = load_file(path)
        save_file({key: value * 1.01 for key, value in weights.items()}, path, {"format": "pt"})
        prepare(**data, pretrained_model_name_or_path=model)
        assert encode_counts(log()) == counts


# --- What a file is known by -----------------------------------------------------------------------------------------


def flip_middle(path: Path) -> None:
    """Change one byte at 3/8 of a file, and neither its size nor its time, as `cp -p` or `rsync -t` may do."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[3 * len(data) // 8] ^= 1
    path.write_bytes(data)
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system ticks a few times a second
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture
def hash_of(flags, tmp_path, monkeypatch):
    """Function that identifies a file: its hash, and how many files were read for it."""
    args = train_ltd.parse_args(flags())
    reads = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *rest: reads.append(1) or digest(*rest))

    def function(path):
        reads.clear()
        return train_ltd.content_hash(str(path), args), len(reads)

    return function


@pytest.fixture
def settled(monkeypatch):
    """Files that a test has just written count as settled."""
    monkeypatch.setattr(train_ltd, "SETTLING_SECONDS", -1)


@pytest.mark.usefixtures("one_text_encoder")
def test_uncompressed_clips_of_one_size_are_different(prepare, tmp_path):
    """Their first, middle and last 64 KiB agree: a square moves over black in between, each time elsewhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        frames = np.zeros((33, 64, 96, 3), np.uint8)
        for frame in range(6, 11):
            frames[frame, 8 + 16 * number : 20 + 16 * number, 4 * frame : 4 * frame + 12] = 255
        write_video(folder / f"{number}.avi", list(frames), codec="rawvideo", pix_fmt="bgr24")
    write_metadata(folder, [{"file_name": f"{number}.avi", "text": "a"} for number in range(3)])
    data = [(folder / f"{number}.avi").read_bytes() for number in range(3)]
    middle = len(data[0]) // 2
    for start in (0, middle, len(data[0]) - 2**16):
        assert len({part[start : start + 2**16] for part in data}) == 1
    clips, _, _, args = prepare(train_data_dir=folder, num_frames=33)
    assert len({clip.identity for clip in clips}) == len({clip.path for clip in clips}) == 3
    latents = [load_file(Path(args.cache_dir, clip.path))["latents"] for clip in clips]
    assert not torch.equal(latents[0], latents[1]) and not torch.equal(latents[1], latents[2])


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once_for_its_hash(hash_of, tmp_path):
    """And once more when it has changed, though its size and its time have not."""
    path = tmp_path / "weights.bin"
    path.write_bytes(np.random.default_rng(0).bytes(10**6))
    first, reads = hash_of(path)
    assert reads == 1 and len(first) == 32
    assert hash_of(path) == (first, 0)
    flip_middle(path)
    second, reads = hash_of(path)
    assert reads == 1 and second != first
    assert hash_of(path) == (second, 0)
    copy = tmp_path / "copy.bin"
    copy.write_bytes(path.read_bytes())
    assert hash_of(copy) == (second, 1)
    assert train_ltd.content_hash(path.read_bytes(), None) == second


def test_a_file_that_was_just_written_is_not_remembered(hash_of, monkeypatch, tmp_path):
    """It could change again within one tick of the clock."""
    monkeypatch.setattr(train_ltd, "SETTLING_SECONDS", HOUR)
    path = tmp_path / "a.bin"
    path.write_bytes(b"a clip")
    first, _ = hash_of(path)
    assert hash_of(path) == (first, 1)
    assert not (tmp_path / "cache/identities").exists()


@pytest.mark.usefixtures("settled")
def test_a_hash_that_cannot_be_remembered(hash_of, tmp_path):
    """A record cut short by a kill is written anew; a cache that takes none is used without."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"a clip")
    first, _ = hash_of(path)
    (record,) = (tmp_path / "cache/identities").iterdir()
    record.write_text("")
    assert hash_of(path) == (first, 1)
    assert hash_of(path) == (first, 0)
    shutil.rmtree(tmp_path / "cache/identities")
    (tmp_path / "cache/identities").write_text("no folder, so that no record can be written")
    assert hash_of(path) == (first, 1)


@pytest.mark.usefixtures("settled")
def test_weights_that_differ_in_one_byte_are_another_base(flags, tiny_wan, tmp_path):
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    args = train_ltd.parse_args(flags(pretrained_model_name_or_path=model))
    before = train_ltd.base_identity(args)
    assert train_ltd.base_identity(args) == before
    (path,) = (model / "transformer").glob("*.safetensors")
    flip_middle(path)
    assert train_ltd.base_identity(args) != before


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_table_that_changed_without_its_time_is_read_again(prepare, originals, tmp_path, name):
    folder = tmp_path / "data"
    kwargs = metadata_folder(originals, folder, name)
    clips, *_ = prepare(**kwargs)
    assert clips[0].captions == ["a red square"]
    time = (folder / name).stat().st_mtime_ns
    rows = with_key("file_name")
    rows[0]["text"] = "a new square"
    write_metadata(folder, rows, name)
    os.utime(folder / name, ns=(time, time))
    clips, *_ = prepare(**kwargs)
    assert clips[0].captions == ["a new square"]


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("left", ["half", "nothing", "a link to itself"])
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_damaged_entry_is_made_again(prepare, log, originals, tmp_path, kind, left):
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    args = prepare(**data)[3]
    before = cache_files(args)
    path = min(Path(args.cache_dir, kind).iterdir())
    if left == "a link to itself":  # which cannot be opened, by root neither
        path.unlink()
        path.symlink_to(path.name)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if left == "half" else 0])
    prepare(**data)
    assert encode_counts(log()) == ((1, 0) if kind == "latents" else (0, 1))
    assert cache_files(args) == before


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_entry_damaged_after_the_start(prepare, originals, tmp_path, kind):
    """Training ends with the name of the entry and the remedy, which then works."""
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    args = prepare(**data)[3]
    before = cache_files(args)
    path = min(Path(args.cache_dir, kind).iterdir())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RuntimeError, match=f"{path.name} is damaged.*--resume_from_checkpoint latest"):
        train_ltd.load_entry(args, f"{kind}/{path.name}")
    assert not path.exists()
    prepare(**data)
    assert cache_files(args) == before


@pytest.mark.slow
@pytest.mark.usefixtures("one_text_encoder")
def test_windows_are_entries_of_their_own(prepare, log, tmp_path):
    """When one of a video's is lost, they are made again; the others' videos are not."""
    (tmp_path / "data").mkdir()
    write_numbered(tmp_path / "data" / "long.mp4", 40)
    write_numbered(tmp_path / "data" / "short.mp4", 12)
    write_metadata(tmp_path / "data", [{"file_name": name, "text": "a"} for name in ("long.mp4", "short.mp4")])
    clips, _, _, args = prepare(train_data_dir=tmp_path / "data", clips_per_video=3)
    assert len(clips) == 4 and len({clip.path for clip in clips}) == 4
    assert len({clip.name for clip in clips}) == 4 and [clip.name[:4] for clip in clips] == ["long"] * 3 + ["shor"]
    before = cache_files(args)
    for lost in clips[:3]:
        Path(args.cache_dir, lost.path).unlink()
        assert alike(prepare(train_data_dir=tmp_path / "data", clips_per_video=3)[0]) == alike(clips)
        assert encode_counts(log()) == (3, 0) and cache_files(args) == before


# --- Reading ahead ---------------------------------------------------------------------------------------------------


def slower_at_first(monkeypatch) -> None:
    """Of videos that are read at once, let the first be ready last: the order of reading is not that of the rows."""
    read, count = train_ltd.read_clip, itertools.count()

    def function(*args):
        time.sleep(0.2 * (-next(count) % train_ltd.DECODERS))
        return read(*args)

    monkeypatch.setattr(train_ltd, "read_clip", function)


@pytest.mark.slow
@pytest.mark.usefixtures("one_text_encoder")
def test_reading_ahead_changes_nothing(prepare, log, monkeypatch, tmp_path):
    """Neither clips, cache nor log, nor their order: with damaged videos and entries, copies and long captions."""
    folder = tmp_path / "data"
    names = make_videos(folder, 6)
    for number in range(3):
        (folder / f"broken{number}.mp4").write_bytes(b"no video" * (number + 1))
        shutil.copy(folder / names[number], folder / f"copy{number}.mp4")
    broken = [f"broken{number}.mp4" for number in range(3)]
    copies = [f"copy{number}.mp4" for number in range(3)]
    order = [names[0], broken[0], copies[0], *names[1:3], "missing.mp4", broken[1], *names[3:], *copies[1:], broken[2]]
    captions = ["long " * 10_000 if name in (names[1], broken[1], names[4]) else name for name in order]
    write_metadata(folder, [{"file_name": n, "text": t} for n, t in zip(order, captions, strict=True)])
    results = []
    for name in ("one by one", "ahead"):
        with monkeypatch.context() as patch:
            if name == "one by one":
                patch.setattr(train_ltd, "ThreadPoolExecutor", AtOnce)
            else:
                slower_at_first(patch)
            kwargs = {"train_data_dir": folder, "max_skipped": 0.5, "cache_dir": tmp_path / name}
            before = len(log())
            first = prepare(**kwargs)
            for clip in first[0][:5]:
                Path(tmp_path, name, clip.path).write_bytes(b"damaged")
            second = prepare(**kwargs)
            messages = [message.replace(str(tmp_path / name), "cache") for message in log()[before:]]
            results.append((first[:3], second[:3], cache_files(second[3]), messages))
    assert results[0] == results[1]
    messages = results[1][3]
    assert len([message for message in messages if "skipped broken" in message]) == 2 * len(broken)
    assert len([message for message in messages if "caption cut to" in message and "characters" in message]) == 6
    assert len([message for message in messages if "is damaged" in message]) == 4  # one of the five is a copy's
    sums = [message.split("; ")[1] for message in messages if "MiB in" in message]
    assert sums == ["6 were encoded now", "4 were encoded now"]


class AtOnce:
    """An executor that does everything in its caller, when it is asked."""

    def __init__(self, threads):
        pass

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future

    def map(self, function, *columns):
        return list(map(function, *columns))

    def shutdown(self, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.mark.usefixtures("one_text_encoder")
def test_several_videos_are_read_at_once_and_only_so_many_wait(prepare, monkeypatch, tmp_path):
    """Also while the VAE encodes, and while the entries of the video before are written."""
    names = make_videos(tmp_path / "data", 12)
    write_metadata(tmp_path / "data", [{"file_name": name, "text": "a"} for name in names])
    together = threading.Barrier(train_ltd.DECODERS, timeout=HOUR)
    read, encode, write = train_ltd.read_clip, train_ltd.encode_clip, train_ltd.save_entry
    begun = itertools.count()
    done = {"read": 0, "encoded": 0, "written": 0}
    waiting, unwritten = [], []
    second_is_encoded = threading.Event()

    def read_together(*args):
        if next(begun) < train_ltd.DECODERS:
            together.wait()  # raises if the others never come
        done["read"] += 1
        return read(*args)

    def count_waiting(*args):
        time.sleep(0.05)  # in which as many are read as ever will
        waiting.append(done["read"] - done["encoded"])
        done["encoded"] += 1
        unwritten.append(done["encoded"] - done["written"])
        if done["encoded"] == 2:
            second_is_encoded.set()
        return encode(*args)

    def write_late(tensors, path):
        if path.parent.name == "latents":
            assert second_is_encoded.wait(HOUR)
            done["written"] += 1
        write(tensors, path)

    monkeypatch.setattr(train_ltd, "read_clip", read_together)
    monkeypatch.setattr(train_ltd, "encode_clip", count_waiting)
    monkeypatch.setattr(train_ltd, "save_entry", write_late)
    prepare(train_data_dir=tmp_path / "data")
    assert done == {"read": 12, "encoded": 12, "written": 12}
    assert 2 <= max(waiting) <= train_ltd.DECODERS + 1
    assert max(unwritten) <= 3


STUCK = """
import av, runpy, sys, threading, time
sys.argv = sys.argv[1:]
av.open = lambda *args, **kwargs: print("reading", file=sys.stderr, flush=True) or time.sleep(3600)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_videos_that_are_read(flags, tmp_path):
    command = [sys.executable, "-c", STUCK, str(ROOT / "train_ltd.py"), *flags()]
    with subprocess.Popen(command, env=os.environ | CPU, stderr=subprocess.PIPE, text=True) as process:
        assert any("reading" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()  # ends with the process, and not with the videos
    assert process.returncode == -signal.SIGINT and "Traceback" not in said


def test_interrupted_write_leaves_no_entry(prepare, log, monkeypatch, originals, tmp_path):
    """Stopped between the third entry's bytes and its name."""
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    names = []

    def replace(source, target, real=os.replace):
        names.append(target)
        if len(names) == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            prepare(**data)
    assert len(names) == 3 and not Path(names[2]).exists()
    assert len(list(names[2].parent.iterdir())) == 2  # and no half of one
    prepare(**data)
    assert encode_counts(log()) == (2, 5)


def killed_while_caching(line: list[str]) -> None:
    strike(pytest.MonkeyPatch(), os, "replace", 6, kill)
    run_in_a_process(line)


@pytest.mark.slow
def test_killed_run_resumes(flags, forks, prepare, log, tmp_path):
    """SIGKILL in the middle of caching: the next run does the rest, and the cache is as if nothing had happened."""
    names = make_videos(tmp_path / "data", 9)
    write_metadata(tmp_path / "data", [{"file_name": name, "text": name} for name in names])
    process = forks.Process(target=killed_while_caching, args=(flags(train_data_dir=tmp_path / "data"),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = {path: path.read_bytes() for path in (tmp_path / "cache/latents").glob("[!.]*.safetensors")}
    assert len(done) == 5
    for path in done:
        assert load_file(path)["latents"].shape == (16, 3, HEIGHT // 8, WIDTH // 8)
    clips = prepare(train_data_dir=tmp_path / "data")[0]
    assert encode_counts(log())[0] == 9 - len(done)
    assert all(path.read_bytes() == data for path, data in done.items())
    straight = prepare(train_data_dir=tmp_path / "data", cache_dir=tmp_path / "straight")[0]
    assert alike(clips) == alike(straight)


@pytest.mark.slow
def test_launcher_that_is_terminated_while_clips_are_cached(flags, clips, tmp_path):
    """Its one process ends with it and starts no training. There are more clips than can be encoded meanwhile."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"file_name": f"{number}.mp4", "text": "a"} for number in range(1000)]
    for row in rows:
        (data / row["file_name"]).write_bytes((clips / "0.mp4").read_bytes() + row["file_name"].encode())
    write_metadata(data, rows)
    command = launcher(1) + flags(train_data_dir=data, height=240, width=416, max_train_steps=1)
    env, cached = os.environ | CPU, tmp_path / "cache/latents"
    with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(cached.glob("[!.]*.safetensors")), process)
        process.terminate()
        said = process.stderr.read()  # ends when the last process that holds the pipe has ended
    assert 0 < len(list(cached.glob("*.safetensors"))) < len(rows)
    assert not (tmp_path / "run/metrics.jsonl").exists() and "done; look into" not in said


@pytest.mark.slow
def test_two_processes_share_the_work(flags, prepare, log, originals, tmp_path):
    """Both really run, each encodes a part, and the cache is that of one process."""
    copy_clips(originals, tmp_path / "data")
    rows = with_key("file_name") + [{"file_name": f"gone{n}.mp4", "text": "gone"} for n in range(2)]
    write_metadata(tmp_path / "data", rows)
    kwargs = {"train_data_dir": tmp_path / "data", "max_skipped": 0.5, "max_train_steps": 1}
    one = cache_files(prepare(**kwargs, cache_dir=tmp_path / "one")[3])
    expected = encode_counts(log())
    result = launch(flags(**kwargs), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "updates: 1 of 2 clips" in result.stderr  # one clip for each of two processes
    assert len(re.findall(r"RANK 0\].* gone0.mp4", result.stderr)) == 1
    assert len(re.findall(r"RANK 1\].* gone1.mp4", result.stderr)) == 1
    assert encode_counts(result.stderr.splitlines()) == expected == (4, 5)
    two = cache_files(SimpleNamespace(cache_dir=tmp_path / "cache"))
    assert two == one
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 2


def test_the_cache_travels(prepare, no_models, log, clips, tiny_wan, tmp_path):
    """To a machine where model, clips and cache lie elsewhere; nothing in it names a folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    for source, name in ((tiny_wan, "model"), (clips, "clips")):
        shutil.copytree(source, here / name)

    def places(root: Path) -> dict:
        folders = {"pretrained_model_name_or_path": "model", "train_data_dir": "clips", "cache_dir": "cache"}
        return {k: root / v for k, v in (folders | {"output_dir": "run"}).items()}

    cold = prepare(**places(here))
    files = [path for path in (here / "cache").rglob("*") if path.is_file()]
    assert files and all(str(tmp_path).encode() not in path.read_bytes() for path in files)
    here.rename(there)
    no_models()
    warm = prepare(**places(there))
    assert encode_counts(log()) == (0, 0)
    assert alike(warm[0]) == alike(cold[0]) and warm[1:3] == cold[1:3]


# --- Streams and big data --------------------------------------------------------------------------------------------


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
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in encoded(folder)}


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
    straight = prepare(**data, cache_dir=tmp_path / "straight")
    assert alike(resumed[0]) == alike(straight[0])


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


HUB_SCRIPT = """
import json, sys
from pathlib import Path
from accelerate.state import AcceleratorState, GradientState
import train_ltd

for line in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train_ltd.main(train_ltd.parse_args(line))
"""


@pytest.mark.slow
def test_hub_dataset_and_streaming(flags, originals, expected_latents, tmp_path):
    """A Hub name, as videofolder, parquet, csv with relative paths, downloaded and streamed: one cache and order."""
    metadata_folder(originals, tmp_path / "folder", "metadata.jsonl")
    embedded_by_datasets(originals, tmp_path / "parquet")
    table_of_paths(originals, tmp_path / "table", "rows.csv")
    card = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n---\n"
    (tmp_path / "table" / "README.md").write_text(card)
    runs = [(repo, streaming) for repo in ("folder", "parquet", "table") for streaming in (False, True)]
    lines = []
    for repo, streaming in runs:
        output = tmp_path / f"{repo}-{streaming}"
        kwargs = {"dataset_name": f"somebody/{repo}", "train_data_dir": None, "streaming": streaming}
        kwargs |= {"output_dir": output, "cache_dir": output / "cache", "max_train_steps": 5, "cache_dtype": "float32"}
        lines.append(flags(**kwargs))
    with HubServer(tmp_path / "hub") as hub:
        for repo in ("folder", "parquet", "table"):
            hub.add(f"somebody/{repo}", tmp_path / repo, repo_type="dataset")
        command = [sys.executable, "-c", HUB_SCRIPT, json.dumps(lines)]
        result = subprocess.run(command, env=os.environ | hub.env(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    caches, weights = [], []
    for repo, streaming in runs:
        output = tmp_path / f"{repo}-{streaming}"
        caches.append(cache_files(SimpleNamespace(cache_dir=output / "cache")))
        weights.append(load_file(output / "pytorch_lora_weights.safetensors"))
    assert len([name for name in caches[0] if name.startswith("latents")]) == len(NAMES)
    assert all(cache == caches[0] for cache in caches)
    assert all(torch.equal(weight[key], weights[0][key]) for weight in weights for key in weights[0])
    got = [load_file(tmp_path / "folder-True" / "cache" / name)["latents"] for name in caches[0] if "latents" in name]
    for expected in expected_latents:
        assert min((latents - expected).abs().max() for latents in got) < 1e-5


ENTRIES = 3_000
PLAIN = train_ltd.ClipFacts(
    height=HEIGHT,
    width=WIDTH,
    crop_fraction=0.0,
    enlargement=1.0,
    orientation_differs=False,
    repeated_fraction=0.0,
    interlaced=False,
    hdr=False,
)


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
        latents = torch.randn(16, 21, HEIGHT // 8, WIDTH // 8)
        patch.setattr(train_ltd, "read_clip", lambda *args: (frames, PLAIN))
        patch.setattr(train_ltd, "encode_clip", lambda *args: {"latents": latents})
        prepare(train_data_dir=data)
    assert len(list((tmp_path / "cache/latents").iterdir())) == ENTRIES
    no_models()
    names, before = set(), resident()

    @contextlib.contextmanager
    def watched(path, framework):
        with safe_open(path, framework=framework) as file:
            yield SimpleNamespace(keys=file.keys, get_tensor=lambda name: names.add(name) or file.get_tensor(name))

    monkeypatch.setattr(train_ltd, "safe_open", watched)
    warm = prepare(train_data_dir=data)
    assert len(warm[0]) == ENTRIES and "ltd" in names and "latents" not in names
    assert (resident() - before) / ENTRIES < 2**14


# --- Summary ---------------------------------------------------------------------------------------------------------


def test_progress_and_summary(prepare, log, capfd, originals, tmp_path):
    """A bar with a rate and an estimate; at the end the count, the size on disk, the latents' mean and spread."""
    clips, _, _, args = prepare(
        **metadata_folder(originals, tmp_path / "data", "metadata.jsonl"), cache_dtype="float32"
    )
    bar = capfd.readouterr().err
    assert re.search(r"4/4 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ ?(video/s|s/video)", bar)
    latents = torch.cat([load_file(Path(args.cache_dir, clip.path))["latents"] for clip in clips])
    (line,) = [message for message in log() if message.startswith("latents:")]
    mean, std = map(float, re.findall(r"-?[\d.]+\d", line))
    assert mean == pytest.approx(latents.mean().item(), abs=2e-3)
    assert std == pytest.approx(latents.std().item(), rel=0.05)
    (line,) = [message for message in log() if message.startswith("cache:")]
    size = sum(path.stat().st_size for path in Path(args.cache_dir, "latents").iterdir())
    assert f"{size / 2**20:.1f} MiB" in line and "4 training" in line


@pytest.mark.parametrize(("factor", "outcome"), [(4, "warning"), (1000, "error"), (1, None)])
def test_unusual_latents(prepare, log, tiny_wan, originals, tmp_path, factor, outcome):
    """A VAE whose `latents_std` is wrong: warned about when odd, refused at gross bounds."""
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    config = json.loads((model / "vae" / "config.json").read_text())
    config["latents_std"] = [value * factor for value in config["latents_std"]]
    (model / "vae" / "config.json").write_text(json.dumps(config))
    kwargs = metadata_folder(originals, tmp_path / "data", "metadata.jsonl") | {"pretrained_model_name_or_path": model}
    if outcome == "error":
        with pytest.raises(ValueError, match="latents"):
            prepare(**kwargs)
        return
    prepare(**kwargs)
    assert len([m for m in log("WARNING") if "latents" in m]) == (outcome == "warning")


def slow_discrepancy(latents: np.ndarray) -> np.ndarray:
    """Eq. 2 with the window 3, literally, in float64: `(C, F, H, W)` to `(F, H, W)`."""
    gaps = np.sqrt((np.diff(latents.astype(np.float64), axis=1) ** 2).sum(0))
    count = latents.shape[1]
    return np.stack([gaps[max(0, f - 1) : min(count - 1, f + 1)].mean(0) for f in range(count)])


@pytest.mark.usefixtures("one_text_encoder")
def test_ltd_summary(prepare, log, tmp_path):
    names = make_videos(tmp_path / "data", 6)
    write_metadata(tmp_path / "data", [{"file_name": name, "text": "a"} for name in names])
    clips, _, _, args = prepare(train_data_dir=tmp_path / "data", cache_dtype="float32")
    maps = [slow_discrepancy(load_file(Path(args.cache_dir, clip.path))["latents"].numpy()) for clip in clips]
    means = np.array([m.mean() for m in maps])
    lines = [message for message in log() if "LTD" in message]
    lines = [next(line for line in lines if line.startswith("LTD:")), lines[0].split("LTD over")[1]]
    numbers = [float(n) for line in lines for n in re.findall(r"\d+\.\d+", line)]
    expected = [means.mean(), *np.quantile(means, [0, 0.1, 0.5, 0.9, 1]), *np.mean(maps, axis=(0, 2, 3))]
    assert numbers == pytest.approx(expected, abs=2e-3)


def made_up_clip(name: str, gaps: list[float]) -> train_ltd.Clip:
    """A cached clip with the given gaps between its latent frames."""
    return train_ltd.Clip(
        order=(0, 0, 0),
        name=name,
        captions=["a"],
        identity=name,
        path="x",
        bucket=train_ltd.Bucket(NUM_FRAMES, HEIGHT, WIDTH),
        encoded=False,
        ltd=float(np.mean(gaps)),
        ltd_per_frame=gaps,
        ltd_quantiles=[0.0] * 21,
        gaps=gaps,
        mean=0.0,
        std=1.0,
        **asdict(PLAIN),
    )


@pytest.mark.parametrize(
    ("gaps", "cut"),
    [
        ([1.0, 1.0, 1.1, 0.9, 6.0, 1.0, 1.2], True),
        ([1.0, 1.0, 1.1, 0.9, 1.0, 1.2, 8.0], True),
        ([9.0, 1.0, 1.1, 0.9, 1.0, 1.0, 1.2], False),  # only the first, which the causal VAE inflates
        ([1.0, 1.5, 2.0, 2.5, 2.0, 1.5, 1.0], False),
        ([2.0, 0.5, 1.5, 0.7, 1.8, 0.6, 1.2], False),
    ],
)
def test_cuts(flags, log, gaps, cut):
    args = train_ltd.parse_args(flags())
    train_ltd.build_accelerator(args)
    train_ltd.summarize(args, [made_up_clip("plain.mp4", [1.0] * 7), made_up_clip("tested.mp4", gaps)])
    assert len([m for m in log("WARNING") if "a hard cut is suspected" in m and "tested.mp4" in m]) == cut
    assert not [m for m in log("WARNING") if "plain.mp4" in m]


class PoolingVAE(torch.nn.Module):
    """Sees what there is to see: latents are the pixels, averaged over 8 x 8 of them and, but the first, 4 frames."""

    device, config = torch.device("cpu"), SimpleNamespace(latents_mean=[0.0] * 3, latents_std=[0.5] * 3)

    def encode(self, pixels):
        first, rest = F.avg_pool3d(pixels[:, :, :1], (1, 8, 8)), F.avg_pool3d(pixels[:, :, 1:], (4, 8, 8))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.cat([first, rest], dim=2)))


@pytest.fixture
def folder_with_a_cut(monkeypatch, tmp_path):
    """Two scenes in one file, and a clip that only moves; encoded by a VAE that sees both."""
    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", lambda *args, **kwargs: PoolingVAE())
    folder = tmp_path / "data"
    folder.mkdir()
    scenes = [np.full((HEIGHT, WIDTH, 3), color, np.uint8) for color in (30, 220)]
    for scene in scenes:
        scene[8:24, 8:24, 0] = 128
    write_video(folder / "cut.mp4", [np.roll(scenes[n >= 21], n, axis=1) for n in range(33)])
    write_video(folder / "moves.mp4", [np.roll(scenes[0], n, axis=1) for n in range(33)])
    write_metadata(folder, [{"file_name": f"{name}.mp4", "text": "a"} for name in ("moves", "cut")])
    return folder


@pytest.mark.usefixtures("one_text_encoder")
def test_real_cut(prepare, log, folder_with_a_cut):
    assert len(prepare(train_data_dir=folder_with_a_cut, num_frames=33)[0]) == 2
    warnings = [message for message in log("WARNING") if "a hard cut is suspected" in message]
    assert len(warnings) == 1 and "cut.mp4" in warnings[0]
