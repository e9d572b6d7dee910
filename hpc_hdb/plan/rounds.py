"""Which samples are trained when, and by which group: the epoch cut into rounds.

A *round* is what a worker trains between two commits. An epoch is one permutation of the data
set, cut into one slot per worker (of the size the plan gives its group) and each slot into
``commits_per_epoch`` parts. Rounds are handed out in order within a group to whichever worker is
free, so over all workers every sample is visited exactly once an epoch, however unevenly the
workers run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hpc_hdb.plan.dual_batch import DualBatchPlan, Group
from hpc_hdb.plan.progressive import Stage, stage_index


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


def epoch_bounds(plan: DualBatchPlan, samples: int) -> list[int]:
    """Where the epoch's permutation is cut into the workers' slots, large ones first.

    The plan's shares are rounded and may miss `samples` by a few; the cuts hit it exactly,
    each slot within one of its share's proportion.

    Returns
    -------
    list of int, length ``workers + 1``
        From 0 to `samples`.
    """
    shares = [plan.large_share] * plan.large_workers + [plan.small_share] * plan.small_workers
    return [0, *(samples * end // sum(shares) for end in accumulate(shares))]


class RoundBook:
    """Hands out the rounds of a training run and keeps account of their commits.

    Parameters
    ----------
    plan : DualBatchPlan
        Shares and group sizes (the same for every resolution).
    stages : sequence of Stage
    samples : int
        ``D``, training images per epoch.
    commits_per_epoch : int
        Commits of each worker in an epoch; 1 in the paper.
    """

    def __init__(
        self, plan: DualBatchPlan, stages: Sequence[Stage], samples: int, commits_per_epoch: int = 1
    ) -> None:
        self.commits = 0
        self._plan = plan
        self._stages = stages
        self._parts = commits_per_epoch
        self._bounds = epoch_bounds(plan, samples)
        self._epochs = stages[-1].end_epoch
        self._handed_out = dict.fromkeys(Group, 0)
        self._returned: dict[Group, list[int]] = {group: [] for group in Group}
        self._open: set[tuple[Group, int]] = set()

    @property
    def commits_per_epoch(self) -> int:
        """Commits of all workers together in an epoch."""
        return self._parts * self._plan.workers

    @property
    def total(self) -> int:
        """Commits of the whole run: ``epochs * n * commits_per_epoch``."""
        return self._epochs * self.commits_per_epoch

    @property
    def finished(self) -> bool:
        return self.commits >= self.total

    @property
    def epoch(self) -> float:
        """Epochs done, by the global commit count (paper, section on the parameter server)."""
        return self.commits / self.commits_per_epoch

    @property
    def stage(self) -> int:
        """Index of the stage that holds at the global commit count."""
        return stage_index(self._stages, self.commits // self.commits_per_epoch)

    @property
    def next_stage(self) -> int:
        """Index of the stage in which a worker that goes on now will commit and go on again."""
        epoch = (self.commits + self._plan.workers) // self.commits_per_epoch
        return stage_index(self._stages, min(epoch, self._epochs - 1))

    def hand_out(self, group: Group) -> Round | None:
        """The next round for a worker of `group`, or None when all rounds are handed out.

        It is one of the group's own, unless the group is more than an epoch ahead of the other
        or has none left: then it is one of the other's, trained with that group's batch and
        committed with its factor. So unforeseen differences in speed neither pull the groups
        apart nor leave workers idle at the end.
        """
        other = Group.SMALL if group is Group.LARGE else Group.LARGE
        own_next, other_next = self._next(group), self._next(other)
        if other_next is not None and (
            own_next is None
            or own_next // self._plan.size(group)
            > other_next // self._plan.size(other) + self._parts
        ):
            group, own_next = other, other_next
        if own_next is None:
            return None
        if self._returned[group]:
            self._returned[group].pop(0)
        else:
            self._handed_out[group] += 1
        self._open.add((group, own_next))
        return self.round(group, own_next)

    def _next(self, group: Group) -> int | None:
        """Index of the group's next round; None when all are handed out."""
        if self._returned[group]:
            return self._returned[group][0]
        index = self._handed_out[group]
        return index if index < self._epochs * self._parts * self._plan.size(group) else None

    def round(self, group: Group, index: int) -> Round:
        """Round number `index` of `group`."""
        size = self._plan.size(group)
        epoch, within = divmod(index, self._parts * size)
        part, slot = divmod(within, size)
        column = slot if group is Group.LARGE else self._plan.large_workers + slot
        start, stop = self._bounds[column], self._bounds[column + 1]
        begin = start + (stop - start) * part // self._parts
        end = start + (stop - start) * (part + 1) // self._parts
        return Round(group, index, epoch, part, slot, begin, end)

    def commit(self, group: Group, index: int) -> None:
        """Count the round's commit. Raises KeyError if that round was not handed out."""
        self._open.remove((group, index))
        self.commits += 1

    def state(self) -> dict[str, object]:
        """Plain values from which `restore` goes on; rounds not committed are done again."""

        def undone(group: Group) -> Iterable[int]:
            return (index for other, index in self._open if other is group)

        return {
            "commits": self.commits,
            "handed_out": {group.value: self._handed_out[group] for group in Group},
            "undone": {
                group.value: sorted([*self._returned[group], *undone(group)]) for group in Group
            },
        }

    def restore(self, state: dict) -> None:
        """Go on from a `state` of a run with the same plan."""
        self.commits = state["commits"]
        self._handed_out = {group: state["handed_out"][group.value] for group in Group}
        self._returned = {group: list(state["undone"][group.value]) for group in Group}
        self._open.clear()
