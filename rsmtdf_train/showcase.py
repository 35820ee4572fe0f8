"""Pictures of a comparison: what every arm makes of the same tiles, and how their losses fell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.devices import pick_device
from rsmtdf_train.experiment.compare import Comparison
from rsmtdf_train.pictures import PanelRow, draw_curves, draw_panel
from rsmtdf_train.predict import predict_mask

__all__ = ["choose_tiles", "picture_arms"]

_VISIBLE = 0.03  # a class on fewer of a tile's pixels is not counted as shown


def picture_arms(comparison: Comparison, source: TileSource, folder: Path, tiles: int = 6) -> list[Path]:
    """Write ``predictions.png`` (first seed) and ``losses.png`` (all seeds) to ``folder``; return their paths."""
    runs = {row.title: row.runs for row in comparison.rows}
    panel = _panel(
        source, comparison, {title: paths[0] for title, paths in runs.items()}, folder / "predictions.png", tiles
    )
    logs = {title: [RunFolder(path).log for path in paths] for title, paths in runs.items()}
    seeds = ", ".join(map(str, comparison.seeds))
    curves = draw_curves(folder / "losses.png", logs, f"{source.name}: losses, seed {seeds}")
    return [panel, curves]


def _panel(source: TileSource, comparison: Comparison, runs: Mapping[str, Path], path: Path, tiles: int) -> Path:
    device = pick_device(None)
    chosen = choose_tiles(source, comparison.split, tiles)
    images = {tile.id: source.read_image(tile) for tile in chosen}
    masks: dict[str, dict[str, np.ndarray]] = {tile.id: {} for tile in chosen}
    for title, run in runs.items():
        model, _ = load_deployed(RunFolder(run), comparison.checkpoint, device)
        for tile in chosen:
            masks[tile.id][title] = predict_mask(model, images[tile.id], device)
    rows = [PanelRow(tile.id, images[tile.id], source.read_mask(tile), masks[tile.id]) for tile in chosen]
    title = f"{source.name}: {comparison.split} tiles, seed {comparison.seeds[0]}, checkpoint {comparison.checkpoint}"
    return draw_panel(path, rows, source.classes, title)


def choose_tiles(source: TileSource, split: str, count: int) -> list[Tile]:
    """Return ``count`` tiles of ``split`` that show its classes, chosen by labels alone: never by how well they do.

    One after the other the tile that adds most classes to those shown; ties: more classes in it, then the id. Raises
    ``DataError`` when no tile has a mask.
    """
    seen_in = {}
    for tile in source.tiles([split]):
        if tile.mask is not None:
            values, counts = np.unique(source.read_mask(tile), return_counts=True)
            large = values[(counts >= _VISIBLE * source.tile_px**2) & (values < len(source.classes))]
            seen_in[tile.id] = (tile, frozenset(large.tolist()))
    if not seen_in:
        raise DataError(f"{source.root}: no tile of split {split!r} has a mask to compare predictions with")
    chosen: list[Tile] = []
    shown: set[int] = set()
    while seen_in and len(chosen) < count:
        best = min(seen_in, key=lambda i: (-len(seen_in[i][1] - shown), -len(seen_in[i][1]), i))
        tile, classes = seen_in.pop(best)
        chosen.append(tile)
        shown |= classes
        if len(shown) == len(source.classes):
            shown = set()  # all are shown: begin another round
    return chosen
