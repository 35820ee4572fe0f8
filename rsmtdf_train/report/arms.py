"""Runs that differ in the seed alone are one arm. What arms are called, in which keys they differ, their pairs."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_train.experiment.compare import Difference, paired_difference
from rsmtdf_train.report.runs import RunRecord

__all__ = ["Arm", "Statistic", "choose_baseline", "difference", "group_runs", "short"]

#: The content of the store decides a run as its recipe does.
_STORE = "store snapshot"

_ABSENT = object()


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe and store, by seed.

    ``name``: what tells it from the other arms, for tables and legends. ``says``: key → value for every recipe key in
    which the arms of the report differ, as text.
    """

    name: str
    says: Mapping[str, str]
    runs: tuple[RunRecord, ...]

    @property
    def complete(self) -> tuple[RunRecord, ...]:
        """Return the runs that have scores."""
        return tuple(run for run in self.runs if run.complete)

    def mious(self, kind: str) -> dict[int, float]:
        """Return seed → mean IoU in 0..1 of a checkpoint kind, for the runs that have it."""
        return {run.seed: v for run in self.runs if (v := run.miou(kind)) is not None}

    def ious(self, kind: str, name: str) -> dict[int, float]:
        """Return seed → IoU in 0..1 of class ``name``, for the runs that have it."""
        return {run.seed: v for run in self.runs if (v := run.iou(kind, name)) is not None}


@dataclass(frozen=True)
class Statistic:
    """Mean over seeds; ``sd`` is None for one seed."""

    mean: float
    sd: float | None
    count: int

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Statistic | None:
        """Return the statistic of seed → value, None for no value."""
        if not values:
            return None
        numbers = list(values.values())
        return cls(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None, len(numbers))


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Return the paired difference over the seeds that both have, None when they share none."""
    seeds = sorted(values.keys() & baseline.keys())
    return paired_difference([values[s] for s in seeds], [baseline[s] for s in seeds]) if seeds else None


def group_runs(runs: Sequence[RunRecord]) -> list[Arm]:
    """Return the arms in the order of their first runs.

    Two runs of one recipe, store and seed are repetitions: the second one begins an arm of its own, ``NAME (2)``,
    because pairs are found by seed.
    """
    grouped: dict[tuple[str, int], list[RunRecord]] = {}
    trees: dict[tuple[str, int], dict[str, Any]] = {}
    for run in runs:
        tree = {k: v for k, v in run.recipe.items() if k not in ("name", "seed")} | {_STORE: run.snapshot}
        text = json.dumps(tree, sort_keys=True)
        again = next(n for n in itertools.count(1) if run.seed not in {r.seed for r in grouped.get((text, n), ())})
        grouped.setdefault((text, again), []).append(run)
        trees[text, again] = tree
    keys = list(grouped)
    differing = dict(_differing([trees[k] for k in keys]))
    says = [{name: values[i] for name, values in differing.items()} for i in range(len(keys))]
    names = _names([grouped[k] for k in keys], says)
    return [
        Arm(name + (f" ({key[1]})" if key[1] > 1 else ""), said, tuple(sorted(grouped[key], key=lambda r: r.seed)))
        for key, name, said in zip(keys, names, says, strict=True)
    ]


def choose_baseline(arms: Sequence[Arm], asked: str | None) -> Arm:
    """Return the arm called ``asked``, or that of the run folder or run name ``asked``.

    By default FixMatch without teachers, else the first arm without teachers, else the first. Raises ``UsageError``.
    """
    if asked is None:
        plain = [arm for arm in arms if arm.runs[0].mode == "none"]
        return next((arm for arm in plain if arm.runs[0].recipe["method"] == "fixmatch"), (plain or list(arms))[0])
    folder = Path(asked).resolve()
    for fits in (
        lambda arm: arm.name == asked,
        lambda arm: any(run.folder.resolve() == folder for run in arm.runs),
        lambda arm: any(asked in (run.label, run.folder.name) for run in arm.runs),
        lambda arm: any(asked == run.name for run in arm.runs),
    ):
        fitting = [arm for arm in arms if fits(arm)]
        if len(fitting) == 1:
            return fitting[0]
    names = [arm.name for arm in arms]
    raise UsageError(
        f"--baseline {asked!r}: names no arm, or several.{did_you_mean(asked, names)} Give an arm ({', '.join(names)}) "
        "or the folder of one of its runs"
    )


def _names(groups: Sequence[Sequence[RunRecord]], says: Sequence[Mapping[str, str]]) -> list[str]:
    """Return one name for each group: its recipe's name if no other group has it, else the fewest keys that tell."""
    own = [{run.name for run in group} for group in groups]
    if len({n for names in own for n in names}) == len(groups) and all(len(names) == 1 for names in own):
        return [next(iter(names)) for names in own]
    keys = list(says[0])
    told = len({tuple(s.items()) for s in says})
    for count in range(1, len(keys) + 1):
        for chosen in itertools.islice(itertools.combinations(keys, count), 5000):
            texts = [", ".join(f"{key} {said[key]}" for key in chosen) for said in says]
            if len(set(texts)) == told:
                return texts
    return [sorted(names)[0] for names in own]  # repetitions of one recipe


def _differing(trees: Sequence[Mapping[str, Any]], above: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield (key, its value in each of ``trees`` as text) for the keys in which they are not all equal.

    A section that only some have is ``on`` or ``off``; what is in it counts among those that have it.
    """
    for key in dict.fromkeys(k for tree in trees for k in tree):
        values = [tree.get(key, _ABSENT) for tree in trees]
        if all(v == values[0] for v in values):
            continue
        name = f"{above}.{key}" if above else key
        inside = [v for v in values if isinstance(v, Mapping)]
        if len(inside) < len(values):
            yield name, [_short(v, inside) for v in values]
        if inside:
            below = dict(_differing(inside, name))
            for sub, texts in below.items():
                there = iter(texts)
                yield sub, [next(there) if isinstance(v, Mapping) else "–" for v in values]


def _short(value: object, sections: Sequence[object]) -> str:
    if isinstance(value, Mapping):
        return "on"
    if value is None and sections:
        return "off"
    return short(value)


def short(value: object) -> str:
    """Return a recipe's value as text for tables."""
    if value is _ABSENT:
        return "–"
    if value is None:
        return "none"
    if isinstance(value, str):
        return value[:12] if len(value) == 64 and value.isalnum() else value  # a digest
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(short(v) for v in value) or "none"
    return json.dumps(value)
