"""Bytes of an image file to pixels, strictly: what the file says it is has to be what the benchmark distributes."""

from __future__ import annotations

from io import BytesIO
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.rasters.png import (
    GREY,
    PALETTE,
    RGB,
    PngError,
    PngHeader,
    decode_png,
    parse_png_header,
)

__all__ = ["MAX_PIXELS", "image_side", "read_colors", "read_rgb", "read_values"]

#: An image of more pixels is refused before it is decoded (Potsdam's scenes have 36 million).
MAX_PIXELS = 80_000_000
_PNG = b"\x89PNG\r\n\x1a\n"


def image_side(file: IO[bytes], place: str) -> tuple[int, int]:
    """Return height and width in pixels that the head of an image file declares; nothing is decoded.

    Raises ``DataError`` for anything but a PNG, JPEG or TIFF file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=["PNG", "JPEG", "TIFF"]) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: no PNG, JPEG or TIFF file of 8 bits, or damaged ({error})") from None


def read_rgb(data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return ``[height, width, 3]`` uint8 of an 8-bit RGB PNG, JPEG or TIFF file. Raises ``DataError``."""
    if data.startswith(_PNG):
        header = _png_header(data, place, max_pixels)
        if (header.bit_depth, header.color_type) != (8, RGB):
            raise DataError(f"{place}: found {header}; the images are 8-bit RGB")
        return _decoded_png(data, place)
    return _decoded(data, place, max_pixels, "RGB", "the images are 8-bit RGB")


def read_colors(data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return ``[height, width, 3]`` uint8 colours of a label image; a palette is looked up. Raises ``DataError``.

    A grey or 1-bit image has no colours to tell classes by and is refused.
    """
    if data.startswith(_PNG):
        header = _png_header(data, place, max_pixels)
        if header.color_type == PALETTE:
            return _decoded(data, place, max_pixels, "P", "", convert=True)
        if (header.bit_depth, header.color_type) != (8, RGB):
            raise DataError(f"{place}: found {header}; the labels are 8-bit RGB colours, or a palette of them")
        return _decoded_png(data, place)
    return _decoded(data, place, max_pixels, "RGB", "the labels are 8-bit RGB colours, or a palette of them", True)


def read_values(data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return ``[height, width]`` uint8 values of a one-band label PNG; of a palette its indices. Raises ``DataError``.

    A 1-bit grey image cannot hold the classes and is refused, as is one of 16 bits.
    """
    if not data.startswith(_PNG):
        raise DataError(f"{place}: not a PNG file; the labels are 8-bit one-band PNG files")
    header = _png_header(data, place, max_pixels)
    if header.color_type != PALETTE and (header.bit_depth, header.color_type) != (8, GREY):
        raise DataError(f"{place}: found {header}; the labels are 8-bit with one band of class values")
    return _decoded_png(data, place)


def _png_header(data: bytes, place: str, max_pixels: int) -> PngHeader:
    try:
        header = parse_png_header(data)
    except PngError as error:
        raise DataError(f"{place}: {error}") from None
    _check_size(header.width, header.height, place, max_pixels)
    return header


def _check_size(width: int, height: int, place: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataError(f"{place}: declares {width} x {height} px, more than {max_pixels} pixels; it was not decoded")


def _decoded_png(data: bytes, place: str) -> NDArray[np.uint8]:
    try:
        pixels: NDArray[np.uint8] = decode_png(data)
    except PngError as error:
        raise DataError(f"{place}: {error}") from None
    return pixels


def _decoded(
    data: bytes, place: str, max_pixels: int, mode: str, expected: str, convert: bool = False
) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data), formats=["PNG", "JPEG", "TIFF"]) as image:
            _check_size(image.width, image.height, place, max_pixels)
            if image.mode != mode and not (convert and image.mode == "P"):
                raise DataError(f"{place}: found {image.format} of mode {image.mode}; {expected}")
            image.load()
            pixels: Any = image.convert("RGB") if image.mode == "P" else image
            return np.array(pixels, np.uint8)
    except UnidentifiedImageError:
        raise DataError(f"{place}: no PNG, JPEG or TIFF file of 8 bits, or damaged; {expected}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: truncated or damaged, cannot be decoded ({error})") from None
