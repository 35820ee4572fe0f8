"""The contract of a student, and the one place that builds one from a recipe.

Shape legend: B batch, H W image side in pixels, h w grid of a feature map, D channels of a map, C classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.alignment import Grid
from rsmtdf_train.sections import StudentConfig

__all__ = ["Decoder", "Encoder", "MapSpec", "Student", "build_student"]


@dataclass(frozen=True)
class MapSpec:
    """Channels of one feature map; stride and centre of token 0 in image pixels (None: the middle of its cell)."""

    channels: int
    stride_px: int
    offset_px: float | None = None

    def grid(self, side_px: int) -> Grid:
        """Return the token centres of a square image of ``side_px``."""
        offset = self.stride_px / 2 if self.offset_px is None else self.offset_px
        return Grid(side_px // self.stride_px, self.stride_px, offset)


class Encoder(nn.Module, ABC):
    """Images to feature maps. ``maps`` describes what ``forward`` returns, in order from shallow to deep."""

    maps: tuple[MapSpec, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @abstractmethod
    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        """Return one ``[B, D, h, w]`` map for each entry of ``maps``; the image is normalised already."""


class Decoder(nn.Module, ABC):
    """Feature maps to logits. ``reads``: numbers of the maps that have an effect; None: all.

    ``least``: tokens on a side of the last map that it needs.
    """

    reads: tuple[int, ...] | None = None
    least: int = 1

    @abstractmethod
    def forward(self, maps_BDhw: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits ``[B, C, H, W]`` of ``size = (H, W)``."""


class Student(nn.Module):
    """An encoder and a decoder that owns its pixel statistics; reads float RGB in 0..1.

    ``multiple_px``: image sides must be multiples of this. ``classes``: number of output channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, decoder: Decoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.classes = classes
        self.register_buffer("mean", torch.tensor(encoder.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(encoder.std).view(1, 3, 1, 1))

    @property
    def maps(self) -> tuple[MapSpec, ...]:
        """Channels and strides of what ``encode`` returns; the last one is the last decoder input."""
        return self.encoder.maps

    @property
    def decoder_reads(self) -> tuple[int, ...]:
        """Numbers of the maps that the decoder reads: fusion into another one would do nothing."""
        return tuple(range(len(self.maps))) if self.decoder.reads is None else self.decoder.reads

    @property
    def multiple_px(self) -> int:
        return math.lcm(*(m.stride_px for m in self.maps))

    def encode(self, image_B3HW: Tensor) -> list[Tensor]:
        """Return the feature maps ``[B, D, h, w]`` of float RGB in 0..1, shallow to deep.

        Raises ``UsageError`` when a side is not a multiple of ``multiple_px``.
        """
        height, width = image_B3HW.shape[-2:]
        if height % self.multiple_px or width % self.multiple_px:
            raise UsageError(
                f"the student reads sides that are multiples of {self.multiple_px} px, found {height}x{width}; "
                f"choose crop_px accordingly"
            )
        maps: list[Tensor] = self.encoder((image_B3HW - self.mean) / self.std)
        return maps

    def decode(self, maps_BDhw: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits ``[B, C, H, W]`` for maps as ``encode`` returns them, at ``size = (H, W)``."""
        logits: Tensor = self.decoder(maps_BDhw, size)
        return logits

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Return logits ``[B, C, H, W]`` of float RGB in 0..1."""
        height, width = image_B3HW.shape[-2:]
        return self.decode(self.encode(image_B3HW), (height, width))


def build_student(config: StudentConfig, classes: int, *, load_weights: bool = True) -> Student:
    """Return a freshly initialised student; weights come from the current random state or the encoder's file or hub.

    ``load_weights=False`` skips published weights, for a checkpoint that is loaded over them. Raises ``UsageError``
    for an unknown encoder or decoder and for two that do not go together, ``ResourceError`` for weights out of reach
    and for a package that is not installed, ``MismatchError`` for weights of another net.
    """
    from rsmtdf_train.students.dpt import DptDecoder
    from rsmtdf_train.students.fpn import FpnDecoder
    from rsmtdf_train.students.smp import SmpDecoder, needs
    from rsmtdf_train.students.timm_encoder import load_encoder

    family, _, name = config.decoder.partition(":")
    if family == "smp":
        finest, deepest = needs(name)
        encoder = load_encoder(config, load_weights=load_weights, finest=finest, deepest=deepest)
        return Student(encoder, SmpDecoder(name, encoder.maps, classes, config.channels), classes)
    encoder = load_encoder(config, load_weights=load_weights)
    if family == "dpt":
        return Student(encoder, DptDecoder(encoder.maps, classes, config.channels), classes)
    return Student(encoder, FpnDecoder(encoder.maps, classes, config.channels), classes)
