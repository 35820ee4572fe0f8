"""What is compared: stores, their arrays by teacher and scale, and the tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.encode import TileReader
from rsmtdf_cache.errors import DataError, MismatchError, UsageError
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile, TeacherSpec, ViewSpec
from rsmtdf_cache.store import FeatureStore

__all__ = ["Family", "Sample", "Target", "choose_tiles", "find_families"]

#: Tiles of a dataset that lacks or changed them are passed over; so many are tried.
_TRIES = 256


@dataclass(frozen=True, eq=False)
class Target:
    """One layer at one scale in one store. ``whole``: its arrays of whole tiles by orientation; ``fixed``: others.

    ``mean``, ``std`` ``[D]``: those of the store that a trainer standardises with. ``scales``: the same layer of the
    same store at the other scales.
    """

    store: int
    opened: FeatureStore
    key: str
    whole: Mapping[int, FeatureSpec]
    fixed: tuple[FeatureSpec, ...]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    scales: list[Target] = field(default_factory=list)

    @property
    def spec(self) -> FeatureSpec:
        """The array of the first stored orientation, or of the first fixed view."""
        return self.whole[min(self.whole)] if self.whole else self.fixed[0]


@dataclass(frozen=True, eq=False)
class Family:
    """All that one teacher says at one scale, in all stores: the live teacher is asked once for all of it."""

    teacher: TeacherSpec
    view: ViewSpec
    targets: tuple[Target, ...]

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(t.spec.layer.name for t in self.targets))

    @property
    def recorded(self) -> NumericsProfile:
        """The numerics that the first of the arrays was encoded in."""
        first = self.targets[0]
        return first.opened.ledger.sets[first.opened.ledger.set_of(first.spec.key)].profile


@dataclass(frozen=True, eq=False)
class Sample:
    """The tiles: ids, their rows in each store ``rows[store][n]``, and their pixels."""

    ids: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    reader: TileReader
    tile_px: int

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, n: int) -> NDArray[np.uint8]:
        """Return tile ``n``: ``[tile_px, tile_px, 3]`` uint8."""
        return self.reader.read(self.rows[0][n])

    def after(self, n: int) -> int:
        """Return the tile that stands for another one than ``n``."""
        return (n + 1) % len(self)


def find_families(stores: Sequence[FeatureStore]) -> list[Family]:
    """Return the arrays of ``stores``, by teacher and from large to small views. Raises ``UsageError``: no arrays."""
    targets = [target for number, store in enumerate(stores) for target in _targets(number, store)]
    if not targets:
        raise UsageError(f"{', '.join(s.shown for s in stores)}: no arrays to compare")
    for target in targets:
        mine = target.spec
        target.scales.extend(
            other for other in targets
            if other is not target and other.store == target.store and other.whole
            and (other.spec.teacher, other.spec.layer.name) == (mine.teacher, mine.layer.name)
        )  # fmt: skip
    families: dict[tuple[TeacherSpec, str], list[Target]] = {}
    for target in targets:
        families.setdefault((target.spec.teacher, target.spec.view.scale), []).append(target)
    found = [
        Family(teacher, ViewSpec(size_px=members[0].spec.view.size_px, orientation=0,
                                 windows=members[0].spec.view.windows), tuple(members))
        for (teacher, _), members in families.items()
    ]  # fmt: skip
    return sorted(found, key=lambda f: (f.teacher.name, f.teacher.weights, -f.view.size_px, f.view.scale))


def _targets(number: int, store: FeatureStore) -> list[Target]:
    whole: dict[str, dict[int, FeatureSpec]] = {}
    fixed: dict[str, list[FeatureSpec]] = {}
    for key in store.keys():
        spec = store.spec(key)
        name = f"{key.teacher}/{spec.view.scale}/{key.layer}"
        if spec.view.is_whole:
            whole.setdefault(name, {})[spec.view.orientation] = spec
        else:
            fixed.setdefault(name, []).append(spec)
    found = []
    for name in sorted({*whole, *fixed}):
        by, others = dict(sorted(whole.get(name, {}).items())), tuple(fixed.get(name, ()))
        first = by[min(by)] if by else others[0]
        found.append(Target(number, store, name, by, others, *store.stats(first.key)))
    return found


def choose_tiles(stores: Sequence[FeatureStore], source: TileSource, tiles: int) -> Sample:
    """Return up to ``tiles`` tiles that all arrays of all ``stores`` have, of smallest content digest.

    Those are the ones that calibrated codecs were kept away from (``calibrate.sample_rows``). Raises ``UsageError``
    when there is none, or stores have tiles of several sizes.
    """
    first = stores[0]
    if len({s.tile_px for s in stores}) > 1:
        sizes = ", ".join(f"{s.shown} {s.tile_px} px" for s in stores)
        raise UsageError(f"stores to compare have tiles of one size, found {sizes}; name one store at a time")
    if tiles < 1:
        raise UsageError(f"--tiles {tiles}: ask for at least one tile (two for CutMix and for the level of chance)")
    held = [np.logical_and.reduce([s.committed(k) for k in s.keys()]) for s in stores]
    reader = TileReader(source, first.tiles)
    ids, rows, changed = [], [], 0
    records = [(r.digest, row, r.id) for row, r in enumerate(first.tiles.records) if r is not None]
    for digest, _, name in sorted(records):
        places = [s.tiles.row_of(name) if name in s.tiles else -1 for s in stores]
        if -1 in places or not all(h[row] for h, row in zip(held, places, strict=True)):
            continue
        if any(s.tiles.record(row).digest != digest for s, row in zip(stores, places, strict=True)):
            continue
        try:
            reader.read(places[0])
        except MismatchError:  # the dataset has no such tile
            continue
        except DataError:  # a tile of the same name with other pixels
            changed += 1
            if changed == _TRIES:
                break
            continue
        ids.append(name)
        rows.append(places)
        if len(ids) == tiles:
            break
    if not ids:
        pixels = f"; {changed} of that name have other pixels" if changed else ""
        raise UsageError(
            f"no tile of {source.root} has features of all arrays of {', '.join(s.shown for s in stores)}{pixels}; "
            "name the dataset that was encoded, and finish the build (`rsmtdf cache build` continues)"
        )
    return Sample(tuple(ids), tuple(zip(*rows, strict=True)), reader, first.tile_px)
