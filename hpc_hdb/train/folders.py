"""Folders of labelled images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hpc_hdb.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


def find_images(folder: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Find the images of ``folder/<class>/``, in sorted order, in subfolders too.

    Returns
    -------
    classes : list of str
        Sorted.
    labels : ndarray, shape (n,), int64
        Positions in `classes`.
    paths : list of str, length n

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
    for name in classes:
        found = [
            f"{parent}/{file}"
            for parent, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES)
        ]
        if not found:
            raise UserError(
                f"class folder {folder / name} has no images ({', '.join(IMAGE_SUFFIXES)}): "
                "fill or remove it"
            )
        paths += sorted(found)
        counts.append(len(found))
    return classes, np.repeat(np.arange(len(classes)), counts), paths
