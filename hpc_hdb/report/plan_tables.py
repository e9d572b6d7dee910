"""Tables of what is decided before a run: schedule, time model, a single dual-batch plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from hpc_hdb.config import Schedule
from hpc_hdb.plan import DualBatchPlan, Group, Stage, TrainingPlan, scale_rate
from hpc_hdb.report.units import format_count

if TYPE_CHECKING:
    from hpc_hdb.train.profile import Timing

_WHOLE = 0.8
"""Of a planned batch: steps of more images than that count as whole."""


def schedule_table(stages: Sequence[Stage]) -> Table:
    """The stages, whether or not the small batches are known yet."""
    table = _table("epochs", "learning rate", "resolution", "dropout", "large batch", "small batch")
    for stage in stages:
        table.add_row(
            f"{stage.start_epoch} to {stage.end_epoch}",
            f"{stage.learning_rate:g}",
            str(stage.resolution),
            f"{stage.dropout:g}",
            str(stage.large_batch or "-"),
            str(stage.small_batch or "-"),
        )
    return table


def rate_note(schedule: Schedule, workers: int) -> str:
    """What becomes of the learning rates in a table of stages; empty where they stay constant.

    Parameters
    ----------
    workers : int
        Those whose models are merged; all ranks of all-reduce are one.
    """
    parts = []
    scale = scale_rate(schedule.scale_with_workers, workers)
    if scale != 1:
        parts.append(f"times {scale:g} with {workers} workers")
    if schedule.scale_with_batch != "none":
        rule = {"linear": "in proportion to", "sqrt": "with the root of"}[schedule.scale_with_batch]
        parts.append(f"{rule} the batch, from {schedule.reference_batch} images on")
    if schedule.warmup:
        parts.append(f"warmed up over {schedule.warmup:g} epoch{'s' * (schedule.warmup != 1)}")
    if schedule.decay != "step":
        parts.append(f"{schedule.decay} decay to zero")
    return f"learning rate: as a stage begins; {', '.join(parts)}" if parts else ""


def commit_note(plan: TrainingPlan, commits_per_epoch: int) -> str:
    """Where rounds cut batches to less than four fifths of those planned; empty if nowhere."""
    shares = plan.shares
    cuts = []
    for stage in plan.stages:
        for group, batch, share in (
            (Group.LARGE, stage.large_batch, shares.large_share),
            (Group.SMALL, stage.small_batch, shares.small_share),
        ):
            if batch and shares.size(group):
                images = share / commits_per_epoch
                steps = math.ceil(images / batch)
                cuts.append((images / steps / batch, stage.resolution, images, steps, batch))
    filled, resolution, images, steps, batch = min(cuts)
    if filled > _WHOLE:
        return ""
    return (
        f"commits: a round of {images:.0f} images is {format_count(steps, 'step')} of "
        f"{images / steps:.0f} at {resolution} px, where batches of {batch} are planned: another "
        "server.commits_per_epoch may leave them whole"
    )


def timing_table(timings: Mapping[int, Timing]) -> Table:
    """The fitted time model of each resolution, and how well it fits."""
    table = _table(
        "resolution", "ms per image (a)", "ms per batch (c)", "largest batch", "images/s",
        "mean error", "worst error",
    )  # fmt: skip
    for resolution, timing in timings.items():
        line = timing.fit.line
        table.add_row(
            str(resolution),
            f"{line.seconds_per_image * 1e3:.4f}",
            f"{line.overhead * 1e3:.3f}",
            str(timing.large_batch),
            f"{timing.large_batch / line.of_batch(timing.large_batch):.0f}",
            f"{timing.fit.mean_error:.1%}",
            f"{timing.fit.worst_error:.1%}",
        )
    return table


def dual_batch_table(plan: DualBatchPlan) -> Table:
    """One dual-batch plan."""
    table = _table("group", "workers", "batch", "samples per epoch", "update factor")
    table.add_row(
        "large", str(plan.large_workers), str(plan.large_batch), str(plan.large_share), "1"
    )
    if plan.update_factor is not None:
        table.add_row(
            "small",
            str(plan.small_workers),
            str(plan.small_batch),
            str(plan.small_share),
            f"{plan.update_factor:.4f}",
        )
    table.caption = f"predicted epoch: {plan.epoch_seconds:.6g} s"
    return table


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    return table
