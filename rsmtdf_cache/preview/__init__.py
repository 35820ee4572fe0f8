"""Pictures of stored features: chosen tiles and arrays → maps → a PNG, or one HTML page that needs nothing else.

Flow: ``selection.py`` → ``maps.py`` (with ``pca.py``, ``norms.py``, ``similarity.py``) → ``panel.py``, ``page.py``.
``draw_preview`` is the way in for a store; ``draw_pca`` for arrays at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.preview.maps import Maps, make_maps
from rsmtdf_cache.preview.page import PAGE_NBYTES, write_page
from rsmtdf_cache.preview.panel import draw_panel, draw_pca
from rsmtdf_cache.preview.pca import pca_colors
from rsmtdf_cache.preview.selection import Selection, select
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.store import FeatureStore

__all__ = ["draw_pca", "draw_preview", "pca_colors", "pca_picture"]


def draw_preview(
    store: FeatureStore,
    source: TileSource | None = None,
    png: Path | None = None,
    html: Path | None = None,
    tiles: int | Sequence[str] = 6,
    arrays: Sequence[str] = (),
    patch: tuple[str, float, float] | None = None,
    on_event: EventSink = ignore_events,
) -> dict[str, Any]:
    """Draw tiles of ``store`` as a PNG, a page or both, and return what was drawn, as JSON data.

    ``source``: where the tiles' pixels are; None = features only. ``tiles``, ``arrays``, ``patch``: see ``select``.
    Memory: the shown tokens of one array at a time. Raises what ``select`` raises.
    """
    selection = select(store, source, tiles, arrays, patch, on_event)
    maps = _maps(selection, html is not None, on_event)
    if png is not None:
        draw_panel(png, selection, maps)
    if html is not None:
        write_page(html, selection, maps)
    return {
        "store": store.shown, "snapshot": store.snapshot, "data": None if source is None else str(source.root),
        "png": png, "html": html, "html_nbytes": None if html is None else html.stat().st_size,
        "patch": dict(zip(("tile", "y", "x"), selection.patch, strict=True)),
        "tiles": [{"id": t.id, "split": t.split, "image": t.image is not None} for t in selection.tiles],
        "arrays": [m.describe() for m in maps],
    }  # fmt: skip


def pca_picture(
    store: FeatureStore, source: TileSource, path: Path, tiles: int = 6, teacher: str | None = None
) -> Path:
    """Draw the PCA colours of every array of ``store`` beside tiles of ``source`` as a PNG and return ``path``.

    ``tiles``: how many, spread evenly over the tiles that all arrays hold. ``teacher``: only the arrays of this one.
    Raises what ``select`` raises.
    """
    if teacher is not None and teacher not in {key.teacher for key in store.keys()}:
        raise UsageError(f"{store.shown} holds no array of teacher {teacher!r}; `rsmtdf cache info` lists them")
    selection = select(store, source, tiles, () if teacher is None else (f"{teacher}/*o0/*",))
    return draw_panel(path, selection, _maps(selection, False, ignore_events), ("pca",))


def _maps(selection: Selection, clickable: bool, on_event: EventSink) -> list[Maps]:
    on_event(ProgressStart("preview", "drawing", len(selection.arrays), unit="arrays"))
    budget = PAGE_NBYTES // len(selection.arrays) if clickable else None
    maps = []
    for array in selection.arrays:
        maps.append(make_maps(selection, array, budget))
        on_event(Progress("preview", 1))
    on_event(ProgressEnd("preview"))
    return maps
