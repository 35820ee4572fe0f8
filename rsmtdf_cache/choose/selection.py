"""``choose_tiles``: the tiles worth labelling, what each stands for, and the list that a recipe names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.choose.clusters import nearest, squared_distances
from rsmtdf_cache.choose.descriptors import Descriptors, describe_tiles, upright_arrays
from rsmtdf_cache.choose.strategies import Order, farthest_first, random_order, typical_first, uncertain_first
from rsmtdf_cache.choose.uncertainty import labelled_tiles, tile_uncertainty
from rsmtdf_cache.errors import DataError, MismatchError, UsageError
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.files import replace_file
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore

__all__ = [
    "Budget",
    "ChosenTile",
    "Coverage",
    "LABEL_FREE",
    "Strategy",
    "TileChoice",
    "candidate_rows",
    "choose_tiles",
    "default_name",
    "order_tiles",
    "subset_path",
    "write_subset",
]

Strategy = Literal["typical", "k-center", "uncertain"]
#: Strategies that need no label.
LABEL_FREE: tuple[Strategy, ...] = ("typical", "k-center")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED = {"train", "val", "test"}
_DRAWS = 20  # random choices that coverage is compared with
_LOOKED_AT = 4096  # tiles that coverage is measured on, at most


@dataclass(frozen=True)
class Budget:
    """A number of tiles, or a share of all of them (``percent``, 0 to 100). One of the two is set."""

    tiles: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the budget written as ``40`` or ``5%``. Raises ``UsageError``."""
        word = text.strip()
        try:
            if word.endswith("%"):
                percent = float(word[:-1])
                if 0 < percent <= 100:
                    return cls(percent=percent)
            elif int(word) > 0:
                return cls(tiles=int(word))
        except ValueError:
            pass
        raise UsageError(f"--budget {text!r}: write a number of tiles, such as 40, or a share of them, such as 5%")

    def count(self, tiles: int) -> int:
        """Return how many of ``tiles`` that are, at least 1. Raises ``UsageError`` when there are not so many."""
        if self.percent is not None:
            return max(1, round(tiles * self.percent / 100))
        assert self.tiles is not None
        if self.tiles > tiles:
            raise UsageError(f"--budget {self.tiles}: there are {tiles} tiles to choose from; ask for fewer")
        return self.tiles

    @property
    def label(self) -> str:
        """``40`` or ``5p``: what stands in the name of a list."""
        return str(self.tiles) if self.percent is None else f"{self.percent:g}p"


@dataclass(frozen=True)
class ChosenTile:
    """A tile of the list.

    ``kept``: labelled already. ``distance``: to the nearest tile before it in the list, None for the first one (1 is
    the root mean square distance of two tiles). ``typicality``: 1 / mean distance to its nearest neighbours. ``group``:
    tiles in its cluster, or nearer to it than to any other of the list (k-center). ``uncertainty``: of a probe that
    learned from the kept tiles, 0..1 (uncertain; None by other strategies). None for a kept tile without features.
    """

    id: str
    kept: bool
    distance: float | None
    typicality: float | None
    group: int | None
    uncertainty: float | None = None


@dataclass(frozen=True)
class Coverage:
    """How far tiles are from the list: mean and largest distance of a tile to its nearest one, here and at random."""

    mean: float
    largest: float
    random_mean: float
    random_mean_sd: float
    random_largest: float


@dataclass(frozen=True)
class TileChoice:
    """The list in the order in which to label; kept tiles stand first. ``ids``, ``vectors``: of all candidates."""

    store: str
    snapshot: str
    strategy: Strategy
    seed: int
    tiles: list[ChosenTile]
    coverage: Coverage
    ids: list[str]
    vectors: NDArray[np.float32]
    kept_variance: float
    arrays: tuple[str, ...]
    without_features: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without the vectors."""
        return {
            "store": self.store, "snapshot": self.snapshot, "strategy": self.strategy, "seed": self.seed,
            "candidates": len(self.ids), "without_features": self.without_features, "arrays": list(self.arrays),
            "components": self.vectors.shape[1], "kept_variance": self.kept_variance,
            "coverage": asdict(self.coverage), "tiles": [asdict(t) for t in self.tiles],
        }  # fmt: skip


def choose_tiles(
    store: FeatureStore,
    budget: Budget,
    strategy: Strategy = "typical",
    source: TileSource | None = None,
    have: Sequence[str] = (),
    seed: int = 0,
    arrays: Sequence[str] = (),
    on_event: EventSink = ignore_events,
) -> TileChoice:
    """Return ``budget`` train tiles of ``store``; no labels are read but, by ``uncertain``, those of ``have``.

    ``source``: its train split is chosen from; None = the split that the store remembers. ``have``: ids that are
    labelled already; they are kept, count as covered, and are part of the budget. ``arrays``: globs of
    ``teacher/view/layer`` (default: all upright arrays of whole tiles). ``seed`` matters to clusters alone:
    ``typical`` and ``uncertain``. Raises ``UsageError`` for a budget or array that cannot be and for ``uncertain``
    without labelled tiles to learn from, ``MismatchError`` when no train tile has features, ``DataError`` for a mask
    that cannot be read, ``ResourceError`` when there are more labelled tiles than memory.
    """
    keys = upright_arrays(store, arrays)
    rows, without = candidate_rows(store, keys, source)
    ids = [store.tiles.ids[row] for row in rows]
    kept = list(dict.fromkeys(have))
    count = budget.count(len(rows))
    place = {tile_id: i for i, tile_id in enumerate(ids)}
    labelled = labelled_tiles(store, source, kept, place) if strategy == "uncertain" else {}
    unknown = [tile_id for tile_id in kept if tile_id not in place]
    if unknown:
        on_event(Warned(
            f"{len(unknown)} of {len(kept)} labelled tiles have no features in {store.shown} (such as {unknown[0]!r}); "
            "they are kept in the list and cover nothing"
        ))  # fmt: skip
    if count <= len(kept):
        raise UsageError(
            f"a budget of {count} of {len(rows)} tiles, and {len(kept)} are labelled already; the budget counts both, "
            f"ask for more than {len(kept)}"
        )
    number = count - len(kept)
    if number > len(rows) - (len(kept) - len(unknown)):
        raise UsageError(f"a budget of {count} tiles: only {len(rows)} train tiles have features; ask for fewer")
    if without:
        on_event(Warned(
            f"{without} train tiles have no features of all chosen arrays in {store.shown} and cannot be chosen; "
            "`rsmtdf cache build` adds tiles"
        ))  # fmt: skip
    found = describe_tiles(store, keys, rows, on_event)
    covered = [place[tile_id] for tile_id in kept if tile_id in place]
    uncertainty = None
    if source is not None and labelled:
        uncertainty = tile_uncertainty(store, keys, rows, source, labelled, on_event)
    order = order_tiles(strategy, found.vectors, number, covered, seed, on_event, uncertainty)
    tiles = _chosen(ids, found, order, kept, covered, place, uncertainty)
    listed = [*covered, *order.chosen]
    return TileChoice(
        store.shown, store.snapshot, strategy, seed, tiles, _coverage(found.vectors, listed, covered, number), ids,
        found.vectors, found.kept, found.arrays, without,
    )  # fmt: skip


def order_tiles(
    strategy: Strategy, points: NDArray[np.float32], number: int, have: Sequence[int] = (), seed: int = 0,
    on_event: EventSink = ignore_events, uncertainty: NDArray[np.float32] | None = None,
) -> Order:  # fmt: skip
    """Return the order of ``strategy``; ``uncertain`` needs the ``uncertainty`` ``[n]`` of all tiles."""
    if strategy == "uncertain":
        if uncertainty is None:
            raise ValueError("the order of `uncertain` needs the uncertainty of all tiles")
        return uncertain_first(points, uncertainty, number, have, seed, on_event)
    if strategy == "typical":
        return typical_first(points, number, have, seed, on_event)
    return farthest_first(points, number, have, on_event)


def candidate_rows(store: FeatureStore, keys: Sequence[FeatureKey], source: TileSource | None) -> tuple[list[int], int]:
    """Return the rows of the train tiles that have features of all ``keys``, by tile id, and how many have not.

    Tiles that the build quarantined are not among either. Raises ``MismatchError`` when none is left.
    """
    table = store.tiles
    if source is None:
        train = [r.id for r in table.records if r is not None and r.split == "train"]
        where = store.shown
    else:
        left_out = store.quarantined
        train = [tile_id for tile_id in source.split("train") if tile_id not in left_out]
        where = str(source.root)
    held = np.logical_and.reduce([store.committed(key) for key in keys])
    rows = [table.row_of(i) for i in sorted(train) if i in table and held[table.row_of(i)]]
    if not rows:
        raise MismatchError(
            f"none of the {len(train)} train tiles of {where} has features of all {len(keys)} arrays in "
            f"{store.shown}; name the dataset that it was built from, or finish its build"
        )
    return rows, len(train) - len(rows)


def default_name(strategy: Strategy, budget: Budget, seed: int = 0) -> str:
    """Return how the list is called unless a person says otherwise: ``typical-5p``, ``k-center-40``, ``typical-5p-s1``.

    The seed is in it where it matters and is not 0.
    """
    return f"{strategy}-{budget.label}" + (f"-s{seed}" if seed and strategy != "k-center" else "")


def subset_path(source: TileSource, name: str) -> Path:
    """Return where the list ``name`` belongs. Raises ``UsageError`` for what cannot be a name."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UsageError(
            f"--name {name!r}: use letters, digits, '_', '.' and '-', at most 64, and none of train, val and test"
        )
    return source.root / "splits" / "labeled" / f"{name}.txt"


def write_subset(source: TileSource, name: str, ids: Sequence[str], force: bool = False) -> Path:
    """Write ``ids``, one a line, as the labelled subset ``name`` of ``source`` and return the file.

    The same list once more is no change. Raises ``UsageError`` when another list is there and ``force`` is not given,
    ``DataError`` when the file there cannot be read.
    """
    path = subset_path(source, name)
    data = "".join(f"{tile_id}\n" for tile_id in ids).encode()
    try:
        there = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if there is not None and there != data and not force:
        raise UsageError(f"{path}: another list is there; give this one another --name, or replace it with --force")
    if there != data:
        replace_file(path, data)
    return path


def _chosen(
    ids: Sequence[str], found: Descriptors, order: Order, kept: Sequence[str], covered: Sequence[int],
    place: dict[str, int], uncertainty: NDArray[np.float32] | None,
) -> list[ChosenTile]:  # fmt: skip
    listed = [*covered, *order.chosen]
    distances = _steps(found.vectors, listed)
    labels = order.clusters
    if labels is None:
        nearest_of, _ = nearest(found.vectors, found.vectors[listed])
        sizes = np.bincount(nearest_of, minlength=len(listed))
        groups = dict(zip(listed, sizes.tolist(), strict=True))
    else:
        sizes = np.bincount(labels)
        groups = {i: int(sizes[labels[i]]) for i in listed}
    about = {
        i: (
            d, float(1 / max(order.neighbours[i], 1e-6)) if np.isfinite(order.neighbours[i]) else None, groups[i],
            None if uncertainty is None else float(uncertainty[i]),
        )
        for i, d in zip(listed, distances, strict=True)
    }  # fmt: skip
    first = [
        ChosenTile(tile_id, True, *(about[place[tile_id]] if tile_id in place else (None, None, None, None)))
        for tile_id in kept
    ]
    return first + [ChosenTile(ids[i], False, *about[i]) for i in order.chosen]


def _steps(points: NDArray[np.float32], listed: Sequence[int]) -> list[float | None]:
    """Return how far each tile of the list is from those before it."""
    those = points[list(listed)]
    later = [float(np.sqrt(squared_distances(those[n : n + 1], those[:n]).min())) for n in range(1, len(those))]
    return [None, *later]


def _coverage(points: NDArray[np.float32], listed: Sequence[int], covered: Sequence[int], number: int) -> Coverage:
    looked = points[:: -(-len(points) // _LOOKED_AT)]

    def reach(positions: Sequence[int]) -> tuple[float, float]:
        distances = np.sqrt(nearest(looked, points[list(positions)])[1])
        return float(distances.mean()), float(distances.max())

    draws = [reach([*covered, *random_order(len(points), number, covered, seed)]) for seed in range(_DRAWS)]
    means = np.array([mean for mean, _ in draws])
    mean, largest = reach(listed)
    return Coverage(
        mean, largest, float(means.mean()), float(means.std(ddof=1)), float(np.mean([most for _, most in draws]))
    )
