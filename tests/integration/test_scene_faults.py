"""Scenes and requests at fault: one error that says what to do, nothing left; one broken file does not stop a build."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml

from rsmtdf_cache.errors import DataError, TileError
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.base import Tile
from rsmtdf_cache.tiling.write import tile
from tests.command_line import call, call_json
from tests.scene_sets import CLASS_TABLE, classes_file, request, write_pair
from tests.scenes import blobs, write_scene

TEACHER = "timm:resnet10t,pretrained=none,layers=stage2"


def cut_short(path: Path, part: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def two(folder: Path) -> None:
    write_pair(folder, "a", tiled=True, blockxsize=32, blockysize=32)
    write_pair(folder, "b", seed=1, tiled=True, blockxsize=32, blockysize=32)


def tiled(folder: Path, *options: object) -> tuple[int, str]:
    code, _, err = call(
        "data", "tile", folder / "images", "--labels", folder / "labels", "--classes", classes_file(folder), "--tile",
        32, "--out", folder / "set", *options,
    )  # fmt: skip
    return code, err


REQUESTS: dict[str, tuple[list[object], int, str]] = {
    "no such band": (["--bands", "1,2,9"], 2, "the file has 3 bands"),
    "no bands": (["--bands", "red"], 2, "give 3 numbers"),
    "range upside down": (["--scale", "9,3"], 2, "the lower one first"),
    "no range": (["--scale", "a,b"], 2, "give numbers"),
    "three numbers": (["--scale", "1,2,3"], 2, "give LOW,HIGH, or six numbers"),
    "one percentile": (["--scale", "2%"], 2, "percentiles are two"),
    "percent of more": (["--scale", "2%,101%"], 2, "percentiles are two"),
    "all held out": (["--val", "50%", "--test", "50%"], 2, "leave some to train on"),
    "share of two": (["--val", "2"], 2, "a share is at least 0 and below 1"),
    "no such scene": (["--val", "zebra"], 3, "no scene has such a name; scenes are a, b"),
    "in two splits": (["--val", "a", "--test", "a,b"], 3, "scene 'a' is asked for as val and as test"),
    "nothing left": (["--val", "a", "--test", "b"], 3, "no tile is left to train on"),
    "too few scenes": (["--split-by", "scene"], 3, "2 scenes with labels cannot be dealt to train, test and val"),
    "split by luck": (["--split-by", "luck"], 2, "give scene or block"),
    "overlapping blocks": (["--split-by", "block", "--overlap", 8], 2, "share pixels"),
    "no overlap of that": (["--overlap", 32], 2, "cannot be cut"),
    "tile of nothing": (["--tile", 0], 2, "cannot be cut"),
    "block of scenes": (["--split-by", "scene", "--block", 2], 2, "--block belongs to"),
    "labels of none": (["--label-name", "{scene}_gt"], 3, "looked for a_gt.* and the like, found a.tif, b.tif"),
    "pattern without": (["--label-name", "gt"], 2, "it has no {scene}"),
    "percent of labels": (["--labeled", "0"], 2, "percent above 0"),
}


@pytest.mark.parametrize(("options", "code", "said"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_that_cannot_be_met_is_one_error_and_leaves_nothing(
    tmp_path: Path, options: list[object], code: int, said: str
) -> None:
    two(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found, err = tiled(tmp_path, *options)
    assert (found, said in err, "Traceback" in err) == (code, True, False), err
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "classes.yaml") == before


def without_images(folder: Path) -> None:
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()


def labels_cut_short(folder: Path) -> None:
    cut_short(folder / "labels" / "b.tif", 0.7)


def another_type(folder: Path) -> None:
    write_scene(folder / "images" / "b.tif", blobs(150, 210).astype(np.uint16))


def all_broken(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        cut_short(path, 0.01)


def no_data_at_all(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        with rasterio.open(path, "r+") as file:
            file.nodata = 0
            file.write(np.zeros((3, 150, 210), np.uint8))


def two_of_one_name(folder: Path) -> None:
    shutil.copy(folder / "images" / "a.tif", folder / "images" / "a.jp2")


FAULTS: dict[str, tuple[Any, str]] = {
    "no rasters": (without_images, "no rasters in it"),
    "no folder": (lambda f: shutil.rmtree(f / "images"), "no such file or folder"),
    "no labels folder": (lambda f: shutil.rmtree(f / "labels"), "no such file or folder"),
    "labels cut short": (labels_cut_short, "labels/b.tif: cannot be read at rows"),
    "another type": (another_type, "its values are uint16"),
    "one name": (two_of_one_name, "would both be scene 'a'"),
    "all broken": (all_broken, "none of 2 scenes can be read"),
    "no data at all": (
        no_data_at_all,
        "have no tile with data",
    ),
}


@pytest.mark.parametrize(("break_it", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_of_the_input_is_one_error_and_leaves_nothing(tmp_path: Path, break_it: Any, said: str) -> None:
    two(tmp_path)
    break_it(tmp_path)
    code, err = tiled(tmp_path)
    assert code in (2, 3) and said in err and "Traceback" not in err, err
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".*"))


CLASS_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "value of two": ({"classes": [*CLASS_TABLE["classes"], {"name": "x", "color": [1, 1, 1], "values": [30]}]},
                     "30 means 'road' and 'x'"),
    "some without": ({"classes": [*CLASS_TABLE["classes"], {"name": "x", "color": [1, 1, 1]}]}, "'x' has no values"),
    "text": ({"classes": [{"name": "x", "color": [1, 1, 1], "values": ["ten"]}]}, "'ten' of 'x' is not a number"),
    "no classes": ({"classes": []}, "classes: Tuple should have at least 1 item"),
    "misspelt": ({**CLASS_TABLE, "label": {}}, "label: unknown key. Did you mean 'labels'?"),
    "unknown outside": ({**CLASS_TABLE, "labels": {"outside": "sea"}}, "there is no class 'sea'"),
    "polygons": ({**CLASS_TABLE, "labels": {"kind": "polygons"}}, "labels.kind is polygons"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "said"), CLASS_FAULTS.values(), ids=CLASS_FAULTS.keys())
def test_a_class_table_at_fault_is_named_by_its_key(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    two(tmp_path)
    with pytest.raises(DataError) as caught:
        tile(request(tmp_path, classes=classes_file(tmp_path, table)))
    assert said in str(caught.value) and "classes.yaml" in str(caught.value)


def test_without_classes_the_error_shows_what_to_write_and_what_was_seen(tmp_path: Path) -> None:
    two(tmp_path)
    code, _, err = call("data", "tile", tmp_path / "images", "--labels", tmp_path / "labels", "--out", tmp_path / "set")
    assert code == 2 and "values: [2, 3]" in err and "Seen in a.tif: 10, 20, 21, 30, 99" in err.replace("\n", " ")


def test_a_scene_that_cannot_be_opened_is_left_out_and_named_unless_strict(tmp_path: Path) -> None:
    two(tmp_path)
    cut_short(tmp_path / "images" / "b.tif", 0.01)
    told: list[Event] = []
    plan, _ = tile(request(tmp_path), told.append)
    assert [name for name, _ in plan.layout.left_out] == ["b"]
    assert any("scene 'b' is left out" in str(e.text) for e in told if isinstance(e, Warned))
    assert {c.scene for c in open_source(tmp_path / "set").cells.values()} == {"a"}  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"images/b\.tif"):
        tile(request(tmp_path, "strict", strict=True))


def test_what_is_damaged_later_costs_the_tiles_that_show_it_and_the_build_goes_on(tmp_path: Path) -> None:
    two(tmp_path)
    tile(request(tmp_path, bands=(1, 2, 3)))
    source = open_source(tmp_path / "set")
    cut_short(tmp_path / "images" / "b.tif", 0.6)
    broken = set()
    for entry in source.tiles(["train"]):
        try:
            source.read_image(entry)
        except TileError as error:
            assert "damaged or cut short" in str(error)
            broken.add(entry.id)
    assert broken and all(tile_id.startswith("b_") for tile_id in broken)
    arguments = ["cache", "build", tmp_path / "set", "--teacher", TEACHER, "--scales", 1]
    found = call_json(*arguments, "--out", tmp_path / "store")
    assert {q["id"] if isinstance(q, dict) else q for q in found["quarantined"]} == broken
    code, _, err = call(*arguments, "--out", tmp_path / "strict", "--strict", "--device", "cpu")
    assert code == 3 and "b_" in err


def test_a_virtual_raster_without_one_of_its_sources_gives_no_pixel_from_any_thread(tmp_path: Path) -> None:
    two(tmp_path)
    sources = "".join(
        f'<SimpleSource><SourceFilename relativeToVRT="1">../images/{name}.tif</SourceFilename><SourceBand>{{band}}'
        f'</SourceBand><SrcRect xOff="0" yOff="0" xSize="210" ySize="150"/><DstRect xOff="{x}" yOff="0" xSize="210" '
        'ySize="150"/></SimpleSource>'
        for x, name in ((0, "a"), (210, "b"))
    )
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{b}">{sources.replace("{band}", str(b))}</VRTRasterBand>'
        for b in (1, 2, 3)
    )
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "m.vrt").write_text(f'<VRTDataset rasterXSize="420" rasterYSize="150">{bands}</VRTDataset>')
    tile(request(tmp_path, scenes=(tmp_path / "v",), labels=None))
    source = open_source(tmp_path / "set")
    with rasterio.open(tmp_path / "images" / "b.tif") as file:
        last = source.read_image(next(t for t in source.tiles() if t.id == "m_y00_x10"))
        assert np.array_equal(last, file.read(window=((0, 32), (110, 142))).transpose(1, 2, 0))
    (tmp_path / "images" / "b.tif").rename(tmp_path / "away.tif")
    source = open_source(tmp_path / "set")

    def fails(entry: Tile) -> bool:
        try:
            source.read_image(entry)
        except TileError as error:
            return "b.tif is not there" in str(error)
        return False

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fails, source.tiles() * 3))


def test_names_and_links_that_text_does_not_tell_are_kept(tmp_path: Path) -> None:
    write_pair(tmp_path, "two\nlines")
    write_pair(tmp_path, "quotes, and 'commas\"", seed=1)
    real = tmp_path / "real" / "below"
    real.mkdir(parents=True)
    (tmp_path / "real" / "images").symlink_to(tmp_path / "images")
    (tmp_path / "real" / "labels").symlink_to(tmp_path / "labels")
    (tmp_path / "link").symlink_to(real)
    here = tmp_path / "link" / ".."
    tile(request(tmp_path, scenes=(here / "images",), labels=here / "labels"))
    source = open_source(tmp_path / "set")
    source.check()
    assert len(source.tiles()) == 70


def test_a_narrow_range_far_from_zero_is_measured(tmp_path: Path) -> None:
    write_pair(tmp_path, dtype="float32", factor=1e-4)
    with rasterio.open(tmp_path / "images" / "a.tif", "r+") as file:
        values = file.read() + np.float32(290)
        file.write(values)
    plan, _ = tile(request(tmp_path, scale=(2.0, 98.0)))
    assert plan.header.pixels is not None and plan.header.pixels.scale is not None
    for band, (low, high) in zip(values, plan.header.pixels.scale, strict=True):
        wanted = np.percentile(band, (2, 98))
        assert abs(low - wanted[0]) < 0.02 * (high - low) > abs(high - wanted[1])


def test_scenes_that_changed_or_went_after_the_tiling_are_named(tmp_path: Path) -> None:
    two(tmp_path)
    tile(request(tmp_path))
    (tmp_path / "images" / "a.tif").rename(tmp_path / "images" / "gone.tif")
    with pytest.raises(DataError, match=r"a\.tif of .*rasters\.csv: there is no such file"):
        open_source(tmp_path / "set").check()
    write_scene(tmp_path / "images" / "a.tif", blobs(150, 200))
    with pytest.raises(DataError, match="says 210 x 150; lay the dataset out again"):
        open_source(tmp_path / "set").check()


TABLES: dict[str, tuple[str, str, str]] = {
    "no table": ("rasters.csv", "", "rsmtdf data tile"),
    "no scene": ("rasters.csv", "scene,image,width,height\nz,../images/a.tif,210,150\n", "which rasters.csv does not"),
    "no size": ("rasters.csv", "scene,image,width,height\na,../images/a.tif,wide,150\n", "line 2: width and height"),
    "size of nothing": ("rasters.csv", "scene,image,width,height\na,../images/a.tif,0,150\n", "has no tiles"),
    "half an affine": (
        "rasters.csv",
        "scene,image,width,height,a\na,../images/a.tif,210,150,1\n",
        "a to f six numbers",
    ),
    "outside": ("scenes.csv", "id,scene,row,column\na_y00_x00,a,150,0\n", "outside of scene 'a' (210 x 150 px)"),
    "bad id": ("scenes.csv", "id,scene,row,column\n../x,a,0,0\n", "cannot be a tile id"),
    "unlisted": ("scenes.csv", "id,scene,row,column\nx,a,0,0\n", "is not in"),
}


@pytest.mark.parametrize(("name", "text", "said"), TABLES.values(), ids=TABLES.keys())
def test_a_table_at_fault_is_named_by_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    write_pair(tmp_path)
    tile(request(tmp_path))
    (tmp_path / "set" / name).write_text(text) if text else (tmp_path / "set" / name).unlink()
    with pytest.raises(DataError) as caught:
        open_source(tmp_path / "set").check()
    assert said in str(caught.value)


def test_a_band_that_a_scene_does_not_have_is_a_fault_of_that_tile(tmp_path: Path) -> None:
    write_pair(tmp_path)
    tile(request(tmp_path))
    path = tmp_path / "set" / "dataset.yaml"
    header = yaml.safe_load(path.read_text())
    header["pixels"]["bands"] = [1, 2, 7]
    path.write_text(yaml.safe_dump(header))
    source = open_source(tmp_path / "set")
    with pytest.raises(TileError, match="the file has 3 bands"):
        source.read_image(source.tiles()[0])
