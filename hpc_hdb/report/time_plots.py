"""Where the time went: seconds per role, and stages against the plan."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hpc_hdb.report.runs import Run
from hpc_hdb.report.style import (
    ACTIVITY_COLOURS,
    GROUP_COLOURS,
    PREDICTED_COLOUR,
    few_ticks,
    legend_below,
    new_figure,
    shorten,
)
from hpc_hdb.report.tables import ACTIVITY_NAMES, ROLE_NAMES, shows_other
from hpc_hdb.report.units import format_count, time_unit


def plot_roles(runs: Sequence[Run]) -> Figure | None:
    """Seconds of one rank of each role as stacked bars; None without commits."""
    bars = [
        (run, name, role)
        for run in runs
        for name, role in run.summary["roles"].items()
        if name != "server" or (role["evaluate"] and run.summary["mode"] != "virtual")
    ]
    if all(name == "server" for _, name, _ in bars):
        return None
    figure, (axes,) = new_figure(9.2, 1.3 + 0.3 * len(bars) + 0.25 * len(runs))
    scale, unit = time_unit(max(run.summary["seconds"] for run in runs))
    used, ticks, labels, height, previous = {}, [], [], 0.0, None
    for run, name, role in bars:
        if run is not previous and len(runs) > 1:
            height += 0.7
            axes.text(0, height - 0.62, shorten(run.name, 60), weight="bold", va="center")
            previous = run
        left = 0.0
        seconds = {key: role.get(key, 0.0) for key in ACTIVITY_NAMES}
        seconds["train"] = max(0.0, seconds["train"] - seconds["data"])  # drawn side by side
        for key, value in seconds.items():
            if value > 0 and (key != "other" or shows_other(role)):
                axes.barh(height, value / scale, 0.75, left, color=ACTIVITY_COLOURS[key])
                used[key] = True
                left += value / scale
        if "overhead" in role:
            axes.text(left, height, f"  {role['overhead']:.1%} not training", va="center", size=8)
        ticks.append(height)
        ranks = format_count(role["workers"] * run.summary["ranks_per_worker"], "rank")
        labels.append(ROLE_NAMES[name] if name == "server" else f"{ROLE_NAMES[name]} ({ranks})")
        height += 1
    axes.set(title="Time per rank", xlabel=f"time ({unit})", yticks=ticks, yticklabels=labels)
    axes.set_ylim(height - 0.4, -0.4)
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)
    few_ticks(axes)
    names = ACTIVITY_NAMES | {"train": "training", "data": "waiting for images"}
    handles = [
        Patch(color=colour, label=names[key])
        for key, colour in ACTIVITY_COLOURS.items()
        if key in used
    ]
    legend_below(figure, handles, 7)
    return figure


def plot_stages(runs: Sequence[Run]) -> Figure | None:
    """Predicted and measured training time of an epoch in each stage; None without commits."""
    runs = [run for run in runs if run.summary["stages"]]
    if not runs:
        return None
    columns = 1 if len(runs) == 1 else 2
    rows = -(-len(runs) // columns)
    figure, panels = new_figure(9.2, 0.7 + 2.5 * rows, rows, columns, sharey=True)
    longest = max(
        max(stage["predicted_epoch_seconds"], stage["measured_epoch_seconds"])
        for run in runs
        for stage in run.summary["stages"]
    )
    scale, unit = (1e-3, "ms") if longest < 0.1 else time_unit(longest)
    for axes, run in zip(panels, runs, strict=False):
        stages = run.summary["stages"]
        for position, stage in enumerate(stages):
            groups = stage["groups"]
            width = 0.8 / (len(groups) + 1)
            left = position - 0.4
            predicted = stage["predicted_epoch_seconds"] / scale
            axes.bar(left, predicted, width, color=PREDICTED_COLOUR, align="edge")
            for number, (group, seconds) in enumerate(groups.items(), start=1):
                axes.bar(
                    left + number * width,
                    seconds["measured"] / scale,
                    width,
                    color=GROUP_COLOURS[group],
                    align="edge",
                )
        axes.set_xticks(
            range(len(stages)),
            [f"{s['start_epoch']}-{s['end_epoch']}\n{s['resolution']} px" for s in stages],
            fontsize=8,
        )
        axes.set_title(shorten(run.name) if len(runs) > 1 else "Training time of an epoch")
        axes.grid(axis="x", visible=False)
    for unused in panels[len(runs) :]:
        unused.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(f"time of an epoch ({unit})")
    for axes in panels[max(0, len(runs) - columns) : len(runs)]:
        axes.set_xlabel("stage: epochs, resolution")
    handles = [Patch(color=PREDICTED_COLOUR, label="predicted")]
    found = {group for run in runs for stage in run.summary["stages"] for group in stage["groups"]}
    handles += [
        Patch(color=colour, label=f"measured, {group} batch")
        for group, colour in GROUP_COLOURS.items()
        if group in found
    ]
    legend_below(figure, handles)
    return figure
