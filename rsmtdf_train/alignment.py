"""Student maps, read at the centres of a teacher's tokens.

A map is a set of samples at ``offset + i * stride`` pixels. Student and teacher differ in both: TF-style padding moves
token centres by up to half a stride one way, symmetric padding by as much the other way. Resizing as if all tokens
were centred in their cells would ask the student for features of a place it is not looking at.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rsmtdf_cache.resampling import Grid, interpolation_weights

__all__ = ["Grid", "resample", "resample_matrix"]


def resample_matrix(source: Grid, target: Grid) -> Tensor:
    """Return ``[target.tokens, source.tokens]`` float32; see ``resampling.interpolation_weights``."""
    return torch.from_numpy(interpolation_weights(source, target.centres(), target.stride_px))


@lru_cache(maxsize=256)
def _matrix(source: Grid, target: Grid, device: torch.device) -> Tensor:
    return resample_matrix(source, target).to(device)


def resample(map_BDhw: Tensor, source: Grid, target: Grid) -> Tensor:
    """Return ``[B, D, target.tokens, target.tokens]``: a square map read at the centres of ``target``."""
    if source == target:
        return map_BDhw
    matrix = _matrix(source, target, map_BDhw.device).to(map_BDhw.dtype)
    return torch.matmul(matrix, torch.matmul(map_BDhw, matrix.T))
