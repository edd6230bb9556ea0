"""LoRA files of other programs that a run reads, and the files that it writes for other programs."""

import argparse
import json
import math
import os
import re
from pathlib import Path

import generate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import HEIGHT, NUM_FRAMES, WIDTH
from diffusers import WanPipeline, WanTransformer3DModel
from helpers import assert_same, code_block
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_ltd

NAME = "dancing_dog"
# The fields of LoraConfig and its parents in peft 0.18.0 (peft/config.py, peft/tuners/lora/config.py in its wheel).
# 0.19 added lora_ga_config and use_bdlora, 0.20 velora_config and monteclora_config, 0.21 kasa_config; none left.
PEFT_FIELDS = set(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core "
    "trainable_token_indices loftq_config eva_config corda_config use_dora alora_invocation_tokens use_qalora "
    "qalora_group_size layer_replication runtime_config lora_bias target_parameters arrow_config "
    "ensure_weight_tying".split()
)


# --- Files that are written ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, tiny_wan, clips, tmp_path_factory):
    """Train under the umask 0027; `(folder, files that were published)`."""
    folder = tmp_path_factory.mktemp("trained")
    values = {
        "pretrained_model_name_or_path": tiny_wan,
        "train_data_dir": clips,
        "output_dir": folder / "out",
        "output_name": NAME,
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": NUM_FRAMES,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "report_to": "none",
        "trigger_word": "ohwx dog",
        "ltd_window": 2,
        "ltd_scale": 0.5,
        "train_type": request.param,
    }
    if request.param == "lora":
        values |= {"rank": 4, "lora_alpha": 2, "lora_dropout": 0.1}
    published = []
    umask = os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_ltd, "create_hub_repo", lambda args: "me/dog")
            patch.setattr(train_ltd, "publish", lambda args, repo_id, files: published.extend(files))
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            line = [f"--{name}={value}" for name, value in values.items()]
            train_ltd.main(train_ltd.parse_args([*line, "--push_to_hub"]))
    finally:
        os.umask(umask)
    return request.param, folder / "out", published


only_lora = pytest.mark.parametrize("trained", ["lora"], indirect=True)
only_full = pytest.mark.parametrize("trained", ["full"], indirect=True)


def file_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@only_lora
def test_adapter_metadata_are_known_to_every_peft(trained):
    """peft before 0.21 refuses a configuration with a field that it does not know."""
    _, folder, _ = trained
    metadata = json.loads(file_metadata(folder / train_ltd.LORA_FILE)["lora_adapter_metadata"])
    config = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    assert config.keys() <= PEFT_FIELDS
    targets = sorted(train_ltd.LORA_TARGETS)
    assert config == {"r": 4, "lora_alpha": 2, "lora_dropout": 0.1, "target_modules": targets}


def test_adapter_metadata_name_rank_and_alpha_even_if_they_are_the_defaults(tiny_wan):
    model = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    model.add_adapter(LoraConfig(target_modules=["to_q"]))
    metadata = train_ltd.lora_metadata(model, argparse.Namespace(expert=None))
    assert metadata.keys() == {"format", "lora_adapter_metadata"}
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "transformer.r": 8,
        "transformer.lora_alpha": 8,
        "transformer.target_modules": ["to_q"],
    }


@only_lora
@pytest.mark.parametrize("where", [".", "checkpoint-1"])
def test_comfyui_file_has_its_strength_in_its_weights(trained, where):
    _, folder, _ = trained
    own = load_file(folder / where / train_ltd.LORA_FILE)
    comfyui = load_file(folder / where / f"{NAME}.safetensors")
    assert all(re.fullmatch(r"diffusion_model\..+\.lora_[AB]\.weight", key) for key in comfyui)
    converted = WanPipeline.lora_state_dict(folder / where / f"{NAME}.safetensors")
    assert converted.keys() == own.keys()
    for key, value in own.items():
        assert torch.equal(converted[key], value * 0.5 if "lora_B" in key else value)
        assert value.any()


def test_metadata_for_comfyui_and_galleries(trained, tiny_wan):
    train_type, folder, _ = trained
    metadata = file_metadata(folder / f"{NAME}.safetensors")
    assert all(isinstance(value, str) for value in metadata.values())
    assert str(folder) not in str(metadata) and str(tiny_wan.parent) not in str(metadata)
    assert "lora_adapter_metadata" not in metadata  # diffusers would scale by it once more
    expected = {
        "modelspec.title": NAME,
        "modelspec.architecture": "wan2.1/lora" if train_type == "lora" else "wan2.1",
        "modelspec.trigger_phrase": "ohwx dog",
        "ss_output_name": NAME,
        "ss_sd_model_name": tiny_wan.name,
        "ss_steps": "2",
        "ss_loss_type": "ltd",
        "ss_training_comment": "loss ltd (window 2, scale 0.5, strength 1, normalize False)",
    }
    if train_type == "lora":
        expected |= {"ss_network_dim": "4", "ss_network_alpha": "4"}
        assert file_metadata(folder / "checkpoint-1" / f"{NAME}.safetensors")["ss_steps"] == "1"
    assert metadata.items() >= expected.items()


def test_a_hub_id_is_the_base_model_of_the_metadata(flags):
    wan = train_ltd.identify_wan(train_ltd.parse_args(flags()))
    line = flags(pretrained_model_name_or_path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    metadata = train_ltd.file_metadata(wan, train_ltd.parse_args(line), 7)
    assert metadata["ss_sd_model_name"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert "modelspec.trigger_phrase" not in metadata


def test_every_file_has_the_mode_that_the_umask_leaves(trained):
    """safetensors writes 0600, which locks out the group and every server."""
    _, folder, _ = trained
    files = list(folder.rglob("*.safetensors"))
    assert {path.relative_to(folder).parts[0] for path in files} >= {"cache", f"{NAME}.safetensors", "checkpoint-1"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    assert not list(folder.rglob(".mode*"))


def test_what_is_published(trained):
    train_type, folder, published = trained
    names = {path.relative_to(folder).as_posix() for path in published}
    own = {"pytorch_lora_weights.safetensors"}
    if train_type == "full":
        own = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
    assert {name for name in names if "." in name and not name.startswith("samples")} == own | {
        f"{NAME}.safetensors",
        "README.md",
        "training_settings.json",
        "curves.png",
    }


def original_keys(blocks: int) -> set[str]:
    """The keys of the published Wan2.1-T2V checkpoints."""
    modules = ["patch_embedding", "head.head", "time_projection.1"]
    modules += [f"{name}_embedding.{layer}" for name in ("text", "time") for layer in (0, 2)]
    keys = {"head.modulation"}
    for block in range(blocks):
        keys.add(f"blocks.{block}.modulation")
        modules += [f"blocks.{block}.{name}" for name in ("norm3", "ffn.0", "ffn.2")]
        for attention in ("self_attn", "cross_attn"):
            modules += [f"blocks.{block}.{attention}.{name}" for name in "qkvo"]
            keys |= {f"blocks.{block}.{attention}.norm_{name}.weight" for name in "qk"}
    return keys | {f"{module}.{part}" for module in modules for part in ("weight", "bias")}


@only_full
def test_full_fine_tune_is_also_one_file_in_original_keys(trained, tiny_wan):
    """ComfyUI, DiffSynth and musubi want such a file; diffusers gives every tensor of it back."""
    _, folder, _ = trained
    path = folder / f"{NAME}.safetensors"
    own = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    model = WanTransformer3DModel.from_single_file(path, config=str(tiny_wan), subfolder="transformer")
    assert_same(dict(model.state_dict()), own)
    assert load_file(path).keys() == original_keys(len(model.blocks))
    assert not list(folder.glob("checkpoint-*/*.safetensors"))


def test_card_says_which_file_goes_where(trained):
    train_type, folder, _ = trained
    card = (folder / "README.md").read_text()
    assert "lora_comfyui" not in card
    if train_type == "lora":
        assert f"put `{NAME}.safetensors` into `models/loras`, and not the file of diffusers" in card
    else:
        assert f"put `{NAME}.safetensors` into `models/diffusion_models`" in card
    assert re.search(r"^\| libraries \| .*\bpeft \d", card, re.MULTILINE)
    assert NAME not in code_block(card)


def test_output_name_is_that_of_the_folder(flags, tmp_path):
    for folder, name in (("my.lora", "my.lora"), ("out-x.safetensors", "out-x")):
        assert train_ltd.parse_args(flags(output_dir=tmp_path / folder)).output_name == name


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "a\\b", "dog.safetensors", "pytorch_lora_weights", "my_PyTorch_LoRA_weights", "x" * 250]
)
def test_output_name_that_cannot_be_a_file_is_refused(flags, name):
    with pytest.raises(ValueError, match=rf"^--output_name {re.escape(name)}: give a plain, short name[^\n]*$"):
        train_ltd.parse_args(flags(output_name=name))


def test_the_folder_gives_no_name_that_is_taken(flags, tmp_path):
    with pytest.raises(ValueError, match="--output_name pytorch_lora_weights: give"):
        train_ltd.parse_args(flags(output_dir=tmp_path / "pytorch_lora_weights"))


@pytest.mark.parametrize("seed", [-1, 2**32, "x"])
def test_seed_that_no_library_takes_is_refused(flags, capsys, seed):
    with pytest.raises(SystemExit):
        train_ltd.parse_args(flags(seed=seed))
    assert "argument --seed" in capsys.readouterr().err
    assert train_ltd.parse_args(flags(seed=2**32 - 1)).seed == 2**32 - 1


# --- Files that are read ---------------------------------------------------------------------------------------------
RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
# diffusers' layers of a block, and the names that the original Wan code has for them
LAYERS = {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
for own, original in (("attn1", "self_attn"), ("attn2", "cross_attn")):
    LAYERS |= {f"{own}.to_{letter}": f"{original}.{letter}" for letter in "qkv"}
    LAYERS[f"{own}.to_out.0"] = f"{original}.o"


@pytest.fixture
def model(tiny_wan):
    return WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")


@pytest.fixture
def pairs(model):
    """A random LoRA: `(lora_A, lora_B)` by diffusers' names."""
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for block in range(len(model.blocks)):
        for layer in LAYERS:
            name = f"blocks.{block}.{layer}"
            weight = model.get_submodule(name).weight
            down = torch.randn(RANK, weight.shape[1], generator=generator)
            pairs[name] = (down, torch.randn(weight.shape[0], RANK, generator=generator))
    return pairs


def original_name(name: str) -> str:
    _, block, layer = name.split(".", 2)
    return f"blocks.{block}.{LAYERS[layer]}"


def own_name(name: str) -> str:
    return name


def musubi_name(name: str) -> str:
    return original_name(name).replace(".", "_")


def keys_of(pairs, prefix: str, name=original_name, parts=("lora_A.weight", "lora_B.weight")) -> dict:
    tensors = {}
    for layer, matrices in pairs.items():
        for part, matrix in zip(parts, matrices, strict=True):
            tensors[f"{prefix}{name(layer)}.{part}"] = matrix.clone()
    return tensors


def with_alpha(pairs, tensors: dict, prefix: str, alpha=lambda layer: 2.0, name=original_name) -> dict:
    for layer in pairs:
        tensors[f"{prefix}{name(layer)}.alpha"] = torch.tensor(alpha(layer))
    return tensors


def adapter(prefix: str = "transformer.", **config) -> dict[str, str]:
    values = {"r": RANK, "lora_alpha": 2, "target_modules": list(TARGETS)} | config
    return {"lora_adapter_metadata": json.dumps({prefix + key: value for key, value in values.items()})}


def write(path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def mixed_alpha(layer: str) -> float:
    return 1.0 if "to_k" in layer else 3.0


DOWN_UP = ("lora_down.weight", "lora_up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")


def dialect(name: str, pairs: dict, folder: Path) -> tuple[Path, dict[str, float]]:
    """Write the LoRA in a dialect. Returns the path, and each layer's scale by the rules of who wrote it."""
    path = folder / "lora.safetensors"
    diffusers = keys_of(pairs, "transformer.", own_name)
    one = dict.fromkeys(pairs, 1.0)
    half = dict.fromkeys(pairs, 0.5)
    if name == "diffusers":
        return write(path, diffusers, adapter()), half
    if name == "diffusers, no metadata":
        return write(path, diffusers), one
    if name == "metadata without the prefix":
        return write(path, diffusers, adapter("")), half
    if name == "metadata of peft 0.21":
        return write(path, diffusers, adapter(kasa_config=None, velora_config=None)), half
    if name == "rslora":
        return write(path, diffusers, adapter(use_rslora=True)), dict.fromkeys(pairs, 2 / math.sqrt(RANK))
    if name == "alpha_pattern":
        scales = {layer: 8 / RANK if layer.endswith("attn1.to_k") else 0.5 for layer in pairs}
        return write(path, diffusers, adapter(alpha_pattern={"attn1.to_k": 8})), scales
    if name == "comfyui with alpha":
        tensors = keys_of(pairs, "diffusion_model.")
        return write(path, with_alpha(pairs, tensors, "diffusion_model.")), half
    if name == "comfyui without alpha":
        return write(path, keys_of(pairs, "diffusion_model.")), one
    if name == "comfyui with several alphas":
        tensors = with_alpha(pairs, keys_of(pairs, "diffusion_model."), "diffusion_model.", mixed_alpha)
        return write(path, tensors), {layer: mixed_alpha(layer) / RANK for layer in pairs}
    if name == "alpha of zero":
        tensors = with_alpha(pairs, keys_of(pairs, "diffusion_model."), "diffusion_model.", lambda layer: 0.0)
        return write(path, tensors), dict.fromkeys(pairs, 0.0)
    if name == "diffsynth":
        return write(path, keys_of(pairs, "", parts=DEFAULT)), one
    if name == "pipe.dit.":
        return write(path, keys_of(pairs, "pipe.dit.", parts=DEFAULT)), one
    if name == "bare":
        return write(path, keys_of(pairs, "", own_name)), one
    if name == "lora_down and lora_up":
        tensors = keys_of(pairs, "diffusion_model.", parts=DOWN_UP)
        return write(path, with_alpha(pairs, tensors, "diffusion_model.")), half
    if name == "musubi":
        tensors = keys_of(pairs, "lora_unet_", musubi_name, DOWN_UP)
        return write(path, with_alpha(pairs, tensors, "lora_unet_", name=musubi_name)), half
    if name == "fun":
        tensors = keys_of(pairs, "lora_unet__", musubi_name, DOWN_UP)
        return write(path, with_alpha(pairs, tensors, "lora_unet__", name=musubi_name)), half
    if name == "zero differences":
        zeros = {f"diffusion_model.blocks.0.{key}": torch.zeros(3) for key in ("norm3.diff", "self_attn.q.diff_b")}
        return write(path, keys_of(pairs, "diffusion_model.") | zeros), one
    assert name == "peft folder"
    write(folder / "adapter_model.safetensors", keys_of(pairs, "base_model.model.", own_name))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "alpha_pattern": {"to_v": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, {layer: 0.5 if "to_v" in layer else 2.0 for layer in pairs}


DIALECTS = (
    "diffusers",
    "diffusers, no metadata",
    "metadata without the prefix",
    "metadata of peft 0.21",
    "rslora",
    "alpha_pattern",
    "comfyui with alpha",
    "comfyui without alpha",
    "comfyui with several alphas",
    "alpha of zero",
    "diffsynth",
    "pipe.dit.",
    "bare",
    "lora_down and lora_up",
    "musubi",
    "fun",
    "zero differences",
    "peft folder",
)


def differences(model: torch.nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """What the adapter adds to the weight of each layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            product = module.lora_B[adapter].weight @ module.lora_A[adapter].weight
            found[name] = module.scaling[adapter] * product.detach()
    return found


def assert_adds(found: dict[str, torch.Tensor], pairs: dict, scales: dict[str, float]) -> None:
    assert found.keys() == pairs.keys()
    for layer, (down, up) in pairs.items():
        torch.testing.assert_close(found[layer], scales[layer] * up @ down)


@pytest.mark.parametrize("name", DIALECTS)
def test_init_lora_loads_the_mathematics_of_the_file(name, model, pairs, flags, tmp_path):
    path, scales = dialect(name, pairs, tmp_path)
    args = train_ltd.parse_args(flags(init_lora=path, rank=None))
    train_ltd.check_lora(args, train_ltd.identify_wan(args))
    settled = (args.rank, args.lora_alpha, args.lora_target_modules)
    train_ltd.add_lora(model, args)
    assert settled == (args.rank, args.lora_alpha, args.lora_target_modules)
    assert_adds(differences(model), pairs, scales)
    if len(set(scales.values())) == 1 and min(scales.values()) > 0:
        assert args.lora_alpha == pytest.approx(RANK * scales.popitem()[1])


def test_musubi_file_without_all_layers(model, pairs, tmp_path):
    some = {layer: pair for layer, pair in pairs.items() if layer.endswith("1.attn1.to_q")}
    path = write(tmp_path / "some.safetensors", keys_of(some, "lora_unet_", musubi_name, DOWN_UP))
    assert train_ltd.read_lora(str(path), model).keys() == some.keys()


def spoiled(kind: str, pairs: dict, folder: Path) -> tuple[Path, str]:
    """Write a LoRA file that cannot be used. Returns the path, and what the message must name."""
    path = folder / "lora.safetensors"
    tensors = keys_of(pairs, "diffusion_model.")
    first = "diffusion_model.blocks.0.self_attn.q"
    if kind in ("diff", "diff_b", "diff_m", "dora_scale", "lokr_w1", "hada_w1_a", "lora_B.bias", "reshape_weight"):
        return write(path, tensors | {f"{first}.{kind}": torch.ones(3)}), f"{first}.{kind}"
    if kind == "another model":
        tensors = {key.replace("blocks.0", "blocks.77"): value for key, value in tensors.items()}
        return write(path, tensors), "diffusion_model.blocks.77.cross_attn.k.lora_A.weight"
    if kind == "text encoder":
        key = "text_encoder.layers.0.q.lora_A.weight"
        return write(path, tensors | {key: torch.ones(2, 2)}), key
    if kind == "half":
        del tensors[f"{first}.lora_B.weight"]
        return write(path, tensors), "blocks.0.attn1.to_q has no lora_B"
    if kind == "shape":
        tensors[f"{first}.lora_A.weight"] = torch.ones(RANK, 5)
        return write(path, tensors), "blocks.0.attn1.to_q has "
    if kind == "twice":
        tensors["blocks.0.attn1.to_q.lora_A.weight"] = tensors[f"{first}.lora_A.weight"].clone()
        return write(path, tensors), "under another name too"
    if kind == "two strengths":
        tensors = with_alpha(pairs, tensors, "diffusion_model.")
        return write(path, tensors, adapter(lora_alpha=3)), "has the alpha 2, and 3 in the metadata"
    if kind == "empty":
        return write(path, {}), "there is no LoRA in it"
    if kind == "not safetensors":
        path.write_bytes(b"<html>Not found</html>")
        return path, "cannot be used"
    if kind == "absent":
        return path, "there is no such file"
    if kind == "no folder":
        return folder / "absent", "there is no such file or folder"
    if kind == "nowhere":
        return Path("nobody/nothing"), "it is no path, and no repository of the Hub that can be read"
    if kind == "no configuration":
        write(folder / "adapter_model.safetensors", keys_of(pairs, "base_model.model.", own_name))
        return folder, "adapter_config.json"
    assert kind == "several"
    write(folder / "a.safetensors", tensors)
    write(folder / "b.safetensors", tensors)
    return folder, "it holds a.safetensors, b.safetensors; give the path of one"


SPOILED = (
    *("diff", "diff_b", "diff_m", "dora_scale", "lokr_w1", "hada_w1_a", "lora_B.bias", "reshape_weight"),
    *("another model", "text encoder", "half", "shape", "twice", "two strengths", "empty", "not safetensors"),
    *("absent", "no folder", "nowhere", "no configuration", "several"),
)


@pytest.mark.parametrize("kind", SPOILED)
def test_lora_that_cannot_be_used_is_refused_in_one_line(kind, pairs, flags, tmp_path):
    path, named = spoiled(kind, pairs, tmp_path)
    args = train_ltd.parse_args(flags(init_lora=path, rank=None))
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        train_ltd.check_lora(args, train_ltd.identify_wan(args))
    message = str(caught.value)
    assert message.startswith(f"--init_lora {path} cannot be used: ")
    assert "LoRA files that work: diffusers (transformer.), ComfyUI (diffusion_model.), DiffSynth" in message
    assert "\n" not in message


def test_mixed_ranks_are_refused_for_training(pairs, flags, tmp_path):
    path = write(tmp_path / "lora.safetensors", keys_of(mixed_ranks(pairs), "diffusion_model."))
    args = train_ltd.parse_args(flags(init_lora=path, rank=None))
    with pytest.raises(ValueError, match=r"one rank for all its layers is needed, found ranks \[2, 4\]"):
        train_ltd.check_lora(args, train_ltd.identify_wan(args))


def mixed_ranks(pairs: dict) -> dict:
    mixed = dict(pairs)
    for layer, (down, up) in pairs.items():
        if "to_v" in layer:
            mixed[layer] = (down[:2].clone(), up[:, :2].clone())
    return mixed


def test_own_folder_and_checkpoint_hold_a_lora(model, pairs, tmp_path):
    write(tmp_path / train_ltd.LORA_FILE, keys_of(pairs, "transformer.", own_name))
    write(tmp_path / "run.safetensors", keys_of(pairs, "diffusion_model."))
    assert train_ltd.find_lora(str(tmp_path)) == (tmp_path / train_ltd.LORA_FILE, None)
    assert train_ltd.read_lora(str(tmp_path), model).keys() == pairs.keys()


def test_lora_of_the_hub(monkeypatch, pairs, tmp_path, model):
    """The peft folder of a repository: its weights and what alone knows their strength."""
    dialect("peft folder", pairs, tmp_path)
    names = ["README.md", "checkpoint-1/x.safetensors", "adapter_model.safetensors", "adapter_config.json"]
    monkeypatch.setattr(train_ltd.huggingface_hub, "list_repo_files", lambda name: names)
    monkeypatch.setattr(train_ltd.huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    layers = train_ltd.read_lora("somebody/lora", model)
    assert {name: layer.alpha for name, layer in layers.items()} == {n: 2.0 if "to_v" in n else 8.0 for n in pairs}


# --- What is refused before anything is encoded ----------------------------------------------------------------------
EARLY = {
    "a target that matches nothing": (
        {"lora_target_modules": ["to_q", "to_nothing"]},
        "to_nothing: this model has no",
    ),
    "a layer that is not linear": ({"lora_target_modules": ["patch_embedding"]}, "has no linear layer of that name"),
    "targets outside the blocks": ({"lora_target_modules": ["proj_out"]}, "could not load a file with proj_out"),
    "a LoRA of another rank": ({"rank": 8}, "--rank 8 clashes with --init_lora, which has 4"),
    "a LoRA with a difference": ({}, "self_attn.q.diff_b fits no LoRA of this model"),
}


@pytest.mark.parametrize("what", EARLY)
def test_nothing_is_encoded_before(what, run, no_models, pairs, tmp_path):
    settings, message = EARLY[what]
    path = tmp_path / "lora.safetensors"
    tensors = keys_of(pairs, "diffusion_model.")
    if not settings:
        tensors["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.ones(3)
    if "lora_target_modules" not in settings:
        settings = {"init_lora": write(path, tensors), "rank": None} | settings
    no_models()
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**settings, cache_dir=tmp_path / "none")
    assert not list((tmp_path / "none").rglob("*.safetensors"))


def test_every_linear_layer_can_be_a_target_beside_one_of_a_block(model, flags):
    targets = sorted(set(train_ltd.lora_layers(model).values()))
    assert "proj_out" in targets and "condition_embedder.time_proj" in targets
    args = train_ltd.parse_args(flags(lora_target_modules=targets))
    train_ltd.check_lora(args, train_ltd.identify_wan(args))


# --- examples/generate.py --------------------------------------------------------------------------------------------
@pytest.fixture
def pipeline(tiny_wan):
    return WanPipeline.from_pretrained(tiny_wan, text_encoder=None, tokenizer=None, vae=None)


def one_model(loras, scales):
    """What a command line comes to that gives these to a pipeline of one transformer."""
    own = argparse.Namespace(expert=None, lora=[str(lora) for lora in loras], lora_scale=scales)
    return [generate.Model(argparse.Namespace(subfolder="transformer"), own)]


@pytest.mark.parametrize("name", DIALECTS)
def test_generate_loads_the_mathematics_of_the_file(name, pipeline, pairs, tmp_path):
    path, scales = dialect(name, pairs, tmp_path)
    generate.add_loras(pipeline, one_model([path], [1.0]))
    assert_adds(differences(pipeline.transformer, "lora_0"), pairs, scales)


def test_generate_takes_mixed_ranks_and_two_loras(pipeline, pairs, tmp_path):
    one = write(tmp_path / "one.safetensors", keys_of(mixed_ranks(pairs), "diffusion_model."))
    two = write(tmp_path / "two.safetensors", keys_of(pairs, "transformer.", own_name), adapter())
    generate.add_loras(pipeline, one_model([one, two], [0.5, 2.0]))
    assert_adds(differences(pipeline.transformer, "lora_0"), mixed_ranks(pairs), dict.fromkeys(pairs, 0.5))
    assert_adds(differences(pipeline.transformer, "lora_1"), pairs, dict.fromkeys(pairs, 1.0))


@pytest.mark.parametrize("kind", SPOILED)
def test_generate_refuses_what_it_cannot_load(kind, pipeline, pairs, tmp_path):
    path, named = spoiled(kind, pairs, tmp_path)
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        generate.add_loras(pipeline, one_model([path], [1.0]))
    assert str(caught.value).startswith(f"--lora {path} cannot be used: ")
