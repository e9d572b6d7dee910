"""The worker's loop: pull the global model, train a round, push the result."""

from __future__ import annotations

import time
from pathlib import Path

from hpc_hdb.cluster.link import WorkerLink
from hpc_hdb.cluster.messages import OrderKind, Report, ReportKind
from hpc_hdb.train.checkpoint import load_worker_state, save_worker_state
from hpc_hdb.train.trainer import Trainer


async def run_worker(
    link: WorkerLink,
    trainer: Trainer,
    bulk_synchronous: bool,
    checkpoints: Path | None,
    states_kept: int,
) -> None:
    """Train rounds until the server says stop.

    Parameters
    ----------
    link : WorkerLink
    trainer : Trainer
    bulk_synchronous : bool
        Commit in a reduction with all workers (BSP) instead of alone (ASP, SSP).
    checkpoints : Path or None
        Where the optimizer's state is kept before each commit, so that a resumed run goes on
        with it; None keeps nothing, as where another rank of the worker does.
    states_kept : int
        As in `hpc_hdb.config.Run.states_kept`.
    """
    model = trainer.parameters
    order = await link.report(Report(ReportKind.JOIN), model.wire)
    if order.worker_commits:
        state = None
        if checkpoints is not None:
            state = load_worker_state(checkpoints, link.rank, order.worker_commits, trainer.device)
        trainer.restore(state)
    while order.kind == OrderKind.TRAIN:
        model.from_wire()
        report = trainer.train_round(order, link.interrupted, link.tell)
        if report is None:
            break
        report.real_seconds = report.train_seconds + report.data_seconds
        report.train_seconds = await link.elapse(order.predicted_seconds, report.real_seconds)
        model.to_wire()
        diverged = report.kind == ReportKind.DIVERGED
        if checkpoints is not None and not diverged:
            start = time.perf_counter()
            number = order.worker_commits + 1
            save_worker_state(checkpoints, link.rank, number, trainer.state(), states_kept)
            report.checkpoint_seconds = time.perf_counter() - start
        _add_link_seconds(report, link)
        answer = link.report if bulk_synchronous or diverged else link.exchange
        order = await answer(report, model.wire)
    last = Report(ReportKind.LEAVE)
    _add_link_seconds(last, link)
    await link.leave(last)


def _add_link_seconds(report: Report, link: WorkerLink) -> None:
    report.wait_seconds, link.wait_seconds = link.wait_seconds, 0.0
    report.communicate_seconds, link.communicate_seconds = link.communicate_seconds, 0.0
