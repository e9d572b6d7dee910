"""The learning rate over a run: decay, warm-up, and scaling with the batch and the workers.

Sources: linear scaling and gradual warm-up, Goyal et al., arXiv 1706.02677, sections 2.1 and 2.2;
square-root scaling, Krizhevsky, arXiv 1404.5997, section 5; cosine decay, Loshchilov and Hutter,
arXiv 1608.03983, equation 5; linear decay to zero, Defazio et al., arXiv 2310.07831.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scaling = Literal["none", "linear", "sqrt"]
Decay = Literal["step", "cosine", "linear"]


def scale_rate(rule: Scaling, ratio: float) -> float:
    """What a learning rate is multiplied by where something has grown to `ratio` of its size.

    >>> [scale_rate(rule, 4) for rule in ("none", "linear", "sqrt")]
    [1.0, 4.0, 2.0]
    """
    return {"none": 1.0, "linear": float(ratio), "sqrt": math.sqrt(ratio)}[rule]


def step_decay(rate: float, milestones: Sequence[int], factor: float, epoch: float) -> float:
    """`rate` times `factor` for each of the rising `milestones` that `epoch` has reached.

    >>> [step_decay(0.2, [80, 120], 0.1, epoch) for epoch in (0, 79.9, 80, 120)]
    [0.2, 0.2, 0.02, 0.002]
    """
    return float(f"{rate * factor ** bisect_right(milestones, epoch):.12g}")  # 0.02, not 0.02...04


@dataclass(frozen=True)
class RateSchedule:
    """The learning rate over the epochs of a run, before it is scaled.

    Attributes
    ----------
    rate : float
        What the decay starts from.
    epochs : int
        Length of training.
    decay : {"step", "cosine", "linear"}
        Times `factor` at each of the `milestones`, or to zero at the end of training.
    milestones : tuple of int
    factor : float
    warmup : float
        Epochs, from the start on, in which the rate rises linearly from zero; the decay to zero
        begins after them.
    """

    rate: float
    epochs: int
    decay: Decay = "step"
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    warmup: float = 0.0

    def decayed(self, epoch: float) -> float:
        """The rate after `epoch` epochs, as if there were no warm-up."""
        if self.decay == "step":
            return step_decay(self.rate, self.milestones, self.factor, epoch)
        done = min(max(epoch - self.warmup, 0.0) / (self.epochs - self.warmup), 1.0)
        if self.decay == "linear":
            return self.rate * (1 - done)
        return self.rate * (1 + math.cos(math.pi * done)) / 2

    def of_stage(self, start: int) -> float:
        """The rate by which a stage is known: as it begins, without warm-up; of 12 digits."""
        return float(f"{self.decayed(start):.12g}")

    def of_round(self, start: float, end: float) -> tuple[float, float]:
        """The rate at both ends of a round that lasts from epoch `start` to `end`.

        In between it changes linearly. With step decay a round keeps the factor that held when
        it began.
        """
        return (
            self.decayed(start) * self._warm(start),
            self.decayed(start if self.decay == "step" else end) * self._warm(end),
        )

    def _warm(self, epoch: float) -> float:
        return min(1.0, epoch / self.warmup) if self.warmup else 1.0
