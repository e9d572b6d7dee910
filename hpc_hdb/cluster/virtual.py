"""The link inside one process, on a virtual clock: a discrete-event simulation of a cluster.

Server and workers are the same coroutines that run over MPI. One of them runs at a time; who
is next is decided by the time model alone, ties by rank. So a run is deterministic in every
mode, needs no MPI, and its clock counts what a cluster of that many workers would take.
Communication takes no virtual time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Coroutine, Generator, Mapping, Sequence
from typing import Any

from torch import Tensor

from hpc_hdb.cluster.messages import Order, Report, ReportKind
from hpc_hdb.cluster.roles import SERVER


class _Suspend:
    """Awaiting it hands control back to the cluster."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class VirtualCluster:
    """A server and `workers` workers on one clock.

    Parameters
    ----------
    workers : int
    slowness : sequence of float, length `workers`, optional
        Factor by which each worker takes longer than predicted; 1 by default.
    """

    def __init__(self, workers: int, slowness: Sequence[float] | None = None) -> None:
        self.time = 0.0
        self.server = VirtualServerLink(self, workers)
        factors = slowness or [1.0] * workers
        self.workers = [
            VirtualWorkerLink(self, rank, factor) for rank, factor in enumerate(factors, start=1)
        ]
        self._events: list[tuple[float, int]] = []

    def wake(self, rank: int, delay: float = 0.0) -> None:
        """Let `rank` run again after `delay` virtual seconds."""
        heapq.heappush(self._events, (self.time + delay, rank))

    def run(self, server: Coroutine[Any, Any, Any], workers: Sequence[Coroutine]) -> Any:
        """Run all ranks to their end; what `server` returned.

        Raises
        ------
        RuntimeError
            If every rank waits for another.
        """
        ranks: dict[int, Coroutine] = {SERVER: server, **dict(enumerate(workers, start=1))}
        result = None
        try:
            for rank in ranks:
                self.wake(rank)
            while self._events:
                self.time, rank = heapq.heappop(self._events)
                if rank not in ranks:
                    continue
                try:
                    ranks[rank].send(None)
                except StopIteration as end:
                    del ranks[rank]
                    if rank == SERVER:
                        result = end.value
            if ranks:
                raise RuntimeError(f"ranks {sorted(ranks)} wait for each other")
        finally:
            for coroutine in ranks.values():
                coroutine.close()
        return result


class VirtualWorkerLink:
    """A worker's end of the link; see `hpc_hdb.cluster.link.WorkerLink`."""

    def __init__(self, cluster: VirtualCluster, rank: int, slowness: float) -> None:
        self.rank = rank
        self.wait_seconds = 0.0
        self.communicate_seconds = 0.0
        self.model: Tensor | None = None
        self.order: Order | None = None
        self._cluster = cluster
        self._slowness = slowness

    async def elapse(self, predicted: float, measured: float) -> float:
        seconds = predicted * self._slowness
        self._cluster.wake(self.rank, seconds)
        await _Suspend()
        return seconds

    def tell(self, report: Report) -> None:
        if report.kind != ReportKind.PROGRESS:
            self._cluster.server.deliver(self.rank, report)

    def interrupted(self) -> bool:
        return self._cluster.server.is_interrupted

    async def join(self, model: Tensor) -> Order:
        return await self._report_and_wait(Report(ReportKind.JOIN), model)

    async def exchange(self, report: Report, model: Tensor) -> Order:
        return await self._report_and_wait(report, model)

    async def reduce(self, report: Report, model: Tensor) -> Order:
        return await self._report_and_wait(report, model)

    async def leave(self, report: Report) -> None:
        self._cluster.server.deliver(self.rank, report)

    async def _report_and_wait(self, report: Report, model: Tensor) -> Order:
        self.model, self.order = model, None
        self._cluster.server.deliver(self.rank, report)
        start = self._cluster.time
        while self.order is None:
            await _Suspend()
        self.wait_seconds += self._cluster.time - start
        return self.order


class VirtualServerLink:
    """The server's end of the link; see `hpc_hdb.cluster.link.ServerLink`."""

    def __init__(self, cluster: VirtualCluster, workers: int) -> None:
        self.workers = workers
        self.is_interrupted = False
        self._cluster = cluster
        self._inbox: deque[tuple[int, Report]] = deque()
        self._orders: Mapping[int, Order] = {}

    def deliver(self, worker: int, report: Report) -> None:
        """Take a worker's report."""
        self._inbox.append((worker, report))
        self._cluster.wake(SERVER)

    def now(self) -> float:
        return self._cluster.time

    async def next_report(self, timeout: float) -> tuple[int, Report] | None:
        while not self._inbox:
            await _Suspend()
        return self._inbox.popleft()

    async def receive(self, worker: int, out: Tensor) -> None:
        out.copy_(self._model(worker))

    def reply(self, worker: int, order: Order, model: Tensor | None) -> None:
        if model is not None:
            self._model(worker).copy_(model)
        self._answer(worker, order)

    def sending(self, model: Tensor) -> bool:
        return False

    async def reduce(self, orders: Mapping[int, Order], out: Tensor) -> None:
        self._orders = orders
        for worker, order in sorted(orders.items()):
            weighted = self._model(worker).mul_(order.weight)
            if worker == 1:
                out.copy_(weighted)
            else:
                out.add_(weighted)

    async def broadcast(self, model: Tensor) -> None:
        for worker, order in self._orders.items():
            self._model(worker).copy_(model)
            self._answer(worker, order)

    def interrupt(self) -> None:
        self.is_interrupted = True

    def _model(self, worker: int) -> Tensor:
        model = self._cluster.workers[worker - 1].model
        assert model is not None, f"worker {worker} has not reported"
        return model

    def _answer(self, worker: int, order: Order) -> None:
        self._cluster.workers[worker - 1].order = order
        self._cluster.wake(worker)
