"""All that is counted of one student on a split, and the scores it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsmtdf_cache.sources.base import Tile
from rsmtdf_train.metrics import ConfusionMatrix, GroupScores, Scores, scores_of
from rsmtdf_train.processes import Processes
from rsmtdf_train.scoring.boundary import BoundaryCounts
from rsmtdf_train.scoring.calibration import CalibrationSums
from rsmtdf_train.scoring.groups import GroupCounts, Grouping

__all__ = ["Measures", "Tally"]


@dataclass(frozen=True)
class Measures:
    """What is counted beside the confusion matrix; nothing by default, which is what training does.

    ``tolerance_px``: boundary F1 at this tolerance. ``groups``: scores by group; they hold every tile of the split.
    """

    tolerance_px: int | None = None
    calibration: bool = False
    groups: Grouping | None = None


class Tally:
    """Sums over everything that was added; integers, so they add up over batches and processes to the same bits."""

    def __init__(self, names: Sequence[str], ignore_index: int, measures: Measures) -> None:
        self.confusion = ConfusionMatrix(names, ignore_index)
        tolerance, groups = measures.tolerance_px, measures.groups
        self.boundary = None if tolerance is None else BoundaryCounts(names, ignore_index, tolerance)
        self.calibration = CalibrationSums(names, ignore_index) if measures.calibration else None
        self.groups = None if groups is None else GroupCounts(groups, len(names), ignore_index)

    def add(self, logits_BCHW: Tensor, label_BHW: Tensor, tiles: Sequence[Tile]) -> None:
        """Count the logits of ``tiles`` against their labels, integers ``[B, H, W]``."""
        predicted = logits_BCHW.argmax(dim=1)
        probabilities = None if self.calibration is None else logits_BCHW.float().softmax(dim=1)
        self.add_predicted(predicted, probabilities, label_BHW, tiles)

    def add_predicted(
        self, predicted_BHW: Tensor, probabilities_BCHW: Tensor | None, label_BHW: Tensor, tiles: Sequence[Tile]
    ) -> None:
        """Count class numbers, and the probabilities they come from where calibration is asked for."""
        self.confusion.add(predicted_BHW, label_BHW)
        if self.boundary is not None:
            self.boundary.add(predicted_BHW, label_BHW)
        if self.calibration is not None and probabilities_BCHW is not None:
            self.calibration.add(probabilities_BCHW, predicted_BHW, label_BHW)
        if self.groups is not None:
            self.groups.add(predicted_BHW, label_BHW, tiles)

    def add_up(self, world: Processes, device: torch.device) -> None:
        """Replace the sums by those over all processes."""
        self.confusion.counts = world.sum_(self.confusion.counts, device)
        if self.boundary is not None:
            self.boundary.counts = world.sum_(self.boundary.counts, device)
        if self.calibration is not None:
            self.calibration.sums = world.sum_(self.calibration.sums, device)
        if self.groups is not None:
            self.groups.counts = world.sum_(self.groups.counts, device)

    def scores(self) -> Scores:
        """Return the scores of what was added."""
        return scores_of(
            self.confusion.names,
            self.confusion.counts,
            boundary=None if self.boundary is None else self.boundary.scores(),
            calibration=None if self.calibration is None else self.calibration.scores(),
            groups=None if self.groups is None else _group_scores(self.groups, self.confusion.names),
        )


def _group_scores(groups: GroupCounts, names: Sequence[str]) -> GroupScores:
    parts = {
        name: (tiles, scores_of(names, counts))
        for (name, tiles), counts in zip(groups.grouping.tiles.items(), groups.counts, strict=True)
    }
    return GroupScores(groups.grouping.by.value, parts)
