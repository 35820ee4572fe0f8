"""The range of values that becomes 8 bits, where it is asked for as percentiles: from windows all over the scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.rasters.scaling import EIGHT_BIT, Scale, percentile_scale
from rsmtdf_cache.rasters.scene import open_scene
from rsmtdf_cache.tiling.finding import FoundScene

__all__ = ["measure_scale"]

_SCENES, _WINDOWS, _SIDE_PX = 32, 8, 256


def measure_scale(
    scenes: Sequence[FoundScene], bands: tuple[int, int, int] | None, percentiles: tuple[float, float], seed: int
) -> Scale:
    """Return the range between two percentiles of each band, over up to 256 windows of 256 px where there is data.

    Which windows is a function of ``seed`` and the names. Raises ``UsageError`` when a band has one value everywhere.
    """
    order = sorted(scenes, key=lambda s: hashlib.sha256(f"{seed}/{s.name}".encode()).digest())
    parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    for found in order[:_SCENES]:
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{found.name}".encode()).digest()[:8], "big"))
        try:
            with gdal_settings(), open_scene(found.image, bands, EIGHT_BIT) as scene:
                height, width = min(_SIDE_PX, scene.height), min(_SIDE_PX, scene.width)
                for _ in range(_WINDOWS):
                    y = int(rng.integers(scene.height - height + 1))
                    x = int(rng.integers(scene.width - width + 1))
                    raw, valid = scene.read_raw(y, x, height, width)
                    parts.append(scene.values_with_data(raw, valid))
        except DataError:
            continue  # it is told of when the scene is laid out
    scale = (
        percentile_scale([np.concatenate(values) for values in zip(*parts, strict=True)], percentiles)
        if parts
        else None
    )
    if scale is None:
        raise UsageError(
            f"--scale {percentiles[0]:g}%,{percentiles[1]:g}%: a band has one value, or none, in the windows that were "
            "looked at; give the range as LOW,HIGH"
        )
    return scale
