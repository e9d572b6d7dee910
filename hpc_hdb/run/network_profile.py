"""``hdb profile --network``: the constants of the network model, measured among real MPI ranks.

Messages and models go back and forth between two ranks; then the parameter server itself takes
commits from one worker, and from all at once, whose rounds are over as soon as they begin.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from hpc_hdb.cluster.mpi import library, wait_until, world
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan.network import Network, fit_network
from hpc_hdb.run.build import choose_place
from hpc_hdb.run.network import NETWORK_FILE, write_network
from hpc_hdb.run.profiling import writing
from hpc_hdb.run.scale import guess_classes, model_bytes
from hpc_hdb.run.timed_rounds import UNSTEADY, rest, time_rounds
from hpc_hdb.train.merge import merge_weighted

_TINY = 64
"""Floats of a model of which only the messages cost anything."""
_REPEATS = 2
_PING_PONGS = 9
_ROUNDS = 14
_TINY_ROUNDS = 60


def profile_network(settings: Settings, output: Path) -> tuple[Network | None, Path]:
    """Measure the network among all ranks; every rank of the job calls this.

    Parameters
    ----------
    settings : Settings
        Whose model's size is measured with.
    output : Path
        The timing.json beside which network.json is written.

    Returns
    -------
    tuple of Network and Path
        The constants (None on all ranks but the first), and where they are written.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    path = output.with_name(NETWORK_FILE)
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}")
    comm = world()
    nodes = _nodes(comm)
    size = model_floats(comm, settings)
    network = _measure(comm, nodes, size, settle_rank(comm, settings))
    if network is not None:
        about: dict[str, str | int] = {
            "ranks": comm.size,
            "nodes": len(set(nodes)),
            "model_bytes": 4 * size,
            "mpi": library(),
        }
        with writing(path):
            write_network(path, network, about)
    rest(comm)
    comm.Free()
    return network, path


def model_floats(comm: MPI.Intracomm, settings: Settings) -> int:
    """Floats of a configuration's model, which the first rank builds."""
    size = np.zeros(1, dtype=np.int64)
    if comm.rank == SERVER:
        size[0] = model_bytes(settings, guess_classes(settings)) // 4
    wait_until(comm.Ibcast(size, SERVER).Test)
    return int(size[0])


def settle_rank(comm: MPI.Intracomm, settings: Settings) -> int:
    """Prepare this rank as a run does that shares the node with these; its threads."""
    nodes = _nodes(comm)
    own = nodes[comm.rank]
    workers = nodes.count(own) - (own == nodes[SERVER])
    place = choose_place(settings, sharing=max(1, workers))
    place.settle()
    return place.threads


def _measure(comm: MPI.Intracomm, nodes: list[int], size: int, threads: int) -> Network | None:
    """All measurements, which take turns, so that a disturbance falls on all of them."""
    most = comm.size - 1
    peer = next((rank for rank, node in enumerate(nodes) if node != nodes[SERVER]), 1)
    pairs = [(SERVER, peer), _pair_on_a_node(nodes) or (SERVER, peer)]
    sizes = [1, size // 4, size // 2, size]
    transfers: list[list[list[float]]] = [[[] for _ in sizes] for _ in pairs]
    merge: list[float] = []
    tiny: list[float] = []
    counts = {min(1 << power, most) for power in range(most.bit_length() + 1)}
    commits: dict[int, list[float]] = {workers: [] for workers in sorted(counts)}
    reductions: dict[int, list[float]] = {workers: [] for workers in sorted(counts)}
    for _ in range(_REPEATS):
        for pair, times in zip(pairs, transfers, strict=True):
            for length, seconds in zip(sizes, times, strict=True):
                seconds += _ping_pong(comm, pair, length)
        if comm.rank == SERVER:
            merge += _time_merges(size, max(1, threads // 2))
        rest(comm)
        tiny += time_rounds(comm, most, _TINY, "asp", _TINY_ROUNDS, 0.0, threads)
        for workers in commits:
            for sync, rounds in (("asp", commits), ("bsp", reductions)):
                seconds = time_rounds(comm, workers, size, sync, _ROUNDS, 0.0, threads)
                rounds[workers] += seconds
    if comm.rank != SERVER:
        return None
    median = statistics.median
    link, node = (
        [(4 * length, median(seconds)) for length, seconds in zip(sizes, times, strict=True)]
        for times in transfers
    )
    return fit_network(
        4 * size,
        link,
        node,
        median(merge),
        median(tiny) / most,
        {workers: median(seconds) for workers, seconds in commits.items()},
        {workers: median(seconds) for workers, seconds in reductions.items()},
    )


def _ping_pong(comm: MPI.Intracomm, pair: tuple[int, int], size: int) -> list[float]:
    """Seconds of `size` floats one way, several times, on the first rank of all.

    Every rank calls this; those not of the pair wait.
    """
    first, second = pair
    buffer = torch.zeros(size)
    # Small messages are quick and vary more.
    times = np.zeros(_PING_PONGS if size > _TINY else 20 * _PING_PONGS)
    if comm.rank in pair:
        other = second if comm.rank == first else first
        for number in range(-UNSTEADY, len(times)):
            start = time.perf_counter()
            if comm.rank == first:
                comm.Send(buffer, other)
            wait_until(comm.Irecv(buffer, other).Test)
            if comm.rank == second:
                comm.Send(buffer, other)
            elif number >= 0:
                times[number] = (time.perf_counter() - start) / 2
    total = np.zeros_like(times)
    wait_until(comm.Ireduce(times, total, MPI.SUM, SERVER).Test)
    rest(comm)
    return total.tolist()


def _time_merges(size: int, threads: int) -> list[float]:
    """Seconds of merging a commit, several times."""
    torch.set_num_threads(threads)
    model, commit = torch.zeros(size), torch.zeros(size)
    times = []
    for _ in range(UNSTEADY + _PING_PONGS):
        start = time.perf_counter()
        merge_weighted(model, commit, 1.0, commit)
        times.append(time.perf_counter() - start)
    return times[UNSTEADY:]


def _nodes(comm: MPI.Intracomm) -> list[int]:
    """For each rank, the first rank of its node."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    leader = np.array([comm.rank], dtype=np.int64)
    node.Bcast(leader)
    node.Free()
    leaders = np.empty(comm.size, dtype=np.int64)
    comm.Allgather(leader, leaders)
    return leaders.tolist()


def _pair_on_a_node(nodes: list[int]) -> tuple[int, int] | None:
    """Two ranks that share a node; None where no two do."""
    for rank, node in enumerate(nodes):
        if node != rank:
            return node, rank
    return None
