"""The plan of a whole run: one dual-batch plan for each stage of the progressive schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from hpc_hdb.errors import InfeasiblePlan, UserError
from hpc_hdb.plan.batch_time import BatchTime
from hpc_hdb.plan.dual_batch import DualBatchPlan, Group, plan_dual_batch
from hpc_hdb.plan.progressive import Stage


@dataclass(frozen=True)
class TrainingPlan:
    """What every rank does in every stage.

    Attributes
    ----------
    samples : int
        ``D``, training images per epoch.
    stages : tuple of Stage
        With the small batch filled in.
    plans : tuple of DualBatchPlan
        One per stage. Shares and factor are the same in all of them.
    timing : dict of int to BatchTime
        A worker's time model by resolution.
    ranks : int
        Ranks that share the batches of each worker.
    """

    samples: int
    stages: tuple[Stage, ...]
    plans: tuple[DualBatchPlan, ...]
    timing: dict[int, BatchTime]
    ranks: int = 1

    @property
    def shares(self) -> DualBatchPlan:
        """A plan for what does not depend on the resolution: shares, sizes, factor."""
        return self.plans[0]

    def batch(self, stage: int, group: Group) -> int:
        """Batch size of `group` in stage number `stage`, in images."""
        return self.plans[stage].batch(group)

    def predicted_seconds(self, start_epoch: float = 0.0) -> float:
        """Predicted seconds of training from `start_epoch` to the end."""
        return sum(
            max(0.0, stage.end_epoch - max(stage.start_epoch, start_epoch)) * plan.epoch_seconds
            for stage, plan in zip(self.stages, self.plans, strict=True)
        )

    def for_workers(self, workers: int, small_workers: int, time_ratio: float) -> TrainingPlan:
        """The plan of the same training for other workers.

        Parameters
        ----------
        workers : int
        small_workers : int
            The most that train the small batch; fewer, or none, where that has no plan.
        time_ratio : float
            As in `plan_dual_batch`.
        """
        stages = [replace(stage, small_batch=None) for stage in self.stages]
        small = min(small_workers, workers)
        while True:
            try:
                plan = plan_training(stages, self.timing, self.samples, workers, small, time_ratio)
                return replace(plan, ranks=self.ranks)
            except InfeasiblePlan:
                if not small:
                    raise
            small -= 1

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        shares = self.shares
        return {
            "samples": self.samples,
            "workers": shares.workers,
            "small_workers": shares.small_workers,
            "ranks_per_worker": self.ranks,
            "large_share": shares.large_share,
            "small_share": shares.small_share,
            "update_factor": shares.update_factor,
            "predicted_seconds": self.predicted_seconds(),
            "stages": [
                asdict(stage) | {"epoch_seconds": plan.epoch_seconds}
                for stage, plan in zip(self.stages, self.plans, strict=True)
            ],
            "timing": {str(side): asdict(line) for side, line in self.timing.items()},
        }

    @classmethod
    def from_dict(cls, values: dict, time_ratio: float) -> TrainingPlan:
        """The plan that `to_dict` wrote, solved again with the run's `time_ratio`.

        Raises
        ------
        UserError
            If the values do not make a plan, or are not all of one and the same.
        KeyError, TypeError, AttributeError
            If they are not of that form.
        """
        timing = {int(side): BatchTime(**line) for side, line in values["timing"].items()}
        stages = [
            Stage(**{key: value for key, value in stage.items() if key != "epoch_seconds"})
            for stage in values["stages"]
        ]
        whole = [values[k] for k in ("samples", "workers", "small_workers", "ranks_per_worker")]
        if not all(type(value) is int for value in whole):
            raise UserError("its counts are not whole numbers")
        samples, workers, small, ranks = whole
        _check_stages(stages)
        plan = plan_training(stages, timing, samples, workers, small, time_ratio)
        plan = replace(plan, ranks=ranks)
        if plan.to_dict() != values:
            raise UserError("its figures do not agree with one another")
        return plan


def _check_stages(stages: Sequence[Stage]) -> None:
    """Raise UserError unless they are of numbers, and follow one another from epoch 0 on."""
    for stage in stages:
        whole = (stage.start_epoch, stage.end_epoch, stage.resolution, stage.large_batch)
        real = (stage.learning_rate, stage.dropout)
        if not all(type(value) is int for value in whole) or not all(
            type(value) in (int, float) and math.isfinite(value) for value in real
        ):
            raise UserError("a stage is not made of numbers")
    bounds = [0, *(stage.end_epoch for stage in stages)]
    starts = [stage.start_epoch for stage in stages]
    if not stages or starts != bounds[:-1] or bounds != sorted(set(bounds)):
        raise UserError("its stages do not follow one another")


def plan_training(
    stages: Sequence[Stage],
    timing: Mapping[int, BatchTime],
    samples: int,
    workers: int,
    small_workers: int,
    time_ratio: float,
) -> TrainingPlan:
    """Solve the dual-batch plan of every stage.

    Parameters
    ----------
    stages : sequence of Stage
        Each with its large batch.
    timing : mapping of int to BatchTime
        Measured ``a`` and ``c`` by resolution.
    samples, workers, small_workers, time_ratio
        As in `plan_dual_batch`.

    Raises
    ------
    InfeasiblePlan
        If a stage has no plan; the message names its resolution.
    UserError
        If a resolution has no timing or no large batch.
    """
    plans = []
    for stage in stages:
        if stage.resolution not in timing:
            raise UserError(
                f"no timing for resolution {stage.resolution} (there is one for "
                f"{', '.join(map(str, sorted(timing))) or 'none'}): measure it with 'hdb profile'"
            )
        if stage.large_batch is None:
            raise UserError(
                f"no large batch for resolution {stage.resolution}: set schedule.large_batch, "
                "or measure it with 'hdb profile'"
            )
        try:
            plans.append(
                plan_dual_batch(
                    timing[stage.resolution],
                    stage.large_batch,
                    samples,
                    workers,
                    small_workers,
                    time_ratio,
                )
            )
        except UserError as error:
            raise type(error)(f"resolution {stage.resolution}: {error}") from None
    filled = tuple(
        replace(stage, small_batch=plan.small_batch or None)
        for stage, plan in zip(stages, plans, strict=True)
    )
    return TrainingPlan(samples, filled, tuple(plans), dict(timing))
