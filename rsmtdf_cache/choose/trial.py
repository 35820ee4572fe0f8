"""Chosen tiles against random ones, where labels exist: how much a linear probe learns from either.

In each round all arms choose from the same random four fifths of the train tiles, equally many; a probe on the stored
features learns from each choice alone, and all are judged on the same tiles, those that no arm chose. Labels choose
nothing, they only judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.choose.descriptors import describe_tiles, upright_arrays
from rsmtdf_cache.choose.selection import LABEL_FREE, Budget, candidate_rows, order_tiles
from rsmtdf_cache.choose.strategies import random_order
from rsmtdf_cache.errors import DataError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.memory import require_memory
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tune.choice import TileBootstrap
from rsmtdf_cache.tune.maps import grid_of
from rsmtdf_cache.tune.probe import ProbeTask

__all__ = ["ARMS", "Trial", "try_choices"]

ARMS: tuple[str, ...] = ("random", *LABEL_FREE)

_POOL = 0.8
_JUDGED = 200  # tiles a round, at most
_SHOWN_SHARE = 0.01  # of the labelled pixels of a tile: less of a class does not make it seen


@dataclass(frozen=True)
class Trial:
    """Per arm and round: mIoU (0..1) over the classes that the judged tiles show, and how many classes the choice shows
    on at least 1 % of one of its tiles. ``chosen`` (per arm and round), ``judged`` (per round): ids, sorted.
    """

    budget: int
    tiles: int
    rounds: int
    classes: int
    miou: Mapping[str, list[float]]
    seen: Mapping[str, list[int]]
    chosen: Mapping[str, list[list[str]]]
    judged: list[list[str]]

    def to_json(self) -> dict[str, Any]:
        """Return plain data: scores and numbers, without ids."""
        return {
            "budget": self.budget, "tiles": self.tiles, "rounds": self.rounds, "classes": self.classes,
            "miou": dict(self.miou), "seen": dict(self.seen), "judged": [len(ids) for ids in self.judged],
        }  # fmt: skip


def try_choices(
    store: FeatureStore,
    source: TileSource,
    budgets: Sequence[Budget],
    rounds: int = 20,
    arrays: Sequence[str] = (),
    seed: int = 0,
    on_event: EventSink = ignore_events,
) -> list[Trial]:
    """Return a trial for each of ``budgets`` (shares of all train tiles with a mask and features).

    All maps of the chosen ``arrays`` are held in memory. Raises ``DataError`` when too few tiles have labels for the
    largest budget, ``ResourceError`` when the maps do not fit into memory.
    """
    keys = upright_arrays(store, arrays)
    rows, _ = candidate_rows(store, keys, source)
    tiles = {t.id: t for t in source.tiles(["train"]) if t.mask is not None}
    rows = [row for row in rows if store.tiles.ids[row] in tiles]
    pool = round(_POOL * len(rows))
    for budget in budgets:
        if len(rows) < 4 or len(ARMS) * budget.count(len(rows)) > len(rows) - 2 or budget.count(len(rows)) > pool:
            raise DataError(
                f"{source.root}: {len(rows)} train tiles have a mask and features; {len(ARMS)} choices of a budget of "
                f"{budget.label} leave too few to judge by; try a smaller budget"
            )
    _require_memory(store, keys, len(rows))
    masks = np.stack([source.read_mask(tiles[store.tiles.ids[row]]) for row in rows])
    points = describe_tiles(store, keys, rows, on_event).vectors
    scene = _Scene(store, keys, rows, masks, len(source.classes), source.ignore_index)
    on_event(ProgressStart("trial", "linear probes", rounds * len(budgets) * len(ARMS), unit="probes"))
    found = [_trial(scene, points, budget.count(len(rows)), pool, rounds, seed, on_event) for budget in budgets]
    on_event(ProgressEnd("trial"))
    return found


def _trial(
    scene: _Scene, points: NDArray[np.float32], budget: int, pool: int, rounds: int, seed: int, on_event: EventSink
) -> Trial:
    miou: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seen: dict[str, list[int]] = {arm: [] for arm in ARMS}
    listed: dict[str, list[list[str]]] = {arm: [] for arm in ARMS}
    held: list[list[str]] = []
    for number in range(rounds):
        rng = np.random.default_rng([seed, number])
        offered = np.sort(rng.permutation(len(points))[:pool])
        found = {"random": random_order(pool, budget, seed=int(rng.integers(2**31)))}
        found |= {s: order_tiles(s, points[offered], budget, seed=number).chosen for s in LABEL_FREE}
        chosen = {arm: sorted(int(offered[i]) for i in places) for arm, places in found.items()}
        taken = {i for several in chosen.values() for i in several}
        judged = sorted([int(i) for i in rng.permutation(len(points)) if int(i) not in taken][:_JUDGED])
        held.append([scene.ids[i] for i in judged])
        for arm in ARMS:
            miou[arm].append(scene.score(chosen[arm], judged))
            seen[arm].append(int(scene.shown[chosen[arm]].any(0).sum()))
            listed[arm].append([scene.ids[i] for i in chosen[arm]])
            on_event(Progress("trial", 1))
    return Trial(budget, len(points), rounds, int(scene.shown.any(0).sum()), miou, seen, listed, held)


class _Scene:
    """Maps and masks of all tiles, by position."""

    def __init__(
        self, store: FeatureStore, keys: Sequence[FeatureKey], rows: Sequence[int], masks: NDArray[np.uint8],
        classes: int, ignore: int,
    ) -> None:  # fmt: skip
        self.ids = [store.tiles.ids[row] for row in rows]
        self.maps = [store.read(key, rows).values for key in keys]
        self.grids = [grid_of(store.spec(key)) for key in keys]
        self.masks, self.classes, self.ignore = masks, classes, ignore
        counts = np.stack([(masks == c).sum((1, 2)) for c in range(classes)], 1)
        #: ``[n, C]``: whether a tile shows a class.
        self.shown = (counts > 0) & (counts >= _SHOWN_SHARE * counts.sum(1, keepdims=True))

    def score(self, chosen: Sequence[int], judged: Sequence[int]) -> float:
        """Return the mIoU of a probe that learned from ``chosen``."""
        task = ProbeTask(self.masks[chosen], self.masks[judged], self.classes, self.ignore)
        probe = task.fit([task.points(m[chosen], g) for m, g in zip(self.maps, self.grids, strict=True)])
        confusions = task.confusions(probe, [m[judged] for m in self.maps], self.grids)
        return TileBootstrap(len(judged), draws=1).score(confusions).mean


def _require_memory(store: FeatureStore, keys: Sequence[FeatureKey], tiles: int) -> None:
    specs = [store.spec(key) for key in keys]
    need = 3 * tiles * sum(2 * s.grid[0] * s.grid[1] * s.layer.channels for s in specs)  # those judged are copied
    require_memory(need, f"{store.shown}: the maps of {tiles} tiles take", "choose fewer with --array")
