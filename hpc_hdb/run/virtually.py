"""A run within one process, on the virtual clock."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from torch import Tensor

from hpc_hdb.cluster.roles import check_roles
from hpc_hdb.cluster.virtual import VirtualCluster
from hpc_hdb.config import Settings
from hpc_hdb.report.progress import Progress
from hpc_hdb.run.build import (
    choose_place,
    image_name,
    make_evaluator,
    make_trainer,
    note_loading,
)
from hpc_hdb.run.folder import RunFolder, results_in
from hpc_hdb.run.planning import (
    WorkerCounts,
    check_resumed_data,
    fit_sweeps,
    known_timing,
    large_batch_note,
    make_plan,
    sweeps,
    time_sweeps,
)
from hpc_hdb.run.serve import catch_signals, has_finished, serve
from hpc_hdb.train.data import open_data, prepare_data
from hpc_hdb.train.global_model import follow_root
from hpc_hdb.train.merge import MERGES
from hpc_hdb.train.server_optimizer import ServerOptimizer
from hpc_hdb.train.worker import run_worker


def train_virtually(
    settings: Settings, name: str, resume: Path | None, best: bool, progress: Progress
) -> int:
    """Train with ``plan.workers`` simulated workers; the exit status.

    Parameters
    ----------
    settings : Settings
        Ignored where a run is resumed: its own settings count.
    name : str
        Names the run folder, where the settings do not.
    resume : Path or None
        Run folder to go on with.
    best : bool
        Go back to its best checkpoint instead of the newest.

    Raises
    ------
    UserError
        For anything a user can mend.
    """
    if resume is None:
        if settings.server.sync != "allreduce":
            servers = settings.server.servers
            check_roles(settings.plan.workers + servers, settings.plan.small_workers, servers)
        folder = RunFolder.create(settings, name, progress.note)
    else:
        folder, settings = RunFolder.reopen(resume, best, progress.note)
    with folder:
        if resume is not None and has_finished(folder, progress):
            return 0
        return _run(settings, folder, progress)


def _run(settings: Settings, folder: RunFolder, progress: Progress) -> int:
    place = choose_place(settings)
    place.settle()
    prepare_data(settings.data)
    data = open_data(settings.data, "train")
    note_loading(data, settings, place.device, progress.note)
    evaluator = make_evaluator(settings, place.device, data.classes, note=progress.note)
    plan = folder.read_plan(settings)
    ranks = WorkerCounts.of(settings, None).ranks
    if plan is None:
        timing = known_timing(settings)
        if note := large_batch_note(settings):
            progress.note(note)
        if timing is None:
            sizes = sweeps(settings)
            progress.note("measuring batch times ...")
            trainer = make_trainer(settings, data, place.device, in_turn=ranks)
            seconds = [each / ranks for each in time_sweeps(trainer, sizes)]
            timing = fit_sweeps(sizes, seconds)
        plan = make_plan(settings, settings.plan.workers, len(data.labels), timing)
    else:
        check_resumed_data(plan, len(data.labels))
    servers = max(1, settings.server.server_ranks)
    asked = catch_signals()
    cluster = VirtualCluster(plan.shares.workers, servers=servers, signal_number=asked)
    trainers = [make_trainer(settings, data, place.device, in_turn=ranks) for _ in cluster.workers]
    synchronous = settings.server.synchronous
    keep = folder.checkpoints if settings.train.keep_momentum else None

    def drive(server: Coroutine[Any, Any, Tensor]) -> Tensor:
        workers = [
            run_worker(link, trainer, synchronous, keep, settings.run.states_kept)
            for link, trainer in zip(cluster.workers, trainers, strict=True)
        ]
        merge = MERGES[settings.server.merge]
        optimizer = ServerOptimizer.of(settings.server)
        followers = [follow_root(link, merge, optimizer) for link in cluster.followers]
        return cluster.run(server, workers, followers)

    if not folder.resumed:
        folder.begin(settings, plan)
    link, names = cluster.server, image_name(data, settings)
    with results_in(folder.path, folder.check):
        return serve(
            settings, folder, plan, evaluator, link, progress, drive, "virtual", names, asked
        )
