"""The loop: open what a run needs, step, log, save, score. A run that stops anywhere continues to the same bits."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rsmtdf_cache.errors import DataError, Interrupted, MismatchError, RsmtdfError, UsageError
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.files import replace_file
from rsmtdf_cache.sources import TileSource, open_source
from rsmtdf_train.checkpoint import (
    CHECKPOINT_KINDS,
    RunFolder,
    RunIdentity,
    load_checkpoint,
    save_checkpoint,
    save_deployed,
)
from rsmtdf_train.evaluate import evaluate
from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.logs import LogWriter, StepLogged
from rsmtdf_train.metrics import Scores
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.state import TrainState, build_state
from rsmtdf_train.step import batch_to, train_step
from rsmtdf_train.targets import check_pins

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = ["Run", "RunResult", "TrainSink", "pick_device", "scores_to_json", "train"]

TrainSink = Callable[[Event | StepLogged], None]


@dataclass(frozen=True)
class RunResult:
    """A complete run. ``resumed_at`` is the step it continued from; ``steps`` there means nothing was left to do."""

    out: Path
    steps: int
    resumed_at: int
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """All that stays the same while a run goes on."""

    identity: RunIdentity
    folder: RunFolder
    source: TileSource
    loader: BatchLoader
    device: torch.device


class _StoreGone(Exception):
    """The store, or what the run reads of it, cannot be had: no matter to a run that is complete."""

    def __init__(self, address: Path | str, error: RsmtdfError) -> None:
        super().__init__(str(error))
        self.address = address
        self.error = error


def pick_device(name: str | None) -> torch.device:
    """Return the device called ``name``; by default the first GPU, else the CPU. Raises ``UsageError``."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: cannot be used here ({reason}); leave it out or use cpu") from None
    return device


def train(
    recipe: Recipe,
    out: Path,
    store_path: Path | str | None = None,
    *,
    pin: bool = False,
    device: str | None = None,
    on_event: TrainSink = lambda event: None,
    threads: int = 1,
    tensorboard: bool = True,
) -> RunResult:
    """Train ``recipe`` into the run folder ``out`` and score it on ``recipe.eval_split``; return the result.

    A run that is there already continues; a complete one is returned as it is, also when its store is gone.
    ``store_path``: folder or URL of the store of cached targets, with ``@SNAPSHOT`` or without; given without
    distillation it still decides the geometry of the crops, so that arms are paired. A run that continues reads the
    snapshot it began with. ``pin``: keep that snapshot from being collected as long as the pin in the store, owned by
    the run's folder, is there.
    Raises ``UsageError`` (recipe, or targets without a store), ``MismatchError`` (another run, store or dataset),
    ``DataError`` (dataset, damaged checkpoint), ``Interrupted`` after a signal. A loss that is not finite is a
    ``UsageError`` of the recipe.
    """
    if pin and (store_path is None or "://" in str(store_path)):
        raise UsageError(
            f"--pin writes into the store, which must be a local folder; --use-cache is {_shown(store_path)}"
        )
    try:
        run, store = _open(recipe, out, store_path, device, threads)
    except _StoreGone as gone:
        metrics = None if pin else _complete_without_store(recipe, RunFolder(out), gone.address)
        if metrics is None:
            raise gone.error from None
        return RunResult(out, recipe.total_steps, recipe.total_steps, metrics)
    if left_out := run.loader.dataset.left_out:
        on_event(Warned(f"{len(left_out)} tiles that the store's build could not use are left out of training"))
    if run.loader.targets is not None and run.loader.targets.approximated:
        on_event(Warned(_approximations(run.loader.targets.approximated)))
    state = build_state(recipe, len(run.identity.classes), run.identity.targets, run.device)
    _check_geometry(recipe, state)
    load_checkpoint(run.folder, run.identity, state)
    resumed_at = state.step
    complete = state.step == recipe.total_steps and run.folder.metrics.is_file()
    if not complete:
        replace_file(run.folder.recipe, recipe.to_yaml().encode())  # first: a folder with a recipe is a run
    if store is not None and store_path is not None:
        _record_store(run, store, store_path, pin, on_event)
    if complete:
        return RunResult(out, recipe.total_steps, resumed_at, json.loads(run.folder.metrics.read_text()))
    for folder in (run.folder.checkpoints, run.folder.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    if state.step < recipe.total_steps:
        _steps(run, state, on_event, tensorboard)
    models = {"student": state.student.eval(), "ema": state.ema}
    for kind in CHECKPOINT_KINDS:
        save_deployed(run.folder.deployed(kind), models[kind], run.identity, kind, state.step)
    scores = evaluate({k: models[k] for k in CHECKPOINT_KINDS}, run.source, recipe.eval_split, run.device, on_event)
    metrics = scores_to_json(run.identity, recipe.eval_split, scores, state.step)
    replace_file(run.folder.metrics, (json.dumps(metrics, indent=1) + "\n").encode())
    return RunResult(out, recipe.total_steps, resumed_at, metrics)


def scores_to_json(identity: RunIdentity, split: str, scores: dict[str, Scores], step: int) -> dict[str, Any]:
    """Return what ``metrics.json`` holds: what was scored, on what, and the scores by checkpoint kind.

    ``checkpoint`` and ``miou`` at the top name the deployed choice, the EMA; ``scores`` has both kinds.
    """
    recipe = identity.recipe
    return {
        "name": recipe.name,
        "data": str(recipe.data),
        "split": split,
        "labeled": recipe.labeled,
        "seed": recipe.seed,
        "step": step,
        "method": recipe.method,
        "targets": {
            "mode": recipe.targets,
            "keys": [t.key for t in identity.targets],
            **({"approximate_orientations": True} if recipe.augment.approximate_orientations else {}),
        },
        "fused": recipe.fuse is not None,
        "store": identity.snapshot,
        "checkpoint": "ema",
        "miou": scores["ema"].miou if "ema" in scores else None,
        "classes": [c.name for c in identity.classes],
        "scores": {kind: {"checkpoint": kind, **s.to_json()} for kind, s in scores.items()},
    }


def _approximations(approximated: Mapping[str, tuple[int, ...]]) -> str:
    lines = (f"{key} in orientations {', '.join(map(str, frames))}" for key, frames in approximated.items())
    return f"approximate_orientations: these features are not stored, turned ones stand for them: {'; '.join(lines)}"


def _open(
    recipe: Recipe, out: Path, store_path: Path | str | None, device: str | None, threads: int
) -> tuple[Run, FeatureStore | None]:
    folder = RunFolder(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not folder.recipe.is_file():
        raise MismatchError(f"--out {out}: holds something that is no run; give an empty or new folder")
    chosen = pick_device(device)
    source = open_source(recipe.data)
    source.check([recipe.labeled, recipe.eval_split])
    store: FeatureStore | None = None
    if store_path is not None:
        from rsmtdf_train.run_store import open_run_store

        try:
            store = open_run_store(store_path, out)
        except RsmtdfError as error:
            raise _StoreGone(store_path, error) from error
        if recipe.distill is not None:
            check_pins(store, recipe.distill.pins)
    loader = BatchLoader.open(source, recipe, store, threads)
    shapes = () if loader.targets is None else tuple(
        TargetShape(key, t.channels, float(t.stride_px), float(t.offset_px)) for key, t in loader.targets.specs.items()
    )  # fmt: skip
    identity = RunIdentity(
        recipe, store.snapshot if store is not None else None, source.classes, source.ignore_index, shapes
    )
    if folder.recipe.is_file() and not folder.last.is_file():  # stopped before its first checkpoint
        there = RunIdentity(folder.load_recipe(), identity.snapshot, source.classes, source.ignore_index, shapes)
        identity.require_same(there, out)
    return Run(identity, folder, source, loader, chosen), store


def _complete_without_store(recipe: Recipe, folder: RunFolder, address: Path | str) -> dict[str, Any] | None:
    """Return the metrics of the run in ``folder`` if it is complete and was made of ``recipe`` and this store."""
    from rsmtdf_train.run_store import names_recorded, read_run_store

    try:
        recorded = read_run_store(folder.root)
        if recorded is None or not names_recorded(address, recorded) or folder.load_recipe() != recipe:
            return None
        metrics: dict[str, Any] = json.loads(folder.metrics.read_text())
        same = (metrics["store"], metrics["step"]) == (recorded.snapshot, recipe.total_steps)
    except (OSError, ValueError, KeyError, TypeError, UsageError, DataError):
        return None
    return metrics if same else None


def _shown(address: Path | str | None) -> str:
    if address is None:
        return "not given"
    from rsmtdf_cache.share.address import redact

    return redact(str(address))


def _record_store(run: Run, store: FeatureStore, address: Path | str, pin: bool, on_event: TrainSink) -> None:
    """Write down which content the run reads: in its folder, in the catalogue and, with ``pin``, in the store."""
    from rsmtdf_cache.share.catalogue import register_run
    from rsmtdf_train.run_store import store_place, write_run_store

    place = store_place(address)
    if pin:
        from rsmtdf_cache.upkeep.pins import pin_snapshot

        pin_snapshot(Path(place), store.snapshot, owner=str(run.folder.root.resolve()))
    write_run_store(run.folder.root, place, store)
    register_run(run.folder.root, place, store.snapshot, run.identity.recipe.name, on_event)


def _check_geometry(recipe: Recipe, state: TrainState) -> None:
    multiple = state.student.student.multiple_px
    if recipe.crop_px % multiple:
        raise UsageError(
            f"crop_px {recipe.crop_px}: the student {recipe.student.encoder!r} reads multiples of {multiple} px; "
            f"choose crop_px {recipe.crop_px // multiple * multiple or multiple} or another student"
        )


def _steps(run: Run, state: TrainState, on_event: TrainSink, tensorboard: bool) -> None:
    """Run the steps that are left; the last one is followed by a checkpoint."""
    recipe = run.identity.recipe
    state.student.train()
    with (
        _signals() as stopped,
        LogWriter(run.folder, recipe.total_steps, state.step, run.device, on_event, tensorboard) as log,
        contextlib.closing(run.loader.iterate(state.step, recipe.total_steps)) as batches,
    ):
        started = time.perf_counter()
        for batch in batches:
            logs = train_step(
                state, batch_to(batch, run.device), recipe, run.identity.ignore_index, run.loader.offsets_px
            )
            now = time.perf_counter()
            log.add(state.step - 1, logs, now - started)
            started = now
            stop = bool(stopped)
            if stop or state.step % recipe.checkpoint_every == 0 or state.step == recipe.total_steps:
                log.flush()  # raises for a loss that is not finite: such a state is never saved
                save_checkpoint(run.folder, run.identity, state)
            if stop and state.step < recipe.total_steps:
                raise Interrupted(
                    f"{stopped[0]} after step {state.step} of {recipe.total_steps}; the checkpoint is in "
                    f"{run.folder.last}, the same command continues"
                )


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect the names of SIGINT and SIGTERM instead of dying; the second one acts as before."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
