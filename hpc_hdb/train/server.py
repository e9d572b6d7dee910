"""The root server's loop: hand out rounds, merge commits, keep account.

Source: Lu et al., arXiv 2509.26092, for ASP and BSP with the model update factor; SSP after
Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hpc_hdb.cluster.link import ServerLink
from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.cluster.roles import group_of
from hpc_hdb.config import Settings
from hpc_hdb.plan import Group, RoundBook, TrainingPlan
from hpc_hdb.plan.rounds import split_evenly
from hpc_hdb.train.checkpoint import Checkpoint
from hpc_hdb.train.evaluate import Evaluator
from hpc_hdb.train.global_model import GlobalModel
from hpc_hdb.train.merge import MERGES, reduction_weights
from hpc_hdb.train.server_optimizer import Pace, ServerOptimizer, pace_of
from hpc_hdb.train.snapshots import Emit, Snapshots

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
        self._plan = plan
        self._settings = settings
        self._emit = emit
        self._signal_number = signal_number
        self._book = RoundBook(
            plan.shares, plan.stages, plan.samples, settings.server.commits_per_epoch
        )
        self._evaluator = evaluator
        self._model = GlobalModel(
            link,
            model,
            MERGES[settings.server.merge],
            ServerOptimizer.of(settings.server),
            self._pace,
        )
        self._present = set(range(1, link.workers + 1))
        self._active = set(self._present)
        self._waiting: set[int] = set()
        self._left_out: set[str] = set()
        self._image_name = image_name
        self._orders: dict[int, Order] = {}
        self._worker_commits = dict.fromkeys(self._present, 0)
        self._stage = -1
        self._snapshots = Snapshots(
            self._model,
            self._book,
            self._worker_commits,
            link,
            settings.run,
            evaluator,
            emit,
            self._note_left_out,
            checkpoints,
            inline,
        )
        self._inline = inline

    def resume(self, checkpoint: Checkpoint, evaluated: int) -> None:
        """Go on from a checkpoint, before `run`.

        Parameters
        ----------
        checkpoint : Checkpoint
        evaluated : int
            Commit count of the last model evaluated before it; 0 if there was none.
        """
        self._model.restore(checkpoint.model, checkpoint.server)
        self._book.restore(checkpoint.rounds)
        self._worker_commits.update(checkpoint.worker_commits)
        self._snapshots.resume(checkpoint, evaluated)

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
        """
        if not self._inline:
            # Merges are bound by memory, and the worker that waits for one polls on some core.
            torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        self._model.distribute()
        try:
            while self._waiting < self._active:
                await self._next_report(ReportKind.JOIN)
            await self._snapshots.evaluate_if_due()
            await self._send_rounds()
            if self._settings.server.synchronous:
                await self._serve_bulk_synchronously()
            else:
                await self._serve_asynchronously()
            while self._present:
                await self._next_report(ReportKind.LEAVE)
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
        while self._active:
            worker, report = await self._next_report(ReportKind.COMMIT)
            await self._snapshots.make_room(worker)
            self._count_commit(worker, report)
            reply = self._may_go_on(worker) and self._send_next_order(worker)
            await self._model.merge(worker, self._factor(report), reply)
            await self._after_commits()
            await self._send_rounds()

    async def _serve_bulk_synchronously(self) -> None:
        """BSP: one reduction over all workers each round."""
        workers = sorted(self._active)
        while self._active:
            reports: dict[int, Report] = {}
            while len(reports) < len(workers):
                worker, report = await self._next_report(ReportKind.COMMIT)
                await self._snapshots.make_room(worker)
                reports[worker] = report
            for worker in workers:
                self._count_commit(worker, reports[worker])
            weights = reduction_weights([self._factor(reports[worker]) for worker in workers])
            for worker, weight in zip(workers, weights, strict=True):
                self._send_next_order(worker, weight)
            await self._model.reduce()
            await self._after_commits()

    async def _send_rounds(self) -> None:
        """Give every worker that waits its next round, unless it must wait for others (SSP)."""
        # An order to stop takes a worker out of the count, which may let others go on.
        while ready := [worker for worker in sorted(self._waiting) if self._may_go_on(worker)]:
            for worker in ready:
                if self._send_next_order(worker):
                    await self._model.send(worker)

    def _may_go_on(self, worker: int) -> bool:
        """Whether a worker that has committed may start its next round (SSP's bound)."""
        if self._settings.server.sync != "ssp":
            return True
        slowest = min(self._worker_commits[other] for other in self._active)
        return self._worker_commits[worker] - slowest <= self._settings.server.staleness

    def _send_next_order(self, worker: int, weight: float = 0.0) -> bool:
        """Order a worker that waits to train its next round, or to stop; whether to train."""
        order = self._next_order(worker)
        order.weight = weight
        self._waiting.remove(worker)
        self._link.order(worker, order)
        return order.kind == OrderKind.TRAIN

    def _next_order(self, worker: int) -> Order:
        """The worker's next round, or the order to stop."""
        work = self._book.hand_out(self._group(worker))
        if work is None:
            self._active.discard(worker)
            return Order(OrderKind.STOP)
        number = self._book.stage
        stage, batch = self._plan.stages[number], self._plan.batch(number, work.group)
        following = self._book.next_stage
        if number != self._stage:
            self._stage = number
            self._emit("stage", {"commit": self._book.commits, "stage": number} | vars(stage))
        samples = work.end - work.begin
        rate, change = self._rate(batch)
        order = Order(
            OrderKind.TRAIN,
            small=work.group is Group.SMALL,
            index=work.index,
            epoch=work.epoch,
            part=work.part,
            slot=work.slot,
            begin=work.begin,
            end=work.end,
            stage=number,
            resolution=stage.resolution,
            batch=batch,
            next_resolution=self._plan.stages[following].resolution,
            next_batch=self._plan.batch(following, work.group),
            commits=self._book.commits,
            worker_commits=self._worker_commits[worker],
            learning_rate=rate,
            rate_change=change,
            dropout=stage.dropout,
            predicted_seconds=self._plan.timing[stage.resolution].of_steps(
                samples, len(split_evenly(samples, batch))
            ),
        )
        self._orders[worker] = order
        return order

    def _rate(self, batch: int) -> tuple[float, float]:
        """The learning rate of a round that begins now, and its change until the round's end."""
        schedule, epoch = self._settings.schedule, self._book.epoch
        round_epochs = 1 / self._settings.server.commits_per_epoch
        scale = schedule.rate_scale(self._plan.shares.workers, batch)
        start, end = schedule.rates().of_round(epoch, epoch + round_epochs)
        return scale * start, scale * (end - start)

    def _pace(self) -> Pace:
        """What the servers must know of the version that the commits counted so far make."""
        parts = self._settings.server.commits_per_epoch
        return pace_of(
            self._evaluator.parameters.trained,
            self._book.epoch,
            parts if self._settings.server.synchronous else self._book.commits_per_epoch,
            self._settings.server,
            self._settings.schedule,
        )

    def _count_commit(self, worker: int, report: Report) -> None:
        order = self._orders[worker]
        self._book.commit(_trained_as(report), report.index)
        self._worker_commits[worker] += 1
        self._emit(
            "commit",
            {
                "commit": self._book.commits,
                "worker": worker,
                "group": self._group(worker).value,
                "trained_as": _trained_as(report).value,
                "epoch": order.epoch,
                "part": order.part,
                "begin": order.begin,
                "end": order.end,
                "stage": order.stage,
                "learning_rate": order.learning_rate,
                "resolution": order.resolution,
                "dropout": order.dropout,
                "batch": order.batch,
                "pulled_at": order.commits,
                "samples": report.samples,
                "steps": report.steps,
                "loss": report.loss / max(report.samples, 1),
                "accuracy": report.correct / max(report.samples, 1),
                "predicted_seconds": order.predicted_seconds,
            }
            | _seconds(report),
        )

    async def _after_commits(self) -> None:
        """Evaluate and write a checkpoint where one is due."""
        await self._snapshots.evaluate_if_due()
        await self._snapshots.save_if_due()

    async def _next_report(self, kind: ReportKind) -> tuple[int, Report]:
        """The next report of that kind; progress and departures are dealt with on the way."""
        while True:
            self._snapshots.poll()
            if self._signal_number():
                raise Interrupted(self._signal_number())
            item = await self._link.next_report(_POLL_SECONDS)
            if item is None:
                continue
            worker, report = item
            self._note(worker, report)
            if report.kind == kind:
                return worker, report

    def _note(self, worker: int, report: Report) -> None:
        """Keep account of who waits for an order, who is under way and who has left."""
        if report.kind == ReportKind.PROGRESS:
            self._emit("progress", {"worker": worker, "samples": report.samples})
        elif report.kind == ReportKind.LEFT_OUT:
            self._note_left_out(self._image_name(report.index))
        elif report.kind == ReportKind.LEAVE:
            self._present.discard(worker)
            group = self._group(worker).value
            self._emit("leave", {"worker": worker, "group": group} | _seconds(report))
        else:
            self._waiting.add(worker)

    def _note_left_out(self, file: str) -> None:
        if file not in self._left_out:
            self._left_out.add(file)
            self._emit("left_out", {"commit": self._book.commits, "file": file})

    async def _interrupt(self) -> None:
        """Save what is merged, then see the workers off."""
        await self._snapshots.interrupt()
        self._link.interrupt()
        deadline = self._link.now() + _LEAVE_SECONDS
        while self._present and self._link.now() < deadline:
            for worker in sorted(self._waiting):
                self._link.order(worker, Order(OrderKind.STOP))
            self._waiting.clear()
            item = await self._link.next_report(_POLL_SECONDS)
            if item is not None:
                worker, report = item
                self._note(worker, report)
                if report.kind == ReportKind.COMMIT and not self._settings.server.synchronous:
                    await self._model.drop(worker)

    def _group(self, worker: int) -> Group:
        return group_of(worker, self._link.workers, self._plan.shares.small_workers)

    def _factor(self, report: Report) -> float:
        return self._plan.shares.factor(_trained_as(report))


def _trained_as(report: Report) -> Group:
    """Whose round a commit ends; mostly that of the worker's own group."""
    return Group.SMALL if report.small else Group.LARGE


def _seconds(report: Report) -> dict[str, float]:
    """The report's times, by name."""
    return {
        name: round(value, 6) for name, value in vars(report).items() if name.endswith("_seconds")
    }
