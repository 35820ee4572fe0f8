"""A store of codes that was committed long ago reads today, by this package and by FORMAT.md alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from safetensors.numpy import load_file

from rsmtdf_cache.codecs import parse_codec
from rsmtdf_cache.specs import FeatureKey, digest_of
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.verify import verify_store

GOLDEN = Path(__file__).parents[1] / "golden"
STORE = GOLDEN / "codes"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "codes.json").read_text())
KEYS = [FeatureKey.parse(f"{teacher}/s64o0/mean8") for teacher in ("plain", "packed", "projected")]


def test_it_is_whole_and_has_the_snapshot_it_had() -> None:
    assert verify_store(STORE, deep=True) == []
    assert FeatureStore.open(STORE).snapshot == EXPECTED["snapshot"]
    assert sum(p.stat().st_size for p in STORE.rglob("*") if p.is_file()) < 400_000


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_features_are_those_of_the_teacher_as_far_as_the_codec_keeps_them(key: FeatureKey) -> None:
    store = FeatureStore.open(STORE)
    for tile_id, cells in EXPECTED["mean8"].items():
        found = store.read(key, [store.tiles.row_of(tile_id)]).values[0].astype(float)
        wanted = np.asarray(cells)
        if key.teacher == "projected":  # two of three components
            assert np.linalg.norm(found - wanted) < 0.25 * np.linalg.norm(wanted - wanted.mean((0, 1)))
        else:
            assert np.abs(found - wanted).max() < 1.0  # of 255


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_reader_written_from_the_page_gets_the_same_features(key: FeatureKey) -> None:
    store = FeatureStore.open(STORE)
    root = zarr.open_group(STORE / "zarr", mode="r")
    codes, scale = (np.asarray(root[f"{key}/{part}"][...]) for part in ("features", "scale"))  # type: ignore[index]
    records = [json.loads(p.read_text()) for p in sorted((STORE / "ledger" / "sets").glob("*.json"))]
    (record,) = [r for r in records if any(s["teacher"]["name"] == key.teacher for s in r["arrays"])
                 and all(s["view"]["orientation"] == 0 and "crop" not in s["view"] for s in r["arrays"])]  # fmt: skip
    name = record["calibrations"][key.layer]
    artefact = STORE / "ledger" / "calibrations" / f"{name}.safetensors"
    assert hashlib.sha256(artefact.read_bytes()).hexdigest() == name
    known = {k: v.astype(np.float64) for k, v in load_file(artefact).items()}
    spread = np.maximum(known["std"], 0.01 * np.sqrt(np.mean(known["std"] ** 2)))
    z = codes * scale[..., None].astype(np.float64)
    if key.teacher == "projected":
        d = np.sqrt(known["variances"])
        gain = known["basis"] * spread * np.maximum(d, 0.001 * max(d[0], 1e-6))[:, None]
        features = z @ gain + known["mean"]
    else:
        features = z * spread + known["mean"]
    assert np.allclose(features, store.read(key, range(len(store.tiles))).values, rtol=1e-3, atol=0.05)


def test_the_snapshot_root_can_be_computed_from_the_page() -> None:
    shards, calibrations, units = [], {}, {}
    for path in sorted((STORE / "ledger" / "sets").glob("*.json")):
        record = json.loads(path.read_text())
        units[path.stem] = record
        for spec in record["arrays"]:
            view = next(v for v, body in EXPECTED["views"].items() if body == spec["view"])
            name = f"{spec['teacher']['name']}/{view}/{spec['layer']['name']}"
            calibrations[name] = record["calibrations"][spec["layer"]["name"]]
    for path in sorted((STORE / "ledger" / "commits").glob("*/*.json")):
        commit = json.loads(path.read_text())
        shards += [[s["path"], s["sha256"], commit["start"], commit["stop"]] for s in commit["shards"]]
    tiles = FeatureStore.open(STORE).tiles.digest()
    root = digest_of({"shards": sorted(shards), "tiles": tiles, "calibrations": calibrations})
    assert root == EXPECTED["snapshot"]
    assert any("/scale/c/" in path for path, *_ in shards)


def test_fixed_views_have_the_parameters_they_were_stored_with() -> None:
    store = FeatureStore.open(STORE)
    fixed = [k for k in store.keys() if not store.spec(k).view.is_whole and k.layer == "mean8"]
    assert len(fixed) == 2 and {k.view for k in fixed} == set(EXPECTED["shown"])
    for key in fixed:
        assert store.spec(key).view.to_json() == EXPECTED["views"][key.view]
        for tile_id, colour in EXPECTED["shown"][key.view].items():
            found = store.read(key, [store.tiles.row_of(tile_id)]).values[0].astype(float).mean((0, 1))
            assert np.abs(found - colour).max() < 1.0


def test_codec_names_in_old_stores_stay_known() -> None:
    assert parse_codec("pca2-int8").codec == "pca-int8" and parse_codec("int8").codec == "int8"
