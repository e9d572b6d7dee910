"""From settings to the plan of a run: where its time model comes from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, Stage, TrainingPlan, fit_timings, plan_training
from hpc_hdb.plan.rounds import epoch_bounds
from hpc_hdb.train.memory import free_memory, room_for
from hpc_hdb.train.profile import measure_steps, read_timing, sweep_sizes
from hpc_hdb.train.trainer import Trainer


class Crew(NamedTuple):
    """How many workers a run has, and how many ranks share the batches of each."""

    workers: int
    ranks: int

    @classmethod
    def of(cls, settings: Settings, workers: int | None) -> Crew:
        """That of a run with so many workers, by default ``plan.workers``.

        All-reduce makes them ranks of a single one.
        """
        workers = workers or settings.plan.workers
        if settings.server.sync == "allreduce":
            return cls(1, workers)
        return cls(workers, settings.server.ranks_per_worker)


def known_timing(settings: Settings, workers: int | None = None) -> dict[int, BatchTime] | None:
    """The time model of the configuration or its timing file; None if it is to be measured.

    Both are of one rank; of those that share a batch each has only its part of the images.
    `workers` is as in `Crew.of`.
    """
    ranks = Crew.of(settings, workers).ranks
    if isinstance(settings.plan.timing, Path):
        known: dict[int, BatchTime] | None = read_timing(settings.plan.timing)[0]
    else:
        known = settings.inline_timing()
    if known is None or ranks == 1:
        return known
    return {
        side: replace(line, seconds_per_image=line.seconds_per_image / ranks)
        for side, line in known.items()
    }


def stages_with_batches(settings: Settings, workers: int | None = None) -> tuple[Stage, ...]:
    """The schedule, its large batches from the timing file where the configuration has none.

    A configured batch is a worker's, and with all-reduce a rank's; a measured one a rank's.
    `workers` is as in `Crew.of`.
    """
    stages = settings.schedule.stages()
    shared = Crew.of(settings, workers).ranks
    ranks = shared if settings.server.sync == "allreduce" else 1
    batches = {stage.resolution: stage.large_batch for stage in stages}
    if not settings.schedule.large_batch and isinstance(settings.plan.timing, Path):
        ranks = shared
        batches |= read_timing(settings.plan.timing)[1]
    return tuple(
        replace(stage, large_batch=batch and batch * ranks)
        for stage, batch in ((stage, batches[stage.resolution]) for stage in stages)
    )


def make_plan(
    settings: Settings, workers: int, samples: int, timing: Mapping[int, BatchTime]
) -> TrainingPlan:
    """Solve the plan; `workers` is as in `Crew.of`.

    Raises
    ------
    UserError
        If it is infeasible, or cuts shares into more commits than they have samples, or batches
        into more ranks than they have images.
    """
    crew = Crew.of(settings, workers)
    plan = plan_training(
        stages_with_batches(settings, workers),
        timing,
        samples,
        crew.workers,
        0 if settings.server.sync == "allreduce" else settings.plan.small_workers,
        settings.plan.time_ratio,
    )
    least = min(stage.small_batch or stage.large_batch or 0 for stage in plan.stages)
    if least < crew.ranks:
        raise UserError(
            f"a batch of {least} images cannot be shared by {crew.ranks} ranks: use larger "
            "batches, or fewer ranks in a worker (server.ranks_per_worker)"
        )
    plan = replace(plan, ranks=crew.ranks)
    bounds = epoch_bounds(plan.shares, samples)
    smallest = min(end - start for start, end in itertools.pairwise(bounds))
    if settings.server.commits_per_epoch > smallest:
        raise UserError(
            f"server.commits_per_epoch = {settings.server.commits_per_epoch} cuts a share of "
            f"{smallest} samples into nothing: set it to {smallest} or less"
        )
    return plan


def check_resumed_data(plan: TrainingPlan, samples: int) -> None:
    """Raise UserError where a run is resumed with another number of training images."""
    if plan.samples != samples:
        raise UserError(
            f"the run was started with {plan.samples} training images, and there are {samples} "
            "now: bring the same ones back, or start a new run"
        )


def sweeps(settings: Settings, workers: int | None = None) -> dict[int, list[int]]:
    """Batch sizes to time at each resolution, for a run that measures as it starts.

    Raises
    ------
    UserError
        If the configuration has no large batches.
    """
    sizes: dict[int, list[int]] = {}
    for stage in stages_with_batches(settings, workers):
        if stage.large_batch is None:
            raise UserError(
                'schedule.large_batch is empty and plan.timing is "profile": set the largest '
                "batch of each resolution, or let 'hdb profile' find it and set plan.timing"
            )
        sizes[stage.resolution] = sweep_sizes(stage.large_batch)
    return sizes


def time_sweeps(trainer: Trainer, sizes: Mapping[int, list[int]]) -> list[float]:
    """Seconds per step of every batch size of every resolution, one after another.

    Raises
    ------
    UserError
        If a batch does not fit the memory.
    """
    times: list[float] = []
    for resolution, batches in sizes.items():
        free_memory(trainer.device)  # torch's of the resolution before is none that DALI can use
        with room_for(
            f"a batch of up to {max(batches)} images at {resolution}x{resolution}",
            trainer.device,
            "lower schedule.large_batch, or find what fits with 'hdb profile'",
        ):
            times += measure_steps(trainer, resolution, batches)
    return times


def fit_sweeps(sizes: Mapping[int, list[int]], seconds: Sequence[float]) -> dict[int, BatchTime]:
    """The time model by resolution, from what `time_sweeps` measured."""
    timing = {}
    start = 0
    for resolution, batches in sizes.items():
        measured = seconds[start : start + len(batches)]
        timing[resolution] = fit_timings(batches, measured).line
        start += len(batches)
    return timing
