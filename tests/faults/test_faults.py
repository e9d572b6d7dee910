"""Ranks that die, hang or diverge: every row of the table, under a real mpirun."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from endings import Ending, Job, assert_whole, sets
from faults.table import LIVES, SURVIVED, Life, Scenario, cells
from programs.runs import PROGRAMS

from hpc_hdb.report.events import Event, read_events

EPOCHS = 5
SAMPLES = 240
TOLERANT = ["mpirun", "--with-ft", "ulfm", "--prtemca", "state_base_recoverable", "1"]

RUN = sets(
    "data.source=synthetic",
    f"data.synthetic_samples={SAMPLES}",
    "data.synthetic_side=16",
    "model.name=faulty:net",
    "plan.timing={16=[4e-4,2e-3]}",
    "schedule.resolutions=[16]",
    "schedule.dropout=[0.0]",
    "schedule.large_batch=[16]",
    "schedule.milestones=[]",
    f"schedule.epochs={EPOCHS}",
    "server.commits_per_epoch=2",
    "server.staleness=2",
)


def start(
    mode: str,
    run: Path,
    ranks: int,
    faults: str,
    *overrides: str,
    step_seconds: float = 0,
    servers: int = 1,
) -> Job:
    """A run with fault tolerance, under way."""
    own = sets(f"server.sync={mode}", f"server.servers={servers}", f"run.output={run}", *overrides)
    words = [*TOLERANT, "-n", str(ranks), "hdb", "train", "digits", *RUN, *own]
    env = {"HDB_FAULT": faults, "HDB_SERVERS": servers, "HDB_STEP_SECONDS": step_seconds}
    return Job(*words, cwd=PROGRAMS, **{name: str(value) for name, value in env.items()})


def named(log: list[Event], name: str) -> list[Event]:
    return [event for event in log if event["event"] == name]


def assert_complete(run: Path) -> list[Event]:
    """Every commit is in the log, and every sample was visited once an epoch; the log."""
    log = read_events(run)
    commits = named(log, "commit")
    visits = np.zeros((EPOCHS, SAMPLES), dtype=int)
    for commit in commits:
        visits[commit["epoch"], commit["begin"] : commit["end"]] += 1
    assert (visits == 1).all()
    assert [commit["commit"] for commit in commits] == list(range(1, len(commits) + 1))
    assert log[-1]["event"] == "end"
    assert commits[-1]["epochs"] == EPOCHS
    assert_whole(run)
    return log


def test_there_are_sixty_cells() -> None:
    assert len(cells()) >= 60


@pytest.mark.parametrize(("mode", "name"), SURVIVED, ids=str)
def test_a_run_goes_on_without_ranks_that_fail(mode: str, name: str, tmp_path: Path) -> None:
    scenario = SURVIVED[mode, name]
    ending = start(
        *(mode, tmp_path / "run", scenario.ranks, scenario.inject(), *scenario.overrides),
        step_seconds=scenario.step_seconds,
        servers=scenario.servers,
    ).end(180)
    assert ending.status == 0, ending
    log = assert_complete(tmp_path / "run")
    assert_outcomes(scenario, log, ending)


def assert_outcomes(scenario: Scenario, log: list[Event], ending: Ending) -> None:
    """Each accident had the outcome of the table, is in the log, and the user was told of it."""
    events = {"redone": "refused", "spared": "silent"}
    for accident in scenario.accidents:
        happened = named(log, events.get(accident.outcome, accident.outcome))
        assert accident.victim in [event["worker"] for event in happened], accident
        assert f"worker {accident.victim} " in ending.out
    died = [a.victim for a in scenario.accidents if a.outcome in ("lost", "replaced", "dropped")]
    gone = [*named(log, "lost"), *named(log, "dropped")]
    assert sorted(event["worker"] for event in gone) == sorted(died)
    lost = {a.victim for a in scenario.accidents if a.outcome in ("lost", "dropped")}
    workers = scenario.workers
    active = workers - len(lost)
    for event in named(log, "replaced"):
        later = named(log[log.index(event) :], "commit")
        assert event["worker"] in [commit["worker"] for commit in later]
    for plan in named(log, "plan"):
        assert plan["workers"] in range(1, workers + 1)
        assert plan["workers"] >= active or named(log, "replaced")
        assert plan["small_workers"] <= 1
    left = [e["worker"] for e in named(log, "leave")]
    assert set(range(1, workers + 1)) - lost <= set(left)


def test_a_run_ends_without_a_server_that_is_not_the_first(tmp_path: Path) -> None:
    """Its slice of the model is nowhere else but in the checkpoints."""
    run = tmp_path / "run"
    job = start("bsp", run, 4, "", "schedule.epochs=5000", servers=2)
    events = run / "events.jsonl"
    job.until(lambda: events.exists() and events.read_text().count('"event": "commit"') > 9)
    os.kill(job.ranks()[1], signal.SIGKILL)
    ending = job.end()
    assert ending.status == 2
    (told,) = [line for line in ending.lines if line.startswith("hdb: ")]
    assert "rank 1, a parameter server, was lost" in told
    assert "hdb train --resume" in told
    assert_whole(run)


@pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="Horovod is not installed: make horovod (needs a C++ compiler)",
)
@pytest.mark.parametrize(
    ("mode", "victim", "number"),
    [("asp", 4, signal.SIGKILL), ("bsp", 3, signal.SIGKILL), ("bsp", 4, signal.SIGSTOP)],
)
def test_a_worker_of_several_ranks_is_lost_as_one(
    mode: str, victim: int, number: signal.Signals, tmp_path: Path
) -> None:
    """Ranks 1 and 2 are worker 1, and 3, which leads, and 4 are worker 2."""
    run = tmp_path / "run"
    shared = ("server.ranks_per_worker=2", "plan.small_workers=0")
    drop = ("server.silent_worker=drop", "server.silent_seconds=4")
    job = start(mode, run, 5, "", *shared, *drop, step_seconds=0.05)
    events = run / "events.jsonl"
    job.until(lambda: events.exists() and events.read_text().count('"event": "commit"') > 3)
    os.kill(job.ranks()[victim], number)
    ending = job.end()
    assert ending.status == 0, ending
    log = assert_complete(run)
    assert [event["worker"] for event in named(log, "lost")] == [2]
    assert "worker 2 was lost" in ending.out


@pytest.mark.parametrize("mode", LIVES)
def test_a_run_that_is_ended_again_and_again_is_resumed(mode: str, tmp_path: Path) -> None:
    """By the loss of all workers, of the server, and without fault mitigation; with other ranks."""
    run = tmp_path / "run"
    first, *later = LIVES[mode]
    faults = ",".join(a.inject() for a in first.accidents)
    assert_ended(start(mode, run, first.ranks, faults).end(180), first, run)
    for life in later:
        faults = ",".join(a.inject() for a in life.accidents)
        launcher = TOLERANT if life.tolerant else TOLERANT[:1]
        words = [*launcher, "-n", str(life.ranks), "hdb", "train", "--resume", run]
        ending = Job(*words, cwd=PROGRAMS, HDB_FAULT=faults).end(180)
        assert_ended(ending, life, run)
    assert_complete(run)


def assert_ended(ending: Ending, life: Life, run: Path) -> None:
    """The job has ended as the table says, and left nothing damaged."""
    told = [line for line in ending.lines if line.startswith("hdb: ")]
    if life.told:
        assert len(told) == 1, ending
        assert life.told.format(run=run) in told[0]
        assert ending.status == 2
    elif life.accidents:
        assert ending.status != 0
    else:
        assert ending.status == 0, ending
    assert_whole(run)


def test_the_docs_page_tells_every_outcome() -> None:
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    for _, accident in cells():
        assert f"`{accident.fault}`" in page, accident
        assert f"`{accident.moment.partition(':')[0]}`" in page, accident
