"""Smaller copies of an image as JPEG, for the low resolutions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

_QUALITY = 90


def smaller_copies(
    data: bytes, picture: Image.Image, sides: Sequence[int]
) -> dict[int, bytes | None]:
    """JPEG files of `picture`, the shorter side of each of so many pixels.

    Parameters
    ----------
    data : bytes
        The file that `picture` was decoded from.
    picture : Image
        In RGB.
    sides : sequence of int

    Returns
    -------
    dict of int to bytes or None
        By side; None where the picture is not larger.
    """
    tables = _coarser_tables(data) if sides else None
    return {side: _copy(picture, side, tables) for side in sides}


def _coarser_tables(data: bytes) -> dict[int, list[int]] | None:
    """The quantization tables of a JPEG file coarser than `_QUALITY`, which its copies take over.

    Finer ones would take room and time to decode for detail that is not there.
    """
    with Image.open(io.BytesIO(data)) as image:
        tables = getattr(image, "quantization", None)
    if not tables or 0 not in tables:  # a JPEG may number its tables otherwise
        return None
    return tables if sum(tables[0]) > sum(_finest_tables()[0]) else None


@cache
def _finest_tables() -> dict[int, list[int]]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=_QUALITY)
    with Image.open(buffer) as image:
        assert isinstance(image, JpegImageFile)
        return image.quantization


def _copy(picture: Image.Image, side: int, tables: dict[int, list[int]] | None) -> bytes | None:
    width, height = picture.size
    scale = side / min(width, height)
    if scale >= 1:
        return None
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    how: dict[str, Any] = {"qtables": tables} if tables else {"quality": _QUALITY}
    small.save(buffer, "JPEG", optimize=True, **how)
    return buffer.getvalue()
