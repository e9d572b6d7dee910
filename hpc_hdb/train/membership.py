"""Who trains for the root server: groups by the plan, and what becomes of workers that fail."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_hdb.cluster.link import ServerLink
from hpc_hdb.cluster.messages import Order, OrderKind
from hpc_hdb.config import Server
from hpc_hdb.errors import UserError
from hpc_hdb.train.checkpoint import has_checkpoint
from hpc_hdb.train.crew import Crew
from hpc_hdb.train.snapshots import Emit
from hpc_hdb.train.work import Work

_CHANGE = 1.1
"""By how much one worker's speed relative to another's must change for shares to follow."""
_SILENT_ROUNDS = 3.0
"""A worker counts as silent no sooner than after so many predicted times of its round."""


class Membership:
    """Takes workers in and out of the crew, and has the plan solved again for those there are.

    Parameters
    ----------
    link : ServerLink
    crew : Crew
    work : Work
    settings : Server
    emit : callable
        Takes an event's name and its values.
    checkpoints : Path or None
        Folder of the checkpoints, to say how to go on.
    """

    def __init__(
        self,
        link: ServerLink,
        crew: Crew,
        work: Work,
        settings: Server,
        emit: Emit,
        checkpoints: Path | None,
    ) -> None:
        self._link = link
        self._crew = crew
        self._work = work
        self._book = work.book
        self._settings = settings
        self._emit = emit
        self._checkpoints = checkpoints
        self._silent: set[int] = set()
        self._replaced = 0
        self._slowness = [1.0] * len(crew.active)
        self._adapt_at = 1

    def resume(self, commits: Mapping[int, int]) -> None:
        """Go on after so many commits of each worker, of which there may be others now."""
        self._crew.commits.update(commits)
        self._crew.spare_returned(self._settings.staleness)
        self._slowness, self._adapt_at = [], int(self._book.epoch) + 1

    def fit_plan(self) -> dict[str, Any] | None:
        """Deal out the groups, before `run`, by a plan for the workers there are.

        Returns
        -------
        dict or None
            The values of a ``plan`` event, where the plan was for others.
        """
        last = self._book.cuts[-1]
        if last.workers == len(self._crew.active):
            self._crew.regroup(last.small_workers)
            return None
        return self._solve_plan()

    def adapt(self) -> None:
        """Once an epoch, let the shares follow the workers' speeds where these have changed."""
        due = self._settings.adapts and self._book.epoch >= self._adapt_at
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

    def refuse(self, worker: int) -> None:
        """A round has ended in NaN or infinity: it is done again, from the last good model."""
        order = self._crew.order_of(worker)
        self._work.give_back(order)
        self._crew.refused[worker] += 1
        where = {"epoch": order.epoch, "stage": order.stage, "learning_rate": order.learning_rate}
        self._tell("refused", worker, times=self._crew.refused[worker], **where)
        if self._crew.refused[worker] < self._settings.refusals:
            return
        self._crew.dismiss(worker)
        self._tell("dropped", worker, **where)
        if not self._crew.active:
            before = ""
            if self._checkpoints is not None and has_checkpoint(self._checkpoints):
                before = "; the checkpoints written before are good"
            raise UserError(
                f"training diverged (loss or weights no longer finite) in epoch {order.epoch}, "
                f"stage {order.stage} (learning rate {order.learning_rate:g}, "
                f"{order.resolution}x{order.resolution}), on every worker: lower "
                f"{self._settings.rates} and start again{before}"
            )
        if not self._settings.synchronous:  # else it takes part in reductions, with nothing
            self.stop({worker})
        self._replan()

    def lose(self, worker: int) -> None:
        """A worker has died: others do what it leaves undone."""
        if worker not in self._crew.present:  # a replacement that was called off
            return
        trained = worker in self._crew.active
        wanted = trained or worker in self._crew.awaited
        order = self._crew.lose(worker)
        if order is not None:
            self._work.give_back(order)
        self._tell("lost", worker, group=self._crew.group(worker).value)
        if not wanted or self._book.finished:
            return
        if trained and self._crew.active:
            self._replan()
        self._replace(worker)
        if not self._crew.active and not self._crew.awaited:
            folder = "RUN" if self._checkpoints is None else self._checkpoints.parent
            raise UserError(f"all workers were lost: go on with hdb train --resume {folder}")

    def admit(self, worker: int) -> None:
        """The replacement of a lost worker has joined."""
        self._crew.admit(worker)
        self._crew.spare_returned(self._settings.staleness)
        self._tell("replaced", worker, group=self._crew.group(worker).value)
        if not self._book.finished:
            self._replan()

    def watch(self, listened: float) -> None:
        """Report workers that have not been heard of for long, and end them if so configured.

        Parameters
        ----------
        listened : float
            When the server last listened to workers.
        """
        now = self._link.now()
        self._crew.excuse(now - listened)
        silent = self._crew.silent(now, self._settings.silent_seconds, _SILENT_ROUNDS)
        for worker in silent:
            if worker not in self._silent:
                self._tell("silent", worker)
                if self._settings.silent_worker == "drop":
                    self._link.fence(worker)
        self._silent = set(silent)

    def call_off_replacements(self) -> None:
        """Nothing is left to do for those that have not joined, if they ever would."""
        for worker in sorted(self._crew.awaited):
            self._crew.lose(worker)
            self._tell("called_off", worker)
            with contextlib.suppress(UserError):  # it is where we cannot end it
                self._link.fence(worker)

    def stop(self, workers: set[int]) -> None:
        """Let workers that wait for an order go."""
        for worker in sorted(workers & self._crew.waiting):
            order = Order(OrderKind.STOP)
            self._crew.note_order(worker, order, self._link.now())
            self._link.order(worker, order)

    def _replace(self, worker: int) -> None:
        """Start another process in place of a lost worker, if that is wanted and possible."""
        if self._replaced == self._settings.replacements:
            return
        if self._link.replace(worker):
            self._replaced += 1
            self._crew.await_replacement(worker, self._link.now())
        else:
            self._tell("irreplaceable", worker)

    def _tell(self, event: str, worker: int, **more: Any) -> None:
        self._emit(event, {"commit": self._book.commits, "worker": worker} | more)

    def _replan(self) -> None:
        self._emit("plan", self._solve_plan())

    def _solve_plan(self) -> dict[str, Any]:
        """Solve the plan for the workers there are; the values of a ``plan`` event."""
        plan = self._work.replan(len(self._crew.active), self._crew.small_workers)
        self._crew.regroup(plan["small_workers"])
        return plan
