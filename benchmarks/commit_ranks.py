"""Helper of commit.py, run by mpirun: hpc-hdb's commits and the same bytes over bare mpi4py.

Rank 0 runs the real `ParameterServer`, the others a worker's loop without the training. The
last line printed holds, by name, the seconds of each commit at each worker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import torch
from mpi4py import MPI
from torch import Tensor
from torchvision.models import resnet18

from hpc_hdb.cluster.link import WorkerLink
from hpc_hdb.cluster.messages import OrderKind, Report, ReportKind
from hpc_hdb.cluster.mpi import MpiServerLink, MpiWorkerLink, world
from hpc_hdb.config import Settings, parse_settings
from hpc_hdb.plan import BatchTime, plan_training
from hpc_hdb.report.events import EventLog
from hpc_hdb.run.build import choose_place
from hpc_hdb.train.evaluate import Evaluation
from hpc_hdb.train.parameters import FlatModel
from hpc_hdb.train.server import ParameterServer

WARM_UP = 3
"""Commits at the start of a block that do not count: first touches of the server's buffers."""


class NoEvaluator:
    """Stands in for the evaluation that a run ends with."""

    def evaluate(self, model: Tensor) -> Evaluation:
        return Evaluation(accuracy=0.0, loss=0.0, seconds=0.0)

    def left_out(self) -> list[str]:
        return []


def hdb_commits(
    comm: MPI.Intracomm, model: Tensor, settings: Settings, pause: float
) -> list[float]:
    """A whole run of parameter server and workers; seconds of each commit of this worker."""
    workers = comm.size - 1
    if comm.rank:
        # Over MPI the coroutines never suspend, so any event loop will do.
        loop = commit_loop(MpiWorkerLink(comm), model, settings.server.sync == "bsp", pause)
        return asyncio.run(loop)[WARM_UP:]
    stages = settings.schedule.stages()
    timing = {stages[0].resolution: BatchTime(1e-3, 1e-2)}
    plan = plan_training(stages, timing, 64 * workers, workers, small_workers=0, time_ratio=1.0)
    link = MpiServerLink(comm)
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "events.jsonl", link.now)
        server = ParameterServer(
            link, plan, settings, model.clone(), NoEvaluator(), log.emit, checkpoints=None
        )
        asyncio.run(server.run())
        log.close()
    return []


async def commit_loop(
    link: WorkerLink, model: Tensor, bulk_synchronous: bool, pause: float
) -> list[float]:
    """The loop of `hpc_hdb.train.worker.run_worker`, without the training."""
    commit = link.reduce if bulk_synchronous else link.exchange
    order = await link.join(model)
    times = []
    while order.kind == OrderKind.TRAIN:
        time.sleep(pause)
        start = time.perf_counter()
        order = await commit(Report(ReportKind.COMMIT, order.small, order.index), model)
        times.append(time.perf_counter() - start)
    await link.leave(Report(ReportKind.LEAVE))
    return times[:-1]  # no model comes back from the last commit


def bare_exchanges(comm: MPI.Intracomm, model: Tensor, count: int, pause: float) -> list[float]:
    """Every worker sends the model and receives it back, `count` times."""
    if comm.rank == 0:
        status = MPI.Status()
        for _ in range(count * (comm.size - 1)):
            comm.Recv(model, MPI.ANY_SOURCE, 0, status)
            comm.Send(model, status.Get_source(), 0)
        return []
    times = []
    for _ in range(count):
        time.sleep(pause)
        start = time.perf_counter()
        comm.Send(model, 0, 0)
        comm.Recv(model, 0, 0)
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


def bare_reductions(comm: MPI.Intracomm, model: Tensor, count: int, pause: float) -> list[float]:
    """A sum over all ranks at rank 0 and its broadcast, `count` times."""
    times = []
    for _ in range(count):
        time.sleep(pause)
        start = time.perf_counter()
        if comm.rank == 0:
            comm.Reduce(MPI.IN_PLACE, model, MPI.SUM, 0)
        else:
            comm.Reduce(model, None, MPI.SUM, 0)
        comm.Bcast(model, 0)
        times.append(time.perf_counter() - start)
        model.zero_()  # sums of sums would overflow, and infinities add more slowly
    return times[WARM_UP:] if comm.rank else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commits", type=int, required=True, help="per worker and block")
    parser.add_argument("--blocks", type=int, required=True, help="of each kind, taking turns")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each commit")
    options = parser.parse_args()
    comm = world()
    count, pause = options.commits + WARM_UP, options.pause

    def settings(sync: str) -> Settings:
        values = {
            "server": {"sync": sync},
            "schedule": {"epochs": count + 1, "large_batch": [64]},
            "run": {"evaluate_every": count + 2},
        }
        return parse_settings(values, "benchmark")

    # As many threads as a rank of a real run has.
    choose_place(settings("asp"), sharing=comm.size - 1).settle()
    model = FlatModel(resnet18()).flat
    other = torch.zeros_like(model)
    kinds = {
        "bare": lambda: bare_exchanges(comm, other, count, pause),
        "hdb": lambda: hdb_commits(comm, model, settings("asp"), pause),
        "bare_bsp": lambda: bare_reductions(comm, other, count, pause),
        "hdb_bsp": lambda: hdb_commits(comm, model, settings("bsp"), pause),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.blocks):
        for name, block in kinds.items():
            comm.Barrier()
            times[name] += block()
    gathered = comm.gather(times)
    if gathered is not None:
        print(json.dumps({name: [t for rank in gathered for t in rank[name]] for name in kinds}))
    comm.Free()


if __name__ == "__main__":
    main()
