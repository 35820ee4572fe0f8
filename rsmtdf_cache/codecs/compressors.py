"""Byte compressors of shards, after the codec: off by default, since features hardly compress and reading slows down.

A compressor is written ``zstd``, ``zstd:LEVEL``, or ``blosc:CODEC[:LEVEL[:SHUFFLE]]``: ``blosc:zstd:3:bitshuffle``.
Bytes are those of Zarr v3's ``zstd`` and ``blosc`` codecs. They depend on the library's version; features do not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import FindingsError, UsageError

__all__ = ["check_compressor", "compress", "decompress", "zarr_compressor"]

_BLOSC = ("lz4", "lz4hc", "blosclz", "zstd", "zlib")
_SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")


def check_compressor(name: str) -> None:
    """Raise ``UsageError`` when ``name`` is no compressor."""
    if name != "none":
        _parsed(name)


@lru_cache
def _parsed(name: str) -> tuple[str, str, int, str]:
    """Return kind, codec, level and shuffle."""
    kind, *rest = name.split(":")
    try:
        if kind == "zstd" and len(rest) <= 1:
            level = int(rest[0]) if rest else 1
            if 1 <= level <= 19:
                return kind, "zstd", level, "noshuffle"
        if kind == "blosc" and 1 <= len(rest) <= 3 and rest[0] in _BLOSC:
            level = int(rest[1]) if len(rest) > 1 else 5
            shuffle = rest[2] if len(rest) > 2 else "bitshuffle"
            if 0 <= level <= 9 and shuffle in _SHUFFLES:
                return kind, rest[0], level, shuffle
    except ValueError:
        pass
    raise UsageError(
        f"unknown compressor {name!r}; write none, zstd[:LEVEL 1-19], or blosc:CODEC[:LEVEL 0-9[:SHUFFLE]] with "
        f"{', '.join(_BLOSC)} and {', '.join(_SHUFFLES)}"
    )


@lru_cache
def _engine(name: str) -> Any:
    import numcodecs

    kind, codec, level, shuffle = _parsed(name)
    if kind == "zstd":
        return numcodecs.Zstd(level=level)
    return numcodecs.Blosc(cname=codec, clevel=level, shuffle=_SHUFFLES.index(shuffle))


def compress(name: str, values: NDArray[Any]) -> bytes:
    """Return the bytes of a chunk as they are stored."""
    if name == "none":
        return values.tobytes()
    return bytes(_engine(name).encode(np.ascontiguousarray(values)))


def decompress(name: str, data: Any, nbytes: int, where: str) -> Any:
    """Return the ``nbytes`` bytes of a chunk. Raises ``FindingsError`` when ``data`` is damaged or holds more."""
    if name == "none":
        return data
    out = np.empty(nbytes, np.uint8)
    try:
        found = _engine(name).decode(data, out=out)
    except (RuntimeError, ValueError) as error:
        raise FindingsError(f"{where}: a chunk cannot be decompressed ({error}); run `rsmtdf cache verify`") from None
    if np.asarray(found).nbytes != nbytes:
        raise FindingsError(f"{where}: a chunk has another size than the array says; run `rsmtdf cache verify`")
    return out


def zarr_compressor(name: str, itemsize: int) -> Any:
    """Return the Zarr v3 codec that reads what ``compress`` writes, None for none."""
    if name == "none":
        return None
    from zarr.codecs import BloscCodec, ZstdCodec

    kind, codec, level, shuffle = _parsed(name)
    if kind == "zstd":
        return ZstdCodec(level=level)
    return BloscCodec(cname=codec, clevel=level, shuffle=shuffle, typesize=itemsize)  # type: ignore[arg-type]
