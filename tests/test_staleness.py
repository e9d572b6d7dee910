"""Slow workers: who runs ahead in ASP, and how far in SSP; shares that follow the speeds."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import events, succeed
from programs.lives import SLOWNESS, Killed, Run, settings_for
from programs.runs import PROGRAMS, leads

from hpc_hdb.config_files import parse_settings
from hpc_hdb.train.checkpoint import Checkpoint, load_checkpoint, note_lost_states
from hpc_hdb.train.sealed import read_sealed
from hpc_hdb.train.server import Interrupted

pytestmark = pytest.mark.usefixtures("beside_models")


def test_asp_lets_the_fast_run_ahead() -> None:
    run = Run(settings_for("asp"))
    run.live()
    rounds = Counter(commit["worker"] for commit in run.commits)
    assert rounds.total() == 24
    assert min(rounds[1], rounds[2]) >= 4 * rounds[3] > 0
    assert max(leads(run.commits)) > 4


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_ssp_holds_the_fast_at_its_bound(staleness: int) -> None:
    run, free = Run(settings_for("ssp", staleness)), Run(settings_for("asp"))
    run.live()
    free.live()
    assert len(run.commits) == 24
    assert max(leads(run.commits)) == staleness
    assert run.seconds > free.seconds
    waited = Counter()
    for commit in run.commits:
        waited[commit["worker"]] += commit["wait_seconds"]
    assert min(waited[1], waited[2]) > waited[3] == 0


@pytest.mark.parametrize("until", range(1, 24, 3))
def test_ssp_keeps_its_bound_through_a_resume(until: int, tmp_path: Path) -> None:
    run = Run(settings_for("ssp"), tmp_path)
    run.live_until(until)
    run.live()
    assert [commit["commit"] for commit in run.commits] == list(range(1, 25))
    assert max(leads(run.commits)) == 1


@pytest.mark.parametrize("lives", [(2, 3), (3, 2, 3)], ids=["a new worker", "one that is back"])
def test_ssp_waits_for_nobody_to_catch_up_after_a_resume(
    lives: tuple[int, ...], tmp_path: Path
) -> None:
    """The slow worker never commits twice before others do; from then on they wait for it."""
    run = Run(settings_for("ssp", epochs=8), tmp_path)
    for number, workers in enumerate(lives[:-1], start=1):
        run.live_until(10 * number, slowness=SLOWNESS[:workers])
    before = len(run.commits)
    run.live()
    workers = [commit["worker"] for commit in run.commits]
    assert (3, 3) not in itertools.pairwise(workers[before:])
    assert max(leads(run.commits[before:])) <= 2
    newest = read_sealed(max(tmp_path.glob("[0-9]*.pt")))
    assert newest["worker_commits"] == Counter(workers)


@pytest.mark.parametrize(("sync", "every"), [("asp", 1), ("bsp", 1), ("bsp", 7)])
@pytest.mark.parametrize("questions", range(20, 100, 16))
def test_a_signal_in_the_middle_of_a_round_is_heard_after_a_step(
    sync: str, every: int, questions: int, tmp_path: Path
) -> None:
    """Workers ask for it in each step, of which every round has more than one.

    Where no checkpoint was due, they have kept their states in memory.
    """
    run, asked = Run(settings_for(sync, batch=4, every=every), tmp_path), itertools.count()
    with pytest.raises(Interrupted):
        run.live(lambda: 15 if next(asked) >= questions else 0)
    assert next(asked) < questions + 10
    run.live()
    assert [commit["commit"] for commit in run.commits] == list(range(1, 25))
    if sync == "bsp":
        whole = Run(settings_for(sync, batch=4))
        whole.live()
        assert torch.equal(run.model, whole.model)


def forget_unsaved(run: Run, folder: Path) -> Checkpoint:
    """Leave the commits that the newest checkpoint holds, which is returned."""
    newest = read_sealed(max(folder.glob("[0-9]*.pt")))
    checkpoint = load_checkpoint(folder, newest["signature"])
    run.events = run.commits[: checkpoint.rounds["commits"]]
    return checkpoint


@pytest.mark.parametrize("every", [1, 4, 7])
@pytest.mark.parametrize("commit", [13, 16, 24])
@pytest.mark.parametrize("diverges_in", [0, 4])
def test_each_checkpoint_has_its_states_whenever_a_kill_comes(
    every: int, commit: int, diverges_in: int, tmp_path: Path
) -> None:
    """A round that is refused brings no commit, while those of the others are saved."""
    run = Run(settings_for("bsp", every=every), tmp_path)
    with pytest.raises(Killed):
        run.live(killed_at=commit, diverging={2: [diverges_in]})
    checkpoint = forget_unsaved(run, tmp_path)
    assert 0 <= commit - checkpoint.rounds["commits"] <= every * len(SLOWNESS)
    lost: list[Path] = []
    note_lost_states(tmp_path, checkpoint.worker_commits, lambda file, *_: lost.append(file))
    assert not lost
    run.live()
    assert [commit["commit"] for commit in run.commits] == list(range(1, 25))
    if not diverges_in:
        whole = Run(settings_for("bsp"))
        whole.live()
        assert torch.equal(run.model, whole.model)


@pytest.mark.parametrize(
    ("sync", "every", "written"),
    [("bsp", 1, [5, 6, 7, 8]), ("bsp", 7, [4, 7, 8]), ("asp", 7, None)],
)
def test_states_are_written_only_where_a_checkpoint_may_need_them(
    sync: str, every: int, written: list[int] | None, tmp_path: Path
) -> None:
    """And as the worker leaves, that before the last; in ASP at each commit of any worker."""
    run = Run(settings_for(sync, every=every), tmp_path)
    run.live()
    commits = sum(commit["worker"] == 1 for commit in run.commits)
    files = sorted(tmp_path.glob("worker-1-*.pt"))
    assert [int(file.stem[-8:]) for file in files] == (written or [*range(1, commits + 1)])


@pytest.mark.parametrize(("sync", "even_epochs"), [("bsp", 1), ("ssp", 2)])
def test_adaptive_shares_make_a_slow_worker_cost_its_own_share_alone(
    sync: str, even_epochs: int
) -> None:
    """In the first epoch it is measured, and in SSP the next has begun by then."""
    adaptive = Run(settings_for(sync, adaptive=True))
    adaptive.live()
    first, *others = (epoch_seconds(adaptive, epoch) for epoch in range(4))
    assert others[: even_epochs - 1] == [pytest.approx(first)] * (even_epochs - 1)
    for seconds in others[even_epochs - 1 :]:  # of three workers, one of which does a sixth
        assert seconds < 1.5 * first / SLOWNESS[2] * 3 / (2 + 1 / SLOWNESS[2])
    assert adaptive.seconds < 1.1 * (first + sum(others))
    if sync == "bsp":
        even = Run(settings_for(sync))
        even.live()
        assert first == pytest.approx(even.seconds / 4)
    else:
        assert max(leads(adaptive.commits)) == 1
    visits = Counter(
        (commit["epoch"], position)
        for commit in adaptive.commits
        for position in range(commit["begin"], commit["end"])
    )
    assert visits == {(epoch, position): 1 for epoch in range(4) for position in range(60)}


@pytest.mark.parametrize("sync", ["bsp", "ssp"])
def test_adaptive_shares_follow_the_speeds_that_are_measured(sync: str, tmp_path: Path) -> None:
    """Real ranks, the last of which needs 0.15 s more for each step."""
    out = tmp_path / "out"
    settings = settings_for(sync, adaptive=True).model_dump(mode="json", exclude_defaults=True)
    settings["model"]["name"] = "models:watched"
    settings["data"]["synthetic_samples"] = 240
    settings["schedule"]["epochs"] = 8
    settings["run"] = {"output": str(out)}
    config = tmp_path / "slow.toml"
    config.write_text(parse_settings(settings, "test").to_toml())
    succeed("hdb", "train", config, ranks=4, cwd=PROGRAMS, SLOW="3", SLOW_SECONDS="0.15")
    shares = Counter[tuple[int, int]]()
    commits = [event for event in events(out) if event["event"] == "commit"]
    for commit in commits:
        shares[commit["epoch"], commit["worker"]] += commit["samples"]
    assert [shares[0, worker] for worker in (1, 2, 3)] == [80, 80, 80]
    for epoch in range(8):
        assert sum(shares[epoch, worker] for worker in (1, 2, 3)) == 240
    for epoch in range(3, 8):
        assert shares[epoch, 3] < 40
    measured = [event["slowness"] for event in events(out) if event["event"] == "adapted"]
    *others, slow = measured[0]
    assert slow > 3 * max(others)


def epoch_seconds(run: Run, epoch: int) -> float:
    """Of the slowest worker's rounds."""
    seconds = Counter[int]()
    for commit in run.commits:
        if commit["epoch"] == epoch:
            seconds[commit["worker"]] += commit["train_seconds"]
    return max(seconds.values())
