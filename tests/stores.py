"""Stores that several test modules build alike."""

from __future__ import annotations

from pathlib import Path

from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

__all__ = ["write_mean_store"]


def write_mean_store(root: Path, tiles: int, tile_px: int = 64) -> Path:
    """Write ``root/data`` and its store of the mean teacher at scale 1, ``root/store``; return ``root``."""
    write_dataset(root / "data", tiles=tiles, tile_px=tile_px)
    build_store(
        BuildRequest.of({"data": root / "data", "out": root / "store", "teachers": ["mean"], "scales": [1.0]}),
        load_teacher=load_mean_teacher,
    )
    return root
