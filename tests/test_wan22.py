"""Wan2.2: the experts of T2V-A14B, and TI2V-5B from text, each through the whole of a run."""

import json
import re
import shutil

import av
import generate
import pytest
import torch
from conftest import HEIGHT, NUM_FRAMES, WIDTH, launch
from diffusers import WanPipeline, WanTransformer3DModel
from helpers import SAMPLED, SIZE_5B, assert_same, code_block, encoded, lora_of, metrics, output_of, recorded, suffix
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_ltd

pytestmark = pytest.mark.slow  # runs of other models

FAMILIES = ("high", "low", "5b")


@pytest.fixture(params=FAMILIES)
def family(request, tiny_experts, tiny_5b) -> dict:
    """The flags of one of the three."""
    if request.param == "5b":
        return {"pretrained_model_name_or_path": tiny_5b} | SIZE_5B
    return {"pretrained_model_name_or_path": tiny_experts, "expert": request.param}


def subfolder(family: dict) -> str:
    return "transformer_2" if family.get("expert") == "low" else "transformer"


def stock_pipeline(family: dict) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(family["pretrained_model_name_or_path"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- Inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", ["t2v", *FAMILIES])
def test_training_feeds_what_the_stock_pipeline_feeds(flags, tiny_wan, tiny_experts, tiny_5b, expert):
    """At each step of a sample: the same latents, timestep and prompt, and the same prediction from them."""
    folders = {"t2v": tiny_wan, "high": tiny_experts, "low": tiny_experts, "5b": tiny_5b}
    line = {"pretrained_model_name_or_path": folders[expert]}
    size = {"height": HEIGHT, "width": WIDTH}
    if expert in ("high", "low"):
        line["expert"] = expert
    if expert == "5b":
        size = SIZE_5B
    args = train_ltd.parse_args(flags(**line, **size))
    wan = train_ltd.identify_wan(args)
    pipeline = stock_pipeline(line)
    seen = []
    model = getattr(pipeline, wan.subfolder)
    with recorded(model, seen):
        pipeline(
            "a square",
            num_frames=NUM_FRAMES,
            num_inference_steps=6,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            **size,
        )
    assert seen
    with torch.no_grad():
        prompt_embeds, _ = pipeline.encode_prompt(
            "a square", do_classifier_free_guidance=False, max_sequence_length=512
        )
    lowest, highest = wan.sigma_range
    for given in seen:
        timestep = given["timestep"].flatten()
        assert bool((timestep == timestep[0]).all())  # of the 5B one a token, and all are equal
        sigma = timestep[:1].float() / 1000
        assert lowest <= sigma.item() <= highest
        batch = {"sigmas": sigma, "prompt_embeds": prompt_embeds}
        ours = []
        with torch.no_grad(), recorded(model, ours):
            prediction = train_ltd.predict_flow(wan, model, given["hidden_states"], batch)
        assert torch.equal(ours[0]["timestep"], timestep[:1].float())
        torch.testing.assert_close(ours[0]["hidden_states"], given["hidden_states"], rtol=0, atol=1e-4)
        assert torch.equal(ours[0]["encoder_hidden_states"], given["encoder_hidden_states"])
        torch.testing.assert_close(prediction, given["output"], rtol=0, atol=1e-5)
    if expert == "5b":
        tokens = given["hidden_states"].shape[2] * (size["height"] // 32) * (size["width"] // 32)
        assert given["timestep"].shape == (1, tokens) and given["hidden_states"].shape[1] == 48


def test_experts_draw_from_their_own_noise_levels(flags, tiny_experts):
    drawn = {}
    for expert in ("high", "low"):
        args = train_ltd.parse_args(flags(pretrained_model_name_or_path=tiny_experts, expert=expert))
        wan = train_ltd.identify_wan(args)
        drawn[expert] = train_ltd.draw_sigmas(args, torch.Generator().manual_seed(0))
        assert train_ltd.identify_wan(args) == wan  # once more changes nothing
    assert drawn["high"].min() >= 0.875 >= drawn["low"].max()
    assert len(drawn["high"]) + len(drawn["low"]) == train_ltd.SIGMA_DRAWS
    # Of the shifted density: 19.8 % of the draws, with their median at 0.916.
    assert 0.15 < len(drawn["high"]) / train_ltd.SIGMA_DRAWS < 0.25
    assert drawn["high"].median().item() == pytest.approx(0.916, abs=0.01)


@pytest.mark.parametrize(("expert", "sigmas"), [("high", (0.95, 1.0)), ("low", (0.3, 0.875))])
def test_flags_narrow_the_range_of_an_expert(flags, tiny_experts, expert, sigmas):
    line = flags(pretrained_model_name_or_path=tiny_experts, expert=expert, min_sigma=sigmas[0])
    args = train_ltd.parse_args(line)
    train_ltd.identify_wan(args)
    assert (args.min_sigma, args.max_sigma) == sigmas


def test_held_out_noise_levels_are_shares_of_the_range(flags, tiny_experts, tiny_wan):
    line = flags(pretrained_model_name_or_path=tiny_experts, expert="high")
    args = train_ltd.parse_args(line)
    train_ltd.identify_wan(args)
    assert train_ltd.eval_sigmas(args) == pytest.approx([0.8875, 0.9125, 0.9375, 0.9625, 0.9875])
    args = train_ltd.parse_args(flags())
    train_ltd.identify_wan(args)
    assert train_ltd.eval_sigmas(args) == list(train_ltd.EVAL_SIGMAS)


# --- Refused ---------------------------------------------------------------------------------------------------------


def test_expert_must_be_named_where_there_are_two(run, tiny_experts, tmp_path):
    with pytest.raises(ValueError, match="has two experts, and a run trains one: give --expert high or --expert low"):
        run(pretrained_model_name_or_path=tiny_experts, cache_dir=tmp_path / "none")
    assert not encoded(tmp_path / "none")


def test_expert_is_refused_where_there_is_one_transformer(run, tiny_wan):
    with pytest.raises(ValueError, match=r"--expert low: .* has one transformer alone; leave the flag out"):
        run(expert="low")


def test_boundary_without_a_second_transformer_is_none(flags, tiny_wan, tmp_path):
    """As a Wan2.1 that was converted anew may have it."""
    shutil.copytree(tiny_wan, tmp_path / "model")
    path = tmp_path / "model/model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boundary_ratio": 0.875}))
    wan = train_ltd.identify_wan(train_ltd.parse_args(flags(pretrained_model_name_or_path=tmp_path / "model")))
    assert wan.boundary_ratio is None


def test_range_outside_of_the_expert_is_refused(run, tiny_experts):
    with pytest.raises(ValueError, match="of the high expert, have under 2 %"):
        run(pretrained_model_name_or_path=tiny_experts, expert="high", max_sigma=0.5)


def test_sizes_of_the_5b(flags, tiny_5b):
    line = flags(pretrained_model_name_or_path=tiny_5b, height=32, width=48)
    with pytest.raises(ValueError, match="--width must be a multiple of 32, got 48; try 64"):
        train_ltd.identify_wan(train_ltd.parse_args(line))


def test_defaults_are_those_of_the_model(flags, tiny_wan, tiny_5b):
    found = {}
    for model in (tiny_wan, tiny_5b):
        nothing = {"height": None, "width": None, "num_frames": None, "fps": None}
        args = train_ltd.parse_args(flags(pretrained_model_name_or_path=model, **nothing))
        train_ltd.identify_wan(args)
        found[model] = (args.width, args.height, args.num_frames, args.fps)
    assert found == {tiny_wan: (832, 480, 81, 16.0), tiny_5b: (1280, 704, 121, 24.0)}


@pytest.mark.parametrize("shape", [(24, 36, 1, 2, 2), (48, 16, 1, 2, 2), (24, 48, 1, 2, 2)])
def test_single_file_of_another_family_is_refused_by_its_shape(run, tmp_path, shape):
    save_file({"patch_embedding.weight": torch.zeros(shape)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"patch_embedding.weight of shape {shape}, for the base's")):
        run(transformer_path=tmp_path / "other.safetensors", cache_dir=tmp_path / "none")
    assert not encoded(tmp_path / "none")


def test_folder_of_another_family_is_refused(run, tiny_5b):
    with pytest.raises(ValueError, match="it has 48 channels for the base's 16"):
        run(transformer_path=tiny_5b)


# --- A whole run -----------------------------------------------------------------------------------------------------


def stock_sample(pipeline: WanPipeline, family: dict) -> torch.Tensor:
    size = {"height": family.get("height", HEIGHT), "width": family.get("width", WIDTH)}
    video = pipeline(
        "a square",
        negative_prompt="",
        num_frames=NUM_FRAMES,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        **size,
    ).frames[0]
    return torch.tensor(video)


def test_run_of_a_lora(run, family, sampled_frames):
    """Cache, training, held-out errors, samples, both files, and the stock pipeline makes the same sample of each."""
    output = run(**family, **SAMPLED, validation_fraction=0.2, max_train_steps=3)
    results = output / suffix(family).strip("_")
    assert {path.name for path in (results / "samples").glob("*")} == {
        "step-000000-0-a-square.mp4",
        "step-000003-0-a-square.mp4",
    }
    held_out = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    sigmas = [name.removeprefix("val/mse_sigma_") for name in held_out if name.startswith("val/mse_sigma_")]
    lowest, highest = {"high": (0.875, 1), "low": (0, 0.875)}.get(family.get("expert"), (0, 1))
    assert len(sigmas) == 5 and all(lowest < float(sigma) < highest for sigma in sigmas)

    pipeline = stock_pipeline(family)
    before = stock_sample(pipeline, family)
    for file in (lora_of(output, family), output / f"run{suffix(family)}.safetensors"):
        pipeline.load_lora_weights(file, load_into_transformer_2=family.get("expert") == "low")
        after = stock_sample(pipeline, family)
        assert (after - sampled_frames[".step-000003-0-a-square.mp4"]).abs().max() < 1e-5
        assert (before - sampled_frames[".step-000000-0-a-square.mp4"]).abs().max() < 1e-5
        assert (after - before).abs().max() > 1e-3
        pipeline.unload_lora_weights()


def test_resume(run, family, tmp_path):
    kwargs = family | {"max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.2, "train_batch_size": 2}
    straight = run(output_dir=tmp_path / "straight", **kwargs)
    resumed = tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    run(output_dir=resumed, resume_from_checkpoint="latest", **kwargs)
    assert_same(load_file(lora_of(straight, family)), load_file(lora_of(resumed, family)))
    assert metrics(resumed) == metrics(straight)  # the rows until then came with the checkpoint


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_code_of_the_card(run, family, tmp_path, monkeypatch, train_type):
    """As a user does: copy it, run it where base and weights go by the names in it; the trained part is loaded."""
    output = run(train_type=train_type, **family | {"rank": None}, **SAMPLED, max_train_steps=1)
    base = family["pretrained_model_name_or_path"]
    (tmp_path / base.name).symlink_to(base)
    monkeypatch.chdir(tmp_path)
    loaded = {}
    exec(compile(code_block((output / "README.md").read_text()), "README.md", "exec"), loaded)
    with av.open("output.mp4") as video:
        assert len(list(video.decode(video=0))) == NUM_FRAMES
    moved = {}
    for part in ("transformer", "transformer_2"):
        model = getattr(loaded["pipe"], part)
        if model is not None:
            plain = WanTransformer3DModel.from_pretrained(base, subfolder=part, dtype=torch.bfloat16)
            moved[part] = not torch.equal(model_output(model), model_output(plain))
    expected = {"transformer": False, "transformer_2": False} if "expert" in family else {}
    assert moved == expected | {subfolder(family): True}


def model_output(model: WanTransformer3DModel) -> torch.Tensor:
    if model.config.in_channels == 16:
        return output_of(model.float())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model.float()(
            torch.randn(1, 48, 3, 2, 4, generator=generator),
            torch.tensor([500.0]),
            torch.randn(1, 12, model.config.text_dim, generator=generator),
        ).sample


def test_full_fine_tune_of_the_low_expert(run, flags, tiny_experts):
    """It is saved as the pipeline has it, and another run starts from it, or from its checkpoint."""
    kwargs = {"pretrained_model_name_or_path": tiny_experts, "expert": "low", "train_type": "full", "rank": None}
    output = run(**kwargs, max_train_steps=1)
    assert (output / "transformer_2/config.json").is_file() and not (output / "transformer").exists()
    assert (output / "run_low_noise.safetensors").is_file()
    tuned = WanTransformer3DModel.from_pretrained(output, subfolder="transformer_2").state_dict()
    line = flags(pretrained_model_name_or_path=tiny_experts, expert="low", transformer_path=output)
    args = train_ltd.parse_args(line)
    loaded = train_ltd.load_transformer(args, train_ltd.identify_wan(args))
    assert_same(loaded.state_dict(), tuned)
    args.expert = "high"
    with pytest.raises(ValueError, match="--transformer_path"):
        train_ltd.identify_wan(args)


# --- Which expert a file is of ---------------------------------------------------------------------------------------


@pytest.fixture
def high(run, tiny_experts, tmp_path):
    return run(pretrained_model_name_or_path=tiny_experts, expert="high", output_dir=tmp_path / "high")


def test_expert_stands_in_every_file(high):
    for name in ("pytorch_lora_weights_high_noise.safetensors", "high_high_noise.safetensors"):
        with safe_open(high / name, framework="pt") as file:
            assert file.metadata()["expert"] == "high"
    with safe_open(high / "high_high_noise.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.architecture"] == "wan2.2/lora"
    card = (high / "README.md").read_text()
    assert "| expert | high |" in card and "| min_sigma | 0.875 |" in card
    assert 'weight_name="pytorch_lora_weights_high_noise.safetensors"' in card
    assert "(high_noise/curves.png)" in card and (high / "high_noise/curves.png").is_file()
    settings = json.loads((high / "checkpoint-2/settings.json").read_text())["settings"]
    assert settings["flags"]["expert"] == "high"


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint", "name"])
def test_lora_of_the_other_expert_is_refused(run, tiny_experts, tmp_path, high, kind):
    paths = {
        "folder": high,
        "file": high / "high_high_noise.safetensors",
        "checkpoint": high / "checkpoint-2",
        "name": tmp_path / "dog_HighNoise.safetensors",  # says it by its name alone, as most do
    }
    tensors = load_file(paths["file"])
    save_file(tensors, paths["name"])
    with pytest.raises(ValueError, match="is of the high expert, and the low one is to take it"):
        run(
            pretrained_model_name_or_path=tiny_experts,
            expert="low",
            output_dir=tmp_path / "low",
            rank=None,
            init_lora=paths[kind],
        )


def test_lora_that_names_no_expert_is_taken_as_told(run, tiny_experts, tmp_path, high, log):
    save_file(load_file(high / "high_high_noise.safetensors"), tmp_path / "dog.safetensors")
    kwargs = {"pretrained_model_name_or_path": tiny_experts, "output_dir": tmp_path / "low", "rank": None}
    run(**kwargs, expert="low", init_lora=tmp_path / "dog.safetensors")
    assert "dog.safetensors names no expert: it is taken for one of the low expert" in log()


def test_own_lora_goes_on(run, tiny_experts, tmp_path, high):
    """From the folder of a run, which has a file for each program."""
    kwargs = {"pretrained_model_name_or_path": tiny_experts, "output_dir": tmp_path / "more", "rank": None}
    run(**kwargs, expert="high", init_lora=high)


def test_checkpoint_of_the_other_expert_is_refused(run, tiny_experts, tmp_path, high):
    with pytest.raises(ValueError, match="expert high -> low"):
        run(
            pretrained_model_name_or_path=tiny_experts,
            expert="low",
            output_dir=high,
            resume_from_checkpoint="latest",
        )


def test_experts_share_the_cache(run, tiny_experts, high, tmp_path, no_models):
    before = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    no_models()
    run(pretrained_model_name_or_path=tiny_experts, expert="low", output_dir=tmp_path / "low")
    assert {path.name for path in (tmp_path / "cache").rglob("*.safetensors")} == before


# --- Several processes -----------------------------------------------------------------------------------------------


def test_two_processes(run, flags, tiny_experts, tmp_path):
    """They equal accumulation to the bit, and both load the other expert for samples."""
    kwargs = {"pretrained_model_name_or_path": tiny_experts, "expert": "low"} | SAMPLED
    alone = run(output_dir=tmp_path / "alone", gradient_accumulation_steps=2, **kwargs)
    result = launch(flags(output_dir=tmp_path / "two", **kwargs), processes=2)
    assert result.returncode == 0, result.stderr
    name = "pytorch_lora_weights_low_noise.safetensors"
    assert_same(load_file(alone / name), load_file(tmp_path / "two" / name))
    assert (tmp_path / "two/low_noise/samples/step-000002-0-a-square.mp4").is_file()


# --- The published models, without their weights ---------------------------------------------------------------------

PUBLISHED = {
    # layers, heads, feed-forward, channels
    "t2v-1.3b": (30, 12, 8960, 16),
    "t2v-14b": (40, 40, 13824, 16),
    "ti2v-5b": (30, 24, 14336, 48),
}
EXPECTED = {
    # parameters, those of a LoRA of rank 32
    "t2v-1.3b": (1.42e9, 43.7e6),
    "t2v-14b": (14.29e9, 153.4e6),
    "ti2v-5b": (5.00e9, 80.6e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_lora_of_the_published_models(flags, name):
    """On the meta device: how many layers are adapted, how large the file is, and every key in both dialects."""
    layers, heads, feed_forward, channels = PUBLISHED[name]
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=128,
            ffn_dim=feed_forward,
            in_channels=channels,
            out_channels=channels,
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        train_ltd.add_lora(model, train_ltd.parse_args(flags(rank=32, lora_alpha=32)))
    adapted = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert parameters == pytest.approx(EXPECTED[name][0], rel=5e-3)
    assert sum(p.numel() for p in adapted.values()) == pytest.approx(EXPECTED[name][1], rel=5e-3)
    assert len(adapted) == 2 * 10 * layers
    keys = train_ltd.comfyui_state_dict(dict.fromkeys(layer_keys(adapted), torch.ones(1)), 32, 32)
    block = {key.removeprefix("diffusion_model.blocks.0.") for key in keys if ".blocks.0." in key}
    parts = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"]
    assert block == {f"{part}.lora_{side}.weight" for part in (*parts, "ffn.0", "ffn.2") for side in "AB"}


def layer_keys(adapted: dict) -> list[str]:
    return [name.replace(".default.", ".") for name in adapted]


# --- examples/generate.py --------------------------------------------------------------------------------------------


@pytest.fixture
def generated(tiny_experts, tmp_path, monkeypatch):
    """Function that generates one video and returns its frames."""
    seen = []
    sample = generate.sample
    monkeypatch.setattr(generate, "sample", lambda *args: seen.append(sample(*args)) or seen[-1])

    def call(name: str, *flags) -> torch.Tensor:
        line = ["--preset=nano", f"--pretrained_model_name_or_path={tiny_experts}", "--prompt=a square"]
        line += [f"--height={HEIGHT}", f"--width={WIDTH}", f"--num_frames={NUM_FRAMES}", "--num_inference_steps=4"]
        generate.main(generate.parse_args([*line, f"--output_dir={tmp_path / name}", *map(str, flags)]))
        return torch.tensor(seen[-1][0])

    return call


SCALES = ("--lora_scale=40", "--lora_2_scale=20", "--guidance_scale_2=2")  # two steps alone change little


def test_generate_samples_with_both_experts_and_a_lora_each(run, tiny_experts, tmp_path, high, generated):
    low = run(pretrained_model_name_or_path=tiny_experts, expert="low", output_dir=tmp_path / "low")
    video = generated("tuned", f"--lora={high}", f"--lora_2={low}", *SCALES)
    record = json.loads((tmp_path / "tuned/generation.json").read_text())
    assert record["settings"]["lora_2"][0]["scale"] == 20 and record["settings"]["guidance_scale_2"] == 2
    seed = next(iter(record["videos"].values()))["seed"]

    pipeline = WanPipeline.from_pretrained(tiny_experts)
    pipeline.load_lora_weights(high, weight_name="pytorch_lora_weights_high_noise.safetensors", adapter_name="h")
    pipeline.load_lora_weights(
        low,
        weight_name="pytorch_lora_weights_low_noise.safetensors",
        adapter_name="l",
        load_into_transformer_2=True,
    )
    pipeline.set_adapters(["h", "l"], [40.0, 20.0])
    expected = pipeline(
        "a square",
        negative_prompt="",
        height=HEIGHT,
        width=WIDTH,
        num_frames=NUM_FRAMES,
        num_inference_steps=4,
        guidance_scale=4.0,
        guidance_scale_2=2.0,
        generator=torch.Generator().manual_seed(seed),
    ).frames[0]
    assert (video - torch.tensor(expected)).abs().max() < 1e-4
    assert (video - generated("base")).abs().max() > 1e-3


def test_generate_refuses_the_lora_of_the_other_expert(generated, high):
    with pytest.raises(ValueError, match=r"--lora_2 .* is of the high expert, and the low one is to take it"):
        generated("tuned", f"--lora_2={high}")


def test_generate_refuses_a_second_expert_where_there_is_none(tiny_wan, tmp_path):
    line = [f"--pretrained_model_name_or_path={tiny_wan}", "--prompt=x", f"--output_dir={tmp_path}", "--lora_2=a"]
    with pytest.raises(ValueError, match=r"--lora_2: .* has one transformer alone"):
        generate.main(generate.parse_args(line))
