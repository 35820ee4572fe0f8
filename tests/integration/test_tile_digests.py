"""A tile that was decoded once is not decoded again to know its digest, unless its file is another one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsmtdf_cache import index
from rsmtdf_cache.events import Event, Progress, ignore_events
from rsmtdf_cache.index import index_tiles
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.tile_digests import TileDigests
from rsmtdf_cache.tiles import pixel_digest
from rsmtdf_cache.tiling.write import tile
from tests.datasets import write_dataset
from tests.scene_sets import request, write_pair


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = write_dataset(tmp_path / "data", tiles=6, tile_px=32)
    for image in data.rglob("*.png"):
        os.utime(image, (1_700_000_000, 1_700_000_000))  # long settled
    return data


def indexed(data: Path) -> tuple[dict[str, bytes], list[str]]:
    """Return the digests that an index finds, and which tiles it decoded for them."""
    source = open_source(data)
    decoded = []
    read = source.read_image

    def watched(tile: object) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        decoded.append(tile.id)  # type: ignore[attr-defined]
        return read(tile)  # type: ignore[arg-type]

    source.read_image = watched  # type: ignore[method-assign]
    records, quarantined = index_tiles(source, source.tiles(), ignore_events)
    assert not quarantined
    return {r.id: r.digest for r in records}, sorted(decoded)


def test_a_second_index_decodes_nothing_and_finds_the_same(data: Path) -> None:
    first, decoded = indexed(data)
    assert len(decoded) == 6
    assert indexed(data) == (first, [])


def test_an_index_that_is_stopped_keeps_what_it_saw_and_looks_only_a_little_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "many", tiles=40, tile_px=32)
    for image in data.rglob("*.png"):
        os.utime(image, (1_700_000_000, 1_700_000_000))
    monkeypatch.setattr(index, "_AHEAD", 10)
    source = open_source(data)
    seen = 0

    def stop(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, Progress)
        if seen == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_tiles(source, source.tiles(), stop)
    whole, decoded = indexed(data)
    assert len(whole) == 40 and 40 - 5 - 10 <= len(decoded) <= 40 - 5
    assert "t000" not in decoded and "t039" in decoded


def test_a_changed_image_is_decoded_again_and_a_touched_one_is_not(data: Path) -> None:
    first, _ = indexed(data)
    os.utime(data / "images" / "t001.png", (1_700_000_500, 1_700_000_500))
    pixels = np.full((32, 32, 3), 7, np.uint8)
    Image.fromarray(pixels).save(data / "images" / "t002.png")
    second, decoded = indexed(data)
    assert decoded == ["t002"]
    assert second == {**first, "t002": pixel_digest(pixels)}


def test_a_damaged_cache_is_as_good_as_none(data: Path) -> None:
    first, _ = indexed(data)
    path = TileDigests(open_source(data)).path
    path.write_bytes(path.read_bytes()[:-20])
    second, decoded = indexed(data)
    assert second == first and len(decoded) == 6


def test_a_file_that_was_just_written_is_not_trusted_by_its_time(data: Path) -> None:
    image = data / "images" / "t003.png"
    Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(image)
    indexed(data)
    assert "t003" in indexed(data)[1]


def test_tiles_of_a_scene_are_told_apart_and_decoded_again_when_the_scene_is_another_file(tmp_path: Path) -> None:
    write_pair(tmp_path)
    tile(request(tmp_path))
    image = tmp_path / "images" / "a.tif"
    os.utime(image, (1_700_000_000, 1_700_000_000))
    first, decoded = indexed(tmp_path / "set")
    assert len(first) == len(decoded) == len(set(first.values())) == 35
    assert indexed(tmp_path / "set") == (first, [])
    os.utime(image, (1_700_000_500, 1_700_000_500))
    assert indexed(tmp_path / "set") == (first, decoded)
