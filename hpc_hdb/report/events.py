"""The event log of a run: one JSON object a line, and all that the report reads.

Every event has ``event`` (its name) and ``time`` (seconds since training began, counted on
through a resume). Events by name:

- ``start``: ``mode``, ``sync``, ``servers`` (0 with all-reduce), ``workers``,
  ``ranks_per_worker``, ``small_workers``,
  ``commits_per_epoch`` (of all workers), ``samples``, ``update_factor``, ``device``, ``threads``,
  ``versions``; again when resumed, by the plan for the workers there are then
- ``stage``: ``commit``, ``stage``, ``start_epoch``, ``end_epoch``, ``learning_rate``
  (before warm-up and scaling), ``resolution``, ``dropout``, ``large_batch``, ``small_batch``
- ``commit``: ``commit`` (global count), ``epochs`` (done so far), ``worker``, ``group``,
  ``trained_as`` (the group whose round it was), ``epoch``, ``part``, ``begin``, ``end``,
  ``stage``, ``learning_rate`` (as the round began), ``resolution``, ``dropout``, ``batch``,
  ``pulled_at``
  (commit count of the model it started from), ``samples``, ``steps``, ``loss``, ``accuracy``
  (while training), ``predicted_seconds``, the seconds of the round: ``train_seconds`` by the run's
  clock, ``real_seconds`` by the device's, and others; and those of the first server since the
  commit before: ``server_wait_seconds`` (while it did not evaluate either) and
  ``server_communicate_seconds`` (moving and merging models)
- ``evaluation``: ``commit``, ``epoch``, ``accuracy``, ``loss``, ``seconds``
- ``checkpoint``: ``commit``, ``file``
- ``slow_write``: ``file`` of a checkpoint that is still being written, and ``seconds`` since when
- ``damaged``: ``file`` that is not gone on from, ``reason``, and what is used ``instead``
- ``left_out``: ``commit``, ``file``: a bad image, where those are skipped
- ``refused``: ``commit``, ``worker``, ``times`` (in a row), ``epoch``, ``stage``,
  ``learning_rate``: a round that ended in NaN or infinity, and was not merged
- ``dropped``: as ``refused``: the worker is given no more rounds
- ``silent``: ``commit``, ``worker``: not heard of for too long
- ``lost``: ``commit``, ``worker``, ``group``: it has died; others go on
- ``replaced``: as ``lost``: another process trains in its place from now on
- ``irreplaceable``: ``commit``, ``worker``: no process could be started in its place
- ``called_off``: ``commit``, ``worker``: its replacement had not joined when all was done
- ``plan``: ``commit``, ``from_epoch``, ``total`` (commits of the whole run), and what plan.json
  holds but the timing, with learning rates: the plan for the workers that are left, or there are
  after a resume
- ``adapted``: as ``plan``, and ``slowness``, each worker's time relative to the predicted one, by
  which the shares of the epochs from then on are cut
- ``leave``: ``worker``, ``group``, and the seconds since its last commit
- ``resume``: ``commit``, ``seconds``; what was logged after that commit is void
- ``interrupted``: ``signal``
- ``end``: ``commit``, and the first server's seconds since that
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_hdb.errors import UserError

Event = dict[str, Any]

TROUBLES = {
    "lost": "was lost: the others take over its share",
    "replaced": "was replaced by a new process",
    "irreplaceable": "is not replaced: MPI starts no process there",
    "called_off": "had no replacement when the run ended: the process was still starting",
    "silent": "does not answer",
    "refused": "ended a round in NaN or infinity: it is done again",
    "dropped": "is dropped: its rounds keep ending in NaN or infinity",
}
"""What events of a worker say of it, in words."""

_NEEDED = {
    "stage": ("commit", "stage", "start_epoch", "end_epoch", "resolution"),
    "commit": ("commit", "worker", "group", "stage", "samples", "loss", "train_seconds"),
    "evaluation": ("commit", "epoch", "accuracy", "loss", "seconds"),
    "leave": ("worker", "group"),
    "end": (),
    "left_out": ("file",),
    "resume": ("commit",),
    "start": (),
}
"""What a line must hold to be of use: one that a crash or an editor damaged is left out."""

_WHOLE = {
    *("batch", "begin", "commit", "commits_per_epoch", "end", "end_epoch", "large_batch", "part"),
    *("pulled_at", "ranks_per_worker", "resolution", "samples", "servers", "small_batch"),
    *("small_workers", "stage", "start_epoch", "steps", "threads", "worker", "workers"),
}
_FROM_ONE = {"commits_per_epoch", "ranks_per_worker", "workers"}
_REAL = {"dropout", "epoch", "learning_rate", "seconds", "time", "update_factor"}
_MAY_DIVERGE = {"accuracy", "loss"}
_TEXT = {"device", "event", "file", "instead", "mode", "reason", "signal", "sync"}
_LARGEST = 1e15
"""Of numbers in a log, well beyond any that is meant: what is drawn or added up stays finite."""


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
        for listener in self._listeners:  # first: a disk that hangs is told before it is met
            listener(event)
        if name != "progress":
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _end_cut_line(path: Path) -> None:
    """Give a last line that a crash cut short its end, so that the next event starts anew."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_events(run: Path) -> list[Event]:
    """As `read_log`, the events alone."""
    return read_log(run)[0]


def read_log(run: Path) -> tuple[list[Event], int]:
    """Events of a run as if it had never been interrupted.

    What came after the checkpoint that a resumed run went on from was done again and is left
    out; so are damaged lines.

    Parameters
    ----------
    run : Path
        The run folder.

    Returns
    -------
    events : list of Event
    damaged : int
        Lines left out that are no events.

    Raises
    ------
    UserError
        If there is no event log, it cannot be read, or all of it is damaged.
    """
    path = run / "events.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run} is not a run folder: it has no events.jsonl") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    lines = text.split("\n")
    events: list[Event] = []
    damaged = 0
    for number, line in enumerate(lines, start=1):
        event = _parse(line)
        if event is None:
            damaged += number < len(lines)  # the last one may just be being written
            continue
        if event["event"] == "resume":
            events = [old for old in events if _still_holds(old, event["commit"])]
        events.append(event)
    if not events and text.strip():
        raise UserError(f"{path} is damaged, or no event log: none of its lines is an event")
    return events, damaged


def _parse(line: str) -> Event | None:
    """The event of a line; None if the line is damaged."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    needed = _NEEDED.get(event["event"], ())
    if any(event.get(key) is None for key in ("time", *needed)):
        return None
    known = {key: value for key, value in event.items() if value is not None}
    checked = known if event["event"] in _NEEDED else {"time", "commit"} & set(known)
    return known if all(_fits(key, known[key]) for key in checked) else None


def _fits(key: str, value: object) -> bool:
    """Whether a value is of the kind that its key has in every event."""
    if key in _TEXT:
        return isinstance(value, str)
    if key in ("group", "trained_as"):
        return value in ("large", "small")
    if key == "versions":
        return isinstance(value, dict)
    if key in _MAY_DIVERGE:
        return type(value) is float or (type(value) is int and abs(value) < _LARGEST)
    if key in _WHOLE:
        return type(value) is int and (key in _FROM_ONE) <= value < _LARGEST
    if key in _REAL or key.endswith("_seconds"):
        return type(value) in (int, float) and 0 <= value < _LARGEST  # type: ignore[operator]
    return True


def _still_holds(event: Event, commit: int) -> bool:
    """Whether an event is part of a run that was resumed after `commit`."""
    if event["event"] in ("leave", "interrupted"):
        return False
    return event.get("commit", 0) <= commit
