"""Ranks that share a batch over Horovod: a worker of several ranks, and all-reduce training."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import events, succeed
from endings import Job, assert_refusal, refused, sets
from programs.runs import PROGRAMS, Kind, assert_same_bits, final_model
from torch import Tensor

from hpc_hdb.report.events import read_events

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="Horovod is not installed: make horovod (needs a C++ compiler)",
)

PER_WORKER = 2
KIND = Kind("bsp", ranks=3, small_workers=1, commits_per_epoch=2)
"""Two workers; KIND.ranks counts one rank for each."""
RANKS = 1 + PER_WORKER * KIND.workers
TOGETHER = 3
"""Ranks of all-reduce training."""


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[n], other[n], rtol=0, atol=tolerance) for n in one)


def shapes(watched: Path) -> dict[int, list[list[int]]]:
    """Of what each rank's model was given, step by step."""
    return {
        int(file.name): [json.loads(line)["shape"] for line in file.read_text().splitlines()]
        for file in watched.iterdir()
    }


def stop(job: Job, run: Path, commits: int) -> None:
    """After so many commits, tell rank 0 in the middle of a round to stop; it says how to go on."""

    def happened() -> bool:
        log = run / "events.jsonl"
        return log.exists() and log.read_text().count('{"event": "commit"') >= commits

    job.until(happened)
    time.sleep(0.05)
    os.kill(job.ranks()[0], signal.SIGUSR1)
    ending = job.end()
    assert ending.status == 128 + signal.SIGUSR1
    assert ending.out.rstrip().endswith(f"hdb train --resume {run}")


# ---- a worker of several ranks ----------------------------------------------------------------

SHARED = {
    "server.ranks_per_worker": PER_WORKER,
    "model.name": "models:watched",
    "schedule.epochs": 2,
    "schedule.milestones": [],
    "schedule.learning_rate": 0.02,
    "schedule.large_batch": [63, 41],
    "schedule.dropout": [0.2, 0.5],
    "train.weight_decay": 0.05,
    "train.decay_norms": "false",
}
"""Odd batches, which two ranks cannot share evenly; flips, rotations, zooms and dropout are on."""


@pytest.fixture(scope="module")
def shared(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers of two ranks each."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "watch").mkdir()
    arguments = KIND.settings(digits, folder / "run", **SHARED)
    succeed("hdb", "train", *arguments, ranks=RANKS, cwd=PROGRAMS, WATCH=str(folder / "watch"))
    return folder


def test_ranks_that_share_batches_take_the_steps_of_one(
    shared: Path, digits: Path, tmp_path: Path
) -> None:
    """On the virtual cluster a worker's ranks take turns in one process, each with its own rows."""
    whole = tmp_path / "whole"
    succeed("hdb", "simulate", *KIND.settings(digits, whole, **SHARED), cwd=PROGRAMS)
    assert close(final_model(shared / "run"), final_model(whole), 2e-5)
    other = tmp_path / "other"
    arguments = KIND.settings(digits, other, **SHARED | {"run.seed": 1})
    succeed("hdb", "simulate", *arguments, cwd=PROGRAMS)
    assert not close(final_model(other), final_model(whole), 1e-2)
    figures = [
        [(c["samples"], c["steps"], c["accuracy"]) for c in events(run) if c["event"] == "commit"]
        for run in (shared / "run", whole)
    ]
    for one, two in zip(*map(sorted, figures), strict=True):
        assert one[:2] == two[:2]
        assert one[2] == pytest.approx(two[2], abs=0.01)


def test_each_rank_trains_its_rows_of_every_batch(shared: Path) -> None:
    given = shapes(shared / "watch")
    assert sorted(given) == list(range(1, RANKS))
    uneven = 0
    for worker in range(1, KIND.workers + 1):
        rounds = [event for event in events(shared / "run") if event.get("steps")]
        rounds = [commit for commit in rounds if commit["worker"] == worker]
        first, second = (given[PER_WORKER * (worker - 1) + rank] for rank in (1, 2))
        assert len(first) == len(second) == sum(commit["steps"] for commit in rounds)
        assert sum(shape[0] for shape in first + second) == sum(c["samples"] for c in rounds)
        for one, two in zip(first, second, strict=True):
            assert one[0] - two[0] in (0, 1)
            uneven += one[0] - two[0]
    assert uneven


def test_the_report_tells_of_the_ranks(shared: Path) -> None:
    plan = json.loads((shared / "run" / "plan.json").read_text())
    assert (plan["workers"], plan["ranks_per_worker"]) == (KIND.workers, PER_WORKER)
    (start,) = [event for event in events(shared / "run") if event["event"] == "start"]
    assert (start["workers"], start["ranks_per_worker"]) == (KIND.workers, PER_WORKER)
    succeed("hdb", "report", shared / "run", cwd=PROGRAMS)
    page = (shared / "run" / "report.html").read_text()
    assert "1 large-batch worker, 1 small-batch worker, 2 ranks each, BSP over MPI" in page


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    shared: Path, digits: Path, tmp_path: Path
) -> None:
    """Nor that it has two servers."""
    run = tmp_path / "run"
    settings = KIND.settings(digits, run, **SHARED | {"server.servers": 2})
    job = Job("hdb", "train", *settings, ranks=1 + RANKS, cwd=PROGRAMS, SLOW="2")
    stop(job, run, commits=1)
    succeed("hdb", "train", "--resume", run, ranks=1 + RANKS, cwd=PROGRAMS)
    assert_same_bits(final_model(run), final_model(shared / "run"))


# ---- all-reduce -------------------------------------------------------------------------------

CONVENTIONAL = sets(
    "data.source=synthetic",
    "data.synthetic_samples=192",
    "data.synthetic_side=16",
    "model.name=models:recorded",
    "plan.timing={16=[4e-4,2e-3]}",
    "schedule.epochs=4",
    "schedule.milestones=[2]",
    "schedule.resolutions=[16]",
    "schedule.dropout=[0.0]",
    "schedule.large_batch=[16]",
    "server.sync=allreduce",
    "train.flip=false",
    "train.rotation=0",
    "train.zoom=0",
)
"""Four steps an epoch, of 16 images on each of three ranks."""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by all-reduce, and what each rank's model found in each step."""
    folder = tmp_path_factory.mktemp("together")
    for name in ("ours", "ddp"):
        (folder / name).mkdir()
    output = f"run.output={folder / 'run'}"
    succeed(
        *("hdb", "train", "digits", *CONVENTIONAL, "--set", output),
        ranks=TOGETHER,
        cwd=PROGRAMS,
        WATCH=str(folder / "ours"),
    )
    return folder


def test_all_reduce_takes_the_steps_of_ddp(together: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    succeed(
        *(*torchrun, f"--nproc-per-node={TOGETHER}"),
        *(sys.executable, PROGRAMS / "ddp_program.py", together / "run"),
        cwd=PROGRAMS,
        WATCH=str(together / "ddp"),
    )
    size = sum(p.numel() for n, p in final_model(together / "run").items() if "running" not in n)
    ours, theirs = (
        [np.fromfile(together / name / str(rank), dtype=np.float32) for rank in range(TOGETHER)]
        for name in ("ours", "ddp")
    )
    for own, peer in zip(ours, theirs, strict=True):
        own, peer = own.reshape(-1, size), peer.reshape(-1, size)
        assert len(own) == len(peer) == 4 * 4
        for step, (one, other) in enumerate(zip(own, peer, strict=True)):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6, err_msg=f"step {step}")
        assert np.abs(own[-1] - own[0]).max() > 0.01
    states = [torch.load(together / "ddp" / f"{rank}.pt") for rank in range(TOGETHER)]
    trained = final_model(together / "run")
    for name in ("norm.running_mean", "norm.running_var"):
        mean = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(trained[name], mean, rtol=1e-5, atol=1e-6)


def test_an_all_reduce_run_is_like_any_other(together: Path) -> None:
    run = together / "run"
    log = events(run)
    (start,) = [event for event in log if event["event"] == "start"]
    facts = (start["sync"], start["workers"], start["ranks_per_worker"], start["small_workers"])
    assert facts == ("allreduce", 1, TOGETHER, 0)
    commits = [event for event in log if event["event"] == "commit"]
    assert [(c["epoch"], c["samples"], c["steps"], c["batch"]) for c in commits] == [
        (epoch, 192, 4, 16 * TOGETHER) for epoch in range(4)
    ]
    assert [event["epoch"] for event in log if event["event"] == "evaluation"] == [1, 2, 3, 4]
    found = json.loads(succeed("hdb", "evaluate", run, "--json", cwd=PROGRAMS))
    summary = json.loads((run / "summary.json").read_text())
    assert found["accuracy"] == pytest.approx(summary["final_accuracy"])
    assert found["loss"] == pytest.approx(summary["final_loss"], rel=1e-5)
    assert list(summary["roles"]) == ["large"]
    assert summary["roles"]["large"]["evaluate"] > 0
    succeed("hdb", "report", run, cwd=PROGRAMS)
    assert f"{TOGETHER} ranks, ALLREDUCE over MPI" in (run / "report.html").read_text()


def test_a_stopped_all_reduce_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """The other run is one process in which the ranks take turns."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = [
        *CONVENTIONAL,
        *sets("model.name=models:watched", "schedule.epochs=12", "schedule.milestones=[6]"),
        *sets("schedule.dropout=[0.3]", "train.rotation=18", f"plan.workers={TOGETHER}"),
    ]
    output = sets(f"run.output={run}")
    job = Job("hdb", "train", "digits", *settings, *output, ranks=TOGETHER, cwd=PROGRAMS, SLOW="1")
    stop(job, run, commits=3)
    succeed("hdb", "train", "--resume", run, ranks=TOGETHER, cwd=PROGRAMS)
    commits = [event["commit"] for event in read_events(run) if event["event"] == "commit"]
    assert commits == list(range(1, 13))
    succeed("hdb", "simulate", "digits", *settings, *sets(f"run.output={whole}"), cwd=PROGRAMS)
    assert close(final_model(run), final_model(whole), 2e-5)


# ---- what does not work -----------------------------------------------------------------------

TRAIN = ["hdb", "train", "mine.toml", "--set", "run.output=out"]
PAIRS = sets("server.ranks_per_worker=2", "plan.small_workers=0")


def test_ranks_that_do_not_divide_are_refused(here: Path) -> None:
    told = (
        "2 ranks do not divide into a server and workers of server.ranks_per_worker = 2 ranks: "
        "start 3"
    )
    refused(*TRAIN, *PAIRS, told=told, ranks=2, cwd=here)


def test_batches_that_are_too_small_to_share_are_refused(here: Path) -> None:
    told = "a batch of 1 images cannot be shared by 2 ranks"
    refused(*TRAIN, *PAIRS, *sets("schedule.large_batch=[1]"), told=told, ranks=3, cwd=here)


def test_a_missing_horovod_is_told_once(here: Path) -> None:
    (here / "horovod").mkdir()
    (here / "horovod" / "__init__.py").touch()  # a package that goes before Horovod's
    told = "server.ranks_per_worker = 2 needs Horovod, which is not installed: build it with 'make"
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    refused(*TRAIN, *PAIRS, told=told, ranks=3, cwd=here, PYTHONPATH=path)


def test_a_horovod_for_another_torch_is_told_once(here: Path) -> None:
    package = importlib.util.find_spec("horovod")
    assert package is not None and package.origin is not None
    (here / "horovod").mkdir()
    for file in Path(package.origin).parent.iterdir():
        (here / "horovod" / file.name).symlink_to(file)
    (here / "horovod" / "metadata.json").unlink()
    (here / "horovod" / "metadata.json").write_text('{"pytorch": "1.13.1"}')
    told = f"was built for torch 1.13.1, not {torch.__version__}: build it with 'make horovod'"
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    allreduce = sets("server.sync=allreduce")
    refused(*TRAIN, *allreduce, told=told, ranks=2, cwd=here, PYTHONPATH=path)


def test_a_gpu_short_is_told_once(here: Path) -> None:
    """One GPU for two ranks; or none, on a machine that has none."""
    ending = Job(
        *TRAIN, *PAIRS, *sets("train.device=cuda"), ranks=3, cwd=here, CUDA_VISIBLE_DEVICES="0"
    ).end()
    if torch.cuda.device_count():
        assert_refusal(ending, "has 1 GPUs for 2 ranks that train", "needs one for each")
    else:
        assert_refusal(ending, "torch sees no GPU here")


def test_mpi_without_full_threads_is_refused(here: Path) -> None:
    told = "server.ranks_per_worker = 2 needs an MPI library with full thread support"
    serialized = {"MPI4PY_RC_THREAD_LEVEL": "serialized"}
    refused(*TRAIN, *PAIRS, told=told, ranks=3, cwd=here, **serialized)
