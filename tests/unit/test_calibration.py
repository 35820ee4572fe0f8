"""Calibration errors against torchmetrics and against cases counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from rsmtdf_train.scoring.calibration import Calibration, CalibrationSums

IGNORE = 255
ROUNDED = 4e-5  # what the levels cost, at most


def calibration(probabilities: Tensor, label: Tensor, parts: int = 1) -> Calibration:
    sums = CalibrationSums([f"c{n}" for n in range(probabilities.shape[1])], IGNORE)
    for p, truth in zip(probabilities.chunk(parts), label.chunk(parts), strict=True):
        sums.add(p, p.argmax(1), truth)
    return sums.scores()


def column(rows: list[list[float]], labels: list[int]) -> tuple[Tensor, Tensor]:
    """Return probabilities ``[1, C, 1, N]`` and labels ``[1, 1, N]`` of N pixels."""
    return torch.tensor(rows).T[None, :, None, :], torch.tensor(labels)[None, None, :]


def drawn(seed: int, classes: int, sharpness: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(6, classes, 40, 30, generator=generator)
    softened = (logits.movedim(1, -1) / 2).softmax(-1)
    label = torch.multinomial(softened.reshape(-1, classes), 1, generator=generator).view(6, 40, 30)
    label[torch.rand(label.shape, generator=generator) < 0.2] = IGNORE
    return logits.softmax(1), label


@pytest.mark.parametrize(("classes", "sharpness"), [(2, 1.0), (5, 0.3), (5, 3.0), (20, 2.0)])
def test_errors_equal_those_of_torchmetrics(classes: int, sharpness: float) -> None:
    p, label = drawn(classes, classes, sharpness)
    found = calibration(p, label, parts=3)
    theirs = multiclass_calibration_error(p, label, num_classes=classes, n_bins=15, norm="l1", ignore_index=IGNORE)
    assert found.overall.ece == pytest.approx(float(theirs), abs=ROUNDED)
    ones = []
    for c, mine in enumerate(found.classes):
        truth = torch.where(label == IGNORE, -1, (label == c).long())
        one = float(binary_calibration_error(p[:, c], truth, n_bins=15, norm="l1", ignore_index=-1))
        assert mine.one_vs_rest.ece == pytest.approx(one, abs=ROUNDED)
        ones.append(one)
        chosen = (p.argmax(1) == c) & (label != IGNORE)
        if chosen.any():
            right = binary_calibration_error(p[:, c][chosen], (label == c)[chosen].long(), n_bins=15, norm="l1")
            assert mine.predicted.ece == pytest.approx(float(right), abs=ROUNDED)
    assert found.classwise_ece == pytest.approx(sum(ones) / classes, abs=ROUNDED)


def test_ten_pixels_at_a_probability_of_three_quarters_of_which_six_are_right() -> None:
    found = calibration(*column([[0.75, 0.25]] * 10, [0] * 6 + [1] * 4))
    assert found.overall.ece == pytest.approx(0.15, abs=ROUNDED)
    assert found.overall.overconfidence == pytest.approx(0.15, abs=ROUNDED)
    first, second = found.classes
    assert first.predicted == found.overall and first.one_vs_rest.ece == pytest.approx(0.15, abs=ROUNDED)
    assert second.predicted.ece is None, "never predicted"
    assert second.one_vs_rest.ece == pytest.approx(0.15, abs=ROUNDED), "said 0.25, came true in 4 of 10"
    assert sum(n > 0 for n in found.overall.pixels) == 1
    place = found.overall.pixels.index(10)
    assert place == 11, "from 11/15 to 12/15"
    assert found.overall.accuracy[place] == 0.6
    assert found.overall.confidence[place] == pytest.approx(0.75, abs=ROUNDED)


def test_errors_of_opposite_sign_do_not_cancel_but_the_overconfidence_does() -> None:
    rows = [[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10
    found = calibration(*column(rows, [0] * 7 + [1] * 3 + [0] * 8 + [1] * 2))
    assert found.overall.ece == pytest.approx((0.2 + 0.2) / 2, abs=ROUNDED)
    assert found.overall.overconfidence == pytest.approx(0.0, abs=ROUNDED)


def test_probabilities_that_come_true_as_often_as_they_say_have_no_error() -> None:
    rows = [[0.7, 0.3]] * 10 + [[0.2, 0.8]] * 5
    found = calibration(*column(rows, [0] * 7 + [1] * 3 + [1] * 4 + [0]))
    assert found.overall.ece == pytest.approx(0, abs=ROUNDED)
    assert found.classwise_ece == pytest.approx(0, abs=ROUNDED)


def test_certainty_costs_nothing_where_it_is_right_and_all_where_it_is_wrong() -> None:
    rows = [[1.0, 0.0, 0.0]] * 4
    assert calibration(*column(rows, [0] * 4)).overall.ece == pytest.approx(0, abs=ROUNDED)
    assert calibration(*column(rows, [2] * 4)).overall.ece == pytest.approx(1, abs=ROUNDED)
    assert calibration(*column(rows, [0] * 4)).classwise_ece == pytest.approx(0, abs=ROUNDED)


def test_ignored_pixels_count_nowhere() -> None:
    p, label = drawn(3, 4, 1.0)
    other = torch.where((label == IGNORE)[:, None], p.roll(1, dims=1), p)
    assert not torch.equal(other, p) and calibration(other, label) == calibration(p, label)
    nothing = calibration(p, torch.full_like(label, IGNORE))
    assert nothing.overall.ece is None and nothing.classwise_ece is None


def test_tiles_in_any_parts_and_order_add_up_to_the_same_sums() -> None:
    p, label = drawn(4, 6, 2.0)
    whole, parts = (CalibrationSums("abcdef", IGNORE) for _ in range(2))
    whole.add(p, p.argmax(1), label)
    for tiles in ([4], [5, 0], [3, 1, 2]):
        parts.add(p[tiles], p[tiles].argmax(1), label[tiles])
    assert torch.equal(whole.sums, parts.sums)


def test_the_pixels_predicted_as_each_class_are_all_labelled_pixels() -> None:
    p, label = drawn(5, 5, 2.0)
    found = calibration(p, label)
    assert sum(sum(c.predicted.pixels) for c in found.classes) == int((label != IGNORE).sum())
    assert all(sum(c.one_vs_rest.pixels) == int((label != IGNORE).sum()) for c in found.classes)
    assert sum(found.overall.pixels) == int((label != IGNORE).sum())


def test_a_student_that_says_no_number_is_scored_without_a_crash() -> None:
    p, label = drawn(6, 3, 1.0)
    found = calibration(torch.full_like(p, float("nan")), label)
    assert found.overall.ece is not None and 0 <= found.overall.ece <= 1
