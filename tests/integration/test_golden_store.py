"""A store that was committed long ago opens today: with plain zarr, with xarray, by FORMAT.md alone, and with ours."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsmtdf_cache.errors import MismatchError
from rsmtdf_cache.files import replace_json
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.verify import verify_store

GOLDEN = Path(__file__).parents[1] / "golden"
STORE = GOLDEN / "store"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "store.json").read_text())
ROWS = ["t000", "t001", "t002", "t003", "", "", "t004", "t005", "t006"]


def features(tile_id: str) -> np.ndarray[Any, Any]:
    """Mean RGB of the 8-px cells of a golden tile, as float16, computed from its pixels when the store was made."""
    return np.asarray(EXPECTED["mean8"][tile_id], np.float16)


def test_the_golden_store_is_small() -> None:
    assert 20_000 < sum(p.stat().st_size for p in STORE.rglob("*") if p.is_file()) < 200_000


@pytest.mark.parametrize("reader", ["zarr", "xarray"])
def test_plain_readers_open_it_without_this_package_and_without_warnings(reader: str) -> None:
    code = {
        "zarr": "import zarr; g = zarr.open_group(S, mode='r'); a = g['mean/s32o0/mean8/features']; v = a[:]\n"
        "ids = g['tile'][:]; names = a.metadata.dimension_names; attrs = dict(a.attrs)",
        "xarray": "import xarray; g = xarray.open_datatree(S, engine='zarr')['mean/s32o0/mean8']; a = g['features']\n"
        "ids = a['tile'].values; v = a.values; names = a.dims; attrs = a.attrs\n"
        "assert list(a['y'].values) == [4, 12, 20, 28]",
    }[reader]
    script = (
        f"import sys, json, warnings; warnings.simplefilter('error'); S = {str(STORE / 'zarr')!r}\n{code}\n"
        "assert not any(m.startswith('rsmtdf') for m in sys.modules)\n"
        "print(json.dumps({'ids': [str(i) for i in ids], 'values': v.astype(float).tolist(), 'names': list(names),"
        " 'attrs': {k: attrs[k] for k in ('teacher', 'layer', 'stride_tile_px', 'offset_tile_px', 'codec')}}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == ROWS and found["names"] == ["tile", "y", "x", "channel"]
    assert found["attrs"] == {
        "teacher": "mean", "layer": "mean8", "stride_tile_px": 8.0, "offset_tile_px": 4.0, "codec": "float16",
    }  # fmt: skip
    for tile_id, values in zip(ROWS, np.asarray(found["values"]), strict=True):
        if tile_id:
            assert np.array_equal(values.astype(np.float16), features(tile_id))
        else:
            assert np.isnan(values).all()


def test_a_stranger_reads_it_by_the_format_page_with_the_standard_library() -> None:
    """Checksums, names, commits from records and segments, shard index and snapshot root, straight from FORMAT.md."""
    import pyarrow.parquet as pq

    def canonical(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def record(path: Path) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(path.read_text())
        checksum = body.pop("checksum")
        assert hashlib.sha256(canonical(body)).hexdigest() == checksum, path
        return body

    ledger = STORE / "ledger"
    manifest, head = record(STORE / "manifest.json"), record(ledger / "head.json")
    assert (manifest["format"], manifest["version"]) == ("rsmtdf-feature-store", 1)
    for name, facts in head["files"].items():
        data = (STORE / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["nbytes"], facts["sha256"])
    rows: list[list[str] | None] = []
    for path in sorted((ledger / "tiles").glob("*.json")):
        segment = record(path)
        rows += [None] * (segment["first_row"] - len(rows))
        table = pq.read_table(path.parent / segment["file"]).to_pydict()
        rows += [[i, d.hex()] for i, d in zip(table["id"], table["digest"], strict=True)]
    dropped = [tuple(pair) for pair in record(ledger / "dropped.json")["arrays"]]
    shards = []
    for path in sorted((ledger / "commits").glob("*/*.json")):
        commit = record(path)
        for shard in commit["shards"]:
            shards.append(
                (commit["set"], shard["layer"], shard["path"], shard["sha256"], commit["start"], commit["stop"])
            )
    for path in (ledger / "segments").glob("*.parquet"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        columns = pq.read_table(path).to_pydict()
        names = ("set", "layer", "path", "sha256", "start", "stop")
        for name, layer, place, digest, start, stop in zip(*(columns[c] for c in names), strict=True):
            shards.append((name, layer, place, digest.hex(), start, stop))
    counted = sorted([s[2], s[3], s[4], s[5]] for s in shards if s[:2] not in dropped)
    tiles = hashlib.sha256(canonical([r for r in rows])).hexdigest()
    root = hashlib.sha256(canonical({"shards": counted, "tiles": tiles})).hexdigest()
    assert root == head["snapshot"] == EXPECTED["snapshot"]
    for _, _, place, digest, _, _ in shards:
        assert hashlib.sha256((STORE / place).read_bytes()).hexdigest() == digest
    data = (STORE / "zarr/mean/s32o0/mean8/features/c/2/0/0/0").read_bytes()
    index = np.frombuffer(data[-(3 * 16 + 4) : -4], "<u8").reshape(3, 2)
    for tile_id, (offset, nbytes) in zip(ROWS[6:], index.tolist(), strict=True):
        assert np.array_equal(np.frombuffer(data, "<f2", nbytes // 2, offset).reshape(4, 4, 3), features(tile_id))


def test_our_reader_agrees_and_shows_the_snapshot_of_then(tmp_path: Path) -> None:
    assert verify_store(STORE, deep=True) == []
    now = FeatureStore.open(STORE)
    assert now.snapshot == EXPECTED["snapshot"] and now.tiles.ids == ROWS
    assert [str(k) for k in now.keys()] == ["mean/s32o0/mean16", "mean/s32o0/mean8", "mean/s32o4/mean8"]
    key = FeatureKey.parse("mean/s32o0/mean8")
    for row, tile_id in enumerate(ROWS):
        if tile_id:
            assert np.array_equal(now.read(key, [row]).values[0], features(tile_id))
    then = FeatureStore.open(f"{STORE}@{EXPECTED['first_snapshot'][:12]}")
    assert then.snapshot == EXPECTED["first_snapshot"] != now.snapshot
    assert len(then.tiles) == 4 and len(then.keys()) == 4
    turned = FeatureKey.parse("mean/s32o4/mean8")
    assert np.array_equal(then.read(turned, [1]).values[0], features("t001")[:, ::-1])


def test_a_newer_format_is_refused_with_the_version_it_needs(tmp_path: Path) -> None:
    copy = shutil.copytree(STORE, tmp_path / "s")
    body = json.loads((copy / "manifest.json").read_text())
    del body["checksum"]
    replace_json(copy / "manifest.json", {**body, "version": 2})
    with pytest.raises(MismatchError, match=r"format version 2.*reads up to 1.*install a newer"):
        FeatureStore.open(copy)


def test_our_xarray_view_has_labels_and_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = FeatureStore.open(STORE).to_xarray()
    assert tree["mean/s32o0/mean8"]["features"].dims == ("tile", "y", "x", "channel")
    assert tree.attrs["version"] == 1
