"""Build a complete Wan pipeline that is small enough for a laptop CPU, without any download.

The classes are the real ones (`WanPipeline` and everything in it), so whatever runs on this folder runs on
`Wan-AI/Wan2.1-T2V-1.3B-Diffusers` too. Only the sizes differ, and the weights are random.

    python examples/benchmark/small_wan.py --output_dir small-wan --preset small --train_vae_data clips

`--train_vae_data` fits the VAE to a folder of clips for two minutes, on small crops, so that latents mean something
and samples can be looked at. The clips it is fitted to are the demo's own and only ones: how well it reconstructs them
says nothing about other videos. The transformer and the text encoder stay random.

`--preset 1.3b` has the true shape of Wan2.1-T2V-1.3B with random weights (about 6 GB), to try memory, speed, saving
and resuming on a GPU without a download.

`--form a14b` makes a pipeline of two experts, as Wan2.2-T2V-A14B is one; `--form 5b` one with the VAE of 48 channels
and 16x16 pixels and the timestep a token of Wan2.2-TI2V-5B. `--form i2v-14b` is image-to-video as Wan2.1 has it, with
CLIP, and `--form i2v-a14b` as Wan2.2 has it, with two experts. Sizes are the preset's.
"""

import argparse
import json
import math
import string
import sys
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock, patchify, unpatchify
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

ROOT = Path(__file__).resolve().parents[2]
# train_ltd.py is a script in the repository's root, and examples/ is folders of scripts: neither is a package.
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from videos import describe_video

import train_ltd

PRESETS = {
    # For tests: the whole folder is below 0.5 MB and a forward pass takes milliseconds.
    "tiny": {
        "base_dim": 3,
        "dim_mult": (1, 1, 1, 1),
        "text_dim": 32,
        "clip_dim": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "freq_dim": 32,
        "rope_max_seq_len": 32,
    },
    # The VAE works on patches of 2x2 pixels, as that of Wan2.2, which makes it four times as fast.
    "small": {
        "base_dim": 16,
        "dim_mult": (1, 2, 2),
        "patch_size": 2,
        "text_dim": 64,
        "num_layers": 6,
        "num_attention_heads": 4,
        "attention_head_dim": 36,
        "ffn_dim": 512,
        "freq_dim": 256,
        "rope_max_seq_len": 128,
    },
    "1.3b": {
        "base_dim": 96,
        "dim_mult": (1, 2, 4, 4),
        "num_res_blocks": 2,
        "text_dim": 4096,
        "clip_dim": 1280,
        "num_layers": 30,
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "freq_dim": 256,
        "rope_max_seq_len": 1024,
    },
}
# What makes another model of the family of a preset; the shifts are those of the published pipelines
FORMS = {
    "wan2.1": {},
    "a14b": {"boundary_ratio": 0.875},
    "i2v-14b": {"image_to_video": True, "image_encoder": True},
    "i2v-a14b": {"image_to_video": True, "boundary_ratio": 0.9},
    "5b": {"z_dim": 48, "dim_mult": (1, 1, 2, 2), "patch_size": 2, "expand_timesteps": True, "flow_shift": 5.0},
}
# Of the demo on real clips
HEIGHT = 96
WIDTH = 160
NUM_FRAMES = 17

WORDS = """a an and are at away back behind beside big black blue bright brown by camera car city close closer colour
dark day down face fast field for forest from front grass gray green hand hands he head her his in into is it large
left light long looks man motion move moves moving near night of off old on one out over past person red right road
room scene shot she sits sky slow slowly small stands street sun talks the their they through to toward tree trees
turns two under up video view walks water white wind window with woman yellow young""".split()


def parse_args(input_args=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder of the new pipeline.")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="Sizes of the models.")
    parser.add_argument("--form", choices=FORMS, default="wan2.1", help="Model of the family to build like.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_vae_data", help="Folder of clips with a metadata.jsonl to fit the VAE to.")
    parser.add_argument("--vae_steps", type=int, default=800, help="Steps of that fit.")
    return parser.parse_args(input_args)


def build_tokenizer(words=WORDS):
    """Build a `T5Tokenizer` of common `words`, then single characters, so that no English caption is unknown."""
    endings = ("ing", "ed", "er", "es", "ly", "th", "an", "on", "re", "in")
    accents = [chr(code) for code in (0xB0, *range(0xC0, 0x180))]
    dashes_and_quotes = [chr(code) for code in range(0x2010, 0x2027)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    for word in dict.fromkeys(words):
        if len(word) > 1:
            vocab.append((f"▁{word}", -5.0))
    for ending in endings:
        vocab.append((ending, -6.0))
    for character in (*string.printable[:94], *accents, *dashes_and_quotes):
        vocab.append((character, -8.0))
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def build_text_encoder(vocab_size, text_dim):
    """Build a random `UMT5EncoderModel`; its last norm gives every token embedding a root mean square of 1."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=text_dim,
        d_kv=text_dim // 2,
        d_ff=2 * text_dim,
        num_heads=2,
        num_layers=1,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config).eval()


def build_image_encoder(clip_dim):
    """Build a random `CLIPVisionModel` of as many tokens as Wan2.1 I2V's, 257, of width `clip_dim`, in two layers."""
    config = CLIPVisionConfig(
        hidden_size=clip_dim,
        intermediate_size=2 * clip_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval()


def smooth_videos(batch_size=4, num_frames=9, height=64, width=64):
    """Draw random smooth videos in [-1, 1], `(batch_size, 3, num_frames, height, width)` float32."""
    coarse = torch.randn(batch_size, 3, 3, 5, 5)
    return F.interpolate(coarse, size=(num_frames, height, width), mode="trilinear").tanh()


@torch.no_grad()
def measure_latents(vae, videos):
    """Write the latents' mean and std per channel over `videos`, each `(B, 3, F, H, W)`, to the VAE's config."""
    latents = []
    for pixels in videos:
        encoded = vae.encode(pixels).latent_dist.mode()  # (B, C, F, H, W)
        latents.append(encoded.transpose(0, 1).flatten(1))
    latents = torch.cat(latents, dim=1)  # (C, voxels of all videos)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


def build_small_wan(
    path,
    *,
    base_dim=16,
    decoder_base_dim=None,
    z_dim=16,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=1,
    patch_size=None,
    text_dim=64,
    clip_dim=64,
    image_encoder=False,
    image_to_video=False,
    num_layers=6,
    num_attention_heads=4,
    attention_head_dim=36,
    ffn_dim=512,
    freq_dim=256,
    rope_max_seq_len=128,
    boundary_ratio=None,
    expand_timesteps=False,
    flow_shift=3.0,
    seed=0,
    vae_videos=None,
    vae_steps=800,
):
    """Save a `WanPipeline`, or a `WanImageToVideoPipeline`, with random weights to the folder `path`.

    Args:
        path (`str` or `Path`): The folder; `from_pretrained(path)` of the pipeline's class loads it.
        base_dim, decoder_base_dim, z_dim, dim_mult, num_res_blocks, patch_size: The VAE, always 4x in time. With a
            `patch_size` it is of Wan2.2's kind: on patches of pixels, with residual branches around its stages.
        text_dim (`int`): Width of the text encoder, hence of the prompt embeddings.
        clip_dim (`int`), image_encoder (`bool`): Width of CLIP, and whether there is one.
        image_to_video (`bool`): Whether the transformer takes an image, by more channels.
        num_layers, num_attention_heads, attention_head_dim, ffn_dim, freq_dim, rope_max_seq_len: The transformer.
        boundary_ratio (`float`, *optional*): Share of the noise from which on `transformer` samples; below it
            `transformer_2` does, which has weights of its own.
        expand_timesteps (`bool`): Whether the pipeline gives each token a timestep.
        flow_shift (`float`): Of the pipeline's scheduler.
        seed (`int`): Same seed, same weights. The caller's random state is left alone.
        vae_videos (`list[torch.Tensor]`, *optional*): Videos `(3, F, H, W)` in [-1, 1] to fit the VAE to.
        vae_steps (`int`): Steps of that fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = build_text_encoder(len(tokenizer), text_dim)
        channels = 3 * (patch_size or 1) ** 2
        vae = AutoencoderKLWan(
            base_dim=base_dim,
            decoder_base_dim=decoder_base_dim,
            z_dim=z_dim,
            dim_mult=list(dim_mult),
            num_res_blocks=num_res_blocks,
            temperal_downsample=[False, True, True][1 - len(dim_mult) :],
            is_residual=patch_size is not None,
            patch_size=patch_size,
            in_channels=channels,
            out_channels=channels,
            scale_factor_spatial=2 ** (len(dim_mult) - 1) * (patch_size or 1),
        ).eval()
        if vae_videos:
            fit_vae(vae, vae_videos, vae_steps)
            measure_latents(vae, [video[None] for video in vae_videos])
        else:
            measure_latents(vae, [smooth_videos()])
        in_channels = z_dim
        if image_to_video:
            in_channels = 2 * z_dim + 4  # the noisy latents, a mask, and the condition
        image_shape = {}
        if image_encoder:
            image_shape = {"image_dim": clip_dim, "added_kv_proj_dim": num_attention_heads * attention_head_dim}
        transformer = WanTransformer3DModel(
            in_channels=in_channels,
            out_channels=z_dim,
            **image_shape,
            text_dim=text_dim,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            ffn_dim=ffn_dim,
            freq_dim=freq_dim,
            rope_max_seq_len=rope_max_seq_len,
        )
        transformer_2 = None
        if boundary_ratio:
            transformer_2 = WanTransformer3DModel.from_config(transformer.config)
        image_components = {}
        if image_encoder:
            image_components["image_encoder"] = build_image_encoder(clip_dim)
            # Its import warns without torchvision, as does that of the pipeline below.
            image_components["image_processor"] = transformers.CLIPImageProcessor()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    pipeline_class = WanPipeline
    if image_to_video:
        pipeline_class = diffusers.WanImageToVideoPipeline
    pipeline = pipeline_class(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
        transformer_2=transformer_2,
        **image_components,
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
    )
    pipeline.save_pretrained(path)


def read_videos(folder):
    """Read the clips that a `metadata.jsonl` names: each `(3, F, HEIGHT, WIDTH)` in [-1, 1], with F = 4k+1."""
    videos = []
    for line in Path(folder, "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        path = Path(folder, json.loads(line)["file_name"])
        header = describe_video(path)
        usable = (header["frames"] - 1) // 4 * 4 + 1
        clips, _ = train_ltd.read_clip(str(path), (usable, HEIGHT, WIDTH), float(header["fps"]))
        videos.append(clips[0].transpose(0, 1) / 127.5 - 1)
    return videos


@torch.no_grad()
def start_linear(vae, gain=3.0, noise=0.1):
    """Initialize a VAE of equal widths' ends as a linear map with small residual branches: it learns in minutes."""
    for module in vae.modules():
        last = None
        if isinstance(module, WanResidualBlock):
            last = module.conv2
        elif isinstance(module, WanAttentionBlock):
            last = module.proj
        if last is not None:
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    # A large constant before the last norm makes that norm nearly linear in all else.
    for block in (vae.encoder.mid_block.resnets[-1], vae.decoder.up_blocks[-1].resnets[-1]):
        block.conv2.bias.fill_(gain)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.zeros_(conv.bias)
        conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None, None])
    z_dim = vae.config.z_dim
    width = vae.encoder.conv_out.weight.shape[1]
    basis = torch.linalg.qr(torch.randn(width, z_dim))[0].T  # (z_dim, width), orthonormal rows
    no_variance = torch.zeros_like(basis)
    set_linear(vae.encoder.conv_in, torch.eye(*vae.encoder.conv_in.weight.shape[:2]), noise)
    set_linear(vae.encoder.conv_out, torch.cat([basis * gain, no_variance]), noise)
    set_linear(vae.decoder.conv_in, basis.T, noise)
    set_linear(vae.decoder.conv_out, torch.eye(*vae.decoder.conv_out.weight.shape[:2]) * gain, noise)


def set_linear(conv, matrix, noise):
    """Make a convolution the linear map `matrix` `(out, in)` of each voxel, plus a little of what it was, in place."""
    conv.weight.mul_(noise)
    conv.weight[:, :, -1, 1, 1] += matrix
    torch.nn.init.zeros_(conv.bias)


def reconstruct(vae, videos, noise):
    """Encode, add a little noise, and decode videos `(B, 3, F, H, W)`; returns pixels and latents.

    Not by `vae.decode`, whose clamp has no gradient.
    """
    patch_size = vae.config.patch_size
    vae.clear_cache()
    latents = []
    for part in patchify(videos, patch_size).split([1, videos.shape[2] - 1], dim=2):
        vae._enc_conv_idx = [0]
        latents.append(vae.encoder(part, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    latents = vae.quant_conv(torch.cat(latents, dim=2))[:, : vae.config.z_dim]
    hidden = vae.post_quant_conv(latents + noise * torch.randn_like(latents))
    vae.clear_cache()
    frames = []
    for part in hidden.split([1, hidden.shape[2] - 1], dim=2):
        vae._conv_idx = [0]
        first_chunk = not frames
        frames.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=first_chunk))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), patch_size), latents


def random_crop(video, num_frames, crop):
    """Cut a random part `(3, num_frames, crop, crop)` out of a video `(3, F, H, W)`."""
    for dim, length in ((1, num_frames), (2, crop), (3, crop)):
        room = video.shape[dim] - length
        start = int(torch.randint(room + 1, ()))
        video = video.narrow(dim, start, length)
    return video


def fit_vae(vae, videos, steps, batch_size=2, num_frames=9, crop=64, learning_rate=3e-3, warmup=30):
    """Fit the VAE to random crops of `videos`, each `(3, F, H, W)`, in place; ends with averaged weights."""
    start_linear(vae)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # twice as fast on a CPU
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    ema = EMAModel(vae.parameters(), decay=0.99)
    bar = tqdm(range(steps), desc="fitting the VAE")
    for _ in bar:
        batch = []
        for index in torch.randint(len(videos), (batch_size,)).tolist():
            batch.append(random_crop(videos[index], num_frames, crop))
        batch = torch.stack(batch)
        frames, latents = reconstruct(vae, batch, noise=0.05)
        error = frames - batch
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-4 * latents.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        bar.set_postfix(psnr=f"{decibel(error):.1f} dB")
    ema.copy_to(vae.parameters())


def decibel(error):
    """Return the PSNR in dB of an error of pixels in [-1, 1]."""
    return -10 * math.log10(error.square().mean().item() / 4)


@torch.no_grad()
def psnr(vae, videos):
    """Average over the clips the PSNR in dB of the whole reconstructed picture."""
    values = []
    for video in videos:
        latents = vae.encode(video[None]).latent_dist.mode()
        error = vae.decode(latents).sample[0] - video
        values.append(decibel(error))
    return sum(values) / len(values)


def main(args):
    """Build the pipeline, and tell how well a fitted VAE reconstructs."""
    videos = None
    if args.train_vae_data:
        videos = read_videos(args.train_vae_data)
    shape = PRESETS[args.preset] | FORMS[args.form]
    build_small_wan(args.output_dir, **shape, seed=args.seed, vae_videos=videos, vae_steps=args.vae_steps)
    print(f"Saved {Path(args.output_dir)}")
    if videos:
        vae = AutoencoderKLWan.from_pretrained(args.output_dir, subfolder="vae")
        value = psnr(vae, [video[:, :NUM_FRAMES] for video in videos])
        print(
            f"The VAE brings the first {NUM_FRAMES} frames of the clips that it was fitted to back with {value:.1f} dB"
        )


if __name__ == "__main__":
    train_ltd.run_script(main, parse_args)
