"""The link between MPI ranks, over mpi4py: typed buffers only, no pickle.

A bulk-synchronous merge is a reduce-scatter among the workers (each adds up one slice of all
models), a gather of the slices to the server and a broadcast, so that no rank moves more than
a few models' worth of bytes, however many workers there are. ``MPI_Reduce`` would do, but adds
in an order that depends on the library, its version and the number of ranks; here the slices
are added in the order of the ranks, so a run repeats bit for bit, on the virtual cluster too.

A waiting rank tests its requests and sleeps in between, instead of spinning inside MPI: it
must not take the core (or, oversubscribed, the turn) of a rank that trains. Transfers
themselves run at full speed, since both sides are known to be there.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.errors import UserError

_REPORT, _MODEL, _ORDER, _MERGED, _INTERRUPT = range(1, 6)

_LAUNCHER = os.getppid()
_SPIN_SECONDS = 0.02
"""Longer than a commit's transfer and merge take; a rank that waits yields its core meanwhile."""
_LONGEST_SLEEP = 0.001


def world() -> MPI.Intracomm:
    """A communicator of all ranks of our own.

    Raises
    ------
    UserError
        If the MPI library was started without support for threads.
    """
    if MPI.Query_thread() < MPI.THREAD_FUNNELED:
        raise UserError(
            "this MPI library runs without thread support, which evaluation beside training "
            "needs: start with MPI4PY_RC_THREAD_LEVEL unset, or load an MPI built with threads"
        )
    return MPI.COMM_WORLD.Dup()


def slices(size: int, workers: int) -> tuple[list[int], list[int]]:
    """Lengths and starts of the slices in which `workers` share a buffer of `size`."""
    bounds = [size * worker // workers for worker in range(workers + 1)]
    return [end - start for start, end in itertools.pairwise(bounds)], bounds[:-1]


def wait_until(done: Callable[[], bool], timeout: float = float("inf")) -> bool:
    """Wait for `done`, first eagerly, then asleep; False after `timeout` seconds.

    A rank whose launcher has been killed ends here: nobody else would end it.
    """
    start = time.perf_counter()
    sleep = 5e-5
    while not done():
        waited = time.perf_counter() - start
        if waited > timeout:
            return False
        if waited < _SPIN_SECONDS:
            os.sched_yield()
        elif os.getppid() != _LAUNCHER:
            os._exit(1)
        else:
            time.sleep(sleep)
            sleep = min(sleep * 1.5, _LONGEST_SLEEP)
    return True


class MpiWorkerLink:
    """A worker's end of the link; see `hpc_hdb.cluster.link.WorkerLink`.

    Parameters
    ----------
    comm : MPI.Intracomm
        Server and workers; not freed here. Every rank of it makes its end at the same time.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank = comm.rank
        self._workers = comm.Split(0, comm.rank)
        self.wait_seconds = 0.0
        self.communicate_seconds = 0.0
        self._comm = comm
        self._order = bytearray(Order.layout.size)
        self._order_request = comm.Recv_init([self._order, MPI.BYTE], SERVER, _ORDER)
        self._interrupt = comm.Irecv([bytearray(0), MPI.BYTE], SERVER, _INTERRUPT)
        self._interrupted = False
        self._progress: tuple[MPI.Request, bytearray] | None = None

    async def elapse(self, predicted: float, measured: float) -> float:
        return measured

    def tell(self, report: Report) -> None:
        if report.kind != ReportKind.PROGRESS:
            self._report(report)
        elif self._progress is None or self._progress[0].Test():
            data = report.pack()
            self._progress = (self._comm.Isend([data, MPI.BYTE], SERVER, _REPORT), data)

    def interrupted(self) -> bool:
        self._interrupted = self._interrupted or self._interrupt.Test()
        return self._interrupted

    async def join(self, model: Tensor) -> Order:
        self._report(Report(ReportKind.JOIN))
        return self._pull(model)

    async def exchange(self, report: Report, model: Tensor) -> Order:
        self._report(report)
        start = time.perf_counter()
        push = self._comm.Isend(model, SERVER, _MODEL)
        wait_until(push.Test)
        self.communicate_seconds += time.perf_counter() - start
        return self._pull(model)

    async def reduce(self, report: Report, model: Tensor) -> Order:
        self._report(report)
        order = self._next_order()
        if order.weight:
            start = time.perf_counter()
            self._comm.Gatherv(self._reduce_scatter(model.mul_(order.weight)), None, SERVER)
            self._comm.Bcast(model, SERVER)
            self.communicate_seconds += time.perf_counter() - start
        return order

    async def leave(self, report: Report) -> None:
        self._report(report)
        if self._progress is not None:
            wait_until(self._progress[0].Test)
        if not self.interrupted():
            self._interrupt.Cancel()
            self._interrupt.Wait()
        self._order_request.Free()
        self._workers.Free()

    def _reduce_scatter(self, model: Tensor) -> Tensor:
        """This worker's slice of the sum of all workers' models."""
        counts, starts = slices(model.numel(), self._workers.size)
        own = counts[self._workers.rank]
        parts = torch.empty(self._workers.size, own)
        self._workers.Alltoallv(
            [model, (counts, starts), MPI.FLOAT],
            [parts, ([own] * len(counts), [own * rank for rank in range(len(counts))]), MPI.FLOAT],
        )
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def _report(self, report: Report) -> None:
        self._comm.Send([report.pack(), MPI.BYTE], SERVER, _REPORT)

    def _next_order(self) -> Order:
        start = time.perf_counter()
        self._order_request.Start()
        wait_until(self._order_request.Test)
        self.wait_seconds += time.perf_counter() - start
        return Order.unpack(self._order)

    def _pull(self, model: Tensor) -> Order:
        order = self._next_order()
        if order.kind == OrderKind.TRAIN:
            start = time.perf_counter()
            self._comm.Recv(model, SERVER, _MERGED)
            self.communicate_seconds += time.perf_counter() - start
        return order


@dataclass
class _Sending:
    request: MPI.Request
    model: Tensor | None
    order: bytearray


class MpiServerLink:
    """The server's end of the link; see `hpc_hdb.cluster.link.ServerLink`.

    Attributes
    ----------
    present : set of int
        Workers that have not left.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.workers = comm.size - 1
        self.present = set(range(1, comm.size))
        comm.Split(MPI.UNDEFINED, comm.rank)
        self._comm = comm
        self._start = time.perf_counter()
        self._reports = [bytearray(Report.layout.size) for _ in range(self.workers)]
        self._requests = [
            comm.Recv_init([data, MPI.BYTE], worker, _REPORT)
            for worker, data in enumerate(self._reports, start=1)
        ]
        MPI.Prequest.Startall(self._requests)
        self._sending: list[_Sending] = []

    def now(self) -> float:
        return time.perf_counter() - self._start

    async def next_report(self, timeout: float) -> tuple[int, Report] | None:
        arrived = MPI.UNDEFINED

        def any_report() -> bool:
            nonlocal arrived
            arrived, done = MPI.Request.Testany(self._requests)
            return done and arrived != MPI.UNDEFINED

        if not wait_until(any_report, timeout):
            return None
        report = Report.unpack(self._reports[arrived])
        if report.kind == ReportKind.LEAVE:
            self.present.discard(arrived + 1)
        else:
            self._requests[arrived].Start()
        return arrived + 1, report

    async def receive(self, worker: int, out: Tensor) -> None:
        self._comm.Recv(out, worker, _MODEL)

    def reply(self, worker: int, order: Order, model: Tensor | None) -> None:
        data = order.pack()
        self._sending.append(
            _Sending(self._comm.Isend([data, MPI.BYTE], worker, _ORDER), None, data)
        )
        if model is not None:
            self._sending.append(_Sending(self._comm.Isend(model, worker, _MERGED), model, data))

    def sending(self, model: Tensor) -> bool:
        self._sending = [item for item in self._sending if not item.request.Test()]
        return any(item.model is model for item in self._sending)

    async def reduce(self, orders: Mapping[int, Order], out: Tensor) -> None:
        for worker, order in orders.items():
            self.reply(worker, order, None)
        counts, starts = slices(out.numel(), self.workers)
        nothing = torch.empty(0)
        self._comm.Gatherv(
            [nothing, MPI.FLOAT], [out, ([0, *counts], [0, *starts]), MPI.FLOAT], SERVER
        )

    async def broadcast(self, model: Tensor) -> None:
        self._comm.Bcast(model, SERVER)

    def interrupt(self) -> None:
        for worker in range(1, self.workers + 1):
            self._sending.append(
                _Sending(
                    self._comm.Isend([bytearray(0), MPI.BYTE], worker, _INTERRUPT),
                    None,
                    bytearray(),
                )
            )
