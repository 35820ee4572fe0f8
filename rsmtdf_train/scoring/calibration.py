"""Calibration: whether a probability of 0.9 means right in 9 of 10 cases.

Probabilities are sorted into ``BINS`` bins of equal width, ``[0, 1/15), [1/15, 2/15), … [14/15, 1]``; ``n_b`` of ``n``
pixels are in bin b, ``conf_b`` is their mean probability, ``acc_b`` the share of them that it came true for.

- *ECE* (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017): ``sum_b n_b / n |acc_b - conf_b|`` over the
  probability of the predicted class.
- *of the pixels predicted as c* (top-label calibration, Gupta and Ramdas, ICLR 2022): the same over these pixels alone:
  how far to trust the map where it says c.
- *classwise ECE* of c (Kull et al., "Beyond temperature scaling", NeurIPS 2019; static calibration error of Nixon et
  al., CVPR Workshops 2019): the same over the probability of c at *all* pixels, against whether c is the label. It is
  small for rare classes, whose probability is rightly near 0 almost everywhere. Their mean is the classwise ECE.

Only pixels with a label count. Within a bin a probability counts as the middle of one of 1,024 levels, so that all sums
are integers: the order of tiles, batches and processes changes nothing, and an ECE is within 0.00004 of the exact one.

Shape legend: B batch, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsmtdf_train.scoring.means import mean_of

__all__ = ["BINS", "Calibration", "CalibrationSums", "ClassCalibration", "Reliability"]

BINS = 15
_FINE = 1024
_LEVELS = BINS * _FINE
#: Pixels at once on a CPU: what stays in its caches.
_CPU_PIXELS = 2**18


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: for each bin its pixels, their mean probability and how often it came true (0..1)."""

    pixels: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]

    @property
    def ece(self) -> float | None:
        """Return the expected calibration error in 0..1; None without pixels."""
        total = sum(self.pixels)
        gaps = [
            n * abs(a - c)
            for n, c, a in zip(self.pixels, self.confidence, self.accuracy, strict=True)
            if c is not None and a is not None
        ]
        return sum(gaps) / total if total else None

    @property
    def overconfidence(self) -> float | None:
        """Return mean probability minus how often it came true, -1..1: positive when too sure."""
        total = sum(self.pixels)
        gaps = [
            n * (c - a)
            for n, c, a in zip(self.pixels, self.confidence, self.accuracy, strict=True)
            if c is not None and a is not None
        ]
        return sum(gaps) / total if total else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data: a list with an entry per bin for each number."""
        return {k: list(v) for k, v in vars(self).items()}


@dataclass(frozen=True)
class ClassCalibration:
    """One class: ``predicted`` over the pixels predicted as it, ``one_vs_rest`` over its probability at all pixels."""

    name: str
    predicted: Reliability
    one_vs_rest: Reliability


@dataclass(frozen=True)
class Calibration:
    """``overall``: the probability of the predicted class at all pixels."""

    overall: Reliability
    classes: tuple[ClassCalibration, ...]

    @property
    def classwise_ece(self) -> float | None:
        """Return the mean over classes of the one-vs-rest ECE."""
        return mean_of([c.one_vs_rest.ece for c in self.classes])

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "bins": BINS,
            "ece": self.overall.ece,
            "overconfidence": self.overall.overconfidence,
            "classwise_ece": self.classwise_ece,
            "reliability": self.overall.to_json(),
            "classes": [
                {
                    "name": c.name,
                    "ece": c.predicted.ece,
                    "overconfidence": c.predicted.overconfidence,
                    "classwise_ece": c.one_vs_rest.ece,
                    "reliability": c.predicted.to_json(),
                    "classwise_reliability": c.one_vs_rest.to_json(),
                }
                for c in self.classes
            ],
        }


class CalibrationSums:
    """Sums ``[2, C, 3, BINS]`` (predicted, one-vs-rest; class; pixels, probability, true; bin); exact (int64).

    Probabilities are summed in units of 1/30,720: half a level.
    """

    def __init__(self, names: Sequence[str], ignore_index: int) -> None:
        self.names = tuple(names)
        self.ignore_index = ignore_index
        self.sums = torch.zeros(2, len(self.names), 3, BINS, dtype=torch.int64)

    def add(self, probabilities_BCHW: Tensor, predicted_BHW: Tensor, label_BHW: Tensor) -> None:
        """Add probabilities (they sum to 1 over classes) with the classes of the largest ones and the labels."""
        classes, device = len(self.names), label_BHW.device
        pixels = label_BHW[0].numel() if len(label_BHW) else 1
        size = max(1, _CPU_PIXELS // pixels) if device.type == "cpu" else max(1, len(label_BHW))
        fine = torch.zeros(2, classes, _LEVELS, dtype=torch.int64, device=device)
        true = torch.zeros(2, classes, BINS, dtype=torch.int64, device=device)
        for start in range(0, len(label_BHW), size):
            part = slice(start, start + size)
            p, predicted, label = probabilities_BCHW[part].float(), predicted_BHW[part].long(), label_BHW[part].long()
            counted = label != self.ignore_index
            label = torch.where(counted, label, 0)
            top, at_label = (_levels(p.gather(1, n.unsqueeze(1))[:, 0]) for n in (predicted, label))
            fine[0] += _counts(predicted * _LEVELS + top, counted, classes * _LEVELS).view(classes, -1)
            right = counted & (predicted == label)
            true[0] += _counts(predicted * BINS + top // _FINE, right, classes * BINS).view(classes, -1)
            true[1] += _counts(label * BINS + at_label // _FINE, counted, classes * BINS).view(classes, -1)
            for c in range(classes):
                fine[1, c] += _counts(_levels(p[:, c]), counted, _LEVELS)
        worth = 2 * torch.arange(_LEVELS, device=device) + 1  # the middle of each level, in half levels
        self.sums += torch.stack([_coarse(fine), _coarse(fine * worth), true], dim=2).cpu()

    def scores(self) -> Calibration:
        """Return the calibration of what was added."""
        predicted, rest = self.sums
        return Calibration(
            _reliability(predicted.sum(0)),
            tuple(
                ClassCalibration(name, _reliability(predicted[c]), _reliability(rest[c]))
                for c, name in enumerate(self.names)
            ),
        )


def _levels(probabilities: Tensor) -> Tensor:
    # clamped as integers: 1 belongs to the last level, and what is no number becomes one
    return probabilities.mul(_LEVELS).to(torch.int64).clamp_(0, _LEVELS - 1)


def _counts(numbers: Tensor, counted: Tensor, size: int) -> Tensor:
    """Return how often each of ``0..size-1`` stands among the ``counted`` ones of ``numbers``."""
    return torch.bincount(torch.where(counted, numbers, size).reshape(-1), minlength=size + 1)[:size]


def _coarse(fine: Tensor) -> Tensor:
    return fine.view(*fine.shape[:-1], BINS, _FINE).sum(-1)


def _reliability(sums: Tensor) -> Reliability:
    pixels, halves, true = sums.tolist()
    return Reliability(
        tuple(pixels),
        tuple(v / n / (2 * _LEVELS) if n else None for v, n in zip(halves, pixels, strict=True)),
        tuple(v / n if n else None for v, n in zip(true, pixels, strict=True)),
    )
