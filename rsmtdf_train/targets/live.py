"""Teachers that run in the step: what they say of the student's own crops. No child of a student, in no checkpoint.

A crop is shown at the side it has in the stored view of its whole tile, so that cached and online targets differ in
nothing but where they come from; or, in native geometry (RS-MTDF), as if it were a tile of its own.

Shape legend: B batch, H W crop in pixels, h w tokens of a crop, D channels of a teacher layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.request import TeacherAsked
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, ViewSpec
from rsmtdf_cache.views import base_size_px, view_specs
from rsmtdf_cache.windows import with_windows
from rsmtdf_train.augment import batch_token_weights
from rsmtdf_train.sample import Targets

if TYPE_CHECKING:
    from rsmtdf_cache.teachers.base import Teacher
    from rsmtdf_train.targets.base import TargetSpec

__all__ = ["LiveTarget", "LiveTeachers", "crop_maps", "live_target", "live_targets"]


@dataclass(frozen=True)
class LiveTarget:
    """One target of a live teacher. ``spec`` takes the crop for a tile: stride and offset are in crop pixels."""

    key: str
    teacher: Teacher
    spec: FeatureSpec


def live_target(teacher: Teacher, key: str, layer: str, size_px: int, shown_px: int, crop_px: int) -> LiveTarget:
    """Return the target ``key``: ``layer`` of crops of ``crop_px``, at the scale of ``shown_px`` seen at ``size_px``.

    Raises ``UsageError`` for a crop whose view the patch does not divide, with sides that it does.
    """
    patch = teacher.spec.patch_px
    unit = patch * shown_px // math.gcd(size_px, patch * shown_px)
    if crop_px % unit:
        below = crop_px // unit * unit
        near = [px for px in (below, below + unit) if 0 < px <= shown_px]
        raise UsageError(
            f"crop_px {crop_px}: {key} shows {shown_px} px as {size_px}, so the teacher would see the crop at "
            f"{crop_px * size_px / shown_px:g} px, no multiple of its {patch}-px patch; choose crop_px "
            f"{' or '.join(map(str, near)) or shown_px}"
        )
    side = crop_px * size_px // shown_px
    (found,) = teacher.layer_specs([layer], side)
    spec = FeatureSpec(
        teacher=teacher.spec,
        layer=found,
        view=ViewSpec(size_px=side, orientation=0),
        encoding=EncodingSpec(),
        tile_px=crop_px,
        grid=teacher.grid(layer, side),
    )
    return LiveTarget(key, teacher, spec)


def live_targets(teacher: Teacher, asked: TeacherAsked, tile_px: int, crop_px: int, native: bool) -> list[LiveTarget]:
    """Return the targets of a teacher that no store speaks for: its layers, at the scales asked for (default: 1).

    The keys are those that a store of tiles of ``tile_px`` would have; in ``native`` geometry the crop stands for the
    tile. Raises ``UsageError`` for sides, scales and layers that cannot be.
    """
    shown = crop_px if native else tile_px
    layers = asked.layers or teacher.default_layers
    try:
        base_size_px(teacher.spec, shown)
    except UsageError:
        raise UsageError(
            f"teacher {teacher.spec.name}: a crop_px of {shown} is no multiple of any of its strides of 4 to 64 px; "
            f"choose crop_px {shown // 32 * 32 or 32} or {shown // 32 * 32 + 32}, or a teacher that sees one size "
            "only, such as dinov2_vitb14_paper"
        ) from None
    found = []
    for view in view_specs(teacher.spec, shown, asked.scales or (1.0,), 1):
        if not native:  # a store's view of a large tile is named after its windows
            view = with_windows(teacher, layers, view, asked.window_px)
        found += [
            live_target(teacher, f"{teacher.spec.name}/{view.scale}/{layer}", layer, view.size_px, shown, crop_px)
            for layer in dict.fromkeys(layers)
        ]
    return found


def crop_maps(targets: Sequence[LiveTarget], images_B3HW: Tensor, precision: str) -> dict[str, Tensor]:
    """Return ``{key: [B, h, w, D] float32}`` in the teachers' own scale, one pass per teacher and side.

    ``images_B3HW``: float RGB in 0..1. The result is made of inference tensors (see ``Teacher.encode``).
    """
    passes: dict[tuple[int, int], list[LiveTarget]] = {}
    for target in targets:
        passes.setdefault((id(target.teacher), target.spec.view.size_px), []).append(target)
    found: dict[str, Tensor] = {}
    for (_, size_px), together in passes.items():
        layers = [target.spec.layer.name for target in together]
        maps = together[0].teacher.encode_images(images_B3HW.detach(), size_px, layers, precision)
        found |= {target.key: maps[target.spec.layer.name] for target in together}
    return {target.key: found[target.key] for target in targets}


class LiveTeachers:
    """Frozen teachers and what a run asks them. They are part of no module, so of no state dict, EMA or optimiser."""

    def __init__(
        self,
        targets: Sequence[LiveTarget],
        specs: Mapping[str, TargetSpec],
        precision: str = "float32",
        padding: bool = False,
    ) -> None:
        """``specs``: of every target, for mean and deviation (0 and 1: features as they are).

        ``padding``: tokens that see padded pixels count too.
        """
        self._targets = tuple(targets)
        self._precision = precision
        self._padding = padding
        self._scales: dict[str, tuple[Tensor, Tensor]] = {}
        for target in targets:
            spec, device = specs[target.key], target.teacher.device
            self._scales[target.key] = (torch.from_numpy(spec.mean).to(device), torch.from_numpy(spec.std).to(device))

    @property
    def teachers(self) -> dict[str, Teacher]:
        """Return the teachers by name, for a drift monitor of the same run."""
        return {target.teacher.spec.name: target.teacher for target in self._targets}

    def targets(self, images_B3HW: Tensor, valid_BHW: Tensor | None = None) -> Targets:
        """Return what the teachers say of ``images_B3HW``, standardised as ``specs`` say.

        ``images_B3HW``: ``[B, 3, crop_px, crop_px]`` float RGB in 0..1, not normalised: the very crops that the student
        sees, mixed and recoloured or not. ``valid_BHW``: bool, mixed like them; a token whose cell has an invalid pixel
        weighs 0 (None: all are valid). So does a token that is not finite. No gradient flows. Raises ``ValueError`` for
        crops of another side.
        """
        features: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for key, values in crop_maps(self._checked(images_B3HW), images_B3HW, self._precision).items():
            finite = values.sum(-1).isfinite()
            mean, std = self._scales[key]
            # A new tensor: inference tensors cannot be saved for a backward pass.
            features[key] = values.sub(mean).div_(std).masked_fill_(~finite.unsqueeze(-1), 0)
            weights[key] = finite.float()
        if valid_BHW is not None and not self._padding:
            for target in self._targets:
                weights[target.key] *= batch_token_weights(valid_BHW, target.spec.grid, target.spec.offset_tile_px)
        return Targets(features, weights)

    def _checked(self, images_B3HW: Tensor) -> Sequence[LiveTarget]:
        for target in self._targets:
            if images_B3HW.shape[-2:] != (target.spec.tile_px, target.spec.tile_px):
                raise ValueError(f"crops of {list(images_B3HW.shape)}, expected a side of {target.spec.tile_px}")
        return self._targets
