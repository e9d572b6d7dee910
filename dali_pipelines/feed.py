"""A pipeline and what keeps it fed: threads that read the next batches' bytes ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline
from torch import Tensor

from dali_pipelines.classification import Form, decoding_pipeline, image_pipeline
from dali_pipelines.resize import Resize

AHEAD = 3
"""Batches that are being read beyond those that DALI has asked for."""
_RESIZED = 2
"""Batches that are resized ahead, where torch resizes."""
_SMALL = 80
"""Up to this side, in pixels, DALI resizes sooner than Python starts torch for each image."""

Job = Callable[[], tuple[Any, ...]]
"""Reads one batch: gives what the source of `image_pipeline` gives."""


class Feed:
    """Batches of one resolution, decoded while the caller trains.

    Parameters
    ----------
    form : Form
    resolution : int
        Side of the images, in pixels.
    largest_batch : int
    threads : int
        CPU threads that decode, at least 1.
    device : torch.device
        Where images are decoded and given out.
    readers : ThreadPoolExecutor
        Threads that read; may be shared.
    """

    def __init__(
        self,
        form: Form,
        resolution: int,
        largest_batch: int,
        threads: int,
        device: torch.device,
        readers: ThreadPoolExecutor,
    ) -> None:
        self.largest_batch = largest_batch
        self._form = form
        self._device = device
        device_id = None
        if device.type == "cuda":
            device_id = torch.cuda.current_device() if device.index is None else device.index
        self._source = _ReadAhead(readers)
        self._first: Tensor | None = None
        self._resize: Resize | None = None
        self._coming: deque[Future[Tensor]] = deque()
        if device.type == "cpu" and form.change != "warp" and resolution > _SMALL:
            self._pipeline = decoding_pipeline(self._source, form, largest_batch, threads)
            self._resize = Resize(form, resolution, threads)
            self._runner = ThreadPoolExecutor(1)
        else:
            self._pipeline = image_pipeline(
                self._source, form, resolution, largest_batch, threads, device_id
            )

    def start(self, jobs: Iterator[Job], prefetch: bool = False) -> None:
        """Begin a sequence of batches, each of at most `largest_batch` images.

        Parameters
        ----------
        prefetch : bool
            Return once the first batch is decoded; the ones after it follow by themselves.
        """
        self._source.begin(jobs)
        if prefetch:
            self._first = self._run()

    def next(self) -> Tensor:
        """The next batch.

        Returns
        -------
        Tensor, shape (b, 3, resolution, resolution), of the form's dtype
            Normalised, on the device; in memory channels last where the form says so.

        Raises
        ------
        StopIteration
            After the last one.
        RuntimeError
            If DALI cannot decode an image.
        """
        if self._first is not None:
            images, self._first = self._first, None
            return images
        return self._run()

    def finish(self) -> None:
        """After the last batch: make ready for another `start`."""
        while self._coming:
            self._coming.popleft().exception()
        self._pipeline.reset()

    def _run(self) -> Tensor:
        if self._resize is not None:
            while len(self._coming) < _RESIZED:
                self._coming.append(self._runner.submit(_run, self._pipeline, self._resize))
            return self._coming.popleft().result()
        if self._device.type == "cpu":
            (images,) = self._pipeline.run()
        else:  # bound to torch's stream, DALI reuses the memory only after torch's work on it
            (images,) = self._pipeline.run(torch.cuda.current_stream(self._device))
        pixels = torch.from_dlpack(images.as_tensor()).to(self._form.dtype)
        return pixels.permute(0, 3, 1, 2) if self._form.channels_last else pixels


def _run(pipeline: Pipeline, resize: Resize) -> Tensor:
    outputs: Any = pipeline.run()
    images, *flips = outputs
    flipped = flips[0].as_array() if flips else np.zeros(len(images))
    return resize([images[number] for number in range(len(images))], flipped)


class _ReadAhead:
    """A pipeline's source.

    It knows nothing of its pipeline: a cycle would keep both alive until garbage is collected.
    """

    def __init__(self, readers: ThreadPoolExecutor) -> None:
        self._readers = readers
        self._jobs: Iterator[Job] = iter(())
        self._reading: deque[Future[Any]] = deque()

    def begin(self, jobs: Iterator[Job]) -> None:
        for future in self._reading:
            future.cancel()
        self._reading.clear()
        self._jobs = jobs

    def __call__(self) -> Any:
        while len(self._reading) <= AHEAD and (job := next(self._jobs, None)) is not None:
            self._reading.append(self._readers.submit(job))
        if not self._reading:
            raise StopIteration
        return self._reading.popleft().result()
