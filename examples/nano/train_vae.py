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
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResidualBlock,
    patchify,
    unpatchify,
)

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # mistakes.py: examples/ is folders of scripts, not a package

from mistakes import run_script
from sprites import clip_spec, render_clip

logger = logging.getLogger("train_vae")

MIXES = ("calm", "dynamic")  # in turn
EVALUATION_CLIPS = 8  # of each mix while training
FINAL_CLIPS = 64  # of each mix at the end
STATISTICS_CLIPS = 256  # training clips behind latents_mean and latents_std
QUICK_STATISTICS_CLIPS = 32  # the same, for the models saved on the way
SHORT_FRAMES = 9  # three latent frames
SHORT_PER_CLIP = 4  # short windows for a whole clip
LATENT_CHANNELS = 16
FIRST_LOG_VARIANCE = -5.0  # noise of 0.08 at the start
LOG_STEPS = 25
BETTER_BY = 0.5  # dB by which a model must be better to replace one that is kept
# Seeds of the `train` split below this one are left to the diffusion model's data sets.
VAE_DATA_SEED = 1000


def parse_args(input_args=None):
    """Parse the command line, or `input_args` instead of it."""
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
    """Render clips `start ... start + count - 1`, float32 `(B, 3, F, H, W)` in [-1, 1], calm and dynamic in turn.

    With `num_frames` every clip is cut to a random window of that many frames.
    """
    clips = []
    for index in range(start, start + count):
        mix = MIXES[index % 2]
        spec = clip_spec(mix, seed, split, index // 2)
        frames, _ = render_clip(spec)  # (F, H, W, 3)
        if num_frames is not None:
            rng = np.random.default_rng([seed, index])
            first = rng.integers(0, len(frames) - num_frames + 1)
            frames = frames[first : first + num_frames]
        clip = torch.from_numpy(frames).permute(3, 0, 1, 2)
        clips.append(clip)
    return torch.stack(clips).float() / 127.5 - 1


def training_batch(step, args):
    """Render the clips of one step: short windows while the network learns to draw, then whole clips.

    Four windows cost as much as one clip and are a better sample. But the causal convolutions look further back than
    a window is long: trained on windows only, a model of 30 dB on 9 frames had 15 dB on the 20th.
    """
    seed = VAE_DATA_SEED + args.seed
    most = SHORT_PER_CLIP * args.train_batch_size
    # Whole clips leave out most numbers, so that a step's clips do not depend on the phases before it.
    start = step * most
    if step < args.short_steps:
        return render_batch(seed, "train", start, most, SHORT_FRAMES)
    return render_batch(seed, "train", start, args.train_batch_size)


# ------------------------------------------------------------------------------------------------ model


def build_vae(args):
    """Build a small `AutoencoderKLWan` with /8 in space and /4 in time, at first almost linear and noiseless."""
    vae = AutoencoderKLWan(
        base_dim=args.base_dim,
        decoder_base_dim=args.decoder_base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=args.dim_mult,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    for module in vae.modules():
        # Residual branches start at zero.
        if isinstance(module, WanResidualBlock):
            set_to_zero(module.conv2)
        elif isinstance(module, WanAttentionBlock):
            set_to_zero(module.proj)
        # Twice as fast on a CPU as the default layout.
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    # The second half of the channels is the log variance.
    torch.nn.init.zeros_(vae.quant_conv.weight[LATENT_CHANNELS:])
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], FIRST_LOG_VARIANCE)
    return vae


def set_to_zero(layer):
    """Set the weights and the bias of a layer to zero."""
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)


def first_and_others(frames):
    """Split `(B, C, F, H, W)` into its first frame and, where there are any, all the others."""
    chunks = [frames[:, :, :1]]
    if frames.shape[2] > 1:
        chunks.append(frames[:, :, 1:])
    return chunks


def encode_moments(vae, video):
    """Return posterior mean and log variance as `vae.encode` has them.

    Both are `(B, 16, 1 + (F - 1) / 4, H / 8, W / 8)`.
    """
    patches = patchify(video, vae.config.patch_size)
    vae.clear_cache()
    encoded = []
    for chunk in first_and_others(patches):
        # The encoder counts its convolutions anew in every chunk, and keeps their last frames for the next.
        vae._enc_conv_idx = [0]
        hidden = vae.encoder(
            chunk,
            feat_cache=vae._enc_feat_map,
            feat_idx=vae._enc_conv_idx,
        )
        encoded.append(hidden)
    moments = vae.quant_conv(torch.cat(encoded, dim=2))
    vae.clear_cache()
    return moments.chunk(2, dim=1)


def decode_unclamped(vae, latents):
    """Return pixels `(B, 3, F, H, W)` as `vae.decode` has them, but for its clamp to [-1, 1]."""
    hidden = vae.post_quant_conv(latents)
    vae.clear_cache()
    decoded = []
    for number, chunk in enumerate(first_and_others(hidden)):
        vae._conv_idx = [0]
        patches = vae.decoder(
            chunk,
            feat_cache=vae._feat_map,
            feat_idx=vae._conv_idx,
            first_chunk=number == 0,
        )
        decoded.append(patches)
    vae.clear_cache()
    return unpatchify(torch.cat(decoded, dim=2), vae.config.patch_size)


# ------------------------------------------------------------------------------------------------ objective


def training_loss(vae, video, args, generator):
    """Return the loss, reconstruction plus a small Kullback-Leibler term, and its parts for the log."""
    with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        mean, log_variance = encode_moments(vae, video)
        mean = mean.float()
        log_variance = log_variance.float().clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=generator)
        deviation = (0.5 * log_variance).exp()
        restored = decode_unclamped(vae, mean + deviation * noise)
    error = restored.float() - video
    mse = error.square().mean()
    mae = error.abs().mean()
    divergence = mean.square() + log_variance.exp() - 1 - log_variance
    kl = 0.5 * divergence.mean()
    loss = mse + args.l1_weight * mae + args.kl_weight * kl
    parts = {
        "mse": mse.item(),
        "mae": mae.item(),
        "kl": kl.item(),
        "noise": deviation.mean().item(),
    }
    return loss, parts


def learning_rate(step, args):
    """Return the rate of a step: a linear warm-up, then a cosine to one hundredth."""
    if step < args.lr_warmup_steps:
        return args.learning_rate * (step + 1) / args.lr_warmup_steps
    decay_steps = max(1, args.steps - args.lr_warmup_steps)
    progress = min(1.0, (step - args.lr_warmup_steps) / decay_steps)
    cosine = 1 + math.cos(math.pi * progress)
    return args.learning_rate * (0.01 + 0.99 * 0.5 * cosine)


@torch.no_grad()
def update_ema(average, vae, step, decay):
    """Average the weights; with a short memory at first, so that the random start is soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    averages = list(average.parameters())
    weights = list(vae.parameters())
    torch._foreach_lerp_(averages, weights, 1 - decay)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def held_out_psnr(vae, count):
    """Return the mean PSNR in dB over `count` whole held-out clips of each mix, `{"calm": ..., "dynamic": ...}`.

    From the posterior's mode and clamped as `vae.decode` does it; the mean is over the clips' own PSNR.
    """
    values = {mix: [] for mix in MIXES}
    for index in range(2 * count):
        video = render_batch(0, "heldout", index, 1)
        mean, _ = encode_moments(vae, video)
        restored = decode_unclamped(vae, mean).clamp(-1, 1)
        mse = (restored - video).square().mean()
        psnr = -10 * torch.log10(mse / 4)  # pixels are 2 apart at most
        values[MIXES[index % 2]].append(psnr.item())
    return {mix: float(np.mean(psnrs)) for mix, psnrs in values.items()}


@torch.no_grad()
def latent_statistics(vae, count):
    """Return mean and standard deviation of each latent channel over training clips, two lists of 16."""
    latents = []
    for index in range(count):
        video = render_batch(VAE_DATA_SEED, "train", index, 1)
        mean, _ = encode_moments(vae, video)
        latents.append(mean)
    channels = torch.cat(latents).transpose(0, 1).flatten(1)  # (C, voxels)
    return channels.mean(dim=1).tolist(), channels.std(dim=1).tolist()


def save_model(vae, output_dir, statistics_clips):
    """Write float16 weights and the measured `latents_mean` and `latents_std`."""
    mean, std = latent_statistics(vae, statistics_clips)
    config = {**vae.config, "latents_mean": mean, "latents_std": std}
    half = AutoencoderKLWan.from_config(config)
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(output_dir)


# ------------------------------------------------------------------------------------------------ state


@dataclass
class TrainState:
    """Hold what a checkpoint restores besides the weights and the optimizer."""

    step: int = 0
    seconds: float = 0.0  # of training, evaluation left out
    best: float = 0.0  # dB: the lower of the two mixes' PSNR, of the model in `--output_dir`


def save_checkpoint(path, vae, average, optimizer, state):
    """Write beside, then rename: a checkpoint exists only when it is complete."""
    content = {
        "vae": vae.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "best": state.best,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def load_checkpoint(path, vae, average, optimizer):
    """Load weights and optimizer in place; return the `TrainState`."""
    content = torch.load(path, weights_only=True)
    vae.load_state_dict(content["vae"])
    average.load_state_dict(content["average"])
    optimizer.load_state_dict(content["optimizer"])
    return TrainState(content["step"], content["seconds"], content["best"])


def append_log(path, record):
    """Append a record to a file of JSON lines."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------ main


def train_step(vae, average, optimizer, step, args):
    """Take one step; return the gradient's norm and the parts of the loss, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    video = training_batch(step, args)
    # Seeded by the step, so that a resumed run draws the noise that it would have drawn.
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    loss, parts = training_loss(vae, video, args, generator)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), args.max_grad_norm)
    optimizer.step()
    update_ema(average, vae, step, args.ema_decay)
    return {"grad_norm": norm.item(), **parts}


def evaluate(average, state, log, args):
    """Measure the held-out PSNR, and put the best model so far where users find it."""
    psnr = held_out_psnr(average, EVALUATION_CLIPS)
    append_log(log, {"step": state.step, "seconds": state.seconds, "psnr": psnr})
    logger.info(
        "step %d, %.0f s, held-out PSNR %.2f dB calm, %.2f dB dynamic",
        state.step,
        state.seconds,
        psnr["calm"],
        psnr["dynamic"],
    )
    lower = min(psnr.values())
    if lower > state.best + BETTER_BY:
        state.best = lower
        save_model(average, args.output_dir, QUICK_STATISTICS_CLIPS)


def main(args):
    """Train from where the last run stopped to the end, or for `--max_minutes`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = Path(args.checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    checkpoint = folder / "checkpoint.pt"

    # 1. Model, its running average, optimizer
    torch.manual_seed(args.seed)
    vae = build_vae(args)
    if args.pretrained_vae:
        pretrained = AutoencoderKLWan.from_pretrained(args.pretrained_vae)
        vae.load_state_dict(pretrained.state_dict())
    average = AutoencoderKLWan.from_config(vae.config).requires_grad_(False)
    average.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(
        vae.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
    )
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    logger.info("%.2f M parameters", parameters / 1e6)

    # 2. Go on where the last run stopped
    state = TrainState()
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, vae, average, optimizer)
        logger.info("resumed at step %d after %.0f s", state.step, state.seconds)
    elif args.pretrained_vae:
        # A model that is already there is replaced by a better one only.
        psnr = held_out_psnr(vae, EVALUATION_CLIPS)
        state.best = min(psnr.values())

    # 3. Training
    began = time.monotonic()
    last = began
    while state.step < args.steps:
        record = train_step(vae, average, optimizer, state.step, args)
        state.step += 1
        now = time.monotonic()
        state.seconds += now - last
        last = now
        if state.step % LOG_STEPS == 0:
            append_log(log, {"step": state.step, "seconds": state.seconds, **record})
        finished = state.step == args.steps
        if state.step % args.evaluation_steps == 0 or finished:
            evaluate(average, state, log, args)
            last = time.monotonic()
        stopping = time.monotonic() - began > 60 * args.max_minutes
        if state.step % args.checkpointing_steps == 0 or finished or stopping:
            save_checkpoint(checkpoint, vae, average, optimizer, state)
        if stopping:
            logger.info("stopped at step %d; the same command goes on", state.step)
            return

    # 4. The result
    save_model(average, args.output_dir, STATISTICS_CLIPS)
    # As it is on the disk: in float16
    saved = AutoencoderKLWan.from_pretrained(args.output_dir)
    psnr = held_out_psnr(saved, FINAL_CLIPS)
    record = {
        "step": state.step,
        "seconds": state.seconds,
        "final_psnr": psnr,
        "arguments": vars(args),
    }
    append_log(log, record)
    logger.info(
        "final, %d clips a mix: %.2f dB calm, %.2f dB dynamic",
        FINAL_CLIPS,
        psnr["calm"],
        psnr["dynamic"],
    )


if __name__ == "__main__":
    run_script(main, parse_args)
