"""Predicted and measured rounds of a parameter server with 1 to 7 workers.

`hdb profile --network` measures the constants with as many ranks as there are; the simulation of
`hdb simulate --timing-only` predicts a round from them. Measured are the same rounds of the real
server over MPI, whose workers sleep instead of training. Both alternate, so that a disturbance of
the machine falls on either; the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from common import HERE, Bar, Sheet, arguments, last_json, mpirun

from hpc_hdb.cluster.timing import time_commits
from hpc_hdb.config_files import load_settings
from hpc_hdb.plan.network import Network
from hpc_hdb.plan.topology import Topology
from hpc_hdb.run.network import find_network

APART = Bar(1.2, most=True)

Case = tuple[str, int, float]
"""Mode, workers, seconds that a worker sleeps between commits."""


def profile(options: argparse.Namespace) -> Network:
    """What ``hdb profile --network`` measures now."""
    hdb = Path(sys.executable).with_name("hdb")
    with tempfile.TemporaryDirectory() as folder:
        timing = Path(folder) / "timing.json"
        mpirun(
            max(options.ranks), [hdb, "profile", options.config, "--network", "--output", timing]
        )
        path = timing.with_name("network.json")
        return find_network(load_settings(options.config, [f"plan.network={path}"]))[0]


def measure(options: argparse.Namespace) -> tuple[int, dict[Case, float]]:
    """Bytes of the model, and seconds of a round."""
    words = [options.config, *map(str, options.pauses), "--ranks", *map(str, options.ranks)]
    words += ["--modes", *options.modes]
    record = last_json(
        mpirun(max(options.ranks), [sys.executable, HERE / "scale_ranks.py", *words])
    )
    rounds = {(sync, workers, pause): time for sync, workers, pause, time in record["rounds"]}
    return record["model_bytes"], rounds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", default="cifar10", help="whose model is committed")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 3, 5, 8], help="server included"
    )
    parser.add_argument(
        "--pauses", type=float, nargs="+", default=[0.0, 0.05], help="seconds between commits"
    )
    parser.add_argument("--modes", nargs="+", default=["asp", "bsp"], help="of asp, ssp and bsp")
    parser.add_argument("--repeats", type=int, default=5, help="of profile and measurement")
    options = parser.parse_args()
    sheet = Sheet("scale")
    measured, predicted = defaultdict(list), defaultdict(list)
    for _ in range(options.repeats):
        network = profile(options)
        model_bytes, rounds = measure(options)
        for case, seconds in rounds.items():
            sync, workers, pause = case
            timing = time_commits(
                network, Topology("star"), model_bytes, [pause] * workers, [0.0] * workers, sync
            )
            measured[case].append(seconds)
            predicted[case].append(timing.round_seconds)
    rows = []
    for case in measured:
        sync, workers, pause = case
        ours, theirs = statistics.median(predicted[case]), statistics.median(measured[case])
        ratio = ours / theirs
        rows.append(
            [
                str(workers + 1),
                sync.upper(),
                f"{pause * 1e3:g} ms",
                f"{theirs * 1e3:.1f} ms",
                f"{ours * 1e3:.1f} ms",
                f"{ratio:.2f}x",
                APART.verdict(max(ratio, 1 / ratio)),
            ]
        )
    sheet.table(["ranks", "mode", "training", "measured", "predicted", "ratio", ""], rows)
    sheet.line(f"Rounds of a model of {model_bytes / 1e6:.1f} MB; medians of all repeats.")
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
