# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Latent Temporal Discrepancy (LTD): a motion prior that weights a diffusion loss per latent voxel.

LTD is the distance between neighboring frames of the clean video latents, averaged over a sliding window of frames.
Where a clip moves, flickers or burns, LTD is large; there the squared error of the denoiser is weighted up by
`1 + ln(e + LTD)`, and elsewhere it keeps a weight near 2. It needs no optical flow, no mask and no second network.

One line in any trainer of a latent video model:

    loss = F.mse_loss(prediction.float(), target.float())
    loss = ltd_loss(prediction, target, latents)  # latents: the clean, normalized VAE latents

Legend: B batch, C channels, F latent frames, H and W latent height and width. The default layout is (B, C, F, H, W),
as in Wan; for (B, F, C, H, W), as in CogVideoX, pass `channel_dim=2, frame_dim=1`.

From the paper (https://huggingface.co/papers/2601.20504): the windowed mean of Eq. 2 with its cut-off windows at the
two ends, the logarithm, and the form `L + ln(e + D) * L` of Eq. 3. Our choices: float32 inside, D = 0 for a single
frame (an image), the prediction and target of whatever parametrization the model has (noise, velocity, flow) in place
of the paper's noise, and the three knobs `scale`, `strength` and `normalize`, all off by default.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F


@torch.no_grad()
def latent_temporal_discrepancy(
    latents: torch.Tensor, window: int = 3, *, channel_dim: int = 1, frame_dim: int = 2
) -> torch.Tensor:
    r"""
    Mean L2 distance between neighboring latent frames in a window around each frame, per voxel: Eq. 2 of the
    [LTD paper](https://huggingface.co/papers/2601.20504), \\(D_f = \frac{1}{R_f - L_f} \sum_{i=L_f}^{R_f-1} \lVert
    z(i+1) - z(i) \rVert\\) with \\(L_f = \max(1, f - \lfloor\tau/2\rfloor)\\), \\(R_f = \min(F, f +
    \lfloor\tau/2\rfloor)\\).

    Args:
        latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
            Clean latents on the scale that the denoiser sees, any floating dtype. Never modified.
        window (`int`, *optional*, defaults to 3):
            Window size tau in latent frames. 2 and 3 are the same window.
        channel_dim (`int`, *optional*, defaults to 1), frame_dim (`int`, *optional*, defaults to 2):
            Where the channels and frames are.

    Returns:
        `torch.Tensor` of the shape of `latents` without the channel dimension, float32, without gradient; in units of
        the latents. All zeros for a single frame.

    Raises:
        ValueError: `window` is not an integer of at least 2, `latents` is not 5-D, or the two dimensions are not two
            different ones of 1 to 4.
    """
    if not isinstance(window, int) or window < 2:
        raise ValueError(
            f"`window` must be an integer of at least 2 (a smaller one holds no frame pair), got {window!r}."
        )
    channel_dim, frame_dim = _check_layout(latents, channel_dim, frame_dim)
    z = latents.detach().movedim((channel_dim, frame_dim), (1, 2)).float()  # (B, C, F, H, W)
    if z.shape[2] == 1:
        discrepancy = z.new_zeros(z.shape[0], *z.shape[2:])
    else:
        gaps = (z[:, :, 1:] - z[:, :, :-1]).square().sum(dim=1).sqrt()  # (B, F-1, H, W)
        # Frame f averages gaps f-half .. f+half-1 and counts only those there are: a pooling that ignores its padding.
        # In 2-D, over (F-1, H * W), since avg_pool3d refuses a kernel longer than its input.
        half = min(window // 2, gaps.shape[1])
        discrepancy = F.avg_pool2d(
            gaps.flatten(2), (2 * half, 1), stride=1, padding=(half, 0), count_include_pad=False
        ).unflatten(2, gaps.shape[2:])
    return discrepancy.movedim(1, frame_dim - (channel_dim < frame_dim))


@torch.no_grad()
def ltd_weights(
    latents: torch.Tensor,
    window: int = 3,
    *,
    scale: float = 1.0,
    strength: float = 1.0,
    normalize: bool = False,
    channel_dim: int = 1,
    frame_dim: int = 2,
) -> torch.Tensor:
    r"""
    Weight of each voxel's squared error, \\((1 + \ln(e + s D))^p\\): Eq. 3 of the
    [LTD paper](https://huggingface.co/papers/2601.20504) with the loss factored out, the scale s = 1 and the
    strength p = 1.

    Args:
        latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
            Clean latents, any floating dtype.
        window (`int`, *optional*, defaults to 3):
            As in [`latent_temporal_discrepancy`].
        scale (`float`, *optional*, defaults to 1.0):
            Multiplies D before the logarithm; not in the paper. 0 gives every voxel the weight 2 (to the power p).
        strength (`float`, *optional*, defaults to 1.0):
            Power of the weight; not in the paper. 0 is plain MSE, above 1 the loss leans more to motion, below 0 to
            stillness. The loss grows with it (3: 8 times and more), which AdamW does not feel but a clipped gradient
            norm does.
        normalize (`bool`, *optional*, defaults to `False`):
            Divide each sample's weights by their mean, so that only the distribution of the loss changes and not its
            size; not in the paper. It also removes the weighting between wild and still clips.
        channel_dim (`int`, *optional*, defaults to 1), frame_dim (`int`, *optional*, defaults to 2):
            Where the channels and frames are.

    Returns:
        `torch.Tensor` of the shape of `latents` without the channel dimension, float32, without gradient, at least 2
        for the paper's form.

    Raises:
        ValueError: `scale` is negative or not a number, `strength` is not a finite number, or as in
            [`latent_temporal_discrepancy`].
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"`scale` must be a number of at least 0, got {scale!r}.")
    if not -math.inf < strength < math.inf:
        raise ValueError(f"`strength` must be a finite number, got {strength!r}.")
    discrepancy = latent_temporal_discrepancy(latents, window, channel_dim=channel_dim, frame_dim=frame_dim)
    # ln(e + sD) = 1 + ln(1 + sD/e), exact where nothing moves.
    motion = torch.log1p(discrepancy * (scale / math.e))
    weights = 2 + motion
    if strength != 1:
        weights = weights**strength
    if not normalize:
        return weights
    if strength == 1:
        # The 2 stays outside the mean, so that a still clip is divided by exactly 2 on any device.
        return weights / (2 + motion.mean(dim=(1, 2, 3), keepdim=True))
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def ltd_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    latents: torch.Tensor,
    window: int = 3,
    *,
    scale: float = 1.0,
    strength: float = 1.0,
    normalize: bool = False,
    channel_dim: int = 1,
    frame_dim: int = 2,
    sample_weight: torch.Tensor | None = None,
    reduction: Literal["mean", "sample", "none"] = "mean",
) -> torch.Tensor:
    r"""
    Squared error between prediction and target, weighted by the motion of the clean latents: Eq. 3 of the
    [LTD paper](https://huggingface.co/papers/2601.20504), \\(\mathcal{L} + \ln(e + D) \mathcal{L}\\).

    Args:
        prediction (`torch.Tensor` of shape `(B, C, F, H, W)`):
            What the denoiser returned: noise, velocity or flow. Never modified.
        target (`torch.Tensor` of the same shape):
            What it should have returned.
        latents (`torch.Tensor` of the same shape):
            Clean latents, from which the weights come. No gradient flows into them.
        window, scale, strength, normalize, channel_dim, frame_dim:
            As in [`ltd_weights`].
        sample_weight (`torch.Tensor` of shape `(B,)`, *optional*):
            One more factor a sample, for instance a timestep weight.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` for a scalar, `"sample"` for shape `(B,)`, `"none"` for the full tensor.

    Returns:
        `torch.Tensor`, float32.

    Raises:
        ValueError: The shapes of the three tensors differ, `sample_weight` is not `(B,)`, `reduction` is unknown, or
            as in [`ltd_weights`].

    Example:

        >>> latents, noise = torch.randn(2, 1, 16, 5, 8, 8).unbind()
        >>> loss = ltd_loss(prediction=torch.zeros_like(noise), target=noise - latents, latents=latents)
    """
    if not prediction.shape == target.shape == latents.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (prediction, target, latents))
        raise ValueError(f"`prediction`, `target` and `latents` must have one shape, got {shapes}.")
    if reduction not in ("mean", "sample", "none"):
        raise ValueError(f'`reduction` must be "mean", "sample" or "none", got {reduction!r}.')
    weights = ltd_weights(
        latents,
        window,
        scale=scale,
        strength=strength,
        normalize=normalize,
        channel_dim=channel_dim,
        frame_dim=frame_dim,
    )
    loss = weights.unsqueeze(channel_dim % latents.ndim) * (prediction.float() - target.float()).square()
    if sample_weight is not None:
        if sample_weight.shape != latents.shape[:1]:
            expected, got = tuple(latents.shape[:1]), tuple(sample_weight.shape)
            raise ValueError(f"`sample_weight` must have shape {expected}, one factor a sample, got {got}.")
        loss = loss * sample_weight.float().view(-1, 1, 1, 1, 1)
    if reduction == "mean":
        return loss.mean()
    return loss.mean(dim=(1, 2, 3, 4)) if reduction == "sample" else loss


def _check_layout(latents: torch.Tensor, channel_dim: int, frame_dim: int) -> tuple[int, int]:
    if latents.ndim != 5:
        raise ValueError(
            f"`latents` must be 5-D (batch, channels, frames, height, width), got {tuple(latents.shape)}."
        )
    dims = channel_dim % 5, frame_dim % 5
    if not (-5 <= channel_dim < 5 and -5 <= frame_dim < 5) or 0 in dims or dims[0] == dims[1]:
        raise ValueError(
            "`channel_dim` and `frame_dim` must be two different dimensions of 1 to 4 (0 is the batch), got "
            f"{channel_dim} and {frame_dim}."
        )
    return dims
