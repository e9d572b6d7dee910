"""``hdb profile``: the time model and the largest batches of a configuration, on this device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dali_pipelines.files import write_whole
from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.run.build import choose_place, make_trainer
from hpc_hdb.train.data import open_data, prepare_data
from hpc_hdb.train.profile import Timing, profile_resolution, write_timing
from hpc_hdb.train.trainer import choose_precision

_BOUND_ON_GPU = 16384
_BOUND_ON_CPU = 256
_ROOM = 4096
"""Bytes: more than most of these files take."""


def profile_device(settings: Settings, bound: int | None, output: Path) -> dict[int, Timing]:
    """Measure every resolution of the schedule and write `output`.

    Parameters
    ----------
    settings : Settings
    bound : int or None
        Largest batch to try. By default a GPU is searched up to what its memory holds, and a
        CPU up to the configured large batch, or 256 where that is larger or there is none.
    output : Path
        The timing.json to write.

    Returns
    -------
    dict of int to Timing
        By resolution.

    Raises
    ------
    UserError
        If `output` cannot be written.
    """
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    with writing(output):  # told now rather than after minutes of measuring
        probe = output.with_name(f"{output.name}.probe")
        write_whole(probe, bytes(_ROOM))
        probe.unlink()
    place = choose_place(settings)
    place.settle()
    prepare_data(settings.data)
    data = open_data(settings.data, "train")
    timings = {}
    for stage in settings.schedule.stages():
        if stage.resolution in timings:
            continue
        default = min(stage.large_batch or _BOUND_ON_CPU, _BOUND_ON_CPU)
        if place.device.type == "cuda":
            default = _BOUND_ON_GPU
        trainer = make_trainer(settings, data, place.device)
        timings[stage.resolution] = profile_resolution(trainer, stage.resolution, bound or default)
    about = {
        "device": torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu",
        "threads": str(place.threads),
        "model": settings.model.name,
        "precision": str(choose_precision(settings.train, place.device)).removeprefix("torch."),
        "torch": torch.__version__,
    }
    with writing(output):
        write_timing(output, timings, about)
    return timings


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """For the time in which `output` is written: a failing disk is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror}: choose another --output"
        ) from None
