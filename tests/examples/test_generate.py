"""examples/generate.py and its --compare: prompts, models, sampling, restarts, processes, the gallery in a browser."""

import gc
import importlib.metadata
import importlib.util
import json
import resource
import shutil
from pathlib import Path

import gallery
import generate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CPU, launch, run_script, wait_for
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel
from videos import find_videos, read_video, write_video

import train_ltd

pytestmark = pytest.mark.slow  # models generate

pytest_plugins = ["browser"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/generate.py"
SIZE = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}
PROMPTS = ["a red square moves", "a <b>bold</b> cat / dog", "<script>window.hacked = 1</script>"]


@pytest.fixture
def flags(tiny_wan, tmp_path):
    """Function that returns a command line for tiny videos into `tmp_path/NAME`; keyword arguments override or add."""

    def build(name="base", **kwargs) -> list[str]:
        values = {"pretrained_model_name_or_path": tiny_wan, "preset": "nano", "output_dir": tmp_path / name}
        values |= {"cache_dir": tmp_path / "cache"} | SIZE | kwargs
        if not any(values.get(source) for source in (*generate.PROMPT_SOURCES, "compare")):
            values["prompt"] = PROMPTS
        line = []
        for key, value in values.items():
            if key in ("compare", "labels", "dimensions"):
                line += [f"--{key}", *value]
            elif value is not None:
                line += [f"--{key}={v}" for v in (value if isinstance(value, list) else [value])]
        return [str(part) for part in line]

    return build


@pytest.fixture
def run(flags):
    """Function that generates in this process with `flags(...)` and returns the output folder."""

    def call(name="base", **kwargs) -> Path:
        args = generate.parse_args(flags(name, **kwargs))
        generate.main(args)
        return Path(args.output_dir)

    return call


@pytest.fixture
def plan(flags):
    """Function that returns the planned videos of `flags(...)`."""
    return lambda **kwargs: generate.plan_videos(generate.parse_args(flags(**kwargs)))


@pytest.fixture(scope="session")
def make_lora(tiny_wan, tmp_path_factory):
    """Function that saves a random LoRA for the tiny model, or one of another shape, and returns its folder."""

    def make(seed=0, gain=0.3, **config) -> Path:
        model = WanTransformer3DModel.from_config(
            WanTransformer3DModel.load_config(tiny_wan, subfolder="transformer") | config
        )
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        generator = torch.Generator().manual_seed(seed)
        shapes = get_peft_model_state_dict(model).items()
        folder = tmp_path_factory.mktemp("lora")
        WanPipeline.save_lora_weights(folder, {k: torch.randn(v.shape, generator=generator) * gain for k, v in shapes})
        return folder

    return make


def record_of(folder: Path) -> dict:
    return json.loads((folder / "generation.json").read_text(encoding="utf-8"))


def pixels(path: Path) -> np.ndarray:
    return read_video(path).astype(np.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in find_videos(folder)}


# --- Prompts ---------------------------------------------------------------------------------------------------------


def prompts_of(videos: dict) -> list[str]:
    return [entry["prompt"] for entry in videos.values()]


def test_prompts_of_the_command_line_and_of_a_file(plan, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n  a dog \na cat\n", encoding="utf-8")
    assert list(plan(prompt=["a cat", "a dog"])) == ["a cat-0.mp4", "a dog-0.mp4"]
    assert plan(prompt_file=path) == plan(prompt=["a cat", "a dog"])
    assert list(plan(prompt_file=path, num_samples=2, max_prompts=1)) == ["a cat-0.mp4", "a cat-1.mp4"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_prompts_of_a_table(plan, tmp_path, name):
    import pandas

    rows = pandas.DataFrame({"file_name": ["1.mp4", "2.mp4", "3.mp4"], "caption": ["a cat", None, "a dog"]})
    path = tmp_path / name
    {"t.jsonl": lambda: rows.to_json(path, orient="records", lines=True),
     "t.csv": lambda: rows.to_csv(path, index=False),
     "t.parquet": lambda: rows.to_parquet(path)}[name]()  # fmt: skip
    assert prompts_of(plan(dataset_name=path, caption_column="caption")) == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="--caption_column text: the dataset has file_name"):
        plan(dataset_name=path)


def test_prompts_of_a_folder_of_clips_and_of_lists_of_captions(plan, clips, tmp_path):
    assert prompts_of(plan(dataset_name=clips, max_prompts=2)) == [f"a square moves, number {i}" for i in (0, 1)]
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": ["a cat", "one cat"]}\n{"text": []}\n')
    assert prompts_of(plan(dataset_name=path)) == ["a cat"]


@pytest.fixture
def vbench(tmp_path) -> Path:
    """Entries as in VBench_full_info.json: a prompt with dots, one of two dimensions, one that is there twice."""
    rows = [("In a still frame, a stop sign", ["temporal_flickering"]),
            ("a person swimming in ocean", ["subject_consistency", "dynamic_degree", "motion_smoothness"]),
            ("Snow rocky mountains peaks canyon...", ["aesthetic_quality", "imaging_quality"]),
            ("a person swimming in ocean", ["human_action"]),
            ("a bear and a zebra", ["multiple_objects"])]  # fmt: skip
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps([{"prompt_en": prompt, "dimension": dimensions} for prompt, dimensions in rows]))
    return path


def test_vbench_has_five_videos_a_prompt_and_25_for_flicker(plan, vbench):
    everything = "temporal_flickering subject_consistency aesthetic_quality".split()
    videos = plan(vbench=vbench, dimensions=everything)
    assert len(videos) == 25 + 5 + 5
    assert {"In a still frame, a stop sign-24.mp4", "Snow rocky mountains peaks canyon...-4.mp4"} < set(videos)
    assert list(plan(vbench=vbench, dimensions=["human_action"], num_samples=1)) == [
        "a person swimming in ocean-0.mp4"
    ]
    with pytest.raises(ValueError, match=r"--dimensions beauty: .* there are aesthetic_quality, dynamic_degree"):
        plan(vbench=vbench, dimensions=["beauty"])


def test_vbench_augmented_prompts_go_to_the_model_under_the_short_ones_name_and_seed(plan, vbench, tmp_path):
    path = tmp_path / "augmented.txt"
    path.write_text("\n".join(f"long {i}" for i in range(5)) + "\n")
    choice = {"vbench": vbench, "dimensions": ["human_action"], "num_samples": 1}
    short, long = plan(**choice), plan(**choice, augmented_prompts=path)
    assert list(short) == list(long)
    assert [e["text"] for e in long.values()] == ["long 3"]
    assert [e["prompt"] for e in long.values()] == ["a person swimming in ocean"]
    assert [e["seed"] for e in long.values()] == [e["seed"] for e in short.values()]
    path.write_text("one line")
    with pytest.raises(ValueError, match="1 lines for the 5 entries"):
        plan(**choice, augmented_prompts=path)


def test_vmbench_files_have_the_index_for_a_name(plan, tmp_path):
    path = tmp_path / "prompts.json"
    rows = [{"prompt": "a cat jumps", "subject": "a cat", "index": "0001"}, {"prompt": "a dog", "index": "0002"}]
    path.write_text(json.dumps(rows))
    assert {n: e["prompt"] for n, e in plan(vmbench=path).items()} == {"0001.mp4": "a cat jumps", "0002.mp4": "a dog"}
    path.write_text(json.dumps([{"prompt": "x", "index": "../0001"}]))
    with pytest.raises(ValueError, match="is no index such as 0001"):
        plan(vmbench=path)
    path.write_text(json.dumps([{"prompt": "x"}]))
    with pytest.raises(ValueError, match="list of objects with index, prompt"):
        plan(vmbench=path)


@pytest.mark.parametrize(
    "prompt", ["a/b", 'he says "hi"', "../up", ".hidden", "two\nlines", "word " * 80, "длинный " * 40]
)
def test_every_prompt_can_be_a_file_name(plan, tmp_path, prompt):
    (name,) = plan(prompt=[prompt.strip()])
    assert len(name.encode()) + len(".partial-") <= 255 and not set('/"') & set(name)
    assert not name.startswith(".")
    (tmp_path / name).touch()
    assert [*plan(prompt=[prompt.strip() + "!"])] != [name]


def test_what_the_sources_lack_is_said(plan, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompt in the source"):
        plan(prompt_file=tmp_path / "empty.txt")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"--vbench .*bad.json is not JSON"):
        plan(vbench=tmp_path / "bad.json")


def test_seeds_depend_on_seed_prompt_and_sample_only(plan):
    alone, among = plan(prompt=["a dog"], num_samples=2), plan(prompt=["a cat", "a dog"], num_samples=2)
    assert all(among[name] == entry for name, entry in alone.items())
    assert len({entry["seed"] for entry in among.values()}) == 4
    other = plan(prompt=["a dog"], num_samples=2, seed=1)
    assert not {e["seed"] for e in other.values()} & {e["seed"] for e in alone.values()}


def test_seeds_and_names_are_those_of_earlier_versions(plan):
    """So that a folder can be gone on with, and new models be compared with old videos."""
    assert plan(prompt=["a dog"], num_samples=2)["a dog-1.mp4"]["seed"] == 2820804467
    assert list(plan(prompt=["a/b"])) == ["a_b-4fc0c406-0.mp4"]


# --- Settings --------------------------------------------------------------------------------------------------------


def test_every_wrong_setting_is_named_at_once(flags):
    with pytest.raises(ValueError) as error:
        generate.parse_args(
            flags(prompt=["a", " "], prompt_file="nowhere.txt", lora=["x"], lora_scale=[1, 2], fps=0, batch_size=0,
                  augmented_prompts="no.txt", labels=["a"])
        )  # fmt: skip
    for part in ("got 2", "nowhere.txt: no such", "--prompt must not", "2 --lora_scale for 1", "--fps",
                 "--batch_size", "goes with --vbench", "goes with --compare"):  # fmt: skip
        assert part in str(error.value), part


def test_a_size_that_the_model_cannot_make_is_refused_before_anything_is_written(run, tmp_path):
    for size, message in (({"height": 30}, "--height .* 16, got 30; try 32"), ({"num_frames": 10}, "4k.* try 9")):
        with pytest.raises(ValueError, match=message):
            run(**size)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("preset", generate.PRESETS)
def test_presets_fill_what_is_not_given(preset):
    args = generate.parse_args(["--preset", preset, "--prompt", "x", "--output_dir", "y", "--guidance_scale", "3.5"])
    assert args.guidance_scale == 3.5
    expected = generate.PRESETS[preset] | {"guidance_scale": 3.5}
    assert {key: getattr(args, key) for key in expected} == expected


def test_paper_preset_is_first_order_with_the_models_own_shift(flags, tiny_wan):
    sampling = dict.fromkeys(["height", "width", "num_frames", "num_inference_steps"])
    args = generate.parse_args(flags(preset="paper", **sampling))
    scheduler = generate.load_scheduler(args)
    assert (args.num_inference_steps, args.guidance_scale, args.negative_prompt) == (50, 7.5, "")
    assert (args.height, args.width, args.num_frames) == (480, 832, 81)
    own = UniPCMultistepScheduler.from_pretrained(tiny_wan, subfolder="scheduler").config.flow_shift
    assert args.flow_shift == scheduler.shift == own == 3
    # An exact prediction of the flow of one straight path is integrated to its end: deterministic, no noise is added.
    clean, noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(args.num_inference_steps)
    assert len(scheduler.timesteps) == 50 and scheduler.sigmas[0] == 1
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(noise - clean, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, clean, atol=1e-5, rtol=0)


def test_wan_preset_is_vbenchs(flags):
    args = generate.parse_args(flags(preset="wan", num_inference_steps=None))
    scheduler = generate.load_scheduler(args)
    assert type(scheduler) is UniPCMultistepScheduler and scheduler.config.flow_shift == 3
    assert (args.num_inference_steps, args.guidance_scale) == (50, 6)
    assert "静止不动的画面" in args.negative_prompt


def test_help_is_there_for_every_flag():
    parser = generate.build_parser()
    assert [action.dest for action in parser._actions if not action.help] == []
    assert "examples/generate.py --compare outputs/base outputs/tuned" in parser.format_help()


# --- Generation ------------------------------------------------------------------------------------------------------


def stock_video(tiny_wan, seed, scheduler=None, transformer=None, lora=()) -> np.ndarray:
    """What a user of diffusers gets for the first prompt."""
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.scheduler = scheduler or pipeline.scheduler
    pipeline.transformer = transformer or pipeline.transformer
    for i, path in enumerate(lora):
        pipeline.load_lora_weights(path, adapter_name=str(i))
    if len(lora) > 1:
        pipeline.set_adapters([str(i) for i in range(len(lora))], [0.5, 2.0])
    generator = torch.Generator().manual_seed(seed)
    return pipeline(PROMPTS[0], negative_prompt="", guidance_scale=4.0, generator=generator, **SIZE).frames[0]


@pytest.fixture
def sampled(monkeypatch):
    """All frames that the script samples, before they are encoded."""
    frames, sample = [], generate.sample

    def remember(*args):
        frames.extend(sample(*args))
        return np.stack(frames[-len(args[1]) :])

    monkeypatch.setattr(generate, "sample", remember)
    return frames


def test_a_video_is_the_stock_pipelines(run, sampled, tiny_wan, capsys):
    folder = run(prompt=PROMPTS[:1])
    record = record_of(folder)
    (name,), (entry,) = record["videos"].keys(), record["videos"].values()
    expected = stock_video(tiny_wan, entry["seed"])
    assert np.array_equal(sampled[0], expected)
    assert pixels(folder / name).shape == (9, 32, 48, 3)
    assert abs(pixels(folder / name) / 255 - expected).mean() < 0.05  # what H.264 leaves of noise
    settings = record["settings"]
    assert (settings["model"], settings["lora"], settings["transformer"]) == ("tiny-wan", [], None)
    assert (settings["scheduler"], settings["flow_shift"], settings["seed"]) == ("UniPCMultistepScheduler", 3.0, 0)
    assert record["versions"]["torch"] == importlib.metadata.version("torch") and str(folder) not in json.dumps(record)
    printed = capsys.readouterr().out
    assert all(key in printed for key in settings)


def test_euler_and_shift_are_the_stock_schedulers(run, sampled, tiny_wan):
    folder = run(prompt=PROMPTS[:1], scheduler="euler", flow_shift=5)
    seed = record_of(folder)["videos"][f"{PROMPTS[0]}-0.mp4"]["seed"]
    assert np.array_equal(sampled[0], stock_video(tiny_wan, seed, FlowMatchEulerDiscreteScheduler(shift=5.0)))


def test_loras_are_applied_with_their_scales(run, sampled, tiny_wan, make_lora):
    one, two = make_lora(1), make_lora(2)
    file = two / "pytorch_lora_weights.safetensors"
    folder = run("tuned", prompt=PROMPTS[:1], lora=[one, file], lora_scale=[0.5, 2])
    record = record_of(folder)
    seed = record["videos"][f"{PROMPTS[0]}-0.mp4"]["seed"]
    assert np.array_equal(sampled[0], stock_video(tiny_wan, seed, lora=[one, file]))
    assert [lora["scale"] for lora in record["settings"]["lora"]] == [0.5, 2]
    assert len({lora["revision"] for lora in record["settings"]["lora"]}) == 2
    run("base", prompt=PROMPTS[:1])
    run("off", prompt=PROMPTS[:1], lora=[one], lora_scale=[0])
    assert not np.allclose(sampled[0], sampled[1], atol=0.01)
    np.testing.assert_allclose(sampled[1], sampled[2], atol=1e-5)
    assert record_of(folder.parent / "base")["videos"] == record["videos"]  # the same seeds


def test_a_comfyui_lora_gives_the_same_video(run, sampled, make_lora, tmp_path):
    lora = make_lora(1)
    weights = load_file(lora / "pytorch_lora_weights.safetensors")
    peft = {k.removeprefix("transformer."): v for k, v in weights.items()}
    save_file(train_ltd.comfyui_state_dict(peft, 4, 4), tmp_path / "comfyui.safetensors")
    run("one", prompt=PROMPTS[:1], lora=[lora])
    run("two", prompt=PROMPTS[:1], lora=[tmp_path / "comfyui.safetensors"])
    np.testing.assert_allclose(sampled[0], sampled[1], atol=1e-5)


def test_a_lora_that_does_not_fit_is_refused(run, make_lora, tmp_path):
    for lora, message in (
        (make_lora(num_layers=3), "blocks.2.attn1.to_k.lora_A.weight fits no LoRA of this model"),
        (make_lora(num_attention_heads=4), r"attn1.to_k has .* for a layer of \(24, 24\)"),
        (tmp_path / "nowhere.safetensors", "--lora .*nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            run(lora=[lora])
    run()  # nothing was made, so the folder is free


def test_a_fine_tuned_transformer(run, sampled, tiny_wan, tmp_path):
    transformer = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.05)
    transformer.save_pretrained(tmp_path / "full" / "transformer")
    folder = run("tuned", prompt=PROMPTS[:1], transformer=tmp_path / "full")
    settings = record_of(folder)["settings"]
    assert settings["transformer"]["name"] == "full" and settings["model"] == "tiny-wan"
    seed = record_of(folder)["videos"][f"{PROMPTS[0]}-0.mp4"]["seed"]
    assert np.array_equal(sampled[0], stock_video(tiny_wan, seed, transformer=transformer))
    run("base", prompt=PROMPTS[:1])
    assert not np.array_equal(sampled[0], sampled[1])


def save_in_original_keys(transformer: WanTransformer3DModel, path: Path) -> None:
    """Write a file as Wan's own checkpoints and ComfyUI's files are."""
    save_file({train_ltd.original_name(key): value.clone() for key, value in transformer.state_dict().items()}, path)


def test_a_transformer_in_original_keys(run, sampled, tiny_wan, tmp_path):
    transformer = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.05)
    save_in_original_keys(transformer, tmp_path / "wan.safetensors")
    transformer.save_pretrained(tmp_path / "same")
    run("file", prompt=PROMPTS[:1], transformer=tmp_path / "wan.safetensors")
    run("folder", prompt=PROMPTS[:1], transformer=tmp_path / "same")
    np.testing.assert_allclose(sampled[0], sampled[1], atol=1e-5)


def test_batches_change_nothing_but_the_rounding(run, sampled):
    one, three = run("one", num_samples=2), run("three", num_samples=2, batch_size=4)
    assert record_of(one) == record_of(three) and len(contents(three)) == 6
    np.testing.assert_allclose(np.stack(sampled[:6]), np.stack(sampled[6:]), atol=1e-4)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offload_gives_the_same_videos(run, sampled, make_lora, offload):
    lora = make_lora(1)
    run("plain", prompt=PROMPTS[:1], lora=[lora])
    run("offloaded", prompt=PROMPTS[:1], lora=[lora], offload=offload)
    np.testing.assert_allclose(sampled[0], sampled[1], atol=1e-5)


def test_quantization_that_cannot_be(monkeypatch, flags, tmp_path):
    """The flag and its values are those of train_ltd.py, and so is what it refuses."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name))
    with pytest.raises(ValueError, match="--quantization int8: pip install torchao"):
        generate.parse_args(flags(quantization="int8"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="leaves a single file in floats"):
        generate.parse_args(flags(quantization="int8", transformer=tmp_path / "wan.safetensors"))
    with pytest.raises(ValueError, match="nf4 needs a GPU; try int8"):
        generate.parse_args(flags(quantization="nf4"))
    (action,) = (action for action in train_ltd.build_parser()._actions if action.dest == "quantization")
    assert list(action.choices) == list(generate.QUANTIZATION)


def test_quantized_weights(flags, run, sampled, make_lora):
    pytest.importorskip("torchao", reason="no torchao: pip install torchao")
    lora, kwargs = make_lora(1), {"quantization": "int8", "mixed_precision": "bf16"}
    args = generate.parse_args(flags(lora=[lora], **kwargs))
    pipeline = generate.load_pipeline(
        args, generate.identify_models(args), generate.load_scheduler(args), Accelerator()
    )
    weight = pipeline.transformer.blocks[0].attn1.to_q.base_layer.weight
    assert type(weight).__name__ == "Int8Tensor"
    run("plain", prompt=PROMPTS[:1], lora=[lora], mixed_precision="bf16")
    run("quantized", prompt=PROMPTS[:1], lora=[lora], **kwargs)
    assert 0 < abs(sampled[0] - sampled[1]).mean() < 0.1


# --- Size ------------------------------------------------------------------------------------------------------------


NO_SIZE = dict.fromkeys(("height", "width", "num_frames"))
TRAINED = {"height": 48, "width": 64, "num_frames": 13, "fps": 12.0}


def size_of(args) -> dict:
    return {name: getattr(args, name) for name in TRAINED}


@pytest.mark.parametrize("name", ["", "high_noise"])
def test_the_size_is_what_the_lora_was_trained_on(flags, tmp_path, name):
    """From training_settings.json beside it, whichever of its files is given; a flag comes first."""
    folder = tmp_path / "lora"
    (folder / name).mkdir(parents=True)
    (folder / name / "training_settings.json").write_text(json.dumps(TRAINED | {"rank": 4}))
    save_file({"x": torch.zeros(1)}, folder / "lora.safetensors")
    for lora in (folder, folder / "lora.safetensors"):
        assert size_of(generate.parse_args(flags(lora=[lora], **NO_SIZE))) == TRAINED
    args = generate.parse_args(flags(lora=[folder], **NO_SIZE | {"num_frames": 9}))
    assert size_of(args) == TRAINED | {"num_frames": 9}
    assert size_of(generate.parse_args(flags(**NO_SIZE)))["height"] == generate.PRESETS["nano"]["height"]


def test_the_size_is_read_from_a_file_that_is_alone(flags, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors", {"modelspec.resolution": "64x48"})
    args = generate.parse_args(flags(lora=[tmp_path / "lora.safetensors"], **NO_SIZE))
    assert (args.width, args.height, args.num_frames) == (64, 48, generate.PRESETS["nano"]["num_frames"])


def test_benchmarks_keep_their_size(flags, vbench, tmp_path):
    (tmp_path / "training_settings.json").write_text(json.dumps(TRAINED))
    args = generate.parse_args(flags(vbench=vbench, lora=[tmp_path], **NO_SIZE))
    assert args.height == generate.PRESETS["nano"]["height"]


@pytest.mark.parametrize("text", ["{", "[]", '{"height": null, "width": "x", "num_frames": -1}'])
def test_settings_that_say_no_size_are_passed_over(flags, tmp_path, text):
    (tmp_path / "training_settings.json").write_text(text)
    assert generate.trained_size(str(tmp_path)) == {}


def test_the_text_encoder_is_gone_before_sampling_and_embeddings_are_shared(monkeypatch, run, tmp_path):
    alive, sample = [], generate.sample

    def count(*args):
        gc.collect()
        alive.append(sum(isinstance(thing, UMT5EncoderModel) for thing in gc.get_objects()))
        return sample(*args)

    gc.collect()
    before = sum(isinstance(thing, UMT5EncoderModel) for thing in gc.get_objects())
    monkeypatch.setattr(generate, "sample", count)
    run("base", num_samples=2)
    assert alive == [before] * 6
    cached = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/text/*")}
    assert len(cached) == 4  # three prompts and the negative one
    run("other", num_samples=2, guidance_scale=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/text/*")} == cached


# --- Restarts --------------------------------------------------------------------------------------------------------


def test_finished_files_are_kept_and_missing_ones_made_again(run):
    folder = run(num_samples=2)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    lost = folder / f"{PROMPTS[0]}-1.mp4"
    content = pixels(lost)
    lost.unlink()
    (folder / ".partial-x.mp4").touch()  # as a killed run leaves it
    run(num_samples=2)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    # Not the same bytes: x264's macroblock tree is not the same every time.
    assert abs(pixels(lost) - content).mean() < 1 and not (folder / ".partial-x.mp4").exists()
    assert {p for p in after if after[p] != before[p]} == {lost} and len(after) == 6


def test_a_run_that_was_killed_in_its_first_video_goes_on(run):
    folder = run(prompt=["a cat"])
    video = folder / "a cat-0.mp4"
    content = pixels(video)
    video.rename(folder / ".partial-a cat-0.mp4")
    run(prompt=["a cat"])
    assert list(contents(folder)) == [video.name]
    assert abs(pixels(video) - content).mean() < 1


def test_prompts_and_samples_can_be_added(run):
    folder = run(prompt=["a cat"])
    run(prompt=["a dog"], num_samples=2)
    assert (
        sorted(record_of(folder)["videos"])
        == sorted(contents(folder))
        == ["a cat-0.mp4", "a dog-0.mp4", "a dog-1.mp4"]
    )


def test_a_folder_made_otherwise_is_refused(run, make_lora, tmp_path):
    lora = make_lora(1)
    folder = run(lora=[lora])
    record, files = record_of(folder), contents(folder)
    for changed, message in (
        ({"guidance_scale": 5}, "guidance_scale: 4.0 then, 5.0 now"),
        ({"lora_scale": [0.5]}, "lora: .*'scale': 1.0.* then, .*'scale': 0.5.* now"),
        ({"lora": [make_lora(2)]}, "lora: .*revision"),
        ({"lora": None}, r"lora: .* then, \[\] now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"preset": "wan"}, "negative_prompt: '' then, '色"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**({"lora": [lora]} | changed))
    assert record_of(folder) == record and contents(folder) == files
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "holiday.mp4").touch()
    with pytest.raises(ValueError, match=r"no generation\.json"):
        run("alien")


def test_a_file_exists_only_when_it_is_complete(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as on a full disk
    try:
        with pytest.raises(OSError):
            write_video(frames, tmp_path / "a.mp4", 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    write_video(frames, tmp_path / "a.mp4", 16)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and len(read_video(tmp_path / "a.mp4")) == 30


def test_values_that_are_not_finite_make_no_video(run, make_lora):
    with pytest.raises(RuntimeError, match="not finite"):
        run(lora=[make_lora(1, gain=float("nan"))])


def test_two_processes_share_the_videos_and_make_the_same(run, flags, tmp_path):
    alone = run("alone", num_samples=2)
    result = launch(flags("shared", num_samples=2), 2, script=SCRIPT)
    errors = result.stderr
    assert result.returncode == 0, errors
    assert "rank 0 of 2: 3 of 6 missing videos" in errors and "rank 1 of 2: 3 of 6 missing videos" in errors
    assert "6/6" in errors  # the bar
    assert record_of(alone) == record_of(tmp_path / "shared")
    one, two = contents(alone), contents(tmp_path / "shared")
    assert list(one) == list(two) and len(one) == 6
    for name in one:
        assert abs(pixels(alone / name) - pixels(tmp_path / "shared" / name)).mean() < 1


def test_a_killed_run_leaves_whole_videos_and_goes_on(run, flags, forks, tmp_path):
    folder, settings = tmp_path / "base", {"num_samples": 30, "num_frames": 33}
    process = forks.Process(
        target=run_script, args=(flags(**settings), CPU, tmp_path / "said", ROOT, SCRIPT), daemon=True
    )
    process.start()
    wait_for(lambda: len(find_videos(folder)) >= 2, process)
    process.kill()
    process.join()
    made = contents(folder)
    assert 2 <= len(made) < 90
    assert all(len(read_video(folder / name)) == 33 for name in made)
    run(**settings, max_prompts=1)
    after = contents(folder)
    assert {name: after[name] for name in made} == made
    assert {f"{PROMPTS[0]}-{i}.mp4" for i in range(30)} <= set(after) and not list(folder.glob(".partial-*"))


# --- Comparison ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(run, make_lora) -> list[Path]:
    return [run("base", num_samples=2), run("tuned", num_samples=2, lora=[make_lora(1, gain=1.0)])]


def test_compare_puts_the_models_side_by_side(run, pair, tmp_path, caplog):
    page = run("gallery", compare=pair, labels=["Wan2.1", "LTD"])
    names = [name for name, entry in record_of(pair[0])["videos"].items() if entry["sample"] == 0]
    assert sorted(path.name for path in (page / "videos").iterdir()) == sorted(names) and len(names) == 3
    for name in names:
        shown, sources = pixels(page / "videos" / name), [pixels(folder / name) for folder in pair]
        assert shown.shape == (9, 32 + 12 + 2, 2 * (48 + 2), 3)
        for side, source in enumerate(sources):
            part = shown[:, 12:44, side * 50 : side * 50 + 48]
            assert abs(part - source).mean() < 0.7 * abs(part - sources[1 - side]).mean()
        with Image.open(page / "posters" / f"{Path(name).stem}.jpg") as poster:
            assert poster.size == (100, 46)
            assert np.abs(np.asarray(poster, np.float32) - shown[4]).mean() < 8
        with Image.open(page / "strips" / f"{Path(name).stem}.jpg") as strip:
            assert strip.size == (gallery.STRIP_COLUMNS * 50, 2 * 46)
    assert "differ in more than the model" not in caplog.text
    assert len(list((run("gallery2", compare=pair, num_samples=2) / "videos").iterdir())) == 6


def test_compare_names_what_does_not_pair_up(run, pair, tmp_path):
    (pair[1] / f"{PROMPTS[0]}-1.mp4").unlink()
    with pytest.raises(ValueError, match=rf"tuned lacks 1 of 6 videos: {PROMPTS[0]}-1.mp4"):
        run("gallery", compare=pair)
    other = run("other", prompt=PROMPTS[:1], num_samples=2, seed=1)
    with pytest.raises(ValueError) as error:
        run("gallery", compare=[pair[0], other])
    assert "other lacks 4 of 6 videos" in str(error.value) and "another prompt or seed" in str(error.value)
    small = run("small", num_samples=2, num_frames=5)
    with pytest.raises(ValueError, match=r"small has --num_frames 5, but .*base 9"):
        run("gallery", compare=[pair[0], small])
    with pytest.raises(ValueError, match=r"no generation\.json"):
        run("gallery", compare=[pair[0], tmp_path])
    record = record_of(small)
    record["videos"] = {"../out.mp4": next(iter(record["videos"].values()))}  # a folder from who knows where
    (small / "generation.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"\.\./out\.mp4 is no name of a video"):
        run("gallery", compare=[small, small], labels=["a", "b"])
    for settings, message in (
        ({"compare": pair[:1]}, "two folders or more"),
        ({"compare": pair, "labels": ["a"]}, "1 --labels for 2"),
        ({"compare": pair, "labels": ["a", "a"]}, "must differ"),
        ({"compare": pair, "prompt": ["x"]}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            run("gallery", **settings)
    assert not (tmp_path / "gallery").exists()


def test_compare_warns_when_more_than_the_model_differs(run, caplog):
    folders = [run("base"), run("guided", guidance_scale=7), run("third", guidance_scale=7)]
    page = run("gallery", compare=folders, labels=["a", "b", "c"])
    assert "more than the model: guidance_scale is 4.0 and 7.0 and 7.0" in caplog.text
    assert "<tr class=differs><th>guidance_scale<td>4.0<td>7.0<td>7.0" in (page / "index.html").read_text()
    assert pixels(page / "videos" / f"{PROMPTS[0]}-0.mp4").shape[2] == 150


def test_gallery_plays_in_a_browser_and_prompts_stay_text(run, pair, chromium, tmp_path):
    folder = run("gallery", compare=pair, labels=["Wan2.1", "<i>LTD"])
    shutil.rmtree(pair[0])  # the folder stands for itself
    page, errors = chromium.new_page(), []
    page.set_default_timeout(180_000)  # the machine may be busy
    page.on("pageerror", lambda error: errors.append(error))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.goto((folder / "index.html").as_uri())
    assert page.title() == "Wan2.1 | <i>LTD"
    for width in (1600, 390):
        page.set_viewport_size({"width": width, "height": 900})
        box = page.locator("video").first.bounding_box()
        assert width - 48 <= box["width"] <= width and box["height"] <= 900  # all of the width, and still in view
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    posters = page.locator("video").evaluate_all("videos => videos.map(v => v.poster)")
    assert "/posters/a%20red%20square" in posters[0]
    page.evaluate("posters => Promise.all(posters.map(p => { const i = new Image(); i.src = p; return i.decode() }))",
                  posters)  # fmt: skip
    assert page.locator("h2").all_text_contents() == PROMPTS
    assert page.evaluate("window.hacked") is None and page.locator("h2 b, h1 i, td i").count() == 0
    for i in range(3):
        video = page.locator("video").nth(i)
        video.scroll_into_view_if_needed()
        page.wait_for_function("i => document.querySelectorAll('video')[i].played.length > 0", arg=i)
        assert video.evaluate("v => [v.videoWidth, v.videoHeight, v.error]") == [100, 46, None]
        assert video.evaluate("v => Math.round(v.duration * 16)") == 9
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth === 300)")
    page.get_by_role("searchbox").fill("CAT")
    assert page.locator("h2:visible").all_text_contents() == [PROMPTS[1]]
    assert not errors


def test_versions_of_an_earlier_start_are_kept(run):
    folder = run(prompt=PROMPTS[:2])
    record = record_of(folder)
    assert record["earlier_versions"] == []
    (folder / "generation.json").write_text(json.dumps(record | {"versions": {"torch": "1.0"}}))
    (folder / f"{PROMPTS[0]}-0.mp4").unlink()
    again = record_of(run(prompt=PROMPTS[:2]))
    assert again["versions"] == record["versions"] and again["earlier_versions"] == [{"torch": "1.0"}]
