"""Flags, recipes, and the checks that name every problem before anything is loaded."""

import ast
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import CPU, ROOT, launcher

import train_ltd

RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))


def test_all_problems_are_named_at_once(flags, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(ValueError) as error:
        train_ltd.parse_args(
            flags(
                ltd_window=1,
                resume_from_checkpoint="nowhere",
                hub_model_id="a/b/c",
                optimizer="adamw8bit",
                min_sigma=0.9,
                max_sigma=0.1,
                train_data_dir="missing",
                validation_split=0.2,
                attention_backend="sage_the_herb",
            )
        )
    message = str(error.value)
    for part in (
        "--ltd_window must be at least 2 to hold a pair of frames, got 1",
        "--resume_from_checkpoint nowhere is not a complete checkpoint",
        "--hub_model_id",
        "pip install bitsandbytes",
        "--min_sigma 0.9 and --max_sigma 0.1",
        "--train_data_dir missing does not exist",
        "--validation_split is the name of a split: try --validation_fraction 0.2",
        "--attention_backend sage_the_herb: diffusers knows no kernel of that name",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("rank", 0, "must be positive, got 0"),
        ("rank", 4.5, "invalid positive_int value: '4.5'"),
        ("learning_rate", 0, "must be positive, got 0"),
        ("learning_rate", "nan", "must be positive, got nan"),
        ("fps", "inf", "must be positive, got inf"),
        ("ltd_scale", -1, "must not be negative, got -1"),
        ("ltd_strength", 11, "must lie in [-10, 10], got 11"),
        ("max_grad_norm", "inf", "must not be negative, got inf"),
        ("lr_warmup_steps", -1, "must not be negative, got -1"),
        ("caption_dropout", 2, "must lie in [0, 1], got 2"),
        ("max_skipped", "nan", "must lie in [0, 1], got nan"),
        ("max_train_samples", 0, "must be positive, got 0"),
        ("loss", "focal", "invalid choice: 'focal'"),
    ],
)
def test_values_out_of_range(flags, capsys, tmp_path, flag, value, message):
    """On the command line argparse says so, and exits with 2; a recipe says where it stands."""
    with pytest.raises(SystemExit) as stop:
        train_ltd.parse_args(flags(**{flag: value}))
    assert stop.value.code == 2 and f"argument --{flag}: {message}" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{flag}: {value}")
    with pytest.raises(ValueError, match=rf"--config .*recipe\.yaml: `{flag}`: "):
        train_ltd.parse_args(flags(config=recipe, **{flag: None}))


def test_a_fraction_that_holds_out_all_is_refused(flags):
    with pytest.raises(ValueError, match="--validation_fraction 1 leaves no video to train on"):
        train_ltd.parse_args(flags(validation_fraction=1))


@pytest.mark.parametrize(
    "given", [{"validation_split": "test"}, {"validation_fraction": 0}, {"validation_fraction": 0.3}]
)
def test_the_command_line_overrides_what_a_recipe_holds_out(flags, tmp_path, given):
    (tmp_path / "recipe.yaml").write_text("validation_fraction: 0.05")
    args = train_ltd.parse_args(flags(config=tmp_path / "recipe.yaml", **given))
    expected = {"validation_split": None, "validation_fraction": None} | given
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_hold_out_clips(recipe):
    """Only then is there a held-out error, by which a checkpoint can be chosen."""
    values = train_ltd.read_recipe(str(recipe), train_ltd.build_parser())
    assert 0 < values["validation_fraction"] <= 0.15


def test_a_fraction_and_a_split_are_refused(flags):
    with pytest.raises(ValueError, match="give one of --validation_fraction and --validation_split"):
        train_ltd.parse_args(flags(validation_fraction=0.1, validation_split="test"))
    assert train_ltd.parse_args(flags(validation_split="test")).validation_split == "test"


@pytest.mark.parametrize("name", train_ltd.REMOVED_FLAGS)
def test_a_flag_that_is_gone_says_what_took_its_place(flags, tmp_path, name):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: true")
    for line in ([f"--{name}"], [f"--{name}=1"], [f"--no-{name}"], [f"--config={recipe}"]):
        with pytest.raises(ValueError) as error:
            train_ltd.parse_args([*flags(), *line])
        message = str(error.value)
        assert f"{name}" in message and f"is gone: {train_ltd.REMOVED_FLAGS[name]}" in message
        assert "\n" not in message and train_ltd.REMOVED_FLAGS[name]


def test_remedies_for_flags_that_are_gone_name_flags_that_exist():
    """Of the script itself; those of `examples/visualize_ltd.py` are tested where its own flags are."""
    known = {option for action in train_ltd.build_parser()._actions for option in action.option_strings}
    assert not known & {f"--{name}" for name in train_ltd.REMOVED_FLAGS}
    assert set(re.findall(r"--\w+", train_ltd.REMOVED_FLAGS["dry_run"])) <= known


def test_no_source(flags):
    with pytest.raises(ValueError, match="give the clips, by --train_data_dir or --dataset_name"):
        train_ltd.parse_args(flags(train_data_dir=None))


def test_several_sources(flags, clips, tmp_path):
    args = train_ltd.parse_args(flags(train_data_dir=[clips, tmp_path], dataset_name="a/b"))
    assert args.sources == [
        train_ltd.Source(path=str(clips)),
        train_ltd.Source(path=str(tmp_path)),
        train_ltd.Source(name="a/b"),
    ]
    one = train_ltd.parse_args(flags())
    assert one.sources == [train_ltd.Source(path=str(clips))] and one.train_data_dir == str(clips)


def test_sources_of_a_recipe(flags, clips, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sources:\n- path: {clips}\n  repeats: 3\n- name: a/b\n  caption_column: caption\n  video_column: clip\n"
    )
    args = train_ltd.parse_args(flags(train_data_dir=None, config=recipe))
    assert args.sources == [
        train_ltd.Source(path=str(clips), repeats=3),
        train_ltd.Source(name="a/b", caption_column="caption", video_column="clip"),
    ]
    own = train_ltd.of_source(args, args.sources[1])
    assert (own.train_data_dir, own.dataset_name, own.caption_column, own.video_column) == (
        None,
        "a/b",
        "caption",
        "clip",
    )
    # The command line wins.
    assert train_ltd.parse_args(flags(config=recipe)).sources == [train_ltd.Source(path=str(clips))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: clips", "a mapping with a `path` or a `name`"),
        ("sources:\n- repeats: 2", "a mapping with a `path` or a `name`"),
        ("sources:\n- path: a\n  name: b", "a mapping with a `path` or a `name`"),
        ("sources:\n- path: a\n  weight: 2", "a mapping with a `path` or a `name`"),
        ("sources:\n- path: a\n  repeats: 0", "`repeats` of .* must be a whole number above 0"),
        ("sources:\n- path: a\n  repeats: many", "`repeats` of .* must be a whole number above 0"),
        ("sources:\n- path: /nowhere", "/nowhere does not exist"),
        ("sources:\n- path: a\nsources:\n- path: b", "line 3 gives `sources` once more; keep one of them"),
    ],
)
def test_sources_that_cannot_work(flags, tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        train_ltd.parse_args(flags(train_data_dir=None, config=tmp_path / "recipe.yaml"))


def test_a_source_twice_is_refused_with_the_way_to_repeat_it(flags, clips):
    with pytest.raises(ValueError, match=r"is given more than once; .* give `repeats` in a recipe"):
        train_ltd.parse_args(flags(train_data_dir=[clips, clips]))


NO_SIZE = {"height": None, "width": None, "num_frames": None}


def test_sizes(flags, tiny_wan):
    args = train_ltd.parse_args([*flags(**NO_SIZE), "--sizes", "64x32x9", "32x64x9", "64x32x1"])
    train_ltd.identify_wan(args)
    assert train_ltd.training_buckets(args) == [(9, 32, 64), (9, 64, 32), (1, 32, 64)]
    assert (args.width, args.height, args.num_frames) == (64, 32, 9)  # of samples


@pytest.mark.parametrize(
    ("sizes", "kwargs", "message"),
    [
        (["64x32x9"], {}, "give --sizes or --height, not both"),
        (["64x32x9", "64x32x9"], NO_SIZE, "--sizes has a size twice"),
        (["64x30x9"], NO_SIZE, "--height of --sizes 64x30x9 must be a multiple of 16, got 30; try 32"),
        (["64x32x8"], NO_SIZE, r"--num_frames of --sizes 64x32x8 must be 4k\+1, .*got 8, try 9"),
    ],
)
def test_sizes_that_cannot_work(flags, sizes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        train_ltd.identify_wan(train_ltd.parse_args([*flags(**kwargs), "--sizes", *sizes]))


def test_a_size_is_width_height_and_frames(flags, capsys):
    with pytest.raises(SystemExit):
        train_ltd.parse_args([*flags(**NO_SIZE), "--sizes", "832x480"])
    assert "must be width x height x frames, such as 832x480x81, got 832x480" in capsys.readouterr().err


def test_narrow_sigma_range_is_refused(run):
    with pytest.raises(ValueError, match=r"--min_sigma 0 to --max_sigma 0\.001 have under 2 %"):
        run(min_sigma=0.0, max_sigma=0.001)


def test_defaults_by_train_type(flags):
    lora = train_ltd.parse_args(flags(learning_rate=None, max_train_steps=None))
    full = train_ltd.parse_args(flags(learning_rate=None, max_train_steps=None, train_type="full", rank=None))
    assert (lora.learning_rate, lora.max_train_steps, lora.num_train_epochs) == (1e-4, 1000, None)
    assert (full.learning_rate, full.max_train_steps, full.num_train_epochs) == (2e-5, None, 2)


def test_the_bare_switch_of_diffusers_scripts(flags):
    assert train_ltd.parse_args([*flags(), "--gradient_checkpointing"]).gradient_checkpointing == "full"


@pytest.mark.parametrize("name", ["sage", "_sage_qk_int8_pv_fp16_triton"])
def test_attention_kernels_for_inference_are_refused(flags, name):
    """They have no backward pass: the projections before them would silently get no gradient."""
    with pytest.raises(ValueError, match="sage has no backward pass"):
        train_ltd.parse_args(flags(attention_backend=name))
    assert train_ltd.parse_args(flags(attention_backend="_native_cudnn")).attention_backend == "_native_cudnn"


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


def test_a_kernel_without_its_package_is_refused_before_anything_is_encoded(flags):
    with pytest.raises(ValueError, match="--attention_backend flash: "):
        train_ltd.parse_args(flags(attention_backend="flash"))


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
        ("use_ema: maybe", "recipe.yaml: `use_ema`: must be true or false, got maybe"),
        ("use_ema: yes", "recipe.yaml: `use_ema`: must be true or false, got yes"),
        ("ltd_window: three", "recipe.yaml: `ltd_window`: invalid literal for int"),
        ("loss: focal", "recipe.yaml: `loss`: must be one of ltd, mse, got focal"),
        ("rank: [4, 8]", "recipe.yaml: `rank`: takes one value, and not several"),
        ("seed: 1\nrank: 4\nseed: 2", "recipe.yaml: line 3 gives `seed` once more; keep one of them"),
        ("trigger_word: true", "recipe.yaml: `trigger_word`: takes a word, got true; put quotes around it"),
        ("output_dir: False", "recipe.yaml: `output_dir`: takes a word, got False; put quotes around it"),
        ("validation_prompt: [a, true]", "recipe.yaml: `validation_prompt`: takes a word, got true"),
        ("gradient_checkpointing: true", "`gradient_checkpointing`: must be one of none, selective, full, offload"),
        ("", "must hold lines of `flag: value`"),
        ("[a]: 1", "there is no flag"),
        ("trigger_word: {a: b}", "recipe.yaml: `trigger_word`: takes one value"),
        ("validation_prompt: [[a]]", "recipe.yaml: `validation_prompt`: takes one value"),
        ("validation_split: 0.2", "try --validation_fraction 0.2"),
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


def test_recipes_are_read_as_they_are_written(flags, tmp_path):
    """YAML would make a boolean of `no`, the number 7 of `007`, and text of `1e-4`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "mixed_precision: no\ntrigger_word: 007\nlearning_rate: 1e-4\nseed: 12\nlicense: 1.0\nstreaming: false\n"
        "validation_prompt: on\ngradient_checkpointing: full\nhub_model_id: ''\nmax_train_hours: ~\nrevision:\n"
    )
    args = train_ltd.parse_args(flags(learning_rate=None, seed=None, config=recipe))
    assert (args.mixed_precision, args.trigger_word, args.learning_rate, args.seed) == ("no", "007", 1e-4, 12)
    assert (args.license, args.streaming, args.validation_prompt) == ("1.0", False, ["007 on"])
    assert (args.hub_model_id, args.max_train_hours, args.revision) == (None, None, None)


def test_a_quoted_word_is_taken_as_it_is(flags, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trigger_word: 'true'\nlicense: \"~\"\nvalidation_prompt: ['null', \"false\"]\n")
    args = train_ltd.parse_args(flags(config=recipe))
    assert (args.trigger_word, args.license) == ("true", "~")
    assert args.validation_prompt == ["true null", "true false"]


def test_a_recipe_is_found_from_anywhere(flags, tmp_path, monkeypatch):
    """From here first, then beside the script, then by its bare name among the recipes."""
    monkeypatch.chdir(tmp_path)
    kwargs = {"learning_rate": None, "rank": None, "fps": None, "num_frames": 9}
    for name in ("examples/recipes/lora_1.3b.yaml", "lora_1.3b.yaml"):
        assert train_ltd.parse_args(flags(config=name, **kwargs)).rank == 32
    (tmp_path / "lora_1.3b.yaml").write_text("rank: 5")
    assert train_ltd.parse_args(flags(config="lora_1.3b.yaml", **kwargs)).rank == 5
    with pytest.raises(ValueError, match=r"--config lora_3b.yaml: there is no such file; .*recipes has .*lora_1\.3b"):
        train_ltd.parse_args(flags(config="lora_3b.yaml"))


def test_a_tilde_is_the_home_folder(flags, tmp_path, monkeypatch):
    """No shell expands it behind `=`, nor in a recipe."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "clips").mkdir()
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/run\ncache_dir: ~/cache\ninit_lora: ~/lora\n")
    args = train_ltd.parse_args(
        flags(config="~/recipe.yaml", train_data_dir="~/clips", output_dir=None, cache_dir=None)
    )
    for name in ("train_data_dir", "output_dir", "cache_dir", "init_lora"):
        assert getattr(args, name).startswith(f"{tmp_path}/")


def test_sizes_on_the_command_line_override_the_size_of_a_recipe(flags, tmp_path):
    (tmp_path / "recipe.yaml").write_text("height: 32\nwidth: 48\nnum_frames: 9")
    none = {"height": None, "width": None, "num_frames": None}
    args = train_ltd.parse_args(flags(**none, config=tmp_path / "recipe.yaml", sizes=["48x32x9", "32x48x9"]))
    assert (args.sizes, args.height) == (["48x32x9", "32x48x9"], None)
    (tmp_path / "recipe.yaml").write_text("sizes: [48x32x9, 32x48x9]")
    args = train_ltd.parse_args(flags(config=tmp_path / "recipe.yaml"))
    assert (args.sizes, args.height) == (None, 32)


# --- Prompts from a file ---------------------------------------------------------------------------------------------


def test_prompts_of_a_file_follow_those_of_the_flag(flags, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('\ufeffa dog jumps\n\n# not this one\n  a cat, "asleep"\n', encoding="utf-8")
    args = train_ltd.parse_args(flags(validation_prompts_file=file, validation_prompt="first"))
    assert args.validation_prompt == ["first", "a dog jumps", 'a cat, "asleep"']
    assert "validation_prompts_file" not in train_ltd.published_settings(args)  # a path of this machine


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read as UTF-8: .*No such file"), (b"\xff", "cannot be read as UTF-8"), (b"# a\n", "no prompt")],
)
def test_bad_files_of_prompts(flags, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--validation_prompts_file .*prompts\.txt .*{message}"):
        train_ltd.parse_args(flags(validation_prompts_file=file))


# --- Slips of the hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--lerning_rate", "1"], "there is no flag --lerning_rate; the nearest is --learning_rate"),
        (["--learning-rate=1"], "there is no flag --learning-rate; the nearest is --learning_rate"),
        (["-rank", "4"], "there is no flag -rank; the nearest is --rank"),
        (["--xyzzy"], "there is no flag --xyzzy; --help lists all that there are"),
        (["--validation_prompt", "a", "dog", "jumps"], "`dog` belongs to no flag; if it belongs to"),
        (["--validation_prompt=a", "dog"], 'put quotes around all of it: --validation_prompt "..."'),
    ],
)
def test_what_belongs_to_no_flag(flags, capsys, line, message):
    """One line, without the usage of all flags."""
    with pytest.raises(SystemExit) as stop:
        train_ltd.parse_args([*flags(), *line])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_a_folder_in_front_of_all_flags(capsys):
    with pytest.raises(SystemExit):
        train_ltd.parse_args(["my_clips"])
    assert "`my_clips` belongs to no flag; a folder of clips goes with --train_data_dir" in capsys.readouterr().err


def test_one_problem_is_one_line(flags):
    with pytest.raises(ValueError) as error:
        train_ltd.parse_args(flags(ltd_window=1))
    assert str(error.value) == "--ltd_window must be at least 2 to hold a pair of frames, got 1"


# --- What a mistake ends in ------------------------------------------------------------------------------------------


def caught(function, *args, **kwargs) -> Exception:
    """Return what a call raises."""
    with pytest.raises(Exception) as error:
        function(*args, **kwargs)
    return error.value


def test_own_value_errors_are_for_the_user(flags, run, tmp_path):
    message = train_ltd.user_message(caught(train_ltd.parse_args, flags(ltd_window=1)))
    assert message.startswith("--ltd_window must be at least 2")
    assert "7 clips are fewer than the 8 of one update" in train_ltd.user_message(caught(run, train_batch_size=8))


def test_folders_that_cannot_be_written_to(run, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for name in ("output_dir", "cache_dir"):
        message = train_ltd.user_message(caught(run, **{name: tmp_path / "notes.txt"}))
        assert message == f"--{name} {tmp_path}/notes.txt cannot be made: File exists; take another"
    (tmp_path / "held/.lock").mkdir(parents=True)
    message = train_ltd.user_message(caught(run, output_dir=tmp_path / "held"))
    assert message == f"--output_dir {tmp_path}/held cannot be written to: Is a directory; take another"


def test_errors_of_others_keep_their_traceback(run):
    assert train_ltd.user_message(caught(int, "three")) is None
    assert train_ltd.user_message(caught(run, compute_loss=lambda *args: int("three"))) is None


def test_no_network_is_said_so(flags, run, tmp_path):
    """The tests' own setting forbids it: a base and a dataset that are on no disk."""
    base = caught(run, pretrained_model_name_or_path="someone/wan")
    assert train_ltd.user_message(base).startswith("--pretrained_model_name_or_path someone/wan: this is not in the")
    data = caught(run, train_data_dir=None, dataset_name="someone/clips")
    for message in (train_ltd.user_message(base), train_ltd.user_message(data)):
        assert "HF_HUB_OFFLINE forbids to download it" in message and "\n" not in message


def test_no_network_for_a_while(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    error = caught(train_ltd.httpx.get, "http://nowhere.invalid")
    assert train_ltd.user_message(error).startswith("the Hub cannot be reached: check the network")
    outer = OSError("no model_index.json")
    outer.__context__ = error
    assert train_ltd.network_fault(outer) and not train_ltd.network_fault(BrokenPipeError())


@pytest.mark.parametrize("base", ["/no/such/folder", "models/wan/1.3b", "~/wan"])
def test_a_base_that_is_nowhere(flags, base):
    with pytest.raises(
        ValueError, match=r"--pretrained_model_name_or_path .* is neither a folder nor a name on the Hub"
    ):
        train_ltd.parse_args(flags(pretrained_model_name_or_path=base))


@pytest.mark.parametrize("names", [[], [".DS_Store", "notes.txt"]])
def test_a_folder_without_clips_shows_what_one_looks_like(run, tmp_path, names):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(ValueError, match=r"--train_data_dir .*clips holds no clips .*\.mp4.*dog\.mp4 and dog\.txt"):
        run(train_data_dir=folder)


def test_a_folder_without_captions_shows_where_they_go(run, clips, tmp_path):
    folder = tmp_path / "uncaptioned"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).symlink_to(clips / "0.mp4")
    with pytest.raises(ValueError, match="its clips have no captions") as error:
        run(train_data_dir=folder)
    message = str(error.value)
    assert "Write the one of a.mp4 into a.txt beside it" in message and "\n" not in message
    assert '{"file_name": "a.mp4", "text": "a dog jumps"}' in message


@pytest.mark.slow
def test_a_mistake_of_the_command_is_one_line(flags):
    """At once it says what one waits for; at the end there is no traceback."""
    command = [sys.executable, str(ROOT / "train_ltd.py"), *flags(ltd_window=1)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | CPU, cwd=ROOT)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and lines[0] == "loading libraries" and "Traceback" not in result.stderr
    assert lines[-1] == "error: --ltd_window must be at least 2 to hold a pair of frames, got 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        ("train_ltd.py", "--lerning_rate=1", "there is no flag --lerning_rate"),
        ("train_ltd.py", "--train_batch_size=8", "7 clips are fewer than the 16 of one update"),
        ("tests/mistaken_rank.py", "--ltd_window=1", "rank 1: --ltd_window must be"),
        ("tests/mistaken_rank.py", "--init_lora=none", "rank 1: --init_lora none cannot be used"),
    ],
)
def test_two_processes_name_a_mistake_once(flags, script, flag, message):
    """All of them or one alone, before they have met or after: one line of ours, above the launcher's own."""
    of_all = [] if "rank" in script else [flag]
    command = [*launcher(2)[:-1], str(ROOT / script), *flags(), *of_all]
    env = os.environ | CPU | {"PYTHONPATH": str(ROOT), "FLAG_OF_RANK_1": flag}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode == 1 and len(lines) == 1 and lines[0].startswith(f"error: {message}"), result.stderr


def test_the_script_speaks_before_its_heavy_imports():
    """In less than two seconds, then: only the standard library comes before."""
    tree = ast.parse((ROOT / "train_ltd.py").read_text(encoding="utf-8"))
    line = next(node.lineno for node in ast.walk(tree) if getattr(node, "value", None) == "loading libraries")
    before = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno < line]
    names = {alias.name for node in before if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in before if isinstance(node, ast.ImportFrom)}
    assert len(names) > 10 and {name.split(".")[0] for name in names} <= sys.stdlib_module_names
