"""How long training waits for shards of a store behind a slow line, with and without fetching ahead of need.

    python bench/remote.py OUT.json [--delay-ms 20] [--step-ms 200] [--tiles 240] [--rounds 3]

A store of pixels, two tiles a shard, behind a web server of this machine that waits before each answer; a first epoch
with an empty cache, 8 labelled and 8 unlabelled crops a batch. A step is a pause: it needs no core, as a GPU's step
would. Rounds alternate; the share of time that waits for batches is that after the first one, which nothing can be
ahead of. Each shard has to be fetched once, or the measurement stops.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.ahead import FetchAhead
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.stored_pixels import StoredPixels
from rsmtdf_cli.machine import context
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.geometry import Geometry
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.recipe import Recipe

__all__ = ["main"]

_BATCH, _TILE_PX = 8, 128


def _write(root: Path, tiles: int) -> None:
    """Write ``root/data``, tiles of noise, and ``root/store`` with their pixels."""
    rng = np.random.default_rng(0)
    data, ids = root / "data", [f"t{n:04}" for n in range(tiles)]
    for folder in ("images", "masks", "splits"):
        (data / folder).mkdir(parents=True)
    for name in ids:
        Image.fromarray(rng.integers(0, 256, (_TILE_PX, _TILE_PX, 3), np.uint8)).save(data / "images" / f"{name}.png")
        Image.fromarray(np.zeros((_TILE_PX, _TILE_PX), np.uint8)).save(data / "masks" / f"{name}.png")
    (data / "splits" / "train.txt").write_text("".join(f"{name}\n" for name in ids))
    classes = [{"name": name, "color": [shade] * 3} for name, shade in (("a", 0), ("b", 9))]
    header = {"name": "bench", "tile_px": _TILE_PX, "ignore_index": 255, "masks": "complete", "classes": classes}
    (data / "dataset.yaml").write_text(yaml.safe_dump(header))
    build_store(BuildRequest.of({"data": data, "out": root / "store", "pixels": True, "group_rows": 2}))


@contextmanager
def _served(root: Path, delay_s: float, asked: Counter[str]) -> Iterator[str]:
    """Serve ``root`` on loopback, ``delay_s`` late, and count what is ``asked``."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *words: Any) -> None:
            super().__init__(*words, directory=str(root))

        def do_GET(self) -> None:
            asked[self.path] += 1
            time.sleep(delay_s)
            super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _epoch(root: Path, tiles: int, delay_s: float, step_s: float) -> dict[str, float]:
    recipe = Recipe.model_validate({
        "data": root / "data", "labeled": "train", "crop_px": 64, "targets": "none", "distill": False, "fuse": False,
        "batch": {"labeled": _BATCH, "unlabeled": _BATCH},
    })  # fmt: skip
    asked: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home, _served(root / "store", delay_s, asked) as url:
        os.environ["RSMTDF_HOME"] = home
        pixels = StoredPixels.of(FeatureStore.open(url))
        geometry = Geometry(_TILE_PX, recipe.crop_px, 32)
        loader = BatchLoader(TileDataset(open_source(root / "data"), None, geometry, pixels=pixels), recipe)
        waits = []
        begun = since = time.perf_counter()
        for _ in loader.iterate(0, tiles // _BATCH):
            waits.append(time.perf_counter() - since)
            time.sleep(step_s)
            since = time.perf_counter()
        seconds = time.perf_counter() - begun
    shards = {path: count for path, count in asked.items() if "/features/c/" in path}
    if len(shards) != -(-tiles // 2) or set(shards.values()) != {1}:
        raise SystemExit(f"{len(shards)} shards were asked for {sum(shards.values())} times")
    rest = seconds - waits[0] - step_s
    return {"seconds": seconds, "first_batch_s": waits[0], "data_wait": sum(waits[1:]) / rest}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--step-ms", type=float, default=200)
    parser.add_argument("--tiles", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    ask = FetchAhead.ask
    rounds: dict[str, list[dict[str, float]]] = {"at need": [], "ahead": []}
    with tempfile.TemporaryDirectory() as work:
        _write(Path(work), asked.tiles)
        for _ in range(asked.rounds):
            for name, found in rounds.items():
                setattr(FetchAhead, "ask", ask if name == "ahead" else lambda *words: False)  # noqa: B010
                found.append(_epoch(Path(work), asked.tiles, asked.delay_ms / 1000, asked.step_ms / 1000))
    medians = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in rounds.items()
    }
    for name, numbers in medians.items():
        print(f"{name:8} " + "  ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
    settings = {key: value for key, value in vars(asked).items() if key != "out"}
    result = {"context": context(), "settings": settings, "medians": medians, "rounds": rounds}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
