"""What may be done to training images, as drawn and as applied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import functional as reference_transforms

from dali_pipelines.augmentation import (
    ASPECT,
    Augmentation,
    Draws,
    affine_matrices,
    crop_boxes,
    needed_sides,
)
from hpc_hdb.train.augment import normalise, transform


def some_images(count: int = 4, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def drawn(count: int, seed: int, *how: float) -> Draws:
    return Augmentation(*how).draw(count, np.random.default_rng(seed))


def test_with_everything_off_images_stay_as_they_are() -> None:
    images = some_images()
    assert torch.equal(transform(images, drawn(4, 0, False, 0, 0)), images)


def test_flipping_alone_mirrors_about_half_and_resamples_none() -> None:
    images = some_images(400)
    flipped = transform(images, drawn(400, 0, True, 0, 0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize("how", [(False, 18, 0), (False, 0, 0.25), (True, 18, 0.25)])
def test_a_seed_fixes_what_is_done_to_the_images(how: tuple[float, ...]) -> None:
    images = some_images(4, 24)
    done = transform(images, drawn(4, 5, *how))
    assert done.shape == images.shape
    assert done.dtype == torch.float32
    assert torch.equal(done, transform(images, drawn(4, 5, *how)))
    assert not torch.equal(done, transform(images, drawn(4, 6, *how)))
    assert not torch.equal(done, images)
    assert done.min() >= images.min()
    assert done.max() <= images.max()


def test_draws_stay_within_what_is_set_and_fill_it() -> None:
    crops, mirrored, angles, scales = drawn(4000, 0, True, 18, 0.25, 0.08)
    assert 0.45 < mirrored.mean() < 0.55
    degrees = np.degrees(angles)
    assert -18 <= degrees.min() < -17 < 17 < degrees.max() <= 18
    assert 0.75 <= scales.min() < 0.76 < 1.24 < scales.max() <= 1.25
    area, aspect, *places = crops.T
    assert 0.08 <= area.min() < 0.09 < 0.99 < area.max() <= 1
    assert abs(area.mean() - 0.54) < 0.02
    assert 1 / ASPECT <= aspect.min() < 0.76 < 1.32 < aspect.max() <= ASPECT + 1e-6
    assert abs(np.log(aspect).mean()) < 0.02, "wide and tall crops are as frequent"
    assert all(0 <= place.min() < 0.01 < 0.99 < place.max() < 1 for place in places)


def test_images_are_flipped_rotated_and_zoomed_about_their_centre() -> None:
    """A spot moves to where the draw sends it."""
    side, count, spot = 64, 16, torch.tensor([12.0, 5.0])
    across = torch.arange(side) - (side - 1) / 2
    down, right = torch.meshgrid(across, across, indexing="ij")
    blob = torch.exp(-((right - spot[0]) ** 2 + (down - spot[1]) ** 2) / 8)
    draws = drawn(count, 7)
    images = transform(blob.expand(count, 3, side, side), draws)
    mirrored, angles, scales = (torch.from_numpy(values) for values in draws[1:])
    assert 0 < mirrored.sum() < count
    weight = images[:, 0].sum((1, 2))
    x = (images[:, 0] * right).sum((1, 2)) / weight
    y = (images[:, 0] * down).sum((1, 2)) / weight
    there = torch.stack((torch.where(mirrored, -x, x), y), 1)
    distance = spot.norm() / scales
    angle = torch.atan2(spot[1], spot[0]) - angles
    expected = torch.stack((distance * angle.cos(), distance * angle.sin()), 1)
    torch.testing.assert_close(there, expected, rtol=0, atol=0.3)


def test_images_are_normalised_as_torchvision_does() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    expected = reference_transforms.normalize(
        images.float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    torch.testing.assert_close(normalise(images), expected)


def test_affine_matrices_keep_the_centre_and_mirror_the_corners() -> None:
    matrices = affine_matrices(
        np.array([False, True, False]), np.array([0.3, 0, 0]), np.array([1.2, 1, 0.5]), side=8
    )
    assert matrices.dtype == np.float32
    np.testing.assert_allclose(matrices @ [4, 4, 1], np.full((3, 2), 4), rtol=1e-6)
    np.testing.assert_allclose(matrices[1] @ [0, 0, 1], [8, 0], atol=1e-6)
    np.testing.assert_allclose(matrices[2] @ [0, 0, 1], [2, 2], atol=1e-6)


@given(
    st.floats(0.01, 1),
    st.floats(1 / ASPECT, ASPECT),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 3000),
    st.integers(1, 3000),
)
def test_a_crop_lies_within_its_image(
    area: float, aspect: float, down: float, right: float, height: int, width: int
) -> None:
    crops, sizes = np.array([[area, aspect, down, right]]), np.array([[height, width]])
    [[top, left, tall, wide]] = crop_boxes(crops, sizes).tolist()
    assert 0 <= top <= top + tall <= height
    assert 0 <= left <= left + wide <= width
    assert tall >= 1
    assert wide >= 1
    if tall < height and wide < width and min(tall, wide) > 50:
        assert tall * wide == pytest.approx(area * height * width, rel=0.05)
        assert wide / tall == pytest.approx(aspect, rel=0.05)


def test_a_whole_image_is_a_crop_too() -> None:
    whole = crop_boxes(np.array([[1.0, 1, 0.9, 0.9]]), np.array([[40, 40]]))
    assert whole.tolist() == [[0, 0, 40, 40]]


def test_sides_hold_the_pixels_of_their_crops() -> None:
    crops = drawn(100, 1, True, 18, 0.25, 0.08).crops
    for crop, side in zip(crops, needed_sides(crops, 96), strict=True):
        [[_, _, tall, wide]] = crop_boxes(crop[None], np.array([[side, side]])).tolist()
        assert tall * wide == pytest.approx(96 * 96, rel=0.15)
    assert needed_sides(drawn(3, 1).crops, 96).tolist() == [96] * 3
