"""``hdb doctor`` on this machine, with its real parts, and with some of them taken away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import BIN, run

from hpc_hdb.run.doctor import check_slurm

PARTS = ["PyTorch", "GPUs", "MPI", "launcher", "fault tolerance", "Horovod", "DALI", "Slurm"]


def findings(**env: str) -> tuple[int, dict[str, dict]]:
    done = run("hdb", "doctor", "--json", timeout=300, **env)
    told = json.loads(done.stdout)
    assert [finding["part"] for finding in told] == PARTS
    return done.returncode, {finding["part"]: finding for finding in told}


def test_everything_that_is_here_works() -> None:
    status, found = findings()
    assert status == 0
    for part in ("PyTorch", "MPI", "launcher", "fault tolerance", "DALI"):
        assert found[part]["state"] == "works", found[part]
    assert "Open MPI" in found["MPI"]["found"]
    assert "MPI_THREAD_MULTIPLE" in found["MPI"]["found"]
    assert found["launcher"]["advice"] == "mpirun -n 5 hdb train CONFIG"
    assert "another went on" in found["fault tolerance"]["found"]


def test_what_is_missing_is_named_with_what_to_type(tmp_path: Path) -> None:
    """Neither launcher nor threads, and a DALI and a Horovod that do not load."""
    for name in ("python", "hdb"):
        (tmp_path / name).symlink_to(BIN / name)
    for name in ("nvidia", "horovod"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "raise ImportError('libgone.so: no such file')"
        )
    status, found = findings(
        PATH=str(tmp_path), PYTHONPATH=str(tmp_path), MPI4PY_RC_THREAD_LEVEL="single"
    )
    assert status == 1
    assert (found["MPI"]["state"], found["launcher"]["state"]) == ("broken", "not here")
    assert found["MPI"]["advice"].startswith("unset MPI4PY_RC_THREAD_LEVEL")
    assert "pip install 'hpc-hdb[mpi]'" in found["launcher"]["advice"]
    for part in ("DALI", "Horovod"):
        assert found[part]["state"] == "broken"
        assert "libgone.so" in found[part]["found"]
    assert found["Slurm"]["state"] == "not here"


def test_a_slurm_without_sinfo_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = check_slurm()
    assert (found.state, found.found) == ("broken", "there is an sbatch, and no sinfo")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_exit_status_is_explained(flag: str) -> None:
    assert "Exit status 1" in run("hdb", "doctor", flag).stdout
