"""How an epoch is cut: into the slots of workers, those into rounds, and rounds into batches.

A *round* is what a worker trains between two commits. An epoch is one permutation of the data
set, cut into one slot per worker (of the size the plan gives its group) and each slot into
``commits_per_epoch`` parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from hpc_hdb.plan.dual_batch import DualBatchPlan, Group


@dataclass(frozen=True)
class Round:
    """One worker's work between two commits.

    Attributes
    ----------
    group : Group
    index : int
        Position in the group's sequence of rounds.
    epoch, part, slot : int
        Epoch, part of the epoch (0 to ``commits_per_epoch - 1``), and slot in that part.
    begin, end : int
        Range of positions in the epoch's permutation.
    """

    group: Group
    index: int
    epoch: int
    part: int
    slot: int
    begin: int
    end: int


def split_evenly(samples: int, largest: int) -> list[int]:
    """Sizes of the batches in which `samples` are trained: none over `largest`, all within one.

    A remainder in a batch of its own would be a step as long as any other taken on a few
    samples (batch normalisation fails on one).

    >>> split_evenly(10, 4)
    [4, 3, 3]
    """
    steps = -(-samples // largest)
    return [samples // steps + (position < samples % steps) for position in range(steps)]


def rows_of(batch: int, rank: int, ranks: int) -> slice:
    """The rows of a batch that `rank` of the `ranks` that share it trains: all within one.

    >>> [rows_of(10, rank, 4) for rank in range(4)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None), slice(8, 10, None)]
    """
    share, rest = divmod(batch, ranks)
    begin = rank * share + min(rank, rest)
    return slice(begin, begin + share + (rank < rest))


def epoch_bounds(
    plan: DualBatchPlan, samples: int, slowness: Sequence[float] = (), least: int = 0
) -> list[int]:
    """Where the epoch's permutation is cut into the workers' slots, large ones first.

    The plan's shares are rounded and may miss `samples` by a few; the cuts hit it exactly,
    each slot within one of its share's proportion.

    Parameters
    ----------
    slowness : sequence of float, length ``workers``, optional
        How many times as long as predicted each worker takes; its slot is smaller by as much.
    least : int
        Samples that even the slowest worker's slot has, unless an even share has fewer.

    Returns
    -------
    list of int, length ``workers + 1``
        From 0 to `samples`.
    """
    shares = [plan.large_share] * plan.large_workers + [plan.small_share] * plan.small_workers
    if slowness:
        fair = [share / slow for share, slow in zip(shares, slowness, strict=True)]
        fair = _at_least(min(least, samples // len(shares)) / samples, fair)
        return [0, *(round(samples * end) for end in accumulate(fair))]
    return [0, *(samples * end // sum(shares) for end in accumulate(shares))]


def _at_least(least: float, weights: Sequence[float]) -> list[float]:
    """Proportions that add up to 1: those of `weights`, but none below `least`."""
    few: set[int] = set()
    while True:
        rest = sum(weight for place, weight in enumerate(weights) if place not in few)
        left = 1 - least * len(few)
        fair = [
            least if place in few else left * weight / rest for place, weight in enumerate(weights)
        ]
        fewer = {place for place, share in enumerate(fair) if share < least}
        if not fewer:
            return fair
        few |= fewer


@dataclass(frozen=True)
class Cut:
    """How the epochs from `start_epoch` on are cut, until the next cut holds.

    Attributes
    ----------
    start_epoch : int
    large_workers, small_workers : int
    bounds : tuple of int, length ``large_workers + small_workers + 1``
        As `epoch_bounds` gives them.
    start_commits : int
        Global commit count at `start_epoch`.
    first : dict of Group to int
        Index of each group's first round of `start_epoch`.
    """

    start_epoch: int
    large_workers: int
    small_workers: int
    bounds: tuple[int, ...]
    start_commits: int
    first: dict[Group, int]

    @property
    def workers(self) -> int:
        return self.large_workers + self.small_workers

    def size(self, group: Group) -> int:
        """Slots of `group`."""
        return self.small_workers if group is Group.SMALL else self.large_workers

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self) | {"first": {group.value: self.first[group] for group in Group}}

    @classmethod
    def from_dict(cls, values: dict) -> Cut:
        """What `to_dict` gave."""
        first = {group: values["first"][group.value] for group in Group}
        return cls(**values | {"first": first, "bounds": tuple(values["bounds"])})
