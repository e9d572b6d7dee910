"""How a command ends that cannot do what it was asked: shared by the tests of bad input."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import command, environment

from hpc_hdb.train.sealed import read_sealed

TRAIN = ["hdb", "train", "mine.toml", "--set", "run.output=out"]
SIMULATE = ["hdb", "simulate", "mine.toml", "--set", "run.output=out"]
LONG = ["--set", "schedule.epochs=100000"]

CONFIGURATION = """
[data]
source = "synthetic"
synthetic_samples = 240
synthetic_side = 16
[model]
name = "mine:net"
[plan]
workers = 2
time_ratio = 1.1
timing = { 16 = [4e-4, 2e-3] }
[schedule]
epochs = 3
resolutions = [16]
large_batch = [64]
[server]
commits_per_epoch = 2
"""
"""A run of seconds for `MODELS`; further sections go on from here."""

MODELS = """
import time
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, steps=None):
        super().__init__()
        self.fc, self.steps = nn.Linear(3, classes), steps

    def forward(self, images):
        if self.training and self.steps is not None:
            self.steps -= 1
            if self.steps < 0:
                raise ArithmeticError("these weights are no good")
        return self.fc(images.mean((2, 3)))

def net(num_classes):
    return Net(num_classes)

class Sleepy(Net):
    def forward(self, images):
        if self.training:
            time.sleep(0.5)
        return super().forward(images)

def sleepy(num_classes):
    return Sleepy(num_classes)

def wrong(num_classes):
    return Net(3)

def one_sided(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))

def failing(num_classes):
    raise KeyError("no such layer")

def failing_later(num_classes):
    return Net(num_classes, steps=3)
"""

SECONDS = 20
"""Within which all processes end, once it is said why; a second or two where cores are free."""


class Ending(NamedTuple):
    """What a command has left: `lines` of standard error, without the launcher's own."""

    status: int
    lines: list[str]
    out: str
    seconds: float
    """From its first words on standard error to the end of its last process."""


class Job:
    """A command under way, with all the processes that it starts."""

    def __init__(
        self, *arguments: str | Path, ranks: int = 0, cwd: Path | None = None, **env: str
    ) -> None:
        self._mark = f"HDB_TEST_JOB={uuid.uuid4().hex}".encode()
        name, _, value = self._mark.decode().partition("=")
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the job
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command(arguments, ranks),
            env=environment(**env) | {name: value},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )

    def signal(self, number: int) -> None:
        """Signal the command and what it has started, as a terminal does."""
        os.killpg(self.process.pid, number)

    def said(self) -> str:
        """What it has printed so far."""
        return self._text(self._out)

    def ranks(self) -> dict[int, int]:
        """The processes of the ranks that mpirun has started and that still run."""
        return {rank: process for job, rank, process in self._started() if job == 1}

    def replacements(self) -> list[int]:
        """The processes that were started in the middle of it, and still run."""
        return [process for job, _, process in self._started() if job > 1]

    def _started(self) -> Iterator[tuple[int, int, int]]:
        """Number of the MPI job, rank and process of what mpirun has started and still runs."""
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for child in file.read_text().split():
                with contextlib.suppress(OSError):
                    environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                    values = dict(entry.partition(b"=")[::2] for entry in environment)
                    if rank := values.get(b"OMPI_COMM_WORLD_RANK"):
                        job = values[b"PMIX_NAMESPACE"].rpartition(b"@")[2]
                        yield int(job), int(rank), int(child)

    def until(self, happened: Callable[[], object], seconds: float = 90) -> None:
        """Wait until it has happened; the job must not have ended by then."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"it has ended: {self.end()}"
            assert time.monotonic() < end, f"nothing happened in {seconds} s: {self._kill()}"
            time.sleep(0.02)

    def end(self, seconds: float = 90) -> Ending:
        """Wait for the end of all processes."""
        end = time.monotonic() + seconds
        spoke = None
        while self.process.poll() is None or self._left():
            now = time.monotonic()
            assert now < end, f"still running after {seconds} s: {self._kill()}"
            if spoke is None and os.fstat(self._err.fileno()).st_size:
                spoke = now
            time.sleep(0.02)
        lines = [line for line in self._text(self._err).split("\n") if not _launchers(line)]
        silent = 0.0 if spoke is None else time.monotonic() - spoke
        return Ending(self.process.returncode, lines, self._text(self._out), silent)

    def _left(self) -> list[int]:
        """The job's processes that still run."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:  # ended meanwhile
                continue
        return found

    def _kill(self) -> str:
        """End it by force; what it has said."""
        for process in {self.process.pid, *self._left()}:
            os.kill(process, 9)
        return self._text(self._err) + self._text(self._out)

    @staticmethod
    def _text(file: tempfile._TemporaryFileWrapper) -> str:
        size = os.fstat(file.fileno()).st_size
        printed = os.pread(file.fileno(), size, 0)  # no seek: the job would write there
        return printed.decode(errors="replace").replace("\0", "")


def _launchers(line: str) -> bool:
    """Whether mpirun itself says that, about a rank that has ended the job."""
    words = (
        *("---", "MPI_ABORT was", "  Proc: [[", "  Errorcode:", "NOTE: invoking", "You may or"),
        *("exactly when", "prterun ", '"abort"', "terminated by", "thus causing", "   Process"),
        "   Exit code",
    )
    return not line.strip() or line.startswith(words)


def write_configuration(folder: Path) -> None:
    """Put ``mine.toml`` and its models into `folder`."""
    (folder / "mine.toml").write_text(CONFIGURATION)
    (folder / "mine.py").write_text(MODELS)


def write_bomb(path: Path) -> None:
    """A PNG whose header claims 60,000 pixels each way."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))


def refused(*arguments: str | Path, told: str, ranks: int = 0, cwd: Path, **env: str) -> None:
    """Run a command that must end with one line that holds `told`, all its processes at once."""
    ending = Job(*arguments, ranks=ranks, cwd=cwd, **env).end()
    assert_refusal(ending, told)


def assert_refusal(ending: Ending, *told: str) -> None:
    assert len(ending.lines) == 1, ending
    assert ending.lines[0].startswith("hdb: "), ending
    for words in told:
        assert words in ending.lines[0]
    assert "Traceback" not in ending.out
    assert ending.status == 2
    assert ending.seconds < SECONDS


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoint").glob("[0-9]*.pt"))


def assert_whole(folder: Path) -> None:
    """The run folder holds checkpoints, and all of them load."""
    assert checkpoints(folder)
    for path in checkpoints(folder):
        assert read_sealed(path)["model"].isfinite().all()


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]
