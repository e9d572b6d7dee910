"""The programs that start the ranks of a job, and what each wants to be told."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from hpc_hdb.errors import UserError

Kind = Literal["openmpi", "hydra", "srun"]


class Launcher(NamedTuple):
    """A launcher as typed, such as ``srun --mpi=pmix``, and whose options it takes."""

    words: tuple[str, ...]
    kind: Kind


class _Options(NamedTuple):
    """Options by purpose, as shell text that refers to variables of the job script."""

    one_node: str
    nodes: str
    apart: str
    bound: str
    bound_to_cores: str
    unbound: str


_OPTIONS: dict[Kind, _Options] = {
    "openmpi": _Options(
        one_node='-n "$((workers + servers))"',
        nodes='--host "$hosts" -n "$((workers + servers))"',
        apart='--leave-session-attached --host "$hosts"',
        bound='--use-hwthread-cpus --map-by "slot:PE=${cpus}" --bind-to hwthread',
        bound_to_cores='--map-by "slot:PE=${cpus}" --bind-to core',
        unbound="--map-by slot --bind-to none",
    ),
    "hydra": _Options(
        one_node='-n "$((workers + servers))"',
        nodes='-hosts "$hosts" -n "$((workers + servers))"',
        apart="",
        bound='-bind-to "hwthread:${cpus}"',
        bound_to_cores='-bind-to "core:${cpus}"',
        unbound="-bind-to none",
    ),
    "srun": _Options(
        one_node='--ntasks="$((workers + servers))"',
        nodes='--distribution=arbitrary --nodelist="$hosts" --ntasks="$((workers + servers))"',
        apart='--het-group="0,1"',
        bound='--cpus-per-task="${cpus}" --cpu-bind=cores',
        bound_to_cores='--cpus-per-task="${cpus}" --cpu-bind=cores',
        unbound="--cpu-bind=none",
    ),
}


def find_job_launcher(typed: str) -> Launcher:
    """What is to start the ranks of a job.

    Parameters
    ----------
    typed : str
        A command line such as ``srun --mpi=pmi2``, or "auto": mpirun where there is one, beside
        this Python or on PATH, else srun.

    Raises
    ------
    UserError
        If it is no launcher that is known.
    """
    if typed == "auto":
        typed = "mpirun" if _find("mpirun") or not shutil.which("srun") else "srun"
    try:
        words = tuple(shlex.split(typed))
    except ValueError as error:
        raise UserError(f"launcher '{typed}': {error}") from None
    program = words[0].rpartition("/")[2] if words else ""
    if program == "srun":
        return Launcher(words, "srun")
    if program not in ("mpirun", "mpiexec", "mpiexec.hydra"):
        raise UserError(
            f"launcher '{typed}': give mpirun, mpiexec or srun, with options if need be"
        )
    return Launcher(words, "openmpi" if _is_open_mpi(words[0]) else "hydra")


def launch_line(launcher: Launcher, nodes: int, apart: bool, bind: bool | Literal["cores"]) -> str:
    """The value of a job script's array ``launch``.

    Parameters
    ----------
    nodes : int
        Of the workers.
    apart : bool
        Whether the server has a node of its own, in a heterogeneous job.
    bind : bool or "cores"
        Whether each rank is bound to cores of its own; "cores" where Slurm counts those instead
        of their hardware threads.

    Raises
    ------
    UserError
        If this launcher cannot start a heterogeneous job.
    """
    options = _OPTIONS[launcher.kind]
    where = options.apart if apart else options.nodes if nodes > 1 else options.one_node
    if not where:
        raise UserError(
            f"{launcher.words[0]} of MPICH does not start heterogeneous jobs: use --launcher srun"
        )
    words = shlex.join(launcher.words)
    if launcher.kind == "srun" and nodes > 1 and not apart:
        words = f"env -u SLURM_NTASKS_PER_NODE {words}"
    cpus = "SLURM_CPUS_PER_TASK_HET_GROUP_1" if apart else "SLURM_CPUS_PER_TASK"
    how = options.bound if bind else options.unbound
    if bind == "cores":
        how = options.bound_to_cores
    return f"({words} {where}\n    {how.replace('${cpus}', f'${cpus}')})"


def _find(program: str) -> str | None:
    """A program's path; beside this Python first, as a job script has it."""
    beside = Path(sys.executable).parent
    return shutil.which(program, path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")


def _is_open_mpi(program: str) -> bool:
    """Whether an mpirun is Open MPI's; where it cannot be asked here, it counts as such."""
    try:
        told = subprocess.run(
            [_find(program) or program, "--version"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return not program.endswith("hydra")
    return not any(name in told for name in ("HYDRA", "Intel", "MPICH"))
