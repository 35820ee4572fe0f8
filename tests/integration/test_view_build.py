"""Fixed views and windows through a real build: what is stored is what was shown, and it lies where the spec says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml
from PIL import Image
from typer.testing import CliRunner

from rsmtdf_cache.build import BuildReport, build_store
from rsmtdf_cache.encode import encode_batch
from rsmtdf_cache.errors import FindingsError, UsageError
from rsmtdf_cache.estimate import plan_build
from rsmtdf_cache.files import publish_json, read_json, replace_json
from rsmtdf_cache.fixed_views import FixedView, draw_fixed_view
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.ledger import Ledger, SetRecord
from rsmtdf_cache.photometry import photometric
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile, ViewSpec
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import TeacherRequest
from rsmtdf_cache.upkeep.recompute import recompute_sample
from rsmtdf_cache.verify import verify_store
from rsmtdf_cache.views import ORIENTATION_SETS, orient_point
from rsmtdf_cache.windows import with_windows
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher, load_mean_teacher

TILE_PX = 128


def build(data: Path, out: Path, **changes: object) -> BuildReport:
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 3, "threads": 1, "scales": [1.0], **changes}
    return build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("views") / "data", tiles=6, tile_px=TILE_PX)


def test_every_array_holds_what_the_teacher_says_of_the_view_its_spec_describes(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s", orientations=2, fixed_views=3, view_seed=7, window_px=48, scales=[1.0, 0.25])
    store, source = FeatureStore.open(tmp_path / "s"), open_source(data)
    images = {t.id: source.read_image(t) for t in source.tiles(["train"])}
    views = {store.spec(key).view for key in store.keys()}
    assert len(views) == 2 * 2 + 3 and sum(v.windows is not None for v in views) == 2 + 3
    assert {FixedView.of(v) for v in views} - {None} == {draw_fixed_view(7, k, TILE_PX) for k in range(3)}
    for key in store.keys():
        spec, got = store.spec(key), store.read(key, range(len(store.tiles)))
        assert got.valid.all()
        profile = NumericsProfile(**store.ledger.sets[store.ledger.set_of(key)].profile.to_json())
        for row, tile_id in enumerate(store.tiles.ids):
            fresh = encode_batch(MeanTeacher(), spec.view, [key.layer], [images[tile_id]], profile)[key.layer][0]
            np.testing.assert_array_equal(got.values[row], fresh.astype(np.float16))
    results, faults = recompute_sample(tmp_path / "s", data, 30, load_teacher=load_mean_teacher)
    assert not faults and {r.key for r in results} == {str(k) for k in store.keys()} and all(r.equal for r in results)


def test_a_mark_is_found_where_stride_offset_and_origin_of_the_view_say(tmp_path: Path) -> None:
    """Through turned, cut, recoloured views and windows: the centroid of a bright mark, in tile pixels of the frame."""
    data = write_dataset(tmp_path / "data", tiles=6, tile_px=TILE_PX)
    places = {f"t{n:03}": (30.5 + 17 * n, 96.5 - 13 * n) for n in range(4)}
    for tile_id, (row, column) in places.items():
        image = np.full((TILE_PX, TILE_PX, 3), 40, np.uint8)
        image[int(row) - 2 : int(row) + 3, int(column) - 2 : int(column) + 3] = (210, 190, 170)
        Image.fromarray(image).save(data / "images" / f"{tile_id}.png")
    build(data, tmp_path / "s", orientations=8, fixed_views=6, view_seed=1, window_px=64)
    store = FeatureStore.open(tmp_path / "s")
    tree = xr.open_datatree(tmp_path / "s" / "zarr", engine="zarr")
    found = 0
    for key in store.keys():
        spec = store.spec(key)
        for row, tile_id in enumerate(store.tiles.ids):
            y, x = orient_point(*places[tile_id], TILE_PX, spec.view.orientation)
            (top, left), margin = spec.origin_tile_px, 12 + spec.stride_tile_px
            if not all(margin < v - o < spec.shown_px - margin for v, o in ((y, top), (x, left))):
                continue  # cut by the crop, or so near to its border that the mark's blur is
            light = store.read(key, [row]).values[0].astype(np.float64).sum(-1)
            light -= np.median(light)
            centres = tree[str(key)]["y"].to_numpy(), tree[str(key)]["x"].to_numpy()
            got_y, got_x = (light.sum(1) @ centres[0]) / light.sum(), (light.sum(0) @ centres[1]) / light.sum()
            # Cells of the local teacher say where light is to a cell: half of the cell's side at the most.
            assert abs(got_y - y) <= spec.stride_tile_px / 2 and abs(got_x - x) <= spec.stride_tile_px / 2
            found += 1
            np.testing.assert_allclose(centres[0][0], top + spec.offset_tile_px)
            np.testing.assert_allclose(centres[1][0], left + spec.offset_tile_px)
    whole = len(ORIENTATION_SETS[8]) * 2 * len(store.tiles)
    assert found > whole  # more than the whole views alone


def test_more_fixed_views_are_an_append_and_a_seed_adds_others(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s", fixed_views=2, view_seed=3)
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("c/*/0/0/0")}
    more = build(data, tmp_path / "s", fixed_views=4, view_seed=3)
    assert more.units_before == 3 * 2 and more.units == 2 * 2  # of two row groups
    build(data, tmp_path / "s", fixed_views=1, view_seed=4)
    assert len({k.view for k in FeatureStore.open(tmp_path / "s").keys()}) == 1 + 4 + 1
    assert all(p.read_bytes() == content for p, content in before.items())


def test_one_teacher_can_have_its_own_number_of_views_and_windows(data: Path, tmp_path: Path) -> None:
    report = build(
        data, tmp_path / "s", teachers=["mean,fixed_views=0,window_px=0", "other,fixed_views=1"], fixed_views=2,
        window_px=64,
    )  # fmt: skip
    views = {tuple(a["key"].split("/")[:2]) for a in report.arrays}
    assert {v for t, v in views if t == "mean"} == {"s128o0"}
    assert sorted(v[:10] for t, v in views if t == "other") == ["s128w64v16", "s128w64v16"]


def test_default_scales_that_a_tile_cannot_have_are_left_out_and_asked_ones_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", tiles=3, tile_px=48)
    base = {"data": data, "out": tmp_path / "s", "teachers": ["mean"]}
    report = plan_build(BuildRequest.of(base), measure=False, load_teacher=load_mean_teacher)
    assert {a["key"].split("/")[1] for a in report.arrays} == {"s48o0"}
    with pytest.raises(UsageError, match=r"scale 0\.5"):
        plan_build(BuildRequest.of({**base, "scales": [1.0, 0.5]}), measure=False, load_teacher=load_mean_teacher)


def test_the_command_line_takes_shows_and_stores_views(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"

    def run(*words: str) -> str:
        shown = CliRunner().invoke(app, ["cache", *words], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output
        return shown.stdout

    asked = [
        "build", str(data), "--out", str(out), "--teacher", "timm:test_vit,pretrained=none,layers=block0",
        "--threads", "1",
    ]  # fmt: skip
    options = ["--fixed-views", "2", "--seed", "7", "--window", "64", "--overlap", "0.5", "--scales", "1"]
    planned = run(*asked, *options, "--dry-run", "--no-measure")
    arrays = json.loads(run(*asked, *options, "--json"))["arrays"]
    info = run("info", str(out))
    drawn = [draw_fixed_view(7, k, TILE_PX) for k in range(2)]
    for view in drawn:
        text = f"{view.crop.side_px} px at ({view.crop.y}, {view.crop.x})"
        assert text in planned and text in info
    assert info.count("in windows of 64 px that overlap by 32 px") == 3
    crops = [a["view"]["crop"] for a in arrays if "crop" in a["view"]]
    assert sorted(crops, key=str) == sorted((v.crop.to_json() for v in drawn), key=str)
    assert all(a["view"]["windows"] == {"side_px": 64, "overlap_px": 32} for a in arrays)
    config = tmp_path / "build.yaml"
    config.write_text(
        yaml.safe_dump({"fixed_views": 2, "view_seed": 7, "window_px": 64, "overlap": 0.5, "scales": [1]})
    )
    again = json.loads(run(*asked, "--config", str(config), "--json"))
    assert again["units"] == 0 and again["arrays"] == arrays


def test_the_parameters_that_count_are_those_stored(data: Path, tmp_path: Path) -> None:
    """A reader needs no generator: crop and colours of the record give the picture again."""
    build(data, tmp_path / "s", fixed_views=1, view_seed=2**62)
    store, source = FeatureStore.open(tmp_path / "s"), open_source(data)
    key = next(k for k in store.keys() if not store.spec(k).view.is_whole)
    records = [json.loads(p.read_text()) for p in (tmp_path / "s" / "ledger" / "sets").glob("*.json")]
    (view,) = {json.dumps(a["view"]) for r in records for a in r["arrays"] if "crop" in a["view"]}
    assert json.loads(view) == store.spec(key).view.to_json()
    recorded = draw_fixed_view(2**62, 0, TILE_PX)
    assert recorded.photometry is not None and json.loads(view)["photometry"] == recorded.photometry.to_json()
    tile = source.read_image(source.tiles(["train"])[0])
    assert not np.array_equal(photometric(tile, recorded.photometry), tile)


_BIG = """
import resource, sys
from pathlib import Path
from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from tests.teachers import load_mean_teacher

data, out = Path(sys.argv[1]), Path(sys.argv[2])
source = open_source(data)
held = source.read_image(source.tiles()[0])
source.read_image(source.tiles()[0])  # a build holds the tile, and decodes it once more
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del held
request = {"data": data, "out": out, "teachers": ["mean,layers=mean16"], "threads": 1, "window_px": 256,
           "scales": [1.0]}
report = build_store(BuildRequest.of(request), load_teacher=load_mean_teacher)
print(report.arrays[0]["key"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_tile_of_6000_px_is_encoded_in_the_memory_of_a_window_beside_the_tile(tmp_path: Path) -> None:
    data, side = tmp_path / "data", 6000
    (data / "images").mkdir(parents=True)
    (data / "splits").mkdir()
    rows, columns = np.ogrid[0:side, 0:side]
    planes = [np.broadcast_to(v, (side, side)) for v in (rows * 255 // side, columns * 255 // side, 0)]
    Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(data / "images" / "big.png", compress_level=1)
    (data / "splits" / "train.txt").write_text("big\n")
    header = {
        "name": "big", "tile_px": side, "ignore_index": 255, "masks": "partial", "attribution": "synthetic",
        "classes": [{"name": n, "color": [0, 0, 0]} for n in ("a", "b")],
    }  # fmt: skip
    (data / "dataset.yaml").write_text(yaml.safe_dump(header))
    done = subprocess.run(
        [sys.executable, "-c", _BIG, str(data), str(tmp_path / "s")], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    name, extra_kib = done.stdout.split()
    assert name == "mean/s6000w256v64o0/mean16"
    # The view as float32 alone would take 432 MB, and a teacher holds it twice; windows of 256 px take 6 MB a batch.
    assert int(extra_kib) * 1024 < 200e6
    store = FeatureStore.open(tmp_path / "s")
    found = store.read(store.keys()[0], [0])
    assert found.valid.all()
    centres = 8 + 16 * np.arange(375)
    np.testing.assert_allclose(found.values[0, :, 7, 0], centres * 255 / side, atol=1)  # painted rows and columns
    np.testing.assert_allclose(found.values[0, 9, :, 1], centres * 255 / side, atol=1)
    assert found.values.shape == (1, 375, 375, 3)


@pytest.mark.parametrize("lie", ["tile_px", "stride_px", "grid"])
def test_a_record_that_lies_about_geometry_is_refused_and_found(lie: str, tmp_path: Path) -> None:
    """Its checksum and name fit: a hostile store says what it likes, and reading by it would be silently wrong."""
    data, out = write_dataset(tmp_path / "data", tiles=4, tile_px=64), tmp_path / "s"
    request = BuildRequest.of({"data": data, "out": out, "teachers": ["mean,layers=mean8"], "scales": [1.0]})
    build_store(request, load_teacher=load_mean_teacher)
    paths = StorePaths(out)
    ((name, record),) = Ledger.load(paths).sets.items()
    body = record.arrays.specs[0].to_json()
    if lie == "tile_px":
        body["tile_px"] = 32
    elif lie == "stride_px":
        body["layer"]["stride_px"] = 1
    else:
        body["grid"] = [64, 64]
    forged = ArraySet((FeatureSpec.from_json(body),))
    paths.array_set(name).unlink()
    (paths.ledger / "commits" / name).rename(paths.ledger / "commits" / forged.id)
    for path in (paths.ledger / "commits" / forged.id).glob("*.json"):
        replace_json(path, {**{k: v for k, v in read_json(path).items() if k != "checksum"}, "set": forged.id})
    publish_json(paths.array_set(forged.id), SetRecord(forged, record.profile).to_json(), paths.tmp)
    paths.head.unlink()
    with pytest.raises(FindingsError, match="the record is damaged or hostile"):
        FeatureStore.open(out)
    assert any("px" in f.fault for f in verify_store(out) if f.path == f"ledger/sets/{forged.id}.json")


def test_views_too_large_to_store_are_a_usage_error(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", tiles=4, tile_px=64)
    request = BuildRequest.of({"data": data, "out": tmp_path / "s", "teachers": ["mean"], "scales": [2000.0]})
    with pytest.raises(UsageError, match="at most 65536 px"):
        build_store(request, load_teacher=load_mean_teacher)


def test_an_overlap_that_was_asked_for_is_never_rounded_away(tmp_path: Path) -> None:
    teacher = load_mean_teacher(TeacherRequest("mean"))
    view = with_windows(teacher, ("mean8",), ViewSpec(size_px=128, orientation=0), 64, 0.01)
    assert view.windows is not None and view.windows.overlap_px > 0
