"""The lock on a run folder, which keeps a second job out, and outlives no crash for long.

It is the kernel's (``flock``), which ends with the process, however that ends. Some file systems
have no such lock, or one of each node's own; so the holder also keeps a heartbeat file, whose
bytes change every 15 seconds. A job that finds one takes it for dead

- as soon as its process is gone, where that was on this node;
- at once, where it is of an earlier life of this Slurm job, or where nothing has been heard of it
  for three minutes, by the file system's clock;
- else once that time is over. If the bytes change meanwhile, the holder is alive.

A holder that finds another's heartbeat in the place of its own was thought dead, and stops. So does
an earlier life of a Slurm job that is still there, as on a node whose daemon alone has died: the
next life puts its own heartbeat there, and waits for the kernel's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_hdb.errors import UserError

HEARTBEAT = ".heartbeat"
_BEAT_SECONDS = 15.0
_STALE_SECONDS = 180.0
_LOOK_SECONDS = 1.0


class FolderLock:
    """Held from construction to `release`.

    Parameters
    ----------
    folder : Path
    note : callable
        Told, in a line, whom it waits for and from whom it has taken over.

    Raises
    ------
    UserError
        If another process holds the lock.
    OSError
        If the folder cannot be written.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self._folder = folder
        self._path = folder / HEARTBEAT
        self._lost: str | None = None
        self._about = {
            "process": os.getpid(),
            "started": _started(os.getpid()),
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "life": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "token": uuid.uuid4().hex,
        }
        self._beats = 0
        self._file = (folder / ".lock").open("a+")
        try:
            locked = self._lock()
            if not locked and not self._follows(_parse(self._seen())):
                self._file.seek(0)
                raise self._in_use(self._file.read().strip() or "another process")
            while not self._begin():
                self._displace(note)
        except BaseException:
            self._file.close()
            raise
        self._heard = time.monotonic()
        self._due, self._looked = threading.Event(), threading.Event()
        self._released = False
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        if not locked:
            self._outlast(note)

    def sign(self) -> None:
        """Say in the lock file who holds the lock, for whom the kernel keeps out."""
        self._file.truncate(0)
        self._file.write(_describe(self._heartbeat()))
        self._file.flush()

    def check(self) -> None:
        """Raise UserError where another job has taken the lock over.

        That is looked up every 15 seconds, and at once after a time in which it could not be, as
        where this process was stopped.
        """
        if time.monotonic() - self._heard > 2 * _BEAT_SECONDS:
            self._looked.clear()
            self._due.set()
            self._looked.wait(_LOOK_SECONDS)  # no longer: its disk may hang
        if self._lost is not None:
            raise UserError(
                f"{self._folder} was taken over by another run ({self._lost}), for which this one "
                "was dead: this one ends here"
            )

    def release(self) -> None:
        """Give the lock back; harmless where it is lost or the folder is gone."""
        self._released = True
        self._due.set()
        self._beating.join(_LOOK_SECONDS)
        with contextlib.suppress(OSError):
            if _token(self._path.read_bytes()) == self._about["token"]:
                self._path.unlink()
        self._file.close()

    def _lock(self) -> bool:
        """Lock the lock file as far as the file system can; False where another process has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            pass  # this file system has no locks: the heartbeat alone decides
        return True

    def _outlast(self, note: Callable[[str], None]) -> None:
        """Wait until an earlier life has found our heartbeat, and ended."""
        note(f"{self._folder} is still in use by an earlier life of this job: waiting for its end")
        end = time.monotonic() + _STALE_SECONDS
        while not self._lock() and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)

    def _seen(self) -> bytes:
        """The heartbeat that is there."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""

    def _begin(self) -> bool:
        """Put a heartbeat where there is none; of several processes one succeeds."""
        try:
            file = open(self._path, "xb")  # noqa: SIM115 - closed below
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._heartbeat())
        except OSError:
            self._path.unlink()
            raise
        return True

    def _displace(self, note: Callable[[str], None]) -> None:
        """Remove the heartbeat that is there, once its holder is dead."""
        try:
            seen = self._path.read_bytes()
            if not self._is_dead(seen, note):
                return
            aside = self._path.with_name(f"{HEARTBEAT}-{self._about['token']}")
            self._path.rename(aside)
        except FileNotFoundError:  # given back, or another job was faster
            return
        moved = aside.read_bytes()
        if moved != seen:  # somebody else's, who was faster
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._path)
            aside.unlink()
            raise self._in_use(_describe(moved))
        aside.unlink()

    def _is_dead(self, seen: bytes, note: Callable[[str], None]) -> bool:
        """Wait until it is known; False where the heartbeat is given back meanwhile."""
        holder = _describe(seen)
        if self._is_gone(_parse(seen)):
            return True
        silent = self._silent_seconds()
        if silent < _STALE_SECONDS:
            note(
                f"{self._folder} may be in use by a run ({holder}), last heard of "
                f"{max(0.0, silent):.0f} s ago: waiting until that is sure, "
                f"{_STALE_SECONDS - max(0.0, silent):.0f} s at most"
            )
        start = time.monotonic()
        while max(0.0, silent) + time.monotonic() - start < _STALE_SECONDS:
            time.sleep(_LOOK_SECONDS)
            try:
                now = self._path.read_bytes()
            except FileNotFoundError:
                return False
            if now != seen:
                raise self._in_use(_describe(now))
            if self._is_gone(_parse(seen)):
                return True
        note(
            f"{self._folder} is taken over from a run ({holder}) of which nothing was heard for "
            f"{_STALE_SECONDS / 60:.0f} minutes"
        )
        return True

    def _is_gone(self, holder: dict[str, Any]) -> bool:
        """Whether the holder is known to be dead, or as good as that, without waiting."""
        here = holder.get("host") == self._about["host"]
        return self._follows(holder) or (here and not _runs(holder))

    def _follows(self, holder: dict[str, Any]) -> bool:
        """Whether the holder is of an earlier life of this Slurm job."""
        job, life = holder.get("job"), holder.get("life")
        return bool(job) and job == self._about["job"] and life != self._about["life"]

    def _silent_seconds(self) -> float:
        """Seconds since the last heartbeat, by the clock of the file system."""
        lock = self._folder / ".lock"
        os.utime(lock)
        return lock.stat().st_mtime - self._path.stat().st_mtime

    def _beat(self) -> None:
        while self._lost is None:
            self._due.wait(_BEAT_SECONDS)
            self._due.clear()
            if self._released:
                return
            with contextlib.suppress(OSError):  # a disk that fails: training meets that as well
                self._beat_once()
                self._heard = time.monotonic()
            self._looked.set()

    def _beat_once(self) -> None:
        try:
            # What is written goes into the file that was read, whatever takes its place meanwhile.
            with open(self._path, "r+b") as file:
                there = file.read()
                if _token(there) == self._about["token"]:
                    self._beats += 1
                    file.seek(0)
                    file.write(self._heartbeat())
                else:
                    self._lost = _describe(there)
        except FileNotFoundError:
            self._begin()

    def _heartbeat(self) -> bytes:
        return json.dumps(self._about | {"beat": f"{self._beats:012d}"}).encode() + b"\n"

    def _in_use(self, holder: str) -> UserError:
        return UserError(
            f"{self._folder} is in use by a run ({holder}): wait for it, or choose another "
            "run.output"
        )


def _parse(heartbeat: bytes) -> dict[str, Any]:
    """What a heartbeat says; nothing where it is damaged."""
    try:
        values = json.loads(heartbeat)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _token(heartbeat: bytes) -> str | None:
    return _parse(heartbeat).get("token")


def _describe(heartbeat: bytes) -> str:
    """Its holder, in words."""
    values = _parse(heartbeat)
    if not {"process", "host"} <= set(values):
        return "another process"
    job = f", job {values['job']}" if values.get("job") else ""
    return f"process {values['process']} on {values['host']}{job}"


def _runs(holder: dict[str, Any]) -> bool:
    """Whether the holder's process runs on this node; True where that cannot be known.

    A process that nobody has waited for yet does not run, nor does one that has come to the number
    of a dead one.
    """
    process = holder.get("process")
    if not isinstance(process, int) or process <= 0:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    started = _started(process)
    return started is None or (started > 0 and started == holder.get("started", started))


def _started(process: int) -> int | None:
    """When a process of this node was started, in ticks since boot; 0 where it has ended.

    None where that is kept from this user.
    """
    try:
        about = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *values = about.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(values[18])
