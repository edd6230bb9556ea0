"""Which models are accepted, and how one is loaded: precision, checkpointing, attention kernels, a quantized base."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import launch
from diffusers import WanPipeline, WanTransformer3DModel
from helpers import LOOKS, assert_same, encoded, metrics, needs_torchao, output_of, trained_output, weights
from safetensors.torch import save_file
from small_wan import PRESETS, build_small_wan
from torch.utils._python_dispatch import TorchDispatchMode

import train_ltd

# --- Accepted and refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "16 in_channels, where I2V has 36"),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "the class WanVACEPipeline"),
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
        run(pretrained_model_name_or_path=copy, cache_dir=tmp_path / "none")
    assert not encoded(tmp_path / "none")


def test_i2v_single_file_is_refused(run, tmp_path):
    save_file({"blocks.0.cross_attn.k_img.weight": torch.zeros(1)}, tmp_path / "i2v.safetensors")
    with pytest.raises(ValueError, match=r"i2v\.safetensors is no Wan .*key blocks\.0\.cross_attn\.k_img"):
        run(transformer_path=tmp_path / "i2v.safetensors")


def test_missing_model_is_named(run):
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path nobody/nothing"):
        run(pretrained_model_name_or_path="nobody/nothing")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 33}, "--height must be a multiple of 16, got 33; try 32"),
        ({"width": 0}, "--width must be a multiple of 16, got 0; try 16"),
        ({"num_frames": 80}, r"--num_frames must be 4k\+1, for the VAE would drop the rest; got 80, try 81"),
        ({"num_frames": 0}, "got 0, try 1"),
    ],
)
def test_sizes_that_the_model_cannot_make_are_refused(run, tmp_path, sizes, message):
    """Before anything is cached: the VAE would drop frames in silence, the patches pixels."""
    with pytest.raises(ValueError, match=message):
        run(**sizes, cache_dir=tmp_path / "none")
    assert not encoded(tmp_path / "none")


def test_what_is_known_of_a_model_is_read_from_its_configs(flags):
    wan = train_ltd.identify_wan(train_ltd.parse_args(flags()))
    assert wan == train_ltd.Wan(
        subfolder="transformer",
        boundary_ratio=None,
        sigma_range=(0, 1),
        first_frame=None,
        image_embeds=False,
        timestep_per_token=False,
        patch_size=(1, 2, 2),
        architecture="wan2.1",
        scheduler="UniPCMultistepScheduler",
        size_multiple=16,
        frame_multiple=4,
        defaults=(81, 480, 832),
        fps=16,
    )


def original_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tiny transformer in the key layout of the original Wan code, as community files have it."""
    return {train_ltd.original_name(key): value for key, value in state_dict.items()}


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


def test_adapter_is_float32_on_a_bf16_base(flags, tiny_wan):
    args = train_ltd.parse_args(flags(mixed_precision="bf16"))
    transformer = train_ltd.load_transformer(args, train_ltd.identify_wan(args))
    train_ltd.add_lora(transformer, args)
    assert {p.dtype for p in train_ltd.trainable_parameters(transformer)} == {torch.float32}
    assert transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    frozen = [n for n, p in transformer.named_parameters() if not p.requires_grad]
    assert all("lora_" not in n for n in frozen)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_a_file_of_scaled_fp8_is_refused(run, tiny_wan, tmp_path, scale):
    tensors = {}
    model = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    for key, value in model.state_dict().items():
        name = train_ltd.original_name(key)
        tensors[name] = value
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2:
            factor = value.abs().max() / 448
            tensors[name] = (value / factor).to(torch.float8_e4m3fn)
            tensors[f"{name.removesuffix('weight')}{scale}"] = factor
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(ValueError, match=f"scaled fp8 .the key .*{scale}.*take the file in bf16"):
        run(transformer_path=tmp_path / "fp8.safetensors")


# --- Checkpointing ---------------------------------------------------------------------------------------------------


class KernelCount(TorchDispatchMode):
    """How often torch's fused attention ran forward; what checkpointing has kept does not come here."""

    calls = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled blocks run compiled under it, as they do under selective checkpointing's own

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return operator(*args, **(kwargs or {}))


def gradients(args, compiled: bool = False) -> tuple[dict[str, torch.Tensor], torch.nn.Module, int]:
    """Of one step on random numbers, and how often the attention kernel ran forward in it."""
    torch.manual_seed(0)
    wan = train_ltd.identify_wan(args)
    model = train_ltd.load_transformer(args, wan)
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
            noisy_latents = torch.lerp(latents, noise, batch["sigmas"].view(-1, 1, 1, 1, 1))
            prediction = train_ltd.predict_flow(wan, model, noisy_latents, batch)
        F.mse_loss(prediction.float(), noise - latents).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, model, kernels.calls


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_checkpointing_gives_equal_gradients_and_selective_keeps_self_attention(flags, train_type, mixed_precision):
    kwargs = {"train_type": train_type, "rank": None, "mixed_precision": mixed_precision}
    args = [train_ltd.parse_args(flags(gradient_checkpointing=m, **kwargs)) for m in ("none", "selective", "full")]
    (wanted, model, calls), selective, full = (gradients(a) for a in args)
    assert calls == 2 * model.config.num_layers and all(g.any() for g in wanted.values())
    # Of the two attentions of a block, selective keeps the first and computes the second once more.
    assert (selective[2], full[2]) == (calls * 3 // 2, 2 * calls)
    assert_same(selective[0], wanted)
    assert_same(full[0], wanted)


@pytest.mark.slow
def test_checkpointing_in_compiled_blocks(flags):
    args = [train_ltd.parse_args(flags(gradient_checkpointing=m)) for m in ("none", "selective", "full", "offload")]
    (wanted, _, calls), selective, full, offload = (gradients(a, compiled=True) for a in args)
    assert calls > 0 and (selective[2], full[2], offload[2]) == (calls * 3 // 2, 2 * calls, 2 * calls)
    assert_same(offload[0], full[0])
    for name, gradient in wanted.items():
        torch.testing.assert_close(selective[0][name], gradient, rtol=1e-4, atol=1e-6)


# --- Checkpointing with the blocks' inputs in RAM --------------------------------------------------------------------


@pytest.fixture
def moves(monkeypatch):
    """What was copied to RAM and back, in order: `("out" or "back", tensor, its copy)`."""
    seen = []

    def watch(name: str, direction: str):
        copy = getattr(train_ltd, name)

        def function(value):
            result = copy(value)
            tensors = (value, result[0]) if direction == "out" else (value[0], result)
            seen.append((direction, *tensors))
            return result

        monkeypatch.setattr(train_ltd, name, function)

    watch("copy_to_ram", "out")
    watch("copy_from_ram", "back")
    return seen


OFFLOADED = [
    {"train_type": "lora"},
    {"train_type": "full", "rank": None},
    {"train_type": "lora", "mixed_precision": "bf16"},
    {"train_type": "full", "rank": None, "mixed_precision": "bf16"},
    {"train_type": "lora", "lora_dropout": 0.5},
    pytest.param({"train_type": "lora", "mixed_precision": "bf16", "quantization": "int8"}, marks=needs_torchao),
]


@pytest.mark.parametrize("kwargs", OFFLOADED, ids=lambda kwargs: "-".join(str(v) for v in kwargs.values() if v))
def test_offloaded_inputs_give_equal_gradients(flags, moves, kwargs):
    """One copy a block and way, of its own input and of nothing that the blocks share; bit for bit as it was."""
    args = [train_ltd.parse_args(flags(gradient_checkpointing=m, **kwargs)) for m in ("full", "offload")]
    wanted = gradients(args[0])
    assert moves == []
    gradient, model, calls = gradients(args[1])
    assert any(g.any() for g in wanted[0].values()) and calls == wanted[2] > 0
    assert_same(gradient, wanted[0])

    blocks, width = model.config.num_layers, model.config.num_attention_heads * model.config.attention_head_dim
    moves[:] = [move for move in moves if move[1].numel()]  # torch 2.8 also saves an empty tensor of its own
    assert [direction for direction, _, _ in moves] == ["out"] * blocks + ["back"] * blocks
    for _, tensor, copied in moves[:blocks]:
        assert tensor.shape == copied.shape == (2, 3 * 2 * 3, width) and torch.equal(tensor, copied)
        assert tensor.dtype == copied.dtype == (torch.bfloat16 if args[1].mixed_precision == "bf16" else torch.float32)
        assert tensor.stride() == copied.stride() and tensor.data_ptr() != copied.data_ptr()
    saved = [copied.data_ptr() for _, _, copied in moves[:blocks]]
    assert [tensor.data_ptr() for _, tensor, _ in moves[blocks:]] == saved[::-1]


def test_offloaded_inputs_of_layers_in_4_bits(flags, monkeypatch, moves):
    """By bitsandbytes' own layers on a CPU, which diffusers puts in on a GPU only."""
    bnb = pytest.importorskip("bitsandbytes")
    load = train_ltd.load_transformer

    def load_in_4_bits(args, wan):
        model = load(args, wan)
        layers = [(name, m) for name, m in model.blocks.named_modules() if isinstance(m, torch.nn.Linear)]
        for name, layer in layers:
            quantized = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
            quantized.load_state_dict(layer.state_dict())
            model.blocks.set_submodule(name, quantized.requires_grad_(False).to("cpu"))
            assert quantized.weight.quant_state.quant_type == "nf4"
        return model

    monkeypatch.setattr(train_ltd, "load_transformer", load_in_4_bits)
    kwargs = {"mixed_precision": "bf16"}
    full, offload = (
        gradients(train_ltd.parse_args(flags(gradient_checkpointing=m, **kwargs)))[0] for m in ("full", "offload")
    )
    assert moves and any(g.any() for g in full.values())
    assert_same(offload, full)


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_offloaded_run_and_its_resume_are_bit_identical(run, moves, tmp_path, train_type, mixed_precision):
    """To a run with full checkpointing, held-out errors included; a resumed run may change between the two."""
    kwargs = {"train_type": train_type, "rank": 4 if train_type == "lora" else None, "max_train_steps": 4}
    kwargs |= {"mixed_precision": mixed_precision, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
    kwargs |= {"validation_fraction": 0.2, "eval_steps": 2}
    straight = run(output_dir=tmp_path / "straight", gradient_checkpointing="full", **kwargs)
    assert moves == []
    offloaded = run(output_dir=tmp_path / "offloaded", gradient_checkpointing="offload", **kwargs)
    steps = 4 * 2
    assert sum(direction == "out" for direction, _, _ in moves) == steps * 2  # two blocks; none in a held-out error
    assert_same(weights(offloaded, train_type), weights(straight, train_type))
    for key in ("loss", "grad_norm", "val/mse"):
        assert metrics(offloaded, key) == metrics(straight, key)
    for origin, checkpointing in ((straight, "offload"), (offloaded, "full")):
        resumed = tmp_path / f"resumed-{checkpointing}"
        shutil.copytree(origin / "checkpoint-2", resumed / "checkpoint-2")
        run(output_dir=resumed, resume_from_checkpoint="latest", gradient_checkpointing=checkpointing, **kwargs)
        assert_same(weights(resumed, train_type), weights(straight, train_type))


@pytest.fixture
def deterministic_kernels():
    """On a GPU attention's backward pass adds up in any order, unless it is told not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.usefixtures("deterministic_kernels")
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_offloaded_inputs_leave_the_gpu(flags, tmp_path, quantization):
    """Equal gradients while their memory is written over at once, and a peak that is lower by most inputs."""
    wan = tmp_path / "wan"
    build_small_wan(wan, **PRESETS["tiny"] | {"num_layers": 12, "attention_head_dim": 128, "ffn_dim": 256})
    kwargs = {"pretrained_model_name_or_path": wan, "mixed_precision": "bf16", "quantization": quantization}
    results = {}
    for checkpointing in ("full", "offload"):
        args = train_ltd.parse_args(flags(gradient_checkpointing=checkpointing, **kwargs))
        torch.manual_seed(0)
        model = train_ltd.load_transformer(args, train_ltd.identify_wan(args))
        train_ltd.add_lora(model, args)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.to("cuda")
        latents, noise = torch.randn(2, 1, 16, 16, 64, 64, device="cuda").unbind()  # 16,384 tokens
        batch = {"sigmas": torch.tensor([0.5], device="cuda")}
        batch["prompt_embeds"] = torch.randn(1, 12, model.config.text_dim, device="cuda")
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                prediction = train_ltd.predict_flow(None, model, latents, batch)
            F.mse_loss(prediction.float(), noise - latents).backward()
        peak = torch.cuda.max_memory_allocated()
        found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}
        results[checkpointing] = (found, peak, model.config.num_attention_heads * 128 * 2 * 16_384)
        del model, prediction
        torch.cuda.empty_cache()
    (wanted, full, size), (gradient, offload, _) = results.values()
    assert all(g.any() for g in wanted.values())
    assert_same(gradient, wanted)
    assert full - offload > 9 * size  # of twelve blocks' inputs


@pytest.mark.slow
def test_offloaded_inputs_in_two_processes(run, flags, tmp_path):
    kwargs = {"max_train_steps": 2, "gradient_checkpointing": "offload"}
    result = launch(flags(output_dir=tmp_path / "two", **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    assert "| hardware | 2 x" in (tmp_path / "two/README.md").read_text()
    kwargs["gradient_checkpointing"] = "full"
    alone = run(output_dir=tmp_path / "alone", gradient_accumulation_steps=2, **kwargs)
    assert_same(weights(alone, "lora"), weights(tmp_path / "two", "lora"))


# --- Attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", train_ltd.FLASH_ATTENTION)
@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({}, "needs a GPU of the Hopper generation or newer"),
        ({"is_available": True, "get_device_capability": (8, 9)}, "Some GPU is older than Hopper"),
        ({"is_available": True, "get_device_capability": (9, 0)}, "a package is missing: (build|pip install)"),
    ],
)
def test_flash_attention_says_what_it_lacks(flags, monkeypatch, backend, machine, message):
    """The GPUs are made up; what torch has and which packages there are is not."""
    for name, value in {"get_device_name": "Some GPU", "is_bf16_supported": True, **machine}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    with pytest.raises(ValueError, match=f"--attention_backend {backend}.*{message}"):
        train_ltd.parse_args(flags(attention_backend=backend, mixed_precision="no"))


def test_torch_knows_the_names_of_the_kernels():
    names = torch.nn.attention.list_flash_attention_impls()
    assert {kernel.name for kernel in train_ltd.FLASH_ATTENTION.values()} <= set(names)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", train_ltd.FLASH_ATTENTION)
def test_flash_attention_gives_the_gradients_of_torchs_own(flags, backend):
    """In bf16, to a hundredth of each gradient's size."""
    try:
        args = train_ltd.parse_args(flags(attention_backend=backend, mixed_precision="bf16"))
    except ValueError as error:
        pytest.skip(str(error))
    found = gradients(args)[0]
    torch.nn.attention.restore_flash_attention_impl()
    wanted = gradients(train_ltd.parse_args(flags(mixed_precision="bf16")))[0]
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 0.01 * gradient.norm()


def test_attention_backends_agree(flags):
    args = {name: train_ltd.parse_args(flags(attention_backend=name)) for name in (None, "native", "_native_math")}
    (wanted, _, calls), native, plain = (gradients(a) for a in args.values())
    assert native[2] == calls > 0 and plain[2] == 0
    assert_same(native[0], wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(plain[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_training_and_sampling_use_the_attention_backend(run, tmp_path):
    outputs = {name: run(output_dir=tmp_path / f"{name}", attention_backend=name) for name in (None, "_native_math")}
    assert metrics(outputs["_native_math"]) == pytest.approx(metrics(outputs[None]), rel=1e-5)


# --- Quantized base --------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_lora_on_a_quantized_base(monkeypatch, run, tiny_wan, tmp_path, quantization):
    """Held-out error within 1 % of the float base's; the LoRA fits the unquantised base in the stock pipeline."""
    kwargs = {"validation_fraction": 0.2, "max_train_steps": 3, "mixed_precision": "bf16"}
    models, save = [], train_ltd.save_weights
    monkeypatch.setattr(train_ltd, "save_weights", lambda *args: (models.append(args[0].transformer), save(*args)))
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
    with pytest.raises(ValueError, match=f"quantization {quantization} -> None"):
        run(output_dir=resumed, resume_from_checkpoint="latest", **kwargs | {"quantization": None})


@needs_torchao
def test_int8_weights_move_to_a_device(flags):
    """To the meta device, in place of a GPU: their tensors must move, not only what wraps them."""
    args = train_ltd.parse_args(flags(mixed_precision="bf16", quantization="int8"))
    model = train_ltd.load_transformer(args, train_ltd.identify_wan(args))
    train_ltd.add_lora(model, train_ltd.parse_args(flags()))
    weight = model.to("meta").blocks[0].attn1.to_q.base_layer.weight
    assert type(weight).__name__ == "Int8Tensor" and weight.device.type == weight.qdata.device.type == "meta"


@pytest.mark.slow
@needs_torchao
def test_int8_in_two_processes_equals_accumulation_bitwise(flags, tmp_path):
    """Both in processes of their own: other tests leave a state in this one that changes the last bits."""
    kwargs = {"max_train_steps": 2, "quantization": "int8"}
    alone = tmp_path / "alone"
    result = launch(flags(output_dir=alone, gradient_accumulation_steps=2, **kwargs))
    assert result.returncode == 0, result.stderr
    result = launch(flags(output_dir=tmp_path / "two", **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    assert "| hardware | 2 x" in (tmp_path / "two/README.md").read_text()
    assert_same(weights(alone, "lora"), weights(tmp_path / "two", "lora"))
