"""Runs as the report sees them: a name, the events, their figures, the settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc_hdb.config_files import tomllib
from hpc_hdb.report.events import Event, read_log
from hpc_hdb.report.summary import run_facts, summarise


@dataclass(frozen=True)
class Run:
    """One run of a report.

    Attributes
    ----------
    name : str
        What it is called in the report.
    folder : Path
    events : list of Event
    settings : dict of str to str
        From its config.toml, by ``section.key``; empty where there is none to read.
    damaged_lines : int
        Of its event log, which are left out.
    """

    name: str
    folder: Path
    events: list[Event]
    settings: dict[str, str]
    damaged_lines: int

    @cached_property
    def summary(self) -> dict[str, Any]:
        return summarise(self.events)

    @cached_property
    def facts(self) -> Event:
        return run_facts(self.events)

    @cached_property
    def commits(self) -> list[Event]:
        return self.named("commit")

    @cached_property
    def evaluations(self) -> list[Event]:
        """By the commit they evaluate: one that runs beside the training ends after others."""
        return sorted(self.named("evaluation"), key=lambda event: event["commit"])

    @cached_property
    def stages(self) -> list[Event]:
        """Each stage as it was entered; a resumed run tells its current one again."""
        entered: dict[int, Event] = {}
        for event in self.named("stage"):
            entered.setdefault(event["stage"], event)
        return [entered[number] for number in sorted(entered)]

    @property
    def decays_in_steps(self) -> bool:
        """Whether the learning rate only changes at once, as a stage begins, after any warm-up."""
        return self.settings.get("schedule.decay", "step") == "step"

    @cached_property
    def commit_times(self) -> dict[int, float]:
        """Seconds at which each commit was merged; commit 0 is the model training began with."""
        return {0: 0.0} | {event["commit"]: event["time"] for event in self.commits}

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]

    def evaluated_at(self, evaluation: Event) -> float:
        """Seconds at which the evaluated model existed: the evaluation itself ends later."""
        return self.commit_times.get(int(evaluation["commit"]), float(evaluation["time"]))

    def seconds_to(self, accuracy: float) -> float:
        """Seconds until the model first had that accuracy; infinite if it never had."""
        times = [self.evaluated_at(e) for e in self.evaluations if e["accuracy"] >= accuracy]
        return min(times, default=float("inf"))


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs; one that is named twice is read once.

    Raises
    ------
    UserError
        If a folder holds no event log.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    runs = []
    for name, folder in zip(_names(unique), unique, strict=True):
        events, damaged = read_log(folder)
        runs.append(Run(name, folder, events, _read_settings(folder / "config.toml"), damaged))
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or where two are the same their whole paths."""
    names = [folder.resolve().name or str(folder) for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_printable(name) for name in names]


def _printable(text: str) -> str:
    """Without control characters and what no encoding can hold, which would spoil any output."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _read_settings(path: Path) -> dict[str, str]:
    """Settings as text; they are for show alone, so that those of any version will do."""
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {
        f"{section}.{key}": value if isinstance(value, str) else json.dumps(value, default=str)
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
