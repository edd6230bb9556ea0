"""Clips of several sizes and lengths, pictures beside videos, and several sources, each through the whole of a run."""

import functools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import visualize_ltd
from accelerate.state import AcceleratorState, GradientState
from conftest import launch, write_clip
from helpers import assert_same, metrics, weights
from PIL import Image

import train_ltd

SIZES = ["64x32x9", "64x32x5", "32x64x9", "64x32x1"]
MIXED = {"height": None, "width": None, "num_frames": None, "sizes": None}
CLIPS = {
    # name: (frames, height, width), and the size that it takes
    "wide0.mp4": ((24, 48, 96), "64x32x9"),
    "wide1.mp4": ((12, 40, 64), "64x32x9"),
    "wide2.mp4": ((24, 48, 96), "64x32x9"),
    "wide3.mp4": ((24, 48, 80), "64x32x9"),
    "short0.mp4": ((6, 48, 96), "64x32x5"),
    "short1.mp4": ((8, 48, 96), "64x32x5"),
    "tall0.mp4": ((24, 96, 48), "32x64x9"),
    "tall1.mp4": ((24, 80, 48), "32x64x9"),
    "still0.png": ((1, 48, 96), "64x32x1"),
    "still1.png": ((1, 90, 96), "64x32x1"),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Pairs of clips and captions: wide, tall and short videos, and pictures."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, (name, ((frames, height, width), _)) in enumerate(CLIPS.items()):
        if name.endswith(".png"):
            pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        else:
            write_clip(folder / name, number, frames, height, width)
        (folder / name).with_suffix(".txt").write_text(f"clip {number}")
    return folder


def mixed_flags(folder: Path, **kwargs) -> dict:
    """The flags of a run on it; `--sizes` comes apart, since it takes several values."""
    return MIXED | {"train_data_dir": folder} | kwargs


@pytest.fixture
def run_mixed(flags, mixed):
    """Function that trains on the mixed clips in this process."""

    def train(sizes=SIZES, **kwargs) -> Path:
        args = train_ltd.parse_args([*flags(**mixed_flags(mixed, **kwargs)), "--sizes", *sizes])
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        train_ltd.main(args)
        return Path(args.output_dir)

    return train


@pytest.fixture
def prepare_mixed(flags, mixed):
    """Function that caches the mixed clips and returns them by name."""

    def prepare(sizes=SIZES, **kwargs):
        args = train_ltd.parse_args([*flags(**mixed_flags(mixed, **kwargs)), "--sizes", *sizes])
        train_ltd.identify_wan(args)
        clips, _, _ = train_ltd.prepare_data(args, train_ltd.build_accelerator(args), with_captions=False)
        return {clip.name: clip for clip in clips}, args

    return prepare


# --- Which size a clip takes -----------------------------------------------------------------------------------------


def test_a_clip_takes_the_nearest_aspect_then_the_longest_that_it_fills(prepare_mixed):
    clips, args = prepare_mixed()
    assert {name: str(clip.bucket) for name, clip in clips.items()} == {
        name: size for name, (_, size) in CLIPS.items()
    }
    for clip in clips.values():
        latents = train_ltd.load_entry(args, clip.path)["latents"]
        frames, height, width = clip.bucket
        assert latents.shape == (16, (frames - 1) // 4 + 1, height // 8, width // 8)


def test_summary_counts_the_clips_of_each_size(prepare_mixed, log):
    prepare_mixed(sizes=[*SIZES, "96x32x13"])
    lines = [line for line in log() if "cropped away" in line]
    assert [line.split(";")[0] for line in lines] == [
        "64x32x9: 4 clips",
        "64x32x5: 2 clips",
        "32x64x9: 2 clips",
        "64x32x1: 2 clips",
    ]
    # 48 x 96 and 48 x 80 (width x height) to 32 x 64: by 2/3 and 4/5, of which the second cuts a sixth of the width
    assert "8% of the picture is cropped away, the rest is scaled by 0.73" in lines[2]
    assert "--sizes 96x32x13: no clip takes this size" in log("WARNING")


def test_no_size_for_pictures_or_for_videos_is_a_reason(prepare_mixed, tmp_path):
    clips, _ = prepare_mixed(sizes=["64x32x9", "64x32x5"], max_skipped=0.9)
    assert not any(name.startswith("still") for name in clips)
    reasons = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert reasons == [
        {"file": f"still{n}.png", "reason": "a picture, and --sizes has none of one frame"} for n in (0, 1)
    ]
    clips, _ = prepare_mixed(sizes=["64x32x1", "32x64x1"], max_skipped=0.9)
    assert set(clips) == {"still0.png", "still1.png"}


def test_pictures_beside_videos_are_told_the_size_that_they_need(flags, mixed):
    with pytest.raises(
        ValueError,
        match="2 are pictures beside videos, which take a size of one frame, such as --sizes 64x32x5 64x32x1",
    ):
        args = train_ltd.parse_args([*flags(**mixed_flags(mixed)), "--sizes", "64x32x5", "32x64x5"])
        train_ltd.identify_wan(args)
        train_ltd.prepare_data(args, train_ltd.build_accelerator(args), with_captions=False)


def test_another_size_on_the_list_encodes_only_what_moves_there(prepare_mixed):
    prepare_mixed()
    clips, _ = prepare_mixed(sizes=[*SIZES, "48x32x9"])
    assert {name for name, clip in clips.items() if clip.encoded} == {"wide1.mp4", "wide3.mp4"}
    assert {str(clips[name].bucket) for name in ("wide1.mp4", "wide3.mp4")} == {"48x32x9"}


def test_warm_start_decodes_nothing(prepare_mixed, monkeypatch):
    before, _ = prepare_mixed()
    monkeypatch.setattr(train_ltd, "frames_at", None)
    after, _ = prepare_mixed()
    assert {name: clip.path for name, clip in after.items()} == {name: clip.path for name, clip in before.items()}


def test_a_size_that_cannot_be_remembered_is_no_fault_of_the_clip(prepare_mixed, tmp_path):
    """As on a full disk; a file in the folder's place holds for root, too."""
    clips, *_ = prepare_mixed(cache_dir=tmp_path / "whole")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sizes").write_text("")
    again, *_ = prepare_mixed(cache_dir=tmp_path / "full")
    assert {name: clip.bucket for name, clip in again.items()} == {name: clip.bucket for name, clip in clips.items()}


def test_entry_is_that_of_a_run_of_this_size_alone(prepare_mixed, flags, mixed):
    _, args = prepare_mixed()
    line = flags(train_data_dir=mixed, height=32, width=64, num_frames=9, max_skipped=1.0, cache_dir=args.cache_dir)
    args = train_ltd.parse_args(line)
    alone, _, _ = train_ltd.prepare_data(args, train_ltd.build_accelerator(args), with_captions=False)
    encoded = {clip.name: clip.encoded for clip in alone}
    assert encoded["wide0.mp4"] is False and encoded["tall0.mp4"] is True


# --- The order of an epoch -------------------------------------------------------------------------------------------

A, B, C = (train_ltd.Bucket(frames, 32, 48) for frames in (9, 5, 1))


def order(counts: dict, per_update: int, epoch: int = 0) -> tuple[list[int], list]:
    clips = [SimpleNamespace(bucket=bucket) for bucket, count in counts.items() for _ in range(count)]
    sampler = train_ltd.BucketSampler(clips, per_update, seed=3)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    return indices, [clips[index].bucket for index in indices]


@pytest.mark.parametrize("per_update", [1, 2, 3, 4])
def test_each_update_has_one_size_and_no_sample_comes_twice(per_update):
    counts = {A: 11, B: 6, C: 4}
    seen = set()
    for epoch in range(4):
        indices, buckets = order(counts, per_update, epoch)
        assert len(set(indices)) == len(indices)
        for start in range(0, len(indices), per_update):
            assert len(set(buckets[start : start + per_update])) == 1
        found = Counter(buckets)
        assert found == {bucket: n // per_update * per_update for bucket, n in counts.items()}
        seen.update(indices)
        assert indices != order(counts, per_update, epoch + 1)[0]
    assert len(seen) == 21 or per_update == 4  # what is left out differs from epoch to epoch


@pytest.mark.parametrize("per_update", [1, 2, 3])
def test_with_one_size_the_order_is_that_of_torch_and_accelerate(per_update):
    """So that the weights are those of before."""
    from accelerate.data_loader import SeedableRandomSampler

    for epoch in (0, 2):
        count = 7 // per_update * per_update
        theirs = SeedableRandomSampler(range(7), num_samples=count, data_seed=3)
        theirs.set_epoch(epoch)
        assert order({A: 7}, per_update, epoch)[0] == list(theirs)


# --- Training --------------------------------------------------------------------------------------------------------

EVERY_UPDATE = {"max_train_steps": 6, "logging_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{}, {"train_batch_size": 2}, {"gradient_accumulation_steps": 2}])
def test_resume_is_bit_identical(run_mixed, tmp_path, variant):
    kwargs = EVERY_UPDATE | {"checkpointing_steps": 4, "validation_prompt": "x"} | variant
    kwargs |= {"validation_num_inference_steps": 2, "validation_steps": 100}
    straight = run_mixed(output_dir=tmp_path / "straight", **kwargs)
    resumed = tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-4", resumed / "checkpoint-4")
    run_mixed(output_dir=resumed, resume_from_checkpoint="latest", **kwargs)
    assert_same(weights(straight, "lora"), weights(resumed, "lora"))
    assert metrics(resumed) == metrics(straight)  # the rows until then came with the checkpoint
    card = (straight / "README.md").read_text()
    assert "| sizes | 64x32x9 64x32x5 32x64x9 64x32x1 |" in card


def test_batches_and_accumulation_see_the_same_updates(run_mixed, tmp_path):
    batch = run_mixed(output_dir=tmp_path / "batch", train_batch_size=2, **EVERY_UPDATE)
    accumulated = run_mixed(output_dir=tmp_path / "accumulated", gradient_accumulation_steps=2, **EVERY_UPDATE)
    assert metrics(batch) == pytest.approx(metrics(accumulated), rel=1e-5)


@pytest.mark.slow
def test_two_processes_equal_accumulation(run_mixed, flags, mixed, tmp_path):
    alone = run_mixed(output_dir=tmp_path / "alone", gradient_accumulation_steps=2, **EVERY_UPDATE)
    line = flags(**mixed_flags(mixed, output_dir=tmp_path / "two", **EVERY_UPDATE))
    result = launch([*line, "--sizes", *SIZES], processes=2)
    assert result.returncode == 0, result.stderr
    assert_same(weights(alone, "lora"), weights(tmp_path / "two", "lora"))


@pytest.mark.slow
def test_compiled_graphs_do_not_grow_with_the_number_of_sizes(run_mixed, log, monkeypatch):
    """At most six: two kinds of block (the first needs no gradient of its input), by three of dimensions.

    What traces them is the compiler's first half; their C++ takes minutes, and has no part in their number.
    """
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_mixed(sizes=[*SIZES, "48x32x9", "32x48x9"], torch_compile=True, max_train_steps=10)
    said = next(line for line in log() if line.startswith("compiled graphs: "))
    graphs = int(re.match(r"compiled graphs: (\d+), for 6 sizes", said)[1])
    assert 2 <= graphs <= 6
    torch._dynamo.reset()


def test_a_size_with_too_few_clips_is_refused_by_name(run_mixed):
    with pytest.raises(ValueError, match=r"2 clips of 64x32x[15] are fewer than the 3 of one .*take the size off"):
        run_mixed(sizes=["64x32x9", "64x32x5", "64x32x1"], train_batch_size=3, max_skipped=1.0)


def test_motion_bounds_are_weighted_by_voxels_and_leave_pictures_out():
    levels = np.linspace(0, 1, 21)
    clips = [
        SimpleNamespace(bucket=A, ltd_per_frame=[0] * 3, ltd_quantiles=list(10 * levels)),
        SimpleNamespace(bucket=A._replace(frames=81), ltd_per_frame=[0] * 21, ltd_quantiles=list(levels)),
        SimpleNamespace(bucket=C, ltd_per_frame=[0], ltd_quantiles=[0.0] * 21),
    ]
    low, high = train_ltd.LatentDataset(clips, {}, SimpleNamespace()).motion_bounds(torch.device("cpu")).tolist()
    # Of 24 parts 3 lie evenly in 0..10 and 21 evenly in 0..1.
    assert low == pytest.approx(0.55, abs=0.06) and high == pytest.approx(2.0, abs=1.1)
    values = np.concatenate([np.linspace(0, 10, 3000), np.linspace(0, 1, 21000)])
    assert np.quantile(values, [0.5, 0.9]) == pytest.approx([low, high], abs=0.06)


def test_images_have_the_weight_two_and_no_motion(prepare_mixed):
    clips, args = prepare_mixed()
    latents = train_ltd.load_entry(args, clips["still0.png"].path)["latents"][None]
    prediction, target = torch.randn(2, *latents.shape)
    batch = {"latents": latents}
    loss = train_ltd.compute_loss(prediction, target, batch, args)
    assert loss.item() == pytest.approx(2 * torch.nn.functional.mse_loss(prediction, target).item(), rel=1e-6)
    assert clips["still0.png"].ltd == 0


# --- Several sources -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_sources(tmp_path) -> Path:
    """A recipe of two folders, one of which has a table with columns of other names and is repeated."""
    (tmp_path / "cats").mkdir()
    for number in range(5):
        write_clip(tmp_path / "cats" / f"{number}.mp4", number)
        (tmp_path / "cats" / f"{number}.txt").write_text(f"a cat, number {number}")
    (tmp_path / "dogs").mkdir()
    rows = []
    for number in range(3):
        write_clip(tmp_path / "dogs" / f"{number}.mp4", number, frames=20)
        rows.append(json.dumps({"clip": f"{number}.mp4", "caption": f"a dog, number {number}"}))
    (tmp_path / "dogs/metadata.jsonl").write_text("\n".join(rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sources:\n- path: {tmp_path}/cats\n- path: {tmp_path}/dogs\n  repeats: 2\n  caption_column: caption\n"
        "  video_column: clip\n"
    )
    return recipe


def test_run_on_two_sources(run, two_sources, tmp_path, log):
    output = run(
        config=two_sources,
        train_data_dir=None,
        validation_fraction=0.3,
        max_eval_clips=2,
        max_train_steps=2,
    )
    row = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert {"val/mse_cats", "val/mse_dogs"} < set(row)  # the first two that are measured are one of each
    assert row["val/mse"] == pytest.approx((row["val/mse_cats"] + row["val/mse_dogs"]) / 2)
    card = (output / "README.md").read_text()
    assert "| clips | 5, and 3 held out, 7 samples an epoch |" in card  # of 5 cats 2 are held out, of 3 dogs 1
    assert str(tmp_path) not in card and str(tmp_path) not in (output / "training_settings.json").read_text()
    lines = [line for line in log() if "times an epoch" in line]
    assert [line.split(";")[0].split("/")[-1] for line in lines] == [
        "cats: 3 clips, 1 times an epoch",
        "dogs: 2 clips, 2 times an epoch",
    ]


def test_repeats_are_samples_with_noise_of_their_own(run, two_sources):
    seen = []

    def keep(prediction, target, batch, args):
        seen.append((batch["name"][0], batch["noise"].sum().item()))
        return train_ltd.compute_loss(prediction, target, batch, args)

    run(keep, config=two_sources, train_data_dir=None, max_train_steps=11)
    assert len(set(seen)) == 11  # 5 cats and twice 3 dogs
    names = Counter(name for name, _ in seen)
    assert sorted(names.values()) == [1, 1, 3, 3, 3]  # 0 to 2 are names of both


def test_a_copy_in_another_source_is_not_trained_on(prepare, clips, tmp_path):
    """The best clips once more, in a folder of their own: a held-out one is held out of both."""
    best = shutil.copytree(clips, tmp_path / "best")
    lines = (best / "metadata.jsonl").read_text().splitlines()
    leaks = 0
    for kept in ([0, 1], [2, 3], [4, 5]):
        (best / "metadata.jsonl").write_text("\n".join(lines[i] for i in kept))
        training, held_out, _, _ = prepare(train_data_dir=[clips, best], validation_fraction=0.3)
        leaks += len({clip.identity for clip in training} & {clip.identity for clip in held_out})
    assert leaks == 0


# --- What the report proposes ----------------------------------------------------------------------------------------


def test_report_proposes_sizes_that_fit_the_folder(mixed, tiny_wan, tmp_path, capsys):
    line = ["report", f"--train_data_dir={mixed}", f"--output_dir={tmp_path}", "--report_to=none", "--fps=16"]
    line += [f"--pretrained_model_name_or_path={tiny_wan}", "--height=32", "--width=64", "--num_frames=9"]
    visualize_ltd.main(visualize_ltd.parse_args(line))
    said = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("--sizes"))
    match = re.fullmatch(r"--sizes ([\dx ]+) would take (\d+) of 10 clips and crop away (\d+)% of .*", said)
    sizes = match[1].split()
    assert {"64x32x9", "64x32x5", "32x64x9", "64x32x1"} <= set(sizes) and int(match[2]) >= 9 and int(match[3]) <= 8
    # And that is what a run with this line does.
    line = [f"--pretrained_model_name_or_path={tiny_wan}", f"--train_data_dir={mixed}", f"--output_dir={tmp_path}/run"]
    line += ["--report_to=none", "--fps=16", "--max_skipped=0.5", "--sizes", *sizes]
    args = train_ltd.parse_args(line)
    train_ltd.identify_wan(args)
    clips, _, _ = train_ltd.prepare_data(args, train_ltd.build_accelerator(args), with_captions=False)
    assert len(clips) == int(match[2])
    assert np.mean([clip.crop_fraction for clip in clips]) == pytest.approx(int(match[3]) / 100, abs=0.006)
