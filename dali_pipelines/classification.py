"""Encoded images to normalised batches for classification, on the CPU or a GPU.

Both pipelines resize the shorter side to the resolution and crop the centre. Training then
applies one affine map per image, given by the caller: nothing in a pipeline is random, so the
same input gives the same batch whatever ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType, DALIImageType

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of R, G and B, in units of full brightness."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of R, G and B, in units of full brightness."""


def training_pipeline(
    source: Callable[[], tuple[Sequence[np.ndarray], np.ndarray]],
    resolution: int,
    largest_batch: int,
    threads: int,
    device_id: int | None = None,
    warp: bool = True,
) -> Pipeline:
    """Decode, resize, crop, flip or warp, and normalise.

    Parameters
    ----------
    source : callable
        Gives the next batch, at most `largest_batch` images: the bytes of their JPEG or PNG
        files, ndarrays of uint8 with one dimension; and the maps of `affine_matrices`, an ndarray
        of shape (b, 2, 3), float32, or, without `warp`, which images to flip left and right, of
        shape (b,), int32, 0 or 1. Raises StopIteration at the end; after ``pipeline.reset()`` it
        is asked again.
    resolution : int
        Side of the images given out, in pixels.
    largest_batch : int
    threads : int
        CPU threads, at least 1.
    device_id : int or None
        The GPU that decodes and warps; None for the CPU.
    warp : bool
        Whether images are rotated and zoomed as well as flipped, which resamples them once more.

    Returns
    -------
    Pipeline
        Built. A run gives one output of shape (b, 3, resolution, resolution), layout NCHW,
        float32, RGB, normalised by `MEAN` and `STD` (values about -2.1 to 2.6), on `device_id`.
        Where a map leaves the image, the nearest border pixel is repeated.
    """

    pipeline = _pipeline(largest_batch, threads, device_id)
    with pipeline:
        encoded, changes = fn.external_source(
            source=source,
            num_outputs=2,
            dtype=[DALIDataType.UINT8, DALIDataType.FLOAT if warp else DALIDataType.INT32],
            ndim=[1, 2 if warp else 0],
        )
        images = _resized(encoded, resolution, device_id)
        if warp:
            images = fn.crop(images, crop=(resolution, resolution), rounding="truncate")
            # Float output keeps what lies between two levels, and is faster than rounding it.
            images = fn.warp_affine(images, matrix=changes, dtype=DALIDataType.FLOAT)
        pipeline.set_outputs(_normalised(images, resolution, mirror=0 if warp else changes))
    pipeline.build()
    return pipeline


def evaluation_pipeline(
    source: Callable[[], Sequence[np.ndarray]],
    resolution: int,
    largest_batch: int,
    threads: int,
    device_id: int | None = None,
) -> Pipeline:
    """Decode, resize, crop and normalise; as `training_pipeline` without the warp.

    Parameters
    ----------
    source : callable
        Gives the encoded images of the next batch; otherwise as in `training_pipeline`.
    resolution, largest_batch, threads, device_id
        As in `training_pipeline`.

    Returns
    -------
    Pipeline
        As of `training_pipeline`.
    """

    pipeline = _pipeline(largest_batch, threads, device_id)
    with pipeline:
        encoded = fn.external_source(source=source, dtype=DALIDataType.UINT8, ndim=1)
        images = _resized(encoded, resolution, device_id)
        pipeline.set_outputs(_normalised(images, resolution))
    pipeline.build()
    return pipeline


def affine_matrices(
    mirrored: np.ndarray, angles: np.ndarray, scales: np.ndarray, side: int
) -> np.ndarray:
    """Maps from pixels of the output to pixels of the input that keep the centre.

    Parameters
    ----------
    mirrored : ndarray, shape (b,), bool
        Flip left and right.
    angles : ndarray, shape (b,), float
        Rotation, in radians.
    scales : ndarray, shape (b,), float
        Input pixels per output pixel: below 1 enlarges the centre.
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


def _pipeline(largest_batch: int, threads: int, device_id: int | None) -> Pipeline:
    return Pipeline(batch_size=largest_batch, num_threads=threads, device_id=device_id)


def _resized(encoded: Any, resolution: int, device_id: int | None) -> Any:
    """Decoded to RGB, uint8, layout HWC, the shorter side `resolution` pixels."""
    images = fn.decoders.image(
        encoded,
        device="cpu" if device_id is None else "mixed",
        output_type=DALIImageType.RGB,
        adjust_orientation=False,  # as Pillow and torchvision leave it
        affine=False,  # pinned threads of several processes on a node would share the same cores
    )
    # Without subpixel_scale the whole image maps to the rounded size, as in Pillow.
    return fn.resize(images, resize_shorter=resolution, subpixel_scale=False)


def _normalised(images: DataNode, resolution: int, mirror: Any = 0) -> DataNode:
    """The centre crop, float32, layout CHW, of zero mean and unit deviation; flipped on request."""
    return fn.crop_mirror_normalize(
        images,
        crop=(resolution, resolution),
        rounding="truncate",  # of the crop's position, as in Pillow's integer division
        mirror=mirror,
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        dtype=DALIDataType.FLOAT,
        output_layout="CHW",
    )
