"""A scene in windows is the scene in one pass; no-data, strips, scaling and memory of maps."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from numpy.typing import NDArray
from rasterio.enums import ColorInterp

from rsmtdf_cache.errors import DataError, ResourceError, UsageError
from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.rasters.scaling import EIGHT_BIT
from rsmtdf_cache.rasters.scene import open_scene
from rsmtdf_train.scenes.map_scene import MapReport, blended_rows, map_scene
from rsmtdf_train.scenes.request import MapRequest, Segmenter, plan_map
from tests.scenes import blobs, local_segmenter, write_scene

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def blended(segmenter: Segmenter, path: Path, window: int, overlap: int, tta: bool = False) -> NDArray[np.float32]:
    """Return the probabilities ``[C, H, W]`` of a scene that is done in one strip."""
    request = MapRequest(path, path.with_name("m.tif"), window_px=window, overlap_px=overlap)
    with gdal_settings(), open_scene(path) as scene:
        plan = plan_map(segmenter, request, scene)
        (strip,) = plan.grid.strips()
        rows = [p.copy() for p, _ in blended_rows(segmenter, scene, plan.grid, strip, 0, tta, CPU)]
    return np.concatenate(rows, axis=1)


def one_pass(segmenter: Segmenter, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits = segmenter.model.predict(torch.from_numpy(pixels)[None].float() / 255)
    probabilities: NDArray[np.float32] = logits.softmax(1)[0].numpy()
    return probabilities


def made(segmenter: Segmenter, scene: Path, name: str = "map.tif", budget: int = 2**30, **more: Any) -> MapReport:
    request = MapRequest(scene, scene.with_name(name), **{"window_px": 32, "overlap_px": 8, **more})
    return map_scene(segmenter, request, CPU, budget_nbytes=budget)


def values(path: Path) -> NDArray[np.uint8]:
    with gdal_settings(), rasterio.open(path) as file:
        found: NDArray[np.uint8] = file.read(1)
        return found


@pytest.mark.parametrize(("stride", "radius", "window", "overlap"), [
    (1, 0, 32, 8), (1, 0, 32, 0), (1, 3, 32, 12), (4, 1, 32, 16), (4, 1, 64, 24),
])  # fmt: skip
@pytest.mark.parametrize("size", [(96, 64), (75, 130), (9, 11), (40, 1), (1, 70)])
def test_windows_give_what_one_pass_gives_when_the_overlap_holds_the_receptive_field(
    tmp_path: Path, stride: int, radius: int, window: int, overlap: int, size: tuple[int, int]
) -> None:
    segmenter = local_segmenter(stride, radius)
    pixels = blobs(*size)
    scene = write_scene(tmp_path / "s.tif", pixels)
    found, expected = blended(segmenter, scene, window, overlap), one_pass(segmenter, pixels)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)
    first, second = np.sort(expected, axis=0)[-2:][::-1]
    clear = first - second > 1e-4
    assert (found.argmax(0) == expected.argmax(0))[clear].all() and clear.mean() > 0.9


def test_too_small_an_overlap_shows_so_the_comparison_can_fail(tmp_path: Path) -> None:
    pixels = blobs(96, 96)
    scene = write_scene(tmp_path / "s.tif", pixels)
    segmenter = local_segmenter(4, 3)
    assert np.abs(blended(segmenter, scene, 32, 4) - one_pass(segmenter, pixels)).max() > 1e-2


def test_turned_windows_are_averaged_as_probabilities(tmp_path: Path) -> None:
    segmenter, pixels = local_segmenter(1, 3), blobs(48, 64)
    scene = write_scene(tmp_path / "s.tif", pixels)
    total = np.zeros((3, 48, 64))
    for turns in range(4):
        for mirrored in (False, True):
            seen = np.rot90(pixels, turns, (1, 2))
            seen = seen[:, :, ::-1] if mirrored else seen
            answer = one_pass(segmenter, np.ascontiguousarray(seen))
            answer = answer[:, :, ::-1] if mirrored else answer
            total += np.rot90(answer, -turns, (1, 2)) / 8
    np.testing.assert_allclose(blended(segmenter, scene, 32, 12, tta=True), total, atol=1e-4)


def test_files_hold_the_blended_probabilities(tmp_path: Path) -> None:
    segmenter = local_segmenter(4, 1)
    scene = write_scene(tmp_path / "s.tif", blobs(75, 130))
    places: dict[str, Any] = {name: tmp_path / f"{name}.tif" for name in ("confidence", "probabilities")}
    made(segmenter, scene, **places)
    expected = blended(segmenter, scene, 32, 8)
    assert (values(tmp_path / "map.tif") == expected.argmax(0)).all()
    for name, wanted in (("confidence", expected.max(0, keepdims=True)), ("probabilities", expected)):
        with rasterio.open(places[name]) as file:
            scales = np.array(file.scales)[:, None, None]
            assert np.abs(file.read() * scales - wanted).max() <= 0.5 / 254 + 1e-6
            assert file.read().max() <= 254 and file.nodata == 255


@pytest.mark.parametrize("size", [(600, 1700), (520, 1025)])
def test_strips_change_no_byte(tmp_path: Path, size: tuple[int, int]) -> None:
    segmenter = local_segmenter(4, 1)
    scene = write_scene(tmp_path / "s.tif", blobs(*size))
    for name, budget in (("whole", 2**30), ("strips", 1)):
        made(segmenter, scene, f"{name}.tif", budget, probabilities=tmp_path / f"{name}_p.tif")
    for kind in ("", "_p"):
        assert (tmp_path / f"whole{kind}.tif").read_bytes() == (tmp_path / f"strips{kind}.tif").read_bytes()


def test_memory_does_not_grow_with_the_height_and_strips_bound_it_for_any_width(tmp_path: Path) -> None:
    segmenter = local_segmenter(4, 1)
    peaks = {}
    for name, size, budget in (
        ("warm", (64, 64), 1), ("low", (1024, 512), 1), ("high", (3072, 512), 1), ("wide", (1024, 2048), 1),
    ):  # fmt: skip
        scene = write_scene(tmp_path / f"{name}.tif", blobs(*size), tiled=True)
        tracemalloc.start()
        made(segmenter, scene, f"{name}_map.tif", budget, window_px=64, overlap_px=8)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks["high"] < 1.1 * peaks["low"] and peaks["wide"] < 1.3 * peaks["low"], peaks


def test_alpha_mask_no_data_and_nan_become_no_data_and_the_rest_is_segmented(tmp_path: Path) -> None:
    segmenter = local_segmenter()
    pixels = blobs(60, 90) // 2 + 40
    hole = np.zeros((60, 90), bool)
    hole[:10] = hole[20:40, 30:70] = True
    pixels[:, ~hole] |= 1
    plain = made(segmenter, write_scene(tmp_path / "plain.tif", pixels), "plain_map.tif")
    expected = np.where(hole, 255, values(plain.files["classes"]))

    alpha = np.concatenate([pixels, np.where(hole, 0, 255).astype(np.uint8)[None]])
    with rasterio.open(
        tmp_path / "alpha.tif", "w", driver="GTiff", height=60, width=90, count=4, dtype="uint8", photometric="rgb",
        alpha="yes", crs="EPSG:32633",
    ) as file:  # fmt: skip
        file.write(alpha)
        assert file.colorinterp[3] is ColorInterp.alpha
    masked = write_scene(tmp_path / "masked.tif", pixels)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(masked, "r+") as file:
        file.write_mask(~hole)
    empty = np.where(hole, 0, pixels)
    empty[0, 50:55, 5:9] = 0  # dark in one band is no hole
    scenes = {
        "alpha": tmp_path / "alpha.tif",
        "masked": masked,
        "nodata": write_scene(tmp_path / "nodata.tif", np.where(hole, 0, pixels), nodata=0),
        "nan": write_scene(tmp_path / "nan.tif", np.where(hole, np.nan, pixels).astype(np.float32)),
        "outside": write_scene(tmp_path / "outside.tif", np.where(hole, -9999, pixels.astype(np.int16)), nodata=-9999),
    }
    for name, scene in scenes.items():
        scale = None if name in ("alpha", "masked", "nodata") else EIGHT_BIT
        report = made(segmenter, scene, f"{name}_map.tif", scale=scale)
        assert (values(report.files["classes"]) == expected).all(), name
        assert report.nodata == pytest.approx(hole.mean())
    dark = made(segmenter, write_scene(tmp_path / "dark.tif", empty, nodata=0), "dark_map.tif")
    assert ((values(dark.files["classes"]) == 255) == hole).all()


def test_a_number_for_no_data_outside_the_range_counts_in_any_band(tmp_path: Path) -> None:
    pixels = blobs(40, 40).astype(np.int16)
    pixels[1, 5:9, 5:9] = -9999
    report = made(local_segmenter(), write_scene(tmp_path / "s.tif", pixels, nodata=-9999), scale=EIGHT_BIT)
    hole = np.zeros((40, 40), bool)
    hole[5:9, 5:9] = True
    assert ((values(report.files["classes"]) == 255) == hole).all()


@pytest.mark.parametrize(("dtype", "low", "high"), [
    ("uint8", 0, 255), ("uint16", 100, 10300), ("int16", -500, 2050), ("float32", -1.0, 0.5), ("float64", 0.0, 1.0),
    ("int32", -100000, 155000),
])  # fmt: skip
def test_a_range_of_other_values_gives_the_8_bit_pixels_and_is_kept_in_the_map(
    tmp_path: Path, dtype: str, low: float, high: float
) -> None:
    pixels = blobs(40, 50)
    stored = low + pixels / 255 * (high - low)
    stored[:, :2] += 10 * (high - low) if dtype != "uint8" else 0  # cut to white
    with np.errstate(over="ignore"):
        raw = np.clip(stored, *(
            (np.iinfo(dtype).min, np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else (-1e9, 1e9)
        ))  # fmt: skip
    raw = (raw.round() if np.dtype(dtype).kind in "iu" else raw).astype(dtype)
    path = write_scene(tmp_path / "s.tif", raw)
    with gdal_settings(), open_scene(path, scale=((low, high),) * 3) as scene:
        found, valid = scene.read(0, 40, 0, 50)
    expected = pixels.copy()
    if dtype != "uint8":
        expected[:, :2] = 255
    assert (found == expected).all() and valid.all()
    report = made(local_segmenter(), path, scale=((low, high),) * 3)
    with rasterio.open(report.files["classes"]) as file:
        assert [float(v) for v in file.tags()["RSMTDF_SCALE"].split(",")] == [low, high]


def test_bands_are_those_asked_for_else_those_the_file_calls_red_green_and_blue(tmp_path: Path) -> None:
    pixels = blobs(20, 30, bands=4)
    path = write_scene(tmp_path / "s.tif", pixels)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    for bands, expected in ((None, [2, 1, 0]), ((4, 3, 1), [3, 2, 0]), ((2, 2, 2), [1, 1, 1])):
        with gdal_settings(), open_scene(path, bands) as scene:
            assert (scene.read(0, 20, 0, 30)[0] == pixels[expected]).all()


def test_windows_without_data_are_not_segmented(tmp_path: Path) -> None:
    pixels = np.zeros((128, 128, 3), np.uint8).transpose(2, 0, 1)
    pixels[:, :20, :20] = 90
    scene = write_scene(tmp_path / "s.tif", pixels, nodata=0)
    segmenter = local_segmenter()
    seen = 0

    def count(module: object, images: tuple[torch.Tensor], output: object) -> None:
        nonlocal seen
        seen += len(images[0])

    segmenter.model.student.encoder.register_forward_hook(count)
    made(segmenter, scene, window_px=64, overlap_px=0)
    assert seen == 2  # one window of four, in a batch that is always filled


def test_what_is_there_is_made_once_and_never_replaced_by_something_else(tmp_path: Path) -> None:
    segmenter = local_segmenter()
    scene = write_scene(tmp_path / "s.tif", blobs(40, 40))
    assert made(segmenter, scene).made and not made(segmenter, scene).made
    before = (tmp_path / "map.tif").read_bytes()
    with pytest.raises(UsageError, match="is not this map"):
        made(replace(segmenter, digest="1" * 64), scene)
    with pytest.raises(UsageError, match="that is the scene"):
        made(segmenter, scene, "s.tif")
    assert (tmp_path / "map.tif").read_bytes() == before
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_map_is_of_the_place_and_the_sources_that_its_scene_had(tmp_path: Path) -> None:
    """They may stand in other files: a scene that was placed since, or whose mosaic was renewed, is another one."""
    segmenter = local_segmenter()
    scene = write_scene(tmp_path / "s.tif", blobs(40, 40))
    mosaic = tmp_path / "m.vrt"
    mosaic.write_text(
        f"""<VRTDataset rasterXSize="40" rasterYSize="40">{
            "".join(
                f'<VRTRasterBand dataType="Byte" band="{n}"><SimpleSource>'
                f'<SourceFilename relativeToVRT="1">{scene.name}'
                f"</SourceFilename><SourceBand>{n}</SourceBand></SimpleSource></VRTRasterBand>"
                for n in (1, 2, 3)
            )
        }</VRTDataset>"""
    )
    outer = tmp_path / "outer.vrt"
    outer.write_text(mosaic.read_text().replace(scene.name, mosaic.name))
    for path in (mosaic, outer):
        assert made(segmenter, path, f"{path.stem}.tif").made and not made(segmenter, path, f"{path.stem}.tif").made
    os.utime(scene, ns=(0, 0))
    for path in (mosaic, outer):
        with pytest.raises(UsageError, match="is not this map"):
            made(segmenter, path, f"{path.stem}.tif")
    bare = tmp_path / "bare.tif"
    with rasterio.open(scene) as dataset:
        profile = {**dataset.profile, "crs": None, "transform": None}
        with rasterio.open(bare, "w", **profile) as copy:
            copy.write(dataset.read())
    assert made(segmenter, bare, "of_bare.tif").crs is None
    (tmp_path / "bare.tfw").write_text("2\n0\n0\n-2\n500001\n5399999\n")
    with pytest.raises(UsageError, match="is not this map"):
        made(segmenter, bare, "of_bare.tif")


def test_a_cog_without_room_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GDAL's own errors come out of rasterio's copy; pieces stay."""
    segmenter, whole = local_segmenter(), rasterio.shutil.copy
    scene = write_scene(tmp_path / "s.tif", blobs(40, 40))

    def copy(source: Path, target: Path, **more: Any) -> None:
        whole(source, tmp_path / "no" / "folder" / target.name, **more)

    with monkeypatch.context() as patch:
        patch.setattr("rasterio.shutil.copy", copy)
        with pytest.raises(ResourceError, match=r"map .*map\.tif: cannot be written"):
            made(segmenter, scene, cog=True)
    assert not (tmp_path / "map.tif").exists()
    assert made(segmenter, scene, cog=True).made


def test_a_damaged_piece_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = local_segmenter(4, 1)
    scene = write_scene(tmp_path / "s.tif", blobs(1100, 40))
    made(segmenter, scene, "whole.tif")
    seen = 0

    def stop(event: object) -> None:
        nonlocal seen
        pieces = sorted((tmp_path / ".map.tif.partial").glob("*.zlib"))
        if len(pieces) == 2 and not seen:
            seen = 1
            pieces[0].write_bytes(pieces[0].read_bytes()[:-7])
            raise KeyboardInterrupt

    request = MapRequest(scene, tmp_path / "map.tif", window_px=32, overlap_px=8)
    with pytest.raises(KeyboardInterrupt):
        map_scene(segmenter, request, CPU, stop)
    with pytest.raises(DataError, match="same command again"):
        map_scene(segmenter, request, CPU)
    map_scene(segmenter, request, CPU)
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
