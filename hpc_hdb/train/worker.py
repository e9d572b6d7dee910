"""The worker's loop: pull the global model, train a round, push the result."""

from __future__ import annotations

import copy
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
        Where the optimizer's state is kept before a commit that a checkpoint may hold, so that a
        resumed run goes on with it; None keeps nothing, as where another rank of the worker does.
    states_kept : int
        As in `hpc_hdb.config.Run.states_kept`.
    """
    model = trainer.parameters
    states = None if checkpoints is None else _States(checkpoints, link.rank, states_kept)
    order = await link.report(Report(ReportKind.JOIN), model.wire)
    if order.worker_commits:
        state = None
        if checkpoints is not None:
            state = load_worker_state(checkpoints, link.rank, order.worker_commits, trainer.device)
        trainer.restore(state)
    while order.kind == OrderKind.TRAIN:
        if states is not None:
            states.forget_before(order.worker_commits)
        model.from_wire()
        report = trainer.train_round(order, link.interrupted, link.tell)
        if report is None:
            break
        report.real_seconds = report.train_seconds + report.data_seconds
        report.train_seconds = await link.elapse(order.predicted_seconds, report.real_seconds)
        model.to_wire()
        diverged = report.kind == ReportKind.DIVERGED
        if states is not None:
            start = time.perf_counter()
            if diverged:
                states.write()  # others may commit without this one
            else:
                states.keep(order.worker_commits + 1, trainer.state(), bool(order.keep_state))
            report.checkpoint_seconds = time.perf_counter() - start
        _add_link_seconds(report, link)
        answer = link.report if bulk_synchronous or diverged else link.exchange
        order = await answer(report, model.wire)
    if states is not None:
        states.write()
    last = Report(ReportKind.LEAVE)
    _add_link_seconds(last, link)
    await link.leave(last)


class _States:
    """A worker's states after its latest commits: in files, or in memory until it leaves.

    Parameters
    ----------
    folder, rank, kept : Path, int, int
        As in `save_worker_state`.
    """

    def __init__(self, folder: Path, rank: int, kept: int) -> None:
        self._folder, self._rank, self._kept = folder, rank, kept
        self._unwritten: dict[int, dict] = {}

    def keep(self, commits: int, state: dict, in_file: bool) -> None:
        """Keep the state after so many commits, the last of which is still to be merged."""
        if in_file:
            save_worker_state(self._folder, self._rank, commits, state, self._kept)
        else:
            self._unwritten[commits] = copy.deepcopy(state)

    def forget_before(self, commits: int) -> None:
        """So many commits are merged."""
        for earlier in [number for number in self._unwritten if number < commits]:
            del self._unwritten[earlier]

    def write(self) -> None:
        """Write those that are in memory only."""
        for commits, state in self._unwritten.items():
            save_worker_state(self._folder, self._rank, commits, state, self._kept)
        self._unwritten.clear()


def _add_link_seconds(report: Report, link: WorkerLink) -> None:
    report.wait_seconds, link.wait_seconds = link.wait_seconds, 0.0
    report.communicate_seconds, link.communicate_seconds = link.communicate_seconds, 0.0
