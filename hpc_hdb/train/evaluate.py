"""Accuracy and loss of a model on the held-out split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc_hdb.errors import UserError
from hpc_hdb.plan.cuts import split_evenly
from hpc_hdb.train.loader import Loader
from hpc_hdb.train.memory import room_for
from hpc_hdb.train.parameters import FlatModel
from hpc_hdb.train.recalibrate import Recalibration

if TYPE_CHECKING:
    from hpc_hdb.cluster.groups import RankGroup


@dataclass(frozen=True)
class Evaluation:
    """Result on the held-out split.

    Attributes
    ----------
    accuracy : float
        Fraction classified right, 0 to 1.
    loss : float
        Mean cross-entropy per image.
    seconds : float
        Wall-clock time it took.
    """

    accuracy: float
    loss: float
    seconds: float


class Evaluator:
    """Evaluates flat buffers with a model of its own.

    Parameters
    ----------
    model : nn.Module
        On its device; overwritten by each evaluation.
    loader : Loader
        Of the held-out split, without augmentation.
    samples : int
        Size of the held-out split.
    resolution : int
        Side of the images, in pixels.
    batch : int
        Images per forward pass.
    name : callable
        Where a sample's image is, to name bad ones.
    group : RankGroup, optional
        Ranks that evaluate together, each its part of the images.
    recalibration : Recalibration, optional
        What gives each model its batch-norm statistics first; by default it keeps its own.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        samples: int,
        resolution: int,
        batch: int,
        name: Callable[[int], str] = str,
        group: RankGroup | None = None,
        recalibration: Recalibration | None = None,
    ) -> None:
        self._recalibration = recalibration
        self._name = name
        self._group = group
        self.parameters = FlatModel(model)
        self._loader = loader
        self._samples = samples
        self._resolution = resolution
        self._batch = batch
        self._cancelled = False

    def left_out(self) -> list[str]:
        """Names of the bad images left out since this was last called."""
        samples, self._loader.left_out = self._loader.left_out, []
        names = [self._name(sample) for sample in samples]
        return names + (self._recalibration.left_out() if self._recalibration else [])

    def cancel(self) -> None:
        """Give up the evaluation that another thread is in, and any later one."""
        self._cancelled = True

    def load(self, flat: Tensor) -> None:
        """Take over the model whose buffer is `flat`, shape (size,), float32, ready to use.

        Raises
        ------
        CancelledError
            Soon after `cancel`.
        UserError
            If a batch of the recalibration does not fit the memory.
        """
        with self._on_device():
            self.parameters.flat.copy_(flat)
            if self._recalibration is not None:
                self._recalibration.apply(self.parameters.model, self._check_cancelled)

    @torch.inference_mode()
    def evaluate(self, flat: Tensor) -> Evaluation:
        """Evaluate the model whose buffer is `flat`, shape (size,), float32.

        Raises
        ------
        CancelledError
            Soon after `cancel`.
        UserError
            If a batch does not fit the memory, or all images are bad.
        """
        with self._on_device():
            return self._evaluate(flat)

    def _evaluate(self, flat: Tensor) -> Evaluation:
        start = time.perf_counter()
        if self._group is not None:
            self._group.begin_evaluation(flat)
        self.load(flat)
        model = self.parameters.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.parameters.flat.device)
        own = np.arange(self._samples)
        if self._group is not None:
            own = own[self._group.rows(len(own))]
        sizes = split_evenly(len(own), self._batch)
        batches = self._loader.batches(own, sizes, self._resolution, 0) if len(own) else iter(())
        for images, labels in batches:
            self._check_cancelled()
            scores = model(images)
            loss = functional.cross_entropy(scores, labels, reduction="sum")
            correct = (scores.argmax(1) == labels).sum().to(loss.dtype)
            totals += torch.stack((loss, correct, torch.full_like(loss, len(labels))))
        if self._group is not None:
            totals = self._group.sum(totals)
            self._loader.left_out = self._group.collect(self._loader.left_out)
        total_loss, right, samples = totals.tolist()
        if not samples:
            raise UserError("all held-out images are bad: bring good ones")
        return Evaluation(right / samples, total_loss / samples, time.perf_counter() - start)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Use the model's GPU in whatever thread, each of which has a current one of its own."""
        flat, side = self.parameters.flat, self._resolution
        what = f"an evaluation's batch of up to {self._batch} images at {side}x{side}"
        with (
            torch.cuda.device_of(flat),
            room_for(what, flat.device, "lower run.evaluation_batch"),
        ):
            yield

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise CancelledError
