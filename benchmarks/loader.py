"""Images per second: the cyclic loader beside a bare DALI pipeline and torchvision's DataLoader.

All give batches of the same form (cropped at random, flipped, normalised, float32) from the same
photographs, on the same cores. The cyclic loader reads packed shards with smaller copies, as
'hdb pack FOLDER OUT --side 96 ...' writes them, and the originals: each crop comes from the
smallest copy that has its pixels. Bare DALI and torchvision read the files. FFCV takes part where
it is installed, with its own file of the same photographs. The loaders take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import Bar, Sheet, add_device, arguments, hdb, image_folder, run
from loader_peers import (
    CROP_AREA,
    ROTATION,
    ZOOM,
    bare_dali,
    ffcv_loader,
    torchvision_loader,
    write_beton,
)

from dali_pipelines.augmentation import Augmentation
from dali_pipelines.cyclic import Cycle, CyclicLoader
from dali_pipelines.shards import Shards

BARS = {
    "bare DALI": Bar(0.95, most=False, percent=True),
    "torchvision": Bar(2.5, most=False),
}
WARM_UP = 5
"""Batches before the clock starts: pipelines and processes are built, queues filled."""

Start = Callable[[], Iterator[object]]


def cyclic(folder: Path, resolution: int, options: argparse.Namespace) -> Iterator[object]:
    """hpc-hdb's loader, on the packed photographs."""
    how = {
        "crop": Augmentation(True, 0, 0, CROP_AREA),
        "flip": Augmentation(True, 0, 0),
        "warp": Augmentation(True, ROTATION, ZOOM),
    }
    loader = CyclicLoader(
        Shards(folder),
        [Cycle(0, 10**6, resolution, options.batch)],
        augmentation=how[options.augment],
        threads=options.cores,
        device=options.device,
    )
    return loader.batches()


def rate(batches: Iterator[object], options: argparse.Namespace) -> float:
    """Images per second in the steady state."""
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < options.seconds:
        next(batches)
        count += options.batch
    return count / (time.perf_counter() - start)


def has_ffcv() -> bool:
    """Whether FFCV is installed; it wants OpenCV's and libjpeg-turbo's headers for that."""
    return importlib.util.find_spec("ffcv") is not None


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=image_folder, default="data/imagenette", help="has train/")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[96, 128, 160, 224])
    parser.add_argument("--batch", type=int, default=50, help="images in a batch")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    add_device(parser)
    parser.add_argument("--augment", choices=["crop", "flip", "warp"], default="crop")
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 128, 160, 192], help="packed")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each loader")
    options = parser.parse_args()
    sheet = Sheet("loader")
    torch.set_num_threads(1)
    peers = ["bare DALI", "torchvision", *(["FFCV"] if has_ffcv() else [])]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        packed, files, beton = Path(scratch) / "packed", options.data / "train", Path(scratch) / "f"
        sides = [word for side in options.sides for word in ("--side", str(side))]
        run([hdb(), "pack", options.data, packed, *sides])
        if "FFCV" in peers:
            write_beton(files, beton, options.cores)
        for resolution in options.resolutions:
            starts: dict[str, Start] = {
                "hpc-hdb": lambda r=resolution: cyclic(packed / "train", r, options),
                "bare DALI": lambda r=resolution: bare_dali(files, r, options),
                "torchvision": lambda r=resolution: torchvision_loader(files, r, options),
                "FFCV": lambda r=resolution: ffcv_loader(beton, r, options),
            }
            rates: dict[str, list[float]] = {name: [] for name in ("hpc-hdb", *peers)}
            for _ in range(options.repeats):
                for name, found in rates.items():
                    found.append(rate(starts[name](), options))
            middle = {name: statistics.median(found) for name, found in rates.items()}
            rows.append([f"{resolution}x{resolution}", f"{middle['hpc-hdb']:.0f}"])
            for name in peers:
                ratio = middle["hpc-hdb"] / middle[name]
                bar = BARS.get(name)
                shown = f"{bar.show(ratio)} {bar.verdict(ratio)}" if bar else f"{ratio:.2f}x"
                rows[-1] += [f"{middle[name]:.0f}", shown]
    head = ["images/s", "hpc-hdb"]
    for name in peers:
        head += [name, f"of {name}"]
    sheet.table(head, rows)
    sheet.line(
        f"{options.cores} cores, batches of {options.batch}, DALI on {options.device}; medians of "
        "turns."
    )
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
