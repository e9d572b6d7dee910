"""Shared by all tests: real commands, started as a user starts them."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
BIN = Path(sys.executable).parent
PROGRAMS = Path(__file__).parent / "programs"
"""Modules that the tests' models import."""

TIMING = "plan.timing={16=[4e-4,2e-3],24=[7e-4,2e-3]}"
"""A time model for the digits preset, so that a test's plan does not depend on the machine."""

FIRST = (
    *("test_slurm_jobs", "faults/test_faults", "test_resume", "test_groups", "test_training"),
    *("faults/test_soak", "faults/test_lock", "faults/test_disks", "test_bad_files"),
    *("test_bad_input", "test_study"),
)
"""Files that have deadlines, then those that take minutes."""

# HYPOTHESIS_PROFILE=soak tries each property as often as it takes to find what is rare.
hypothesis.settings.register_profile(
    "suite", max_examples=50, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("soak", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files, so that no process is left alone with one of them."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=place)


def pytest_sessionfinish() -> None:
    """Commands that ran in this process have kept what was there from being tidied up."""
    gc.unfreeze()


@functools.cache
def scratch() -> str:
    """A folder for temporary files, removed at the end."""
    folder = tempfile.mkdtemp(prefix="hdb-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment(**more: str) -> dict[str, str]:
    """The environment of a rank: one thread, and an mpirun that works as root on few cores.

    Each has a TMPDIR of its own: what an mpirun leaves there that was killed keeps a later one
    with the same process number from starting.
    """
    modules = [more.pop("PYTHONPATH", os.environ.get("PYTHONPATH", "")), str(PROGRAMS)]
    base = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # ranks that share a batch want a GPU each
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_btl": "^ofi",  # which looks for fabrics for a second
        "COLUMNS": "100",
        "TMPDIR": tempfile.mkdtemp(dir=scratch()),
        "PYTHONDONTWRITEBYTECODE": "1",  # tests compare what a run leaves in a folder
    }
    return os.environ | base | more


def command(arguments: Sequence[str | Path], ranks: int = 0) -> list[str]:
    """``hdb ...`` (or another program), under ``mpirun -n ranks`` where ranks is given."""
    words = [str(word) for word in arguments]
    if words[:2] in (["hdb", "train"], ["hdb", "simulate"]) and "--resume" not in words:
        words[2:2] = [
            "--set",
            "run.report=false",
        ]  # a second each, of hundreds; it may be set again
    if ranks:
        assert shutil.which("mpirun", path=environment()["PATH"]), "no mpirun: pip install .[mpi]"
        words = ["mpirun", "-n", str(ranks), *words]
    return words


def run(
    *arguments: str | Path,
    ranks: int = 0,
    timeout: float = 120,
    cwd: Path | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is text."""
    return subprocess.run(
        command(arguments, ranks),
        env=environment(**env),
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def lacks(what: str) -> NoReturn:
    """Skip a test for want of something; where all tests must run, as in CI, it fails."""
    if "HDB_TEST_EVERYTHING" in os.environ:
        pytest.fail(what)
    pytest.skip(what)


def succeed(*arguments: str | Path, **options) -> str:
    """Run a command that must succeed; its standard output."""
    done = run(*arguments, **options)
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def events(run_folder: Path) -> list[dict]:
    """The raw event log, every line of it."""
    lines = (run_folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data.path in which the digits have been written once."""
    from hpc_hdb.config import Data
    from hpc_hdb.train.data import prepare_data

    path = tmp_path_factory.mktemp("data")
    prepare_data(Data(source="digits", path=path))
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a configuration, ``mine.toml``, to start commands in."""
    from endings import write_configuration

    write_configuration(tmp_path)
    return tmp_path


@pytest.fixture
def beside_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are looked for in the current folder; more threads only slow the tests' down."""
    import torch

    monkeypatch.chdir(PROGRAMS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk on ``tmp_path/disk``, with the options given; skips where it may not."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=False)
        if done.returncode:
            pytest.skip("no disk can be mounted here: a full one was not tested")
        return path

    yield mount
    while subprocess.run(["umount", path], check=False, stderr=subprocess.DEVNULL).returncode == 0:
        pass


@pytest.fixture(scope="session")
def reference() -> Path:
    """The authors' plans, timings and runs; beside the project only where it is developed."""
    path = SHARED / "reference"
    if not path.is_dir():
        pytest.skip("the authors' reference data is not beside this clone")
    return path
