"""Who gets which tiles: whole scenes, or square blocks of tiles, so that what is scored does not touch what is learned.

A function of names and a seed, the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.tiling.request import Held

__all__ = ["Dealt", "Window", "deal_windows", "labeled_lists"]

_FEW_SCENES = 5
_BLOCKS = (8, 4, 2, 1)
_ENOUGH_BLOCKS = 20


@dataclass(frozen=True)
class Window:
    """One tile: its id, its scene, its row and column in the grid of tiles, and the share of labelled pixels."""

    id: str
    scene: str
    row: int
    column: int
    row_px: int
    column_px: int
    labeled: float


@dataclass(frozen=True)
class Dealt:
    """The tiles of each split, and what was dealt whole: scenes, or blocks with ``block`` tiles a side."""

    splits: Mapping[str, list[Window]]
    by: str
    block: int | None


def deal_windows(
    windows: Sequence[Window], val: Held, test: Held, by: str | None, block: int | None, seed: int, overlap: bool
) -> Dealt:
    """Return who gets which of ``windows``, in their order.

    By default scenes are dealt where there are five or more, or where tiles overlap, else blocks. Where there are any
    labels, a scene or block without them is never held out. Raises ``DataError`` where there is too little to deal.
    """
    named = _named(windows, val, test)
    rest = [w for w in windows if w.scene not in named]
    shares = {name: held.share for name, held in (("test", test), ("val", val)) if held.share}
    scenes = len({w.scene for w in rest})
    by = by or ("scene" if scenes >= _FEW_SCENES or overlap or not shares else "block")
    if by == "block" and block is None:
        block = next((b for b in _BLOCKS if len({_unit(w, by, b) for w in rest}) >= _ENOUGH_BLOCKS), 1)
    home = _dealt(rest, shares, by, block, seed)
    splits: dict[str, list[Window]] = {"train": [], "val": [], "test": []}
    for window in windows:
        split = named.get(window.scene)
        splits[split or home.get(_unit(window, by, block), "train")].append(window)
    for name, held in (("val", val), ("test", test)):
        if held.patterns and not splits[name]:
            raise DataError(f"--{name} {','.join(held.patterns)}: no tile of a scene of that name is left")
    if not splits["train"]:
        raise DataError("no tile is left to train on; hold out less with --val and --test")
    return Dealt({name: found for name, found in splits.items() if found}, by, block if by == "block" else None)


def labeled_lists(train: Sequence[Window], percents: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Return the ids of each labelled subset: a share of the tiles of train that have labels, at least one, nested."""
    order = sorted((w.id for w in train if w.labeled > 0), key=lambda i: _drawn(f"labeled/{seed}/{i}"))
    return {p: order[: max(1, int(len(order) * Fraction(p) / 100))] for p in percents} if order else {}


def _named(windows: Sequence[Window], val: Held, test: Held) -> dict[str, str]:
    """Return the split of each scene that a pattern names."""
    found: dict[str, str] = {}
    scenes = sorted({w.scene for w in windows})
    for split, held in (("val", val), ("test", test)):
        for pattern in held.patterns:
            matching = [s for s in scenes if fnmatchcase(s, pattern)]
            if not matching:
                shown = ", ".join(scenes[:5]) + (" …" if len(scenes) > 5 else "")
                raise DataError(f"--{split} {pattern}: no scene has such a name; scenes are {shown}")
            for scene in matching:
                if found.setdefault(scene, split) != split:
                    raise DataError(f"scene {scene!r} is asked for as {found[scene]} and as {split}; choose one")
    return found


def _dealt(
    windows: Sequence[Window], shares: Mapping[str, Fraction], by: str, block: int | None, seed: int
) -> dict[tuple[str, int, int], str]:
    """Return the split of each unit that is held out."""
    if not shares:
        return {}
    sizes: dict[tuple[str, int, int], int] = {}
    labels: dict[tuple[str, int, int], float] = {}
    for window in windows:
        unit = _unit(window, by, block)
        sizes[unit] = sizes.get(unit, 0) + 1
        labels[unit] = labels.get(unit, 0.0) + window.labeled
    candidates = [unit for unit in sizes if labels[unit] > 0] or list(sizes)
    if len(candidates) <= len(shares):
        what = "scenes" if by == "scene" else "blocks of tiles"
        raise DataError(
            f"{len(candidates)} {what} with labels cannot be dealt to train, {' and '.join(shares)}; "
            + ("use --split-by block, or " if by == "scene" else "use smaller tiles, or ")
            + "set --val 0 or --test 0"
        )
    total = sum(sizes[unit] for unit in candidates)
    order = sorted(candidates, key=lambda unit: _drawn(f"{seed}/{unit[0]}/{unit[1]}/{unit[2]}"))
    home: dict[tuple[str, int, int], str] = {}
    for n, (name, share) in enumerate(shares.items()):
        count = 0
        keep = len(shares) - n  # at least one for each of the splits that follow, and for train
        while len(order) > keep and (count == 0 or count + sizes[order[0]] / 2 <= share * total):
            unit = order.pop(0)
            home[unit] = name
            count += sizes[unit]
    return home


def _unit(window: Window, by: str, block: int | None) -> tuple[str, int, int]:
    if by == "scene" or block is None:
        return window.scene, 0, 0
    return window.scene, window.row // block, window.column // block


def _drawn(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
