"""A tiny teacher for geometry: its features are mean pixel values of each token's cell, so they tell positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.specs import LayerSpec, PixelSpec, TeacherSpec
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest

__all__ = ["MeanTeacher", "load_mean_teacher"]


class MeanTeacher(Teacher):
    """Layers ``mean8`` and ``mean16``: mean RGB (0..255) of cells of 8 and 16 view pixels."""

    def __init__(self, name: str = "mean", weights: str = "0" * 64) -> None:
        self.device = torch.device("cpu")
        self.calls = 0
        self.spec = TeacherSpec(
            name=name, family="timm", architecture="mean", weights=weights, weights_origin="no weights", patch_px=16,
            native_px=4096, prefix_tokens=0, norm=False,
            pixel=PixelSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize="bilinear", antialias=True),
        )  # fmt: skip

    @property
    def default_layers(self) -> tuple[str, ...]:
        return ("mean8", "mean16")

    @property
    def layer_names(self) -> tuple[str, ...]:
        return ("mean8", "mean16")

    def layer_specs(self, layers: Sequence[str], size_px: int) -> list[LayerSpec]:
        unknown = set(layers) - set(self.layer_names)
        if unknown or size_px % 16:
            raise UsageError(f"mean teacher: {unknown or size_px}")
        return [LayerSpec(name=n, channels=3, stride_px=int(n[4:]), offset_px=int(n[4:]) / 2) for n in layers]

    def grid(self, layer: str, size_px: int) -> tuple[int, int]:
        return (size_px // int(layer[4:]),) * 2

    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        self.calls += 1
        pixels = tiles_BHW3.permute(0, 3, 1, 2).float()
        view = functional.interpolate(pixels, size=(size_px, size_px), mode="bilinear", antialias=True)
        return {n: functional.avg_pool2d(view, int(n[4:])).permute(0, 2, 3, 1).contiguous() for n in layers}


def load_mean_teacher(request: TeacherRequest, device: str = "cpu") -> Teacher:
    """Load by name like ``rsmtdf_cache.teachers.load``; the seed stands for other weights."""
    return MeanTeacher(request.name, f"{request.seed:064d}")
