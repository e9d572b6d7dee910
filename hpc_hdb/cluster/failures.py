"""Ranks that die: what MPI says of them, and how a rank that does not answer is ended.

An MPI library with user-level fault mitigation (ULFM) reports a lost rank to those that
communicate with it, and lets the others go on. In any other one the launcher ends the whole job.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
from typing import NamedTuple

from mpi4py import MPI

from hpc_hdb.errors import UserError

_FAILURES = {
    getattr(MPI, name)
    for name in (
        *("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED"),
        "ERR_IN_STATUS",  # of a call for several requests, when one of them has failed
        *("ERR_OTHER", "ERR_INTERN", "ERR_UNKNOWN"),  # what Open MPI's collectives make of it
    )
    if hasattr(MPI, name)
}
_CORES = 1024
_ADDRESS = struct.Struct(f"<q64s{_CORES // 8}s")


def tolerates_failures() -> bool:
    """Whether this job goes on without ranks that die: as ``mpirun --with-ft ulfm`` starts it."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "0") in ("1", "true")  # noqa: SIM112


def raise_unless_failure(error: MPI.Exception) -> None:
    """Raise an error again, unless it says that a rank has died or that others have noticed it."""
    if not tolerates_failures() or error.Get_error_class() not in _FAILURES:
        raise error


def failed_ranks(comm: MPI.Comm) -> set[int]:
    """Ranks of `comm` that this one knows to be dead."""
    if not tolerates_failures():
        return set()
    failed = comm.Get_failed()
    ranks = set(MPI.Group.Translate_ranks(failed, None, comm.group))
    failed.Free()
    return ranks


def completed(request: MPI.Request) -> bool:
    """Whether a request has ended, be it in failure."""
    try:
        return request.Test()
    except MPI.Exception as error:
        raise_unless_failure(error)
        return True


class Address(NamedTuple):
    """Where a rank runs."""

    process: int
    host: str
    cores: frozenset[int]
    """Those it may use; of the first 1,024."""

    def pack(self) -> bytes:
        mask = sum(1 << core for core in self.cores if core < _CORES)
        return _ADDRESS.pack(
            self.process, self.host.encode()[:64], mask.to_bytes(_CORES // 8, "little")
        )

    @classmethod
    def unpack(cls, process: int, host: bytes, mask: bytes) -> Address:
        bits = int.from_bytes(mask, "little")
        cores = frozenset(core for core in range(_CORES) if bits >> core & 1)
        return cls(process, host.rstrip(b"\0").decode(), cores)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def kill(self) -> bool:
        """End that rank, whatever state it is in; False if it is no longer there.

        Raises
        ------
        UserError
            If it runs on another node and there is no ``srun`` to reach it.
        """
        if self.host == socket.gethostname():
            try:
                os.kill(self.process, signal.SIGKILL)
            except ProcessLookupError:
                return False
        elif "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
            there = ["--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={self.host}"]
            subprocess.Popen(["srun", *there, "kill", "-KILL", str(self.process)])
        else:
            raise UserError(
                f"a rank ({self}) does not answer and cannot be ended from here: end it by hand, "
                'or set server.silent_worker to "report"'
            )
        return True


def addresses(comm: MPI.Intracomm) -> list[Address]:
    """Where the ranks of a communicator run; all of them ask at once."""
    here = Address(os.getpid(), socket.gethostname(), frozenset(os.sched_getaffinity(0)))
    own = bytearray(here.pack())
    everyone = bytearray(len(own) * comm.size)
    comm.Allgather([own, MPI.BYTE], [everyone, MPI.BYTE])
    return [Address.unpack(*fields) for fields in _ADDRESS.iter_unpack(everyone)]
