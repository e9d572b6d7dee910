"""What commits cost on a network, and how many workers its servers can serve.

A commit of a model of ``M`` bytes that meets an idle server takes its worker

    C = 4*latency + overhead + M/commit_rate,

for the way there, the merge and the way back, as far as they do not overlap. A server that is
never idle takes one commit every

    P = overhead + M/server_rate

seconds. ``n`` workers that train for ``Z`` seconds between commits (ASP) then commit every
``max(Z + C, n*P)`` seconds: the asymptotes of a closed queueing network (Denning and Buzen,
"The Operational Analysis of Queueing Network Models", ACM Computing Surveys 1978).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from hpc_hdb.errors import UserError
from hpc_hdb.plan.topology import Topology

_SLOWED_DOWN, _ALMOST_LINEAR = 1.15, 0.6
"""A reduction so much slower than expected, and that part of one whose time is proportional to the
workers, shows that they share a fabric; deeper trees of messages take longer too, but less."""


@dataclass(frozen=True)
class Network:
    """Constants of a network and of the ranks on it; `hdb profile --network` measures them.

    Parameters
    ----------
    latency : float
        Seconds of a small message between a worker and a server.
    bandwidth : float
        Bytes per second of one model on its way, with nothing else going on.
    merge_rate : float
        Bytes of model that a server merges per second.
    overhead : float
        Seconds that a server spends on a commit, however small the model.
    commit_rate : float
        Bytes of model per second of a whole commit with a single worker.
    server_rate : float
        Bytes of model that a server takes per second when several workers commit without a
        pause: what its link, the merge and their contention leave.
    reduce_rate : float
        Bytes of model per second of a reduction and broadcast (BSP) with a single worker.
    exchange_rate : float
        As `reduce_rate`, of what further workers add: a second one half of a model, and many
        one model.
    fabric_rate : float or None
        Bytes of model per second of a reduction, all workers together, beyond which they slow one
        another down, as on a machine or a switch that they share; None where nothing does.
    node_latency, node_bandwidth : float
        As `latency` and `bandwidth`, between the ranks of one node.

    Raises
    ------
    UserError
        If a constant is not a positive, finite number.
    """

    latency: float
    bandwidth: float
    merge_rate: float
    overhead: float
    commit_rate: float
    server_rate: float
    reduce_rate: float
    exchange_rate: float
    fabric_rate: float | None
    node_latency: float
    node_bandwidth: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "fabric_rate" and value is None:
                continue
            if not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
                raise UserError(f"the network model needs a positive {name}, not {value!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> Network:
        """The constants among `values`; KeyError where one is missing."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})  # type: ignore[arg-type]


ASSUMED = Network(
    latency=50e-6,
    bandwidth=1.1e9,
    merge_rate=4e9,
    overhead=200e-6,
    commit_rate=0.5e9,
    server_rate=0.9e9,
    reduce_rate=0.5e9,
    exchange_rate=1.1e9,
    fabric_rate=None,
    node_latency=5e-6,
    node_bandwidth=5e9,
)
"""Stands in for a network that has not been measured: 10 Gbit/s Ethernet."""


def fit_network(
    model_bytes: int,
    link: Sequence[tuple[int, float]],
    node: Sequence[tuple[int, float]],
    merge: float,
    overhead: float,
    commits: Mapping[int, float],
    reductions: Mapping[int, float],
) -> Network:
    """The constants that describe what was measured.

    Parameters
    ----------
    model_bytes : int
    link, node : sequence of (int, float)
        Bytes and seconds of transfers, one way, between two ranks and between two of one node;
        the first is of a small message.
    merge : float
        Seconds of one merge.
    overhead : float
        Seconds from commit to commit at a server whose model is next to nothing.
    commits, reductions : mapping of int to float
        Seconds from one round to the next in ASP and in BSP, by the number of workers that
        commit without a pause: 1, 2 where there are so many, and others.
    """
    latency, bandwidth = _fit_line(link)
    node_latency, node_bandwidth = _fit_line(node)
    # Noise may leave nothing of a small model: what is left then counts as very fast.
    fastest = 100 * bandwidth

    def rate(seconds: float) -> float:
        return model_bytes / max(seconds, model_bytes / fastest)

    commit_rate = rate(commits[1] - overhead - 4 * latency)
    periods = [seconds / workers - overhead for workers, seconds in commits.items() if workers > 1]
    if periods:
        # With two workers the server still idles while a commit is on its way.
        server_rate = rate(statistics.fmean(periods[1:] or periods))
    else:
        server_rate = 1 / (1 / bandwidth + merge / model_bytes)

    def in_messages(workers: int) -> float:
        return reductions[workers] - workers * overhead - _steps(workers) * latency

    exchange_rate = rate(2 * (in_messages(2) - in_messages(1))) if 2 in reductions else bandwidth
    fitted = Network(
        latency=latency,
        bandwidth=bandwidth,
        merge_rate=rate(merge),
        overhead=overhead,
        commit_rate=commit_rate,
        server_rate=server_rate,
        reduce_rate=rate(in_messages(1)),
        exchange_rate=exchange_rate,
        fabric_rate=None,
        node_latency=node_latency,
        node_bandwidth=node_bandwidth,
    )
    slowed = [
        in_messages(workers) / workers
        for workers, seconds in reductions.items()
        if workers > 2
        and seconds > _SLOWED_DOWN * _reduction(fitted, model_bytes, workers, 1)
        and seconds > _ALMOST_LINEAR * reductions[2] * workers / 2
    ]
    if slowed:
        return replace(fitted, fabric_rate=rate(statistics.fmean(slowed)))
    return fitted


def _fit_line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency in seconds, of the first point, and bandwidth, of least relative squares."""
    (_, latency), *rest = points
    weights = [1 / seconds**2 for _, seconds in rest]
    moved = zip(rest, weights, strict=True)
    slope = sum(w * size * max(t - latency, t / 10) for (size, t), w in moved)
    slope /= sum(w * size**2 for (size, _), w in zip(rest, weights, strict=True))
    return latency, 1 / slope


@dataclass(frozen=True)
class CommitCost:
    """Seconds of a commit in ASP and SSP.

    Attributes
    ----------
    alone : float
        ``C``: of a commit that meets idle servers, as its worker sees it.
    period : float
        ``P``: from one commit to the next at a server that is never idle.
    """

    alone: float
    period: float


def commit_cost(network: Network, model_bytes: float, servers: int = 1) -> CommitCost:
    """What a commit of `model_bytes` costs when they are spread over `servers` servers.

    All servers take the same commits in the same order, each a slice of them. So they share the
    merge and their links, but one worker's link carries the whole model.
    """
    link = model_bytes / network.bandwidth
    others = 1 - 1 / servers
    alone = model_bytes / network.commit_rate
    alone = max(min(link, alone), alone - others * model_bytes / network.merge_rate)
    period = model_bytes / network.server_rate
    period = max(min(link, period), period / servers)
    return CommitCost(
        alone=4 * network.latency + network.overhead + alone, period=network.overhead + period
    )


def reduction_seconds(
    network: Network, topology: Topology, model_bytes: float, workers: int
) -> tuple[float, float]:
    """Seconds of a bulk-synchronous merge (BSP) once all workers are done.

    The models are added up and the sum is broadcast, slice by slice. A tree does so level by
    level, each server with its members.

    Returns
    -------
    tuple of float
        Of the merge, and of the part in which the busiest server takes part.
    """
    levels = topology.levels(workers)
    if len(levels) == 1:
        merge = _reduction(network, model_bytes, workers, topology.servers)
        return merge, merge
    members = [topology.fan_out] * (len(levels) - 1) + [levels[-1]]
    parts = [_reduction(network, model_bytes, count, 1) for count in members]
    return sum(parts), max(parts)


def _reduction(network: Network, model_bytes: float, workers: int, servers: int) -> float:
    link = model_bytes / network.bandwidth
    alone = model_bytes / network.reduce_rate
    seconds = max(min(link, alone), alone / servers)
    seconds += model_bytes / network.exchange_rate * (workers - 1) / workers
    if network.fabric_rate is not None:
        seconds = max(seconds, workers * model_bytes / network.fabric_rate)
    return seconds + _steps(workers) * network.latency + workers * network.overhead


def _steps(workers: int) -> int:
    """Messages one after another in a reduction and a broadcast among so many and a server."""
    return 2 * math.ceil(math.log2(workers + 1))


def all_reduce_seconds(network: Network, gradient_bytes: float, ranks: int) -> float:
    """Seconds of a ring all-reduce among the ranks of one node.

    ``2*(g-1)/g * M/b + 2*(g-1)*latency`` (Patarasuk and Yuan, "Bandwidth Optimal All-reduce
    Algorithms for Clusters of Workstations", 2009).
    """
    transfer = gradient_bytes / ranks / network.node_bandwidth
    return 2 * (ranks - 1) * (transfer + network.node_latency)


def broadcast_seconds(network: Network, model_bytes: float, ranks: int) -> float:
    """Seconds until the merged model has come from a worker's leader to its other ranks."""
    if ranks == 1:
        return 0.0
    return model_bytes / network.node_bandwidth + (ranks - 1) * network.node_latency
