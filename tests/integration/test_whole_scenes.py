"""Whole scenes are scored at the pixels of the tiles; what differs from tiles is what the student sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.sources import open_source
from rsmtdf_train.evaluate import evaluate, labelled_tiles
from rsmtdf_train.metrics import Scores
from rsmtdf_train.scenes.request import Segmenter
from rsmtdf_train.scenes.score_scenes import SceneWindows, score_scenes
from rsmtdf_train.scoring.groups import By, group_tiles
from rsmtdf_train.scoring.tally import Measures
from tests.command_line import call, call_json
from tests.datasets import write_dataset, write_split
from tests.scenes import CLASSES, blobs, local_segmenter, save_run, write_scene

CPU = torch.device("cpu")
TILE = 48
#: The second is narrower than a window and than a tile; in the first the last row and column of tiles stick out.
SIZES = {"test_north": (150, 200), "test_south": (40, 60), "train": (60, 100), "val": (60, 60)}
WINDOWS = SceneWindows(32, 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with labels, a fifth of them unlabelled, as tiles that overlap by 8 px; a third of them are left out."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("whole")
    for folder in ("scenes", "labels"):
        (root / folder).mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        pixels = blobs(*size, seed=seed)
        labels = (pixels.astype(int).sum(0) // 40 % len(CLASSES)).astype(np.uint8)
        labels[: size[0] // 5] = 200
        write_scene(root / "scenes" / f"{name}.tif", pixels)
        write_scene(root / "labels" / f"{name}.tif", labels[None])
    table = [{"name": c.name, "color": list(c.color), "values": [n]} for n, c in enumerate(CLASSES)]
    (root / "classes.yaml").write_text(yaml.safe_dump({"classes": table, "labels": {"ignore": [200]}}))
    code, _, err = call(
        "data", "tile", root / "scenes", "--labels", root / "labels", "--classes", root / "classes.yaml",
        "--tile", TILE, "--overlap", 8, "--out", root / "data", "--split-by", "scene",
        "--val", "val", "--test", "test_*", "--labeled", "100", "-q",
    )  # fmt: skip
    assert code == 0, err
    ids = (root / "data" / "splits" / "test.txt").read_text().split()
    write_split(root / "data", "test", [tile for n, tile in enumerate(ids) if n % 3 != 1])
    return root / "data"


def whole(data: Path, segmenter: Segmenter, windows: SceneWindows = WINDOWS, budget: int = 2**29) -> Scores:
    source = open_source(data)
    measures = Measures(3, True, group_tiles(source, labelled_tiles(source, "test"), By.TILE))
    scores, _ = score_scenes({"m": segmenter}, source, "test", windows, CPU, measures=measures, budget_nbytes=budget)
    return scores["m"]


def tilewise(data: Path, segmenter: Segmenter) -> Scores:
    source = open_source(data)
    measures = Measures(3, True, group_tiles(source, labelled_tiles(source, "test"), By.TILE))
    return evaluate({"m": segmenter.model}, source, "test", CPU, measures=measures)["m"]


def test_a_student_that_sees_single_pixels_has_the_scores_of_tiles(data: Path) -> None:
    segmenter = local_segmenter()
    found, wanted = whole(data, segmenter), tilewise(data, segmenter)
    assert found.confusion == wanted.confusion and found.boundary == wanted.boundary
    assert np.sum(found.confusion) > 10_000 and np.count_nonzero(found.confusion) > 5
    assert (
        found.groups is not None
        and wanted.groups is not None
        and found.groups.parts.keys() == wanted.groups.parts.keys()
    )
    for name, (_, scores) in found.groups.parts.items():
        assert scores.confusion == wanted.groups.parts[name][1].confusion, name
    assert found.calibration is not None and wanted.calibration is not None
    ece = wanted.calibration.overall.ece
    assert found.calibration.overall.ece == pytest.approx(ece, abs=1e-3), "a pixel on the edge of a bin may change it"


def test_windows_and_strips_change_nothing_for_it(data: Path) -> None:
    segmenter = local_segmenter()
    wanted = tilewise(data, segmenter).confusion
    for windows in (SceneWindows(64, 16), SceneWindows(48, 0), SceneWindows(None, None, True)):
        assert whole(data, segmenter, windows).confusion == wanted
    assert whole(data, segmenter, budget=1).confusion == wanted, "a strip as wide as a tile"
    assert whole(data, segmenter, budget=64 * 100 * (8 * 3 + 28)).confusion == wanted


def test_a_student_that_looks_around_sees_beyond_the_edges_of_tiles(data: Path) -> None:
    """What it says of a pixel is what it says of it in one pass over the whole scene."""
    segmenter = local_segmenter(radius=3)
    source = open_source(data)
    counts = np.zeros((3, 3), int)
    with gdal_settings():
        import rasterio

        for tile in source.tiles(["test"]):
            if tile.mask is None:
                continue
            with rasterio.open(tile.image) as file:
                pixels = file.read()
            padded = np.pad(pixels, ((0, 0), (8, 8), (8, 8)), mode="edge")
            image = torch.from_numpy(padded)[None].float() / 255
            with torch.inference_mode():
                one_pass = segmenter.model.predict(image).argmax(1)[0, 8:-8, 8:-8].numpy()
            assert tile.origin_px is not None
            y, x = tile.origin_px
            seen = one_pass[y : y + TILE, x : x + TILE]
            label = source.read_mask(tile)[: seen.shape[0], : seen.shape[1]]
            counted = label != 255
            np.add.at(counts, (label[counted], seen[counted]), 1)
    found = np.array(whole(data, segmenter, SceneWindows(48, 16)).confusion)
    apart, from_tiles = (np.abs(m - counts).sum() for m in (found, tilewise(data, segmenter).confusion))
    assert apart < from_tiles / 4 and from_tiles > 100
    assert found.sum() == counts.sum()


def test_the_command_says_which_windows_it_used(data: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", crop_px=64)
    found = call_json("eval", run, "--checkpoint", "ema", "--data", data, "--whole-scenes")
    assert found["whole_scenes"] == {"window_px": 64, "overlap_px": 32, "tta": False}
    found = call_json(
        "eval", run, "--checkpoint", "ema", "--data", data, "--whole-scenes", "--window", 96, "--overlap", 32, "--tta",
        "--out", tmp_path / "out", "--by", "scene",
    )  # fmt: skip
    assert found["whole_scenes"] == {"window_px": 96, "overlap_px": 32, "tta": True}
    assert {g["name"] for g in found["scores"]["ema"]["groups"]["groups"]} <= set(SIZES)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == found
    tiles = call_json("eval", run, "--checkpoint", "ema", "--data", data)
    assert "whole_scenes" not in tiles
    pixels = [[c["pixels"] for c in f["scores"]["ema"]["classes"]] for f in (tiles, found)]
    assert pixels[0] == pixels[1] and tiles["miou"] != found["miou"]
    _, out, _ = call("eval", run, "--checkpoint", "ema", "--data", data, "--whole-scenes", "-q", "--device", "cpu")
    assert "test tiles in whole scenes, windows of 64 px" in out


def test_what_whole_scenes_cannot_be(data: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", crop_px=64)
    for options, text in (
        (["--tta"], "add --whole-scenes"),
        (["--whole-scenes", "--window", "50"], "multiples of 32 px"),
        (["--whole-scenes", "--split", "tset"], "tset"),
    ):
        code, out, err = call("eval", run, "--checkpoint", "ema", "--data", data, "--device", "cpu", *options)
        assert (code, out) == (3 if "tset" in text else 2, "") and text in err
    source = open_source(write_dataset(tmp_path / "files", tiles=6, tile_px=64))
    with pytest.raises(UsageError, match="files of their own"):
        score_scenes({"m": local_segmenter()}, source, "test", SceneWindows(), CPU)
