"""Tuning: sizes, the front, intervals that cover, a probe that reads what is there and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.resampling import Grid
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, LayerSpec, ViewSpec
from rsmtdf_cache.tune.budget import parse_nbytes
from rsmtdf_cache.tune.choice import Interval, TileBootstrap, pareto_front, recommend, verdict_of
from rsmtdf_cache.tune.labelled import choose_tiles
from rsmtdf_cache.tune.maps import grid_of, recentred
from rsmtdf_cache.tune.probe import ProbeTask, cells_of
from rsmtdf_cache.views import inverse_orientation, orient, orient_point
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("20GB", 20 * 10**9), ("1.5 TiB", 3 * 2**39), ("500mb", 5 * 10**8), ("1e9", 10**9), ("7", 7), ("2k", 2000)],
)
def test_budgets_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "nan", "inf", "1e40", "20 XB", "20GB more", "0.2", "1,5GB"])
def test_other_budgets_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        parse_nbytes(text)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=40))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    sizes, scores = [p[0] for p in points], [p[1] / 20 for p in points]
    front = pareto_front(sizes, scores)
    assert all(a < b for a, b in zip([sizes[i] for i in front], [sizes[i] for i in front[1:]], strict=False))
    assert all(a < b for a, b in zip([scores[i] for i in front], [scores[i] for i in front[1:]], strict=False))
    for i in range(len(points)):
        assert any(sizes[f] <= sizes[i] and scores[f] >= scores[i] for f in front)
    for f in front:
        assert not any((sizes[i] < sizes[f] and scores[i] >= scores[f]) for i in range(len(points)))


def test_the_smallest_that_cannot_be_told_from_the_best_or_that_is_proved_to_be_near_it() -> None:
    worse, unsure, near, best = (
        Interval(-0.05, -0.08, -0.02), Interval(-0.03, -0.07, 0.01), Interval(-0.002, -0.006, 0.002), Interval(0, 0, 0)
    )  # fmt: skip
    assert [verdict_of(d) for d in (worse, unsure, near)] == ["worse", "inconclusive", "equal"]
    sizes, differences = [1, 2, 3, 4], [worse, unsure, near, best]
    assert recommend(sizes, differences) == 1
    assert recommend(sizes, differences, max_loss=0.01) == 2
    assert recommend(sizes, differences, max_loss=0.001) == 3
    assert recommend([4, 3, 3, 3], differences) == 3, "of equally large ones the better"


def _tiles(rng: np.random.Generator, tiles: int, accuracies: tuple[float, float]) -> list[torch.Tensor]:
    """Return confusion counts of two candidates on the same tiles: some are harder, for both."""
    hard = rng.normal(0, 0.15, tiles)
    shares = rng.dirichlet([0.7] * 3, tiles)
    found = []
    for accuracy in accuracies:
        right = np.clip(accuracy + hard + rng.normal(0, 0.05, tiles), 0, 1)[:, None]
        counts = np.zeros((tiles, 3, 3))
        for c in range(3):
            counts[:, c] = (shares[:, c] * 1000)[:, None] * (1 - right) / 2
            counts[:, c, c] = shares[:, c] * 1000 * right[:, 0]
        found.append(torch.from_numpy(counts.round().astype(np.int64)))
    return found


def test_paired_intervals_cover_the_true_difference_and_are_narrower_than_unpaired_ones() -> None:
    rng, accuracies, tiles, trials = np.random.default_rng(3), (0.62, 0.6), 24, 150
    everything = TileBootstrap(20_000, draws=2)
    huge = _tiles(rng, 20_000, accuracies)
    truth = everything.difference(*huge).mean
    boot = TileBootstrap(tiles, draws=300)
    covered, narrower = 0, 0
    for _ in range(trials):
        a, b = _tiles(rng, tiles, accuracies)
        paired = boot.difference(a, b)
        covered += paired.low <= truth <= paired.high
        unpaired = [boot.score(c) for c in (a, b)]
        narrower += paired.high - paired.low < sum(i.high - i.low for i in unpaired) / 2
    assert covered / trials >= 0.89, "95 % intervals from 24 tiles"
    assert covered < trials or narrower == trials, "an interval that always covers is too wide"
    assert narrower > 0.95 * trials


def test_an_interval_of_one_tile_says_nothing() -> None:
    a, b = _tiles(np.random.default_rng(0), 1, (0.9, 0.1))
    found = TileBootstrap(1).difference(a, b)
    assert verdict_of(found) == "inconclusive" or found.low != found.low


def test_a_score_is_what_torchmetrics_says() -> None:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    rng = np.random.default_rng(1)
    label = torch.from_numpy(rng.integers(0, 4, (5, 32, 32)))
    predicted = torch.where(torch.from_numpy(rng.random((5, 32, 32)) < 0.4), label, (label + 1) % 4)
    counts = torch.stack([
        torch.bincount(a.ravel() * 4 + b.ravel(), minlength=16).view(4, 4)
        for a, b in zip(label, predicted, strict=True)
    ])  # fmt: skip
    expected = float(multiclass_jaccard_index(predicted, label, num_classes=4))
    assert TileBootstrap(5).score(counts).mean == pytest.approx(expected, abs=1e-6)


def _blobs(rng: np.random.Generator, tiles: int, side: int, classes: int) -> np.ndarray:
    """Return masks of blocks of ``side // 8`` pixels."""
    coarse = rng.integers(0, classes, (tiles, 8, 8)).astype(np.uint8)
    return coarse.repeat(side // 8, 1).repeat(side // 8, 2)


def test_a_probe_reads_a_linear_labelling_and_nothing_from_shuffled_labels() -> None:
    rng = np.random.default_rng(0)
    masks = _blobs(rng, 24, 64, 4)
    hidden = np.eye(4)[masks[:, ::2, ::2]] @ rng.normal(size=(4, 12)) + rng.normal(scale=0.05, size=(24, 32, 32, 12))
    features, grid = hidden.astype(np.float32), Grid(32, 2.0, 1.0)

    def score(labels: np.ndarray) -> float:
        task = ProbeTask(labels[:16], labels[16:], 4, 255)
        probe = task.fit([task.points(features[:16], grid)])
        return TileBootstrap(8).score(task.confusions(probe, [features[16:]], [grid])).mean

    assert score(masks) > 0.93, "all but pixels at the edges of blocks"
    shuffled = rng.permuted(masks.reshape(24, -1), axis=1).reshape(masks.shape)
    assert score(shuffled) < 0.2, "four classes by chance: 1/7"


def test_a_probe_reads_arrays_of_other_strides_together_where_each_knows_half() -> None:
    rng = np.random.default_rng(1)
    masks = _blobs(rng, 24, 64, 4)
    fine = (masks[:, ::2, ::2, None] % 2).astype(np.float32)  # stride 2
    coarse = (masks[:, ::8, ::8, None] // 2).astype(np.float32)  # stride 8
    grids = [Grid(32, 2.0, 1.0), Grid(8, 8.0, 4.0)]
    task = ProbeTask(masks[:16], masks[16:], 4, 255)

    def score(chosen: list[int]) -> float:
        maps = [(fine, coarse)[i] for i in chosen]
        probe = task.fit([task.points(m[:16], grids[i]) for m, i in zip(maps, chosen, strict=True)])
        found = task.confusions(probe, [m[16:] for m in maps], [grids[i] for i in chosen])
        return TileBootstrap(8).score(found).mean

    assert score([0, 1]) > 1.4 * max(score([0]), score([1]))


@pytest.mark.parametrize("tile_px", [64, 256, 500, 518, 125, 6000])
def test_a_probe_learns_from_many_points_of_tiles_of_any_side(tile_px: int) -> None:
    cells = cells_of(tile_px)
    assert cells <= 32 and tile_px % cells == 0
    mask = np.zeros((tile_px, tile_px), np.uint8)
    mask[tile_px // 2 :] = 1
    task = ProbeTask([mask] * 16, np.empty((0, tile_px, tile_px), np.uint8), 2, 255)
    points = task.points(np.zeros((16, 4, 4, 1), np.float32), Grid(4, tile_px / 4, tile_px / 8))
    assert len(points) == len(task.counts) >= 16 * 25
    assert task.counts.sum(0).tolist() == pytest.approx([0.5, 0.5], abs=0.005), "sixteen tiles visit every cell"


def test_ignored_pixels_teach_and_count_nothing() -> None:
    rng = np.random.default_rng(2)
    masks = _blobs(rng, 12, 64, 3)
    features, grid = np.eye(3, dtype=np.float32)[masks[:, ::2, ::2]], Grid(32, 2.0, 1.0)
    hidden = masks.copy()
    hidden[:, :, 32:] = 255
    task = ProbeTask(hidden[:8], hidden[8:], 3, 255)
    lies = features.copy()
    lies[:, :, 17:] = 7.0  # another world where nothing is labelled; the token at the border is read by both
    scores = []
    for maps in (features, lies):
        probe = task.fit([task.points(features[:8], grid)])
        counts = task.confusions(probe, [maps[8:]], [grid])
        assert int(counts.sum()) == 4 * 64 * 32
        scores.append(counts)
    assert torch.equal(scores[0], scores[1])


def test_held_out_tiles_come_from_val_or_from_another_place_and_never_from_test(tmp_path: Path) -> None:
    source = open_source(write_dataset(tmp_path / "a", tiles=18, tile_px=32))
    train, held, origin = choose_tiles(source, "train", 100)
    assert ({t.split for t in train}, {t.split for t in held}, origin) == ({"train"}, {"val"}, "split val")
    train, held, _ = choose_tiles(source, "5", 100)
    assert {t.id for t in train} == set(source.split("5"))
    folder = write_dataset(tmp_path / "b", tiles=12, tile_px=32, splits={"train": range(12)}, georeference=True)
    train, held, origin = choose_tiles(open_source(folder), "train", 100)
    assert (max(t.id for t in train) < min(t.id for t in held), len(held), origin) == (
        True,
        3,
        "the easternmost of train",
    )
    for wrong in ("val", "test"):
        with pytest.raises(UsageError, match="--labels"):
            choose_tiles(source, wrong, 100)


def test_without_labels_there_is_nothing_to_tune(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", tiles=8, tile_px=32, splits={"train": range(8)}, labeled={})
    (folder / "dataset.yaml").write_text((folder / "dataset.yaml").read_text().replace("complete", "partial"))
    for mask in (folder / "masks").iterdir():
        mask.unlink()
    with pytest.raises(DataError, match=r"cache plan"):
        choose_tiles(open_source(folder), "train", 100)


@pytest.mark.parametrize("orientation", range(8))
def test_turned_maps_are_read_where_the_teacher_has_its_tokens(orientation: int) -> None:
    """A map that holds its tokens' own places, of a network whose first token is at a corner."""
    teacher = MeanTeacher().spec
    layer = LayerSpec(name="corner", channels=2, stride_px=8, offset_px=0.5)
    spec = FeatureSpec(
        teacher=teacher, layer=layer, view=ViewSpec(size_px=64, orientation=0), encoding=EncodingSpec(), tile_px=64,
        grid=(8, 8),
    )  # fmt: skip
    centres = grid_of(spec).centres()
    places = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1)
    maps = orient(places[None].astype(np.float32), orientation, axes=(1, 2))
    found = recentred(maps, spec, orientation)[0]
    there = [[orient_point(y, x, 64, inverse_orientation(orientation)) for x in centres] for y in centres]
    wanted = np.clip(np.array(there), centres[0], centres[-1])  # nothing lies beyond the outermost tokens
    assert np.abs(found - wanted).max() < 1e-4
