"""Training on stored pixels: the batches of the images, bit for bit, without an image being decoded, or even there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.errors import DataError, MismatchError, UsageError
from rsmtdf_cache.sources import Tile, open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.loop import train
from rsmtdf_train.targets.drift import Drift
from rsmtdf_train.targets.stored import StoredTargets
from tests.command_line import call
from tests.datasets import write_dataset, write_split
from tests.pixel_runs import CPU, batches, build, recipe, require_same
from tests.scene_sets import classes_file, write_pair
from tests.teachers import load_mean_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("training") / "data", tiles=12, tile_px=64)


@pytest.fixture(scope="module")
def store(data: Path) -> Path:
    return build(data, data.parent / "store")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of two scenes, one with labels; both have holes, and some tiles reach beyond their scene."""
    root = tmp_path_factory.mktemp("scenes")
    for n, name in enumerate(("north", "south", "west")):
        pixels, _ = write_pair(root, name, 150, 200, seed=n, dtype="uint16", bands=3, factor=35, nodata=0)
        pixels[:, 60:90, :70] = 0
        with rasterio.open(root / "images" / f"{name}.tif", "r+") as file:
            file.write(pixels)
    (root / "labels" / "south.tif").unlink()
    code, _, err = call(
        "data", "tile", root / "images", "--labels", root / "labels", "--classes", classes_file(root), "--tile", 64,
        "--scale", "200,9000", "--out", root / "tiles", "--val", "west", "--test", "0",
    )  # fmt: skip
    assert code == 0, err
    return root / "tiles"


def test_batches_are_the_same_from_store_and_images(data: Path, store: Path) -> None:
    for changes in ({}, {"crop_px": 64}, {"method": "unimatch"}):
        with_images = batches(open_source(data), store, "source", **changes)
        turned = 0
        for a, b in zip(batches(open_source(data), store, "store", **changes), with_images, strict=True):
            require_same(a, b)
            turned += 1
        assert turned == 6


def test_batches_of_scenes_are_the_same_with_holes_and_edges(scenes: Path, tmp_path: Path) -> None:
    built, holes = build(scenes, tmp_path / "store"), 0
    subset = open_source(scenes).split_names()[-1].removeprefix("labeled/")
    two = (batches(open_source(scenes), built, pixels, labeled=subset) for pixels in ("store", "source"))
    for a, b in zip(*two, strict=True):
        require_same(a, b)
        assert a.unlabeled is not None
        holes += int((~a.labeled.valid).sum()) + int((~a.unlabeled.valid).sum())
    assert holes > 500


def test_no_image_is_decoded_but_those_whose_labels_are_used(
    data: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(data)
    decoded: list[str] = []
    read = source.read_valid

    def noted(tile: Tile) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        decoded.append(tile.id)
        return read(tile)

    monkeypatch.setattr(source, "read_valid", noted)
    for _ in batches(source, store, "auto", steps=8, threads=1):
        pass
    assert sorted(decoded) == sorted(set(source.split("10"))), "one look each: labels and pixels are of one tile"


def test_training_without_the_images_is_the_same_training(data: Path, store: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(data, tmp_path / "bare"))
    train(recipe(data), tmp_path / "with", store, device="cpu", pixels="source", tensorboard=False)
    for tile in open_source(data).tiles(["train"]):
        (bare / "images" / tile.image.name).unlink()
    with pytest.raises(DataError, match="has no image"):
        train(recipe(bare), tmp_path / "fails", store, device="cpu", pixels="source", tensorboard=False)
    result = train(recipe(bare), tmp_path / "without", store, device="cpu", tensorboard=False)
    one, other = (load_deployed(RunFolder(tmp_path / n), "ema", CPU)[0].state_dict() for n in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one) and result.metrics["step"] == 4


def test_unlabelled_scenes_need_not_be_there(scenes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scenes.parent, tmp_path / "moved"))
    built = build(root / "tiles", tmp_path / "store")
    subset = open_source(scenes).split_names()[-1].removeprefix("labeled/")
    before = list(batches(open_source(root / "tiles"), built, "source", labeled=subset))
    (root / "images" / "south.tif").unlink()
    source = open_source(root / "tiles")
    with pytest.raises(DataError, match=r"south\.tif"):
        source.check(["train"])
    source = open_source(root / "tiles")
    loader = BatchLoader.open(source, recipe(source.root, labeled=subset), FeatureStore.open(built), pixels="store")
    source.held = loader.dataset.pixels
    source.check(["train"])
    for step, batch in enumerate(before):
        require_same(loader.batch(step), batch)


def test_unlabelled_scenes_whose_labels_are_there_need_not_be_there(scenes: Path, tmp_path: Path) -> None:
    """Labels of tiles that train unlabelled only score pseudo-labels; where they lie is read off the image."""
    root = Path(shutil.copytree(scenes.parent, tmp_path / "moved"))
    with rasterio.open(root / "labels" / "north.tif") as labels, rasterio.open(root / "images" / "south.tif") as image:
        profile, values = {**labels.profile, "transform": image.transform}, labels.read()
    with rasterio.open(root / "labels" / "south.tif", "w", **profile) as file:
        file.write(values)
    code, _, err = call(
        "data", "tile", root / "images", "--labels", root / "labels", "--classes", classes_file(root), "--tile", 64,
        "--scale", "200,9000", "--out", root / "both", "--val", "west", "--test", "0",
    )  # fmt: skip
    assert code == 0, err
    source = open_source(root / "both")
    labeled = [tile.id for tile in source.tiles(["train"]) if "north" in tile.id][:2]
    write_split(root / "both", "labeled/two", labeled)
    built = build(root / "both", tmp_path / "store")
    with_images = recipe(root / "both", labeled="two", unlabeled="rest")
    train(with_images, tmp_path / "with", built, device="cpu", tensorboard=False)
    (root / "images" / "south.tif").unlink()
    train(with_images, tmp_path / "without", built, device="cpu", tensorboard=False)
    one, other = (load_deployed(RunFolder(tmp_path / n), "ema", CPU)[0].state_dict() for n in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (root / "images" / "north.tif").unlink()  # its labels are used: told before the first step
    with pytest.raises(DataError, match=r"north\.tif"):
        train(with_images, tmp_path / "fails", built, device="cpu", tensorboard=False)
    assert not (tmp_path / "fails").exists()


def test_drift_is_watched_without_the_images(data: Path, store: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(data, tmp_path / "bare"))
    source, loaded = open_source(data), FeatureStore.open(store)
    loader = BatchLoader.open(source, recipe(data), loaded, pixels="store")
    ids = [(tile_id, 0) for tile_id in source.split("train")[:3]]
    assert isinstance(loader.targets, StoredTargets)
    shown = Drift(loader.targets, source, load=load_mean_teacher).measure(ids)
    for tile_id, _ in ids:
        (bare / "images" / f"{tile_id}.png").unlink()
    gone = open_source(bare)
    gone.held = loader.dataset.pixels
    assert Drift(loader.targets, gone, load=load_mean_teacher, pixels=loader.dataset.pixels).measure(ids) == shown != {}


def test_a_store_of_pixels_alone_trains_what_reads_no_features(data: Path, tmp_path: Path) -> None:
    built = build(data, tmp_path / "pixels", teachers=())
    asked = recipe(data).without_distillation()
    on_images = train(asked, tmp_path / "images", None, device="cpu", tensorboard=False)
    on_store = train(asked, tmp_path / "stored", built, device="cpu", tensorboard=False, pixels="store")
    assert on_images.metrics["step"] == on_store.metrics["step"] == 4
    one, other = (load_deployed(RunFolder(tmp_path / n), "ema", CPU)[0].state_dict() for n in ("images", "stored"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UsageError, match="holds no arrays; build features into it"):
        train(recipe(data), tmp_path / "distils", built, device="cpu", tensorboard=False)


def test_pixels_of_another_dataset_are_refused(data: Path, store: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(data, tmp_path / "other"))
    tile = open_source(other).split("10")[0]
    with Image.open(other / "images" / f"{tile}.png") as image:
        pixels = np.array(image)
    pixels[5, 5, 0] ^= 1
    Image.fromarray(pixels).save(other / "images" / f"{tile}.png")
    with pytest.raises(MismatchError, match="are not those that"):
        for _ in batches(open_source(other), store, "auto", steps=8):
            pass


def test_pixels_that_are_not_stored_come_from_images_or_are_refused(data: Path, tmp_path: Path) -> None:
    part = Path(shutil.copytree(data, tmp_path / "part"))
    ids = open_source(data).split("train")
    shutil.rmtree(part / "splits" / "labeled")
    write_split(part, "train", ids[:5])
    out = tmp_path / "store"
    build(part, out, teachers=(), group_rows=4)
    build(data, out, pixels=False)
    for a, b in zip(
        batches(open_source(data), out, "auto"), batches(open_source(data), out, "source"), strict=True
    ):  # fmt: skip
        require_same(a, b)
    with pytest.raises(MismatchError, match=r"has the pixels of 5 of 8 train tiles, it lacks t005"):
        next(batches(open_source(data), out, "store"))
    bare = build(data, tmp_path / "bare", pixels=False)
    with pytest.raises(MismatchError, match="holds no pixels; store them with"):
        next(batches(open_source(data), bare, "store"))
    with pytest.raises(UsageError, match="there is no store"):
        BatchLoader.open(open_source(data), recipe(data).without_distillation(), pixels="store")
    code, _, err = call("train", tmp_path / "r.yaml", "--pixels", "maybe")
    assert code == 2, err


def test_labels_of_images_that_may_lack_data_need_the_image(data: Path, tmp_path: Path) -> None:
    """A folder of GeoTIFF tiles: where an image has no data its label does not count, and that stands in the image."""
    tiles = Path(shutil.copytree(data, tmp_path / "tiles"))
    for path in sorted((tiles / "images").glob("*.png")):
        with Image.open(path) as image:
            values = np.array(image).transpose(2, 0, 1)
        values[:, :9, :5] = 0
        profile = {"driver": "GTiff", "height": 64, "width": 64, "count": 3, "dtype": "uint8", "nodata": 0}
        profile |= {"transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), "crs": "EPSG:32632"}
        with rasterio.open(path.with_suffix(".tif"), "w", **profile) as file:
            file.write(values)
        path.unlink()
    built = build(tiles, tmp_path / "store")
    for a, b in zip(
        batches(open_source(tiles), built, "store"), batches(open_source(tiles), built, "source"), strict=True
    ):  # fmt: skip
        require_same(a, b)
    source = open_source(tiles)
    loader = BatchLoader.open(source, recipe(tiles), FeatureStore.open(built), pixels="store")
    labeled = source.split("10")[0]
    (tiles / "images" / f"{labeled}.tif").unlink()
    gone = open_source(tiles)
    gone.held = loader.dataset.pixels
    tile = next(t for t in gone.tiles(["train"]) if t.id == labeled)
    with pytest.raises(DataError, match="bring it back"):
        gone.read_mask(tile)
