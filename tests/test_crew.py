"""The server's account of its workers."""

from __future__ import annotations

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
