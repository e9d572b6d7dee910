"""Rounds of the real parameter server over MPI, whose workers sleep instead of training."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.link import WorkerLink, complete
from hpc_hdb.cluster.messages import OrderKind, Report, ReportKind
from hpc_hdb.cluster.mpi import wait_until
from hpc_hdb.cluster.mpi_server import MpiServerLink
from hpc_hdb.cluster.mpi_worker import MpiWorkerLink
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.config_files import parse_settings
from hpc_hdb.plan import BatchTime, plan_training
from hpc_hdb.report.events import EventLog
from hpc_hdb.train.evaluate import Evaluation
from hpc_hdb.train.server import ParameterServer

UNSTEADY = 4
"""Rounds at the start that do not count: buffers are touched for the first time."""


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
        complete(commit_rounds(link, torch.zeros(size), sync == "bsp", pause))
    if comm.rank <= workers:
        members.Free()
    rest(comm)
    # The last commits get no model back, and no others come after them.
    ends = commits[workers * UNSTEADY : -workers]
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
            NoEvaluator(),  # type: ignore[arg-type]
            emit,
            checkpoints=None,
            inline=True,
        )
        complete(server.run())
        log.close()
    link.close()
    return commits


class NoEvaluator:
    """Stands in for the evaluation that a run ends with."""

    def evaluate(self, model: Tensor) -> Evaluation:
        return Evaluation(accuracy=0.0, loss=0.0, seconds=0.0)

    def left_out(self) -> list[str]:
        return []


async def commit_rounds(
    link: WorkerLink, model: Tensor, bulk_synchronous: bool, pause: float
) -> list[float]:
    """The loop of `hpc_hdb.train.worker.run_worker`, asleep instead of training.

    Parameters
    ----------
    pause : float
        Seconds of sleep before each commit.

    Returns
    -------
    list of float
        Seconds of each commit, from which a model comes back but for the last.
    """
    commit = link.report if bulk_synchronous else link.exchange
    order = await link.report(Report(ReportKind.JOIN), model)
    seconds = []
    while order.kind == OrderKind.TRAIN:
        if pause:
            time.sleep(pause)
        start = time.perf_counter()
        order = await commit(Report(ReportKind.COMMIT, order.small, order.index), model)
        seconds.append(time.perf_counter() - start)
    await link.leave(Report(ReportKind.LEAVE))
    return seconds


def rest(comm: MPI.Intracomm) -> None:
    """Wait for all ranks without taking a core from those that are still measuring."""
    wait_until(comm.Ibarrier().Test)
