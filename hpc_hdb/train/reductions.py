"""BSP's reductions, as the root server leads them: again without workers that die meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from hpc_hdb.cluster.link import ReductionBroken, ServerLink
from hpc_hdb.cluster.messages import Order, OrderKind, Report
from hpc_hdb.train.crew import Crew
from hpc_hdb.train.global_model import GlobalModel


class Reductions:
    """Has the workers that wait merge their models, in groups without those that are gone.

    Parameters
    ----------
    link : ServerLink
    model : GlobalModel
    crew : Crew
    listen : callable
        Awaits the next report of a worker, of which `crew` takes note.
    """

    def __init__(
        self,
        link: ServerLink,
        model: GlobalModel,
        crew: Crew,
        listen: Callable[[], Awaitable[tuple[int, Report]]],
    ) -> None:
        self._link = link
        self._model = model
        self._crew = crew
        self._listen = listen
        self._asked = 0

    async def gather(self) -> None:
        """Make sure that all are there who are to form new groups: one that hangs holds up all."""
        if not self._crew.changed:
            return
        await self._all_answer()
        order = self._next_order(OrderKind.MUSTER)
        for worker in sorted(self._crew.waiting):
            self._link.order(worker, order)
        self._crew.expect_answers(self._asked, self._link.now())
        await self._all_answer()

    async def reduce(self, weights: Mapping[int, float]) -> bool:
        """Merge the models of the workers that wait, once they are gathered.

        Parameters
        ----------
        weights : mapping of int to float
            Of each worker that has something to commit; they add up to one.

        Returns
        -------
        bool
            Whether there is a new version, which all of them have; else nothing has come of it.
        """
        order = self._next_order(OrderKind.REDUCE)
        newcomers = sorted(self._crew.newcomers)
        order.newcomers = len(newcomers)
        for worker in sorted(self._crew.waiting):
            order.weight = weights.get(worker, 0.0)
            order.position = newcomers.index(worker) if worker in newcomers else -1
            self._link.order(worker, order)
        if (not self._crew.changed or self._form_groups(newcomers)) and await self._reduced():
            self._crew.changed = False
            self._crew.lacking.clear()
            self._crew.committed.clear()
            return True
        self._crew.changed = True
        self._crew.expect_answers(self._asked, self._link.now())
        return False

    async def send_again(self, worker: int, report: Report) -> None:
        """The worker has missed the end of a reduction that was done elsewhere."""
        if report.index != self._asked:
            return
        self._crew.changed = True
        if worker in self._crew.waiting:
            self._crew.lacking.add(worker)
        elif worker in self._crew.active:
            await self._model.send(worker)

    def _next_order(self, kind: OrderKind) -> Order:
        """An order that those who wait answer, unless they carry it out."""
        self._asked += 1
        return Order(kind, index=self._asked, regroup=self._crew.changed)

    async def _all_answer(self) -> None:
        while self._crew.owing:
            await self._listen()

    def _form_groups(self, newcomers: list[int]) -> bool:
        formed = self._model.regroup(newcomers)
        if formed:
            self._crew.newcomers.difference_update(newcomers)
        return formed

    async def _reduced(self) -> bool:
        try:
            await self._model.reduce()
        except ReductionBroken:
            return False
        return True
