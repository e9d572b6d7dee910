"""The pause when the resolution changes: the cyclic loader beside tearing down and rebuilding.

A training step is a sleep of --step seconds, as while a GPU works: long enough that decoding keeps
up. The wait for a batch at a change is compared with the usual wait within a cycle; what is beyond
it may be one batch's time at most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from common import Bar, Sheet, add_device, arguments, image_folder

from dali_pipelines.augmentation import Augmentation
from dali_pipelines.cyclic import Cycle, CyclicLoader
from hpc_hdb.train.data import ImageFiles, scan_folder

BAR = Bar(1.0, most=True)


def cycled(data: ImageFiles, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """One loader through all cycles."""
    return batches_of(data, cycles_of(options), options)


def rebuilt(data: ImageFiles, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """A loader a cycle, built when the one before it has ended."""
    for cycle in cycles_of(options):
        yield from batches_of(data, [cycle], options)


def batches_of(
    data: ImageFiles, cycles: list[Cycle], options: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """The images of a loader's batches."""
    loader = CyclicLoader(
        data,
        cycles,
        (0, options.images),
        augmentation=Augmentation(),
        threads=options.threads,
        device=options.device,
    )
    for _, _, images, _ in loader.batches(cycles[0].start_epoch):
        yield images


def cycles_of(options: argparse.Namespace) -> list[Cycle]:
    """One epoch at each resolution, over and over."""
    sides = options.resolutions * options.rounds
    return [Cycle(epoch, epoch + 1, side, options.batch) for epoch, side in enumerate(sides)]


def waits(batches: Iterator[torch.Tensor], step: float) -> tuple[list[float], list[float]]:
    """Seconds waited for each batch, at changes of resolution and within cycles."""
    at_changes, within = [], []
    last = 0
    while True:
        start = time.perf_counter()
        images = next(batches, None)
        if images is None:
            return at_changes, within
        waited = time.perf_counter() - start
        if last:  # the first batch of all has nothing before it
            (within if images.shape[-1] == last else at_changes).append(waited)
        last = images.shape[-1]
        time.sleep(step)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=image_folder, default="data/imagenette", help="has train/")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[96, 160, 224])
    parser.add_argument("--images", type=int, default=1000, help="of an epoch")
    parser.add_argument("--batch", type=int, default=50, help="images in a batch")
    parser.add_argument("--threads", type=int, default=2, help="that decode")
    add_device(parser)
    parser.add_argument("--step", type=float, default=0.06, help="seconds of a training step")
    parser.add_argument("--rounds", type=int, default=3, help="times through the resolutions")
    options = parser.parse_args()
    sheet = Sheet("resolution_switch")
    data = scan_folder(options.data / "train")
    rows = []
    for name, start in (("cyclic loader", cycled), ("torn down and rebuilt", rebuilt)):
        at_changes, within = waits(start(data, options), options.step)
        usual = statistics.median(within)
        beyond = max(at_changes) - usual
        ratio = beyond / (options.step + usual)
        rows.append(
            [
                name,
                f"{usual * 1e3:.1f} ms",
                f"{statistics.median(at_changes) * 1e3:.1f} ms",
                f"{max(at_changes) * 1e3:.1f} ms",
                f"{ratio:.2f} steps",
                BAR.verdict(ratio) if start is cycled else "",
            ]
        )
    head = ["wait for a batch", "usual", "at a change", "longest", "longest beyond usual", ""]
    sheet.table(head, rows)
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
