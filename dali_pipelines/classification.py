"""Images to normalised batches for classification, on the CPU or a GPU.

Nothing in a pipeline is random: what is drawn at random is an input of it, so the same input
gives the same batch whatever ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType, DALIImageType

from dali_pipelines.augmentation import MEAN, STD


@dataclass(frozen=True)
class Form:
    """What a pipeline takes and gives.

    Attributes
    ----------
    encoded : bool
        Whether images come as JPEG or PNG files, to be decoded, or as pixels.
    crops : bool
        Whether a crop is given for each image; else the centre square is taken.
    change : {"none", "flip", "warp"}
        What is then done to an image, as given for each.
    dtype : torch.dtype
        Of the batches: torch.float32, torch.float16 or torch.bfloat16.
    channels_last : bool
        Whether the colours of a pixel lie side by side in memory, as GPUs convolve fastest.
    """

    encoded: bool = True
    crops: bool = False
    change: Literal["none", "flip", "warp"] = "none"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


def image_pipeline(
    source: Callable[[], tuple[Sequence[Any], ...]],
    form: Form,
    resolution: int,
    largest_batch: int,
    threads: int,
    device_id: int | None = None,
) -> Pipeline:
    """Decode, crop, resize, flip or warp, and normalise.

    Parameters
    ----------
    source : callable
        Gives the next batch of at most `largest_batch` images, as a tuple of: the images, each
        an ndarray of uint8, of shape (bytes,) where encoded, else (h, w, 3), RGB; with `crops`,
        their upper left corners and their sizes, each of shape (b, 2), int32, (y, x) in pixels;
        to flip, which ones, shape (b,), int32, 0 or 1; to warp, the maps of `affine_matrices`,
        shape (b, 2, 3), float32. Raises StopIteration at the end; after ``pipeline.reset()`` it
        is asked again.
    form : Form
    resolution : int
        Side of the images given out, in pixels.
    largest_batch : int
    threads : int
        CPU threads, at least 1.
    device_id : int or None
        The GPU that decodes and resizes; None for the CPU.

    Returns
    -------
    Pipeline
        Built. A run gives one output on `device_id`, RGB normalised by `MEAN` and `STD` (values
        about -2.1 to 2.6): of shape (b, 3, resolution, resolution), or with `channels_last`
        (b, resolution, resolution, 3); float32, or float16 where the form's dtype has 16 bits.
        Where a map leaves the image, the nearest border pixel is repeated.
    """
    pipeline = Pipeline(batch_size=largest_batch, num_threads=threads, device_id=device_id)
    with pipeline:
        images: Any
        images, given = _cropped(source, form, "cpu" if device_id is None else "gpu")
        if not form.crops:
            # Without subpixel_scale the whole image maps to the rounded size, as in Pillow.
            images = fn.resize(images, resize_shorter=resolution, subpixel_scale=False)
        else:
            images = fn.resize(images, size=(resolution, resolution))
        if form.change == "warp":
            images = fn.crop(images, crop=(resolution, resolution), rounding="truncate")
            # Float output keeps what lies between two levels, and is faster than rounding it.
            images = fn.warp_affine(images, matrix=given[0], dtype=DALIDataType.FLOAT)
        pipeline.set_outputs(
            fn.crop_mirror_normalize(
                images,
                crop=(resolution, resolution),
                rounding="truncate",  # of the crop's position, as in Pillow's integer division
                mirror=given[0] if form.change == "flip" else 0,
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
                dtype=DALIDataType.FLOAT if form.dtype.itemsize == 4 else DALIDataType.FLOAT16,
                output_layout="HWC" if form.channels_last else "CHW",
            )
        )
    pipeline.build()
    return pipeline


def decoding_pipeline(
    source: Callable[[], tuple[Sequence[Any], ...]], form: Form, largest_batch: int, threads: int
) -> Pipeline:
    """Decode, crop and flip on the CPU: what `dali_pipelines.resize.Resize` goes on from.

    Parameters
    ----------
    source, form, largest_batch, threads
        As in `image_pipeline`; nothing is warped.

    Returns
    -------
    Pipeline
        Built. A run gives images of shape (h, w, 3), each of its own size, uint8, RGB; and, with
        flips, which ones are flipped, int32, 0 or 1.
    """
    pipeline = Pipeline(batch_size=largest_batch, num_threads=threads, device_id=None)
    with pipeline:
        images, flipped = _cropped(source, form, "cpu")
        if flipped:
            images = fn.flip(images, horizontal=flipped[0])
        pipeline.set_outputs(images, *flipped)
    pipeline.build()
    return pipeline


def _cropped(
    source: Callable[[], tuple[Sequence[Any], ...]], form: Form, device: str
) -> tuple[Any, list[Any]]:
    """Images, decoded and cropped where the form says so, and what is given for each beside it."""
    inputs = [(DALIDataType.UINT8, 1 if form.encoded else 3, "" if form.encoded else "HWC")]
    if form.crops:
        inputs += [(DALIDataType.INT32, 1, "")] * 2
    if form.change == "flip":
        inputs.append((DALIDataType.INT32, 0, ""))
    elif form.change == "warp":
        inputs.append((DALIDataType.FLOAT, 2, ""))
    dtypes, dimensions, layouts = (list(values) for values in zip(*inputs, strict=True))
    images: Any
    images, *given = fn.external_source(
        source=source, num_outputs=len(inputs), dtype=dtypes, ndim=dimensions, layout=layouts
    )
    boxes = {"start": given.pop(0), "shape": given.pop(0)} if form.crops else {}
    return (_decoded if form.encoded else _cut)(images, boxes, device), given


def _decoded(encoded: Any, boxes: dict[str, Any], device: str) -> Any:
    """Decoded to RGB, uint8, layout HWC: only the crop's part, where there is one."""
    how: dict[str, Any] = {
        "device": "cpu" if device == "cpu" else "mixed",
        "output_type": DALIImageType.RGB,
        "adjust_orientation": False,  # as Pillow and torchvision leave it
        "affine": False,  # pinned threads of several processes on a node would share cores
    }
    if not boxes:
        return fn.decoders.image(encoded, **how)
    return fn.decoders.image_slice(encoded, axis_names="HW", **boxes, **how)


def _cut(images: Any, boxes: dict[str, Any], device: str) -> Any:
    """The crop's part of each image, or all of it, on the device."""
    if boxes:
        images = fn.slice(images, axis_names="HW", **boxes)
    return images if device == "cpu" else images.gpu()
