"""Which checkpoints a run keeps, and from which it goes on, told to the user."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import events, run, succeed
from endings import (
    SIMULATE,
    TRAIN,
    Job,
    assert_whole,
    checkpoints,
    refused,
    sets,
    write_configuration,
)

from hpc_hdb.train.sealed import read_sealed

KEPT = 3
SETTINGS = sets(
    "model.name=resnet8",
    f"run.keep_checkpoints={KEPT}",
    "run.checkpoint_every=2",
    "schedule.epochs=100000",
    "schedule.learning_rate=0.02",
)
RESUME = ["hdb", "simulate", "--resume", "out"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``out``, interrupted some commits after its best."""
    here = tmp_path_factory.mktemp("interrupted")
    write_configuration(here)
    job = Job(*SIMULATE, *SETTINGS, cwd=here)
    job.until(lambda: len(checkpoints(here / "out")) == KEPT and past_the_best(here / "out"))
    job.signal(signal.SIGUSR1)
    assert job.end().status == 128 + signal.SIGUSR1
    return here


@pytest.fixture
def here(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(interrupted, tmp_path / "copy"))


def evaluations(out: Path) -> list[dict]:
    return [event for event in events(out) if event["event"] == "evaluation"]


def best_of(out: Path) -> dict:
    """The evaluation that was the first to reach the best accuracy."""
    return max(evaluations(out), key=lambda event: (event["accuracy"], -event["commit"]))


def past_the_best(out: Path) -> bool:
    """Whether the best is older than what is kept of the workers' newest states."""
    newest = int(checkpoints(out)[-1].stem)
    return len(evaluations(out)) > 3 and newest - best_of(out)["commit"] > 2 * KEPT * (2 + 1) + 4


def flip(file: Path) -> None:
    """Change one byte in the middle of the file; a second time does not change it back."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] = (data[len(data) // 2] + 1) % 256
    file.write_bytes(data)


def until_resumed(here: Path, *words: str) -> tuple[dict, str]:
    """Go on with the run, interrupt it again: the resume event, and what was printed."""
    before = len(events(here / "out"))
    job = Job(*words, cwd=here)
    job.until(lambda: [e for e in events(here / "out")[before:] if e["event"] == "commit"][2:])
    job.signal(signal.SIGUSR1)
    ending = job.end()
    assert (ending.status, ending.lines) == (128 + signal.SIGUSR1, [])
    (resume,) = (e for e in events(here / "out")[before:] if e["event"] == "resume")
    return resume, ending.out


def test_the_newest_and_the_best_are_kept_each_with_the_workers_states(interrupted: Path) -> None:
    out = interrupted / "out"
    newest = checkpoints(out)
    assert len(newest) == KEPT
    for file in newest:
        checkpoint = read_sealed(file)
        assert file.name == f"{checkpoint['rounds']['commits']:08d}.pt"
        for worker, commits in checkpoint["worker_commits"].items():
            assert "optimizer" in read_sealed(out / f"checkpoint/worker-{worker}-{commits:08d}.pt")
    best = read_sealed(out / "checkpoint" / "best.pt")
    assert best["rounds"]["commits"] == best_of(out)["commit"]
    assert best["accuracy"] == best_of(out)["accuracy"]


def test_the_best_is_evaluated_on_request(here: Path) -> None:
    told = json.loads(succeed("hdb", "evaluate", "out", "--best", "--json", cwd=here))
    assert told["model"] == "out/checkpoint/best.pt"
    assert told["accuracy"] == pytest.approx(best_of(here / "out")["accuracy"])


def test_a_run_goes_back_to_the_best(here: Path) -> None:
    out = here / "out"
    best, newest = best_of(out), checkpoints(out)
    resume, printed = until_resumed(here, *RESUME, "--best")
    assert resume["commit"] == best["commit"]
    assert f"resumed after commit {best['commit']}" in printed
    assert "a fresh optimizer in workers 1, 2" in " ".join(printed.split())
    assert not any(file.exists() for file in newest), "they are of what no longer counts"
    resume, _ = until_resumed(here, *RESUME)
    assert best["commit"] < resume["commit"] < int(newest[0].stem), "it goes on, not back again"


def test_a_run_goes_on_at_another_learning_rate(here: Path) -> None:
    config = here / "out" / "config.toml"
    changed = config.read_text().replace("learning_rate = 0.02", "learning_rate = 0.005")
    config.write_text(changed)
    before = len(events(here / "out"))
    until_resumed(here, *RESUME, "--best")
    later = events(here / "out")[before:]
    rates = {e["learning_rate"] for e in later if e["event"] in ("stage", "commit")}
    assert rates == {0.005}


def test_damaged_checkpoints_are_told_of_and_the_one_before_counts(here: Path) -> None:
    out = here / "out"
    oldest, middle, newest = checkpoints(out)
    flip(newest)
    shutil.copy(oldest, middle)
    resume, printed = until_resumed(here, *RESUME)
    assert resume["commit"] == int(oldest.stem)
    for file, reason in (
        (newest, "its checksum is wrong"),
        (middle, f"it is that of commit {int(oldest.stem)}"),
    ):
        line = f"checkpoint/{file.name} cannot be used ({reason}): going on with {oldest.name}"
        assert line in " ".join(printed.split())
        told = [event for event in events(out) if event["event"] == "damaged"]
        assert any(event["file"] == f"checkpoint/{file.name}" for event in told)
    assert_whole(out)  # none of them is in the way of what comes now


def test_a_damaged_best_is_told_of_and_the_next_takes_its_place(here: Path) -> None:
    best = here / "out" / "checkpoint" / "best.pt"
    flip(best)
    _, printed = until_resumed(here, *RESUME)
    line = "checkpoint/best.pt cannot be used (its checksum is wrong): going on with the next best"
    assert line in " ".join(printed.split())
    flip(best)
    refused("hdb", "evaluate", "out", "--best", told="best.pt is damaged (its che", cwd=here)
    refused(*RESUME, "--best", told="go on from the newest one, without --best", cwd=here)
    best.unlink()
    refused(*RESUME, "--best", told="there is no out/checkpoint/best.pt", cwd=here)


def test_a_damaged_state_of_a_worker_is_told_of(here: Path) -> None:
    """Over MPI, of a run that was begun on the virtual clock."""
    out = here / "out"
    commits = read_sealed(checkpoints(out)[-1])["worker_commits"]
    flip(out / f"checkpoint/worker-2-{commits[2]:08d}.pt")
    job = Job("hdb", "train", "--resume", "out", ranks=3, cwd=here)
    before = len(events(out))
    job.until(lambda: [e for e in events(out)[before:] if e["event"] == "commit"][2:])
    job.signal(signal.SIGUSR1)
    ending = job.end()
    line = (
        f"checkpoint/worker-2-{commits[2]:08d}.pt cannot be used (its checksum is wrong): going on "
        "with a fresh optimizer in worker 2"
    )
    assert line in " ".join(ending.out.split())


def test_going_back_needs_a_run(tmp_path: Path) -> None:
    write_configuration(tmp_path)
    refused(*TRAIN, "--best", told="--best is for going on with a run", ranks=3, cwd=tmp_path)
    assert run("hdb", "evaluate", "out", "--best", cwd=tmp_path).returncode == 2
