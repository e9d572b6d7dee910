"""Runs over MPI that are interrupted or killed, and go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import succeed
from endings import Job, contents, sets
from programs.runs import PROGRAMS, assert_same_bits, final_model, leads

from hpc_hdb.report.events import read_events
from hpc_hdb.train.checkpoint import Checkpoint, load_checkpoint
from hpc_hdb.train.sealed import read_sealed

RANKS = 3
KILLS = 10
KILLED_AT_THE_START = (1, 5, 8)
"""Which of them come at a random moment within START_SECONDS of a new run's or a resumed one's."""
START_SECONDS = 4
SAMPLES = 240

COMMON = sets(
    "data.source=synthetic",
    f"data.synthetic_samples={SAMPLES}",
    "data.synthetic_side=16",
    "plan.workers=2",
    "plan.timing={12=[4e-4,2e-3],16=[7e-4,2e-3]}",
    "schedule.resolutions=[12,16]",
    "schedule.dropout=[0.0,0.2]",
    "server.commits_per_epoch=2",
)
SLOW = sets(
    "model.name=models:watched",
    "schedule.large_batch=[8,8]",
    "schedule.epochs=8",
    "schedule.milestones=[4]",
)
"""With SLOW=1 rank 1 takes a quarter of a second a round, and rank 2 waits for it."""
FAST = sets(
    "model.name=models:heavy",
    "schedule.large_batch=[32,32]",
    "schedule.epochs=60",
    "schedule.milestones=[30]",
    "run.evaluate_every=10",
)
"""Rounds of some milliseconds, with checkpoints that take longer."""


def train(*overrides: str, output: Path, ranks: int = RANKS, **env: str) -> Job:
    """A new run under way."""
    arguments = ("digits", *COMMON, *overrides, "--set", f"run.output={output}")
    return Job("hdb", "train", *arguments, ranks=ranks, cwd=PROGRAMS, **env)


def resume(run: Path, ranks: int = RANKS, **env: str) -> Job:
    """A run going on."""
    return Job("hdb", "train", "--resume", run, ranks=ranks, cwd=PROGRAMS, **env)


def commits_of(run: Path) -> list[dict]:
    """The commits that hold."""
    return [event for event in read_events(run) if event["event"] == "commit"]


def train_on(job: Job, run: Path, life: int, commits: int) -> None:
    """Wait until training has begun for the `life`-th time and so many commits were made."""

    def happened() -> bool:
        if starts(run) != life:
            return False
        *_, log = (run / "events.jsonl").read_text().rpartition('{"event": "start"')
        return log.count('{"event": "commit"') >= commits

    job.until(happened)


def starts(run: Path) -> int:
    """How often training has begun."""
    log = run / "events.jsonl"
    whole_lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return sum(line.startswith('{"event": "start"') for line in whole_lines)


def processes(job: Job) -> list[int]:
    """mpirun and the ranks, in their order."""
    ranks = job.ranks()
    assert sorted(ranks) == list(range(len(ranks)))
    return [job.process.pid, *(ranks[rank] for rank in range(len(ranks)))]


def assert_whole(run: Path) -> Checkpoint:
    """No file in `run` is damaged; its newest checkpoint."""
    files = sorted((run / "checkpoint").glob("[0-9]*.pt"))
    for file in (run / "checkpoint").glob("*.pt"):
        read_sealed(file)
    newest = torch.load(files[-1], weights_only=True)
    checkpoint = load_checkpoint(run / "checkpoint", newest["signature"])
    assert checkpoint.rounds["commits"] == newest["rounds"]["commits"]
    return checkpoint


def assert_complete(run: Path, epochs: int) -> None:
    """The log reads as that of one run: every commit, every sample once an epoch."""
    commits = commits_of(run)
    assert [commit["commit"] for commit in commits] == list(range(1, 4 * epochs + 1))
    visits = np.zeros((epochs, SAMPLES), dtype=int)
    for commit in commits:
        visits[commit["epoch"], commit["begin"] : commit["end"]] += 1
    assert (visits == 1).all()


def assert_interrupted(job: Job, run: Path, number: signal.Signals) -> None:
    """It ends by itself, with a checkpoint, and says how to go on."""
    ending = job.end()
    assert ending.status == 128 + number
    assert ending.lines == []
    assert ending.out.rstrip().split("\n")[-1].endswith(f"hdb train --resume {run}")
    *_, last = read_events(run)
    assert (last["event"], last["signal"]) == ("interrupted", number.name)
    assert assert_whole(run).rounds["commits"] == commits_of(run)[-1]["commit"]


@pytest.mark.parametrize(("sync", "every"), [("bsp", 1), ("bsp", 3), ("asp", 1)])
def test_kills_change_nothing(sync: str, every: int, tmp_path: Path) -> None:
    """SIGKILL to all ranks and mpirun at random moments, resumed each time."""
    fast = (*FAST, *sets(f"server.sync={sync}", f"run.checkpoint_every={every}"))
    whole, run = tmp_path / "whole", tmp_path / "killed"
    if sync == "bsp":
        assert train(*fast, output=whole).end().status == 0
    dice = random.Random()
    print("seed", seed := dice.randrange(10**6))
    dice.seed(seed)
    for life in range(1, KILLS + 1):
        before = starts(run)
        job = resume(run) if (run / "config.toml").exists() else train(*fast, output=run)
        in_training = life not in KILLED_AT_THE_START
        if in_training:
            # With every = 1 a third commit is the second of some worker: by then a checkpoint must
            # be whole.
            least = 2 * every + 1
            train_on(job, run, before + 1, commits=dice.randrange(least, least + 5))
            time.sleep(dice.uniform(0, 0.05))
        else:
            time.sleep(dice.uniform(0, START_SECONDS))
        victims = processes(job) if in_training else [job.process.pid, *job.ranks().values()]
        dice.shuffle(victims)
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):  # a rank ends when it finds no mpirun
                os.kill(victim, signal.SIGKILL)
        assert job.end().status == -signal.SIGKILL
        if in_training:
            checkpoint = assert_whole(run)
            made = Counter(commit["worker"] for commit in commits_of(run))
            for worker, saved in checkpoint.worker_commits.items():
                lost = made[worker] - saved
                assert 0 <= lost <= every, (life, made, checkpoint.worker_commits)
        if life == 2:  # as if it had come before the first checkpoint was whole
            for file in (run / "checkpoint").glob("[0-9]*.pt"):
                file.unlink()
    assert resume(run).end().status == 0
    assert_complete(run, epochs=60)
    assert not list(run.rglob("*.part"))
    if sync == "bsp":
        assert_same_bits(final_model(run), final_model(whole))
    for folder in {run, whole} if sync == "bsp" else {run}:
        log = [event for event in read_events(folder) if event["event"] == "evaluation"]
        assert [int(event["epoch"]) // 10 for event in log] == list(range(1, 7))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BSP run that was interrupted in many ways, each time in the middle of a round."""
    here = tmp_path_factory.mktemp("interrupted")
    run = here / "run"
    watch = {"SLOW": "1", "WATCH": str(here)}
    for life, (target, number) in enumerate(
        [
            (1, signal.SIGUSR1),
            (0, signal.SIGUSR1),
            (0, signal.SIGTERM),
            (2, signal.SIGKILL),
        ],
        start=1,
    ):
        if life == 1:
            job = train(*SLOW, "--set", "server.sync=bsp", output=run, **watch)
        else:
            job = resume(run, **watch)
        train_on(job, run, life, commits=2)
        time.sleep(0.1)
        os.kill(processes(job)[target], number)
        if target == 1 or number == signal.SIGUSR1:
            assert_interrupted(job, run, number)
        else:  # mpirun ends the ranks itself and passes nothing on that they say
            assert job.end().status != 0
            assert_whole(run)
        if life == 2:
            cut_newest_checkpoint(run)
    assert resume(run, **watch).end().status == 0
    trained = len((here / "1").read_text().splitlines())
    committed = sum(commit["steps"] for commit in commits_of(run) if commit["worker"] == 1)
    assert trained > committed, "no round was interrupted"
    return run


def cut_newest_checkpoint(run: Path) -> None:
    newest = max((run / "checkpoint").glob("[0-9]*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)


def test_interrupts_change_nothing(finished: Path, tmp_path: Path) -> None:
    assert_complete(finished, epochs=8)
    whole = tmp_path / "whole"
    overrides = (*COMMON, *SLOW, *sets("server.sync=bsp", f"run.output={whole}"))
    succeed("hdb", "simulate", "digits", *overrides, cwd=PROGRAMS)
    assert_same_bits(final_model(finished), final_model(whole))


def test_a_finished_run_has_nothing_to_resume(finished: Path) -> None:
    before = contents(finished)
    ending = resume(finished).end()
    assert ending.status == 0
    assert ending.lines == []
    assert ending.out == f"{finished} has finished: nothing to resume; see hdb report {finished}\n"
    after = contents(finished)
    assert before.pop(".lock") != after.pop(".lock")
    assert before == after


@pytest.mark.parametrize(("sync", "bound", "servers"), [("asp", 1000, 2), ("ssp", 0, 1)])
def test_commits_on_their_own_are_resumed(
    sync: str, bound: int, servers: int, tmp_path: Path
) -> None:
    """In SSP the signal comes while the fast worker is held back."""
    run = tmp_path / "run"
    ranks = servers + 2
    slow = {"SLOW": str(servers)}
    settings = sets(f"server.sync={sync}", "server.staleness=0", f"server.servers={servers}")
    if servers > 1:  # the workers measure, and the servers wait for them
        settings += sets("plan.timing=profile", "plan.small_workers=0")
    job = train(*SLOW, *settings, output=run, ranks=ranks, **slow)
    train_on(job, run, 1, commits=5)
    time.sleep(0.1)
    os.kill(processes(job)[1], signal.SIGTERM)
    assert_interrupted(job, run, signal.SIGTERM)
    before = len(commits_of(run))
    if servers > 1:  # a server that is not the root is lost, and with it its slice
        job = resume(run, ranks, **slow)
        train_on(job, run, 2, commits=3)
        os.kill(processes(job)[2], signal.SIGKILL)
        assert job.end().status != 0
        assert_whole(run)
    assert resume(run, ranks, **slow).end().status == 0
    assert_complete(run, epochs=8)
    assert before < len(commits_of(run))
    assert max(leads(commits_of(run))) <= bound


def test_a_run_that_goes_on_with_another_worker_is_shown_and_reported_as_theirs(
    tmp_path: Path,
) -> None:
    """In SSP, where the others wait for the new one, but not for all that it was not there for."""
    run = tmp_path / "run"
    settings = sets("server.sync=ssp", "server.staleness=0", "plan.small_workers=1")
    job = train(*SLOW, *settings, output=run)
    train_on(job, run, 1, commits=7)
    os.kill(processes(job)[0], signal.SIGUSR1)
    assert_interrupted(job, run, signal.SIGUSR1)
    before = len(commits_of(run))
    ending = resume(run, ranks=4).end()
    assert ending.status == 0
    assert "1 server, 2 large-batch workers, 1 small-batch worker (" in ending.out
    (plan,) = (event for event in read_events(run) if event["event"] == "plan")
    told = "2 large-batch and 1 small-batch workers go on, by a new plan from epoch"
    assert f"{told} {plan['from_epoch'] + 1}\n" in ending.out
    *_, start = (event for event in read_events(run) if event["event"] == "start")
    for key in ("workers", "small_workers", "update_factor"):
        assert start[key] == plan[key]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["workers"], summary["small_workers"]) == (3, 1)
    roles = {name: role["workers"] for name, role in summary["roles"].items()}
    assert roles == {"server": 1, "large": 2, "small": 1}
    assert (summary["epochs"], summary["commits"]) == (8, plan["total"])
    first = [commit["worker"] for commit in commits_of(run)[before : before + 3]]
    assert first != [3, 3, 3]
