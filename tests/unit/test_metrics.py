"""Scores against torchmetrics' own classes and against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from rsmtdf_train.metrics import ConfusionMatrix

IGNORE = 255
NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_torchmetrics_on_random_maps_added_in_parts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (6, 17, 19), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = IGNORE
    right = torch.rand(label.shape, generator=generator) < 0.6
    predicted = torch.where(right & (label != IGNORE), label, torch.randint(0, 4, label.shape, generator=generator))
    matrix = ConfusionMatrix(NAMES, IGNORE)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        matrix.add(predicted[part], label[part])
    scores = matrix.scores()
    for kind, mine in (
        (MulticlassJaccardIndex, [c.iou for c in scores.classes]),
        (MulticlassF1Score, [c.f1 for c in scores.classes]),
        (MulticlassAccuracy, [c.accuracy for c in scores.classes]),
    ):
        theirs = kind(num_classes=4, average="none", ignore_index=IGNORE)(predicted, label)
        assert mine == pytest.approx(theirs.tolist(), abs=1e-6)
    macro = MulticlassJaccardIndex(num_classes=4, average="macro", ignore_index=IGNORE)(predicted, label)
    assert scores.miou == pytest.approx(float(macro), abs=1e-6)
    micro = MulticlassAccuracy(num_classes=4, average="micro", ignore_index=IGNORE)(predicted, label)
    assert scores.pixel_accuracy == pytest.approx(float(micro), abs=1e-6)


def test_a_class_that_never_occurs_enters_no_mean_and_one_predicted_but_never_labelled_scores_zero() -> None:
    matrix = ConfusionMatrix(NAMES, IGNORE)
    matrix.add(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 0, 0, 0]]]))
    scores = matrix.scores()
    assert [c.iou for c in scores.classes] == [0.5, 0.0, 0.0, None]
    assert [c.accuracy for c in scores.classes] == [0.5, None, None, None]
    assert scores.miou == pytest.approx(0.5 / 3)
    assert [c.pixels for c in scores.classes] == [4, 0, 0, 0]


def test_the_mean_without_a_class_keeps_the_other_scores() -> None:
    matrix = ConfusionMatrix(NAMES, IGNORE)
    matrix.add(torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 2]]]))
    scores = matrix.scores()
    ious = {c.name: c.iou for c in scores.classes}
    assert ious == {"a": 1.0, "b": 0.5, "c": 0.5, "d": None}
    assert scores.miou_without(["a"]) == pytest.approx(0.5)
    assert scores.miou_without(["b", "d"]) == pytest.approx(0.75)
    assert scores.miou_without(NAMES) is None


def test_ignored_pixels_count_nowhere() -> None:
    matrix = ConfusionMatrix(NAMES, IGNORE)
    matrix.add(torch.tensor([[[3, 3]]]), torch.tensor([[[IGNORE, IGNORE]]]))
    scores = matrix.scores()
    assert not matrix.counts.any()
    assert scores.miou is None and scores.pixel_accuracy is None


def test_scores_are_plain_json_data() -> None:
    matrix = ConfusionMatrix(["only"], IGNORE)
    matrix.add(torch.tensor([[[0, 0]]]), torch.tensor([[[0, IGNORE]]]))
    assert matrix.scores().to_json() == {
        "miou": 1.0, "mf1": 1.0, "macc": 1.0, "pixel_accuracy": 1.0,
        "classes": [{"name": "only", "iou": 1.0, "f1": 1.0, "accuracy": 1.0, "pixels": 1}],
        "confusion": [[1]],
    }  # fmt: skip
