"""The training loss in the script; that it is Eq. 3 stands in `test_train.py`."""

import pytest
import torch

import train_ltd


def test_motion_and_static_errors(flags):
    """The masks follow D: an error that lies only on moving voxels is seen only there."""
    latents = torch.zeros(1, 4, 3, 2, 2)
    latents[:, :, 1, 0, 0] = 10.0
    squared_error = torch.zeros_like(latents)
    squared_error[..., 0, 0] = 3.0
    row = torch.stack(train_ltd.motion_sums(squared_error, latents, torch.tensor([1.0, 2.0])))
    means = train_ltd.motion_means(row[None])
    assert means == pytest.approx({"mse": 3 / 4, "mse_motion": 3.0, "mse_static": 0.0})
