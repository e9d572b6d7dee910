"""What parameter servers and workers need of each other.

Two implementations: `hpc_hdb.cluster.mpi_worker` and `mpi_server` between MPI ranks, and
`hpc_hdb.cluster.virtual` within one process on a virtual clock. The loops that use them are
coroutines: ``await`` marks where time passes. Over MPI an awaited call blocks, as any MPI call
does; on the virtual clock another rank runs meanwhile.

Models are float32 CPU tensors of one dimension and of the same length on every worker. Each
server keeps one slice of the model, which travels in parts (`hpc_hdb.cluster.slices`). The first
server is the root: it alone takes reports, decides, and instructs the others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from hpc_hdb.cluster.messages import Instruction, Order, Report

T = TypeVar("T")


class WorkerLost(Exception):
    """A worker has died in the middle of an exchange."""


class ReductionBroken(Exception):
    """A reduction came to nothing, since a worker died or does not answer."""


class WorkerLink(Protocol):
    """A worker's end."""

    rank: int
    wait_seconds: float
    """Seconds spent waiting for the server or other workers; the caller may reset it."""
    communicate_seconds: float
    """Seconds spent moving models; the caller may reset it."""

    async def elapse(self, predicted: float, measured: float) -> float:
        """Let the time of local work pass; returns the seconds that count.

        Over MPI the work itself took `measured` seconds; the virtual clock moves on by
        `predicted`.
        """
        ...

    def tell(self, report: Report) -> None:
        """Tell the server something in the middle of a round; PROGRESS may get lost."""
        ...

    def interrupted(self) -> bool:
        """Whether the server has called the run off."""
        ...

    async def report(self, report: Report, model: Tensor) -> Order:
        """Report, and wait for the next round; the global model in `model`.

        Meanwhile the worker takes part in reductions with all others (BSP), to which it
        contributes `model`. After a STOP order the contents of `model` are unspecified.
        """
        ...

    async def exchange(self, report: Report, model: Tensor) -> Order:
        """Commit `model` on its own (ASP, SSP); otherwise as `report`."""
        ...

    async def leave(self, report: Report) -> None:
        """The last message: totals since the last report."""
        ...


class SliceLink(Protocol):
    """Any server's end, where it moves its slice. Workers are numbered from 1."""

    parts: Sequence[slice]
    """The parts of this server's slice, as positions in the slice."""

    @property
    def begin(self) -> int:
        """Position of this server's slice in the model."""
        ...

    def receive(self, worker: int, out: Tensor) -> AsyncIterator[slice]:
        """Receive this slice of `worker`'s commit into `out`; yields each part once it is there.

        Raises
        ------
        WorkerLost
            If the worker dies meanwhile.
        """
        ...

    def send(self, worker: int, model: Tensor, part: slice) -> None:
        """Send a part of `model` to `worker`, without waiting.

        It must not change while `sending` says that `model` is still on its way.
        """
        ...

    def reduce(self, out: Tensor) -> AsyncIterator[slice]:
        """Add up this slice of all workers' weighted models in `out`; yields each part once done.

        Each part that it yields is to be sent to the workers with `broadcast`.

        Raises
        ------
        ReductionBroken
            If a rank dies or hangs meanwhile.
        """
        ...

    def broadcast(self, model: Tensor, part: slice) -> None:
        """Send a part of `model` to all workers; they all wait for it.

        If a rank dies or hangs, `reduce` goes no further.
        """
        ...

    def sending(self, model: Tensor) -> bool:
        """Whether something of this very buffer is still on its way."""
        ...


class ServerLink(SliceLink, Protocol):
    """The root server's end."""

    workers: int
    servers: int
    patience: float
    """Seconds after which a worker that should be sending is ended (`fence`); may be set."""

    def now(self) -> float:
        """Seconds since the link was made."""
        ...

    async def next_report(self, timeout: float) -> tuple[int, Report] | None:
        """The next worker's report, or None after `timeout` real seconds without one.

        A LOST report says once of a worker that it has died.
        """
        ...

    def order(self, worker: int, order: Order) -> None:
        """Answer `worker`'s report, without waiting.

        The model that belongs to a TRAIN order follows by `send`, unless the worker has taken
        part in a reduction since its report.
        """
        ...

    def regroup(self, newcomers: Sequence[int]) -> bool:
        """Do what a REDUCE order with `regroup` asks of the workers; whether it is done.

        All other servers have had a REGROUP instruction.

        Parameters
        ----------
        newcomers : sequence of int
            Workers that take part for the first time since `replace`.
        """
        ...

    def replace(self, worker: int) -> bool:
        """Start another process in place of a worker that has died; whether that could be done.

        It joins as any worker does.
        """
        ...

    def fence(self, worker: int) -> None:
        """End a worker that does not answer, so that it cannot come back; LOST follows.

        Raises
        ------
        UserError
            If it cannot be ended from here.
        """
        ...

    def distribute(self, model: Tensor) -> Tensor:
        """Give every server its slice of `model`, before anything else; the root's own."""
        ...

    def instruct(self, instruction: Instruction) -> None:
        """Send an instruction to all other servers, without waiting."""
        ...

    async def confirmed(self, worker: int) -> bool:
        """Whether all other servers have carried a MERGE or REDUCE instruction out.

        Waits for them where ranks may be lost (elsewhere there is nothing to wait for).

        Parameters
        ----------
        worker : int
            Whose commit it was; 0 where it was everyone's. If it hangs, it is ended.
        """
        ...

    async def collect(self, own: Tensor, out: Tensor) -> None:
        """After a COLLECT instruction: the root's slice `own` and all others, in `out`."""
        ...

    def interrupt(self) -> None:
        """Call the run off: `interrupted` turns true at every worker."""
        ...


class FollowerLink(SliceLink, Protocol):
    """The end of a server that is not the root."""

    async def first_slice(self) -> Tensor:
        """The slice that the root gives this server before the first instruction."""
        ...

    async def next_instruction(self) -> Instruction:
        """The next thing to do."""
        ...

    def confirm(self, done: bool) -> None:
        """Tell the root whether a MERGE or REDUCE instruction was carried out."""
        ...

    def regroup(self) -> None:
        """Take part in the root's `regroup`."""
        ...

    def hand_in(self, model: Tensor) -> None:
        """Answer a COLLECT instruction, without waiting; `model` as in `send`."""
        ...


def complete(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends: over MPI, awaited calls block."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("an MPI link has suspended")
