"""A worker that takes the place of one that has died, started by rank 0 in the middle of a run.

Rank 0 waits until the new process has come as far as to MPI, so that does so before it imports
anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from hpc_hdb.cluster.failures import Address, addresses, tolerates_failures
from hpc_hdb.cluster.launcher import describe, exit_status
from hpc_hdb.startup import lasting_imports

if TYPE_CHECKING:
    from hpc_hdb.config import Settings


_SURVIVE = "state_base_recoverable"
"""A setting of Open MPI's launcher, without which it ends a job with any process that was started
in the middle of it."""


def hindrance(settings: Settings) -> str | None:
    """Why lost workers of this job cannot be replaced though that is wanted; None if they can."""
    server = settings.server
    if not server.replacements or server.sync == "allreduce":
        return None
    if server.servers > 1 or server.ranks_per_worker > 1:
        return "that takes one server, and one rank a worker"
    if not tolerates_failures() or not _launcher_was_told(_SURVIVE):
        return f"start with mpirun --with-ft ulfm --prtemca {_SURVIVE} 1"
    return None


def _launcher_was_told(setting: str) -> bool:
    """Whether the launcher has a setting; it does not pass its own environment on."""
    launcher = Path(f"/proc/{os.getppid()}")
    told = (launcher / "environ").read_bytes() + (launcher / "cmdline").read_bytes()
    return setting.encode() in told


def recruiter(job: dict[str, Any]) -> Callable[[int, list[Address]], MPI.Intracomm | None]:
    """What starts replacements in a run with one server and one rank a worker.

    Parameters
    ----------
    job : dict
        What all ranks are told as they start.

    Returns
    -------
    callable
        For `hpc_hdb.cluster.mpi_server.MpiServerLink`.
    """

    def recruit(worker: int, ranks: list[Address]) -> MPI.Intracomm | None:
        own, *workers = ranks[worker], *ranks[1:]
        place = {
            "worker": worker,
            "cores": sorted(own.cores),
            "local_rank": sum(other.host == own.host for other in workers[: worker - 1]),
            "sharing": sum(other[1:] == own[1:] for other in workers),
        }
        words = ["-m", __spec__.name, json.dumps(job | place)]
        # The launcher still counts the lost one's slot as taken; `work` binds to its cores.
        where = {"host": own.host, "map_by": "slot:oversubscribe", "bind_to": "none"}
        try:
            started = MPI.COMM_SELF.Spawn(sys.executable, words, 1, MPI.Info.Create(where))
            return started.Merge(high=False)
        except MPI.Exception:
            return None

    return recruit


def work(comm: MPI.Intracomm, job: dict[str, Any]) -> None:
    """Train until the server says stop.

    Parameters
    ----------
    comm : MPI.Intracomm
        The server, and this rank.
    job : dict
        As `recruiter` extends it.
    """
    with lasting_imports():
        from hpc_hdb.cluster.link import complete
        from hpc_hdb.cluster.mpi_worker import MpiWorkerLink
        from hpc_hdb.config import Settings
        from hpc_hdb.run.build import choose_place, make_trainer
        from hpc_hdb.run.serve import STOP_SIGNALS
        from hpc_hdb.train.data import open_data
        from hpc_hdb.train.worker import run_worker

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, job["cores"])
    settings = Settings.model_validate(job["settings"])
    place = choose_place(settings, job["local_rank"], job["sharing"])
    place.settle()
    data = open_data(settings.data, "train")
    link = MpiWorkerLink(comm, patience=settings.server.patience, replaces=job["worker"])
    trainer = make_trainer(settings, data, place.device)
    keep = Path(job["folder"]) / "checkpoint" if settings.train.keep_momentum else None
    bulk_synchronous, kept = settings.server.synchronous, settings.run.states_kept
    complete(run_worker(link, trainer, bulk_synchronous, keep, kept))


def main() -> None:
    """The process that `recruiter` starts; if it fails, it is one more worker that is lost."""
    status = 0
    comm = MPI.Comm.Get_parent().Merge(high=True)
    addresses(comm)  # of use at the server
    try:
        work(comm, json.loads(sys.argv[1]))
    except MPI.Exception:  # the server is gone, and its launcher says so
        status = 1
    except BaseException as error:
        describe(error)
        status = exit_status(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # MPI's own end may wait for ranks that were lost


if __name__ == "__main__":
    main()
