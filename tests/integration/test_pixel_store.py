"""Pixels in a store: the dataset's own, bit for bit, and one with features in everything that happens to a store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray

from rsmtdf_cache import files
from rsmtdf_cache.build import BuildReport, build_store
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.estimate import plan_build
from rsmtdf_cache.head import load_whole, write_head
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.pixels import PIXEL_PROFILE, pixel_specs
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.shard import ShardLayout, ShardReader, ShardWriter
from rsmtdf_cache.share.pull import pull_store
from rsmtdf_cache.share.push import push_store
from rsmtdf_cache.share.select import Selection
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.stored_pixels import StoredPixels
from rsmtdf_cache.upkeep.gc import collect, drop_arrays
from rsmtdf_cache.upkeep.merge import merge_stores
from rsmtdf_cache.upkeep.recompute import recompute_sample
from rsmtdf_cache.upkeep.repair import repair_store
from rsmtdf_cache.verify import verify_store
from rsmtdf_cache.writer import UnitWriter
from rsmtdf_train.targets.stored import store_geometry, target_specs
from tests.command_line import call, call_json
from tests.datasets import write_dataset, write_split
from tests.scene_sets import classes_file, write_pair
from tests.teachers import load_mean_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

SHARD = "zarr/pixels/s64o0/rgb/features/c/{}/0/0/0"


def build(data: Path, out: Path, teachers: tuple[str, ...] = ("mean",), **values: object) -> BuildReport:
    asked = {"data": data, "out": out, "teachers": teachers, "group_rows": 3, "threads": 1, "micro_batch": 2}
    return build_store(BuildRequest.of({"pixels": True, **asked, **values}), load_teacher=load_mean_teacher)


def no_teacher(*_: object, **__: object) -> None:
    raise AssertionError("a teacher was loaded")


def content(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def require_same_pixels(store: Path, data: Path, count: int) -> int:
    """Assert that ``count`` tiles of a store have the dataset's pixels; return how many pixels of them lack data."""
    opened, source = FeatureStore.open(store), open_source(data)
    pixels, holes, seen = StoredPixels.of(opened), 0, 0
    assert pixels is not None
    for tile in source.tiles():
        if tile.id not in pixels:
            continue
        image, valid = source.read_valid(tile)
        held = pixels.valid(tile.id)
        assert np.array_equal(pixels.image(tile.id), image) and (held is None) == (valid is None)
        assert held is None or valid is None or np.array_equal(held, valid)
        holes += 0 if valid is None else int((~valid).sum())
        seen += 1
    assert seen == count
    return holes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("pixels") / "data", tiles=12, tile_px=64, georeference=True)


@pytest.fixture(scope="module")
def built(data: Path) -> Path:
    build(data, data.parent / "store")
    return data.parent / "store"


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "store"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes with a hole, cut to tiles that also reach beyond them."""
    root = tmp_path_factory.mktemp("scenes")
    for n, name in enumerate(("north", "south")):
        pixels, _ = write_pair(root, name, 150, 200, seed=n, dtype="uint16", bands=3, factor=35, nodata=0)
        pixels[:, 60:90, :70] = 0
        with rasterio.open(root / "images" / f"{name}.tif", "r+") as file:
            file.write(pixels)
    code, _, err = call(
        "data", "tile", root / "images", "--labels", root / "labels", "--classes", classes_file(root), "--tile", 64,
        "--scale", "200,9000", "--out", root / "tiles", "--test", "0", "--val", "0",
    )  # fmt: skip
    assert code == 0, err
    return root / "tiles"


def test_stored_pixels_are_those_of_the_files_and_lie_in_the_mapped_shard(built: Path, data: Path) -> None:
    assert require_same_pixels(built, data, 8) == 0
    pixels = StoredPixels.of(FeatureStore.open(built))
    assert pixels is not None and not pixels.may_lack_data
    image = pixels.image("t003")
    assert not image.flags.writeable and not image.flags.owndata
    assert np.shares_memory(image, pixels.image("t003")), "each call made a copy"


def test_pixels_of_scenes_come_with_their_validity(scenes: Path, tmp_path: Path) -> None:
    count = len(open_source(scenes).tiles(["train"]))
    build(scenes, tmp_path / "store", teachers=())
    assert require_same_pixels(tmp_path / "store", scenes, count) > 2000
    assert verify_store(tmp_path / "store", deep=True) == []
    rows, faults = recompute_sample(tmp_path / "store", scenes, 6, load_teacher=no_teacher)  # type: ignore[arg-type]
    assert faults == [] and [r.equal for r in rows] == [True, True] and {r.tiles for r in rows} == {6}
    nbytes = {a["key"]: a["nbytes"] for a in FeatureStore.open(tmp_path / "store").describe()["pixels"]}
    assert nbytes["pixels/s64o0/valid"] < nbytes["pixels/s64o0/rgb"] / 10, "validity takes little"


@pytest.mark.parametrize(("side", "most"), [(64, 64), (64, 24), (50, 32), (33, 32)])
def test_boxes_of_tiles_in_few_large_chunks_are_read_exactly(tmp_path: Path, side: int, most: int) -> None:
    """As of tiles beyond 1024 px, but small: chunks of ``most`` px, none of them gathered token by token."""
    layout = ShardLayout(3, side, side, 3, np.dtype("u1"), 0, side=most)
    big = ShardLayout(3, side, side, 3, np.dtype("u1"), 0, side=max(most, 33))
    rng = np.random.default_rng(side)
    images = rng.integers(0, 256, (3, side, side, 3), np.uint8)
    for number, chosen in enumerate((layout, big)):
        path = tmp_path / f"{number}.shard"
        with ShardWriter(path, chosen) as writer:
            for row in (0, 2):
                writer.add(row, images[row])
            writer.close()
        reader = ShardReader(path, chosen)
        assert (reader.view(0) is not None) == (chosen.grid == (1, 1)) and reader.view(1) is None
        for _ in range(40):
            y, x = rng.integers(0, side, 2)
            h, w = rng.integers(1, side - y + 1), rng.integers(1, side - x + 1)
            for row in range(3):
                out = np.full((h, w, 3), 7, np.uint8)
                reader.read(row, int(y), int(x), out)
                wanted = images[row, y : y + h, x : x + w] if row != 1 else np.zeros_like(out)
                assert np.array_equal(out, wanted)


def test_xarray_shows_labelled_pixels_and_which_tiles_have_them(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "store")
    build(data, tmp_path / "store", splits=("train", "val"), pixels=False)  # rows without pixels, and holes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = xarray.open_datatree(tmp_path / "store" / "zarr", engine="zarr")
    found = tree["pixels/s64o0/rgb"]
    array = found["features"]
    assert array.dims == ("tile", "y", "x", "band") and array.dtype == np.uint8
    assert found["band"].to_numpy().tolist() == ["red", "green", "blue"]
    assert found["y"].to_numpy()[:2].tolist() == [0.5, 1.5]
    source = open_source(data)
    ids = tree["tile"].to_numpy().tolist()
    committed = dict(zip(ids, found["committed"].to_numpy().tolist(), strict=True))
    for tile in source.tiles(["train", "val"]):
        assert committed[tile.id] == (tile.split == "train")
        if tile.split == "train":
            assert np.array_equal(array[ids.index(tile.id)].to_numpy(), source.read_image(tile))


def test_pixels_join_a_store_later_without_a_teacher_and_grow_with_it(data: Path, tmp_path: Path, built: Path) -> None:
    out = tmp_path / "store"
    build(data, out, pixels=False)
    before = FeatureStore.open(out).snapshot
    build(data, out, teachers=())
    assert FeatureStore.open(out).snapshot == FeatureStore.open(built).snapshot != before
    assert FeatureStore.open(out, snapshot=before).pixel_keys() == []
    again = build(data, out, teachers=())
    assert (again.units, again.units_before) == (0, 3)
    build(data, out, teachers=(), splits=("train", "val", "test"))
    require_same_pixels(out, data, 12)
    assert verify_store(out, deep=True) == []


def test_a_plan_says_the_bytes_that_a_build_then_writes(data: Path, tmp_path: Path, scenes: Path) -> None:
    for name, source in (("tiles", data), ("scenes", scenes)):
        values = {"data": source, "out": tmp_path / name, "teachers": (), "pixels": True}
        plan = plan_build(BuildRequest.of(values), measure=False)
        report = build_store(BuildRequest.of(values))
        assert report.planned_nbytes == plan.nbytes and plan.exact == (name == "tiles")
        assert plan.nbytes == report.nbytes_shards if plan.exact else plan.nbytes > report.nbytes_shards > 0


def test_a_quarantined_tile_has_no_pixels(data: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    (broken / "images" / "t002.png").write_bytes(b"no png")
    build(broken, tmp_path / "store", teachers=())
    pixels = StoredPixels.of(FeatureStore.open(tmp_path / "store"))
    assert pixels is not None and "t002" not in pixels and "t003" in pixels and None not in pixels
    assert FeatureStore.open(tmp_path / "store").quarantined.keys() == {"t002"}


def test_killed_after_any_operation_a_build_continues_to_the_same_bytes(data: Path, tmp_path: Path) -> None:
    values = {"data": data, "teachers": (), "pixels": True, "group_rows": 3, "decoders": 1}

    def run(out: Path, observe: Callable[..., None] | None) -> int:
        child = os.fork()
        if child == 0:
            if observe is not None:
                files.observe = observe
            code = 1
            try:
                build_store(BuildRequest.of({**values, "out": out}))
                code = 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    steps = tmp_path / "steps"

    def note(*_: object) -> None:
        with steps.open("a") as file:
            file.write("x")

    assert run(tmp_path / "whole", note) == 0
    whole, total = content(tmp_path / "whole"), len(steps.read_text())
    assert total > 40
    for number, last in enumerate(range(3, total, 9)):
        out, left = tmp_path / f"cut{number}", [last]

        def observe(*_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        assert run(out, observe) == -signal.SIGKILL
        if (out / "manifest.json").is_file() and (out / "ledger" / "head.json").is_file():
            held = StoredPixels.of(FeatureStore.open(out))
            for tile in open_source(data).tiles(["train"]) if held is not None else ():
                assert held is not None
                assert tile.id not in held or np.array_equal(held.image(tile.id), open_source(data).read_image(tile))
        assert run(out, None) == 0
        assert content(out) == whole


def test_verify_finds_pixels_that_are_not_those_of_the_tile_table(data: Path, tmp_path: Path) -> None:
    """Every hash of the store is right; the pixels are other ones."""
    out = tmp_path / "store"
    build(data, out, pixels=False)
    paths, source = StorePaths(out), open_source(data)
    ledger, arrays = load_whole(paths), ArraySet(tuple(pixel_specs(source)))
    ledger.add_set(arrays, PIXEL_PROFILE)
    tiles = {t.id: t for t in source.tiles()}
    for group in range(3):
        rows = ledger.table.rows_between(3 * group, 3 * group + 3)
        with UnitWriter(ledger, arrays, group, 3, PIXEL_PROFILE) as writer:
            for row in rows:
                image = source.read_image(tiles[ledger.table.ids[row]])
                if row == 4:
                    image[10, 20, 1] ^= 1
                writer.add_stored(row, ledger.table.ids[row], {"rgb": Codes(image)})
            writer.commit(rows[-1] + 1)
    write_head(paths, load_manifest(paths), ledger)
    assert verify_store(out) == []
    (finding,) = verify_store(out, deep=True)
    assert finding.path == SHARD.format(1) and "t004" in finding.fault


def test_a_flipped_bit_is_found_and_mended_from_the_images_without_a_teacher(store: Path, data: Path) -> None:
    whole = content(store)
    for name in (SHARD.format(1), next(p for p in whole if p.startswith("ledger/commits") and "00000002" in p)):
        raw = bytearray(whole[name])
        raw[200] ^= 4
        (store / name).write_bytes(raw)
        assert verify_store(store, deep=True)
        repair_store(store, data, load_teacher=load_mean_teacher)
        assert content(store) == whole
    lone = [r for r in recompute_sample(store, data, 30, load_teacher=load_mean_teacher)[0] if "pixels" in r.key]
    assert [(r.key, r.equal, r.tiles) for r in lone] == [("pixels/s64o0/rgb", True, 8)]


def test_recompute_tells_pixels_of_another_dataset(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "store", teachers=())
    rows, faults = recompute_sample(
        tmp_path / "store", write_dataset(tmp_path / "other", tiles=12, tile_px=64, seed=9), 4,
        load_teacher=no_teacher,  # type: ignore[arg-type]
    )  # fmt: skip
    assert rows == [] and faults == []  # none of its tiles is at hand


def test_pixels_are_no_teacher(store: Path, data: Path) -> None:
    opened = FeatureStore.open(store)
    assert all("pixels" not in str(key) for key in opened.keys()) and len(opened.pixel_keys()) == 1
    assert all("pixels" not in key for key in target_specs(opened))
    assert store_geometry(opened, 32) == store_geometry(FeatureStore.open(store), 32, ["mean/*"])
    found = call_json_info(store)
    assert [a["key"] for a in found["pixels"]] == ["pixels/s64o0/rgb"]
    assert [t["name"] for t in found["teachers"]] == ["mean"] and all(
        "pixels" not in str(a["key"]) for a in found["arrays"]
    )
    assert {p["device"] for p in found["profiles"]} == {"cpu"}
    with pytest.raises(UsageError, match="is no teacher"):
        BuildRequest.of({"data": data, "out": store, "teachers": ["pixels"]})
    with pytest.raises(UsageError, match="or ask for pixels"):
        BuildRequest.of({"data": data, "out": store})
    with pytest.raises(UsageError, match="unknown codec"):
        BuildRequest.of({"data": data, "out": store, "teachers": ["mean"], "codec": "uint8"}).encoding(
            BuildRequest.of({"data": data, "out": store, "teachers": ["mean"]}).teachers[0]
        )


def call_json_info(store: Path) -> dict[str, list[dict[str, object]]]:
    code, out, err = call("cache", "info", store, "--json")
    assert code == 0, err
    found: dict[str, list[dict[str, object]]] = json.loads(out)
    return found


def test_push_leaves_pixels_out_unless_asked(store: Path, data: Path, tmp_path: Path) -> None:
    push_store(store, str(tmp_path / "without"))
    without = FeatureStore.open(tmp_path / "without")
    assert without.pixel_keys() == [] and without.keys() == FeatureStore.open(store).keys()
    assert not (tmp_path / "without" / "zarr" / "pixels").exists()
    assert verify_store(tmp_path / "without", deep=True) == []
    push_store(store, str(tmp_path / "without"), Selection(pixels=True))  # and joins what is there
    assert FeatureStore.open(tmp_path / "without").snapshot == FeatureStore.open(store).snapshot
    code, _, err = call("cache", "push", store, tmp_path / "cli", "--pixels", "-q")
    assert code == 0, err
    pull_store(f"file://{tmp_path}/cli", tmp_path / "pulled")
    require_same_pixels(tmp_path / "pulled", data, 8)
    code, _, err = call("cache", "pull", tmp_path / "cli", tmp_path / "bare", "--no-pixels", "-q")
    assert code == 0 and FeatureStore.open(tmp_path / "bare").pixel_keys() == [], err
    build(data, tmp_path / "alone", teachers=())
    with pytest.raises(UsageError, match="pixels travel with --pixels"):
        push_store(tmp_path / "alone", str(tmp_path / "nothing"))


def test_merge_drop_gc_preview_and_compaction_take_pixels_as_they_are(data: Path, tmp_path: Path) -> None:
    halves = []
    for name, numbers in (("a", range(5)), ("b", range(3, 8))):
        half = Path(shutil.copytree(data, tmp_path / f"data-{name}"))
        shutil.rmtree(half / "splits" / "labeled")
        write_split(half, "train", [f"t{n:03}" for n in numbers])
        build(half, tmp_path / name)
        halves.append(tmp_path / name)
    merge_stores(halves[0], halves[1], tmp_path / "c")
    require_same_pixels(tmp_path / "c", data, 8)
    assert verify_store(tmp_path / "c", deep=True) == []
    code, _, err = call("cache", "preview", tmp_path / "c", data, "--out", tmp_path / "p.png", "--tiles", 1, "-q")
    assert code == 0, err
    paths = StorePaths(tmp_path / "c")
    ledger = load_whole(paths)
    ledger.compact(tail_max=0)
    write_head(paths, load_manifest(paths), ledger)
    require_same_pixels(tmp_path / "c", data, 8)
    assert verify_store(tmp_path / "c", deep=True) == []
    drop_arrays(tmp_path / "c", ["pixels/*/*"])
    collect(tmp_path / "c")
    assert FeatureStore.open(tmp_path / "c").pixel_keys() == [] and verify_store(tmp_path / "c", deep=True) == []
    assert not list((tmp_path / "c").glob("zarr/pixels/**/c/*"))
    build(data, tmp_path / "c", teachers=())
    require_same_pixels(tmp_path / "c", data, 8)


def test_the_command_builds_and_plans_pixels_alone(data: Path, tmp_path: Path) -> None:
    plan = call_json("cache", "build", data, "--out", tmp_path / "s", "--pixels", "--dry-run", "--no-measure")
    assert not (tmp_path / "s").exists()
    report = call_json("cache", "build", data, "--out", tmp_path / "s", "--pixels")
    assert plan["planned"]["nbytes"] == report["planned"]["nbytes"] == report["actual"]["nbytes"]
    assert [a["key"] for a in report["arrays"]] == ["pixels/s64o0/rgb"]
    code, out, err = call("cache", "info", tmp_path / "s")
    assert code == 0 and "pixels/s64o0/rgb" in out, err
    code, _, err = call("cache", "build", data, "--out", tmp_path / "t")
    assert code == 2 and "--teacher NAME" in err
