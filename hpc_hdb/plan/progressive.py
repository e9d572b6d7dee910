"""Cyclic progressive learning: from an epoch to learning rate, resolution, dropout and batches.

Source: Lu et al., arXiv 2509.26092. Training is cut at the learning-rate milestones, and each
piece into equal sub-stages of rising resolution, so that the resolution cycles from low to
high at every learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpc_hdb.errors import UserError
from hpc_hdb.plan.learning_rate import Decay, RateSchedule


@dataclass(frozen=True)
class Stage:
    """Settings that hold from `start_epoch` up to, not including, `end_epoch`.

    Attributes
    ----------
    start_epoch, end_epoch : int
        Half-open range of epochs, counted from 0.
    learning_rate : float
        At its start: before warm-up, and before scaling with batch and workers.
    resolution : int
        Side of the square training images, in pixels.
    dropout : float
        Probability before the classifier.
    large_batch : int or None
        ``B_L`` at this resolution, in images; None until measured.
    small_batch : int or None
        ``B_S`` at this resolution; None until a timing is known or without small workers.
    """

    start_epoch: int
    end_epoch: int
    learning_rate: float
    resolution: int
    dropout: float
    large_batch: int | None
    small_batch: int | None = None


def cut_stages(
    epochs: int,
    learning_rate: float,
    milestones: Sequence[int],
    factor: float,
    resolutions: Sequence[int],
    dropout: Sequence[float],
    large_batch: Sequence[int] = (),
    cyclic: bool = True,
    decay: Decay = "step",
    warmup: float = 0.0,
) -> tuple[Stage, ...]:
    """Cut training into stages.

    Parameters
    ----------
    epochs : int
        Length of training.
    learning_rate, factor, decay, warmup
        Of the `RateSchedule`; its step decay multiplies the rate by `factor` at each milestone.
    milestones : sequence of int
        Epochs at which a new cycle of resolutions begins, rising, within ``1..epochs-1``.
    resolutions : sequence of int, length r
        Image sides in pixels, rising.
    dropout : sequence of float, length r
        Dropout of each resolution.
    large_batch : sequence of int, length r or 0
        ``B_L`` of each resolution; empty where it is not known yet.
    cyclic : bool
        False trains at the highest resolution alone.

    Returns
    -------
    tuple of Stage
        Without gaps, from epoch 0 to `epochs`.

    Raises
    ------
    UserError
        If the lengths differ, the milestones are out of order, a learning-rate stage has fewer
        epochs than there are resolutions, or the warm-up does not end before training.
    """
    if not resolutions:
        raise UserError("schedule.resolutions is empty: give at least one image size")
    if len(dropout) != len(resolutions):
        raise UserError(
            f"schedule.dropout has {len(dropout)} values for {len(resolutions)} resolutions: "
            "give one for each"
        )
    if large_batch and len(large_batch) != len(resolutions):
        raise UserError(
            f"schedule.large_batch has {len(large_batch)} values for {len(resolutions)} "
            "resolutions: give one for each, or none to take the measured ones"
        )
    if list(resolutions) != sorted(set(resolutions)):
        raise UserError(f"schedule.resolutions must rise, not {list(resolutions)}")
    bounds = [0, *milestones, epochs]
    if any(later <= earlier for earlier, later in pairwise(bounds)):
        raise UserError(
            f"schedule.milestones must rise and lie between 1 and {epochs - 1} "
            f"for {epochs} epochs, not {list(milestones)}"
        )
    if warmup >= epochs:
        raise UserError(
            f"schedule.warmup = {warmup:g} does not end before training, which has {epochs} "
            "epochs: make it shorter"
        )
    rates = RateSchedule(learning_rate, epochs, decay, tuple(milestones), factor, warmup)
    batches: list[int | None] = list(large_batch) or [None] * len(resolutions)
    chosen = list(zip(resolutions, dropout, batches, strict=True))
    if not cyclic:
        chosen = chosen[-1:]
    stages = []
    for start, end in pairwise(bounds):
        if end - start < len(chosen):
            raise UserError(
                f"the learning-rate stage from epoch {start} to {end} is too short to cycle "
                f"through {len(chosen)} resolutions: move the milestones or use fewer resolutions"
            )
        for position, (resolution, probability, batch) in enumerate(chosen):
            begin = start + (end - start) * position // len(chosen)
            stages.append(
                Stage(
                    begin,
                    start + (end - start) * (position + 1) // len(chosen),
                    rates.of_stage(begin),
                    resolution,
                    probability,
                    batch,
                )
            )
    return tuple(stages)


def stage_index(stages: Sequence[Stage], epoch: int) -> int:
    """Index of the stage that holds at `epoch`; the last one from the end of training on."""
    for index, stage in enumerate(stages):
        if epoch < stage.end_epoch:
            return index
    return len(stages) - 1
