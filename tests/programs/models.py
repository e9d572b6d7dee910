"""Models of a user's own, as ``model.name = "models:..."`` where this is the current folder."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """A convolution with batch normalisation and a classifier: milliseconds a batch."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12 * 16, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.conv(images)).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(maps, 4).flatten(1))


class Watched(Tiny):
    """Writes what each training step is given to ``$WATCH/RANK``.

    Rank $SLOW takes $SLOW_SECONDS more, in a Slurm job only in its first $SLOW_LIVES lives; a batch
    that is evaluated $SLOW_EVALUATION more.
    """

    def forward(self, images: Tensor) -> Tensor:
        rank = os.environ.get("OMPI_COMM_WORLD_RANK", "")
        if self.training and "WATCH" in os.environ:
            dropout = [module.p for module in self.modules() if isinstance(module, nn.Dropout)]
            cores = sorted(os.sched_getaffinity(0))
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            line = {"shape": list(images.shape), "dropout": dropout, "cores": cores, "gpus": gpus}
            with (Path(os.environ["WATCH"]) / rank).open("a") as file:
                file.write(json.dumps(line) + "\n")
        lives = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
        hurried = lives > int(os.environ.get("SLOW_LIVES", lives))
        if self.training and rank and rank == os.environ.get("SLOW") and not hurried:
            time.sleep(float(os.environ.get("SLOW_SECONDS", "0.03")))
        if not self.training and len(images) > 2:
            time.sleep(float(os.environ.get("SLOW_EVALUATION", "0")))
        return super().forward(images)


class Heavy(Watched):
    """With parameters that nothing uses: to write it down takes longer than to train it."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.ballast = nn.Parameter(torch.zeros(2_000_000))


class Recorded(Tiny):
    """Appends its parameters, as each training step finds them, to ``$WATCH/RANK``."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and "WATCH" in os.environ:
            rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"]
            values = torch.cat([value.detach().flatten() for value in self.parameters()])
            with (Path(os.environ["WATCH"]) / rank).open("ab") as file:
                file.write(values.numpy().tobytes())
        return super().forward(images)


def tiny(num_classes: int) -> nn.Module:
    return Tiny(num_classes)


def heavy(num_classes: int) -> nn.Module:
    return Heavy(num_classes)


def watched(num_classes: int) -> nn.Module:
    return Watched(num_classes)


def recorded(num_classes: int) -> nn.Module:
    return Recorded(num_classes)
