"""A run over MPI: rank 0 serves, with further servers where there are any; the others work.

With all-reduce there is no server: all work together.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from hpc_hdb.cluster.failures import completed, failed_ranks, raise_unless_failure
from hpc_hdb.cluster.group_links import LeaderLink, MemberLink
from hpc_hdb.cluster.groups import RankGroup, split_workers
from hpc_hdb.cluster.link import WorkerLink, complete
from hpc_hdb.cluster.mpi import wait_until, world
from hpc_hdb.cluster.mpi_server import MpiFollowerLink, MpiServerLink
from hpc_hdb.cluster.mpi_worker import MpiWorkerLink
from hpc_hdb.cluster.roles import SERVER, check_roles
from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import TrainingPlan
from hpc_hdb.report.progress import Progress
from hpc_hdb.run.all_reduce import follow, lead
from hpc_hdb.run.build import (
    Place,
    check_gpus,
    choose_place,
    gpu_number,
    image_name,
    make_evaluator,
    make_trainer,
    note_loading,
)
from hpc_hdb.run.folder import RunFolder, results_in
from hpc_hdb.run.planning import (
    check_resumed_data,
    count_planned,
    fit_sweeps,
    known_timing,
    large_batch_note,
    make_plan,
    sweeps,
    time_sweeps,
)
from hpc_hdb.run.replacement import hindrance, recruiter
from hpc_hdb.run.serve import STOP_SIGNALS, catch_signals, has_finished, serve
from hpc_hdb.train.data import open_data, prepare_data
from hpc_hdb.train.global_model import follow_root
from hpc_hdb.train.merge import MERGES
from hpc_hdb.train.profile import keep_stepping
from hpc_hdb.train.server_optimizer import ServerOptimizer
from hpc_hdb.train.trainer import Trainer
from hpc_hdb.train.worker import run_worker

_STATUS = 20
"""Tag of the message that ends a run."""


def train_over_mpi(
    settings: Settings,
    name: str,
    resume: Path | None,
    best: bool,
    progress: Progress,
    data_copy: Path | None = None,
) -> int:
    """This rank's part of a run; parameters, result and errors as `train_virtually`.

    Parameters
    ----------
    data_copy : Path, optional
        Where the ranks find a copy of ``data.path``, as on each node's own disk.
    """
    comm = world()
    try:
        if comm.rank == SERVER:
            return _tell_status(
                comm, _server(comm, settings, name, resume, best, progress, data_copy)
            )
        return _follower_or_worker(comm)
    except MPI.Exception as error:
        raise_unless_failure(error)
        raise UserError(_lost_rank(comm)) from None


def _server(
    comm: MPI.Intracomm,
    settings: Settings,
    name: str,
    resume: Path | None,
    best: bool,
    progress: Progress,
    data_copy: Path | None,
) -> int:
    if resume is None:
        server = settings.server
        if server.sync != "allreduce":
            check_roles(
                comm.size, settings.plan.small_workers, server.servers, server.ranks_per_worker
            )
        folder = RunFolder.create(settings, name, progress.note)
    else:
        folder, settings = RunFolder.reopen(resume, best, progress.note)
    with folder:
        if resume is not None and has_finished(folder, progress):
            _broadcast_json(comm, {})
            return 0
        return _run(comm, settings, folder, progress, data_copy)


def _run(
    comm: MPI.Intracomm,
    settings: Settings,
    folder: RunFolder,
    progress: Progress,
    data_copy: Path | None,
) -> int:
    plan = folder.read_plan(settings)
    if plan is not None:
        check_resumed_ranks(plan, settings, comm.size, folder)
    _check_threads(settings)
    workers = count_planned(settings, comm.size)
    own = settings
    if data_copy is not None:
        data_there = settings.data.model_copy(update={"path": data_copy})
        settings = settings.model_copy(update={"data": data_there})
    prepare_data(settings.data)
    timing = None if plan else known_timing(settings, workers)
    if plan is None and (note := large_batch_note(settings)):
        progress.note(note)
    sizes = {} if plan or timing else sweeps(settings, workers)
    job = {
        "settings": settings.model_dump(mode="json"),
        "folder": str(folder.path),
        "sweeps": {str(side): batches for side, batches in sizes.items()},
    }
    _broadcast_json(comm, job)
    place = _place(comm, settings)
    place.settle()
    data = open_data(settings.data, "train")
    note_loading(data, settings, place.device, progress.note)
    if settings.server.sync == "allreduce":
        return lead(comm, settings, folder, progress, place, data, plan, timing, sizes)
    servers = settings.server.servers
    split = split_workers(comm, servers, settings.server.ranks_per_worker)
    if split.spread:
        spread = ", ".join(map(str, split.spread))
        progress.note(f"workers whose ranks are on more than one node: {spread}")
    evaluator = make_evaluator(settings, place.device, data.classes, note=progress.note)
    if sizes:
        progress.note("measuring batch times ...")
        timing = fit_sweeps(sizes, list(_sum_of_sweeps(comm, sizes) / (comm.size - servers)))
    if plan is None:
        plan = make_plan(settings, workers, len(data.labels), timing or {})
        folder.begin(own, plan)
    else:
        check_resumed_data(plan, len(data.labels))
    if reason := hindrance(settings):
        progress.note(f"server.replacements: lost workers will not be replaced; {reason}")
    recruit = None if reason else recruiter(job)
    link = MpiServerLink(split.links, servers, recruit, split.partners)
    asked = catch_signals()
    with results_in(folder.path, folder.check):
        name = image_name(data, settings)
        try:
            status = serve(
                settings, folder, plan, evaluator, link, progress, complete, "mpi", name, asked
            )
        except MPI.Exception as error:
            raise_unless_failure(error)
            raise UserError(_lost_rank(comm, servers, folder.path)) from None
    if link.present:  # interrupted, and some worker has not come out of its step for long
        raise SystemExit(status)
    link.close()
    return status


def _follower_or_worker(comm: MPI.Intracomm) -> int:
    for number in STOP_SIGNALS:
        # A launcher signals every rank; rank 0 decides what becomes of the run.
        signal.signal(number, signal.SIG_IGN)
    job = _broadcast_json(comm, None)
    if not job:
        return _hear_status(comm)
    settings = Settings.model_validate(job["settings"])
    follows = comm.rank < settings.server.server_ranks
    place = _place(comm, _on_cpu(settings) if follows else settings)
    sizes = {int(side): batches for side, batches in job["sweeps"].items()}
    try:
        if follows:
            _follower(comm, settings, place, sizes)
        else:
            _worker(comm, settings, place, sizes, Path(job["folder"]))
        return _hear_status(comm)
    except MPI.Exception as error:
        raise_unless_failure(error)
        raise UserError(_lost_rank(comm, settings.server.servers, job["folder"])) from None


def _on_cpu(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"train": settings.train.model_copy(update={"device": "cpu"})}
    )


def _follower(
    comm: MPI.Intracomm, settings: Settings, place: Place, sizes: dict[int, list[int]]
) -> None:
    """A server that is not the root: it keeps a slice of the model, and needs no data or GPU."""
    torch.set_num_threads(max(1, place.threads // 2))  # as the root
    servers = settings.server.servers
    split = split_workers(comm, servers, settings.server.ranks_per_worker)
    if sizes:
        _sum_of_sweeps(comm, sizes)
    link = MpiFollowerLink(split.links, servers, settings.server.patience)
    optimizer = ServerOptimizer.of(settings.server)
    complete(follow_root(link, MERGES[settings.server.merge], optimizer))
    link.close()


def _worker(
    comm: MPI.Intracomm,
    settings: Settings,
    place: Place,
    sizes: dict[int, list[int]],
    folder: Path,
) -> None:
    place.settle()
    data = open_data(settings.data, "train")
    if settings.server.sync == "allreduce":
        return follow(comm, settings, place, data, sizes)
    servers, shared = settings.server.servers, settings.server.ranks_per_worker
    split = split_workers(comm, servers, shared)
    group = None
    if split.group is not None:
        group = RankGroup(split.group, place.device, f"server.ranks_per_worker = {shared}")
    if sizes:
        _sum_of_sweeps(comm, sizes, make_trainer(settings, data, place.device, group))
    link: WorkerLink
    if group is None:
        link = MpiWorkerLink(split.links, servers, settings.server.patience)
    elif split.leads:
        link = LeaderLink(MpiWorkerLink(split.links, servers), group)
    else:
        link = MemberLink(group)
    trainer = make_trainer(settings, data, place.device, group)
    keep = folder / "checkpoint" if settings.train.keep_momentum and split.leads else None
    kept = settings.run.states_kept
    with results_in(folder), nullcontext() if group is None else group.as_one():
        complete(run_worker(link, trainer, settings.server.synchronous, keep, kept))
    if group is not None:
        group.close()


def _check_threads(settings: Settings) -> None:
    """Raise UserError where ranks that hang are to be ended, and MPI takes calls of one thread.

    A worker in a collective call that one of them holds up is got out of it by another thread.
    """
    drops = settings.server.sync == "bsp" and settings.server.silent_worker == "drop"
    if drops and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise UserError(
            'server.silent_worker = "drop" in BSP needs an MPI library with full thread support '
            "(MPI_THREAD_MULTIPLE), which this one lacks or was started without: leave "
            'MPI4PY_RC_THREAD_LEVEL unset, load an MPI built with threads, or set it to "report"'
        )


def check_resumed_ranks(
    plan: TrainingPlan, settings: Settings, ranks: int, folder: RunFolder
) -> None:
    """Raise UserError where a run of all-reduce is resumed with another number of ranks."""
    before = plan.shares.workers * plan.ranks
    if settings.server.sync == "allreduce" and ranks != before:
        raise UserError(
            f"{folder.path} was started with {before} ranks: "
            f"resume it with mpirun -n {before}, not {ranks}"
        )


def _place(comm: MPI.Intracomm, settings: Settings) -> Place:
    """Device and threads of this rank among those of its node."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    works = comm.rank >= settings.server.server_ranks
    workers = np.array([works], dtype=np.int64)
    cores = np.array([hash(frozenset(os.sched_getaffinity(0)))], dtype=np.int64)
    all_workers = np.empty(node.size, dtype=np.int64)
    all_cores = np.empty(node.size, dtype=np.int64)
    node.Allgather(workers, all_workers)
    node.Allgather(cores, all_cores)
    local_rank = int(all_workers[: node.rank].sum()) if works else -1
    if not all_workers.any() and not torch.cuda.device_count():
        settings = _on_cpu(settings)  # a node of servers needs none
    place = choose_place(settings, local_rank, int(all_workers[all_cores == cores[0]].sum()))
    if settings.server.shared:
        gpu = np.array([gpu_number(place.device) if works else 0], dtype=np.int64)
        gpus = np.empty(node.size, dtype=np.int64)
        node.Allgather(gpu, gpus)
        check_gpus(settings, gpus[gpus > 0].tolist())
    node.Free()
    return place


def _sum_of_sweeps(
    comm: MPI.Intracomm, sizes: dict[int, list[int]], trainer: Trainer | None = None
) -> np.ndarray:
    """At rank 0 the seconds of each step, added up over the ranks that have a trainer.

    All begin with a resolution together, and go on with steps until all have measured it: a worker
    alone would find cores free that it shares in the run. Nor does waiting take a core from those
    that measure.
    """
    own: list[float] = []
    wait_until(comm.Ibarrier().Test)
    for side, batches in sizes.items():
        own += time_sweeps(trainer, {side: batches}) if trainer else [0.0] * len(batches)
        measured = comm.Ibarrier().Test
        if trainer:
            here = functools.partial(wait_until, measured, timeout=0)
            keep_stepping(trainer, side, batches[0], here)
        else:
            wait_until(measured)
    total = np.zeros(len(own))
    wait_until(comm.Ireduce(np.array(own), total, MPI.SUM, SERVER).Test)
    return total


def _broadcast_json(comm: MPI.Intracomm, value: dict[str, Any] | None) -> dict[str, Any]:
    """Plain values from rank 0 to all, as bytes."""
    data = bytearray(json.dumps(value).encode())
    size = np.array([len(data)], dtype=np.int64)
    wait_until(comm.Ibcast(size, SERVER).Test)
    if comm.rank != SERVER:
        data = bytearray(int(size[0]))
    comm.Bcast([data, MPI.BYTE], SERVER)
    return json.loads(data)


def _tell_status(comm: MPI.Intracomm, status: int) -> int:
    """Send the exit status of rank 0 to all ranks that are left."""
    lost = failed_ranks(comm)
    box = np.array([status, len(lost)], dtype=np.int64)
    ranks = set(range(comm.size)) - {SERVER} - lost
    for request in [comm.Isend(box, rank, _STATUS) for rank in ranks]:
        wait_until(functools.partial(completed, request))
    return _end(status, len(lost))


def _hear_status(comm: MPI.Intracomm) -> int:
    """The exit status of rank 0."""
    box = np.empty(2, dtype=np.int64)
    wait_until(comm.Irecv(box, SERVER, _STATUS).Test)
    return _end(*box.tolist())


def _end(status: int, lost: int) -> int:
    """The exit status; where ranks were lost, with the end of this process."""
    if lost:  # MPI's own end may wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _lost_rank(comm: MPI.Intracomm, servers: int = 1, folder: Path | str = "") -> str:
    """Which ranks were lost, in words, and how to go on."""
    lost = sorted(failed_ranks(comm))
    ranks = ", ".join(map(str, lost))
    told = f"rank {ranks} was lost" if ranks else "another rank was lost"
    if lost and lost[0] < servers:
        told = f"rank {lost[0]}, {'the' if servers == 1 else 'a'} parameter server, was lost"
    return f"{told}: go on with hdb train --resume {folder}" if folder else told
