"""Conventional data-parallel training: every rank trains its rows of each batch, rank 0 too.

The ranks are one worker, and rank 0 serves it between the steps, so plan, schedule, events,
checkpoints and report are those of any other run. A bulk-synchronous round of a single worker
leaves its model as it is. Evaluations are shared by all ranks as well.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.group_links import LeaderLink, MemberLink
from hpc_hdb.cluster.groups import RankGroup
from hpc_hdb.cluster.link import complete
from hpc_hdb.cluster.local import LocalCluster
from hpc_hdb.config import Settings
from hpc_hdb.plan import BatchTime, TrainingPlan
from hpc_hdb.report.progress import Progress
from hpc_hdb.run.build import Place, image_name, make_evaluator, make_trainer
from hpc_hdb.run.folder import RunFolder, results_in
from hpc_hdb.run.planning import check_resumed_data, fit_sweeps, make_plan, time_sweeps
from hpc_hdb.run.serve import catch_signals, serve
from hpc_hdb.train.data import ImageSet
from hpc_hdb.train.worker import run_worker

_SETTING = 'server.sync = "allreduce"'


def lead(
    comm: MPI.Intracomm,
    settings: Settings,
    folder: RunFolder,
    progress: Progress,
    place: Place,
    data: ImageSet,
    plan: TrainingPlan | None,
    timing: dict[int, BatchTime] | None,
    sizes: dict[int, list[int]],
) -> int:
    """Rank 0's part of a run; its exit status.

    Parameters
    ----------
    plan : TrainingPlan or None
        Of a resumed run.
    timing : dict or None
        The time model, where it is known.
    sizes : dict of int to list of int
        Batch sizes to time by resolution; none where the time model is known.
    """
    group = RankGroup(comm, place.device, _SETTING)
    evaluator = make_evaluator(settings, place.device, data.classes, group, note=progress.note)
    if sizes:
        progress.note("measuring batch times ...")
        measured = time_sweeps(make_trainer(settings, data, place.device, group), sizes)
        timing = fit_sweeps(sizes, measured)
    if plan is None:
        plan = make_plan(settings, comm.size, len(data.labels), timing or {})
        folder.begin(settings, plan)
    else:
        check_resumed_data(plan, len(data.labels))
    trainer = make_trainer(settings, data, place.device, group)
    cluster = LocalCluster()
    keep = folder.checkpoints if settings.train.keep_momentum else None
    worker = run_worker(
        LeaderLink(cluster.worker, group), trainer, True, keep, settings.run.states_kept
    )

    def drive(server: Coroutine[Any, Any, Tensor]) -> Tensor:
        return cluster.run(server, worker)

    link, names, asked = cluster.server, image_name(data, settings), catch_signals()
    with results_in(folder.path, folder.check):
        status = serve(
            settings, folder, plan, evaluator, link, progress, drive, "mpi", names, asked
        )
    group.close()
    return status


def follow(
    comm: MPI.Intracomm,
    settings: Settings,
    place: Place,
    data: ImageSet,
    sizes: dict[int, list[int]],
) -> None:
    """Another rank's part; parameters as in `lead`."""
    group = RankGroup(comm, place.device, _SETTING)
    evaluator = make_evaluator(settings, place.device, data.classes, group)
    if sizes:
        time_sweeps(make_trainer(settings, data, place.device, group), sizes)
    link = MemberLink(group, lambda: evaluator.evaluate(evaluator.parameters.wire))
    trainer = make_trainer(settings, data, place.device, group)
    complete(run_worker(link, trainer, True, None, settings.run.states_kept))
    group.close()
