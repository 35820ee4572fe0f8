"""The method of RS-MTDF, isolated: translate student features, distil from teachers, fuse back into the decoder.

Everything here is part of the student and is deployed with it when fusion is on; no teacher is.
Shape legend: B batch, h w grid of a student map, D channels of a teacher layer, S channels of the last decoder input.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsmtdf_train.alignment import Grid, resample
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.students.base import MapSpec, Student, build_student

__all__ = ["FusedStudent", "TargetShape", "TeacherFusion", "Translator", "build_fused_student", "nearest_map"]


@dataclass(frozen=True)
class TargetShape:
    """One distillation target: its key ``teacher/scale/layer``, channels, stride and first centre in tile pixels."""

    key: str
    channels: int
    stride_px: float
    offset_px: float | None = None

    def grid(self, side_px: int) -> Grid:
        """Return the token centres of a crop of ``side_px`` on the lattice."""
        offset = self.stride_px / 2 if self.offset_px is None else self.offset_px
        return Grid(int(side_px / self.stride_px), self.stride_px, offset)


class Translator(nn.Module):
    """A two-layer MLP on tokens (RS-MTDF: 384 → 1024 → D), written as 1x1 convolutions."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, hidden, 1)
        self.second = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, map_BShw: Tensor) -> Tensor:
        """Return ``[B, D, h, w]`` on the student's own grid."""
        y: Tensor = self.second(F.gelu(self.first(map_BShw)))
        return y


class TeacherFusion(nn.Module):
    """One translator for each target, and, with ``share``, a projection of each back into the last decoder input.

    ``share=None``: the translators serve the loss alone and are dropped from the deployed student.
    """

    def __init__(
        self, maps: Sequence[MapSpec], targets: Sequence[TargetShape], hidden: int, share: float | None, seed: int
    ) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.sources = tuple(nearest_map(maps, t.stride_px) for t in targets)
        self.share = share
        self._maps = tuple(maps)
        self.translators = nn.ModuleList()
        self.projections = nn.ModuleList()
        for target, source in zip(self.targets, self.sources, strict=True):
            # each target's weights depend on its own key, so adding a teacher leaves the others' start as it was
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed_of(seed, target.key))
                self.translators.append(Translator(maps[source].channels, hidden, target.channels))
                if share is not None:
                    self.projections.append(nn.Conv2d(target.channels, maps[-1].channels, 1))

    def translate(self, maps_BShw: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return ``{key: [B, D, h, w]}`` on the grid of the student map that feeds the target."""
        return {
            target.key: translator(maps_BShw[source])
            for target, source, translator in zip(self.targets, self.sources, self.translators, strict=True)
        }

    def align(self, translated: dict[str, Tensor], side_px: int) -> dict[str, Tensor]:
        """Return ``{key: [B, D, n, n]}``: the translations of a square crop, read at the teachers' token centres."""
        return {
            target.key: resample(translated[target.key], self._maps[source].grid(side_px), target.grid(side_px))
            for target, source in zip(self.targets, self.sources, strict=True)
        }

    def fuse(self, maps_BShw: Sequence[Tensor], translated: dict[str, Tensor]) -> list[Tensor]:
        """Return the maps with the last replaced by ``(1 - share) s + share * mean(projections)``.

        Paper: 0.8 s + 0.1 d' + 0.1 c' is ``share=0.2`` with two targets. Without ``share`` the maps come back as is.
        """
        maps = list(maps_BShw)
        if self.share is None or not self.targets:
            return maps
        last = maps[-1]
        total = torch.zeros_like(last)
        for target, projection in zip(self.targets, self.projections, strict=True):
            total = total + _resize(projection(translated[target.key]), (last.shape[-2], last.shape[-1]))
        maps[-1] = (1 - self.share) * last + (self.share / len(self.targets)) * total
        return maps


class FusedStudent(nn.Module):
    """What is trained and deployed: encoder, translators, projections, decoder. No teacher anywhere."""

    def __init__(self, student: Student, fusion: TeacherFusion | None) -> None:
        super().__init__()
        self.student = student
        self.fusion = fusion

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Return logits ``[B, C, H, W]`` of float RGB in 0..1, sides multiples of ``student.multiple_px``."""
        maps = self.student.encode(image_B3HW)
        if self.fusion is not None and self.fusion.share is not None:
            maps = self.fusion.fuse(maps, self.fusion.translate(maps))
        height, width = image_B3HW.shape[-2:]
        return self.student.decode(maps, (height, width))

    def forward_train(self, image_B3HW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits ``[B, C, H, W]`` and translations ``{key: [B, D, n, n]}`` at the teachers' token centres."""
        maps = self.student.encode(image_B3HW)
        translated = self.fusion.translate(maps) if self.fusion is not None else {}
        height, width = image_B3HW.shape[-2:]
        if self.fusion is not None:
            maps = self.fusion.fuse(maps, translated)
            translated = self.fusion.align(translated, height)
        return self.student.decode(maps, (height, width)), translated

    def forward_translate(self, image_B3HW: Tensor) -> dict[str, Tensor]:
        """Return translations ``{key: [B, D, n, n]}`` at the teachers' token centres, without decoding."""
        if self.fusion is None:
            return {}
        maps = self.student.encode(image_B3HW)
        return self.fusion.align(self.fusion.translate(maps), image_B3HW.shape[-2])

    def predict(self, image_B3HW: Tensor) -> Tensor:
        """Return logits ``[B, C, H, W]`` for any size: edges are repeated to the right and below, then cut off."""
        height, width = image_B3HW.shape[-2:]
        multiple = self.student.multiple_px
        padded = F.pad(image_B3HW, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        logits: Tensor = self(padded)
        return logits[..., :height, :width]

    @property
    def deployed_targets(self) -> tuple[TargetShape, ...]:
        """Targets whose translators the deployed student needs: none unless fusion is on."""
        return self.fusion.targets if self.fusion is not None and self.fusion.share is not None else ()

    def deployed_state(self) -> dict[str, Tensor]:
        """Return the tensors of the deployed student: without translators when they served the loss alone."""
        keep = bool(self.deployed_targets)
        return {k: v for k, v in self.state_dict().items() if keep or not k.startswith("fusion.")}


def nearest_map(maps: Sequence[MapSpec], stride_px: float) -> int:
    """Return the index of the map whose stride is nearest on a log scale; the deepest of equals."""
    return min(range(len(maps)), key=lambda i: (abs(math.log(maps[i].stride_px / stride_px)), -i))


def build_fused_student(
    recipe: Recipe, classes: int, targets: Sequence[TargetShape], *, load_weights: bool = True
) -> FusedStudent:
    """Return the student of ``recipe`` with weights that are a function of ``recipe.seed`` alone.

    The student is built before and apart from the translators, so that paired arms (with and without distillation)
    start from the same student. ``load_weights=False`` when a checkpoint follows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(recipe.seed, "student"))
        student = build_student(recipe.student, classes, load_weights=load_weights)
    fusion = None
    if targets and recipe.distill is not None:
        share = recipe.fuse.share if recipe.fuse is not None else None
        fusion = TeacherFusion(student.maps, targets, recipe.distill.hidden, share, recipe.seed)
    return FusedStudent(student, fusion)


def _resize(x_BDhw: Tensor, size: tuple[int, int]) -> Tensor:
    if (x_BDhw.shape[-2], x_BDhw.shape[-1]) == size:
        return x_BDhw
    if size[0] <= x_BDhw.shape[-2] and size[1] <= x_BDhw.shape[-1]:
        return F.adaptive_avg_pool2d(x_BDhw, size)  # bilinear would skip tokens
    return F.interpolate(x_BDhw, size=size, mode="bilinear", align_corners=False)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
