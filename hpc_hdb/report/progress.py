"""What a user sees while a run goes on, and the tables at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.text import Text

from hpc_hdb.config import Settings
from hpc_hdb.plan import RoundBook, TrainingPlan
from hpc_hdb.report.events import TROUBLES, Event
from hpc_hdb.report.plan_notes import plan_notes
from hpc_hdb.report.tables import (
    measured_table,
    plan_lines,
    plan_table,
    result_lines,
    role_table,
)

_LINES_BESIDE_BARS = 12
"""Of a terminal's height, kept for what is printed above the bars of the workers."""


def damage_line(file: str, reason: str, instead: str) -> str:
    """What is told of a damaged file that the run can do without."""
    return f"{file} cannot be used ({reason}): going on with {instead}"


class _Bars(bars.Progress):
    """Bars that end in an empty line: mpirun withholds a last line that has no end yet."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text()


class Progress:
    """A line per evaluation, and on a terminal bars below.

    Parameters
    ----------
    console : Console
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = _Bars(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=None),
            bars.TextColumn("{task.fields[note]}", justify="right"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self._run: bars.TaskID | None = None
        self._workers: dict[int, bars.TaskID] = {}
        self._epochs = 0

    def note(self, text: str) -> None:
        """Say what is going on."""
        self.console.print(Text(text), soft_wrap=True)

    def begin(self, plan: TrainingPlan, settings: Settings, book: RoundBook) -> None:
        """Show the plan with what to know of it, and start the bars: `book` has what is done."""
        shares = plan.shares
        servers = settings.server.server_ranks
        self._epochs = plan.stages[-1].end_epoch
        self.note(plan_lines(plan, servers))
        self.console.print(plan_table(plan))
        for note in plan_notes(plan, settings):
            self.note(note)
        self._run = self._live.add_task(
            self._epoch(book.epoch), total=book.total, completed=book.commits, note=""
        )
        room = max(1, self.console.height - _LINES_BESIDE_BARS)
        for worker in range(1, min(shares.workers, room) + 1):
            large = worker <= shares.large_workers
            share = shares.large_share if large else shares.small_share
            who = "all ranks" if not servers else f"worker {worker}"
            self._workers[worker] = self._live.add_task(
                f"  {who}, {'large' if large else 'small'} batch",
                total=share / book.parts,
                note="",
            )
        if shares.workers > room:
            self.note(f"bars: workers 1 to {room} of {shares.workers}")
        self._live.start()

    def show(self, event: Event) -> None:
        """Take an event from the log."""
        name = event["event"]
        if name == "resume":
            self.note(f"resumed after commit {event['commit']}")
        elif name == "damaged":
            self.note(damage_line(**{key: event[key] for key in ("file", "reason", "instead")}))
        elif name == "slow_write":
            self.note(
                f"checkpoint {event['file']} has been writing for {event['seconds']:.0f} s: does "
                "the file system hang? The workers wait for it"
            )
        if self._run is None:
            return
        if name == "commit":
            self._live.update(
                self._run, completed=event["commit"], description=self._epoch(event["epochs"])
            )
            if event["worker"] in self._workers:
                note = f"{event['resolution']} px, batch {event['batch']}, loss {event['loss']:.3f}"
                self._live.reset(self._workers[event["worker"]], note=note)
        elif name == "progress" and event["worker"] in self._workers:
            self._live.update(self._workers[event["worker"]], completed=event["samples"])
        elif name == "plan":
            self._live.update(self._run, total=event["total"])
            self.note(_crew(event, self._epochs))
        elif name in TROUBLES:
            self._take_away(event["worker"], name)
            self.note(f"[{event['time']:8.1f} s] worker {event['worker']} {TROUBLES[name]}")
        elif name == "evaluation":
            self._live.update(self._run, note=f"accuracy {event['accuracy']:.2%}")
            self.note(
                f"[{event['time']:8.1f} s] epoch {event['epoch']:5.1f} of {self._epochs}: "
                f"accuracy {event['accuracy']:.2%}, loss {event['loss']:.4f}"
            )

    def close(self) -> None:
        """Take the bars away and give the cursor back; harmless where there are none."""
        for task in self._workers.values():
            self._live.remove_task(task)
        self._workers.clear()
        self._live.stop()

    def interrupted(self, folder: Path, saved: bool) -> None:
        """Say how to go on after a signal, and whether there is a checkpoint to go on from."""
        self.close()
        again = shlex.quote(str(folder))
        state = "checkpoint written" if saved else "nothing was merged yet"
        self.note(f"interrupted; {state}. Go on, started as before: hdb train --resume {again}")

    def end(self, summary: dict[str, Any], folder: Path) -> None:
        """Show the results."""
        self.close()
        self.note(result_lines(summary))
        self.console.print(measured_table(summary))
        self.console.print(role_table(summary))
        self.note(f"run folder: {folder}")

    def _take_away(self, worker: int, trouble: str) -> None:
        """Remove the bar of a worker that is gone."""
        if trouble in ("lost", "dropped") and worker in self._workers:
            self._live.remove_task(self._workers.pop(worker))

    def _epoch(self, epochs: float) -> str:
        return f"epoch {epochs:.1f} of {self._epochs}"


def _crew(plan: Event, epochs: int) -> str:
    """Who goes on by a new plan, and from when."""
    small = plan["small_workers"]
    large = plan["workers"] - small
    groups = [f"{large} large-batch"] * (large > 0) + [f"{small} small-batch"] * (small > 0)
    who = f"{' and '.join(groups)} worker{'s' * (large + small > 1)}"
    verb = "go on" if large + small > 1 else "goes on"
    by = f", by a new plan from epoch {plan['from_epoch'] + 1}"
    return f"{'':13}{who} {verb}{by * (plan['from_epoch'] < epochs)}"
