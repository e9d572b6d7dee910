"""What is done to images: crops, flips, rotations and zooms, drawn ahead; normalisation.

Arithmetic alone: needs neither DALI nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dali_pipelines.headers import image_size

ASPECT = 4 / 3
"""Width to height of a random crop lies between 1 / ASPECT and this."""


MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of R, G and B, in units of full brightness, which is taken from all images."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of R, G and B, in units of full brightness."""


class Draws(NamedTuple):
    """What is done to each of b images.

    Attributes
    ----------
    crops : ndarray, shape (b, 4), float32
        Share of the image's area; width to height; position from top and from left, 0 to 1.
    mirrored : ndarray, shape (b,), bool
        Flip left and right.
    angles : ndarray, shape (b,), float32
        Rotation, in radians.
    scales : ndarray, shape (b,), float32
        Input pixels per output pixel: below 1 enlarges the centre.
    """

    crops: np.ndarray
    mirrored: np.ndarray
    angles: np.ndarray
    scales: np.ndarray

    def only(self, chosen: np.ndarray) -> Draws:
        """Those of the images that a mask, shape (b,), chooses."""
        return Draws(*(drawn[chosen] for drawn in self))


@dataclass(frozen=True)
class Augmentation:
    """What may be done to a training image: a random resized crop, then flip, rotation and zoom.

    Attributes
    ----------
    flip : bool
        Mirror half of the images.
    rotation : float
        Largest angle to either side, in degrees.
    zoom : float
        Largest relative change of size, in either direction; below 1.
    crop_area : float
        Least share of an image's area that its random crop keeps, such as 0.08; 1 crops the
        centre square instead.
    """

    flip: bool = True
    rotation: float = 18.0
    zoom: float = 0.25
    crop_area: float = 1.0

    @property
    def crops(self) -> bool:
        """Whether images are cropped at random."""
        return self.crop_area < 1

    @property
    def change(self) -> Literal["none", "flip", "warp"]:
        """What is done after cropping: rotation and zoom resample an image once more."""
        if self.rotation or self.zoom:
            return "warp"
        return "flip" if self.flip else "none"

    def draw(self, count: int, generator: np.random.Generator) -> Draws:
        """What is done to each of `count` images; the same state gives the same draws."""
        draws = generator.random((7, count), dtype=np.float32)
        area = self.crop_area + (1 - self.crop_area) * draws[0]
        aspect = ASPECT ** (2 * draws[1] - 1)
        return Draws(
            np.stack([area, aspect, draws[2], draws[3]], axis=1),
            (draws[4] < 0.5) & self.flip,
            (draws[5] * 2 - 1) * math.radians(self.rotation),
            1 + (draws[6] * 2 - 1) * self.zoom,
        )

    def inputs(
        self, draws: Draws, resolution: int, images: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, ...]:
        """What `dali_pipelines.classification.image_pipeline` takes beside the images.

        Parameters
        ----------
        images : sequence of ndarray
            Encoded, or pixels, as the pipeline takes them.
        """
        boxes: tuple[np.ndarray, ...] = ()
        if self.crops:
            found = crop_boxes(draws.crops, np.array([image_size(image) for image in images]))
            boxes = (found[:, :2].copy(), found[:, 2:].copy())  # DALI wants them dense
        if self.change == "warp":
            return (*boxes, affine_matrices(*draws[1:], resolution))
        return (*boxes, draws.mirrored.astype(np.int32)) if self.change == "flip" else boxes


PLAIN = Augmentation(flip=False, rotation=0, zoom=0)
"""Images as they are."""


def needed_sides(crops: np.ndarray, resolution: int) -> np.ndarray:
    """Shorter sides of images whose crops have the pixels for `resolution`.

    Parameters
    ----------
    crops : ndarray, shape (b, 4)
        As in `Draws`.

    Returns
    -------
    ndarray, shape (b,), int64
        In pixels.
    """
    return np.ceil(resolution / np.sqrt(crops[:, 0])).astype(np.int64)


def crop_boxes(crops: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Top, left, height and width of crops, in pixels.

    A side that would leave the image is cut to the image's.

    Parameters
    ----------
    crops : ndarray, shape (b, 4)
        As in `Draws`.
    sizes : ndarray, shape (b, 2), int
        Height and width of the images, in pixels.

    Returns
    -------
    ndarray, shape (b, 4), int32
    """
    area, aspect = crops[:, 0] * sizes.prod(axis=1), crops[:, 1]
    wanted = np.sqrt(np.stack([area / aspect, area * aspect], axis=1))
    shape = np.clip(np.rint(wanted), 1, sizes)
    start = np.floor(crops[:, 2:] * (sizes - shape + 1))
    return np.concatenate([start, shape], axis=1).astype(np.int32)


def affine_matrices(
    mirrored: np.ndarray, angles: np.ndarray, scales: np.ndarray, side: int
) -> np.ndarray:
    """Maps from pixels of the output to pixels of the input that keep the centre.

    Parameters
    ----------
    mirrored, angles, scales : ndarray, shape (b,)
        As in `Draws`.
    side : int
        Side of the square images, in pixels.

    Returns
    -------
    ndarray, shape (b, 2, 3), float32
        ``(x, y)`` of the input is the matrix times ``(x, y, 1)`` of the output, measured from
        the image's upper left corner.
    """
    side_sign = np.where(mirrored, -1.0, 1.0)
    cosine, sine = scales * np.cos(angles), scales * np.sin(angles)
    linear = np.stack([cosine * side_sign, -sine, sine * side_sign, cosine], axis=1)
    linear = linear.reshape(-1, 2, 2)
    shift = side / 2 * (1 - linear.sum(axis=2, keepdims=True))
    return np.concatenate([linear, shift], axis=2).astype(np.float32)
