"""Every benchmark starts, measures both sides and prints a ratio, at its smallest."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import succeed

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALLEST = {
    "batch_time": "--resolutions 16 --large-batch 16 --samples 128 --workers 2 --small-workers 1",
    "commit": "--workers 1 --commits 2",
    "conventional": "--model resnet8 --samples 32 --batch 8 --epochs 2",
    "end_to_end": "--images-per-class 10 --epochs 4 --timing {24=[4e-4,2e-3],32=[7e-4,2e-3]}",
    "fault_tolerance": "--workers 2 --commits 2 --modes asp",
    "loader": "--resolutions 16 --sides 16 --batch 5 --seconds 0.1 --cores 1",
    "resolution_switch": "--resolutions 16 24 --images 40 --batch 5 --rounds 1 --step 0.01",
    "scale": "--config digits --ranks 2 --pauses 0 --modes asp",
    "servers": "--workers 1 --servers 1 --commits 2 --blocks 1",
    "shard_formats": "--batch 5 --seconds 0.1 --cores 1",
    "worker_overhead": "--models resnet8",
}
UNREPEATED = {"resolution_switch", "servers"}
"""Benchmarks without --repeats."""

ON_IMAGES = {"end_to_end", "loader", "resolution_switch", "shard_formats"}


def test_no_benchmark_is_left_out():
    mains = {path.stem for path in BENCHMARKS.glob("*.py") if "Sheet(" in path.read_text()}
    assert mains - {"common"} == set(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_and_compares(name: str, digits: Path):
    words = SMALLEST[name].split()
    if name not in UNREPEATED:
        words += ["--repeats", "1"]
    if name in ON_IMAGES:
        words += ["--data", str(digits / "digits")]
    out = succeed(sys.executable, BENCHMARKS / f"{name}.py", *words, timeout=300)
    assert out.startswith(f"{name}, ")
    table = re.sub(
        r"bar: .*", "", out.partition("\n")[2]
    )  # less the bars, which are printed anyway
    # shard_formats has formats side by side, of which none is ours to be compared with.
    figure = (
        r"images/s" if name == "shard_formats" else r"(?<!\S)\(?[+-]?\d[\d.]*(x|%| steps)\)?(?!\S)"
    )
    assert re.search(figure, table), out
