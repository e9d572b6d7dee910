"""The run folder: what a run leaves behind, and the lock that keeps a second run out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hpc_hdb.config import Settings, read_settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import TrainingPlan

_OF_A_RUN = ("config.toml", "plan.json", "events.jsonl", "checkpoint", "model.pt")

_ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EACCES: "make it yours to write",
    errno.EPERM: "make it yours to write",
    errno.EROFS: "make it writable",
}


class RunFolder:
    """A locked run folder; made by `create` or `reopen`.

    The lock is the kernel's (``flock``): it ends with the process, however that ends. As a
    context it unlocks at the end, and takes a new folder away again in which no run began.
    """

    def __init__(self, path: Path, resumed: bool, made: bool = False) -> None:
        self.path = path
        self.resumed = resumed
        self._made = made
        self._begun = resumed
        self._lock = _lock(path)

    @classmethod
    def create(cls, settings: Settings, name: str) -> RunFolder:
        """Make a new run folder.

        Raises
        ------
        UserError
            If it cannot be made, is in use, or already holds a run.
        """
        path = settings.run.output or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with _to_be_written(path):
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, resumed=False, made=made)
            if any((path / of_a_run).exists() for of_a_run in _OF_A_RUN):
                raise UserError(
                    f"{path} already holds a run: go on with it by --resume {_quoted(path)}, "
                    "or choose another run.output"
                )
            folder._sign()
        return folder

    @classmethod
    def reopen(cls, path: Path) -> tuple[RunFolder, Settings]:
        """Open the folder of an interrupted run, and the settings it was started with.

        Raises
        ------
        UserError
            If it is not a run folder, its settings are damaged, or another run is using it.
        """
        if not path.is_dir():
            raise UserError(f"--resume {path}: there is no such run folder")
        with _to_be_written(path):
            settings = read_settings(path / "config.toml")
            folder = cls(path, resumed=True)
            folder._sign()
        return folder, settings

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._made and not self._begun:
            with contextlib.suppress(OSError):  # it may have been filled meanwhile
                (self.path / ".lock").unlink()
                self.path.rmdir()
        self._lock.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / "summary.json").exists()

    def begin(self, settings: Settings, plan: TrainingPlan) -> None:
        """Write what the run is to do; from now on the folder holds a run.

        Raises
        ------
        UserError
            If it cannot be written.
        """
        with _to_be_written(self.path):
            self._write("plan.json", json.dumps(plan.to_dict(), indent=2) + "\n")
            self._write("config.toml", settings.to_toml())
        self._begun = True

    def read_plan(self, time_ratio: float) -> TrainingPlan | None:
        """The plan that the run was started with; None for a new run.

        Raises
        ------
        UserError
            If it is missing or damaged.
        """
        if not self.resumed:
            return None
        path = self.path / "plan.json"
        try:
            plan = TrainingPlan.from_dict(json.loads(path.read_text()), time_ratio)
            if not plan.plans:
                raise ValueError("it has no stages")
        except Exception as error:  # a damaged file raises whatever its bytes lead to
            what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
            again = _quoted(self.path / "config.toml")
            raise UserError(
                f"{path} {what} ({type(error).__name__}: {error}): start the run again with "
                f"hdb train {again} --set run.output=..."
            ) from None
        return plan

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self._write(name, json.dumps(values, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        unfinished = self.path / f"{name}.part"
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(self.path / name)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise

    def _sign(self) -> None:
        """Say in the lock file who holds the lock."""
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()


@contextlib.contextmanager
def results_in(path: Path) -> Iterator[None]:
    """For the time in which a run writes into its folder `path`: a failing disk is a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):  # torch.save hides it behind a RuntimeError
            raise
        advice = _ADVICE.get(cause.errno or 0, "mend that")
        raise UserError(
            f"run folder {path}: {_reason(cause)}: {advice}, then go on with "
            f"hdb train --resume {_quoted(path)}"
        ) from None


@contextlib.contextmanager
def _to_be_written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot use the run folder {path}: {_reason(error)}: choose a run.output on a disk "
            "with room where you may write"
        ) from None


def _lock(path: Path) -> IO[str]:
    """Lock `path` for this process; keep what is returned."""
    file = (path / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(
            f"{path} is in use by a run ({holder}): wait for it, or choose another run.output"
        ) from None
    except OSError:
        pass  # this file system has no locks: better without than not at all
    return file


def _reason(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
