"""Which tile is trained on, and which labels may be used: a function of names and a seed, the same on every machine.

``by-image``: all tiles of a scene are in one split. ``by-tile``: tiles are dealt one by one, as the published counts
are made; then every scene of val and test also has tiles in train. An official validation part is never trained on:
there it is what is halved into val and test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.prepare.benchmark import Scene

__all__ = ["Cell", "PROTOCOLS", "deal", "labeled_subsets", "parse_percents", "scenes_in_several"]

PROTOCOLS = ("by-image", "by-tile")


@dataclass(frozen=True)
class Cell:
    """One tile of a scene: its number (1 = upper left, row by row), and its first row and column in the scene."""

    scene: Scene
    number: int
    top_px: int
    left_px: int

    @property
    def id(self) -> str:
        return f"{self.scene.id}_{self.number}"


def parse_percents(text: str) -> list[str]:
    """Return ``"1,5,10"`` as names of labelled subsets, ascending. Raises ``UsageError``."""
    found: dict[Fraction, str] = {}
    for word in filter(None, (w.strip().removesuffix("%").strip() for w in text.split(","))):
        try:
            percent = Fraction(word)
        except (ValueError, ZeroDivisionError):
            percent = Fraction(0)
        if not 0 < percent <= 100 or "/" in word:
            raise UsageError(
                f"labelled share {word!r} of {text!r}: expected percent above 0, at most 100, as in 1,5,10"
            )
        found[percent] = str(int(percent)) if percent.denominator == 1 else str(float(percent))
    return [found[percent] for percent in sorted(found)]


def deal(cells: Sequence[Cell], protocol: str, seed: int, name: str, official_val: bool) -> dict[str, list[Cell]]:
    """Return the cells of train, val and test, each in the order of ``cells``.

    60 : 20 : 20, or with an official part ``val`` all others to train and that part halved. ``name`` (the benchmark's)
    and ``seed`` decide who goes where. Raises ``DataError`` when there are too few for three splits.
    """
    by_image = protocol == "by-image"
    dealt = [c for c in cells if c.scene.part == "val"] if official_val else cells
    units = _shuffled({c.scene.id if by_image else c.id for c in dealt}, f"{name}/{protocol}/{seed}")
    count, what = len(units), "scenes" if by_image else "tiles"
    if official_val:
        if count < 2:
            raise DataError(f"{name}: {count} {what} in Val; at least 2 are needed to halve it into val and test")
        home = {unit: "val" if i < count // 2 else "test" for i, unit in enumerate(units)}
    else:
        if count < 3:
            raise DataError(f"{name}: {count} {what}; at least 3 are needed for train, val and test")
        n_train, n_val = max(1, (6 * count + 5) // 10), max(1, (2 * count + 5) // 10)
        n_train = min(n_train, count - n_val - 1)
        home = {u: "train" if i < n_train else "val" if i < n_train + n_val else "test" for i, u in enumerate(units)}
    splits: dict[str, list[Cell]] = {"train": [], "val": [], "test": []}
    for cell in cells:
        splits[home.get(cell.scene.id if by_image else cell.id, "train")].append(cell)
    return splits


def labeled_subsets(train: Sequence[Cell], percents: Sequence[str], seed: int, name: str) -> dict[str, list[str]]:
    """Return tile ids of each labelled subset: the same share, rounded down, of every domain, at least one tile each.

    Nested: a subset is the beginning of the next larger one.
    """
    domains: dict[str, list[str]] = {}
    for cell in train:
        domains.setdefault(cell.scene.domain, []).append(cell.id)
    orders = [_shuffled(ids, f"{name}/labeled/{seed}") for _, ids in sorted(domains.items())]
    subsets: dict[str, list[str]] = {}
    chosen: dict[str, None] = {}  # an ordered set
    for percent in percents:
        for order in orders:
            count = max(1, int(len(order) * Fraction(percent) / 100))
            chosen.update(dict.fromkeys(order[:count]))
        subsets[percent] = list(chosen)
    return subsets


def scenes_in_several(splits: Mapping[str, Sequence[Cell]]) -> int:
    """Return how many scenes have tiles in more than one split."""
    homes: dict[str, set[str]] = {}
    for split, cells in splits.items():
        for cell in cells:
            homes.setdefault(cell.scene.id, set()).add(split)
    return sum(len(h) > 1 for h in homes.values())


def _shuffled(ids: Iterable[str], salt: str) -> list[str]:
    return sorted(ids, key=lambda i: (hashlib.sha256(f"{salt}/{i}".encode()).digest(), i))
