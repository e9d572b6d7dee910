"""Commits of ResNet-18 to 1, 2 and 4 servers by 1 to 8 workers, beside a bare MPI exchange.

The peer sends the same bytes, in the same slices, to the same ranks and back over bare mpi4py
without a merge; for BSP, a bare Reduce to each server and a Bcast from there. Throughput is that
of all workers together. Bytes are counted by Open MPI itself, and are all that any rank sends.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import Any

from common import HERE, Sheet, arguments, last_json, milliseconds, mpirun
from sent_bytes import ENABLE

KINDS = {"ASP": ("hdb", "bare"), "BSP": ("hdb_bsp", "bare_bsp")}


def measure(workers: int, servers: int, options: argparse.Namespace) -> dict[str, Any]:
    """What commit_ranks.py prints, of one launch."""
    script = HERE / "commit_ranks.py"
    words = ["--servers", servers, "--commits", options.commits, "--blocks", options.blocks]
    return last_json(mpirun(workers + servers, [sys.executable, script, *map(str, words)]))


def rows(workers: int, servers: int, record: dict[str, Any]) -> list[list[str]]:
    """The table's rows for one cluster."""
    table = []
    for what, (ours, theirs) in KINDS.items():
        seconds, sent = record["seconds"], record["bytes"]
        ratio = statistics.median(seconds[ours]) / statistics.median(seconds[theirs])
        rates = [record["commits"][kind] / record["elapsed"][kind] for kind in (ours, theirs)]
        megabytes = [sent[kind] / record["commits"][kind] / 1e6 for kind in (ours, theirs)]
        table.append(
            [
                what,
                str(workers),
                str(servers),
                milliseconds(seconds[ours]),
                milliseconds(seconds[theirs]),
                f"{ratio:.2f}x",
                *(f"{rate:.0f}" for rate in rates),
                *(f"{size:.1f}" if size else "-" for size in megabytes),
            ]
        )
    return table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--commits", type=int, default=8, help="of each worker in a block")
    parser.add_argument("--blocks", type=int, default=2, help="of each kind, taking turns")
    options = parser.parse_args()
    os.environ |= ENABLE
    sheet = Sheet("servers")
    head = ["", "workers", "servers", "hpc-hdb", "bare MPI", "ratio"]
    head += ["commits/s", "bare", "MB/commit", "bare"]
    table = [
        row
        for workers in options.workers
        for servers in options.servers
        for row in rows(workers, servers, measure(workers, servers, options))
    ]
    sheet.table(head, sorted(table, key=lambda row: row[0]))
    sheet.line("Medians over all commits, with their middle half in brackets.")
    cores = len(os.sched_getaffinity(0))
    if max(options.workers) + max(options.servers) > cores:
        sheet.line(f"More than {cores} ranks share the {cores} cores.")
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
