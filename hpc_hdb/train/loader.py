"""Batches of a round, by torch or by DALI, behind one interface."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpc_hdb.config import Data, Train
from hpc_hdb.errors import UserError
from hpc_hdb.train.augment import normalise, random_affine
from hpc_hdb.train.data import EncodedImages, ImageSet

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
            Normalised, on the loader's device.
        labels : Tensor, shape (b,), int64
            On the loader's device.
        """
        ...


def make_loader(
    data: ImageSet, settings: Data, augmentation: Train | None, device: torch.device
) -> Loader:
    """The loader of a data set; "auto" is DALI for image files that a GPU trains on.

    Parameters
    ----------
    augmentation : Train or None
        Its flip, rotation and zoom; None for evaluation.

    Raises
    ------
    UserError
        If DALI is asked for and not installed, or cannot read this data set.
    """
    try:
        installed = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package "nvidia"
        installed = False
    if settings.loader == "dali":
        if not installed:
            raise UserError(
                "data.loader = \"dali\", but DALI is not installed: pip install 'hpc-hdb[dali]', "
                'or set data.loader to "torch"'
            )
        if not isinstance(data, EncodedImages):
            raise UserError(
                f'data.loader = "dali" reads image files, and {settings.source} is in memory: '
                'set data.loader to "auto" or "torch"'
            )
    skip = settings.on_bad_image == "skip"
    preferred = settings.loader == "auto" and installed and device.type == "cuda"
    if isinstance(data, EncodedImages) and (settings.loader == "dali" or preferred):
        from hpc_hdb.train.dali_loader import DaliLoader

        return DaliLoader(data, settings.threads, augmentation, device, skip)
    return TorchLoader(data, settings.threads, augmentation, device, skip)


class TorchLoader:
    """Decodes with Pillow in the rank or in `processes` beside it; augments on the device."""

    def __init__(
        self,
        data: ImageSet,
        processes: int,
        augmentation: Train | None,
        device: torch.device,
        skip: bool = False,
    ) -> None:
        self.left_out: list[int] = []
        self._augmentation = augmentation
        self._device = device
        self._requests: list[tuple[np.ndarray, int]] = []
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

    def batches(
        self, indices: np.ndarray, sizes: Sequence[int], resolution: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        cuts = np.cumsum(sizes)[:-1]
        self._requests[:] = [(chosen, resolution) for chosen in np.split(indices, cuts)]
        generator = torch.Generator().manual_seed(seed)
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            *tensors, bad = batch
            images, labels = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
            self.left_out += bad.tolist()
            if len(labels):
                yield self._finish(images, generator), labels

    def _finish(self, images: Tensor, generator: torch.Generator) -> Tensor:
        pixels = normalise(images)
        if self._augmentation is not None:
            chosen = self._augmentation
            pixels = random_affine(pixels, generator, chosen.flip, chosen.rotation, chosen.zoom)
        if self._device.type == "cuda":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return pixels


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
    """Whole batches by (indices, resolution); errors as values, since processes garble them."""

    def __init__(self, data: ImageSet, skip: bool) -> None:
        self._data = data
        self._skip = skip
        self._labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64))

    def __getitem__(self, request: tuple[np.ndarray, int]) -> tuple[Tensor, ...] | UserError:
        """Images, labels, and the samples left out."""
        indices, resolution = request
        good = np.ones(len(indices), dtype=bool)
        try:
            if self._skip and isinstance(self._data, EncodedImages):
                images, good = self._data.load_readable(indices, resolution)
            else:
                images = self._data.load(indices, resolution)
        except UserError as error:
            return error
        return images, self._labels[indices[good]], torch.from_numpy(indices[~good])
