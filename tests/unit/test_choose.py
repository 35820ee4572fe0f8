"""The choice of tiles on points whose right answer is known, and budgets, names and lists."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rsmtdf_cache.choose.clusters import _means, cluster, nearest, squared_distances
from rsmtdf_cache.choose.selection import Budget, default_name, subset_path, write_subset
from rsmtdf_cache.choose.strategies import (
    farthest_first,
    neighbour_distances,
    random_order,
    typical_first,
    uncertain_first,
)
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.sources import open_source
from tests.datasets import write_dataset

CENTRES = np.array([[0, 0, 0], [10, 0, 0], [0, 10, 0], [0, 0, 10]], np.float32)
SIZES = (9, 30, 14, 20)


def blobs(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Return points ``[n, 3]`` around far centres, in mixed order, and the centre of each."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (CENTRES[labels] + rng.normal(0, 0.5, (len(labels), 3))).astype(np.float32), labels


def test_distances_are_those_of_the_definition() -> None:
    points, _ = blobs()
    direct = np.square(points[:, None].astype(np.float64) - points[None, :7]).sum(-1)
    np.testing.assert_allclose(squared_distances(points, points[:7]), direct, atol=1e-3)
    labels, least = nearest(points, points[:7])
    np.testing.assert_allclose(least, direct.min(1), atol=1e-3)
    np.testing.assert_allclose(np.take_along_axis(direct, labels[:, None], 1)[:, 0], direct.min(1), atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_the_groups_that_are_there(seed: int) -> None:
    points, truth = blobs(seed=seed)
    found = cluster(points, len(SIZES), seed)
    for label in range(len(SIZES)):
        assert len(set(truth[found == label].tolist())) == 1
    assert (found == cluster(points, len(SIZES), seed)).all()


def test_no_cluster_is_empty_while_there_are_points_for_all() -> None:
    points, _ = blobs()
    assert len(set(cluster(points, len(points)).tolist())) == len(points)
    twice = np.repeat(points[:3], 5, axis=0)
    assert len(set(cluster(twice, 6).tolist())) == 3  # there are no more


def test_a_centre_that_lost_all_its_points_moves_to_the_worst_served_one() -> None:
    points = np.array([[0.0], [1.0], [8.0], [9.0]], np.float32)
    means = _means(points, np.array([0, 0, 2, 2]), np.array([0.1, 0.2, 0.3, 0.9], np.float32), 3)
    np.testing.assert_array_equal(means, [[0.5], [9.0], [8.5]])


def test_typical_takes_the_densest_tile_of_each_group_the_largest_first() -> None:
    points, truth = blobs()
    order = typical_first(points, 4)
    assert [int(truth[i]) for i in order.chosen] == list(np.argsort(SIZES)[::-1])
    for i in order.chosen:
        group = np.flatnonzero(truth == truth[i])
        apart = np.sqrt(np.square(points[group, None].astype(np.float64) - points[group]).sum(-1))
        near = np.sort(apart, axis=1)[:, 1 : min(20, len(group) // 2) + 1].mean(1)
        assert i == group[near.argmin()]


def test_typical_leaves_stray_tiles_to_the_end() -> None:
    points, _ = blobs((30, 20))
    stray = np.array([[90, 90, 90], [-90, 90, 0]], np.float32)
    everything = np.concatenate([stray, points])
    chosen = typical_first(everything, 4).chosen
    assert not set(chosen) & {0, 1}
    assert sorted(typical_first(everything, len(everything)).chosen) == list(range(len(everything)))


def test_typical_goes_where_nothing_is_labelled_yet() -> None:
    points, truth = blobs()
    have = [int(np.flatnonzero(truth == label)[0]) for label in (1, 3)]  # the two largest groups
    order = typical_first(points, 2, have)
    assert [int(truth[i]) for i in order.chosen] == [2, 0]
    assert not set(typical_first(points, len(points) - 2, have).chosen) & set(have)


def test_uncertain_takes_the_most_doubted_tile_of_each_group_the_most_doubted_group_first() -> None:
    points, truth = blobs()
    doubt = np.random.default_rng(5).uniform(0, 1, len(points)).astype(np.float32)
    doubt[truth == 3] *= 0.3  # a large group that is well known, though its best tile is not
    order = uncertain_first(points, doubt, 4)
    best = {label: int(np.where(truth == label, doubt, -1).argmax()) for label in range(4)}
    assert order.chosen == sorted(best.values(), key=lambda i: -doubt[i])
    assert int(truth[order.chosen[-1]]) == 3
    have = [best[label] for label in (0, 1)]
    later = uncertain_first(points, doubt, 2, have).chosen  # the others, however doubted the labelled groups are
    assert later == sorted((best[2], best[3]), key=lambda i: -doubt[i])


def test_uncertain_goes_on_with_the_group_whose_next_tile_is_doubted_most() -> None:
    points, truth = blobs((20, 20))
    doubt = np.where(truth == 0, 0.5, 0.1).astype(np.float32)
    doubt[np.flatnonzero(truth == 1)[:2]] = 0.9, 0.8
    stray = np.array([[90, 90, 90]], np.float32)
    everything, doubts = np.concatenate([stray, points]), np.concatenate([np.ones(1, np.float32), doubt])
    chosen = uncertain_first(everything, doubts, 3).chosen
    assert 0 not in chosen  # the most doubted tile of all, but a cluster of its own: a stray
    assert [int(truth[i - 1]) for i in chosen] == [1, 0, 1]
    assert [float(doubts[i]) for i in chosen] == pytest.approx([0.9, 0.5, 0.8])
    assert sorted(uncertain_first(everything, doubts, len(everything)).chosen) == list(range(len(everything)))


def test_of_tiles_as_uncertain_but_for_rounding_the_first_is_taken() -> None:
    points, truth = blobs()
    doubt = (0.4 * (1 + np.random.default_rng(2).uniform(-1e-7, 1e-7, len(points)))).astype(np.float32)
    firsts = [int(np.flatnonzero(truth == label)[0]) for label in range(4)]
    assert uncertain_first(points, doubt, 4).chosen == sorted(firsts)


def test_a_larger_k_center_list_begins_with_the_smaller_one() -> None:
    points, _ = blobs()
    whole = farthest_first(points, len(points)).chosen
    assert sorted(whole) == list(range(len(points)))
    assert whole[0] == neighbour_distances(points).argmin()
    for number in (1, 5, 20):
        assert farthest_first(points, number).chosen == whole[:number]
    assert farthest_first(points, 6, have=whole[:4]).chosen == whole[4:10]


@pytest.mark.parametrize("number", [2, 3])
def test_k_center_is_within_twice_the_best_possible_radius(number: int) -> None:
    points = np.random.default_rng(number).normal(0, 1, (14, 2)).astype(np.float32)
    apart = np.sqrt(squared_distances(points, points))
    best = min(apart[list(several)].min(0).max() for several in combinations(range(len(points)), number))
    assert apart[farthest_first(points, number).chosen].min(0).max() <= 2 * best + 1e-4


def test_of_equal_tiles_the_first_is_taken_whatever_rounding_says() -> None:
    points = np.repeat(blobs()[0][:5], 4, axis=0)
    points *= np.tile(np.array([1, 1 + 3e-7, 1 - 3e-7, 1 + 6e-7], np.float32), 5)[:, None]
    chosen = farthest_first(points, 5).chosen
    assert all(i % 4 == 0 for i in chosen)
    assert [i % 4 for i in typical_first(points, 5).chosen] == [0] * 5


def test_neighbours_of_few_points() -> None:
    points = np.array([[0.0], [1.0], [5.0]], np.float32)
    np.testing.assert_allclose(neighbour_distances(points), [1, 1, 4], rtol=1e-5)
    assert np.isnan(neighbour_distances(points[:1])).all()


def test_random_choices_are_without_replacement_and_beside_what_is_there() -> None:
    drawn = random_order(20, 15, have=[3, 4, 5], seed=1)
    assert len(set(drawn)) == 15 and not set(drawn) & {3, 4, 5}
    assert drawn == random_order(20, 15, have=[3, 4, 5], seed=1) != random_order(20, 15, have=[3, 4, 5], seed=2)


def test_budgets() -> None:
    assert Budget.parse("7").count(132) == 7
    assert Budget.parse(" 5% ").count(132) == 7  # as the land-cover sample counts
    assert Budget.parse("0.1%").count(132) == 1
    assert (Budget.parse("2.5%").label, Budget.parse("12").label) == ("2.5p", "12")
    for text in ("0", "-3", "0%", "101%", "many", "5.5", "", "nan%"):
        with pytest.raises(UsageError, match="--budget"):
            Budget.parse(text)
    with pytest.raises(UsageError, match="there are 6 tiles"):
        Budget.parse("7").count(6)


def test_names_and_lists(tmp_path: Path) -> None:
    source = open_source(write_dataset(tmp_path / "data", tiles=6, tile_px=32))
    for name in ("", "../5", "train", "a/b", ".hidden", "a" * 65):
        with pytest.raises(UsageError, match="--name"):
            subset_path(source, name)
    name = default_name("typical", Budget.parse("50%"))
    assert name == "typical-50p" != default_name("typical", Budget.parse("50%"), seed=1)
    names = [default_name(s, Budget.parse("40"), seed=1) for s in ("typical", "k-center", "uncertain")]
    assert names == ["typical-40-s1", "k-center-40", "uncertain-40-s1"]
    path = write_subset(source, name, ["t002", "t000"])
    assert open_source(source.root).split(name) == ["t002", "t000"]  # the order in which to label
    written = path.stat().st_mtime_ns
    assert write_subset(source, name, ["t002", "t000"]).stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="another list is there"):
        write_subset(source, name, ["t000", "t002"])
    write_subset(source, name, ["t001"], force=True)
    assert open_source(source.root).split(name) == ["t001"]
