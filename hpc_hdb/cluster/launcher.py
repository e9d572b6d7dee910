"""Whether a launcher (mpirun, srun) started this process, and how a rank leaves on an error."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from hpc_hdb.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID")

_FAILED = 7
"""Tag of the empty messages, on COMM_WORLD, by which failing ranks agree who speaks."""
_SERVER_MOMENT, _WORKER_MOMENT = 0.2, 1.0
_FORWARD_SECONDS = 0.2
_PATIENCE = 5.0


class Launched(NamedTuple):
    """What the launcher says of this process."""

    rank: int
    size: int


def find_launcher() -> Launched | None:
    """Rank and number of processes by the launcher's environment; None if started by hand.

    A Slurm step of one task counts as that: it is mostly a shell, of ``srun --pty`` or salloc.
    """
    in_step = os.environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in os.environ
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"]) if in_step else 0
    for rank, size in _VARIABLES:
        if rank in os.environ and size in os.environ:
            launched = Launched(int(os.environ[rank]), int(os.environ[size]))
            if (rank, launched.size, tasks) != ("PMI_RANK", 1, 1):
                return launched
    return Launched(int(os.environ["SLURM_PROCID"]), tasks) if tasks > 1 else None


def check_mpi(launched: Launched) -> None:
    """Start MPI, and raise UserError where it cannot or does not see the launcher's ranks."""
    size = load_mpi().COMM_WORLD.size
    if size != launched.size:
        raise UserError(
            f"{launched.size} processes were started, but MPI sees {size}: launcher and MPI "
            "library do not fit; use the mpirun of the library that mpi4py loads, or srun with the "
            "--mpi plugin it speaks"
        )


def load_mpi() -> ModuleType:
    """``mpi4py.MPI``, whose import starts MPI; raises UserError where there is no MPI library."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpi4py finds no MPI library ({str(error).splitlines()[0]}): load your cluster's "
            "MPI module, or pip install 'hpc-hdb[mpi]'"
        ) from None
    return MPI


def leave(error: BaseException) -> NoReturn:
    """End this process because of `error`, and with it all ranks of its job.

    A UserError is printed as one line, what nobody foresaw as a traceback. The same error often
    strikes many ranks at once: one of them speaks for all.
    """
    status = exit_status(error)
    world = _running_world()
    if world is None:
        if _speaks_without_mpi():
            describe(error)
        sys.exit(status)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher may end this rank at once
    if _speaks_for_all(world):
        describe(error)
        time.sleep(_FORWARD_SECONDS)  # lets the launcher pass the line on before it ends the job
    else:
        time.sleep(_PATIENCE)  # the one that speaks ends this rank too
    if len(_lost(world)) == world.size - 1:
        os._exit(status)  # MPI would end the job with 0
    world.Abort(status)
    sys.exit(status)


def exit_status(error: BaseException) -> int:
    """With which a process ends because of `error`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, UserError) else 1


def _running_world() -> MPI.Intracomm | None:
    """All ranks of the job; None where MPI does not run, or not with other ranks."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return None
    return mpi.COMM_WORLD


def _speaks_without_mpi() -> bool:
    """Whether this process is to print its error: the first of the job, or of a node.

    What fails before MPI runs fails on whole nodes. The others wait: a launcher ends the job as
    soon as one process fails, and the first must have spoken by then.
    """
    launched = find_launcher()
    if launched is None or launched.rank == 0:
        return True
    time.sleep(_PATIENCE)
    return next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), "") == "0"


def _speaks_for_all(world: MPI.Intracomm) -> bool:
    """Whether this rank is to print its error: the lowest of those that fail about now.

    Each failing rank tells the higher ones, and waits a moment to be told by a lower one. The one
    that then speaks tells the lower ones too, in case they fail before the job is torn down.
    """
    try:
        notes = [_tell(world, rank) for rank in range(world.rank + 1, world.size)]
        if _is_told(world, _WORKER_MOMENT if world.rank else _SERVER_MOMENT):
            return False
        notes += [_tell(world, rank) for rank in range(world.rank)]
        for note in notes:
            note.Test()  # lets MPI send it
    except Exception:  # MPI itself may be what has failed
        return True
    return True


def _tell(world: MPI.Intracomm, rank: int) -> MPI.Request:
    from mpi4py import MPI

    try:
        return world.Isend(bytearray(0), rank, _FAILED)
    except MPI.Exception:  # that one is gone
        return MPI.REQUEST_NULL


def _is_told(world: MPI.Intracomm, seconds: float) -> bool:
    """Whether another failing rank makes itself heard within `seconds`."""
    others = set(range(world.size)) - {world.rank} - _lost(world)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if any(world.Iprobe(rank, _FAILED) for rank in others):
            return True
        time.sleep(0.01)
    return False


def _lost(world: MPI.Intracomm) -> set[int]:
    """Ranks that have died."""
    from hpc_hdb.cluster.failures import failed_ranks

    return failed_ranks(world)


def describe(error: BaseException) -> None:
    """Tell the user of it: a UserError in one line, what nobody foresaw as a traceback."""
    if sys.stderr is None or isinstance(error, KeyboardInterrupt | SystemExit):
        return
    try:
        if isinstance(error, UserError):
            print(f"hdb: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
        elif isinstance(error, OSError):
            where = f": {error.filename}" if error.filename else ""
            print(f"hdb: {error.strerror or error}{where}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
            sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads it any more
        sys.stderr = None  # else Python fails on it again at the end
