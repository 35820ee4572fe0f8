"""The decoders of segmentation_models_pytorch (smp, MIT; extra ``smp``) on the maps of our encoders.

On a CNN or hierarchical encoder a decoder gets what smp itself would give it, and computes the same numbers:

- Decoders of the U-Net family get the map of stride 2 too where the encoder has one; where it has none they get 0
  channels in its place, as smp does for transformers. No decoder of smp looks into its map of stride 1, the image.
- DeepLab, PAN and PSPNet are made for encoders that end at stride 8 or 16: the encoder is dilated to that. (smp cuts
  PSPNet's encoder off after stride 8 instead; Zhao et al. 2017 dilate it.)

The four maps of a ViT are of one stride: each is narrowed by a 1x1 convolution and resized (bilinear) to 4, 2, 1 and
1/2 times the token grid, after which the decoder takes them for strides 4, 8, 16, 32; logits are resized to the image
in the end whatever the patch. An odd grid is resized to the next even one.

Shape legend: B batch, C classes, D channels, H W image side in pixels, h w grid of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rsmtdf_cache.errors import ResourceError, UsageError, did_you_mean
from rsmtdf_train.students.base import Decoder, MapSpec

__all__ = ["SmpDecoder", "needs"]

#: Tokens of a ViT's levels in place of the strides 4, 8, 16, 32 of a CNN, by the stride of the last one.
_FACTORS = {32: (4.0, 2.0, 1.0, 0.5), 16: (4.0, 2.0, 1.0, 1.0), 8: (1.0, 1.0, 1.0, 1.0)}


@dataclass(frozen=True)
class _Kind:
    """What a decoder asks of its maps.

    ``half``: reads stride 2. ``deepest``: stride of the last map. ``reads``: of the maps from stride 4 on. ``least``:
    tokens on a side of the last map. ``pools``: normalises one value per image and channel over the batch.
    """

    half: bool = False
    deepest: int = 32
    reads: tuple[int, ...] = (0, 1, 2, 3)
    least: int = 1
    pools: bool = False


_KINDS = {
    "unet": _Kind(half=True),
    "unetplusplus": _Kind(half=True),
    "linknet": _Kind(half=True),
    "manet": _Kind(half=True),
    "fpn": _Kind(),
    "pan": _Kind(deepest=16, least=8, pools=True),
    "deeplabv3": _Kind(deepest=8, reads=(3,), pools=True),
    "deeplabv3plus": _Kind(deepest=16, reads=(0, 3), pools=True),
    "pspnet": _Kind(deepest=8, reads=(3,)),
    "upernet": _Kind(pools=True),
    "segformer": _Kind(),
    "dpt": _Kind(),
}
_ALIASES = {"unet++": "unetplusplus", "deeplabv3+": "deeplabv3plus"}


class SmpDecoder(Decoder):
    """The decoder ``name`` of smp with its own head. ``width`` 64 means smp's default widths; others scale them."""

    def __init__(self, name: str, maps: Sequence[MapSpec], classes: int, width: int = 64) -> None:
        """Raise ``UsageError`` for maps or a width that the decoder cannot take, ``ResourceError`` without smp."""
        super().__init__()
        self.name, self.kind = _look_up(name)
        self.least = self.kind.least
        strides = [m.stride_px for m in maps]
        self.tokens = len(maps) == 4 and len(set(strides)) == 1
        self.fine = self.kind.half and strides[0] == 2
        deep = maps[1:] if self.fine else maps
        wanted = [min(stride, self.kind.deepest) for stride in (4, 8, 16, 32)]
        if not self.tokens and [m.stride_px for m in deep] != wanted:
            raise UsageError(
                f"decoder smp:{self.name} needs maps of strides {', '.join(map(str, wanted))} (or a ViT's four), found "
                f"{', '.join(map(str, strides))}; take another encoder, or student.decoder: fpn"
            )
        self.reads = tuple(i + self.fine for i in self.kind.reads)
        if self.fine:
            self.reads = (0, *self.reads)
        channels = [m.channels for m in deep]
        self.laterals = nn.ModuleList()
        if self.tokens and self.name != "dpt" and len(self.kind.reads) > 1:
            for i in range(4):
                read = i in self.kind.reads
                narrow = min(channels[i], width << i) if read else channels[i]
                self.laterals.append(nn.Conv2d(channels[i], narrow, 1) if read else nn.Identity())
                channels[i] = narrow
        half = maps[0].channels if self.fine else 0
        self.net, self.head = _build(self.name, [0, half, *channels], classes, width, self.tokens)

    def forward(self, maps_BDhw: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits ``[B, C, H, W]`` of ``size``, at last resized with ``align_corners=True`` as smp does.

        Raises ``UsageError`` for a crop too small for the decoder, and for a single crop where it cannot train on one.
        """
        levels = list(maps_BDhw)
        half = levels.pop(0) if self.fine else None
        batch, _, height, width = levels[-1].shape
        if self.tokens:
            levels = self._pyramid(levels)
        if min(levels[-1].shape[-2:]) < self.kind.least:
            raise UsageError(
                f"decoder smp:{self.name} halves its last map three times and needs {self.kind.least} tokens on a "
                f"side, found {height}x{width} for an image of {size[0]}x{size[1]} px; choose a larger crop_px"
            )
        if self.training and self.kind.pools and batch == 1:
            raise UsageError(
                f"decoder smp:{self.name} normalises means of whole crops over the batch and cannot train on one crop; "
                "set batch.labeled to 2 or more, or batch.accumulate lower"
            )
        tall, wide = levels[0].shape[-2:]
        if half is None:
            half = levels[0].new_empty((batch, 0, 2 * tall, 2 * wide))
        full = levels[0].new_empty((batch, 0, 4 * tall, 4 * wide))
        arguments = (levels, [None] * len(levels)) if self.name == "dpt" else ([full, half, *levels],)
        return _resized(self.head(self.net(*arguments)), size, align_corners=True)

    def _pyramid(self, levels: list[Tensor]) -> list[Tensor]:
        """Return the maps of one stride as the levels of a pyramid; those that nobody reads as they are."""
        factors = _FACTORS[self.kind.deepest]
        even = 0.5 in factors
        if self.name == "dpt":  # spreads them itself
            factors = (1.0,) * 4
        if self.laterals:
            levels = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        tall, wide = (n + n % 2 if even else n for n in levels[0].shape[-2:])
        # arithmetic, not int(): exporters record the one and take the other for a constant
        sizes = [tuple(side * int(2 * factor) // 2 for side in (tall, wide)) for factor in factors]
        return [_resized(x, sizes[i]) if i in self.kind.reads else x for i, x in enumerate(levels)]


def needs(name: str) -> tuple[int, int | None]:
    """Return the least stride of maps that the decoder ``name`` reads, and the stride a CNN must end at (None: 32).

    Raises ``UsageError`` for a name that is none of smp's.
    """
    _, kind = _look_up(name)
    return 2 if kind.half else 4, None if kind.deepest == 32 else kind.deepest


def _look_up(name: str) -> tuple[str, _Kind]:
    name = _ALIASES.get(name, name)
    if name not in _KINDS:
        raise UsageError(
            f"student.decoder smp:{name}: no decoder of this name.{did_you_mean(name, _KINDS)} "
            f"Known: {', '.join(f'smp:{n}' for n in sorted(_KINDS))}"
        )
    return name, _KINDS[name]


def _build(name: str, channels: list[int], classes: int, width: int, tokens: bool) -> tuple[Any, Any]:
    """Return smp's decoder and head for maps of ``channels`` at strides 1, 2, 4, ..., initialised as smp does."""
    try:
        from segmentation_models_pytorch import decoders  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"student.decoder smp:{name} needs the package segmentation_models_pytorch ({error}): "
            "pip install 'rsmtdf[smp]' (in a clone: pip install -e '.[smp]')"
        ) from None
    from segmentation_models_pytorch.base import SegmentationHead
    from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head

    decoder, out, kernel = _decoder(name, channels, width, tokens)
    if name == "dpt":
        from segmentation_models_pytorch.decoders.dpt.decoder import DPTSegmentationHead

        head = DPTSegmentationHead(out, classes).head  # without its resize
    else:
        head = SegmentationHead(out, classes, kernel_size=kernel)
    if not name.startswith("deeplab"):  # which smp leaves as torch makes it
        initialize_decoder(decoder)
        initialize_head(head)
    return decoder, head


def _decoder(name: str, channels: list[int], width: int, tokens: bool) -> tuple[Any, int, int]:
    """Return the decoder, its output channels and the kernel of its head. 64 gives the defaults of smp 0.6."""
    depth = len(channels) - 1
    quarter, half, twice, wide = max(width // 4, 1), max(width // 2, 1), 2 * width, 4 * width
    if name in ("unet", "unetplusplus", "manet"):
        steps = (wide, twice, width, half, quarter)
        common = {"encoder_channels": channels, "decoder_channels": steps, "n_blocks": depth}
        if name == "unet":
            from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

            return UnetDecoder(**common), quarter, 3
        if name == "unetplusplus":
            from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder

            return UnetPlusPlusDecoder(**common), quarter, 3
        from segmentation_models_pytorch.decoders.manet.decoder import MAnetDecoder

        return MAnetDecoder(**common, pab_channels=width), quarter, 3
    if name == "linknet":
        from segmentation_models_pytorch.decoders.linknet.decoder import LinknetDecoder

        return LinknetDecoder(channels, prefinal_channels=half, n_blocks=depth), half, 1
    if name == "fpn":
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

        if width % 16:
            raise UsageError(
                f"decoder smp:fpn normalises 32 groups of 2 x student.channels: it must be a multiple of 16, "
                f"found {width}"
            )
        return FPNDecoder(channels, depth, pyramid_channels=wide, segmentation_channels=twice), twice, 1
    if name == "pan":
        from segmentation_models_pytorch.decoders.pan.decoder import PANDecoder

        return PANDecoder(channels, 5, half), half, 3
    if name == "deeplabv3":
        from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder

        return DeepLabV3Decoder(channels[-1], wide, (12, 24, 36), False, 0.5), wide, 1
    if name == "deeplabv3plus":
        from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder

        return DeepLabV3PlusDecoder(channels, 5, wide, (12, 24, 36), 16, True, 0.5), wide, 1
    if name == "pspnet":
        from segmentation_models_pytorch.decoders.pspnet.decoder import PSPDecoder

        return PSPDecoder(channels, out_channels=8 * width), 8 * width, 3
    if name == "upernet":
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        return UPerNetDecoder(channels, depth, wide), wide, 1
    if name == "segformer":
        from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

        return SegformerDecoder(channels, depth, wide), wide, 1
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder

    strides = [16] * 4 if tokens else [4, 8, 16, 32]
    intermediate = (wide, 8 * width, 16 * width, 16 * width)
    return DPTDecoder(channels[2:], strides, False, "ignore", intermediate, wide), wide, 3


def _resized(x_BDhw: Tensor, size: tuple[int, ...], align_corners: bool = False) -> Tensor:
    if (x_BDhw.shape[-2], x_BDhw.shape[-1]) == size:
        return x_BDhw
    return F.interpolate(x_BDhw, size=size, mode="bilinear", align_corners=align_corners)
