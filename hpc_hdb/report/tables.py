"""Tables of a plan and of runs, one form for the terminal and the HTML report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from rich.table import Table
from rich.text import Text

from hpc_hdb.plan import TrainingPlan
from hpc_hdb.report.runs import Run
from hpc_hdb.report.units import format_count, format_number, format_seconds, format_together

ROLE_NAMES = {"server": "server", "large": "large batch", "small": "small batch"}

ACTIVITY_NAMES = {
    "train": "training",
    "data": "loading",
    "wait": "waiting",
    "communicate": "communicating",
    "rebuild": "rebuilding",
    "checkpoint": "saving",
    "evaluate": "evaluating",
    "other": "other",
}


@dataclass(frozen=True)
class TextTable:
    """A table of plain strings. The first column is aligned left, the others right.

    Attributes
    ----------
    title : str
    columns : sequence of str
    rows : sequence of sequence of str
    note : str
        What a reader must know of it, below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def turned(self) -> TextTable:
        """Rows as columns."""
        turned = list(zip_longest(self.columns, *self.rows, fillvalue=""))
        return TextTable(self.title, turned[0], turned[1:], self.note)

    def blocks(self, most: int) -> Iterator[TextTable]:
        """The same table in parts of about equal size, of no more than `most` rows each."""
        parts = -(-len(self.rows) // most)
        for part in range(parts):
            begin, end = (len(self.rows) * number // parts for number in (part, part + 1))
            note = self.note if part == parts - 1 else ""
            yield TextTable(self.title, self.columns, self.rows[begin:end], note)

    def __rich__(self) -> Table:
        # Text, so that no name is taken for markup
        table = Table(
            title=Text(self.title),
            caption=Text(self.note),
            title_justify="left",
            caption_justify="left",
            title_style="bold",
            caption_style="dim",
        )
        for position, column in enumerate(self.columns):
            table.add_column(Text(column), justify="right" if position else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def plan_table(plan: TrainingPlan) -> TextTable:
    """The stages of a plan, with batches and predicted time."""
    rows = [
        (
            f"{stage.start_epoch} to {stage.end_epoch}",
            f"{stage.learning_rate:g}",
            f"{stage.resolution} px",
            f"{stage.dropout:g}",
            " / ".join(str(batch) for batch in (stage.large_batch, stage.small_batch) if batch),
            format_seconds(solved.epoch_seconds),
        )
        for stage, solved in zip(plan.stages, plan.plans, strict=True)
    ]
    columns = ("epochs", "learning rate", "resolution", "dropout", "batches", "epoch time")
    note = "batches: large / small, in images; epoch time as predicted"
    return TextTable("Stages", columns, rows, note)


def plan_lines(plan: TrainingPlan, servers: int = 1) -> str:
    """Who takes part, and the predicted time, on two lines."""
    shares = plan.shares
    ranks = [format_count(servers, "server")]
    if shares.large_workers:
        ranks.append(format_count(shares.large_workers, "large-batch worker"))
    if shares.small_workers:
        small = format_count(shares.small_workers, "small-batch worker")
        ranks.append(f"{small} (update factor {shares.update_factor:.3f})")
    if plan.ranks > 1:
        ranks.append(f"{plan.ranks} ranks a worker")
    if not servers:
        ranks = [f"{format_count(plan.ranks, 'rank')} sharing each batch (all-reduce)"]
    epochs = format_count(plan.stages[-1].end_epoch, "epoch")
    return (
        f"{', '.join(ranks)}\n{epochs} of {format_count(plan.samples, 'image')}, "
        f"predicted to take {format_seconds(plan.predicted_seconds())}"
    )


def result_lines(summary: dict[str, Any]) -> str:
    """Accuracy, loss and time, on two lines; further ones where workers or images were lost."""
    unended = "" if summary["state"] == "finished" else f" ({summary['state']})"
    text = (
        f"{summary['epochs']:g} epochs in {format_seconds(summary['seconds'])}{unended}, "
        f"{format_number(summary['images_per_second'])} images/s, "
        f"{summary['overhead']:.1%} not training\n"
    )
    if "final_accuracy" in summary:
        text += (
            f"accuracy {summary['final_accuracy']:.2%}"
            f" (best {summary['best_accuracy']:.2%} after epoch {summary['best_epoch']:g}),"
            f" loss {summary['final_loss']:.4f}"
        )
    else:
        text += "not evaluated yet"
    if lost := summary.get("lost_workers"):
        once = dict.fromkeys(lost)  # some are lost again after a resume, or a replacement
        gone = format_count(len(once), "worker")
        text += f"\n{gone} of {summary['workers']} lost on the way: "
        text += ", ".join(map(str, once))
    if replaced := summary.get("replaced_workers"):
        text += f"; replaced: {', '.join(map(str, dict.fromkeys(replaced)))}"
    if files := summary.get("left_out"):
        text += f"\n{format_count(len(files), 'bad image')} left out: see summary.json"
    return text


def measured_table(summary: dict[str, Any]) -> TextTable:
    """The stages of a run, predicted and measured."""
    rows = []
    for row in summary["stages"]:
        predicted, measured = row["predicted_epoch_seconds"], row["measured_epoch_seconds"]
        groups = row["groups"]
        rows.append(
            (
                f"{row['start_epoch']} to {row['end_epoch']}",
                f"{row['resolution']} px",
                " / ".join(str(row[f"{group}_batch"]) for group in groups),
                format_together([predicted]),
                format_together([group["measured"] for group in groups.values()]),
                f"{measured / predicted - 1:+.1%}" if predicted else "-",
            )
        )
    columns = ("epochs", "resolution", "batches", "predicted", "measured", "difference")
    return TextTable(
        "Training time of an epoch",
        columns,
        rows,
        "of one worker, large / small batch; the difference is of the slower",
    )


def role_table(summary: dict[str, Any]) -> TextTable:
    """Where the time of each role went, in seconds per rank."""
    roles = summary["roles"]
    shared = summary["ranks_per_worker"]
    ranks = (r["workers"] * (1 if name == "server" else shared) for name, r in roles.items())
    rows = [("ranks", *map(str, ranks))]
    for activity, name in ACTIVITY_NAMES.items():
        if activity == "other" and not any(shows_other(role) for role in roles.values()):
            continue
        cells = (format_number(r[activity]) if activity in r else "-" for r in roles.values())
        rows.append(("  of it loading" if activity == "data" else name, *cells))
    shares = (f"{role['overhead']:.1%}" if "overhead" in role else "-" for role in roles.values())
    rows.append(("not training", *shares))
    note = "the server evaluates beside the training"
    if roles.get("server", {}).get("workers", 0) > 1:
        note = "the servers' times are those of the first, which evaluates beside the training"
    if "server" not in roles:
        note = "all ranks evaluate together, between epochs"
    if summary["mode"] == "virtual":
        note = "on the virtual clock loading, rebuilding, saving and evaluating take no time"
    elif any(shows_other(role) for role in roles.values()):
        note += "; other: starting up, and rounds that an interruption undid"
    columns = ("seconds per rank", *(ROLE_NAMES[name] for name in roles))
    return TextTable("Where the time went", columns, rows, note)


def shows_other(role: dict[str, Any]) -> bool:
    """Whether the time in none of the activities is more than the timers miss anyway."""
    return role.get("other", 0.0) > 0.005 * role.get("wall", 0.0)


def comparison_table(runs: Sequence[Run]) -> TextTable:
    """Results of several runs, a row each."""
    best = [run.summary["best_accuracy"] for run in runs if run.evaluations]
    reached = min(best) if len(best) == len(runs) else None
    columns = [
        "run", "sync", "workers", "small workers", "epochs", "final accuracy", "best accuracy",
        "final loss", "seconds", "images/s", "not training",
    ]  # fmt: skip
    note = ""
    if reached is not None:
        columns.append(f"s to {reached:.2%}")
        note = f"s to {reached:.2%}: seconds to the best accuracy that all of the runs reached"
    rows = []
    for run in runs:
        summary = run.summary
        accuracies = ["-", "-", "-"]
        if run.evaluations:
            accuracies = [
                f"{summary['final_accuracy']:.2%}",
                f"{summary['best_accuracy']:.2%}",
                f"{summary['final_loss']:.4f}",
            ]
        row = [
            run.name,
            str(summary["sync"] or "-"),
            str(summary["workers"]),
            str(summary["small_workers"]),
            f"{summary['epochs']:g}",
            *accuracies,
            format_number(summary["seconds"]),
            format_number(summary["images_per_second"]),
            f"{summary['overhead']:.1%}",
        ]
        if reached is not None:
            row.append(format_number(run.seconds_to(reached)))
        rows.append(row)
    if any(run.summary["state"] != "finished" for run in runs):
        columns.append("state")
        rows = [[*row, run.summary["state"]] for row, run in zip(rows, runs, strict=True)]
    return TextTable("Runs", columns, rows, note)


def difference_table(runs: Sequence[Run]) -> TextTable:
    """The settings in which runs differ, a row for each run."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key, "-") for run in runs] for key in keys}
    differ = [key for key in keys if key != "run.output" and len(set(values[key])) > 1]
    rows = [(run.name, *(values[key][number] for key in differ)) for number, run in enumerate(runs)]
    return TextTable("Settings that differ", ("run", *differ), rows if differ else ())


def settings_table(run: Run) -> TextTable:
    """All settings of a run."""
    return TextTable("Settings", ("setting", "value"), list(run.settings.items()))


def version_table(run: Run) -> TextTable:
    """Device and versions."""
    rows = [("device", str(run.summary["device"] or "-"))]
    rows += [(name, str(version)) for name, version in run.summary["versions"].items()]
    return TextTable("Versions", ("component", "version"), rows)
