"""What a server does with merged models: an optimizer of its own, and a weight average.

Merging gives what averaging makes of the model. Its difference from the model before is taken for
a gradient, and the server takes a step of its own with it. Sources: Nesterov's momentum as in
DiLoCo, Douillard et al., arXiv 2311.08105, algorithm 1; SlowMo, Wang et al., arXiv 1910.00643,
algorithm 1. The weight averages: exponential, common practice (Szegedy et al., arXiv 1512.00567,
section 8, evaluate a running average of the parameters); stochastic, Izmailov et al., arXiv
1803.05407, after the uniform mean of Polyak and Juditsky 1992. All is arithmetic on flat buffers,
element by element, so that every server does its slice, and every slice its parts.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hpc_hdb.config import Schedule, Server

_ROUNDING = 1e-6
"""Of the number of versions, which is made of fractions of epochs."""


class Kept(enum.IntEnum):
    """The buffers of a version of the model that a server may keep."""

    MODEL = 0
    MOMENTUM = 1
    AVERAGE = 2


class Pace(NamedTuple):
    """What a server must know of a version to make it.

    Attributes
    ----------
    trained : int
        Floats at the beginning of the model that are parameters. Those behind it are statistics
        (of batch normalisation), which are averaged whatever the optimizer: a step beyond the
        average may make a variance negative.
    learning_rate : float
        The workers', before it is scaled; SlowMo's gamma.
    weight : float
        Of this version in the weight average, 0 to 1.
    """

    trained: int = 0
    learning_rate: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class ServerOptimizer:
    """The server's own step, after the merge.

    Attributes
    ----------
    name : {"average", "nesterov", "slowmo"}
        "average" takes what merging gives.
    rate, momentum : float
        Of the optimizer: DiLoCo's outer learning rate and momentum, SlowMo's alpha and beta.
    averages : bool
        Whether a weight average is kept.
    """

    name: Literal["average", "nesterov", "slowmo"] = "average"
    rate: float = 1.0
    momentum: float = 0.0
    averages: bool = False

    @classmethod
    def of(cls, settings: Server) -> ServerOptimizer:
        """The one that the settings ask for."""
        return cls(
            settings.optimizer,
            settings.outer_rate,
            settings.outer_momentum,
            settings.average != "none",
        )

    @property
    def keeps(self) -> tuple[Kept, ...]:
        """The buffers of a version."""
        momentum = (Kept.MOMENTUM,) if self.name != "average" else ()
        average = (Kept.AVERAGE,) if self.averages else ()
        return (Kept.MODEL, *momentum, *average)

    def step(
        self, model: Tensor, merged: Tensor, momentum: Tensor, new_momentum: Tensor, rate: float
    ) -> None:
        """Take a step from `model`, with what merging made of it for a direction.

        Parameters
        ----------
        model : Tensor, shape (size,), float32
            The version before the merge.
        merged : Tensor, shape (size,), float32
            What merging gave; overwritten with the result.
        momentum, new_momentum : Tensor, shape (size,), float32
            Of the version before, and where that of the new one goes.
        rate : float
            The workers' learning rate.
        """
        if self.name == "nesterov":
            step_nesterov(model, merged, momentum, new_momentum, self.rate, self.momentum)
        else:
            step_slowmo(model, merged, momentum, new_momentum, self.rate, self.momentum, rate)


def step_nesterov(
    model: Tensor, merged: Tensor, momentum: Tensor, new_momentum: Tensor, eta: float, mu: float
) -> None:
    """DiLoCo's outer step: SGD with Nesterov's momentum on the difference of the models.

    ``g = w - w_merged``, ``m <- mu*m + g``, ``w <- w - eta*(g + mu*m)``, as `torch.optim.SGD` has
    it. With ``eta = 1`` and ``mu = 0`` it is averaging. Parameters as in `ServerOptimizer.step`.
    """
    torch.sub(model, merged, out=merged)
    torch.add(merged, momentum, alpha=mu, out=new_momentum)
    merged.add_(new_momentum, alpha=mu).mul_(-eta).add_(model)


def step_slowmo(
    model: Tensor,
    merged: Tensor,
    momentum: Tensor,
    new_momentum: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
) -> None:
    """SlowMo's outer step: momentum in units of the workers' learning rate ``gamma``.

    ``u <- beta*u + (w - w_merged)/gamma``, ``w <- w - alpha*gamma*u``. With ``alpha = 1`` and
    ``beta = 0`` it is averaging. Parameters as in `ServerOptimizer.step`.
    """
    torch.sub(model, merged, out=merged)
    torch.mul(momentum, beta, out=new_momentum).add_(merged, alpha=1 / gamma)
    torch.add(model, new_momentum, alpha=-alpha * gamma, out=merged)


def ema_weight(version: int, half_life: float) -> float:
    """Weight of version number `version`, from 1, in an exponential average.

    Until there are enough versions it is their mean: the first ones count no more than others.

    Parameters
    ----------
    half_life : float
        Versions after which the weight of one has halved.

    >>> [round(ema_weight(version, 2.0), 3) for version in (1, 2, 3, 4)]
    [1.0, 0.5, 0.333, 0.293]
    """
    return max(1 - 0.5 ** (1 / half_life), 1 / version)


def swa_weight(version: int, start: float) -> float:
    """Weight of version number `version`, from 1, in the mean of those after `start` versions.

    Up to then the average is the newest version.

    >>> [round(swa_weight(version, 2), 3) for version in (1, 2, 3, 4, 5)]
    [1.0, 1.0, 1.0, 0.5, 0.333]
    """
    return 1 / max(1, math.ceil(version - start))


def pace_of(trained: int, epoch: float, per_epoch: int, server: Server, schedule: Schedule) -> Pace:
    """What to know of the version that has come about at `epoch`.

    Parameters
    ----------
    trained : int
        As in `Pace`.
    epoch : float
        Epochs done, the new version's commits included.
    per_epoch : int
        Versions in an epoch; in BSP, if all workers commit to each.
    """
    begin = max(0.0, epoch - 1 / server.commits_per_epoch)
    version = math.ceil(epoch * per_epoch - _ROUNDING)
    if server.average == "ema":
        weight = ema_weight(version, server.average_half_life * per_epoch)
    else:
        weight = swa_weight(version, server.average_from * per_epoch)
    return Pace(trained, sum(schedule.rates().of_round(begin, epoch)) / 2, weight)
