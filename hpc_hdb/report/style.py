"""The look of the plots: one style, colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

STYLE: dict[Any, Any] = {
    "figure.dpi": 140,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a dollar in a run's name is a dollar
}

# Okabe and Ito's palette, dark ones first; its yellow is too faint for a line on white
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
RUN_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

ACTIVITY_COLOURS = {
    "train": "#0072B2",
    "data": "#56B4E9",
    "wait": "#D55E00",
    "communicate": "#E69F00",
    "rebuild": "#CC79A7",
    "checkpoint": "#009E73",
    "evaluate": "#7F7F7F",
    "other": "#CFCFCF",
}
GROUP_COLOURS = {"large": "#0072B2", "small": "#E69F00"}
PREDICTED_COLOUR = "#B5B5B5"


def run_line(position: int) -> dict[str, Any]:
    """Colour and dashes of a run's lines: more runs than colours differ by dashes."""
    dashes = RUN_DASHES[position // len(RUN_COLOURS) % len(RUN_DASHES)]
    return {"color": RUN_COLOURS[position % len(RUN_COLOURS)], "linestyle": dashes}


def resolution_colours(resolutions: Iterable[int], bands: bool = False) -> dict[int, str]:
    """Light for low, dark for high; `bands` gives paler ones, to lie behind lines."""
    lightest, darkest = (0.02, 0.2) if bands else (0.35, 0.95)
    unique = sorted(set(resolutions))
    shades = colormaps["Blues"](np.linspace(lightest, darkest, len(unique)))
    return {side: to_hex(shade) for side, shade in zip(unique, shades, strict=True)}


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of that many inches, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    return figure, list(axes.flat)


def legend_below(figure: Figure, handles: Sequence[Line2D | Patch], columns: int = 4) -> None:
    """One legend for the whole figure, where it covers no data."""
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            handlelength=2.2,
        )


def shorten(name: str, longest: int = 28) -> str:
    """A name that fits a legend: the middle of a long one is left out."""
    if len(name) > longest:
        half = (longest - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    return f" {name}" if name.startswith("_") else name  # matplotlib hides labels with _


def few_ticks(axes: Axes, integer: bool = False) -> None:
    """Ticks at round values of x, as many as there is room for."""
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=integer))


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
