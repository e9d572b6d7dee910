"""The link between MPI ranks: the servers' ends. See `hpc_hdb.cluster.mpi`."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.failures import (
    Addresses,
    completed,
    failed_ranks,
    raise_unless_failure,
    tolerates_failures,
)
from hpc_hdb.cluster.link import ReductionBroken, WorkerLost
from hpc_hdb.cluster.messages import Instruction, Order, Report, ReportKind
from hpc_hdb.cluster.mpi import (
    INSTRUCTION,
    INTERRUPT,
    MERGED,
    MODEL,
    ORDER,
    REPORT,
    SLICE,
    SPIN_SECONDS,
    Groups,
    wait_until,
)
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.cluster.slices import Slices, overlap, share_of_sum
from hpc_hdb.errors import UserError

_DEATH_SECONDS = 10.0
"""Within which MPI tells of a rank that has been killed."""
_AHEAD = 3
"""Parts that arrive at a time. Within a node the receiver copies a part as soon as it may: were
all expected at once, it would copy all before it merged the first."""


@dataclass
class _Sending:
    """A message on its way, and what must not change or be freed meanwhile."""

    request: MPI.Request
    data: Tensor | bytearray


class _Place(NamedTuple):
    """Where a worker is reached."""

    comm: MPI.Intracomm
    rank: int
    addresses: Addresses


class _MpiSliceLink:
    """What all servers' ends share; see `hpc_hdb.cluster.link.SliceLink`."""

    parts: Sequence[slice] = ()

    def __init__(self, comm: MPI.Intracomm, servers: int) -> None:
        self.servers = servers
        self.workers = comm.size - servers
        self.patience = float("inf")
        self._comm = comm
        self._groups = Groups.split(comm, servers)
        self._addresses = Addresses(comm)
        self._places = {
            worker: _Place(comm, worker + servers - 1, self._addresses)
            for worker in range(1, self.workers + 1)
        }
        self._sending: list[_Sending] = []
        self._size = self._begin = 0

    @property
    def begin(self) -> int:
        return self._begin

    async def receive(self, worker: int, out: Tensor) -> AsyncIterator[slice]:
        place = self._places[worker]
        requests: deque[MPI.Request] = deque()
        try:
            for number, part in enumerate(self.parts):
                for ahead in self.parts[number + len(requests) : number + _AHEAD]:
                    requests.append(place.comm.Irecv(out[ahead], place.rank, MODEL))
                if not wait_until(requests[0].Test, self.patience):
                    self.fence(worker)
                    if not wait_until(requests[0].Test, _DEATH_SECONDS):
                        raise WorkerLost(worker)
                requests.popleft()
                yield part
        except MPI.Exception as error:
            raise_unless_failure(error)
            for request in requests:  # they write into `out`
                wait_until(functools.partial(completed, request))
            raise WorkerLost(worker) from None

    def send(self, worker: int, model: Tensor, part: slice) -> None:
        place = self._places[worker]
        self._keep(place.comm, model[part], place.rank, MERGED, model)

    async def reduce(self, out: Tensor) -> AsyncIterator[slice]:
        group = self._groups.of_server[self._comm.rank]
        requests: list[list[MPI.Request]] = []
        try:
            requests += (self._receive_sum(group, out, part) for part in self.parts)
            for of_part, part in zip(requests, self.parts, strict=True):
                if not wait_until(functools.partial(MPI.Request.Testall, of_part), self.patience):
                    raise ReductionBroken
                yield part
        except (MPI.Exception, ReductionBroken) as error:
            if isinstance(error, MPI.Exception):
                raise_unless_failure(error)
            self._groups.revoke()
            for request in (request for of_part in requests for request in of_part):
                wait_until(functools.partial(completed, request))
            raise ReductionBroken from None

    def broadcast(self, model: Tensor, part: slice) -> None:
        try:
            with self._groups.watched(self.patience):
                self._groups.of_server[self._comm.rank].Bcast(model[part], SERVER)
        except MPI.Exception as error:
            raise_unless_failure(error)
            self._groups.revoke()  # shows in what comes next

    def fence(self, worker: int) -> None:
        """End a worker that does not answer; only the root may."""
        raise NotImplementedError

    def sending(self, model: Tensor) -> bool:
        # All at once: an idle MPI gives its core away at every test.
        try:
            arrived = MPI.Request.Testsome([item.request for item in self._sending]) or ()
        except MPI.Exception as error:
            raise_unless_failure(error)
            self._sending = [item for item in self._sending if not completed(item.request)]
        else:
            for number in sorted(arrived, reverse=True):
                del self._sending[number]
        return any(item.data is model for item in self._sending)

    def close(self) -> None:
        """Wait until everything has left."""
        for item in self._sending:
            wait_until(functools.partial(completed, item.request))
        self._groups.free()

    def _receive_sum(self, group: MPI.Comm, out: Tensor, part: slice) -> list[MPI.Request]:
        """Receive a part of the sum from the workers that have added it up."""
        requests = []
        workers = group.size - 1
        for worker in range(workers):
            share = share_of_sum(self._size, worker, workers)
            both = overlap(share, slice(self._begin + part.start, self._begin + part.stop))
            if both.start < both.stop:
                values = out[both.start - self._begin : both.stop - self._begin]
                requests.append(group.Irecv(values, worker + 1, MODEL))
        return requests

    def _keep(
        self, comm: MPI.Intracomm, message: Any, rank: int, tag: int, data: Tensor | bytearray
    ) -> None:
        """Send `message`, which lies in `data`; to a rank that is gone it goes nowhere."""
        try:
            request = comm.Isend(message, rank, tag)
        except MPI.Exception as error:
            raise_unless_failure(error)
        else:
            self._sending.append(_Sending(request, data))

    def _post(self, comm: MPI.Intracomm, data: bytearray, rank: int, tag: int) -> None:
        self._keep(comm, [data, MPI.BYTE], rank, tag, data)

    def _take_parts(self, size: int) -> tuple[int, int]:
        """Cut a model of `size` floats; the bounds of this server's slice."""
        slices = Slices(size, self.servers)
        begin, end = slices.bounds(self._comm.rank)
        self._size, self._begin = size, begin
        self.parts = [
            slice(part.start - begin, part.stop - begin) for part in slices.parts(self._comm.rank)
        ]
        return begin, end


class MpiServerLink(_MpiSliceLink):
    """The root server's end of the link; see `hpc_hdb.cluster.link.ServerLink`.

    Parameters
    ----------
    comm, servers
        As in `hpc_hdb.cluster.mpi.MpiWorkerLink`.
    recruit : callable, optional
        Starts a process in place of a worker, given its number and where the ranks of `comm`
        run; a communicator of this rank and the new one, or None where that cannot be done.

    Attributes
    ----------
    present : set of int
        Workers that have neither left nor died.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        servers: int = 1,
        recruit: Callable[[int, Addresses], MPI.Intracomm | None] = lambda *_: None,
    ) -> None:
        super().__init__(comm, servers)
        self._recruit = recruit
        self.present = set(range(1, self.workers + 1))
        self._start = time.perf_counter()
        self._lost: deque[int] = deque()
        self._quiet = False
        self._arrived = MPI.UNDEFINED
        self._reports = [bytearray(Report.layout.size) for _ in range(self.workers)]
        self._requests = [self._listen(worker) for worker in sorted(self.present)]

    def now(self) -> float:
        return time.perf_counter() - self._start

    async def next_report(self, timeout: float) -> tuple[int, Report] | None:
        eagerly = 0.0 if self._quiet else SPIN_SECONDS  # once after a commit, not at each call
        self._quiet = True
        if not self._lost and not wait_until(self._has_report, timeout, eagerly):
            return None
        if self._lost:
            return self._lost.popleft(), Report(ReportKind.LOST)
        report = Report.unpack(self._reports[self._arrived])
        self._quiet = report.kind == ReportKind.PROGRESS  # the worker is in the middle of a round
        if report.kind == ReportKind.LEAVE:
            self.present.discard(self._arrived + 1)
        else:
            self._requests[self._arrived].Start()
        return self._arrived + 1, report

    def _has_report(self) -> bool:
        try:
            self._arrived, done = MPI.Request.Testany(self._requests)
        except MPI.Exception as error:
            raise_unless_failure(error)
            self._note_lost()
            return bool(self._lost)
        return done and self._arrived != MPI.UNDEFINED

    def _note_lost(self) -> None:
        """Take account of ranks that have died."""
        failed = failed_ranks(self._comm)
        if failed and self.servers > 1:
            raise UserError(
                f"rank {min(failed)} was lost: with several parameter servers (server.servers) a "
                "run does not go on without it; resume it"
            )
        for worker in sorted(self.present):
            place = self._places[worker]
            if place.rank in (failed if place.comm is self._comm else failed_ranks(place.comm)):
                self._forget(worker)

    def _listen(self, worker: int) -> MPI.Prequest:
        """Wait for the worker's next report."""
        place = self._places[worker]
        data = [self._reports[worker - 1], MPI.BYTE]
        request = place.comm.Recv_init(data, place.rank, REPORT)
        request.Start()
        return request

    def _forget(self, worker: int) -> None:
        """A worker is gone: say so once, and listen no more to it."""
        if worker in self.present:
            self.present.discard(worker)
            self._lost.append(worker)
            self._requests[worker - 1] = MPI.Prequest()

    def order(self, worker: int, order: Order) -> None:
        place = self._places[worker]
        self._post(place.comm, order.pack(), place.rank, ORDER)

    def fence(self, worker: int) -> None:
        place = self._places[worker]
        if not tolerates_failures():
            where = place.addresses.describe(place.rank)
            raise UserError(
                f"worker {worker} ({where}) does not answer, and the MPI of this job has no fault "
                "tolerance with which to go on without it (mpirun --with-ft ulfm); resume the run"
            )
        if not place.addresses.kill(place.rank):
            self._forget(worker)  # it went without a word to MPI

    def replace(self, worker: int) -> bool:
        comm = self._recruit(worker, self._addresses)
        if comm is None:
            return False
        self._places[worker] = _Place(comm, 1, Addresses(comm))
        self._requests[worker - 1] = self._listen(worker)
        self.present.add(worker)
        return True

    def regroup(self, newcomers: Sequence[int] = ()) -> bool:
        groups = self._groups.of_survivors([self._places[worker].comm for worker in newcomers])
        if groups is not None:
            self._groups = groups
        return groups is not None

    def distribute(self, model: Tensor) -> Tensor:
        for server in range(1, self.servers):
            begin, end = Slices(model.numel(), self.servers).bounds(server)
            size = np.array([model.numel()], dtype=np.int64)
            self._comm.Send(size, server, SLICE)
            self._comm.Send(model[begin:end], server, SLICE)
        begin, end = self._take_parts(model.numel())
        return model[begin:end]

    def instruct(self, instruction: Instruction) -> None:
        data = instruction.pack()
        for server in range(1, self.servers):
            self._post(self._comm, data, server, INSTRUCTION)

    async def collect(self, own: Tensor, out: Tensor) -> None:
        slices = Slices(self._size, self.servers)
        requests = [
            self._comm.Irecv(out[slice(*slices.bounds(server))], server, SLICE)
            for server in range(1, self.servers)
        ]
        out[slice(*slices.bounds(SERVER))] = own
        for request in requests:
            wait_until(request.Test)

    def interrupt(self) -> None:
        for worker in self.present:
            place = self._places[worker]
            self._post(place.comm, bytearray(0), place.rank, INTERRUPT)


class MpiFollowerLink(_MpiSliceLink):
    """Another server's end of the link; see `hpc_hdb.cluster.link.FollowerLink`.

    Parameters
    ----------
    comm, servers
        As in `hpc_hdb.cluster.mpi.MpiWorkerLink`.
    """

    def __init__(self, comm: MPI.Intracomm, servers: int) -> None:
        super().__init__(comm, servers)
        self._instruction = bytearray(Instruction.layout.size)
        self._request = comm.Recv_init([self._instruction, MPI.BYTE], SERVER, INSTRUCTION)

    async def first_slice(self) -> Tensor:
        size = np.empty(1, dtype=np.int64)
        wait_until(self._comm.Irecv(size, SERVER, SLICE).Test)
        begin, end = self._take_parts(int(size[0]))
        model = torch.empty(end - begin)
        wait_until(self._comm.Irecv(model, SERVER, SLICE).Test)
        return model

    async def next_instruction(self) -> Instruction:
        self._request.Start()
        wait_until(self._request.Test)
        return Instruction.unpack(self._instruction)

    def hand_in(self, model: Tensor) -> None:
        self._keep(self._comm, model, SERVER, SLICE, model)

    def close(self) -> None:
        self._request.Free()
        super().close()
