"""The Python of docs/cluster.md runs as it stands, and says what a plain loop says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray

from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of 7 tiles in three groups, the last one with a hole, and the dataset."""
    write_dataset(tmp_path / "DATA", tiles=7, splits={"train": range(7)})
    values = {"data": tmp_path / "DATA", "out": tmp_path / "STORE", "teachers": ["mean"], "scales": [1.0]}
    build_store(BuildRequest.of({**values, "group_rows": 3}), load_teacher=load_mean_teacher)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_dask_chunks_are_shards(folder: Path) -> None:
    store = FeatureStore.open("STORE")
    key = store.keys()[0]
    plain, chunked = store.to_xarray()[str(key)], store.to_xarray(chunks="shard")[str(key)]
    assert chunked["features"].chunks == ((3, 3, 1), *((n,) for n in plain["features"].shape[1:]))
    assert isinstance(chunked, xarray.DataTree) and isinstance(plain, xarray.DataTree)
    assert chunked.to_dataset().identical(plain.to_dataset())
    read = store.read(key, range(7)).values
    assert np.array_equal(np.asarray(chunked["features"].data.compute(scheduler="sync"), np.float32), read)


def test_prototypes_of_the_page_are_means_of_tokens(folder: Path) -> None:
    [block] = [b for b in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if "prototypes" in b]
    script = folder / "prototypes.py"
    script.write_text(f"{block}    np.savez('found.npz', counts=counts, prototypes=prototypes)\n")
    env = {**os.environ, "PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(folder / "found.npz")
    store, source = FeatureStore.open("STORE"), open_source("DATA")
    spec = store.spec(store.keys()[0])
    stride = round(spec.stride_tile_px)
    sums, counts = np.zeros((3, 3)), np.zeros(3, int)
    for tile in source.tiles():
        features = store.read(spec.key, [store.tiles.row_of(tile.id)]).values[0].astype(np.float32)
        mask = source.read_mask(tile)[stride // 2 :: stride, stride // 2 :: stride]
        for label in range(3):
            sums[label] += features[mask == label].sum(0)
            counts[label] += np.count_nonzero(mask == label)
    assert counts.tolist() == found["counts"].tolist() and counts.sum() == 7 * (64 // stride) ** 2
    assert np.allclose(found["prototypes"], sums / counts[:, None], rtol=1e-5)
    assert done.stdout.startswith("{'class0': ")
