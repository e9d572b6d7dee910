"""The link between MPI ranks: the servers' ends. See `hpc_hdb.cluster.mpi`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.messages import Instruction, Order, Report, ReportKind
from hpc_hdb.cluster.mpi import (
    INSTRUCTION,
    INTERRUPT,
    MERGED,
    MODEL,
    ORDER,
    REPORT,
    SLICE,
    Groups,
    wait_until,
)
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.cluster.slices import Slices, overlap, share_of_sum

_AHEAD = 3
"""Parts that arrive at a time. Within a node the receiver copies a part as soon as it may: were
all expected at once, it would copy all before it merged the first."""


@dataclass
class _Sending:
    """A message on its way, and what must not change or be freed meanwhile."""

    request: MPI.Request
    data: Tensor | bytearray


class _MpiSliceLink:
    """What all servers' ends share; see `hpc_hdb.cluster.link.SliceLink`."""

    parts: Sequence[slice] = ()

    def __init__(self, comm: MPI.Intracomm, servers: int) -> None:
        self.servers = servers
        self.workers = comm.size - servers
        self._comm = comm
        self._groups = Groups.split(comm, servers)
        self._sending: list[_Sending] = []
        self._size = self._begin = 0

    @property
    def begin(self) -> int:
        return self._begin

    async def receive(self, worker: int, out: Tensor) -> AsyncIterator[slice]:
        rank = self._rank(worker)
        requests: deque[MPI.Request] = deque()
        for number, part in enumerate(self.parts):
            for ahead in self.parts[number + len(requests) : number + _AHEAD]:
                requests.append(self._comm.Irecv(out[ahead], rank, MODEL))
            wait_until(requests.popleft().Test)
            yield part

    def send(self, worker: int, model: Tensor, part: slice) -> None:
        self._keep(self._comm.Isend(model[part], self._rank(worker), MERGED), model)

    async def reduce(self, out: Tensor) -> AsyncIterator[slice]:
        requests = [self._receive_sum(out, part) for part in self.parts]
        for of_part, part in zip(requests, self.parts, strict=True):
            MPI.Request.Waitall(of_part)
            yield part

    def broadcast(self, model: Tensor, part: slice) -> None:
        self._groups.of_server[self._comm.rank].Bcast(model[part], SERVER)

    def sending(self, model: Tensor) -> bool:
        # All at once: an idle MPI gives its core away at every test.
        arrived = MPI.Request.Testsome([item.request for item in self._sending]) or ()
        for number in sorted(arrived, reverse=True):
            del self._sending[number]
        return any(item.data is model for item in self._sending)

    def close(self) -> None:
        """Wait until everything has left."""
        for item in self._sending:
            wait_until(item.request.Test)
        self._groups.free()

    def _receive_sum(self, out: Tensor, part: slice) -> list[MPI.Request]:
        """Receive a part of the sum from the workers that have added it up."""
        requests = []
        for worker in range(self.workers):
            share = share_of_sum(self._size, worker, self.workers)
            both = overlap(share, slice(self._begin + part.start, self._begin + part.stop))
            if both.start < both.stop:
                values = out[both.start - self._begin : both.stop - self._begin]
                requests.append(self._comm.Irecv(values, self._rank(worker + 1), MODEL))
        return requests

    def _rank(self, worker: int) -> int:
        return worker + self.servers - 1

    def _keep(self, request: MPI.Request, data: Tensor | bytearray) -> None:
        self._sending.append(_Sending(request, data))

    def _post(self, data: bytearray, rank: int, tag: int) -> None:
        self._keep(self._comm.Isend([data, MPI.BYTE], rank, tag), data)

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

    Attributes
    ----------
    present : set of int
        Workers that have not left.
    """

    def __init__(self, comm: MPI.Intracomm, servers: int = 1) -> None:
        super().__init__(comm, servers)
        self.present = set(range(1, self.workers + 1))
        self._start = time.perf_counter()
        self._reports = [bytearray(Report.layout.size) for _ in range(self.workers)]
        self._requests = [
            comm.Recv_init([data, MPI.BYTE], self._rank(worker), REPORT)
            for worker, data in enumerate(self._reports, start=1)
        ]
        MPI.Prequest.Startall(self._requests)

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

    def order(self, worker: int, order: Order) -> None:
        self._post(order.pack(), self._rank(worker), ORDER)

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
            self._post(data, server, INSTRUCTION)

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
        for worker in range(1, self.workers + 1):
            self._post(bytearray(0), self._rank(worker), INTERRUPT)


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
        self._keep(self._comm.Isend(model, SERVER, SLICE), model)

    def close(self) -> None:
        self._request.Free()
        super().close()
