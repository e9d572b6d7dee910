"""The loaders that hpc-hdb's is compared with, each as its own documentation has it."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dali_pipelines.augmentation import MEAN, STD

ROTATION, ZOOM, CROP_AREA = 18.0, 0.25, 0.08


def bare_dali(folder: Path, resolution: int, options: argparse.Namespace) -> Iterator[object]:
    """DALI's own file reader and the same operators, without anything of ours."""

    device_id, device = (0, "mixed") if options.device == "cuda" else (None, "cpu")

    @pipeline_def(batch_size=options.batch, num_threads=options.cores, device_id=device_id)
    def pipeline() -> tuple:
        files, labels = fn.readers.file(file_root=str(folder), random_shuffle=True)
        if options.augment == "crop":
            images = fn.decoders.image_random_crop(
                files, device=device, output_type=types.RGB, random_area=[CROP_AREA, 1]
            )
            images = fn.resize(images, size=(resolution, resolution))
        else:
            images = fn.decoders.image(files, device=device, output_type=types.RGB)
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


def write_beton(folder: Path, file: Path, processes: int) -> None:
    """An image folder as FFCV's file of JPEG images."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    writer = DatasetWriter(str(file), fields, num_workers=processes)
    writer.from_indexed_dataset(ImageFolder(str(folder)))


def ffcv_loader(file: Path, resolution: int, options: argparse.Namespace) -> Iterator[object]:
    """FFCV's loader with random resized crops and flips, or centre crops and flips."""
    from ffcv.fields import decoders
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    shape = (resolution, resolution)
    if options.augment == "crop":
        decoder = decoders.RandomResizedCropRGBImageDecoder(shape, scale=(CROP_AREA, 1))
    else:
        decoder = decoders.CenterCropRGBImageDecoder(shape, ratio=1)
    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)
    normalise = NormalizeImage(mean, std, np.float32)
    steps = [decoder, RandomHorizontalFlip(), normalise, ToTensor(), ToTorchImage(False)]
    loader = Loader(
        str(file),
        batch_size=options.batch,
        num_workers=options.cores,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={"image": steps, "label": [decoders.IntDecoder(), ToTensor()]},
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))
