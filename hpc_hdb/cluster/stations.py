"""Workers and servers of a simulation that times commits: queues on a virtual clock."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from hpc_hdb.cluster.clock import Clock, Suspend
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.plan.network import CommitCost
from hpc_hdb.plan.topology import Topology


class Rounds(NamedTuple):
    """How many each worker trains: to get into step, and that count."""

    warm_up: int
    measured: int

    @property
    def total(self) -> int:
        return self.warm_up + self.measured


class Member(Protocol):
    """Whoever commits to a server."""

    rank: int


class Bound:
    """SSP's bound: who has committed waits until it is no more than `staleness` ahead.

    Parameters
    ----------
    workers : int
    staleness : int or None
        None for no bound (ASP).
    """

    def __init__(self, workers: int, staleness: int | None) -> None:
        self._staleness = staleness
        self._commits: Counter[int] = Counter()
        self._at = Counter({0: workers})
        self._slowest = 0
        self._held: defaultdict[int, list[tuple[Station, Member]]] = defaultdict(list)

    def commit(self, station: Station, member: Member) -> list[tuple[Station, Member]]:
        """Count a worker's commit; those that may go on now, each with its server."""
        if self._staleness is None:
            return [(station, member)]
        self._commits[member.rank] += 1
        commits = self._commits[member.rank]
        self._at[commits] += 1
        self._at[commits - 1] -= 1
        self._held[commits].append((station, member))
        ready = []
        while not self._at[self._slowest]:
            self._slowest += 1
            ready += self._held.pop(self._slowest + self._staleness, [])
        if commits <= self._slowest + self._staleness:
            ready += self._held.pop(commits, [])
        return ready


class Worker:
    """Trains and commits; `seconds` of each round."""

    def __init__(
        self, clock: Clock, rank: int, station: Station | BulkStation, seconds: Sequence[float]
    ) -> None:
        self.rank = rank
        self._clock = clock
        self._station = station
        self._seconds = seconds

    async def work(self) -> list[float]:
        """The times at which its rounds ended."""
        ends = []
        for seconds in self._seconds:
            self._clock.wake(self.rank, seconds)
            await Suspend()
            self._station.deliver(self)
            await Suspend()
            ends.append(self._clock.time)
        return ends


class Station:
    """A server: takes one commit after another, and sends models while it takes the next.

    Parameters
    ----------
    clock : Clock
    rank : int
    rounds : Rounds
    cost : CommitCost
    members : int
        Who commit to it.
    bound : Bound
    parent : Station or None
        To which it commits itself, once for as many commits as it has members; meanwhile its
        members wait.
    """

    def __init__(
        self,
        clock: Clock,
        rank: int,
        rounds: Rounds,
        cost: CommitCost,
        members: int,
        bound: Bound,
        parent: Station | None = None,
    ) -> None:
        self.rank = rank
        self._clock = clock
        self._rounds = rounds
        self._cost = cost
        self._members = members
        self._bound = bound
        self._parent = parent
        self._inbox: deque[Member] = deque()
        self._idle = False
        self._sending_until = 0.0
        self._busy = 0.0

    @property
    def busy_seconds_per_round(self) -> float:
        return self._busy / self._rounds.measured

    def deliver(self, member: Member) -> None:
        """A member's commit is there to be received."""
        self._inbox.append(member)
        if self._idle:
            self._idle = False
            self._clock.wake(self.rank)

    async def serve(self) -> None:
        """Take all commits of all members."""
        cost, clock = self._cost, self._clock
        for number in range(self._rounds.total):
            for _ in range(self._members):
                if not self._inbox:
                    self._idle = True
                    await Suspend()
                member = self._inbox.popleft()
                meets_others = self._inbox or self._sending_until > clock.time
                busy = cost.period if meets_others else min(cost.period, cost.alone)
                clock.wake(self.rank, busy)
                await Suspend()
                self._busy += busy if number >= self._rounds.warm_up else 0.0
                self._answer(member)
            if self._parent is not None:
                self._parent.deliver(self)
                await Suspend()

    def reply(self, member: Member) -> None:
        """Send a member the merged model."""
        sending = max(0.0, self._cost.alone - self._cost.period)
        self._sending_until = self._clock.time + sending
        self._clock.wake(member.rank, sending)

    def _answer(self, member: Member) -> None:
        if isinstance(member, Station):
            self.reply(member)
            return
        for station, ready in self._bound.commit(self, member):
            station.reply(ready)


class BulkStation:
    """All servers in BSP: one reduction of all workers' models a round."""

    def __init__(
        self, clock: Clock, rounds: Rounds, workers: int, merge: float, serving: float
    ) -> None:
        self.rank = SERVER
        self.busy_seconds_per_round = serving
        self._clock = clock
        self._rounds = rounds
        self._workers = workers
        self._merge = merge
        self._inbox: list[Member] = []

    def deliver(self, member: Member) -> None:
        """A worker is ready to reduce."""
        self._inbox.append(member)
        if len(self._inbox) == self._workers:
            self._clock.wake(self.rank)

    async def serve(self) -> None:
        """Take part in all reductions."""
        for _ in range(self._rounds.total):
            await Suspend()
            for member in self._inbox:
                self._clock.wake(member.rank, self._merge)
            self._inbox.clear()


def make_stations(
    clock: Clock,
    rounds: Rounds,
    cost: CommitCost,
    topology: Topology,
    workers: int,
    bound: Bound,
) -> tuple[list[Station], list[Station]]:
    """All servers, from the root down, and the one of each worker."""
    rank = workers + 1
    levels = topology.levels(workers)
    above = [Station(clock, SERVER, rounds, cost, levels[-1], bound)]
    stations = list(above)
    parents = above * levels[-1]
    for below, count in zip(levels[-2::-1], levels[:0:-1], strict=True):
        cuts = [below * number // count for number in range(count + 1)]
        sizes = [end - begin for begin, end in itertools.pairwise(cuts)]
        above = [
            Station(clock, rank + number, rounds, cost, size, bound, parents[number])
            for number, size in enumerate(sizes)
        ]
        rank += count
        stations += above
        parents = [station for station, size in zip(above, sizes, strict=True) for _ in range(size)]
    return stations, parents
