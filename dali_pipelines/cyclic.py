"""Batches through the stages of a schedule, without a pause where the resolution changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.augmentation import PLAIN, Augmentation, needed_sides
from dali_pipelines.classification import Form
from dali_pipelines.feed import Feed
from dali_pipelines.transfer import to_device

READERS = 4
"""Threads that read files: enough to hide the latency of a parallel file system."""
NOTICE = 32
"""Batches before the end of a cycle at which the next pipeline is built, in 0.2 s or so."""


class Images(Protocol):
    """Labelled images; `dali_pipelines.shards.Shards` is one.

    Attributes
    ----------
    labels : ndarray, shape (n,), int64
    encoded : bool
        Whether `read` gives the bytes of JPEG or PNG files, or pixels.
    """

    labels: np.ndarray
    encoded: bool

    def read(self, sample: int, side: int) -> np.ndarray:
        """An image whose shorter side has at least `side` pixels, if there is one.

        Returns
        -------
        ndarray, uint8
            Of shape (bytes,) where encoded, else (h, w, 3), RGB.
        """
        ...


@dataclass(frozen=True)
class Cycle:
    """Epochs at one resolution.

    Attributes
    ----------
    start_epoch, end_epoch : int
        The first, and the one after the last.
    resolution : int
        Side of the images, in pixels.
    batch : int
        Images in a batch; the last one of an epoch may hold fewer.
    """

    start_epoch: int
    end_epoch: int
    resolution: int
    batch: int


class CyclicLoader:
    """The batches of one worker, epoch after epoch, through all cycles.

    An epoch is one permutation of all samples, the same on every worker, of which this worker
    reads its share. Near the end of a cycle the next one's pipeline is built and its first
    batches are decoded, beside the training; never are more than two pipelines alive.

    Parameters
    ----------
    images : Images
    cycles : sequence of Cycle
        One after another, without gaps.
    share : (int, int)
        Begin and end of this worker's positions in each epoch's permutation.
    seed : int
        Of the permutations and the augmentation: the same seed gives the same batches.
    augmentation : Augmentation
    threads : int
        CPU threads that decode.
    device : torch.device
        Where images are decoded and given out.
    dtype : torch.dtype
        Of the images: torch.float32, torch.float16 or torch.bfloat16.
    channels_last : bool
        The images' memory format.

    Raises
    ------
    ValueError
        If the cycles have gaps, or the share is not within the samples.
    """

    def __init__(
        self,
        images: Images,
        cycles: Sequence[Cycle],
        share: tuple[int, int] | None = None,
        seed: int = 0,
        augmentation: Augmentation = PLAIN,
        threads: int = 2,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        samples = len(images.labels)
        begin, end = share if share is not None else (0, samples)
        if not 0 <= begin < end <= samples:
            raise ValueError(f"share {begin} to {end} is not within {samples} samples")
        for one, following in itertools.pairwise(cycles):
            if one.end_epoch != following.start_epoch:
                raise ValueError(
                    f"a cycle ends at epoch {one.end_epoch}, the next starts at "
                    f"{following.start_epoch}"
                )
        if any(cycle.start_epoch >= cycle.end_epoch for cycle in cycles) or not cycles:
            raise ValueError("every cycle needs an epoch")
        self._images = images
        self._labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
        self._cycles = cycles
        self._share = (begin, end)
        self._seed = seed
        self._augmentation = augmentation
        self._form = Form(
            images.encoded, augmentation.crops, augmentation.change, dtype, channels_last
        )
        self._threads = threads
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            # Here, since the thread that builds pipelines has a current device of its own.
            self._device = torch.device("cuda", torch.cuda.current_device())

    def steps(self, cycle: Cycle) -> int:
        """Batches of an epoch in a cycle."""
        begin, end = self._share
        return -(-(end - begin) // cycle.batch)

    def batches(self, epoch: int = 0, step: int = 0) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """All batches from a step of an epoch on: a resumed run's start where it left off.

        Yields
        ------
        epoch, step : int
            Of the batch; the step counts the batches of its epoch.
        images : Tensor, shape (b, 3, resolution, resolution), of the loader's dtype
            Normalised, on the device.
        labels : Tensor, shape (b,), int64
            On the device.
        """
        todo = [cycle for cycle in self._cycles if cycle.end_epoch > epoch]
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as builder:
            upcoming: Future[Feed] | None = None
            for number, cycle in enumerate(todo):
                place = (epoch, step) if number == 0 else (cycle.start_epoch, 0)
                feed = upcoming.result() if upcoming else self._begin(cycle, place, readers, stream)
                upcoming = None
                following = todo[number + 1] if number + 1 < len(todo) else None
                left = (cycle.end_epoch - place[0]) * self.steps(cycle) - place[1]
                for of_epoch, of_step, chosen in self._requests(cycle, place):
                    images = feed.next()
                    if following and upcoming is None and left <= NOTICE:
                        start = (following.start_epoch, 0)
                        upcoming = builder.submit(self._begin, following, start, readers, stream)
                    left -= 1
                    labels = self._labels[torch.from_numpy(chosen)]
                    yield of_epoch, of_step, images, to_device(labels, self._device)
                del feed  # at most two are alive

    def _begin(
        self,
        cycle: Cycle,
        place: tuple[int, int],
        readers: ThreadPoolExecutor,
        stream: torch.cuda.Stream | None,
    ) -> Feed:
        """A feed that has decoded its first batch, at `place` (epoch and step), for `stream`."""
        shape = (cycle.resolution, cycle.batch, self._threads)
        feed = Feed(self._form, *shape, self._device, readers)
        requests = self._requests(cycle, place)
        with torch.cuda.stream(stream) if stream else nullcontext():
            feed.start(
                (partial(self._read, cycle, *request) for request in requests), prefetch=True
            )
        return feed

    def _requests(
        self, cycle: Cycle, place: tuple[int, int]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Epoch, step and samples of each batch of a cycle, from `place` on."""
        begin, end = self._share
        for epoch in range(place[0], cycle.end_epoch):
            generator = np.random.default_rng([self._seed, epoch])
            own = generator.permutation(len(self._labels))[begin:end]
            first = place[1] if epoch == place[0] else 0
            for step in range(first, self.steps(cycle)):
                yield epoch, step, own[step * cycle.batch : (step + 1) * cycle.batch]

    def _read(
        self, cycle: Cycle, epoch: int, step: int, chosen: np.ndarray
    ) -> tuple[Sequence[np.ndarray] | np.ndarray, ...]:
        generator = np.random.default_rng([self._seed, epoch, self._share[0], step])
        draws = self._augmentation.draw(len(chosen), generator)
        sides = needed_sides(draws.crops, cycle.resolution)
        places = zip(chosen.tolist(), sides.tolist(), strict=True)
        images = [self._images.read(sample, side) for sample, side in places]
        return images, *self._augmentation.inputs(draws, cycle.resolution, images)
