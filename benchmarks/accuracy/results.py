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
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from hpc_hdb.report.runs import load_runs
from hpc_hdb.report.style import STYLE, legend_below, new_figure, run_line

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

    @property
    def real_seconds(self) -> float:
        return sum(map(float, (self.folder / "real_seconds").read_text().split()))

    @cached_property
    def curve(self) -> tuple[list[float], list[float]]:
        """Virtual seconds of the evaluated models, and their accuracy."""
        (log,) = load_runs([self.folder])
        times = [log.evaluated_at(event) for event in log.evaluations]
        return times, [event["accuracy"] for event in log.evaluations]


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
    """Head and rows of the table."""
    head = ["row", "", "accuracy", "spread", "seeds", "loss", "epochs", "images", "virtual time",
            "of conventional's epoch", "simulated in"]  # fmt: skip
    groups = by_row(runs)
    base = epoch_seconds(groups[CONVENTIONAL]) if CONVENTIONAL in groups else None
    lines = []
    for row, own in groups.items():
        ratio = f"{epoch_seconds(own) / base:.0%}" if base else "-"
        lines.append(
            [
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
                f"{statistics.mean(run.real_seconds for run in own):.0f} s",
            ]
        )
    return head, lines


def verdicts(runs: Sequence[Run]) -> list[str]:
    """The goals of the study, and whether they are met; of those whose rows are there."""
    groups = by_row(runs)
    lines = []

    def points(row: str) -> float:
        return 100 * (
            mean_of(groups["ours"], "final_accuracy") - mean_of(groups[row], "final_accuracy")
        )

    def verdict(met: bool) -> str:
        return "met" if met else "MISSED"

    if "ours" not in groups:
        return []
    if "one-large" in groups:
        gap, spread = points("one-large"), 100 * spread_of(groups["one-large"])
        lines.append(
            f"goal: the accuracy of one worker within its spread ({spread:.2f}): "
            f"{gap:+.2f} points: {verdict(gap >= -spread)}"
        )
    if CONVENTIONAL in groups:
        gap = points(CONVENTIONAL)
        ratio = epoch_seconds(groups["ours"]) / epoch_seconds(groups[CONVENTIONAL])
        lines.append(f"goal: 5 points above conventional: {gap:+.2f}: {verdict(gap >= 5)}")
        lines.append(
            f"goal: at most 65% of its time per epoch: {ratio:.0%}: {verdict(ratio <= 0.65)}"
        )
    if "all-reduce" in groups:
        gap = points("all-reduce")
        ratio = mean_of(groups["ours"], "seconds") / mean_of(groups["all-reduce"], "seconds")
        lines.append(
            f"goal: better than rate-scaled all-reduce in no more time: {gap:+.2f} points in "
            f"{ratio:.0%} of its time: {verdict(gap > 0 and ratio <= 1)}"
        )
    return lines


def plot(runs: Sequence[Run], rows: dict[str, dict[str, Any]]) -> Figure:
    """Held-out accuracy against virtual time, mean of the seeds, of the rows to be plotted."""
    with rc_context(STYLE):
        figure, (axes,) = new_figure(9.2, 5.2)
        handles = []
        shown = {row: own for row, own in by_row(runs).items() if rows[row].get("plot")}
        for position, (row, own) in enumerate(shown.items()):
            style = run_line(position)
            times, _ = own[0].curve
            accuracies = np.array([np.interp(times, *run.curve) for run in own])
            axes.plot(times, accuracies.mean(0), **style)
            if len(own) > 1:
                axes.fill_between(
                    times, accuracies.min(0), accuracies.max(0), color=style["color"], alpha=0.15
                )
            handles.append(Line2D([], [], label=rows[row]["about"], **style))
        axes.set(
            title="Accuracy against time", xlabel="virtual seconds", ylabel="held-out accuracy"
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlim(left=0)
        legend_below(figure, handles, columns=2)
        return figure
