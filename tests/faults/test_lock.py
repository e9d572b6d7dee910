"""One run folder, two jobs: the lock holds where the kernel's does not reach, and not for ever.

Nodes whose locks do not reach each other are played by one machine, on which the lock file is
removed once a job has locked it: the next one then locks another file, as on another node.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import events
from endings import LONG, SIMULATE, TRAIN, Job, assert_refusal, checkpoints

from hpc_hdb.report.events import read_events
from hpc_hdb.train.checkpoint import Checkpoint, save_checkpoint

RESUME = ["hdb", "simulate", "--resume", "out"]


def started(here: Path, *words: str, ranks: int = 0, **env: str) -> Job:
    """A job that has come to write checkpoints."""
    job = Job(*words, ranks=ranks, cwd=here, **env)
    job.until(lambda: len(checkpoints(here / "out")) > 1)
    return job


def killed(here: Path, **env: str) -> dict:
    """Start a run and kill it: its heartbeat, which nobody has given back."""
    job = started(here, *SIMULATE, *LONG, **env)
    job.signal(signal.SIGKILL)
    job.end()
    return json.loads((here / "out" / ".heartbeat").read_bytes())


def write_heartbeat(here: Path, values: dict, seconds_ago: float = 0.0) -> None:
    """Put a heartbeat as if it had been written so long ago."""
    file = here / "out" / ".heartbeat"
    file.write_text(json.dumps(values) + "\n")
    then = time.time() - seconds_ago
    os.utime(file, (then, then))


def goes_on(here: Path, **env: str) -> tuple[float, str]:
    """Resume, and interrupt it again: seconds until it had resumed, and what was printed."""
    count = len(resumes(here))
    start = time.monotonic()
    job = Job(*RESUME, cwd=here, **env)
    job.until(lambda: len(resumes(here)) > count)
    seconds = time.monotonic() - start
    job.until(lambda: events(here / "out")[-1]["event"] == "commit")
    job.signal(signal.SIGUSR1)
    ending = job.end()
    assert (ending.status, ending.lines) == (128 + signal.SIGUSR1, [])
    assert not (here / "out" / ".heartbeat").exists()
    return seconds, " ".join(ending.out.split())


def resumes(here: Path) -> list[str]:
    """Read as it is written: the last line may be half."""
    log = (here / "out" / "events.jsonl").read_text()
    return [line for line in log.split("\n") if '"event": "resume"' in line]


def test_a_second_job_on_a_node_that_does_not_see_the_lock_is_refused(here: Path) -> None:
    first = started(here, *TRAIN, *LONG, ranks=3)
    (here / "out" / ".lock").unlink()
    holder = json.loads((here / "out" / ".heartbeat").read_bytes())["process"]
    ending = Job("hdb", "train", "--resume", "out", ranks=3, cwd=here).end()
    assert_refusal(ending, f"out is in use by a run (process {holder} on ")
    assert "may be in use by a run" in ending.out
    number = len(events(here / "out"))
    first.until(lambda: len(events(here / "out")) > number)
    first.signal(signal.SIGUSR1)
    assert first.end().status == 128 + signal.SIGUSR1


def test_a_crash_on_this_node_holds_nobody_up(here: Path) -> None:
    killed(here)
    _, printed = goes_on(here)
    assert "in use" not in printed


def test_a_process_that_nobody_has_waited_for_holds_nobody_up(here: Path) -> None:
    job = started(here, *SIMULATE, *LONG)
    job.signal(signal.SIGKILL)
    while ") Z " not in Path(f"/proc/{job.process.pid}/stat").read_text():
        time.sleep(0.01)
    _, printed = goes_on(here)
    assert "in use" not in printed
    job.end()


def test_another_process_of_the_same_number_holds_nobody_up(here: Path) -> None:
    write_heartbeat(here, killed(here) | {"process": os.getpid()})
    _, printed = goes_on(here)
    assert "in use" not in printed


def test_a_process_that_still_ends_holds_the_next_up_until_it_has(here: Path) -> None:
    values = killed(here)
    with subprocess.Popen(["sleep", "600"]) as ending:
        del values["started"]
        write_heartbeat(here, values | {"process": ending.pid})
        job = Job(*RESUME, cwd=here)
        job.until(lambda: "may be in use" in job.said())
        ending.kill()
    job.until(lambda: resumes(here))
    job.signal(signal.SIGUSR1)
    assert job.end(30).status == 128 + signal.SIGUSR1


def test_a_crash_on_another_node_holds_the_next_up_for_some_minutes(here: Path) -> None:
    """Of which most have passed."""
    values = killed(here) | {"host": "elsewhere", "job": "17"}
    write_heartbeat(here, values, seconds_ago=160)
    seconds, printed = goes_on(here)
    who = f"(process {values['process']} on elsewhere, job 17)"
    assert re.search(
        rf"out may be in use by a run {re.escape(who)}, last heard of 1[67]\d ", printed
    )
    assert f"out is taken over from a run {who}" in printed
    assert seconds > 5


def test_a_crash_long_ago_holds_nobody_up(here: Path) -> None:
    write_heartbeat(here, killed(here) | {"host": "elsewhere"}, seconds_ago=400)
    _, printed = goes_on(here)
    assert "may be in use" not in printed
    assert "out is taken over from a run (process" in printed


def test_a_requeued_job_is_not_held_up_by_its_earlier_life(here: Path) -> None:
    values = killed(here, SLURM_JOB_ID="4711")
    assert (values["job"], values["life"]) == ("4711", "0")
    write_heartbeat(here, values | {"host": "elsewhere"})
    _, printed = goes_on(here, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="1")
    assert "in use" not in printed


def test_a_requeued_job_ends_an_earlier_life_that_is_still_there(here: Path) -> None:
    """As on a node of which Slurm has lost sight."""
    first = started(here, *SIMULATE, *LONG, SLURM_JOB_ID="4711")
    second = Job(*RESUME, cwd=here, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="1")
    ending = first.end()
    assert_refusal(ending, "out was taken over by another run (process ", "this one ends here")
    second.until(lambda: resumes(here))
    second.signal(signal.SIGUSR1)
    ending = second.end()
    assert ending.status == 128 + signal.SIGUSR1
    assert "out is still in use by an earlier life of this job" in " ".join(ending.out.split())
    made = [event["commit"] for event in read_events(here / "out") if event["event"] == "commit"]
    assert made == list(range(1, len(made) + 1))


def test_a_job_thought_dead_ends_once_it_wakes_up(here: Path) -> None:
    first = started(here, *SIMULATE, *LONG)
    first.signal(signal.SIGSTOP)
    (here / "out" / ".lock").unlink()
    write_heartbeat(here, json.loads((here / "out" / ".heartbeat").read_bytes()), seconds_ago=400)
    second = Job(*RESUME, cwd=here)
    second.until(lambda: resumes(here))
    time.sleep(32)  # longer than between heartbeats
    first.signal(signal.SIGCONT)
    ending = first.end()
    assert_refusal(ending, "out was taken over by another run (process ", "this one ends here")
    number = len(events(here / "out"))
    second.until(lambda: len(events(here / "out")) > number)
    second.signal(signal.SIGUSR1)
    assert second.end().status == 128 + signal.SIGUSR1


def test_a_job_stopped_within_a_checkpoint_removes_nothing_of_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checkpoint(commit: int) -> Checkpoint:
        return Checkpoint(torch.zeros(3), "net", {"commits": commit}, {}, 0.0)

    def stopped_for_long(file: int) -> None:
        flush(file)
        for name in successors:
            (tmp_path / name).write_bytes(b"another job's")

    flush, successors = os.fsync, ["00000007.pt", "00000008.pt", "00000009.pt.part"]
    for commit in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(commit), keep=2)
    monkeypatch.setattr(os, "fsync", stopped_for_long)
    save_checkpoint(tmp_path, checkpoint(4), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["00000003.pt", "00000004.pt", *successors]
    monkeypatch.setattr(os, "fsync", flush)
    save_checkpoint(tmp_path, checkpoint(5), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["00000004.pt", "00000005.pt"]


def test_of_jobs_that_start_at_once_one_goes_on(here: Path) -> None:
    write_heartbeat(here, killed(here) | {"host": "elsewhere"}, seconds_ago=400)
    jobs = [Job(*RESUME, cwd=here) for _ in range(3)]
    while sum(job.process.poll() is None for job in jobs) > 1:
        time.sleep(0.1)
    [first] = (job for job in jobs if job.process.poll() is None)
    first.until(lambda: resumes(here))
    first.signal(signal.SIGUSR1)
    endings = [job.end() for job in jobs]
    assert sorted(ending.status for ending in endings) == [2, 2, 128 + signal.SIGUSR1]
    for ending in endings:
        if ending.status == 2:
            assert_refusal(ending, "out is in use by a run (")
    assert len(resumes(here)) == 1
