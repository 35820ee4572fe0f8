"""The losses, each a pure function of tensors. Everything is computed in float32.

A mean is a sum over what counts, divided by a denominator. Whoever computes a batch in parts, or on several processes,
counts the whole batch first and gives each part that denominator; then the parts' losses add up to the batch's.
Shape legend: B batch, C classes, H W pixels, D channels of a teacher layer, h w tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.sections import SupervisedConfig

__all__ = [
    "SupervisedLoss",
    "balanced_weights",
    "class_weights",
    "distillation",
    "pseudo_label_loss",
    "supervised_loss",
]

#: Theia (Shang et al. 2024, section 3.2): mostly cosine, a little smooth L1 for the scale.
_COSINE_SHARE = 0.9


class SupervisedLoss:
    """The loss on labelled crops that ``config`` names; pixels of ``ignore_index`` have neither loss nor gradient.

    - ``ce``: mean cross-entropy, with weights as torch's default reduction: ``sum(w CE) / sum(w)``.
    - ``ohem``: the same over the hard pixels: those whose label has a probability below ``ohem_threshold``, and at
      least the ``ohem_least`` share of the labelled pixels (Shrivastava et al. 2016).
    - ``dice``: ``1 - 2 sum(p y) / (sum(p) + sum(y))``, averaged over the classes that occur in the labels of the call
      (Milletari et al. 2016, the sums over all pixels of the call; p without a square).
    - ``ce+dice``: the sum of both.
    """

    def __init__(self, config: SupervisedConfig, weights_C: Tensor | None, ignore_index: int) -> None:
        self.config = config
        self.weights_C = None if weights_C is None else weights_C.float()
        self.ignore_index = ignore_index

    def count(self, label_BHW: Tensor) -> Tensor:
        """Return what the cross-entropy of these labels divides by, float32: labelled pixels, or their weights' sum."""
        if self.weights_C is None:
            return (label_BHW != self.ignore_index).sum().float()
        counts = torch.stack([(label_BHW == c).sum() for c in range(len(self.weights_C))])
        return (counts * self.weights_C.to(label_BHW.device)).sum()

    def __call__(
        self, logits_BCHW: Tensor, label_BHW: Tensor, denominator: Tensor | None = None, share: float = 1.0
    ) -> Tensor:
        """Return the loss; 0, with a gradient of 0, when nothing is labelled.

        ``denominator`` (default: ``count`` of these labels) divides the cross-entropy. OHEM and Dice know theirs only
        after the forward pass: they return their mean over this call times ``share``, the call's part of the batch.
        """
        logits = logits_BCHW.float()
        weights = None if self.weights_C is None else self.weights_C.to(logits.device)
        kind = self.config.loss
        if kind == "ohem":
            return self._ohem(logits, label_BHW, weights) * share
        if kind == "dice":
            return self._dice(logits, label_BHW, weights) * share
        total = F.cross_entropy(logits, label_BHW, weights, ignore_index=self.ignore_index, reduction="sum")
        entropy = total / _safe(self.count(label_BHW) if denominator is None else denominator)
        return entropy if kind == "ce" else entropy + self._dice(logits, label_BHW, weights) * share

    def _ohem(self, logits_BCHW: Tensor, label_BHW: Tensor, weights_C: Tensor | None) -> Tensor:
        entropy = F.cross_entropy(logits_BCHW, label_BHW, ignore_index=self.ignore_index, reduction="none").flatten()
        label = label_BHW.flatten()
        labeled = label != self.ignore_index
        hardness = entropy.detach().masked_fill(~labeled, -1.0)  # below any cross-entropy
        least = (labeled.sum() * self.config.ohem_least).ceil().long().clamp(min=1)
        bound = hardness.sort(descending=True).values[least - 1]
        # probability < threshold, said in cross-entropies
        hard = labeled & ((hardness > -math.log(self.config.ohem_threshold)) | (hardness >= bound))
        weight = hard.float() if weights_C is None else hard * weights_C[label.masked_fill(~labeled, 0)]
        return (entropy * weight).sum() / _safe(weight.sum())

    def _dice(self, logits_BCHW: Tensor, label_BHW: Tensor, weights_C: Tensor | None) -> Tensor:
        labeled = (label_BHW != self.ignore_index).unsqueeze(1)
        classes = logits_BCHW.shape[1]
        truth_BCHW = (
            label_BHW.unsqueeze(1) == torch.arange(classes, device=label_BHW.device).view(1, -1, 1, 1)
        ).float()
        found_BCHW = logits_BCHW.softmax(1) * labeled
        common, size = ((t.sum((0, 2, 3))) for t in (found_BCHW * truth_BCHW, truth_BCHW))
        dice = 2 * common / _safe(found_BCHW.sum((0, 2, 3)) + size)
        weight = (size > 0).float() if weights_C is None else (size > 0) * weights_C
        return ((1 - dice) * weight).sum() / _safe(weight.sum())


def supervised_loss(logits_BCHW: Tensor, label_BHW: Tensor, ignore_index: int) -> Tensor:
    """Return the mean cross-entropy over pixels that are not ``ignore_index``; 0 when there are none."""
    return SupervisedLoss(SupervisedConfig(), None, ignore_index)(logits_BCHW, label_BHW)


def balanced_weights(counts_C: Tensor) -> Tensor:
    """Return ``[C]`` float32: the inverse square root of each class's share of the labelled pixels.

    Scaled to a mean of 1 over the classes that occur; a class without a pixel has the weight 1.
    """
    counts = counts_C.double()
    present = counts > 0
    weights = torch.where(present, counts.clamp(min=1).rsqrt(), 0.0)
    mean = weights.sum() / present.sum().clamp(min=1)
    return torch.where(present, weights / _safe(mean), 1.0).float()


def class_weights(config: SupervisedConfig, counts_C: Tensor) -> Tensor | None:
    """Return the weights ``[C]`` float32 that ``config.class_weights`` asks for, or None for ``none``.

    ``counts_C``: labelled pixels per class (``label_counts.count_labels``). Raises ``UsageError`` for a list of another
    length, a weight below 0, or no weight above 0.
    """
    if config.class_weights == "none":
        return None
    if config.class_weights == "balanced":
        return balanced_weights(counts_C)
    weights = config.class_weights
    if len(weights) != len(counts_C):
        raise UsageError(
            f"supervised.class_weights: {len(weights)} numbers, and the dataset has {len(counts_C)} classes; "
            "give one for each, in the order of dataset.yaml"
        )
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise UsageError(
            f"supervised.class_weights {list(weights)}: give numbers of 0 or more, at least one of them above 0"
        )
    return torch.tensor(weights, dtype=torch.float32)


def pseudo_label_loss(
    logits_BCHW: Tensor,
    pseudo_BHW: Tensor,
    confidence_BHW: Tensor,
    valid_BHW: Tensor,
    threshold: float,
    denominator: Tensor | None = None,
) -> Tensor:
    """Return FixMatch's ``sum(CE * [confidence >= threshold and valid]) / n_valid`` (0 when nothing is valid).

    ``denominator``: n_valid of the whole batch, where this is a part of it; default: of this call.
    """
    entropy = F.cross_entropy(logits_BCHW.float(), pseudo_BHW, reduction="none")
    counts = (confidence_BHW >= threshold) & valid_BHW
    return (entropy * counts).sum() / _safe(valid_BHW.sum() if denominator is None else denominator)


def distillation(
    translated_BDhw: Tensor,
    target_BhwD: Tensor,
    weight_Bhw: Tensor,
    kind: str = "cosine_smooth_l1",
    denominator: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss over the tokens that count, and their mean cosine (detached, for the log).

    ``translated`` is on the target's grid (``alignment.resample``). ``mse``: mean squared error
    over channels (RS-MTDF). ``cosine_smooth_l1``: ``0.9 (1 - cosine) + 0.1 smooth_l1`` (Theia). Tokens of weight 0
    (padding, edges of CutMix) have neither loss nor gradient. ``denominator``: sum of the weights of the whole batch,
    where this is a part of it (both results of the parts then add up); default: of this call.
    """
    mine = translated_BDhw.float().permute(0, 2, 3, 1)
    if mine.shape != target_BhwD.shape:
        raise ValueError(f"student features {list(mine.shape)} and target {list(target_BhwD.shape)}: not one grid")
    # a token that does not count may hold anything, even NaN from a hole; 0 * NaN would poison the gradient
    target = torch.where((weight_Bhw > 0).unsqueeze(-1), target_BhwD.float(), 0.0)
    cosine = F.cosine_similarity(mine, target, dim=-1)
    if kind == "mse":
        loss = (mine - target).square().mean(dim=-1)
    elif kind == "cosine_smooth_l1":
        smooth = F.smooth_l1_loss(mine, target, reduction="none").mean(dim=-1)
        loss = _COSINE_SHARE * (1 - cosine) + (1 - _COSINE_SHARE) * smooth
    else:
        raise ValueError(f"unknown distillation loss {kind!r}")
    count = (weight_Bhw.sum() if denominator is None else denominator).clamp(min=1e-6)
    return (loss * weight_Bhw).sum() / count, (cosine.detach() * weight_Bhw).sum() / count


def _safe(denominator: Tensor) -> Tensor:
    """Return ``denominator`` with 1 in place of 0: a mean over nothing is then 0, and its gradient too."""
    return torch.where(denominator > 0, denominator, torch.ones_like(denominator))
