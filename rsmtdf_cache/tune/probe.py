"""A linear probe: how well per-pixel classes can be read off features by one linear map.

Logits are linear in the standardised features of a token and interpolated bilinearly between token centres; a linear
map and an interpolation commute, so arrays of any stride are summed on one grid without being resampled to each other.
The probe learns at a lattice of points in each tile, from the shares of the classes in the cell around each point, and
is judged on pixels. Softmax regression, full batch, L2, LBFGS from zero: no chance in it, the same for all candidates.

Shape legend: n training tiles, m other tiles, p points a tile, P places a side, C classes, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rsmtdf_cache.resampling import Grid, interpolation_weights

__all__ = ["LinearProbe", "ProbeTask", "cells_of"]

#: Cells a side of a tile; every fourth one a side is learned from. Measured on the sample: every second one (four times
#: the work) or twice the steps move mIoU by a point at most, with an interval of ten.
_CELLS, _EACH = 32, 4
_JUDGED_PX = 128  # pixels a side that are judged, evenly spread
_STEPS = 30
_L2 = 3e-3


def cells_of(tile_px: int) -> int:
    """Return how many cells a tile has a side: 32, or the most that divide its side; better in fours than in twos."""
    divisors = (n for n in range(1, _CELLS + 1) if tile_px % n == 0)
    return max(divisors, key=lambda n: (math.gcd(n, _EACH), n))


@dataclass(frozen=True)
class LinearProbe:
    """``logits = sum of (x - mean) / std @ weight + bias`` over arrays; lists are by array."""

    means: list[Tensor]
    stds: list[Tensor]
    weights: list[Tensor]  # [D, C]
    bias: Tensor

    def logits(
        self, maps: Sequence[NDArray[np.floating]], grids: Sequence[Grid], centres: NDArray[np.float64]
    ) -> Iterator[Tensor]:
        """Yield logits ``[P, P, C]`` float32 of each tile, at the pixel ``centres`` ``[P]`` of either axis.

        ``maps``: ``[m, h, w, D]`` by array.
        """
        device = self.bias.device
        between = [torch.from_numpy(_weights(g, centres)).to(device) for g in grids]
        offset = self.bias
        for mean, std, weight in zip(self.means, self.stds, self.weights, strict=True):
            offset = offset - (mean / std) @ weight
        gains = [weight / std[:, None] for weight, std in zip(self.weights, self.stds, strict=True)]
        for n in range(len(maps[0])):
            logits = offset.view(1, 1, -1)
            for values, gain, reach in zip(maps, gains, between, strict=True):
                tokens = torch.from_numpy(values[n].astype(np.float32)).to(device) @ gain
                rows = torch.tensordot(reach, tokens, 1)  # [P, w, C]
                logits = logits + torch.matmul(reach, rows)
            yield logits


class ProbeTask:
    """Labels of ``n`` tiles to learn from, ``m`` to be judged on: masks ``[H, H]`` uint8, ``ignore`` where none.

    ``train_masks``: looked at one by one and not kept. ``held_masks`` ``[m, H, H]``, m may be 0.
    """

    def __init__(
        self, train_masks: Iterable[NDArray[np.uint8]], held_masks: NDArray[np.uint8], classes: int, ignore: int,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.classes, self._ignore, self._device = classes, ignore, torch.device(device)
        self.tile_px = held_masks.shape[1]
        cells = cells_of(self.tile_px)
        self._cell_px = self.tile_px / cells
        step = math.gcd(_EACH, cells)  # every start has as many points
        self._centres = {start: (np.arange(start, cells, step) + 0.5) * self._cell_px for start in range(step)}
        #: The corner of the lattice moves from tile to tile, so that ``step ** 2`` tiles visit every cell.
        self._phases: list[tuple[int, int]] = []
        chosen = []
        for n, mask in enumerate(train_masks):
            y, x = n // step % step, n % step
            self._phases.append((y, x))
            chosen.append(_class_counts(mask, cells, classes)[y::step, x::step])
        counts = np.stack(chosen).reshape(-1, classes).astype(np.float32)
        self.counts = torch.from_numpy(counts / max(1.0, float(counts.sum()))).to(self._device)
        pace = max(1, self.tile_px // _JUDGED_PX)
        pixels = np.arange(pace // 2, self.tile_px, pace)
        self._pixel_centres = pixels + 0.5
        self.labels = torch.from_numpy(held_masks[:, pixels][:, :, pixels].astype(np.int64)).to(self._device)

    def points(self, maps: NDArray[np.floating], grid: Grid, first: int = 0) -> Tensor:
        """Return features ``[n * p, D]`` float32 at the points, of maps ``[n, h, w, D]`` of the training tiles.

        Where these are not all of them: of those from the number ``first`` on.
        """
        rows = {s: _weights(grid, c) for s, c in self._centres.items()}
        parts = []
        for values, (y, x) in zip(maps, self._phases[first : first + len(maps)], strict=True):
            height, width, channels = values.shape
            mixed = rows[y] @ values.astype(np.float32).reshape(height, width * channels)
            parts.append((rows[x] @ mixed.reshape(-1, width, channels)).reshape(-1, channels))
        return torch.from_numpy(np.concatenate(parts)).to(self._device)

    def fit(self, arrays: Sequence[Tensor]) -> LinearProbe:
        """Return the probe for ``arrays`` ``[n * p, D]`` each, concatenated."""
        means = [a.mean(0) for a in arrays]
        stds = [_spread(a.std(0, unbiased=False)) for a in arrays]
        x = torch.cat([(a - mean) / std for a, mean, std in zip(arrays, means, stds, strict=True)], 1)
        weight = torch.zeros(
            self.classes, x.shape[1], device=self._device, requires_grad=True
        )  # four times as fast as D, C
        bias = torch.zeros(self.classes, device=self._device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=_STEPS, max_eval=2 * _STEPS, tolerance_grad=0, tolerance_change=0,
            history_size=10, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = functional.linear(x, weight, bias).log_softmax(1)
            value = -(self.counts * logits).sum() + _L2 / 2 * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        found = torch.split(weight.detach().T, [a.shape[1] for a in arrays])
        return LinearProbe(means, stds, list(found), bias.detach())

    def confusions(self, probe: LinearProbe, maps: Sequence[NDArray[np.floating]], grids: Sequence[Grid]) -> Tensor:
        """Return ``[m, C, C]`` int64 (label, prediction) pixel counts of each held-out tile; ``maps``: ``[m, h, w, D]``
        by array.
        """
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        found = []
        for label, logits in zip(self.labels, probe.logits(maps, grids, self._pixel_centres), strict=True):
            found.append(
                multiclass_confusion_matrix(
                    logits.argmax(-1), label, num_classes=self.classes, ignore_index=self._ignore, validate_args=False
                )
            )
        return torch.stack(found).cpu().long()


def _class_counts(mask: NDArray[np.uint8], cells: int, classes: int) -> NDArray[np.int64]:
    """Return pixels of each class in each cell, ``[cells, cells, C]``."""
    pixels = mask.reshape(cells, len(mask) // cells, cells, len(mask) // cells)
    return np.stack([(pixels == c).sum((1, 3)) for c in range(classes)], -1)


def _weights(grid: Grid, centres: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return plain bilinear weights ``[centres, tokens]``: nothing is smoothed, tokens may be passed over."""
    return interpolation_weights(grid, centres, grid.stride_px)


def _spread(std: Tensor) -> Tensor:
    """Return ``std`` with a floor, so that a channel that hardly varies is not blown up."""
    return std.clamp_min(0.01 * float(std.square().mean().sqrt()) or 1.0)
