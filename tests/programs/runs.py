"""Kinds of short runs on the digits, and what a finished one has left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import TIMING
from torch import Tensor

PROGRAMS = Path(__file__).parent
"""Where the models lie that these runs train; their current folder."""

SAMPLES = 1437
EPOCHS = 4
STAGES = [(0.1, 16, 0.0), (0.1, 24, 0.1), (0.01, 16, 0.0), (0.01, 24, 0.1)]
"""Learning rate, resolution and dropout of the four epochs."""
TIME = {16: (4e-4, 2e-3), 24: (7e-4, 2e-3)}
"""What TIMING says: seconds per image and per batch, by resolution."""


@dataclass(frozen=True)
class Kind:
    """What distinguishes one run from another."""

    sync: str
    ranks: int
    small_workers: int
    commits_per_epoch: int
    keep_momentum: bool = True
    slow_rank: int = 0
    servers: int = 1
    model: str = "watched"

    @property
    def workers(self) -> int:
        return self.ranks - self.servers

    @property
    def total(self) -> int:
        return EPOCHS * self.workers * self.commits_per_epoch

    def settings(self, data: Path, output: Path, **more: object) -> list[str]:
        values = {
            "data.path": data,
            "model.name": f"models:{self.model}",
            "plan.workers": self.workers,
            "plan.small_workers": self.small_workers,
            "schedule.epochs": EPOCHS,
            "schedule.milestones": [2],
            "server.sync": self.sync,
            "server.servers": self.servers,
            "server.commits_per_epoch": self.commits_per_epoch,
            "train.keep_momentum": str(self.keep_momentum).lower(),
            "run.output": output,
        }
        pairs = [TIMING, *(f"{key}={value}" for key, value in (values | more).items())]
        return ["digits", *(word for pair in pairs for word in ("--set", pair))]


KINDS = {
    "asp-1": Kind("asp", 2, 0, 1),
    "asp-3": Kind("asp", 4, 1, 3, slow_rank=1),
    "ssp-4": Kind("ssp", 5, 2, 3, slow_rank=1),
    "bsp-1": Kind("bsp", 2, 0, 2),
    "bsp-2": Kind("bsp", 3, 1, 3),
    "bsp-3": Kind("bsp", 4, 1, 1, keep_momentum=False),
    "bsp-4": Kind("bsp", 5, 2, 1, model="heavy"),
    "ssp-3 on 2": Kind("ssp", 5, 1, 2, slow_rank=2, servers=2),
    "bsp-2 on 3": Kind("bsp", 5, 1, 3, servers=3),
}
"""By sync, number of workers, and number of servers where it is not one."""


@dataclass(frozen=True)
class Done:
    """A finished run."""

    kind: Kind
    folder: Path
    events: list[dict]
    steps: dict[int, list[dict]]
    """What the model saw in each training step, by worker (over MPI)."""

    @property
    def commits(self) -> list[dict]:
        return [event for event in self.events if event["event"] == "commit"]

    @property
    def evaluations(self) -> list[dict]:
        return [event for event in self.events if event["event"] == "evaluation"]

    @property
    def model(self) -> dict[str, Tensor]:
        return final_model(self.folder)


def final_model(run: Path) -> dict[str, Tensor]:
    """What a run has trained, by name."""
    state = torch.load(run / "model.pt", weights_only=True)
    return {name: value for name, value in state.items() if value.is_floating_point()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value.view(torch.int32), other[name].view(torch.int32)), name


def leads(commits: list[dict]) -> list[int]:
    """For every commit event: how far its worker was ahead when it began that round.

    Ahead of the slowest worker that still had rounds to do, in commits.
    """
    numbers: dict[int, list[int]] = {}
    for commit in commits:
        numbers.setdefault(commit["worker"], []).append(commit["commit"])
    found = []
    for commit in commits:
        start = commit["pulled_at"]
        counts = {worker: sum(n <= start for n in own) for worker, own in numbers.items()}
        active = [counts[worker] for worker, own in numbers.items() if own[-1] > start]
        found.append(counts[commit["worker"]] - min(active))
    return found
