"""Codecs: how a float feature becomes stored numbers. ``load_codec(spec)`` is the way in."""

from __future__ import annotations

from rsmtdf_cache.codecs.base import Codec
from rsmtdf_cache.codecs.float16 import Float16
from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.specs import EncodingSpec

__all__ = ["CODECS", "Codec", "load_codec"]

#: The allow-list (decision 16): a store can name a codec, never a module to import.
CODECS: dict[str, type[Codec]] = {"float16": Float16}


def load_codec(spec: EncodingSpec) -> Codec:
    """Return the codec of ``spec``. Raises ``UsageError`` for a name that is not on the list."""
    if spec.codec not in CODECS:
        raise UsageError(f"unknown codec {spec.codec!r}.{did_you_mean(spec.codec, CODECS)} Known: {', '.join(CODECS)}")
    return CODECS[spec.codec](spec)
