"""Training among accidents: every few seconds something happens to some rank, until it is done.

Half a minute; with ``HDB_SOAK_SECONDS=1800`` half an hour (``make soak``).
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from endings import Job, assert_whole, sets
from faults.test_faults import RUN, SAMPLES, TOLERANT, named
from programs.runs import PROGRAMS

from hpc_hdb.report.events import read_events

SECONDS = float(os.environ.get("HDB_SOAK_SECONDS", 25))
EVERY = 20.0 if SECONDS > 300 else 4.0
"""Seconds between accidents."""
SEED = 121565
"""Of the accidents of the short soak, so that CI does not depend on luck."""
NAP = 2.0
GROWTH = 64 * 2**20
"""Bytes by which the server may grow within one life."""
PATIENCE = 120.0


class Memory:
    """What the server occupies, since it began to train."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}
        self.growth = 0

    def look(self, process: int) -> None:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        held = pages * os.sysconf("SC_PAGE_SIZE")
        self.growth = max(self.growth, held - self._first.setdefault(process, held))


def begin(mode: str, run: Path, epochs: int) -> Job:
    settings = sets(
        f"server.sync={mode}",
        f"run.output={run}",
        f"schedule.epochs={epochs}",
        "server.silent_worker=drop",
        "server.silent_seconds=4",
        "server.replacements=1000",
    )
    words = [*TOLERANT, "-n", "5", "hdb", "train", "digits", *RUN, *settings]
    return Job(*words, cwd=PROGRAMS, HDB_STEP_SECONDS="0.05")


def go_on(run: Path, ranks: int) -> Job:
    words = [*TOLERANT, "-n", str(ranks), "hdb", "train", "--resume", run]
    return Job(*words, cwd=PROGRAMS, HDB_STEP_SECONDS="0.05")


def has_begun(run: Path, lives: int) -> bool:
    log = run / "events.jsonl"
    if not log.exists():
        return False
    *_, life = log.read_text().rpartition('{"event": "start"')
    return log.read_text().count('{"event": "start"') == lives and '"event": "commit"' in life


def meet_with_an_accident(dice: random.Random, job: Job, memory: Memory) -> str:
    """Something happens to a rank of the job, if it still runs; what."""
    ranks = job.ranks()
    server = ranks.pop(0, job.process.pid)
    workers = [*ranks.values(), *job.replacements()] or [server]
    launcher = job.process.pid
    memory.look(server)
    kind = dice.choice(["kill", "kill", "kill", "stop", "nap", "server", "interrupt", "launcher"])
    worker = dice.choice(workers)
    if kind == "nap":
        os.kill(worker, signal.SIGSTOP)
        time.sleep(NAP)
        os.kill(worker, signal.SIGCONT)
    elif kind == "stop":
        os.kill(worker, signal.SIGSTOP)
    elif kind == "interrupt":
        os.kill(server, signal.SIGUSR1)
    else:
        os.kill({"kill": worker, "server": server, "launcher": launcher}[kind], signal.SIGKILL)
    return kind


@pytest.mark.parametrize("mode", ["asp", "bsp"])
def test_no_accident_costs_a_sample(mode: str, tmp_path: Path) -> None:
    epochs, run = int(SECONDS), tmp_path / "run"
    print("seed", seed := random.randrange(10**6) if SECONDS > 300 else SEED)
    dice, memory = random.Random(seed), Memory()
    accidents: list[str] = []
    job, lives = begin(mode, run, epochs), 1
    deadline = 0.0
    while not (run / "summary.json").exists():
        end = time.monotonic() + PATIENCE
        while job.process.poll() is None and not has_begun(run, lives):
            assert time.monotonic() < end, accidents
            time.sleep(0.05)
        deadline = deadline or time.monotonic() + SECONDS
        while job.process.poll() is None:
            assert time.monotonic() < end + SECONDS, accidents
            time.sleep(min(EVERY, 0.05) if time.monotonic() > deadline else EVERY)
            if time.monotonic() < deadline and job.process.poll() is None:
                accidents.append(meet_with_an_accident(dice, job, memory))
        job.end()
        if not (run / "summary.json").exists():
            if list((run / "checkpoint").glob("[0-9]*.pt")):
                assert_whole(run)
            lives = (run / "events.jsonl").read_text().count('{"event": "start"') + 1
            job = go_on(run, dice.choice([3, 4, 5]))
    assert accidents
    visits = np.zeros((epochs, SAMPLES), dtype=int)
    log = read_events(run)
    for commit in named(log, "commit"):
        visits[commit["epoch"], commit["begin"] : commit["end"]] += 1
    assert (visits == 1).all(), (seed, accidents)
    assert named(log, "commit")[-1]["epochs"] == epochs
    assert memory.growth < GROWTH, (seed, accidents)
