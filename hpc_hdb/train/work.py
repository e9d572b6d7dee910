"""The work that the root server hands out: rounds as orders to workers, and the account of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_hdb.cluster.messages import Order, OrderKind, Report
from hpc_hdb.config import Settings
from hpc_hdb.plan import Group, RoundBook, TrainingPlan
from hpc_hdb.plan.cuts import split_evenly
from hpc_hdb.train.server_optimizer import Pace, pace_of


class Work:
    """Rounds by the plan of the run, and by others once workers have been lost.

    Parameters
    ----------
    plan : TrainingPlan
    settings : Settings

    Attributes
    ----------
    book : RoundBook
    """

    def __init__(self, plan: TrainingPlan, settings: Settings) -> None:
        self.book = RoundBook(
            plan.shares, plan.stages, plan.samples, settings.server.commits_per_epoch
        )
        self._plan = plan
        self._plans = {0: plan}
        self._settings = settings
        self._stage = self._announced = -1

    @property
    def newest_plan(self) -> TrainingPlan:
        """The plan that was solved last; it may hold from a later epoch on."""
        return self._plans[max(self._plans)]

    def restore(self, rounds: dict[str, Any]) -> None:
        """Go on from a `RoundBook.state`."""
        self.book.restore(rounds)
        for cut in self.book.cuts[1:]:
            self._plans[cut.start_epoch] = self._solve(cut.workers, cut.small_workers)

    def replan(
        self, workers: int, small_workers: int, slowness: Sequence[float] = ()
    ) -> dict[str, Any]:
        """Solve the plan for so many workers; it holds from the next epoch on.

        Parameters
        ----------
        workers, small_workers : int
        slowness : sequence of float, optional
            As in `hpc_hdb.plan.cuts.epoch_bounds`.

        Returns
        -------
        dict
            The values of a ``plan`` event.
        """
        plan = self._solve(workers, small_workers)
        epoch = self.book.recut(plan.shares, slowness)
        self._plans[epoch] = plan
        about = {k: v for k, v in plan.to_dict().items() if k not in ("timing", "samples")}
        return {"commit": self.book.commits, "from_epoch": epoch, "total": self.book.total} | about

    def next_order(self, group: Group, slot: int, worker_commits: int) -> Order | None:
        """The next round for a worker of `group`; None while all rounds are handed out.

        Parameters
        ----------
        slot : int
            The worker's position in its group; its own are the rounds cut for its speed.
        worker_commits : int
            The worker's own commits so far.
        """
        work = self.book.hand_out(group, slot if self._settings.server.adapts else None)
        if work is None:
            return None
        self._stage = number = self.book.stage
        plan = self._plan_of(work.group, work.index)
        stage, batch = plan.stages[number], plan.batch(number, work.group)
        following = self.book.next_stage
        samples = work.end - work.begin
        rate, change = self._rate(batch, plan)
        return Order(
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
            next_resolution=plan.stages[following].resolution,
            next_batch=plan.batch(following, work.group),
            commits=self.book.commits,
            worker_commits=worker_commits,
            learning_rate=rate,
            rate_change=change,
            dropout=stage.dropout,
            predicted_seconds=plan.timing[stage.resolution].of_steps(
                samples, len(split_evenly(samples, batch))
            ),
        )

    def new_stage(self) -> dict[str, Any] | None:
        """The values of a ``stage`` event, once orders of a new stage have been given."""
        if self._stage == self._announced:
            return None
        self._announced = self._stage
        stage = vars(self._plan.stages[self._stage])
        return {"commit": self.book.commits, "stage": self._stage} | stage

    def count(self, order: Order, report: Report) -> dict[str, Any]:
        """Count the commit that ends a round; what a ``commit`` event says of it."""
        group = trained_as(order)
        self.book.commit(group, order.index)
        return {
            "commit": self.book.commits,
            "epochs": round(self.book.epoch, 6),
            "trained_as": group.value,
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

    def uncount(self, order: Order) -> None:
        """Undo `count`: the round is under way again."""
        self.book.take_back(trained_as(order), order.index)

    def give_back(self, order: Order) -> None:
        """Let another worker do a round, if it is still under way."""
        if self.book.under_way(trained_as(order), order.index):
            self.book.give_back(trained_as(order), order.index)

    def factor(self, order: Order) -> float:
        """Model update factor with which a round is committed."""
        group = trained_as(order)
        shares = self._plan_of(group, order.index).shares
        if not self._settings.server.adapts:
            return shares.factor(group)
        return (
            self._settings.server.commits_per_epoch
            * (order.end - order.begin)
            / max(shares.large_share, shares.small_share)
        )

    def pace(self, trained: int) -> Pace:
        """What the servers must know of the version that the commits counted so far make.

        Parameters
        ----------
        trained : int
            As in `hpc_hdb.train.server_optimizer.pace_of`.
        """
        server = self._settings.server
        parts = server.commits_per_epoch if server.synchronous else self.book.commits_per_epoch
        return pace_of(trained, self.book.epoch, parts, server, self._settings.schedule)

    def _rate(self, batch: int, plan: TrainingPlan) -> tuple[float, float]:
        """The learning rate of a round that begins now, and its change until the round's end."""
        schedule, epoch = self._settings.schedule, self.book.epoch
        round_epochs = 1 / self._settings.server.commits_per_epoch
        scale = schedule.rate_scale(plan.shares.workers, batch)
        start, end = schedule.rates().of_round(epoch, epoch + round_epochs)
        return scale * start, scale * (end - start)

    def _plan_of(self, group: Group, index: int) -> TrainingPlan:
        """The plan by which that round was cut."""
        return self._plans[self.book.cuts[self.book.cut_of(group, index)].start_epoch]

    def _solve(self, workers: int, small_workers: int) -> TrainingPlan:
        return self._plan.for_workers(workers, small_workers, self._settings.plan.time_ratio)


def trained_as(order: Order) -> Group:
    """Whose round that is; mostly that of the worker's own group."""
    return Group.SMALL if order.small else Group.LARGE
