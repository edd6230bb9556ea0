"""Checkpointing, attention kernels, a quantised base: that they are really on, and that the results are the same."""

import importlib.util
import shutil

import diffusers
import pytest
import torch
from conftest import launch
from diffusers import WanPipeline, WanTransformer3DModel
from test_train import LOOKS, assert_same, metrics, output_of, trained_output, weights
from torch.utils._python_dispatch import TorchDispatchMode

import train_ltd

needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="no torchao: pip install torchao")


class KernelCount(TorchDispatchMode):
    """How often torch's fused attention ran forward; what checkpointing has kept does not come here."""

    calls = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled blocks run compiled under it, as they do under selective checkpointing's own

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def default_attention():
    """Afterwards: diffusers sets a backend for the whole process."""
    with diffusers.attention_backend("native"):
        yield


def gradients(args, compiled: bool = False) -> tuple[dict[str, torch.Tensor], torch.nn.Module, int]:
    """Of one step on random numbers, and how often the attention kernel ran forward in it."""
    torch.manual_seed(0)
    model = train_ltd.load_transformer(args)
    if args.train_type == "lora":
        train_ltd.add_lora(model, args)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)  # fresh ones are zero, and so would lora_A's gradients be
    if compiled:
        model.compile_repeated_blocks()
    latents, noise = torch.randn(2, 2, 16, 3, 4, 6).unbind()
    batch = {"latents": latents, "noise": noise, "sigmas": torch.rand(2)}
    batch["prompt_embeds"] = torch.randn(2, 12, model.config.text_dim)
    with KernelCount() as kernels:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            error = train_ltd.flow_matching_error(model, batch)
        error.mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, model, kernels.calls


# --- Checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_checkpointing_gives_equal_gradients_and_selective_runs_attention_once(flags, train_type, mixed_precision):
    kwargs = {"train_type": train_type, "rank": None, "mixed_precision": mixed_precision}
    args = [train_ltd.parse_args(flags(gradient_checkpointing=m, **kwargs)) for m in ("none", "selective", "full")]
    (wanted, model, calls), selective, full = (gradients(a) for a in args)
    assert calls == 2 * model.config.num_layers and all(g.any() for g in wanted.values())
    assert (selective[2], full[2]) == (calls, 2 * calls)
    assert_same(selective[0], wanted)
    assert_same(full[0], wanted)


@pytest.mark.slow
def test_selective_checkpointing_in_compiled_blocks(flags):
    args = [train_ltd.parse_args(flags(gradient_checkpointing=m)) for m in ("none", "selective", "full")]
    (wanted, _, calls), selective, full = (gradients(a, compiled=True) for a in args)
    assert calls > 0 and (selective[2], full[2]) == (calls, 2 * calls)
    for name, gradient in wanted.items():
        torch.testing.assert_close(selective[0][name], gradient, rtol=1e-4, atol=1e-6)


# --- Attention -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("default_attention")
def test_attention_backends_agree(flags):
    args = {name: train_ltd.parse_args(flags(attention_backend=name)) for name in (None, "native", "_native_math")}
    (wanted, _, calls), native, plain = (gradients(a) for a in args.values())
    assert native[2] == calls > 0 and plain[2] == 0
    assert_same(native[0], wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(plain[0][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("default_attention")
def test_training_and_sampling_use_the_attention_backend(run, tmp_path):
    outputs = {name: run(output_dir=tmp_path / f"{name}", attention_backend=name) for name in (None, "_native_math")}
    assert metrics(outputs["_native_math"]) == pytest.approx(metrics(outputs[None]), rel=1e-5)


def test_attention_kernels_for_inference_are_no_choice(flags, capsys):
    """sage has no backward pass: the projections before it would silently get no gradient."""
    with pytest.raises(SystemExit):
        train_ltd.parse_args(flags(attention_backend="sage"))
    assert "--attention_backend" in capsys.readouterr().err


# --- Quantised base --------------------------------------------------------------------------------------------------


def test_quantization_is_refused_where_it_cannot_work(monkeypatch, flags, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (tmp_path / "community.safetensors").touch()
    kwargs = {"train_type": "full", "rank": None, "transformer_path": tmp_path / "community.safetensors"}
    with pytest.raises(ValueError) as error:
        train_ltd.parse_args(flags(quantization="int8", **kwargs))
    parts = ("pip install torchao", "goes with --train_type lora", "not with FSDP", "leaves a single file in floats")
    for part in parts:
        assert part in str(error.value)
    with pytest.raises(ValueError, match="adamw8bit go with one GPU or DDP"):
        train_ltd.parse_args(flags(optimizer="adamw8bit"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="nf4 needs a GPU"):
        train_ltd.parse_args(flags(quantization="nf4"))


def assert_quantized(model: WanTransformer3DModel, quantization: str) -> None:
    """All linear layers of the blocks; the time embedding stays in float32, as diffusers keeps it."""
    layers = {n: m for n, m in model.blocks.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n}
    assert len(layers) == 10 * model.config.num_layers
    for layer in layers.values():
        if quantization == "int8":
            assert type(layer.weight).__name__ == "Int8Tensor" and layer.weight.qdata.dtype == torch.int8
        else:
            assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.dtype == torch.uint8
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


QUANTIZED = [pytest.param("int8", marks=needs_torchao), pytest.param("nf4", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_lora_on_a_quantized_base(monkeypatch, run, tiny_wan, tmp_path, quantization):
    """Held-out error within 1 % of the float base's; the LoRA fits the unquantised base in the stock pipeline."""
    kwargs = {"validation_split": 0.2, "max_train_steps": 3, "mixed_precision": "bf16"}
    models, save = [], train_ltd.save_weights
    monkeypatch.setattr(train_ltd, "save_weights", lambda *args: (models.append(args[1]), save(*args)))
    plain = run(output_dir=tmp_path / "plain", **kwargs)
    output, expected = trained_output(monkeypatch, run, **kwargs, **LOOKS, quantization=quantization)
    assert_quantized(models[-1], quantization)
    for step in (0, 3):
        assert metrics(output, "val/mse")[step] == pytest.approx(metrics(plain, "val/mse")[step], rel=0.01)
    assert metrics(output, "val/mse")[0] != metrics(plain, "val/mse")[0]
    assert list((output / "samples").glob("*.mp4"))
    assert f"| quantization | {quantization} |" in (output / "README.md").read_text()
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    before = output_of(pipeline.transformer)
    pipeline.load_lora_weights(output)
    after = output_of(pipeline.transformer)
    assert (after - expected).abs().mean() < 0.2 * (before - expected).abs().mean()


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_quantized_resume_is_bit_identical(run, tmp_path, quantization):
    kwargs = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_checkpointing": "selective"}
    kwargs |= {"mixed_precision": "bf16", "quantization": quantization}
    straight, resumed = run(output_dir=tmp_path / "straight", **kwargs), tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    run(output_dir=resumed, resume_from_checkpoint="latest", **kwargs)
    assert_same(weights(straight, "lora"), weights(resumed, "lora"))
    with pytest.raises(ValueError, match=f"quantization {quantization} there, None here"):
        run(output_dir=resumed, resume_from_checkpoint="latest", **kwargs | {"quantization": None})


@needs_torchao
def test_int8_weights_move_to_a_device(flags):
    """To the meta device, in place of a GPU: their tensors must move, not only what wraps them."""
    model = train_ltd.load_transformer(train_ltd.parse_args(flags(mixed_precision="bf16", quantization="int8")))
    train_ltd.add_lora(model, train_ltd.parse_args(flags()))
    weight = model.to("meta").blocks[0].attn1.to_q.base_layer.weight
    assert type(weight).__name__ == "Int8Tensor" and weight.device.type == weight.qdata.device.type == "meta"


@needs_torchao
def test_int8_in_two_processes_equals_accumulation_bitwise(run, flags, tmp_path):
    kwargs = {"max_train_steps": 2, "quantization": "int8"}
    alone = run(output_dir=tmp_path / "alone", gradient_accumulation_steps=2, **kwargs)
    result = launch(flags(output_dir=tmp_path / "two", **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    assert "| hardware | 2 x" in (tmp_path / "two/README.md").read_text()
    assert_same(weights(alone, "lora"), weights(tmp_path / "two", "lora"))


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_quantized_dry_run(run, capsys, quantization):
    run(dry_run=True, mixed_precision="bf16", quantization=quantization)
    assert "passed" in capsys.readouterr().out


def test_the_bare_switch_of_diffusers_scripts(flags):
    assert train_ltd.parse_args([*flags(), "--gradient_checkpointing"]).gradient_checkpointing == "full"
