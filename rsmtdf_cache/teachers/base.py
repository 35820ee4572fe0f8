"""The contract of a teacher: uint8 RGB in, dense float features out. One file of this folder = one family.

Shape legend: B batch, S view side in pixels, h w token grid, D channels of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.positions import PositionRule
from rsmtdf_cache.specs import LayerSpec, TeacherSpec

__all__ = ["Teacher", "TeacherRequest"]


@dataclass(frozen=True)
class TeacherRequest:
    """Which teacher a user asked for.

    ``weights``: None = the family's published weights (hub or installed package); a path = a safetensors file, or a
    torch file read with ``weights_only=True``; ``"none"`` = seeded random weights (``seed``), for tests and controls.
    ``layers``: None = the teacher's default layers. ``positions``: how a trained position embedding is resampled
    (``positions.py``), None = the teacher's own rule.
    """

    name: str
    weights: str | Path | None = None
    seed: int = 0
    layers: tuple[str, ...] | None = None
    positions: PositionRule | None = None


class Teacher(ABC):
    """A frozen network in eval mode. Not a child of any student; nothing trains it."""

    spec: TeacherSpec
    device: torch.device

    @property
    @abstractmethod
    def default_layers(self) -> tuple[str, ...]:
        """Names of the layers that are stored when none are asked for."""

    @property
    @abstractmethod
    def layer_names(self) -> tuple[str, ...]:
        """Names of every layer that can be asked for."""

    @abstractmethod
    def layer_specs(self, layers: Sequence[str], size_px: int) -> list[LayerSpec]:
        """Return channels, stride and offset (view pixels) of ``layers`` for views of ``size_px``.

        Raises ``UsageError`` for an unknown layer (with "did you mean") or a side the patch does not divide.
        """

    @abstractmethod
    def grid(self, layer: str, size_px: int) -> tuple[int, int]:
        """Return the token grid ``(h, w)`` of ``layer`` for a square view of ``size_px``."""

    @abstractmethod
    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        """Return ``{layer: [B, h, w, D] float32}`` on ``self.device``.

        ``tiles_BHW3``: uint8 RGB, oriented already, at tile resolution; this method resizes to ``size_px`` by the
        rule of ``spec.pixel``, normalises and runs the network under ``torch.inference_mode``; ``precision`` other
        than float32 is autocast. Raises ``TypeError`` for another dtype or shape (a caller's bug).
        """

    def encode_images(
        self, images_B3HW: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        """Return what ``encode`` returns, for images that are not stored bytes, such as a student's augmented crops.

        ``images_B3HW``: floating point RGB in 0..1, square. Resized by the rule of ``spec.pixel`` and kept in 0..1, not
        rounded to 8 bits. As of ``encode``, what comes back are inference tensors. Raises ``TypeError`` for another
        dtype or shape (a caller's bug), ``UsageError`` of a teacher that sees stored bytes only.
        """
        raise UsageError(
            f"teacher {self.spec.name} sees stored tiles only: it has no encode_images, which online targets need; "
            "use cached targets, or another teacher"
        )
