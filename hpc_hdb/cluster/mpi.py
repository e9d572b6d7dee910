"""The link between MPI ranks, over mpi4py: typed buffers only, no pickle. The workers' end.

A model travels in parts, each a message of its own. A worker sends all parts of its commit at
once, in turn to the servers; a server merges each as it arrives and sends it straight back. So
the merge, the way there and the way back overlap. A bulk-synchronous merge is an MPI
reduce-scatter among the workers, a gather of the sum to the servers, and a broadcast of each part
by the server that keeps it: no rank moves more than a few models' worth of bytes, however many
workers there are. The reduction does not involve the servers, so their number does not change the
order in which MPI adds.

Of a bulk-synchronous merge in which a rank dies nothing remains: who notices revokes the groups
in which it is done, so that all come out of it; each tells the root, which lets the rest form new
groups and do it again.

A waiting rank tests its requests and sleeps in between, instead of spinning inside MPI: it
must not take the core (or, oversubscribed, the turn) of a rank that trains.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.failures import Addresses, raise_unless_failure
from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.cluster.slices import Slices, overlap, share_of_sum
from hpc_hdb.errors import UserError

REPORT, MODEL, ORDER, MERGED, INTERRUPT, INSTRUCTION, SLICE, _PORT = range(1, 9)
"""Tags of the messages."""

_LAUNCHER = os.getppid()
SPIN_SECONDS = 0.02
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


def library() -> str:
    """Name and version of the MPI library, such as "Open MPI v5.0.11"."""
    line = MPI.Get_library_version().split(",")[0].split("\n")[0]
    return " ".join(line.strip("\0").split())


def wait_until(
    done: Callable[[], bool], timeout: float = float("inf"), eagerly: float = SPIN_SECONDS
) -> bool:
    """Wait for `done`, so many seconds eagerly, then asleep; False after `timeout` seconds.

    A rank whose launcher has been killed ends here: nobody else would end it.
    """
    start = time.perf_counter()
    sleep = 5e-5
    while not done():
        waited = time.perf_counter() - start
        if waited > timeout:
            return False
        if waited < eagerly:
            os.sched_yield()
        elif os.getppid() != _LAUNCHER:
            os._exit(1)
        else:
            time.sleep(sleep)
            sleep = min(sleep * 1.5, _LONGEST_SLEEP)
    return True


@dataclass(frozen=True)
class Groups:
    """Communicators within that of servers and workers; every rank of it makes them at once.

    Attributes
    ----------
    everyone : MPI.Intracomm
        Servers and workers.
    workers : MPI.Comm
        All workers.
    of_server : list of MPI.Comm
        Each server with all workers, it first.
    """

    everyone: MPI.Intracomm
    workers: MPI.Comm
    of_server: list[MPI.Comm]

    @classmethod
    def split(cls, comm: MPI.Intracomm, servers: int) -> Groups:
        """A communicator of which this rank is no member is null."""
        workers = set(range(servers, comm.size))

        def group(ranks: set[int]) -> MPI.Comm:
            return comm.Split(0 if comm.rank in ranks else MPI.UNDEFINED)

        return cls(comm, group(workers), [group({server} | workers) for server in range(servers)])

    def of_survivors(self, bridges: Sequence[MPI.Intracomm]) -> Groups | None:
        """Those of the ranks that are left (one server); None if one died meanwhile.

        Every rank that is left calls this at once, and all get groups or none does.

        Parameters
        ----------
        bridges : sequence of MPI.Intracomm
            One for each newcomer that is to take part as well, which calls `of_newcomer`: between
            the server and it. At a worker they may be any.
        """
        groups = None
        try:
            survivors = MPI.Intracomm(self.everyone.Shrink())
        except MPI.Exception as error:
            raise_unless_failure(error)
            return None
        try:
            groups = self.split(_admit(survivors, bridges), servers=1)
        except MPI.Exception as error:
            raise_unless_failure(error)
        try:
            agreed = survivors.Agree(int(groups is not None))
        except MPI.Exception as error:
            raise_unless_failure(error)
            agreed = 0
        if groups is not None and not agreed:
            groups.revoke()  # newcomers have not heard
        return groups if agreed else None

    @classmethod
    def of_newcomer(cls, bridge: MPI.Intracomm, following: int) -> Groups | None:
        """What `of_survivors` gives the others; `following` newcomers come after this one."""
        try:
            port = bytearray(MPI.MAX_PORT_NAME)
            bridge.Recv([port, MPI.BYTE], SERVER, _PORT)
            comm = MPI.COMM_SELF.Connect(port.rstrip(b"\0").decode()).Merge(high=True)
            return cls.split(_admit(comm, [bridge] * following), servers=1)
        except MPI.Exception as error:
            raise_unless_failure(error)
            return None

    @contextlib.contextmanager
    def watched(self, patience: float) -> Iterator[None]:
        """Revoke the groups if what is done meanwhile takes longer than `patience` seconds.

        A rank that hangs holds up all others in a collective call, where they notice nothing.
        """
        if math.isinf(patience):
            yield
            return
        timer = threading.Timer(patience, self.revoke)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def revoke(self) -> None:
        """Let every rank come out of what it does in these groups."""
        for group in (self.workers, *self.of_server):
            if group != MPI.COMM_NULL:
                group.Revoke()

    def free(self) -> None:
        for group in (self.workers, *self.of_server):
            if group != MPI.COMM_NULL:
                group.Free()


def _admit(comm: MPI.Intracomm, bridges: Sequence[MPI.Intracomm]) -> MPI.Intracomm:
    """A communicator with one rank more for each bridge, which all of `comm` make at once."""
    for bridge in bridges:
        port = ""
        if comm.rank == SERVER:
            port = MPI.Open_port()
            bridge.Send([port.encode().ljust(MPI.MAX_PORT_NAME, b"\0"), MPI.BYTE], 1, _PORT)
        # Not Create_intercomm: after a loss, Open MPI 5.0.11 hands out broken communicators there.
        comm = comm.Accept(port, root=SERVER).Merge(high=False)
        if port:
            MPI.Close_port(port)
    return comm


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
            Addresses(comm)  # the root's is of use
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
                pushes.append(groups.of_server[server].Isend(values, SERVER, MODEL))
        for server, part in cut:
            groups.of_server[server].Bcast(out[part], SERVER)
        MPI.Request.Waitall(pushes)

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
