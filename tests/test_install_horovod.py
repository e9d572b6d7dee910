"""The build of Horovod: what it uses, and what it says where something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BIN, environment

from hpc_hdb.run import install_horovod
from hpc_hdb.run.cuda_wheels import lay_out

MODULE = "hpc_hdb.run.install_horovod"


def install(here: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command where Horovod is not installed, nothing is cached and few programs are found."""
    (here / "horovod").mkdir()
    (here / "horovod" / "__init__.py").touch()  # a package that goes before Horovod's
    programs = here / "bin"
    programs.mkdir()
    for name in ("python", "mpicxx", "make", "cmake"):
        (programs / name).touch(0o755)
    if (BIN / "mpicxx").exists():  # then it is found beside the interpreter
        (programs / "mpicxx").unlink()
    found = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", MODULE],
        env=environment()
        | {"PATH": str(programs), "PYTHONPATH": found, "XDG_CACHE_HOME": str(here / "cache")}
        | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"MPI4PY_LIBMPI": "/gone.so"}, "mpi4py finds no MPI library (cannot load MPI library): "),
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler (no-such-compiler): install g++"),
        (
            {"CXX": "/bin/false", "CUDA_HOME": "/nowhere", "HOROVOD_CUDA_HOME": "/nowhere"},
            "CUDA_HOME = /nowhere has no nvcc that runs",
        ),
    ],
    ids=["MPI", "compiler", "CUDA"],
)
def test_what_is_missing_is_told_in_one_line(
    tmp_path: Path, env: dict[str, str], told: str
) -> None:
    import torch

    if "CUDA_HOME" in env and torch.version.cuda is None:
        pytest.skip("this torch is a build without CUDA, and asks for none")
    done = install(tmp_path, **env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("hdb: ") and told in line
    assert not list(tmp_path.rglob("*.whl"))


def test_wheels_are_laid_out_as_an_installed_cuda(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    files = {
        one / "cu13/bin/nvcc": "",
        one / "cu13/include/cuda.h": "first",
        one / "cu13/nvvm/bin/cicc": "",
        two / "cu13/include/cuda.h": "second",
        two / "cu13/lib/libcudart.so.13": "",
        two / "nccl/include/nccl.h": "",
        two / "nccl/lib/libnccl.so.2": "",
    }
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    lay_out(tmp_path / "cuda", [one, two])
    lay_out(tmp_path / "nccl", [two], only="nccl")
    cuda = tmp_path / "cuda"
    assert (cuda / "include/cuda.h").read_text() == "first"
    for name in ("bin/nvcc", "nvvm/bin/cicc", "lib64/libcudart.so", "lib/libcudart.so.13"):
        assert (cuda / name).exists(), name
    for name in ("include/nccl.h", "lib/libnccl.so", "lib64/libnccl.so.2"):
        assert (tmp_path / "nccl" / name).exists(), name
    assert not (tmp_path / "nccl/include/cuda.h").exists()


def test_the_wrapper_has_the_last_word_on_the_standard(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho "$@"\n')
    compiler.chmod(0o755)
    wrapper = install_horovod._write_wrapper(tmp_path, str(compiler))

    def told(*arguments: str) -> str:
        return subprocess.run([wrapper, *arguments], capture_output=True, text=True).stdout.strip()

    assert told("-std=c++14", "a.cc") == "-std=c++14 a.cc -std=gnu++20"
    assert told("-D__CUDACC__", "a.cc") == "-D__CUDACC__ a.cc"
