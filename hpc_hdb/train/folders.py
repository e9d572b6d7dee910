"""Folders of labelled images."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpc_hdb.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Those that torchvision's ImageFolder or DALI's file reader takes; Pillow and DALI decode all."""

_NAMED = 5
"""Other suffixes that are told of by name."""


class Found(NamedTuple):
    """The images of a folder.

    Attributes
    ----------
    classes : list of str
        Sorted.
    labels : ndarray, shape (n,), int64
        Positions in `classes`.
    paths : list of str, length n
    passed_over : str
        One line on the other files, for the user; empty where there are none.
    """

    classes: list[str]
    labels: np.ndarray
    paths: list[str]
    passed_over: str


def find_images(folder: Path) -> Found:
    """Find the images of ``folder/<class>/``, in sorted order, in subfolders too.

    Images are told by `IMAGE_SUFFIXES`, in upper or lower case.

    Raises
    ------
    UserError
        If there are no classes, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(f"no data at {folder}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise UserError(f"{folder} has no class folders: expected {folder}/<class>/<image>")
    paths: list[str] = []
    counts = []
    others: Counter[str] = Counter()
    for name in classes:
        found = []
        for parent, _, files in os.walk(folder / name):
            for file in files:
                if file.lower().endswith(IMAGE_SUFFIXES):
                    found.append(f"{parent}/{file}")
                elif not file.startswith("."):
                    others[os.path.splitext(file)[1].lower() or "no suffix"] += 1
        if not found:
            raise UserError(
                f"class folder {folder / name} has no images ({', '.join(IMAGE_SUFFIXES)}): "
                "fill or remove it"
            )
        paths += sorted(found)
        counts.append(len(found))
    labels = np.repeat(np.arange(len(classes)), counts)
    return Found(classes, labels, paths, _passed_over(folder, others))


def _passed_over(folder: Path, others: Counter[str]) -> str:
    if not others:
        return ""
    named = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(_NAMED))
    more = ", ..." if len(others) > _NAMED else ""
    return (
        f"{folder}: files passed over that are not named as images: {others.total()} "
        f"({named}{more})"
    )
