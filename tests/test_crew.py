"""The server's account of its workers, and who they are after a resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from programs.lives import Run, settings_for

from hpc_hdb.plan import Group
from hpc_hdb.train.crew import Crew


def test_a_replacement_that_never_joins_counts_as_silent_after_a_minute() -> None:
    crew = Crew([Group.LARGE, Group.SMALL])
    crew.lose(2)
    crew.await_replacement(2, now=10.0)
    assert crew.silent(now=69.0, least=1.0, rounds=3.0) == []
    assert crew.silent(now=71.0, least=1.0, rounds=3.0) == [2]
    assert crew.silent(now=71.0, least=90.0, rounds=3.0) == []
    crew.admit(2)
    assert crew.silent(now=71.0, least=1.0, rounds=3.0) == []


def test_who_returns_is_as_far_as_the_slowest_of_the_others_and_its_commits_are_its_own() -> None:
    """By its own number of commits it finds its optimizer's state."""
    crew = Crew([Group.LARGE] * 4)
    crew.commits.update({1: 9, 2: 10, 3: 4, 4: 0})
    crew.spare_returned(staleness=1)
    assert [crew.lead(worker) for worker in (1, 2, 3, 4)] == [0, 1, 0, 0]
    assert crew.commits == {1: 9, 2: 10, 3: 4, 4: 0}
    crew.commits[2] += 1
    crew.spare_returned(staleness=1)
    assert [crew.lead(worker) for worker in (1, 2, 3, 4)] == [0, 2, 0, 0]


@pytest.mark.usefixtures("beside_models")
def test_the_groups_of_a_resumed_run_are_those_of_the_plan_in_force(tmp_path: Path) -> None:
    """One of three small-batch workers is dropped, and as many go on as are left."""
    run = Run(settings_for("asp", small_workers=3, refusals=1), tmp_path)
    run.live_until(10, slowness=(1, 1, 1, 1), diverging={4: [1]})
    before = len(run.commits)
    run.live(slowness=(1, 1, 1))
    (plan,) = run.named("plan")
    assert (plan["workers"], plan["small_workers"]) == (3, 2)
    groups = {commit["worker"]: commit["group"] for commit in run.commits[before:]}
    assert groups == {1: "large", 2: "small", 3: "small"}


@pytest.mark.usefixtures("beside_models")
@pytest.mark.parametrize("commits", [0, 5], ids=["before the first commit", "later"])
@pytest.mark.parametrize("workers", [2, 4])
def test_a_run_of_three_goes_on_with_others(commits: int, workers: int, tmp_path: Path) -> None:
    run = Run(settings_for("bsp", small_workers=2), tmp_path)
    run.live_until(commits, slowness=(1, 1, 1))
    run.live(slowness=(1,) * workers)
    (plan,) = run.named("plan")
    assert plan["workers"] == workers
    assert plan["from_epoch"] == (1 if commits else 0)
    visits = Counter(
        (commit["epoch"], position)
        for commit in run.commits
        for position in range(commit["begin"], commit["end"])
    )
    assert visits == {(epoch, position): 1 for epoch in range(4) for position in range(60)}
    last = Counter(commit["worker"] for commit in run.commits if commit["epoch"] == 3)
    assert last == dict.fromkeys(range(1, workers + 1), 2)
