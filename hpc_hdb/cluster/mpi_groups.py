"""Groups of MPI ranks in which bulk-synchronous merges are done, also if ranks are lost in them."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mpi4py import MPI
from torch import Tensor

from hpc_hdb.cluster.failures import failed_ranks, raise_unless_failure
from hpc_hdb.cluster.mpi import MERGED, PORT, wait_until
from hpc_hdb.cluster.roles import SERVER


class Sent(NamedTuple):
    """A message on its way to a rank of a group.

    Such a one is not tested, but asked for its status. In a revoked group a test would give it up
    while MPI is still at it, which then ends the process (Open MPI 5.0.11).
    """

    group: MPI.Comm
    rank: int
    request: MPI.Request

    def lost(self) -> bool:
        """Whether the rank has died before it had it all."""
        return not self.request.Get_status() and self.rank in failed_ranks(self.group)

    def is_over(self) -> bool:
        """Whether it has arrived or failed, or its rank has died."""
        return self.request.Get_status() or self.lost()


def wait_sent(messages: Sequence[Sent], patience: float = float("inf")) -> bool:
    """Wait until messages have left; False if that takes longer than `patience` seconds.

    Raises
    ------
    MPI.Exception
        If one has failed.
    """
    if not wait_until(lambda: all(message.is_over() for message in messages), patience):
        return False
    for message in messages:
        if message.lost():  # its request is left as it is
            raise MPI.Exception(MPI.ERR_PROC_FAILED)
        message.request.Wait()
    return True


def forward(group: MPI.Comm, values: Tensor) -> list[Sent]:
    """Send `values` on to the ranks below this one in a binomial tree, whose root is the first.

    In place of a broadcast where ranks may hang: that would keep whoever sends to such a rank
    within MPI, out of which not even `Groups.revoke` gets it.
    """
    lowest = group.rank & -group.rank or group.size
    below = [group.rank + (1 << bit) for bit in range((lowest - 1).bit_length())]
    return [
        Sent(group, rank, group.Isend(values, rank, MERGED))
        for rank in reversed(below)
        if rank < group.size
    ]


def pass_on(group: MPI.Comm, values: Tensor) -> None:
    """Receive what the first rank of a group has begun to `forward`, and send it on."""
    above = group.rank & (group.rank - 1)
    wait_until(group.Irecv(values, above, MERGED).Test)
    wait_sent(forward(group, values))


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
        """Those of the ranks that are left, all servers among them; None if one died meanwhile.

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
            groups = self.split(_admit(survivors, bridges), max(1, len(self.of_server)))
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
            bridge.Recv([port, MPI.BYTE], SERVER, PORT)
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
            bridge.Send([port.encode().ljust(MPI.MAX_PORT_NAME, b"\0"), MPI.BYTE], 1, PORT)
        # Not Create_intercomm: after a loss, Open MPI 5.0.11 hands out broken communicators there.
        comm = comm.Accept(port, root=SERVER).Merge(high=False)
        if port:
            MPI.Close_port(port)
    return comm
