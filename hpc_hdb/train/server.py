"""The root server's loop: hand out rounds, merge commits, keep account.

Source: Lu et al., arXiv 2509.26092, for ASP and BSP with the model update factor; SSP after
Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_hdb.cluster.link import ServerLink, WorkerLost
from hpc_hdb.cluster.messages import Order, Report, ReportKind
from hpc_hdb.cluster.roles import group_of
from hpc_hdb.config import Settings
from hpc_hdb.plan import TrainingPlan
from hpc_hdb.train.checkpoint import Checkpoint
from hpc_hdb.train.crew import Crew
from hpc_hdb.train.evaluate import Evaluator
from hpc_hdb.train.global_model import GlobalModel
from hpc_hdb.train.membership import Membership
from hpc_hdb.train.merge import MERGES, reduction_weights
from hpc_hdb.train.reductions import Reductions
from hpc_hdb.train.server_optimizer import ServerOptimizer
from hpc_hdb.train.snapshots import Emit, Snapshots
from hpc_hdb.train.work import Work

_POLL_SECONDS = 0.2
_LEAVE_SECONDS = 10.0
"""For the workers to come out of a step, once a run is interrupted."""


class Interrupted(Exception):
    """A signal ended the run early; a checkpoint has been written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class ParameterServer:
    """Rank 0: decides for all servers, and keeps the first slice of the model.

    Parameters
    ----------
    link : ServerLink
    plan : TrainingPlan
    settings : Settings
    model : Tensor, shape (size,), float32
        The initial model, on the CPU.
    evaluator : Evaluator
    emit : callable
        Takes an event's name and its values, for the event log.
    checkpoints : Path or None
        Folder of the checkpoints; None writes none.
    signal_number : callable
        The signal that asks to stop, 0 while there is none.
    image_name : callable
        Where a sample's training image is, to name bad ones.
    inline : bool
        Evaluate and write checkpoints within the loop instead of beside it.

    Attributes
    ----------
    work : Work
    members : Membership
    """

    def __init__(
        self,
        link: ServerLink,
        plan: TrainingPlan,
        settings: Settings,
        model: Tensor,
        evaluator: Evaluator,
        emit: Emit,
        checkpoints: Path | None,
        signal_number: Callable[[], int] = lambda: 0,
        image_name: Callable[[int], str] = str,
        inline: bool = False,
    ) -> None:
        self._link = link
        link.patience = settings.server.patience
        self._settings = settings
        self._emit = emit
        self._signal_number = signal_number
        self.work = Work(plan, settings)
        self._book = self.work.book
        self._model = GlobalModel(
            link,
            model,
            MERGES[settings.server.merge],
            ServerOptimizer.of(settings.server),
            lambda: self.work.pace(evaluator.parameters.trained),
        )
        workers, small_workers = link.workers, min(plan.shares.small_workers, link.workers)
        self._crew = Crew([group_of(w, workers, small_workers) for w in range(1, workers + 1)])
        self.members = Membership(link, self._crew, self.work, settings.server, emit, checkpoints)
        self._reductions = Reductions(link, self._model, self._crew, self._next_report)
        self._left_out: set[str] = set()
        self._image_name = image_name
        self._listened = 0.0
        self._wait_seconds = 0.0
        self._snapshots = Snapshots(
            self._model,
            self._book,
            self._crew.commits,
            link,
            settings,
            evaluator,
            emit,
            self._note_left_out,
            checkpoints,
            inline,
        )
        self._inline = inline
        # Workers then write a state only where a checkpoint may need it.
        self._spares_states = (
            settings.server.synchronous
            and settings.train.keep_momentum
            and not settings.server.replacements
        )

    def resume(
        self, checkpoint: Checkpoint, evaluated: int, best_accuracy: float = -math.inf
    ) -> None:
        """Go on from a checkpoint, before `Membership.fit_plan`; with any number of workers.

        Parameters
        ----------
        checkpoint : Checkpoint
        evaluated : int
            Commit count of the last model evaluated before it; 0 if there was none.
        best_accuracy : float
            Of the best checkpoint so far.
        """
        self._model.restore(checkpoint.model, checkpoint.server)
        self.work.restore(checkpoint.rounds)
        self.members.resume(checkpoint.worker_commits)
        self._snapshots.resume(checkpoint, evaluated, best_accuracy)

    @property
    def saved(self) -> Mapping[int, int]:
        """Commits of each worker in the newest checkpoint."""
        return self._snapshots.saved

    def own_seconds(self) -> dict[str, float]:
        """Seconds that this server has waited and communicated since this was last asked."""
        seconds = {
            "server_wait_seconds": round(self._wait_seconds, 6),
            "server_communicate_seconds": round(self._model.communicate_seconds, 6),
        }
        self._wait_seconds = self._model.communicate_seconds = 0.0
        return seconds

    async def run(self) -> Tensor:
        """Serve until training ends.

        Returns
        -------
        Tensor, shape (size,), float32
            The final model, or the weight average.

        Raises
        ------
        Interrupted
            After a signal, once the checkpoint is written and the workers have left.
        UserError
            If no worker is left to train, or none whose training stays finite.
        """
        if not self._inline:
            # Merges are bound by memory, and the worker that waits for one polls on some core.
            torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        self._model.distribute()
        try:
            while self._crew.active - self._crew.waiting:
                await self._next_report()
            await self._snapshots.evaluate_if_due()
            await self._send_rounds()
            if self._settings.server.synchronous:
                await self._serve_bulk_synchronously()
            else:
                await self._serve_asynchronously()
            self.members.stop(self._crew.waiting)
            self.members.call_off_replacements()
            while self._crew.present:
                await self._next_report()
        except Interrupted:
            await self._interrupt()
            self._model.end()
            raise
        await self._snapshots.finish()
        final = await self._model.hold_result()
        self._model.end()
        return final

    async def _serve_asynchronously(self) -> None:
        """ASP and SSP: merge each commit as it comes; its worker goes on at once where it may."""
        while not self._book.finished:
            worker, report = await self._next_report()
            if report.kind == ReportKind.COMMIT:
                await self._take_commit(worker, report)
                self.members.adapt()
            await self._after_commits()
            await self._send_rounds()

    async def _take_commit(self, worker: int, report: Report) -> None:
        await self._snapshots.make_room(worker)
        order = self._crew.order_of(worker)
        event = self._count_commit(worker, report)
        reply = self._may_go_on(worker) and self._send_next_order(worker)
        try:
            await self._model.merge(worker, self.work.factor(order), reply)
        except WorkerLost:
            self._uncount_commit(worker, order)
            self.work.give_back(order)
        else:
            self._emit("commit", event | self.own_seconds())
            self._announce_stage()

    async def _serve_bulk_synchronously(self) -> None:
        """BSP: one reduction over all workers each round."""
        while not self._book.finished:
            while self._crew.active - self._crew.waiting or not self._crew.active:
                worker, report = await self._next_report()
                if report.kind == ReportKind.COMMIT:
                    await self._snapshots.make_room(worker)
                    self._crew.committed[worker] = report
                elif report.kind == ReportKind.UNDONE:
                    await self._reductions.send_again(worker, report)
            await self._reduce()
            self.members.adapt()
            await self._after_commits()
            await self._send_rounds()

    async def _reduce(self) -> None:
        """Merge what all workers have committed; again without those that die meanwhile."""
        while True:
            await self._reductions.gather()
            commits = dict(sorted(self._crew.committed.items()))
            if not commits:
                return
            events = [self._count_commit(worker, report) for worker, report in commits.items()]
            factors = [self.work.factor(self._crew.order_of(worker)) for worker in commits]
            weights = dict(zip(commits, reduction_weights(factors), strict=True))
            if await self._reductions.reduce(weights):
                for event in events:
                    self._emit("commit", event | self.own_seconds())
                return
            for worker in commits:
                self._uncount_commit(worker, self._crew.order_of(worker))

    async def _send_rounds(self) -> None:
        """Give every worker that waits its next round, unless it must wait for others (SSP)."""
        for worker in sorted(self._crew.active & self._crew.waiting):
            if not self._may_go_on(worker):
                continue
            lacking = worker in self._crew.lacking
            if not self._send_next_order(worker):
                break  # nothing is left to do; what is under way may yet come back
            if lacking:
                await self._model.send(worker)
        at_work = self._crew.active and not self._book.idle
        assert self._book.finished or at_work or self._crew.awaited, "a round was lost"
        self._announce_stage()

    def _may_go_on(self, worker: int) -> bool:
        """Whether a worker that has committed may start its next round (SSP's bound)."""
        server = self._settings.server
        return server.sync != "ssp" or self._crew.lead(worker) <= server.staleness

    def _send_next_order(self, worker: int) -> bool:
        """Order a worker that waits to train its next round; whether there is one."""
        crew = self._crew
        order = self.work.next_order(crew.group(worker), crew.slot(worker), crew.commits[worker])
        if order is None:
            return False
        order.keep_state = self._state_may_count()
        crew.note_order(worker, order, self._link.now())
        self._link.order(worker, order)
        return True

    def _state_may_count(self) -> bool:
        """Whether a round that begins now may be its worker's latest in a checkpoint.

        In BSP all commit together, so that is so where a checkpoint is due then, and in the last
        rounds, after which some workers have none.
        """
        left = self._book.total - self._book.commits
        last = left < 2 * len(self._crew.active)
        return not self._spares_states or last or self._snapshots.due_after(1)

    def _announce_stage(self) -> None:
        """Log that a stage has begun, once workers have been sent into it."""
        if (stage := self.work.new_stage()) is not None:
            self._emit("stage", stage)

    def _count_commit(self, worker: int, report: Report) -> dict[str, Any]:
        """Count a commit; the event to log once it is merged."""
        self._crew.commits[worker] += 1
        self._crew.refused[worker] = 0
        self._crew.note_seconds(worker, report.train_seconds)
        who = {"worker": worker, "group": self._crew.group(worker).value}
        return self.work.count(self._crew.order_of(worker), report) | who | _seconds(report)

    def _uncount_commit(self, worker: int, order: Order) -> None:
        """A commit was cut short by its worker's death, or by another's in a reduction."""
        self.work.uncount(order)
        self._crew.commits[worker] -= 1

    async def _after_commits(self) -> None:
        """Evaluate and write a checkpoint where one is due."""
        await self._snapshots.evaluate_if_due()
        await self._snapshots.save_if_due()

    async def _next_report(self) -> tuple[int, Report]:
        """The next report that changes who is there, waits or trains; others are dealt with."""
        while True:
            self._snapshots.poll()
            if self._signal_number():
                raise Interrupted(self._signal_number())
            if not self._inline:  # else nobody runs now
                self.members.watch(self._listened)
            start = self._link.now()
            item = await self._link.next_report(_POLL_SECONDS)
            self._listened = self._link.now()
            if not self._snapshots.evaluating:
                self._wait_seconds += self._listened - start
            if item is None:
                continue
            worker, report = item
            self._note(worker, report)
            if report.kind == ReportKind.LEAVE and self._signal_number():
                continue  # it has heard of the signal by itself, and left a round undone
            if report.kind not in (ReportKind.PROGRESS, ReportKind.LEFT_OUT):
                return worker, report

    def _note(self, worker: int, report: Report) -> None:
        """Keep account of a report."""
        if report.kind == ReportKind.LOST:
            self.members.lose(worker)
            return
        if report.kind == ReportKind.JOIN and worker not in self._crew.active:
            self.members.admit(worker)
        self._crew.note_report(worker, report, self._link.now())
        if report.kind == ReportKind.PROGRESS:
            self._emit("progress", {"worker": worker, "samples": report.samples})
        elif report.kind == ReportKind.LEFT_OUT:
            self._note_left_out(self._image_name(report.index))
        elif report.kind == ReportKind.DIVERGED:
            self.members.refuse(worker)
        elif report.kind == ReportKind.LEAVE:
            group = self._crew.group(worker).value
            self._emit("leave", {"worker": worker, "group": group} | _seconds(report))

    def _note_left_out(self, file: str) -> None:
        if file not in self._left_out:
            self._left_out.add(file)
            self._emit("left_out", {"commit": self._book.commits, "file": file})

    async def _interrupt(self) -> None:
        """Save what is merged and see the workers off: first, where their states are not written.

        If one of these does not leave, the checkpoint before counts.
        """
        complete = not self._spares_states or self._snapshots.due_after(0)
        await self._snapshots.interrupt(save=complete)
        self._link.interrupt()
        deadline = math.inf if self._inline else self._link.now() + _LEAVE_SECONDS
        while self._crew.present and self._link.now() < deadline:
            self.members.stop(self._crew.waiting)
            item = await self._link.next_report(_POLL_SECONDS)
            if item is None:
                continue
            worker, report = item
            if report.kind == ReportKind.LOST:
                self._crew.lose(worker)
                continue
            self._note(worker, report)
            if report.kind == ReportKind.COMMIT and not self._settings.server.synchronous:
                with contextlib.suppress(WorkerLost):
                    await self._model.drop(worker)
        if not complete and not self._crew.present:
            await self._snapshots.interrupt(save=True)


def _seconds(report: Report) -> dict[str, float]:
    """The report's times, by name."""
    return {
        name: round(value, 6) for name, value in vars(report).items() if name.endswith("_seconds")
    }
