"""Images per second: the cyclic loader beside a bare DALI pipeline and torchvision's DataLoader.

All give batches of the same form (cropped at random, flipped, normalised, float32) from the same
photographs, on the same cores. The cyclic loader reads packed shards with smaller copies, as
'hdb pack FOLDER OUT --side 96 ...' writes them, and the originals: each crop comes from the
smallest copy that has its pixels. Bare DALI and torchvision read the files. The loaders take turns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import Bar, Sheet, arguments, image_folder, run
from nvidia.dali import fn, pipeline_def, types
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dali_pipelines.augmentation import Augmentation
from dali_pipelines.classification import MEAN, STD
from dali_pipelines.cyclic import Cycle, CyclicLoader
from dali_pipelines.shards import Shards

OF_DALI = Bar(0.95, most=False, percent=True)
OF_TORCHVISION = Bar(2.5, most=False)
ROTATION, ZOOM, CROP_AREA = 18.0, 0.25, 0.08
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
    )
    return loader.batches()


def bare_dali(folder: Path, resolution: int, options: argparse.Namespace) -> Iterator[object]:
    """DALI's own file reader and the same operators, without anything of ours."""

    @pipeline_def(batch_size=options.batch, num_threads=options.cores, device_id=None)
    def pipeline() -> tuple:
        files, labels = fn.readers.file(file_root=str(folder), random_shuffle=True)
        if options.augment == "crop":
            images = fn.decoders.image_random_crop(
                files, output_type=types.RGB, random_area=[CROP_AREA, 1]
            )
            images = fn.resize(images, size=(resolution, resolution))
        else:
            images = fn.decoders.image(files, output_type=types.RGB)
            images = fn.resize(images, resize_shorter=resolution)
        mirror = fn.random.coin_flip()
        if options.augment == "warp":
            angle = fn.random.uniform(range=(-ROTATION, ROTATION))
            scale = fn.random.uniform(range=(1 - ZOOM, 1 + ZOOM))
            centre = (resolution / 2, resolution / 2)
            matrix = fn.transforms.rotation(angle=angle, center=centre)
            matrix = fn.transforms.scale(matrix, scale=fn.stack(scale, scale), center=centre)
            images = fn.crop(images, crop=(resolution, resolution))
            images = fn.warp_affine(images, matrix=matrix, dtype=types.FLOAT)
        return fn.crop_mirror_normalize(
            images,
            crop=(resolution, resolution),
            mirror=mirror,
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT,
        ), labels

    built = pipeline()
    built.build()
    while True:
        images, labels = built.run()
        yield torch.from_dlpack(images.as_tensor()), labels


def torchvision_loader(
    folder: Path, resolution: int, options: argparse.Namespace
) -> Iterator[object]:
    """torchvision's v2 transforms in a DataLoader with one process a core."""
    spatial: list[v2.Transform] = [v2.Resize(resolution), v2.CenterCrop(resolution)]
    if options.augment == "crop":
        spatial = [v2.RandomResizedCrop(resolution, scale=(CROP_AREA, 1))]
    spatial.append(v2.RandomHorizontalFlip())
    if options.augment == "warp":
        spatial.append(
            v2.RandomAffine(
                ROTATION,
                scale=(1 - ZOOM, 1 + ZOOM),
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    loader = DataLoader(
        ImageFolder(str(folder), v2.Compose([*spatial, *tensor])),
        options.batch,
        shuffle=True,
        num_workers=options.cores,
        persistent_workers=True,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=image_folder, default="data/imagenette", help="has train/")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[96, 128, 160, 224])
    parser.add_argument("--batch", type=int, default=50, help="images in a batch")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--augment", choices=["crop", "flip", "warp"], default="crop")
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 128, 160, 192], help="packed")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each loader")
    options = parser.parse_args()
    sheet = Sheet("loader")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        sides = [word for side in options.sides for word in ("--side", str(side))]
        hdb = Path(sys.executable).with_name("hdb")
        run([hdb, "pack", options.data, Path(scratch) / "packed", *sides])
        packed, files = Path(scratch) / "packed" / "train", options.data / "train"
        for resolution in options.resolutions:
            starts: dict[str, Start] = {
                "ours": lambda r=resolution: cyclic(packed, r, options),
                "dali": lambda r=resolution: bare_dali(files, r, options),
                "torchvision": lambda r=resolution: torchvision_loader(files, r, options),
            }
            rates: dict[str, list[float]] = {name: [] for name in starts}
            for _ in range(options.repeats):
                for name, start in starts.items():
                    rates[name].append(rate(start(), options))
            ours, dali, torchvision = (statistics.median(found) for found in rates.values())
            of_dali, of_torchvision = ours / dali, ours / torchvision
            rows.append(
                [
                    f"{resolution}x{resolution}",
                    *(f"{value:.0f}" for value in (ours, dali, torchvision)),
                    f"{OF_DALI.show(of_dali)} {OF_DALI.verdict(of_dali)}",
                    f"{OF_TORCHVISION.show(of_torchvision)} "
                    f"{OF_TORCHVISION.verdict(of_torchvision)}",
                ]
            )
    head = ["images/s", "hpc-hdb", "bare DALI", "torchvision", "of bare DALI", "of torchvision"]
    sheet.table(head, rows)
    sheet.line(f"{options.cores} cores, batches of {options.batch}; medians of turns.")
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
