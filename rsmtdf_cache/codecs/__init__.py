"""Codecs: how a float feature becomes stored numbers. ``load_codec(encoding, …)`` is the way in."""

from __future__ import annotations

import re

from rsmtdf_cache.codecs.base import Affine, Codec, Codes
from rsmtdf_cache.codecs.calibration import Calibration, Moments
from rsmtdf_cache.codecs.compressors import check_compressor
from rsmtdf_cache.codecs.float16 import Float16
from rsmtdf_cache.codecs.int8 import Int8
from rsmtdf_cache.codecs.pca import PcaInt8
from rsmtdf_cache.codecs.uint8 import Uint8
from rsmtdf_cache.errors import FindingsError, UsageError, did_you_mean
from rsmtdf_cache.specs import EncodingSpec

__all__ = [
    "Affine",
    "CODECS",
    "Calibration",
    "Codec",
    "Codes",
    "Moments",
    "codec_class",
    "codec_name",
    "load_codec",
    "parse_codec",
]

#: The allow-list (decision 16): a store can name a codec, never a module to import.
CODECS: dict[str, type[Codec]] = {"float16": Float16, "int8": Int8, "pca-int8": PcaInt8}

#: Of pixels, which a build stores on its own: a store can name it, a user cannot ask for it.
_PIXELS: dict[str, type[Codec]] = {"uint8": Uint8}

_KNOWN = "float16, int8, pcaK-int8 (K = components, e.g. pca96-int8)"


def codec_class(encoding: EncodingSpec) -> type[Codec]:
    """Return the codec that ``encoding`` names. Raises ``UsageError`` for a name that is not on the list."""
    kind = CODECS.get(encoding.codec) or _PIXELS.get(encoding.codec)
    if kind is None:
        raise UsageError(f"unknown codec {encoding.codec!r}.{did_you_mean(encoding.codec, CODECS)} Known: {_KNOWN}")
    check_compressor(encoding.compressor)
    return kind


def load_codec(encoding: EncodingSpec, channels: int, calibration: Calibration | None = None) -> Codec:
    """Return the codec of ``encoding`` for features of ``channels``.

    Raises ``UsageError`` for an unknown codec or parameter, ``FindingsError`` when it needs another calibration.
    """
    kind = codec_class(encoding)
    kind.stored_channels(encoding, channels)
    if kind.calibrated and (calibration is None or calibration.channels != channels):
        found = "none" if calibration is None else f"one of {calibration.channels} channels"
        raise FindingsError(f"codec {codec_name(encoding)} needs a calibration of {channels} channels, found {found}")
    return kind(encoding, channels, calibration)


def parse_codec(text: str) -> EncodingSpec:
    """Return the encoding written as ``float16``, ``int8`` or ``pca96-int8``, uncompressed. Raises ``UsageError``."""
    found = re.fullmatch(r"pca(\d{1,5})-int8", text)
    if found:
        return EncodingSpec(codec="pca-int8", parameters={"components": int(found[1])})
    encoding = EncodingSpec(codec=text)
    if text == "pca-int8":
        raise UsageError(f"codec {text!r}: say how many components, e.g. pca96-int8")
    if text not in CODECS:
        raise UsageError(f"unknown codec {text!r}.{did_you_mean(text, CODECS)} Known: {_KNOWN}")
    return encoding


def codec_name(encoding: EncodingSpec) -> str:
    """Return the encoding as people write it: ``pca96-int8``, ``float16+zstd``."""
    name = encoding.codec
    if name == "pca-int8":
        name = f"pca{encoding.parameters.get('components', '?')}-int8"
    return name if encoding.compressor == "none" else f"{name}+{encoding.compressor}"
