"""The report of one run, or of several side by side: a page, its plots, and tables to print."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from dali_pipelines.files import write_whole
from hpc_hdb.errors import UserError
from hpc_hdb.report.html import report_page
from hpc_hdb.report.plots import plot_accuracy, plot_loss, plot_rate
from hpc_hdb.report.runs import Run, load_runs
from hpc_hdb.report.style import STYLE
from hpc_hdb.report.tables import (
    comparison_table,
    difference_table,
    measured_table,
    result_lines,
    role_table,
)
from hpc_hdb.report.time_plots import plot_roles, plot_stages
from hpc_hdb.report.timeline import plot_timeline
from hpc_hdb.report.units import format_count

_PLOTS = {
    "accuracy": plot_accuracy,
    "loss": plot_loss,
    "rate": plot_rate,
    "roles": plot_roles,
    "stages": plot_stages,
    "timeline": plot_timeline,
}

_FIRST_COLUMN, _RUN_COLUMN = 18, 12
"""Widths by which to decide how many runs fit side by side in a terminal."""


@dataclass(frozen=True)
class Report:
    """What `write_report` has written; printed to a rich console, the tables of it.

    Attributes
    ----------
    runs : tuple of Run
    page : Path
        The HTML page.
    plots : tuple of Path
        PNG files. A run with no commits yet has none.
    """

    runs: tuple[Run, ...]
    page: Path
    plots: tuple[Path, ...]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        for run in self.runs:
            if run.damaged_lines:
                lines = format_count(run.damaged_lines, "damaged line")
                yield Text(f"{run.folder / 'events.jsonl'}: {lines} left out")
        if len(self.runs) == 1:
            summary = self.runs[0].summary
            yield Text(result_lines(summary))
            if summary["stages"]:
                yield measured_table(summary)
                yield role_table(summary)
            return
        across = max(1, (options.max_width - _FIRST_COLUMN) // _RUN_COLUMN)
        for table in (comparison_table(self.runs), difference_table(self.runs)):
            for block in table.blocks(across):
                yield block.turned()


def write_report(folders: Sequence[Path], output: Path | None = None) -> Report:
    """Write ``report.html`` and ``plots/*.png``.

    Parameters
    ----------
    folders : sequence of Path
        Run folders; of each, ``events.jsonl`` is read, and ``config.toml`` to show it. A run
        may still be going on.
    output : Path, optional
        Folder to write into; by default the run folder, or ``report`` for several runs.

    Raises
    ------
    UserError
        If a folder holds no run, or the output cannot be written.
    """
    runs = load_runs(folders)
    if output is None:
        output = runs[0].folder if len(runs) == 1 else Path("report")
    images = draw_plots(runs)
    page = output / "report.html"
    paths = {name: output / "plots" / f"{name}.png" for name in images}
    try:
        (output / "plots").mkdir(parents=True, exist_ok=True)
        for name, data in images.items():
            write_whole(paths[name], data)
        write_whole(page, report_page(runs, images).encode())
    except OSError as error:
        raise UserError(
            f"cannot write the report into {output}: {error.strerror}; choose another --output"
        ) from None
    return Report(tuple(runs), page, tuple(paths.values()))


def draw_plots(runs: Sequence[Run]) -> dict[str, bytes]:
    """PNG files by name; a plot for which there is nothing yet is left out."""
    images = {}
    with matplotlib.rc_context(STYLE):
        for name, plot in _PLOTS.items():
            figure = plot(runs)
            if figure is not None:
                buffer = io.BytesIO()
                FigureCanvasAgg(figure).print_png(buffer)
                images[name] = buffer.getvalue()
    return images
