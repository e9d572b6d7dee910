"""Images per second of a worker's round beside a bare PyTorch loop.

Both train the same architecture on the same batches of the same loader with the same optimizer;
the bare loop keeps no account of loss or accuracy. Rounds take turns in one process.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from common import Bar, Sheet, arguments
from torch import nn
from torch.nn import functional

from dali_pipelines.augmentation import Augmentation
from hpc_hdb.cluster.messages import Order, OrderKind
from hpc_hdb.config import Settings
from hpc_hdb.config_files import parse_settings
from hpc_hdb.plan.cuts import split_evenly
from hpc_hdb.run.build import choose_place, make_trainer
from hpc_hdb.train.data import ImageSet, open_data
from hpc_hdb.train.loader import TorchLoader
from hpc_hdb.train.model import build_model

BAR = Bar(0.97, most=False, percent=True)
CASES = {"resnet8": (32, 32, 16), "resnet18": (32, 32, 4)}
"""Batch size, resolution and batches of a round by model; a round takes about a second."""


class BareLoop:
    """What a user would write without hpc-hdb."""

    def __init__(self, settings: Settings, data: ImageSet, device: torch.device) -> None:
        torch.manual_seed(settings.run.seed)
        self.model: nn.Module = build_model(settings.model, len(data.classes)).to(device)
        train = settings.train
        augmentation = Augmentation(train.flip, train.rotation, train.zoom, train.crop_area)
        self.loader = TorchLoader(data, settings.data.threads, augmentation, device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.schedule.learning_rate,
            momentum=settings.train.momentum,
            weight_decay=settings.train.weight_decay,
        )

    def round(self, samples: int, batch: int, resolution: int, seed: int) -> None:
        indices = np.random.default_rng(seed).permutation(samples)
        self.model.train()
        for images, labels in self.loader.batches(
            indices, split_evenly(samples, batch), resolution, seed
        ):
            self.optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()


def settings_of(model: str, resolution: int, samples: int) -> Settings:
    """Synthetic images in memory, so that neither side waits for a disk."""
    values = {
        "data": {
            "source": "synthetic",
            "synthetic_samples": samples,
            "synthetic_side": resolution,
        },
        "model": {"name": model},
        "schedule": {"learning_rate": 0.01, "large_batch": [1], "resolutions": [resolution]},
        # The bare loop trains in single precision; so must we, on a GPU too.
        "train": {"precision": "fp32"},
    }
    return parse_settings(values, "benchmark")


def compare(model: str, repeats: int) -> tuple[list[float], list[float]]:
    """Images per second of each round of the worker and of the bare loop."""
    batch, resolution, steps = CASES[model]
    samples = batch * steps
    settings = settings_of(model, resolution, samples)
    place = choose_place(settings)
    place.settle()
    data = open_data(settings.data, "train")
    trainer = make_trainer(settings, data, place.device)
    bare = BareLoop(settings, data, place.device)

    def worker_round(number: int) -> None:
        order = Order(
            OrderKind.TRAIN,
            epoch=number,
            end=samples,
            resolution=resolution,
            batch=batch,
            learning_rate=settings.schedule.learning_rate,
        )
        trainer.train_round(order, lambda: False, lambda report: None)

    rounds = (worker_round, lambda number: bare.round(samples, batch, resolution, number))
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 1):
        # Who comes first alternates too: a machine may slow down or speed up throughout.
        for side in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            rounds[side](number)
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                rates[side].append(samples / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="to train")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each side")
    options = parser.parse_args()
    sheet = Sheet("worker_overhead")
    rows = []
    for model in options.models:
        batch, resolution, _ = CASES[model]
        ours, bare = compare(model, options.repeats)
        # A pair of neighbouring rounds had the machine in much the same mood.
        ratio = statistics.median(mine / peer for mine, peer in zip(ours, bare, strict=True))
        rows.append(
            [
                f"{model}, {batch} images of {resolution}x{resolution}",
                f"{statistics.median(ours):.0f} images/s",
                f"{statistics.median(bare):.0f} images/s",
                BAR.show(ratio),
                BAR.verdict(ratio),
            ]
        )
    sheet.table(["model, batch", "hpc-hdb worker", "bare PyTorch", "ratio", ""], rows)
    sheet.line("Medians over rounds; the ratio is the median of those of neighbouring rounds.")
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
