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

from hpc_hdb.cluster.link import ReductionBroken, ServerLink, WorkerLost
from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.cluster.roles import group_of
from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import TrainingPlan
from hpc_hdb.train.checkpoint import Checkpoint, has_checkpoint
from hpc_hdb.train.crew import Crew
from hpc_hdb.train.evaluate import Evaluator
from hpc_hdb.train.global_model import GlobalModel
from hpc_hdb.train.merge import MERGES, reduction_weights
from hpc_hdb.train.server_optimizer import ServerOptimizer
from hpc_hdb.train.snapshots import Emit, Snapshots
from hpc_hdb.train.work import Work

_POLL_SECONDS = 0.2
_LEAVE_SECONDS = 10.0
"""For the workers to come out of a step, once a run is interrupted."""
_CHANGE = 1.1
"""By how much one worker's speed relative to another's must change for shares to follow."""
_SILENT_ROUNDS = 3.0
"""A worker counts as silent no sooner than after so many predicted times of its round."""


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
        self._work = Work(plan, settings)
        self._book = self._work.book
        self._model = GlobalModel(
            link,
            model,
            MERGES[settings.server.merge],
            ServerOptimizer.of(settings.server),
            lambda: self._work.pace(evaluator.parameters.trained),
        )
        workers, small_workers = link.workers, min(plan.shares.small_workers, link.workers)
        self._crew = Crew([group_of(w, workers, small_workers) for w in range(1, workers + 1)])
        self._left_out: set[str] = set()
        self._image_name = image_name
        self._silent: set[int] = set()
        self._listened = 0.0
        self._wait_seconds = 0.0
        self._to_answer: set[int] = set()
        self._answered: set[int] = set()
        self._regroup = False
        self._replaced = 0
        self._reports: dict[int, Report] = {}
        self._asked = 0
        self._slowness = [1.0] * workers
        self._adapt_at = 1
        self._checkpoints = checkpoints
        self._snapshots = Snapshots(
            self._model,
            self._book,
            self._crew.commits,
            link,
            settings.run,
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
        """Go on from a checkpoint, before `run`; with any number of workers.

        Parameters
        ----------
        checkpoint : Checkpoint
        evaluated : int
            Commit count of the last model evaluated before it; 0 if there was none.
        best_accuracy : float
            Of the best checkpoint so far.
        """
        self._model.restore(checkpoint.model, checkpoint.server)
        self._work.restore(checkpoint.rounds)
        self._crew.commits.update(checkpoint.worker_commits)
        self._snapshots.resume(checkpoint, evaluated, best_accuracy)
        self._slowness, self._adapt_at = [], int(self._book.epoch) + 1
        if self._book.cuts[-1].workers != len(self._crew.active):
            self._replan()

    @property
    def commits(self) -> int:
        """Commits merged so far, of all workers."""
        return self._book.commits

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
            self._stop(self._crew.waiting)
            self._call_off_replacements()
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
                self._adapt()
            await self._after_commits()
            await self._send_rounds()

    async def _take_commit(self, worker: int, report: Report) -> None:
        await self._snapshots.make_room(worker)
        order = self._crew.order_of(worker)
        event = self._count_commit(worker, report)
        reply = self._may_go_on(worker) and self._send_next_order(worker)
        try:
            await self._model.merge(worker, self._work.factor(order), reply)
        except WorkerLost:
            self._uncount_commit(worker, order)
            self._work.give_back(order)
        else:
            self._emit("commit", event | self.own_seconds())
            self._announce_stage()

    async def _serve_bulk_synchronously(self) -> None:
        """BSP: one reduction over all workers each round."""
        while not self._book.finished:
            self._reports.clear()
            while self._crew.active - self._crew.waiting or not self._crew.active:
                worker, report = await self._next_report()
                if report.kind == ReportKind.COMMIT:
                    await self._snapshots.make_room(worker)
                    self._reports[worker] = report
                elif report.kind == ReportKind.UNDONE and worker in self._answered:
                    await self._send_again(worker)
            await self._reduce()
            self._adapt()
            await self._after_commits()
            await self._send_rounds()

    async def _reduce(self) -> None:
        """Merge what all workers have committed; again without those that die meanwhile."""
        while True:
            if self._regroup:
                await self._muster()
            commits = {w: r for w, r in sorted(self._reports.items()) if w in self._crew.waiting}
            if not commits:
                return
            events = [self._count_commit(worker, report) for worker, report in commits.items()]
            factors = [self._work.factor(self._crew.order_of(worker)) for worker in commits]
            weights = dict(zip(commits, reduction_weights(factors), strict=True))
            order = self._ask(OrderKind.REDUCE)
            newcomers = sorted(self._crew.newcomers)
            order.newcomers = len(newcomers)
            for worker in sorted(self._crew.waiting):
                order.weight = weights.get(worker, 0.0)  # some have nothing to commit
                order.position = newcomers.index(worker) if worker in newcomers else -1
                self._link.order(worker, order)
            if (not self._regroup or self._form_groups(newcomers)) and await self._reduced():
                self._regroup = False
                self._crew.lacking.clear()
                for event in events:
                    self._emit("commit", event | self.own_seconds())
                return
            for worker in commits:
                self._uncount_commit(worker, self._crew.order_of(worker))
            self._regroup = True
            await self._all_answer()

    def _form_groups(self, newcomers: list[int]) -> bool:
        formed = self._model.regroup(newcomers)
        if formed:
            self._crew.newcomers.difference_update(newcomers)
        return formed

    def _adapt(self) -> None:
        """Once an epoch, let the shares follow the workers' speeds where these have changed."""
        due = self._settings.server.adapts and self._book.epoch >= self._adapt_at
        if not due or not self._crew.active:
            return
        self._adapt_at = int(self._book.epoch) + 1
        slowness = self._crew.slowness
        changes = [new / old for new, old in zip(slowness, self._slowness, strict=False)]
        if len(slowness) == len(self._slowness) and max(changes) < _CHANGE * min(changes):
            return
        self._slowness = slowness
        plan = self._work.replan(len(slowness), self._crew.small_workers, slowness)
        self._emit("adapted", {"commit": self._book.commits, "slowness": slowness} | plan)

    async def _muster(self) -> None:
        """Make sure that all are there who are to form new groups: one that hangs holds up all."""
        order = self._ask(OrderKind.MUSTER)
        for worker in sorted(self._crew.waiting):
            self._link.order(worker, order)
        await self._all_answer()

    def _ask(self, kind: OrderKind) -> Order:
        """An order that those who wait answer, unless they carry it out."""
        self._answered.clear()
        self._to_answer = set(self._crew.waiting)
        self._asked += 1
        return Order(kind, index=self._asked, regroup=self._regroup)

    async def _all_answer(self) -> None:
        self._crew.expect(self._to_answer & self._crew.waiting - self._answered, self._link.now())
        while self._to_answer & self._crew.waiting - self._answered:
            await self._next_report()

    async def _reduced(self) -> bool:
        try:
            await self._model.reduce()
        except ReductionBroken:
            return False
        return True

    async def _send_again(self, worker: int) -> None:
        """The worker has missed the end of a reduction that was done elsewhere."""
        self._regroup = True
        if worker in self._crew.waiting:
            self._crew.lacking.add(worker)
        elif worker in self._crew.active:
            await self._model.send(worker)

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
        if self._settings.server.sync != "ssp":
            return True
        slowest = min(self._crew.commits[other] for other in self._crew.active)
        return self._crew.commits[worker] - slowest <= self._settings.server.staleness

    def _send_next_order(self, worker: int) -> bool:
        """Order a worker that waits to train its next round; whether there is one."""
        crew = self._crew
        order = self._work.next_order(crew.group(worker), crew.slot(worker), crew.commits[worker])
        if order is None:
            return False
        order.keep_state = self._state_may_count()
        self._send_order(worker, order)
        return True

    def _state_may_count(self) -> bool:
        """Whether a round that begins now may be its worker's latest in a checkpoint.

        In BSP all commit together, so that is so where a checkpoint is due then, and in the last
        rounds, after which some workers have none.
        """
        left = self._book.total - self._book.commits
        last = left < 2 * len(self._crew.active)
        return not self._spares_states or last or self._snapshots.due_after(1)

    def _send_order(self, worker: int, order: Order) -> None:
        self._crew.note_order(worker, order, self._link.now())
        self._link.order(worker, order)

    def _announce_stage(self) -> None:
        """Log that a stage has begun, once workers have been sent into it."""
        if (stage := self._work.new_stage()) is not None:
            self._emit("stage", stage)

    def _count_commit(self, worker: int, report: Report) -> dict[str, Any]:
        """Count a commit; the event to log once it is merged."""
        self._crew.commits[worker] += 1
        self._crew.refused[worker] = 0
        self._crew.note_seconds(worker, report.train_seconds)
        who = {"worker": worker, "group": self._crew.group(worker).value}
        return self._work.count(self._crew.order_of(worker), report) | who | _seconds(report)

    def _uncount_commit(self, worker: int, order: Order) -> None:
        """A commit was cut short by its worker's death, or by another's in a reduction."""
        self._work.uncount(order)
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
            self._watch()
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
            self._lose(worker)
            return
        if report.kind == ReportKind.JOIN and worker not in self._crew.active:
            self._admit(worker)
        self._crew.note_report(worker, report, self._link.now())
        if report.kind == ReportKind.PROGRESS:
            self._emit("progress", {"worker": worker, "samples": report.samples})
        elif report.kind == ReportKind.LEFT_OUT:
            self._note_left_out(self._image_name(report.index))
        elif report.kind in (ReportKind.UNDONE, ReportKind.PRESENT):
            if report.index == self._asked:
                self._answered.add(worker)
        elif report.kind == ReportKind.DIVERGED:
            self._refuse(worker)
        elif report.kind == ReportKind.LEAVE:
            group = self._crew.group(worker).value
            self._emit("leave", {"worker": worker, "group": group} | _seconds(report))

    def _refuse(self, worker: int) -> None:
        """A round has ended in NaN or infinity: it is done again, from the last good model."""
        order = self._crew.order_of(worker)
        self._work.give_back(order)
        self._crew.refused[worker] += 1
        where = {"epoch": order.epoch, "stage": order.stage, "learning_rate": order.learning_rate}
        self._emit(
            "refused",
            {"commit": self._book.commits, "worker": worker, "times": self._crew.refused[worker]}
            | where,
        )
        if self._crew.refused[worker] < self._settings.server.refusals:
            return
        self._crew.dismiss(worker)
        self._emit("dropped", {"commit": self._book.commits, "worker": worker} | where)
        if not self._crew.active:
            before = ""
            if self._checkpoints is not None and has_checkpoint(self._checkpoints):
                before = "; the checkpoints written before are good"
            raise UserError(
                f"training diverged (loss or weights no longer finite) in epoch {order.epoch}, "
                f"stage {order.stage} (learning rate {order.learning_rate:g}, "
                f"{order.resolution}x{order.resolution}), on every worker: lower "
                f"schedule.learning_rate and start again{before}"
            )
        if not self._settings.server.synchronous:  # else it takes part in reductions, with nothing
            self._stop({worker})
        self._replan()

    def _lose(self, worker: int) -> None:
        """A worker has died: others do what it leaves undone."""
        if worker not in self._crew.present:  # a replacement that was called off
            return
        trained = worker in self._crew.active
        wanted = trained or worker in self._crew.awaited
        order = self._crew.lose(worker)
        if order is not None:
            self._work.give_back(order)
        self._reports.pop(worker, None)
        self._regroup = True
        group = self._crew.group(worker).value
        self._emit("lost", {"commit": self._book.commits, "worker": worker, "group": group})
        if not wanted or self._book.finished:
            return
        if trained and self._crew.active:
            self._replan()
        self._replace(worker)
        if not self._crew.active and not self._crew.awaited:
            folder = "RUN" if self._checkpoints is None else self._checkpoints.parent
            raise UserError(f"all workers were lost: go on with hdb train --resume {folder}")

    def _replace(self, worker: int) -> None:
        """Start another process in place of a lost worker, if that is wanted and possible."""
        if self._replaced == self._settings.server.replacements:
            return
        if self._link.replace(worker):
            self._replaced += 1
            self._crew.await_replacement(worker, self._link.now())
        else:
            self._emit("irreplaceable", {"commit": self._book.commits, "worker": worker})

    def _call_off_replacements(self) -> None:
        """Nothing is left to do for those that have not joined, if they ever would."""
        for worker in sorted(self._crew.awaited):
            self._crew.lose(worker)
            self._emit("called_off", {"commit": self._book.commits, "worker": worker})
            with contextlib.suppress(UserError):  # it is where we cannot end it
                self._link.fence(worker)

    def _admit(self, worker: int) -> None:
        """The replacement of a lost worker has joined."""
        if self._settings.server.sync == "ssp":  # it need not catch up
            others = [self._crew.commits[w] for w in self._crew.active]
            self._crew.commits[worker] = min(others, default=self._crew.commits[worker])
        self._crew.admit(worker)
        self._regroup = True
        group = self._crew.group(worker).value
        self._emit("replaced", {"commit": self._book.commits, "worker": worker, "group": group})
        if not self._book.finished:
            self._replan()

    def _replan(self) -> None:
        """Solve the plan for the workers that are left."""
        plan = self._work.replan(len(self._crew.active), self._crew.small_workers)
        self._crew.regroup(plan["small_workers"])
        self._emit("plan", plan)

    def _watch(self) -> None:
        """Report workers that have not been heard of for long, and end them if so configured."""
        if self._inline:  # nobody else runs now
            return
        server, now = self._settings.server, self._link.now()
        self._crew.excuse(now - self._listened)
        self._listened = now
        silent = self._crew.silent(now, server.silent_seconds, _SILENT_ROUNDS)
        for worker in silent:
            if worker not in self._silent:
                self._emit("silent", {"commit": self._book.commits, "worker": worker})
                if server.silent_worker == "drop":
                    self._link.fence(worker)
        self._silent = set(silent)

    def _stop(self, workers: set[int]) -> None:
        """Let workers that wait for an order go."""
        for worker in sorted(workers & self._crew.waiting):
            self._send_order(worker, Order(OrderKind.STOP))

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
            self._stop(self._crew.waiting)
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
