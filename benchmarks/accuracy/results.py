"""Table, verdicts and figure of the study of accuracy, from its run folders alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

from hpc_hdb.report.runs import Run as LoggedRun
from hpc_hdb.report.runs import load_runs
from hpc_hdb.report.style import STYLE, legend_below, new_figure, run_line

_LABEL_HEIGHT = 0.035
"""Of a label at a line's end, as a part of the axis."""
_NEAR = 1.15
"""Ends whose times differ by less than this factor have their labels in one column."""

CONVENTIONAL = "paper-conventional-asp"
"""The paper's own baseline: its epoch is what others are compared with."""


@dataclass(frozen=True)
class Run:
    """A finished run of a row."""

    row: str
    seed: int
    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @cached_property
    def log(self) -> LoggedRun:
        (log,) = load_runs([self.folder])
        return log

    @property
    def on_gpu(self) -> bool:
        return self.log.facts["device"] != "cpu"

    @property
    def round_seconds(self) -> float:
        """Mean real time of a round."""
        return statistics.mean(event["real_seconds"] for event in self.log.commits)

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Virtual seconds of the evaluated models, and their accuracy."""
        times = [self.log.evaluated_at(event) for event in self.log.evaluations]
        return times, [event["accuracy"] for event in self.log.evaluations]


def by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each row, in the order in which the rows first came."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.row, []).append(run)
    return found


def mean_of(runs: Sequence[Run], key: str) -> float:
    return statistics.mean(run.summary[key] for run in runs)


def spread_of(runs: Sequence[Run]) -> float:
    """Sample standard deviation of the final accuracy; 0 of a single run."""
    values = [run.summary["final_accuracy"] for run in runs]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def epoch_seconds(runs: Sequence[Run]) -> float:
    """Mean virtual seconds of an epoch, over the whole of training."""
    return mean_of(runs, "seconds") / mean_of(runs, "epochs")


def table(
    runs: Sequence[Run], rows: dict[str, dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table; with real time where a GPU was the workers' in turn."""
    head = ["row", "", "accuracy", "spread", "seeds", "loss", "epochs", "images", "virtual time",
            "of conventional's epoch"]  # fmt: skip
    on_gpu = all(run.on_gpu for run in runs)
    if on_gpu:
        head.append("real time of a round")
    groups = by_row(runs)
    base = epoch_seconds(groups[CONVENTIONAL]) if CONVENTIONAL in groups else None
    lines = []
    for row, own in groups.items():
        ratio = f"{epoch_seconds(own) / base:.0%}" if base else "-"
        line = [
            row,
            rows[row]["about"],
            f"{mean_of(own, 'final_accuracy'):.2%}",
            f"{100 * spread_of(own):.2f}" if len(own) > 1 else "-",
            str(len(own)),
            f"{mean_of(own, 'final_loss'):.4f}",
            f"{mean_of(own, 'epochs'):g}",
            f"{mean_of(own, 'images'):,.0f}",
            f"{mean_of(own, 'seconds'):.1f} s",
            ratio,
        ]
        if on_gpu:
            line.append(f"{statistics.mean(run.round_seconds for run in own):.3g} s")
        lines.append(line)
    return head, lines


def verdicts(runs: Sequence[Run]) -> list[str]:
    """The goals of the study, and whether they are met; of those whose rows are there."""
    groups = by_row(runs)
    present = [ours for ours in ("ours", "ours-often") if ours in groups]
    return [line for ours in present for line in _verdicts_on(ours, groups)]


def _verdicts_on(ours: str, groups: dict[str, list[Run]]) -> list[str]:
    """The goals as the row `ours` meets them."""
    lines = []

    def points(row: str) -> float:
        return 100 * (
            mean_of(groups[ours], "final_accuracy") - mean_of(groups[row], "final_accuracy")
        )

    def of_time(row: str) -> float:
        return epoch_seconds(groups[ours]) / epoch_seconds(groups[row])

    for one in (row for row in groups if row.startswith("one-")):
        gap, spread = points(one), 100 * spread_of(groups[one])
        lines.append(
            f"goal: {ours} has the accuracy of one worker ({one}) within its spread "
            f"({spread:.2f}): {gap:+.2f} points: {_verdict(gap >= -spread)}"
        )
    if CONVENTIONAL in groups:
        gap, ratio = points(CONVENTIONAL), of_time(CONVENTIONAL)
        lines.append(
            f"goal: {ours} 5 points above conventional: {gap:+.2f}: {_verdict(gap >= 5)}; "
            f"in at most 65% of its time per epoch: {ratio:.0%}: {_verdict(ratio <= 0.65)}"
        )
    if "all-reduce" in groups:
        gap, ratio = points("all-reduce"), of_time("all-reduce")
        lines.append(
            f"goal: {ours} better than rate-scaled all-reduce in no more time: {gap:+.2f} "
            f"points in {ratio:.0%} of its time: {_verdict(gap > 0 and ratio <= 1)}"
        )
    if "all-reduce-treated" in groups:
        lines.append(
            f"{ours} beside all-reduce with our schedule: {points('all-reduce-treated'):+.2f} "
            f"points in {of_time('all-reduce-treated'):.0%} of its time, in which exchanging "
            "gradients at every step is free"
        )
    return lines


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def plot(runs: Sequence[Run], rows: dict[str, dict[str, Any]]) -> Figure:
    """Held-out accuracy against virtual time, mean of the seeds, of the rows to be plotted."""
    shown = {row: own for row, own in by_row(runs).items() if rows[row].get("plot")}
    with rc_context(STYLE):
        figure, (axes,) = new_figure(9.2, 6.4)
        handles, ends = [], []
        for position, (row, own) in enumerate(shown.items()):
            style = run_line(position)
            times, _ = own[0].curve
            accuracies = np.array([np.interp(times, *run.curve) for run in own])
            mean = accuracies.mean(0)
            axes.plot(times, mean, **style)
            axes.fill_between(
                times, accuracies.min(0), accuracies.max(0), color=style["color"], alpha=0.15
            )
            ends.append((times[-1], mean[-1], style["color"]))
            handles.append(Line2D([], [], label=rows[row]["about"], **style))
        seeds = max(map(len, shown.values()), default=0)
        axes.set(
            title="Accuracy against time" + (f", mean and range of {seeds} seeds" * (seeds > 1)),
            xlabel="virtual seconds",
            ylabel="held-out accuracy",
            xscale="log",
        )
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _label_ends(axes, ends)
        legend_below(figure, handles, columns=2)
        return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Write each line's last accuracy beside its end, one above the other where these are near."""
    bottom, top = axes.get_ylim()
    height = (top - bottom) * _LABEL_HEIGHT
    placed: list[tuple[float, float]] = []
    for time, accuracy, colour in sorted(ends, key=lambda end: -end[1]):
        near = [y for x, y in placed if 1 / _NEAR < time / x < _NEAR]
        y = min([accuracy, *(y - height for y in near)])
        placed.append((time, y))
        axes.annotate(
            f"{accuracy:.1%}",
            (time, y),
            xytext=(5, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=colour,
            fontsize=8.5,
            fontweight="bold",
        )
    axes.set_xlim(right=axes.get_xlim()[1] * _NEAR)
