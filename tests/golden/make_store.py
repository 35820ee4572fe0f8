"""Make ``tests/golden/store`` again, only when the format version changes.

``PYTHONPATH=. python tests/golden/make_store.py``

A store with everything the format has: two orientations, an append (and so a hole), a compacted segment beside a
record, a dropped layer, snapshots and a pin. ``store.json`` holds the values, computed from the tiles' pixels and not
read back from the store.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.files import publish_json
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.request import BuildRequest
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

HERE = Path(__file__).parent


def main() -> None:
    out = HERE / "store"
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder) / "data", tiles=7, tile_px=32, georeference=True)
        asked = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 3, "scales": [1.0], "orientations": 2}
        build_store(BuildRequest.of({**asked, "threads": 1}), load_teacher=load_mean_teacher)
        paths = StorePaths(out)
        first = Ledger.load(paths).snapshot()
        Ledger.load(paths).compact(tail_max=0)
        build_store(
            BuildRequest.of({**asked, "threads": 1, "splits": ["train", "val", "test"]}), load_teacher=load_mean_teacher
        )
        pin = {
            "snapshot": first,
            "owner": "golden",
            "created": "2026-11-22",
            "expires": None,
            "note": "the first build",
        }
        publish_json(paths.pin(f"golden-{first[:16]}"), pin, paths.tmp)
        ledger = Ledger.load(paths)
        name = next(n for n, s in sorted(ledger.sets.items()) if s.arrays.specs[0].view.orientation)
        ledger.drop([(name, "mean16")])
        write_head(paths, load_manifest(paths), ledger)
        shutil.rmtree(paths.tmp, ignore_errors=True)
        images = {p.stem: np.asarray(Image.open(p)) for p in sorted((data / "images").glob("*.png"))}
    cells = {k: v.reshape(4, 8, 4, 8, 3).mean((1, 3)) for k, v in images.items()}
    values = {k: np.asarray(v, np.float16).astype(float).tolist() for k, v in cells.items()}
    document = {"first_snapshot": first, "snapshot": ledger.snapshot(), "mean8": values}
    (HERE / "store.json").write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
