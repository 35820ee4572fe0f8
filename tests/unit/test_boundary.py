"""Boundary F1 against its definition, pixel by pixel, and against borders that were moved by known distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rsmtdf_train.scoring.boundary import BoundaryCounts, BoundaryScores
from tests.boundary import slow_boundary_f1

IGNORE = 255


def scored(predicted: Tensor, label: Tensor, classes: int = 2, tolerance: int = 3) -> BoundaryScores:
    counts = BoundaryCounts([f"c{n}" for n in range(classes)], IGNORE, tolerance)
    counts.add(predicted, label)
    return counts.scores()


def f1(predicted: Tensor, label: Tensor, classes: int = 2, tolerance: int = 3) -> list[float | None]:
    return [c.f1 for c in scored(predicted, label, classes, tolerance).classes]


def patches(rng: np.random.Generator, tiles: int, side: int, classes: int, patch: int) -> Tensor:
    """Return random maps of square patches, ``[tiles, side, side]``."""
    coarse = rng.integers(0, classes, (tiles, -(-side // patch), -(-side // patch)))
    return torch.from_numpy(coarse.repeat(patch, 1).repeat(patch, 2)[:, :side, :side].copy())


@pytest.mark.parametrize(("classes", "tolerance"), [(2, 0), (5, 1), (8, 2), (9, 3), (16, 5), (33, 2), (70, 3), (3, 6)])
def test_every_class_scores_what_the_definition_says(classes: int, tolerance: int) -> None:
    rng = np.random.default_rng(classes)
    label, predicted = patches(rng, 3, 29, classes, 4), patches(rng, 3, 29, classes, 4)
    predicted = torch.where(torch.from_numpy(rng.random(label.shape) < 0.8), label, predicted)
    label[torch.from_numpy(rng.random(label.shape) < 0.1)] = IGNORE
    wanted = slow_boundary_f1(predicted.numpy(), label.numpy(), classes, IGNORE, tolerance)
    assert f1(predicted, label, classes, tolerance) == pytest.approx(wanted)
    assert any(v not in (None, 0.0, 1.0) for v in wanted), "the maps are neither equal nor strangers"


@pytest.mark.parametrize("tolerance", [0, 1, 2, 3, 5])
def test_a_border_is_found_up_to_the_tolerance_and_no_farther(tolerance: int) -> None:
    columns = torch.arange(40).expand(1, 40, 40)
    label = (columns >= 20).long()
    for moved in range(8):
        expected = [1.0, 1.0] if moved <= tolerance else [0.0, 0.0]
        assert f1((columns >= 20 + moved).long(), label, tolerance=tolerance) == expected


def test_a_tolerance_larger_than_the_tile_finds_every_boundary_that_has_one_of_its_class() -> None:
    rng = np.random.default_rng(3)
    label, predicted = patches(rng, 1, 20, 3, 4), patches(rng, 1, 20, 3, 4)
    assert f1(predicted, label, 3, tolerance=60) == [1.0, 1.0, 1.0]


def test_distances_are_those_of_a_circle() -> None:
    label = torch.zeros(1, 15, 15, dtype=torch.long)
    label[0, 7, 7] = 1
    for dy in range(-4, 5):
        for dx in range(-4, 5):
            predicted = torch.zeros_like(label)
            predicted[0, 7 + dy, 7 + dx] = 1
            assert f1(predicted, label)[1] == (1.0 if math.hypot(dy, dx) <= 3 else 0.0), (dy, dx)


def test_precision_and_recall_say_which_side_has_too_many_borders() -> None:
    label = torch.zeros(1, 30, 30, dtype=torch.long)
    label[0, :, 15:] = 1
    predicted = label.clone()
    predicted[0, 4, 25] = 0  # a hole of one pixel, far from the border: one boundary pixel of 0, four of 1
    classes = scored(predicted, label).classes
    assert [c.recall for c in classes] == [1.0, 1.0]
    assert [c.precision for c in classes] == [30 / 31, 30 / 34]
    assert [(c.predicted_px, c.labelled_px) for c in classes] == [(31, 30), (34, 30)]
    assert scored(predicted, label).mf1 == pytest.approx(((60 / 61) + (60 / 64)) / 2)


def test_edges_of_tiles_and_of_ignored_areas_are_no_boundaries() -> None:
    plain = torch.ones(2, 12, 12, dtype=torch.long)
    assert f1(plain, plain) == [None, None]
    label = torch.zeros(1, 12, 12, dtype=torch.long)
    label[0, :, 6:] = 1
    label[0, :, 5:7] = IGNORE  # the border itself is not labelled
    found = scored(label.clamp(0, 1), label)
    assert [c.f1 for c in found.classes] == [None, None] and found.mf1 is None
    tiles = torch.stack([torch.zeros(12, 12), torch.ones(12, 12)]).long()  # neighbours in a batch are none in space
    assert f1(tiles, tiles) == [None, None]


def test_predictions_on_ignored_pixels_count_nowhere() -> None:
    rng = np.random.default_rng(0)
    label, predicted = patches(rng, 2, 32, 4, 5), patches(rng, 2, 32, 4, 5)
    label[:, 8:20, 10:25] = IGNORE
    other = torch.where(label == IGNORE, (predicted + 1) % 4, predicted)
    assert not torch.equal(other, predicted)
    assert scored(other, label, 4) == scored(predicted, label, 4)


def test_a_class_with_boundaries_on_one_side_only_scores_zero_and_one_with_none_enters_no_mean() -> None:
    label = torch.zeros(1, 20, 20, dtype=torch.long)
    label[0, :10] = 1
    predicted = torch.zeros_like(label)
    predicted[0, :, :10] = 2
    found = scored(predicted, label, classes=4, tolerance=0)
    assert [c.f1 for c in found.classes][1:] == [0.0, 0.0, None]
    assert [(c.precision, c.recall) for c in found.classes[1:]] == [(None, 0.0), (0.0, None), (None, None)]
    assert found.mf1 == pytest.approx(sum(c.f1 for c in found.classes if c.f1 is not None) / 3)


def test_tiles_in_any_parts_and_order_add_up_to_the_same_counts() -> None:
    rng = np.random.default_rng(1)
    label, predicted = patches(rng, 6, 24, 5, 4), patches(rng, 6, 24, 5, 4)
    whole = BoundaryCounts("abcde", IGNORE)
    whole.add(predicted, label)
    parts = BoundaryCounts("abcde", IGNORE)
    for tiles in ([5], [0, 3], [1, 2, 4]):
        parts.add(predicted[tiles], label[tiles])
    assert torch.equal(whole.counts, parts.counts) and whole.counts.sum() > 0
