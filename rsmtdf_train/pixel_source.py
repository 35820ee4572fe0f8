"""Where the pixels of training come from: the store, if it has them, or the dataset's images. Batches are the same."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, get_args

from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_cache.stored_pixels import StoredPixels

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = ["PixelSource", "pixel_source", "require_stored", "stored_pixels"]

#: ``auto``: what the store has of it, the rest from images. ``store``: from the store alone. ``source``: from images.
PixelSource = Literal["auto", "store", "source"]


def pixel_source(text: str) -> PixelSource:
    """Return ``text`` as the word it is. Raises ``UsageError`` for another one."""
    for word in get_args(PixelSource):
        if text == word:
            found: PixelSource = word
            return found
    raise UsageError(f"--pixels {text}: choose {', '.join(get_args(PixelSource))}")


def stored_pixels(store: FeatureStore | None, asked: PixelSource) -> StoredPixels | None:
    """Return the stored pixels that a run reads, None to decode images.

    Raises ``UsageError`` for an unknown word, or when ``store`` is asked for and there is none, ``MismatchError`` when
    it holds no pixels.
    """
    pixel_source(asked)
    if asked == "source" or (asked == "auto" and store is None):
        return None
    if store is None:
        raise UsageError("pixels store: there is no store to read them from; give --use-cache STORE")
    found = StoredPixels.of(store)
    if found is None and asked == "store":
        raise MismatchError(f"{store.shown} holds no pixels; {_advice(store)}")
    return found


def require_stored(pixels: StoredPixels, tile_ids: Collection[str]) -> None:
    """Raise ``MismatchError`` unless the pixels of every tile are stored."""
    absent = [tile_id for tile_id in tile_ids if tile_id not in pixels]
    if absent:
        shown = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        raise MismatchError(
            f"{pixels.store.shown} has the pixels of {len(tile_ids) - len(absent)} of {len(tile_ids)} train tiles, it "
            f"lacks {shown}; {_advice(pixels.store)}"
        )


def _advice(store: FeatureStore) -> str:
    return f"store them with `rsmtdf cache build DATA --out {store.shown} --pixels`, or decode images (pixels: source)"
