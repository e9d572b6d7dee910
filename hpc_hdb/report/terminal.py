"""The terminal at the end of a run's output, also where a launcher stands between."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from rich.console import Console

_PLAIN_WIDTH = 100
_RANK_VARIABLE = "OMPI_COMM_WORLD_SIZE"

_PlainConsole = functools.partial(Console, markup=False, emoji=False, highlight=False)


def find_console() -> Console:
    """A console that draws bars where somebody watches, and plain lines elsewhere.

    What it prints stays as it is: a path may hold what rich takes for markup.

    ``mpirun`` gives its ranks pseudo-terminals or pipes of their own, so that asking the
    rank's standard output is misleading: the launcher's is looked at instead.
    """
    if _RANK_VARIABLE not in os.environ:
        return _PlainConsole(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    size = _launcher_terminal()
    if size is None:
        return _PlainConsole(force_terminal=False, width=_PLAIN_WIDTH)
    return _PlainConsole(force_terminal=True, width=size.columns, height=size.lines)


def _launcher_terminal() -> os.terminal_size | None:
    """Size of the terminal that the launcher writes to; None if it writes elsewhere."""
    try:
        descriptor = os.open(f"/proc/{_launcher()}/fd/1", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # no such terminal here: the launcher is on another node, or not ours
        return None
    try:
        size = os.get_terminal_size(descriptor)
        return size if size.columns else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _launcher() -> int:
    """The nearest process above this one that is not part of the job itself.

    A rank may be started through a script of the user's, whose output is the rank's own.
    """
    process = os.getppid()
    while process > 1:
        environment = Path(f"/proc/{process}/environ").read_bytes()
        if f"{_RANK_VARIABLE}=".encode() not in environment:
            break
        status = Path(f"/proc/{process}/stat").read_text()
        process = int(status.rpartition(")")[2].split()[1])
    return process
