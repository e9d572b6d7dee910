"""What commits cost on a network, and how many workers its servers can serve.

A server receives and merges one commit at a time; the merged model goes back while the next
commit arrives. So a commit that meets an idle server takes

    C = 4*latency + overhead + M/b + M/m + M/b

for a model of ``M`` bytes, bandwidth ``b`` of a transfer on its own and merge rate ``m``, and
servers that are never idle take one commit every

    P = overhead + M/s + M/m

where ``s`` is the bandwidth that each direction of a server's link has while both are in use.
``n`` workers that train for ``Z`` seconds between commits (ASP) then commit every
``max(Z + C, n*P)`` seconds: the asymptotes of a closed queueing network (Denning and Buzen,
"The Operational Analysis of Queueing Network Models", ACM Computing Surveys 1978).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from hpc_hdb.errors import UserError


@dataclass(frozen=True)
class Network:
    """Constants of a network and of the ranks on it; `hdb profile --network` measures them.

    Parameters
    ----------
    latency : float
        Seconds of a small message between a worker and a server.
    bandwidth : float
        Bytes per second of one model on its way, with nothing else going on.
    server_bandwidth : float
        Bytes per second of a server's link, both directions together, when workers commit
        without a pause. Twice `bandwidth` is a full-duplex link that nothing slows down.
    merge_rate : float
        Bytes of model that a server merges per second.
    overhead : float
        Seconds that a server spends on a commit beside receiving and merging it.
    reduce_rate : float
        Bytes per second of model in a reduction and broadcast (BSP) with a single worker.
    exchange_bandwidth : float
        Bytes per second that each worker exchanges with others in a reduction.
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
    server_bandwidth: float
    merge_rate: float
    overhead: float
    reduce_rate: float
    exchange_bandwidth: float
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
    server_bandwidth=2.2e9,
    merge_rate=4e9,
    overhead=200e-6,
    reduce_rate=0.4e9,
    exchange_bandwidth=1.1e9,
    fabric_rate=None,
    node_latency=5e-6,
    node_bandwidth=5e9,
)
"""Stands in for a network that has not been measured: 10 Gbit/s Ethernet."""


@dataclass(frozen=True)
class Topology:
    """Who commits to whom.

    Parameters
    ----------
    name : str
        "star", "sharded", "grouped" or "tree".
    servers : int
        ``k``; each holds a slice of the model.
    ranks_per_worker : int
        ``g``; they all-reduce their gradients after each step, and one of them commits.
    fan_out : int
        Most that commit to one server; 0 for all. Where there are more, servers commit to
        servers: each one time for as many commits as it has members.
    """

    name: str
    servers: int = 1
    ranks_per_worker: int = 1
    fan_out: int = 0

    def levels(self, workers: int) -> list[int]:
        """Numbers of those that commit, from the workers up to the members of the root.

        >>> Topology("tree", fan_out=16).levels(1000)
        [1000, 63, 4]
        """
        levels = [workers]
        while self.fan_out and levels[-1] > self.fan_out:
            levels.append(-(-levels[-1] // self.fan_out))
        return levels

    def server_ranks(self, workers: int) -> int:
        """Ranks that serve instead of training."""
        return self.servers + sum(self.levels(workers)[1:])

    def most_members(self, workers: int) -> int:
        """Members of the server that has the most."""
        levels = self.levels(workers)
        full = self.fan_out if len(levels) > 1 else 0
        return max(full, levels[-1])


@dataclass(frozen=True)
class CommitCost:
    """Seconds of the steps of one commit in ASP and SSP.

    Attributes
    ----------
    messages : float
        Latency of report, order and both models.
    overhead, merge : float
        At the server.
    transfer : float
        Of the server's slice of the model, one way, with nothing else going on.
    shared : float
        The same while the other direction of the server's link is in use.
    whole : float
        Of the whole model over the worker's own link.
    """

    messages: float
    overhead: float
    merge: float
    transfer: float
    shared: float
    whole: float

    @property
    def alone(self) -> float:
        """``C``: what a worker waits for a commit that meets idle servers."""
        return self.messages + self.overhead + self.merge + 2 * max(self.transfer, self.whole)

    @property
    def period(self) -> float:
        """``P``: from one commit to the next at a server that is never idle."""
        return self.overhead + self.shared + self.merge


def commit_cost(network: Network, model_bytes: float, servers: int = 1) -> CommitCost:
    """What a commit of `model_bytes` costs when they are spread over `servers` servers.

    All servers see the same commits, each a slice of them. The worker's own link still carries
    the whole model; under load a server's link carries slices of different workers.
    """
    part = model_bytes / servers
    return CommitCost(
        messages=4 * network.latency,
        overhead=network.overhead,
        merge=part / network.merge_rate,
        transfer=part / network.bandwidth,
        shared=2 * part / network.server_bandwidth,
        whole=model_bytes / network.bandwidth,
    )


def reduction_seconds(
    network: Network, topology: Topology, model_bytes: float, workers: int
) -> tuple[float, float]:
    """Seconds of a bulk-synchronous merge (BSP) once all workers are done.

    Every worker scales its model and adds up one slice of all of them; the slices are gathered
    at the servers and broadcast. A tree does so level by level, each server with its members.

    Returns
    -------
    tuple of float
        Of the merge, and of the part in which the busiest server takes part.
    """
    levels = topology.levels(workers)
    if len(levels) > 1:
        members = [*(min(topology.fan_out, size) for size in levels[:-1]), levels[-1]]
        parts = [_reduction(network, model_bytes, count, 1) for count in members]
        return sum(parts), max(parts)
    merge = _reduction(network, model_bytes, workers, topology.servers)
    exchange = model_bytes / network.exchange_bandwidth * (workers - 1) / workers
    return merge, merge - min(exchange, merge)


def _reduction(network: Network, model_bytes: float, workers: int, servers: int) -> float:
    others = (workers - 1) / workers
    own = model_bytes / network.reduce_rate + others * model_bytes / network.exchange_bandwidth
    # Several servers gather their slices side by side; one worker's model passes its link whole.
    own -= (1 - 1 / servers) * model_bytes / network.bandwidth
    if network.fabric_rate is not None:
        own = max(own, workers * model_bytes / network.fabric_rate)
    messages = workers - 1 + 2 * math.ceil(math.log2(workers + 1))
    return own + messages * network.latency + workers * network.overhead


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
