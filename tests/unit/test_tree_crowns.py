"""The script that builds the tree-crown dataset: masks from boxes, splits, and what it refuses."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench.tree_crowns import MEMBERS, CrownTile, crown_boxes, crown_mask, labeled_order, main, write_crowns
from rsmtdf_cache.errors import DataError, MismatchError
from rsmtdf_cache.sources import open_source

BACKGROUND, TREE, UNKNOWN = 0, 1, 255

boxes = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(4, 12), st.integers(4, 12)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(st.lists(boxes, max_size=6))
def test_a_box_is_a_crown_with_unknown_corners_whatever_the_order(found: list[tuple[int, int, int, int]]) -> None:
    mask = crown_mask(found, 64, 64)
    inside = np.zeros((64, 64), bool)
    for left, top, right, bottom in found:
        inside[top : bottom + 1, left : right + 1] = True
        assert mask[(top + bottom) // 2, (left + right) // 2] == TREE
        assert (mask[top : bottom + 1, left : right + 1] == TREE).mean() > 0.6  # an ellipse fills pi / 4
    assert ((mask == BACKGROUND) == ~inside).all()
    np.testing.assert_array_equal(mask, crown_mask(found[::-1], 64, 64))
    if len(found) == 1:
        left, top, right, bottom = found[0]
        assert mask[top, left] == mask[top, right] == mask[bottom, left] == mask[bottom, right] == UNKNOWN


def test_annotations_count_pixels_from_one() -> None:
    box = "<xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>13</ymax>"
    xml = f"<annotation><object><bndbox>{box}</bndbox></object></annotation>".encode()
    assert crown_boxes(xml) == [(0, 1, 10, 12)]
    for bad in (b"no xml", xml.replace(b"13", b"many"), xml.replace(b"<ymin>2</ymin>", b"")):
        with pytest.raises(DataError, match="Pascal VOC"):
            crown_boxes(bad)


@given(st.dictionaries(st.text("abc0123", min_size=1, max_size=4), st.sets(st.integers(0, 3)), min_size=1))
def test_the_first_few_tiles_hold_every_class_that_any_tile_holds(held: dict[str, set[int]]) -> None:
    order = labeled_order(held, 4)
    assert sorted(order) == sorted(held)
    there = set().union(*held.values())
    assert set().union(*(held[i] for i in order[: len(there)])) == there
    assert order == labeled_order(dict(reversed(held.items())), 4)


def crowns(count: int = 40) -> list[CrownTile]:
    tiles = []
    for n in range(count):
        mask = crown_mask([(20, 20, 20 + 5 * n, 200)] if n % 4 == 0 and n else [], 256, 256)
        image = np.full((256, 256, 3), n, np.uint8)
        tiles.append(CrownTile(f"t{n}", "val" if n % 5 == 2 else "train", image, mask))
    return tiles


def test_the_dataset_is_whole_nested_and_written_once(tmp_path: Path) -> None:
    out = tmp_path / "new" / "data"
    assert write_crowns(out, crowns()) is True
    source = open_source(out)
    source.check()
    assert source.split_names() == ["train", "val", "labeled/10", "labeled/25"]
    assert [len(source.split(s)) for s in ("train", "val", "10", "25")] == [32, 8, 3, 8]
    assert set(source.split("10")) < set(source.split("25"))
    tiles = {t.id: t for t in source.tiles(["train"])}
    held = np.concatenate([np.unique(source.read_mask(tiles[i])) for i in source.split("10")])
    assert {BACKGROUND, TREE} <= set(held.tolist())
    for tile in crowns():
        there = next(t for t in source.tiles() if t.id == tile.id)
        np.testing.assert_array_equal(source.read_mask(there), tile.mask)
        np.testing.assert_array_equal(source.read_image(there), tile.image)
    assert write_crowns(out, crowns()) is False
    (out / "splits" / "val.txt").write_text("t2\n")
    with pytest.raises(MismatchError, match="holds something else"):
        write_crowns(out, crowns())
    assert [p.name for p in out.parent.iterdir()] == ["data"]


def test_tiles_of_a_folder_make_the_dataset_that_they_were_taken_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tile in crowns(12):
        for kind, pixels in (("images_png", tile.image), ("masks_png", tile.mask)):
            path = tmp_path / "tiles" / tile.split / kind / f"{tile.id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    assert main([str(tmp_path / "a"), "--from", str(tmp_path / "tiles")]) == 0
    assert write_crowns(tmp_path / "a", crowns(12)) is False
    assert "10 train and 2 val tiles" in capsys.readouterr().out
    path.unlink()
    assert main([str(tmp_path / "b"), "--from", str(tmp_path / "tiles")]) == 3
    assert not (tmp_path / "b").exists() and path.name in capsys.readouterr().err


def test_another_wheel_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(next(iter(MEMBERS)), b"other pixels")
    assert main([str(tmp_path / "a"), "--wheel", str(wheel)]) == 3
    assert "expected" in capsys.readouterr().err
    assert main([str(tmp_path / "a"), "--wheel", str(tmp_path / "none.whl")]) == 3
    assert main([str(tmp_path / "a"), "--wheel", str(wheel), "--from", str(tmp_path)]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.whl"]
