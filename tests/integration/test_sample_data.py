"""The land-cover sample: its counts, its geometry, its splits, and that it appears complete or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from rsmtdf_cache.errors import DataError, MismatchError, ResourceError
from rsmtdf_cache.events import Event, Progress, ProgressEnd, ProgressStart
from rsmtdf_cache.sources import Tile, TileSource, open_source
from rsmtdf_cache.sources.landcover import RASTER_FOLDER, RASTER_SHA256, build_sample
from rsmtdf_cache.sources.survey import class_pixels
from rsmtdf_cli.app import app

FOLDERS = ("images", "masks")
IMAGE_FILE, LABEL_FILE = RASTER_SHA256
IGBP = {"water": [0], "forest": [1, 2, 3, 4, 5], "shrubland": [6, 7], "savanna": [8, 9], "grassland": [10]}
IGBP |= {"cropland": [12, 14], "barren": [16], "snow_ice": [15]}

# Decoded pixels of all tiles by id. Labels are lossless; images also depend on the JPEG decoder (libjpeg-turbo).
MASKS_SHA256 = "1d290f44fea0aabc0f30383d1270628868da208b0deff7f8fdf4e36808af0672"
IMAGES_SHA256 = "937a3cbdf8e14f5cc76566761bcc485241441e407302fca84a97a1093dcb815b"


@pytest.fixture(scope="module")
def source(sample_root: Path) -> TileSource:
    return open_source(sample_root)


def pixels_sha256(source: TileSource) -> tuple[str, str]:
    images, masks = hashlib.sha256(), hashlib.sha256()
    for tile in sorted(source.tiles(), key=lambda tile: tile.id):
        images.update(tile.id.encode() + source.read_image(tile).tobytes())
        masks.update(tile.id.encode() + source.read_mask(tile).tobytes())
    return images.hexdigest(), masks.hexdigest()


def column(tile: Tile) -> int:
    return int(tile.id[4:])


def corner(tile: Tile) -> tuple[float, float]:
    assert tile.georeference is not None
    return tile.georeference.affine[2], tile.georeference.affine[5]


def degrees(tile: Tile) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return longitude ``[256]`` and latitude ``[256]`` of the pixel centres, by the tile's affine."""
    assert tile.georeference is not None
    a, b, c, d, e, f = tile.georeference.affine
    assert b == d == 0
    centres = np.arange(256) + 0.5
    return a * centres + c, e * centres + f


def test_the_sample_is_sound_and_has_the_stated_tiles(source: TileSource) -> None:
    source.check()
    assert {name: len(source.split(name)) for name in source.split_names()} == {
        "train": 132, "val": 37, "test": 56, "labeled/5": 7, "labeled/10": 13, "labeled/25": 33,
    }  # fmt: skip
    assert [c.name for c in source.classes] == list(IGBP)
    assert len({c.color for c in source.classes}) == 8
    assert (source.tile_px, source.ignore_index) == (256, 255)


def test_classes_have_the_stated_shares_of_train(source: TileSource) -> None:
    counts = class_pixels(source, source.tiles(["train"]))
    percent = 100 * counts / counts.sum()
    assert percent == pytest.approx([24.2, 14.1, 7.2, 16.6, 17.0, 7.5, 11.5, 0.9, 1.0], abs=0.1)


def test_no_column_of_tiles_is_in_two_splits(source: TileSource) -> None:
    columns = {name: {column(t) for t in source.tiles([name])} for name in ("train", "val", "test")}
    assert not columns["train"] & columns["val"]
    assert not columns["train"] & columns["test"]
    assert not columns["val"] & columns["test"]


def test_no_source_pixel_is_in_two_tiles(source: TileSource) -> None:
    """Corners lie on one grid of 128 source pixels (128/15 degrees), each point of it taken once."""
    corners = [corner(tile) for tile in source.tiles()]
    steps = np.array([((x + 180) * 15 / 128, ((90 - y) * 15 - 262) / 128) for x, y in corners])
    np.testing.assert_allclose(steps, steps.round(), atol=1e-9)
    assert len({tuple(s) for s in steps.round()}) == 225


def test_labeled_subsets_are_nested_in_train_and_hold_every_class(source: TileSource) -> None:
    chain = [set(source.split(name)) for name in ("5", "10", "25", "train")]
    assert all(small < large for small, large in itertools.pairwise(chain))
    for name in ("5", "10", "25"):
        assert (class_pixels(source, source.tiles([name]))[:8] > 0.05 * 256**2).all()


def test_the_affine_leads_from_each_pixel_to_its_label_cell(source: TileSource) -> None:
    codes = np.asarray(Image.open(RASTER_FOLDER / LABEL_FILE))
    expected = np.full(256, 255)
    for number, igbp in enumerate(IGBP.values()):
        expected[igbp] = number
    for tile in source.tiles()[::3]:
        longitude, latitude = degrees(tile)
        x, y = (longitude + 180) * 20, (90 - latitude) * 20
        # a pixel centre on the border of two cells may take either
        inside_x, inside_y = (np.abs(v - v.round()) > 1e-6 for v in (x, y))
        cells = expected[codes[np.ix_(y[inside_y].astype(int), x[inside_x].astype(int))]]
        assert cells.size > 25_000
        np.testing.assert_array_equal(source.read_mask(tile)[np.ix_(inside_y, inside_x)], cells)


def test_the_affine_leads_from_each_pixel_to_its_place_in_the_picture(source: TileSource) -> None:
    """The mean of two by two tile pixels is the source pixel there, not one beside it."""
    picture = np.asarray(Image.open(RASTER_FOLDER / IMAGE_FILE)).astype(float)
    for tile in source.tiles()[::25]:
        longitude, latitude = degrees(tile)
        x, y = ((longitude[::2] + 180) * 15).astype(int), ((90 - latitude[::2]) * 15).astype(int)
        means = source.read_image(tile).reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
        shifts = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
        here, *beside = (float(np.abs(means - picture[np.ix_(y + dy, x + dx)]).mean()) for dy, dx in shifts)
        assert here < 2
        assert here < 0.5 * min(beside)


def test_pixels_are_those_recorded_when_the_sample_was_defined(source: TileSource) -> None:
    assert pixels_sha256(source) == (IMAGES_SHA256, MASKS_SHA256)


def test_attribution_travels_with_the_sample(source: TileSource) -> None:
    for text in (source.attribution, (source.root / "ATTRIBUTION.md").read_text()):
        assert "Blue Marble" in text
        assert "MCD12C1" in text
        assert "public domain" in text


@pytest.mark.parametrize("name", [IMAGE_FILE, LABEL_FILE])
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_a_damaged_raster_is_one_error_with_both_digests(tmp_path: Path, name: str, damage: str) -> None:
    rasters = Path(shutil.copytree(RASTER_FOLDER, tmp_path / "rasters"))
    data = bytearray((rasters / name).read_bytes())
    if damage == "missing":
        (rasters / name).unlink()
        found = "no readable file"
    else:
        data[len(data) // 2] ^= 1
        data = data if damage == "flipped bit" else data[:-1]
        (rasters / name).write_bytes(data)
        found = hashlib.sha256(data).hexdigest()
    with pytest.raises(DataError, match=f"{name}.*expected sha256 {RASTER_SHA256[name]}, found {found}") as caught:
        build_sample(tmp_path / "out", rasters=rasters)
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path) == ["rasters"]


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    seen: list[Event] = []

    def interrupt(event: Event) -> None:
        seen.append(event)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_sample(tmp_path / "deep" / "out", interrupt)
    assert os.listdir(tmp_path / "deep") == []


def test_a_second_build_makes_the_same_pixels_and_adopts_what_another_published_first(
    sample_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    events: list[Event] = []
    same: list[bool] = []

    def overtake(event: Event) -> None:
        events.append(event)
        if isinstance(event, ProgressEnd):
            (partial,) = tmp_path.iterdir()
            for name in (f"{folder}/{t.id}.png" for t in open_source(sample_root).tiles() for folder in FOLDERS):
                with Image.open(sample_root / name) as one, Image.open(partial / name) as other:
                    same.append(one.mode == other.mode and one.tobytes() == other.tobytes())
            shutil.copytree(sample_root, out)

    assert build_sample(out, overtake) is False
    assert same == [True] * 450
    assert os.listdir(tmp_path) == ["out"]
    assert open_source(out).split("5") == open_source(sample_root).split("5")
    assert isinstance(events[0], ProgressStart)
    assert events[0].total == sum(e.advance for e in events if isinstance(e, Progress)) == 225


def test_a_file_in_the_way_of_the_folder_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        build_sample(tmp_path / "file" / "out")


def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MismatchError, match="holds something else"):
        build_sample(tmp_path)
    with pytest.raises(MismatchError):
        build_sample(tmp_path / "notes.txt")
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_a_sample_that_was_changed_is_not_taken_for_whole(sample_root: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(sample_root, tmp_path / "copy"))
    name = "masks/new.png" if damage == "added" else f"masks/{open_source(copy).split('train')[0]}.png"
    if damage == "missing":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(b"x")
    with pytest.raises(MismatchError, match=f"1 changed, added or missing files, first {name}"):
        build_sample(copy)


def test_lists_that_a_user_adds_are_no_change_of_the_sample(sample_root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample_root, tmp_path / "copy"))
    (copy / "splits/labeled/typical-5p.txt").write_text(open_source(copy).split("train")[0] + "\n")
    assert build_sample(copy) is False
    assert "labeled/typical-5p" in open_source(copy).split_names()
    (copy / "splits/labeled/5.txt").write_text("mine\n")
    with pytest.raises(MismatchError, match=r"first splits/labeled/5\.txt"):
        build_sample(copy)


def run(arguments: Sequence[str]) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_the_command_says_that_the_sample_is_there_and_ends_with_0(sample_root: Path) -> None:
    times = {p: p.stat().st_mtime_ns for p in sample_root.rglob("*")}
    code, text, notes = run(["data", "sample", "--out", str(sample_root)])
    assert (code, "holds this sample already" in notes) == (0, True)
    assert "snow_ice" in text
    assert {p: p.stat().st_mtime_ns for p in sample_root.rglob("*")} == times
    assert run(["data", "sample", "--out", str(sample_root), "-q"]) == (0, "", "")


def test_info_reports_classes_splits_and_faults_as_json(sample_root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample_root, tmp_path / "copy"))
    broken = open_source(copy).split("test")[0]
    (copy / "images" / f"{broken}.png").write_bytes(b"")
    code, text, _ = run(["data", "info", str(copy), "--json", "-q"])
    data = json.loads(text)
    assert code == 0
    assert data["splits"]["train"]["tiles"] == 132
    assert data["splits"]["labeled/5"]["tiles"] == 7
    assert data["splits"]["train"]["shares"]["water"] == pytest.approx(0.242, abs=0.001)
    assert [c["name"] for c in data["classes"]] == list(IGBP)
    assert [(f["level"], f["tile"]) for f in data["faults"]] == [("tile", broken)]


def test_info_of_a_faulty_dataset_shows_it_and_ends_with_3(sample_root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample_root, tmp_path / "copy"))
    (copy / "splits" / "val.txt").write_text("")
    code, text, errors = run(["data", "info", str(copy)])
    assert code == 3
    assert "snow_ice" in text
    assert "val.txt: the split is empty" in errors
    code, text, _ = run(["data", "info", str(copy), "--json", "-q"])
    assert code == 3
    assert [f["level"] for f in json.loads(text)["faults"]] == ["dataset"]
    assert run(["data", "info", str(tmp_path / "nothing")])[0] == 3


def test_a_full_disk_ends_with_6_and_leaves_nothing(tmp_path: Path) -> None:
    """A real process that may write no file over 20 kB: the system refuses the first larger picture."""
    code = "from rsmtdf_cli.app import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "data", "sample", "--out", str(tmp_path / "out"), "-q"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 6
    assert "cannot be written" in result.stderr
    assert os.listdir(tmp_path) == []
