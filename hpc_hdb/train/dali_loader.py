"""Batches of image files decoded and augmented by NVIDIA DALI."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.cyclic import READERS, Augmentation
from dali_pipelines.feed import Feed, Job, Kind
from hpc_hdb.config import Train
from hpc_hdb.errors import BadImage, UserError
from hpc_hdb.train.augment import draw_affine
from hpc_hdb.train.data import EncodedImages
from hpc_hdb.train.decode import DecodeError, check_header, encode_blank

_KEPT = 2  # idle pipelines: each holds its buffers, and resolutions mostly change to a neighbour


class DaliLoader:
    """A `Loader` that decodes in DALI's threads, or on the GPU, while the caller trains.

    Parameters
    ----------
    data : EncodedImages
    threads : int
        CPU threads of a pipeline; 0 counts as 1, since DALI has no other thread to decode in.
    augmentation : Train or None
        Its flip, rotation and zoom; None for evaluation.
    device : torch.device
        Where batches are made and given out.
    skip : bool
        Whether to leave bad images out.
    """

    def __init__(
        self,
        data: EncodedImages,
        threads: int,
        augmentation: Train | None,
        device: torch.device,
        skip: bool = False,
    ) -> None:
        self.left_out: list[int] = []
        self._skip = skip
        self._bad: set[int] = set()
        self._checked = np.full(len(data.labels), data.verified)
        self._data = data
        self._labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64))
        self._threads = max(1, threads)
        self._augmentation: Augmentation | None = None
        if augmentation is not None:
            self._augmentation = Augmentation(
                augmentation.flip, augmentation.rotation, augmentation.zoom
            )
        self._device = device
        self._kind: Kind = self._augmentation.kind if self._augmentation else "plain"
        self._readers = ThreadPoolExecutor(READERS)
        self._idle: dict[int, Feed] = {}  # by resolution, the least recently used first

    def prepare(self, resolution: int, largest_batch: int) -> None:
        feed = self._idle.pop(resolution, None)
        if feed is None or feed.largest_batch < largest_batch:
            feed = None  # its memory is free before another pipeline asks for its own
            while len(self._idle) >= _KEPT:
                del self._idle[next(iter(self._idle))]
            feed = self._build(resolution, largest_batch, self._kind)
        self._idle[resolution] = feed

    def batches(
        self, indices: np.ndarray, sizes: Sequence[int], resolution: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.prepare(resolution, max(sizes))
        # A feed goes back only from a finished round: one that failed, or was abandoned with
        # batches under way, is freed together with this generator.
        feed = self._idle.pop(resolution)
        chunks = np.split(indices, np.cumsum(sizes)[:-1])
        masks: dict[int, np.ndarray] = {}
        feed.start(self._jobs(chunks, resolution, seed, masks))
        for position, chosen in enumerate(chunks):
            while True:
                try:
                    images = feed.next()
                    break
                except (RuntimeError, MemoryError) as error:
                    problem = self._explained(error, chosen, resolution)
                    if not (self._skip and isinstance(problem, BadImage)):
                        raise problem from None
                del feed  # after an error DALI's pipeline is of no more use
                self._leave_out(self._undecodable(chosen, resolution))
                feed = self._build(resolution, max(sizes), self._kind)
                feed.start(self._jobs(chunks, resolution, seed, masks, position))
            if position == len(chunks) - 1:
                feed.finish()
                self._idle[resolution] = feed
            labels = self._labels[torch.from_numpy(chosen[masks.pop(position)])]
            if len(labels):
                yield images, labels.to(self._device, non_blocking=True)

    def _build(self, resolution: int, largest_batch: int, kind: Kind) -> Feed:
        return Feed(resolution, largest_batch, kind, self._threads, self._device, self._readers)

    def _jobs(
        self,
        chunks: list[np.ndarray],
        resolution: int,
        seed: int,
        masks: dict[int, np.ndarray],
        start: int = 0,
    ) -> Iterator[Job]:
        """What reads the batches from `start` on, one after another, and draws their changes.

        A job also says in `masks`, by position, which of its chunk's images are good.
        """
        generator = torch.Generator().manual_seed(seed)
        for position, chosen in enumerate(chunks):
            changes = None
            if self._augmentation is not None:
                how = self._augmentation
                draws = draw_affine(len(chosen), generator, how.flip, how.rotation, how.zoom)
                mirrored, angles, scales = (drawn.numpy() for drawn in draws)
                changes = how.changes(mirrored, angles, scales, resolution)
            if position >= start:
                masks[position] = np.ones(len(chosen), dtype=bool)
                yield partial(self._read, chosen, resolution, changes, masks[position])

    def _read(
        self, chosen: np.ndarray, resolution: int, changes: np.ndarray | None, good: np.ndarray
    ) -> Any:
        """What a pipeline takes of a batch; bad images are marked in `good`, and left out."""
        encoded = []
        for place, index in enumerate(chosen.tolist()):
            try:
                if index in self._bad:
                    good[place] = False
                else:
                    encoded.append(self._encoded(index, resolution))
            except BadImage:
                if not self._skip:
                    raise
                good[place] = False
                self._leave_out([index])
        if not encoded:  # DALI wants something to decode; the labels tell that it is nothing
            return [_NOTHING] if changes is None else ([_NOTHING], changes[:1])
        return encoded if changes is None else (encoded, changes[good])

    def _encoded(self, index: int, resolution: int) -> np.ndarray:
        data = self._data.read(index, resolution)
        if not self._checked[index]:
            try:
                check_header(data.tobytes())
            except DecodeError as error:
                raise self._data.bad_image(index, resolution, error) from None
            self._checked[index] = True
        return data

    def _leave_out(self, samples: Sequence[int]) -> None:
        self.left_out += samples
        self._bad.update(samples)

    def _explained(self, error: Exception, chosen: np.ndarray, resolution: int) -> Exception:
        """What to raise instead of DALI's own error."""
        reason = str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
        if self._device.type == "cuda" and _OUT_OF_MEMORY.search(reason):
            return torch.cuda.OutOfMemoryError(reason)
        culprit = next(iter(self._undecodable(chosen, resolution)), None)
        if culprit is None:
            return UserError(f'DALI failed ({reason}): set data.loader to "torch"')
        try:
            self._data.load(np.array([culprit]), resolution)
        except BadImage as named:
            return named
        return BadImage(
            f"DALI cannot decode {self._data.name(culprit, resolution)}: save it anew as JPEG or "
            'PNG, or set data.loader to "torch", which can'
        )

    def _undecodable(self, chosen: np.ndarray, resolution: int) -> list[int]:
        """The samples of these on which DALI fails; its errors often do not say which."""
        bad = []
        feed: Feed | None = None
        for index in chosen.tolist():
            if index in self._bad:
                continue
            if feed is None:
                feed = self._build(resolution, 1, "plain")
            feed.start(iter([partial(self._one, index, resolution)]))
            try:
                feed.next()
                feed.finish()
            except RuntimeError:
                feed = None
                bad.append(index)
        return bad

    def _one(self, index: int, resolution: int) -> list[np.ndarray]:
        return [self._data.read(index, resolution)]


_NOTHING = encode_blank()
_OUT_OF_MEMORY = re.compile("can't allocate|allocation failed|out of memory", re.IGNORECASE)
