"""The link inside one process, on the real clock: rank 0 of all-reduce training.

It keeps the run's account and trains as well. The server runs between the steps of the training,
so that signals, progress and checkpoints go the same way as with a server of its own.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any

from hpc_hdb.cluster.clock import Suspend
from hpc_hdb.cluster.messages import Report
from hpc_hdb.cluster.virtual import VirtualFollowerLink, VirtualServerLink, VirtualWorkerLink

_WORKER = 1


class LocalCluster:
    """A server and its only worker."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.servers = 1
        self.followers: list[VirtualFollowerLink] = []
        self.server = LocalServerLink(self, workers=1)
        self.worker = LocalWorkerLink(self)
        self.workers = [self.worker]
        self._serving: Coroutine | None = None
        self._result: Any = None
        self._answered = True

    @property
    def time(self) -> float:
        return time.perf_counter() - self._start

    def wake(self, rank: int, delay: float = 0.0) -> None:
        """Let the worker go on; the server runs in every turn anyway."""
        self._answered |= rank == _WORKER

    def run(self, server: Coroutine[Any, Any, Any], worker: Coroutine) -> Any:
        """Run both to their end; what `server` returned."""
        self._serving = server
        training: Coroutine | None = worker
        try:
            while self._serving is not None:
                self.serve()
                if training is not None and self._answered:
                    self._answered = False
                    training = _resume(training)[0]
        finally:
            for coroutine in (self._serving, training):
                if coroutine is not None:
                    coroutine.close()
        return self._result

    def serve(self) -> None:
        """Let the server do what there is to do."""
        if self._serving is not None:
            self._serving, self._result = _resume(self._serving)


class LocalWorkerLink(VirtualWorkerLink):
    """The worker's end of the link; see `hpc_hdb.cluster.link.WorkerLink`."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__(cluster, number=_WORKER, slowness=1.0)
        self._local = cluster

    async def elapse(self, predicted: float, measured: float) -> float:
        return measured

    def tell(self, report: Report) -> None:
        self._local.server.deliver(self.rank, report)

    def interrupted(self) -> bool:
        self._local.serve()
        return super().interrupted()


class LocalServerLink(VirtualServerLink):
    """The server's end of the link; see `hpc_hdb.cluster.link.ServerLink`."""

    async def next_report(self, timeout: float) -> tuple[int, Report] | None:
        if not self._inbox:
            await Suspend()
        return self._inbox.popleft() if self._inbox else None


def _resume(coroutine: Coroutine) -> tuple[Coroutine | None, Any]:
    """Run a coroutine on; itself, or None and its result once it has ended."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return None, end.value
    return coroutine, None
