"""CutMix of pixels and of features, and which tokens of a crop count. Colours are changed in ``photometry.py``.

Boxes are drawn apart from being applied, so that they are values: a function of seed and position (``sampler.py``),
the same in every arm of an experiment.

Shape legend: B batch, H W crop in pixels, h w tokens of a crop, D channels of a teacher layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_train.sample import Targets

__all__ = [
    "CutMixBox",
    "NO_CUTMIX",
    "batch_token_weights",
    "cutmix",
    "cutmix_targets",
    "draw_cutmix_box",
    "token_cells",
    "token_weights",
]

#: ``(y0, x0, y1, x1)`` in pixels of the crop, half open; all zero for no mixing.
CutMixBox = tuple[int, int, int, int]

NO_CUTMIX: CutMixBox = (0, 0, 0, 0)

_AREA = (0.02, 0.4)
_ASPECT = (0.3, 1 / 0.3)


def draw_cutmix_box(rng: np.random.Generator, p: float, crop_px: int) -> CutMixBox:
    """Return a box inside a crop of ``crop_px`` with probability ``p``, else ``NO_CUTMIX``.

    Area 2 to 40 % of the crop, aspect 0.3 to 1/0.3; a draw that leaves the crop is drawn again (RS-MTDF, augmentation).
    """
    if rng.random() >= p:
        return NO_CUTMIX
    while True:
        area = rng.uniform(*_AREA) * crop_px * crop_px
        aspect = rng.uniform(*_ASPECT)
        height, width = max(1, int(math.sqrt(area * aspect))), max(1, int(math.sqrt(area / aspect)))
        y, x = int(rng.integers(crop_px)), int(rng.integers(crop_px))
        if y + height <= crop_px and x + width <= crop_px:
            return (y, x, y + height, x + width)


def cutmix(x: Tensor, boxes: Tensor) -> Tensor:
    """Return ``x`` with each box filled from the partner: same shape and dtype.

    ``x``: ``[B, ..., H, W]``, pixels of any kind. ``boxes``: ``[B, 4]`` as ``(y0, x0, y1, x1)``. The partner of
    element ``i`` is ``B - 1 - i``.
    """
    height, width = x.shape[-2:]
    y0, x0, y1, x1 = (edge[:, None] for edge in boxes.to(x.device).unbind(1))
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside = ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None, :]
    return torch.where(inside.reshape(len(x), *[1] * (x.ndim - 3), height, width), x.flip(0), x)


def token_cells(
    tokens: int, crop_px: int, offset_px: float | None = None, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return the first and the end pixel coordinate of each token's cell along one side: two ``[tokens]`` float32.

    A cell is one stride wide around the token's centre (``offset_px + i * stride``; default: the middle of the i-th
    stride), cut to the crop.
    """
    stride = crop_px / tokens
    offset = stride / 2 if offset_px is None else offset_px
    start = torch.arange(tokens, dtype=torch.float32, device=device) * stride + (offset - stride / 2)
    return start.clamp(0, crop_px), (start + stride).clamp(0, crop_px)


def cutmix_targets(
    targets: Targets, boxes: Tensor, crop_px: int, offsets_px: Mapping[str, float] | None = None
) -> Targets:
    """Return ``targets`` mixed by the pixel ``boxes`` of ``cutmix`` (decision 11).

    A token whose cell lies fully inside the box takes features and weight of the partner, one fully outside keeps its
    own, one that the box's edge crosses gets weight 0. ``offsets_px``: centre of token 0 by key (``TargetSpec``); it
    matters for networks whose padding shifts the centres.
    """
    features: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for key, own in targets.features.items():
        edges = [edge[:, None] for edge in boxes.to(own.device).unbind(1)]
        offset = None if offsets_px is None else offsets_px.get(key)
        sides = []
        for low, high, tokens in ((edges[0], edges[2], own.shape[1]), (edges[1], edges[3], own.shape[2])):
            start, end = token_cells(tokens, crop_px, offset, own.device)
            sides.append(((start >= low) & (end <= high), (end <= low) | (start >= high)))
        (inside_y, outside_y), (inside_x, outside_x) = sides
        inside = inside_y[:, :, None] & inside_x[:, None, :]
        outside = outside_y[:, :, None] | outside_x[:, None, :]
        weight = targets.weights[key]
        features[key] = torch.where(inside[..., None], own.flip(0), own)
        weights[key] = torch.where(inside, weight.flip(0), torch.where(outside, weight, 0.0))
    return Targets(features, weights)


def token_weights(
    valid_HW: NDArray[np.bool_], grid: tuple[int, int], offset_px: float | None = None
) -> NDArray[np.float32]:
    """Return ``[h, w]`` float32: 1 where every pixel of the token's cell is valid, else 0."""
    if valid_HW.all():
        return np.ones(grid, np.float32)
    weights: NDArray[np.float32] = batch_token_weights(torch.from_numpy(valid_HW)[None], grid, offset_px)[0].numpy()
    return weights


def batch_token_weights(valid_BHW: Tensor, grid: tuple[int, int], offset_px: float | None = None) -> Tensor:
    """Return ``[B, h, w]`` float32: ``token_weights`` of every crop of a batch, on its device."""
    batch, *sides = valid_BHW.shape
    counts = torch.zeros((batch, sides[0] + 1, sides[1] + 1), dtype=torch.int32, device=valid_BHW.device)
    counts[:, 1:, 1:] = (~valid_BHW).to(torch.int32).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    cells = [token_cells(n, side, offset_px, valid_BHW.device) for n, side in zip(grid, sides, strict=True)]
    (y0, y1), (x0, x1) = ((start.floor().long(), end.ceil().long()) for start, end in cells)
    below, above = counts[:, y1], counts[:, y0]
    invalid = below[:, :, x1] - above[:, :, x1] - below[:, :, x0] + above[:, :, x0]
    return (invalid == 0).float()
