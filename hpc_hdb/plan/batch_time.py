"""The time of one training batch, affine in its size: ``t(b) = a*b + c``.

Source: Lu et al., arXiv 2509.26092, section on the dual-batch plan; the coefficients are
measured for each device and resolution and fitted by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_hdb.errors import UserError

_HIDDEN = 100
"""Of how many parts of a step the one that noise hides is taken to be one."""


@dataclass(frozen=True)
class BatchTime:
    """Coefficients of ``t(b) = a*b + c`` for one device and resolution.

    Parameters
    ----------
    seconds_per_image : float
        ``a``, in seconds; positive.
    overhead : float
        ``c``, the fixed cost of a batch, in seconds; positive.

    Raises
    ------
    UserError
        If a coefficient is not a positive, finite number.
    """

    seconds_per_image: float
    overhead: float

    def __post_init__(self) -> None:
        for name, value in (
            ("seconds per image (a)", self.seconds_per_image),
            ("overhead per batch (c)", self.overhead),
        ):
            if not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"the time model needs a positive {name}, not {value:g}: "
                    "measure again with 'hdb profile' over a wider range of batch sizes"
                )

    def of_batch(self, batch: float) -> float:
        """Seconds for one batch of `batch` images."""
        return self.seconds_per_image * batch + self.overhead

    def of_samples(self, samples: float, batch: float) -> float:
        """Seconds for `samples` images in batches of `batch`: ``(a + c/B)*d``."""
        return (self.seconds_per_image + self.overhead / batch) * samples

    def of_steps(self, samples: int, steps: int) -> float:
        """Seconds for `samples` images trained in `steps` whole batches: ``a*d + c*steps``."""
        return self.seconds_per_image * samples + self.overhead * steps


@dataclass(frozen=True)
class BatchTimeFit:
    """A fitted line and how well it describes its points.

    Attributes
    ----------
    line : BatchTime
        The coefficients.
    mean_error, worst_error : float
        Mean and largest relative distance of a point from the line (0.01 is one percent).
    points : int
        Number of (batch size, seconds) pairs used.
    """

    line: BatchTime
    mean_error: float
    worst_error: float
    points: int


def fit_batch_time(
    batch_sizes: Sequence[float], seconds: Sequence[float], relative: bool = False
) -> BatchTimeFit:
    """Fit ``t(b) = a*b + c`` by least squares.

    Parameters
    ----------
    batch_sizes : sequence of float, length p
        Batch sizes in images, at least two different ones.
    seconds : sequence of float, length p
        Time of one batch of that size, in seconds.
    relative : bool
        Minimise relative instead of absolute errors, as suits timings whose noise grows with
        them; the authors' coefficients are those of absolute errors.

    Returns
    -------
    BatchTimeFit

    Raises
    ------
    UserError
        If there are fewer than two different sizes, or the line has no positive slope and
        intercept (noise larger than the effect).
    """
    sizes = np.asarray(batch_sizes, dtype=np.float64)
    times = np.asarray(seconds, dtype=np.float64)
    if sizes.shape != times.shape or sizes.ndim != 1:
        raise UserError("the time model needs one measured time for each batch size")
    if np.unique(sizes).size < 2:
        raise UserError("the time model needs measurements at two different batch sizes or more")
    weights = 1 / times**2 if relative else np.ones_like(times)
    mean_size, mean_time = np.average(sizes, weights=weights), np.average(times, weights=weights)
    spread = weights * (sizes - mean_size)
    slope = float((spread * (times - mean_time)).sum() / (spread * (sizes - mean_size)).sum())
    return _described_by(BatchTime(slope, float(mean_time - slope * mean_size)), sizes, times)


def fit_timings(batch_sizes: Sequence[float], seconds: Sequence[float]) -> BatchTimeFit:
    """Fit ``t(b) = a*b + c`` to timings, also where their noise hides one of the coefficients.

    Then that one is taken to be small. Where a step takes the same whatever its size, as on a GPU
    that waits for its kernels to be launched, the images of the largest batch count as a hundredth
    of the overhead; where the overhead cannot be told, it counts as one image.

    Parameters
    ----------
    batch_sizes, seconds : sequence of float, length p
        As in `fit_batch_time`, whose relative errors are minimised.

    Returns
    -------
    BatchTimeFit
    """
    try:
        return fit_batch_time(batch_sizes, seconds, relative=True)
    except UserError:
        sizes = np.asarray(batch_sizes, dtype=np.float64)
        times = np.asarray(seconds, dtype=np.float64)
    if np.unique(sizes).size > 1 and np.polyfit(sizes, times, 1, w=1 / times)[0] <= 0:
        overhead = float(np.median(times))
        line = BatchTime(overhead / (_HIDDEN * float(sizes.max())), overhead)
    else:
        image = float((times / sizes).min())
        line = BatchTime(image, image)
    return _described_by(line, sizes, times)


def _described_by(line: BatchTime, sizes: np.ndarray, times: np.ndarray) -> BatchTimeFit:
    errors = np.abs(line.seconds_per_image * sizes + line.overhead - times) / times
    return BatchTimeFit(line, float(errors.mean()), float(errors.max()), int(sizes.size))
