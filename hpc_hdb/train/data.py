"""Data sets: labelled images in files or in memory, from which a loader takes batches."""

from __future__ import annotations

import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dali_pipelines.augmentation import crop_boxes, needed_sides
from dali_pipelines.shards import ShardError, Shards
from hpc_hdb.config import Data
from hpc_hdb.errors import BadImage, UserError
from hpc_hdb.train.decode import DecodeError, decode, fit
from hpc_hdb.train.folders import find_images

Split = Literal["train", "test"]

_DOWNLOAD_PATIENCE = 20
"""Seconds without a byte after which a download is given up."""


class EncodedImages(ABC):
    """Images decoded when they are needed.

    Attributes
    ----------
    classes : list of str
        Class names, sorted; a label is a position in it.
    labels : ndarray, shape (n,), int64
    verified : bool
        Whether all have been decoded before, so that no header claims absurd sizes.
    """

    classes: list[str]
    labels: np.ndarray
    verified = False
    encoded = True

    @abstractmethod
    def read(self, index: int, side: int) -> np.ndarray:
        """The encoded image, its shorter side of `side` pixels or more where it has: uint8.

        Raises
        ------
        BadImage
            If it cannot be read.
        """

    @abstractmethod
    def name(self, index: int, side: int) -> str:
        """Where what `read` gives is, for messages."""

    def load(
        self,
        indices: np.ndarray,
        resolution: int,
        crops: np.ndarray | None = None,
        skip: bool = False,
    ) -> tuple[Tensor, np.ndarray]:
        """Decode, resize the shorter side and crop the centre, or crop as drawn and resize.

        Parameters
        ----------
        indices : ndarray, shape (n,), int64
        resolution : int
            Side of the images given out, in pixels.
        crops : ndarray, shape (n, 4), optional
            Of `dali_pipelines.augmentation.Draws`.
        skip : bool
            Leave bad images out.

        Returns
        -------
        images : Tensor, shape (good.sum(), 3, resolution, resolution), uint8
        good : ndarray, shape (n,), bool
            Which images are not left out.

        Raises
        ------
        BadImage
            If a file is missing or no image; names the file.
        """
        images = np.empty((len(indices), resolution, resolution, 3), dtype=np.uint8)
        good = np.ones(len(indices), dtype=bool)
        sides = np.full(len(indices), resolution)
        if crops is not None:
            sides = needed_sides(crops, resolution)
        for place, (index, side) in enumerate(zip(indices.tolist(), sides.tolist(), strict=True)):
            try:
                picture = self._decoded(index, side)
            except BadImage:
                if not skip:
                    raise
                good[place] = False
            else:
                images[place] = fit(picture, resolution, None if crops is None else crops[place])
        return torch.from_numpy(images if good.all() else images[good]).permute(0, 3, 1, 2), good

    def _decoded(self, index: int, side: int) -> Image.Image:
        try:
            return decode(self.read(index, side).tobytes(), side)
        except DecodeError as error:
            raise self.bad_image(index, side, error) from None

    def bad_image(self, index: int, side: int, error: DecodeError) -> BadImage:
        """What to tell of an image that cannot be decoded."""
        where = self.name(index, side)
        return BadImage(f"cannot decode {where}: {error}; bring a good copy of it")


@dataclass
class ImageFiles(EncodedImages):
    """Images in a file each; attributes as in `hpc_hdb.train.folders.Found`."""

    classes: list[str]
    labels: np.ndarray
    paths: list[str]
    passed_over: str = ""

    def read(self, index: int, side: int) -> np.ndarray:
        path = self.paths[index]
        try:
            return np.fromfile(path, dtype=np.uint8)
        except FileNotFoundError:
            raise BadImage(
                f"image {path} has vanished since the run started: bring it back, then go on with "
                "hdb train --resume"
            ) from None
        except OSError as error:
            raise BadImage(f"cannot read {path}: {error.strerror}") from None

    def name(self, index: int, side: int) -> str:
        return self.paths[index]


class ImageShards(EncodedImages):
    """Images packed by ``hdb pack``.

    Parameters
    ----------
    folder : Path
        The packed split.

    Raises
    ------
    UserError
        If there is none.
    """

    verified = True

    def __init__(self, folder: Path) -> None:
        with _as_user_error():
            self._shards = Shards(folder)
        self.classes, self.labels = self._shards.classes, self._shards.labels

    def read(self, index: int, side: int) -> np.ndarray:
        with _as_user_error():
            return self._shards.read(index, side)

    def name(self, index: int, side: int) -> str:
        return self._shards.name(index, side)


@dataclass
class ImageArray:
    """Square images of one size in memory.

    Attributes
    ----------
    classes, labels
        As in `ImageFiles`.
    images : Tensor, shape (n, 3, side, side), uint8
    """

    classes: list[str]
    labels: np.ndarray
    images: Tensor
    verified = True
    encoded = False

    def read(self, index: int, side: int) -> np.ndarray:
        """An image, ndarray of shape (h, w, 3), uint8."""
        return self.images[index].permute(1, 2, 0).contiguous().numpy()

    def load(
        self,
        indices: np.ndarray,
        resolution: int,
        crops: np.ndarray | None = None,
        skip: bool = False,
    ) -> tuple[Tensor, np.ndarray]:
        """The images at `resolution`; as `EncodedImages.load`, with crops in float32."""
        images, good = self.images[torch.as_tensor(indices)], np.ones(len(indices), dtype=bool)
        side = images.shape[-1]
        if crops is not None:
            boxes = crop_boxes(crops, np.full((len(crops), 2), side))
            top, left, tall, wide = torch.from_numpy(boxes).T / side
            corners = torch.zeros(len(images), 2, 3)
            corners[:, 0, 0], corners[:, 0, 2] = wide, 2 * left + wide - 1
            corners[:, 1, 1], corners[:, 1, 2] = tall, 2 * top + tall - 1
            shape = [len(images), 3, resolution, resolution]
            grid = functional.affine_grid(corners, shape, align_corners=False)
            images = functional.grid_sample(
                images.float(), grid, padding_mode="border", align_corners=False
            )
        elif side != resolution:
            images = functional.interpolate(
                images, (resolution, resolution), mode="bilinear", antialias=True
            )
        return images, good


ImageSet = EncodedImages | ImageArray


@contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except ShardError as error:
        raise UserError(str(error)) from None


def prepare_data(settings: Data) -> None:
    """Write or download what `open_data` then reads; to be called by one rank of a job.

    Raises
    ------
    UserError
        If the files can be neither found nor made.
    """
    if settings.source == "digits":
        try:
            _write_digits(settings.path / "digits")
        except OSError as error:
            raise UserError(
                f"cannot write the digits below data.path = '{settings.path}' "
                f"({error.strerror}): set it to a folder with room where you may write"
            ) from None
    elif settings.source in ("cifar10", "cifar100"):
        _torchvision_cifar(settings, "train", download=True)


def open_data(settings: Data, split: Split) -> ImageSet:
    """Open a split of the data set.

    Raises
    ------
    UserError
        If it is missing, or has a class folder without images.
    """
    if settings.source == "digits":
        return scan_folder(settings.path / "digits" / split)
    if settings.source == "synthetic":
        return _synthetic(settings, split)
    if settings.source == "folder":
        return scan_folder(_split_folder(settings.path, split))
    if settings.source == "shards":
        return ImageShards(_split_folder(settings.path, split))
    return _torchvision_cifar(settings, split, download=False)


def count_images(settings: Data) -> int:
    """Training images; raises UserError as `open_data`."""
    if settings.source == "synthetic":  # which would be made to be counted
        return _synthetic_count(settings, "train")
    return len(open_data(settings, "train").labels)


def check_classes(train: Sequence[str], test: Sequence[str]) -> None:
    """Raise UserError where the held-out images are not of the classes that are trained."""
    problems = [
        f"{', '.join(sorted(missing)[:5])}{' ...' if len(missing) > 5 else ''} only {where}"
        for missing, where in (
            (set(train) - set(test), "for training"),
            (set(test) - set(train), "held out"),
        )
        if missing
    ]
    if problems:
        raise UserError(
            f"the classes differ: {'; '.join(problems)}; make train/ and val/ (or test/) hold "
            "the same class folders"
        )


def _split_folder(root: Path, split: Split) -> Path:
    if not root.is_dir():
        raise UserError(
            f"data.path = '{root}' is not a folder: set it to one with train/ and test/"
        )
    names = ("train",) if split == "train" else ("val", "test")
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(
        f"{root} has no {' or '.join(f'{name}/' for name in names)} folder: expected "
        f"{root / names[0]}/<class>/<image>"
    )


def scan_folder(folder: Path) -> ImageFiles:
    """The images of ``folder/<class>/``; raises UserError as `find_images`."""
    return ImageFiles(*find_images(folder))


def _write_digits(folder: Path) -> None:
    """Scikit-learn's 1,797 scans of 8x8 pixels as JPEG files; every fifth is held out."""
    if folder.is_dir():
        return
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".digits-") as scratch:
        unfinished = Path(scratch) / "digits"
        for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            split = "test" if number % 5 == 0 else "train"
            path = unfinished / split / str(label) / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((scan * (255 / 16)).astype(np.uint8)).save(path, quality=95)
        try:
            unfinished.rename(folder)
        except OSError:  # another run was faster
            if not folder.is_dir():
                raise


def _torchvision_cifar(settings: Data, split: Split, download: bool) -> ImageArray:
    import torchvision  # two seconds of a core, which other data spare

    maker = torchvision.datasets.CIFAR10
    if settings.source == "cifar100":
        maker = torchvision.datasets.CIFAR100
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_PATIENCE)  # else a firewall that swallows packets hangs us
    try:
        data = maker(str(settings.path), train=split == "train", download=download)
    except Exception as error:  # the download raises what its transport raises
        missing = f"not in {settings.path}, or corrupted: let hdb train download it,"
        if download:
            missing = f"neither in {settings.path} nor can it be downloaded ({error}):"
        raise UserError(
            f"{settings.source} is {missing} put torchvision's {maker.base_folder} there, or bring "
            "the images as a folder (data.source=folder)"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageArray(list(data.classes), np.asarray(data.targets, dtype=np.int64), images)


def _synthetic(settings: Data, split: Split) -> ImageArray:
    """Noisy pictures of one smooth pattern per class: learnable, and the same on every rank."""
    generator = torch.Generator().manual_seed(20)
    side, classes = settings.synthetic_side, settings.synthetic_classes
    coarse = torch.rand(classes, 3, 4, 4, generator=generator)
    patterns = functional.interpolate(coarse, (side, side), mode="bicubic")
    count = _synthetic_count(settings, split)
    generator.manual_seed(21 if split == "train" else 22)
    labels = torch.arange(count) % classes
    noise = torch.randn(count, 3, side, side, generator=generator)
    images = ((patterns[labels] + 0.5 * noise) * 255).clamp_(0, 255).to(torch.uint8)
    return ImageArray([f"class{number}" for number in range(classes)], labels.numpy(), images)


def _synthetic_count(settings: Data, split: Split) -> int:
    samples = settings.synthetic_samples
    return max(samples if split == "train" else samples // 5, settings.synthetic_classes)
