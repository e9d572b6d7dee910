"""Accuracy over time and over epochs, loss and learning rate, of one run or several."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from hpc_hdb.report.runs import Run
from hpc_hdb.report.style import (
    GROUP_COLOURS,
    few_ticks,
    legend_below,
    log_scale,
    new_figure,
    resolution_colours,
    run_line,
    shorten,
)
from hpc_hdb.report.units import time_unit

_MOST_MARKED = 40
"""Points of a line up to which each is marked."""


def plot_accuracy(runs: Sequence[Run]) -> Figure | None:
    """Held-out accuracy over seconds and over epochs, stage changes marked; None without any.

    Of several runs a second row shows the heights where they end: there, points matter.
    """
    if not any(run.evaluations for run in runs):
        return None
    several = len(runs) > 1
    rows = 2 if several else 1
    figure, panels = new_figure(9.2, 0.6 + 3.6 * rows, rows, 2)
    scale, unit = time_unit(max(run.summary["seconds"] for run in runs))
    handles: list[Line2D | Patch] = []
    for over_time, over_epochs in zip(panels[::2], panels[1::2], strict=True):
        handles = _draw_accuracy(over_time, over_epochs, runs, scale)
        over_time.set(xlabel=f"time ({unit})", ylabel="held-out accuracy")
        over_epochs.set_xlabel("epochs (by commits)")
        for axes in (over_time, over_epochs):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        over_time.set_xlim(0, 1.01 * max(run.summary["seconds"] for run in runs) / scale)
        over_epochs.set_xlim(0, 1.01 * max(run.summary["epochs"] for run in runs))
        few_ticks(over_time)
        few_ticks(over_epochs, integer=True)
    panels[0].set_title("Accuracy over time")
    panels[1].set_title("Accuracy over epochs")
    if several:
        bottom, top = _final_heights(runs)
        for axes in panels[2:]:
            axes.set_ylim(bottom, top)
            axes.set_title("closer", weight="normal")
    legend_below(figure, handles)
    return figure


def _draw_accuracy(
    over_time: Axes, over_epochs: Axes, runs: Sequence[Run], scale: float
) -> list[Line2D | Patch]:
    """Curves and stages of all runs; what a legend needs."""
    handles: list[Line2D | Patch] = []
    for position, run in enumerate(runs):
        style = run_line(position)
        accuracy = [event["accuracy"] for event in run.evaluations]
        times = [run.evaluated_at(event) / scale for event in run.evaluations]
        epochs = [event["epoch"] for event in run.evaluations]
        marker = "o" if len(accuracy) <= _MOST_MARKED else ""
        for axes, x in ((over_time, times), (over_epochs, epochs)):
            axes.plot(x, accuracy, marker=marker, markersize=3, **style)
        if len(runs) > 1:
            handles.append(Line2D([], [], label=shorten(run.name), **style))
            _mark_changes(over_time, run, times, accuracy, style["color"], scale)
    if len(runs) == 1:
        _stage_bands(over_time, runs[0], scale)
    if schedule := _common_schedule(runs):
        handles += _stage_bands(over_epochs, schedule, None)
    if len(runs) > 1 and any(len(run.stages) > 1 for run in runs):
        handles.append(
            Line2D([], [], ls="", marker="D", mfc="white", mec="#444444", label="stage change")
        )
    return handles


def _final_heights(runs: Sequence[Run]) -> tuple[float, float]:
    """From the lower accuracies of the runs' second halves to the best one."""
    accuracies = [[event["accuracy"] for event in run.evaluations] for run in runs]
    bottom = min(float(np.percentile(own[len(own) // 2 :], 25)) for own in accuracies if own)
    top = max(max(own) for own in accuracies if own)
    margin = 0.05 * (top - bottom) + 0.002
    return bottom - margin, min(1.0, top + margin)


def plot_loss(runs: Sequence[Run]) -> Figure | None:
    """Training and held-out loss over epochs; None without commits."""
    if not any(run.commits for run in runs):
        return None
    figure, (axes,) = new_figure(9.2, 4.0)
    handles: list[Line2D | Patch] = []
    values: list[float] = []
    for position, run in enumerate(runs):
        colour = run_line(position)["color"]
        held_out = [(event["epoch"], event["loss"]) for event in run.evaluations]
        curves = [(held_out, {"color": colour, "linestyle": "-", "label": "held-out"})]
        if len(runs) == 1:
            curves[0][1]["color"] = "#222222"
            curves += [
                (_training_loss(run, group), {"color": GROUP_COLOURS[group], "linestyle": "--",
                 "label": f"training, {group} batch"})
                for group in ("large", "small")
            ]  # fmt: skip
        else:
            curves.append((_training_loss(run), {"color": colour, "linestyle": ":"}))
            handles.append(Line2D([], [], color=colour, label=shorten(run.name)))
        for points, style in curves:
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), **style)
                values += [loss for _, loss in points]
                if len(runs) == 1:
                    handles.append(line)
    if len(runs) > 1:
        handles += [
            Line2D([], [], color="#444444", linestyle="-", label="held-out"),
            Line2D([], [], color="#444444", linestyle=":", label="training"),
        ]
    if schedule := _common_schedule(runs):
        handles += _stage_bands(axes, schedule, None)
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if positive and max(positive) > 20 * min(positive):
        log_scale(axes)
    axes.set(title="Loss", xlabel="epochs (by commits)", ylabel="cross-entropy per image")
    axes.set_xlim(0, 1.01 * max(run.summary["epochs"] for run in runs))
    few_ticks(axes, integer=True)
    legend_below(figure, handles)
    return figure


def plot_rate(runs: Sequence[Run]) -> Figure | None:
    """The learning rate of the rounds over epochs, as scaled; None where no commit tells it."""
    curves: list[tuple[int, str | None, list[tuple[float, float]]]] = []
    for position, run in enumerate(runs):
        differ = run.settings.get("schedule.scale_with_batch", "none") != "none"
        for group in ("large", "small") if differ else (None,):
            if points := round_rates(run, group):
                curves.append((position, group, points))
    if not curves:
        return None
    figure, (axes,) = new_figure(9.2, 3.0)
    handles: list[Line2D | Patch] = []
    for position, group, points in curves:
        style = run_line(position)
        if len(runs) == 1:
            style = {"color": GROUP_COLOURS[group] if group else "#222222"}
        elif group == "small":
            style["linestyle"] = ":"
        (line,) = axes.plot(*zip(*points, strict=True), **style)
        if len(runs) == 1 and group:
            line.set_label(f"{group} batch")
            handles.append(line)
    if len(runs) > 1:
        drawn = sorted({position for position, _, _ in curves})
        handles += [Line2D([], [], label=shorten(runs[n].name), **run_line(n)) for n in drawn]
        if any(group == "small" for _, group, _ in curves):
            handles.append(Line2D([], [], color="#444444", linestyle=":", label="small batch"))
    if schedule := _common_schedule(runs):
        handles += _stage_bands(axes, schedule, None, changes=False)
    rates = [rate for _, _, points in curves for _, rate in points if rate > 0]
    if rates and all(run.decays_in_steps for run in runs) and max(rates) > 20 * min(rates):
        log_scale(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.set(title="Learning rate", xlabel="epochs (by commits)", ylabel="learning rate, scaled")
    axes.set_xlim(0, 1.01 * max(run.summary["epochs"] for run in runs))
    few_ticks(axes, integer=True)
    legend_below(figure, handles)
    return figure


def round_rates(run: Run, group: str | None = None) -> list[tuple[float, float]]:
    """Epochs done as each round of a group began, and the learning rate that it began with.

    Between them the rate goes in a straight line, but where it decays in steps: it then falls
    at once, and stays until the end.
    """
    epochs = {0: 0.0} | {
        event["commit"]: event.get("epochs", event["commit"] / run.facts["commits_per_epoch"])
        for event in run.commits
    }
    rates = {
        epochs.get(event["pulled_at"], 0.0): event["learning_rate"]
        for event in run.commits
        if group in (None, event["group"]) and "learning_rate" in event and "pulled_at" in event
    }
    points = sorted(rates.items())
    if not run.decays_in_steps or not points:
        return points
    stepped = [
        point
        for (_, before), (epoch, rate) in pairwise([points[0], *points])
        for point in ([(epoch, before)] * (rate < before) + [(epoch, rate)])
    ]
    return [*stepped, (run.summary["epochs"], points[-1][1])]


def _training_loss(run: Run, group: str | None = None) -> list[tuple[float, float]]:
    """Mean training loss per image of each epoch's commits, at the end of that epoch."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    per_epoch = run.facts["commits_per_epoch"]
    for event in run.commits:
        if group in (None, event["group"]):
            epochs = event.get("epochs", event["commit"] / per_epoch)
            both = sums[math.ceil(epochs) - 1]
            both[0] += event["loss"] * event["samples"]
            both[1] += event["samples"]
    last = run.summary["epochs"]
    return [
        (min(epoch + 1, last), loss / images)
        for epoch, (loss, images) in sorted(sums.items())
        if images
    ]


def _common_schedule(runs: Sequence[Run]) -> Run | None:
    """The run that has come furthest, if the others went through the same stages."""
    stages = [[(s["start_epoch"], s["end_epoch"], s["resolution"]) for s in r.stages] for r in runs]
    longest = max(stages, key=len)
    same = all(own == longest[: len(own)] for own in stages)
    return runs[stages.index(longest)] if same and longest else None


def _stage_bands(
    axes: Axes, run: Run, scale: float | None, changes: bool = True
) -> list[Line2D | Patch]:
    """Shade the stages by resolution, over time (in units of `scale` seconds) or epochs.

    Steps of the learning rate are marked, with `changes`.

    Returns
    -------
    list
        What a legend needs to explain them.
    """
    stages = run.stages
    if not stages:
        return []
    if scale is None:
        starts = [stage["start_epoch"] for stage in stages]
        end = min(stages[-1]["end_epoch"], max(run.summary["epochs"], starts[-1]))
    else:
        starts = [stage["time"] / scale for stage in stages]
        end = run.summary["seconds"] / scale
    colours = resolution_colours((stage["resolution"] for stage in stages), bands=True)
    marked = False
    for position, (stage, start) in enumerate(zip(stages, starts, strict=True)):
        stop = starts[position + 1] if position + 1 < len(starts) else end
        axes.axvspan(start, stop, color=colours[stage["resolution"]], zorder=-1, linewidth=0)
        falls = stage.get("learning_rate") != stages[position - 1].get("learning_rate")
        if changes and run.decays_in_steps and position and falls:
            axes.axvline(start, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
            marked = True
    handles: list[Line2D | Patch] = [
        Patch(facecolor=colour, edgecolor="#aaaaaa", linewidth=0.5, label=f"{side} px")
        for side, colour in colours.items()
    ]
    if marked:
        handles.append(
            Line2D([], [], color="#444444", linewidth=0.9, linestyle=(0, (4, 3)),
                   label="learning rate changes")
        )  # fmt: skip
    return handles


def _mark_changes(
    axes: Axes, run: Run, times: list[float], accuracy: list[float], colour: str, scale: float
) -> None:
    """Mark a run's stage changes on its line: each run has its own times of them."""
    if times:
        changes = [stage["time"] / scale for stage in run.stages[1:]]
        heights = np.interp(changes, times, accuracy)
        axes.plot(changes, heights, ls="", marker="D", ms=5, mfc="white", mec=colour, zorder=4)
