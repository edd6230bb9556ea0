"""Image-to-video: Wan2.1 I2V-14B, Wan2.2 I2V-A14B, and TI2V-5B with an image, each through the whole of a run."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import av
import generate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HEIGHT, NUM_FRAMES, WIDTH, launch, write_clip
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from helpers import SAMPLED, SIZE_5B, assert_same, code_block, encoded, lora_of, matter, metrics, recorded, suffix
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_ltd
from ltd_loss import ltd_weights

pytestmark = pytest.mark.slow  # runs of other models

FAMILIES = ("i2v", "high", "low", "5b")


@pytest.fixture
def families(tiny_i2v, tiny_i2v_experts, tiny_5b) -> dict[str, dict]:
    """The flags of each."""
    return {
        "i2v": {"pretrained_model_name_or_path": tiny_i2v},
        "high": {"pretrained_model_name_or_path": tiny_i2v_experts, "expert": "high"},
        "low": {"pretrained_model_name_or_path": tiny_i2v_experts, "expert": "low"},
        "5b": {"pretrained_model_name_or_path": tiny_5b, "first_frame_share": 0.5} | SIZE_5B,
    }


@pytest.fixture(params=FAMILIES)
def family(request, families) -> dict:
    return families[request.param]


def size_of(family: dict) -> dict:
    return {"height": family.get("height", HEIGHT), "width": family.get("width", WIDTH)}


def stock_pipeline(family: dict) -> WanImageToVideoPipeline:
    pipeline = WanImageToVideoPipeline.from_pretrained(family["pretrained_model_name_or_path"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def moving_frames(family: dict) -> torch.Tensor:
    """A clip `(F, 3, H, W)` uint8 of noise that drifts."""
    size = size_of(family)
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(1, 3, size["height"] // 8, size["width"] // 8, generator=generator)
    picture = F.interpolate(still, scale_factor=8, mode="bilinear")[0]
    frames = [picture.roll(2 * i, dims=-1) for i in range(NUM_FRAMES)]
    return (255 * torch.stack(frames)).byte()


def picture_of(frames: torch.Tensor) -> Image.Image:
    return Image.fromarray(frames[0].permute(1, 2, 0).numpy())


# --- Inputs ----------------------------------------------------------------------------------------------------------


def test_training_feeds_what_the_stock_pipeline_feeds(flags, family):
    """At each step of a sample: the same latents with the same condition, timestep, prompt and image embeds."""
    args = train_ltd.parse_args(flags(**family))
    wan = train_ltd.identify_wan(args)
    pipeline = stock_pipeline(family)
    frames = moving_frames(family)
    seen = []
    model = getattr(pipeline, wan.subfolder)
    with recorded(model, seen):
        pipeline(
            picture_of(frames),
            "a square",
            num_frames=NUM_FRAMES,
            num_inference_steps=8,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            **size_of(family),
        )
    assert seen
    encoder = train_ltd.load_image_encoder(args, torch.device("cpu")) if wan.image_embeds else None
    vae = train_ltd.load_vae(args, torch.device("cpu"))
    sample = train_ltd.encode_clip(vae, frames, wan.first_frame == "channels", encoder)
    with torch.no_grad():
        prompt_embeds, _ = pipeline.encode_prompt(
            "a square", do_classifier_free_guidance=False, max_sequence_length=512
        )
    batch = {name: tensor[None] for name, tensor in sample.items()} | {"prompt_embeds": prompt_embeds}
    channels = sample["latents"].shape[0]
    for given in seen:
        timestep = given["timestep"].max().float()
        batch["sigmas"] = (timestep / 1000).view(1)
        noisy_latents = given["hidden_states"][:, :channels].clone()
        if wan.first_frame == "replaced":
            batch["first_frame_given"] = torch.tensor([True])
            noisy_latents[:, :, 0] = 7  # is not looked at
        ours = []
        with torch.no_grad(), recorded(model, ours):
            prediction = train_ltd.predict_flow(wan, model, noisy_latents, batch)
        assert torch.equal(ours[0]["timestep"], given["timestep"].float())
        torch.testing.assert_close(ours[0]["hidden_states"], given["hidden_states"], rtol=0, atol=1e-4)
        assert torch.equal(ours[0]["encoder_hidden_states"], given["encoder_hidden_states"])
        if wan.image_embeds:
            assert torch.equal(ours[0]["encoder_hidden_states_image"], given["encoder_hidden_states_image"])
            assert ours[0]["encoder_hidden_states_image"].shape[1] == 257
        else:
            assert ours[0]["encoder_hidden_states_image"] is given["encoder_hidden_states_image"] is None
        torch.testing.assert_close(prediction, given["output"], rtol=0, atol=1e-5)
    if wan.first_frame == "replaced":
        tokens_per_frame = size_of(family)["height"] * size_of(family)["width"] // 32**2
        assert (given["timestep"][0] == 0).sum() == tokens_per_frame
    else:
        assert given["hidden_states"].shape[1] == 36


def test_samples_of_one_batch_are_conditioned_each_for_itself(flags, families):
    """Of TI2V-5B: what a sample gets does not depend on the other one of its batch."""
    args = train_ltd.parse_args(flags(**families["5b"]))
    wan = train_ltd.identify_wan(args)
    model = train_ltd.load_transformer(args, wan).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(2, 48, 3, 2, 4, generator=generator),
        "sigmas": torch.tensor([0.4, 0.8]),
        "prompt_embeds": torch.randn(2, 512, model.config.text_dim, generator=generator),
        "first_frame_given": torch.tensor([False, True]),
    }
    noisy_latents = torch.randn(2, 48, 3, 2, 4, generator=generator)
    with torch.no_grad():
        both = train_ltd.predict_flow(wan, model, noisy_latents, batch)
        for i in range(2):
            one = {name: tensor[i : i + 1] for name, tensor in batch.items()}
            alone = train_ltd.predict_flow(wan, model, noisy_latents[i : i + 1], one)
            torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)


def test_experts_change_at_nine_tenths(flags, families):
    for name, expected in (("high", (0.9, 1.0)), ("low", (0.0, 0.9))):
        args = train_ltd.parse_args(flags(**families[name]))
        train_ltd.identify_wan(args)
        assert (args.min_sigma, args.max_sigma) == expected


def test_first_frame_is_drawn_last(prepare, families):
    """So that noise, captions and noise levels are those of a run from text; and none is given of a still."""
    clips, _, captions, args = prepare(**families["5b"])
    items = {}
    for share in (None, 0.5, 1.0):
        args.first_frame_share = share
        dataset = train_ltd.LatentDataset(clips, captions, args)
        items[share] = [dataset[i] for i in range(len(clips))]
    for share in (0.5, 1.0):
        for plain, item in zip(items[None], items[share], strict=True):
            assert item.keys() == plain.keys() | {"first_frame_given"}
            for name, value in plain.items():
                assert torch.equal(value, item[name]) if torch.is_tensor(value) else value == item[name]
    given = [bool(item["first_frame_given"]) for item in items[0.5]]
    assert True in given and False in given
    assert all(item["first_frame_given"] for item in items[1.0])
    # Held-out clips always get the same, whatever the epoch.
    args.first_frame_share = 0.5
    dataset = train_ltd.LatentDataset(clips, captions, args)
    fixed = [bool(dataset.load_fixed(i)["first_frame_given"]) for i in range(len(clips))]
    dataset.epoch = 1
    assert fixed == [bool(dataset.load_fixed(i)["first_frame_given"]) for i in range(len(clips))]
    assert True in fixed and False in fixed
    clips, _, captions, args = prepare(**families["5b"], num_frames=1)
    assert not any(item["first_frame_given"] for item in train_ltd.LatentDataset(clips, captions, args))


# --- Loss of TI2V-5B: what is given does not count -------------------------------------------------------------------


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two samples of three latent frames, of which the second is given its first; its prediction there is absurd."""
    generator = torch.Generator().manual_seed(1)
    prediction, target, latents = torch.randn(3, 2, 4, 3, 2, 2, generator=generator)
    prediction[1, :, 0] = 1e6
    return {
        "prediction": prediction,
        "target": target,
        "latents": latents,
        "first_frame_given": torch.tensor([False, True]),
    }


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", ["ltd", "mse"])
def test_given_frame_has_no_loss_and_samples_count_the_same(flags, batch, loss, normalize):
    """Each sample's mean is over what is trained of it; LTD still sees the gap behind the given frame."""
    args = train_ltd.parse_args(flags(loss=loss, ltd_normalize=normalize, ltd_scale=1.5, ltd_strength=2))
    expected = []
    for i, first in ((0, 0), (1, 1)):
        weights = ltd_weights(batch["latents"][i : i + 1], 3, scale=1.5, strength=2)[0, first:]
        if loss == "mse":
            weights = torch.ones_like(weights)
        elif normalize:
            weights = weights / weights.mean()
        errors = (batch["prediction"][i, :, first:] - batch["target"][i, :, first:]).square()
        expected.append((weights * errors).mean())
    value = train_ltd.compute_loss(batch["prediction"], batch["target"], batch, args)
    torch.testing.assert_close(value, sum(expected) / 2, rtol=1e-5, atol=0)
    batch["first_frame_given"] = torch.tensor([False, False])
    value = train_ltd.compute_loss(batch["prediction"], batch["target"], batch, args)
    del batch["first_frame_given"]
    plain = train_ltd.compute_loss(batch["prediction"], batch["target"], batch, args)
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=0)


def test_given_frame_counts_neither_as_motion_nor_as_static(batch):
    trained = train_ltd.trained_frames(batch)
    assert trained.tolist() == [[True, True, True], [False, True, True]]
    tensors = (batch["prediction"], batch["target"], batch["latents"])
    for bounds in ((math.inf, -1.0), (math.inf, math.inf), (-2.0, -1.0)):
        row = train_ltd.motion_errors(*tensors, torch.tensor(bounds), trained)
        for name, counts in (("motion", bounds[1] < 0), ("static", bounds[0] > 0)):
            assert row[f"{name}_voxels"] == (20 if counts else 0)  # 5 frames of 4 voxels, and not 6
            assert row[f"{name}_error"] < 100
    assert row["mse"] < 100


# --- A whole run -----------------------------------------------------------------------------------------------------


def stock_sample(pipeline: WanImageToVideoPipeline, family: dict, picture: Image.Image) -> torch.Tensor:
    video = pipeline(
        picture,
        "a square",
        negative_prompt="",
        num_frames=NUM_FRAMES,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        **size_of(family),
    ).frames[0]
    return torch.tensor(video)


def test_run_of_a_lora(run, family, sampled_frames, tmp_path):
    """Cache, training, held-out errors, samples, both files, and the stock pipeline makes the same sample of each."""
    picture = picture_of(moving_frames(family))
    picture.save(tmp_path / "picture.png")
    kwargs = family | SAMPLED | {"validation_image": tmp_path / "picture.png", "learning_rate": 0.1}
    output = run(**kwargs, validation_fraction=0.2, max_train_steps=3)
    results = output / suffix(family).strip("_")
    assert {path.name for path in (results / "samples").glob("*")} == {
        "step-000000-0-a-square.mp4",
        "step-000003-0-a-square.mp4",
    }
    held_out = metrics(output, "val/mse")
    assert len(held_out) == 2 and all(0 < value < 10 for value in held_out.values())
    card = matter((output / "README.md").read_text())
    assert card["pipeline_tag"] == "image-to-video" and "image-to-video" in card["tags"]
    assert ("text-to-video" in card["tags"]) == ("first_frame_share" in family)
    assert "picture.png" not in (results / "training_settings.json").read_text()

    pipeline = stock_pipeline(family)
    before = stock_sample(pipeline, family, picture)
    for file in (lora_of(output, family), output / f"run{suffix(family)}.safetensors"):
        pipeline.load_lora_weights(file, load_into_transformer_2=family.get("expert") == "low")
        after = stock_sample(pipeline, family, picture)
        assert (after - sampled_frames[".step-000003-0-a-square.mp4"]).abs().max() < 1e-5
        assert (before - sampled_frames[".step-000000-0-a-square.mp4"]).abs().max() < 1e-5
        assert (after - before).abs().max() > 1e-3
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("held_out", [True, False])
def test_samples_start_from_a_clip_by_default(run, families, sampled_frames, tmp_path, monkeypatch, held_out):
    """From the first frame of a held-out clip, or else of a training clip, as the VAE decodes it from the whole."""
    family = families["i2v"]
    seen = []
    choose = train_ltd.sample_image

    def keep(live, vae, number, args):
        picture = choose(live, vae, number, args)
        clips = live.held_out.clips if held_out else live.dataset.clips
        seen.append((train_ltd.load_entry(args, clips[number].path)["latents"], picture))
        return picture

    monkeypatch.setattr(train_ltd, "sample_image", keep)
    kwargs = family | SAMPLED | {"validation_prompt": ["a square", "a square"], "max_train_steps": 1}
    if held_out:
        kwargs["validation_fraction"] = 0.4
    run(**kwargs)
    vae = AutoencoderKLWan.from_pretrained(family["pretrained_model_name_or_path"], subfolder="vae")
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    for latents, picture in seen:
        with torch.no_grad():
            first = vae.decode((latents * std + mean)[None]).sample[0, :, 0]
        expected = (255 * (first.clamp(-1, 1) + 1) / 2).permute(1, 2, 0)
        assert (torch.from_numpy(np.array(picture)) - expected).abs().max() <= 1
    assert len(seen) == 4 and seen[0][1] == seen[2][1] != seen[1][1] == seen[3][1]
    pipeline = stock_pipeline(family)
    for number in range(2):
        sampled = sampled_frames[f".step-000000-{number}-a-square.mp4"]
        assert (stock_sample(pipeline, family, seen[number][1]) - sampled).abs().max() < 1e-5


def test_picture_is_cropped_as_clips_are(flags, tmp_path, families):
    """Not squashed, as the pipeline would."""
    write_clip(tmp_path / "clip.mp4", frames=3, height=64, width=64)
    picture = np.zeros((64, 256, 3), np.uint8)
    picture[:, 128 - 48 : 128 + 48] = 200  # what is left of it
    Image.fromarray(picture).save(tmp_path / "wide.png")
    args = train_ltd.parse_args(flags(**families["i2v"]))
    train_ltd.identify_wan(args)
    read = np.asarray(train_ltd.read_image(str(tmp_path / "wide.png"), args))
    assert read.shape == (HEIGHT, WIDTH, 3)
    assert (read[:, 1:-1] > 190).all()
    assert train_ltd.read_image(str(tmp_path / "clip.mp4"), args).size == (WIDTH, HEIGHT)


def test_resume(run, family, tmp_path):
    kwargs = family | {"max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.2, "train_batch_size": 2}
    straight = run(output_dir=tmp_path / "straight", **kwargs)
    resumed = tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    run(output_dir=resumed, resume_from_checkpoint="latest", **kwargs)
    assert_same(load_file(lora_of(straight, family)), load_file(lora_of(resumed, family)))
    assert metrics(resumed) == metrics(straight)  # the rows until then came with the checkpoint


def test_resume_with_another_share_is_refused(run, families):
    output = run(**families["5b"])
    with pytest.raises(ValueError, match=r"first_frame_share 0\.5 -> 1\.0"):
        run(**families["5b"] | {"first_frame_share": 1.0}, resume_from_checkpoint=output / "checkpoint-2")


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_code_of_the_card(run, family, tmp_path, monkeypatch, train_type):
    """As a user does: copy it, put a picture beside it, and run it where base and weights go by the names in it."""
    output = run(train_type=train_type, **family | {"rank": None}, **SAMPLED, max_train_steps=1)
    base = family["pretrained_model_name_or_path"]
    (tmp_path / base.name).symlink_to(base)
    picture_of(moving_frames(family)).resize((100, 100)).save(tmp_path / "first_frame.png")
    monkeypatch.chdir(tmp_path)
    loaded = {}
    exec(compile(code_block((output / "README.md").read_text()), "README.md", "exec"), loaded)
    with av.open("output.mp4") as video:
        assert len(list(video.decode(video=0))) == NUM_FRAMES
    pipeline = loaded["pipe"]
    assert isinstance(pipeline, WanImageToVideoPipeline)
    moved = {}
    for part in ("transformer", "transformer_2"):
        model = getattr(pipeline, part)
        if model is not None:
            plain = WanTransformer3DModel.from_pretrained(base, subfolder=part, dtype=torch.bfloat16)
            if train_type == "lora":
                moved[part] = any("lora_B" in name and p.any() for name, p in model.named_parameters())
            else:
                moved[part] = any(
                    not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
                )
    trained = "transformer_2" if family.get("expert") == "low" else "transformer"
    assert moved == {part: part == trained for part in moved} and trained in moved


def test_two_processes(run, flags, families, tmp_path):
    """They equal accumulation to the bit, and share clips and samples."""
    kwargs = families["i2v"] | SAMPLED
    alone = run(output_dir=tmp_path / "alone", gradient_accumulation_steps=2, **kwargs)
    command_line = flags(output_dir=tmp_path / "two", cache_dir=tmp_path / "cache-of-two", **kwargs)
    result = launch(command_line, processes=2)
    assert result.returncode == 0, result.stderr
    name = "pytorch_lora_weights.safetensors"
    assert_same(load_file(alone / name), load_file(tmp_path / "two" / name))
    assert (tmp_path / "two/samples/step-000002-0-a-square.mp4").is_file()


def test_last_lines_say_how_to_start_from_a_picture(run, families, log, tmp_path):
    """The command is one that `generate.py` takes."""
    picture = tmp_path / "a picture.png"
    picture_of(moving_frames(families["high"])).save(picture)
    run(**families["high"], max_train_steps=1)
    (line,) = [line for line in log() if line.startswith("to use it: ")]
    assert "--preset wan22-i2v --image first_frame.png" in line
    run(**families["5b"], **SAMPLED, validation_image=picture, max_train_steps=1, output_dir=tmp_path / "5b")
    line = [line for line in log() if line.startswith("to use it: ")][1]
    words = shlex.split(line.removeprefix("to use it: "))
    args = generate.parse_args(words[2:])
    assert (args.preset, args.image) == ("ti2v-5b", [str(picture)])
    assert [model.wan.first_frame for model in generate.identify_models(args)] == ["replaced"]


# --- Cache -----------------------------------------------------------------------------------------------------------


def test_experts_share_the_cache_and_text_to_video_does_not_take_it(run, families, tmp_path, tiny_wan, no_models):
    """An entry of text-to-video, with the same VAE, has no condition."""
    run(pretrained_model_name_or_path=tiny_wan, output_dir=tmp_path / "t2v")
    before = set((tmp_path / "cache/latents").glob("*"))
    run(**families["high"], output_dir=tmp_path / "high")
    entries = set((tmp_path / "cache/latents").glob("*")) - before
    assert len(entries) == len(before)
    with safe_open(entries.pop(), framework="pt") as entry:
        assert entry.get_slice("condition").get_shape() == entry.get_slice("latents").get_shape()
    no_models()
    run(**families["low"], output_dir=tmp_path / "low")


def test_text_only_runs_of_the_5b_share_the_cache(run, families, tmp_path, no_models):
    run(**families["5b"] | {"first_frame_share": None}, output_dir=tmp_path / "text")
    no_models()
    run(**families["5b"], output_dir=tmp_path / "image")


# --- LoRA files ------------------------------------------------------------------------------------------------------


def test_lora_of_2_1_fits_2_2(run, families, tmp_path):
    """By default neither CLIP's layers nor the image embedder are adapted."""
    first = run(**families["i2v"], output_dir=tmp_path / "first")
    assert not [key for key in load_file(first / "first.safetensors") if "img" in key]
    kwargs = families["high"] | {"rank": None, "init_lora": first / "first.safetensors"}
    run(**kwargs, output_dir=tmp_path / "second", max_train_steps=1)


def test_layers_for_clip_have_their_names_in_both_dialects(run, families, tmp_path):
    """Adapted all the same: both files bring the same weights into the stock pipeline, and go on here."""
    targets = ["add_k_proj", "add_v_proj", "image_embedder.ff.net.0.proj", "image_embedder.ff.net.2", "attn2.to_q"]
    output = run(**families["i2v"], lora_target_modules=targets)
    keys = {key.removeprefix("diffusion_model.") for key in load_file(output / "run.safetensors")}
    for layer in ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1", "img_emb.proj.3"):
        assert f"{layer}.lora_A.weight" in keys
    loaded = []
    for file in (output / "pytorch_lora_weights.safetensors", output / "run.safetensors"):
        pipeline = stock_pipeline(families["i2v"])
        pipeline.load_lora_weights(file)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        loaded.append(pipeline.transformer.state_dict())
    assert_same(*loaded)
    run(
        **families["i2v"] | {"rank": None},
        output_dir=tmp_path / "more",
        init_lora=output / "run.safetensors",
        max_train_steps=1,
    )


def test_full_fine_tune_has_the_original_names(run, families, tmp_path):
    """Its single file loads again as `--transformer_path`."""
    kwargs = families["i2v"] | {"train_type": "full", "rank": None, "max_train_steps": 1}
    output = run(**kwargs)
    keys = set(load_file(output / "run.safetensors"))
    for number in (0, 1, 3, 4):
        assert f"img_emb.proj.{number}.weight" in keys
    assert "blocks.0.cross_attn.norm_k_img.weight" in keys
    losses = []
    for number, path in enumerate((output, output / "run.safetensors")):
        again = run(**kwargs, output_dir=tmp_path / f"again-{number}", transformer_path=path)
        losses.append(metrics(again)[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("image_dim", "expected"), [(1280, 16.40e9), (None, 14.29e9)])
def test_lora_of_the_published_models(flags, image_dim, expected):
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_layers=40,
            num_attention_heads=40,
            attention_head_dim=128,
            ffn_dim=13824,
            in_channels=36,
            out_channels=16,
            image_dim=image_dim,
            added_kv_proj_dim=5120 if image_dim else None,
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        train_ltd.add_lora(model, train_ltd.parse_args(flags(rank=32, lora_alpha=32)))
    adapted = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert parameters == pytest.approx(expected, rel=5e-3)
    assert sum(p.numel() for p in adapted.values()) == pytest.approx(153.4e6, rel=5e-3)
    assert len(adapted) == 2 * 10 * 40


# --- Refused ---------------------------------------------------------------------------------------------------------


def test_flags_of_a_first_frame_that_the_model_does_not_take(run, families, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    cases = [
        ({"first_frame_share": 0.5}, "takes no image; take TI2V-5B"),
        (families["i2v"] | {"first_frame_share": 0.5}, "is given the first frame of all clips; leave the flag out"),
        (
            {"validation_prompt": "a", "validation_image": tmp_path / "a.png"},
            "is trained from text here; take an I2V model",
        ),
        (families["i2v"] | {"validation_image": tmp_path / "a.png"}, "there are 1 for 0"),
        (
            families["i2v"] | {"validation_prompt": "a", "validation_image": tmp_path / "b.png"},
            r"--validation_image .*b\.png does not exist",
        ),
        (families["i2v"] | {"num_frames": 1}, "learns nothing from it; try 5"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            run(**kwargs, cache_dir=tmp_path / "none")
    assert not encoded(tmp_path / "none")


def test_unreadable_picture_is_named_before_anything_is_encoded(run, families, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"the picture .*a\.png cannot be read"):
        kwargs = {"validation_prompt": "a", "validation_image": tmp_path / "a.png", "cache_dir": tmp_path / "none"}
        run(**families["i2v"], **kwargs)
    assert not encoded(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "FLF2V's pos_embed_seq_len"),
        ("transformer/config.json", {"in_channels": 16}, "16 in_channels, where I2V has 36"),
        ("transformer/config.json", {"in_channels": 52}, "52 in_channels, where I2V has 36"),  # Fun, with control
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "the class WanVACEPipeline"),
        ("model_index.json", {"_class_name": "WanAnimatePipeline"}, "the class WanAnimatePipeline"),
        ("model_index.json", {"_class_name": "WanSpeechToVideoPipeline"}, "the class WanSpeechToVideoPipeline"),
    ],
)
def test_other_models_are_refused_by_name(run, tiny_i2v, tmp_path, file, change, message):
    shutil.copytree(tiny_i2v, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"is no Wan model that this script trains.*{message}"):
        run(pretrained_model_name_or_path=tmp_path / "model", cache_dir=tmp_path / "none")
    assert not encoded(tmp_path / "none")


@pytest.mark.parametrize(
    ("base", "key", "message"),
    [
        ("i2v", "head.modulation", "it has no img_emb"),
        ("i2v", "img_emb.emb_pos", "the key img_emb.emb_pos"),
        ("i2v", "pose_patch_embedding.weight", "the key pose_patch_embedding"),
        ("high", "blocks.0.cross_attn.k_img.weight", "the key blocks.0.cross_attn.k_img"),
    ],
)
def test_single_file_of_another_model_is_refused(run, families, tmp_path, base, key, message):
    save_file({key: torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**families[base], transformer_path=tmp_path / "other.safetensors")


# --- examples/generate.py --------------------------------------------------------------------------------------------


def generate_line(family: dict, output: Path) -> list[str]:
    line = ["--preset=nano", f"--pretrained_model_name_or_path={family['pretrained_model_name_or_path']}"]
    line += [f"--{name}={value}" for name, value in size_of(family).items()]
    return [*line, f"--num_frames={NUM_FRAMES}", "--num_inference_steps=4", f"--output_dir={output}"]


@pytest.mark.parametrize("name", ["i2v", "high", "5b"])
def test_generate_starts_from_a_picture(families, tmp_path, monkeypatch, name):
    """Each prompt from its own: what the stock pipeline makes of them; and the record knows the pictures."""
    family = families[name]
    pictures = [picture_of(moving_frames(family)), picture_of(moving_frames(family).flip(0))]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    videos = []
    sample = generate.sample
    monkeypatch.setattr(generate, "sample", lambda *args: videos.append(sample(*args)) or videos[-1])
    line = generate_line(family, tmp_path / "videos")
    line += [f"--image={tmp_path / '0.png'}", f"--image={tmp_path / '1.png'}", "--prompt=a square", "--prompt=a dog"]
    generate.main(generate.parse_args(line))
    record = json.loads((tmp_path / "videos/generation.json").read_text())["videos"]
    pipeline = stock_pipeline(family)
    for number, (entry, made) in enumerate(zip(record.values(), videos, strict=True)):
        assert entry["image"].startswith(f"{number} {number}.png ")
        expected = pipeline(
            pictures[number],
            entry["prompt"],
            negative_prompt="",
            num_frames=NUM_FRAMES,
            num_inference_steps=4,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(entry["seed"]),
            **size_of(family),
        ).frames[0]
        assert np.abs(made[0] - expected).max() < 1e-4

    pictures[1].save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="was made otherwise"):
        generate.main(generate.parse_args(line))


def test_generate_refuses_pictures_that_do_not_fit(families, tiny_wan, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    image = f"--image={tmp_path / 'a.png'}"
    text = {"pretrained_model_name_or_path": tiny_wan}
    cases = [
        (families["i2v"], [], "--image: .* starts from a picture; give one"),
        (text, [image], "--image: .* takes none"),
        (families["i2v"], [image, image, "--prompt=b", "--prompt=c"], "2 pictures for 3 prompts"),
        (families["i2v"], [image, "--batch_size=2"], "--image goes with --batch_size 1"),
        (families["i2v"], ["--image=nothing.png"], "--image nothing.png: no such file"),
    ]
    for family, flags, message in cases:
        with pytest.raises(ValueError, match=message):
            generate.main(generate.parse_args([*generate_line(family, tmp_path / "out"), "--prompt=a", *flags]))
