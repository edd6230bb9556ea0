"""examples/benchmark/small_wan.py: the small pipelines are what the stock pipeline samples with, in all forms."""

import json
from pathlib import Path

import pytest
import small_wan
import torch
from diffusers import WanPipeline
from helpers import assert_same
from safetensors.torch import load_file
from transformers import CLIPVisionModel


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Function that builds the tiny pipeline in a form, by the command line, once."""
    built = {}

    def function(form: str) -> Path:
        if form not in built:
            built[form] = tmp_path_factory.mktemp("models") / form
            command = ["--preset=tiny", f"--form={form}", f"--output_dir={built[form]}"]
            small_wan.main(small_wan.parse_args(command))
        return built[form]

    return function


class Calls:
    """What the transformers of a pipeline are given while it samples, by hooks."""

    def __init__(self, pipeline: WanPipeline):
        self.seen = []
        for name in ("transformer", "transformer_2"):
            model = getattr(pipeline, name)
            if model is not None:
                model.register_forward_pre_hook(self.hook(name), with_kwargs=True)

    def hook(self, name: str):
        def function(module, args, kwargs):
            self.seen.append((name, kwargs["timestep"], kwargs["hidden_states"].shape))

        return function


def sample(path: Path, **kwargs) -> tuple[torch.Tensor, list]:
    """Let the stock pipeline make 9 frames in 5 steps; returns `(F, 3, H, W)` and what its transformers were given."""
    pipeline = WanPipeline.from_pretrained(path)
    calls = Calls(pipeline)
    video = pipeline(
        "a red square moves",
        num_frames=9,
        num_inference_steps=5,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **kwargs,
    ).frames[0]
    return video, calls.seen


def test_two_experts_share_the_noise_at_the_boundary(build):
    path = build("a14b")
    video, calls = sample(path, height=32, width=48)
    assert video.shape == (9, 3, 32, 48) and video.isfinite().all()
    used = [(name, float(timestep)) for name, timestep, _ in calls]
    assert [name for name, t in used] == ["transformer" if t >= 875 else "transformer_2" for _, t in used]
    assert {name for name, _ in used} == {"transformer", "transformer_2"}
    index = json.loads((path / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875 and index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    weights = []
    for name in ("transformer", "transformer_2"):
        weights.append(load_file(path / name / "diffusion_pytorch_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert not torch.equal(weights[0]["proj_out.weight"], weights[1]["proj_out.weight"])
    # The first one is that of the same preset with a single transformer.
    assert_same(weights[0], load_file(build("wan2.1") / "transformer/diffusion_pytorch_model.safetensors"))


def test_5b_form_has_the_other_vae_and_a_timestep_a_token(build):
    path = build("5b")
    video, calls = sample(path, height=64, width=96)
    assert video.shape == (9, 3, 64, 96) and video.isfinite().all()
    assert len(calls) == 5
    for name, timestep, shape in calls:
        assert name == "transformer"
        assert shape == (1, 48, 3, 4, 6)  # 16 x 16 pixels and 4 frames are a latent
        assert timestep.shape == (1, 3 * 2 * 3) and (timestep == timestep[0, 0]).all()
    vae = json.loads((path / "vae/config.json").read_text())
    known = {"z_dim": 48, "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16, "in_channels": 12}
    assert {key: vae[key] for key in known} == known
    assert len(vae["latents_mean"]) == len(vae["latents_std"]) == 48
    assert json.loads((path / "model_index.json").read_text())["expand_timesteps"] is True
    assert json.loads((path / "scheduler/scheduler_config.json").read_text())["flow_shift"] == 5.0


def test_wan21_form_has_neither(build):
    path = build("wan2.1")
    _, calls = sample(path, height=32, width=48)
    assert [shape for _, _, shape in calls] == [(1, 16, 3, 4, 6)] * 5
    index = json.loads((path / "model_index.json").read_text())
    assert (index["transformer_2"], index["boundary_ratio"], index["expand_timesteps"]) == ([None, None], None, False)
    assert not (path / "transformer_2").exists()


def test_i2v_forms_take_an_image(build):
    """The first with CLIP's 257 tokens, the second with two experts that change at 0.9."""
    for form, has_clip in (("i2v-14b", True), ("i2v-a14b", False)):
        path = build(form)
        config = json.loads((path / "transformer/config.json").read_text())
        assert (config["in_channels"], config["out_channels"]) == (36, 16)
        assert (config["image_dim"] is not None, (path / "image_encoder").is_dir()) == (has_clip, has_clip)
        assert (path / "transformer_2").is_dir() != has_clip
        index = json.loads((path / "model_index.json").read_text())
        assert index["_class_name"] == "WanImageToVideoPipeline"
        assert index["boundary_ratio"] == (None if has_clip else 0.9)
    clip = CLIPVisionModel.from_pretrained(build("i2v-14b") / "image_encoder")
    pixels = torch.zeros(1, 3, 224, 224)
    assert clip(pixels, output_hidden_states=True).hidden_states[-2].shape[1] == 257
