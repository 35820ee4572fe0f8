"""A light feature pyramid decoder for any encoder (after Lin et al. 2017, with one head at the finest level)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from rsmtdf_train.students.base import Decoder, MapSpec

__all__ = ["FpnDecoder"]


class FpnDecoder(Decoder):
    """Lateral 1x1 convolutions, top-down sums, one 3x3 block at the finest level, bilinear to the input size.

    Maps of one stride (a ViT) are spread over a pyramid of factors 4, 2, 1, 1/2 first. Group norm, so that the decoder
    does not depend on what else is in the batch.
    """

    def __init__(self, maps: Sequence[MapSpec], classes: int, channels: int = 64) -> None:
        super().__init__()
        strides = {m.stride_px for m in maps}
        one_stride = len(strides) == 1 and len(maps) > 1
        # shallow to deep: 2 ** (n - 2 - i); four maps get 4, 2, 1, 1/2
        self.factors = [2.0 ** (len(maps) - 2 - i) if one_stride else 1.0 for i in range(len(maps))]
        self.laterals = nn.ModuleList(nn.Conv2d(m.channels, channels, 1) for m in maps)
        self.smooth = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(_groups(channels), channels),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, maps_BDhw: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits ``[B, C, H, W]`` of ``size``."""
        merged: Tensor | None = None
        for lateral, factor, single in reversed(list(zip(self.laterals, self.factors, maps_BDhw, strict=True))):
            level = lateral(single)
            if factor != 1:
                level = F.interpolate(level, scale_factor=factor, mode="bilinear", align_corners=False)
            if merged is not None:
                level = level + F.interpolate(merged, size=level.shape[-2:], mode="bilinear", align_corners=False)
            merged = level
        logits: Tensor = self.head(self.smooth(merged))
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)
