"""Many processes: four by DDP, two that share the weights by FSDP2, and accelerate's files for them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, launch, launcher
from hub_server import HubServer
from safetensors import safe_open
from safetensors.torch import load_file

import train_ltd

FILES = sorted((ROOT / "examples/accelerate").glob("*.yaml"))
FSDP_FILE = ROOT / "examples/accelerate/fsdp2.yaml"
FULL_FILE = "transformer/diffusion_pytorch_model.safetensors"


def losses(folder: Path) -> list[list[float]]:
    """Of training and of held-out clips, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row[k] for k in ("loss", "mse", "grad_norm", "val/mse") if k in row] for row in rows]


def launch_fsdp(command_line: list[str], file: Path = FSDP_FILE, env: dict | None = None):
    """Two CPU ranks as `fsdp2.yaml` sets them up."""
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={file}", "--num_processes=2"]
    command += ["--main_process_port=0", str(ROOT / "tests/fsdp_ranks.py"), *command_line]
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=900, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_sharded_weights_train_resume_and_publish_as_whole_ones(run, flags, tmp_path, train_type):
    """EMA, clipping, one held-out clip and one sample for two ranks, accumulation; stopped after 2 of 3 updates."""
    kwargs = {"train_type": train_type, "rank": 4 if train_type == "lora" else None, "max_train_steps": 3}
    kwargs |= {"learning_rate": 1e-3}  # Adam magnifies rounding by it
    kwargs |= {"checkpointing_steps": 2, "use_ema": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    kwargs |= {"validation_split": 0.3, "eval_steps": 1, "max_eval_clips": 1, "validation_prompt": "a square"}
    kwargs |= {"validation_steps": 100, "validation_num_inference_steps": 2}
    whole, sharded, resumed = (tmp_path / name for name in ("whole", "sharded", "resumed"))
    result = launch(flags(output_dir=whole, **kwargs), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    with HubServer(tmp_path / "hub") as hub:
        push = {"push_to_hub": True, "hub_model_id": "tester/sharded"}
        result = launch_fsdp(flags(output_dir=sharded, **kwargs, **push), env=hub.env())
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
    assert losses(resumed) == losses(sharded)[-3:]  # a look at step 2 first, which its folder lacks
    with pytest.raises(ValueError, match="fsdp True there, None here"):  # its optimizer's file is another
        run(**kwargs | {"resume_from_checkpoint": resumed / "checkpoint-3", "gradient_accumulation_steps": 4})


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
    result = launch_fsdp(flags(), file)
    assert result.returncode != 0 and "fsdp_state_dict_type: FULL_STATE_DICT on GPUs is needed" in result.stderr


def test_four_processes_equal_accumulation_of_four(run, flags, tmp_path):
    kwargs = {"max_train_steps": 3, "validation_split": 0.3, "eval_steps": 1, "use_ema": True}
    alone = run(output_dir=tmp_path / "alone", gradient_accumulation_steps=4, **kwargs)
    result = launch(flags(output_dir=tmp_path / "four", **kwargs), processes=4)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| hardware | 4 x" in (tmp_path / "four/README.md").read_text()
    a, b = (load_file(folder / train_ltd.LORA_FILE) for folder in (alone, tmp_path / "four"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-6)
    for a, b in zip(losses(alone), losses(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_rank_that_fails_takes_the_job_down_with_its_traceback(flags, tmp_path):
    """The other one waits for it in a collective operation, and must not do so for the two hours of the time-out."""
    command = [*launcher(2)[:-1], str(ROOT / "tests/failing_rank.py")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = flags(max_train_steps=6, checkpointing_steps=2)
    result = subprocess.run([*command, *line], env=env, capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert result.returncode != 0 and "done; look into" not in result.stderr
    assert "RuntimeError: this rank has had enough" in result.stderr
    assert [path.name for path in train_ltd.list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_work_is_shared_evenly():
    """All ranks do equally many, and each item counts once."""
    for count, world in [(1, 4), (4, 4), (5, 4), (32, 8), (3, 1)]:
        ranks = [type("", (), {"process_index": i, "num_processes": world}) for i in range(world)]
        shares = [train_ltd.shared_work(rank, count) for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for i, mine in share if mine) == list(range(count))
        assert all(0 <= i < count for share in shares for i, _ in share)


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
