"""Rounds and commits of many workers on a virtual clock, timed by a network model.

Nothing is trained and no model is moved: a server is a queue, a worker the seconds between its
commits, so that three events a commit are enough and tens of thousands of workers take seconds.
What each step costs is `hpc_hdb.plan.network`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_hdb.cluster.clock import Clock
from hpc_hdb.cluster.stations import Bound, BulkStation, Rounds, Station, Worker, make_stations
from hpc_hdb.plan.network import Network, commit_cost, reduction_seconds
from hpc_hdb.plan.topology import Topology

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
    rounds = Rounds(warm_up, measured)
    seconds = np.asarray(train) * _variation(topology, (rounds.total, workers), jitter, seed)
    clock = Clock()
    bound = Bound(workers, staleness if sync == "ssp" else None)
    cost = commit_cost(network, model_bytes, topology.servers)
    stations: Sequence[Station | BulkStation]
    leaves: Sequence[Station | BulkStation]
    if sync == "bsp":
        moving, serving = reduction_seconds(network, topology, model_bytes, workers)
        stations = [BulkStation(clock, rounds, workers, moving, serving)]
        leaves = [*stations] * workers
    else:
        stations, leaves = make_stations(clock, rounds, cost, topology, workers, bound)
        moving = cost.alone
    members = [
        Worker(clock, rank, station, list(seconds[:, rank - 1] + inside[rank - 1]))
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
