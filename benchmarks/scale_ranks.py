"""Helper of scale.py, run by mpirun: seconds of a round, in each mode with each number of ranks.

The last line printed holds them, and the bytes of the model.
"""

from __future__ import annotations

import argparse
import json
import statistics

from hpc_hdb.cluster.mpi import world
from hpc_hdb.config_files import load_settings
from hpc_hdb.run.network_profile import model_floats, settle_rank
from hpc_hdb.run.timed_rounds import time_rounds

ROUNDS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="whose model is committed")
    parser.add_argument("pauses", type=float, nargs="+", help="seconds between commits")
    parser.add_argument("--ranks", type=int, nargs="+", required=True, help="server included")
    parser.add_argument("--modes", nargs="+", required=True, help="of asp, ssp and bsp")
    options = parser.parse_args()
    comm = world()
    settings = load_settings(options.config)
    size, threads = model_floats(comm, settings), settle_rank(comm, settings)
    rounds = []
    for pause in options.pauses:
        for ranks in options.ranks:
            for sync in options.modes:
                times = time_rounds(comm, ranks - 1, size, sync, ROUNDS, pause, threads)
                if times:
                    rounds.append((sync, ranks - 1, pause, statistics.median(times)))
    if comm.rank == 0:
        print(json.dumps({"model_bytes": 4 * size, "rounds": rounds}))
    comm.Free()


if __name__ == "__main__":
    main()
