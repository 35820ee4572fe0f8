"""From scenes to a map, as a user goes: tiles, store, training, map; the same rule for pixels from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml

from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.landcover_scenes import REGIONS
from rsmtdf_cache.views import orient
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.geometry import Geometry
from rsmtdf_train.photometry import NO_PHOTOMETRY
from rsmtdf_train.sampler import Draw
from tests.command_line import call, call_json
from tests.scene_sets import classes_file, request, write_pair
from tests.scenes import write_scene

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = "timm:resnet10t,pretrained=none,layers=stage2+stage3"
SCALE = "200,9000,200,9000,100,8000"
RECIPE: dict[str, Any] = {
    "name": "walk", "labeled": "100", "crop_px": 64, "steps": 2, "seed": 1, "batch": {"labeled": 2, "unlabeled": 2},
    "student": {"encoder": "timm:lcnet_050", "channels": 16, "pretrained": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two scenes of four 16-bit bands, their tiles, a store and a trained run."""
    root = tmp_path_factory.mktemp("walk")
    for n, name in enumerate(("north", "south", "west")):
        pixels, _ = write_pair(root, name, 192, 256, seed=n, dtype="uint16", bands=4, factor=35, nodata=0)
        pixels[:, :20, :70] = 0
        with rasterio.open(root / "images" / f"{name}.tif", "r+") as file:
            file.write(pixels)
    code, _, err = call(
        "data", "tile", root / "images", "--labels", root / "labels", "--classes", classes_file(root), "--tile", 64,
        "--bands", "4,2,1", "--scale", SCALE, "--out", root / "tiles", "--test", "west", "--val", "0",
    )  # fmt: skip
    assert code == 0, err
    call_json("cache", "build", root / "tiles", "--out", root / "store", "--teacher", TEACHER, "--scales", 1)
    (root / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": str(root / "tiles")}))
    code, _, err = call("train", root / "recipe.yaml", "--use-cache", root / "store", "--out", root / "run", "-q")
    assert code == 0, err
    return root


def test_the_map_lies_on_its_scene_with_colours_names_and_no_data(walked: Path, tmp_path: Path) -> None:
    scene = walked / "images" / "west.tif"
    (report,) = call_json("predict", walked / "run", scene, "--out", tmp_path / "map.tif")
    assert report["made"]
    with rasterio.open(tmp_path / "map.tif") as file, rasterio.open(scene) as source:
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        values = file.read(1)
        assert np.array_equal(values == 255, (source.read([4, 2, 1]) == 0).all(0))
        assert set(np.unique(values)) <= {0, 1, 2, 255}
        assert [file.colormap(1)[n][:3] for n in range(3)] == [(10, 20, 200), (0, 120, 0), (200, 90, 0)]
        assert json.loads(file.tags()["RSMTDF_CLASSES"]) == ["water", "tree", "road"]
        assert (file.tags()["RSMTDF_BANDS"], file.tags()["RSMTDF_SCALE"]) == ("4,2,1", SCALE)


def test_a_map_takes_bands_and_range_from_the_run_and_refuses_another_type(walked: Path, tmp_path: Path) -> None:
    scene = walked / "images" / "west.tif"
    call_json("predict", walked / "run", scene, "--out", tmp_path / "a.tif")
    call_json("predict", walked / "run", scene, "--out", tmp_path / "b.tif", "--bands", "4,2,1", "--scale", SCALE)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with rasterio.open(scene) as file:
        other = write_scene(tmp_path / "other.tif", file.read().astype(np.float32))
    code, _, err = call("predict", walked / "run", other, "--out", tmp_path / "c.tif")
    assert code == 2 and "its values are float32, the student learned from uint16" in err and SCALE in err
    assert not (tmp_path / "c.tif").exists()


def test_eval_reads_the_labels_of_the_scenes(walked: Path) -> None:
    found = call_json("eval", walked / "run")
    with rasterio.open(walked / "labels" / "west.tif") as file, rasterio.open(walked / "images" / "west.tif") as image:
        labels = np.where((image.read([4, 2, 1]) == 0).all(0), 99, file.read(1))
    pixels = {c["name"]: c["pixels"] for c in found["scores"]["ema"]["classes"]}
    wanted = {"water": [10], "tree": [20, 21], "road": [30]}
    assert pixels == {name: int(np.isin(labels, values).sum()) for name, values in wanted.items()}


def test_pixels_without_data_are_invalid_in_training_in_every_frame(walked: Path) -> None:
    source = open_source(walked / "tiles")
    dataset = TileDataset(source, None, Geometry(64, 32, 32))
    rng = np.random.default_rng(0)
    holes = 0
    for tile in source.tiles(["train"]):
        whole = source.read_valid(tile)[1]
        whole = np.ones((64, 64), bool) if whole is None else whole
        for _ in range(12):
            cut = dataset.geometry.draw(rng)
            sample = dataset.sample(Draw(tile.id, 0, cut, NO_PHOTOMETRY))
            wanted = orient(whole, cut.orientation)[cut.box.y : cut.box.y + 32, cut.box.x : cut.box.x + 32]
            assert np.array_equal(sample.valid, wanted)
            assert (sample.image[~wanted] == 0).all() and (sample.label[~wanted] == source.ignore_index).all()
            holes += int(not wanted.all())
    assert holes > 5


def test_the_sample_scenes_are_the_rasters_of_the_package_in_their_place(tmp_path: Path) -> None:
    code, _, err = call("data", "sample", "--scenes", "--out", tmp_path / "scenes", "-q")
    assert code == 0, err
    code, _, err = call("data", "sample", "--scenes", "--out", tmp_path / "scenes")
    assert code == 0 and "holds these scenes already" in err
    assert {p.stem for p in (tmp_path / "scenes" / "images").iterdir()} == set(REGIONS)
    with rasterio.open(tmp_path / "scenes" / "images" / "mediterranean.tif") as file:
        row, column = file.index(12.5, 42.0)  # Italy, east of Rome
        image = file.read()
        assert file.crs == "EPSG:4326" and file.bounds[0] == -6 and file.bounds[3] == 48
    with rasterio.open(tmp_path / "scenes" / "labels" / "mediterranean.tif") as file:
        labels = file.read(1)
        assert labels[row, column] != 0 and labels[file.index(5.0, 40.0)] == 0  # the sea east of Menorca
        assert labels[file.index(8.0, 24.5)] == 16  # the Sahara
    assert image[2][labels == 0].mean() > image[0][labels == 0].mean()  # the sea is blue
    folder = tmp_path / "scenes"
    code, out, err = call(
        "data", "tile", folder / "images", "--labels", folder / "labels", "--classes", folder / "classes.yaml",
        "--tile", 128, "--out", tmp_path / "tiles", "--json", "-q",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["splits"] == {"train": 80, "val": 40, "test": 40}


def test_a_dry_run_says_tiles_and_writes_nothing(tmp_path: Path) -> None:
    write_pair(tmp_path)
    asked = request(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = call(
        "data", "tile", tmp_path / "images", "--labels", tmp_path / "labels", "--classes", asked.classes, "--tile", 32,
        "--out", tmp_path / "set", "--dry-run", "--json", "-q",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and found["tiles"] == 35 and found["written"] is False and sum(found["splits"].values()) == 35
    assert sorted(tmp_path.rglob("*")) == before
