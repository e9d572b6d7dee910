"""How the ranks that share a worker's batches hear of the server: by way of the one that leads."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from hpc_hdb.cluster.groups import RankGroup
from hpc_hdb.cluster.link import WorkerLink
from hpc_hdb.cluster.messages import Order, OrderKind, Report


class LeaderLink:
    """The leader's link: what comes from the server reaches its whole group.

    Parameters
    ----------
    link : WorkerLink
        To the server.
    group : RankGroup
    """

    def __init__(self, link: WorkerLink, group: RankGroup) -> None:
        self.rank = link.rank
        self.wait_seconds = 0.0
        self.communicate_seconds = 0.0
        self._link = link
        self._group = group

    async def elapse(self, predicted: float, measured: float) -> float:
        return await self._link.elapse(predicted, measured)

    def tell(self, report: Report) -> None:
        self._link.tell(report)

    def interrupted(self) -> bool:
        return self._link.interrupted()

    async def report(self, report: Report, model: Tensor) -> Order:
        return self._pass_on(await self._link.report(report, model), model)

    async def exchange(self, report: Report, model: Tensor) -> Order:
        return self._pass_on(await self._link.exchange(report, model), model)

    async def leave(self, report: Report) -> None:
        await self._link.leave(report)

    def _pass_on(self, order: Order, model: Tensor) -> Order:
        self.wait_seconds += self._link.wait_seconds
        self.communicate_seconds += self._link.communicate_seconds
        self._link.wait_seconds = self._link.communicate_seconds = 0.0
        start = time.perf_counter()
        self._group.share(order.pack())
        if order.kind == OrderKind.TRAIN:
            self._group.broadcast_(model)
        self.communicate_seconds += time.perf_counter() - start
        return order


class MemberLink:
    """The link of a rank that does not lead: to its leader.

    Parameters
    ----------
    group : RankGroup
    evaluate : callable, optional
        Called on the leader's order to take part in an evaluation.
    """

    def __init__(self, group: RankGroup, evaluate: Callable[[], object] | None = None) -> None:
        self.rank = 0
        self.wait_seconds = 0.0
        self.communicate_seconds = 0.0
        self._group = group
        self._evaluate = evaluate

    async def elapse(self, predicted: float, measured: float) -> float:
        return measured

    def tell(self, report: Report) -> None:
        pass

    def interrupted(self) -> bool:
        return False

    async def report(self, report: Report, model: Tensor) -> Order:
        return self._follow(model)

    async def exchange(self, report: Report, model: Tensor) -> Order:
        return self._follow(model)

    async def leave(self, report: Report) -> None:
        pass

    def _follow(self, model: Tensor) -> Order:
        order = Order.unpack(self._group.share())
        while order.kind == OrderKind.EVALUATE and self._evaluate is not None:
            self._evaluate()
            order = Order.unpack(self._group.share())
        if order.kind == OrderKind.TRAIN:
            self._group.broadcast_(model)
        return order
