"""Labels of scenes: on the right pixels or refused, colours by a closed table, polygons by the centres of pixels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.warp
import shapely
from numpy.typing import NDArray
from rasterio.warp import transform_geom

from rsmtdf_cache.errors import DataError, ResourceError, RsmtdfError
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.geotiff import GeotiffSource
from rsmtdf_cache.tiling.request import Held
from rsmtdf_cache.tiling.write import tile
from tests.scene_sets import CLASS_TABLE, classes_file, request, write_labels, write_pair
from tests.scenes import PLACE, write_scene

COLORS: dict[str, Any] = {"labels": {"kind": "colors", "ignore": [[0, 0, 0]]}, "classes": [
    {"name": "water", "color": [0, 0, 255]},
    {"name": "tree", "color": [0, 255, 0], "values": [[0, 255, 0], [0, 200, 0]]},
]}  # fmt: skip


def made(folder: Path, **values: Any) -> GeotiffSource:
    tile(request(folder, **values))
    source = open_source(folder / "set")
    assert isinstance(source, GeotiffSource)
    source.check()
    return source


def mosaic(source: GeotiffSource, height: int, width: int) -> NDArray[np.uint8]:
    """Return the masks of all tiles put together again."""
    whole = np.full((height + 32, width + 32), 255, np.uint8)
    for entry in source.tiles():
        y, x = entry.origin_px or (0, 0)
        if entry.mask is not None:
            whole[y : y + 32, x : x + 32] = source.read_mask(entry)
    return whole[:height, :width]


def wrong(folder: Path, **values: Any) -> str:
    with pytest.raises(DataError) as caught:
        tile(request(folder, **values))
    assert not (folder / "set").exists() and not list(folder.glob(".set*"))
    return str(caught.value)


def place(shift_px: float = 0.0, scale: float = 1.0) -> rasterio.Affine:
    return rasterio.Affine(PLACE.a * scale, 0, PLACE.c + shift_px * PLACE.a, 0, PLACE.e * scale, PLACE.f)


GRIDS = {
    "crs": (dict(crs="EPSG:32634"), "the scene has the CRS EPSG:32633, the labels EPSG:32634"),
    "half a pixel": (dict(transform=place(0.5)), "corners lie up to 0.5 pixels apart"),
    "one pixel": (dict(transform=place(-1)), "corners lie up to 1 pixels apart"),
    "resolution": (dict(transform=place(scale=1.01)), "corners lie up to 2.1 pixels apart"),
}


@pytest.mark.parametrize(("profile", "said"), GRIDS.values(), ids=GRIDS.keys())
def test_labels_elsewhere_are_refused_with_the_command_that_helps(
    tmp_path: Path, profile: dict[str, Any], said: str
) -> None:
    write_pair(tmp_path)
    write_labels(tmp_path / "labels" / "a.tif", 150, 210, **profile)
    text = wrong(tmp_path)
    assert said in text and "gdalwarp -r near -t_srs EPSG:32633 -te 390000 5819925 390105 5820000 -ts 210 150" in text
    assert str(tmp_path / "labels" / "a.tif") in text and str(tmp_path / "images" / "a.tif") in text


def test_labels_of_another_size_are_refused_and_rounding_of_coordinates_is_not(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_labels(tmp_path / "labels" / "a.tif", 150, 200)
    assert "the scene has 210 x 150 px, the labels 200 x 150" in wrong(tmp_path)
    write_labels(tmp_path / "labels" / "a.tif", 150, 210, transform=place(0.01))
    made(tmp_path)


def test_labels_without_place_count_by_pixel(tmp_path: Path) -> None:
    write_pair(tmp_path)
    labels = write_labels(tmp_path / "labels" / "a.tif", 150, 210, crs=None, transform=rasterio.Affine.identity())
    found = mosaic(made(tmp_path), 150, 210)
    assert np.array_equal(found == 0, labels == 10)


def test_an_unknown_value_is_named_with_file_and_pixel_and_may_be_ignored(tmp_path: Path) -> None:
    write_pair(tmp_path)
    labels = write_labels(tmp_path / "labels" / "a.tif", 150, 210, 50)
    labels[97, 133] = 77
    write_scene(tmp_path / "labels" / "a.tif", labels[None])
    text = wrong(tmp_path)
    assert f"labels {tmp_path}/labels/a.tif: value 77 at row 97, column 133" in text and "value 10" in text
    table = {**CLASS_TABLE, "labels": {"ignore": [99], "unknown": "ignore"}}
    found = mosaic(made(tmp_path, classes=classes_file(tmp_path, table)), 150, 210)
    assert found[97, 133] == 255 and np.array_equal(found == 2, labels == 30)


def colored(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    table = {10: (0, 0, 255), 20: (0, 255, 0), 21: (0, 200, 0), 30: (0, 0, 255), 99: (0, 0, 0)}
    return np.moveaxis(np.array([table.get(v, (0, 0, 0)) for v in range(256)], np.uint8)[labels], -1, 0)


def test_colours_become_classes_and_what_is_transparent_has_no_label(tmp_path: Path) -> None:
    _, labels = write_pair(tmp_path)
    path = tmp_path / "labels" / "a.tif"
    write_scene(path, colored(labels), photometric="RGB")
    wanted = np.select([np.isin(labels, (10, 30)), np.isin(labels, (20, 21))], [0, 1], 255)
    classes = classes_file(tmp_path, COLORS)
    assert np.array_equal(mosaic(made(tmp_path, classes=classes), 150, 210), wanted)
    alpha = np.full((1, 150, 210), 255, np.uint8)
    alpha[0, 40:60] = 0
    strange = colored(labels)
    strange[:, 40:60] = 7  # under the transparent part: nobody asks for it
    write_scene(path, np.concatenate([strange, alpha]), photometric="RGB", ALPHA="YES")
    wanted[40:60] = 255
    (tmp_path / "set").rename(tmp_path / "opaque")
    assert np.array_equal(mosaic(made(tmp_path, classes=classes), 150, 210), wanted)


def test_a_palette_is_read_as_values_or_as_colours(tmp_path: Path) -> None:
    _, labels = write_pair(tmp_path)
    path = tmp_path / "labels" / "a.tif"
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {v: tuple(colored(np.full((1, 1), v, np.uint8))[:, 0, 0]) for v in (10, 20, 21, 30, 99)})
    by_value = mosaic(made(tmp_path), 150, 210)
    assert np.array_equal(by_value == 2, labels == 30)
    (tmp_path / "set").rename(tmp_path / "values")
    by_color = mosaic(made(tmp_path, classes=classes_file(tmp_path, COLORS)), 150, 210)
    assert np.array_equal(by_color == 0, np.isin(labels, (10, 30)))


def test_an_unknown_colour_is_named_with_file_and_pixel(tmp_path: Path) -> None:
    _, labels = write_pair(tmp_path)
    pixels = colored(labels)
    pixels[:, 11, 205] = (1, 2, 3)
    write_scene(tmp_path / "labels" / "a.tif", pixels, photometric="RGB")
    text = wrong(tmp_path, classes=classes_file(tmp_path, COLORS))
    assert "colour (1, 2, 3) at row 11, column 205" in text and "colour (0, 255, 0)" in text


KINDS = {
    "colours as values": (lambda v: np.stack([v] * 3), CLASS_TABLE, "3 bands; labels are one band"),
    "values as colours": (lambda v: v[None], COLORS, "1 band of uint8; colours need three"),
    "no whole number": (lambda v: (v + 0.5).astype(np.float32)[None], CLASS_TABLE, "at row 0, column 0 is no class"),
    "complex": (lambda v: v.astype(np.complex64)[None], CLASS_TABLE, "values of type complex64"),
}


@pytest.mark.parametrize(("change", "table", "said"), KINDS.values(), ids=KINDS.keys())
def test_labels_of_another_kind_are_one_error(tmp_path: Path, change: Any, table: dict[str, Any], said: str) -> None:
    _, labels = write_pair(tmp_path)
    write_scene(tmp_path / "labels" / "a.tif", change(labels))
    assert said in wrong(tmp_path, classes=classes_file(tmp_path, table))


def test_1_bit_labels_are_two_classes(tmp_path: Path) -> None:
    _, labels = write_pair(tmp_path)
    write_scene(tmp_path / "labels" / "a.tif", (labels == 30).astype(np.uint8)[None], nbits=1)
    table = {"classes": [{"name": "no", "color": [0, 0, 0]}, {"name": "road", "color": [9, 9, 9]}]}
    assert np.array_equal(mosaic(made(tmp_path, classes=classes_file(tmp_path, table)), 150, 210), labels == 30)


# --- polygons ---------------------------------------------------------------------------------------------------------

POLYGONS: dict[str, Any] = {"labels": {"kind": "polygons", "field": "kind"}, "classes": [
    {"name": "water", "color": [0, 0, 255]},
    {"name": "tree", "color": [0, 255, 0], "values": ["tree", "shrub"]},
]}  # fmt: skip


def shapes(seed: int = 0) -> list[Any]:
    """Return stars in the CRS of the scene; some lie on each other, some reach beyond it, one has a hole."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(12):
        x, y = rng.uniform(0, 105), rng.uniform(0, 75)
        radius = rng.uniform(3, 16, 9)
        angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
        ring = np.stack([PLACE.c + x + radius * np.cos(angle), PLACE.f - y + radius * np.sin(angle)], 1)
        found.append(shapely.Polygon(ring).buffer(0))
    found[3] = found[3].difference(found[3].centroid.buffer(2))
    return found


def write_polygons(
    path: Path, geometries: list[Any], values: list[Any], crs: str | None = "EPSG:32633", name: str = "kind",
    geometry_type: str = "Unknown", **options: Any,
) -> None:  # fmt: skip
    column = np.array(values, object if isinstance(values[0], str) else int)
    wkb = np.array(shapely.to_wkb(geometries), dtype=object)
    pyogrio.raw.write(path, wkb, [column], [name], geometry_type=geometry_type, crs=crs, **options)


def by_point_in_polygon(geometries: list[Any], numbers: list[int]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return what each pixel's centre lies in, the later polygon first; and where that is not a matter of rounding."""
    columns, rows = np.meshgrid(np.arange(210) + 0.5, np.arange(150) + 0.5)
    points = shapely.points(PLACE.c + columns * PLACE.a, PLACE.f + rows * PLACE.e)
    found, sure = np.full((150, 210), 255, np.uint8), np.ones((150, 210), bool)
    for geometry, number in zip(geometries, numbers, strict=True):
        found[shapely.contains(geometry, points)] = number
        sure &= shapely.distance(geometry.boundary, points) > 0.01
    return found, sure


WORDS = ["water", "tree", "shrub", "water"] * 3
AS_NUMBERS = [0, 1, 1, 0] * 3


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp", ".fgb"])
def test_polygons_are_burnt_by_pixel_centres_later_ones_over_earlier(tmp_path: Path, suffix: str) -> None:
    write_pair(tmp_path)
    path = tmp_path / f"polygons{suffix}"
    geometries = [shapely.MultiPolygon([g]) if g.geom_type == "Polygon" else g for g in shapes()]
    crs = "EPSG:32633"
    write_polygons(
        path,
        geometries,
        WORDS,
        crs,
        geometry_type="MultiPolygon",
        **({"RFC7946": "NO"} if suffix == ".geojson" else {}),
    )
    source = made(tmp_path, labels=path, classes=classes_file(tmp_path, POLYGONS))
    wanted, sure = by_point_in_polygon(shapes(), AS_NUMBERS)
    found = mosaic(source, 150, 210)
    if suffix == ".fgb":  # FlatGeobuf orders features by place; where polygons overlap, so does their order
        sure &= sum(by_point_in_polygon([g], [1])[0] == 1 for g in shapes()) <= 1
    assert sure.mean() > 0.9 and np.array_equal(found[sure], wanted[sure]) and 0.1 < (found != 255).mean() < 0.9


def test_polygons_in_another_crs_are_reprojected(tmp_path: Path) -> None:
    write_pair(tmp_path)
    path = tmp_path / "polygons.gpkg"
    moved = [
        shapely.geometry.shape(g)
        for g in transform_geom("EPSG:32633", "EPSG:4326", [s.__geo_interface__ for s in shapes()])
    ]
    write_polygons(path, moved, WORDS, "EPSG:4326")
    source = made(tmp_path, labels=path, classes=classes_file(tmp_path, POLYGONS))
    wanted, sure = by_point_in_polygon(shapes(), AS_NUMBERS)
    assert np.array_equal(mosaic(source, 150, 210)[sure], wanted[sure])


def test_what_no_polygon_covers_is_what_the_dataset_says(tmp_path: Path) -> None:
    write_pair(tmp_path)
    path = tmp_path / "polygons.gpkg"
    write_polygons(path, shapes(), WORDS)
    table = {**POLYGONS, "labels": {**POLYGONS["labels"], "outside": "water"}}
    wanted, sure = by_point_in_polygon(shapes(), AS_NUMBERS)
    found = mosaic(made(tmp_path, labels=path, classes=classes_file(tmp_path, table)), 150, 210)
    assert np.array_equal(found[sure], np.where(wanted == 255, 0, wanted)[sure])


@pytest.mark.parametrize("values", [[2, 7, 7, 2], ["2", "7", "7", "2"]], ids=["numbers", "text"])
def test_a_file_of_polygons_for_each_scene_and_numbers_for_classes(tmp_path: Path, values: list[Any]) -> None:
    write_pair(tmp_path)
    (tmp_path / "polygons").mkdir()
    write_polygons(tmp_path / "polygons" / "a_labels.geojson", shapes(), values * 3)
    table = {"labels": {"field": "kind"}, "classes": [
        {"name": "water", "color": [0, 0, 255], "values": [2]}, {"name": "tree", "color": [0, 255, 0], "values": [7]},
    ]}  # fmt: skip
    source = made(
        tmp_path, labels=tmp_path / "polygons", label_name="{scene}_labels", classes=classes_file(tmp_path, table)
    )
    wanted, sure = by_point_in_polygon(shapes(), AS_NUMBERS)
    assert np.array_equal(mosaic(source, 150, 210)[sure], wanted[sure])


TURNED = {
    "south up": (rasterio.Affine(PLACE.a, 0, PLACE.c, 0, -PLACE.e, PLACE.f - 75), lambda m: m[::-1]),
    "mirrored": (rasterio.Affine(-PLACE.a, 0, PLACE.c + 105, 0, PLACE.e, PLACE.f), lambda m: m[:, ::-1]),
}


@pytest.mark.parametrize(("transform", "turn"), TURNED.values(), ids=TURNED.keys())
def test_polygons_lie_right_on_scenes_that_are_upside_down_or_mirrored(
    tmp_path: Path, transform: rasterio.Affine, turn: Any
) -> None:
    write_pair(tmp_path, transform=transform)
    write_polygons(tmp_path / "polygons.gpkg", shapes(), WORDS)
    source = made(tmp_path, labels=tmp_path / "polygons.gpkg", classes=classes_file(tmp_path, POLYGONS))
    wanted, sure = by_point_in_polygon(shapes(), AS_NUMBERS)
    found = mosaic(source, 150, 210)
    assert np.array_equal(found[turn(sure)], turn(wanted)[turn(sure)]) and (found != 255).any()


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp"])
def test_many_overlapping_polygons_keep_the_order_of_the_file(tmp_path: Path, suffix: str) -> None:
    """A spatial index, which GeoPackage has from about fifty on, gives them in an order of its own."""
    write_pair(tmp_path)
    rng = np.random.default_rng(4)
    corners = np.stack([PLACE.c + rng.uniform(0, 100, 400), PLACE.f - rng.uniform(0, 72, 400)], 1)
    squares = [shapely.box(x, y - 9, x + 9, y) for x, y in corners]
    numbers = rng.integers(0, 2, 400).tolist()
    path = tmp_path / f"polygons{suffix}"
    write_polygons(path, squares, [("water", "tree")[n] for n in numbers], geometry_type="Polygon")
    source = made(tmp_path, labels=path, classes=classes_file(tmp_path, POLYGONS))
    wanted, sure = by_point_in_polygon(squares, numbers)
    assert np.array_equal(mosaic(source, 150, 210)[sure], wanted[sure])


def test_polygons_on_both_sides_of_the_180th_meridian_reach_their_scene(tmp_path: Path) -> None:
    """Fiji in UTM zone 60 S: degrees to the west of the line are near 180, to the east near -180."""
    middle = rasterio.warp.transform("EPSG:4326", "EPSG:32760", [180.0], [-17.0])
    place = rasterio.Affine(10, 0, middle[0][0] - 1050, 0, -10, middle[1][0] + 750)
    write_pair(tmp_path, crs="EPSG:32760", transform=place)
    halves = [shapely.box(179.99, -17.005, 179.9999, -16.995), shapely.box(-179.9999, -17.005, -179.99, -16.995)]
    write_polygons(tmp_path / "polygons.gpkg", halves, ["water", "tree"], "EPSG:4326", geometry_type="Polygon")
    source = made(tmp_path, labels=tmp_path / "polygons.gpkg", classes=classes_file(tmp_path, POLYGONS))
    found = mosaic(source, 150, 210)
    assert (found[70:80, 20:95] == 0).all() and (found[70:80, 115:190] == 1).all()


def test_no_data_and_masks_of_colour_labels_and_palettes_are_no_label(tmp_path: Path) -> None:
    _, labels = write_pair(tmp_path)
    path = tmp_path / "labels" / "a.tif"
    pixels = colored(labels)
    pixels[:, 40:60] = 8
    write_scene(path, pixels, photometric="RGB", nodata=8)
    wanted = np.select([np.isin(labels, (10, 30)), np.isin(labels, (20, 21))], [0, 1], 255)
    wanted[40:60] = 255
    classes = classes_file(tmp_path, COLORS)
    assert np.array_equal(mosaic(made(tmp_path, classes=classes), 150, 210), wanted)
    write_scene(path, colored(labels), photometric="RGB")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(~np.isin(np.arange(150), np.arange(40, 60))[:, None].repeat(210, 1))
    (tmp_path / "set").rename(tmp_path / "nodata")
    assert np.array_equal(mosaic(made(tmp_path, classes=classes), 150, 210), wanted)
    write_scene(path, np.where(np.arange(150)[:, None] // 20 == 2, 77, labels).astype(np.uint8)[None], nodata=77)
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {v: tuple(colored(np.full((1, 1), v, np.uint8))[:, 0, 0]) for v in (10, 20, 21, 30, 99)})
    (tmp_path / "set").rename(tmp_path / "masked")
    assert np.array_equal(mosaic(made(tmp_path, classes=classes), 150, 210), wanted)


def test_labels_of_no_scene_and_scenes_without_labels_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_pair(tmp_path, "b", seed=1)
    (tmp_path / "labels" / "b.tif").rename(tmp_path / "labels" / "B.tif")
    told: list[Event] = []
    tile(request(tmp_path), told.append)
    texts = [event.text for event in told if isinstance(event, Warned)]
    assert any("1 files of labels belong to no scene (first B.tif)" in text for text in texts)
    assert any("1 of 2 scenes have no labels (first 'b')" in text for text in texts)


def test_few_labelled_pixels_are_labels(tmp_path: Path) -> None:
    write_pair(tmp_path, height=1500, width=1500)
    labels = np.full((1500, 1500), 99, np.uint8)
    labels[7, 9] = 10
    write_scene(tmp_path / "labels" / "a.tif", labels[None])
    tile(request(tmp_path, tile_px=1500, val=Held(), test=Held()))
    source = open_source(tmp_path / "set")
    source.check()
    assert source.split("100") == ["a_y00_x00"] and (source.read_mask(source.tiles()[0]) == 0).sum() == 1


def test_labels_drawn_after_the_tiling_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    labels = write_labels(tmp_path / "labels" / "a.tif", 150, 210)
    write_scene(tmp_path / "labels" / "a.tif", np.where(np.arange(210) < 96, labels, 99).astype(np.uint8)[None])
    made(tmp_path)
    write_scene(tmp_path / "labels" / "a.tif", labels[None])
    with pytest.raises(DataError, match="had none when the dataset was laid out and has some now"):
        open_source(tmp_path / "set").check()


def test_polygons_at_fault_are_one_error(tmp_path: Path) -> None:
    write_pair(tmp_path)
    path = tmp_path / "polygons.gpkg"
    classes = classes_file(tmp_path, POLYGONS)

    def said(**values: Any) -> str:
        return wrong(tmp_path, **{"labels": path, "classes": classes, **values})

    write_polygons(path, shapes(), ["lava"] * 12)
    assert "kind = 'lava' is no class; known: 'water', 'tree', 'shrub'" in said()
    write_polygons(path, [s.centroid for s in shapes()], WORDS)
    assert "features that are no polygons" in said()
    path.unlink()
    write_polygons(path, shapes(), WORDS, name="class")
    assert "'kind' is none of them; fields there: class" in said()
    path.unlink()
    write_polygons(path, shapes(), WORDS, crs=None)
    assert "no CRS says where its polygons lie" in said()
    path.write_bytes(path.read_bytes()[:3000])
    assert "no vector file that can be read" in said()
    (tmp_path / "labels.json").write_text('{"type": "FeatureCollection"')
    assert "no vector file that can be read" in said(labels=tmp_path / "labels.json")


def test_without_the_libraries_polygons_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path)
    write_polygons(tmp_path / "polygons.gpkg", shapes(), WORDS)
    monkeypatch.setitem(sys.modules, "pyogrio", None)
    with pytest.raises(ResourceError, match=r"pip install 'rsmtdf\[vector\]'"):
        tile(request(tmp_path, labels=tmp_path / "polygons.gpkg", classes=classes_file(tmp_path, POLYGONS)))


def test_a_scene_without_place_takes_no_polygons(tmp_path: Path) -> None:
    write_pair(tmp_path, crs=None, transform=rasterio.Affine.identity())
    write_polygons(tmp_path / "polygons.gpkg", shapes(), WORDS)
    with pytest.raises(RsmtdfError, match="has no CRS"):
        tile(request(tmp_path, labels=tmp_path / "polygons.gpkg", classes=classes_file(tmp_path, POLYGONS)))
