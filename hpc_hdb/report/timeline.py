"""When each worker trained: its rounds as bars along the time."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hpc_hdb.report.events import Event
from hpc_hdb.report.runs import Run
from hpc_hdb.report.style import (
    ACTIVITY_COLOURS,
    few_ticks,
    legend_below,
    new_figure,
    resolution_colours,
    shorten,
)
from hpc_hdb.report.units import time_unit

_MOST_WORKERS = 32
"""Rows of a timeline; of more workers the first of each group are shown."""

_MOST_ROUNDS = 40
"""Rounds of a worker up to which gaps between them can be seen in the whole run."""

_ROUNDS_CLOSER = 12


class TimedRound(NamedTuple):
    """The training of a round, in seconds since the run began."""

    begin: float
    end: float
    resolution: int


class _View(NamedTuple):
    run: Run
    title: str
    begin: float
    end: float


def worker_rounds(run: Run) -> dict[int, list[TimedRound]]:
    """The rounds of each worker.

    A commit is logged when the server takes it. In bulk-synchronous training that is when the
    last worker has committed, and how long the others then waited comes with their next report.
    """
    reports: dict[int, list[Event]] = defaultdict(list)
    for event in run.events:
        if event["event"] in ("commit", "leave"):
            reports[event["worker"]].append(event)
    rounds: dict[int, list[TimedRound]] = defaultdict(list)
    for worker, own in sorted(reports.items()):
        earliest = 0.0
        for report, following in pairwise([*own, {}]):
            if report["event"] == "commit":
                end = report["time"]
                if run.facts["sync"] == "bsp":
                    end -= following.get("wait_seconds", 0.0)
                if run.facts["mode"] != "virtual":
                    end -= report.get("checkpoint_seconds", 0.0)
                begin = max(earliest, end - report["train_seconds"])
                earliest = max(begin, end)
                rounds[worker].append(TimedRound(begin, earliest, report["resolution"]))
    return dict(rounds)


def plot_timeline(runs: Sequence[Run]) -> Figure | None:
    """Each worker's rounds, coloured by resolution: gaps are time not spent training.

    One run is shown whole and, where it has many rounds, closer around a change of stage;
    several runs are shown whole. None without commits.
    """
    runs = [run for run in runs if run.commits]
    if not runs:
        return None
    longest = max(run.summary["seconds"] for run in runs)
    views = [
        _View(run, shorten(run.name, 60) if len(runs) > 1 else "Rounds of the workers", 0, longest)
        for run in runs
    ]
    if len(runs) == 1:
        views += _closer(runs[0])
    rows = [_rows(view.run) for view in views]
    heights = [0.95 + 0.2 * len(workers) for workers in rows]
    figure, panels = new_figure(
        9.2, 0.6 + sum(heights), len(views), gridspec_kw={"height_ratios": heights}
    )
    scale, unit = time_unit(longest)
    colours = resolution_colours(event["resolution"] for run in runs for event in run.commits)
    for axes, view, workers in zip(panels, views, rows, strict=True):
        _draw_rounds(axes, view.run, workers, colours, scale)
        if _shows_evaluations(view.run):
            _draw_evaluations(axes, view.run, scale)
        axes.set_xlim(view.begin / scale, view.end / scale)
        axes.set_title(view.title)
        axes.grid(visible=False)
        few_ticks(axes)
    panels[-1].set_xlabel(f"time ({unit})")
    handles = [Patch(color=colour, label=f"{side} px") for side, colour in colours.items()]
    handles.append(Patch(facecolor="white", edgecolor="#999999", label="not training"))
    if any(map(_shows_evaluations, runs)):
        handles.append(Patch(color=ACTIVITY_COLOURS["evaluate"], label="evaluating"))
    legend_below(figure, handles, 6)
    return figure


def _rows(run: Run) -> list[int]:
    """The workers to show, large-batch ones first."""
    workers = sorted({event["worker"] for event in run.commits})
    if len(workers) <= _MOST_WORKERS:
        return workers
    small = {event["worker"] for event in run.commits if event["group"] == "small"}
    shown_small = round(_MOST_WORKERS * len(small) / len(workers))
    large = [worker for worker in workers if worker not in small]
    return large[: _MOST_WORKERS - shown_small] + sorted(small)[:shown_small]


def _closer(run: Run) -> list[_View]:
    """A dozen rounds about the change of stage nearest the middle, if the run has many more."""
    end = run.summary["seconds"]
    rounds = worker_rounds(run)
    if max(map(len, rounds.values())) <= _MOST_ROUNDS:
        return []
    length = statistics.median(r.end - r.begin for own in rounds.values() for r in own)
    middle = min((stage["time"] for stage in run.stages[1:]), key=lambda t: abs(t - end / 2),
                 default=end / 2)  # fmt: skip
    half = length * _ROUNDS_CLOSER / 2
    return [_View(run, "The same, closer", max(0.0, middle - half), min(end, middle + half))]


def _draw_rounds(
    axes: Axes, run: Run, workers: Sequence[int], colours: dict[int, str], scale: float
) -> None:
    groups = {event["worker"]: event["group"] for event in run.commits}
    rounds = worker_rounds(run)
    for row, worker in enumerate(workers, start=1):
        axes.broken_barh(
            [(r.begin / scale, (r.end - r.begin) / scale) for r in rounds[worker]],
            (row - 0.4, 0.8),
            facecolors=[colours[r.resolution] for r in rounds[worker]],
            edgecolor="white",
            linewidth=0.4,
        )
    labels = {row: f"{worker} {groups[worker]}" for row, worker in enumerate(workers, start=1)}
    if _shows_evaluations(run):
        labels[0] = "server"
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
    axes.set_ylim(len(workers) + 0.6, min(labels) - 0.6)


def _draw_evaluations(axes: Axes, run: Run, scale: float) -> None:
    axes.broken_barh(
        [((e["time"] - e["seconds"]) / scale, e["seconds"] / scale) for e in run.evaluations],
        (-0.4, 0.8),
        facecolor=ACTIVITY_COLOURS["evaluate"],
    )


def _shows_evaluations(run: Run) -> bool:
    """Whether evaluations took time: on the virtual clock they take none."""
    return run.facts["mode"] != "virtual" and bool(run.evaluations)
