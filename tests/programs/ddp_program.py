"""What a user of PyTorch writes: DistributedDataParallel over gloo, under torchrun.

Trains `models.recorded` on the batches of a run folder's plan and settings, and leaves each
rank's state_dict in ``$WATCH/RANK.pt``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import models
import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hpc_hdb.config_files import read_settings
from hpc_hdb.train.data import open_data

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (
    (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
))  # fmt: skip


def main() -> None:
    run = Path(sys.argv[1])
    settings = read_settings(run / "config.toml")
    rates = settings.schedule.rates()
    stages = json.loads((run / "plan.json").read_text())["stages"]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    data = open_data(settings.data, "train")
    torch.manual_seed(settings.run.seed)
    model = DistributedDataParallel(models.recorded(len(data.classes)), broadcast_buffers=False)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=settings.train.weight_decay
    )
    for stage in stages:
        optimizer.param_groups[0]["lr"] = rates.of_stage(stage["start_epoch"])
        own = stage["large_batch"] // ranks
        for epoch in range(stage["start_epoch"], stage["end_epoch"]):
            order = np.random.default_rng([settings.run.seed, epoch]).permutation(len(data.labels))
            for begin in range(0, len(order), own * ranks):
                chosen = order[begin + rank * own : begin + (rank + 1) * own]
                images = (data.load(chosen, stage["resolution"])[0].float() - MEAN) / STD
                optimizer.zero_grad()
                labels = torch.from_numpy(data.labels[chosen])
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
    torch.save(model.module.state_dict(), Path(os.environ["WATCH"]) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
