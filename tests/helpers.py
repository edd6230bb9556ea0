"""Functions that more than one file of tests needs: what a run has left, and blows that it gets."""

import contextlib
import importlib.util
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import extract_model_from_parallel
from conftest import HEIGHT, WIDTH
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import train_ltd

needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="no torchao: pip install torchao")


def weights(folder: Path, train_type: str = "lora") -> dict[str, torch.Tensor]:
    file = train_ltd.LORA_FILE if train_type == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    return load_file(folder / file)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def metrics(folder: Path, key: str = "loss") -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


LOOKS = {"validation_prompt": ["a", "b"], "validation_num_inference_steps": 2, "validation_steps": 2, "eval_steps": 1}


def inputs(model: WanTransformer3DModel) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 3, HEIGHT // 8, WIDTH // 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, model.config.text_dim, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
def output_of(model: WanTransformer3DModel) -> torch.Tensor:
    on_device = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in inputs(model).items()}
    return model(**on_device)[0].cpu()


def trained_output(monkeypatch, run, **kwargs) -> tuple[Path, torch.Tensor]:
    """Train, and take the live model's output at the end, before anything is reloaded."""
    seen = {}
    save = train_ltd.save_weights

    def spy(live, *rest):
        seen["output"] = output_of(extract_model_from_parallel(live.transformer).eval())
        save(live, *rest)

    monkeypatch.setattr(train_ltd, "save_weights", spy)
    return run(**kwargs), seen["output"]


def encoded(cache_dir: Path) -> list[Path]:
    """What was encoded; the hashes of the files that were looked at cost nothing."""
    return sorted(cache_dir.rglob("*.safetensors"))


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in train_ltd.list_checkpoints(folder)]


def strike(monkeypatch, owner, name: str, call: int | None, blow) -> None:
    """Let the `call`-th call of `owner.name` be preceded by `blow()`; every one, if that is `None`."""
    calls, real = [], getattr(owner, name)

    def function(*args, **kwargs):
        calls.append(1)
        if call in (None, len(calls)):
            blow()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def matter(card):
    """The front matter of a card's text, by plain YAML."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL).group(1))


def code_block(card):
    """The only Python in a card, as Markdown delimits it."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return code


def same_weights(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def flip(path: Path, position: int) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def run_in_a_process(line: list[str]) -> None:
    """Train as the script does; for a process that `forks` starts."""
    torch.set_num_threads(1)
    train_ltd.main(train_ltd.parse_args(line))


# --- Models of the family: the flags of each, with its `expert` if it has one ----------------------------------------

SIZE_5B = {"height": 32, "width": 64}
SAMPLED = {"validation_prompt": "a square", "validation_num_inference_steps": 4, "cache_dtype": "float32"}


def suffix(family: dict) -> str:
    return f"_{family['expert']}_noise" if "expert" in family else ""


def lora_of(output: Path, family: dict) -> Path:
    return output / f"pytorch_lora_weights{suffix(family)}.safetensors"


@contextlib.contextmanager
def recorded(model: torch.nn.Module, seen: list):
    """Meanwhile: keep what a transformer is fed, and what comes out."""

    def hook(module, args, kwargs, output):
        seen.append(kwargs | {"output": output[0]})

    handle = model.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()
