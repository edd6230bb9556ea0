"""The training loss in the script; that it is Eq. 3 stands in `test_train.py`."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, metrics, weights

import train_ltd


def test_motion_and_static_errors():
    """The masks follow D: an error that lies only on moving voxels is seen only there."""
    latents = torch.zeros(1, 4, 3, 2, 2)
    latents[:, :, 1, 0, 0] = 10.0
    target = torch.randn(latents.shape, dtype=torch.float64)
    prediction = target.clone()
    prediction[..., 0, 0] += 3**0.5
    row = train_ltd.motion_errors(prediction, target, latents, torch.tensor([1.0, 2.0]))
    assert {name: value.shape for name, value in row.items()} == dict.fromkeys(row, ())
    means = train_ltd.mean_errors({name: value[None] for name, value in row.items()})
    assert means == pytest.approx({"mse": 3 / 4, "mse_motion": 3.0, "mse_static": 0.0}, abs=1e-6)


def test_errors_of_many_batches_are_means_over_voxels():
    """Not means of means: a batch in which little moves counts little."""
    columns = {"mse": [1.0, 2.0], "motion_error": [6.0, 2.0], "motion_voxels": [3.0, 1.0]}
    columns |= {"static_error": [0.0, 0.0], "static_voxels": [0.0, 0.0]}
    means = train_ltd.mean_errors({name: torch.tensor(column) for name, column in columns.items()})
    assert means == {"mse": 1.5, "mse_motion": 2.0}  # nothing stands still: no such error, and no 0 or NaN


def plain_error(prediction, target, batch, args):
    return F.mse_loss(prediction, target)


def no_error(prediction, target, batch, args):
    return 0 * prediction.mean()


def test_another_loss_trains_the_model(run, tmp_path):
    """`main(args, compute_loss=...)`: with plain MSE the run of --loss mse, to the bit; with 0, nothing is learned."""
    wanted = run(output_dir=tmp_path / "mse", loss="mse")
    given = run(output_dir=tmp_path / "given", compute_loss=plain_error)
    ltd = run(output_dir=tmp_path / "ltd")
    assert_same(weights(given), weights(wanted))
    assert metrics(given) == metrics(wanted) == pytest.approx(metrics(given, "mse"), rel=1e-5)
    assert metrics(given, "weight") == pytest.approx({1: 1.0, 2: 1.0}) and min(metrics(ltd, "weight").values()) > 2
    assert not torch.equal(*(next(v for k, v in weights(f).items() if "lora_B" in k) for f in (given, ltd)))
    untrained = weights(run(output_dir=tmp_path / "none", compute_loss=no_error))
    assert not any(value.any() for key, value in untrained.items() if "lora_B" in key)


def test_another_loss_gets_the_batch(run):
    """What it needs of a clip stands in `batch`, by the names that the docstring gives."""
    seen = []

    def spy(prediction, target, batch, args):
        seen.append((prediction, target, batch, args))
        return train_ltd.compute_loss(prediction, target, batch, args)

    run(compute_loss=spy, train_batch_size=2, max_train_steps=1)
    ((prediction, target, batch, args),) = seen
    assert prediction.requires_grad and torch.equal(target, batch["noise"] - batch["latents"])
    assert prediction.shape == target.shape == (2, 16, 3, 4, 6) and batch["sigmas"].shape == (2,)
    assert batch["prompt_embeds"].shape[:2] == (2, 512) and len(batch["name"]) == 2 and args.loss == "ltd"
