"""Runs on the virtual clock whose workers are slow, diverge, or are others after a resume."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpc_hdb.cluster.virtual import VirtualCluster
from hpc_hdb.config import Settings
from hpc_hdb.config_files import parse_settings
from hpc_hdb.plan import TrainingPlan
from hpc_hdb.run.build import make_evaluator, make_trainer
from hpc_hdb.run.planning import known_timing, make_plan
from hpc_hdb.train.checkpoint import load_checkpoint
from hpc_hdb.train.data import open_data
from hpc_hdb.train.server import Interrupted, ParameterServer
from hpc_hdb.train.worker import run_worker

SLOWNESS = (1, 1, 6)
"""How many times as long as predicted each of three workers takes."""


def settings_for(
    sync: str,
    staleness: int = 1,
    batch: int = 10,
    small_workers: int = 0,
    epochs: int = 4,
    every: int = 1,
    **server: object,
) -> Settings:
    values = {
        "data": {"source": "synthetic", "synthetic_samples": 60, "synthetic_side": 8},
        "model": {"name": "models:tiny"},
        "plan": {"small_workers": small_workers, "timing": {"8": [1e-3, 1e-3]}},
        "schedule": {"epochs": epochs, "resolutions": [8], "large_batch": [batch]},
        "server": {"sync": sync, "staleness": staleness, "commits_per_epoch": 2} | server,
        "run": {"checkpoint_every": every},
    }
    return parse_settings(values, "test")


class Killed(Exception):
    """As a SIGKILL: nothing is written after it."""


class Run:
    """One or more lives of a run; its plan is made in the first."""

    def __init__(self, settings: Settings, folder: Path | None = None) -> None:
        self.settings = settings
        self.folder = folder
        self.events: list[dict] = []
        self.seconds = 0.0
        self.model = torch.empty(0)
        self._plan: TrainingPlan | None = None

    @property
    def commits(self) -> list[dict]:
        return self.named("commit")

    def named(self, name: str) -> list[dict]:
        return [event for event in self.events if event["event"] == name]

    def live_until(self, commits: int, **how: Any) -> None:
        """Train until a signal comes after so many commits of all lives."""
        with pytest.raises(Interrupted):
            self.live(lambda: 15 if len(self.commits) >= commits else 0, **how)

    def live(
        self,
        signal_number: Callable[[], int] = lambda: 0,
        slowness: Sequence[float] = SLOWNESS,
        diverging: Mapping[int, Collection[int]] | None = None,
        killed_at: int = 0,
    ) -> None:
        """Train to the end, or until a signal; then go on.

        Parameters
        ----------
        slowness : sequence of float
            Of each worker.
        diverging : mapping of int to collection of int, optional
            Which steps of a worker, counted from 1, begin with images that are not finite.
        killed_at : int
            Commit at which `Killed` is raised.
        """

        def emit(name: str, values: dict) -> None:
            self.events.append({"event": name} | values)
            if name == "commit" and values["commit"] == killed_at:
                raise Killed

        data = open_data(self.settings.data, "train")
        cpu = torch.device("cpu")
        evaluator = make_evaluator(self.settings, cpu, data.classes)
        timing = known_timing(self.settings)
        assert timing is not None
        if self._plan is None:
            self._plan = make_plan(self.settings, len(slowness), len(data.labels), timing)
        cluster = VirtualCluster(len(slowness), slowness, signal_number=signal_number)
        server = ParameterServer(
            cluster.server,
            self._plan,
            self.settings,
            evaluator.parameters.flat.clone(),
            evaluator,
            emit,
            self.folder,
            signal_number,
            inline=True,
        )
        if self.commits:
            assert self.folder is not None
            checkpoint = load_checkpoint(self.folder, evaluator.parameters.signature)
            assert checkpoint.rounds["commits"] == len(self.commits), "a signal loses nothing"
            server.resume(checkpoint, 0)
        if (new_plan := server.members.fit_plan()) is not None:
            self.events.append({"event": "plan"} | new_plan)
        trainers = [make_trainer(self.settings, data, cpu) for _ in cluster.workers]
        for worker, steps in (diverging or {}).items():
            _spoil(trainers[worker - 1].model, steps)
        synchronous, kept = self.settings.server.synchronous, self.settings.run.states_kept
        workers = [
            run_worker(link, trainer, synchronous, self.folder, kept)
            for link, trainer in zip(cluster.workers, trainers, strict=True)
        ]
        self.model = cluster.run(server.run(), workers)
        self.seconds = cluster.time


def _spoil(model: nn.Module, steps: Collection[int]) -> None:
    """Give the model images that are not finite in those of its training steps."""
    numbers = itertools.count(1)

    def spoil(module: nn.Module, images: tuple[Tensor, ...]) -> Any:
        if module.training and next(numbers) in steps:
            return tuple(image * torch.nan for image in images)
        return None

    model.register_forward_pre_hook(spoil)
