"""The chosen tiles as a contact sheet, beside a map of all tiles: the first two components of their vectors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rsmtdf_cache.choose.selection import TileChoice
from rsmtdf_cache.errors import TileError
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tiles import pixel_digest

__all__ = ["draw_choice"]

_SHOWN = 40  # tiles on the sheet
_NUMBERED = 40  # marks with a number on the map
_CELL = 1.3  # inches
_DPI = 110
_KEPT, _NEW = "tab:blue", "tab:red"


def draw_choice(
    path: Path, choice: TileChoice, store: FeatureStore, source: TileSource | None = None,
    on_event: EventSink = ignore_events,
) -> Path:  # fmt: skip
    """Write a PNG and return ``path``. Numbers are places in the list; blue = labelled already, red = chosen.

    ``source``: where the pixels are; a tile whose pixels are missing, or are not those that its features were made of,
    is left grey, with a warning. At most 40 tiles are shown, the first of the list.
    """
    shown = choice.tiles[:_SHOWN]
    columns = max(3, math.ceil(math.sqrt(len(shown))))
    lines = math.ceil(len(shown) / columns)
    side = max(4.6, lines * (_CELL + 0.3))
    wide, high = columns * (_CELL + 0.08) + side + 0.9, side + 1.2
    figure = Figure(figsize=(wide, high), dpi=_DPI)
    FigureCanvasAgg(figure)
    tiles = {t.id: t for t in source.tiles(["train"])} if source is not None else {}
    for n, tile in enumerate(shown):
        line, column = divmod(n, columns)
        x, y = 0.15 + column * (_CELL + 0.08), 0.75 + line * (_CELL + 0.3)
        axis = figure.add_axes((x / wide, 1 - (y + _CELL) / high, _CELL / wide, _CELL / high))
        axis.set_xticks([])
        axis.set_yticks([])
        color = _KEPT if tile.kept else _NEW
        for spine in axis.spines.values():
            spine.set(color=color, linewidth=1.6)
        axis.set_title(f"{n + 1}  {_short(tile.id)}", fontsize=7, color=color, pad=2, parse_math=False)
        image = _image(store, source, tiles.get(tile.id), on_event)
        if image is None:
            axis.set_facecolor("0.85")
        else:
            axis.imshow(image)
    left = columns * (_CELL + 0.08) + 0.75
    axis = figure.add_axes((left / wide, 0.35 / high, side / wide, side / high))
    places = _two(choice.vectors)
    at = dict(zip(choice.ids, places, strict=True))
    axis.scatter(places[:, 0], places[:, 1], s=9, color="0.7", linewidths=0, rasterized=True, label="train tiles")
    for kept, color, label in ((True, _KEPT, "labelled already"), (False, _NEW, "chosen")):
        marks = np.array([at[t.id] for t in choice.tiles if t.kept is kept and t.id in at]).reshape(-1, 2)
        if len(marks):
            axis.scatter(marks[:, 0], marks[:, 1], s=22, color=color, linewidths=0, label=label, zorder=3)
    for n, tile in enumerate(choice.tiles[:_NUMBERED]):
        if tile.id in at:
            color = _KEPT if tile.kept else _NEW
            axis.annotate(
                str(n + 1), at[tile.id], xytext=(3, 3), textcoords="offset points", fontsize=7, color=color, zorder=4
            )
    axis.set_aspect("equal", "datalim")
    axis.tick_params(labelsize=7)
    axis.set_title("all tiles: two principal components of their features", fontsize=8)
    axis.legend(fontsize=7, loc="best")
    more = f", the first {len(shown)} of them shown" if len(choice.tiles) > len(shown) else ""
    title = f"{choice.strategy}: {len(choice.tiles)} of {len(choice.ids)} tiles{more}"
    figure.text(0.15 / wide, 1 - 0.3 / high, title, fontsize=10, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": "rsmtdf"})
    return path


def _two(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``[n, 2]``: the first two components, zeros where there are fewer."""
    found = np.zeros((len(vectors), 2), np.float32)
    found[:, : min(2, vectors.shape[1])] = vectors[:, :2]
    return found


def _image(
    store: FeatureStore, source: TileSource | None, tile: Tile | None, on_event: EventSink
) -> NDArray[np.uint8] | None:
    if source is None or tile is None:
        return None
    try:
        image = source.read_image(tile)
    except TileError as error:
        on_event(Warned(f"tile {tile.id!r} is drawn without its image: {error.reason}"))
        return None
    if tile.id in store.tiles and pixel_digest(image) != store.tiles.record(store.tiles.row_of(tile.id)).digest:
        on_event(Warned(
            f"tile {tile.id!r} is drawn without its image: its pixels in {source.root} are not those that the features "
            "were made of"
        ))  # fmt: skip
        return None
    return image


def _short(text: str, most: int = 20) -> str:
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= most else line[: most - 1] + "…"
