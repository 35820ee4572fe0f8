"""Opening a run: recipe, folder, dataset, store and teachers become one value, or one clear refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rsmtdf_cache.errors import DataError, MismatchError, RsmtdfError, UsageError, did_you_mean
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.sources import TileSource, open_source
from rsmtdf_train.checkpoint import RunFolder, RunIdentity
from rsmtdf_train.devices import pick_device
from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.label_counts import count_labels
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.logs import StepLogged
from rsmtdf_train.losses import SupervisedLoss, class_weights
from rsmtdf_train.pixel_source import PixelSource, stored_pixels
from rsmtdf_train.prepare import StepTools
from rsmtdf_train.processes import Processes
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.residency import Residency, hold_run, small_cache
from rsmtdf_train.state import TrainState
from rsmtdf_train.targets.stored import check_pins

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore
    from rsmtdf_train.targets.drift import Drift

__all__ = [
    "Run",
    "StoreGone",
    "TrainSink",
    "check_student",
    "complete_without_store",
    "open_run",
    "record_store",
    "tell_about",
]

TrainSink = Callable[[Event | StepLogged], None]


@dataclass(frozen=True)
class Run:
    """All that stays the same while a run goes on."""

    identity: RunIdentity
    folder: RunFolder
    source: TileSource
    loader: BatchLoader
    device: torch.device
    tools: StepTools
    processes: Processes
    store: FeatureStore | None = None
    drift: Drift | None = None
    absent: tuple[str, ...] = ()  # classes that no labelled tile shows

    @property
    def recipe(self) -> Recipe:
        return self.identity.recipe


class StoreGone(Exception):
    """The store, or what the run reads of it, cannot be had: no matter to a run that is complete."""

    def __init__(self, address: Path | str, error: RsmtdfError) -> None:
        super().__init__(str(error))
        self.address = address
        self.error = error


def open_run(
    recipe: Recipe,
    out: Path,
    store_path: Path | str | None,
    device: str | None,
    threads: int,
    processes: Processes,
    on_event: TrainSink,
    pixels: PixelSource = "auto",
    residency: Residency = "stream",
) -> Run:
    """Return the run of ``recipe`` in folder ``out``, with its number of steps counted; nothing is written yet.

    Raises ``StoreGone`` when the store cannot be read, and what ``loop.train`` says.
    """
    folder = RunFolder(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; give a folder")
    if folder.is_taken():
        raise MismatchError(f"--out {out}: holds something that is no run; give an empty or new folder")
    if processes.first:
        folder.refuse_held()  # again when it is held; the rest takes a while
    chosen = pick_device(processes.device(device))
    source = open_source(recipe.data)
    store: FeatureStore | None = None
    if store_path is not None:
        from rsmtdf_train.run_store import open_run_store

        try:
            store = open_run_store(store_path, out)
        except RsmtdfError as error:
            raise StoreGone(store_path, error) from error
        if recipe.distill is not None:
            check_pins(store, recipe.distill.pins)
    source.held = stored_pixels(store, pixels)
    scored = [recipe.validation.split] if recipe.validation.every != 0 else []
    source.check([recipe.labeled, recipe.eval_split, *scored])
    recipe = count_steps(recipe, source)
    loader = BatchLoader.open(source, recipe, store, threads, device=chosen, pixels=pixels, on_event=on_event)
    loader.check_parts(processes.count * recipe.batch.accumulate)
    _check_patterns(recipe, loader)
    shapes = () if loader.targets is None else tuple(
        TargetShape(key, t.channels, float(t.stride_px), float(t.offset_px)) for key, t in loader.targets.specs.items()
    )  # fmt: skip
    mode = loader.targets
    live = () if mode is None or mode.live is None else tuple(
        sorted((name, teacher.spec.weights) for name, teacher in mode.live.teachers.items())
    )  # fmt: skip
    identity = RunIdentity(
        recipe, store.snapshot if store is not None else None, source.classes, source.ignore_index, shapes, live,
        source.pixels,
    )  # fmt: skip
    if folder.recipe.is_file() and not folder.last.is_file():  # stopped before its first checkpoint
        identity.require_same(replace(identity, recipe=folder.load_recipe()), out)
    counts = count_labels(source, loader.labeled.tile_ids)
    weights = class_weights(recipe.supervised, counts)
    supervised = SupervisedLoss(recipe.supervised, None if weights is None else weights.to(chosen), source.ignore_index)
    tools = StepTools(supervised, source.ignore_index, loader.offsets_px)
    if mode is not None and mode.live is not None:
        tools = replace(tools, live=mode.live, is_online=mode.is_online)
    hold_run(loader.dataset, residency, on_event, chosen)  # last: all else that can be wrong is told at once
    absent = tuple(c.name for c, n in zip(source.classes, counts.tolist(), strict=True) if n == 0)
    return Run(
        identity, folder, source, loader, chosen, tools, processes, store, _drift(recipe, loader, chosen), absent
    )


def count_steps(recipe: Recipe, source: TileSource) -> Recipe:
    """Return ``recipe`` with the number of steps that its epochs come to on ``source``; see ``Recipe.resolved``."""
    if recipe.epochs is None:
        return recipe
    labeled = set(source.split(recipe.labeled))
    train = {tile.id for tile in source.tiles(["train"])}
    rounds = labeled if recipe.method == "supervised" else train - labeled if recipe.unlabeled == "rest" else train
    return recipe.resolved(len(rounds))


def complete_without_store(recipe: Recipe, folder: RunFolder, address: Path | str) -> dict[str, Any] | None:
    """Return the metrics of the run in ``folder`` if it is complete and was made of ``recipe`` and this store."""
    from rsmtdf_train.run_store import names_recorded, read_run_store

    try:
        recorded = read_run_store(folder.root)
        there = folder.load_recipe()
        if recorded is None or not names_recorded(address, recorded) or not recipe.is_met_by(there):
            return None
        metrics: dict[str, Any] = json.loads(folder.metrics.read_text())
        ended = metrics["step"] == there.steps or bool(metrics.get("stopped_early"))
        same = metrics["store"] == recorded.snapshot and ended
    except (OSError, ValueError, KeyError, TypeError, UsageError, DataError):
        return None
    return metrics if same else None


def record_store(run: Run, store: FeatureStore, address: Path | str, pin: bool, on_event: TrainSink) -> None:
    """Write down which content the run reads: in its folder, in the catalogue and, with ``pin``, in the store."""
    from rsmtdf_cache.share.catalogue import register_run
    from rsmtdf_train.run_store import store_place, write_run_store

    place = store_place(address)
    if pin:
        from rsmtdf_cache.upkeep.pins import pin_snapshot

        pin_snapshot(Path(place), store.snapshot, owner=str(run.folder.root.resolve()))
    write_run_store(run.folder.root, place, store)
    register_run(run.folder.root, place, store.snapshot, run.identity.recipe.name, on_event)


def check_student(recipe: Recipe, state: TrainState) -> None:
    """Raise ``UsageError`` unless the student reads crops of the recipe's side."""
    multiple = state.student.student.multiple_px
    if recipe.crop_px % multiple:
        raise UsageError(
            f"crop_px {recipe.crop_px}: the student {recipe.student.encoder!r} reads multiples of {multiple} px; "
            f"choose crop_px {recipe.crop_px // multiple * multiple or multiple} or another student"
        )


def tell_about(run: Run, on_event: TrainSink) -> None:
    """Warn of what a person should know before the first step."""
    if left_out := run.loader.dataset.left_out:
        on_event(Warned(f"{len(left_out)} tiles that the store's build could not use are left out of training"))
    if run.loader.targets is not None and run.loader.targets.approximated:
        on_event(Warned(_approximations(run.loader.targets.approximated)))
    if (warning := small_cache(run.loader.dataset)) is not None:
        on_event(Warned(warning))
    if run.recipe.eval_split not in ("val", "test"):
        on_event(Warned(f"eval_split {run.recipe.eval_split}: these tiles are trained on; score val or test"))
    distill, steps = run.recipe.distill, run.recipe.total_steps
    if distill is not None and distill.only_steps >= steps:
        on_event(Warned(f"distill.only_steps {distill.only_steps} of {steps} steps: the student never sees a label"))
    if run.recipe.optim.warmup_steps >= steps:
        on_event(Warned(f"optim.warmup_steps {run.recipe.optim.warmup_steps} of {steps} steps: the rate stays low"))
    if run.absent:
        on_event(
            Warned(
                f"no labelled tile shows {', '.join(run.absent)}: these classes cannot be learned and score 0 where "
                f"they occur. Add a tile of each to splits/labeled/{run.recipe.labeled}.txt, or take a larger subset"
            )
        )


def _check_patterns(recipe: Recipe, loader: BatchLoader) -> None:
    """Raise ``UsageError`` for a pattern that matches no target: a typo would train another experiment silently."""
    if recipe.distill is None or loader.targets is None:
        return
    for name, patterns in (("weights", recipe.distill.weights), ("passes", recipe.distill.passes)):
        for pattern in patterns:
            if not any(fnmatchcase(key, pattern) for key in loader.targets.specs):
                raise UsageError(
                    f"distill.{name} {pattern!r} matches no target.{did_you_mean(pattern, loader.targets.specs)} "
                    f"Targets: {', '.join(loader.targets.specs)}"
                )


def _drift(recipe: Recipe, loader: BatchLoader, device: torch.device) -> Drift | None:
    mode = loader.targets
    if recipe.drift_every == 0 or mode is None:
        return None
    from rsmtdf_train.targets.drift import Drift
    from rsmtdf_train.targets.stored import StoredTargets

    stored = mode if isinstance(mode, StoredTargets) else getattr(mode, "cached", None)
    if stored is None:
        raise UsageError(
            "drift_every compares stored features with live teachers, and this run reads none; set it to 0"
        )
    held = mode.live.teachers if mode.live is not None else None
    return Drift(stored, loader.dataset.source, recipe.teachers, device, held, pixels=loader.dataset.pixels)


def _approximations(approximated: Mapping[str, tuple[int, ...]]) -> str:
    lines = (f"{key} in orientations {', '.join(map(str, frames))}" for key, frames in approximated.items())
    return f"approximate_orientations: these features are not stored, turned ones stand for them: {'; '.join(lines)}"
