"""The event log of a run: one JSON object a line, and all that the report reads.

Every event has ``event`` (its name) and ``time`` (seconds since training began, counted on
through a resume). Events by name:

- ``start``: ``mode``, ``sync``, ``servers`` (0 with all-reduce), ``workers``,
  ``ranks_per_worker``, ``small_workers``,
  ``commits_per_epoch`` (of all workers), ``samples``, ``update_factor``, ``device``, ``threads``,
  ``versions``; again when resumed
- ``stage``: ``commit``, ``stage``, ``start_epoch``, ``end_epoch``, ``learning_rate``
  (before warm-up and scaling), ``resolution``, ``dropout``, ``large_batch``, ``small_batch``
- ``commit``: ``commit`` (global count), ``worker``, ``group``, ``trained_as``
  (the group whose round it was), ``epoch``, ``part``, ``begin``,
  ``end``, ``stage``, ``learning_rate`` (as the round began), ``resolution``, ``dropout``,
  ``batch``, ``pulled_at``
  (commit count of the model it started from), ``samples``, ``steps``, ``loss``, ``accuracy``
  (while training), ``predicted_seconds``, and the seconds of the round
- ``evaluation``: ``commit``, ``epoch``, ``accuracy``, ``loss``, ``seconds``
- ``checkpoint``: ``commit``, ``file``
- ``left_out``: ``commit``, ``file``: a bad image, where those are skipped
- ``leave``: ``worker``, ``group``, and the seconds since its last commit
- ``resume``: ``commit``, ``seconds``; what was logged after that commit is void
- ``interrupted``: ``signal``
- ``end``: ``commit``, ``seconds``
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_hdb.errors import UserError

Event = dict[str, Any]

_NEEDED = {
    "stage": ("commit", "stage", "start_epoch", "end_epoch", "resolution"),
    "commit": ("commit", "worker", "group", "stage", "samples", "loss", "train_seconds"),
    "evaluation": ("commit", "epoch", "accuracy", "loss", "seconds"),
    "leave": ("worker", "group"),
    "left_out": ("file",),
    "resume": ("commit",),
}
"""What a line must hold to be of use: one that a crash or an editor damaged is left out."""


class EventLog:
    """Appends events to a file and passes them on to listeners.

    Parameters
    ----------
    path : Path
        Appended to, flushed at every line.
    now : callable
        The time to write into events, in seconds.
    """

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        _end_cut_line(path)
        self._file = path.open("a", encoding="utf-8")  # open as long as the run
        self._now = now
        self._listeners: list[Callable[[Event], None]] = []

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def emit(self, name: str, values: Event) -> None:
        """Log an event; ``progress`` only goes to the listeners."""
        event = {"event": name, "time": round(self._now(), 6)} | values
        if name != "progress":
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()
        for listener in self._listeners:
            listener(event)

    def close(self) -> None:
        self._file.close()


def _end_cut_line(path: Path) -> None:
    """Give a last line that a crash cut short its end, so that the next event starts anew."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_events(run: Path) -> list[Event]:
    """Events of a run as if it had never been interrupted.

    What came after the checkpoint that a resumed run went on from was done again and is left
    out; so are damaged lines.

    Parameters
    ----------
    run : Path
        The run folder.

    Raises
    ------
    UserError
        If there is no event log, or it cannot be read.
    """
    path = run / "events.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run} is not a run folder: it has no events.jsonl") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    events: list[Event] = []
    for line in text.split("\n"):
        event = _parse(line)
        if event is None:
            continue
        if event["event"] == "resume":
            events = [old for old in events if _still_holds(old, event["commit"])]
        events.append(event)
    return events


def _parse(line: str) -> Event | None:
    """The event of a line; None if the line is damaged."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    needed = ("time", *_NEEDED.get(event["event"], ()))
    return event if all(event.get(key) is not None for key in needed) else None


def _still_holds(event: Event, commit: int) -> bool:
    """Whether an event is part of a run that was resumed after `commit`."""
    if event["event"] in ("leave", "interrupted"):
        return False
    return event.get("commit", 0) <= commit
