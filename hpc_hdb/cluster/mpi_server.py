"""The link between MPI ranks: the servers' ends. See `hpc_hdb.cluster.mpi`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.failures import (
    Address,
    addresses,
    failed_ranks,
    raise_unless_failure,
    tolerates_failures,
)
from hpc_hdb.cluster.messages import Instruction, Order, Report, ReportKind
from hpc_hdb.cluster.mpi import (
    CONFIRMED,
    INSTRUCTION,
    INTERRUPT,
    ORDER,
    REPORT,
    SLICE,
    SPIN_SECONDS,
    wait_until,
)
from hpc_hdb.cluster.mpi_slices import Endpoint, MpiSliceLink
from hpc_hdb.cluster.roles import SERVER
from hpc_hdb.cluster.slices import Slices
from hpc_hdb.errors import UserError


class MpiServerLink(MpiSliceLink):
    """The root server's end of the link; see `hpc_hdb.cluster.link.ServerLink`.

    Parameters
    ----------
    comm, servers
        As in `hpc_hdb.cluster.mpi_worker.MpiWorkerLink`.
    recruit : callable, optional
        Starts a process in place of a worker, given its number and where the ranks of `comm`
        run; a communicator of this rank and the new one, or None where that cannot be done.
    partners : mapping of int to sequence of Address, optional
        The processes that share each worker's batches with the one that leads, which is in `comm`.

    Attributes
    ----------
    present : set of int
        Workers that have neither left nor died.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        servers: int = 1,
        recruit: Callable[[int, list[Address]], MPI.Intracomm | None] | None = None,
        partners: Mapping[int, Sequence[Address]] | None = None,
    ) -> None:
        super().__init__(comm, servers)
        for worker, processes in (partners or {}).items():
            self._endpoints[worker].processes.extend(processes)
        self._recruit = recruit
        self.present = set(range(1, self.workers + 1))
        self._start = time.perf_counter()
        self._lost: deque[int] = deque()
        self._quiet = False
        self._arrived = MPI.UNDEFINED
        self._reports = [bytearray(Report.layout.size) for _ in range(self.workers)]
        self._requests = [self._listen(worker) for worker in sorted(self.present)]
        self._done = [bytearray(1) for _ in range(1, self.servers)]
        self._confirmations = [
            comm.Recv_init([done, MPI.BYTE], server, CONFIRMED)
            for server, done in enumerate(self._done, start=1)
        ]
        if tolerates_failures():  # listened to all the time, so that a server's end is noticed
            MPI.Prequest.Startall(self._confirmations)
            self._requests += self._confirmations

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
        if failed and min(failed) < self.servers:
            raise MPI.Exception(MPI.ERR_PROC_FAILED)  # a server, and its slice of the model with it
        for worker in sorted(self.present):
            endpoint = self._endpoints[worker]
            here = endpoint.comm is self._comm
            if endpoint.rank in (failed if here else failed_ranks(endpoint.comm)):
                self._forget(worker)

    def _listen(self, worker: int) -> MPI.Prequest:
        """Wait for the worker's next report."""
        endpoint = self._endpoints[worker]
        data = [self._reports[worker - 1], MPI.BYTE]
        request = endpoint.comm.Recv_init(data, endpoint.rank, REPORT)
        request.Start()
        return request

    def _forget(self, worker: int) -> None:
        """A worker is gone: say so once, and listen no more to it."""
        if worker in self.present:
            self.present.discard(worker)
            self._lost.append(worker)
            self._requests[worker - 1] = MPI.Prequest()

    def order(self, worker: int, order: Order) -> None:
        endpoint = self._endpoints[worker]
        self._post(endpoint.comm, order.pack(), endpoint.rank, ORDER)

    def fence(self, worker: int) -> None:
        endpoint = self._endpoints[worker]
        if not tolerates_failures():
            raise UserError(
                f"worker {worker} ({endpoint.processes[0]}) does not answer, and the MPI of this "
                "job has no fault tolerance with which to go on without it (mpirun --with-ft "
                "ulfm); resume the run"
            )
        leader, *partners = endpoint.processes
        if not leader.kill():
            self._forget(worker)  # it went without a word to MPI
        for partner in partners:
            partner.kill()

    def replace(self, worker: int) -> bool:
        comm = self._recruit(worker, self._addresses) if self._recruit else None
        if comm is None:
            return False
        self._endpoints[worker] = Endpoint(comm, 1, addresses(comm)[1:])
        self._requests[worker - 1] = self._listen(worker)
        self.present.add(worker)
        return True

    def regroup(self, newcomers: Sequence[int]) -> bool:
        return self._regroup([self._endpoints[worker].comm for worker in newcomers])

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

    async def confirmed(self, worker: int) -> bool:
        if not tolerates_failures():
            return True
        for request in self._confirmations:
            if not wait_until(request.Test, self.patience):
                if worker:
                    self.fence(worker)
                else:
                    self._groups.revoke()
                wait_until(request.Test)
            request.Start()
        return all(done[0] for done in self._done)

    async def collect(self, own: Tensor, out: Tensor) -> None:
        slices = Slices(self._size, self.servers)
        requests = [
            self._comm.Irecv(out[slice(*slices.bounds(server))], server, SLICE)
            for server in range(1, self.servers)
        ]
        out[slice(*slices.bounds(SERVER))] = own
        for request in requests:
            wait_until(request.Test)

    def close(self) -> None:
        for request in self._confirmations:
            if tolerates_failures():
                request.Cancel()
                request.Wait()
            request.Free()
        super().close()

    def interrupt(self) -> None:
        for worker in self.present:
            endpoint = self._endpoints[worker]
            self._post(endpoint.comm, bytearray(0), endpoint.rank, INTERRUPT)


class MpiFollowerLink(MpiSliceLink):
    """Another server's end of the link; see `hpc_hdb.cluster.link.FollowerLink`.

    Parameters
    ----------
    comm, servers, patience
        As in `hpc_hdb.cluster.mpi_worker.MpiWorkerLink`.
    """

    def __init__(self, comm: MPI.Intracomm, servers: int, patience: float = float("inf")) -> None:
        super().__init__(comm, servers)
        self.patience = patience
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

    def fence(self, worker: int) -> None:
        """Leave it to the root, which waits as long for what this server has to confirm."""

    def confirm(self, done: bool) -> None:
        if tolerates_failures():
            self._post(self._comm, bytearray([done]), SERVER, CONFIRMED)

    def regroup(self) -> None:
        self._regroup([])

    def close(self) -> None:
        self._request.Free()
        super().close()
