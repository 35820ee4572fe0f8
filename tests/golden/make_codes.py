"""Make ``tests/golden/codes`` again, only when the format of codes, calibrations or fixed views changes.

``PYTHONPATH=. python tests/golden/make_codes.py``

A store of int8 and PCA codes with their calibrations, a compressor, and two fixed views. ``codes.json`` holds the
features that the teacher gave, not what was read back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.views import render
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

HERE = Path(__file__).parent


def main() -> None:
    out = HERE / "codes"
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder) / "data", tiles=9, tile_px=64, splits={"train": range(9)}, labeled={})
        asked = {"data": data, "out": out, "group_rows": 4, "scales": [1.0], "threads": 1, "micro_batch": 2}
        for teacher, more in (
            ("plain,codec=int8,fixed_views=2", {"view_seed": 5}),
            ("packed,codec=int8", {"compressor": "zstd:3"}),
            ("projected,codec=pca2-int8", {}),
        ):
            build_store(BuildRequest.of({**asked, **more, "teachers": [teacher]}), load_teacher=load_mean_teacher)
        shutil.rmtree(StorePaths(out).tmp, ignore_errors=True)
        images = {p.stem: np.asarray(Image.open(p)) for p in sorted((data / "images").glob("*.png"))}
    store = FeatureStore.open(out)
    mean8 = {
        key.view: {
            name: render(image, store.spec(key).view).astype(float).tolist() for name, image in list(images.items())[:2]
        }
        for key in store.keys() if key.teacher == "plain" and key.layer == "mean8" and not store.spec(key).view.is_whole
    }  # fmt: skip
    cells = {
        k: v.reshape(8, 8, 8, 8, 3).mean((1, 3)).astype(np.float32).astype(float).tolist() for k, v in images.items()
    }
    views = {str(key.view): store.spec(key).view.to_json() for key in store.keys()}
    document = {"snapshot": store.snapshot, "mean8": cells, "views": views, "shown": _means(mean8)}
    (HERE / "codes.json").write_text(json.dumps(document) + "\n")


def _means(shown: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Return the mean colour of what each fixed view shows of a tile."""
    return {view: {k: np.asarray(v).mean((0, 1)).tolist() for k, v in tiles.items()} for view, tiles in shown.items()}


if __name__ == "__main__":
    main()
