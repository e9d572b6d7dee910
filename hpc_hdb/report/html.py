"""The report as one HTML page that needs nothing beside it: no network, no other file.

Whatever comes from a run (names, settings, versions) is escaped; the page has no scripts, and
its policy forbids any.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from hpc_hdb.report.events import TROUBLES
from hpc_hdb.report.runs import Run
from hpc_hdb.report.tables import (
    TextTable,
    comparison_table,
    difference_table,
    measured_table,
    result_lines,
    role_table,
    settings_table,
    version_table,
)
from hpc_hdb.report.units import format_count, format_seconds

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff;
       max-width: 66rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc;
     overflow-wrap: anywhere; }
p.about { color: #555; margin-top: 0; white-space: pre-line; }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
dl div { border: 1px solid #ddd; border-radius: .4rem; padding: .5rem .9rem; }
dt { color: #555; font-size: .85rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; display: block; margin: 1.2rem 0; }
div.table { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: bold; padding-bottom: .3rem; white-space: nowrap; }
th, td { padding: .2rem .5rem; font-size: .93rem; text-align: right; max-width: 16rem;
         border-bottom: 1px solid #e5e5e5; overflow-wrap: break-word; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: pre-wrap;
                               min-width: 7rem; }
p.note { color: #555; font-size: .85rem; margin: .2rem 0 0; }
summary { cursor: pointer; color: #0072b2; }
"""

PLOT_TITLES = {
    "accuracy": "Held-out accuracy",
    "loss": "Training and held-out loss",
    "rate": "Learning rate",
    "roles": "Time per rank",
    "stages": "Predicted and measured time of an epoch",
    "timeline": "Rounds of the workers over time",
}


def report_page(runs: Sequence[Run], plots: Mapping[str, bytes]) -> str:
    """The whole page.

    Parameters
    ----------
    runs : sequence of Run
    plots : mapping of str to bytes
        PNG files by their names, see `PLOT_TITLES`.
    """
    if len(runs) == 1:
        title, body = runs[0].name, _single(runs[0], plots)
    else:
        title, body = f"Comparison of {len(runs)} runs", _several(runs, plots)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"/>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)} - hpc-hdb</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def _single(run: Run, plots: Mapping[str, bytes]) -> str:
    return (
        _about(run)
        + _figures(run)
        + _images(plots)
        + _table(measured_table(run.summary))
        + _table(role_table(run.summary))
        + _table(version_table(run))
        + _accidents(run)
        + _left_out(run)
        + _settings(run)
    )


def _several(runs: Sequence[Run], plots: Mapping[str, bytes]) -> str:
    parts = [_table(comparison_table(runs))]
    different = difference_table(runs)
    if different.rows:
        parts.append(_table(different.turned()))
    parts.append(_images(plots))
    for run in runs:
        parts += [
            f"<h2>{escape(run.name)}</h2>\n",
            _about(run),
            f'<p class="about">{escape(result_lines(run.summary))}</p>\n',
            _table(measured_table(run.summary)),
            _table(role_table(run.summary)),
            _table(version_table(run)),
            _settings(run),
        ]
    return "".join(parts)


def _about(run: Run) -> str:
    """Who took part, in a line, and whether the run has ended."""
    summary = run.summary
    small = summary["small_workers"]
    where = {"mpi": "over MPI", "virtual": "on the virtual clock"}.get(summary["mode"], "")
    shared = summary["ranks_per_worker"]
    who = (
        f"{format_count(summary['workers'] - small, 'large-batch worker')}, "
        f"{format_count(small, 'small-batch worker')}"
    )
    if summary["sync"] == "allreduce":
        who = format_count(shared, "rank")
    elif shared > 1:
        who += f", {shared} ranks each"
    text = f"{who}, {str(summary['sync'] or '').upper()} {where}; {run.folder}"
    if summary["state"] != "finished":
        text += f"\nThis run is {summary['state']}: figures up to its last event."
    return f'<p class="about">{escape(text)}</p>\n'


def _figures(run: Run) -> str:
    """The few figures that one looks for first."""
    summary = run.summary
    figures = {
        "epochs": f"{summary['epochs']:g}",
        "time": format_seconds(summary["seconds"]),
        "images/s": f"{summary['images_per_second']:.0f}",
        "not training": f"{summary['overhead']:.1%}",
    }
    if "final_accuracy" in summary:
        figures = {
            "final accuracy": f"{summary['final_accuracy']:.2%}",
            f"best, after epoch {summary['best_epoch']:g}": f"{summary['best_accuracy']:.2%}",
            "final loss": f"{summary['final_loss']:.4f}",
        } | figures
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n"
        for name, value in figures.items()
    )
    return f"<dl>\n{''.join(items)}</dl>\n"


def _images(plots: Mapping[str, bytes]) -> str:
    return "".join(
        f'<img alt="{escape(PLOT_TITLES[name])}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"/>\n'
        for name, data in plots.items()
    )


def _accidents(run: Run) -> str:
    """What befell the workers, and when."""
    happened = [event for event in run.events if event["event"] in TROUBLES]
    if not happened:
        return ""
    items = "".join(
        f"<li>after {format_seconds(event['time'])}, worker {event['worker']} "
        f"{escape(TROUBLES[event['event']])}</li>\n"
        for event in happened
    )
    title = format_count(len(happened), "accident")
    return f"<details>\n<summary>{title}</summary>\n<ul>\n{items}</ul>\n</details>\n"


def _left_out(run: Run) -> str:
    files = run.summary.get("left_out", [])
    if not files:
        return ""
    items = "".join(f"<li>{escape(file)}</li>\n" for file in files)
    title = f"{format_count(len(files), 'bad image')} left out"
    return f"<details>\n<summary>{title}</summary>\n<ul>\n{items}</ul>\n</details>\n"


def _settings(run: Run) -> str:
    if not run.settings:
        return ""
    table = _table(settings_table(run))
    return f"<details>\n<summary>All settings</summary>\n{table}</details>\n"


def _table(table: TextTable) -> str:
    if not table.rows:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>\n' if table.note else ""
    return (
        f'<div class="table"><table>\n<caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n{note}</div>\n"
    )
