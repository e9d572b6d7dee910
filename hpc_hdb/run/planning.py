"""From settings to the plan of a run: where its time model comes from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from hpc_hdb.cluster.roles import count_workers
from hpc_hdb.config import Settings
from hpc_hdb.errors import NotKnownYet, UserError
from hpc_hdb.plan import BatchTime, Stage, TrainingPlan, fit_timings, plan_training
from hpc_hdb.plan.cuts import epoch_bounds
from hpc_hdb.train.data import count_images
from hpc_hdb.train.memory import free_memory, room_for
from hpc_hdb.train.profile import measure_steps, read_timing, sweep_sizes
from hpc_hdb.train.trainer import Trainer

T = TypeVar("T")


class WorkerCounts(NamedTuple):
    """How many workers a run has, and how many ranks share the batches of each."""

    workers: int
    ranks: int

    @classmethod
    def of(cls, settings: Settings, workers: int | None) -> WorkerCounts:
        """That of a run with so many workers, by default ``plan.workers``.

        All-reduce makes them ranks of a single one.
        """
        workers = workers or settings.plan.workers
        if settings.server.sync == "allreduce":
            return cls(1, workers)
        return cls(workers, settings.server.ranks_per_worker)


def count_planned(settings: Settings, ranks: int) -> int:
    """The workers of `WorkerCounts.of` that so many ranks make, the servers' among them.

    Raises
    ------
    UserError
        If they do not divide.
    """
    server = settings.server
    if server.sync == "allreduce":
        return ranks
    return count_workers(ranks, server.servers, server.ranks_per_worker)


def rank_timing(settings: Settings) -> dict[int, BatchTime] | None:
    """The time model of one rank, of the configuration or its timing file.

    None if it is to be measured.
    """
    if isinstance(settings.plan.timing, Path):
        return read_timing(settings.plan.timing)[0]
    return settings.inline_timing()


def known_timing(settings: Settings, workers: int | None = None) -> dict[int, BatchTime] | None:
    """The time model of a worker, where `rank_timing` knows that of a rank.

    Of ranks that share a batch each has only its part of the images. `workers` is as in
    `WorkerCounts.of`.
    """
    ranks = WorkerCounts.of(settings, workers).ranks
    known = rank_timing(settings)
    if known is None or ranks == 1:
        return known
    return {
        side: replace(line, seconds_per_image=line.seconds_per_image / ranks)
        for side, line in known.items()
    }


def stages_with_batches(settings: Settings, workers: int | None = None) -> tuple[Stage, ...]:
    """The schedule, its large batches from the timing file where the configuration has none.

    A configured batch is a worker's, and with all-reduce a rank's; a measured one a rank's.
    `workers` is as in `WorkerCounts.of`.
    """
    stages = settings.schedule.stages()
    shared = WorkerCounts.of(settings, workers).ranks
    ranks = shared if settings.server.sync == "allreduce" else 1
    batches = {stage.resolution: stage.large_batch for stage in stages}
    if not settings.schedule.large_batch and isinstance(settings.plan.timing, Path):
        ranks = shared
        batches |= read_timing(settings.plan.timing)[1]
    return tuple(
        replace(stage, large_batch=batch and batch * ranks)
        for stage, batch in ((stage, batches[stage.resolution]) for stage in stages)
    )


def large_batch_note(settings: Settings) -> str:
    """Where a rank is to train more images at once than were measured; empty if nowhere."""
    schedule, timing = settings.schedule, settings.plan.timing
    if not schedule.large_batch or not isinstance(timing, Path):
        return ""
    measured = read_timing(timing)[1]
    ranks = 1 if settings.server.sync == "allreduce" else settings.server.ranks_per_worker
    stages = {stage.resolution: stage.large_batch or 0 for stage in schedule.stages()}
    beyond = [
        f"{batch} images at {side} px, measured {measured[side] * ranks}"
        for side, batch in stages.items()
        if side in measured and batch > measured[side] * ranks
    ]
    if not beyond:
        return ""
    return (
        f"schedule.large_batch is more than the largest batch of {timing} ({'; '.join(beyond)}): "
        "it may not fit; --set 'schedule.large_batch=[]' takes what was measured"
    )


def known_beforehand(timing: dict[int, BatchTime] | None) -> dict[int, BatchTime]:
    """What `rank_timing` or `known_timing` gave; raises NotKnownYet where that is None."""
    if timing is None:
        raise NotKnownYet(
            'plan.timing = "profile" is measured when a run starts: to know it beforehand write '
            "timing.json with 'hdb profile', then --set plan.timing=timing.json"
        )
    return timing


def ask_data(question: Callable[[], T]) -> T:
    """What the training images answer; raises NotKnownYet where they cannot be had."""
    try:
        return question()
    except UserError as error:
        raise NotKnownYet(f"{error}; or give their number: --samples") from None


def plan_beforehand(
    settings: Settings, workers: int | None = None, samples: int | None = None
) -> TrainingPlan:
    """The plan of a run that has not begun.

    Parameters
    ----------
    workers : int, optional
        As in `WorkerCounts.of`.
    samples : int, optional
        Training images; by default those of the data.

    Raises
    ------
    NotKnownYet
        If the time model or the number of images is.
    UserError
        As `make_plan`.
    """
    timing = known_beforehand(known_timing(settings, workers))
    if samples is None:
        samples = ask_data(lambda: count_images(settings.data))
    return make_plan(settings, workers or settings.plan.workers, samples, timing)


def make_plan(
    settings: Settings, workers: int, samples: int, timing: Mapping[int, BatchTime]
) -> TrainingPlan:
    """Solve the plan; `workers` is as in `WorkerCounts.of`.

    Raises
    ------
    UserError
        If it is infeasible, or cuts shares into more commits than they have samples, or batches
        into more ranks than they have images.
    """
    counts = WorkerCounts.of(settings, workers)
    plan = plan_training(
        stages_with_batches(settings, workers),
        timing,
        samples,
        counts.workers,
        0 if settings.server.sync == "allreduce" else settings.plan.small_workers,
        settings.plan.time_ratio,
    )
    least = min(stage.small_batch or stage.large_batch or 0 for stage in plan.stages)
    if least < counts.ranks:
        raise UserError(
            f"a batch of {least} images cannot be shared by {counts.ranks} ranks: use larger "
            "batches, or fewer ranks in a worker (server.ranks_per_worker)"
        )
    plan = replace(plan, ranks=counts.ranks)
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
