"""Measurements behind ``rsmtdf bench store``: building against the bare teacher, reading against a memory map."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsmtdf_cache.events import EventSink

__all__ = ["measure_store"]

_SPLIT = "val"  # 37 tiles: enough for a rate, quick on two cores
_SIDE_PX = 128
_CROPS_AT_ONCE = 16
_READ_SECONDS = 2.0


def measure_store(out: Path, teacher: str, on_event: EventSink) -> dict[str, Any]:
    """Return rates: ``{build,teacher}_tiles_per_s`` (one view, scale 1) and ``{read,memmap}_crops_per_s``.

    The store is built new in a temporary folder of ``out``. Both readers read the same random crops of 128 px of the
    array with most values; the page cache is warm for both, so this compares the work per crop, not disks.
    """
    import numpy as np
    import torch

    from rsmtdf_cache.build import build_store
    from rsmtdf_cache.request import BuildRequest
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.sources.landcover import build_sample
    from rsmtdf_cache.store import FeatureStore
    from rsmtdf_cache.teachers import load
    from rsmtdf_cache.teachers.base import TeacherRequest
    from rsmtdf_cache.views import Box

    data = out / "data"
    build_sample(data, on_event)
    source = open_source(data)
    with tempfile.TemporaryDirectory(dir=out, prefix="store-") as folder:
        asked = {"data": data, "out": folder, "teachers": [teacher], "splits": [_SPLIT], "scales": [1.0]}
        report = build_store(BuildRequest.of(asked), on_event)
        store = FeatureStore.open(Path(folder))
        key = max(store.keys(), key=lambda k: (np.prod(store.spec(k).grid) * store.spec(k).layer.channels, str(k)))
        spec = store.spec(key)

        images = np.stack([source.read_image(tile) for tile in source.tiles([_SPLIT])])
        batch = store.describe()["profiles"][0]
        network = load(TeacherRequest(teacher))
        layers = [k.layer for k in store.keys()]
        before = torch.get_num_threads()
        torch.set_num_threads(batch["threads"])
        try:
            size = batch["micro_batch"]
            pieces = [torch.from_numpy(images[i : i + size]) for i in range(0, len(images), size)]
            network.encode(pieces[0], spec.view.size_px, layers, batch["precision"])  # warm up
            begun = time.perf_counter()
            for piece in pieces:
                network.encode(piece, spec.view.size_px, layers, batch["precision"])
            forward = len(images) / (time.perf_counter() - begun)
        finally:
            torch.set_num_threads(before)

        rows = list(range(len(images)))
        flat = Path(folder) / "flat.npy"
        np.save(flat, store.read(key, rows).values)
        mapped = np.load(flat, mmap_mode="r")
        stride = int(spec.stride_tile_px)
        places = np.random.default_rng(0).integers(0, (source.tile_px - _SIDE_PX) // stride + 1, (1000, 2))

        def from_store(n: int) -> None:
            chosen = [(n + i) % len(rows) for i in range(_CROPS_AT_ONCE)]
            corners = [places[(n * 7 + i) % 1000] * stride for i in range(_CROPS_AT_ONCE)]
            store.read(key, chosen, [Box(int(y), int(x), _SIDE_PX, _SIDE_PX) for y, x in corners])

        def from_map(n: int) -> None:
            side = _SIDE_PX // stride
            corners = [places[(n * 7 + i) % 1000] for i in range(_CROPS_AT_ONCE)]
            np.stack([
                mapped[(n + i) % len(rows), y : y + side, x : x + side] for i, (y, x) in enumerate(corners)
            ])  # fmt: skip

        return {
            "teacher": teacher,
            "tiles": len(images),
            "array": str(key),
            "build_tiles_per_s": round(report.rates[teacher], 2),
            "teacher_tiles_per_s": round(forward, 2),
            "read_crops_per_s": round(_rate(from_store) * _CROPS_AT_ONCE, 1),
            "memmap_crops_per_s": round(_rate(from_map) * _CROPS_AT_ONCE, 1),
        }


def _rate(work: Callable[[int], None]) -> float:
    """Return calls per second of ``work``, after a first round that warms caches."""
    for n in range(40):
        work(n)
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < _READ_SECONDS:
        work(count)
        count += 1
    return count / (time.perf_counter() - begun)
