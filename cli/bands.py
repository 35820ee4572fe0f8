"""Band numbers as the command line takes them."""

from __future__ import annotations

__all__ = ["parse_bands"]


def parse_bands(text: str | None) -> tuple[int, int, int] | None:
    """Return ``"4,3,2"`` as numbers, None for None. Raises ``UsageError`` for anything but three whole numbers."""
    from rsmtdf_cache.errors import UsageError

    if text is None:
        return None
    try:
        red, green, blue = (int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--bands {text}: give 3 numbers with commas between, such as 1,2,3") from None
    return red, green, blue
