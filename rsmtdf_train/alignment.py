"""Student maps, read at the centres of a teacher's tokens.

A map is a set of samples at ``offset + i * stride`` pixels. Student and teacher differ in both: TF-style padding moves
token centres by up to half a stride one way, symmetric padding by as much the other way. Resizing as if all tokens
were centred in their cells would ask the student for features of a place it is not looking at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Grid", "resample", "resample_matrix"]


@dataclass(frozen=True)
class Grid:
    """Token centres along one axis: ``offset_px + i * stride_px``, ``i < tokens``."""

    tokens: int
    stride_px: float
    offset_px: float


def resample_matrix(source: Grid, target: Grid) -> Tensor:
    """Return ``[target.tokens, source.tokens]`` float32 whose rows sum to 1: linear interpolation between centres.

    Where the target is coarser, the triangle is as wide as the target's stride, so that no source token is skipped.
    Beyond the outermost source centre the nearest tokens count.
    """
    width = max(source.stride_px, target.stride_px)
    centres = source.offset_px + source.stride_px * torch.arange(source.tokens, dtype=torch.float64)
    wanted = target.offset_px + target.stride_px * torch.arange(target.tokens, dtype=torch.float64)
    wanted = wanted.clamp(centres[0], centres[-1])
    weights = (1 - (wanted[:, None] - centres[None]).abs() / width).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


@lru_cache(maxsize=256)
def _matrix(source: Grid, target: Grid, device: torch.device) -> Tensor:
    return resample_matrix(source, target).to(device)


def resample(map_BDhw: Tensor, source: Grid, target: Grid) -> Tensor:
    """Return ``[B, D, target.tokens, target.tokens]``: a square map read at the centres of ``target``."""
    if source == target:
        return map_BDhw
    matrix = _matrix(source, target, map_BDhw.device).to(map_BDhw.dtype)
    return torch.matmul(matrix, torch.matmul(map_BDhw, matrix.T))
