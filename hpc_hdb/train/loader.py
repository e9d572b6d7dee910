"""Batches of a round, by torch or by DALI, behind one interface."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dali_pipelines.augmentation import PLAIN, Augmentation, Draws
from hpc_hdb.config import Data
from hpc_hdb.errors import UserError
from hpc_hdb.train.augment import normalise, transform
from hpc_hdb.train.data import ImageSet

Rows = Callable[[int], slice]
"""Which rows of a batch of that size a rank loads, where several share it."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_CPU = torch.device("cpu")

_Request = tuple[np.ndarray, np.ndarray | None, int]
"""Samples, crops and resolution of a batch."""


class Loader(Protocol):
    """Gives the batches of one round after another.

    Attributes
    ----------
    left_out : list of int
        Samples left out, where bad images are skipped; the caller empties it.
    """

    left_out: list[int]

    def prepare(self, resolution: int, largest_batch: int) -> None:
        """Get ready for batches of this kind, ahead of the first one."""
        ...

    def expect(self, resolution: int, largest_batch: int) -> None:
        """Towards the end of the round to come, get ready for batches of this kind beside it."""
        ...

    def batches(
        self, indices: np.ndarray, sizes: Sequence[int], resolution: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given samples, in order.

        Parameters
        ----------
        indices : ndarray, shape (n,), int64
            Positions in the data set.
        sizes : sequence of int
            Batch sizes; they add up to n. Where bad images are skipped a batch may be smaller.
        resolution : int
            Side of the images, in pixels.
        seed : int
            Of the augmentation: the same seed gives the same batches.

        Yields
        ------
        images : Tensor, shape (b, 3, resolution, resolution), float32
            Normalised, on the loader's device, channels-last in memory.
        labels : Tensor, shape (b,), int64
            On the loader's device.
        """
        ...


def make_loader(
    data: ImageSet,
    settings: Data,
    augmentation: Augmentation,
    device: torch.device,
    rows: Rows | None = None,
) -> Loader:
    """The loader of a data set; "auto" is DALI for image files that a GPU trains on.

    Parameters
    ----------
    rows : callable, optional
        Which rows of each batch to give; all by default. With it every batch is given, be it
        empty, so that ranks keep step.

    Raises
    ------
    UserError
        If DALI is asked for and not installed.
    """
    skip = settings.on_bad_image == "skip"
    installed = has_dali()
    if settings.loader == "dali" and not installed:
        raise UserError(
            "data.loader = \"dali\", but DALI is not installed: pip install 'hpc-hdb[dali]', "
            'or set data.loader to "torch"'
        )
    preferred = settings.loader == "auto" and installed and _suits_dali(data, device)
    if settings.loader == "dali" or preferred:
        from hpc_hdb.train.dali_loader import DaliLoader

        threads = settings.threads
        if device.type == "cuda":  # else the rank's threads are at work with training
            threads = threads or torch.get_num_threads() - 1
        return DaliLoader(data, threads, augmentation, device, skip, rows)
    return TorchLoader(data, settings.threads, augmentation, device, skip, rows)


def misses_dali(data: ImageSet, settings: Data, device: torch.device) -> bool:
    """Whether torch decodes only because DALI, which would be faster, is not installed."""
    return settings.loader == "auto" and _suits_dali(data, device) and not has_dali()


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package "nvidia"
        return False


def _suits_dali(data: ImageSet, device: torch.device) -> bool:
    return data.encoded and device.type == "cuda"


class TorchLoader:
    """Decodes with Pillow in the rank or in `processes` beside it; augments on the device."""

    def __init__(
        self,
        data: ImageSet,
        processes: int,
        augmentation: Augmentation = PLAIN,
        device: torch.device = _CPU,
        skip: bool = False,
        rows: Rows | None = None,
    ) -> None:
        self.left_out: list[int] = []
        self._rows = rows
        self._augmentation = augmentation
        self._device = device
        self._requests: list[_Request] = []
        if processes:
            _start_deaf_fork_server()
        self._loader = DataLoader(
            _Batches(data, skip),
            batch_size=None,
            sampler=self._requests,  # refilled for each round; any iterable serves as a sampler
            num_workers=processes,
            persistent_workers=processes > 0,
            multiprocessing_context="forkserver" if processes else None,
            worker_init_fn=_end_with_rank,
            pin_memory=device.type == "cuda",
        )

    def prepare(self, resolution: int, largest_batch: int) -> None:
        pass

    def expect(self, resolution: int, largest_batch: int) -> None:
        pass

    def batches(
        self, indices: np.ndarray, sizes: Sequence[int], resolution: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        chunks, draws = cut_round(indices, sizes, self._augmentation, seed, self._rows)
        crops = [drawn.crops if self._augmentation.crops else None for drawn in draws]
        self._requests[:] = [(*of, resolution) for of in zip(chunks, crops, strict=True)]
        for chunk, drawn, batch in zip(chunks, draws, self._loader, strict=True):
            if isinstance(batch, UserError):
                raise batch
            images, labels, good = batch
            self.left_out += chunk[~good.numpy()].tolist()
            images = images.to(self._device, non_blocking=True)
            if len(labels):
                images = self._finish(images, drawn.only(good.numpy()))
            if len(labels) or self._rows:
                yield images, labels.to(self._device, non_blocking=True)

    def _finish(self, images: Tensor, draws: Draws) -> Tensor:
        pixels = normalise(images)
        if self._augmentation.change != "none":
            pixels = transform(pixels, draws)
        return pixels.contiguous(memory_format=torch.channels_last)


def draws_of(augmentation: Augmentation, sizes: Sequence[int], seed: int) -> list[Draws]:
    """What is done to the images of each batch of a round, whichever loader gives it."""
    return [
        augmentation.draw(size, np.random.default_rng([seed, number]))
        for number, size in enumerate(sizes)
    ]


def cut_round(
    indices: np.ndarray,
    sizes: Sequence[int],
    augmentation: Augmentation,
    seed: int,
    rows: Rows | None = None,
) -> tuple[list[np.ndarray], list[Draws]]:
    """The samples of each batch of a round, and what is done to them.

    Of the whole batches, or of a rank's rows: what is drawn for an image is the same.
    """
    chunks = np.split(indices, np.cumsum(sizes)[:-1])
    draws = draws_of(augmentation, sizes, seed)
    if rows is not None:
        own = [np.arange(size)[rows(size)] for size in sizes]
        chunks = [chunk[chosen] for chunk, chosen in zip(chunks, own, strict=True)]
        draws = [drawn.only(chosen) for drawn, chosen in zip(draws, own, strict=True)]
    return chunks, draws


def _end_with_rank(_: int) -> None:
    """Let this decoding process end when its rank does, however that ends.

    By itself it would notice the end of its fork server alone, which waits for its processes. A
    batch that nobody fetches any more is no news either.
    """
    sys.excepthook = lambda *_: None  # called by the thread that hands batches over
    rank = multiprocessing.parent_process()
    assert rank is not None

    def end() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _start_deaf_fork_server() -> None:
    """Start what starts the decoding processes, so that none of them hears the run's signals.

    A terminal or a batch system signals every process of a run: were they to end by it, the
    rank could not end its run in order. Nor do they comment on a rank that is killed.
    """
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    warnings = os.environ.get("PYTHONWARNINGS", "")
    os.environ["PYTHONWARNINGS"] = f"{warnings},ignore:resource_tracker".lstrip(",")
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONWARNINGS"] = warnings
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Batches(Dataset):
    """Whole batches as requested; errors as values, since processes garble them."""

    def __init__(self, data: ImageSet, skip: bool) -> None:
        self._data = data
        self._skip = skip
        self._labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64))

    def __getitem__(self, request: _Request) -> tuple[Tensor, ...] | UserError:
        """Images, labels, and a mask of the samples that are not left out."""
        indices, crops, resolution = request
        if not len(indices):
            nothing = torch.zeros(0, 3, resolution, resolution, dtype=torch.uint8)
            return nothing, self._labels[:0], torch.zeros(0, dtype=torch.bool)
        try:
            images, good = self._data.load(indices, resolution, crops, self._skip)
        except UserError as error:
            return error
        return images, self._labels[indices[good]], torch.from_numpy(good)
