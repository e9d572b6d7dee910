"""What may befall a run, when, in which mode, and what comes of it.

``docs/faults.md`` is checked against this table, and every row is run under mpirun.
"""

from __future__ import annotations

from typing import NamedTuple

MODES = ("asp", "ssp", "bsp")


class Accident(NamedTuple):
    """A fault of one rank.

    Attributes
    ----------
    victim : int
        Number of the worker; 0 is the parameter server.
    fault : str
        As `programs.faulty` knows it.
    moment : str
        As `programs.faulty` knows it; the number of the time it comes follows a colon.
    outcome : str
        "lost", "replaced" (lost, and another takes its place), "dropped", "redone" (the round),
        "spared" (it goes on), "called_off" (a replacement that does not come), or for the whole
        run "ended".
    again : bool
        It is the worker's replacement that meets with it.
    """

    victim: int
    fault: str
    moment: str
    outcome: str
    again: bool = False

    def inject(self) -> str:
        """For ``$HDB_FAULT``."""
        return f"{self.victim}{'+' * self.again}:{self.fault}@{self.moment}"


class Scenario(NamedTuple):
    """Accidents of one run, of which some worker is left.

    Attributes
    ----------
    ranks : int
    accidents : tuple of Accident
    overrides : tuple of str
        Settings of their own.
    step_seconds : float
        What each training step takes beside its work, so that the run outlasts the accidents.
    servers : int
        Of the ranks.
    """

    ranks: int
    accidents: tuple[Accident, ...]
    overrides: tuple[str, ...] = ()
    step_seconds: float = 0.0
    servers: int = 1

    @property
    def workers(self) -> int:
        return self.ranks - self.servers

    def inject(self) -> str:
        return ",".join(accident.inject() for accident in self.accidents)


def _survived(mode: str) -> dict[str, Scenario]:
    pushing = "scatter" if mode == "bsp" else "push"
    merging = "reduce" if mode == "bsp" else "reply"
    drop = ("server.silent_worker=drop", "server.silent_seconds=4")
    scenarios = {
        "deaths": Scenario(
            6,
            (
                Accident(5, "kill", "join", "lost"),  # the only small-batch worker
                Accident(4, "kill", "round:1", "lost"),
                Accident(3, "kill", f"{pushing}:2", "lost"),
                Accident(2, "kill", f"{merging}:4", "lost"),
            ),
        ),
        "crashes": Scenario(
            6,
            (
                Accident(5, "segv", "round:2", "lost"),
                Accident(4, "abort", f"{merging}:3", "lost"),
                Accident(3, "nan", "round:1", "redone"),
                Accident(2, "nan", "round:0", "dropped"),
                Accident(1, "kill", "leave", "lost"),
            ),
        ),
        "several servers": Scenario(
            7,
            (
                Accident(5, "kill", f"{pushing}:2", "lost"),
                Accident(4, "kill", f"{pushing}:2", "lost"),
                Accident(3, "stop", f"{pushing}:3", "lost"),
                Accident(2, "kill", f"{merging}:5", "lost"),
            ),
            drop,
            servers=2,
        ),
        "hangs": Scenario(
            4,
            (
                Accident(3, "stop", "reduce:2" if mode == "bsp" else f"{pushing}:2", "lost"),
                Accident(2, "stop", "round:5", "lost"),
            ),
            drop,
        ),
        "naps": Scenario(
            3,
            (Accident(2, "nap", "round:2", "spared"),),
            ("server.silent_seconds=1",),
        ),
        "replacements": Scenario(
            4,
            (
                Accident(2, "kill", "join", "replaced"),
                Accident(3, "kill", "round:2", "replaced"),
                Accident(2, "kill", "round:2", "lost", again=True),
            ),
            ("server.replacements=2",),
            step_seconds=0.2,
        ),
        "all at once": Scenario(
            3,
            (
                Accident(1, "kill", "round:2", "replaced"),
                Accident(2, "kill", "round:2", "lost"),
                Accident(2, "stop", "start", "called_off", again=True),
            ),
            ("server.replacements=2",),
        ),
    }
    if mode == "ssp":  # but for who may go on, the same as ASP
        for name in ("several servers", "naps", "all at once"):
            del scenarios[name]
    return scenarios


SURVIVED = {(mode, name): scenario for mode in MODES for name, scenario in _survived(mode).items()}
"""Runs that come to their end, with exit status 0 and whole epochs."""


class Life(NamedTuple):
    """One start of a run that is begun once, ended by accidents, and resumed until it is done.

    Attributes
    ----------
    ranks : int
    tolerant : bool
        Whether MPI has fault mitigation.
    accidents : tuple of Accident
    told : str
        What standard error says; empty where the launcher alone speaks.
    """

    ranks: int
    tolerant: bool
    accidents: tuple[Accident, ...]
    told: str


def _lives(mode: str) -> list[Life]:
    pushing = "reduce" if mode == "bsp" else "push"
    return [
        Life(
            4,
            True,
            (
                Accident(1, "kill", "round:2", "lost"),
                Accident(2, "kill", f"{pushing}:2", "lost"),
                Accident(3, "kill", "round:3", "ended"),
            ),
            "all workers were lost: go on with hdb train --resume {run}",
        ),
        Life(
            3,
            True,
            (Accident(0, "kill", "merge:3", "ended"),),
            "rank 0, the parameter server, was lost: go on with hdb train --resume {run}",
        ),
        Life(3, False, (Accident(2, "kill", "round:2", "ended"),), ""),
        Life(
            3,
            False,
            (Accident(1, "nan", "round:0", "dropped"), Accident(2, "nan", "round:0", "ended")),
            "training diverged",
        ),
        Life(4, True, (), ""),
    ]


LIVES = {mode: _lives(mode) for mode in ("asp", "bsp")}


def cells() -> list[tuple[str, Accident]]:
    """Every accident with its mode."""
    found = [(mode, a) for (mode, _), s in SURVIVED.items() for a in s.accidents]
    return found + [(mode, a) for mode in LIVES for life in LIVES[mode] for a in life.accidents]
