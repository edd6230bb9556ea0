"""Weights that a run writes and others load: LoRA in both dialects, full weights, EMA, `--init_lora`."""

import json

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from helpers import assert_same, metrics, weights
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

import train_ltd


def test_both_dialects_hold_the_same_weights(run):
    """ComfyUI's dialect through diffusers' own converter; alpha / rank, here 1/2, is in its weights."""
    output = run(lora_alpha=2)
    own = load_file(output / train_ltd.LORA_FILE)
    converted = WanPipeline.lora_state_dict(output / "run.safetensors")
    assert own.keys() == converted.keys()
    for key in (k for k in own if "lora_A" in k):
        up = key.replace("lora_A", "lora_B")
        assert torch.equal(converted[up] @ converted[key], 0.5 * (own[up] @ own[key]))
    with safe_open(output / "run.safetensors", "pt") as file:
        assert "lora_adapter_metadata" not in (file.metadata() or {})
    with safe_open(output / train_ltd.LORA_FILE, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 2


def test_other_target_modules_in_comfyui_keys(run, tiny_wan, tmp_path):
    """Every linear layer that a user may name has a place in the other dialect."""
    targets = [
        *("proj_out", "condition_embedder.time_proj", "attn1.to_q", "attn2.to_out.0"),
        *(f"condition_embedder.{e}_embedder.linear_{i}" for e in ("time", "text") for i in (1, 2)),
    ]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"lora_target_modules": targets}))
    output = run(config=tmp_path / "recipe.yaml", lora_alpha=2)
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.load_lora_weights(output / "run.safetensors")
    own = load_file(output / train_ltd.LORA_FILE)
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0")
    assert {f"transformer.{k}" for k in loaded} == set(own)
    for down in (k for k in loaded if "lora_A" in k):
        up = down.replace("lora_A", "lora_B")
        product = 0.5 * own[f"transformer.{up}"] @ own[f"transformer.{down}"]
        torch.testing.assert_close(loaded[up] @ loaded[down], product)


# The published configurations, and every layer that the default targets must reach: (diffusers, original, in, out).
PUBLISHED = {
    "1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
}


def expected_layers(dim: int, ffn_dim: int) -> list[tuple[str, str, int, int]]:
    return [
        ("attn1.to_q", "self_attn.q", dim, dim),
        ("attn1.to_k", "self_attn.k", dim, dim),
        ("attn1.to_v", "self_attn.v", dim, dim),
        ("attn1.to_out.0", "self_attn.o", dim, dim),
        ("attn2.to_q", "cross_attn.q", dim, dim),
        ("attn2.to_k", "cross_attn.k", dim, dim),
        ("attn2.to_v", "cross_attn.v", dim, dim),
        ("attn2.to_out.0", "cross_attn.o", dim, dim),
        ("ffn.net.0.proj", "ffn.0", dim, ffn_dim),
        ("ffn.net.2", "ffn.2", ffn_dim, dim),
    ]


@pytest.mark.parametrize("size", PUBLISHED)
def test_default_targets_on_the_published_models(size):
    config = PUBLISHED[size]
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
        model.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=list(train_ltd.LORA_TARGETS)))
    state_dict = get_peft_model_state_dict(model)
    comfyui = train_ltd.comfyui_state_dict(state_dict, 32, 32)
    own_keys, comfyui_keys = {}, {}
    for block in range(config["num_layers"]):
        for own, original, inside, outside in expected_layers(config["num_attention_heads"] * 128, config["ffn_dim"]):
            for name, keys in (
                (f"blocks.{block}.{own}", own_keys),
                (f"diffusion_model.blocks.{block}.{original}", comfyui_keys),
            ):
                keys[f"{name}.lora_A.weight"] = (32, inside)
                keys[f"{name}.lora_B.weight"] = (outside, 32)
    assert len(own_keys) == 2 * 10 * config["num_layers"]
    assert {k: tuple(v.shape) for k, v in state_dict.items()} == own_keys
    assert {k: tuple(v.shape) for k, v in comfyui.items()} == comfyui_keys


def test_ema_weights_are_what_is_published(run, tmp_path):
    plain = run(output_dir=tmp_path / "plain", max_train_steps=4)
    ema = run(output_dir=tmp_path / "ema", max_train_steps=4, use_ema=True)
    live = load_file(ema / "checkpoint-4/live" / train_ltd.LORA_FILE)
    assert_same(weights(plain, "lora"), live)
    assert not torch.equal(*(next(v for k, v in w.items() if "lora_B" in k) for w in (live, weights(ema, "lora"))))
    assert_same(weights(ema, "lora"), weights(ema / "checkpoint-4", "lora"))


@pytest.mark.parametrize("alpha", [4, 2])
@pytest.mark.parametrize("file", [train_ltd.LORA_FILE, "first.safetensors"])
def test_init_lora_goes_on_from_an_adapter(run, tmp_path, alpha, file):
    first = run(output_dir=tmp_path / "first", lora_alpha=alpha, lora_target_modules="to_q", validation_fraction=0.2)
    last = metrics(first, "val/mse")[2]
    second = run(
        output_dir=tmp_path / "second", init_lora=first / file, rank=None, max_train_steps=1, validation_fraction=0.2
    )
    assert metrics(second, "val/mse")[0] == pytest.approx(last, rel=1e-6)
    keys = {k.split(".lora_")[0] for k in load_file(second / train_ltd.LORA_FILE)}
    assert all(k.endswith("to_q") for k in keys)


def test_init_lora_clash_is_an_error(run, tmp_path):
    lora = run(output_dir=tmp_path / "first") / train_ltd.LORA_FILE
    with pytest.raises(ValueError, match=r"--rank 8 clashes with --init_lora, which has 4"):
        run(output_dir=tmp_path / "second", init_lora=lora, rank=8)
    with pytest.raises(ValueError, match=r"--lora_alpha 2\.0 clashes"):
        run(output_dir=tmp_path / "second", init_lora=lora, lora_alpha=2)
    with pytest.raises(ValueError, match="--lora_target_modules clashes"):
        run(output_dir=tmp_path / "second", init_lora=lora, lora_target_modules="to_q")


def test_a_lora_without_tensors_is_an_error_wherever_it_is_saved(run, monkeypatch, tmp_path):
    """At the first checkpoint, and not by a card of weights that are not there."""
    monkeypatch.setattr(train_ltd, "gather_weights", lambda *args: {})
    with pytest.raises(RuntimeError, match="the LoRA has no tensors"):
        run(max_train_steps=1)
    assert not (tmp_path / "run/README.md").exists() and train_ltd.list_checkpoints(tmp_path / "run") == []
