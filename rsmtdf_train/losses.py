"""The losses, each a pure function of tensors. Everything is computed in float32.

Shape legend: B batch, C classes, H W pixels, D channels of a teacher layer, h w tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation", "pseudo_label_loss", "supervised_loss"]

#: Theia (Shang et al. 2024, section 3.2): mostly cosine, a little smooth L1 for the scale.
_COSINE_SHARE = 0.9


def supervised_loss(logits_BCHW: Tensor, label_BHW: Tensor, ignore_index: int) -> Tensor:
    """Return the mean cross-entropy over pixels that are not ``ignore_index``; 0 when there are none."""
    total = F.cross_entropy(logits_BCHW.float(), label_BHW, ignore_index=ignore_index, reduction="sum")
    return total / (label_BHW != ignore_index).sum().clamp(min=1)


def pseudo_label_loss(
    logits_BCHW: Tensor, pseudo_BHW: Tensor, confidence_BHW: Tensor, valid_BHW: Tensor, threshold: float
) -> Tensor:
    """Return FixMatch's ``sum(CE * [confidence >= threshold and valid]) / n_valid`` (0 when nothing is valid)."""
    entropy = F.cross_entropy(logits_BCHW.float(), pseudo_BHW, reduction="none")
    counts = (confidence_BHW >= threshold) & valid_BHW
    return (entropy * counts).sum() / valid_BHW.sum().clamp(min=1)


def distillation(
    translated_BDhw: Tensor, target_BhwD: Tensor, weight_Bhw: Tensor, kind: str = "cosine_smooth_l1"
) -> tuple[Tensor, Tensor]:
    """Return the loss over the tokens that count, and their mean cosine (detached, for the log).

    ``translated`` is on the target's grid (``alignment.resample``). ``mse``: mean squared error
    over channels (RS-MTDF). ``cosine_smooth_l1``: ``0.9 (1 - cosine) + 0.1 smooth_l1`` (Theia). Tokens of weight 0
    (padding, edges of CutMix) have neither loss nor gradient.
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
    return _mean_over_tokens(loss, weight_Bhw), _mean_over_tokens(cosine.detach(), weight_Bhw)


def _mean_over_tokens(value_Bhw: Tensor, weight_Bhw: Tensor) -> Tensor:
    return (value_Bhw * weight_Bhw).sum() / weight_Bhw.sum().clamp(min=1e-6)
