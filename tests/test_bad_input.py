"""Bad input ends all ranks of the real command with one line that says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import run
from endings import (
    SECONDS,
    SIMULATE,
    TRAIN,
    Job,
    assert_refusal,
    assert_whole,
    contents,
    refused,
    sets,
)

from hpc_hdb.train.sealed import read_sealed

MANY = """
import random, sys, time
from mpi4py import MPI
from hpc_hdb.cluster.launcher import leave
from hpc_hdb.errors import UserError

rank = MPI.COMM_WORLD.rank
MPI.COMM_WORLD.Barrier()
time.sleep(random.Random(rank).uniform(0, float(sys.argv[1])) if rank else 60)
leave(UserError(f"as rank {rank} says"))
"""
"""Ranks all of which but the first fail within some seconds."""


# ---- what MPI is not needed for ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.name=resnet81"], "there is no 'resnet81'; did you mean 'resnet8'?"),
        (["model.name=mine:failing"], "'mine:failing' raised KeyError: 'no such layer' (/"),
        (["model.name=mine:wrong"], "gives a tensor of shape (2, 3) for 2 images, not a tensor of"),
        (
            ["model.name=vit_b_32"],
            "model.name = 'vit_b_32' raised AssertionError for images of 16x16: Wrong image height",
        ),
        (["model.name=mine:Net.forward"], "mine:Net.forward"),
        (["plan.small_workers=3"], "plan.small_workers = 3 does not fit the 2 workers"),
        (["server.servers=0"], "server.servers: input should be greater than or equal to 1, not 0"),
        (["server.servers=two"], "server.servers: input should be a valid integer"),
        (["plan.time_ratio=9"], "no dual-batch plan: with time_ratio 9 the 1 large-batch"),
        (["schedule.large_batch=[]"], "no large batch for resolution 16"),
        (["schedule.large_batch=[]", "plan.timing=profile"], "schedule.large_batch is empty"),
        (["plan.timing=mine.toml"], "timing file mine.toml is damaged"),
        (["train.precision=fp16"], 'train.precision = "fp16" needs a GPU'),
        (["data.source=folder"], "data.path = 'data' is not a folder: set it to one with train/"),
        (["data.source=digits", "data.path=mine.toml"], "below data.path = 'mine.toml'"),
        (["run.output=mine.toml"], "cannot use the run folder mine.toml"),
        (["run.output=/proc/out"], "cannot use the run folder /proc/out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_begin_leaves_nothing_behind(
    here: Path, overrides: list[str], told: str
) -> None:
    before = contents(here)
    refused(*SIMULATE, *sets(*overrides), told=told, cwd=here)
    assert contents(here) == before
    assert not (here / "out").exists()


def test_a_gpu_that_is_not_there_is_asked_for(here: Path) -> None:
    refused(*SIMULATE, *sets("train.device=cuda"), told="torch sees no GPU here", cwd=here)


def leading(folder: Path) -> str:
    """A PYTHONPATH in which modules in `folder` go before all others."""
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_dali_that_is_not_installed_is_named(here: Path) -> None:
    (here / "nvidia").mkdir()
    (here / "nvidia" / "__init__.py").touch()  # a package that goes before DALI's
    told = "DALI is not installed: pip install 'hpc-hdb[dali]', or set data.loader to \"torch\""
    refused(*SIMULATE, *sets("data.loader=dali"), told=told, cwd=here, PYTHONPATH=leading(here))


@pytest.mark.parametrize("words", [["train", "nosuch"], ["train", "digits", "--nosuch"]])
@pytest.mark.parametrize("close", ["2>&-", "2>/dev/full", "2>&- >&-"])
def test_without_standard_error_the_status_says_it(
    here: Path, words: list[str], close: str
) -> None:
    done = run("bash", "-c", f"hdb {' '.join(words)} {close}", cwd=here)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


# ---- ranks and MPI ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "words", "told"),
    [
        (1, TRAIN, "1 rank is too few: start at least 2 (a server and a worker)"),
        (3, [*TRAIN, "--set", "plan.small_workers=3"], "does not fit the 2 workers of 3 ranks"),
        (
            2,
            [*TRAIN, "--set", "server.servers=2"],
            "2 ranks are too few: start at least 3 (server.",
        ),
        (3, [*TRAIN, "--nosuch"], "No such option: --nosuch: see hdb train --help"),
        (3, ["hdb", "train", "digts"], "did you mean 'digits'?"),
        (3, [*TRAIN, "--set", "plan.workrs=3"], "did you mean 'plan.workers'?"),
        (3, [*TRAIN, "--set", "server.sync=bps"], "did you mean 'bsp'?"),
        (3, [*TRAIN, "--set", "plan.time_ratio=9"], "use a time_ratio from"),
        (3, SIMULATE, "hdb simulate is one process"),
        (3, ["hdb", "train", "--resume", "gone"], "--resume gone: there is no such run folder"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_rank_0_finds_ends_all_ranks(
    here: Path, ranks: int, words: list[str], told: str
) -> None:
    before = contents(here)
    refused(*words, told=told, ranks=ranks, cwd=here)
    assert contents(here) == before


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.source=folder", "data.path=gone"], "data.path = 'gone' is not a folder"),
        (["model.name=mine:one_sided"], "raised RuntimeError for images of 16x16: mat1 and mat2 "),
        (["train.precision=fp16"], 'train.precision = "fp16" needs a GPU'),
    ],
    ids=["of all ranks", "of all ranks, a moment apart", "of all workers"],
)
def test_an_error_of_many_ranks_is_told_once(here: Path, overrides: list[str], told: str) -> None:
    refused(*TRAIN, *sets(*overrides), told=told, ranks=3, cwd=here)


@pytest.mark.parametrize("seconds", [0, 2])
def test_of_many_failing_ranks_one_speaks(here: Path, seconds: float) -> None:
    ending = Job("python", "-c", MANY, str(seconds), ranks=8, cwd=here).end()
    assert_refusal(ending, "as rank ")


def test_mpi_without_threads_is_refused(here: Path) -> None:
    single = {"MPI4PY_RC_THREAD_LEVEL": "single"}
    level = "from mpi4py import MPI; assert MPI.Query_thread() == MPI.THREAD_SINGLE"
    assert run("python", "-c", level, ranks=1, **single).returncode == 0
    refused(*TRAIN, told="runs without thread support", ranks=3, cwd=here, **single)
    serialized = {"MPI4PY_RC_THREAD_LEVEL": "serialized"}
    drop = sets("server.sync=bsp", "server.silent_worker=drop")
    told = 'server.silent_worker = "drop" in BSP needs an MPI library with full thread support'
    refused(*TRAIN, *drop, told=told, ranks=3, cwd=here, **serialized)


def test_a_missing_mpi_library_is_told_once(here: Path) -> None:
    told = "mpi4py finds no MPI library (cannot load MPI library): load your cluster's MPI module"
    refused(*TRAIN, told=told, ranks=3, cwd=here, MPI4PY_LIBMPI=str(here / "gone.so"))


def test_a_launcher_that_is_not_of_this_mpi_library_is_told_once(here: Path) -> None:
    """Each of its processes then is alone, in an MPI world of its own."""
    ranks = [
        Job(
            *TRAIN,
            cwd=here,
            OMPI_COMM_WORLD_SIZE="4",
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
        )
        for rank in range(4)
    ]
    endings = [rank.end() for rank in ranks]
    assert_refusal(endings[0], "4 processes were started, but MPI sees 1", "use the mpirun of")
    assert [ending.status for ending in endings] == [2, 2, 2, 2]
    assert [ending.lines for ending in endings[1:]] == [[], [], []]


# ---- at the end of training ------------------------------------------------------------------


def test_a_report_that_cannot_be_written_fails_no_run(here: Path) -> None:
    (here / "matplotlib").mkdir()
    (here / "matplotlib" / "__init__.py").write_text("raise ImportError('no matplotlib here')")
    words = sets("run.report=true")
    done = run(*SIMULATE, *words, cwd=here, PYTHONPATH=leading(here))
    assert (done.returncode, done.stderr) == (0, "")
    last = "no report was written (no matplotlib here): hdb report out"
    assert done.stdout.rstrip().split("\n")[-1] == last
    assert (here / "out" / "summary.json").exists()


# ---- in the middle of training ----------------------------------------------------------------


def test_an_unforeseen_error_of_all_workers_is_one_traceback(here: Path) -> None:
    ending = Job(*TRAIN, *sets("model.name=mine:failing_later"), ranks=3, cwd=here).end()
    assert ending.status == 1
    assert ending.lines[0] == "Traceback (most recent call last):"
    assert ending.lines[-1] == "ArithmeticError: these weights are no good"
    assert sum(line.startswith("Traceback") for line in ending.lines) == 1
    assert ending.seconds < SECONDS


def test_training_that_diverges_at_once_speaks_of_no_checkpoint(here: Path) -> None:
    overrides = ["schedule.learning_rate=1e38", "server.commits_per_epoch=1"]
    ending = Job(*SIMULATE, *sets(*overrides), cwd=here).end()
    assert_refusal(ending, "training diverged", "on every worker: lower schedule.learning_rate")
    assert ending.lines[0].endswith("and start again")


def test_a_server_that_diverges_writes_no_checkpoint_of_it(here: Path) -> None:
    overrides = ["server.optimizer=slowmo", "server.outer_rate=1e30", "server.sync=bsp"]
    ending = Job(*SIMULATE, *sets(*overrides, "server.commits_per_epoch=1"), cwd=here).end()
    assert_refusal(ending, "training diverged", "schedule.learning_rate or server.outer_rate")
    for file in (here / "out" / "checkpoint").glob("[0b]*.pt"):
        assert torch.isfinite(read_sealed(file)["model"]).all(), file


def test_training_that_diverges_leaves_good_checkpoints(here: Path) -> None:
    overrides = ["schedule.learning_rate=0.1", "schedule.milestones=[2]", "schedule.factor=1e38"]
    ending = Job(*TRAIN, *sets(*overrides), ranks=3, cwd=here).end()
    assert_refusal(ending, "training diverged", "stage 1 (learning rate 1e+37, 16x16)")
    assert_whole(here / "out")
    assert run("hdb", "evaluate", "out", cwd=here).returncode == 0
