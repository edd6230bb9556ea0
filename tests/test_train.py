"""Training end to end on the tiny pipeline: exact resume, ranks, reload elsewhere, objective, evaluation, refusals."""

import importlib.util
import json
import logging
import math
import shutil
import time
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from conftest import HEIGHT, NUM_FRAMES, WIDTH, launch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ltd_loss
import train_ltd


def weights(folder: Path, train_type: str) -> dict[str, torch.Tensor]:
    file = train_ltd.LORA_FILE if train_type == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    return load_file(folder / file)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def metrics(folder: Path, key: str = "loss") -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


# --- Resume ----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("variant", RESUMES)
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
    assert metrics(resumed) == {step: loss for step, loss in metrics(straight).items() if step > 4}


def test_resume_by_path_equals_latest(run, tmp_path):
    straight = run(max_train_steps=3, checkpointing_steps=1)
    other = run(output_dir=tmp_path / "other", max_train_steps=3, resume_from_checkpoint=straight / "checkpoint-1")
    assert_same(weights(straight, "lora"), weights(other, "lora"))


def test_resume_of_a_finished_run_changes_nothing(run):
    first = weights(run(), "lora")
    assert_same(first, weights(run(resume_from_checkpoint="latest"), "lora"))


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_resume_with_two_processes(flags, tmp_path, train_type):
    kwargs = {"train_type": train_type, "rank": 4 if train_type == "lora" else None, "max_train_steps": 4}
    kwargs |= {"checkpointing_steps": 2, "gradient_accumulation_steps": 1, "use_ema": True}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    result = launch(flags(output_dir=straight, **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    assert "| hardware | 2 x" in (straight / "README.md").read_text()
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {p.name for p in (resumed / "checkpoint-2").iterdir()}
    result = launch(flags(output_dir=resumed, resume_from_checkpoint="latest", **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    assert_same(weights(straight, train_type), weights(resumed, train_type))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 8, "lora_alpha": 4}, "rank 4 there, 8 here"),
        ({"lora_alpha": 2}, "lora_alpha 4 there, 2.0 here"),
        ({"lora_target_modules": ["to_q"]}, "lora_target_modules"),
        ({"train_type": "full", "rank": None}, "train_type lora there, full here"),
        ({"seed": 4}, "seed 3 there, 4 here"),
        ({"gradient_accumulation_steps": 2}, "samples_per_update 1 there, 2 here"),
        ({"validation_split": 0.2}, "clips 7 there, 6 here"),
        ({"use_ema": True}, "use_ema False there, True here"),
    ],
)
def test_checkpoint_of_other_settings_is_refused(run, change, named):
    run(max_train_steps=1)
    with pytest.raises(ValueError, match="other settings") as error:
        run(max_train_steps=2, resume_from_checkpoint="latest", **change)
    assert named in str(error.value)


def test_checkpoints_rotate_and_hold_ready_weights(run):
    output = run(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(p.name for p in output.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]
    names = {p.name for p in (output / "checkpoint-5").iterdir()}
    assert names == {
        *(train_ltd.LORA_FILE, train_ltd.COMFYUI_FILE, "settings.json", train_ltd.SUMS_FILE),
        *("optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
    }
    assert_same(load_file(output / train_ltd.LORA_FILE), load_file(output / "checkpoint-5" / train_ltd.LORA_FILE))


def test_incomplete_checkpoint_is_ignored(run, caplog):
    output = run(max_train_steps=1)
    (output / "checkpoint-9").mkdir()
    (output / ".checkpoint-8.partial").mkdir()
    with caplog.at_level(logging.INFO):
        run(max_train_steps=2, resume_from_checkpoint="latest")
    assert any("resumed" in r.message and "checkpoint-1" in r.message for r in caplog.records)


def test_nothing_to_resume_starts_afresh(run, caplog):
    run(resume_from_checkpoint="latest")
    assert any("starting afresh" in r.message for r in caplog.records)


# --- Ranks and batches -----------------------------------------------------------------------------------------------


def test_two_processes_equal_accumulation_bitwise(run, flags, tmp_path):
    alone = run(output_dir=tmp_path / "alone", max_train_steps=3, gradient_accumulation_steps=2, logging_steps=1)
    result = launch(flags(output_dir=tmp_path / "two", max_train_steps=3, logging_steps=1), processes=2)
    assert result.returncode == 0, result.stderr
    assert "| hardware | 2 x" in (tmp_path / "two/README.md").read_text()
    assert_same(weights(alone, "lora"), weights(tmp_path / "two", "lora"))
    assert metrics(alone, "mse") == pytest.approx(metrics(tmp_path / "two", "mse"), rel=1e-6)


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


def test_too_few_clips_for_one_update(run):
    with pytest.raises(ValueError, match=r"7 clips are fewer than the 8 of one update.*--train_batch_size 8"):
        run(train_batch_size=8)


# --- What others load ------------------------------------------------------------------------------------------------


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

    def spy(accelerator, transformer, folder, args):
        seen["output"] = output_of(extract_model_from_parallel(transformer).eval())
        save(accelerator, transformer, folder, args)

    monkeypatch.setattr(train_ltd, "save_weights", spy)
    return run(**kwargs), seen["output"]


@pytest.mark.parametrize("alpha", [4, 8, 3])
@pytest.mark.parametrize("file", [train_ltd.LORA_FILE, train_ltd.COMFYUI_FILE])
def test_lora_loads_in_the_stock_pipeline(monkeypatch, run, tiny_wan, alpha, file):
    output, expected = trained_output(monkeypatch, run, lora_alpha=alpha, max_train_steps=3)
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    before = output_of(pipeline.transformer)
    pipeline.load_lora_weights(output / file)
    after = output_of(pipeline.transformer)
    assert (before - expected).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=2e-6)


def test_both_dialects_hold_the_same_weights(run):
    """ComfyUI's dialect through diffusers' own converter, which folds alpha / rank (here 1/2) into the weights."""
    output = run(lora_alpha=2)
    own, comfyui = load_file(output / train_ltd.LORA_FILE), load_file(output / train_ltd.COMFYUI_FILE)
    converted = WanPipeline.lora_state_dict(output / train_ltd.COMFYUI_FILE)
    assert own.keys() == converted.keys()
    for key in (k for k in own if "lora_A" in k):
        up = key.replace("lora_A", "lora_B")
        assert torch.equal(converted[up] @ converted[key], 0.5 * (own[up] @ own[key]))
    alphas = {k: v for k, v in comfyui.items() if k.endswith(".alpha")}
    assert len(alphas) == len(own) // 2 and {v.item() for v in alphas.values()} == {2.0}
    with safe_open(output / train_ltd.COMFYUI_FILE, "pt") as file:
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
    pipeline.load_lora_weights(output / train_ltd.COMFYUI_FILE)
    own = load_file(output / train_ltd.LORA_FILE)
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0")
    assert {f"transformer.{k}" for k in loaded} == set(own)
    for down in (k for k in loaded if "lora_A" in k):
        up = down.replace("lora_A", "lora_B")
        product = 0.5 * own[f"transformer.{up}"] @ own[f"transformer.{down}"]
        torch.testing.assert_close(loaded[up] @ loaded[down], product)


def test_full_weights_load_in_the_stock_model(monkeypatch, run, tiny_wan):
    output, expected = trained_output(monkeypatch, run, train_type="full", rank=None, max_train_steps=3)
    model = WanTransformer3DModel.from_pretrained(output, subfolder="transformer")
    torch.testing.assert_close(output_of(model), expected, rtol=1e-5, atol=2e-6)
    assert "_name_or_path" not in json.loads((output / "transformer/config.json").read_text())
    base = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer").state_dict()
    same = [k for k, v in model.state_dict().items() if torch.equal(v, base[k])]
    assert same == []


def test_ema_weights_are_what_is_published(run, tmp_path):
    plain = run(output_dir=tmp_path / "plain", max_train_steps=4)
    ema = run(output_dir=tmp_path / "ema", max_train_steps=4, use_ema=True)
    live = load_file(ema / "checkpoint-4/live" / train_ltd.LORA_FILE)
    assert_same(weights(plain, "lora"), live)
    assert not torch.equal(*(next(v for k, v in w.items() if "lora_B" in k) for w in (live, weights(ema, "lora"))))
    assert_same(weights(ema, "lora"), weights(ema / "checkpoint-4", "lora"))


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
            comfyui_keys[f"diffusion_model.blocks.{block}.{original}.alpha"] = ()
    assert len(own_keys) == 2 * 10 * config["num_layers"]
    assert {k: tuple(v.shape) for k, v in state_dict.items()} == own_keys
    assert {k: tuple(v.shape) for k, v in comfyui.items()} == comfyui_keys


# --- Other weights to start from -------------------------------------------------------------------------------------


def original_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tiny transformer in the key layout of the original Wan code, as community files have it."""
    names = train_ltd.COMFYUI_NAMES | {
        "norm2": "norm__3",
        "norm3": "norm2",
        "scale_shift_table": "modulation",
        "attn1.norm_": "self_attn.norm_",
        "attn2.norm_": "cross_attn.norm_",
    }
    converted = {}
    for key, value in state_dict.items():
        for name, original in names.items():
            key = key.replace(name, original)
        key = "head.modulation" if key == "modulation" else key.replace("norm__3", "norm3")
        converted[key] = value
    return converted


def test_single_file_in_original_keys(run, tiny_wan, tmp_path):
    other = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    save_file(original_keys(other.state_dict()), tmp_path / "community.safetensors")
    other.save_pretrained(tmp_path / "folder")
    losses = {}
    for name in ("community.safetensors", "folder", None):
        output = run(output_dir=tmp_path / f"out-{name}", transformer_path=name and tmp_path / name)
        losses[name] = metrics(output)[1]
    assert losses["community.safetensors"] == pytest.approx(losses["folder"], rel=1e-5)
    assert losses["folder"] != pytest.approx(losses[None], rel=1e-3)


@pytest.mark.parametrize("alpha", [4, 2])
@pytest.mark.parametrize("file", [train_ltd.LORA_FILE, train_ltd.COMFYUI_FILE])
def test_init_lora_goes_on_from_an_adapter(run, tmp_path, alpha, file):
    first = run(output_dir=tmp_path / "first", lora_alpha=alpha, lora_target_modules="to_q", validation_split=0.2)
    last = metrics(first, "val/mse")[2]
    second = run(
        output_dir=tmp_path / "second", init_lora=first / file, rank=None, max_train_steps=1, validation_split=0.2
    )
    assert metrics(second, "val/mse")[0] == pytest.approx(last, rel=1e-6)
    keys = {k.split(".lora_")[0] for k in load_file(second / train_ltd.LORA_FILE)}
    assert all(k.endswith("to_q") for k in keys)


def test_init_lora_clash_is_an_error(run, tmp_path):
    lora = run(output_dir=tmp_path / "first") / train_ltd.LORA_FILE
    with pytest.raises(ValueError, match=r"--rank 8 clashes with --init_lora, which has 4"):
        run(init_lora=lora, rank=8)
    with pytest.raises(ValueError, match=r"--lora_alpha 2\.0 clashes"):
        run(init_lora=lora, lora_alpha=2)
    with pytest.raises(ValueError, match="--lora_target_modules clashes"):
        run(init_lora=lora, lora_target_modules="to_q")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "the class WanImageToVideoPipeline"),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "the class WanVACEPipeline"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, r"no Wan2\.1 .*Wan2\.2's"),
        ("model_index.json", {"expand_timesteps": True}, r"no Wan2\.1 .*Wan2\.2's"),
        ("transformer/config.json", {"image_dim": 1280}, "has I2V's"),
        ("transformer/config.json", {"in_channels": 36}, "has I2V's"),
        ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "class WanVACETransformer3DModel"),
    ],
)
def test_other_models_are_refused_by_name(run, tiny_wan, tmp_path, file, change, message):
    copy = tmp_path / "other"
    shutil.copytree(tiny_wan, copy)
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    with pytest.raises(ValueError, match=message):
        run(pretrained_model_name_or_path=copy)
    assert not (tmp_path / "cache").exists()


def test_i2v_single_file_is_refused(run, tmp_path):
    save_file({"blocks.0.cross_attn.k_img.weight": torch.zeros(1)}, tmp_path / "i2v.safetensors")
    with pytest.raises(ValueError, match=r"i2v\.safetensors is no Wan2\.1 .*key blocks\.0\.cross_attn\.k_img"):
        run(transformer_path=tmp_path / "i2v.safetensors")


def test_missing_model_is_named(run):
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path nobody/nothing"):
        run(pretrained_model_name_or_path="nobody/nothing")


# --- Objective -------------------------------------------------------------------------------------------------------


class Stub(torch.nn.Module):
    """Records what it is called with and returns a fixed prediction."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, **kwargs):
        self.kwargs = kwargs
        return (self.prediction,)


@pytest.mark.parametrize("loss", ["ltd", "mse"])
@pytest.mark.parametrize("normalize", [False, True])
def test_training_loss_is_equation_3_on_rectified_flow(flags, loss, normalize):
    args = train_ltd.parse_args(flags(loss=loss, ltd_normalize=normalize, ltd_scale=2, ltd_window=4))
    latents, noise, prediction = torch.randn(3, 2, 16, 5, 4, 6).unbind()
    batch = {
        "latents": latents,
        "noise": noise,
        "sigmas": torch.tensor([0.25, 0.8]),
        "prompt_embeds": torch.zeros(2, 4, 8),
    }
    model = Stub(prediction)
    value, _ = train_ltd.training_loss(model, batch, torch.tensor([1.0, 5.0]), args)
    knobs = {"scale": 2, "normalize": normalize}
    target = noise - latents
    expected = (
        ltd_loss.ltd_loss(prediction, target, latents, 4, **knobs) if loss == "ltd" else F.mse_loss(prediction, target)
    )
    torch.testing.assert_close(value, expected)
    assert torch.equal(model.kwargs["timestep"], torch.tensor([250.0, 800.0]))
    assert model.kwargs["timestep"].dtype == torch.float32
    mixed = 0.75 * latents[0] + 0.25 * noise[0]
    torch.testing.assert_close(model.kwargs["hidden_states"][0], mixed)


def test_motion_and_static_errors(flags):
    """The masks follow D: an error that lies only on moving voxels is seen only there."""
    latents = torch.zeros(1, 4, 3, 2, 2)
    latents[:, :, 1, 0, 0] = 10.0
    squared_error = torch.zeros_like(latents)
    squared_error[..., 0, 0] = 3.0
    row = torch.stack(train_ltd.motion_sums(squared_error, latents, torch.tensor([1.0, 2.0])))
    means = train_ltd.motion_means(row[None])
    assert means == pytest.approx({"mse": 3 / 4, "mse_motion": 3.0, "mse_static": 0.0})


def test_adapter_is_float32_on_a_bf16_base(flags, tiny_wan):
    args = train_ltd.parse_args(flags(mixed_precision="bf16"))
    transformer = train_ltd.load_transformer(args)
    train_ltd.add_lora(transformer, args)
    assert {p.dtype for p in train_ltd.trainable(transformer)} == {torch.float32}
    assert transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    frozen = [n for n, p in transformer.named_parameters() if not p.requires_grad]
    assert all("lora_" not in n for n in frozen)


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_bf16_trains(run, train_type):
    kwargs = {"validation_prompt": "a", "validation_num_inference_steps": 2, "validation_split": 0.2}
    output = run(train_type=train_type, rank=None, mixed_precision="bf16", **kwargs)
    assert all(math.isfinite(v) for v in metrics(output).values())
    assert {v.dtype for v in weights(output, train_type).values()} == {torch.float32}


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
    output = run(max_train_steps=7)
    assert max(metrics(output, "skipped_steps").values()) == 1
    assert sum("skipped: its loss or gradient is not finite" in r.message for r in caplog.records) == 1
    assert all(v.isfinite().all() for v in weights(output, "lora").values())


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


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
def test_8_bit_adam_trains_and_resumes(run, tmp_path):
    kwargs = {"train_type": "full", "rank": None, "optimizer": "adamw8bit", "checkpointing_steps": 2}
    straight, resumed = run(output_dir=tmp_path / "straight", max_train_steps=4, **kwargs), tmp_path / "resumed"
    state = torch.load(straight / "checkpoint-4/optimizer.bin", weights_only=True)["state"].values()
    assert any("__bnb_optimizer_quant_state__" in row for row in state)  # bitsandbytes' own
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    run(output_dir=resumed, resume_from_checkpoint="latest", max_train_steps=4, **kwargs)
    assert_same(weights(straight, "full"), weights(resumed, "full"))


def test_ten_bad_steps_stop_the_run(run, tmp_path):
    run(max_train_steps=1)
    for entry in (tmp_path / "cache/latents").iterdir():
        tensors = load_file(entry)
        save_file(tensors | {"latents": torch.full_like(tensors["latents"], torch.inf)}, entry)
    with pytest.raises(RuntimeError, match=r"10 steps in a row were not finite; clips of the last one: \d.mp4"):
        run(max_train_steps=20)


# --- Evaluation and samples ------------------------------------------------------------------------------------------

LOOKS = {"validation_prompt": ["a", "b"], "validation_num_inference_steps": 2, "validation_steps": 2, "eval_steps": 1}


@pytest.mark.parametrize("extra", [{}, {"lora_dropout": 0.5, "use_ema": True}])
def test_looking_does_not_move_training(run, tmp_path, extra):
    kwargs = {"max_train_steps": 4, "validation_split": 0.2} | extra
    looking = run(output_dir=tmp_path / "looking", **kwargs, **LOOKS)
    blind = run(output_dir=tmp_path / "blind", max_eval_clips=1, eval_steps=100, **kwargs)
    assert_same(weights(looking, "lora"), weights(blind, "lora"))
    assert metrics(looking) == metrics(blind)


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


# --- Settings --------------------------------------------------------------------------------------------------------


def test_all_problems_are_named_at_once(flags, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(ValueError) as error:
        train_ltd.parse_args(
            flags(
                num_frames=80,
                height=33,
                ltd_window=1,
                ltd_scale=-1,
                resume_from_checkpoint="nowhere",
                hub_model_id="a/b/c",
                optimizer="adamw8bit",
                min_sigma=0.9,
                max_sigma=0.1,
                rank=0,
                caption_dropout=2,
                train_data_dir="missing",
            )
        )
    message = str(error.value)
    for part in (
        "--num_frames must be 4k+1 (the VAE would drop the rest), got 80; try 81",
        "--height must be a multiple of 16, got 33; try 32",
        "--ltd_window must be at least 2 (a smaller one holds no frame pair), got 1",
        "--ltd_scale must not be negative, got -1.0",
        "--resume_from_checkpoint nowhere is not a complete checkpoint",
        "--hub_model_id",
        "pip install bitsandbytes",
        "--min_sigma 0.9 and --max_sigma 0.1",
        "--rank must be positive, got 0",
        "--caption_dropout must lie in [0, 1], got 2.0",
        "--train_data_dir missing does not exist",
    ):
        assert part in message


@pytest.mark.parametrize("given", ["num_train_epochs", "max_train_steps"])
def test_a_length_on_the_command_line_overrides_the_recipes_other(flags, tmp_path, given):
    """`max_train_steps` would win, and the recipe's own would be trained in silence."""
    recipe = {"num_train_epochs": "max_train_steps: 1000", "max_train_steps": "num_train_epochs: 7"}[given]
    (tmp_path / "recipe.yaml").write_text(recipe)
    args = train_ltd.parse_args(flags(config=tmp_path / "recipe.yaml", **{"max_train_steps": None, given: 3}))
    assert {k: getattr(args, k) for k in ("num_train_epochs", "max_train_steps")} == {
        "num_train_epochs": None, "max_train_steps": None, given: 3
    }  # fmt: skip


def test_two_sources_or_none(flags):
    for kwargs in ({"dataset_name": "a/b"}, {"train_data_dir": None}):
        with pytest.raises(ValueError, match="give one of --dataset_name and --train_data_dir"):
            train_ltd.parse_args(flags(**kwargs))


def test_narrow_sigma_range_is_refused(flags):
    with pytest.raises(ValueError, match="leave under 2 %"):
        train_ltd.parse_args(flags(min_sigma=0.0, max_sigma=0.001))


def test_defaults_by_train_type(flags):
    lora = train_ltd.parse_args(flags(learning_rate=None, max_train_steps=None))
    full = train_ltd.parse_args(flags(learning_rate=None, max_train_steps=None, train_type="full", rank=None))
    assert (lora.learning_rate, lora.max_train_steps, lora.num_train_epochs) == (1e-4, 1000, None)
    assert (full.learning_rate, full.max_train_steps, full.num_train_epochs) == (2e-5, None, 2)


def test_recipe_is_overridden_by_the_command_line(flags, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "learning_rate: 3.0e-5\nltd_window: 5\nuse_ema: true\ngradient_checkpointing: none\n"
        "validation_prompt: [one, two]\nlora_target_modules: [to_q, to_k]\nmax_train_steps: null\n"
    )
    base = flags(learning_rate=None, config=recipe)
    args = train_ltd.parse_args(base)
    assert (args.learning_rate, args.ltd_window, args.use_ema, args.gradient_checkpointing) == (3e-5, 5, True, "none")
    assert (args.validation_prompt, args.lora_target_modules) == (["one", "two"], ["to_q", "to_k"])
    args = train_ltd.parse_args([*base, "--ltd_window", "7", "--no-use_ema", "--validation_prompt", "three"])
    assert (args.ltd_window, args.use_ema, args.validation_prompt) == (7, False, ["three"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnign_rate: 1", "there is no flag `learnign_rate`; the nearest is `learning_rate`"),
        ("hub_token: hf_x", "there is no flag `hub_token`"),
        ("use_ema: maybe", "`use_ema` must be true or false, got 'maybe'"),
        ("- a list", "must hold lines of `flag: value`"),
        ("a: [1", "--config"),
        ("!!python/object/apply:os.system ['true']", "--config"),
    ],
)
def test_bad_recipes(flags, tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError) as error:
        train_ltd.parse_args(flags(config=recipe))
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["ltd_window: three", "loss: focal", "train_type: dora"])
def test_recipe_values_are_checked_like_flags(flags, tmp_path, text, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(SystemExit):
        train_ltd.parse_args(flags(config=recipe))
    assert f"--{text.split(':')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_dry_run_prints_a_table_and_leaves_no_weights(run, capsys, train_type):
    output = run(dry_run=True, train_type=train_type, rank=None, validation_split=0.2)
    table = capsys.readouterr().out
    for part in (
        "videos",
        "skipped",
        "captions",
        "cache to expect",
        "trainable parameters",
        "latents",
        "tokens per clip",
    ):
        assert part in table
    assert "(16, 3, 4, 6)" in table and "peak memory" in table and "base model's loss" in table
    assert ("passed" in table) == (train_type == "lora")
    assert {p.name for p in output.iterdir()} <= {"logs", ".lock"}


def test_fsdp_that_did_not_come_about_is_refused(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for"):
        run()


@pytest.mark.slow
def test_regional_compile_trains_like_eager(run, tmp_path):
    compiled = run(output_dir=tmp_path / "compiled", torch_compile=True)
    eager = run(output_dir=tmp_path / "eager")
    assert weights(compiled, "lora").keys() == weights(eager, "lora").keys()
    assert metrics(compiled) == pytest.approx(metrics(eager), rel=1e-4)


def test_compiling_without_a_compiler_is_refused(flags, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C compiler and Python\.h: --no-torch_compile"):
        train_ltd.parse_args([*flags(), "--torch_compile"])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_regional_compile_in_two_processes(run, flags, tmp_path, checkpointing):
    """With what the recipes ask for: blocks compiled, checkpointed, then wrapped by DDP."""
    kwargs = {"max_train_steps": 2, "logging_steps": 1, "gradient_checkpointing": checkpointing}
    result = launch([*flags(output_dir=tmp_path / "compiled", **kwargs), "--torch_compile"], processes=2)
    assert result.returncode == 0, result.stderr
    eager = run(output_dir=tmp_path / "eager", gradient_accumulation_steps=2, **kwargs)
    assert metrics(tmp_path / "compiled") == pytest.approx(metrics(eager), rel=1e-4)
