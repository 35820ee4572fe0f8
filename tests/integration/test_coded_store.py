"""Stores of codes: int8 and PCA with a scale per token, calibrations, compressors, in all that a store goes through."""

from __future__ import annotations

import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import xarray
import zarr

from rsmtdf_cache.build import build_store
from rsmtdf_cache.calibrate import sample_rows
from rsmtdf_cache.codecs.compressors import compress
from rsmtdf_cache.errors import DataError, FindingsError, MismatchError, UsageError
from rsmtdf_cache.layout import shard_layout
from rsmtdf_cache.quality import Quality
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.share.pull import pull_store
from rsmtdf_cache.share.push import push_store
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.upkeep.gc import collect, drop_arrays
from rsmtdf_cache.upkeep.merge import merge_stores
from rsmtdf_cache.upkeep.recompute import recompute_sample
from rsmtdf_cache.upkeep.repair import UnrepairedError, repair_store
from rsmtdf_cache.verify import verify_store
from rsmtdf_cache.views import Box
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.recipe import Recipe
from tests.datasets import write_dataset, write_split

pytestmark = pytest.mark.usefixtures("one_thread")

CODINGS = {"int8": "int8", "pca": "pca24-int8", "packed": "int8"}
TEACHER = "timm:test_resnet,pretrained=none,layers=stage3+stage4,scales=1"
KEY = FeatureKey.parse("timm-test_resnet/s64o0/stage3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("coded") / "data", tiles=18, tile_px=64)


def build(data: Path, out: Path, codec: str = "int8", teacher: str = TEACHER, **more: object) -> Path:
    values = {"data": data, "out": out, "teachers": [teacher], "group_rows": 5, "threads": 1, "micro_batch": 4}
    build_store(BuildRequest.of({**values, "codec": codec, **more}))
    return out


@pytest.fixture(scope="module")
def plain(data: Path) -> Path:
    return build(data, data.parent / "float16", "float16")


@pytest.fixture(scope="module")
def coded(data: Path) -> dict[str, Path]:
    packed = {"packed": "blosc:lz4:5:bitshuffle"}
    return {n: build(data, data.parent / n, c, compressor=packed.get(n, "none")) for n, c in CODINGS.items()}


def files(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def flip(path: Path, position: int = 40) -> None:
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", CODINGS)
def test_features_come_back_and_the_recorded_quality_is_that_of_the_held_out_tiles(
    name: str, plain: Path, coded: dict[str, Path]
) -> None:
    true, store = FeatureStore.open(plain), FeatureStore.open(coded[name])
    for key in store.keys():
        rows = range(len(store.tiles))
        original, found = true.read(key, rows), store.read(key, rows)
        assert found.valid.all() and found.values.dtype == np.float16
        fitted, held = sample_rows(store.tiles, rows)
        assert not set(fitted) & set(held) and len(fitted) + len(held) == 12
        seen = Quality.of(original.values[held], found.values[held])
        record = store.ledger.sets[store.ledger.set_of(key)].quality[key.layer]
        # The record compares with float32 features, this test with float16 ones.
        assert record.tiles == len(held) and record.held_out
        assert record.cosine == pytest.approx(seen.cosine, abs=2e-5)
        assert record.standardised == pytest.approx(seen.standardised, abs=1e-4)
        assert record.cosine_worst <= record.cosine <= 1
        if name != "pca":
            assert record.cosine > 0.9995


@pytest.mark.parametrize("name", CODINGS)
def test_a_stranger_with_plain_zarr_and_xarray_gets_the_same_features(name: str, coded: dict[str, Path]) -> None:
    store = FeatureStore.open(coded[name])
    tree = xarray.open_datatree(store.paths.zarr, engine="zarr")
    for key in store.keys():
        node, group = tree[str(key)], zarr.open_group(store.paths.zarr, mode="r")
        codes, scale = (np.asarray(group[f"{key}/{part}"][...]) for part in ("features", "scale"))  # type: ignore[index]
        own = store.read_codes(key, range(len(store.tiles)))
        assert codes.dtype == np.int8 and codes.tobytes() == own.values.tobytes()
        assert own.scale is not None and scale.tobytes() == own.scale.tobytes()
        z = codes.astype(np.float32) * scale[..., None].astype(np.float32)
        gain, offset = np.asarray(node["gain"]), np.asarray(node["offset"])
        features = (z @ gain if gain.ndim == 2 else z * gain) + offset
        wanted = store.read(key, range(len(store.tiles))).values
        assert np.allclose(features, wanted, rtol=2e-3, atol=1e-3 * np.abs(wanted).max())
        assert node["scale"].dims == ("tile", "y", "x")
        assert node["features"].dims[-1] == ("component" if name == "pca" else "channel")
        assert node["features"].attrs["quality"]["tiles"] == 3


def test_a_row_without_features_has_a_nan_scale_for_everyone(data: Path, tmp_path: Path) -> None:
    store = build(data, tmp_path / "s")
    build(data, store, teacher=TEACHER.replace("stage3+stage4", "stage3"), splits=["train", "val"])
    found = FeatureStore.open(store)
    other = FeatureKey.parse("timm-test_resnet/s64o0/stage4")
    hole = next(row for row, record in enumerate(found.tiles.records) if record is None)
    missing = [hole]
    assert not found.read(other, missing).valid.any() and np.isnan(found.read(other, missing).values).all()
    scales = np.asarray(xarray.open_datatree(found.paths.zarr, engine="zarr")[f"{other}/scale"])
    assert np.isnan(scales[hole]).all() and np.isfinite(np.delete(scales, hole, 0)[:12]).all()


@pytest.mark.parametrize("name", CODINGS)
def test_crops_of_codes_are_exact(name: str, coded: dict[str, Path]) -> None:
    store = FeatureStore.open(coded[name])
    whole = store.read(KEY, [1, 4])
    stride = int(store.spec(KEY).stride_tile_px)
    boxes = [Box(0, stride, 2 * stride, 2 * stride), Box(stride, 0, 2 * stride, 2 * stride)]
    crops = store.read(KEY, [1, 4], boxes)
    assert crops.values[0].tobytes() == whole.values[0, 0:2, 1:3].tobytes()
    assert crops.values[1].tobytes() == whole.values[1, 1:3, 0:2].tobytes()


def test_a_second_build_computes_the_same_bytes(data: Path, coded: dict[str, Path], tmp_path: Path) -> None:
    for name in ("int8", "pca"):
        again = build(data, tmp_path / name, CODINGS[name])
        assert files(again) == files(coded[name])


def test_an_append_and_another_orientation_keep_the_calibration(data: Path, tmp_path: Path) -> None:
    store = build(data, tmp_path / "s")
    before = {p for p in files(store) if "calibrations" in p}
    build(data, store, splits=["train", "val", "test"])
    build(data, store, teacher=f"{TEACHER},orientations=2")
    assert {p for p in files(store) if "calibrations" in p} == before and len(before) == 2
    assert verify_store(store, deep=True) == []
    turned, upright = (f"timm-test_resnet/s64o{o}/stage3" for o in (4, 0))
    found = {a["key"]: a["calibration"] for a in FeatureStore.open(store).describe()["arrays"]}
    assert found[turned] == found[upright] != ""


def test_another_codec_for_the_same_array_is_refused_with_the_field(data: Path, coded: dict[str, Path]) -> None:
    before = files(coded["int8"])
    for codec, field in (("float16", "encoding.codec"), ("pca24-int8", "encoding.codec")):
        with pytest.raises(MismatchError, match=field):
            build(data, coded["int8"], codec)
    with pytest.raises(MismatchError, match=r"encoding\.parameters\.components"):
        build(data, coded["pca"], "pca25-int8")
    with pytest.raises(UsageError, match="1 <= K <= "):
        build(data, data.parent / "wide", "pca4096-int8")
    assert files(coded["int8"]) == before and not (data.parent / "wide").exists()


def test_halves_merge_when_they_share_a_calibration_and_are_refused_otherwise(data: Path, tmp_path: Path) -> None:
    left = write_dataset(tmp_path / "l", 18, splits={"train": range(9), "val": range(9, 18)}, labeled={})
    right = write_dataset(tmp_path / "r", 18, splits={"train": range(9, 18), "val": range(9)}, labeled={})
    a = build(left, tmp_path / "a")
    alone, shared = build(right, tmp_path / "b"), build(right, tmp_path / "c", calibration=[a])
    with pytest.raises(MismatchError, match="calibrated differently"):
        merge_stores(a, alone, tmp_path / "no")
    merge_stores(a, shared, tmp_path / "union")
    assert verify_store(tmp_path / "union", deep=True) == []
    union = FeatureStore.open(tmp_path / "union")
    for place in (a, shared):
        part = FeatureStore.open(place)
        for row, record in enumerate(part.tiles.records):
            assert record is not None
            here = union.stored(KEY, union.tiles.row_of(record.id))
            there = part.stored(KEY, row)
            assert here is not None and there is not None and here.tobytes() == there.tobytes()
    with pytest.raises(MismatchError, match="--calibration"):
        build(left, tmp_path / "d", teacher=TEACHER.replace("none", "none,seed=3"), calibration=[a])
    with pytest.raises(UsageError, match="no calibration is there"):
        build(left, tmp_path / "d", calibration=[tmp_path / "nowhere.safetensors"])


def test_codes_are_part_of_the_snapshot_and_so_is_what_they_mean(coded: dict[str, Path], tmp_path: Path) -> None:
    ledger = FeatureStore.open(coded["int8"]).ledger
    root = ledger.snapshot()
    other = {layer: "0" * 64 for layer in next(iter(ledger.sets.values())).calibrations}
    name, record = next(iter(ledger.sets.items()))
    object.__setattr__(record, "calibrations", other)
    assert ledger.snapshot() != root and name in ledger.sets


@pytest.mark.parametrize("part", ["features", "scale"])
@pytest.mark.parametrize("name", CODINGS)
def test_damage_to_either_part_is_found_read_never_and_repaired_to_the_same_bytes(
    name: str, part: str, data: Path, coded: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(coded[name], tmp_path / "s"))
    sound = files(store)
    shard = sorted((store / "zarr" / str(KEY) / part / "c").rglob("*"))[-1]
    flip(shard)
    name_of = shard.relative_to(store).as_posix()
    assert [f.path for f in verify_store(store, deep=True)] == [name_of]
    with pytest.raises(FindingsError, match="sha256 differs"):
        reader = FeatureStore.open(store, verify_reads="always")
        reader.read(KEY, range(len(reader.tiles)))
    report = repair_store(store, data)
    assert name_of in {r.path for r in report.done if "reproduced" in r.action}
    assert files(store) == sound


def test_a_lost_or_damaged_calibration_is_named_and_its_arrays_are_refused(
    data: Path, coded: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(coded["pca"], tmp_path / "s"))
    artefact = sorted((store / "ledger" / "calibrations").iterdir())[0]
    sound = artefact.read_bytes()
    for damage in ("flipped", "lost"):
        flip(artefact, 5000) if damage == "flipped" else artefact.unlink()
        assert artefact.relative_to(store).as_posix() in {f.path for f in verify_store(store)}
        before = files(store)
        for use in (
            FeatureStore.open,
            collect,
            lambda s: drop_arrays(s, ["*/*/stage4"]),
            lambda s: build(data, s, "pca24-int8"),
        ):
            with pytest.raises(FindingsError, match="the ledger has lost the calibration"):
                use(store)
        with pytest.raises(FindingsError, match="the ledger has lost the calibration"):
            push_store(store, str(tmp_path / damage))
        assert files(store) == before
        with pytest.raises((FindingsError, UnrepairedError), match="calibration"):
            repair_store(store, data)
        artefact.write_bytes(sound)
        assert verify_store(store, deep=True) == []


def test_recompute_finds_equal_bytes(data: Path, coded: dict[str, Path]) -> None:
    for store in coded.values():
        seen, faults = recompute_sample(store, data, 6)
        assert faults == [] and all(r.equal and r.cosine > 0.999999 for r in seen)


def test_both_parts_and_the_calibration_travel(coded: dict[str, Path], tmp_path: Path) -> None:
    for name, store in coded.items():
        push_store(store, str(tmp_path / f"{name}-there"))
        pull_store(str(tmp_path / f"{name}-there"), tmp_path / f"{name}-back")
        assert verify_store(tmp_path / f"{name}-back", deep=True) == []
        mine, back = FeatureStore.open(store), FeatureStore.open(tmp_path / f"{name}-back")
        assert back.snapshot == mine.snapshot
        rows = range(len(mine.tiles))
        assert back.read(KEY, rows).values.tobytes() == mine.read(KEY, rows).values.tobytes()


def test_a_copy_into_a_store_of_another_calibration_is_refused(data: Path, tmp_path: Path) -> None:
    left = write_dataset(tmp_path / "l", 18, splits={"train": range(9), "val": range(9, 18)}, labeled={})
    a, b = build(left, tmp_path / "a"), build(left, tmp_path / "b")
    given = build(data, tmp_path / "c")
    c = build(left, tmp_path / "d", calibration=[given])
    assert pull_store(str(a), b).plan.shards == 0
    with pytest.raises(MismatchError, match="calibration"):
        pull_store(str(a), c)


def test_a_collection_takes_scales_and_calibrations_of_dropped_arrays_and_no_others(
    coded: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(coded["int8"], tmp_path / "s"))
    drop_arrays(store, ["*/*/*"])
    collect(store)
    left = {p for p in files(store) if ("/c/" in p and p.startswith("zarr/timm")) or "calibrations" in p}
    assert left == set() and verify_store(store, deep=True) == []


def test_compressed_shards_are_smaller_and_hold_the_same_codes(coded: dict[str, Path]) -> None:
    packed, raw = FeatureStore.open(coded["packed"]), FeatureStore.open(coded["int8"])
    rows = range(len(raw.tiles))
    for key in raw.keys():
        assert packed.read_codes(key, rows).tobytes() == raw.read_codes(key, rows).tobytes()
        assert packed.describe()["arrays"][0]["codec"] == "int8+blosc:lz4:5:bitshuffle"


@pytest.mark.parametrize("name", CODINGS)
def test_training_batches_carry_codes_and_decode_to_the_standardised_features(
    name: str, data: Path, coded: dict[str, Path]
) -> None:
    store = FeatureStore.open(coded[name])
    recipe = Recipe.model_validate(
        {"data": data, "crop_px": 64, "labeled": "5", "batch": {"labeled": 2, "unlabeled": 3}}
    )
    loader = BatchLoader.open(open_source(data), recipe, store, 1)
    assert loader.unlabeled is not None and loader.targets is not None
    batch, draws = loader.batch(2), loader.unlabeled.draws(2, 3)
    assert batch.unlabeled is not None and not batch.unlabeled.targets.features
    decoded = batch.unlabeled.targets.decoded(torch.device("cpu"))
    for key, spec in loader.targets.specs.items():
        travelling = batch.unlabeled.targets.codes[key]
        assert travelling.values.dtype == torch.int8 and travelling.scale is not None
        rows = [store.tiles.row_of(d.tile_id) for d in draws]
        own = next(k for k in store.keys() if k.layer == key.rsplit("/", 1)[1])
        wanted = (store.read(own, rows, [d.box for d in draws]).values.astype(np.float32) - spec.mean) / spec.std
        assert np.allclose(decoded.features[key].numpy(), wanted, rtol=2e-3, atol=5e-3)
        assert bool((decoded.weights[key] == 1).all())


def test_the_command_that_a_run_prints_for_missing_tiles_names_the_codec(
    data: Path, coded: dict[str, Path], tmp_path: Path
) -> None:
    more = Path(shutil.copytree(data, tmp_path / "data"))
    write_split(more, "train", [f"t{n:03}" for n in range(13)])
    for name, option in (("int8", ",codec=int8,"), ("pca", ",codec=pca24-int8,"), ("packed", "blosc:lz4:5:bitshuffle")):
        recipe = Recipe.model_validate({"data": more, "crop_px": 64, "labeled": "5"})
        with pytest.raises(MismatchError, match="lacks 1 of them") as caught:
            BatchLoader.open(open_source(more), recipe, FeatureStore.open(coded[name]), 1)
        assert option in str(caught.value)


def test_a_given_calibration_is_used_or_refused_never_left_aside(
    data: Path, coded: dict[str, Path], tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other", 9, seed=4, splits={"train": range(9)}, labeled={})
    foreign, store = build(other, tmp_path / "foreign"), Path(shutil.copytree(coded["int8"], tmp_path / "s"))
    before = files(store)
    for teacher in (TEACHER, f"{TEACHER},orientations=2"):  # nothing to do, and an orientation more
        with pytest.raises(MismatchError, match="with another calibration"):
            build(data, store, teacher=teacher, calibration=[foreign])
    with pytest.raises(UsageError, match="two different ones"):
        build(data, tmp_path / "new", calibration=[foreign, coded["int8"]])
    with pytest.raises(UsageError, match="nothing of this build is calibrated"):
        build(data, tmp_path / "new", "float16", calibration=[foreign])
    artefact = sorted((foreign / "ledger" / "calibrations").iterdir())[0]
    flip(artefact, artefact.stat().st_size - 9)
    with pytest.raises(DataError, match="its sha256 is not its name"):
        build(data, tmp_path / "new", calibration=[foreign])
    assert files(store) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("compressor", ["zstd:1", "blosc:lz4:1:shuffle"])
def test_a_compressed_chunk_that_holds_less_or_lies_is_a_finding_not_memory(
    compressor: str, data: Path, tmp_path: Path
) -> None:
    """The shard's sha256 is made to fit: a hostile store says whatever it likes of its own bytes."""
    store = build(data, tmp_path / "s", compressor=compressor, teacher=TEACHER.replace("stage3+stage4", "stage3"))
    shard = store / "zarr" / str(KEY) / "features/c/0/0/0/0"
    layout = shard_layout(FeatureStore.open(store).spec(KEY), 5)
    sound = ShardReader(shard, layout)
    short = compress(compressor, np.zeros(layout.chunk_nbytes // 2, np.int8))
    assert len(short) <= int(sound._lengths[0, 0, 0])
    liar = short[:12] + (2**31 - 1).to_bytes(4, "little") + short[16:]  # Blosc: its compressed size
    for chunk in (short, liar, short[:8], b""):
        raw = bytearray(shard.read_bytes())
        offset = int(sound._offsets[0, 0, 0])
        raw[offset : offset + len(chunk)] = chunk
        index = np.frombuffer(bytes(raw[-layout.index_nbytes : -4]), "<u8").copy()
        index[1] = len(chunk)
        raw[-layout.index_nbytes :] = index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")
        broken = tmp_path / "broken"
        broken.write_bytes(raw)
        with pytest.raises(FindingsError, match="a chunk cannot be decompressed"):
            ShardReader(broken, layout).read(0, 0, 0, np.empty((4, 4, layout.channels), np.int8))
        with pytest.raises(FindingsError, match="a chunk cannot be decompressed"):
            ShardReader(broken, layout).check_chunks()
