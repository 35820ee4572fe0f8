"""Scores of a segmentation from one global confusion matrix.

Definitions, per class c over all pixels whose label is not the ignore index (TP, FP, FN are counts of pixels):
``IoU = TP / (TP + FP + FN)``, ``F1 = 2 TP / (2 TP + FP + FN)``, ``accuracy = TP / (TP + FN)`` (recall).
A class that occurs neither in the labels nor in the predictions has no score (None) and enters no mean; one that was
predicted but never labelled scores 0. ``miou``, ``mf1`` and ``macc`` are means over classes; ``pixel_accuracy`` is the
share of right pixels. Ignored pixels count nowhere. Boundaries, calibration and groups: ``rsmtdf_train.scoring``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsmtdf_train.scoring.boundary import BoundaryScores
from rsmtdf_train.scoring.calibration import Calibration
from rsmtdf_train.scoring.means import mean_of

__all__ = ["ClassScore", "ConfusionMatrix", "GroupScores", "Scores", "scores_of"]


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class in 0..1; None when the class occurs neither in the labels nor in the predictions."""

    name: str
    iou: float | None
    f1: float | None
    accuracy: float | None
    pixels: int


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one split; every value in 0..1, None when nothing could be scored.

    ``confusion[label][prediction]`` counts pixels. ``boundary``, ``calibration``, ``groups``: None where not asked for.
    """

    classes: tuple[ClassScore, ...]
    miou: float | None
    mf1: float | None
    macc: float | None
    pixel_accuracy: float | None
    confusion: tuple[tuple[int, ...], ...] = ()
    boundary: BoundaryScores | None = None
    calibration: Calibration | None = None
    groups: GroupScores | None = None

    def miou_without(self, names: Sequence[str]) -> float | None:
        """Return the mean IoU over the classes that are not named (pixel counts stay as they are)."""
        return mean_of([c.iou for c in self.classes if c.name not in names])

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the means, a list of classes, and what was asked for beside them."""
        more = {"boundary": self.boundary, "calibration": self.calibration, "groups": self.groups}
        return {
            "miou": self.miou,
            "mf1": self.mf1,
            "macc": self.macc,
            "pixel_accuracy": self.pixel_accuracy,
            "classes": [vars(c) | {} for c in self.classes],
            "confusion": [list(row) for row in self.confusion],
            **{name: found.to_json() for name, found in more.items() if found is not None},
        }


@dataclass(frozen=True)
class GroupScores:
    """``parts``: name of a group → its number of tiles and its scores. ``by``: what the tiles were put together by."""

    by: str
    parts: Mapping[str, tuple[int, Scores]]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; groups with the fewest right pixels first, those without any label last."""

        def worst(item: tuple[str, tuple[int, Scores]]) -> tuple[float, str]:
            right = item[1][1].pixel_accuracy
            return (2.0 if right is None else right, item[0])

        parts = sorted(self.parts.items(), key=worst)
        return {
            "by": self.by,
            "groups": [{"name": name, "tiles": tiles, **scores.to_json()} for name, (tiles, scores) in parts],
        }


class ConfusionMatrix:
    """Counts ``[C, C]`` (label, prediction) over everything that was added; exact (int64)."""

    def __init__(self, names: Sequence[str], ignore_index: int) -> None:
        self.names = tuple(names)
        self.ignore_index = ignore_index
        self.counts = torch.zeros(len(self.names), len(self.names), dtype=torch.int64)

    def add(self, predicted_BHW: Tensor, label_BHW: Tensor) -> None:
        """Count class numbers ``predicted`` against ``label``; both ``[B, H, W]`` integers."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        if len(self.names) == 1:  # torchmetrics wants two classes
            self.counts += (label_BHW != self.ignore_index).sum().cpu()
            return
        counts: Tensor = multiclass_confusion_matrix(
            predicted_BHW, label_BHW, num_classes=len(self.names), ignore_index=self.ignore_index, validate_args=False
        )
        self.counts += counts.to("cpu", torch.int64)

    def scores(self) -> Scores:
        """Return the scores of what was added."""
        return scores_of(self.names, self.counts)


def scores_of(
    names: Sequence[str],
    confusion: Tensor,
    boundary: BoundaryScores | None = None,
    calibration: Calibration | None = None,
    groups: GroupScores | None = None,
) -> Scores:
    """Return the scores of counts ``[C, C]`` (label, prediction), with what else was scored."""
    counts = confusion.double()
    hits, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    classes = tuple(
        _class_score(name, *(float(v[i]) for v in (hits, labelled, predicted))) for i, name in enumerate(names)
    )
    total = float(counts.sum())
    return Scores(
        classes=classes,
        miou=mean_of([c.iou for c in classes]),
        mf1=mean_of([c.f1 for c in classes]),
        macc=mean_of([c.accuracy for c in classes]),
        pixel_accuracy=float(hits.sum()) / total if total else None,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        boundary=boundary,
        calibration=calibration,
        groups=groups,
    )


def _class_score(name: str, hits: float, labelled: float, predicted: float) -> ClassScore:
    union = labelled + predicted - hits
    return ClassScore(
        name=name,
        iou=hits / union if union else None,
        f1=2 * hits / (labelled + predicted) if union else None,
        accuracy=hits / labelled if labelled else None,
        pixels=int(labelled),
    )
