"""Random flips, rotations and zooms of a batch on its device, and normalisation.

Source: the augmentation of Lu et al., arXiv 2509.26092: horizontal flip, rotation by up to 18
degrees, zoom by up to 25 %. The border is filled by reflection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """Images of values 0..255 to zero mean and unit deviation, by ImageNet's statistics.

    Parameters
    ----------
    images : Tensor, shape (b, 3, h, w), uint8 or float

    Returns
    -------
    Tensor, shape (b, 3, h, w), float32
    """
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std


def draw_affine(
    count: int, generator: torch.Generator, flip: bool, rotation: float, zoom: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What is done to each of `count` images.

    Parameters
    ----------
    generator : torch.Generator
        On the CPU; the same state gives the same draws.
    flip : bool
        Mirror half of the images.
    rotation : float
        Largest angle to either side, in degrees.
    zoom : float
        Largest relative change of size, in either direction; below 1.

    Returns
    -------
    mirrored : Tensor, shape (count,), bool
    angles : Tensor, shape (count,), float32
        In radians.
    scales : Tensor, shape (count,), float32
        Input pixels per output pixel: below 1 enlarges the centre.
    """
    draws = torch.rand(3, count, generator=generator)
    mirrored = (draws[0] < 0.5) & flip
    return mirrored, (draws[1] * 2 - 1) * math.radians(rotation), 1 + (draws[2] * 2 - 1) * zoom


def random_affine(
    images: Tensor, generator: torch.Generator, flip: bool, rotation: float, zoom: float
) -> Tensor:
    """Flip, rotate and zoom each image at random, in one resampling.

    Parameters
    ----------
    images : Tensor, shape (b, 3, h, w), float32
    generator, flip, rotation, zoom
        As in `draw_affine`.

    Returns
    -------
    Tensor, shape (b, 3, h, w), float32
    """
    count = images.shape[0]
    mirrored, angle, scale = draw_affine(count, generator, flip, rotation, zoom)
    if not rotation and not zoom:
        mask = mirrored.to(images.device).view(-1, 1, 1, 1)
        return torch.where(mask, images.flip(3), images)
    side = torch.where(mirrored, -1.0, 1.0)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = scale * angle.cos() * side
    matrix[:, 0, 1] = -scale * angle.sin()
    matrix[:, 1, 0] = scale * angle.sin() * side
    matrix[:, 1, 1] = scale * angle.cos()
    grid = functional.affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
