"""What it costs to go on without workers that die: while none dies, and when one does.

A commit of ResNet-18 (ASP), and a round of BSP, in a job with fault mitigation beside the same in
a job without. Then a worker of a run is killed with SIGKILL: the seconds until it is noticed and
until the next commit of another worker, beside the time of a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from common import HERE, Bar, Sheet, arguments, hdb, last_json, milliseconds, mpirun

WITHOUT_FAULTS = Bar(1.02, most=True)
LOSS = Bar(1.0, most=True)
TOLERANT = ("--with-ft", "ulfm")


def measure_commits(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every commit, by kind and by whether the job tolerates faults; in turn."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        for tolerant in (False, True):
            words = [sys.executable, HERE / "commit_ranks.py", "--commits", str(options.commits)]
            output = mpirun(
                options.workers + 1, [*words, "--blocks", "2"], options=TOLERANT * tolerant
            )
            for kind, seconds in last_json(output)["seconds"].items():
                times[f"{kind} {tolerant}"] += seconds
    return times


def kill_a_worker(sync: str, workers: int) -> tuple[float, float, float]:
    """Kill the last worker of a run.

    Returns
    -------
    noticed, committed, round : float
        Seconds from the kill to the log's note of it, to the next commit of another worker, and
        of a round of those that are left, the median.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = [
            *("data.source=synthetic", "data.synthetic_side=32", "schedule.resolutions=[32]"),
            *("schedule.dropout=[0.0]", "schedule.large_batch=[32]", "schedule.milestones=[]"),
            *("schedule.epochs=4", "server.commits_per_epoch=4", "model.name=resnet8"),
            *("plan.timing={32=[2e-3,5e-3]}", f"server.sync={sync}", f"run.output={run}"),
        ]
        words = [hdb(), "train", "digits", *(w for s in sets for w in ("--set", s))]
        environment = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"} | os.environ
        job = subprocess.Popen(
            ["mpirun", *TOLERANT, "-n", str(workers + 1), *words],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        seen: dict[str, float] = {}
        committed: dict[int, list[float]] = defaultdict(list)
        killed, position = 0.0, 0
        while job.poll() is None:
            time.sleep(0.0005)
            log = run / "events.jsonl"
            if not log.exists():
                continue
            with log.open() as file:
                file.seek(position)
                lines = file.readlines()
                position = file.tell()
            for line in lines:
                event = json.loads(line)
                if event["event"] == "lost":
                    seen.setdefault("lost", time.perf_counter())
                elif event["event"] == "commit" and event["worker"] != workers:
                    committed[event["worker"]].append(time.perf_counter())
                    if killed and event["worker"] != workers:
                        seen.setdefault("commit", time.perf_counter())
            if not killed and committed and min(map(len, committed.values())) >= 3:
                os.kill(rank_process(job.pid, workers), signal.SIGKILL)
                killed = time.perf_counter()
        if job.returncode:
            sys.exit(f"the run did not survive: status {job.returncode}")
    rounds = [b - a for own in committed.values() for a, b in itertools.pairwise(own)]
    return seen["lost"] - killed, seen["commit"] - killed, statistics.median(rounds)


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank that this launcher has started."""
    mark = f"OMPI_COMM_WORLD_RANK={rank}".encode()
    for file in Path(f"/proc/{launcher}/task").glob("*/children"):
        for child in file.read_text().split():
            if mark in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise LookupError(f"no rank {rank}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=2, help="in both parts")
    parser.add_argument("--commits", type=int, default=20, help="of each worker in a block")
    parser.add_argument(
        "--modes", nargs="+", default=["asp", "ssp", "bsp"], help="that a worker is killed in"
    )
    parser.add_argument("--repeats", type=int, default=5, help="launches of everything")
    options = parser.parse_args()
    sheet = Sheet("fault_tolerance")
    times = measure_commits(options)
    rows = []
    for name, kind in (("commit", "hdb"), ("BSP round", "hdb_bsp")):
        own, peer = times[f"{kind} True"], times[f"{kind} False"]
        ratio = statistics.median(own) / statistics.median(peer)
        verdict = WITHOUT_FAULTS.verdict(ratio)
        rows.append(
            [name, milliseconds(own), milliseconds(peer), WITHOUT_FAULTS.show(ratio), verdict]
        )
    sheet.table(["nothing fails", "with fault mitigation", "without", "ratio", ""], rows)
    rows = []
    for sync in options.modes:
        losses = [kill_a_worker(sync, options.workers) for _ in range(options.repeats)]
        noticed, commit, of_round = (statistics.median(c) for c in zip(*losses, strict=True))
        cells = [f"{1000 * seconds:.0f} ms" for seconds in (noticed, commit, of_round)]
        rows.append([sync, *cells, LOSS.show(commit / of_round), LOSS.verdict(commit / of_round)])
    head = ["a worker is killed", "noticed after", "next commit after", "a round", "ratio", ""]
    sheet.table(head, rows)
    sheet.line(
        f"{options.workers} workers; medians, of commits with their middle half in brackets."
    )
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
