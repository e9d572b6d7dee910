"""The link between MPI ranks: what all servers' ends share. See `hpc_hdb.cluster.mpi`."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.failures import (
    Address,
    addresses,
    completed,
    raise_unless_failure,
    tolerates_failures,
)
from hpc_hdb.cluster.link import ReductionBroken, WorkerLost
from hpc_hdb.cluster.mpi import MERGED, MODEL, wait_until
from hpc_hdb.cluster.mpi_groups import Groups, Sent, forward, wait_sent
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.cluster.slices import Slices, overlap, share_of_sum

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


class Endpoint(NamedTuple):
    """Where a worker is reached, and the processes of its ranks, the leader's first."""

    comm: MPI.Intracomm
    rank: int
    processes: list[Address]


class MpiSliceLink:
    """What all servers' ends share; see `hpc_hdb.cluster.link.SliceLink`."""

    parts: Sequence[slice] = ()

    def __init__(self, comm: MPI.Intracomm, servers: int) -> None:
        self.servers = servers
        self.workers = comm.size - servers
        self.patience = float("inf")
        self._comm = comm
        self._groups = Groups.split(comm, servers)
        self._addresses = addresses(comm)
        self._endpoints = {
            rank - servers + 1: Endpoint(comm, rank, [self._addresses[rank]])
            for rank in range(servers, comm.size)
        }
        self._sending: list[_Sending] = []
        self._forwarded: list[tuple[Sent, Tensor]] = []
        self._broken = False
        self._size = self._begin = 0

    @property
    def begin(self) -> int:
        return self._begin

    async def receive(self, worker: int, out: Tensor) -> AsyncIterator[slice]:
        endpoint = self._endpoints[worker]
        requests: deque[MPI.Request] = deque()
        try:
            for number, part in enumerate(self.parts):
                for ahead in self.parts[number + len(requests) : number + _AHEAD]:
                    requests.append(endpoint.comm.Irecv(out[ahead], endpoint.rank, MODEL))
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
        endpoint = self._endpoints[worker]
        self._keep(endpoint.comm, model[part], endpoint.rank, MERGED, model)

    async def reduce(self, out: Tensor) -> AsyncIterator[slice]:
        group = self._groups.of_server[self._comm.rank]
        requests: list[list[MPI.Request]] = []
        self._broken = False
        try:
            requests += (self._receive_sum(group, out, part) for part in self.parts)
            for of_part, part in zip(requests, self.parts, strict=True):
                if not wait_until(functools.partial(MPI.Request.Testall, of_part), self.patience):
                    raise ReductionBroken
                yield part
                if self._broken:
                    raise ReductionBroken
        except (MPI.Exception, ReductionBroken) as error:
            if isinstance(error, MPI.Exception):
                raise_unless_failure(error)
            self._groups.revoke()
            for request in (request for of_part in requests for request in of_part):
                wait_until(functools.partial(completed, request))
            raise ReductionBroken from None

    def broadcast(self, model: Tensor, part: slice) -> None:
        group = self._groups.of_server[self._comm.rank]
        if not tolerates_failures():
            group.Bcast(model[part], SERVER)
            return
        messages: list[Sent] = []
        try:
            messages = forward(group, model[part])
            if wait_sent(messages, self.patience):
                return
        except MPI.Exception as error:
            raise_unless_failure(error)
        self._forwarded += [(message, model) for message in messages]
        self._broken = True

    def fence(self, worker: int) -> None:
        """End a worker that does not answer."""
        raise NotImplementedError

    def _regroup(self, bridges: Sequence[MPI.Intracomm]) -> bool:
        groups = self._groups.of_survivors(bridges)
        if groups is not None:
            self._groups = groups
        return groups is not None

    def sending(self, model: Tensor) -> bool:
        self._forwarded = [item for item in self._forwarded if not item[0].is_over()]
        # All at once: an idle MPI gives its core away at every test.
        try:
            arrived = MPI.Request.Testsome([item.request for item in self._sending]) or ()
        except MPI.Exception as error:
            raise_unless_failure(error)
            self._sending = [item for item in self._sending if not completed(item.request)]
        else:
            for number in sorted(arrived, reverse=True):
                del self._sending[number]
        leaving = [item.data for item in self._sending] + [data for _, data in self._forwarded]
        return any(data is model for data in leaving)

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
