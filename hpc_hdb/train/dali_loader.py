"""Batches of image files decoded and augmented by NVIDIA DALI."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline
from torch import Tensor

from dali_pipelines import affine_matrices, evaluation_pipeline, training_pipeline
from hpc_hdb.config import Train
from hpc_hdb.errors import UserError
from hpc_hdb.train.augment import draw_affine
from hpc_hdb.train.data import ImageFiles

_KEPT = 2  # idle pipelines: each holds its buffers, and resolutions mostly change to a neighbour


class DaliLoader:
    """A `Loader` that decodes in DALI's threads, or on the GPU, while the caller trains.

    Parameters
    ----------
    data : ImageFiles
    threads : int
        CPU threads of a pipeline; 0 counts as 1, since DALI has no other thread to decode in.
    augmentation : Train or None
        Its flip, rotation and zoom; None for evaluation.
    device : torch.device
        Where batches are made and given out.
    """

    def __init__(
        self, data: ImageFiles, threads: int, augmentation: Train | None, device: torch.device
    ) -> None:
        self._data = data
        self._labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64))
        self._threads = max(1, threads)
        self._augmentation = augmentation
        self._device = device
        self._idle: dict[int, _Fed] = {}  # by resolution, the least recently used first

    def prepare(self, resolution: int, largest_batch: int) -> None:
        fed = self._idle.pop(resolution, None)
        if fed is None or fed.pipeline.max_batch_size < largest_batch:
            fed = None  # its memory is free before another pipeline asks for its own
            while len(self._idle) >= _KEPT:
                del self._idle[next(iter(self._idle))]
            fed = self._build(resolution, largest_batch, self._augmentation is not None)
        self._idle[resolution] = fed

    def batches(
        self, indices: np.ndarray, sizes: Sequence[int], resolution: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.prepare(resolution, max(sizes))
        # A pipeline goes back only from a finished round: one that failed, or was abandoned with
        # batches under way, is freed together with this generator.
        fed = self._idle.pop(resolution)
        chunks = np.split(indices, np.cumsum(sizes)[:-1])
        fed.source.requests = self._requests(chunks, resolution, seed)
        for position, chosen in enumerate(chunks):
            try:
                images = self._run(fed.pipeline)
            except (RuntimeError, MemoryError) as error:
                raise self._explained(error, chosen, resolution) from None
            if position == len(chunks) - 1:
                fed.pipeline.reset()
                self._idle[resolution] = fed
            labels = self._labels[torch.from_numpy(chosen)]
            yield images, labels.to(self._device, non_blocking=True)

    def _build(self, resolution: int, largest_batch: int, augment: bool) -> _Fed:
        source = _Source()
        device_id = None
        if self._device.type == "cuda":
            device_id = self._device.index
            if device_id is None:
                device_id = torch.cuda.current_device()
        make = training_pipeline if augment else evaluation_pipeline
        return _Fed(make(source, resolution, largest_batch, self._threads, device_id), source)

    def _requests(self, chunks: list[np.ndarray], resolution: int, seed: int) -> Iterator[Any]:
        """What a pipeline's source gives, batch by batch."""
        generator = torch.Generator().manual_seed(seed)
        for chosen in chunks:
            paths = [self._data.paths[index] for index in chosen]
            if self._augmentation is None:
                yield paths
            else:
                how = self._augmentation
                draws = draw_affine(len(chosen), generator, how.flip, how.rotation, how.zoom)
                mirrored, angles, scales = (drawn.numpy() for drawn in draws)
                yield paths, affine_matrices(mirrored, angles, scales, resolution)

    def _run(self, pipeline: Pipeline) -> Tensor:
        if self._device.type == "cpu":
            (images,) = pipeline.run()
            return torch.from_dlpack(images.as_tensor())
        # Bound to torch's stream, DALI reuses the memory only after torch's work on it.
        (images,) = pipeline.run(torch.cuda.current_stream(self._device))
        pixels = torch.from_dlpack(images.as_tensor())
        return pixels.contiguous(memory_format=torch.channels_last)

    def _explained(self, error: Exception, chosen: np.ndarray, resolution: int) -> Exception:
        """What to raise instead of DALI's own error."""
        reason = str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
        if self._device.type == "cuda" and _OUT_OF_MEMORY.search(reason):
            return torch.cuda.OutOfMemoryError(reason)
        culprit = self._first_undecodable(chosen, resolution)
        if culprit is None:
            return UserError(f'DALI failed ({reason}): set data.loader to "torch"')
        try:
            self._data.load(np.array([culprit]), resolution)
        except UserError as named:
            return named
        return UserError(
            f"DALI cannot decode {self._data.paths[culprit]}: save it anew as JPEG or PNG, or set "
            'data.loader to "torch", which can'
        )

    def _first_undecodable(self, chosen: np.ndarray, resolution: int) -> int | None:
        """The first of these samples on which DALI fails; its errors often do not say which."""
        fed = self._build(resolution, 1, augment=False)
        fed.source.requests = ([self._data.paths[index]] for index in chosen)
        for index in chosen:
            try:
                fed.pipeline.run()
            except RuntimeError:
                return int(index)
        return None


class _Source:
    """A pipeline's source, whose requests are replaced for each round.

    It knows nothing of its pipeline: a cycle would keep both alive until garbage is collected.
    """

    def __init__(self) -> None:
        self.requests: Iterator[Any] = iter(())

    def __call__(self) -> Any:
        return next(self.requests)


@dataclass
class _Fed:
    """A pipeline and the source that it asks."""

    pipeline: Pipeline
    source: _Source


_OUT_OF_MEMORY = re.compile("can't allocate|allocation failed|out of memory", re.IGNORECASE)
