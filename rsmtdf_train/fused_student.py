"""What is trained and deployed: encoder, translators, projections, decoder. No teacher anywhere.

Shape legend: B batch, H W image, C classes, n grid of a teacher, D channels of a teacher layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.fusion import Encoded, TargetShape, TeacherFusion
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.seeds import seed_of
from rsmtdf_train.students.base import Student, build_student

__all__ = ["FusedStudent", "build_fused_student"]


class FusedStudent(nn.Module):
    """A student and its fusion. ``forward`` is what is deployed; a step puts the same parts together itself."""

    def __init__(self, student: Student, fusion: TeacherFusion | None, odd_sizes: str = "pad") -> None:
        super().__init__()
        self.student = student
        self.fusion = fusion
        self.odd_sizes = odd_sizes

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Return logits ``[B, C, H, W]`` of float RGB in 0..1, sides multiples of ``student.multiple_px``."""
        encoded = self.encode(image_B3HW, passes=self.fuses)
        height, width = image_B3HW.shape[-2:]
        return self.decode(encoded, self.hidden(encoded) if self.fuses else [], (height, width))

    def encode(self, image_B3HW: Tensor, passes: bool = True) -> Encoded:
        """Return the feature maps, those of second passes only with ``passes``.

        A second pass sees the image resized to its side: bilinear, ``align_corners=True``, without antialiasing
        (RS-MTDF, released code).
        """
        sides = self.fusion.pass_sides_px if passes and self.fusion is not None else ()
        second = {
            side: self.student.encode(F.interpolate(image_B3HW, size=(side, side), mode="bilinear", align_corners=True))
            for side in sides
        }
        return Encoded(image_B3HW.shape[-2], self.student.encode(image_B3HW), second)

    def hidden(self, encoded: Encoded) -> list[Tensor]:
        """Return what the last layer of each translator sees; empty without targets."""
        return [] if self.fusion is None else self.fusion.hidden(encoded)

    def translations(self, hidden: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the translations ``{key: [B, D, h, w]}`` of ``hidden``; empty without targets."""
        return {} if self.fusion is None else self.fusion.translations(hidden)

    def translate(self, encoded: Encoded) -> dict[str, Tensor]:
        """Return ``{key: [B, D, h, w]}`` on the student's own grids; empty without targets."""
        return {} if self.fusion is None else self.fusion.translate(encoded)

    def align(self, translated: Mapping[str, Tensor], side_px: int) -> dict[str, Tensor]:
        """Return ``{key: [B, D, n, n]}``: translations at the teachers' token centres."""
        return {} if self.fusion is None else self.fusion.align(translated, side_px)

    def decode(
        self,
        encoded: Encoded,
        translated: Mapping[str, Tensor] | Sequence[Tensor],
        size: tuple[int, int],
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return logits ``[B, C, H, W]`` of ``size``. ``masks``: a factor ``[B, S, 1, 1]`` for each decoder input.

        ``translated``: translations or true features by key, or what ``hidden`` gave, of which no translation is made.
        """
        maps = encoded.maps
        if self.fusion is not None and self.fuses:
            fuse = self.fusion.fuse if isinstance(translated, Mapping) else self.fusion.fuse_directly
            maps = fuse(maps, translated)  # type: ignore[arg-type]
        if masks is not None:
            maps = [m * mask for m, mask in zip(maps, masks, strict=True)]
        return self.student.decode(maps, size)

    def label(self, image_B3HW: Tensor, privileged: Targets | None = None) -> Tensor:
        """Return logits ``[B, C, H, W]`` for pseudo-labels; with ``privileged`` features in place of translations."""
        if privileged is None or self.fusion is None:
            logits: Tensor = self(image_B3HW)
            return logits
        encoded = self.encode(image_B3HW)
        translated = self.fusion.true_translations(privileged, self.translate(encoded), encoded.side_px)
        height, width = image_B3HW.shape[-2:]
        return self.decode(encoded, translated, (height, width))

    def predict(self, image_B3HW: Tensor) -> Tensor:
        """Return logits ``[B, C, H, W]`` for any size.

        ``odd_sizes`` pad: edges are repeated to the right and below, then cut off. resize: the image is resized to the
        nearest multiples and the logits back, both bilinear with ``align_corners=True`` (RS-MTDF: 512 → 518 → 512).
        """
        height, width = image_B3HW.shape[-2:]
        multiple = self.student.multiple_px
        if self.odd_sizes == "resize" and (height % multiple or width % multiple):
            near = tuple(max(1, int(side / multiple + 0.5)) * multiple for side in (height, width))
            resized = F.interpolate(image_B3HW, size=near, mode="bilinear", align_corners=True)
            return F.interpolate(self(resized), size=(height, width), mode="bilinear", align_corners=True)
        padded = F.pad(image_B3HW, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        logits: Tensor = self(padded)
        return logits[..., :height, :width]

    @property
    def fuses(self) -> bool:
        """Whether translations join the decoder's inputs."""
        return self.fusion is not None and self.fusion.fused

    @property
    def deployed_targets(self) -> tuple[TargetShape, ...]:
        """Targets whose translators the deployed student needs: none unless fusion is on."""
        return self.fusion.targets if self.fusion is not None and self.fuses else ()

    @property
    def sees_squares(self) -> bool:
        """Whether an image is also seen resized to a square: then windows have to be squares too."""
        return self.fusion is not None and self.fuses and bool(self.fusion.pass_sides_px)

    def deployed_state(self) -> dict[str, Tensor]:
        """Return the tensors of the deployed student: without translators when they served the loss alone."""
        keep = bool(self.deployed_targets)
        return {k: v for k, v in self.state_dict().items() if keep or not k.startswith("fusion.")}


def build_fused_student(
    recipe: Recipe, classes: int, targets: Sequence[TargetShape], *, load_weights: bool = True
) -> FusedStudent:
    """Return the student of ``recipe`` with weights that are a function of ``recipe.seed`` alone.

    The student is built before and apart from the translators, so that paired arms (with and without distillation)
    start from the same student. ``load_weights=False`` when a checkpoint follows. Raises ``UsageError`` for a decoder
    input of ``fuse.at`` that is not there or not read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, "student"))
        student = build_student(recipe.student, classes, load_weights=load_weights)
    fusion = None
    if targets and recipe.distill is not None:
        fusion = TeacherFusion(student.maps, targets, recipe.distill, recipe.fuse, recipe.seed)
        unread = sorted(set(fusion.at) - set(student.decoder_reads))
        if unread:
            raise UsageError(
                f"fuse.at: decoder {recipe.student.decoder} does not read map {unread[0]} of this encoder; it reads "
                f"{', '.join(map(str, student.decoder_reads))}"
            )
    return FusedStudent(student, fusion, recipe.student.odd_sizes)
