"""Builds Horovod against the installed torch and MPI: ``python -m hpc_hdb.run.install_horovod``.

Horovod 0.28.1 is published as source that asks for C++14, while torch's headers want C++20: a
compiler wrapper settles that. With a CUDA build of torch NCCL is built in, from ``CUDA_HOME`` and
``NCCL_HOME`` where they are set, else from the wheels that torch brought and the compiler's.
The wheel fits one torch, MPI and Python only; it is cached under their versions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hpc_hdb.cluster.launcher import leave, load_mpi
from hpc_hdb.errors import UserError
from hpc_hdb.run.cuda_wheels import Say, cuda_settings, environment, run_pip, search_path

VERSION = "0.28.1"
_MOST_JOBS = 8
"""Compilers at once: each takes one to two GB on torch's headers."""
_TRIAL = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI  # loads the MPI library that Horovod is to find
from hpc_hdb.cluster.horovod import load_horovod
load_horovod("it")
"""
_BUILD_TOOLS = ("cffi", "cloudpickle", "packaging", "psutil", "setuptools", "wheel", "yaml")


def install_horovod(say: Say = print) -> None:
    """Install Horovod into this Python, building it unless the cache has it.

    Parameters
    ----------
    say : callable
        Told in words what goes on.

    Raises
    ------
    UserError
        If a tool is missing, or the build fails; the message names the build's log.
    """
    fault = find_fault()
    if fault is None:
        say(f"Horovod {VERSION} is installed and fits")
        return
    folder = _cache_folder()
    wheel = next(iter(sorted(folder.glob("horovod-*.whl"))), None)
    if wheel is None:
        wheel = _build(folder, say)
    else:
        say(f"from the cache: {wheel}")
    run_pip("install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    fault = find_fault()
    if fault is not None:
        raise UserError(f"{fault}, although it was built here: remove {folder} and try again")
    say(f"Horovod {VERSION} is installed, with {'MPI and NCCL' if _cuda_version() else 'MPI'}")


def find_fault() -> str | None:
    """What keeps the installed Horovod from working with this torch and MPI; None if nothing."""
    # In a process of its own: a library that does not fit may end it.
    done = subprocess.run(
        [sys.executable, "-c", _TRIAL], env=environment({}), capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"it ends with status {done.returncode}"]
    return f"Horovod does not work here ({lines[-1].rpartition('UserError: ')[2]})"


def _build(folder: Path, say: Say) -> Path:
    """Build the wheel into the cache."""
    compiler, mpicxx = _check_tools()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    with tempfile.TemporaryDirectory(prefix="hpc-hdb-horovod-") as name:
        build = Path(name)
        settings = {
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITH_MPI": "1",
            "HOROVOD_CPU_OPERATIONS": "MPI",
            "CXX": str(_write_wrapper(build, compiler)),
            "MPI_CXX_COMPILER": mpicxx,
            "MAKEFLAGS": f"-j{min(_MOST_JOBS, len(os.sched_getaffinity(0)))}",
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses the bundled gloo without
        }
        version = _cuda_version()
        if version is not None:
            settings |= cuda_settings(build, version, say)
        gpus = "and NCCL " if version else ""
        say(f"building Horovod {VERSION} with MPI {gpus}(4 to 10 minutes; log: {log}) ...")
        start = time.perf_counter()
        with log.open("w") as output:
            # Where pip leaves it is renamed into the cache: an interrupted build leaves nothing.
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"),
                    *("--no-cache-dir", "--no-binary", "horovod", "--verbose"),
                    *("--wheel-dir", str(build), f"horovod=={VERSION}"),
                ],
                env=environment(settings),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise UserError(
                f"Horovod could not be built ({_first_error(log)}): the whole log is {log}"
            )
        built = next(build.glob("horovod-*.whl"))
        unfinished = folder / f"{built.name}.part"
        shutil.copyfile(built, unfinished)
        wheel = folder / built.name
        unfinished.replace(wheel)
    say(f"built in {time.perf_counter() - start:.0f} s; cached as {wheel}")
    return wheel


def _check_tools() -> tuple[str, str]:
    """The C++ compiler and mpicxx."""
    compiler = os.environ.get("CXX") or "g++"
    path = search_path()
    if not (found := shutil.which(compiler, path=path)):
        raise UserError(
            f"Horovod is built from source, and there is no C++ compiler ({compiler}): install "
            "g++ 10 or newer (apt-get install g++), or load your cluster's compiler module"
        )
    mpicxx = shutil.which("mpicxx", path=path)
    if mpicxx is None:
        raise UserError(
            "Horovod is built from source, and there is no mpicxx: load your cluster's MPI "
            "module, or pip install 'hpc-hdb[mpi]'"
        )
    for tool, package in (("cmake", "cmake"), ("make", "make")):
        if shutil.which(tool, path=path) is None:
            raise UserError(
                f"Horovod is built from source, and there is no {tool}: apt-get install "
                f"{package}, or load your cluster's module of it"
            )
    missing = [name for name in _BUILD_TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"Horovod's build needs {', '.join(missing)}: pip install 'hpc-hdb[horovod]'"
        )
    return found, mpicxx


def _write_wrapper(build: Path, compiler: str) -> Path:
    """A compiler for C++20, whatever the caller asks for: the last ``-std`` counts.

    What nvcc passes on (the host pass of a .cu file) is left alone.
    """
    wrapper = build / "c++20"
    real = shlex.quote(compiler)
    wrapper.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *__CUDACC__*) exec {real} "$@" ;; esac\n'
        f'exec {real} "$@" -std=gnu++20\n'
    )
    wrapper.chmod(0o755)
    return wrapper


def _cuda_version() -> str | None:
    """Version of CUDA that torch was built for, such as "13.2"; None for a CPU build."""
    import torch

    return torch.version.cuda


def _cache_folder() -> Path:
    """Where the wheel of this torch, MPI and Python is kept."""
    import mpi4py
    import torch

    mpi4py.rc.initialize = False
    library = load_mpi().Get_library_version().strip("\0\n ")
    words = re.findall(r"[\w.]+", library.splitlines()[0])[:3]
    digest = hashlib.sha256(library.encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"torch-{torch.__version__}-{'-'.join(words)}-{digest}-{python}"
    return cache / "hpc-hdb" / "horovod" / version


def _first_error(log: Path) -> str:
    """The first line of a build's log that tells of an error."""
    text = log.read_text(errors="replace")
    found = re.search(r"^.*\b(?:fatal error|error|CMake Error)\b:? .*$", text, re.MULTILINE)
    return " ".join(found[0].split())[:200] if found else "no reason given"


if __name__ == "__main__":
    try:
        install_horovod(lambda text: print(text, flush=True))
    except (UserError, OSError, KeyboardInterrupt) as error:
        leave(error)
