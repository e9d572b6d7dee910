"""What a parameter server and a worker need of each other.

Two implementations: `hpc_hdb.cluster.mpi` between MPI ranks and `hpc_hdb.cluster.virtual`
within one process on a virtual clock. The loops that use them are coroutines: ``await`` marks
where time passes. Over MPI an awaited call blocks, as any MPI call does; on the virtual clock
another rank runs meanwhile.

Models are float32 CPU tensors of one dimension and of the same length on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from hpc_hdb.cluster.messages import Order, Report


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

    async def join(self, model: Tensor) -> Order:
        """Announce this worker; the first round, and the global model in `model`."""
        ...

    async def exchange(self, report: Report, model: Tensor) -> Order:
        """Commit `model` on its own (ASP, SSP); it is overwritten with the merged one.

        After a STOP order the contents of `model` are unspecified.
        """
        ...

    async def reduce(self, report: Report, model: Tensor) -> Order:
        """Commit `model` together with all workers (BSP); it is overwritten with the merged one."""
        ...

    async def leave(self, report: Report) -> None:
        """The last message: totals since the last report."""
        ...


class ServerLink(Protocol):
    """The server's end. Workers are named by their rank, 1 to `workers`."""

    workers: int

    def now(self) -> float:
        """Seconds since the link was made."""
        ...

    async def next_report(self, timeout: float) -> tuple[int, Report] | None:
        """The next worker's report, or None after `timeout` real seconds without one."""
        ...

    async def receive(self, worker: int, out: Tensor) -> None:
        """Receive the model that follows `worker`'s COMMIT report into `out` (ASP, SSP)."""
        ...

    def reply(self, worker: int, order: Order, model: Tensor | None) -> None:
        """Send `order` and, for a TRAIN order, `model`, without waiting.

        `model` must not change while `sending` says that it is still on its way.
        """
        ...

    def sending(self, model: Tensor) -> bool:
        """Whether a reply from this very buffer is still on its way."""
        ...

    async def reduce(self, orders: Mapping[int, Order], out: Tensor) -> None:
        """Send every worker its order; `out` becomes the sum of their weighted models (BSP)."""
        ...

    async def broadcast(self, model: Tensor) -> None:
        """End a reduction: every worker receives `model`."""
        ...

    def interrupt(self) -> None:
        """Call the run off: `interrupted` turns true at every worker."""
        ...
