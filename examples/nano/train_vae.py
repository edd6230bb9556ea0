"""Train the nano Wan's VAE from scratch on sprite clips rendered on the fly: a stock `AutoencoderKLWan`.

    python examples/nano/train_vae.py --output_dir examples/nano/wan-nano/vae --checkpoint_dir outputs/vae

Two CPU cores reach a useful model in an hour or two. Stopping at any time (also kill -9) is safe: the same command
goes on from the last checkpoint with the clips that would have come. `--output_dir` always holds the best weights so
far. When no checkpoint was kept, `--pretrained_vae examples/nano/wan-nano/vae --short_steps 0` trains the shipped
weights further.

What makes it quick:
- Wan2.2's layout: pixels folded 2 x 2 into channels before the first convolution, and averaging shortcuts around every
  level, so that the network starts as a nearly linear autoencoder;
- a posterior that starts almost without noise (unit noise at the start stalls training for a long time);
- a loss on unclamped pixels (`decode` clamps to [-1, 1], where gradients vanish);
- the first frame and all the others as two chunks, not one chunk per latent frame: equal, and faster.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock, patchify, unpatchify
from sprites import clip_spec, render_clip

logger = logging.getLogger("train_vae")

EVALUATION_CLIPS = 8  # of each mix while training
FINAL_CLIPS = 64  # of each mix at the end
STATISTICS_CLIPS = 256  # training clips behind latents_mean and latents_std
QUICK_STATISTICS_CLIPS = 32  # the same, for the models saved on the way
SHORT_FRAMES = 9  # three latent frames
# Seeds of the `train` split below this one are left to the diffusion model's data sets.
VAE_DATA_SEED = 1000


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="examples/nano/wan-nano/vae", help="the best model so far, float16")
    parser.add_argument("--checkpoint_dir", default="outputs/nano-vae", help="optimizer state and the log")
    parser.add_argument("--pretrained_vae", help="start from these weights instead of from scratch")
    parser.add_argument("--base_dim", type=int, default=16, help="channels at half resolution")
    parser.add_argument("--decoder_base_dim", type=int, default=None)
    parser.add_argument("--dim_mult", type=int, nargs="+", default=[1, 4, 4], help="channels of each level / base_dim")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--short_steps", type=int, default=500, help="steps on short windows before whole clips")
    parser.add_argument("--train_batch_size", type=int, default=1, help="whole clips a step; four times as many short")
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--l1_weight", type=float, default=0.2, help="of the absolute error, beside the squared one")
    parser.add_argument("--kl_weight", type=float, default=3e-5)
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--max_grad_norm", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluation_steps", type=int, default=250)
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--max_minutes", type=float, default=math.inf, help="stop (resumably) after so long")
    return parser.parse_args(input_args)


# ------------------------------------------------------------------------------------------------ data


def render_batch(seed, split, start, count, num_frames=None):
    """Clips `start ... start + count - 1` as float32 `(B, 3, F, H, W)` in [-1, 1], calm and dynamic in turn.

    With `num_frames` every clip is cut to a random window of that many frames.
    """
    clips = []
    for index in range(start, start + count):
        frames, _ = render_clip(clip_spec(("calm", "dynamic")[index % 2], seed, split, index // 2))  # (F, H, W, 3)
        if num_frames is not None:
            first = np.random.default_rng([seed, index]).integers(0, len(frames) - num_frames + 1)
            frames = frames[first : first + num_frames]
        clips.append(torch.from_numpy(frames).permute(3, 0, 1, 2))
    return torch.stack(clips).float() / 127.5 - 1


def training_batch(step, args):
    """The clips of one step: many short windows while the network learns to draw, then whole clips.

    Four windows cost as much as one clip and are a better sample. But the causal convolutions look further back than
    a window is long: trained on windows only, a model of 30 dB on 9 frames had 15 dB on the 20th.
    """
    short = step < args.short_steps
    count = args.train_batch_size * (4 if short else 1)
    start = step * 4 * args.train_batch_size
    return render_batch(VAE_DATA_SEED + args.seed, "train", start, count, SHORT_FRAMES if short else None)


# ------------------------------------------------------------------------------------------------ model


def build_vae(args):
    """A small `AutoencoderKLWan` with /8 in space and /4 in time, its first steps almost linear and noiseless."""
    vae = AutoencoderKLWan(
        base_dim=args.base_dim, decoder_base_dim=args.decoder_base_dim, z_dim=16, dim_mult=args.dim_mult,
        num_res_blocks=1, temperal_downsample=[True, True], is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_temporal=4, scale_factor_spatial=8, latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    )  # fmt: skip
    for module in vae.modules():
        # Residual branches start at zero.
        last = {WanResidualBlock: "conv2", WanAttentionBlock: "proj"}.get(type(module))
        if last is not None:
            torch.nn.init.zeros_(getattr(module, last).weight)
            torch.nn.init.zeros_(getattr(module, last).bias)
        # Twice as fast on a CPU as the default layout.
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    torch.nn.init.zeros_(vae.quant_conv.weight[16:])
    torch.nn.init.constant_(vae.quant_conv.bias[16:], -5.0)  # log variance: noise of 0.08 at the start
    return vae


def encode_moments(vae, video):
    """Posterior mean and log variance, both `(B, 16, 1 + (F - 1) / 4, H / 8, W / 8)`, as `vae.encode` has them."""
    patches = patchify(video, vae.config.patch_size)
    vae.clear_cache()
    chunks = []
    for chunk in (patches[:, :, :1], patches[:, :, 1:]):
        vae._enc_conv_idx = [0]
        if chunk.shape[2]:
            chunks.append(vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    moments = vae.quant_conv(torch.cat(chunks, dim=2))
    vae.clear_cache()
    return moments.chunk(2, dim=1)


def decode_unclamped(vae, latents):
    """Pixels `(B, 3, F, H, W)` as `vae.decode` has them, but for its clamp to [-1, 1]."""
    hidden = vae.post_quant_conv(latents)
    vae.clear_cache()
    chunks = []
    for chunk in (hidden[:, :, :1], hidden[:, :, 1:]):
        vae._conv_idx = [0]
        if chunk.shape[2]:
            first = not chunks
            chunks.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=first))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, dim=2), vae.config.patch_size)


# ------------------------------------------------------------------------------------------------ objective


def training_loss(vae, video, args, generator):
    """Reconstruction plus a small Kullback-Leibler term; returns the loss and its parts for the log."""
    with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        mean, log_variance = (moment.float() for moment in encode_moments(vae, video))
        log_variance = log_variance.clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=generator)
        restored = decode_unclamped(vae, mean + (0.5 * log_variance).exp() * noise)
    error = restored.float() - video
    mse, mae = error.square().mean(), error.abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = mse + args.l1_weight * mae + args.kl_weight * kl
    parts = {"mse": mse, "mae": mae, "kl": kl, "noise": (0.5 * log_variance).exp().mean()}
    return loss, {key: value.item() for key, value in parts.items()}


def learning_rate(step, args):
    """Linear warm-up, then a cosine to one hundredth."""
    if step < args.lr_warmup_steps:
        return args.learning_rate * (step + 1) / args.lr_warmup_steps
    progress = min(1.0, (step - args.lr_warmup_steps) / max(1, args.steps - args.lr_warmup_steps))
    return args.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def update_ema(average, vae, step, decay):
    """Average of the weights; a short memory at first, so that it does not remember the random start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def held_out_psnr(vae, count):
    """Mean PSNR in dB over `count` whole held-out clips of each mix, `{"calm": ..., "dynamic": ...}`.

    From the posterior's mode and clamped as `vae.decode` does it; the mean is over the clips' own PSNR.
    """
    values = {"calm": [], "dynamic": []}
    for index in range(2 * count):
        video = render_batch(0, "heldout", index, 1)
        restored = decode_unclamped(vae, encode_moments(vae, video)[0]).clamp(-1, 1)
        psnr = -10 * torch.log10((restored - video).square().mean() / 4)
        values[("calm", "dynamic")[index % 2]].append(psnr.item())
    return {mix: float(np.mean(psnrs)) for mix, psnrs in values.items()}


@torch.no_grad()
def latent_statistics(vae, count):
    """Mean and standard deviation of each latent channel over training clips, two lists of 16."""
    latents = [encode_moments(vae, render_batch(VAE_DATA_SEED, "train", i, 1))[0] for i in range(count)]
    latents = torch.cat(latents).transpose(0, 1).flatten(1)  # (C, voxels)
    return latents.mean(dim=1).tolist(), latents.std(dim=1).tolist()


def save_model(vae, output_dir, statistics_clips):
    """Write float16 weights and the measured `latents_mean` / `latents_std`."""
    mean, std = latent_statistics(vae, statistics_clips)
    half = AutoencoderKLWan.from_config({**vae.config, "latents_mean": mean, "latents_std": std})
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(output_dir)


# ------------------------------------------------------------------------------------------------ state


def save_checkpoint(path, state):
    """Write beside, then rename: a checkpoint exists only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def append_log(path, record):
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------ main


def main(args):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = Path(args.checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Model, its running average, optimizer
    torch.manual_seed(args.seed)
    vae = build_vae(args)
    if args.pretrained_vae:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(args.pretrained_vae).state_dict())
    average = AutoencoderKLWan.from_config(vae.config).requires_grad_(False)
    average.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    logger.info("%.2f M parameters", sum(p.numel() for p in vae.parameters()) / 1e6)

    # 2. Go on where the last run stopped
    step, seconds = 0, 0.0
    # A model that is already there is replaced by a better one only.
    best = min(held_out_psnr(vae, EVALUATION_CLIPS).values()) if args.pretrained_vae else 0.0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, best = state["step"], state["seconds"], state["best"]
        logger.info("resumed at step %d after %.0f s", step, seconds)

    # 3. Training
    began, last = time.monotonic(), time.monotonic()
    while step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        video = training_batch(step, args)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        loss, parts = training_loss(vae, video, args, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), args.max_grad_norm).item()
        optimizer.step()
        update_ema(average, vae, step, args.ema_decay)
        step += 1
        seconds, last = seconds + time.monotonic() - last, time.monotonic()
        if step % 25 == 0:
            append_log(folder / "log.jsonl", {"step": step, "seconds": seconds, "grad_norm": norm, **parts})

        # Once in a while: held-out PSNR, and the best model so far where users find it
        if step % args.evaluation_steps == 0 or step == args.steps:
            psnr = held_out_psnr(average, EVALUATION_CLIPS)
            append_log(folder / "log.jsonl", {"step": step, "seconds": seconds, "psnr": psnr})
            logger.info("step %d, %.0f s, held-out PSNR %.2f dB calm, %.2f dB dynamic", step, seconds, *psnr.values())
            if min(psnr.values()) > best + 0.5:
                best = min(psnr.values())
                save_model(average, args.output_dir, QUICK_STATISTICS_CLIPS)
            last = time.monotonic()
        stopping = time.monotonic() - began > 60 * args.max_minutes
        if step % args.checkpointing_steps == 0 or step == args.steps or stopping:
            save_checkpoint(checkpoint, {
                "vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step, "seconds": seconds, "best": best,
            })  # fmt: skip
        if stopping:
            logger.info("stopped at step %d; the same command goes on", step)
            return

    # 4. The result
    save_model(average, args.output_dir, STATISTICS_CLIPS)
    psnr = held_out_psnr(AutoencoderKLWan.from_pretrained(args.output_dir), FINAL_CLIPS)
    append_log(folder / "log.jsonl", {"step": step, "seconds": seconds, "final_psnr": psnr, "arguments": vars(args)})
    logger.info("final, %d clips a mix: %.2f dB calm, %.2f dB dynamic", FINAL_CLIPS, *psnr.values())


if __name__ == "__main__":
    main(parse_args())
