"""Pixels of tiles as arrays of a store: what is asked for, and how one tells them from features.

A store keeps pixels the way it keeps features, so that commits, checks, copies and collection are one machinery: the
"teacher" ``pixels`` says of each pixel what it shows. A token is a pixel, at stride 1. The name is taken: no network
can have it. ``pixels/s<side>o0/rgb`` holds the decoded 8-bit RGB, ``pixels/s<side>o0/valid`` is 1 where a tile holds
data; without it every pixel does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rsmtdf_cache.specs import (
    EncodingSpec,
    FeatureKey,
    FeatureSpec,
    LayerSpec,
    NumericsProfile,
    PixelSpec,
    TeacherSpec,
    ViewSpec,
    canonical_json,
    digest_of,
)

if TYPE_CHECKING:
    from rsmtdf_cache.sources.base import TileSource

__all__ = ["PIXELS", "PIXEL_PROFILE", "RGB", "VALID", "is_pixels", "pixel_specs"]

PIXELS = "pixels"
RGB = "rgb"
VALID = "valid"

#: Reading pixels has no numerics: every machine gives the same.
PIXEL_PROFILE = NumericsProfile(device="any", precision="float32", torch="any", threads=1, micro_batch=1)

#: Validity is nearly always the same for a whole tile, and then takes a few bytes.
_ENCODINGS = {RGB: EncodingSpec(codec="uint8"), VALID: EncodingSpec(codec="uint8", compressor="zstd:1")}
_CHANNELS = {RGB: 3, VALID: 1}


def is_pixels(array: FeatureSpec | FeatureKey) -> bool:
    """Return whether the array holds pixels or their validity, no features."""
    key = array if isinstance(array, FeatureKey) else array.key
    return key.teacher == PIXELS


def pixel_specs(source: TileSource) -> list[FeatureSpec]:
    """Return the arrays that hold the pixels of ``source``; validity only of a kind of dataset that can lack data.

    The rule by which values become pixels belongs to their identity; ``TeacherSpec.architecture`` has it in words.
    """
    rule = None if source.pixels is None else source.pixels.to_json()
    teacher = TeacherSpec(
        name=PIXELS,
        family=PIXELS,
        architecture="8-bit RGB of the files" if rule is None else canonical_json(rule),
        weights=digest_of({"pixels": rule}),
        weights_origin="the dataset",
        patch_px=1,
        native_px=source.tile_px,
        prefix_tokens=0,
        norm=False,
        pixel=PixelSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    )
    return [
        FeatureSpec(
            teacher=teacher,
            layer=LayerSpec(name=name, channels=_CHANNELS[name], stride_px=1, offset_px=0.5),
            view=ViewSpec(size_px=source.tile_px, orientation=0),
            encoding=_ENCODINGS[name],
            tile_px=source.tile_px,
            grid=(source.tile_px, source.tile_px),
        )
        for name in ((RGB, VALID) if source.may_lack_data else (RGB,))
    ]
