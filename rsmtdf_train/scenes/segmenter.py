"""What makes probabilities of windows: a loaded student here, an exported file in ``rsmtdf_train/export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.rasters.scaling import PixelRule
from rsmtdf_cache.sources.base import ClassInfo

if TYPE_CHECKING:  # a map by an exported file needs no torch
    import torch

    from rsmtdf_train.checkpoint import RunIdentity
    from rsmtdf_train.fused_student import FusedStudent

__all__ = ["Segmenter", "WindowSegmenter"]


class WindowSegmenter(Protocol):
    """All that a map needs to know of a student. ``digest``: sha256 of its file; ``name``: its run.

    ``crop_px``: side of the training crops. ``multiple_px``: its stride. ``fixed_px``: the only side it reads, None for
    any. ``square``: windows have to be squares. ``pixels``: how values became what it learned from, None for 8 bits.
    """

    @property
    def digest(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[ClassInfo, ...]: ...
    @property
    def crop_px(self) -> int: ...
    @property
    def multiple_px(self) -> int: ...
    @property
    def fixed_px(self) -> int | None: ...
    @property
    def square(self) -> bool: ...
    @property
    def pixels(self) -> PixelRule | None: ...

    def window_probabilities(
        self, windows: Sequence[NDArray[np.uint8]], device: torch.device | None, *, count: int, tta: bool
    ) -> NDArray[np.float32]:
        """Return ``[windows, C, H, W]`` of uint8 RGB windows ``[3, H, W]``; see ``blend.window_probabilities``."""


@dataclass(frozen=True)
class Segmenter:
    """A loaded student: what it is, and the sha256 of the file it came from."""

    model: FusedStudent
    identity: RunIdentity
    digest: str

    @property
    def name(self) -> str:
        return self.identity.recipe.name

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return self.identity.classes

    @property
    def crop_px(self) -> int:
        return self.identity.recipe.crop_px

    @property
    def multiple_px(self) -> int:
        return self.model.student.multiple_px

    @property
    def fixed_px(self) -> int | None:
        return None

    @property
    def square(self) -> bool:
        return self.model.sees_squares

    @property
    def pixels(self) -> PixelRule | None:
        return self.identity.pixels

    def window_probabilities(
        self, windows: Sequence[NDArray[np.uint8]], device: torch.device | None, *, count: int, tta: bool
    ) -> NDArray[np.float32]:
        """Return ``[windows, C, H, W]`` of uint8 RGB windows ``[3, H, W]``; see ``blend.window_probabilities``."""
        from rsmtdf_train.scenes.blend import window_probabilities

        assert device is not None
        return window_probabilities(self.model, windows, device, count=count, tta=tta)
