"""The folder source: what it accepts, and one clear error for every fault of a dataset or a tile."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsmtdf_cache.errors import DataError, TileError
from rsmtdf_cache.sources import Georeference, TileSource, open_source
from rsmtdf_cache.sources.survey import class_pixels, survey
from tests.datasets import edit_header, make_tile, png, write_dataset, write_split

PX = 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", tiles=6, tile_px=PX)


def files(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_tiles_are_read_back_as_they_were_written(root: Path) -> None:
    source = open_source(root)
    source.check()
    tiles = source.tiles()
    assert [t.id for t in tiles] == [f"t{i:03}" for i in range(6)]
    assert [t.split for t in tiles] == ["train"] * 4 + ["val"] + ["test"]
    for index, tile in enumerate(tiles):
        image, mask = make_tile(index, PX)
        np.testing.assert_array_equal(source.read_image(tile), image)
        np.testing.assert_array_equal(source.read_mask(tile), mask)
    assert (source.name, source.tile_px, source.ignore_index, len(source.classes)) == ("tiny", PX, 255, 3)


def test_the_short_name_of_a_labeled_subset_means_the_long_one(root: Path) -> None:
    source = open_source(root)
    assert source.split_names() == ["train", "val", "test", "labeled/5", "labeled/10", "labeled/25"]
    assert source.split("25") == source.split("labeled/25") == ["t000", "t001", "t002"]
    assert {t.split for t in source.tiles(["5"])} == {"train"}


def test_overlapping_splits_give_each_tile_once_in_the_order_of_splits(root: Path) -> None:
    tiles = open_source(root).tiles(["test", "25", "train", "labeled/5"])
    assert [(t.split, t.id) for t in tiles] == [("train", f"t{i:03}") for i in range(4)] + [("test", "t005")]


def test_georeference_is_optional_and_read_exactly(tmp_path: Path) -> None:
    bare = open_source(write_dataset(tmp_path / "bare", tiles=3, tile_px=PX))
    placed = open_source(write_dataset(tmp_path / "placed", tiles=3, tile_px=PX, georeference=True))
    assert [t.georeference for t in bare.tiles()] == [None] * 3
    assert placed.tiles()[2].georeference == Georeference("EPSG:4326", (1 / PX, 0.0, 2.0, 0.0, -1 / PX, 50.0))


@pytest.mark.parametrize("line", ["t000,EPSG:4326,1,0,0,0,x,0", "t000,EPSG:4326,1,0,0", "t000,EPSG:4326,0,0,0,0,0,0"])
def test_an_unusable_affine_is_refused_with_its_line(root: Path, line: str) -> None:
    (root / "georeference.csv").write_text(f"id,crs,a,b,c,d,e,f\n{line}\n")
    with pytest.raises(DataError, match=r"georeference\.csv, line 2"):
        open_source(root).tiles()


def test_a_missing_folder_and_a_missing_header_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_source(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no dataset\.yaml"):
        open_source(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder"):
        open_source(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"til_px": 3}, r"til_px: unknown key\. Did you mean 'tile_px'\?"),
        ({"tile_px": "wide"}, "tile_px: .* valid integer.*'wide'"),
        ({"masks": "some"}, "masks: .*'complete' or 'partial'"),
        ({"classes": []}, "classes: .*at least 1"),
        ({"classes": [{"name": "a", "color": [0, 0, 300]}]}, r"classes\.0\.color\.2: .*300"),
        ({"classes": [{"name": "a", "colour": [0, 0, 3]}]}, "Did you mean 'color'"),
        ({"classes": [{"name": "a", "color": [0, 0, 3]}] * 2}, "'a' stands twice"),
        ({"ignore_index": 1}, "ignore_index 1 is also the number of class 'class1'"),
    ],
)
def test_a_wrong_header_is_refused_with_its_key(root: Path, changes: dict[str, object], message: str) -> None:
    edit_header(root, **changes)
    with pytest.raises(DataError, match=message):
        open_source(root)


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_a_header_that_is_no_mapping_is_refused(root: Path, text: str) -> None:
    (root / "dataset.yaml").write_text(text)
    with pytest.raises(DataError, match=r"dataset\.yaml: (not YAML|expected keys)"):
        open_source(root)


def mask_of(root: Path, value: int, row: int, column: int) -> None:
    mask = make_tile(0, PX)[1]
    mask[row, column] = value
    Image.fromarray(mask).save(root / "masks" / "t000.png")


def resize(path: Path) -> None:
    Image.open(path).resize((PX // 2, PX)).save(path)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "image without mask": (lambda r: (r / "masks/t001.png").unlink(), r"t001\.png has no mask masks/t001\.png"),
    "mask without image": (lambda r: (r / "images/t001.png").unlink(), r"mask .*t001\.png has no image"),
    "no masks folder": (lambda r: (r / "masks").rename(r / "labels"), "masks: cannot be listed"),
    "sizes differ": (lambda r: resize(r / "masks/t000.png"), r"t000\.png is 16 x 32 px, its image t000\.png 32 x 32"),
    "label outside": (lambda r: mask_of(r, 3, 4, 7), r"masks/t000\.png: value 3 at row 4, column 7 \(1 such pixels\)"),
    "label 254": (lambda r: mask_of(r, 254, 31, 31), "value 254 at row 31, column 31"),
    "mask not decodable": (lambda r: (r / "masks/t000.png").write_bytes(b"x"), r"mask .*t000\.png: not a PNG"),
    "mask truncated": (
        lambda r: (r / "masks/t000.png").write_bytes((r / "masks/t000.png").read_bytes()[:60]),
        r"mask .*t000\.png: truncated",
    ),
    "mask in colour": (
        lambda r: Image.open(r / "images/t000.png").save(r / "masks/t000.png"),
        r"mask .*t000\.png: found 8-bit RGB.*one band",
    ),
    "mask of 16 bits": (
        lambda r: Image.fromarray(np.zeros((PX, PX), np.uint16)).save(r / "masks/t000.png"),
        "found 16-bit grey",
    ),
    "id twice in a split": (lambda r: append(r / "splits/train.txt", "t000\n"), r"train\.txt: tile id 't000' .*twice"),
    "id in two splits": (lambda r: append(r / "splits/test.txt", "t000\n"), "'t000' is in splits train and test"),
    "two files of one id": (
        lambda r: Image.new("RGB", (PX, PX)).save(r / "images/t002.jpg"),
        r"'t002' stands twice: t002\.jpg, t002\.png",
    ),
    "one id in two cases of suffix": (
        lambda r: Image.new("RGB", (PX, PX)).save(r / "images/t002.PNG"),
        r"'t002' stands twice: t002\.PNG, t002\.png",
    ),
    "id without image": (
        lambda r: append(r / "splits/train.txt", "t0000\n"),
        r"train\.txt: id 't0000' has no image file .*Did you mean 't000'",
    ),
    "empty split": (lambda r: write_split(r, "val", []), r"val\.txt: the split is empty"),
    "blank split": (lambda r: (r / "splits/test.txt").write_text(" \n\n"), r"test\.txt: the split is empty"),
    "labeled outside train": (lambda r: write_split(r, "labeled/5", ["t005"]), "'t005' is not in splits/train.txt"),
    "no splits": (lambda r: (r / "splits").rename(r / "lists"), "no split 'train'.*none"),
    "path as id": (lambda r: append(r / "splits/train.txt", "../t000\n"), "'../t000' cannot be a tile id"),
    "hidden id": (lambda r: append(r / "splits/train.txt", ".t000\n"), "'.t000' cannot be a tile id"),
    "split not text": (lambda r: (r / "splits/val.txt").write_bytes(b"\xff\xfe\x00"), r"val\.txt: cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_dataset_stops_with_one_data_error_and_no_write(root: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(root)
    before = files(root)
    with pytest.raises(DataError, match=message) as caught:
        open_source(root).check()
    assert type(caught.value) is DataError
    assert caught.value.exit_code == 3
    assert files(root) == before


def test_only_masks_of_the_asked_splits_are_judged(root: Path) -> None:
    (root / "masks" / "t005.png").write_bytes(b"x")
    source = open_source(root)
    source.check(["train", "val"])
    with pytest.raises(DataError, match=r"t005\.png"):
        source.check(["test"])


def test_an_unknown_split_is_named_with_a_suggestion_and_the_list(root: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'trian'\. Did you mean 'train'\? Splits there: train, val, test, l"):
        open_source(root).split("trian")


def test_partial_masks_allow_tiles_without_labels_but_not_in_a_labeled_subset(root: Path) -> None:
    edit_header(root, masks="partial")
    (root / "masks" / "t003.png").unlink()
    source = open_source(root)
    source.check()
    tile = source.tiles()[3]
    assert tile.mask is None
    with pytest.raises(DataError, match=r"'t003' .* no mask"):
        source.read_mask(tile)
    (root / "masks" / "t000.png").unlink()
    with pytest.raises(DataError, match=r"labeled/5\.txt: tile 't000' has no mask"):
        open_source(root).check()


def test_hidden_files_and_notes_are_no_tiles(root: Path) -> None:
    (root / "images" / ".DS_Store").touch()
    (root / "images" / "._t009.png").touch()
    (root / "masks" / "README.txt").touch()
    open_source(root).check()


def test_a_palette_mask_is_read_as_its_indices(root: Path) -> None:
    mask = make_tile(0, PX)[1]
    image = Image.fromarray(mask, mode="P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    image.save(root / "masks" / "t000.png")
    source = open_source(root)
    source.check()
    np.testing.assert_array_equal(source.read_mask(source.tiles()[0]), mask)


def tile_reason(source: TileSource, data: bytes) -> str:
    """Put ``data`` in place of the first image and return why the tile is refused; the dataset stays sound."""
    tile = source.tiles()[0]
    tile.image.write_bytes(data)
    with pytest.raises(TileError) as caught:
        source.read_image(tile)
    assert caught.value.tile_id == tile.id
    source.check()
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(PX, PX, 16, 2, bytes(PX * (1 + 6 * PX))), "found 16-bit RGB,"),
        (png(PX, PX, 8, 6, bytes(PX * (1 + 4 * PX))), r"found 8-bit RGB with alpha \(4 bands\)"),
        (png(PX, PX, 8, 0, bytes(PX * (1 + PX))), r"found 8-bit grey \(1 band\)"),
        (png(PX, PX, 16, 0, bytes(PX * (1 + 2 * PX))), "found 16-bit grey"),
        (png(PX, PX, 8, 2, bytes(7)), "cannot be decoded"),
        (png(PX, PX, 8, 2, b"\x09" * (PX * (1 + 3 * PX))), "cannot be decoded"),
        (b"", "empty"),
        (b"\xff\xd8\xff\xe0 a photo", "not a PNG file but JPEG"),
        (b"P6 32 32 255 ", "not a PNG file$"),
    ],
)
def test_an_image_of_another_kind_costs_its_tile_and_is_never_converted(root: Path, data: bytes, reason: str) -> None:
    assert re.search(reason, tile_reason(open_source(root), data))


@pytest.mark.parametrize("side", [PX - 1, 2 * PX, 2**31 - 1])
def test_an_image_of_another_size_costs_its_tile_before_memory_is_taken(root: Path, side: int) -> None:
    data = png(side, side, 8, 2, bytes(10))
    mask = png(side, side, 8, 0, bytes(10))  # the same size: no fault of the dataset
    (root / "masks" / "t000.png").write_bytes(mask)
    assert f"{side} x {side} px" in tile_reason(open_source(root), data)


def test_every_cut_of_an_image_file_is_refused(root: Path) -> None:
    source = open_source(root)
    tile = source.tiles()[0]
    whole = tile.image.read_bytes()
    for end in [*range(0, 60), *range(60, len(whole) - 20, 97), *range(len(whole) - 20, len(whole))]:
        tile.image.write_bytes(whole[:end])
        with pytest.raises(TileError, match=r"truncated|empty|not a PNG"):
            source.read_image(tile)


def test_every_flipped_bit_of_an_image_file_is_refused(root: Path) -> None:
    source = open_source(root)
    tile = source.tiles()[0]
    whole = tile.image.read_bytes()
    for position in range(0, len(whole), 31):
        tile.image.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with pytest.raises(TileError):
            source.read_image(tile)


def test_an_image_that_vanished_costs_its_tile(root: Path) -> None:
    source = open_source(root)
    tile = source.tiles()[0]
    tile.image.unlink()
    with pytest.raises(TileError, match="cannot be read"):
        source.read_image(tile)


def test_the_survey_counts_every_pixel_once(root: Path) -> None:
    source = open_source(root)
    mask_of(root, 255, 0, 0)
    expected = np.bincount(make_tile(0, PX)[1].ravel(), minlength=4)
    expected[make_tile(0, PX)[1][0, 0]] -= 1
    expected[3] += 1
    np.testing.assert_array_equal(class_pixels(source, source.tiles(["5"])), expected)
    found = survey(source)
    assert found.splits["labeled/5"].class_shares == pytest.approx(expected[:3] / PX**2)
    assert found.splits["labeled/5"].ignored_share == 1 / PX**2
    assert (found.dataset_fault, found.tile_faults) == (None, ())


def test_the_survey_lists_unusable_tiles_and_leaves_them_out_of_the_shares(root: Path) -> None:
    source = open_source(root)
    (root / "images" / "t004.png").write_bytes(b"")
    found = survey(source)
    assert [f.tile_id for f in found.tile_faults] == ["t004"]
    assert found.splits["val"].class_shares is None
    assert found.splits["val"].tiles == 1
    write_split(root, "val", [])
    broken = survey(open_source(root))
    assert broken.dataset_fault is not None
    assert "empty" in broken.dataset_fault
