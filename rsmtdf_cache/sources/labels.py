"""What stands in a mask, values or colours, to class numbers. What no table knows is an error that names the pixel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError

__all__ = ["ColorTable", "IGNORE", "LabelTable", "ValueTable"]

#: "no label" where nothing else is said.
IGNORE = 255
_ROWS = 512  # a band of rows at a time: the codes of a 6000-px scene would take 288 MB
_SHOWN = 12  # of what a table knows, in a message


class LabelTable(ABC):
    """Which class each stored value or colour is."""

    @abstractmethod
    def codes(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return one whole number a pixel, ``[height, width]``, that ``table`` knows."""

    @abstractmethod
    def table(self) -> Mapping[int, int]:
        """Return the class number, or the number that means "no label", of each code."""

    @abstractmethod
    def shown(self, code: int) -> str:
        """Return what a message calls ``code``."""

    def convert(
        self, pixels: NDArray[Any], place: str, unknown: str = "error", ignore: int = IGNORE,
        corner: tuple[int, int] = (0, 0),
    ) -> tuple[NDArray[np.uint8], int]:  # fmt: skip
        """Return class numbers ``[height, width]`` (``ignore`` = no label), and how many pixels no table knows.

        Those become ``ignore`` with ``unknown="ignore"``; otherwise they raise ``DataError`` naming file, row, column
        and what stands there. ``corner``: row and column in the file of the first pixel.
        """
        known = np.array(sorted(self.table()), np.int64)
        numbers = np.array([self.table()[int(code)] for code in known], np.uint8)
        mask = np.full(pixels.shape[:2], ignore, np.uint8)
        strangers = 0
        for top in range(0, pixels.shape[0], _ROWS):
            codes = self.codes(pixels[top : top + _ROWS])
            if codes.dtype == np.uint8:  # a table of 256 is several times as fast as a search
                found, hit = _table_of_bytes(known, numbers)
                here, hits = found[codes], hit[codes]
            else:
                index = np.searchsorted(known, codes).clip(max=len(known) - 1)
                here, hits = numbers[index], known[index] == codes
            mask[top : top + _ROWS] = np.where(hits, here, np.uint8(ignore))
            count = int(hits.size - np.count_nonzero(hits))
            if count and unknown == "error":
                row, column = (int(v) for v in np.argwhere(~hits)[0])
                names = [self.shown(int(code)) for code in known[:_SHOWN]] + ["…"] * (len(known) > _SHOWN)
                raise DataError(
                    f"{place}: {self.shown(int(codes[row, column]))} at row {corner[0] + top + row}, column "
                    f"{corner[1] + column} is no label that is known; known: {', '.join(names)}. {self.advice()}"
                )
            strangers += count
        return mask, strangers

    def advice(self) -> str:
        """Return what can be done about a value or colour that is not known."""
        return "Correct the file, or ignore such pixels with --unknown-labels ignore"


def _table_of_bytes(
    known: NDArray[np.int64], numbers: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    inside = (known >= 0) & (known < 256)
    found, hit = np.zeros(256, np.uint8), np.zeros(256, bool)
    found[known[inside]], hit[known[inside]] = numbers[inside], True
    return found, hit


@dataclass(frozen=True)
class ValueTable(LabelTable):
    """One band: stored value → class number."""

    values: Mapping[int, int]

    def codes(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return the values themselves."""
        return pixels

    def table(self) -> Mapping[int, int]:
        """Return class numbers by value."""
        return self.values

    def shown(self, code: int) -> str:
        """Return ``value 9``."""
        return f"value {code}"


@dataclass(frozen=True)
class ColorTable(LabelTable):
    """RGB: stored colour → class number. With ``threshold`` a channel counts as 255 from there on, as 0 below."""

    colors: Mapping[tuple[int, int, int], int]
    threshold: int | None = None

    def codes(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return ``0xRRGGBB`` of each pixel ``[height, width, 3]``, after the threshold."""
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
