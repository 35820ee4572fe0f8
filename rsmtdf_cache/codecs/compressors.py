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

__all__ = ["canonical", "check_compressor", "compress", "decompress", "zarr_compressor"]

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


def canonical(name: str) -> str:
    """Return the one way to write a compressor: ``zstd`` is ``zstd:1``. Raises ``UsageError`` when it is none."""
    if name == "none":
        return name
    kind, codec, level, shuffle = _parsed(name)
    return f"zstd:{level}" if kind == "zstd" else f"blosc:{codec}:{level}:{shuffle}"


def compress(name: str, values: NDArray[Any]) -> bytes:
    """Return the bytes of a chunk as they are stored."""
    if name == "none":
        return values.tobytes()
    return bytes(_engine(name).encode(np.ascontiguousarray(values)))


def decompress(name: str, data: Any, nbytes: int, where: str) -> Any:
    """Return the ``nbytes`` bytes of a chunk. Raises ``FindingsError`` when ``data`` is damaged or holds more or less.

    What the chunk says of itself is checked before a library sees it: both take it at its word.
    """
    if name == "none":
        return data
    kind = _parsed(name)[0]
    stated = _zstd_size(data) if kind == "zstd" else _blosc_size(data)
    out = np.empty(nbytes, np.uint8)
    try:
        if stated != nbytes:
            raise ValueError(f"it says it holds {stated} bytes, the array's chunks have {nbytes}")
        _engine(name).decode(data, out=out)
    except (RuntimeError, ValueError) as error:
        raise FindingsError(f"{where}: a chunk cannot be decompressed ({error}); run `rsmtdf cache verify`") from None
    return out


def _zstd_size(data: Any) -> int | None:
    """Return the size of content in a Zstandard frame's header (RFC 8878, 3.1.1.1), None for no such header."""
    head = bytes(data[:18])
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = head[4]
    single = bool(descriptor & 0x20)
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    field = head[at : at + width]
    if not width or len(field) < width:
        return None
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


def _blosc_size(data: Any) -> int | None:
    """Return the size of content in a Blosc 1 header when its compressed size is that of ``data``, else None."""
    head = bytes(data[:16])
    if len(head) < 16:
        return None
    nbytes, block, stored = (int.from_bytes(head[i : i + 4], "little") for i in (4, 8, 12))
    sound = head[0] == 2 and stored == len(data) and head[3] > 0 and 0 < block <= max(nbytes, 1)
    return nbytes if sound else None


def zarr_compressor(name: str, itemsize: int) -> Any:
    """Return the Zarr v3 codec that reads what ``compress`` writes, None for none."""
    if name == "none":
        return None
    from zarr.codecs import BloscCodec, ZstdCodec

    kind, codec, level, shuffle = _parsed(name)
    if kind == "zstd":
        return ZstdCodec(level=level)
    return BloscCodec(cname=codec, clevel=level, shuffle=shuffle, typesize=itemsize)  # type: ignore[arg-type]
