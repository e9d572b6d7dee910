"""Epoch times that the model ``t(b) = a*b + c`` predicts, beside real epochs.

An epoch with the large batch of the dual-batch plan, a profile as `hdb profile` makes it, and an
epoch with the small batch, at each resolution, many times in turn: each prediction is compared with
the epoch beside it, since even an idle machine is faster one minute than the next. Peer: the naive
model without the intercept, time in proportion to images, taken from the largest batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field

from common import Bar, Sheet, arguments

from hpc_hdb.cluster.messages import Order, OrderKind
from hpc_hdb.config import Settings
from hpc_hdb.config_files import parse_settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import plan_dual_batch
from hpc_hdb.plan.cuts import split_evenly
from hpc_hdb.run.build import choose_place, make_trainer
from hpc_hdb.train.data import open_data
from hpc_hdb.train.profile import profile_resolution
from hpc_hdb.train.trainer import Trainer

BAR = Bar(0.05, most=True, percent=True)


@dataclass
class Epochs:
    """Seconds of an epoch at one resolution and batch size, one of each a repeat."""

    measured: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    naive: list[float] = field(default_factory=list)

    def error(self, predicted: list[float]) -> float:
        """Relative distance of the predictions from what was measured beside them, the median."""
        pairs = zip(predicted, self.measured, strict=True)
        return statistics.median(guess / real - 1 for guess, real in pairs)


def settings_of(options: argparse.Namespace) -> Settings:
    """Synthetic images in memory, of the model and resolutions asked for."""
    values = {
        "data": {
            "source": "synthetic",
            "synthetic_samples": options.samples,
            "synthetic_side": max(options.resolutions),
        },
        "model": {"name": options.model},
        "schedule": {
            "learning_rate": 0.01,
            "resolutions": options.resolutions,
            "dropout": [0.0] * len(options.resolutions),
            "epochs": len(options.resolutions),
        },
    }
    return parse_settings(values, "benchmark")


def epoch_seconds(trainer: Trainer, samples: int, batch: int, resolution: int) -> float:
    """Train two whole epochs; the seconds of the second, loading included.

    All epochs of a stage but its first follow one of the same batch. The first steps at another
    size are slower, and an epoch here is short.
    """
    order = Order(
        OrderKind.TRAIN, end=samples, resolution=resolution, batch=batch, learning_rate=0.01
    )
    for _ in range(2):
        report = trainer.train_round(order, lambda: False, lambda report: None)
        if report is None:
            raise RuntimeError("the round was given up")
    return report.train_seconds + report.data_seconds


def plan_batches(options: argparse.Namespace, trainer: Trainer, side: int) -> tuple[int, int]:
    """Large and small batch at a resolution, by a first profile."""
    timing = profile_resolution(trainer, side, options.large_batch)
    plan = plan_dual_batch(
        timing.fit.line,
        timing.large_batch,
        options.samples,
        options.workers,
        options.small_workers,
        options.time_ratio,
    )
    return timing.large_batch, plan.small_batch


def measure(options: argparse.Namespace, trainer: Trainer) -> dict[tuple[int, int], Epochs]:
    """Epochs by resolution and batch size."""
    results: dict[tuple[int, int], Epochs] = defaultdict(Epochs)
    batches = {side: plan_batches(options, trainer, side) for side in options.resolutions}
    for _ in range(options.repeats):
        for side, sizes in batches.items():
            # On both sides of the profile, so that a drift of the machine's speed cancels out.
            before = [epoch_seconds(trainer, options.samples, batch, side) for batch in sizes]
            timing = profile_resolution(trainer, side, sizes[0])
            after = [epoch_seconds(trainer, options.samples, batch, side) for batch in sizes]
            for batch, *seconds in zip(sizes, before, after, strict=True):
                steps = len(split_evenly(options.samples, batch))
                epochs = results[side, batch]
                epochs.measured.append(statistics.mean(seconds))
                epochs.predicted.append(timing.fit.line.of_steps(options.samples, steps))
                epochs.naive.append(timing.points[-1][1] / sizes[0] * options.samples)
    return results


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="resnet8", help="to train")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[24, 32], help="of images")
    parser.add_argument("--large-batch", type=int, default=256, help="largest batch to try")
    parser.add_argument("--samples", type=int, default=2048, help="images of an epoch")
    parser.add_argument("--workers", type=int, default=4, help="of the plan")
    parser.add_argument("--small-workers", type=int, default=2, help="of the plan")
    parser.add_argument("--time-ratio", type=float, default=1.05, help="k of the plan")
    parser.add_argument("--repeats", type=int, default=11, help="profiles, and epochs of each kind")
    options = parser.parse_args()
    sheet = Sheet("batch_time")
    settings = settings_of(options)
    place = choose_place(settings)
    place.settle()
    trainer = make_trainer(settings, open_data(settings.data, "train"), place.device)
    try:
        results = measure(options, trainer)
    except UserError as error:
        sys.exit(f"no time model: {error}")
    rows = []
    for (side, batch), epochs in results.items():
        error = epochs.error(epochs.predicted)
        rows.append(
            [
                f"{side}x{side}, batches of {batch}",
                f"{statistics.median(epochs.measured):.2f} s",
                f"{statistics.median(epochs.predicted):.2f} s ({error:+.1%})",
                f"{statistics.median(epochs.naive):.2f} s ({epochs.error(epochs.naive):+.1%})",
                BAR.verdict(abs(error)),
            ]
        )
    head = [f"{options.model}, epoch", "measured", "predicted: a*b + c", "naive: in proportion", ""]
    sheet.table(head, rows)
    sheet.line(
        f"Medians of {options.repeats} repeats, {options.samples} images an epoch; the errors are "
        "medians of those of neighbours."
    )
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
