"""How a run scales: the same settings with other numbers of workers and other topologies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hpc_hdb.cluster.timing import CommitTiming, time_commits
from hpc_hdb.config import Settings
from hpc_hdb.errors import InfeasiblePlan, UserError
from hpc_hdb.plan.network import Network
from hpc_hdb.plan.topology import Topology
from hpc_hdb.plan.workload import Workload
from hpc_hdb.run.build import make_model
from hpc_hdb.run.planning import ask_data, known_beforehand, rank_timing, stages_with_batches
from hpc_hdb.train.data import open_data
from hpc_hdb.train.parameters import FlatModel

_SERVERS = (2, 4, 8, 16, 32, 64)
_RANKS_PER_WORKER = (2, 4, 8)
"""What `advise` tries; no more ranks in a worker than a node commonly has GPUs."""
_GOOD_ENOUGH = 1.05
"""Of the best epoch time: a simpler topology within it is preferred."""


@dataclass(frozen=True)
class Row:
    """One topology with one number of training ranks.

    Attributes
    ----------
    ranks, servers : int
        That train, and that serve.
    epoch_seconds : float
    timing : CommitTiming
        Of a round.
    """

    ranks: int
    servers: int
    epoch_seconds: float
    timing: CommitTiming


@dataclass(frozen=True)
class Scaling:
    """One topology with several numbers of training ranks.

    Attributes
    ----------
    topology : Topology
    saturation : int or None
        Training ranks from which on communication limits the run.
    rows : list of Row
    """

    topology: Topology
    saturation: int | None
    rows: list[Row]


def workload_of(settings: Settings, samples: int | None, workers: int | None = None) -> Workload:
    """What a configuration's ranks train and commit, each by itself.

    Of ranks that are to share a batch each has its part of it as its own.

    Parameters
    ----------
    settings : Settings
    samples : int or None
        Training images; None looks at the data.
    workers : int, optional
        Those of which ``plan.small_workers`` are small; by default ``plan.workers``.

    Raises
    ------
    UserError
        If the time model is not known yet, or data or model cannot be had.
    """
    if settings.server.sync not in ("asp", "bsp", "ssp"):
        raise UserError(
            f'server.sync = "{settings.server.sync}" has no commits to time: choose asp, bsp or ssp'
        )
    timing = known_beforehand(rank_timing(settings))
    shared = settings.server.ranks_per_worker
    stages = [
        replace(stage, large_batch=stage.large_batch and -(-stage.large_batch // shared))
        for stage in stages_with_batches(settings)
    ]
    data = None if samples else ask_data(lambda: open_data(settings.data, "train"))
    classes = len(data.classes) if data else guess_classes(settings)
    return Workload(
        stages,
        timing,
        samples or len(data.labels if data else ()),
        settings.plan.small_workers / (workers or settings.plan.workers),
        settings.plan.time_ratio,
        settings.server.commits_per_epoch,
        model_bytes(settings, classes),
    )


def guess_classes(settings: Settings) -> int:
    """Classes of the data without a look at it; they hardly change the size of a model."""
    known = {"digits": 10, "cifar10": 10, "synthetic": settings.data.synthetic_classes}
    return known.get(settings.data.source, 100)


def model_bytes(settings: Settings, classes: int) -> int:
    """Bytes of a commit: the model's parameters and floating-point buffers."""
    return FlatModel(make_model(settings, classes, torch.device("cpu"))).flat.nbytes


def simulate_row(
    settings: Settings,
    workload: Workload,
    network: Network,
    topology: Topology,
    ranks: int,
    jitter: float,
) -> Row:
    """Simulate one number of training ranks, a multiple of the ranks of a worker.

    Raises
    ------
    InfeasiblePlan
        If there are too many for the samples.
    """
    train, inside = workload.members(network, topology, ranks)
    timing = time_commits(
        network,
        topology,
        workload.model_bytes,
        train,
        inside,
        settings.server.sync,
        settings.server.staleness,
        jitter,
        settings.run.seed,
    )
    epoch = timing.round_seconds * workload.commits_per_epoch
    return Row(ranks, topology.server_ranks(len(train)), epoch, timing)


def simulate_scaling(
    settings: Settings,
    workload: Workload,
    network: Network,
    topologies: Sequence[Topology],
    ranks: Sequence[int],
    jitter: float,
) -> list[Scaling]:
    """Simulate every topology with every number of training ranks that it can have.

    Raises
    ------
    UserError
        If there is no such number.
    """
    scalings = []
    refused: UserError | None = None
    for topology in topologies:
        rows = []
        for count in ranks:
            if count % topology.ranks_per_worker:
                continue
            try:
                rows.append(simulate_row(settings, workload, network, topology, count, jitter))
            except InfeasiblePlan as error:
                refused = error
        saturation = workload.saturation(network, topology, settings.server.sync)
        scalings.append(Scaling(topology, saturation, rows))
    if refused is not None and not any(scaling.rows for scaling in scalings):
        raise refused
    return scalings


def scaling_to_dict(
    settings: Settings, workload: Workload, network: Network, source: str, scalings: list[Scaling]
) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "sync": settings.server.sync,
        "samples": workload.samples,
        "model_bytes": workload.model_bytes,
        "network": asdict(network) | {"source": source},
        "topologies": [
            asdict(scaling.topology)
            | {
                "saturates_at": scaling.saturation,
                "rows": [
                    {
                        "workers": row.ranks,
                        "server_ranks": row.servers,
                        "epoch_seconds": row.epoch_seconds,
                    }
                    | asdict(row.timing)
                    for row in scaling.rows
                ],
            }
            for scaling in scalings
        ],
    }


@dataclass(frozen=True)
class Advice:
    """Which topology suits a run.

    Attributes
    ----------
    topology : Topology
        The simplest whose epoch is within five percent of the shortest.
    row : Row
        How it does.
    star : Row
        How a single server does.
    saturation : int or None
        Of a single server.
    """

    topology: Topology
    row: Row
    star: Row
    saturation: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self.topology) | {
            "epoch_seconds": self.row.epoch_seconds,
            "server_load": self.row.timing.server_load,
            "star_epoch_seconds": self.star.epoch_seconds,
            "star_server_load": self.star.timing.server_load,
            "star_saturates_at": self.saturation,
        }


def advise(settings: Settings, workload: Workload, network: Network, ranks: int) -> Advice:
    """The topology that suits so many training ranks, among those that hdb can run.

    Raises
    ------
    InfeasiblePlan
        If there are too many for the samples.
    """
    star = Topology("star")
    candidates = [star]
    candidates += [Topology("sharded", servers=count) for count in _SERVERS if count < ranks]
    candidates += [
        Topology("grouped", ranks_per_worker=count)
        for count in _RANKS_PER_WORKER
        if count < ranks and not ranks % count
    ]
    rows = [
        simulate_row(settings, workload, network, candidate, ranks, 0.0) for candidate in candidates
    ]
    enough = _GOOD_ENOUGH * min(row.epoch_seconds for row in rows)
    best = next(number for number, row in enumerate(rows) if row.epoch_seconds <= enough)
    saturation = workload.saturation(network, star, settings.server.sync)
    return Advice(candidates[best], rows[best], rows[0], saturation)
