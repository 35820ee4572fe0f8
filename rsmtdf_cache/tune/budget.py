"""Sizes as people write them."""

from __future__ import annotations

import math
import re

from rsmtdf_cache.errors import UsageError

__all__ = ["parse_nbytes"]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{tail}": 1000 ** (n + 1) for n, letter in enumerate("kmgt") for tail in ("", "b")}
_UNITS |= {f"{letter}ib": 1024 ** (n + 1) for n, letter in enumerate("kmgt")}


def parse_nbytes(text: str, what: str = "--budget") -> int:
    """Return the bytes that ``text`` says: ``20GB``, ``1.5 TB``, ``500MiB``, ``1e9``; capitals do not matter.

    kB, MB, GB, TB are powers of 1000 (as disks are sold, and as this program prints), KiB to TiB powers of 1024.
    Raises ``UsageError``, naming the option ``what``.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", text.lower())
    value = float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else math.nan
    if not 1 <= value < 2**63:
        raise UsageError(f"{what} {text!r}: write a positive size such as 20GB, 500MB, 1.5TiB or 1e9 (bytes)")
    return int(value)
