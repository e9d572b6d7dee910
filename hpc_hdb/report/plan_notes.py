"""What there is to know of a run beforehand, in lines below the table of its stages."""

from __future__ import annotations

import json
from collections.abc import Iterator

from hpc_hdb.config import Schedule, Settings
from hpc_hdb.plan import TrainingPlan
from hpc_hdb.report.plan_tables import commit_note, rate_note

_MEASURED_WORKERS = 8
_ONLY_WITH = {
    "schedule.factor": ("schedule.decay", ("step",)),
    "schedule.reference_batch": ("schedule.scale_with_batch", ("linear", "sqrt")),
    "server.merge": ("server.sync", ("asp", "ssp")),
    "server.staleness": ("server.sync", ("ssp",)),
    "server.adaptive": ("server.sync", ("bsp", "ssp")),
    "server.outer_rate": ("server.optimizer", ("nesterov", "slowmo")),
    "server.outer_momentum": ("server.optimizer", ("nesterov", "slowmo")),
    "server.average_half_life": ("server.average", ("ema",)),
    "server.average_from": ("server.average", ("swa",)),
}
"""Settings that have an effect only with some values of another one."""


def plan_notes(plan: TrainingPlan, settings: Settings) -> list[str]:
    """What becomes of the rates, which batches are cut, and which settings do nothing."""
    notes = (
        rate_note(settings.schedule, plan.shares.workers),
        _scale_note(settings.schedule, plan.shares.workers),
        commit_note(plan, settings.server.commits_per_epoch),
        *idle_settings(settings),
    )
    return [note for note in notes if note]


def _scale_note(schedule: Schedule, workers: int) -> str:
    """A rate that is scaled further than has been seen to train well; else empty."""
    if schedule.scale_with_workers != "linear" or workers <= _MEASURED_WORKERS:
        return ""
    return (
        f'schedule.scale_with_workers = "linear" has been measured with up to {_MEASURED_WORKERS} '
        f'workers, not {workers}: if accuracy stays low at first, set it to "sqrt"'
    )


def idle_settings(settings: Settings) -> Iterator[str]:
    """A line for each setting that is not the default and does nothing as the others are."""
    plain = Settings()
    for key, (other, values) in _ONLY_WITH.items():
        value = _value(settings, key)
        if value != _value(plain, key) and _value(settings, other) not in values:
            choices = " or ".join(map(json.dumps, values))
            yield f"{key} = {json.dumps(value)} does nothing: it is for {other} = {choices}"
    schedule = settings.schedule
    if (
        settings.server.sync == "allreduce"
        and schedule.scale_with_workers != "none"
        and schedule.scale_with_batch == "none"
    ):
        yield (
            f'schedule.scale_with_workers = "{schedule.scale_with_workers}" does nothing with '
            'server.sync = "allreduce", whose ranks are one worker: to scale the rate with the '
            'global batch set schedule.scale_with_batch = "linear", and schedule.reference_batch '
            "to the batch that schedule.learning_rate is for"
        )


def _value(settings: Settings, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(settings, section), name)
