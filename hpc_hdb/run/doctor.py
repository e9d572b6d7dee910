"""What is installed here and works: every part is tried, in processes of their own.

A part that is broken may crash or hang whoever loads it, so none is loaded into this process.
To look at one more part, write a function that returns its `Finding` and add it to `CHECKS`.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

_PATIENCE = 60.0
"""Seconds for one part to answer."""

_TORCH = """
import json, torch, torchvision
gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
if gpus:
    torch.ones(8, device="cuda").sum().item()
versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
print(json.dumps({"versions": versions, "gpus": gpus, "cuda": torch.version.cuda}))
"""
_MPI = """
import json
from mpi4py import MPI
levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
level = levels[(MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED,
                MPI.THREAD_MULTIPLE).index(MPI.Query_thread())]
told = {"library": MPI.Get_library_version().split(",")[0].split("\\n")[0].strip("\\0 "),
        "level": level, "size": MPI.COMM_WORLD.size}
if MPI.COMM_WORLD.rank == 0:
    print(json.dumps(told), flush=True)
"""
_LOSS = """
import json, os, signal, time
from mpi4py import MPI
world = MPI.COMM_WORLD
world.Set_errhandler(MPI.ERRORS_RETURN)
world.Barrier()
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    world.Recv([bytearray(1), MPI.BYTE], 1)
except MPI.Exception:
    world.Ack_failed()
    print(json.dumps({"left": world.Shrink().size}), flush=True)
os._exit(0)
"""
_HOROVOD = """
import json, horovod, horovod.torch as hvd
built = [name for name, has in (("MPI", hvd.mpi_built()), ("NCCL", hvd.nccl_built())) if has]
print(json.dumps({"version": horovod.__version__, "built": built}))
"""
_DALI = """
import io, json, nvidia.dali as dali, numpy, torch
from nvidia.dali import fn, pipeline_def
from PIL import Image
file = io.BytesIO()
Image.new("RGB", (8, 8)).save(file, "JPEG")
image = numpy.frombuffer(file.getvalue(), numpy.uint8)
gpu = torch.cuda.is_available()
@pipeline_def(batch_size=1, num_threads=1, device_id=0 if gpu else None)
def pipe():
    files = fn.external_source(lambda: [image])
    return fn.resize(fn.decoders.image(files, device="mixed" if gpu else "cpu"), size=2)
built = pipe()
built.build()
built.run()
print(json.dumps({"version": dali.__version__, "gpu": gpu}))
"""

State = Literal["works", "broken", "not here"]


@dataclass(frozen=True)
class Finding:
    """What is true of one part.

    Attributes
    ----------
    part : str
    state : str
        "works", "broken", or "not here".
    found : str
        Versions and abilities, or what went wrong.
    advice : str
        What to type; empty where nothing needs doing.
    needed : bool
        Whether no run can do without it.
    """

    part: str
    state: State
    found: str
    advice: str = ""
    needed: bool = False


class Answer(NamedTuple):
    """What a tried program has printed as JSON, or why it has not."""

    told: dict[str, Any] | None
    error: str


def ask(words: Sequence[str], script: str | None = None, **env: str) -> Answer:
    """Run a command, `script` by this Python where it is given, and read its last line of JSON."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        command = list(words)
        if script is not None:
            file.write(script)
            file.flush()
            command += [sys.executable, file.name]
        try:
            done = subprocess.run(
                command,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            return Answer(None, f"there is no {command[0]}")
        except subprocess.TimeoutExpired:
            return Answer(None, f"no answer within {_PATIENCE:.0f} s")
    for line in reversed(done.stdout.replace("\0", "").splitlines()):
        if line.startswith("{"):
            return Answer(json.loads(line), "")
    return Answer(None, _reason(done.stderr) or f"ended with status {done.returncode}")


@functools.cache
def _ask_torch() -> Answer:
    return ask([], _TORCH)


def check_torch() -> Finding:
    """PyTorch and torchvision."""
    answer = _ask_torch()
    if answer.told is None:
        advice = "pip install torch torchvision, both from one source"
        missing: State = "not here" if "No module named" in answer.error else "broken"
        return Finding("PyTorch", missing, answer.error, advice, needed=True)
    found = f"{answer.told['versions']}, Python {platform.python_version()}"
    return Finding("PyTorch", "works", found, needed=True)


def check_gpus() -> Finding:
    """GPUs that torch can compute on."""
    told = _ask_torch().told
    if told and told["gpus"]:
        names = ", ".join(f"{told['gpus'].count(n)} x {n}" for n in sorted(set(told["gpus"])))
        return Finding("GPUs", "works", names)
    if shutil.which("nvidia-smi"):
        return Finding(
            "GPUs", "broken", "the driver is here, and torch sees no GPU",
            "install a torch built for this driver's CUDA; in a job, ask for GPUs",
        )  # fmt: skip
    return Finding("GPUs", "not here", "runs train on the CPU")


def check_mpi() -> Finding:
    """The MPI library that mpi4py loads, and its support for threads."""
    answer = ask([], _MPI)
    if answer.told is None:
        return Finding(
            "MPI", "broken", answer.error,
            "module load your cluster's MPI, or pip install 'hpc-hdb[mpi]'", needed=True,
        )  # fmt: skip
    library, level = answer.told["library"], answer.told["level"]
    if level == "SINGLE":
        advice = "unset MPI4PY_RC_THREAD_LEVEL, or load an MPI built with threads"
        return Finding("MPI", "broken", f"{library}, no threads", advice, needed=True)
    return Finding("MPI", "works", f"{library}, threads: MPI_THREAD_{level}", needed=True)


def check_launcher() -> Finding:
    """A launcher whose ranks find one another here."""
    working, tried = [], []
    for words in _launchers():
        answer = ask([*words, "-n", "2"], _MPI, **_ANYWHERE)
        if answer.told and answer.told["size"] == 2:
            working.append(shlex.join(words))
            tried.append(f"{working[-1]}: works")
        elif answer.told:
            tried.append(f"{shlex.join(words)}: does not speak this MPI's PMI")
        else:
            tried.append(f"{shlex.join(words)}: {answer.error}")
    if working:
        advice = f"{working[0]} -n 5 hdb train CONFIG"
        if "SLURM_JOB_ID" in os.environ:
            written = working[0].replace(" --overlap", "")
            advice += f'; for hdb slurm, in the site file: launcher = "{written}"'
        return Finding("launcher", "works", "\n".join(tried), advice, needed=True)
    advice = "use the mpirun of the MPI that mpi4py loads: pip install 'hpc-hdb[mpi]' brings one"
    if not tried:
        return Finding("launcher", "not here", "no mpirun, no srun", advice, needed=True)
    return Finding("launcher", "broken", "\n".join(tried), advice, needed=True)


def check_fault_tolerance() -> Finding:
    """Whether the others can go on when a rank is lost (ULFM)."""
    part = "fault tolerance"
    if not shutil.which("mpirun"):
        return Finding(part, "not here", "no mpirun to try it with")
    words = ["mpirun", "--with-ft", "ulfm", "-n", "2"]
    if ask(words, _LOSS, **_ANYWHERE).told == {"left": 1}:
        found = "ULFM: a rank was killed, and another went on"
        return Finding(part, "works", found, "mpirun --with-ft ulfm -n 5 hdb train CONFIG")
    found = "this MPI ends a job with the first rank that is lost; checkpoints are kept"
    return Finding(part, "not here", found, "Open MPI 5 has it: mpirun --with-ft ulfm")


def check_horovod() -> Finding:
    """Horovod, for gradient all-reduce."""
    answer = ask([], _HOROVOD)
    if answer.told is None:
        missing: State = "not here" if "No module named" in answer.error else "broken"
        return Finding("Horovod", missing, answer.error)
    built = " and ".join(answer.told["built"]) or "neither MPI nor NCCL"
    return Finding("Horovod", "works", f"{answer.told['version']}, built with {built}")


def check_dali() -> Finding:
    """NVIDIA DALI, for decoding images: on the GPU where there is one."""
    answer = ask([], _DALI)
    if answer.told is None:
        missing: State = "not here" if "No module named" in answer.error else "broken"
        advice = "pip install 'hpc-hdb[dali]'; without it torch decodes"
        return Finding("DALI", missing, answer.error, advice)
    where = ", decodes on the GPU" if answer.told["gpu"] else ""
    return Finding("DALI", "works", f"{answer.told['version']}{where}")


def check_slurm() -> Finding:
    """Slurm: whether jobs can be submitted, and where to."""
    if not shutil.which("sbatch"):
        return Finding("Slurm", "not here", "no sbatch: mpirun starts runs on this machine")
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%R %D %c %G %l"],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        return Finding("Slurm", "broken", "there is an sbatch, and no sinfo", "put it on PATH")
    if done.returncode:
        return Finding("Slurm", "broken", _reason(done.stderr), "is the controller up? sinfo")
    version = subprocess.run(
        ["sbatch", "--version"], capture_output=True, text=True, check=False
    ).stdout.strip()
    partitions = []
    for line in done.stdout.splitlines():
        name, nodes, cores, gpus, limit = line.split()
        with_gpus = "" if gpus == "(null)" else f", {gpus}"
        partitions.append(f"{name}: {nodes} nodes of {cores} cores{with_gpus}, up to {limit}")
    advice = "hdb slurm CONFIG --submit"
    if "SLURM_JOB_ID" not in os.environ:
        advice += "; which launchers work in a job: sbatch --ntasks=2 --wrap='hdb doctor'"
    return Finding("Slurm", "works", "\n".join([version, *partitions]), advice)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_torch,
    check_gpus,
    check_mpi,
    check_launcher,
    check_fault_tolerance,
    check_horovod,
    check_dali,
    check_slurm,
)

_ANYWHERE = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
"""Two ranks are to start on any machine."""


def _launchers() -> list[list[str]]:
    """Launchers to try, the likeliest first; srun within a job only."""
    found = [["mpirun"]] if shutil.which("mpirun") else []
    if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
        told = subprocess.run(
            ["srun", "--mpi=list"], capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
        kinds = re.findall(r"\b(pmix|pmi2|cray_shasta)\b", told.stdout + told.stderr)
        found += [["srun", "--overlap", f"--mpi={kind}"] for kind in dict.fromkeys(kinds)]
    return found


def _reason(stderr: str) -> str:
    """The line of an error output that says most."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip(" -")]
    telling = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b|.*error:", line)]
    return (telling or lines or [""])[-1][:200]
