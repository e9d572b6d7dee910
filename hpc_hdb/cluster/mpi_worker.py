"""The link between MPI ranks: a worker's end. See `hpc_hdb.cluster.mpi`."""

from __future__ import annotations

import time

import torch
from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.failures import addresses, raise_unless_failure, tolerates_failures
from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.cluster.mpi import INTERRUPT, MERGED, MODEL, ORDER, REPORT, wait_until
from hpc_hdb.cluster.mpi_groups import Groups, Sent, pass_on, wait_sent
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.cluster.slices import Slices, overlap, share_of_sum


class _Contribution:
    """A worker's model as it goes into a reduction, also if that has to be done again.

    Attributes
    ----------
    model : Tensor
        Overwritten by a reduction, whether or not it comes to its end.
    """

    def __init__(self) -> None:
        self.model = torch.empty(0)
        self._scaled = torch.empty(0)
        self._weight = 0.0

    def renew(self, model: Tensor) -> None:
        """Contribute `model` from now on."""
        self.model = model
        self._weight = 0.0

    def scaled(self, weight: float) -> Tensor:
        """The model as it was, times `weight`; 0 leaves it out, whatever its values."""
        if self._scaled.shape != self.model.shape:
            self._scaled = torch.empty_like(self.model)
        if not weight:
            return self._scaled.zero_()
        if self._weight:
            self._scaled *= weight / self._weight
        else:
            torch.mul(self.model, weight, out=self._scaled)
        self._weight = weight
        return self._scaled


class MpiWorkerLink:
    """A worker's end of the link; see `hpc_hdb.cluster.link.WorkerLink`.

    Parameters
    ----------
    comm : MPI.Intracomm
        Servers and workers; not freed here. Every rank of it makes its end at the same time.
    servers : int
        The first ranks of `comm`.
    patience : float
        Seconds after which a reduction is given up in which some rank hangs.
    replaces : int
        Number of the worker, if it takes the place of one that has died: then `comm` holds the
        server and this rank.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        servers: int = 1,
        patience: float = float("inf"),
        replaces: int = 0,
    ) -> None:
        self.rank = replaces or comm.rank - servers + 1
        self.wait_seconds = 0.0
        self.communicate_seconds = 0.0
        self._patience = patience
        self._comm = comm
        self._servers = servers
        # One that comes later forms groups with the others in its first reduction.
        later = Groups(comm, MPI.COMM_NULL, [])
        self._groups = later if replaces else Groups.split(comm, servers)
        if not replaces:
            addresses(comm)  # of use at the root
        self._contribution = _Contribution()
        self._order = bytearray(Order.layout.size)
        self._order_request = comm.Recv_init([self._order, MPI.BYTE], SERVER, ORDER)
        self._interrupt = comm.Irecv([bytearray(0), MPI.BYTE], SERVER, INTERRUPT)
        self._interrupted = False
        self._progress: tuple[MPI.Request, bytearray] | None = None

    async def elapse(self, predicted: float, measured: float) -> float:
        return measured

    def tell(self, report: Report) -> None:
        if report.kind != ReportKind.PROGRESS:
            self._report(report)
        elif self._progress is None or self._progress[0].Test():
            data = report.pack()
            self._progress = (self._comm.Isend([data, MPI.BYTE], SERVER, REPORT), data)

    def interrupted(self) -> bool:
        self._interrupted = self._interrupted or self._interrupt.Test()
        return self._interrupted

    async def report(self, report: Report, model: Tensor) -> Order:
        self._report(report)
        order = self._next_order()
        merged = False
        self._contribution.renew(model)
        while order.kind in (OrderKind.REDUCE, OrderKind.MUSTER):
            if order.kind == OrderKind.MUSTER:
                self._report(Report(ReportKind.PRESENT, index=order.index))
                order = self._next_order()
                continue
            start = time.perf_counter()
            merged = self._reduce(order)
            self.communicate_seconds += time.perf_counter() - start
            if not merged:
                self._report(Report(ReportKind.UNDONE, index=order.index))
            order = self._next_order()
        if order.kind == OrderKind.TRAIN and not merged:
            start = time.perf_counter()
            pulls = [self._comm.Irecv(part, server, MERGED) for server, part in self._cut(model)]
            for pull in pulls:
                wait_until(pull.Test)
            self.communicate_seconds += time.perf_counter() - start
        return order

    async def exchange(self, report: Report, model: Tensor) -> Order:
        self._report(report)
        parts = self._cut(model)
        pushes = [self._comm.Isend(part, server, MODEL) for server, part in parts]
        order = self._next_order()
        start = time.perf_counter()
        pulls = []
        for push, (server, part) in zip(pushes, parts, strict=True):
            wait_until(push.Test)  # it must have left before it may be overwritten
            if order.kind == OrderKind.TRAIN:
                pulls.append(self._comm.Irecv(part, server, MERGED))
        for pull in pulls:
            wait_until(pull.Test)
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
        self._groups.free()

    def _reduce(self, order: Order) -> bool:
        """Take part in a reduction; whether it came to its end here."""
        contribution = self._contribution
        try:
            if order.regroup:
                groups = self._regrouped(order)
                if groups is None:
                    return False
                self._groups = groups
            scaled = contribution.scaled(order.weight)
            with self._groups.watched(self._patience):
                self._reduce_within(self._groups, scaled, contribution.model)
        except MPI.Exception as error:
            raise_unless_failure(error)
            self._groups.revoke()
            return False
        return True

    def _regrouped(self, order: Order) -> Groups | None:
        if order.position >= 0:
            return Groups.of_newcomer(self._comm, order.newcomers - order.position - 1)
        return self._groups.of_survivors([self._comm] * order.newcomers)

    def _reduce_within(self, groups: Groups, scaled: Tensor, out: Tensor) -> None:
        """Add up the scaled models of all workers in `out`."""
        own, total = self._reduce_scatter(groups.workers, scaled)
        cut = Slices(out.numel(), self._servers).interleaved()
        pushes = []
        for server, part in cut:
            both = overlap(part, own)
            if both.start < both.stop:
                values = total[both.start - own.start : both.stop - own.start]
                group = groups.of_server[server]
                pushes.append(Sent(group, SERVER, group.Isend(values, SERVER, MODEL)))
        for server, part in cut:
            group = groups.of_server[server]
            if tolerates_failures():
                pass_on(group, out[part])
            else:
                group.Bcast(out[part], SERVER)
        wait_sent(pushes)

    def _reduce_scatter(self, group: MPI.Comm, scaled: Tensor) -> tuple[slice, Tensor]:
        """The sum of all workers' models within this worker's share of it; which share that is."""
        shares = [share_of_sum(scaled.numel(), worker, group.size) for worker in range(group.size)]
        own = shares[group.rank]
        total = torch.empty(own.stop - own.start)
        group.Reduce_scatter(scaled, total, [share.stop - share.start for share in shares])
        return own, total

    def _cut(self, model: Tensor) -> list[tuple[int, Tensor]]:
        """The parts of `model` with their servers, which take turns."""
        cut = Slices(model.numel(), self._servers).interleaved()
        return [(server, model[part]) for server, part in cut]

    def _report(self, report: Report) -> None:
        self._comm.Send([report.pack(), MPI.BYTE], SERVER, REPORT)

    def _next_order(self) -> Order:
        start = time.perf_counter()
        self._order_request.Start()
        wait_until(self._order_request.Test)
        self.wait_seconds += time.perf_counter() - start
        return Order.unpack(self._order)
