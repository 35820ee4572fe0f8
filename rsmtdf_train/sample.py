"""Names, shapes and dtypes of what the trainer moves around: the contract between data and model.

Shape legend: B batch, H W crop in pixels, h w tokens of a crop, D channels of a teacher layer, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_train.photometry import Photometry

__all__ = ["Batch", "Coded", "LabeledBatch", "Sample", "StrongView", "Targets", "UnlabeledBatch"]


@dataclass(frozen=True)
class Sample:
    """One crop of one tile in one oriented frame: geometry is applied, photometry is not.

    ``features`` are codes as the store has them, keyed by ``"teacher/scale/layer"`` (the key of a target: a feature
    key without its orientation, see ``targets/base.py``). ``image`` and ``label`` can be turned views of the tile, with
    negative strides and read-only: copy what is to be changed or becomes a tensor.
    """

    tile_id: str
    row: int
    orientation: int
    image: NDArray[np.uint8]  # [H, W, 3] RGB
    label: NDArray[np.uint8]  # [H, W] class or ignore index; all ignore for an unlabelled tile
    valid: NDArray[np.bool_]  # [H, W] False on padding and no-data
    features: dict[str, Codes] = field(default_factory=dict)  # key -> values [h, w, C], scale [h, w] or None


@dataclass(frozen=True)
class Coded:
    """Targets of one key as stored: values ``[B, h, w, C]``, scale ``[B, h, w]`` or None; and how to decode them."""

    values: Tensor
    scale: Tensor | None
    decoder: DeviceDecoder


@dataclass(frozen=True)
class Targets:
    """Distillation targets of a batch: standardised features and the weight of each token.

    The loader fills in ``codes``, which are small and travel to the device; there ``decoded`` makes ``features``.
    """

    features: dict[str, Tensor]  # key -> [B, h, w, D] float32, zero mean and unit variance per channel of the store
    weights: dict[str, Tensor]  # key -> [B, h, w] float32 in 0..1; 0 = token does not count
    codes: dict[str, Coded] = field(default_factory=dict)

    def decoded(self, device: torch.device) -> Targets:
        """Return the targets on ``device`` with features for codes; a token without any gets value and weight 0."""
        features = {key: _moved(value, device) for key, value in self.features.items()}
        weights = {key: _moved(value, device) for key, value in self.weights.items()}
        for key, coded in self.codes.items():
            scale = None if coded.scale is None else _moved(coded.scale, device)
            values = coded.decoder(_moved(coded.values, device), scale)
            # The sum of a token is finite only if all its channels are: one pass instead of a mask of all values.
            finite = values.sum(-1).isfinite() if scale is None else scale.isfinite()
            weights[key] = weights[key] * finite
            features[key] = values.masked_fill_(~finite.unsqueeze(-1), 0)
        return Targets(features, weights)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, non_blocking=True)


@dataclass(frozen=True)
class LabeledBatch:
    """Weakly augmented labelled crops. ``image`` is RGB as decoded: the step makes it float 0..1 on the device."""

    image: Tensor  # [B, 3, H, W] uint8
    label: Tensor  # [B, H, W] uint8, ignore index where not labelled; the step makes it int64 on the device
    valid: Tensor  # [B, H, W] bool, False on padding and no-data
    targets: Targets


@dataclass(frozen=True)
class StrongView:
    """What makes a strong view of unlabelled crops; applied by the step, on the device.

    ``cutmix_boxes[i] = (y0, x0, y1, x1)`` in pixels, all zero for none; the partner of crop ``i`` is crop ``B-1-i``.
    """

    photometry: Photometry
    cutmix_boxes: Tensor  # [B, 4] int64


@dataclass(frozen=True)
class UnlabeledBatch:
    """Unlabelled crops: ``image`` is the weak view, for the labeller; each of ``views`` a strong one of the same crops.

    One view, or two for the methods called unimatch. Nothing is recoloured or mixed yet: the step mixes image,
    pseudo-label, confidence, ``valid`` and targets by the boxes of a view.
    """

    image: Tensor  # [B, 3, H, W] uint8
    views: tuple[StrongView, ...]
    valid: Tensor  # [B, H, W] bool
    label: Tensor  # [B, H, W] uint8: true labels where the dataset has them, for monitoring only, never in a loss
    targets: Targets


@dataclass(frozen=True)
class Batch:
    """All that one step, or one part of it, consumes. ``unlabeled`` is None for supervised training."""

    step: int
    labeled: LabeledBatch
    unlabeled: UnlabeledBatch | None
