"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["size"]


def size(nbytes: float) -> str:
    """Return ``nbytes`` for people: ``"1.2 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
