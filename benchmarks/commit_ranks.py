"""Helper of commit.py and servers.py, run by mpirun: commits, and the same bytes over bare mpi4py.

The first ranks run the real servers' loops, the others a worker's loop without the training. The
last line printed holds, by name, the ``seconds`` of each commit at each worker; the ``bytes`` that
all ranks sent in that kind's blocks, where the MPI library counts them; the ``commits`` in those
blocks by all workers; and how long the blocks took (``elapsed``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from mpi4py import MPI
from sent_bytes import SentBytes
from torch import Tensor
from torchvision.models import resnet18

from hpc_hdb.cluster.link import complete
from hpc_hdb.cluster.mpi import world
from hpc_hdb.cluster.mpi_server import MpiFollowerLink, MpiServerLink
from hpc_hdb.cluster.mpi_worker import MpiWorkerLink
from hpc_hdb.cluster.slices import Slices
from hpc_hdb.config import Settings
from hpc_hdb.config_files import parse_settings
from hpc_hdb.plan import BatchTime, plan_training
from hpc_hdb.report.events import EventLog
from hpc_hdb.run.build import choose_place
from hpc_hdb.run.timed_rounds import NoEvaluator, commit_rounds
from hpc_hdb.train.global_model import follow_root
from hpc_hdb.train.merge import MERGES
from hpc_hdb.train.parameters import FlatModel
from hpc_hdb.train.server import ParameterServer

WARM_UP = 3
"""Commits at the start of a block that do not count: first touches of the server's buffers."""


def hdb_commits(
    comm: MPI.Intracomm, model: Tensor, settings: Settings, pause: float
) -> list[float]:
    """A whole run of servers and workers; seconds of each commit of this worker."""
    servers = settings.server.servers
    workers = comm.size - servers
    if comm.rank >= servers:
        worker_link = MpiWorkerLink(comm, servers)
        loop = commit_rounds(worker_link, model, settings.server.sync == "bsp", pause)
        return complete(loop)[WARM_UP:-1]
    if comm.rank:
        follower_link = MpiFollowerLink(comm, servers)
        complete(follow_root(follower_link, MERGES[settings.server.merge]))
        follower_link.close()
        return []
    stages = settings.schedule.stages()
    timing = {stages[0].resolution: BatchTime(1e-3, 1e-2)}
    plan = plan_training(stages, timing, 64 * workers, workers, small_workers=0, time_ratio=1.0)
    link = MpiServerLink(comm, servers)
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "events.jsonl", link.now)
        server = ParameterServer(
            link, plan, settings, model.clone(), NoEvaluator(), log.emit, checkpoints=None
        )
        complete(server.run())
        log.close()
    link.close()
    return []


def bare_exchanges(
    comm: MPI.Intracomm, model: Tensor, servers: int, count: int, pause: float
) -> list[float]:
    """Every worker sends each server its slice of the model and receives it back, `count` times."""
    slices = bare_slices(model, servers)
    if comm.rank < servers:
        own, status = slices[comm.rank], MPI.Status()
        for _ in range(count * (comm.size - servers)):
            comm.Recv(own, MPI.ANY_SOURCE, 0, status)
            comm.Send(own, status.Get_source(), 0)
        return []
    times = []
    back = bare_slices(torch.empty_like(model), servers)
    for _ in range(count):
        time.sleep(pause)
        start = time.perf_counter()
        # Expected before all is sent: a server that has received from another worker first waits.
        replies = [comm.Irecv(own, server, 0) for server, own in enumerate(back)]
        sends = [comm.Isend(own, server, 0) for server, own in enumerate(slices)]
        MPI.Request.Waitall(sends + replies)
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


def bare_reductions(
    comm: MPI.Intracomm, model: Tensor, servers: int, count: int, pause: float
) -> list[float]:
    """Every server's slice: a sum over all workers at that server and its broadcast."""
    slices = bare_slices(model, servers)
    groups = [
        comm.Split(0 if comm.rank in (server, *range(servers, comm.size)) else MPI.UNDEFINED)
        for server in range(servers)
    ]
    mine = [(group, own) for group, own in zip(groups, slices, strict=True) if group]
    times = []
    for _ in range(count):
        time.sleep(pause)
        start = time.perf_counter()
        for group, own in mine:
            if group.rank == 0:
                group.Reduce(MPI.IN_PLACE, own, MPI.SUM, 0)
            else:
                group.Reduce(own, None, MPI.SUM, 0)
        for group, own in mine:
            group.Bcast(own, 0)
        times.append(time.perf_counter() - start)
        model.zero_()  # sums of sums would overflow, and infinities add more slowly
    for group, _ in mine:
        group.Free()
    return times[WARM_UP:] if comm.rank >= servers else []


def bare_slices(model: Tensor, servers: int) -> list[Tensor]:
    """The model's slices, as hpc-hdb cuts them."""
    slices = Slices(model.numel(), servers)
    return [model[slice(*slices.bounds(server))] for server in range(servers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commits", type=int, required=True, help="per worker and block")
    parser.add_argument("--blocks", type=int, required=True, help="of each kind, taking turns")
    parser.add_argument("--servers", type=int, default=1, help="of the ranks; the first ones")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each commit")
    options = parser.parse_args()
    comm = world()
    servers, count, pause = options.servers, options.commits + WARM_UP, options.pause
    workers = comm.size - servers

    def settings(sync: str) -> Settings:
        values = {
            "server": {"sync": sync, "servers": servers},
            "schedule": {"epochs": count + 1, "large_batch": [64]},
            "run": {"evaluate_every": count + 2},
        }
        return parse_settings(values, "benchmark")

    # As many threads as a rank of a real run has.
    choose_place(settings("asp"), sharing=workers).settle()
    model = FlatModel(resnet18()).flat
    other = torch.zeros_like(model)
    kinds = {
        "bare": lambda: bare_exchanges(comm, other, servers, count, pause),
        "hdb": lambda: hdb_commits(comm, model, settings("asp"), pause),
        "bare_bsp": lambda: bare_reductions(comm, other, servers, count, pause),
        "hdb_bsp": lambda: hdb_commits(comm, model, settings("bsp"), pause),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    sent, elapsed = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)
    counter = SentBytes()
    for _ in range(options.blocks):
        for name, block in kinds.items():
            comm.Barrier()
            before, start = counter.read(), time.perf_counter()
            times[name] += block()
            sent[name] += counter.read() - before
            comm.Barrier()
            elapsed[name] += time.perf_counter() - start
    gathered = comm.gather((times, sent))
    if gathered is not None:
        made = options.blocks * (count + 1) * workers
        record = {
            "seconds": {name: [t for own, _ in gathered for t in own[name]] for name in kinds},
            "bytes": {name: sum(own[name] for _, own in gathered) for name in kinds},
            "elapsed": elapsed,
            "commits": {
                name: made if "hdb" in name else made - options.blocks * workers for name in kinds
            },
        }
        print(json.dumps(record))
    comm.Free()


if __name__ == "__main__":
    main()
