"""``hdb profile --network``: the constants of the network model, measured among real MPI ranks.

Messages and models go back and forth between two ranks; then the parameter server itself takes
commits from one worker, and from all at once, whose rounds are over as soon as they begin.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.messages import OrderKind, Report, ReportKind
from hpc_hdb.cluster.mpi import MpiServerLink, MpiWorkerLink, wait_until, world
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.config import Settings, parse_settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, plan_training
from hpc_hdb.plan.network import Network, fit_network
from hpc_hdb.report.events import EventLog
from hpc_hdb.run.build import choose_place
from hpc_hdb.run.network import NETWORK_FILE, write_network
from hpc_hdb.run.scale import guess_classes, model_bytes
from hpc_hdb.train.evaluate import Evaluation
from hpc_hdb.train.merge import merge_weighted
from hpc_hdb.train.server import ParameterServer

_TINY = 64
"""Floats of a model of which only the messages cost anything."""
_REPEATS = 2
_PING_PONGS = 9
_ROUNDS = 14
_TINY_ROUNDS = 60
_UNSTEADY = 4
"""Rounds at the start that do not count: buffers are touched for the first time."""


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
        If there is no folder to write into.
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
            "mpi": MPI.Get_library_version().split(",")[0].strip("\x00\n "),
        }
        write_network(path, network, about)
    _rest(comm)
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


def time_rounds(
    comm: MPI.Intracomm, workers: int, size: int, sync: str, rounds: int, pause: float, threads: int
) -> list[float]:
    """Seconds from one round to the next, of a real server and workers that only sleep.

    Every rank of `comm` calls this; those that do not take part wait.

    Parameters
    ----------
    workers : int
        The ranks after the first that take part.
    size : int
        Floats of the model.
    sync : str
        "asp", "ssp" or "bsp".
    rounds : int
        Of each worker.
    pause : float
        Seconds that a worker sleeps instead of training.
    threads : int
        Of a rank.

    Returns
    -------
    list of float
        Of each steady round; empty on all ranks but the first.
    """
    torch.set_num_threads(threads)  # a server that runs takes half of them
    members = MPI.Intracomm(comm.Split(0 if comm.rank <= workers else MPI.UNDEFINED))
    commits: list[float] = []
    if comm.rank == SERVER:
        commits = _serve(members, size, sync, rounds)
    elif comm.rank <= workers:
        link = MpiWorkerLink(members)
        _drive(_commit_rounds(link, torch.zeros(size), sync == "bsp", pause))
    if comm.rank <= workers:
        members.Free()
    _rest(comm)
    # The last commits get no model back, and no others come after them.
    ends = commits[workers * _UNSTEADY : -workers]
    return [later - ends[number] for number, later in enumerate(ends[workers:])]


def _serve(comm: MPI.Intracomm, size: int, sync: str, rounds: int) -> list[float]:
    """Run the server; the times of the commits."""
    settings = parse_settings(
        {
            "server": {"sync": sync},
            "schedule": {"epochs": rounds, "large_batch": [1]},
            "run": {"evaluate_every": rounds + 1},
        },
        "network profile",
    )
    stages = settings.schedule.stages()
    workers = comm.size - 1
    timing = {stages[0].resolution: BatchTime(1.0, 1.0)}
    plan = plan_training(stages, timing, workers, workers, small_workers=0, time_ratio=1.0)
    link = MpiServerLink(comm)
    commits: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "events.jsonl", link.now)

        def emit(name: str, values: dict[str, Any]) -> None:
            log.emit(name, values)
            if name == "commit":
                commits.append(link.now())

        server = ParameterServer(
            link,
            plan,
            settings,
            torch.zeros(size),
            _NoEvaluator(),  # type: ignore[arg-type]
            emit,
            checkpoints=None,
            inline=True,
        )
        _drive(server.run())
        log.close()
    return commits


class _NoEvaluator:
    """Stands in for the evaluation that a run ends with."""

    def evaluate(self, model: Tensor) -> Evaluation:
        return Evaluation(accuracy=0.0, loss=0.0, seconds=0.0)

    def left_out(self) -> list[str]:
        return []


async def _commit_rounds(
    link: MpiWorkerLink, model: Tensor, bulk_synchronous: bool, pause: float
) -> None:
    """The loop of `hpc_hdb.train.worker.run_worker`, asleep instead of training."""
    commit = link.reduce if bulk_synchronous else link.exchange
    order = await link.join(model)
    while order.kind == OrderKind.TRAIN:
        if pause:
            time.sleep(pause)
        order = await commit(Report(ReportKind.COMMIT, order.small, order.index), model)
    await link.leave(Report(ReportKind.LEAVE))


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
        _rest(comm)
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
        for number in range(-_UNSTEADY, len(times)):
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
    _rest(comm)
    return total.tolist()


def _time_merges(size: int, threads: int) -> list[float]:
    """Seconds of merging a commit, several times."""
    torch.set_num_threads(threads)
    model, commit = torch.zeros(size), torch.zeros(size)
    times = []
    for _ in range(_UNSTEADY + _PING_PONGS):
        start = time.perf_counter()
        merge_weighted(model, commit, 1.0, commit)
        times.append(time.perf_counter() - start)
    return times[_UNSTEADY:]


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


def _rest(comm: MPI.Intracomm) -> None:
    """Wait for all ranks without taking a core from those that are still measuring."""
    wait_until(comm.Ibarrier().Test)


def _drive(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that never suspends: over MPI, awaited calls block."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("an MPI link has suspended")
