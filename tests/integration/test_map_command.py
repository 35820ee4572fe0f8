"""``rsmtdf predict RUN SCENE.tif --out MAP.tif``: place, colours and names as GDAL reads them; signals; bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine, xy

from tests.command_line import call, call_json
from tests.commands import start
from tests.scenes import CLASSES, PLACE, blobs, save_run, write_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("maps")
    save_run(root / "run")
    save_run(root / "other", seed=1)
    write_scene(root / "scene.tif", blobs(150, 230), photometric="rgb")
    return root


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def category_names(path: Path, vrt: Path) -> list[str | None]:
    """Return the names as GDAL reads them: it writes them into the description of a virtual copy."""
    rasterio.shutil.copy(path, vrt, driver="VRT")
    return [e.text for e in ET.parse(vrt).getroot().iterfind("VRTRasterBand/CategoryNames/Category")]


@pytest.mark.parametrize("options", [[], ["--cog"]], ids=["geotiff", "cog"])
def test_gdal_reads_place_no_data_colours_and_names_of_the_map(root: Path, tmp_path: Path, options: list[str]) -> None:
    turned = PLACE @ Affine.rotation(30)
    scene = write_scene(tmp_path / "turned.tif", blobs(140, 700), transform=turned)
    (report,) = call_json("predict", root / "run", scene, "--out", tmp_path / "map.tif", *options)
    assert report["made"] and report["crs"] == "EPSG:32633" and sum(report["shares"].values()) == pytest.approx(1)
    with rasterio.open(tmp_path / "map.tif") as file, rasterio.open(scene) as source:
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        for row, column in ((0, 0), (139, 699), (70, 3)):
            assert xy(file.transform, row, column) == xy(source.transform, row, column)
            assert xy(file.transform, row, column) == pytest.approx(turned @ (column + 0.5, row + 0.5))
        assert file.nodata == 255 and file.dtypes == ("uint8",) and file.compression.value == "DEFLATE"
        colors = file.colormap(1)
        assert [colors[n][:3] for n in range(3)] == [c.color for c in CLASSES] and colors[255][3] == 0
        tags = file.tags()
        assert json.loads(tags["RSMTDF_CLASSES"]) == [c.name for c in CLASSES]
        assert tags["RSMTDF_SCENE"] == "turned.tif" and tags["RSMTDF_WINDOW"] == "64"
        numbers = file.read(1)
        assert set(np.unique(numbers)) <= {0, 1, 2} and len(np.unique(numbers)) > 1
        if options:
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.overviews(1) == [2]
            with rasterio.open(tmp_path / "map.tif", overview_level=0) as small:
                assert set(np.unique(small.read(1))) <= set(np.unique(numbers))
    assert category_names(tmp_path / "map.tif", tmp_path / "map.vrt") == [c.name for c in CLASSES]
    assert hidden(tmp_path) == []
    if shutil.which("gdalinfo"):
        text = subprocess.run(["gdalinfo", tmp_path / "map.tif"], capture_output=True, text=True, check=True).stdout
        assert "32633" in text and "Straße" in text and "NoData Value=255" in text


def test_a_scene_of_one_window_is_segmented_as_the_same_image_is(root: Path, tmp_path: Path) -> None:
    pixels = blobs(50, 64)
    scene = write_scene(tmp_path / "s.tif", pixels)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "s.png")
    call_json("predict", root / "run", scene, "--out", tmp_path / "map.tif")
    (image,) = call_json("predict", root / "run", tmp_path / "s.png", "--out", tmp_path / "p")
    with rasterio.open(tmp_path / "map.tif") as file:
        assert (file.read(1) == np.array(Image.open(image["mask"]))).all()


def test_what_has_a_place_is_a_scene_and_what_has_none_an_image_unless_out_says_so(root: Path, tmp_path: Path) -> None:
    write_scene(tmp_path / "a.tif", blobs(40, 50))
    Image.fromarray(blobs(40, 50).transpose(1, 2, 0)).save(tmp_path / "b.tif")
    Image.fromarray(blobs(40, 50).transpose(1, 2, 0)).save(tmp_path / "c.png")
    found = call_json("predict", root / "run", *(tmp_path / n for n in ("a.tif", "b.tif", "c.png")), "--out", tmp_path)
    assert found[0]["files"] == {"classes": str(tmp_path / "a_map.tif")}
    assert [Path(entry["mask"]).name for entry in found[1:]] == ["b_mask.png", "c_mask.png"]
    code, _, err = call("predict", root / "run", tmp_path / "c.png", "--out", tmp_path / "c_map.tif", "--device", "cpu")
    assert code == 0 and "warning:" in err and "no georeference" in err
    with rasterio.open(tmp_path / "c_map.tif") as file:
        assert file.crs is None and file.shape == (40, 50)


def test_a_dry_run_says_what_it_takes_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "map.tif"
    arguments = ["predict", root / "run", root / "scene.tif", "--out", out, "--dry-run", "--overlap", "32"]
    (found,) = call_json(*arguments, "--probabilities", tmp_path / "new" / "p.tif")
    assert (found["width"], found["height"], found["window_px"], found["overlap_px"]) == (230, 150, [64, 64], 32)
    assert found["windows"] == 4 * 7 and found["strips"] == 1  # 96 and 192 px beyond the first, in steps of 32
    assert found["output_nbytes"] == {"classes": 230 * 150, "probabilities": 3 * 230 * 150}
    code, text, _ = call(*arguments, "--device", "cpu")
    assert code == 0 and "28 of 64 x 64 px" in text
    assert list(tmp_path.iterdir()) == []


def _cut(path: Path) -> Path:
    write_scene(path, blobs(300, 300), tiled=True, blockxsize=64, blockysize=64)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def _by_points(path: Path) -> Path:
    points = [GroundControlPoint(r, c, 10 + c / 99, 50 - r / 99) for r in (0, 40) for c in (0, 50)]
    with rasterio.open(path, "w", driver="GTiff", height=40, width=50, count=3, dtype="uint8") as file:
        file.write(blobs(40, 50))
        file.gcps = (points, rasterio.CRS.from_epsg(4326))
    return path


def _palette(path: Path) -> Path:
    with rasterio.open(path, "w", driver="GTiff", height=40, width=50, count=1, dtype="uint8") as file:
        file.write_colormap(1, {0: (1, 2, 3, 255)})
        file.write(blobs(40, 50, bands=1))
    return path


def _text(path: Path) -> Path:
    path.write_text("no raster")
    return path


BAD: dict[str, tuple[Any, list[str], int, str]] = {
    "missing": (lambda p: p, [], 3, "there is no such file"),
    "text": (_text, [], 3, "GDAL cannot open it"),
    "cut short": (_cut, [], 3, "damaged or cut short"),
    "points only": (_by_points, [], 3, "ground control points only"),
    "palette": (_palette, [], 3, "-expand rgb"),
    "grey": (lambda p: write_scene(p, blobs(40, 50, bands=1)), [], 3, "--bands 1,1,1"),
    "too few bands": (lambda p: write_scene(p, blobs(40, 50)), ["--bands", "1,2,4"], 2, "the file has 3 bands"),
    "bands": (lambda p: write_scene(p, blobs(40, 50)), ["--bands", "1,2"], 2, "give 3 numbers"),
    "float": (lambda p: write_scene(p, blobs(40, 50).astype(np.float32)), [], 2, "--scale LOW,HIGH"),
    "uint16": (lambda p: write_scene(p, blobs(40, 50).astype(np.uint16) * 40), [], 2, "percentiles"),
    "empty float": (lambda p: write_scene(p, np.full((3, 9, 9), np.nan)), [], 2, "has no data"),
    "scale": (lambda p: write_scene(p, blobs(40, 50)), ["--scale", "9,3"], 2, "the lower one first"),
    "complex": (lambda p: write_scene(p, blobs(40, 50).astype(np.complex64)), [], 3, "complex64"),
    "window": (lambda p: write_scene(p, blobs(40, 50)), ["--window", "50"], 2, "multiples of 32 px"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_cannot_be_mapped_is_one_clear_error_and_leaves_nothing(root: Path, tmp_path: Path, case: str) -> None:
    make, options, code, text = BAD[case]
    scene = make(tmp_path / "s.tif")
    before = sorted(tmp_path.iterdir())
    found, out, err = call(
        "predict", root / "run", scene, "--out", tmp_path / "map.tif", "--device", "cpu", "-q", *options
    )
    assert (found, text in err, err.count("error:"), out) == (code, True, 1, ""), err
    assert "Traceback" not in err and sorted(tmp_path.iterdir()) == before


def test_the_range_that_is_suggested_is_that_of_the_scene(root: Path, tmp_path: Path) -> None:
    raw = np.tile(np.arange(1000, 3000, dtype=np.uint16).reshape(40, 50), (3, 1, 1))
    raw[:, :2] = 0
    scene = write_scene(tmp_path / "s.tif", raw, nodata=0)
    arguments = ["predict", root / "run", scene, "--out", tmp_path / "map.tif", "--device", "cpu"]
    _, _, err = call(*arguments)
    low, high = np.percentile(raw[0, 2:], (2, 98))
    assert f"--scale {low:.4g},{high:.4g}" in err
    code, _, err = call(*arguments, "--scale", f"{low:.4g},{high:.4g}")
    assert code == 0, err


@pytest.mark.parametrize(("last", "text"), [
    ("missing.tif", "there is no such file"), ("folder", "is a folder"), ("z.zip/a.tif", "unpack it first"),
])  # fmt: skip
def test_all_files_are_looked_for_before_the_first_is_mapped(root: Path, tmp_path: Path, last: str, text: str) -> None:
    (tmp_path / "folder").mkdir()
    scene = write_scene(tmp_path / "a.tif", blobs(40, 50))
    code, _, err = call("predict", root / "run", scene, tmp_path / last, "--out", tmp_path / "out", "--dry-run", "-q")
    assert code == 3 and text in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "folder"]


@pytest.mark.parametrize(("arguments", "text"), [
    (["c.png", "--tta"], "write --out MAP.tif"),
    (["a.tif", "b.tif", "--out", "m.tif"], "give a folder for several"),
    (["a.tif", "b.tif", "--confidence", "c.tif"], "run them one by one"),
    (["a.tif", "--out", "m.tif", "--confidence", "m.tif"], "the place of classes"),
    (["a.tif", "--out", "m.tif", "--confidence", "c.png"], "maps are GeoTIFF"),
    (["a.tif", "--out", "a.tif"], "that is the scene"),
    (["a.tif", "--out", "b.tif"], "is not this map"),
    (["a.tif", "--out", "map.png"], "end the name of one scene's map in .tif"),
])  # fmt: skip
def test_requests_that_contradict_themselves_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.tif", "b.tif"):
        write_scene(tmp_path / name, blobs(40, 50))
    Image.new("RGB", (32, 32)).save("c.png")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, _, err = call("predict", root / "run", *arguments, "--device", "cpu", "-q")
    assert code == 2 and text in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_stopped_and_killed_runs_continue_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "tall.tif", blobs(5000, 150), tiled=True)
    words = ["predict", root / "run", scene, "--device", "cpu", "--json"]
    whole = start([*words, "--out", tmp_path / "whole.tif", "--confidence", tmp_path / "wc.tif"], tmp_path, "whole")
    assert whole.end() == 0, whole.stderr.read_text()
    words += ["--out", tmp_path / "map.tif", "--confidence", tmp_path / "c.tif"]
    room = tmp_path / ".map.tif.partial"
    for pieces, kill, code in ((1, False, 5), (3, True, -9)):
        command = start(words, tmp_path, f"cut{pieces}")
        until = time.monotonic() + 120
        while len(list(room.glob("*.zlib"))) < pieces and command.runs and time.monotonic() < until:
            time.sleep(0.002)
        os.kill(command.pid, signal.SIGKILL if kill else signal.SIGINT)
        assert command.end() == code, command.stderr.read_text()
        assert not (tmp_path / "map.tif").exists() and not (tmp_path / "c.tif").exists()
        assert len(list(room.glob("*.zlib"))) >= pieces
        if not kill:
            assert "the same command continues" in command.stderr.read_text()
    kept = {p.name: p.stat().st_mtime_ns for p in room.glob("*.zlib")}

    code_, _, err = call(*words[:1], root / "other", *words[2:], "-q")
    assert code_ == 4 and "another student" in err and "student:" in err
    code_, _, err = call(*words, "-q", "--window", "96")
    assert code_ == 4 and "window_px" in err
    assert {p.name: p.stat().st_mtime_ns for p in room.glob("*.zlib")} == kept

    last = start(words, tmp_path, "last")
    assert last.end() == 0, last.stderr.read_text()
    assert "there already" in last.stderr.read_text()
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert (tmp_path / "c.tif").read_bytes() == (tmp_path / "wc.tif").read_bytes()
    assert hidden(tmp_path) == []
    (again,) = call_json(*words)
    assert again["made"] is False
