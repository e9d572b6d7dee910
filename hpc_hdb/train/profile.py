"""Measuring ``t(b) = a*b + c`` and the largest batch on the device at hand."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dali_pipelines.files import write_whole
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, BatchTimeFit, fit_timings
from hpc_hdb.train.memory import free_memory, lacks_memory
from hpc_hdb.train.trainer import Trainer

_SIZES = 6
_SMALLEST = 2
_SMALLEST_PART = 16
_SPARED = 1 / 16
_TRIED = 3
"""Steps of a trial that nobody waits for: so far Python runs ahead, and DALI's batches stay."""
_NOTHING_FITS = "not even a batch of two images fits: use a smaller model or resolution"


def sweep_sizes(largest: int) -> list[int]:
    """Batch sizes to measure: from a sixteenth of the largest up, in equal ratios.

    Not of one image where that can be helped: batch norm refuses it where maps shrink to a pixel.
    """
    smallest = max(1, min(_SMALLEST, largest - 1), largest // _SMALLEST_PART)
    return sorted({round(size) for size in np.geomspace(smallest, largest, _SIZES)})


def measure_steps(
    trainer: Trainer, resolution: int, sizes: list[int], seconds: float = 0.6, repeats: int = 4
) -> list[float]:
    """Time of a whole step, loading included, at each batch size: the median of its turns' means.

    The sizes take turns, so that a disturbance of the machine falls on all of them. The first
    half of a turn, slower after another size's steps, does not count: a round has one size. It is
    means, since ranks that share cores interrupt some steps and not others, and an epoch has both.

    Parameters
    ----------
    trainer : Trainer
    resolution : int
        Side of the images, in pixels.
    sizes : list of int
        Batch sizes.
    seconds, repeats : float, int
        Each size has `repeats` turns, in which it is measured for about `seconds` altogether.

    Returns
    -------
    list of float, same length as `sizes`
        In seconds.
    """
    trainer.model.train()
    times: list[list[float]] = [[] for _ in sizes]
    # The first step ever also sets up memory and kernels, so the second one gives the guess.
    guesses = [_mean_step(trainer, resolution, size, 1) for size in sizes]
    counts = [max(1, round(seconds / repeats / guess)) for guess in trainer.settle(guesses)]
    for _ in range(repeats):
        for size, count, turns in zip(sizes, counts, times, strict=True):
            turns.append(_mean_step(trainer, resolution, size, count))
    return [statistics.median(turns) for turns in times]


def keep_stepping(trainer: Trainer, resolution: int, size: int, done: Callable[[], bool]) -> None:
    """Train batches that nobody times until `done` says yes, on all ranks that share them."""
    while trainer.settle([float(done())])[0] < 1:
        _mean_step(trainer, resolution, size, 1)


def _mean_step(trainer: Trainer, resolution: int, size: int, count: int) -> float:
    """Mean seconds of `count` steps, one after another, behind as many that do not count.

    As in training nobody waits for a GPU in between: the loader and Python run ahead of it.
    """
    batches = trainer.sample_batches(resolution, [size] * (2 * count), seed=0)
    start = 0.0
    for number, (images, labels) in enumerate(batches):
        trainer.step(images, labels, size)
        if number == count - 1:
            _wait_for(trainer.device)
            start = time.perf_counter()
    _wait_for(trainer.device)
    return (time.perf_counter() - start) / count


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def largest_batch(fits: Callable[[int], bool], bound: int) -> int:
    """The largest batch up to `bound` for which `fits` says yes, by doubling and halving.

    Raises
    ------
    UserError
        If not even two images fit; one alone is never tried, as in `sweep_sizes`.
    """
    low, high = _SMALLEST - 1, min(_SMALLEST, bound)
    while high < bound and fits(high):
        low, high = high, min(2 * high, bound)
    if high == bound and fits(bound):
        return bound
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low < _SMALLEST:
        raise UserError(_NOTHING_FITS)
    return low


def fits_device(trainer: Trainer, resolution: int, size: int) -> bool:
    """Whether training steps of that batch fit the device's memory, and its kernels' limits.

    Raises
    ------
    UserError
        If they have left the GPU of no use to this process.
    """
    fits = True
    try:
        _mean_step(trainer, resolution, size, _TRIED)
    except (RuntimeError, MemoryError) as error:
        # Tensors of 2^31 elements fail in many ways. The smallest batch, which is tried first,
        # has none: what it raises is an error of the model's.
        if not lacks_memory(error):
            if size <= _SMALLEST:
                raise
            _check_gpu(trainer.device, size)
        fits = False
    free_memory(trainer.device)  # not before the error is gone: its traceback holds the tensors
    return fits


def _check_gpu(device: torch.device, size: int) -> None:
    """Raise UserError where a batch has broken the context: all that comes then fails as well."""
    try:
        _wait_for(device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"a batch of {size} images made the GPU fail ({reason}): set --bound to less"
        ) from None


@dataclass(frozen=True)
class Timing:
    """What was measured at one resolution.

    Attributes
    ----------
    fit : BatchTimeFit
    large_batch : int
        Largest batch that fits, in images.
    points : list of (int, float)
        Batch sizes and seconds per step.
    """

    fit: BatchTimeFit
    large_batch: int
    points: list[tuple[int, float]]


def profile_resolution(
    trainer: Trainer, resolution: int, bound: int, seconds: float = 1.0, repeats: int = 4
) -> Timing:
    """Find the largest batch up to `bound` and fit the time model below it.

    On a GPU a sixteenth less than what just fits: while a run changes the resolution, the next
    pipeline is there as well. Where memory lacks all the same once it is measured, a sixteenth less
    is tried, and so on.

    Raises
    ------
    UserError
        If not even two images fit.
    """
    if trainer.device.type == "cuda":
        found = largest_batch(lambda size: fits_device(trainer, resolution, size), bound)
        if found < bound:
            bound = max(_SMALLEST, round(found * (1 - _SPARED)))
    sizes = sweep_sizes(bound)
    while (times := _times_if_they_fit(trainer, resolution, sizes, seconds, repeats)) is None:
        bound -= max(1, round(bound * _SPARED))
        if bound < _SMALLEST:
            raise UserError(_NOTHING_FITS)
        sizes = sweep_sizes(bound)
    fit = fit_timings(sizes, times)
    return Timing(fit, bound, list(zip(sizes, times, strict=True)))


def _times_if_they_fit(
    trainer: Trainer, resolution: int, sizes: list[int], seconds: float, repeats: int
) -> list[float] | None:
    """As `measure_steps`; None where memory does not suffice."""
    try:
        return measure_steps(trainer, resolution, sizes, seconds, repeats)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
    free_memory(trainer.device)  # not before the error is gone: its traceback holds the tensors
    return None


def write_timing(path: Path, timings: dict[int, Timing], about: dict[str, str]) -> None:
    """Write timing.json; `about` says on what it was measured."""
    values = about | {
        "resolutions": {
            str(resolution): asdict(timing.fit.line)
            | {
                "large_batch": timing.large_batch,
                "mean_error": timing.fit.mean_error,
                "worst_error": timing.fit.worst_error,
                "points": timing.points,
            }
            for resolution, timing in timings.items()
        }
    }
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def read_timing(path: Path) -> tuple[dict[int, BatchTime], dict[int, int]]:
    """The time models and the largest batches by resolution that `write_timing` wrote.

    Raises
    ------
    UserError
        If the file is missing or not of that form.
    """
    try:
        values = json.loads(path.read_text())["resolutions"]
        lines = {
            int(side): BatchTime(float(line["seconds_per_image"]), float(line["overhead"]))
            for side, line in values.items()
        }
        batches = {int(side): int(line["large_batch"]) for side, line in values.items()}
        if any(batch < 1 for batch in batches.values()):
            raise ValueError("a large_batch below 1")
    except FileNotFoundError:
        raise UserError(f"no timing file {path}: write it with 'hdb profile'") from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise UserError(
            f"timing file {path} is damaged ({type(error).__name__}: {error}): "
            "write it again with 'hdb profile'"
        ) from None
    return lines, batches
