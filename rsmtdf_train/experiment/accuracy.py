"""The accuracy benchmark: paired arms on one dataset, tiles chosen by `select` against random ones, controls.

What is compared lies in ``arms.py``; how runs are paired and judged in ``compare.py``. Everything is kept in one folder
and continues where it stopped. No arm is chosen by its score: the EMA of the last step is scored (decision 17).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.build import build_store
from rsmtdf_cache.choose.selection import Budget, choose_tiles, write_subset
from rsmtdf_cache.choose.strategies import random_order
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_train.experiment.compare import Comparison, compare_arms, compare_recipes
from rsmtdf_train.recipe import Recipe

__all__ = ["AccuracySet", "CORE_ARMS", "MORE_ARMS", "Scored", "measure_accuracy"]

#: Five arms at the full number of seeds.
CORE_ARMS = ("supervised", "fixmatch", "online", "distilled", "preset")
#: What is worth knowing at fewer seeds: each part of the preset, another strong baseline, two controls.
MORE_ARMS = ("fixmatch", "cached", "privileged", "preset", "random", "shuffled", "unimatch")


@dataclass(frozen=True)
class AccuracySet:
    """A dataset and its recipe. ``labeled``: the subsets to train on; ``without``: classes too rare to score."""

    name: str
    recipe: Recipe
    store_config: dict[str, Any]
    labeled: tuple[str, ...]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """One comparison: ``kind`` core, more or select; ``labeled`` names the subset, or its size for ``select``."""

    set: str
    kind: str
    labeled: str
    comparison: Comparison

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"set": self.set, "kind": self.kind, "labeled": self.labeled, **self.comparison.to_json()}


def measure_accuracy(
    chosen: AccuracySet,
    out: Path,
    *,
    seeds: int = 5,
    more_seeds: int = 3,
    jobs: int = 1,
    device: str | None = None,
    on_event: EventSink = ignore_events,
) -> list[Scored]:
    """Return the comparisons of one set: core arms over ``seeds``, the rest over ``more_seeds``, `select` vs random.

    ``more_seeds`` 0: core arms alone.
    Stores and runs lie in ``out``; what is complete there is read, not run again. Arms with random teachers read a
    second store whose teachers have seeded random weights. Raises what builds and runs raise.
    """
    store = _store(chosen, out / "store", on_event)
    found: list[Scored] = []
    for subset in chosen.labeled:
        recipe = chosen.recipe.model_copy(update={"labeled": subset, "name": f"{chosen.recipe.name}-{subset}"})
        kinds: list[tuple[str, Sequence[str], int]] = [("core", CORE_ARMS, seeds)]
        random_store = None
        if more_seeds:
            kinds.append(("more", MORE_ARMS, more_seeds))
            random_store = _store(chosen, out / "random-store", on_event, random=True)
        for kind, arms, count in kinds:
            comparison = compare_arms(
                recipe,
                out / f"labeled-{subset}",
                store,
                seeds=range(count),
                arms=arms,
                jobs=jobs,
                device=device,
                without=chosen.without,
                on_event=on_event,
                random_store=random_store,
                table=f"{kind}.json",
            )
            found.append(Scored(chosen.name, kind, subset, comparison))
    if more_seeds:
        found.append(_selection(chosen, out, store, more_seeds, jobs, device, on_event))
    return found


def _store(chosen: AccuracySet, folder: Path, on_event: EventSink, random: bool = False) -> Path:
    config = dict(chosen.store_config)
    if random:
        config["teachers"] = [f"{name},pretrained=none,seed=0" for name in config["teachers"]]
    build_store(BuildRequest.of({**config, "data": chosen.recipe.data, "out": folder}), on_event)
    return folder


def _selection(
    chosen: AccuracySet, out: Path, store: Path, seeds: int, jobs: int, device: str | None, on_event: EventSink
) -> Scored:
    """Compare FixMatch on tiles that ``select`` picks with FixMatch on as many random ones.

    The lists of `select` are the same for every seed of training; the random ones are drawn anew for each.
    """
    source = open_source(chosen.recipe.data)
    opened = FeatureStore.open(store)
    size = len(source.split(chosen.labeled[0]))
    train = sorted(tile.id for tile in source.tiles(["train"]))
    base = chosen.recipe.without_distillation()
    lists: dict[str, list[str]] = {}
    for strategy in ("typical", "k-center"):
        picked = choose_tiles(opened, Budget.parse(str(size)), strategy, source=source, on_event=on_event)
        name = f"select-{strategy}-{size}"
        write_subset(source, name, [tile.id for tile in picked.tiles], force=True)
        lists[strategy] = [name] * seeds
    lists["random"] = []
    for seed in range(seeds):
        name = f"select-random-{size}-{seed}"
        write_subset(source, name, [train[i] for i in random_order(len(train), size, seed=seed)], force=True)
        lists["random"].append(name)
    comparison = compare_recipes(
        {
            arm: [base.model_copy(update={"labeled": name, "name": f"{base.name}-{arm}"}) for name in names]
            for arm, names in lists.items()
        },
        {"typical": "select --strategy typical", "k-center": "select --strategy k-center", "random": "random tiles"},
        out / "select",
        dict.fromkeys(lists, store),
        seeds=range(seeds),
        baseline="random",
        jobs=jobs,
        device=device,
        without=chosen.without,
        on_event=on_event,
    )
    return Scored(chosen.name, "select", str(size), comparison)
