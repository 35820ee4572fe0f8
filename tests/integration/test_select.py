"""``rsmtdf select`` on real stores: vectors, lists, pictures, and the comparison with random tiles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.choose import descriptors
from rsmtdf_cache.choose.descriptors import describe_tiles, upright_arrays
from rsmtdf_cache.choose.picture import draw_choice
from rsmtdf_cache.choose.selection import LABEL_FREE, Budget, choose_tiles
from rsmtdf_cache.choose.trial import ARMS, try_choices
from rsmtdf_cache.errors import DataError, MismatchError, UsageError
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

TILES, TRAIN = 30, 24
COLORS = ((200, 40, 40), (40, 180, 60), (50, 60, 200))
RARE = (5, 17)  # the only tiles of the third class


def _kind(index: int) -> int:
    return 2 if index in RARE else int(index % 4 == 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of one colour and class each, with blotches: of the first many, of the second a few, of the third two."""
    root = tmp_path_factory.mktemp("select") / "data"
    spans = {"train": range(TRAIN), "val": range(TRAIN, TRAIN + 3), "test": range(TRAIN + 3, TILES)}
    write_dataset(root, tiles=TILES, tile_px=64, splits=spans, labeled={"two": [1, 4]})
    for i in range(TILES):
        rng = np.random.default_rng(i)
        shade = np.array(COLORS[_kind(i)]) + rng.normal(0, 8, 3)
        blotches = [rng.uniform(0, 14) * rng.normal(0, 1, (64 // px, 64 // px, 3)) for px in (8, 16)]
        pixels = (shade + sum(np.kron(b, np.ones((64 // len(b), 64 // len(b), 1))) for b in blotches)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"t{i:03}.png")
        Image.fromarray(np.full((64, 64), _kind(i), np.uint8)).save(root / "masks" / f"t{i:03}.png")
    return root


def built(data: Path, out: Path, **more: Any) -> FeatureStore:
    request = BuildRequest.of({"data": data, "out": out, "teachers": ["mean"], "threads": 1, **more})
    build_store(request, load_teacher=load_mean_teacher)
    return FeatureStore.open(out)


@pytest.fixture(scope="module")
def store(data: Path) -> FeatureStore:
    """Two teachers of the same features, at other scales: distances differ, so do the numbers of arrays."""
    teachers = ["mean,scales=1", "other,scales=0.5,layers=mean16"]
    return built(data, data.parent / "store", teachers=teachers, orientations=2, splits=["train", "val"])


def rsmtdf(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        app([str(a) for a in args], prog_name="rsmtdf")
    return int(end.value.code or 0)


def kinds(ids: list[str]) -> list[int]:
    return [_kind(int(i[1:])) for i in ids]


def apart(store: FeatureStore, *patterns: str) -> NDArray[np.float64]:
    """Return the squared distances of all train tiles by the arrays that match."""
    found = describe_tiles(store, upright_arrays(store, patterns), range(TRAIN))
    assert found.kept > 1 - 1e-5
    wide = found.vectors.astype(np.float64)
    squared: NDArray[np.float64] = np.square(wide[:, None] - wide).sum(-1)
    return squared


def test_teachers_weigh_the_same_and_so_do_the_arrays_of_one(store: FeatureStore) -> None:
    first, second, both = apart(store, "mean/*"), apart(store, "other/*"), apart(store)
    np.testing.assert_allclose(both, (first + second) / 2, atol=2e-4)
    layers = [apart(store, f"mean/*/{name}") for name in ("mean8", "mean16")]
    np.testing.assert_allclose(first, sum(layers) / 2, atol=2e-4)
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_allclose(both.sum() / (TRAIN * TRAIN), 1, atol=1e-3)  # the unit of distances


def test_only_upright_arrays_are_read(store: FeatureStore) -> None:
    assert {v.view for v in store.keys()} == {"s64o0", "s64o4", "s32o0", "s32o4"}
    assert {k.view for k in upright_arrays(store)} == {"s64o0", "s32o0"}
    with pytest.raises(UsageError, match=r"--array 'mean/s64o4/\*' fits no upright array"):
        upright_arrays(store, ["mean/s64o4/*"])


def test_tiles_that_the_components_were_not_fitted_to_keep_their_distances(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = apart(store, "other/*")
    monkeypatch.setattr(descriptors, "FITTED_TILES", 10)  # of 24; the arrays have 6 numbers
    monkeypatch.setattr(descriptors, "_BATCH_NBYTES", 300)
    np.testing.assert_allclose(apart(store, "other/*"), whole, atol=2e-4)


def test_the_choice_is_one_of_tiles_and_pixels_not_of_rows_and_shards(store: FeatureStore, data: Path) -> None:
    teachers = ["mean,scales=1", "other,scales=0.5,layers=mean16"]
    other = data.parent / "appended"
    short = data.parent / "short"
    shutil.copytree(data, short)
    ids = (short / "splits/train.txt").read_text().split()
    (short / "splits/train.txt").write_text("\n".join(ids[10:]) + "\n")
    shutil.rmtree(short / "splits/labeled")
    built(short, other, teachers=teachers, group_rows=4)
    later = built(data, other, teachers=teachers, group_rows=4)
    assert later.tiles.ids[:3] != store.tiles.ids[:3]
    (short / "splits/train.txt").write_text("\n".join(reversed(ids)) + "\n")
    places = ((store, open_source(data)), (later, open_source(short)))
    for strategy in LABEL_FREE:
        one, two = (choose_tiles(s, Budget(tiles=6), strategy, source) for s, source in places)
        assert [t.id for t in one.tiles] == [t.id for t in two.tiles]


def test_both_strategies_find_the_rare_kind_before_a_third_is_labelled(store: FeatureStore, data: Path) -> None:
    source = open_source(data)
    farthest = choose_tiles(store, Budget(tiles=3), "k-center", source)
    assert set(kinds([t.id for t in farthest.tiles])) == {0, 1, 2}
    assert farthest.coverage.largest < farthest.coverage.random_largest
    typical = choose_tiles(store, Budget(tiles=2), "typical", source)
    assert kinds([t.id for t in typical.tiles]) == [0, 1]  # the two kinds there are many of, the larger one first
    assert all(t.id in source.split("train") for t in [*farthest.tiles, *typical.tiles])


def test_labelled_tiles_are_kept_and_cover(store: FeatureStore, data: Path) -> None:
    for strategy in LABEL_FREE:
        found = choose_tiles(store, Budget(tiles=3), strategy, open_source(data), have=["t001", "t004"])
        assert [(t.id, t.kept) for t in found.tiles[:2]] == [("t001", True), ("t004", True)]
        assert not found.tiles[2].kept
    assert kinds([found.tiles[2].id]) == [2]  # k-center: kinds 0 and 1 are covered
    with pytest.raises(UsageError, match="2 are labelled already"):
        choose_tiles(store, Budget(tiles=2), "typical", open_source(data), have=["t001", "t004"])


def test_tiles_without_features_cannot_be_chosen_and_that_is_said(data: Path, tmp_path: Path) -> None:
    here = tmp_path / "data"
    shutil.copytree(data, here)
    (here / "images/t005.png").write_bytes(b"no picture")
    part = built(here, tmp_path / "store", splits=["train"])
    said: list[Event] = []
    ids = (here / "splits/train.txt").read_text().split()
    shutil.copy(here / "images/t001.png", here / "images/t099.png")
    shutil.copy(here / "masks/t001.png", here / "masks/t099.png")
    (here / "splits/train.txt").write_text("\n".join([*ids, "t099"]) + "\n")
    found = choose_tiles(part, Budget(percent=100), "k-center", open_source(here), ["t005"], on_event=said.append)
    listed = [t.id for t in found.tiles]
    assert listed[0] == "t005" and found.tiles[0].distance is None  # labelled and quarantined
    assert len(listed) == len(set(listed)) == TRAIN - 1 and set(listed) <= set(ids)  # t099 came after the build
    assert found.without_features == 1
    texts = [e.text for e in said if isinstance(e, Warned)]
    assert len(texts) == 2 and "'t005'" in texts[0] and "1 train tiles have no features" in texts[1]
    (here / "splits/train.txt").write_text("t099\n")
    with pytest.raises(MismatchError, match="none of the 1 train tiles"):
        choose_tiles(part, Budget(tiles=1), "typical", open_source(here))


def test_the_command_writes_a_list_that_a_recipe_can_name(
    store: FeatureStore, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "data"
    shutil.copytree(data, here)
    asked = ("select", store.path, "--data", here, "--json", "--quiet")
    lists = here / "splits/labeled"
    assert rsmtdf(*asked, "--budget", "25%", "--dry-run", "--picture", tmp_path / "dry.png") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["list"] is None and not (lists / "typical-25p.txt").exists()
    assert Image.open(tmp_path / "dry.png").size[0] > 400
    assert rsmtdf(*asked, "--budget", "25%") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["list"] == str(lists / "typical-25p.txt") and done["tiles"] == planned["tiles"]
    source = open_source(here)
    assert source.split("typical-25p") == [t["id"] for t in done["tiles"]] and len(done["tiles"]) == 6
    source.check(["typical-25p"])
    assert rsmtdf(*asked, "--budget", "25%", "--seed", 3, "--name", "typical-25p", "--strategy", "k-center") == 2
    assert "another list is there" in capsys.readouterr().err
    assert rsmtdf(*asked, "--budget", "10", "--have", "typical-25p", "--strategy", "k-center", "--name", "more") == 0
    assert open_source(here).split("more")[:6] == source.split("typical-25p")
    assert rsmtdf(*asked, "--budget", "10", "--have", "val") == 2
    assert rsmtdf(*asked, "--budget", "10", "--name", "../x") == 2
    capsys.readouterr()
    assert rsmtdf("select", store.path, "--data", here, "--budget", 3) == 0
    shown = capsys.readouterr()
    assert "typicality" in shown.out and "--set labeled=typical-3" in shown.err


def test_a_list_may_be_there_before_its_masks_are_drawn(
    store: FeatureStore, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "data"
    shutil.copytree(data, here)
    shutil.rmtree(here / "splits/labeled")
    (here / "dataset.yaml").write_text((here / "dataset.yaml").read_text().replace("complete", "partial"))
    masks = {tile_id: here / "masks" / f"{tile_id}.png" for tile_id in open_source(here).split("train")}
    drawn = {tile_id: path.read_bytes() for tile_id, path in masks.items()}
    for path in masks.values():
        path.unlink()
    assert rsmtdf("select", store.path, "--data", here, "--budget", 3, "--json", "--quiet") == 0
    done = json.loads(capsys.readouterr().out)
    chosen = [t["id"] for t in done["tiles"]]
    assert done["without_mask"] == chosen
    open_source(here).check(["train", "val"])  # what a build asks
    with pytest.raises(DataError, match=rf"{chosen[0]}.*has no mask"):
        open_source(here).check(["typical-3", "test"])  # what training asks
    for tile_id in chosen:
        masks[tile_id].write_bytes(drawn[tile_id])
    open_source(here).check(["typical-3", "test"])


def test_a_tile_of_other_pixels_is_drawn_without_them(store: FeatureStore, data: Path, tmp_path: Path) -> None:
    here = tmp_path / "data"
    shutil.copytree(data, here)
    source = open_source(here)
    choice = choose_tiles(store, Budget(tiles=4), "k-center", source)
    said: list[Event] = []
    clean = draw_choice(tmp_path / "clean.png", choice, store, source, said.append)
    assert not said
    Image.new("RGB", (64, 64), (255, 0, 255)).save(here / "images" / f"{choice.tiles[1].id}.png")
    other = draw_choice(tmp_path / "other.png", choice, store, source, said.append)
    assert [e.text.split(":")[0] for e in said if isinstance(e, Warned)] == [
        f"tile {choice.tiles[1].id!r} is drawn without its image"
    ]
    assert not (np.asarray(Image.open(other).convert("RGB")) == (255, 0, 255)).all(-1).any()
    assert clean.read_bytes() != other.read_bytes()


def test_a_probe_is_judged_on_tiles_that_no_arm_learned_from(store: FeatureStore, data: Path) -> None:
    source = open_source(data)
    trial, again = (try_choices(store, source, [Budget(tiles=3)], rounds=n, arrays=["other/*"])[0] for n in (4, 1))
    assert set(trial.miou) == set(ARMS) and all(trial.miou[arm][:1] == again.miou[arm] for arm in ARMS)
    assert (trial.tiles, trial.budget, trial.classes) == (TRAIN, 3, 3)
    assert all(0 <= v <= 1 for values in trial.miou.values() for v in values)
    assert len(trial.judged) == 4
    for n, judged in enumerate(trial.judged):
        learned = {tile_id for arm in ARMS for tile_id in trial.chosen[arm][n]}
        assert learned | set(judged) == set(source.split("train")) and not learned & set(judged)
        assert {len(trial.chosen[arm][n]) for arm in ARMS} == {3}
    # Where the four fifths on offer hold a rare tile, it is far from all others.
    assert np.mean(trial.seen["k-center"]) > np.mean(trial.seen["random"])
    assert np.mean(trial.miou["k-center"]) > np.mean(trial.miou["random"])
    with pytest.raises(DataError, match="leave too few to judge by"):
        try_choices(store, source, [Budget(percent=40)])
