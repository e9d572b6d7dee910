"""The link inside one process, on a virtual clock: a discrete-event simulation of a cluster.

Servers and workers are the same coroutines that run over MPI. One of them runs at a time; who
is next is decided by the time model alone, ties by rank. So a run is deterministic in every
mode, needs no MPI, and its clock counts what a cluster of that many workers would take.
Communication takes no virtual time.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_hdb.cluster.clock import Clock, Suspend
from hpc_hdb.cluster.messages import Instruction, Order, OrderKind, Report, ReportKind
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.cluster.slices import Slices, overlap, share_of_sum


class Cluster(Protocol):
    """What the links need of the cluster that joins them."""

    @property
    def time(self) -> float: ...

    @property
    def servers(self) -> int: ...

    @property
    def server(self) -> VirtualServerLink: ...

    @property
    def followers(self) -> Sequence[VirtualFollowerLink]: ...

    @property
    def workers(self) -> Sequence[VirtualWorkerLink]: ...

    def wake(self, rank: int, delay: float = 0.0) -> None: ...


class VirtualCluster(Clock):
    """One or more servers and `workers` workers on one clock; ranked in that order.

    Parameters
    ----------
    workers : int
    slowness : sequence of float, length `workers`, optional
        Factor by which each worker takes longer than predicted; 1 by default.
    servers : int
    signal_number : callable
        The signal that asks to stop, 0 while there is none: no server runs while a worker trains.

    Attributes
    ----------
    server : VirtualServerLink
        The root server's end of the link.
    followers : list of VirtualFollowerLink
        Those of the other servers.
    workers : list of VirtualWorkerLink
    """

    def __init__(
        self,
        workers: int,
        slowness: Sequence[float] | None = None,
        servers: int = 1,
        signal_number: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__()
        self.servers = servers
        self.server = VirtualServerLink(self, workers, signal_number)
        self.followers = [VirtualFollowerLink(self, rank) for rank in range(1, servers)]
        factors = slowness or [1.0] * workers
        self.workers = [
            VirtualWorkerLink(self, number, factor)
            for number, factor in enumerate(factors, start=1)
        ]

    def run(
        self,
        server: Coroutine[Any, Any, Any],
        workers: Sequence[Coroutine],
        followers: Sequence[Coroutine] = (),
    ) -> Any:
        """Run all ranks to their end; what `server`, the root, returned.

        Raises
        ------
        RuntimeError
            If every rank waits for another.
        """
        return self.run_ranks(dict(enumerate([server, *followers, *workers])))[SERVER]


class VirtualWorkerLink:
    """A worker's end of the link; see `hpc_hdb.cluster.link.WorkerLink`."""

    def __init__(self, cluster: Cluster, number: int, slowness: float) -> None:
        self.rank = number
        self.wait_seconds = 0.0
        self.communicate_seconds = 0.0
        self._cluster = cluster
        self._slowness = slowness
        self._model = torch.empty(0)
        self._order: Order | None = None
        self._weight = 0.0
        self._to_push = 0
        self._to_pull = 0

    async def elapse(self, predicted: float, measured: float) -> float:
        seconds = predicted * self._slowness
        self._wake(seconds)
        await Suspend()
        return seconds

    def tell(self, report: Report) -> None:
        if report.kind != ReportKind.PROGRESS:
            self._cluster.server.deliver(self.rank, report)

    def interrupted(self) -> bool:
        return self._cluster.server.is_interrupted

    async def report(self, report: Report, model: Tensor) -> Order:
        return await self._report_and_wait(report, model, pushed=0)

    async def exchange(self, report: Report, model: Tensor) -> Order:
        return await self._report_and_wait(report, model, pushed=model.numel())

    async def leave(self, report: Report) -> None:
        self._cluster.server.deliver(self.rank, report)

    def take_order(self, order: Order) -> None:
        """Receive the root's answer."""
        if order.kind == OrderKind.REDUCE:
            self._weight, self._to_pull = order.weight, self._model.numel()
        else:
            self._order = order
            self._go_on_if_answered()

    def push(self, part: slice) -> Tensor:
        """The committed values of that part of the model, for the server that receives them."""
        self._to_push -= part.stop - part.start
        self._go_on_if_answered()
        return self._model[part]

    def weighted(self, part: slice) -> Tensor:
        """That part of the model, scaled for a reduction."""
        if not self._weight:
            return torch.zeros_like(self._model[part])
        return self._model[part] * self._weight

    def pull(self, part: slice, values: Tensor) -> None:
        """Receive a part of the model."""
        self._model[part] = values
        self._to_pull -= part.stop - part.start
        self._go_on_if_answered()

    async def _report_and_wait(self, report: Report, model: Tensor, pushed: int) -> Order:
        self._model, self._order = model, None
        self._to_push, self._to_pull = pushed, model.numel()
        self._cluster.server.deliver(self.rank, report)
        start = self._cluster.time
        await Suspend()
        self.wait_seconds += self._cluster.time - start
        assert self._order is not None, f"worker {self.rank} was woken without an order"
        return self._order

    def _go_on_if_answered(self) -> None:
        """Go on once the order is there, and all parts of models have arrived both ways."""
        if self._order is None or self._to_push:
            return
        if not self._to_pull or self._order.kind == OrderKind.STOP:
            self._wake()

    def _wake(self, delay: float = 0.0) -> None:
        self._cluster.wake(self._cluster.servers + self.rank - 1, delay)


class _VirtualSliceLink:
    """What all servers' ends share; see `hpc_hdb.cluster.link.SliceLink`."""

    parts: Sequence[slice] = ()

    def __init__(self, cluster: Cluster, rank: int) -> None:
        self._cluster = cluster
        self._rank = rank
        self._size = self._begin = 0

    @property
    def begin(self) -> int:
        return self._begin

    async def receive(self, worker: int, out: Tensor) -> AsyncIterator[slice]:
        for part in self.parts:
            out[part] = self._cluster.workers[worker - 1].push(self._in_model(part))
            yield part

    def send(self, worker: int, model: Tensor, part: slice) -> None:
        self._cluster.workers[worker - 1].pull(self._in_model(part), model[part])

    async def reduce(self, out: Tensor) -> AsyncIterator[slice]:
        workers = self._cluster.workers
        for part in self.parts:
            for number in range(len(workers)):
                share = share_of_sum(self._size, number, len(workers))
                both = overlap(share, self._in_model(part))
                if both.start < both.stop:
                    # Open MPI's order, for all but small models: along a ring that ends here.
                    ring = [*workers[number + 1 :], *workers[: number + 1]]
                    total = functools.reduce(torch.add, (worker.weighted(both) for worker in ring))
                    out[both.start - self._begin : both.stop - self._begin] = total
            yield part

    def broadcast(self, model: Tensor, part: slice) -> None:
        for worker in self._cluster.workers:
            worker.pull(self._in_model(part), model[part])

    def sending(self, model: Tensor) -> bool:
        return False

    def take_slice(self, model: Tensor) -> Tensor:
        """This server's slice of the whole `model`."""
        self._size = model.numel()
        slices = Slices(self._size, self._cluster.servers)
        self._begin, end = slices.bounds(self._rank)
        self.parts = [
            slice(part.start - self._begin, part.stop - self._begin)
            for part in slices.parts(self._rank)
        ]
        return model[self._begin : end]

    def _in_model(self, part: slice) -> slice:
        return slice(self._begin + part.start, self._begin + part.stop)


class VirtualServerLink(_VirtualSliceLink):
    """The root server's end of the link; see `hpc_hdb.cluster.link.ServerLink`."""

    patience = float("inf")

    def __init__(
        self, cluster: Cluster, workers: int, signal_number: Callable[[], int] = lambda: 0
    ) -> None:
        super().__init__(cluster, SERVER)
        self.workers = workers
        self.servers = cluster.servers
        self._signal_number = signal_number
        self._called_off = False
        self._inbox: deque[tuple[int, Report]] = deque()
        self._handed_in: list[tuple[Tensor, slice]] = []

    @property
    def is_interrupted(self) -> bool:
        """Whether the run is called off, or a signal asks for that."""
        return self._called_off or self._signal_number() > 0

    def deliver(self, worker: int, report: Report) -> None:
        """Take a worker's report."""
        self._inbox.append((worker, report))
        self._cluster.wake(SERVER)

    def take_in(self, model: Tensor, where: slice) -> None:
        """Take another server's slice."""
        self._handed_in.append((model, where))
        self._cluster.wake(SERVER)

    def now(self) -> float:
        return self._cluster.time

    async def next_report(self, timeout: float) -> tuple[int, Report] | None:
        while not self._inbox:
            await Suspend()
        return self._inbox.popleft()

    def order(self, worker: int, order: Order) -> None:
        self._cluster.workers[worker - 1].take_order(order)

    def replace(self, worker: int) -> bool:
        return False  # none dies

    def regroup(self, newcomers: Sequence[int]) -> bool:
        return True

    def fence(self, worker: int) -> None:
        raise NotImplementedError("workers of a simulation do not die")

    def distribute(self, model: Tensor) -> Tensor:
        for follower in self._cluster.followers:
            follower.deliver(follower.take_slice(model).clone())
        return self.take_slice(model)

    def instruct(self, instruction: Instruction) -> None:
        for follower in self._cluster.followers:
            follower.deliver(instruction)

    async def confirmed(self, worker: int) -> bool:
        return True  # nothing is lost here

    async def collect(self, own: Tensor, out: Tensor) -> None:
        while len(self._handed_in) < self.servers - 1:
            await Suspend()
        out[self._begin : self._begin + len(own)] = own
        for model, where in self._handed_in:
            out[where] = model
        self._handed_in.clear()

    def interrupt(self) -> None:
        self._called_off = True


class VirtualFollowerLink(_VirtualSliceLink):
    """Another server's end of the link; see `hpc_hdb.cluster.link.FollowerLink`."""

    def __init__(self, cluster: Cluster, rank: int) -> None:
        super().__init__(cluster, rank)
        self._inbox: deque[Tensor | Instruction] = deque()

    def deliver(self, message: Tensor | Instruction) -> None:
        """Take something from the root server."""
        self._inbox.append(message)
        self._cluster.wake(self._rank)

    async def first_slice(self) -> Tensor:
        message = await self._next()
        assert isinstance(message, Tensor)
        return message

    async def next_instruction(self) -> Instruction:
        message = await self._next()
        assert isinstance(message, Instruction)
        return message

    def confirm(self, done: bool) -> None:
        pass  # as it must be

    def regroup(self) -> None:
        raise NotImplementedError("workers of a simulation do not die")

    def hand_in(self, model: Tensor) -> None:
        where = slice(self._begin, self._begin + len(model))
        self._cluster.server.take_in(model, where)

    async def _next(self) -> Tensor | Instruction:
        while not self._inbox:
            await Suspend()
        return self._inbox.popleft()
