"""Previews as a PNG: tiles beside the maps of every array.

Shape legend: N tiles, H W tile pixels, h w tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.preview.maps import Maps
from rsmtdf_cache.preview.norms import ramp
from rsmtdf_cache.preview.pca import pca_colors
from rsmtdf_cache.preview.selection import Selection

__all__ = ["PICTURES", "draw_panel", "draw_pca"]

#: What can be drawn of an array, in this order.
PICTURES = ("pca", "norm", "cosine")

_CELL = 1.45  # inches
_GAP = 0.05
_DPI = 110
_CROSS = {"color": "white", "marker": "+", "markersize": 9, "markeredgewidth": 2.4}


def draw_panel(path: Path, selection: Selection, maps: Sequence[Maps], pictures: Sequence[str] = PICTURES) -> Path:
    """Write a PNG with a block per tile: its image, and for every array a column of ``pictures``; return ``path``.

    Tokens are squares of their true size around their centres, not smoothed. A cross marks the patch that cosines are
    taken to.
    """
    count, kinds = len(selection.tiles), len(pictures)
    side = max(kinds, 1.4) if kinds > 1 else 1.0  # the image, in cells
    left, top, bottom = 0.35, 0.85, 0.3
    wide = left + _CELL * side + sum(_CELL + _GAP for _ in maps) + 0.15
    block = kinds * (_CELL + _GAP) + (2 * _GAP if kinds > 1 else 0)
    high = top + count * block + bottom
    figure = Figure(figsize=(wide, high), dpi=_DPI)
    FigureCanvasAgg(figure)

    def place(x: float, y: float, size: float) -> Axes:
        """Add a square whose corner is ``x`` inches from the left and ``y`` from the top."""
        return _bare(figure.add_axes((x / wide, 1 - (y + size) / high, size / wide, size / high)))

    tile_px = selection.store.tile_px
    for n, tile in enumerate(selection.tiles):
        y = top + n * block
        axis = place(left, y, _CELL * side)
        axis.set_ylabel(_short(tile.id), fontsize=8, parse_math=False)
        if tile.image is None:
            axis.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=8, transform=axis.transAxes)
        else:
            axis.imshow(tile.image, extent=(0, tile_px, tile_px, 0))
        _frame(axis, tile_px)
        if n == selection.patch_tile and "cosine" in pictures:
            _mark(axis, selection.patch[1], selection.patch[2])
        for column, found in enumerate(maps):
            x = left + _CELL * side + _GAP + column * (_CELL + _GAP)
            for row, kind in enumerate(pictures):
                axis = place(x, y + row * (_CELL + _GAP), _CELL)
                axis.imshow(_colors(found, kind, n), interpolation="nearest", extent=_extent(found))
                axis.set_facecolor("0.5")
                _frame(axis, tile_px)
                if kind == "cosine" and n == selection.patch_tile:
                    (i, j), array = found.patch, found.array
                    _mark(axis, array.first_px[0] + array.stride_px * i, array.first_px[1] + array.stride_px * j)
                if column == len(maps) - 1 and kinds > 1:
                    axis.yaxis.set_label_position("right")
                    axis.set_ylabel(kind, fontsize=7, labelpad=2)
                if n == 0 and row == 0:
                    axis.set_title(_title(found, pictures), fontsize=6.5, parse_math=False)
    figure.text(0.1 / wide, 0.1 / high, _legend(selection, pictures), fontsize=6.5, parse_math=False)
    return _save(figure, path)


def draw_pca(
    path: Path,
    images_NHW3: NDArray[np.uint8],
    features: Mapping[str, NDArray[Any]],
    titles: Sequence[str] = (),
) -> Path:
    """Write a PNG with one row per tile (image, then every array of ``features``) and return ``path``.

    ``features``: name → ``[N, h, w, D]`` for the same tiles, one PCA basis each; ``titles``: a name per tile. Tokens
    are drawn as squares that fill the tile, not smoothed. Raises ``UsageError`` without tiles or arrays, or when the
    numbers of tiles differ.
    """
    count = len(images_NHW3)
    if count == 0 or not features:
        raise UsageError(f"a picture of {count} tiles and {len(features)} arrays: choose at least one of each")
    for name, array in features.items():
        if array.ndim != 4 or len(array) != count:
            raise UsageError(f"{name}: expected features [{count}, h, w, D], found shape {list(array.shape)}")
    columns, left, top = 1 + len(features), 0.35 if titles else 0.1, 0.75
    wide, high = left + columns * (_CELL + _GAP) + 0.1, top + count * (_CELL + _GAP) + 0.1
    figure = Figure(figsize=(wide, high), dpi=_DPI)
    FigureCanvasAgg(figure)
    pictures = {"image": images_NHW3, **{name: pca_colors(array) for name, array in features.items()}}
    for column, (name, colors) in enumerate(pictures.items()):
        for row in range(count):
            x, y = left + column * (_CELL + _GAP), top + row * (_CELL + _GAP)
            axis = _bare(figure.add_axes((x / wide, 1 - (y + _CELL) / high, _CELL / wide, _CELL / high)))
            axis.imshow(colors[row], interpolation="nearest" if column else None)
            if column == 0 and titles:
                axis.set_ylabel(_short(titles[row]), fontsize=8, parse_math=False)
            if row == 0:
                size = f"\n{' × '.join(map(str, features[name].shape[1:]))}" if column else ""
                axis.set_title(_in_lines(name) + size, fontsize=7, parse_math=False)
    return _save(figure, path)


def _colors(maps: Maps, kind: str, tile: int) -> NDArray[np.uint8]:
    if kind == "cosine":
        return ramp(maps.cosine[tile], maps.cosine_low, 1.0, "magma")
    colors: NDArray[np.uint8] = (maps.pca if kind == "pca" else maps.norms.colors())[tile]
    return colors


def _extent(maps: Maps) -> tuple[float, float, float, float]:
    """Return left, right, bottom, top of a map in tile pixels."""
    array = maps.array
    (y, x), stride, (height, width) = array.first_px, array.stride_px, array.grid
    return (x - stride / 2, x + stride * (width - 0.5), y + stride * (height - 0.5), y - stride / 2)


def _title(maps: Maps, pictures: Sequence[str]) -> str:
    array = maps.array
    lines = [_in_lines(str(array.key)), " × ".join(map(str, (*array.spec.grid, array.spec.layer.channels)))]
    if "norm" in pictures:
        outliers = f", {maps.norms.outliers} above" if maps.norms.outliers else ""
        lines.append(f"norm {maps.norms.low:.3g} – {maps.norms.high:.3g}{outliers}")
    if "cosine" in pictures:
        lines.append(f"cosine {maps.cosine_low:.2f} – 1")
    return "\n".join(lines)


def _legend(selection: Selection, pictures: Sequence[str]) -> str:
    parts = ["pca: three principal components as red, green, blue; one basis per column"]
    if "norm" in pictures:
        parts.append("norm: length of a token, dark = short, pink = outlier")
    if "cosine" in pictures:
        parts.append("cosine: to the patch under the cross, bright = alike")
    return " · ".join([*parts, f"snapshot {selection.store.snapshot[:16]}"])


def _bare(axis: Axes) -> Axes:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_linewidth(0.5)
    return axis


def _frame(axis: Axes, tile_px: int) -> None:
    """Show the tile, all of it and nothing else, whatever was drawn."""
    axis.set_xlim(0, tile_px)
    axis.set_ylim(tile_px, 0)


def _mark(axis: Axes, y: float, x: float) -> None:
    axis.plot([x], [y], **{**_CROSS, "color": "black", "markersize": 11, "markeredgewidth": 4.4})  # type: ignore[arg-type]
    axis.plot([x], [y], **_CROSS)  # type: ignore[arg-type]


def _short(text: str) -> str:
    """Return ``text`` on one line of bounded length: a store from elsewhere may name its tiles as it likes."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= 40 else line[:39] + "…"


def _in_lines(key: str) -> str:
    """Return ``teacher/view/layer`` on two lines: a column is narrow."""
    teacher, slash, rest = key.partition("/")
    return f"{_short(teacher)}\n{_short(rest.replace('/', '  '))}" if slash else _short(key)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": "rsmtdf"})
    return path
