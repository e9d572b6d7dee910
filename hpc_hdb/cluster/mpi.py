"""The link between MPI ranks, over mpi4py: typed buffers only, no pickle. What all its ends share.

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

import os
import time
from collections.abc import Callable

from mpi4py import MPI

from hpc_hdb.errors import UserError

REPORT, MODEL, ORDER, MERGED, INTERRUPT, INSTRUCTION, SLICE, CONFIRMED, PORT = range(1, 10)
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
        if os.getppid() != _LAUNCHER:
            os._exit(1)
        waited = time.perf_counter() - start
        if waited > timeout:
            return False
        if waited < eagerly:
            os.sched_yield()
        else:
            time.sleep(sleep)
            sleep = min(sleep * 1.5, _LONGEST_SLEEP)
    return True
