"""`ltd_loss.py` against the paper in float64 and loops, and its invariants, bit for bit wherever they hold exactly.

Most clips hold multiples of 1/64, so that differences, squares and their sums are exact in float32 in any order: what
should be the same is then the same to the last bit, whatever the memory layout.
"""

import doctest
import inspect
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ltd_loss as module
from ltd_loss import latent_temporal_discrepancy, ltd_loss, ltd_weights

ROOT = Path(__file__).resolve().parent.parent
WINDOWS = [*range(2, 10), 41]
LAYOUTS = list(itertools.permutations(range(1, 5), 2))


def draw_clip(frames=5, seed=0, batch=2, channels=3, height=2, width=3):
    """(B, C, F, H, W) multiples of 1/64 in [-4, 4)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-256, 256, (batch, channels, frames, height, width), generator=generator) / 64


def draw_batch(frames=5):
    """Prediction, target and clean latents."""
    return [draw_clip(frames, seed) for seed in (1, 2, 0)]


def still_clip(frames=5):
    return draw_clip(frames)[:, :, :1].repeat(1, 1, frames, 1, 1)


def paper_discrepancy(latents, tau):
    """Eq. 2 letter by letter: Python's float64, the paper's frames 1..F, one voxel after the other."""
    batch, channels, F_l, height, width = latents.shape
    z = latents.double().tolist()
    D = torch.zeros(batch, F_l, height, width, dtype=torch.float64)  # one frame has no neighbour: our D = 0
    for b, f, h, w in itertools.product(range(batch), range(1, F_l + 1), range(height), range(width)):
        if F_l == 1:
            continue
        L_f = max(1, f - math.floor(tau / 2))
        R_f = min(F_l, f + math.floor(tau / 2))
        total = 0.0
        for i in range(L_f, R_f - 1 + 1):
            total += math.hypot(*(z[b][c][i + 1 - 1][h][w] - z[b][c][i - 1][h][w] for c in range(channels)))
        D[b, f - 1, h, w] = total / (R_f - L_f)
    return D


def paper_weights(latents, tau=3, scale=1.0, strength=1.0):
    """(1 + ln(e + sD)) ** p, (B, 1, F, H, W), float64."""
    return (1 + torch.log(math.e + scale * paper_discrepancy(latents, tau))).unsqueeze(1) ** strength


def to_layout(tensor, channel_dim, frame_dim):
    return tensor.movedim((1, 2), (channel_dim, frame_dim))


def without_channels_to_layout(tensor, channel_dim, frame_dim):
    return to_layout(tensor.unsqueeze(1), channel_dim, frame_dim).squeeze(channel_dim)


def assert_near(actual, expected, rtol=2e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=0.0)


# The paper


def test_two_frames_by_hand():
    latents = torch.zeros(1, 2, 2, 1, 2)
    latents[0, :, 1, 0, 0] = torch.tensor([3.0, 4.0])
    discrepancy = latent_temporal_discrepancy(latents)
    assert discrepancy.tolist() == [[[[5.0, 0.0]], [[5.0, 0.0]]]]
    weight = 1 + math.log(math.e + 5)
    assert_near(ltd_weights(latents), torch.tensor([[[[weight, 2.0]], [[weight, 2.0]]]]))
    prediction = torch.zeros_like(latents)
    prediction[0, 1, 1, 0] = torch.tensor([0.5, 3.0])
    assert ltd_loss(prediction, torch.zeros_like(latents), latents).item() == pytest.approx(
        (weight * 0.25 + 2 * 9) / 8, rel=1e-6
    )


def test_four_frames_by_hand():
    latents = torch.tensor([0.0, 1.0, 3.0, 7.0]).view(1, 1, 4, 1, 1)  # gaps 1, 2, 4
    assert latent_temporal_discrepancy(latents, 2).flatten().tolist() == [1, 1.5, 3, 4]
    assert latent_temporal_discrepancy(latents, 3).flatten().tolist() == [1, 1.5, 3, 4]
    assert_near(latent_temporal_discrepancy(latents, 4).flatten(), torch.tensor([1.5, 7 / 3, 7 / 3, 3]))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 21])
def test_equals_the_paper(frames, window):
    generator = torch.Generator().manual_seed(frames)
    prediction, target, latents = torch.randn(3, 2, 3, frames, 2, 3, generator=generator)
    discrepancy = latent_temporal_discrepancy(latents, window)
    assert discrepancy.shape == (2, frames, 2, 3) and discrepancy.dtype == torch.float32
    assert_near(discrepancy, paper_discrepancy(latents, window))

    weights = paper_weights(latents, window)
    assert_near(ltd_weights(latents, window).unsqueeze(1), weights)
    elementwise = (prediction.double() - target.double()) ** 2
    assert_near(ltd_loss(prediction, target, latents, window), (weights * elementwise).mean())
    literal = elementwise + torch.log(math.e + paper_discrepancy(latents, window)).unsqueeze(1) * elementwise  # Eq. 3
    assert_near(ltd_loss(prediction, target, latents, window, reduction="none"), literal)


@pytest.mark.parametrize("window", [2, 4, 8])
def test_an_odd_window_is_the_even_one_before(window):
    latents = draw_clip(21)
    assert torch.equal(latent_temporal_discrepancy(latents, window), latent_temporal_discrepancy(latents, window + 1))
    assert not torch.equal(
        latent_temporal_discrepancy(latents, window + 1), latent_temporal_discrepancy(latents, window + 2)
    )


def test_a_window_longer_than_the_clip_is_the_whole_clip():
    latents = draw_clip(5)
    whole = latent_temporal_discrepancy(latents, 10)
    assert torch.equal(whole, whole[:, :1].expand_as(whole))
    assert torch.equal(latent_temporal_discrepancy(latents, 10**12), whole)


def test_defaults_are_the_paper_s():
    prediction, target, latents = draw_batch()
    assert torch.equal(latent_temporal_discrepancy(latents), latent_temporal_discrepancy(latents, 3))
    explicit = {"scale": 1.0, "normalize": False, "channel_dim": 1, "frame_dim": 2}
    assert torch.equal(ltd_weights(latents), ltd_weights(latents, 3, **explicit))
    explicit |= {"sample_weight": None, "reduction": "mean"}
    assert torch.equal(ltd_loss(prediction, target, latents), ltd_loss(prediction, target, latents, 3, **explicit))


# Gradients


@pytest.mark.parametrize("reduction", ["mean", "sample", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_equal_the_analytic_ones(reduction, weighted):
    prediction, target, latents = draw_batch()
    sample_weight = torch.tensor([0.25, 3.0]) if weighted else None
    leaves = [tensor.requires_grad_() for tensor in (prediction, target, latents)]
    ltd_loss(*leaves, 4, sample_weight=sample_weight, reduction=reduction).sum().backward()
    size = {"mean": prediction.numel(), "sample": prediction[0].numel(), "none": 1}[reduction]
    factor = sample_weight.double().view(2, 1, 1, 1, 1) if weighted else 1.0
    with torch.no_grad():
        expected = 2 * paper_weights(latents, 4) * factor * (prediction.double() - target.double()) / size
    assert prediction.grad.dtype == torch.float32
    assert_near(prediction.grad, expected)
    assert torch.equal(target.grad, -prediction.grad)
    assert latents.grad is None


def test_a_half_precision_prediction_gets_the_rounded_float32_gradient():
    prediction, target, latents = draw_batch()
    gradients = []
    for leaf in (prediction.bfloat16().requires_grad_(), prediction.bfloat16().float().requires_grad_()):
        ltd_loss(leaf, target, latents).backward()
        gradients.append(leaf.grad)
    assert gradients[0].dtype == torch.bfloat16
    assert torch.equal(gradients[0], gradients[1].bfloat16())


def test_no_gradient_through_the_weights():
    prediction, target, latents = draw_batch()
    latents = (latents.requires_grad_() * 1).requires_grad_()  # neither a leaf nor one without history
    latents.retain_grad()
    assert not latent_temporal_discrepancy(latents).requires_grad
    assert not ltd_weights(latents, normalize=True).requires_grad
    assert not ltd_loss(prediction, target, latents).requires_grad
    ltd_loss(prediction.requires_grad_(), target, latents, normalize=True).backward()
    assert prediction.grad is not None and latents.grad is None and latents.requires_grad


def test_one_tensor_as_target_and_latents():
    """A trainer that predicts the clean latents: the gradient is that of the error, not of the weights."""
    prediction, _, latents = draw_batch()
    latents.requires_grad_()
    ltd_loss(prediction, latents, latents).backward()
    with torch.no_grad():
        expected = 2 * paper_weights(latents) * (latents.double() - prediction.double()) / latents.numel()
    assert_near(latents.grad, expected)


# Invariants


@pytest.mark.parametrize("window", [2, 5, 41])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_static_clip_weighs_exactly_2(frames, window, dtype):
    prediction, target, _ = draw_batch(frames)
    latents = still_clip(frames).to(dtype)
    assert torch.equal(latent_temporal_discrepancy(latents, window), torch.zeros(2, frames, 2, 3))
    assert torch.equal(ltd_weights(latents, window, scale=16.0), torch.full((2, frames, 2, 3), 2.0))
    assert torch.equal(ltd_loss(prediction, target, latents, window), 2 * F.mse_loss(prediction, target))


@pytest.mark.parametrize("shape", [(2, 3, 5, 2, 3), (1, 2, 1, 7, 7), (3, 1, 1, 1, 41), (1, 1, 7, 13, 11)])
def test_normalize_on_a_static_clip_is_mse_loss(shape):
    prediction, target = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    latents = torch.full(shape, 0.3)
    assert torch.equal(ltd_weights(latents, normalize=True), torch.ones(shape[0], *shape[2:]))
    loss = ltd_loss(prediction, target, latents, normalize=True)
    assert torch.equal(loss, F.mse_loss(prediction, target))


def test_normalize_keeps_each_sample_s_mean_weight_at_1():
    latents = draw_clip(21)
    latents[0] *= 64  # a wild clip beside a calm one
    plain, normalized = ltd_weights(latents, 5, scale=4.0), ltd_weights(latents, 5, scale=4.0, normalize=True)
    assert plain[0].mean() > plain[1].mean() + 1
    assert_near(normalized.mean(dim=(1, 2, 3)), torch.ones(2))
    assert_near(normalized, plain.double() / plain.double().mean(dim=(1, 2, 3), keepdim=True))
    prediction, target, _ = draw_batch(21)
    loss = ltd_loss(prediction, target, latents, 5, scale=4.0, normalize=True, reduction="none")
    assert torch.equal(loss, normalized.unsqueeze(1) * (prediction - target).square())


@pytest.mark.parametrize("constant", [1 / 64, -3.0, 1000.0])
def test_a_constant_added_to_the_latents_changes_nothing(constant):
    prediction, target, latents = draw_batch()
    assert torch.equal(ltd_weights(latents + constant, 4), ltd_weights(latents, 4))
    offsets = draw_clip(1, seed=3) * constant  # another one for each channel and place
    assert torch.equal(ltd_loss(prediction, target, latents + offsets), ltd_loss(prediction, target, latents))


@pytest.mark.parametrize("window", [2, 3, 4, 5, 9, 41])
@pytest.mark.parametrize("frame", [0, 1, 4, 8])
@pytest.mark.parametrize("draw", [draw_clip, still_clip])
def test_a_moving_voxel_changes_only_its_own_weights_in_its_own_window(draw, frame, window):
    before = draw(9)
    after = before.clone()
    after[1, 2, frame, 0, 1] += 16
    changed = ltd_weights(after, window) != ltd_weights(before, window)
    expected = torch.zeros_like(changed)
    expected[1, max(0, frame - window // 2) : frame + window // 2 + 1, 0, 1] = True
    assert torch.equal(changed, expected)


def test_batch_elements_are_independent():
    prediction, target, latents = draw_batch()
    together = ltd_loss(prediction, target, latents, 5, scale=2.0, normalize=True, reduction="none")
    for b in range(2):
        alone = [tensor[b : b + 1] for tensor in (prediction, target, latents)]
        assert torch.equal(ltd_loss(*alone, 5, scale=2.0, normalize=True, reduction="none"), together[b : b + 1])
    latents[1] = math.nan
    spoilt = ltd_loss(prediction, target, latents, 5, scale=2.0, normalize=True, reduction="none")
    assert torch.equal(spoilt[0], together[0]) and spoilt[1].isnan().all()


def test_inputs_are_never_modified():
    tensors = [*draw_batch(), torch.tensor([0.5, 2.0])]
    copies, versions = [tensor.clone() for tensor in tensors], [tensor._version for tensor in tensors]
    for normalize, reduction in itertools.product([False, True], ["mean", "sample", "none"]):
        ltd_loss(*tensors[:3], normalize=normalize, sample_weight=tensors[3], reduction=reduction)
    latent_temporal_discrepancy(tensors[2])
    ltd_weights(tensors[2], normalize=True)
    assert [tensor._version for tensor in tensors] == versions
    assert all(map(torch.equal, tensors, copies))


# Layouts


@pytest.mark.parametrize("negative", [(0, 0), (5, 0), (0, 5), (5, 5)])
@pytest.mark.parametrize("dims", LAYOUTS)
def test_every_layout_equals_the_permuted_one(dims, negative):
    layout = dict(zip(("channel_dim", "frame_dim"), (d - n for d, n in zip(dims, negative, strict=True)), strict=True))
    batch, sample_weight = draw_batch(), torch.tensor([0.5, 2.0])
    views = [to_layout(tensor, *dims) for tensor in batch]
    options = {"scale": 2.0, "normalize": True}
    for moved in (views, [tensor.contiguous() for tensor in views]):
        assert torch.equal(
            latent_temporal_discrepancy(moved[2], 4, **layout),
            without_channels_to_layout(latent_temporal_discrepancy(batch[2], 4), *dims),
        )
        weights = ltd_weights(batch[2], scale=2.0)
        assert torch.equal(ltd_weights(moved[2], scale=2.0, **layout), without_channels_to_layout(weights, *dims))
        elementwise = ltd_loss(*batch, sample_weight=sample_weight, reduction="none")
        assert torch.equal(
            ltd_loss(*moved, sample_weight=sample_weight, reduction="none", **layout), to_layout(elementwise, *dims)
        )
        for reduction in ("mean", "sample"):
            # Sums in another order, so only to rounding.
            expected = ltd_loss(*batch, reduction=reduction, **options)
            assert_near(ltd_loss(*moved, reduction=reduction, **options, **layout), expected)


def test_a_single_frame_in_the_other_layout():
    prediction, target, image = (tensor.transpose(1, 2) for tensor in draw_batch(frames=1))
    weights = ltd_weights(image, channel_dim=2, frame_dim=1)
    assert torch.equal(weights, torch.full((2, 1, 2, 3), 2.0))
    assert_near(ltd_loss(prediction, target, image, channel_dim=2, frame_dim=1), 2 * F.mse_loss(prediction, target))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision_equals_its_float32_copy(dtype, normalize):
    generator = torch.Generator().manual_seed(0)
    halves = [tensor.to(dtype) for tensor in torch.randn(3, 2, 16, 5, 4, 4, generator=generator)]
    copies = [tensor.float() for tensor in halves]
    assert torch.equal(latent_temporal_discrepancy(halves[2]), latent_temporal_discrepancy(copies[2]))
    assert torch.equal(ltd_weights(halves[2], normalize=normalize), ltd_weights(copies[2], normalize=normalize))
    loss = ltd_loss(*halves, normalize=normalize, sample_weight=torch.ones(2, dtype=dtype))
    assert torch.equal(loss, ltd_loss(*copies, normalize=normalize))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32_whatever_comes_in(dtype):
    prediction, target, latents = (tensor.to(dtype) for tensor in draw_batch())
    sample_weight = torch.ones(2, dtype=dtype)
    assert latent_temporal_discrepancy(latents).dtype == torch.float32
    assert latent_temporal_discrepancy(latents[:, :, :1]).dtype == torch.float32
    assert ltd_weights(latents, normalize=True).dtype == torch.float32
    for reduction in ("mean", "sample", "none"):
        loss = ltd_loss(prediction, target, latents, sample_weight=sample_weight, reduction=reduction)
        assert loss.dtype == torch.float32


def test_float16_that_would_overflow_does_not():
    latents = torch.tensor([-60000.0, 60000.0], dtype=torch.float16).view(1, 1, 2, 1, 1)
    assert latent_temporal_discrepancy(latents).flatten().tolist() == [latents.float().diff(dim=2).item()] * 2
    still = torch.zeros_like(latents)
    assert ltd_loss(latents, -latents, still).item() == 2 * (2 * latents[0, 0, 0].float().item()) ** 2


@pytest.mark.parametrize("amplitude", [1e-4, 1e-2, 1.0, 1e4])
@pytest.mark.parametrize("scale", [0, 0.5, 1, 16, 256.0])
def test_scale(scale, amplitude):
    latents = draw_clip() * amplitude
    weights = ltd_weights(latents, scale=scale)
    assert_near(weights.unsqueeze(1), paper_weights(latents, scale=scale), rtol=5e-7)
    assert weights.min() >= 2
    if scale == 0:
        assert torch.equal(weights, torch.full_like(weights, 2.0))
    if scale == 1:
        assert torch.equal(weights, ltd_weights(latents))


@pytest.mark.parametrize("strength", [-2, -1, 0.5, 2, 3, 8.0])
@pytest.mark.parametrize("scale", [0.5, 1])
def test_strength(strength, scale):
    prediction, target, latents = draw_batch()
    options = {"scale": scale, "strength": strength}
    expected = paper_weights(latents, **options)
    assert_near(ltd_weights(latents, **options).unsqueeze(1), expected, rtol=2e-6)
    error = (prediction.double() - target.double()) ** 2
    assert_near(ltd_loss(prediction, target, latents, **options), (expected * error).mean())
    leaf = prediction.clone().requires_grad_()
    ltd_loss(leaf, target, latents, **options).backward()
    assert_near(leaf.grad, 2 * expected * (prediction.double() - target.double()) / prediction.numel())
    # The other layout, and normalized: the mean is that of the powers.
    swapped = [tensor.transpose(1, 2) for tensor in (prediction, target, latents)]
    of_layout = ltd_loss(*swapped, channel_dim=2, frame_dim=1, reduction="none", **options)
    assert torch.equal(of_layout.transpose(1, 2), ltd_loss(prediction, target, latents, reduction="none", **options))
    normalized = ltd_weights(latents, normalize=True, **options).unsqueeze(1)
    assert_near(normalized, expected / expected.mean(dim=(1, 2, 3, 4), keepdim=True))
    # Where nothing moves, it is one number exactly.
    still = ltd_weights(still_clip(), **options)
    assert torch.equal(still, torch.full_like(still, 2.0**strength))


def test_strength_0_is_mse_loss_and_1_the_paper():
    prediction, target, latents = torch.randn(3, 2, 3, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"normalize": True}, {"scale": 3.0}):
        loss = ltd_loss(prediction, target, latents, strength=0, **options)
        assert torch.equal(loss, F.mse_loss(prediction, target))
        paper = ltd_weights(latents, strength=1, **options)
        assert torch.equal(paper, ltd_weights(latents, **options))
    # As it was computed before there was a strength
    motion = torch.log1p(latent_temporal_discrepancy(latents) * (1 / math.e))
    assert torch.equal(ltd_weights(latents), 2 + motion)
    mean = motion.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.equal(ltd_weights(latents, normalize=True), (2 + motion) / (2 + mean))


@pytest.mark.parametrize("strength", [math.inf, -math.inf, math.nan])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match=f"`strength` must be a finite number, got {strength!r}"):
        ltd_weights(draw_clip(), strength=strength)


def test_nan_and_infinity_are_not_silenced():
    prediction, target, latents = draw_batch(9)
    clean = ltd_weights(latents, 5)
    latents[0, 1, 4, 1, 2] = math.nan
    weights = ltd_weights(latents, 5)
    where = torch.zeros_like(weights, dtype=torch.bool)
    where[0, 2:7, 1, 2] = True
    assert torch.equal(weights.isnan(), where)
    assert torch.equal(weights[~where], clean[~where])
    assert ltd_loss(prediction, target, latents).isnan()
    assert ltd_loss(prediction, target, latents, reduction="sample").isnan().tolist() == [True, False]
    assert torch.equal(ltd_weights(latents, normalize=True).isnan().all(dim=(1, 2, 3)), torch.tensor([True, False]))
    for culprit in (0, 1):
        spoilt = draw_batch(9)
        spoilt[culprit][1, 0, 0, 0, 0] = math.nan
        assert ltd_loss(*spoilt).isnan()
    latents[0, 1, 4, 1, 2] = math.inf
    assert torch.equal(ltd_weights(latents, 5).isinf(), where)
    assert not ltd_loss(prediction, target, latents).isfinite()


def test_huge_but_finite_latents_stay_finite():
    prediction, target, latents = draw_batch()
    assert_near(ltd_weights(latents * 2.0**56).unsqueeze(1), paper_weights(latents * 2.0**56))
    assert ltd_loss(prediction, target, latents * 2.0**56).isfinite()


# Reductions


def test_reductions():
    batch = draw_batch()
    elementwise = ltd_loss(*batch, reduction="none")
    samples = ltd_loss(*batch, reduction="sample")
    assert elementwise.shape == batch[0].shape and samples.shape == (2,) and ltd_loss(*batch).shape == ()
    assert_near(samples, elementwise.double().flatten(1).mean(1))
    assert_near(ltd_loss(*batch), elementwise.double().mean())


@pytest.mark.parametrize(
    "sample_weight", [torch.tensor([0.25, 3.0]), torch.tensor([0, 2]), torch.tensor([[0.5, 9.0], [4.0, 9.0]])[:, 0]]
)
def test_sample_weight_multiplies_each_sample(sample_weight):
    batch = draw_batch()
    expected = ltd_loss(*batch, reduction="none") * sample_weight.view(2, 1, 1, 1, 1)
    loss = ltd_loss(*batch, sample_weight=sample_weight, reduction="none")
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert_near(
        ltd_loss(*batch, sample_weight=sample_weight, reduction="sample"), expected.double().flatten(1).mean(1)
    )
    assert_near(ltd_loss(*batch, sample_weight=sample_weight), expected.double().mean())


# Errors


def every_function(latents, *args, **kwargs):
    yield lambda: latent_temporal_discrepancy(latents, *args, **kwargs)
    yield lambda: ltd_weights(latents, *args, **kwargs)
    yield lambda: ltd_loss(latents, latents, latents, *args, **kwargs)


@pytest.mark.parametrize("window", [1, 0, -3, 2.5, 3.0, "3", None, True])
def test_bad_window(window):
    for call in every_function(draw_clip(), window):
        with pytest.raises(ValueError, match=f"`window` .* got {re.escape(repr(window))}"):
            call()


@pytest.mark.parametrize("shape", [(3, 5, 2, 3), (1, 2, 3, 5, 2, 3), (5,), ()])
def test_latents_not_5d(shape):
    for call in every_function(torch.zeros(shape)):
        with pytest.raises(ValueError, match=f"5-D .* got {re.escape(str(shape))}"):
            call()


@pytest.mark.parametrize(
    "dims", [(0, 2), (1, 0), (2, 2), (-5, 2), (1, -5), (1, -4), (-3, 2), (6, 2), (1, 7), (-9, 2), (1, -8)]
)
def test_bad_dims(dims):
    for call in every_function(draw_clip(), channel_dim=dims[0], frame_dim=dims[1]):
        with pytest.raises(ValueError, match=f"`channel_dim` and `frame_dim` .* got {dims[0]} and {dims[1]}"):
            call()


@pytest.mark.parametrize("culprit", range(3))
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 2, 3), (1, 3, 5, 2, 3), (2, 1, 5, 2, 3), (2, 5, 3, 2, 3), (3, 5, 2, 3), ()]
)
def test_shapes_that_do_not_match(culprit, shape):
    batch = draw_batch()
    batch[culprit] = torch.zeros(shape)
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in batch)
    with pytest.raises(ValueError, match=f"one shape, got {re.escape(shapes)}"):
        ltd_loss(*batch)


@pytest.mark.parametrize("reduction", ["sum", "Mean", "", None])
def test_unknown_reduction(reduction):
    with pytest.raises(ValueError, match=f'"mean", "sample" or "none", got {reduction!r}'):
        ltd_loss(*draw_batch(), reduction=reduction)


@pytest.mark.parametrize("scale", [-1, -1e-9, -math.inf, math.nan])
def test_bad_scale(scale):
    prediction, target, latents = draw_batch()
    for call in (
        lambda: ltd_weights(latents, scale=scale),
        lambda: ltd_loss(prediction, target, latents, scale=scale),
    ):
        with pytest.raises(ValueError, match=f"`scale` .* got {scale!r}"):
            call()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 1, 1, 1, 1)])
def test_bad_sample_weight(shape):
    with pytest.raises(ValueError, match=rf"`sample_weight` .*\(2,\).* got {re.escape(str(shape))}"):
        ltd_loss(*draw_batch(), sample_weight=torch.ones(shape))


# In a trainer


def test_under_autocast():
    prediction, target, latents = torch.randn(3, 2, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for enabled in (False, True):
        leaf = prediction.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert (latents[..., 0] @ latents[..., 0].mT).dtype == (torch.bfloat16 if enabled else torch.float32)
            loss = ltd_loss(leaf, target, latents, normalize=True)
            weights = ltd_weights(latents, 5, scale=4.0)
        loss.backward()
        results.append((loss, weights, leaf.grad))
    assert results[1][0].dtype == results[1][1].dtype == torch.float32
    assert all(map(torch.equal, *results))


def test_a_prediction_that_must_not_be_written_to():
    prediction, target, latents = draw_batch()
    leaf = torch.stack([prediction, target]).requires_grad_()
    view, _ = leaf.unbind()
    # Autograd refuses to write to this view. Under FSDP2 a write would be worse: it silently drops the backward hook.
    with pytest.raises(RuntimeError, match=r"inplace|in-place"):
        view.sub_(target)
    view, _ = leaf.unbind()
    version = view._version
    loss = ltd_loss(view, target, latents, sample_weight=torch.tensor([0.5, 2.0]), normalize=True)
    loss.backward()
    assert view._version == leaf._version == version and torch.equal(view, prediction)
    plain = prediction.clone().requires_grad_()
    ltd_loss(plain, target, latents, sample_weight=torch.tensor([0.5, 2.0]), normalize=True).backward()
    assert torch.equal(leaf.grad[0], plain.grad) and not leaf.grad[1].any()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.* returned a view")  # what this test is about
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_under_fsdp2(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Patches(torch.nn.Sequential):
        def forward(self, tokens):
            return super().forward(tokens).unflatten(1, (5, 2, 3)).permute(0, 4, 1, 2, 3)  # a view, as Wan returns

    _, target, latents = draw_batch()
    torch.manual_seed(0)
    plain = Patches(torch.nn.Linear(3, 8), torch.nn.Linear(8, 3))
    sharded = Patches(torch.nn.Linear(3, 8), torch.nn.Linear(8, 3))
    sharded.load_state_dict(plain.state_dict())
    plain.bfloat16()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in sharded:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(sharded, mesh=mesh, mp_policy=policy)
        tokens = latents.permute(0, 2, 3, 4, 1).flatten(1, 3)
        losses = []
        for model, inputs in ((plain, tokens.bfloat16()), (sharded, tokens)):
            prediction = model(inputs)
            assert prediction.dtype == torch.bfloat16 and prediction._is_view()
            losses.append(ltd_loss(prediction, target, latents))
            losses[-1].backward()
        assert torch.equal(*losses)
        for expected, parameter in zip(plain.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(parameter.grad.full_tensor(), expected.grad.float())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or os.environ.get("CXX")), reason="torch.compile needs a C++ compiler")
def test_under_torch_compile():
    prediction, target, latents = torch.randn(3, 2, 4, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (ltd_loss, torch.compile(ltd_loss, fullgraph=True)):
        leaf = prediction.clone().requires_grad_()
        loss = function(leaf, target, latents, 5, scale=2.0, strength=3, normalize=True)
        loss.backward()
        results.append((loss, leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_one_compiled_graph_for_changing_lengths():
    """Traced, not lowered: fast enough to try every branch."""
    compiled = torch.compile(ltd_loss, fullgraph=True, dynamic=True, backend="eager")
    for frames, window, strength in ((5, 3, 1), (9, 3, 3), (1, 3, 0.5), (2, 3, -1), (5, 41, 0)):
        batch = [tensor.transpose(1, 2) for tensor in draw_batch(frames)]
        options = {"channel_dim": 2, "frame_dim": 1, "sample_weight": torch.tensor([0.5, 2.0]), "strength": strength}
        assert torch.equal(compiled(*batch, window, **options), ltd_loss(*batch, window, **options))


@pytest.mark.cuda
@pytest.mark.parametrize("window", [2, 3, 5, 41])
@pytest.mark.parametrize("frames", [1, 2, 5, 21])
def test_cuda_agrees_with_the_cpu(frames, window):
    batch = torch.randn(3, 2, 16, frames, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        prediction, target, latents = batch.to(device).unbind()
        prediction.requires_grad_()
        loss = ltd_loss(prediction, target, latents, window, normalize=True)
        (gradient,) = torch.autograd.grad(loss, prediction)
        assert loss.device.type == gradient.device.type == device
        moved = ltd_weights(latents.transpose(1, 2), window, scale=4.0, channel_dim=2, frame_dim=1)
        results.append([loss, gradient, moved, latent_temporal_discrepancy(latents, window)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-5, atol=1e-7)


@pytest.mark.cuda
def test_cuda_static_clip_and_half_precision():
    prediction, target, latents = (tensor.cuda() for tensor in draw_batch(5))
    still = torch.full((1, 2, 1, 1, 41), 0.3, device="cuda")
    assert torch.equal(ltd_weights(still.expand(-1, -1, 5, -1, -1)), torch.full((1, 5, 1, 41), 2.0, device="cuda"))
    # 1/41 times 41 is not 1 in float32, and CUDA's mean multiplies.
    assert torch.equal(ltd_weights(still, normalize=True), torch.ones(1, 1, 1, 41, device="cuda"))
    halves = latents.bfloat16()
    assert torch.equal(ltd_weights(halves), ltd_weights(halves.float()))
    outside = ltd_loss(prediction.bfloat16(), target, latents)
    with torch.autocast("cuda", torch.bfloat16):
        inside = ltd_loss(prediction.bfloat16(), target, latents)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


# Documentation


def test_the_docstrings_run():
    results = doctest.testmod(module)
    assert results.attempted >= 2 and results.failed == 0
    prediction, target, latents = draw_batch()
    lines = [line.strip() for line in module.__doc__.splitlines()]
    before, after = (
        next(line for line in lines if line.startswith(start)) for start in ("loss = F", "loss = ltd_loss")
    )
    scope = {"F": F, "ltd_loss": ltd_loss, "prediction": prediction, "target": target, "latents": latents}
    losses = []
    for line in (before, after):
        exec(line, scope)
        losses.append(scope["loss"])
    assert torch.equal(losses[0], F.mse_loss(prediction, target))
    assert torch.equal(losses[1], ltd_loss(prediction, target, latents))
    for function in (latent_temporal_discrepancy, ltd_weights, ltd_loss):
        assert "https://huggingface.co/papers/2601.20504" in inspect.getdoc(function)


@pytest.mark.slow
def test_drop_in_example_runs_anywhere(tmp_path):
    """Isolated (`-I`): neither the working directory nor PYTHONPATH helps it to find `ltd_loss.py`."""
    command = [sys.executable, "-I", str(ROOT / "examples" / "drop_in.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for loop in ("flow matching", "noise prediction"):
        losses = [float(value) for value in re.findall(rf"{loop}, .*: mean LTD loss ([\d.]+)", done.stdout)]
        assert len(losses) == 3 and losses[-1] < losses[0]
    ours, elementwise = re.search(
        r"ltd_loss ([\d.]+), elementwise loss with ltd_weights ([\d.]+)", done.stdout
    ).groups()
    assert float(elementwise) == pytest.approx(float(ours), rel=1e-5)
    assert not list(tmp_path.iterdir())
