"""Labels as a benchmark stores them, values or colours, to class numbers. What no table knows is an error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.prepare.pixels import MAX_PIXELS, read_colors, read_values

__all__ = ["ColorLabels", "IGNORE", "Labels", "ValueLabels"]

IGNORE = 255
_ROWS = 512  # a band of rows at a time: the codes of a 6000-px scene would take 144 MB


class Labels(ABC):
    """How labels are stored. ``read`` decodes a file, ``convert`` gives class numbers."""

    @abstractmethod
    def read(self, data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Return the stored values ``[height, width]`` or colours ``[height, width, 3]``. Raises ``DataError``."""

    @abstractmethod
    def codes(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint32]:
        """Return one number a pixel, ``[height, width]``, that ``table`` knows."""

    @abstractmethod
    def table(self) -> Mapping[int, int]:
        """Return the class number, or ``IGNORE``, of each code."""

    @abstractmethod
    def shown(self, code: int) -> str:
        """Return what a message calls ``code``."""

    def convert(self, pixels: NDArray[np.uint8], place: str, unknown: str = "error") -> tuple[NDArray[np.uint8], int]:
        """Return class numbers ``[height, width]`` (``IGNORE`` = no label), and how many pixels no table knows.

        Those become ``IGNORE`` with ``unknown="ignore"``; otherwise they raise ``DataError`` naming file, row, column
        and what stands there.
        """
        mask = np.full(pixels.shape[:2], IGNORE, np.uint8)
        strangers = 0
        for top in range(0, pixels.shape[0], _ROWS):
            codes = self.codes(pixels[top : top + _ROWS])
            known = np.zeros(codes.shape, bool)
            for code, number in self.table().items():
                here = codes == code
                mask[top : top + _ROWS][here] = number
                known |= here
            count = int(known.size - np.count_nonzero(known))
            if count and unknown == "error":
                row, column = (int(v) for v in np.argwhere(~known)[0])
                raise DataError(
                    f"{place}: {self.shown(int(codes[row, column]))} at row {top + row}, column {column} is no label "
                    f"of this benchmark; known: {', '.join(map(self.shown, self.table()))}. Correct the file, or "
                    "ignore such pixels with --unknown-labels ignore"
                )
            strangers += count
        return mask, strangers


@dataclass(frozen=True)
class ValueLabels(Labels):
    """One band: stored value → class number."""

    values: Mapping[int, int]

    def read(self, data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Return ``[height, width]`` stored values. Raises ``DataError``."""
        return read_values(data, place, max_pixels)

    def codes(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint32]:
        """Return the values themselves."""
        return pixels.astype(np.uint32)

    def table(self) -> Mapping[int, int]:
        """Return class numbers by value."""
        return self.values

    def shown(self, code: int) -> str:
        """Return ``value 9``."""
        return f"value {code}"


@dataclass(frozen=True)
class ColorLabels(Labels):
    """RGB: stored colour → class number. With ``threshold`` a channel counts as 255 from there on, as 0 below."""

    colors: Mapping[tuple[int, int, int], int]
    threshold: int | None = None

    def read(self, data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Return ``[height, width, 3]`` stored colours. Raises ``DataError``."""
        return read_colors(data, place, max_pixels)

    def codes(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint32]:
        """Return ``0xRRGGBB`` of each pixel, after the threshold."""
        if self.threshold is not None:
            pixels = np.where(pixels >= self.threshold, 255, 0).astype(np.uint8)
        red, green, blue = (pixels[..., band].astype(np.uint32) for band in range(3))
        return np.asarray((red << 16) | (green << 8) | blue, np.uint32)

    def table(self) -> Mapping[int, int]:
        """Return class numbers by ``0xRRGGBB``."""
        return {(r << 16) | (g << 8) | b: number for (r, g, b), number in self.colors.items()}

    def shown(self, code: int) -> str:
        """Return ``colour (255, 0, 0)``."""
        return f"colour ({code >> 16}, {code >> 8 & 255}, {code & 255})"
