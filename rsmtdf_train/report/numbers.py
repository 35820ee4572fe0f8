"""What a report says in numbers: means over seeds, paired differences, confusion, speed. Plain values, no HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_train.experiment.compare import Difference
from rsmtdf_train.report.arms import Arm, Statistic, difference
from rsmtdf_train.report.runs import RunRecord

__all__ = ["ArmNumbers", "Numbers", "Speed", "collect"]

#: Steps at the start that the speed leaves out: caches fill, kernels are chosen.
_WARM = 5


@dataclass(frozen=True)
class Speed:
    """Medians over the steps after the first few, then means over runs. None: the logs do not say.

    ``data_wait``: share of the time in 0..1 that steps wait for data. ``hours``: of all logged steps of one run.
    """

    seconds_per_step: float | None
    samples_per_s: float | None
    data_wait: float | None
    gpu_memory_mb: float | None
    hours: float | None


@dataclass(frozen=True)
class ArmNumbers:
    """All that a report says of one arm. ``differences`` (to the baseline, by checkpoint kind) are empty for itself.

    ``classes``: class → statistic of its IoU, ``best``: the classes in which its paired difference to every other arm
    has an interval above 0. ``confusion``: counts ``[C, C]`` (label, prediction) over all seeds.
    """

    arm: Arm
    miou: Mapping[str, Statistic]
    differences: Mapping[str, Difference]
    classes: Mapping[str, Statistic | None]
    class_differences: Mapping[str, Difference]
    best: frozenset[str]
    confusion: NDArray[np.int64] | None
    speed: Speed


@dataclass(frozen=True)
class Numbers:
    """The numbers of a report. ``checkpoint``: the kind that classes, confusion and verdicts are about."""

    arms: tuple[ArmNumbers, ...]
    baseline: Arm
    split: str
    checkpoint: str
    kinds: tuple[str, ...]
    classes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "split": self.split,
            "checkpoint": self.checkpoint,
            "baseline": self.baseline.name,
            "classes": list(self.classes),
            "arms": [_arm_json(a) for a in self.arms],
        }


def collect(arms: Sequence[Arm], baseline: Arm, split: str | None) -> Numbers:
    """Return the numbers of ``arms``.

    Raises ``UsageError`` when runs were scored on several splits and ``split`` names none, or on another than it;
    ``MismatchError`` when their classes or the pixels they were scored on differ.
    """
    complete = [run for arm in arms for run in arm.complete]
    splits = sorted({run.split for run in complete}) or sorted({run.split for arm in arms for run in arm.runs})
    if len(splits) > 1 or (split is not None and complete and splits != [split]):
        asked = f"--split {split}" if split is not None else "one split"
        raise UsageError(f"{asked}: the runs were scored on {', '.join(splits)}; choose one with --split")
    classes = _same_classes(complete)
    _require_same_pixels(complete)
    kinds = tuple(dict.fromkeys(kind for run in complete for kind in run.scores))
    deployed = {run.deployed for run in complete}
    checkpoint = deployed.pop() if len(deployed) == 1 else "ema"
    per_arm = [_numbers_of(arm, arms, baseline, checkpoint, kinds, classes) for arm in arms]
    return Numbers(tuple(per_arm), baseline, split or splits[0], checkpoint, kinds, classes)


def _same_classes(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    if not runs:
        return ()
    for run in runs:
        if run.classes != runs[0].classes:
            raise MismatchError(
                f"{run.folder} segments into {', '.join(run.classes)}, {runs[0].folder} into "
                f"{', '.join(runs[0].classes)}; runs of different classes do not compare, report them apart"
            )
    return runs[0].classes


def _require_same_pixels(runs: Sequence[RunRecord]) -> None:
    """Raise ``MismatchError`` unless all runs were scored on as many pixels of each class: on the same tiles."""
    seen = {run.folder: [c["pixels"] for scores in run.scores.values() for c in scores["classes"]][: len(run.classes)]
            for run in runs}  # fmt: skip
    for run in runs:
        if seen[run.folder] != seen[runs[0].folder]:
            raise MismatchError(
                f"{run.folder} (data {run.recipe['data']}) and {runs[0].folder} (data {runs[0].recipe['data']}) were "
                f"scored on other pixels of split {run.split!r}; report runs of one dataset, or score them anew on one"
            )


def _numbers_of(
    arm: Arm, arms: Sequence[Arm], baseline: Arm, kind: str, kinds: Sequence[str], classes: Sequence[str]
) -> ArmNumbers:
    is_baseline = arm is baseline
    pairs = {} if is_baseline else {k: difference(arm.mious(k), baseline.mious(k)) for k in kinds}
    class_pairs = {} if is_baseline else {c: difference(arm.ious(kind, c), baseline.ious(kind, c)) for c in classes}
    counts = [c for run in arm.complete if (c := run.confusion(kind)) is not None]
    return ArmNumbers(
        arm=arm,
        miou={k: s for k in kinds if (s := Statistic.of(arm.mious(k))) is not None},
        differences={k: d for k, d in pairs.items() if d is not None},
        classes={c: Statistic.of(arm.ious(kind, c)) for c in classes},
        class_differences={c: d for c, d in class_pairs.items() if d is not None},
        best=frozenset(c for c in classes if _beats_all(arm, arms, kind, c)),
        confusion=np.sum(counts, axis=0, dtype=np.int64) if counts else None,
        speed=_speed(arm.runs),
    )


def _beats_all(arm: Arm, arms: Sequence[Arm], kind: str, name: str) -> bool:
    others = [other for other in arms if other is not arm and other.complete]
    found = [difference(arm.ious(kind, name), other.ious(kind, name)) for other in others]
    return bool(found) and all(d is not None and d.verdict == "better" for d in found)


def _speed(runs: Sequence[RunRecord]) -> Speed:
    per_run = [_speed_of(run) for run in runs if run.log]

    def mean(name: str) -> float | None:
        known = [v for speed in per_run if (v := getattr(speed, name)) is not None]
        return sum(known) / len(known) if known else None

    return Speed(*(mean(name) for name in Speed.__dataclass_fields__))


def _speed_of(run: RunRecord) -> Speed:
    def over(name: str, reduce: Any) -> float | None:
        values = run.log.get(name)
        if values is None:
            return None
        later = values[_WARM:] if len(values) > 2 * _WARM else values
        known = later[np.isfinite(later)]
        return float(reduce(known)) if known.size else None

    seconds = over("seconds", np.median)
    samples = over("samples_per_s", np.median)
    if samples is None and seconds:  # logs of before: crops of a step by its time
        batch = run.recipe["batch"]
        crops = batch["labeled"] + (0 if run.recipe["method"] == "supervised" else batch["unlabeled"])
        samples = crops / seconds
    total = run.log.get("seconds")
    return Speed(
        seconds_per_step=seconds,
        samples_per_s=samples,
        data_wait=over("data_wait", np.median),
        gpu_memory_mb=over("gpu_memory_mb", np.max),
        hours=float(np.nansum(total)) / 3600 if total is not None else None,
    )


def _arm_json(numbers: ArmNumbers) -> dict[str, Any]:
    arm = numbers.arm
    return {
        "name": arm.name,
        "keys": dict(arm.says),
        "targets": arm.runs[0].mode,
        "store": arm.runs[0].snapshot,
        "runs": [
            {
                "folder": str(run.folder), "seed": run.seed, "complete": run.complete, "step": run.step,
                "steps": run.steps, "miou": {kind: run.miou(kind) for kind in run.scores},
            }
            for run in arm.runs
        ],
        "miou": {kind: asdict(s) for kind, s in numbers.miou.items()},
        "differences": {kind: _difference_json(d) for kind, d in numbers.differences.items()},
        "iou": {
            name: None if s is None else {
                **asdict(s), "best": name in numbers.best,
                "difference": _difference_json(numbers.class_differences.get(name)),
            }
            for name, s in numbers.classes.items()
        },
        "confusion": None if numbers.confusion is None else numbers.confusion.tolist(),
        "speed": {k: v if v is None or math.isfinite(v) else None for k, v in asdict(numbers.speed).items()},
    }  # fmt: skip


def _difference_json(found: Difference | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "verdict": found.verdict}
