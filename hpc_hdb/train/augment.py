"""Flips, rotations and zooms of a batch on its device, and normalisation.

Source: the augmentation of Lu et al., arXiv 2509.26092: horizontal flip, rotation by up to 18
degrees, zoom by up to 25 %. The border is filled by reflection.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from dali_pipelines.augmentation import MEAN, STD, Draws
from dali_pipelines.transfer import to_device


def normalise(images: Tensor) -> Tensor:
    """Images of values 0..255 to zero mean and unit deviation, by ImageNet's statistics.

    Parameters
    ----------
    images : Tensor, shape (b, 3, h, w), uint8 or float

    Returns
    -------
    Tensor, shape (b, 3, h, w), float32
    """
    mean, std = _statistics(images.device)
    return (images.float() - mean) / std


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's, each of shape (1, 3, 1, 1); copied to a GPU only once, which waits for it."""
    with torch.inference_mode(False):  # they outlive an evaluation
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
        return mean.to(device), std.to(device)


def transform(images: Tensor, draws: Draws) -> Tensor:
    """Flip, rotate and zoom each image as drawn, in one resampling.

    Parameters
    ----------
    images : Tensor, shape (b, 3, h, w), float32
    draws : Draws

    Returns
    -------
    Tensor, shape (b, 3, h, w), float32
    """
    mirrored, angle, scale = (torch.from_numpy(drawn) for drawn in draws[1:])
    if not angle.any() and bool((scale == 1).all()):
        mask = to_device(mirrored, images.device).view(-1, 1, 1, 1)
        return torch.where(mask, images.flip(3), images)
    side = torch.where(mirrored, -1.0, 1.0)
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = scale * angle.cos() * side
    matrix[:, 0, 1] = -scale * angle.sin()
    matrix[:, 1, 0] = scale * angle.sin() * side
    matrix[:, 1, 1] = scale * angle.cos()
    matrix = to_device(matrix, images.device)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
