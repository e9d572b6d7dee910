"""Decoded images to batches on the CPU, by torch.

Resizing bytes takes torch a third to a half of DALI's time, in which resizing is most of the work
of small photographs; it gives what Pillow gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dali_pipelines.augmentation import MEAN, STD
from dali_pipelines.classification import Form

_SCALE = (1 / (255 * np.array(STD))).astype(np.float32)
_SHIFT = (-np.array(MEAN) / np.array(STD)).astype(np.float32)


class Resize:
    """Resizes and normalises, several images at a time.

    Parameters
    ----------
    form : Form
        Of which nothing is warped.
    resolution : int
        Side of the images given out, in pixels.
    threads : int
        Images at a time.
    """

    def __init__(self, form: Form, resolution: int, threads: int) -> None:
        self._form = form
        self._resolution = resolution
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._scale, self._shift = np.tile(_SCALE, resolution), np.tile(_SHIFT, resolution)

    def __call__(self, images: Sequence[Any], flipped: np.ndarray) -> Tensor:
        """A batch.

        Parameters
        ----------
        images : sequence of tensors that speak DLPack, each of shape (h, w, 3), uint8, RGB
            Crops where the form crops, which are resized as they are; else whole images, of
            which the shorter side is resized and the centre taken.
        flipped : ndarray, shape (b,)
            Not 0 where the image comes flipped: its centre lies as far from the other border.

        Returns
        -------
        Tensor, shape (b, 3, resolution, resolution), of the form's dtype
            Normalised by `MEAN` and `STD`; in memory channels last where the form says so.
        """
        side = self._resolution
        last = self._form.channels_last
        batch = np.empty((len(images), *((side, side, 3) if last else (3, side, side))), np.float32)
        left = iter(range(len(images)))  # each thread takes the next one
        fill = partial(self._fill, batch, images, flipped, left)
        for thread in [self._pool.submit(fill) for _ in range(self._threads)]:
            thread.result()
        pixels = torch.from_numpy(batch).to(self._form.dtype)
        return pixels.permute(0, 3, 1, 2) if last else pixels

    def _fill(
        self, batch: np.ndarray, images: Sequence[Any], flipped: np.ndarray, left: Iterator[int]
    ) -> None:
        """One thread's images of a batch; numpy, unlike torch, starts no threads of its own."""
        for number in left:
            image = torch.from_dlpack(images[number])
            pixels, out = self._resized(image, bool(flipped[number])), batch[number]
            if self._form.channels_last:
                rows = out.reshape(self._resolution, -1)
                np.multiply(pixels.reshape(rows.shape), self._scale, out=rows)
                rows += self._shift
                continue
            np.copyto(out, pixels.transpose(2, 0, 1))  # then scaled: sooner than both at once
            out *= _SCALE[:, None, None]
            out += _SHIFT[:, None, None]

    def _resized(self, image: Tensor, flipped: bool) -> np.ndarray:
        """Of shape (resolution, resolution, 3), uint8."""
        side = self._resolution
        height, width = image.shape[:2]
        size = (side, side)
        if not self._form.crops:
            scale = side / min(height, width)
            size = (max(side, round(height * scale)), max(side, round(width * scale)))
        if size != (height, width):
            channels_last = image.permute(2, 0, 1)[None]
            resized = functional.interpolate(channels_last, size, mode="bilinear", antialias=True)
            image = resized[0].permute(1, 2, 0)
        top, left = (size[0] - side) // 2, (size[1] - side + flipped) // 2
        return image[top : top + side, left : left + side].numpy()
