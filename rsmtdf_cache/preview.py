"""Pictures of stored features: three principal components as red, green and blue, beside the tile.

Shape legend: N tiles, H W tile pixels, h w tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.store import FeatureStore

__all__ = ["draw_pca", "pca_colors", "pca_picture"]

_GREY = 128  # tokens without a value


def pca_colors(features_NhwD: NDArray[Any]) -> NDArray[np.uint8]:
    """Return ``[N, h, w, 3]`` uint8: the first three principal components of all tokens together.

    One basis for all tiles, so that one colour means one thing in all of them. Channels are standardised first: the
    channels of largest variance would otherwise be the picture. Each component is stretched between its 2nd and 98th
    percentile; signs are fixed, so the same features give the same picture. Tokens with a NaN are grey.
    """
    count, height, width, channels = features_NhwD.shape
    tokens = features_NhwD.reshape(-1, channels).astype(np.float64)
    known = np.isfinite(tokens).all(1)
    colors = np.full((len(tokens), 3), _GREY, np.uint8)
    values = tokens[known]
    if len(values) > 1:
        spread = values.std(0)
        values = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
        _, axes = np.linalg.eigh(values.T @ values)
        axes = axes[:, ::-1][:, :3]
        axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
        parts = values @ axes
        low, high = np.percentile(parts, (2, 98), axis=0)
        stretched = (parts - low) / np.where(high > low, high - low, 1.0)
        colors[known, : parts.shape[1]] = np.rint(stretched.clip(0, 1) * 255)
    return colors.reshape(count, height, width, 3)


def pca_picture(
    store: FeatureStore, source: TileSource, path: Path, tiles: int = 6, teacher: str | None = None
) -> Path:
    """Draw every array of ``store`` in its first orientation, beside tiles of ``source``; return ``path``.

    ``tiles``: how many, spread evenly over the tiles that all arrays hold. ``teacher``: only the arrays of this one.
    Raises ``UsageError`` when there is nothing to draw, ``TileError`` for a tile that cannot be read.
    """
    stored = store.keys()
    keys = [k for k in stored if teacher in (None, k.teacher) and store.spec(k).view.orientation == 0]
    if not keys:
        asked = f" of teacher {teacher!r}" if teacher else ""
        raise UsageError(
            f"{store.shown} holds no array{asked} in the tiles' own orientation; `rsmtdf cache info` lists it"
        )
    by_id = {tile.id: tile for tile in source.tiles()}
    held = np.logical_and.reduce([store.committed(k) for k in keys])
    rows = [int(r) for r in np.flatnonzero(held) if store.tiles.ids[r] in by_id]
    if not rows or tiles < 1:
        raise UsageError(
            f"{tiles} tiles of {store.shown}: {len(rows)} tiles have all of its features and are in {source.root}"
        )
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(tiles, len(rows))).astype(int)]
    ids = [store.tiles.ids[r] for r in rows]
    images = np.stack([source.read_image(by_id[i]) for i in ids])
    keys.sort(key=lambda k: (k.teacher, -store.spec(k).view.size_px, -store.spec(k).grid[0], k.layer))
    return draw_pca(path, images, {str(k): store.read(k, rows).values for k in keys}, ids)


def draw_pca(
    path: Path,
    images_NHW3: NDArray[np.uint8],
    features: Mapping[str, NDArray[Any]],
    titles: Sequence[str] = (),
) -> Path:
    """Write a PNG with one row per tile (image, then every array of ``features``) and return ``path``.

    ``features``: name → ``[N, h, w, D]`` for the same tiles, one PCA basis each; ``titles``: a name per tile. Tokens
    are drawn as squares of their true size, not smoothed. Raises ``UsageError`` without tiles or arrays, or when the
    numbers of tiles differ.
    """
    count = len(images_NHW3)
    if count == 0 or not features:
        raise UsageError(f"a picture of {count} tiles and {len(features)} arrays: choose at least one of each")
    for name, array in features.items():
        if array.ndim != 4 or len(array) != count:
            raise UsageError(f"{name}: expected features [{count}, h, w, D], found shape {list(array.shape)}")
    columns = 1 + len(features)
    cell = 2.0  # inches
    left, top = (0.35 if titles else 0.1), 0.75
    figure = Figure(figsize=(left + columns * cell + 0.1, top + count * cell + 0.1), dpi=110)
    FigureCanvasAgg(figure)
    across, down = figure.get_size_inches()
    axes = figure.subplots(count, columns, squeeze=False)
    figure.subplots_adjust(
        left=left / across, right=1 - 0.1 / across, top=1 - top / down, bottom=0.1 / down, wspace=0.04, hspace=0.04
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_linewidth(0.5)
    for row in range(count):
        axes[row, 0].imshow(images_NHW3[row])
        if titles:
            axes[row, 0].set_ylabel(titles[row], fontsize=8)
    axes[0, 0].set_title("image", fontsize=8)
    for column, (name, array) in enumerate(features.items(), start=1):
        colors = pca_colors(array)
        for row in range(count):
            axes[row, column].imshow(colors[row], interpolation="nearest")
        _, height, width, channels = array.shape
        axes[0, column].set_title(f"{_in_lines(name)}\n{height} × {width} × {channels}", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "rsmtdf"})
    return path


def _in_lines(key: str) -> str:
    """Return ``teacher/view/layer`` on two lines: a column is narrow."""
    teacher, slash, rest = key.partition("/")
    return f"{teacher}\n{rest.replace('/', '  ')}" if slash else key
