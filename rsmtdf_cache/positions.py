"""How a trained position embedding is resampled for a view of another token grid: two rules by name.

``antialiased``: bicubic with antialiasing, timm's rule. ``released``: that of DINOv2's first release, which RS-MTDF's
code keeps: bicubic, not antialiased, scaled by ``(n + 0.1) / trained`` on each side. Resampling from 37 x 37 to 16 x 16
tokens, the two change features by up to about 1. A grid as large as the trained one takes the embedding as it is.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmtdf_cache.errors import UsageError

__all__ = ["PositionRule", "resample_positions", "use_positions"]

PositionRule = Literal["antialiased", "released"]

#: What the release adds to the number of tokens, so that rounding never loses one. It shifts the samples too.
_OFFSET = 0.1


def resample_positions(
    positions_TD: Tensor, trained: tuple[int, int], grid: tuple[int, int], rule: PositionRule
) -> Tensor:
    """Return ``[prefix + h * w, D]`` for ``grid = (h, w)`` from ``[prefix + H * W, D]`` for ``trained = (H, W)``.

    The first ``prefix`` rows, of tokens without a place, stay as they are. Computed in float32 and returned in the
    given dtype; gradients flow.
    """
    if grid == trained:
        return positions_TD
    prefix = len(positions_TD) - trained[0] * trained[1]
    map_1DHW = positions_TD[prefix:].reshape(1, *trained, -1).permute(0, 3, 1, 2).float()
    if rule == "released":
        # The factors themselves are the rule: a size, or factors computed again from it, put the samples elsewhere.
        factors = tuple((n + _OFFSET) / m for n, m in zip(grid, trained, strict=True))
        map_1Dhw = F.interpolate(map_1DHW, scale_factor=factors, mode="bicubic", antialias=False)
    else:
        map_1Dhw = F.interpolate(map_1DHW, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions_TD[:prefix], map_1Dhw[0].flatten(1).T.to(positions_TD.dtype)])


def use_positions(network: nn.Module, rule: PositionRule, asked: str) -> None:
    """Make a timm network resample its position embedding by ``rule``; ``antialiased`` is what timm does anyway.

    ``asked`` says in the message who asked. Raises ``UsageError`` when the network has no embedding that timm resamples
    the plain way: convolutions, relative or rotary positions, one fixed size.
    """
    if rule == "antialiased":
        return
    from timm.models.vision_transformer import VisionTransformer

    plain = getattr(type(network), "_pos_embed", None) is VisionTransformer._pos_embed
    if not (plain and getattr(network, "dynamic_img_size", False) and getattr(network, "pos_embed", None) is not None):
        raise UsageError(
            f"{asked}: positions=released needs a plain vision transformer with a trained position embedding for its "
            f"token grid, {type(network).__name__} has none; leave positions out"
        )
    # Bound to this network alone; copies of the network bind their own, and state dicts do not see it.
    network._pos_embed = MethodType(_released_pos_embed, network)  # type: ignore[assignment]


def _released_pos_embed(self: Any, x: Tensor) -> Tensor:
    """Do what timm's ``VisionTransformer._pos_embed`` does with ``[B, h, w, D]``, but for the rule of resampling."""
    grid: tuple[int, int] = (int(x.shape[1]), int(x.shape[2]))
    trained: tuple[int, int] = tuple(self.patch_embed.grid_size)
    positions = resample_positions(self.pos_embed[0], trained, grid, "released")
    tokens = x.flatten(1, 2)
    prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
    if self.no_embed_class:
        tokens = torch.cat([*prefix, tokens + positions], dim=1)
    else:
        tokens = torch.cat([*prefix, tokens], dim=1) + positions
    out: Tensor = self.pos_drop(tokens)
    return out
