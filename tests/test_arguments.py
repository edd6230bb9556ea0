"""Flags, recipes, and the checks that name every problem before anything is loaded."""

import importlib.util
import shutil

import pytest
import torch

import train_ltd


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


def test_the_bare_switch_of_diffusers_scripts(flags):
    assert train_ltd.parse_args([*flags(), "--gradient_checkpointing"]).gradient_checkpointing == "full"


def test_compiling_without_a_compiler_is_refused(flags, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C compiler and Python\.h: --no-torch_compile"):
        train_ltd.parse_args([*flags(), "--torch_compile"])


def test_attention_kernels_for_inference_are_no_choice(flags, capsys):
    """sage has no backward pass: the projections before it would silently get no gradient."""
    with pytest.raises(SystemExit):
        train_ltd.parse_args(flags(attention_backend="sage"))
    assert "--attention_backend" in capsys.readouterr().err


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


# --- Recipes ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("given", ["num_train_epochs", "max_train_steps"])
def test_a_length_on_the_command_line_overrides_the_recipes_other(flags, tmp_path, given):
    """`max_train_steps` would win, and the recipe's own would be trained in silence."""
    recipe = {"num_train_epochs": "max_train_steps: 1000", "max_train_steps": "num_train_epochs: 7"}[given]
    (tmp_path / "recipe.yaml").write_text(recipe)
    args = train_ltd.parse_args(flags(config=tmp_path / "recipe.yaml", **{"max_train_steps": None, given: 3}))
    assert {k: getattr(args, k) for k in ("num_train_epochs", "max_train_steps")} == {
        "num_train_epochs": None, "max_train_steps": None, given: 3
    }  # fmt: skip


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
