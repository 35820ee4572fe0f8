"""Scores by part of a split: by domain, by scene, by tile. The parts' confusion counts add up to those of the split.

Shape legend: B batch, C classes, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_cache.sources.scenes import DOMAINS, SCENES, read_domains, read_scenes

__all__ = ["By", "GroupCounts", "Grouping", "group_tiles", "has_domains"]


class By(StrEnum):
    """What tiles are put together by."""

    DOMAIN = "domain"
    SCENE = "scene"
    TILE = "tile"


@dataclass(frozen=True)
class Grouping:
    """``group``: the group of each tile id; ``tiles``: how many tiles a group has, groups in alphabetical order."""

    by: By
    group: Mapping[str, str]
    tiles: Mapping[str, int]


def has_domains(source: TileSource) -> bool:
    """Return whether the dataset says of its tiles from which domain they are."""
    return (source.root / DOMAINS).is_file()


def group_tiles(source: TileSource, tiles: Sequence[Tile], by: By) -> Grouping:
    """Return the groups of ``tiles`` by ``domains.csv``, ``scenes.csv``, or one of each tile.

    Raises ``DataError`` when the dataset lacks that file, or the file one of the tiles.
    """
    if by is By.TILE:
        found = {tile.id: tile.id for tile in tiles}
    else:
        name = DOMAINS if by is By.DOMAIN else SCENES
        known = (
            read_domains(source.root) if by is By.DOMAIN else {i: c.scene for i, c in read_scenes(source.root).items()}
        )
        if not known:
            raise DataError(f"{source.root} has no {name}, so there are no scores by {by}; write one line a tile to it")
        lacking = [tile.id for tile in tiles if tile.id not in known]
        if lacking:
            raise DataError(
                f"{source.root / name}: no line for tile {lacking[0]!r} ({len(lacking)} such tiles of {len(tiles)}); "
                "add them, or score without groups (--by none)"
            )
        found = {tile.id: known[tile.id] for tile in tiles}
    return Grouping(by, found, dict(sorted(Counter(found.values()).items())))


class GroupCounts:
    """Confusion counts ``[groups, C, C]`` (group, label, prediction) of a grouping; exact (int64)."""

    def __init__(self, grouping: Grouping, classes: int, ignore_index: int) -> None:
        self.grouping = grouping
        self.ignore_index = ignore_index
        self.counts = torch.zeros(len(grouping.tiles), classes, classes, dtype=torch.int64)
        self._number = {name: n for n, name in enumerate(grouping.tiles)}

    def add(self, predicted_BHW: Tensor, label_BHW: Tensor, tiles: Sequence[Tile]) -> None:
        """Count class numbers ``predicted`` against ``label`` of ``tiles``; both ``[B, H, W]`` integers."""
        batch, classes = len(tiles), self.counts.shape[1]
        tile = torch.arange(batch, device=label_BHW.device).view(-1, 1, 1)
        places = (tile * classes + label_BHW) * classes + predicted_BHW
        places = torch.where(label_BHW != self.ignore_index, places, batch * classes**2)
        counts = torch.bincount(places.reshape(-1), minlength=batch * classes**2 + 1)[:-1]
        numbers = torch.tensor([self._number[self.grouping.group[t.id]] for t in tiles])
        self.counts.index_add_(0, numbers, counts.view(batch, classes, classes).cpu())
