"""The Python of docs/analysis.md runs as it stands on two processes, and says what plain loops say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray
from numpy.typing import NDArray

from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def build(folder: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """Return a store of 7 tiles in three groups, the last one with a hole, beside the dataset."""
    write_dataset(folder / "DATA", tiles=7, splits={"train": range(7)})
    values = {"data": folder / "DATA", "out": folder / "STORE", "teachers": ["mean"], "scales": [1.0], "codec": codec}
    build_store(BuildRequest.of({**values, "group_rows": 3}), load_teacher=load_mean_teacher)
    monkeypatch.chdir(folder)
    return FeatureStore.open("STORE")


@pytest.mark.parametrize("codec", ["float16", "int8", "pca2-int8"])
def test_dask_chunks_are_shards_and_say_what_read_says(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build(tmp_path, codec, monkeypatch)
    key = store.keys()[0]
    plain, chunked = store.to_xarray()[str(key)], store.to_xarray(chunks="shard")[str(key)]
    assert chunked["features"].chunks == ((3, 3, 1), *((n,) for n in plain["features"].shape[1:]))
    assert isinstance(chunked, xarray.DataTree) and isinstance(plain, xarray.DataTree)
    assert chunked.to_dataset().identical(plain.to_dataset())
    array, read = store.to_dataarray(key), store.read(key, range(7)).values
    assert array.dims == ("tile", "y", "x", "channel") and array.dtype == np.float16
    assert array.chunks == ((3, 3, 1), *((n,) for n in read.shape[1:]))
    assert array["tile"].values.tolist() == store.tiles.ids and array["y"].values[0] == store.spec(key).offset_tile_px
    assert np.array_equal(array.data.compute(scheduler="sync"), read)
    one = array.sel(tile="t003").data.compute(scheduler="sync")
    assert np.array_equal(one, store.read(key, [store.tiles.row_of("t003")]).values[0])


def test_tokens_that_are_not_built_are_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(tmp_path, "int8", monkeypatch)
    key = store.keys()[0]
    for shard in Path("STORE").glob(f"zarr/{key}/*/c/1"):  # a group that nobody has come to
        shard.rename(tmp_path / shard.parts[-3])
    missing = np.isnan(store.to_dataarray(key).data.compute(scheduler="sync")).all((1, 2, 3))
    assert missing.tolist() == [False, False, False, True, True, True, False]


def test_what_the_page_computes_is_what_plain_loops_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(tmp_path, "int8", monkeypatch)
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    kept = "counts=counts, means=means, cosines=[f[0] for f in found], tiles=[f[1] for f in found]"
    kept += ", places=[f[2:] for f in found], centres=centres, spread=spread"
    script = tmp_path / "analysis.py"
    script.write_text(f"{code}        np.savez('found.npz', {kept})\n")
    env = {**os.environ, "PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'class0': ")
    found = np.load(tmp_path / "found.npz")
    key = store.keys()[0]
    maps = store.read(key, range(7)).values.astype(np.float32)
    check_prototypes(store, maps, found["means"], found["counts"])
    query = maps[store.tiles.row_of("t003"), 1, 2]
    cosine = maps @ query / np.linalg.norm(maps, axis=-1) / np.linalg.norm(query)
    assert np.allclose(found["cosines"], np.sort(cosine.ravel())[::-1][:5], atol=1e-6)
    assert found["tiles"][0] == "t003" and found["places"][0].tolist() == [1, 2]
    for value, tile, (y, x) in zip(found["cosines"], found["tiles"], found["places"], strict=True):
        assert np.isclose(cosine[store.tiles.row_of(tile), y, x], value, atol=1e-6)
    mean, std = store.stats(key)
    check_clusters((maps.reshape(-1, 3) - mean) / std, found["centres"], found["spread"])


def check_prototypes(
    store: FeatureStore, maps: NDArray[np.float32], means: NDArray[np.float64], counts: NDArray[np.int64]
) -> None:
    source, stride = open_source("DATA"), round(store.spec(store.keys()[0]).stride_tile_px)
    sums, expected = np.zeros((3, 3)), np.zeros(3, int)
    for tile in source.tiles():
        mask = source.read_mask(tile)[stride // 2 :: stride, stride // 2 :: stride]
        for label in range(3):
            sums[label] += maps[store.tiles.row_of(tile.id)][mask == label].sum(0)
            expected[label] += np.count_nonzero(mask == label)
    assert counts.tolist() == expected.tolist() and counts.sum() == 7 * (64 // stride) ** 2
    assert np.allclose(means, sums / expected[:, None], rtol=1e-5)


def check_clusters(tokens: NDArray[np.float32], centres: NDArray[np.float64], spread: NDArray[np.float64]) -> None:
    """Rounds never make it worse, and one more plain round from where they ended is what Lloyd's algorithm does."""
    assert centres.shape == (4, 3) and len(spread) > 1
    assert np.all(np.diff(spread) <= 1e-9) and spread[-1] < spread[0]
    nearest = ((tokens[:, None] - centres) ** 2).sum(-1).argmin(1)
    mine = float(((tokens - centres[nearest]) ** 2).sum(1).mean())
    assert mine <= spread[-1] * (1 + 1e-5) and np.bincount(nearest, minlength=4).min() > 0
