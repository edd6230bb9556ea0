"""LTD in somebody else's training loop: two loops as others write them, each with its one loss line changed.

    python examples/drop_in.py

Takes seconds on a CPU: two convolutions stand in for the denoiser, and the latents are still noise with a square that
moves over it. It shows where the line goes, not that LTD helps.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ltd_loss.py is in the repository root, and a fresh clone is not installed. Your project needs no such line: copy that
# one file beside your trainer, or pip install this repository.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ltd_loss import ltd_loss, ltd_weights


class Denoiser(nn.Module):
    """Takes (B, C, F, H, W) noisy latents and their noise level in [0, 1], returns a prediction of the same shape."""

    def __init__(self, channels: int, hidden: int = 32):
        super().__init__()
        self.first = nn.Conv3d(channels + 1, hidden, 3, padding=1)
        self.last = nn.Conv3d(hidden, channels, 3, padding=1)

    def forward(self, noisy, level):
        level = level.view(-1, 1, 1, 1, 1).expand_as(noisy[:, :1])
        hidden = self.first(torch.cat([noisy, level], dim=1))
        return self.last(F.silu(hidden))


def train_flow_matching(latents: torch.Tensor) -> None:
    """Flow matching on (B, C, F, H, W), as for Wan."""
    model = Denoiser(channels=latents.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(1, 31):
        noise = torch.randn_like(latents)
        sigma = torch.rand(len(latents), 1, 1, 1, 1)
        noisy = (1 - sigma) * latents + sigma * noise
        prediction = model(noisy, sigma)
        target = noise - latents

        # loss = F.mse_loss(prediction.float(), target.float())
        loss = ltd_loss(prediction, target, latents)

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            mean = sum(losses[-10:]) / 10
            print(f"  flow matching, steps {step - 9:2}-{step}: mean LTD loss {mean:.3f}")


def train_noise_prediction(latents: torch.Tensor) -> None:
    """Noise prediction on (B, F, C, H, W), the layout of CogVideoX."""
    model = Denoiser(channels=latents.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    alphas_cumprod = torch.linspace(1 - 1e-4, 1 - 0.02, 1000).cumprod(0)
    losses = []
    for step in range(1, 31):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(latents),))
        alpha = alphas_cumprod[timesteps]
        alpha = alpha.view(-1, 1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        prediction = model(noisy.transpose(1, 2), timesteps / 1000)  # (B, C, F, H, W), as its convolutions want it
        prediction = prediction.transpose(1, 2)

        # loss = F.mse_loss(prediction.float(), noise.float())
        loss = ltd_loss(prediction, noise, latents, channel_dim=2, frame_dim=1)

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            mean = sum(losses[-10:]) / 10
            print(f"  noise prediction, steps {step - 9:2}-{step}: mean LTD loss {mean:.3f}")

    elementwise = F.mse_loss(prediction.float(), noise.float(), reduction="none")
    # A trainer that has an elementwise loss (Huber, masked, weighted by timestep) keeps it and adds two lines.
    weights = ltd_weights(latents, channel_dim=2, frame_dim=1).unsqueeze(2)  # (B, F, 1, H, W)
    loss = (weights * elementwise).mean()
    print(f"  step {step} once more: ltd_loss {losses[-1]:.6f}, elementwise loss with ltd_weights {loss.item():.6f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    latents = torch.randn(8, 16, 1, 16, 16).repeat(1, 1, 5, 1, 1)  # (B, C, F, H, W)
    square = torch.randn(8, 16, 6, 6)
    for frame in range(5):
        latents[:, :, frame, 5:11, 2 * frame : 2 * frame + 6] = square
    weights = ltd_weights(latents)
    print(f"weights: {weights.min():.2f} where nothing moves, up to {weights.max():.2f} on the way of the square")
    print("loop 1, (B, C, F, H, W)")
    train_flow_matching(latents)
    print("loop 2, (B, F, C, H, W)")
    train_noise_prediction(latents.transpose(1, 2))
