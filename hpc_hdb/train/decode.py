"""Encoded images to pixels, with Pillow."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dali_pipelines.augmentation import crop_boxes

_ORIENTATION = 0x112
"""The tag of Exif and TIFF."""


class DecodeError(Exception):
    """What is wrong with the bytes of an image."""


def decode(data: bytes, side: int | None = None) -> Image.Image:
    """Decode to RGB.

    Parameters
    ----------
    data : bytes
        The encoded image.
    side : int, optional
        The shorter side needed, in pixels: a larger JPEG may be decoded at a fraction of its size.

    Raises
    ------
    DecodeError
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_upright(image)
            if side is not None:
                image.draft("RGB", (side, side))
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert would clip to white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except DecodeError:
        raise
    except Image.UnidentifiedImageError:
        raise DecodeError("not an image") from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise DecodeError(str(error)) from None


def check_header(data: bytes) -> None:
    """Raise DecodeError for what DALI decodes, and `decode` refuses by the header."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_upright(image)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(str(error)) from None
    except Exception:  # for the decoder to tell
        return


def _check_upright(image: Image.Image) -> None:
    """Refuse a TIFF that is to be turned: Pillow does so, unlike with other files, DALI never."""
    if image.format == "TIFF" and image.getexif().get(_ORIENTATION, 1) != 1:
        raise DecodeError("its orientation tag turns it: save it upright")


def encode_blank() -> np.ndarray:
    """A JPEG file of one grey pixel, ndarray of uint8."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def fit(picture: Image.Image, resolution: int, crop: np.ndarray | None = None) -> np.ndarray:
    """Resize the shorter side and crop the centre, or crop as drawn and resize.

    Parameters
    ----------
    crop : ndarray, shape (4,), optional
        As a row of `dali_pipelines.augmentation.Draws.crops`.

    Returns
    -------
    ndarray, shape (resolution, resolution, 3), uint8
    """
    width, height = picture.size
    if crop is not None:
        [[top, left, tall, wide]] = crop_boxes(crop[None], np.array([[height, width]])).tolist()
        box = (left, top, left + wide, top + tall)
        picture = picture.resize((resolution, resolution), Image.Resampling.BILINEAR, box)
    elif (width, height) != (resolution, resolution):
        scale = resolution / min(width, height)
        size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
        picture = picture.crop((left, top, left + resolution, top + resolution))
    return np.asarray(picture)
