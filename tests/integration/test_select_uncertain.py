"""``rsmtdf select --strategy uncertain``: the tiles that a probe of the labelled ones doubts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.choose import uncertainty
from rsmtdf_cache.choose.descriptors import upright_arrays
from rsmtdf_cache.choose.selection import Budget, choose_tiles
from rsmtdf_cache.choose.uncertainty import labelled_tiles, tile_uncertainty
from rsmtdf_cache.errors import DataError, MismatchError, UsageError
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

TILES, TRAIN, PX = 28, 24, 64
LABELLED = ["t000", "t001", "t002", "t003"]
RED, GREEN = np.array([200.0, 40, 40]), np.array([40.0, 180, 60])
#: Tiles whose colour goes slowly from that of one class to that of the other, where others have an edge.
BETWEEN = {f"t{i:03}" for i in (6, 9, 13, 14, 18, 22)}


def _shares(index: int, px: int) -> np.ndarray:
    """Return how much green is in each column of the tile."""
    columns = (np.arange(px) + 0.5) / px
    shares = columns if f"t{index:03}" in BETWEEN else (columns > 0.5).astype(float)
    return shares[::-1] if index % 2 else shares


def write_tiles(root: Path, px: int = PX) -> Path:
    """Write tiles of red and green (classes 0 and 1 of three)."""
    write_dataset(root, tiles=TILES, tile_px=px, splits={"train": range(TRAIN), "val": range(TRAIN, TILES)},
                  labeled={"four": range(4), "between": [6, 9]})  # fmt: skip
    for i in range(TILES):
        rng, shares = np.random.default_rng(i), _shares(i, px)
        pixels = np.outer(1 - shares, RED) + np.outer(shares, GREEN) + rng.normal(0, 3, 3)
        noisy = pixels + rng.normal(0, 6, (px, px, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / "images" / f"t{i:03}.png")
        mask = np.tile((shares > 0.5).astype(np.uint8), (px, 1))
        Image.fromarray(mask).save(root / "masks" / f"t{i:03}.png")
    return root


def built(data: Path, out: Path, **more: object) -> FeatureStore:
    asked = {"data": data, "out": out, "teachers": ["mean"], "threads": 1, "scales": [1.0], **more}
    build_store(BuildRequest.of(asked), load_teacher=load_mean_teacher)
    return FeatureStore.open(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("uncertain") / "data")


@pytest.fixture(scope="module")
def store(data: Path) -> FeatureStore:
    return built(data, data.parent / "store")


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    """A copy of the dataset to spoil."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def asked(store: FeatureStore, source: TileSource, have: list[str]) -> dict[str, float]:
    """Return the uncertainty of every train tile."""
    rows = sorted(store.tiles.row_of(i) for i in source.split("train"))
    place = {store.tiles.ids[row]: n for n, row in enumerate(rows)}
    found = tile_uncertainty(store, upright_arrays(store), rows, source, labelled_tiles(store, source, have, place))
    assert found.dtype == np.float32 and found.shape == (len(rows),)
    return {tile_id: float(found[n]) for tile_id, n in place.items()}


def rsmtdf(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        app([str(a) for a in args], prog_name="rsmtdf")
    return int(end.value.code or 0)


def test_what_lies_between_the_classes_is_more_uncertain_than_all_that_does_not(
    store: FeatureStore, data: Path
) -> None:
    found = asked(store, open_source(data), LABELLED)
    clear = [value for tile_id, value in found.items() if tile_id not in BETWEEN]
    doubted = [found[tile_id] for tile_id in sorted(BETWEEN)]
    assert min(doubted) > 2 * max(clear)
    assert min(clear) >= 0 and max(doubted) <= 1


def test_where_features_tell_nothing_the_uncertainty_is_that_of_the_labels(copied: Path, tmp_path: Path) -> None:
    for path in (copied / "images").iterdir():
        Image.new("RGB", (PX, PX), (90, 90, 90)).save(path)
    found = asked(built(copied, tmp_path / "store"), open_source(copied), LABELLED)
    # Two of three classes, seen equally often; nothing speaks for the third.
    np.testing.assert_allclose(list(found.values()), math.log(2) / math.log(3), atol=2e-3)


def test_of_each_cluster_the_most_uncertain_tile_is_chosen(store: FeatureStore, data: Path) -> None:
    source = open_source(data)
    found = choose_tiles(store, Budget(tiles=7), "uncertain", source, LABELLED)
    values = asked(store, source, LABELLED)
    new = [t for t in found.tiles if not t.kept]
    assert [t.id for t in found.tiles[:4]] == LABELLED and len(new) == 3
    assert new[0].id in BETWEEN
    for tile in found.tiles:
        assert tile.uncertainty == pytest.approx(values[tile.id], abs=1e-5)
    assert found.tiles == choose_tiles(store, Budget(tiles=7), "uncertain", source, LABELLED).tiles
    typical = choose_tiles(store, Budget(tiles=7), "typical", source, LABELLED)
    assert all(t.uncertainty is None for t in typical.tiles)


def test_the_choice_is_one_of_tiles_not_of_rows_nor_of_the_order_of_labels(
    store: FeatureStore, data: Path, copied: Path, tmp_path: Path
) -> None:
    train = copied / "splits/train.txt"
    ids = train.read_text().split()
    train.write_text("\n".join(ids[10:]) + "\n")
    shutil.rmtree(copied / "splits/labeled")
    built(copied, tmp_path / "store", group_rows=4)
    later = built(data, tmp_path / "store", group_rows=4)
    assert later.tiles.ids[:3] != store.tiles.ids[:3]
    source = open_source(data)
    one = choose_tiles(store, Budget(tiles=10), "uncertain", source, LABELLED)
    two = choose_tiles(later, Budget(tiles=10), "uncertain", source, LABELLED[::-1])
    assert [t.id for t in one.tiles[4:]] == [t.id for t in two.tiles[4:]]
    values = {t.id: t.uncertainty for t in two.tiles}
    for tile in one.tiles:
        assert tile.uncertainty == pytest.approx(values[tile.id], abs=1e-6)


def test_tiles_read_one_by_one_are_as_uncertain(
    store: FeatureStore, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = asked(store, open_source(data), LABELLED)
    for nbytes in (1, 3000):
        monkeypatch.setattr(uncertainty, "_BATCH_NBYTES", nbytes)
        few = asked(store, open_source(data), LABELLED)
        np.testing.assert_allclose([few[i] for i in whole], list(whole.values()), atol=1e-6)


def test_masks_of_other_tiles_are_never_read(store: FeatureStore, data: Path, copied: Path) -> None:
    for n, tile_id in enumerate(open_source(data).split("train")):
        if tile_id not in LABELLED:
            mask = copied / "masks" / f"{tile_id}.png"
            mask.unlink() if n % 2 else mask.write_bytes(b"no picture")
    clean, spoilt = (
        choose_tiles(store, Budget(tiles=9), "uncertain", open_source(d), LABELLED).tiles for d in (data, copied)
    )
    assert clean == spoilt
    (copied / "masks/t002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"t002\.png"):
        choose_tiles(store, Budget(tiles=9), "uncertain", open_source(copied), LABELLED)


def test_without_labels_to_learn_from_it_is_refused(store: FeatureStore, data: Path, copied: Path) -> None:
    source = open_source(data)
    for have, of in (([], source), (LABELLED, None)):
        with pytest.raises(UsageError, match="name a labelled subset of the dataset with --have"):
            choose_tiles(store, Budget(tiles=9), "uncertain", of, have)
    with pytest.raises(UsageError, match="none of the 1 has features"):
        choose_tiles(store, Budget(tiles=9), "uncertain", source, ["t024"])  # of val
    for tile_id in LABELLED:
        Image.new("L", (PX, PX), 255).save(copied / "masks" / f"{tile_id}.png")
    with pytest.raises(UsageError, match="those of its 4 tiles show no class"):
        choose_tiles(store, Budget(tiles=9), "uncertain", open_source(copied), LABELLED)
    (copied / "masks/t002.png").unlink()
    with pytest.raises(UsageError, match="1 of its 4 tiles have none, such as 't002'"):
        choose_tiles(store, Budget(tiles=9), "uncertain", open_source(copied), LABELLED)


def test_masks_of_another_side_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    other = open_source(write_tiles(tmp_path / "other", px=32))
    with pytest.raises(MismatchError, match="tiles of 32 px"):
        choose_tiles(store, Budget(tiles=9), "uncertain", other, LABELLED)


def test_the_command_writes_the_list_and_says_how_uncertain(
    store: FeatureStore, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("select", store.path, "--data", copied, "--budget", 7)
    assert rsmtdf(*base, "--strategy", "uncertain", "--json", "--quiet") == 2
    assert "--have SUBSET" in capsys.readouterr().err
    assert rsmtdf(*base, "--strategy", "uncertain", "--have", "four", "--seed", 1, "--json", "--quiet") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["name"] == "uncertain-7-s1" and done["strategy"] == "uncertain"
    assert open_source(copied).split("uncertain-7-s1") == [t["id"] for t in done["tiles"]]
    assert all(0 <= t["uncertainty"] <= 1 for t in done["tiles"])
    assert rsmtdf(*base, "--strategy", "uncertain", "--have", "four") == 0
    assert "uncertainty" in capsys.readouterr().out
    assert rsmtdf(*base, "--have", "four") == 0
    assert "uncertainty" not in capsys.readouterr().out
