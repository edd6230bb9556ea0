"""The run as a whole: ten promises first, then the loop, the ranks and how they are launched."""

import enum
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import datasets
import generate
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import CPU, HEIGHT, HOUR, NUM_FRAMES, ROOT, STEPS, WIDTH, launch, launch_for_real, launcher, write_clip
from corpus import NAMES, ffmpeg_frames, metadata_folder
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from helpers import (
    LOOKS,
    assert_same,
    checkpoints,
    code_block,
    encoded,
    kill,
    metrics,
    needs_torchao,
    output_of,
    run_in_a_process,
    same_weights,
    strike,
    trained_output,
    weights,
)
from hub_server import HubServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import ltd_loss
import train_ltd

# The ten sacred tests: whatever else changes, these stay.


@pytest.mark.parametrize("loss", ["ltd", "mse"])
@pytest.mark.parametrize("normalize", [False, True])
def test_training_loss_is_equation_3_on_rectified_flow(run, monkeypatch, loss, normalize):
    """In the step itself: what the model is given, what comes out, what it is compared to, and what is logged."""
    given, compared = {}, {}
    forward = WanTransformer3DModel.forward

    def record_input(self, **kwargs):
        given.update(kwargs)
        return forward(self, **kwargs)

    def record_loss(prediction, target, batch, args):
        compared.update(batch, prediction=prediction.detach(), target=target)
        return train_ltd.compute_loss(prediction, target, batch, args)

    monkeypatch.setattr(WanTransformer3DModel, "forward", record_input)
    output = run(
        record_loss,
        loss=loss,
        ltd_normalize=normalize,
        ltd_scale=2,
        ltd_strength=3,
        ltd_window=4,
        num_frames=17,
        train_batch_size=2,
        max_train_steps=1,
    )
    latents, noise, sigmas, prediction = (compared[k] for k in ("latents", "noise", "sigmas", "prediction"))
    assert latents.shape == (2, 16, 5, 4, 6)
    target = noise - latents
    expected = F.mse_loss(prediction, target)
    if loss == "ltd":
        expected = ltd_loss.ltd_loss(prediction, target, latents, 4, scale=2, strength=3, normalize=normalize)
    assert metrics(output) == {1: pytest.approx(expected.item())} and torch.equal(compared["target"], target)
    assert sigmas[0] != sigmas[1] and torch.equal(given["timestep"], 1000 * sigmas)
    assert given["timestep"].dtype == torch.float32
    assert torch.equal(given["encoder_hidden_states"], compared["prompt_embeds"])
    for n in (0, 1):
        mixed = (1 - sigmas[n]) * latents[n] + sigmas[n] * noise[n]
        torch.testing.assert_close(given["hidden_states"][n], mixed)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_golden_latents(prepare, tiny_wan, originals, expected_latents, tmp_path, dtype):
    """The mode of the VAE's posterior, normalised; decoded, it is the VAE's own reconstruction."""
    clips, _, _, args = prepare(**metadata_folder(originals, tmp_path / "data", "metadata.csv"), cache_dtype=dtype)
    vae = AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae")
    mean, std = (torch.tensor(c).view(1, -1, 1, 1, 1) for c in (vae.config.latents_mean, vae.config.latents_std))
    for clip, name, expected in zip(clips, NAMES, expected_latents, strict=True):
        latents = load_file(Path(args.cache_dir, clip.path))["latents"]
        assert latents.dtype == getattr(torch, dtype) and latents.shape == (16, 3, HEIGHT // 8, WIDTH // 8)
        tolerance = 1e-5 if dtype == "float32" else 5e-3
        torch.testing.assert_close(latents.float(), expected, rtol=0, atol=tolerance)
        pixels = ffmpeg_frames(originals / name, HEIGHT, WIDTH)[:NUM_FRAMES].float().div(127.5).sub(1)
        with torch.no_grad():
            own = vae(pixels.transpose(0, 1)[None]).sample
            decoded = vae.decode(latents[None].float() * std + mean).sample
        assert (decoded - own).abs().mean() < 2 * tolerance
    item = train_ltd.LatentDataset(clips, prepare(train_data_dir=tmp_path / "data", cache_dtype=dtype)[2], args)[2]
    stored = load_file(Path(args.cache_dir, clips[2].path))["latents"]
    assert torch.equal(item["latents"], stored.float())


RESUMES = {
    "lora": {"train_type": "lora"},
    "full": {"train_type": "full", "rank": None},
    "lora, accumulation, EMA, dropout": {
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "lora_dropout": 0.3,
        "lr_scheduler": "cosine",
    },
    "full, accumulation, EMA": {
        "train_type": "full",
        "rank": None,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
    },
    "lora, batch 2, a loader process": {"train_batch_size": 2, "dataloader_num_workers": 1},
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * ("process" in name)) for name in RESUMES]
)
def test_resume_is_bit_identical(run, flags, tmp_path, variant):
    """6 steps straight against 4 and 2 resumed, in the middle of an epoch (7 clips: 7 or 3 updates an epoch)."""
    kwargs = {"max_train_steps": 6, "checkpointing_steps": 4} | RESUMES[variant]
    train_type = kwargs.get("train_type", "lora")
    straight = run(output_dir=tmp_path / "straight", **kwargs)
    resumed = tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-4", resumed / "checkpoint-4")
    run(output_dir=resumed, resume_from_checkpoint="latest", **kwargs)
    assert_same(weights(straight, train_type), weights(resumed, train_type))
    for name in ("optimizer.bin", "scheduler.bin"):
        a, b = (torch.load(f / "checkpoint-6" / name, weights_only=True) for f in (straight, resumed))
        assert str(a) == str(b)
    assert metrics(resumed) == metrics(straight)  # the rows until then came with the checkpoint


@pytest.mark.slow
def test_two_processes_equal_accumulation_bitwise(run, flags, tmp_path):
    alone = run(output_dir=tmp_path / "alone", max_train_steps=3, gradient_accumulation_steps=2, logging_steps=1)
    line = flags(output_dir=tmp_path / "two", max_train_steps=3, logging_steps=1)
    result = launch_for_real(line, processes=2)
    assert result.returncode == 0, result.stderr
    assert "| hardware | 2 x" in (tmp_path / "two/README.md").read_text()
    assert_same(weights(alone, "lora"), weights(tmp_path / "two", "lora"))
    assert metrics(alone, "mse") == pytest.approx(metrics(tmp_path / "two", "mse"), rel=1e-6)


@pytest.mark.parametrize("alpha", [4, 8, 3])
@pytest.mark.parametrize("file", [train_ltd.LORA_FILE, "run.safetensors"])
def test_lora_loads_in_the_stock_pipeline(monkeypatch, run, tiny_wan, alpha, file):
    output, expected = trained_output(monkeypatch, run, lora_alpha=alpha, max_train_steps=3)
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    before = output_of(pipeline.transformer)
    pipeline.load_lora_weights(output / file)
    after = output_of(pipeline.transformer)
    assert (before - expected).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=2e-6)


def test_full_weights_load_in_the_stock_model(monkeypatch, run, tiny_wan):
    output, expected = trained_output(monkeypatch, run, train_type="full", rank=None, max_train_steps=3)
    model = WanTransformer3DModel.from_pretrained(output, subfolder="transformer")
    torch.testing.assert_close(output_of(model), expected, rtol=1e-5, atol=2e-6)
    assert "_name_or_path" not in json.loads((output / "transformer/config.json").read_text())
    base = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer").state_dict()
    same = [k for k, v in model.state_dict().items() if torch.equal(v, base[k])]
    assert same == []


def test_sample_equals_the_stock_pipeline(run, tiny_wan, tmp_path, monkeypatch):
    frames = {}

    def keep(video, path, fps):
        frames.setdefault(path, video)
        Path(path).touch()

    monkeypatch.setattr(train_ltd, "export_to_video", keep)
    run(
        validation_prompt="a square",
        validation_num_inference_steps=3,
        validation_negative_prompt="ugly",
        cache_dtype="float32",
    )
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.set_progress_bar_config(disable=True)
    kwargs = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": NUM_FRAMES,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
    }
    generator = torch.Generator().manual_seed(3)
    expected = pipeline("a square", negative_prompt="ugly", generator=generator, **kwargs).frames[0]
    video = next(v for k, v in frames.items() if "step-000000-0" in k)
    assert abs(video - expected).max() < 1e-5


@pytest.mark.parametrize("extra", [{}, {"lora_dropout": 0.5, "use_ema": True}])
def test_looking_does_not_move_training(run, tmp_path, extra):
    kwargs = {"max_train_steps": 4, "validation_fraction": 0.2} | extra
    looking = run(output_dir=tmp_path / "looking", **kwargs, **LOOKS)
    blind = run(output_dir=tmp_path / "blind", max_eval_clips=1, eval_steps=100, **kwargs)
    assert_same(weights(looking, "lora"), weights(blind, "lora"))
    assert metrics(looking) == metrics(blind)


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_code_of_the_card_runs(run, tiny_wan, tmp_path, monkeypatch, train_type):
    """As a user does: copy it from the card, run it where base and weights go by the names in it."""
    output = run(train_type=train_type, rank=None, validation_num_inference_steps=2, validation_prompt="a square")
    code = code_block((output / "README.md").read_text())
    (tmp_path / "tiny-wan").symlink_to(tiny_wan)
    monkeypatch.chdir(tmp_path)
    loaded = {}
    exec(compile(code, "README.md", "exec"), loaded)
    with av.open("output.mp4") as video:
        frames = list(video.decode(video=0))
        assert (len(frames), frames[0].width, frames[0].height) == (NUM_FRAMES, WIDTH, HEIGHT)
    base = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer", dtype=torch.bfloat16)
    trained = loaded["pipe"].transformer
    assert not torch.equal(output_of(trained.float()), output_of(base.float()))


POINTS = {
    "a step": (train_ltd, "predict_flow", 4),
    "a checkpoint's state": (torch, "save", 4),
    "a checkpoint's weights": (train_ltd, "save_weights", 2),
    "a checkpoint's rename": (Path, "rename", 2),
    "after its rename": (train_ltd, "list_checkpoints", 2),
    "the final weights": (train_ltd.WanPipeline, "save_lora_weights", 4),
    "the card": (train_ltd, "model_card", 1),
}


def killed_at(line: list[str], point: str) -> None:
    strike(pytest.MonkeyPatch(), *POINTS[point], kill)
    run_in_a_process(line)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_kill_at(run, flags, forks, straight, tmp_path, point):
    process = forks.Process(target=killed_at, args=(flags(**STEPS), point))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = tmp_path / "run"
    assert all(train_ltd.is_intact(c) for c in train_ltd.list_checkpoints(folder))
    assert same_weights(run(**STEPS, resume_from_checkpoint="latest"), straight)
    assert checkpoints(folder)[-1] == "checkpoint-3" and not list(folder.glob(".checkpoint-*"))


# --- The loop --------------------------------------------------------------------------------------------------------


def test_batch_equals_accumulation_to_rounding(run, tmp_path):
    kwargs = {"max_train_steps": 3, "learning_rate": 1e-4}
    a = weights(run(output_dir=tmp_path / "a", gradient_accumulation_steps=2, **kwargs), "lora")
    b = weights(run(output_dir=tmp_path / "b", train_batch_size=2, **kwargs), "lora")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-6)


def test_incomplete_batches_are_dropped(run, tmp_path):
    """7 clips in updates of 4: one update an epoch, whose clips differ from epoch to epoch."""
    run(train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=3, max_train_steps=None)
    assert set(metrics(tmp_path / "run")) == {1, 2, 3}


def test_too_few_clips_for_one_update(run, tmp_path):
    """Refused before a text encoder is loaded, and what could be lowered is named."""
    wanted = "7 clips are fewer than the 8 of one update; lower --gradient_accumulation_steps 8, or add clips"
    with pytest.raises(ValueError, match=wanted):
        run(gradient_accumulation_steps=8, cache_dir=tmp_path / "cold")
    assert {path.parent.name for path in encoded(tmp_path / "cold")} == {"latents"}


def test_a_trial_on_the_first_rows(run, prepare, tmp_path):
    """--max_train_samples counts rows of the dataset, before any is encoded."""
    clips, held_out, _, _ = prepare(max_train_samples=4, validation_fraction=0.25, cache_dir=tmp_path / "cold")
    assert sorted(clip.name for clip in clips + held_out) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert len(list((tmp_path / "cold/latents").iterdir())) == 4
    assert len(prepare(max_train_samples=100)[0]) == 7
    card = (run(max_train_samples=4, max_train_steps=1) / "README.md").read_text()
    assert "| clips | 4, and 0 held out |" in card and "| updates | 1 of 1 clips, 4 an epoch |" in card


@pytest.mark.parametrize(("max_skipped", "verdict"), [(0.3, "go on without them"), (0.2, "refuse")])
def test_a_trial_looks_through_all_clips(run, clips, tmp_path, log, max_skipped, verdict):
    """Those beyond it too: it names what would be skipped, and says whether the whole run would refuse."""
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    (folder / "5.mp4").write_bytes(b"no video")
    write_clip(folder / "6.mp4", frames=5)
    kwargs = {"train_data_dir": folder, "max_skipped": max_skipped}
    output = run(max_train_samples=4, max_train_steps=1, **kwargs)
    (message,) = [line for line in log("WARNING") if "would be skipped" in line]
    assert f"of all 7 videos, 2 would be skipped, and the whole run, with --max_skipped {max_skipped}, " in message
    assert f"would {verdict}: 5.mp4: cannot be read: " in message
    rows = [json.loads(line) for line in (output / "trial_skipped.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["5.mp4", "6.mp4"]
    assert rows[1]["reason"] == "too short: 5 frames at 16 fps, 9 needed"
    if verdict == "refuse":
        with pytest.raises(ValueError, match="2 of 7 videos cannot be used"):
            run(output_dir=tmp_path / "whole", **kwargs)
    else:
        run(output_dir=tmp_path / "whole", **kwargs)
        skipped = [json.loads(line) for line in (tmp_path / "whole/skipped.jsonl").read_text().splitlines()]
        assert [row["file"] for row in skipped] == ["5.mp4", "6.mp4"]


def test_a_trial_on_the_first_rows_is_shared_by_the_ranks(flags):
    args = train_ltd.parse_args(flags(max_train_samples=5))
    numbers = []
    for rank in range(2):
        reader = train_ltd.ClipReader(args, "train", SimpleNamespace(process_index=rank, num_processes=2))
        numbers.append([number for (_, number), _ in reader.rows()])
        assert reader.count() == len(numbers[rank])
    assert numbers == [[0, 2, 4], [1, 3]]


def estimate_of(folder: Path) -> dict:
    return json.loads((folder / train_ltd.ESTIMATE_FILE).read_text())


def test_what_the_run_will_take_is_said_after_its_first_steps(run, clock, log, monkeypatch):
    """On a clock of our own: the first step takes 60 s, the others 2; held-out errors 100, samples 1000."""
    steps = []

    def work(*args):
        clock.seconds += 2 if steps else 60
        steps.append(1)
        return train_ltd.compute_loss(*args)

    strike(monkeypatch, train_ltd, "prepare_data", None, lambda: clock.pass_time(700))
    strike(monkeypatch, train_ltd, "evaluate", None, lambda: clock.pass_time(100))
    strike(monkeypatch, train_ltd, "sample_videos", None, lambda: clock.pass_time(1000))
    kwargs = LOOKS | {"eval_steps": 4, "validation_steps": 5}
    output = run(work, **kwargs, validation_fraction=0.2, max_train_steps=11, checkpointing_steps=3)
    estimate = estimate_of(output)
    hours = {name: round(3600 * value) for name, value in estimate["hours"].items()}
    # Evaluated at 0, 4, 8, 11, sampled at 0, 5, 10, 11
    assert hours == {"caching": 700, "training": 22, "evaluating": 400, "sampling": 4000}
    assert estimate["total_hours"] == pytest.approx(5122 / 3600)
    assert (estimate["seconds_per_step"], estimate["measured_steps"]) == (pytest.approx(2), 4)
    assert (estimate["checkpoints"], estimate["steps"], estimate["processes"]) == (4, 11, 1)
    (line,) = [line for line in log("INFO") if line.startswith("computed for the whole run from 4 steps of 2 s")]
    assert "11 steps in 1:25:22 (caching 0:11:40, training 0:00:22" in line and "1000 steps 0:33:20" in line


def test_what_a_trial_says_of_the_whole_folder(run, clock, log, monkeypatch, tmp_path):
    """Three of seven rows, each encoded in 10 s: all of them take 70 s."""

    def work(*args):
        clock.seconds += 2
        return train_ltd.compute_loss(*args)

    strike(monkeypatch, train_ltd, "encode_video", None, lambda: clock.pass_time(10))
    epochs = {"max_train_steps": None, "num_train_epochs": 5}
    output = run(work, max_train_samples=3, cache_dir=tmp_path / "cold", **epochs)
    estimate = estimate_of(output)
    assert 3600 * estimate["hours"]["caching"] == pytest.approx(70)
    assert (estimate["clips"], estimate["updates_per_epoch"], estimate["steps"]) == (7, 7, 35)
    assert 3600 * estimate["hours"]["training"] == pytest.approx(70)
    cached = sum(path.stat().st_size for path in (tmp_path / "cold/latents").iterdir())
    assert estimate["cache_gib"] == pytest.approx(cached / 3 * 7 / 2**30)
    assert any(line.startswith("computed for all 7 videos from 4 steps of 2 s: 35 steps") for line in log("INFO"))


def test_a_trial_is_for_a_run_of_the_length_of_its_recipe(run, clock, log, tmp_path):
    def work(*args):
        clock.seconds += 2
        return train_ltd.compute_loss(*args)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_train_steps: 40\ncheckpointing_steps: 20\n")
    output = run(work, config=recipe, max_train_samples=3, max_train_steps=2, checkpointing_steps=None)
    estimate = estimate_of(output)
    assert (estimate["steps"], estimate["checkpoints"]) == (40, 2)
    assert 3600 * estimate["hours"]["training"] == pytest.approx(80)
    assert any(line.startswith("computed for all 7 videos from 1 steps of 2 s: 40 steps") for line in log("INFO"))


@pytest.mark.parametrize(
    ("own", "recipe", "length"),
    [
        ({"max_train_steps": 3}, "", (1000, None)),
        ({"max_train_steps": 3, "train_type": "full", "rank": None}, "", (None, 2)),
        ({"max_train_steps": 3}, "num_train_epochs: 4", (None, 4)),
        ({"max_train_steps": 5000}, "max_train_steps: 40", (5000, None)),  # more than a trial
        ({"max_train_steps": None, "num_train_epochs": 5}, "max_train_steps: 40", (None, 5)),
    ],
)
def test_the_length_that_a_trial_is_for(flags, tmp_path, own, recipe, length):
    (tmp_path / "recipe.yaml").write_text(recipe or "rank: 4")
    args = train_ltd.parse_args(flags(config=tmp_path / "recipe.yaml", **own))
    whole = train_ltd.whole_length(args)
    assert (whole.max_train_steps, whole.num_train_epochs) == length


def test_a_trial_downloads_no_other_videos_of_a_hub_dataset(flags, log, monkeypatch):
    rows = datasets.Dataset.from_list([{"video": f"{number}.mp4", "text": "a"} for number in range(12)])
    monkeypatch.setattr(train_ltd, "open_dataset", lambda args, split: (rows, Path("user/clips")))
    args = train_ltd.parse_args(flags(train_data_dir=None, dataset_name="user/clips", max_train_samples=3))
    train_ltd.build_accelerator(args)
    assert train_ltd.survey(args) == 12
    assert log("INFO") == ["of the 12 videos of user/clips only those of this trial were looked at"]


def test_what_is_loaded_once_is_counted_once_in_the_estimate_of_a_trial(run, clock, log, monkeypatch, tmp_path):
    """300 s to load VAE and text encoder, 5 s a clip: seven clips take 335 s, of which one was tried."""

    def work(*args):
        clock.pass_time(2)
        return train_ltd.compute_loss(*args)

    load = WanPipeline.from_pretrained.__func__

    def slowly(cls, *args, **kwargs):
        clock.pass_time(200)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(WanPipeline, "from_pretrained", classmethod(slowly))
    strike(monkeypatch, train_ltd, "load_vae", 1, lambda: clock.pass_time(100))
    strike(monkeypatch, train_ltd, "encode_video", None, lambda: clock.pass_time(5))
    kwargs = {"max_train_samples": 1, "cache_dir": tmp_path / "cold"}
    for expected, warned in ((335, False), (0, True)):
        output = run(work, **kwargs, overwrite_output_dir=True)
        hours = json.loads((output / train_ltd.ESTIMATE_FILE).read_text())["hours"]
        assert 3600 * hours["caching"] == pytest.approx(expected)
        assert any("were in the cache" in line for line in log("WARNING")) == warned


def test_a_trial_says_what_all_held_out_clips_take(run, clock, monkeypatch):
    strike(monkeypatch, train_ltd.LatentDataset, "load_fixed", None, lambda: clock.pass_time(10))
    output = run(
        lambda *args: clock.pass_time(2) or train_ltd.compute_loss(*args),
        max_train_samples=2,
        validation_fraction=0.4,
        max_train_steps=1,
    )
    hours = json.loads((output / train_ltd.ESTIMATE_FILE).read_text())["hours"]
    # Before the first step, every 250 and after the last of 1000; 0.4 of seven clips
    assert 3600 * hours["evaluating"] == pytest.approx(5 * 3 * 10)


@pytest.mark.parametrize(
    "kwargs", [{"train_type": "lora", "rank": 64}, {"train_type": "full", "rank": None}, {"rank": 64, "use_ema": True}]
)
def test_the_size_of_a_checkpoint_is_computed_right(run, kwargs):
    """The tensors in it; the headers of files do not grow with the model."""
    output = run(**kwargs)
    optimizer = torch.load(output / "checkpoint-2/optimizer.bin", weights_only=True)["state"]
    moments = sum(state[name].nbytes for state in optimizer.values() for name in ("exp_avg", "exp_avg_sq"))
    files = list((output / "checkpoint-2").rglob("*.safetensors"))
    size = moments + sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert estimate_of(output)["checkpoint_gib"] * 2**30 == pytest.approx(size)


def test_checkpoints_that_will_not_fit_are_said_beforehand(run, log, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    run()
    assert [line for line in log("WARNING") if "will not fit on the disk: --checkpoints_total_limit 2" in line]


def test_clips_in_a_folder_called_samples_outlive_the_run(run, clips, tmp_path):
    """A run clears its own samples in OUTPUT_DIR/samples, and nothing else that is there."""
    project = tmp_path / "project"
    shutil.copytree(clips, project / "samples")
    (project / "samples/step-000002-0-old.mp4").write_bytes((clips / "0.mp4").read_bytes())
    before = sorted(path.name for path in clips.iterdir())
    run(train_data_dir=project / "samples", output_dir=project, max_train_steps=1)
    assert sorted(path.name for path in (project / "samples").iterdir()) == before


def test_a_readme_of_something_else_is_not_replaced(run, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# My project")
    with pytest.raises(ValueError, match=r"--output_dir .*project holds a README\.md of something else"):
        run(output_dir=project)
    assert (project / "README.md").read_text() == "# My project"
    kwargs = {"output_dir": project, "lr_scheduler": "constant"}
    run(**kwargs, overwrite_output_dir=True, max_train_steps=1)
    run(**kwargs, resume_from_checkpoint="latest", max_train_steps=2)  # beside a card of its own


def test_the_rate_that_is_logged_is_that_of_the_step(run):
    """With three steps of warm-up, the first is at a rate of zero."""
    output = run(lr_scheduler="constant_with_warmup", lr_warmup_steps=3, learning_rate=3e-4, max_train_steps=4)
    assert metrics(output, "lr") == pytest.approx({1: 0, 2: 1e-4, 3: 2e-4, 4: 3e-4})


# --- The end ---------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_one_that_is_there_and_was_evaluated(flags, tmp_path):
    args = train_ltd.parse_args(flags())
    folder = tmp_path / "run"
    for step in (4, 6, 8):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}/settings.json").touch()
    assert train_ltd.best_checkpoint(args) is None
    # Step 2 has no checkpoint any more, step 6 was not evaluated; of step 4 the last row counts.
    rows = [{"step": 2, "val/mse": 0.1}, {"step": 4, "val/mse": 0.2}, {"step": 4, "val/mse": 0.5}]
    rows += [{"step": 6, "mse": 0.0}, {"step": 8, "val/mse": 0.6}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train_ltd.best_checkpoint(args) == (folder / "checkpoint-4", 0.5)


def test_the_last_lines_say_what_to_type_next(run, log, monkeypatch, tmp_path):
    """The commands name files that are there and flags that `generate.py` takes; the last one makes the gallery."""
    errors = iter([0.9, 0.5, 0.7])
    monkeypatch.setattr(train_ltd, "held_out_metrics", lambda *args: {"val/mse": next(errors)})
    kwargs = {"validation_fraction": 0.2, "eval_steps": 1, "checkpointing_steps": 1}
    output = run(
        output_dir=tmp_path / "it's mine", validation_prompt="a dog's jump", validation_num_inference_steps=2, **kwargs
    )
    lines = log("INFO")
    assert f"the lowest held-out error of a checkpoint, val/mse 0.5000, is that of {output}/checkpoint-1" in lines
    use = next(line for line in lines if line.startswith("to use it: "))
    words = shlex.split(use.removeprefix("to use it: "))
    assert words[words.index("--lora") + 1] == f"{output}/checkpoint-1"
    assert words[words.index("--prompt") + 1] == "a dog's jump"
    args = generate.parse_args(words[2:])
    assert Path(args.output_dir) == output / "videos/tuned"
    gallery = shlex.split(lines[-1].removeprefix("to see the samples: "))
    assert gallery[0] == "python" and Path(gallery[1]).resolve() == ROOT / "examples/gallery.py"
    assert gallery[2:] == [str(output)]
    assert any("--push_to_hub --resume_from_checkpoint latest" in line for line in lines)


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_bf16_trains(run, train_type):
    kwargs = {"validation_prompt": "a", "validation_num_inference_steps": 2, "validation_fraction": 0.2}
    output = run(train_type=train_type, rank=None, mixed_precision="bf16", **kwargs)
    assert all(math.isfinite(v) for v in metrics(output).values())
    assert {v.dtype for v in weights(output, train_type).values()} == {torch.float32}


class Casts(TorchDispatchMode):
    """Watches the bfloat16 copies that autocast makes of trained weights."""

    def __init__(self):
        super().__init__()
        self.copies = []  # (storage, bytes)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and args[0].is_leaf and args[0].requires_grad:
            self.copies.append((StorageWeakRef(result.untyped_storage()), result.nbytes))
        return result

    def bytes_alive(self) -> int:
        return sum(size for storage, size in self.copies if not storage.expired())


def test_autocast_keeps_no_copies_of_the_blocks_weights(run, monkeypatch):
    """At the end of the forward pass of a full fine-tune with checkpointing, but still under autocast."""
    seen = []
    forward = WanTransformer3DModel.forward

    def watch(self, **kwargs):
        with Casts() as casts:
            result = forward(self, **kwargs)
            in_blocks = sum(p.numel() for p in self.blocks.parameters())
            outside = sum(p.numel() for p in self.parameters()) - in_blocks
            seen.append((casts.bytes_alive(), sum(size for _, size in casts.copies), 2 * in_blocks, 2 * outside))
        return result

    monkeypatch.setattr(WanTransformer3DModel, "forward", watch)
    run(train_type="full", rank=None, mixed_precision="bf16", max_train_steps=1)
    for alive, copied, in_blocks, outside in seen:
        assert copied > 0.9 * in_blocks and alive <= outside < in_blocks


@pytest.mark.slow
def test_learns(run, tmp_path):
    """Plain overfitting: the loss falls well below its start."""
    losses = metrics(
        run(train_type="full", rank=None, max_train_steps=120, logging_steps=20, learning_rate=5e-3), "mse"
    )
    assert losses[120] < 0.7 * losses[20]


def test_non_finite_step_is_skipped_and_counted(run, tmp_path, caplog):
    run(max_train_steps=1)
    entry = sorted((tmp_path / "cache/latents").iterdir())[0]
    tensors = load_file(entry)
    save_file(tensors | {"latents": torch.full_like(tensors["latents"], torch.nan)}, entry)
    output = run(max_train_steps=7, overwrite_output_dir=True)
    assert max(metrics(output, "skipped_steps").values()) == 1
    assert sum("skipped: its loss or gradient is not finite" in r.message for r in caplog.records) == 1
    assert all(v.isfinite().all() for v in weights(output, "lora").values())


def test_ten_bad_steps_stop_the_run(run, tmp_path):
    run(max_train_steps=1)
    for entry in (tmp_path / "cache/latents").iterdir():
        tensors = load_file(entry)
        save_file(tensors | {"latents": torch.full_like(tensors["latents"], torch.inf)}, entry)
    with pytest.raises(RuntimeError, match=r"10 steps in a row were not finite; clips of the last one: \d.mp4"):
        run(max_train_steps=20, overwrite_output_dir=True)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
def test_8_bit_adam_trains_and_resumes(run, tmp_path):
    kwargs = {"train_type": "full", "rank": None, "optimizer": "adamw8bit", "checkpointing_steps": 2}
    straight, resumed = run(output_dir=tmp_path / "straight", max_train_steps=4, **kwargs), tmp_path / "resumed"
    state = torch.load(straight / "checkpoint-4/optimizer.bin", weights_only=True)["state"].values()
    assert any("__bnb_optimizer_quant_state__" in row for row in state)  # bitsandbytes' own
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    run(output_dir=resumed, resume_from_checkpoint="latest", max_train_steps=4, **kwargs)
    assert_same(weights(straight, "full"), weights(resumed, "full"))


# --- Switches of memory and speed: the gradients that `main` trains by -----------------------------------------------

PLAIN = {"gradient_checkpointing": "none", "max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 2}
# How far the gradients of all updates and the last weights may be from those of plain training, as a share of their
# norm: in float32, and under autocast to bfloat16, whose steps are of 0.4 %
EXACT = (0, 0)
ROUNDING = (1e-4, 0.1)
SWITCHES = {
    "full": ({"gradient_checkpointing": "full"}, EXACT),
    "selective": ({"gradient_checkpointing": "selective"}, EXACT),
    "offload": ({"gradient_checkpointing": "offload"}, EXACT),
    "native": ({"attention_backend": "native"}, EXACT),
    "_native_flash": ({"attention_backend": "_native_flash"}, EXACT),
    "_native_math": ({"attention_backend": "_native_math"}, ROUNDING),
    "accumulation": ({"train_batch_size": 1, "gradient_accumulation_steps": 2}, ROUNDING),
    "selective, accumulation, _native_flash": (
        {
            "gradient_checkpointing": "selective",
            "train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "attention_backend": "_native_flash",
        },
        ROUNDING,
    ),
    "int8": ({"quantization": "int8"}, (0.1, 0.1)),  # another base, as far from this one as 8 bits are
    "compiled": ({"torch_compile": True}, ROUNDING),
    "compiled, selective": ({"torch_compile": True, "gradient_checkpointing": "selective"}, ROUNDING),
}
MARKS = {"int8": [needs_torchao], "compiled": [pytest.mark.slow], "compiled, selective": [pytest.mark.slow]}


@pytest.fixture
def train_and_record(run, monkeypatch):
    """Function that trains; returns the output folder and the gradients of each update, before they are clipped."""
    clip = Accelerator.clip_grad_norm_

    def function(**kwargs) -> tuple[Path, list[dict[int, torch.Tensor]]]:
        updates = []

        def record(self, parameters, *rest):
            parameters = list(parameters)
            updates.append(dict(enumerate(p.grad.clone() for p in parameters if p.grad is not None)))
            return clip(self, parameters, *rest)

        monkeypatch.setattr(Accelerator, "clip_grad_norm_", record)
        return run(**PLAIN | kwargs), updates

    return function


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory) -> tuple[Path, dict]:
    """A folder for the plain runs, and what they returned, by their precision."""
    return tmp_path_factory.mktemp("plain"), {}


def distance(a: dict, b: dict) -> float:
    """The norm of the difference as a share of the norm, over all tensors together."""
    assert a.keys() == b.keys()
    difference = sum((a[name] - b[name]).double().square().sum() for name in b)
    return (difference / sum(value.double().square().sum() for value in b.values())).sqrt().item()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("switch", [pytest.param(name, marks=MARKS.get(name, [])) for name in SWITCHES])
def test_gradients_of_a_switch_are_those_of_plain_training(
    train_and_record, plain_runs, tmp_path, switch, mixed_precision
):
    """Through `main`, from the start and resumed in the middle, where a plain run goes on with the switch."""
    kwargs, tolerances = SWITCHES[switch]
    tolerance = tolerances[mixed_precision == "bf16"]
    kwargs = {"mixed_precision": mixed_precision, "cache_dir": plain_runs[0] / "cache"} | kwargs
    if mixed_precision not in plain_runs[1]:
        plain = {"mixed_precision": mixed_precision, "output_dir": plain_runs[0] / mixed_precision}
        plain_runs[1][mixed_precision] = train_and_record(**plain, cache_dir=kwargs["cache_dir"])
    plain, wanted = plain_runs[1][mixed_precision]
    assert len(wanted) == 4 and all(gradient.any() for gradient in wanted[-1].values())
    switched, found = train_and_record(output_dir=tmp_path / "switched", **kwargs)
    origin = switched if "quantization" in kwargs else plain  # another base cannot be changed to
    resumed = tmp_path / "resumed"
    shutil.copytree(origin / "checkpoint-2", resumed / "checkpoint-2")
    _, after = train_and_record(output_dir=resumed, resume_from_checkpoint="latest", **kwargs)
    assert len(found) == 4 and len(after) == 2
    pairs = list(zip([*found, *after], [*wanted, *wanted[2:]], strict=True))
    distances = [distance(a, b) for a, b in pairs]
    distances += [distance(weights(folder), weights(plain)) for folder in (switched, resumed)]
    assert max(distances) <= tolerance
    if origin is switched:
        assert_same(weights(resumed), weights(switched))


# --- Other systems ---------------------------------------------------------------------------------------------------


@pytest.fixture
def on_windows(monkeypatch):
    """The script, imported where modules and signals are missing that Windows lacks."""
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    known = {}
    for name, number in signal.Signals.__members__.items():
        if name not in ("SIGUSR1", "SIGHUP"):
            known[name] = number
    for name in ("SIGUSR1", "SIGHUP"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(signal, "Signals", enum.IntEnum("Signals", known))
    spec = importlib.util.spec_from_file_location("on_windows", ROOT / "train_ltd.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_windows", module)
    spec.loader.exec_module(module)
    return module


def test_the_script_works_without_what_windows_lacks(on_windows, monkeypatch, tmp_path):
    assert on_windows.parse_args(["--train_data_dir=.", f"--output_dir={tmp_path}"]).rank is None
    with on_windows.noted_signals() as notice:
        assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is notice
    on_windows.lock_folder(SimpleNamespace(is_main_process=True), tmp_path).close()
    monkeypatch.setattr(sys, "platform", "win32")
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**30))
    monkeypatch.setattr("psutil.Process", lambda: process)
    assert on_windows.peak_memory(torch.device("cpu")) == 3


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_in_gib_on_every_system(monkeypatch, platform, unit):
    """getrusage counts KiB on Linux and bytes on macOS."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert train_ltd.peak_memory(torch.device("cpu")) == 3


# --- Ranks -----------------------------------------------------------------------------------------------------------


def test_fsdp_that_did_not_come_about_is_refused(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for"):
        run()


def test_work_is_shared_evenly():
    """All ranks do equally many, and each item counts once."""
    for count, world in [(1, 4), (4, 4), (5, 4), (32, 8), (3, 1)]:
        ranks = [type("", (), {"process_index": i, "num_processes": world}) for i in range(world)]
        shares = [train_ltd.split_between_ranks(rank, count) for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for i, mine in share if mine) == list(range(count))
        assert all(0 <= i < count for share in shares for i, _ in share)


@pytest.mark.slow
def test_non_finite_step_is_skipped_by_all_ranks(run, flags, tmp_path):
    """Only one of the two has the bad clip in it; both go on with the same weights, as the last figures show."""
    run(max_train_steps=1)
    entry = sorted((tmp_path / "cache/latents").iterdir())[0]
    tensors = load_file(entry)
    save_file(tensors | {"latents": torch.full_like(tensors["latents"], torch.nan)}, entry)
    result = launch(flags(output_dir=tmp_path / "two", max_train_steps=6), processes=2)
    assert result.returncode == 0, result.stderr
    assert max(metrics(tmp_path / "two", "skipped_steps").values()) in (1, 2)  # two epochs, each cut to three updates
    assert all(v.isfinite().all() for v in weights(tmp_path / "two", "lora").values())
    assert "| hardware | 2 x" in (tmp_path / "two/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["full", "selective", "offload"])
def test_regional_compile_in_two_processes(run, flags, tmp_path, checkpointing):
    """With what the recipes ask for: blocks compiled, checkpointed, then wrapped by DDP."""
    kwargs = {"max_train_steps": 2, "logging_steps": 1, "gradient_checkpointing": checkpointing}
    result = launch([*flags(output_dir=tmp_path / "compiled", **kwargs), "--torch_compile"], processes=2)
    assert result.returncode == 0, result.stderr
    eager = run(output_dir=tmp_path / "eager", gradient_accumulation_steps=2, **kwargs)
    assert metrics(tmp_path / "compiled") == pytest.approx(metrics(eager), rel=1e-4)


@pytest.mark.slow
def test_four_processes_equal_accumulation_of_four(run, flags, tmp_path):
    kwargs = {"max_train_steps": 3, "validation_fraction": 0.3, "eval_steps": 1, "use_ema": True}
    alone = run(output_dir=tmp_path / "alone", gradient_accumulation_steps=4, **kwargs)
    result = launch(flags(output_dir=tmp_path / "four", **kwargs), processes=4)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| hardware | 4 x" in (tmp_path / "four/README.md").read_text()
    a, b = (load_file(folder / train_ltd.LORA_FILE) for folder in (alone, tmp_path / "four"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)  # Adam magnifies rounding
    for a, b in zip(losses(alone), losses(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
def test_a_rank_that_fails_takes_the_job_down_with_its_traceback(flags, tmp_path):
    """The other one waits for it in a collective operation, and must not do so for the two hours of the time-out."""
    command = [*launcher(2)[:-1], str(ROOT / "tests/failing_rank.py")]
    env = os.environ | CPU | {"PYTHONPATH": str(ROOT)}
    line = flags(max_train_steps=6, checkpointing_steps=2)
    result = subprocess.run([*command, *line], env=env, capture_output=True, text=True, timeout=HOUR, cwd=ROOT)
    assert result.returncode != 0 and "done; look into" not in result.stderr
    assert "RuntimeError: this rank has had enough" in result.stderr
    assert [path.name for path in train_ltd.list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


# --- Sharded weights -------------------------------------------------------------------------------------------------

FILES = sorted((ROOT / "examples/accelerate").glob("*.yaml"))
FSDP_FILE = ROOT / "examples/accelerate/fsdp2.yaml"
FULL_FILE = "transformer/diffusion_pytorch_model.safetensors"


def losses(folder: Path) -> list[list[float]]:
    """Of training and of held-out clips, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row[k] for k in ("loss", "mse", "grad_norm", "val/mse") if k in row] for row in rows]


FSDP_SCRIPT = ROOT / "tests/fsdp_ranks.py"


def launch_fsdp(command_line: list[str]):
    """Two CPU ranks as `fsdp2.yaml` sets them up."""
    options = [f"--config_file={FSDP_FILE}", "--num_processes=2"]
    return launch(command_line, processes=2, script=FSDP_SCRIPT, options=options)


def launch_fsdp_for_real(command_line: list[str], file: Path = FSDP_FILE, env: dict | None = None):
    """The same by `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={file}", "--num_processes=2"]
    command += ["--main_process_port=0", str(FSDP_SCRIPT), *command_line]
    env = CPU | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=HOUR, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_sharded_weights_train_resume_and_publish_as_whole_ones(run, flags, tmp_path, train_type):
    """EMA, clipping, one held-out clip and one sample for two ranks, accumulation; stopped after 2 of 3 updates."""
    kwargs = {"train_type": train_type, "rank": 4 if train_type == "lora" else None, "max_train_steps": 3}
    kwargs |= {"learning_rate": 1e-3}  # Adam magnifies rounding by it
    kwargs |= {"checkpointing_steps": 2, "use_ema": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    kwargs |= {"validation_fraction": 0.3, "eval_steps": 1, "max_eval_clips": 1, "validation_prompt": "a square"}
    kwargs |= {"validation_steps": 100, "validation_num_inference_steps": 2, "output_name": "wan"}
    whole, sharded, resumed = (tmp_path / name for name in ("whole", "sharded", "resumed"))
    result = launch(flags(output_dir=whole, **kwargs), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    with HubServer(tmp_path / "hub") as hub:
        other = {"push_to_hub": True, "hub_model_id": "tester/sharded", "gradient_checkpointing": "offload"}
        result = launch_fsdp_for_real(flags(output_dir=sharded, **kwargs, **other), env=hub.env())
        assert result.returncode == 0, result.stderr[-3000:]
        published = hub.files("tester/sharded")
    shares = [float(share) for share in re.findall(r"2 ranks, each with ([\d.]+) of a parameter", result.stdout)]
    assert len(shares) == 2 and sum(shares) == pytest.approx(1, abs=0.02) and max(shares) < 0.6  # they really shard

    names = sorted(p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file())
    assert sorted(p.relative_to(sharded).as_posix() for p in sharded.rglob("*") if p.is_file()) == names
    files = [name for name in names if name.endswith(".safetensors")]
    assert {
        f"checkpoint-2/{'live/' * live}{train_ltd.LORA_FILE if train_type == 'lora' else FULL_FILE}"
        for live in (False, True)
    } < set(files)
    for name in files:
        a, b = load_file(whole / name), load_file(sharded / name)
        assert a.keys() == b.keys()
        with safe_open(whole / name, "pt") as one, safe_open(sharded / name, "pt") as two:
            assert one.metadata().keys() == two.metadata().keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)
    for a, b in zip(losses(whole), losses(sharded), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    weights = train_ltd.LORA_FILE if train_type == "lora" else FULL_FILE
    assert published[weights] == (sharded / weights).read_bytes()

    shutil.copytree(sharded / "checkpoint-2", resumed / "checkpoint-2")
    result = launch_fsdp(flags(output_dir=resumed, resume_from_checkpoint="latest", **kwargs))
    assert result.returncode == 0, result.stderr[-3000:]
    for name in (name for name in files if not name.startswith("checkpoint-2")):
        a, b = load_file(sharded / name), load_file(resumed / name)
        assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    a, b = (torch.load(f / "checkpoint-3/optimizer.bin", weights_only=True)["state"] for f in (sharded, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[p][k], b[p][k]) for p in a for k in a[p])
    assert losses(resumed) == losses(sharded)  # those until step 2 came with the checkpoint
    with pytest.raises(ValueError, match="fsdp True -> False"):  # its optimizer's file is another
        run(**kwargs | {"resume_from_checkpoint": resumed / "checkpoint-3", "gradient_accumulation_steps": 4})


@pytest.mark.slow
def test_sharded_fine_tune_of_an_expert(flags, tiny_experts, tmp_path):
    """One consolidated file, where the pipeline has that expert, and samples by both of them."""
    kwargs = {"pretrained_model_name_or_path": tiny_experts, "expert": "low", "train_type": "full", "rank": None}
    kwargs |= {"learning_rate": 1e-3, "validation_prompt": "a square", "validation_num_inference_steps": 4}
    kwargs |= {"output_name": "wan"}
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    result = launch(flags(output_dir=whole, **kwargs), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    result = launch_fsdp(flags(output_dir=sharded, **kwargs))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 ranks, each with" in result.stdout
    file = "transformer_2/diffusion_pytorch_model.safetensors"
    a, b = load_file(whole / file), load_file(sharded / file)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)
    assert (sharded / "wan_low_noise.safetensors").is_file()
    assert (sharded / "low_noise/samples/step-000002-0-a-square.mp4").is_file()


@pytest.mark.slow
def test_sharded_bf16_base_under_a_float32_lora(flags, tmp_path):
    """As on GPUs: autocast, a bf16 base, adapters in float32; the losses of DDP in bf16."""
    kwargs = {"mixed_precision": "bf16", "max_train_steps": 2, "learning_rate": 1e-3}
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    result = launch(flags(output_dir=whole, **kwargs), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    result = launch_fsdp(flags(output_dir=sharded, **kwargs))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 ranks, each with" in result.stdout
    a, b = (load_file(folder / train_ltd.LORA_FILE) for folder in (whole, sharded))
    assert a.keys() == b.keys() and {v.dtype for v in b.values()} == {torch.float32}
    assert any(v.any() for k, v in b.items() if "lora_B" in k)
    for a, b in zip(losses(whole), losses(sharded), strict=True):
        assert a == pytest.approx(b, rel=2e-2)


@pytest.mark.slow
def test_sharded_files_in_checkpoints_are_refused(flags, tmp_path):
    """They would be pickles."""
    file = tmp_path / "sharded.yaml"
    text = FSDP_FILE.read_text()
    file.write_text(text.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"))
    result = launch_fsdp_for_real(flags(), file)
    assert result.returncode != 0 and "fsdp_state_dict_type: FULL_STATE_DICT on GPUs is needed" in result.stderr


# --- The files for accelerate ----------------------------------------------------------------------------------------


def test_accelerates_files_are_there():
    assert [path.stem for path in FILES] == ["ddp", "fsdp2", "single"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_accelerate_reads_its_file_and_the_command_in_it(path):
    """An unknown key is an error of accelerate's own; the flags and files of the comment exist."""
    config = load_config_from_file(str(path))
    kind, processes = {"single": ("NO", 1), "ddp": ("MULTI_GPU", 8), "fsdp2": ("FSDP", 8)}[path.stem]
    assert (config.distributed_type, config.num_processes) == (kind, processes)
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    known |= {option for action in train_ltd.build_parser()._actions for option in action.option_strings}
    known |= {f"--{key}" for key in config.fsdp_config}
    comment = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"accelerate launch --config_file examples/accelerate/{path.name} " in comment
    assert [flag for flag in re.findall(r"--\w+", comment) if flag not in known] == []
    assert [name for name in re.findall(r"examples/[\w./]+\.yaml", comment) if not (ROOT / name).is_file()] == []
    assert [key for key in config.fsdp_config if f"--{key}" not in known] == []


def test_the_file_for_sharding_names_a_layer_of_the_model(tiny_wan):
    config = load_config_from_file(str(FSDP_FILE))
    transformer = train_ltd.WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    layer = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert {type(block).__name__ for block in transformer.blocks} == {layer}
