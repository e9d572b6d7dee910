"""Helper of commit.py: the commits of the peer, a server over torch.distributed.rpc.

As in the authors' programs the model travels as a list of arrays, pickled, and is merged array
by array in Python under a lock. The last line printed holds the seconds of each commit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import multiprocessing
from torch.distributed import rpc
from torchvision.models import resnet18

WARM_UP = 2


class Server:
    """The global model and its merges."""

    model: ClassVar[list[np.ndarray]] = []
    lock: ClassVar = threading.Lock()

    @classmethod
    def pull(cls) -> list[np.ndarray]:
        with cls.lock:
            return list(cls.model)  # a push replaces arrays, it does not change them

    @classmethod
    def push(cls, arrays: list[np.ndarray], factor: float) -> None:
        with cls.lock:
            for number, array in enumerate(arrays):
                cls.model[number] = (cls.model[number] + factor * array) / (1 + factor)


def arrays_of_model() -> list[np.ndarray]:
    """Parameters and floating-point buffers of ResNet-18, one array each."""
    state = resnet18().state_dict().values()
    return [value.numpy() for value in state if value.is_floating_point()]


def rank_main(rank: int, ranks: int, commits: int, pause: float, folder: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/meeting")
    if rank == 0:
        Server.model = arrays_of_model()
    rpc.init_rpc(f"rank{rank}", rank=rank, world_size=ranks, rpc_backend_options=options)
    if rank:
        torch.set_num_threads(1)
        model = rpc.rpc_sync("rank0", Server.pull)
        times = []
        for _ in range(commits + WARM_UP):
            time.sleep(pause)
            start = time.perf_counter()
            rpc.rpc_sync("rank0", Server.push, args=(model, 1.0))
            model = rpc.rpc_sync("rank0", Server.pull)
            times.append(time.perf_counter() - start)
        Path(folder, f"{rank}.json").write_text(json.dumps(times[WARM_UP:]))
    rpc.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--commits", type=int, required=True, help="per worker")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each commit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranks = options.workers + 1
        multiprocessing.spawn(
            rank_main, (ranks, options.commits, options.pause, folder), nprocs=ranks
        )
        times = []
        for rank in range(1, ranks):
            times += json.loads(Path(folder, f"{rank}.json").read_text())
    print(json.dumps({"rpc": times}))


if __name__ == "__main__":
    main()
