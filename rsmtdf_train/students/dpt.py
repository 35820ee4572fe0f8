"""The dense prediction transformer head of RS-MTDF's student (Ranftl et al. 2021; recipe of the released code).

Attribute names follow the published checkpoints of this head, so that such weights and reference numbers fit.
Encoders with a pyramid of their own (CNNs, hierarchical transformers) enter the fusion blocks through one 3x3
convolution for each map, as in the MiDaS models of the same authors (Ranftl et al. 2022; Birkl et al. 2023).
All interpolation uses ``align_corners=True``; there is no batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.students.base import Decoder, MapSpec

__all__ = ["DptDecoder"]


class DptDecoder(Decoder):
    """Four token maps of one stride → 4x, 2x, 1x, 1/2x pyramid → fusion blocks → logits at 8x the token grid.

    Four maps of rising strides are a pyramid already: logits come at half of the first stride.
    """

    def __init__(
        self,
        maps: Sequence[MapSpec],
        classes: int,
        features: int = 64,
        out_channels: tuple[int, int, int, int] = (48, 96, 192, 384),
    ) -> None:
        super().__init__()
        strides = [m.stride_px for m in maps]
        tokens = len(set(strides)) == 1
        if len(maps) != 4 or not (tokens or strides == sorted(set(strides))):
            raise UsageError(
                "decoder dpt needs four maps of one token stride (a ViT) or of rising strides, found strides "
                f"{', '.join(map(str, strides))}; set student.decoder: fpn"
            )
        if tokens:
            self._spread_tokens(maps, out_channels)
            widths = out_channels
        else:
            self.projects = nn.ModuleList(nn.Identity() for _ in maps)
            self.resize_layers = nn.ModuleList(nn.Identity() for _ in maps)
            a, b, c, d = (m.channels for m in maps)
            widths = (a, b, c, d)
        self.scratch = nn.Module()
        for i, o in enumerate(widths, start=1):
            self.scratch.add_module(f"layer{i}_rn", nn.Conv2d(o, features, 3, padding=1, bias=False))
            self.scratch.add_module(f"refinenet{i}", _FusionBlock(features))
        self.scratch.output_conv = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(features, classes, 1)
        )

    def _spread_tokens(self, maps: Sequence[MapSpec], out_channels: tuple[int, int, int, int]) -> None:
        a, b, _, d = out_channels
        self.projects = nn.ModuleList(nn.Conv2d(m.channels, o, 1) for m, o in zip(maps, out_channels, strict=True))
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(a, a, 4, stride=4),
                nn.ConvTranspose2d(b, b, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(d, d, 3, stride=2, padding=1),
            ]
        )

    def forward(self, maps_BDhw: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits ``[B, C, H, W]`` of ``size``."""
        levels = []
        for i, single in enumerate(maps_BDhw):
            level = self.resize_layers[i](self.projects[i](single))
            levels.append(self.scratch.get_submodule(f"layer{i + 1}_rn")(level))
        path: Tensor = self.scratch.get_submodule("refinenet4")(levels[3], None, levels[2].shape[-2:])
        path = self.scratch.get_submodule("refinenet3")(path, levels[2], levels[1].shape[-2:])
        path = self.scratch.get_submodule("refinenet2")(path, levels[1], levels[0].shape[-2:])
        path = self.scratch.get_submodule("refinenet1")(path, levels[0], None)
        logits = self.scratch.get_submodule("output_conv")(path)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


class _ResidualUnit(nn.Module):
    """``x + conv2(relu(conv1(relu(x))))``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + y


class _FusionBlock(nn.Module):
    """``out_conv(up(unit2(x + unit1(skip))))``, up to ``size`` or by a factor of 2."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.resConfUnit1 = _ResidualUnit(features)  # without a gradient in refinenet4, as published
        self.resConfUnit2 = _ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = self.resConfUnit2(x)
        goal = size if size is not None else (2 * x.shape[-2], 2 * x.shape[-1])
        y: Tensor = self.out_conv(F.interpolate(x, size=goal, mode="bilinear", align_corners=True))
        return y
