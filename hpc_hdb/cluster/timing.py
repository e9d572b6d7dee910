"""Rounds and commits of many workers on a virtual clock, timed by a network model.

Nothing is trained and no model is moved: a server is a queue, a worker the seconds between its
commits, so that three events a commit are enough and tens of thousands of workers take seconds.
What each step costs is `hpc_hdb.plan.network`'s.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from hpc_hdb.cluster.clock import Clock, Suspend
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.plan.network import CommitCost, Network, Topology, commit_cost, reduction_seconds

_FEWEST_ROUNDS, _FEWEST_COMMITS = 3, 512
"""Measured of each worker, and of all together: means of few draws would be those of chance."""

_FASTEST = 0.2
"""Of a round's mean: jitter takes no more off."""


@dataclass(frozen=True)
class CommitTiming:
    """Means over all workers and rounds.

    Attributes
    ----------
    round_seconds : float
        From one commit to the next.
    train_seconds, communicate_seconds, wait_seconds : float
        Parts of it: local steps; moving models and gradients; waiting for a server or for others.
    server_load : float
        Share of the time in which the busiest server receives and merges.
    """

    round_seconds: float
    train_seconds: float
    communicate_seconds: float
    wait_seconds: float
    server_load: float


def time_commits(
    network: Network,
    topology: Topology,
    model_bytes: float,
    train: Sequence[float],
    inside: Sequence[float],
    sync: str,
    staleness: int = 1,
    jitter: float = 0.0,
    seed: int = 0,
) -> CommitTiming:
    """Simulate workers that train, commit and train on.

    Parameters
    ----------
    network : Network
    topology : Topology
    model_bytes : float
    train : sequence of float, length n
        Seconds of local steps that each worker takes between two commits.
    inside : sequence of float, length n
        Seconds that it spends on its own ranks' gradients and models meanwhile.
    sync : str
        "asp", "ssp" or "bsp".
    staleness : int
        SSP: commits that a worker may be ahead of the slowest.
    jitter : float
        Standard deviation of a rank's round, relative to its mean.
    seed : int

    Returns
    -------
    CommitTiming
    """
    workers = len(train)
    # In the first round all commit at once; SSP's workers drift apart for some rounds more.
    warm_up = 6 if sync == "ssp" else 2
    measured = max(_FEWEST_ROUNDS, -(-_FEWEST_COMMITS // workers))
    rounds = _Rounds(warm_up, measured)
    seconds = np.asarray(train) * _variation(topology, (rounds.total, workers), jitter, seed)
    clock = Clock()
    bound = _Bound(workers, staleness if sync == "ssp" else None)
    cost = commit_cost(network, model_bytes, topology.servers)
    stations: Sequence[_Station | _BulkStation]
    leaves: Sequence[_Station | _BulkStation]
    if sync == "bsp":
        moving, serving = reduction_seconds(network, topology, model_bytes, workers)
        stations = [_BulkStation(clock, rounds, workers, moving, serving)]
        leaves = [*stations] * workers
    else:
        stations, leaves = _stations(clock, rounds, cost, topology, workers, bound)
        moving = cost.alone
    members = [
        _Worker(clock, rank, station, list(seconds[:, rank - 1] + inside[rank - 1]))
        for rank, station in enumerate(leaves, start=1)
    ]
    ends = clock.run_ranks(
        {station.rank: station.serve() for station in stations}
        | {member.rank: member.work() for member in members}
    )
    times = np.array([ends[member.rank] for member in members])
    cycle = float((times[:, -1] - times[:, warm_up - 1]).mean()) / measured
    trained = float(seconds[warm_up:].mean())
    communicated = moving + float(np.mean(inside))
    load = max(station.busy_seconds_per_round for station in stations) / cycle
    waited = max(0.0, cycle - trained - communicated)
    return CommitTiming(cycle, trained, communicated, waited, min(1.0, load))


def _variation(topology: Topology, shape: tuple[int, int], jitter: float, seed: int) -> np.ndarray:
    """Factors of the rounds' seconds, shape (rounds, workers); a worker's slowest rank counts."""
    if not jitter:
        return np.ones(shape)
    source = np.random.default_rng(seed)
    slowest = np.full(shape, -np.inf)
    for _ in range(topology.ranks_per_worker):
        np.maximum(slowest, source.standard_normal(shape), out=slowest)
    return np.maximum(1 + jitter * slowest, _FASTEST)


def _stations(
    clock: Clock,
    rounds: _Rounds,
    cost: CommitCost,
    topology: Topology,
    workers: int,
    bound: _Bound,
) -> tuple[list[_Station], list[_Station]]:
    """All servers, from the root down, and the one of each worker."""
    rank = workers + 1
    levels = topology.levels(workers)
    above = [_Station(clock, SERVER, rounds, cost, levels[-1], bound)]
    stations = list(above)
    parents = above * levels[-1]
    for below, count in zip(levels[-2::-1], levels[:0:-1], strict=True):
        cuts = [below * number // count for number in range(count + 1)]
        sizes = [end - begin for begin, end in itertools.pairwise(cuts)]
        above = [
            _Station(clock, rank + number, rounds, cost, size, bound, parents[number])
            for number, size in enumerate(sizes)
        ]
        rank += count
        stations += above
        parents = [station for station, size in zip(above, sizes, strict=True) for _ in range(size)]
    return stations, parents


class _Rounds(NamedTuple):
    """How many each worker trains: to get into step, and that count."""

    warm_up: int
    measured: int

    @property
    def total(self) -> int:
        return self.warm_up + self.measured


class _Member(Protocol):
    """Whoever commits to a server."""

    rank: int


class _Bound:
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
        self._held: defaultdict[int, list[tuple[_Station, _Member]]] = defaultdict(list)

    def commit(self, station: _Station, member: _Member) -> list[tuple[_Station, _Member]]:
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


class _Worker:
    """Trains and commits; `seconds` of each round."""

    def __init__(
        self, clock: Clock, rank: int, station: _Station | _BulkStation, seconds: Sequence[float]
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


class _Station:
    """A server: takes one commit after another, and sends models while it takes the next.

    Parameters
    ----------
    clock : Clock
    rank : int
    rounds : _Rounds
    cost : CommitCost
    members : int
        Who commit to it.
    bound : _Bound
    parent : _Station or None
        To which it commits itself, once for as many commits as it has members; meanwhile its
        members wait.
    """

    def __init__(
        self,
        clock: Clock,
        rank: int,
        rounds: _Rounds,
        cost: CommitCost,
        members: int,
        bound: _Bound,
        parent: _Station | None = None,
    ) -> None:
        self.rank = rank
        self._clock = clock
        self._rounds = rounds
        self._cost = cost
        self._members = members
        self._bound = bound
        self._parent = parent
        self._inbox: deque[_Member] = deque()
        self._idle = False
        self._sending_until = 0.0
        self._busy = 0.0

    @property
    def busy_seconds_per_round(self) -> float:
        return self._busy / self._rounds.measured

    def deliver(self, member: _Member) -> None:
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

    def reply(self, member: _Member) -> None:
        """Send a member the merged model."""
        sending = max(0.0, self._cost.alone - self._cost.period)
        self._sending_until = self._clock.time + sending
        self._clock.wake(member.rank, sending)

    def _answer(self, member: _Member) -> None:
        if isinstance(member, _Station):
            self.reply(member)
            return
        for station, ready in self._bound.commit(self, member):
            station.reply(ready)


class _BulkStation:
    """All servers in BSP: one reduction of all workers' models a round."""

    def __init__(
        self, clock: Clock, rounds: _Rounds, workers: int, merge: float, serving: float
    ) -> None:
        self.rank = SERVER
        self.busy_seconds_per_round = serving
        self._clock = clock
        self._rounds = rounds
        self._workers = workers
        self._merge = merge
        self._inbox: list[_Member] = []

    def deliver(self, member: _Member) -> None:
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
