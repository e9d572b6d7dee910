"""Time of a commit (push, merge, reply) of ResNet-18, beside bare MPI and torch RPC.

Peers: the same bytes back and forth over bare mpi4py without a merge, and a server over
torch.distributed.rpc that pickles lists of arrays, as the method's authors wrote it. For BSP:
a bare reduction and broadcast. Workers commit without a pause unless --pause says otherwise:
then the server has gone to sleep when a commit comes, as in training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict

from common import HERE, Bar, Sheet, arguments, last_json, milliseconds, mpirun, run

BARE = Bar(1.5, most=True)
RPC = Bar(20, most=False)
"""The bars hold at one worker: with more of them, ranks share cores and the server's bandwidth."""


def measure(workers: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every commit by kind; the launches of us and of the peers take turns."""
    times = defaultdict(list)
    pause = ["--pause", str(options.pause)]
    for _ in range(options.repeats):
        ranks = ["commit_ranks.py", "--commits", str(options.commits), "--blocks", "2", *pause]
        done = last_json(mpirun(workers + 1, [sys.executable, HERE / ranks[0], *ranks[1:]]))
        record = done["seconds"]
        # A commit over RPC takes long enough that fewer of them give as good a median.
        rpc = ["--workers", str(workers), "--commits", str(max(2, options.commits // 4)), *pause]
        # torch warns of its own use of deprecated functions.
        record |= last_json(run([sys.executable, "-W", "ignore", HERE / "commit_rpc.py", *rpc]))
        for name, values in record.items():
            times[name] += values
    return times


def rows(workers: int, times: dict[str, list[float]]) -> list[list[str]]:
    """The table's rows for one number of workers."""
    median = {name: statistics.median(values) for name, values in times.items()}
    bare, rpc = median["hdb"] / median["bare"], median["rpc"] / median["hdb"]
    bsp = median["hdb_bsp"] / median["bare_bsp"]
    verdicts = (BARE.verdict(bare), RPC.verdict(rpc)) if workers == 1 else ("", "")
    entries = [
        ("commit", "bare MPI", "hdb", "bare", f"{bare:.2f}x its time", verdicts[0]),
        ("commit", "torch RPC", "hdb", "rpc", f"{rpc:.1f}x faster", verdicts[1]),
        ("BSP round", "bare Reduce + Bcast", "hdb_bsp", "bare_bsp", f"{bsp:.2f}x its time", ""),
    ]
    return [
        [str(workers), what, peer, milliseconds(times[ours]), milliseconds(times[theirs]), *rest]
        for what, peer, ours, theirs, *rest in entries
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="to measure with")
    parser.add_argument("--commits", type=int, default=20, help="of each worker in a block")
    parser.add_argument("--repeats", type=int, default=3, help="launches of everything")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between commits")
    options = parser.parse_args()
    sheet = Sheet("commit")
    head = ["workers", "what", "peer", "hpc-hdb", "peer's", "ratio", ""]
    table = [row for workers in options.workers for row in rows(workers, measure(workers, options))]
    sheet.table(head, table)
    sheet.line("Medians over all commits, with their middle half in brackets.")
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
