"""A worker's local steps: one round of SGD on its share of an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc_hdb.cluster.messages import Order, Report, ReportKind
from hpc_hdb.config import Train
from hpc_hdb.errors import UserError
from hpc_hdb.plan.cuts import split_evenly
from hpc_hdb.train.in_turn import backward_in_turn
from hpc_hdb.train.loader import Loader
from hpc_hdb.train.memory import free_memory, room_for
from hpc_hdb.train.model import set_dropout, set_rows
from hpc_hdb.train.parameters import FlatModel
from hpc_hdb.train.sgd import EagerSGD, parameter_groups

if TYPE_CHECKING:
    from hpc_hdb.cluster.groups import RankGroup

_PROGRESS_SECONDS = 0.5

T = TypeVar("T")


def choose_precision(settings: Train, device: torch.device) -> torch.dtype:
    """The arithmetic type: as set, or bf16 on a GPU that has it and float32 elsewhere.

    Raises
    ------
    UserError
        For fp16 on the CPU, which has no loss scaling.
    """
    if settings.precision == "fp16" and device.type != "cuda":
        raise UserError('train.precision = "fp16" needs a GPU: use "bf16" or "fp32" on the CPU')
    if settings.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        settings.precision
    ]


class Step(NamedTuple):
    """What a step has done.

    Attributes
    ----------
    totals : Tensor, shape (2,)
        Sum of the loss over this rank's images, and the number of them classified right.
    samples : int
        Images of all ranks.
    stopped : bool
        Whether a rank wants the round to be given up.
    """

    totals: Tensor
    samples: int
    stopped: bool


class Trainer:
    """Model, optimizer and loader of one worker, or of a rank among those that share its batches.

    Parameters
    ----------
    model : nn.Module
        On its device; becomes views of one buffer (see `FlatModel`).
    loader : Loader
        Of the training split.
    samples : int
        ``D``, size of the training split.
    settings : Train
    seed : int
        Of the run: order of samples, augmentation, dropout.
    group : RankGroup, optional
        The ranks that share the batches; `loader` gives this one's rows of them.
    in_turn : int
        Without a group, the ranks that share the batches and take turns in this process.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        samples: int,
        settings: Train,
        seed: int,
        group: RankGroup | None = None,
        in_turn: int = 1,
    ) -> None:
        self.parameters = FlatModel(model)
        self.model = model
        self.device = self.parameters.flat.device
        self._loader = loader
        self._samples = samples
        self._settings = settings
        self._seed = seed
        self._dtype = choose_precision(settings, self.device)
        self._scaler = torch.amp.GradScaler(enabled=self._dtype == torch.float16)
        # It starts at the first loss, which a rank without rows of the first batch has not.
        self._scaler.scale(torch.zeros((), device=self.device))
        self._group = group
        self._in_turn = in_turn
        self._optimizer: torch.optim.Optimizer = EagerSGD(
            parameter_groups(model, settings.weight_decay, settings.decay_norms),
            lr=0.0,  # set by each round's order; profiling leaves the weights alone
            momentum=settings.momentum,
            nesterov=settings.nesterov and settings.momentum > 0,
        )
        if group is not None:
            self._optimizer = group.distribute(self._optimizer, model)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._resolution = 0

    def train_round(
        self, order: Order, interrupted: Callable[[], bool], tell: Callable[[Report], None]
    ) -> Report | None:
        """Train the samples of `order`.

        Parameters
        ----------
        interrupted : callable
            Asked in every step; if it says so the round is given up after it.
        tell : callable
            Given a PROGRESS report now and then, and a LEFT_OUT report for each bad image.

        Returns
        -------
        Report or None
            The COMMIT report, in which counts and loss are of all ranks; a DIVERGED one if the
            loss or the weights are no longer finite; None when interrupted.

        Raises
        ------
        UserError
            If a batch does not fit the memory.
        """
        with room_for(
            f"a batch of {order.batch} images at {order.resolution}x{order.resolution}",
            self.device,
            "lower schedule.large_batch, or find what fits with 'hdb profile'",
        ):
            return self._train_round(order, interrupted, tell)

    def _train_round(
        self, order: Order, interrupted: Callable[[], bool], tell: Callable[[Report], None]
    ) -> Report | None:
        report = Report(ReportKind.COMMIT, order.small, order.index)
        report.rebuild_seconds = self._enter_stage(order)
        if not self._settings.keep_momentum:
            self._optimizer.state.clear()
        sizes = split_evenly(order.end - order.begin, order.batch)
        indices = self._epoch_order(order.epoch)[order.begin : order.end]
        seed = self._round_seed(order)
        torch.manual_seed(seed)
        self.model.train()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        start = reported = time.perf_counter()
        batches = _Timed(self._loader.batches(indices, sizes, order.resolution, seed))
        for (images, labels), size in zip(batches, sizes, strict=False):
            done = (report.steps + 0.5) / len(sizes)
            self._set_rate(order.learning_rate + order.rate_change * done)
            step = self.step(images, labels, size, interrupted)
            totals += step.totals
            report.steps += 1
            report.samples += step.samples
            if step.stopped:
                return None
            if time.perf_counter() - reported > _PROGRESS_SECONDS:
                reported = time.perf_counter()
                tell(Report(ReportKind.PROGRESS, samples=report.samples))
        left_out, self._loader.left_out = self._loader.left_out, []
        if self._group is not None:
            # Running statistics are of each rank's own rows.
            self._group.average_([b for b in self.model.buffers() if b.is_floating_point()])
            totals, left_out = self._group.sum(totals), self._group.collect(left_out)
        for sample in left_out:
            tell(Report(ReportKind.LEFT_OUT, index=sample))
        report.loss, correct = totals.tolist()
        report.correct = int(correct)
        report.data_seconds = batches.seconds
        report.train_seconds = time.perf_counter() - start - batches.seconds
        # The last step's overflow shows in the model alone.
        if not math.isfinite(report.loss) or not math.isfinite(self.parameters.flat.sum()):
            report.kind = ReportKind.DIVERGED
            self._optimizer.state.clear()
        return report

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        batch: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Step:
        """One step of SGD.

        Parameters
        ----------
        images : Tensor, shape (b, 3, r, r), float32
        labels : Tensor, shape (b,), int64
        batch : int
            Size of the whole batch, of which ranks that share it are given b each.
        interrupted : callable
            Asked once whether the round is to be given up.
        """
        # Here rather than at the end: the gradients' memory then serves the activations.
        self._optimizer.zero_grad()
        if self._group is not None:
            return self._shared_step(self._group, images, labels, batch, interrupted())
        if self._in_turn > 1:
            totals = backward_in_turn(self.model, images, labels, self._in_turn, self._backward)
        else:
            totals = self._backward(images, labels, 1.0)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return Step(totals, len(labels), interrupted())

    def _shared_step(
        self, group: RankGroup, images: Tensor, labels: Tensor, batch: int, stop: bool
    ) -> Step:
        """This rank's part of a step: its images count by their share of the whole batch."""
        agreement = group.agree(len(labels), stop)
        totals = torch.zeros(2, device=self.device)
        if len(labels):
            set_rows(self.model, batch, group.rows(batch).start)
            totals = self._backward(images, labels, len(labels) / batch)
        optimizer: Any = self._optimizer
        optimizer.synchronize()
        samples, stopped = agreement()
        if samples:
            if samples < batch:  # bad images were left out
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad *= batch / samples
            with optimizer.skip_synchronize():
                self._scaler.step(optimizer)
            self._scaler.update()
        return Step(totals, samples, stopped)

    def _backward(self, images: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Gradients of the mean loss times `weight`; sum of the loss, number classified right."""
        with self._autocast():
            scores = self.model(images)
            if not isinstance(scores, Tensor):
                scores = scores.logits  # Inception and GoogLeNet also return auxiliary scores
            smoothing = self._settings.label_smoothing
            loss = functional.cross_entropy(scores, labels, label_smoothing=smoothing)
        self._scaler.scale(loss * weight).backward()
        correct = (scores.argmax(1) == labels).sum()
        return torch.stack((loss.detach() * len(labels), correct.to(loss.dtype)))

    def state(self) -> dict:
        """What of this worker outlives a round and is not in the model's buffer."""
        return {
            "optimizer": self._optimizer.state_dict()["state"],
            "scaler": self._scaler.state_dict(),
            "buffers": self.parameters.integer_buffers(),
        }

    def restore(self, state: dict | None) -> None:
        """Go on from what `state` returned, or from what the leader of this group is given."""
        if self._group is not None:
            state = self._group.share_state(state)
        if state is None:
            return
        current = self._optimizer.state_dict()
        self._optimizer.load_state_dict(current | {"state": state["optimizer"]})
        self._scaler.load_state_dict(state["scaler"])
        for name, buffer in self.parameters.integer_buffers().items():
            buffer.copy_(state["buffers"][name])

    def settle(self, values: list[float]) -> list[float]:
        """Measurements on which all ranks that share the batches agree: their means."""
        if self._group is None:
            return values
        total = self._group.sum(torch.tensor(values, dtype=torch.float64))
        return (total / self._group.size).tolist()

    def sample_batches(
        self, resolution: int, sizes: Sequence[int], seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given sizes from the start of the data, over and over: for profiling."""
        indices = np.arange(sum(sizes)) % self._samples
        return self._loader.batches(indices, sizes, resolution, seed)

    def _enter_stage(self, order: Order) -> float:
        """Apply the stage's settings; the seconds it took."""
        start = time.perf_counter()
        set_dropout(self.model, order.dropout)
        if order.resolution != self._resolution:
            free_memory(self.device)
            self._loader.prepare(order.resolution, order.batch)
            self._resolution = order.resolution
        if order.next_resolution != order.resolution:
            self._loader.expect(order.next_resolution, order.next_batch)
        return time.perf_counter() - start

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of the samples, the same on every worker."""
        if self._permutation[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._permutation = (epoch, generator.permutation(self._samples))
        return self._permutation[1]

    def _round_seed(self, order: Order) -> int:
        """A seed of this round's own, whichever worker trains it and whatever came before."""
        words = [self._seed, order.small, order.epoch, order.part, order.slot]
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)


class _Timed(Iterable[T]):
    """Passes items on and adds up the seconds spent waiting for them."""

    def __init__(self, items: Iterator[T]) -> None:
        self.seconds = 0.0
        self._items = items

    def __iter__(self) -> Iterator[T]:
        while True:
            start = time.perf_counter()
            try:
                item = next(self._items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item
