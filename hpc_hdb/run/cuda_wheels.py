"""A CUDA and an NCCL to build against: the user's own, or what torch's wheels and nvcc's hold."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from hpc_hdb.errors import UserError

Say = Callable[[str], None]


def cuda_settings(build: Path, version: str, say: Say) -> dict[str, str]:
    """What makes the build find nvcc, CUDA's headers and NCCL for torch's CUDA `version`."""
    wheels = _nvidia_wheels()
    own = os.environ.get("HOROVOD_CUDA_HOME") or os.environ.get("CUDA_HOME")
    if own:
        cuda = Path(own)
        _check_cuda(cuda, version)
    elif wheels is None:
        raise UserError(
            f"torch is a build for CUDA {version} without CUDA's wheels: set CUDA_HOME to your "
            f"cluster's CUDA {version.split('.')[0]} (module load cuda)"
        )
    else:
        cuda = build / "cuda"
        say(f"fetching nvcc {version} (no CUDA_HOME is set) ...")
        target = build / "toolkit"
        run_pip(
            "install", "--target", target, f"cuda-toolkit[nvcc,cudart,cccl]=={_toolkit(version)}"
        )
        lay_out(cuda, [target / "nvidia", wheels])
    nccl = os.environ.get("HOROVOD_NCCL_HOME") or os.environ.get("NCCL_HOME")
    if not nccl:
        nccl = str(cuda)
        if wheels is not None and (wheels / "nccl").is_dir():
            nccl = str(build / "nccl")
            lay_out(Path(nccl), [wheels], only="nccl")
    return {
        "PATH": f"{cuda / 'bin'}{os.pathsep}{search_path()}",
        "CUDA_HOME": str(cuda),
        "CUDAToolkit_ROOT": str(cuda),
        "HOROVOD_CUDA_HOME": str(cuda),
        "HOROVOD_NCCL_HOME": nccl,
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_GPU_OPERATIONS": "NCCL",
    }


def _check_cuda(home: Path, version: str) -> None:
    """Raise UserError where the user's own CUDA is not of torch's major version."""
    try:
        told = subprocess.run(
            [home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            f"CUDA_HOME = {home} has no nvcc that runs: set it to a CUDA toolkit, or unset it to "
            "build with CUDA's wheels"
        ) from None
    found = re.search(r"release (\d+)", told)
    if found is None or found[1] != version.split(".")[0]:
        raise UserError(
            f"torch is a build for CUDA {version}, and CUDA_HOME = {home} is CUDA "
            f"{found[1] if found else '?'}: load CUDA {version.split('.')[0]}, or unset CUDA_HOME "
            "to build with CUDA's wheels"
        )


def lay_out(home: Path, parents: list[Path], only: str = "*") -> None:
    """Link the files of NVIDIA's wheels together as an installed CUDA has them.

    Parameters
    ----------
    home : Path
        The folder to make, with bin, include, lib64 and nvvm.
    parents : list of Path
        Folders ``nvidia`` of the wheels; where two have the same file, the first counts.
    """
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "lib").symlink_to("lib64")
    parts = [part for parent in parents for part in sorted(parent.glob(only)) if part.is_dir()]
    for part in parts:
        for source, target in (("bin", "bin"), ("include", "include"), ("lib", "lib64")):
            for file in (part / source).iterdir() if (part / source).is_dir() else ():
                _link(home / target / file.name, file)
                plain = re.sub(r"\.so\..*", ".so", file.name)
                _link(home / target / plain, file)  # what -lNAME looks for
        if (part / "nvvm").is_dir():
            _link(home / "nvvm", part / "nvvm")


def _link(link: Path, file: Path) -> None:
    if not link.exists():
        link.symlink_to(file)


def _nvidia_wheels() -> Path | None:
    """The folder ``nvidia`` that torch's own dependencies share; None if torch has no such."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    folder = Path(torch.origin).parents[1] / "nvidia"
    return folder if any(folder.glob("*/include/cuda_runtime.h")) else None


def _toolkit(version: str) -> str:
    """Which toolkit's compiler to fetch: the release whose libraries torch brought, if known."""
    try:
        installed = metadata.version("cuda-toolkit")
    except metadata.PackageNotFoundError:
        installed = ""
    return installed if installed.startswith(f"{version}.") else f"{version}.*"


def search_path() -> str:
    """PATH, with the programs of this Python's packages (mpicxx, cmake) first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def environment(settings: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PATH": search_path()} | settings


def run_pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment({})
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"pip {arguments[0]} failed ({lines[-1] if lines else 'silently'})")
