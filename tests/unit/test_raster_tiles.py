"""Folders of tiles in any raster format: strict unless ``dataset.yaml`` says how values become pixels and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.errors import DataError, TileError
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.survey import survey
from rsmtdf_cache.tile_digests import TileDigests
from tests.datasets import edit_header, make_tile, png, write_dataset
from tests.scenes import write_scene

PX = 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", tiles=6, tile_px=PX)


def replace(root: Path, folder: str, pixels: NDArray[Any], name: str = "t000", suffix: str = ".tif", **p: Any) -> None:
    """Put a GeoTIFF in the place of a tile's PNG. ``pixels``: ``[bands, h, w]``."""
    (root / folder / f"{name}.png").unlink()
    path = root / folder / f"{name}.tif"
    write_scene(path, pixels, **p)
    path.rename(path.with_suffix(suffix))


def test_8_bit_rgb_of_any_format_is_read_as_it_is(root: Path) -> None:
    image, _ = make_tile(0, PX)
    replace(root, "images", image.transpose(2, 0, 1), compress="lzw")
    (root / "images" / "t001.png").unlink()
    Image.fromarray(make_tile(1, PX)[0]).save(root / "images" / "t001.jpg", quality=95)
    source = open_source(root)
    source.check()
    tiles = source.tiles()
    assert np.array_equal(source.read_image(tiles[0]), image)
    with rasterio.open(root / "images" / "t001.jpg") as file:
        assert np.array_equal(source.read_image(tiles[1]), file.read().transpose(1, 2, 0))
    assert "gdal" in source.decoder and not survey(source).tile_faults


OTHERS = {
    "16 bits": (lambda i: i.astype(np.uint16), "its values are uint16"),
    "four bands": (lambda i: np.concatenate([i, i[:1]]), "found 4 bands of uint8, 32 x 32 px"),
    "grey": (lambda i: i[:1], "the file has 1 band"),
    "size": (lambda i: i[:, :30], "found 3 bands of uint8, 32 x 30 px"),
}


@pytest.mark.parametrize(("change", "said"), OTHERS.values(), ids=OTHERS.keys())
def test_other_rasters_are_a_fault_of_their_tile_as_long_as_nobody_says_how(root: Path, change: Any, said: str) -> None:
    replace(root, "images", change(make_tile(0, PX)[0].transpose(2, 0, 1)))
    if "30 px" in said:  # a mask of another size than its image is a fault of the dataset
        replace(root, "masks", make_tile(0, PX)[1][None, :30])
    source = open_source(root)
    source.check()
    with pytest.raises(TileError) as caught:
        source.read_image(source.tiles()[0])
    assert said in str(caught.value) and "t000.tif" in str(caught.value)


def test_bands_and_a_range_make_tiles_of_values(root: Path) -> None:
    for index in range(6):
        image, _ = make_tile(index, PX)
        bands = np.stack([image[..., 2], image[..., 1], image[..., 0], image[..., 0]]).astype(np.uint16) * 16
        replace(root, "images", bands, f"t{index:03}")
    edit_header(root, pixels={"bands": [3, 2, 1], "scale": [[0, 4080]] * 3, "dtype": "uint16"})
    source = open_source(root)
    source.check()
    for index, tile in enumerate(source.tiles()):
        assert np.array_equal(source.read_image(tile), make_tile(index, PX)[0])
    assert source.pixels is not None and source.pixels.dtype == "uint16"


def test_16_bit_png_is_read_by_the_rule(root: Path) -> None:
    for index in range(6):
        grey = make_tile(index, PX)[0][..., 0].astype(np.uint16) * 100
        Image.fromarray(grey).save(root / "images" / f"t{index:03}.png")
    edit_header(root, pixels={"bands": [1, 1, 1], "scale": [[0, 25500]] * 3, "dtype": "uint16"})
    source = open_source(root)
    source.check()
    wanted = np.stack([make_tile(2, PX)[0][..., 0]] * 3, -1)
    assert np.array_equal(source.read_image(source.tiles()[2]), wanted)


def test_no_data_of_a_tile_is_invalid(root: Path) -> None:
    image, _ = make_tile(0, PX)
    image = np.maximum(image, 1)
    image[3:9, 5:7] = 0
    replace(root, "images", image.transpose(2, 0, 1), nodata=0)
    source = open_source(root)
    found, valid = source.read_valid(source.tiles()[0])
    assert np.array_equal(found, image) and valid is not None
    assert np.array_equal(~valid, (image == 0).all(-1))
    assert source.read_valid(source.tiles()[1])[1] is None


def test_where_an_image_holds_no_data_a_plain_mask_has_no_label_either(root: Path) -> None:
    image, mask = make_tile(0, PX)
    alpha = np.full((1, PX, PX), 255, np.uint8)
    alpha[0, :16] = 0
    pixels = np.concatenate([image.transpose(2, 0, 1), alpha])
    replace(root, "images", pixels, photometric="RGB", ALPHA="YES")
    for index in range(1, 6):
        replace(root, "images", np.concatenate([make_tile(index, PX)[0].transpose(2, 0, 1), alpha]), f"t{index:03}")
    edit_header(root, pixels={"bands": [1, 2, 3]})
    source = open_source(root)
    source.check()
    found = source.read_mask(source.tiles()[0])
    assert (found[:16] == 255).all() and np.array_equal(found[16:], mask[16:])


@pytest.mark.parametrize("part", [0.97, 0.6, 0.1])
def test_a_png_that_is_cut_short_is_told_by_gdal_s_way_too(root: Path, part: float) -> None:
    for folder in ("images", "masks"):
        path = root / folder / "t000.png"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    edit_header(root, pixels={"bands": [1, 2, 3]}, labels={"kind": "values"})
    source = open_source(root)
    with pytest.raises(TileError, match="truncated"):
        source.read_image(source.tiles()[0])
    Image.fromarray(make_tile(0, PX)[0]).save(root / "images" / "t000.png")
    with pytest.raises(DataError, match=r"masks/t000\.png: truncated"):
        open_source(root).check()


def test_masks_of_colours_and_of_other_values_become_class_numbers(root: Path) -> None:
    colors = np.array([[9, 9, 9], [0, 250, 0], [250, 0, 0]], np.uint8)
    for index in range(6):
        Image.fromarray(colors[make_tile(index, PX)[1]]).save(root / "masks" / f"t{index:03}.png")
    classes = [{"name": f"c{n}", "color": [n, n, n], "values": [c.tolist()]} for n, c in enumerate(colors)]
    edit_header(root, classes=classes)
    with pytest.raises(DataError, match="is not a number, as labels of kind values have"):
        open_source(root)
    edit_header(root, classes=classes, labels={"kind": "colors"})
    source = open_source(root)
    source.check()
    for index, tile in enumerate(source.tiles()):
        assert np.array_equal(source.read_mask(tile), make_tile(index, PX)[1])
    values = [{"name": f"c{n}", "color": [n, n, n], "values": [7 * n, 7 * n + 1]} for n in range(3)]
    edit_header(root, classes=values, labels={"kind": "values"})
    for index in range(6):
        mask = make_tile(index, PX)[1] * 7 + (make_tile(index, PX)[1] + index) % 2
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"t{index:03}.png")
    source = open_source(root)
    source.check()
    for index, tile in enumerate(source.tiles()):
        assert np.array_equal(source.read_mask(tile), make_tile(index, PX)[1])


def test_colour_masks_without_a_word_are_refused_with_what_to_write(root: Path) -> None:
    Image.fromarray(np.zeros((PX, PX, 3), np.uint8)).save(root / "masks" / "t000.png")
    with pytest.raises(DataError, match=r"masks/t000\.png: found 8-bit RGB.*`labels: \{kind: colors\}`"):
        open_source(root).check()


def test_1_bit_masks_are_classes_0_and_1_and_palettes_their_indices(root: Path) -> None:
    mask = make_tile(0, PX)[1] > 0
    Image.fromarray(mask).save(root / "masks" / "t000.png")
    indices = make_tile(1, PX)[1]
    paletted = Image.fromarray(indices)
    paletted.putpalette(bytes(range(9)) * 3)
    paletted.save(root / "masks" / "t001.png")
    source = open_source(root)
    source.check()
    assert np.array_equal(source.read_mask(source.tiles()[0]), mask)
    assert np.array_equal(source.read_mask(source.tiles()[1]), indices)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_2_and_4_bits_are_refused(root: Path, bits: int) -> None:
    """Viewers write them stretched to 255: the number in the file is not what one sees."""
    data = png(PX, PX, bits, 0, b"".join(b"\0" + bytes(PX * bits // 8) for _ in range(PX)))
    (root / "masks" / "t000.png").write_bytes(data)
    with pytest.raises(DataError, match=f"found {bits}-bit grey"):
        open_source(root).check()


def test_masks_as_geotiff_have_to_lie_on_their_image(root: Path) -> None:
    image, mask = make_tile(0, PX)
    replace(root, "images", image.transpose(2, 0, 1))
    replace(root, "masks", mask[None])
    open_source(root).check()
    (root / "masks" / "t000.tif").unlink()
    write_scene(root / "masks" / "t000.tif", mask[None], crs="EPSG:4326")
    with pytest.raises(DataError, match=r"the scene has the CRS EPSG:32633, the labels EPSG:4326"):
        open_source(root).check()
    write_scene(root / "masks" / "t000.tif", np.full((1, PX, PX), 77, np.uint8))
    with pytest.raises(DataError, match="value 77 at row 0, column 0"):
        open_source(root).check()


FAULTS = {
    "range": ({"pixels": {"scale": [[5, 1]] * 3}}, r"\[5, 1\] is no range"),
    "type without": ({"pixels": {"dtype": "uint16"}}, "values of type uint16 need one"),
    "band 0": ({"pixels": {"bands": [0, 1, 2]}}, r"pixels\.bands\.0"),
    "misspelt": ({"pixels": {"band": [1, 1, 1]}}, "Did you mean 'bands'"),
    "polygons": ({"labels": {"kind": "polygons"}}, "polygons are laid over scenes"),
    "kind": ({"kind": "cubes"}, "'tiles' or 'scenes'"),
}


@pytest.mark.parametrize(("changes", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_a_rule_at_fault_is_named_by_its_key(root: Path, changes: dict[str, Any], said: str) -> None:
    edit_header(root, **changes)
    with pytest.raises(DataError, match=said):
        open_source(root)


def test_another_rule_decodes_again_what_was_remembered(root: Path) -> None:
    for index in range(6):
        replace(root, "images", make_tile(index, PX)[0].transpose(2, 0, 1), f"t{index:03}")
    first = TileDigests(open_source(root)).path
    edit_header(root, pixels={"bands": [3, 2, 1]})
    assert TileDigests(open_source(root)).path != first
