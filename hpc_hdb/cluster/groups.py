"""The ranks that share one worker's batches, over Horovod.

Every rank of a group trains its rows of each batch. Horovod adds up their gradients while the
backward pass goes on, so all take the step that one rank would take on the whole batch. The first
rank leads: it alone talks to the server, and passes orders and merged models on
(`hpc_hdb.cluster.group_links`).

Horovod is started on the group's own communicator, so that its process set holds this worker's
ranks and no others: the negotiation that Horovod goes through in every cycle then ties no worker
to another one, nor to the server.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpc_hdb.cluster.failures import Address, addresses, failed_ranks, tolerates_failures
from hpc_hdb.cluster.horovod import load_horovod
from hpc_hdb.cluster.messages import Order, OrderKind
from hpc_hdb.cluster.mpi import wait_until
from hpc_hdb.cluster.roles import place_workers
from hpc_hdb.errors import UserError
from hpc_hdb.plan.cuts import rows_of

_LEADER = 0
_WATCH_SECONDS = 1.0
_LOSS_SECONDS = 3.0
"""Within which MPI tells of a lost rank that Horovod has noticed."""


class Split(NamedTuple):
    """How the ranks of a run are cut into workers.

    Attributes
    ----------
    links : MPI.Intracomm
        Of the servers and the workers' leaders; of no use at other ranks.
    group : MPI.Intracomm or None
        Of the ranks of this rank's worker; None where it is alone, and at a server.
    leads : bool
        Whether this rank belongs to `links`.
    spread : list of int
        Workers whose ranks are not all on one node.
    partners : dict of int to list of Address
        By worker, where its ranks run that do not lead.
    """

    links: MPI.Intracomm
    group: MPI.Intracomm | None
    leads: bool
    spread: list[int]
    partners: dict[int, list[Address]]


def split_workers(comm: MPI.Intracomm, servers: int, ranks_per_worker: int) -> Split:
    """Cut the ranks of `comm` into servers and workers; all of them call this together."""
    if ranks_per_worker == 1:
        return Split(comm, None, True, [], {})
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = np.array([comm.rank], dtype=np.int64)
    node.Allreduce(MPI.IN_PLACE, first, MPI.MIN)
    node.Free()
    nodes = np.empty(comm.size, dtype=np.int64)
    comm.Allgather(first, nodes)
    workers = place_workers(nodes.tolist(), ranks_per_worker, servers)
    of_rank = {rank: number for number, ranks in enumerate(workers, start=1) for rank in ranks}
    number = of_rank.get(comm.rank, 0)
    leads = number == 0 or workers[number - 1][0] == comm.rank
    links = MPI.Intracomm(comm.Split(int(not leads), comm.rank))
    group = MPI.Intracomm(comm.Split(number or MPI.UNDEFINED))
    spread = [n for n, ranks in enumerate(workers, start=1) if len(set(nodes[ranks])) > 1]
    places = addresses(comm)
    partners = {n: [places[rank] for rank in ranks[1:]] for n, ranks in enumerate(workers, start=1)}
    return Split(links, group if number else None, leads, spread, partners)


class RankGroup:
    """This rank among those that share one worker's batches.

    Parameters
    ----------
    comm : MPI.Intracomm
        Of the group, whose first rank leads; not freed here.
    device : torch.device
        On which this rank trains.
    needed_by : str
        The setting that makes the group, for messages.

    Attributes
    ----------
    rank, size : int
    leads : bool

    Raises
    ------
    UserError
        If Horovod does not work here, MPI lacks threads, or only some of the ranks have a GPU.
    """

    def __init__(self, comm: MPI.Intracomm, device: torch.device, needed_by: str) -> None:
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise UserError(
                f"{needed_by} needs an MPI library with full thread support (MPI_THREAD_MULTIPLE), "
                "which this one lacks or was started without: leave MPI4PY_RC_THREAD_LEVEL unset, "
                "or load an MPI built with threads"
            )
        self._hvd = load_horovod(needed_by)
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.leads = comm.rank == _LEADER
        counts = np.array([device.type == "cuda"], dtype=np.int64)
        comm.Allreduce(MPI.IN_PLACE, counts)
        on_gpu = int(counts[0])
        if on_gpu not in (0, comm.size):
            raise UserError(
                f"{needed_by}: of {comm.size} ranks that share a batch only {on_gpu} have a GPU: "
                'start them where each has one, or set train.device to "cpu"'
            )
        self._hvd.init(comm=comm)
        self._partners = addresses(comm)
        del self._partners[comm.rank]
        _end_with_launcher()

    def close(self) -> None:
        """Leave Horovod, together with the whole group."""
        self._hvd.shutdown()

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """Where a run goes on without lost ranks, let the loss of one end the whole group.

        What the others could go on with are batches without some of their rows; and to the server
        the group is one worker, whose end it takes note of.
        """
        from horovod.common.exceptions import HorovodInternalError

        try:
            yield
        except (HorovodInternalError, MPI.Exception):
            if not tolerates_failures() or not wait_until(self._has_lost, _LOSS_SECONDS):
                raise
            for process in self._partners:
                with contextlib.suppress(UserError):
                    process.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    def _has_lost(self) -> bool:
        return bool(failed_ranks(self._comm))

    def rows(self, batch: int) -> slice:
        """This rank's rows of a batch."""
        return rows_of(batch, self.rank, self.size)

    def distribute(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        """Horovod's version of an optimizer: `model`'s gradients become sums over the group."""
        return self._hvd.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters(), op=self._hvd.Sum
        )

    def agree(self, samples: int, stop: bool) -> Callable[[], tuple[int, bool]]:
        """Begin to agree on a step; what is returned waits for the end of that.

        Parameters
        ----------
        samples : int
            How many this rank trains in it.
        stop : bool
            Whether the round is to be given up.

        Returns
        -------
        callable
            Returns how many the group trains, and whether any of its ranks wants to stop.
        """
        handle = self._hvd.allreduce_async_(
            torch.tensor([samples, int(stop)], dtype=torch.int64), op=self._hvd.Sum, name="step"
        )

        def outcome() -> tuple[int, bool]:
            total, stops = self._hvd.synchronize(handle).tolist()
            return total, stops > 0

        return outcome

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the group."""
        return self._hvd.allreduce(values, op=self._hvd.Sum, name="sum")

    def average_(self, values: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the group."""
        if values:
            self._hvd.grouped_allreduce_(list(values), op=self._hvd.Average, name="average")

    def broadcast_(self, model: Tensor) -> None:
        """Overwrite `model` with the leader's."""
        self._hvd.broadcast_(model, _LEADER, name="model")

    def begin_evaluation(self, model: Tensor) -> None:
        """Before the ranks evaluate together: the others learn of it, and all have `model`."""
        if self.leads:
            self.share(Order(OrderKind.EVALUATE).pack())
        self.broadcast_(model)

    def share(self, data: bytes | bytearray | None = None) -> bytes:
        """Bytes of the leader's, who alone gives them; others wait for them asleep."""
        size = np.array([len(data or b"")], dtype=np.int64)
        wait_until(self._comm.Ibcast(size, _LEADER).Test)
        content = bytearray(data) if data else bytearray(int(size[0]))
        self._comm.Bcast([content, MPI.BYTE], _LEADER)
        return bytes(content)

    def share_state(self, state: dict | None) -> dict | None:
        """What the leader has loaded of the optimizer, or None."""
        packed = io.BytesIO()
        if self.leads:
            torch.save(state, packed)
        content = io.BytesIO(self.share(packed.getvalue()))
        return torch.load(content, map_location="cpu", weights_only=True)

    def collect(self, numbers: Sequence[int]) -> list[int]:
        """At the leader the numbers of all ranks, elsewhere none."""
        own = np.array(numbers, dtype=np.int64)
        counts = np.empty(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([len(own)], dtype=np.int64), counts)
        gathered = np.empty(int(counts.sum()) if self.leads else 0, dtype=np.int64)
        if counts.any():
            self._comm.Gatherv(own, [gathered, counts] if self.leads else None, _LEADER)
        return gathered.tolist()


def _end_with_launcher() -> None:
    """Let this process end when its launcher is killed, also while Horovod waits for others."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
