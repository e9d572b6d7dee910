"""CIFAR-10 as JPEG files, which the study trains on: train/ and test/ with a folder for each class.

`make study` starts this where the images are not there yet; torchvision downloads them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from hpc_hdb.config import Data
from hpc_hdb.train.data import ImageArray, open_data, prepare_data


def write_jpegs(data: ImageArray, folder: Path) -> None:
    """Write each image to ``folder/<class>/<number>.jpg``."""
    for name in data.classes:
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        path = folder / data.classes[label] / f"{number:05d}.jpg"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="to write to; it must not be there yet")
    parser.add_argument("--cifar10", type=Path, default=Path("data"), help="torchvision's folder")
    options = parser.parse_args()
    settings = Data(source="cifar10", path=options.cifar10)
    prepare_data(settings)
    unfinished = options.folder.with_name(f"{options.folder.name}.part")
    for split in ("train", "test"):
        data = open_data(settings, split)
        assert isinstance(data, ImageArray)
        write_jpegs(data, unfinished / split)
    unfinished.rename(options.folder)


if __name__ == "__main__":
    main()
