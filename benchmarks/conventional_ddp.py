"""Helper of conventional.py, run by torchrun: an epoch of DistributedDataParallel over gloo.

The last line that rank 0 prints holds the seconds of each epoch but the first.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dali_pipelines.augmentation import Augmentation
from hpc_hdb.config_files import parse_settings
from hpc_hdb.train.data import open_data
from hpc_hdb.train.loader import TorchLoader
from hpc_hdb.train.model import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="of each rank")
    parser.add_argument("--epochs", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    settings = parse_settings(
        {
            "data": {
                "source": "synthetic",
                "synthetic_samples": options.samples,
                "synthetic_side": 32,
            },
            "model": {"name": options.model},
        },
        "benchmark",
    )
    data = open_data(settings.data, "train")
    torch.manual_seed(0)
    model = build_model(settings.model, len(data.classes)).to(memory_format=torch.channels_last)
    model = DistributedDataParallel(model)
    loader = TorchLoader(data, 0, Augmentation())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    seconds = []
    for epoch in range(options.epochs):
        own = np.random.default_rng(epoch).permutation(options.samples)[rank::ranks]
        sizes = [len(part) for part in np.split(own, range(options.batch, len(own), options.batch))]
        distributed.barrier()
        start = time.perf_counter()
        for images, labels in loader.batches(own, sizes, 32, epoch):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        distributed.barrier()
        seconds.append(time.perf_counter() - start)
    distributed.destroy_process_group()
    if rank == 0:
        print(json.dumps({"seconds": seconds[1:]}))


if __name__ == "__main__":
    main()
