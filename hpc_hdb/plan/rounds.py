"""Which samples are trained when, and by which group: the account of rounds.

Rounds (`hpc_hdb.plan.cuts`) are handed out in order within a group to whichever worker is free, so
over all workers every sample is visited exactly once an epoch, however unevenly the workers run.
Where workers are lost, later epochs are cut among those that remain.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from hpc_hdb.plan.cuts import Cut, Round, epoch_bounds
from hpc_hdb.plan.dual_batch import DualBatchPlan, Group
from hpc_hdb.plan.progressive import Stage, stage_index

_FEWEST = 2
"""Samples of a round of the slowest worker: batch normalisation fails on one."""


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

    Attributes
    ----------
    commits : int
        Commits so far, of all workers.
    cuts : list of Cut
        How the epochs were and are cut, the newest last.
    parts : int
        ``commits_per_epoch``.
    """

    def __init__(
        self, plan: DualBatchPlan, stages: Sequence[Stage], samples: int, commits_per_epoch: int = 1
    ) -> None:
        self.commits = 0
        self.cuts: list[Cut] = []
        self._stages = stages
        self._samples = samples
        self.parts = commits_per_epoch
        self._epochs = stages[-1].end_epoch
        self._handed_out = dict.fromkeys(Group, 0)
        self._returned: dict[Group, list[int]] = {group: [] for group in Group}
        self._open: set[tuple[Group, int]] = set()
        self._shared_until = 0
        self._add_cut(0, plan)

    @property
    def commits_per_epoch(self) -> int:
        """Commits of all workers together in an epoch, as it is cut now."""
        return self.parts * self._cut_at(self.commits).workers

    @property
    def total(self) -> int:
        """Commits of the whole run: ``epochs * n * commits_per_epoch``, were ``n`` always the same.

        Where workers are lost, their commits of later epochs are not made.
        """
        return self._commits_at(self.cuts[-1], self._epochs)

    @property
    def finished(self) -> bool:
        return self.commits >= self.total

    @property
    def idle(self) -> bool:
        """Whether no round is under way."""
        return not self._open

    def under_way(self, group: Group, index: int) -> bool:
        """Whether that round was handed out and is neither committed nor given back."""
        return (group, index) in self._open

    @property
    def epoch(self) -> float:
        """Epochs done, by the global commit count (paper, section on the parameter server)."""
        return self.epoch_at(self.commits)

    def epoch_at(self, commits: int) -> float:
        """Epochs done after so many commits."""
        cut = self._cut_at(commits)
        return cut.start_epoch + (commits - cut.start_commits) / (cut.workers * self.parts)

    @property
    def stage(self) -> int:
        """Index of the stage that holds at the global commit count."""
        return stage_index(self._stages, int(self.epoch))

    @property
    def next_stage(self) -> int:
        """Index of the stage in which a worker that goes on now will commit and go on again."""
        epoch = int(self.epoch_at(self.commits + self._cut_at(self.commits).workers))
        return stage_index(self._stages, min(epoch, self._epochs - 1))

    def recut(self, plan: DualBatchPlan, slowness: Sequence[float] = ()) -> int:
        """Cut the epochs of which no round has been handed out by another plan.

        Those under way keep their cut: where the groups are no longer the same, what is left of
        them goes to whoever is free, of either group.

        Parameters
        ----------
        plan : DualBatchPlan
        slowness : sequence of float, optional
            As in `epoch_bounds`.

        Returns
        -------
        int
            The first epoch that is cut anew.
        """
        start = max(map(self._first_untouched_epoch, Group))
        while len(self.cuts) > 1 and self.cuts[-1].start_epoch >= start:
            self.cuts.pop()
        last = self.cuts[-1]
        if (plan.large_workers, plan.small_workers) != (last.large_workers, last.small_workers):
            self._shared_until = start
        if start < self._epochs:
            self._add_cut(start, plan, slowness)
        return start

    def hand_out(self, group: Group, slot: int | None = None) -> Round | None:
        """The next round for a worker of `group`, or None when all rounds are handed out.

        It is one of the group's own, unless the group is more than an epoch ahead of the other
        or has none left: then it is one of the other's, trained with that group's batch and
        committed with its factor. So unforeseen differences in speed neither pull the groups
        apart nor leave workers idle at the end. What is left of the epochs that were under way
        at a `recut` belongs to both groups alike.

        Parameters
        ----------
        group : Group
        slot : int, optional
            The worker's own in its group: it gets the next round of that slot, while there is
            one.
        """
        other = Group.SMALL if group is Group.LARGE else Group.LARGE
        if self._must_help(group, other):
            group, slot = other, None
        index = self._next(group)
        if index is None:
            return None
        if slot is not None:
            index = self._next_of_slot(group, slot, index)
        left = self._returned[group]
        if index in left:
            left.remove(index)
        else:
            left.extend(range(self._handed_out[group], index))
            self._handed_out[group] = index + 1
        self._open.add((group, index))
        return self.round(group, index)

    def round(self, group: Group, index: int) -> Round:
        """Round number `index` of `group`."""
        cut = self.cuts[self.cut_of(group, index)]
        size = cut.size(group)
        epoch, within = divmod(index - cut.first[group], self.parts * size)
        part, slot = divmod(within, size)
        column = slot if group is Group.LARGE else cut.large_workers + slot
        start, stop = cut.bounds[column], cut.bounds[column + 1]
        begin = start + (stop - start) * part // self.parts
        end = start + (stop - start) * (part + 1) // self.parts
        return Round(group, index, cut.start_epoch + epoch, part, slot, begin, end)

    def cut_of(self, group: Group, index: int) -> int:
        """Number of the cut to which that round belongs."""
        return max(n for n, cut in enumerate(self.cuts) if cut.first[group] <= index)

    def commit(self, group: Group, index: int) -> None:
        """Count the round's commit. Raises KeyError if that round was not handed out."""
        self._open.remove((group, index))
        self.commits += 1

    def take_back(self, group: Group, index: int) -> None:
        """Undo `commit`: that commit was not merged after all."""
        self._open.add((group, index))
        self.commits -= 1

    def give_back(self, group: Group, index: int) -> None:
        """Let another worker do a round that was handed out. Raises KeyError as `commit`."""
        self._open.remove((group, index))
        bisect.insort(self._returned[group], index)

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
            "cuts": [cut.to_dict() for cut in self.cuts],
            "shared_until": self._shared_until,
        }

    def restore(self, state: dict) -> None:
        """Go on from a `state` of a run that began with the same plan."""
        self.commits = state["commits"]
        self.cuts = [Cut.from_dict(cut) for cut in state["cuts"]]
        self._shared_until = state["shared_until"]
        self._handed_out = {group: state["handed_out"][group.value] for group in Group}
        self._returned = {group: list(state["undone"][group.value]) for group in Group}
        self._open.clear()

    def _must_help(self, group: Group, other: Group) -> bool:
        """Whether a worker of `group` is to train a round of the other group."""
        own, theirs = self._next(group), self._next(other)
        if own is None or theirs is None:
            return theirs is not None
        mine, late = self.round(group, own), self.round(other, theirs)
        lead = 0 if late.epoch < self._shared_until else self.parts
        return self.parts * (mine.epoch - late.epoch) + mine.part - late.part > lead

    def _next(self, group: Group) -> int | None:
        """Index of the group's next round; None when all are handed out."""
        if self._returned[group]:
            return self._returned[group][0]
        index, last = self._handed_out[group], self.cuts[-1]
        return index if index < self._first_round(last, group, self._epochs) else None

    def _next_of_slot(self, group: Group, slot: int, otherwise: int) -> int:
        """Index of the next round of that slot, within as many as the group has slots."""
        begin = self._handed_out[group]
        size = self.cuts[self.cut_of(group, begin)].size(group)
        end = min(begin + size, self._first_round(self.cuts[-1], group, self._epochs))
        candidates = [*self._returned[group], *range(begin, end)]
        return next((i for i in candidates if self.round(group, i).slot == slot), otherwise)

    def _first_untouched_epoch(self, group: Group) -> int:
        """The first epoch of which no round of `group` has been handed out."""
        index = self._handed_out[group]
        cut = self.cuts[self.cut_of(group, index)]
        size = cut.size(group) * self.parts
        return cut.start_epoch + (-(-(index - cut.first[group]) // size) if size else 0)

    def _first_round(self, cut: Cut, group: Group, epoch: int) -> int:
        """Index of the group's first round of `epoch`, were it cut by `cut`."""
        return cut.first[group] + (epoch - cut.start_epoch) * self.parts * cut.size(group)

    def _commits_at(self, cut: Cut, epoch: int) -> int:
        """Global commit count at the start of `epoch`, were it cut by `cut`."""
        return cut.start_commits + (epoch - cut.start_epoch) * self.parts * cut.workers

    def _cut_at(self, commits: int) -> Cut:
        """The cut of the epoch under way after so many commits."""
        return next(cut for cut in reversed(self.cuts) if cut.start_commits <= commits)

    def _add_cut(self, epoch: int, plan: DualBatchPlan, slowness: Sequence[float] = ()) -> None:
        first, commits = dict.fromkeys(Group, 0), 0
        if self.cuts:
            last = self.cuts[-1]
            first = {group: self._first_round(last, group, epoch) for group in Group}
            commits = self._commits_at(last, epoch)
        least = _FEWEST * self.parts
        bounds = tuple(epoch_bounds(plan, self._samples, slowness, least))
        self.cuts.append(Cut(epoch, plan.large_workers, plan.small_workers, bounds, commits, first))
