"""Paired arms: the same data, split, geometry, steps and seeds; one thing differs. Means, differences, intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.files import replace_file
from rsmtdf_train.experiment.arms import ARMS, arm_recipe
from rsmtdf_train.experiment.jobs import TrainingJob, run_jobs
from rsmtdf_train.recipe import Recipe

__all__ = ["ArmRow", "Comparison", "DEFAULT_ARMS", "Difference", "compare_arms", "compare_recipes", "paired_difference"]

#: What is compared unless other arms are named.
DEFAULT_ARMS = ("supervised", "fixmatch", "preset")

#: Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table the last one (wider).
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Mean paired difference with its 95 % interval; no interval for a single pair."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def verdict(self) -> str:
        """Return ``better``, ``worse``, or ``inconclusive`` when the interval holds zero or there is none."""
        if self.low is not None and self.low > 0:
            return "better"
        return "worse" if self.high is not None and self.high < 0 else "inconclusive"


@dataclass(frozen=True)
class ArmRow:
    """Scores of one arm over its seeds, in 0..1. ``sd`` is None for one seed; ``difference`` for the baseline."""

    arm: str
    title: str
    miou: tuple[float, ...]
    mean: float
    sd: float | None
    mean_without: float
    sd_without: float | None
    difference: Difference | None
    difference_without: Difference | None
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class Comparison:
    """The table of an experiment. ``without`` names the classes that ``mean_without`` leaves out."""

    rows: tuple[ArmRow, ...]
    seeds: tuple[int, ...]
    baseline: str
    checkpoint: str
    split: str
    without: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, verdicts included."""
        data = asdict(self)
        for row, plain in zip(self.rows, data["rows"], strict=True):
            plain["runs"] = [str(p) for p in row.runs]
            plain["verdict"] = row.difference.verdict if row.difference else None
        return data


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return mean and 95 % t-interval of ``values[i] - baseline[i]``; pairs share a seed."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    count = len(differences)
    mean = statistics.fmean(differences)
    if count < 2:
        return Difference(mean, None, None, count)
    half = _T95[min(count - 1, len(_T95)) - 1] * statistics.stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


def compare_arms(
    recipe: Recipe,
    out: Path,
    store_path: Path,
    *,
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = DEFAULT_ARMS,
    baseline: str = "fixmatch",
    jobs: int = 1,
    device: str | None = None,
    checkpoint: str = "ema",
    without: Sequence[str] = (),
    context: Mapping[str, object] | None = None,
    on_event: EventSink = ignore_events,
    random_store: Path | None = None,
    table: str = "comparison.json",
) -> Comparison:
    """Train ``arms`` x ``seeds`` of ``recipe``, ``jobs`` at a time, and return their scores on ``recipe.eval_split``.

    Runs lie in ``out/runs/ARM-seedN``; finished ones are kept, stopped ones continue. Every arm reads the geometry of
    ``store_path``, so crops and orientations are paired; arms with random teachers read ``random_store``, built like
    it. ``without``: classes to leave out of a second mean (too rare to score). Writes ``out/table`` with
    ``context`` (machine, date, command). Raises what a run raises.
    """
    stores = {arm: random_store if ARMS[arm].random_teachers else store_path for arm in arms if arm in ARMS}
    lacking = [arm for arm, store in stores.items() if store is None]
    if lacking:
        raise UsageError(f"arm {lacking[0]!r} reads a store of teachers with random weights; give one")
    chosen = {arm: arm_recipe(recipe, arm) for arm in arms}
    result = compare_recipes(
        {arm: [one.model_copy(update={"name": f"{recipe.name}-{arm}"})] * len(seeds) for arm, one in chosen.items()},
        {arm: ARMS[arm].title for arm in arms},
        out,
        {arm: store for arm, store in stores.items() if store is not None},
        seeds=seeds,
        baseline=baseline,
        jobs=jobs,
        device=device,
        checkpoint=checkpoint,
        without=without,
        on_event=on_event,
    )
    document = {"context": dict(context or {}), "recipe": recipe.model_dump(mode="json"), **result.to_json()}
    replace_file(out / table, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return result


def compare_recipes(
    recipes: Mapping[str, Sequence[Recipe]],
    titles: Mapping[str, str],
    out: Path,
    stores: Mapping[str, Path],
    *,
    seeds: Sequence[int],
    baseline: str,
    jobs: int = 1,
    device: str | None = None,
    checkpoint: str = "ema",
    without: Sequence[str] = (),
    on_event: EventSink = ignore_events,
) -> Comparison:
    """Train each arm's recipe for each seed (``recipes[arm][i]`` with ``seeds[i]``), and return their scores.

    All recipes score the same split. See ``compare_arms``.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds {list(seeds)}: give at least one, each once")
    if baseline not in recipes:
        raise UsageError(f"baseline {baseline!r} is not among the arms {', '.join(recipes)}")
    runs = {(arm, seed): out / "runs" / f"{arm}-seed{seed}" for seed in seeds for arm in recipes}
    work = [
        TrainingJob(
            title=f"{titles[arm]}, seed {seed}",
            recipe=recipes[arm][seeds.index(seed)].model_copy(update={"seed": seed}),
            out=folder,
            store=stores[arm],
            device=device,
        )
        for (arm, seed), folder in runs.items()
    ]
    work.sort(key=lambda job: job.recipe.distill is None)  # the longest runs first, so that no process waits at the end
    run_jobs(work, jobs, on_event)
    scores = {key: _read_scores(folder, checkpoint, without) for key, folder in runs.items()}
    base = [scores[baseline, seed] for seed in seeds]
    rows = tuple(
        _row(arm, titles[arm], [scores[arm, seed] for seed in seeds], None if arm == baseline else base,
             tuple(runs[arm, seed] for seed in seeds))
        for arm in recipes
    )  # fmt: skip
    split = next(iter(recipes.values()))[0].eval_split
    return Comparison(rows, tuple(seeds), baseline, checkpoint, split, tuple(without))


def _row(
    arm: str,
    title: str,
    scores: list[tuple[float, float]],
    base: list[tuple[float, float]] | None,
    runs: tuple[Path, ...],
) -> ArmRow:
    everything, reduced = ([s[i] for s in scores] for i in (0, 1))
    return ArmRow(
        arm=arm,
        title=title,
        miou=tuple(everything),
        mean=statistics.fmean(everything),
        sd=statistics.stdev(everything) if len(everything) > 1 else None,
        mean_without=statistics.fmean(reduced),
        sd_without=statistics.stdev(reduced) if len(reduced) > 1 else None,
        difference=paired_difference(everything, [b[0] for b in base]) if base else None,
        difference_without=paired_difference(reduced, [b[1] for b in base]) if base else None,
        runs=runs,
    )


def _read_scores(run: Path, checkpoint: str, without: Sequence[str]) -> tuple[float, float]:
    """Return mIoU of a finished run over all classes, and over those not in ``without``."""
    try:
        classes = json.loads((run / "metrics.json").read_text())["scores"][checkpoint]["classes"]
        values = {c["name"]: float(c["iou"]) for c in classes if c["iou"] is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run}/metrics.json: no scores of checkpoint {checkpoint!r} ({error})") from None
    kept = [v for name, v in values.items() if name not in without]
    if not kept:
        raise DataError(f"{run}/metrics.json: no class is left to score without {', '.join(without) or 'any'}")
    return statistics.fmean(values.values()), statistics.fmean(kept)
