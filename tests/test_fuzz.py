"""Thousands of damaged files: each is read or skipped with a reason, none ends the run, hangs it or fills the memory.

    LTD_FUZZ_FILES=2000 python -m pytest -m slow tests/test_fuzz.py -s

runs as many as the figures in the closing notes; the suite itself is content with fewer.
"""

import faulthandler
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HOUR
from corpus import ffmpeg, moving_square, write_metadata
from PIL import Image

import train_ltd

FILES = int(os.environ.get("LTD_FUZZ_FILES", 200))
MEMORY = 2 * 2**30  # bytes
SEED = 14


def read_table(line: list[str], answer: Path) -> None:
    """In a process of its own: read the table that `line` names, write what came of it and the memory it took."""
    faulthandler.enable()
    torch.set_num_threads(1)
    args = train_ltd.parse_args(line)
    start = time.perf_counter()
    clips, skipped = train_ltd.cache_clips(args, train_ltd.build_accelerator(args), "train")
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    outcome = {
        "read": [clip.name for clip in clips],
        "skipped": {video.name: video.reason for video in skipped},
        "seconds": seconds,
        "peak_kib": int(status.split("VmHWM:")[1].split()[0]),
    }
    answer.write_text(json.dumps(outcome))


def whole_files(folder: Path) -> list[Path]:
    """Write one undamaged file a format, with B-frames, sound and several key frames where there are such."""
    frames = moving_square(3, 40, 48, 64)
    base = folder / "a.mp4"
    sound = ["-f", "lavfi", "-i", "sine=duration=2"]
    # A Matroska file has a random number, which no seed sets.
    same = ["-fflags", "+bitexact", "-threads", 1, "-pix_fmt", "yuv420p"]
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=16:duration=2.5", "-c:v", "libx264", "-g", 12, *same, base)
    ffmpeg("-i", base, *sound, "-c:v", "copy", "-c:a", "aac", "-shortest", *same, folder / "sound.mp4")
    ffmpeg("-i", base, *sound, "-c:v", "libvpx-vp9", "-c:a", "libopus", "-shortest", *same, folder / "b.mkv")
    ffmpeg("-i", base, "-c", "copy", *same[:2], folder / "c.mkv")
    ffmpeg("-i", base, "-c:v", "mpeg4", *same, folder / "d.avi")
    ffmpeg("-i", base, "-c:v", "mjpeg", "-threads", 1, folder / "e.avi")
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(folder / "f.gif", save_all=True, append_images=pictures[1:], duration=60)
    pictures[0].save(folder / "g.png")
    pictures[0].save(folder / "h.png", save_all=True, append_images=pictures[1:20], duration=60)
    pictures[0].save(folder / "i.webp", lossless=True)
    pictures[0].save(folder / "j.webp", quality=80)
    return sorted(folder.iterdir())


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """Damage a file in one of six ways, as often as not in its first bytes, which rule the most."""
    changed = bytearray(data)
    reach = len(changed) if random.random() < 0.5 else min(len(changed), 1024)
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(0, min(reach, len(changed))))
        length = int(random.integers(1, 64))
        kind = random.integers(6)
        if kind == 0:
            changed[place] ^= 1 << int(random.integers(8))
        elif kind == 1:
            changed[place : place + length] = random.bytes(length)
        elif kind == 2:  # sizes and counts
            changed[place : place + 4] = bytes([random.choice([0, 127, 255])]) * 4
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length] * int(random.integers(1, 20))
        elif len(changed) > 64:
            del changed[int(random.integers(32, len(changed))) :]
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("num_frames", [9, 1], ids=["videos", "images"])
def test_damaged_files(flags, forks, tmp_path, num_frames):
    whole = tmp_path / "whole"
    whole.mkdir()
    originals = whole_files(whole)
    random = np.random.default_rng(SEED + num_frames)
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number in range(FILES // 2):
        original = originals[number % len(originals)]
        name = f"{number:05d}{original.suffix}"
        (data / name).write_bytes(mutate(original.read_bytes(), random))
        rows.append({"file_name": name, "text": "a"})
    write_metadata(data, rows)
    line = flags(train_data_dir=data, num_frames=num_frames, clips_per_video=2, dataloader_num_workers=0)
    process = forks.Process(target=read_table, args=(line, tmp_path / "answer.json"), daemon=True)
    process.start()
    process.join(HOUR)
    assert process.exitcode == 0
    outcome = json.loads((tmp_path / "answer.json").read_text())
    read = {re.sub(r"#\d+$", "", name) for name in outcome["read"]}
    skipped = outcome["skipped"]
    reasons = sorted({re.sub(r"\d+", "N", reason) for reason in skipped.values()})
    print(f"\n{len(rows)} files: {len(read)} read, {len(skipped)} skipped, {outcome['seconds']:.0f} s, "
          f"peak {outcome['peak_kib'] / 2**10:.0f} MiB; reasons: {reasons}")  # fmt: skip
    assert read.isdisjoint(skipped) and len(read) + len(skipped) == len(rows)
    assert all(skipped.values())
    assert len(read) > len(rows) / 10 and len(skipped) > len(rows) / 10  # else it tries nothing
    assert outcome["peak_kib"] * 2**10 < MEMORY
