"""Fixed changes of a tile's colours, the same on every machine: numpy float32, one rounded operation at a time.

Values are 0..255 throughout; each step ends with a clip to that range, the last with ``floor(x + 0.5)``. In this order:

1. brightness ``b``: ``x * b``.
2. contrast ``c``: ``x * c + m * (1 - c)``; ``m`` is the mean grey of the image, summed in integers of 1/256.
3. saturation ``s``: ``x * s + g * (1 - s)``; grey ``g = 0.2989 R + 0.587 G + 0.114 B``.
4. hue: moved by a part of the colour circle; value (largest channel) and chroma (largest - smallest) stay.
5. grey: every channel becomes ``g``.
6. blur: Gaussian of ``blur_px`` (sigma, in tile pixels), rows, then columns; taps up to ``ceil(3 sigma)`` each way, as
   integers of 1/65536, borders mirrored without the border pixel.

The formulas are those of the trainer's strong view (``rsmtdf_train/photometry.py``, in torch and a drawn order; a test
holds the two together). They are written again because a store must not depend on the kernels of a torch release:
sums, means and ``exp`` that libraries may round differently are taken in integers here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.specs import PhotometrySpec

__all__ = ["photometric"]

#: Rows that are changed at a time, so that memory is a few copies of a band and not of the tile.
_BAND_ROWS = 256

_Floats = NDArray[np.float32]


def photometric(image: NDArray[np.uint8], change: PhotometrySpec) -> NDArray[np.uint8]:
    """Return ``image`` ``[H, W, 3]`` uint8 RGB with its colours changed: a new array, same shape. No pixel moves."""
    height, width, _ = image.shape
    mean = _mean_grey(image, change.brightness) if change.contrast != 1 else np.float32(0)
    taps = _gaussian(change.blur_px, min(height, width) - 1)
    radius = len(taps) // 2
    columns = _mirrored(-radius, width + radius, width)
    out = np.empty((height, width, 3), np.uint8)
    for start, stop in _bands(height):
        band = _recoloured(image[_mirrored(start - radius, stop + radius, height)], change, mean)
        if radius:
            rows = _convolved(band, taps, stop - start, axis=0)
            band = _convolved(rows[:, columns], taps, width, axis=1)
        out[start:stop] = np.floor(_clipped(band) + np.float32(0.5))
    return out


def _recoloured(pixels: NDArray[np.uint8], change: PhotometrySpec, mean: np.float32) -> _Floats:
    """Return all that looks at one pixel alone: ``[h, W, 3]`` float32."""
    x = _brightened(pixels, change.brightness)
    if change.contrast != 1:
        x = _clipped(x * np.float32(change.contrast) + mean * np.float32(1 - change.contrast))
    if change.saturation != 1:
        x = _clipped(x * np.float32(change.saturation) + _grey(x) * np.float32(1 - change.saturation))
    if change.hue != 0:
        x = _hue_shifted(x, change.hue)
    if change.grey:
        x = np.repeat(_grey(x), 3, axis=2)
    return x


def _brightened(pixels: NDArray[np.uint8], factor: float) -> _Floats:
    x = pixels.astype(np.float32)
    return _clipped(x * np.float32(factor)) if factor != 1 else x


def _clipped(x: _Floats) -> _Floats:
    return np.clip(x, np.float32(0), np.float32(255))


def _grey(x: _Floats) -> _Floats:
    red, green, blue = (x[..., i : i + 1] for i in range(3))
    grey: _Floats = red * np.float32(0.2989) + green * np.float32(0.587) + blue * np.float32(0.114)
    return grey


def _mean_grey(image: NDArray[np.uint8], brightness: float) -> np.float32:
    """Return the mean grey after the change of brightness. Integers add up to the same sum in every order."""
    total = 0
    for start, stop in _bands(len(image)):
        grey = _grey(_brightened(image[start:stop], brightness))
        total += int(np.rint(grey * np.float32(256)).astype(np.int64).sum())
    return np.float32(total / (256 * image.shape[0] * image.shape[1]))


def _hue_shifted(x: _Floats, turns: float) -> _Floats:
    """Return colours whose hue, in sixths of the circle, is moved by ``6 * turns``.

    Channel ``n`` of a colour of value V, chroma C and hue h is ``V - C * clip(min(k, 4 - k), 0, 1)`` with
    ``k = (n + h) mod 6`` and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value = x.max(axis=2)
    chroma = value - x.min(axis=2)
    divisor = np.where(chroma > 0, chroma, np.float32(1))
    hue = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, np.float32(2) + (blue - red) / divisor, np.float32(4) + (red - green) / divisor),
    )
    out = np.empty_like(x)
    six = np.float32(6)
    for channel, n in enumerate((5, 3, 1)):
        k = hue + np.float32(n + 6 * turns)
        k = k - six * np.floor(k / six)
        out[..., channel] = value - chroma * np.clip(np.minimum(k, np.float32(4) - k), np.float32(0), np.float32(1))
    return out


def _gaussian(sigma_px: float, widest: int) -> _Floats:
    """Return an odd number of taps that add up to 1 exactly; one tap for no blur. Padding reaches ``widest`` px."""
    radius = min(math.ceil(3 * sigma_px), widest) if sigma_px > 0 else 0
    if radius == 0:
        return np.ones(1, np.float32)
    side = [math.exp(-0.5 * (i / sigma_px) ** 2) for i in range(1, radius + 1)]
    total = 1 + 2 * sum(side)
    parts = [round(65536 * v / total) for v in side]
    return np.array([*parts[::-1], 65536 - 2 * sum(parts), *parts], np.float32) / np.float32(65536)


def _convolved(x: _Floats, taps: _Floats, size: int, axis: int) -> _Floats:
    out = np.zeros((size, *x.shape[1:]) if axis == 0 else (x.shape[0], size, *x.shape[2:]), np.float32)
    for k, tap in enumerate(taps):
        out += (x[k : k + size] if axis == 0 else x[:, k : k + size]) * tap
    return out


def _mirrored(start: int, stop: int, size: int) -> NDArray[np.int64]:
    """Return the indices ``start .. stop``, those outside ``0 .. size`` mirrored at the border pixels' centres."""
    index = np.abs(np.arange(start, stop))
    return np.where(index >= size, 2 * (size - 1) - index, index)


def _bands(height: int) -> Iterator[tuple[int, int]]:
    for start in range(0, height, _BAND_ROWS):
        yield start, min(start + _BAND_ROWS, height)
