"""From settings to the plan of a run: where its time model comes from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, Stage, TrainingPlan, fit_batch_time, plan_training
from hpc_hdb.plan.rounds import epoch_bounds
from hpc_hdb.train.profile import measure_steps, read_timing, sweep_sizes
from hpc_hdb.train.trainer import Trainer


def known_timing(settings: Settings) -> dict[int, BatchTime] | None:
    """The time model of the configuration or its timing file; None if it is to be measured."""
    if isinstance(settings.plan.timing, Path):
        return read_timing(settings.plan.timing)[0]
    return settings.inline_timing()


def stages_with_batches(settings: Settings) -> tuple[Stage, ...]:
    """The schedule, its large batches from the timing file where the configuration has none."""
    stages = settings.schedule.stages()
    if settings.schedule.large_batch or not isinstance(settings.plan.timing, Path):
        return stages
    measured = read_timing(settings.plan.timing)[1]
    return tuple(replace(stage, large_batch=measured.get(stage.resolution)) for stage in stages)


def make_plan(
    settings: Settings, workers: int, samples: int, timing: Mapping[int, BatchTime]
) -> TrainingPlan:
    """Solve the plan.

    Raises
    ------
    UserError
        If it is infeasible, or cuts shares into more commits than they have samples.
    """
    plan = plan_training(
        stages_with_batches(settings),
        timing,
        samples,
        workers,
        settings.plan.small_workers,
        settings.plan.time_ratio,
    )
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


def sweeps(settings: Settings) -> dict[int, list[int]]:
    """Batch sizes to time at each resolution, for a run that measures as it starts.

    Raises
    ------
    UserError
        If the configuration has no large batches.
    """
    sizes: dict[int, list[int]] = {}
    for stage in settings.schedule.stages():
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
        If a batch does not fit the GPU.
    """
    times: list[float] = []
    for resolution, batches in sizes.items():
        try:
            times += measure_steps(trainer, resolution, batches)
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"a batch of up to {max(batches)} images at {resolution}x{resolution} does not "
                "fit the GPU: lower schedule.large_batch, or find what fits with 'hdb profile'"
            ) from None
    return times


def fit_sweeps(sizes: Mapping[int, list[int]], seconds: Sequence[float]) -> dict[int, BatchTime]:
    """The time model by resolution, from what `time_sweeps` measured."""
    timing = {}
    start = 0
    for resolution, batches in sizes.items():
        measured = seconds[start : start + len(batches)]
        try:
            timing[resolution] = fit_batch_time(batches, measured, relative=True).line
        except UserError:  # the noise hides the overhead: count it as one image's time
            image = min(time / batch for batch, time in zip(batches, measured, strict=True))
            timing[resolution] = BatchTime(image, image)
        start += len(batches)
    return timing
