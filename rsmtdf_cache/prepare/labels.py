"""Labels as a benchmark stores them, values or colours: how a file is decoded, and which class each of them is."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.prepare.pixels import MAX_PIXELS, read_colors, read_values
from rsmtdf_cache.sources.labels import IGNORE, ColorTable, LabelTable, ValueTable

__all__ = ["ColorLabels", "IGNORE", "Labels", "ValueLabels"]


class Labels(LabelTable):
    """How labels are stored. ``read`` decodes a file, ``convert`` gives class numbers."""

    @abstractmethod
    def read(self, data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Return the stored values ``[height, width]`` or colours ``[height, width, 3]``. Raises ``DataError``."""


class ValueLabels(ValueTable, Labels):
    """One band: stored value → class number."""

    def read(self, data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Return ``[height, width]`` stored values. Raises ``DataError``."""
        return read_values(data, place, max_pixels)


class ColorLabels(ColorTable, Labels):
    """RGB: stored colour → class number. With ``threshold`` a channel counts as 255 from there on, as 0 below."""

    def read(self, data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Return ``[height, width, 3]`` stored colours. Raises ``DataError``."""
        return read_colors(data, place, max_pixels)
