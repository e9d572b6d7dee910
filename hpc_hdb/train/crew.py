"""The root server's account of its workers: who is there, who trains, who waits for an order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.plan import Group

_START_SECONDS = 60.0
"""Within which a replacement joins, at least."""
_LATEST = 0.5
"""Weight of a worker's latest round in its measured speed."""


class Crew:
    """Workers by number, from 1.

    Parameters
    ----------
    groups : sequence of Group
        Of worker 1, 2, ...

    Attributes
    ----------
    present : set of int
        Those that have neither left nor died.
    active : set of int
        Those of them that are to train on.
    waiting : set of int
        Those that wait for an order.
    lacking : set of int
        Those of them that do not have the merged model.
    awaited : set of int
        Those of them that are being started in place of lost ones.
    newcomers : set of int
        Those of them that replace lost ones, and are in no group for reductions yet.
    owing : set of int
        Those of them that are to answer nevertheless, before another reduction.
    changed : bool
        Whether others have come or gone since groups were last formed for reductions.
    committed : dict of int to Report
        Of those of them whose commits wait for a reduction.
    commits : dict of int to int
        Merged commits of each worker, also of those that are gone.
    refused : Counter
        Rounds of each worker, one after another, that came to nothing.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.present = set(range(1, len(groups) + 1))
        self.active = set(self.present)
        self.waiting: set[int] = set()
        self.lacking: set[int] = set()
        self.owing: set[int] = set()
        self.awaited: set[int] = set()
        self.newcomers: set[int] = set()
        self.changed = False
        self.committed: dict[int, Report] = {}
        self.commits = dict.fromkeys(self.present, 0)
        self.refused: Counter[int] = Counter()
        self._groups = dict(enumerate(groups, start=1))
        self._orders: dict[int, Order] = {}
        self._heard: dict[int, float] = {}
        self._slowness: dict[int, float] = {}
        self._spared: Counter[int] = Counter()
        self._to_answer = 0

    def group(self, worker: int) -> Group:
        return self._groups[worker]

    def regroup(self, small_workers: int) -> None:
        """Leave so many active workers in the small-batch group: the last ones."""
        active = sorted(self.active)
        for position, worker in enumerate(active):
            small = position >= len(active) - small_workers
            self._groups[worker] = Group.SMALL if small else Group.LARGE

    @property
    def small_workers(self) -> int:
        """Active ones of the small-batch group."""
        return sum(self._groups[worker] is Group.SMALL for worker in self.active)

    def slot(self, worker: int) -> int:
        """The worker's position among the active ones of its group."""
        return sum(self._groups[w] is self._groups[worker] for w in self.active if w < worker)

    def lead(self, worker: int) -> int:
        """How many commits the worker is ahead of the slowest active one."""
        return self._progress(worker) - min(map(self._progress, self.active))

    def spare_returned(self, staleness: int) -> None:
        """Those who were away, or are new, need not make the commits they have missed (SSP).

        Who is held to `staleness` is never more than one commit further behind. Others are taken
        for as far as the slowest of those.
        """
        progress = {worker: self._progress(worker) for worker in self.active}
        least = max(progress.values()) - staleness - 1
        slowest = min(commits for commits in progress.values() if commits >= least)
        for worker, commits in progress.items():
            self._spared[worker] += max(0, slowest - commits)

    def _progress(self, worker: int) -> int:
        return self.commits[worker] + self._spared[worker]

    def order_of(self, worker: int) -> Order:
        """The order that the worker was given last."""
        return self._orders[worker]

    def note_order(self, worker: int, order: Order, now: float) -> None:
        """The worker is given an order."""
        self.waiting.discard(worker)
        self.lacking.discard(worker)
        self._heard[worker] = now
        if order.kind == OrderKind.TRAIN:
            self._orders[worker] = order

    def note_report(self, worker: int, report: Report, now: float) -> None:
        """The worker is heard of."""
        self._heard[worker] = now
        if report.kind in (ReportKind.UNDONE, ReportKind.PRESENT):
            if report.index == self._to_answer:
                self.owing.discard(worker)
        elif report.kind in (ReportKind.JOIN, ReportKind.COMMIT, ReportKind.DIVERGED):
            self.waiting.add(worker)
            self.lacking.add(worker)
        elif report.kind == ReportKind.LEAVE:
            self.present.discard(worker)

    def note_seconds(self, worker: int, seconds: float) -> None:
        """A round took so long, whatever was predicted of it."""
        slowness = seconds / self._orders[worker].predicted_seconds
        before = self._slowness.get(worker, slowness)
        self._slowness[worker] = before + _LATEST * (slowness - before)

    @property
    def slowness(self) -> list[float]:
        """How many times as long as predicted the active workers take, in their order."""
        return [self._slowness.get(worker, 1.0) for worker in sorted(self.active)]

    def dismiss(self, worker: int) -> None:
        """The worker is to train no more; it is there until it leaves."""
        self.active.discard(worker)

    def lose(self, worker: int) -> Order | None:
        """The worker is gone; the last round that it was given, if any."""
        for members in (
            *(self.present, self.active, self.waiting),
            *(self.lacking, self.owing, self.awaited, self.newcomers),
        ):
            members.discard(worker)
        self.committed.pop(worker, None)
        self.changed = True
        return self._orders.get(worker)

    def await_replacement(self, worker: int, now: float) -> None:
        """A process has been started in its place, and will join."""
        self.present.add(worker)
        self.awaited.add(worker)
        self._heard[worker] = now
        self._orders.pop(worker, None)
        self._slowness.pop(worker, None)
        self.refused.pop(worker, None)

    def admit(self, worker: int) -> None:
        """The replacement has joined."""
        self.awaited.discard(worker)
        self.active.add(worker)
        self.newcomers.add(worker)
        self.changed = True

    def expect_answers(self, number: int, now: float) -> None:
        """All that wait are to answer order number `number`, from now on."""
        self.owing = set(self.waiting)
        self._to_answer = number
        for worker in self.owing:
            self._heard[worker] = now

    def excuse(self, seconds: float) -> None:
        """For so long nobody listened to any worker."""
        for worker in self._heard:
            self._heard[worker] += seconds

    def silent(self, now: float, least: float, rounds: float) -> list[int]:
        """Workers under way that have not been heard of for too long.

        Parameters
        ----------
        now : float
        least : float
            Seconds that are never too long.
        rounds : float
            Nor are so many predicted times of a round.
        """
        found = []
        training = (self.active - self.waiting) & self._orders.keys()
        for worker in sorted(training | self.owing | self.awaited):
            order = self._orders.get(worker)
            usual = rounds * order.predicted_seconds if order else 0.0
            if worker in self.awaited:
                usual = _START_SECONDS
            if now - self._heard[worker] > max(least, usual):
                found.append(worker)
        return found
