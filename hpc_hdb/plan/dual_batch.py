"""The dual-batch plan: shares, small batch and model update factor.

Source: Lu et al., arXiv 2509.26092; Lu, Hong et al., "Efficient Dual Batch Size Deep Learning
for Distributed Parameter Server Systems", COMPSAC 2022.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np

from hpc_hdb.errors import InfeasiblePlan
from hpc_hdb.plan.batch_time import BatchTime

_NEARLY = 1e-6
"""In units of the last decimal of a time ratio."""


class Group(enum.Enum):
    """Which batch a worker trains with."""

    LARGE = "large"
    SMALL = "small"


@dataclass(frozen=True)
class DualBatchPlan:
    """What every worker does in one epoch.

    Attributes
    ----------
    workers, small_workers : int
        ``n`` and ``n_S``.
    large_batch, small_batch : int
        ``B_L`` and ``B_S`` in images; ``small_batch`` is 0 without small workers.
    large_share, small_share : int
        ``d_L`` and ``d_S``, images per epoch and worker; ``small_share`` is 0 without small
        workers.
    update_factor : float or None
        ``f = d_S / d_L`` of a small worker (a large worker's is 1); None without small workers.
    epoch_seconds : float
        ``T``, predicted seconds of one epoch's training.
    """

    workers: int
    small_workers: int
    large_batch: int
    small_batch: int
    large_share: int
    small_share: int
    update_factor: float | None
    epoch_seconds: float

    @property
    def large_workers(self) -> int:
        return self.workers - self.small_workers

    def size(self, group: Group) -> int:
        """Number of workers in `group`."""
        return self.small_workers if group is Group.SMALL else self.large_workers

    def factor(self, group: Group) -> float:
        """Model update factor of a worker of `group`."""
        if group is Group.LARGE or self.update_factor is None:
            return 1.0
        return self.update_factor

    def batch(self, group: Group) -> int:
        """Batch size of `group`, in images."""
        return self.small_batch if group is Group.SMALL else self.large_batch


def plan_dual_batch(
    time: BatchTime,
    large_batch: int,
    samples: int,
    workers: int,
    small_workers: int = 0,
    time_ratio: float = 1.0,
) -> DualBatchPlan:
    """Solve for the shares, the small batch and the update factor.

    ``d_L = round(k*D/n)``, ``d_S = round((D - n_L*d_L)/n_S)``, ``T = k*(a + c/B_L)*D/n``,
    ``B_S = round(c / (T/d_S - a))``, ``f = d_S/d_L``.

    Parameters
    ----------
    time : BatchTime
        Measured ``a`` and ``c`` at this resolution.
    large_batch : int
        ``B_L``, the largest batch that fits, in images.
    samples : int
        ``D``, training images per epoch.
    workers, small_workers : int
        ``n`` and ``n_S``, with ``0 <= n_S <= n``.
    time_ratio : float
        ``k >= 1``, the permitted epoch time relative to large batches alone. Without small
        workers it has no effect.

    Returns
    -------
    DualBatchPlan

    Raises
    ------
    InfeasiblePlan
        If an input is out of range or no small batch solves the equations; the message says
        which input, and the range that works.
    """
    _check_inputs(large_batch, samples, workers, small_workers, time_ratio)
    even_share = samples / workers
    if small_workers == 0:
        share = round(even_share)
        seconds = time.of_samples(even_share, large_batch)
        return DualBatchPlan(workers, 0, large_batch, 0, share, 0, None, seconds)
    solved = _solve(time, large_batch, samples, workers, small_workers, time_ratio)
    if isinstance(solved, str):
        advice = _advice(time, large_batch, samples, workers, small_workers, time_ratio)
        raise InfeasiblePlan(f"no dual-batch plan: {solved}; {advice}")
    return solved


def _check_inputs(
    large_batch: int, samples: int, workers: int, small_workers: int, time_ratio: float
) -> None:
    if workers < 1:
        raise InfeasiblePlan(f"a plan needs at least 1 worker, not {workers}")
    if not 0 <= small_workers <= workers:
        raise InfeasiblePlan(
            f"small_workers = {small_workers} does not fit {workers} workers: use 0 to {workers}"
        )
    if large_batch < 1:
        raise InfeasiblePlan(f"the large batch must be at least 1 image, not {large_batch}")
    if samples < 1:
        raise InfeasiblePlan(f"a plan needs at least 1 training sample, not {samples}")
    if samples < workers:
        raise InfeasiblePlan(
            f"{samples} training samples cannot be shared by {workers} workers: "
            f"use at most {samples} workers, or more data"
        )
    if not (time_ratio >= 1 and math.isfinite(time_ratio * samples)):
        raise InfeasiblePlan(f"time_ratio must be a number from 1 up, not {time_ratio:g}")


def _solve(
    time: BatchTime,
    large_batch: int,
    samples: int,
    workers: int,
    small_workers: int,
    time_ratio: float,
) -> DualBatchPlan | str:
    """The plan, or in words why there is none."""
    large_workers = workers - small_workers
    large_share = round(time_ratio * samples / workers)
    small_share = round((samples - large_workers * large_share) / small_workers)
    if small_share <= 0:
        return (
            f"with time_ratio {time_ratio:g} the {large_workers} large-batch workers take all "
            f"{samples} samples and leave none for the small-batch group"
        )
    seconds = time_ratio * time.of_samples(samples / workers, large_batch)
    slack = seconds / small_share - time.seconds_per_image
    if slack <= 0:
        return (
            f"{small_share} samples cannot be trained in {seconds:.3f} s at "
            f"{time.seconds_per_image:g} s per image, whatever the batch"
        )
    small_batch = round(time.overhead / slack)
    if small_batch < 1:
        return (
            f"with time_ratio {time_ratio:g} a small-batch worker has time to spare even with "
            f"one image per batch"
        )
    if small_batch > large_batch:
        return f"the small batch ({small_batch}) would exceed the large one ({large_batch})"
    return DualBatchPlan(
        workers,
        small_workers,
        large_batch,
        small_batch,
        large_share,
        small_share,
        small_share / large_share,
        seconds,
    )


def _advice(
    time: BatchTime,
    large_batch: int,
    samples: int,
    workers: int,
    small_workers: int,
    time_ratio: float,
) -> str:
    """What would work instead of an infeasible plan."""
    inputs = time, large_batch, samples, workers
    ways = []
    if ratios := _feasible_time_ratios(*inputs, small_workers):
        ways.append(f"a time_ratio {_range(*ratios)}")
    counts = [
        count
        for count in range(1, workers + 1)
        if isinstance(_solve(*inputs, count, time_ratio), DualBatchPlan)
    ]
    if counts:
        ways.append(f"small_workers {_range(counts[0], counts[-1])}")
    if ways:
        return f"use {', or '.join(ways)}"
    none = f"no time_ratio works with {small_workers} small_workers"
    for count in sorted(range(1, workers + 1), key=lambda count: abs(count - small_workers)):
        if ratios := _feasible_time_ratios(*inputs, count):
            return f"{none}; use {count} and a time_ratio {_range(*ratios)}"
    return f"{none}, nor with another number but 0; use more samples or fewer workers"


def _range(lowest: float, highest: float) -> str:
    if lowest == highest:
        return f"of {lowest:.10g}"
    return f"from {lowest:.10g} to {highest:.10g}"


def _feasible_time_ratios(
    time: BatchTime, large_batch: int, samples: int, workers: int, small_workers: int
) -> tuple[float, float] | None:
    """Smallest and largest feasible ``k``, to as few decimals as it takes; None if there is none.

    Each ``d_L``, with the ``d_S`` that goes with it, has an interval of ``k``: ``d_L`` must be what
    ``k*D/n`` rounds to, and ``B_S`` round to a batch from 1 to ``B_L``.
    """
    large_workers = workers - small_workers
    even_share = samples / workers
    large = np.array([round(even_share)])
    if large_workers:
        large = np.arange(large[0], samples // large_workers + 1)
    small = np.rint((samples - large_workers * large) / small_workers)
    fastest = time.of_samples(1, large_batch + 0.5)
    slowest = time.of_samples(1, 0.5)
    even_seconds = time.of_samples(even_share, large_batch)
    lowest, highest = small * fastest / even_seconds, small * slowest / even_seconds
    if large_workers:
        lowest = np.maximum(lowest, (large - 0.5) / even_share)
        highest = np.minimum(highest, (large + 0.5) / even_share)
    lowest, highest = np.maximum(lowest, 1)[small > 0], highest[small > 0]

    def solved(time_ratio: float) -> bool:
        plan = _solve(time, large_batch, samples, workers, small_workers, time_ratio)
        return isinstance(plan, DualBatchPlan)

    for decimals in range(3, 10):
        scale = 10**decimals
        # Nearly outside is tried as well as the next inside: a half is rounded to either side.
        up = np.ceil(lowest * scale - _NEARLY)[:, np.newaxis] + [0, 1]
        down = np.floor(highest * scale + _NEARLY)[:, np.newaxis] - [0, 1]
        within = up[:, 0] <= down[:, 0]
        first = next(filter(solved, (up[within] / scale).ravel().tolist()), None)
        if first is not None:
            last = filter(solved, (down[within][::-1] / scale).ravel().tolist())
            return first, next(last, first)
    return None
