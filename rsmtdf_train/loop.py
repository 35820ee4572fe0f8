"""The loop: step, log, save, validate, score. A run that stops anywhere continues to the same bits (on a GPU: up to
what its own kernels repeat).
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import Interrupted, UsageError
from rsmtdf_cache.events import Warned
from rsmtdf_cache.files import replace_file
from rsmtdf_train.checkpoint import (
    CHECKPOINT_KINDS,
    RunFolder,
    load_checkpoint,
    load_deployed,
    save_checkpoint,
    save_deployed,
)
from rsmtdf_train.evaluate import evaluate
from rsmtdf_train.fused_student import FusedStudent
from rsmtdf_train.launcher import SAME_WISH_S
from rsmtdf_train.logs import LogWriter
from rsmtdf_train.pixel_source import PixelSource
from rsmtdf_train.prepare import Part, part_to
from rsmtdf_train.processes import Processes
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.residency import Residency
from rsmtdf_train.results import scores_to_json
from rsmtdf_train.run import (
    Run,
    StoreGone,
    TrainSink,
    check_student,
    complete_without_store,
    open_run,
    record_store,
    tell_about,
)
from rsmtdf_train.state import Best, TrainState, build_state, require_finite
from rsmtdf_train.step import train_step
from rsmtdf_train.targets.drift import drawn_tiles
from rsmtdf_train.validation import validate
from rsmtdf_train.watch import Watch

__all__ = ["RunResult", "train"]


@dataclass(frozen=True)
class RunResult:
    """A complete run. ``resumed_at`` is the step it continued from; ``steps`` there means nothing was left to do."""

    out: Path
    steps: int
    resumed_at: int
    metrics: dict[str, Any]


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
    pixels: PixelSource = "auto",
    residency: Residency = "stream",
) -> RunResult:
    """Train ``recipe`` into the run folder ``out`` and score it on ``recipe.eval_split``; return the result.

    A run that is there already continues; a complete one is returned as it is, also when its store is gone.
    ``store_path``: folder or URL of the store of cached targets, with ``@SNAPSHOT`` or without; given without
    distillation it still decides the geometry of the crops, so that arms are paired. A run that continues reads the
    snapshot it began with. ``pin``: keep that snapshot from being collected as long as the pin in the store, owned by
    the run's folder, is there. ``pixels``: whether train tiles are read from the store or decoded from images; it is no
    part of the run, for the batches are the same. ``residency``: ``ram`` copies what is read of the store into memory
    first; as little a part of the run. Of several processes (``launcher``, ``torchrun``) all call this; the first one
    writes.
    Raises ``UsageError`` (recipe, or targets without a store), ``MismatchError`` (another run, store or dataset),
    ``DataError`` (dataset, damaged checkpoint), ``ResourceError`` (another process trains it), ``Interrupted`` after a
    signal. A loss that is not finite is a ``UsageError`` of the recipe.
    """
    if pin and (store_path is None or "://" in str(store_path)):
        raise UsageError(
            f"--pin writes into the store, which must be a local folder; --use-cache is {_shown(store_path)}"
        )
    processes = Processes.join(device)
    together = False
    try:
        result = _train(
            recipe, out, store_path, pin, device, on_event, threads, tensorboard, processes, pixels, residency
        )
        together = True
        return result
    except Interrupted:
        together = True
        raise
    finally:
        processes.leave(together)


def _train(
    recipe: Recipe,
    out: Path,
    store_path: Path | str | None,
    pin: bool,
    device: str | None,
    on_event: TrainSink,
    threads: int,
    tensorboard: bool,
    processes: Processes,
    pixels: PixelSource,
    residency: Residency,
) -> RunResult:
    if not processes.first:
        on_event = _silence
    try:
        run = open_run(recipe, out, store_path, device, threads, processes, on_event, pixels, residency)
    except StoreGone as gone:
        metrics = None if pin else complete_without_store(recipe, RunFolder(out), gone.address)
        if metrics is None:
            raise gone.error from None
        return RunResult(out, metrics["step"], metrics["step"], metrics)
    recipe = run.recipe
    tell_about(run, on_event)
    state = build_state(recipe, len(run.identity.classes), run.identity.targets, run.device)
    check_student(recipe, state)
    writes = processes.first and not run.folder.metrics.is_file()
    with run.folder.held() if writes else contextlib.nullcontext():
        return _go_on(run, state, store_path, pin, on_event, tensorboard)


def _go_on(
    run: Run, state: TrainState, store_path: Path | str | None, pin: bool, on_event: TrainSink, tensorboard: bool
) -> RunResult:
    """Train from the last checkpoint, or from the beginning, to the end."""
    recipe, processes, out = run.recipe, run.processes, run.folder.root
    load_checkpoint(run.folder, run.identity, state)
    # Nobody writes before everybody has read, and has read the same: stores grow, network file systems remember.
    processes.require_same(json.dumps([run.identity.to_json(), state.step, state.stopped], sort_keys=True), run.device)
    resumed_at = state.step
    complete = _ended(state, recipe) and run.folder.metrics.is_file()
    if processes.first:
        if not complete:
            replace_file(run.folder.recipe, recipe.to_yaml().encode())  # first: a folder with a recipe is a run
        if run.store is not None and store_path is not None:
            record_store(run, run.store, store_path, pin, on_event)
    if complete:
        return RunResult(out, state.step, resumed_at, json.loads(run.folder.metrics.read_text()))
    if processes.first:
        for folder in (run.folder.checkpoints, run.folder.pictures):
            folder.mkdir(parents=True, exist_ok=True)
    processes.wait()
    if not _ended(state, recipe):
        _steps(_with_probe(run, state, on_event), state, on_event, tensorboard)
    return RunResult(out, state.step, resumed_at, _finish(run, state, on_event))


def _finish(run: Run, state: TrainState, on_event: TrainSink) -> dict[str, Any]:
    """Deploy, score and write ``metrics.json``; return what it says."""
    models: dict[str, FusedStudent] = {"student": state.student.eval(), "ema": state.ema}
    if run.processes.first:
        for kind in CHECKPOINT_KINDS:
            save_deployed(run.folder.deployed(kind), models[kind], run.identity, kind, state.step)
    run.processes.wait()
    chosen = {kind: models[kind] for kind in CHECKPOINT_KINDS}
    if run.recipe.validation.keep == "best":
        chosen["best"] = load_deployed(run.folder, "best", run.device)[0]
    scores = evaluate(chosen, run.source, run.recipe.eval_split, run.device, on_event, processes=run.processes)
    best = None if run.recipe.validation.every == 0 else asdict(state.best)
    metrics = scores_to_json(run.identity, run.recipe.eval_split, scores, state.step, best, state.stopped)
    if run.processes.first:
        replace_file(run.folder.metrics, (json.dumps(metrics, indent=1) + "\n").encode())
    return metrics


def _ended(state: TrainState, recipe: Recipe) -> bool:
    return state.step == recipe.total_steps or state.stopped


def _with_probe(run: Run, state: TrainState, on_event: TrainSink) -> Run:
    """Return ``run`` with its probe trained, if pseudo-labels still need one: a function of recipe, store and data."""
    config = run.recipe.probe
    if config is None or state.step >= config.until * run.recipe.total_steps:
        return run
    from rsmtdf_train.probe import train_probe

    probe = train_probe(
        run.loader, run.recipe, len(run.identity.classes), run.identity.ignore_index, run.device, on_event
    )
    return replace(run, tools=replace(run.tools, probe=probe))


def _steps(run: Run, state: TrainState, on_event: TrainSink, tensorboard: bool) -> None:
    """Run the steps that are left; the last one is followed by a checkpoint."""
    recipe, processes = run.recipe, run.processes
    if recipe.compile:
        for model in (state.student, state.ema):
            model.student.encoder.compile()
            model.student.decoder.compile()
    state.student.train()
    watch = Watch(recipe)
    every = _validation_steps(run)
    parts = [processes.rank * recipe.batch.accumulate + i for i in range(recipe.batch.accumulate)]
    of = processes.count * recipe.batch.accumulate
    with (
        _signals() as stopped,
        LogWriter(
            run.folder, recipe.total_steps, state.step, run.device, on_event, tensorboard, processes.first, watch
        ) as log,
        contextlib.closing(run.loader.iterate(state.step, recipe.total_steps, parts, of)) as batches,
    ):
        started = time.perf_counter()
        for some in batches:
            waited = time.perf_counter() - started
            here: list[Part] = [part_to(batch, run.device, recipe.channels_last) for batch in some]
            logs = train_step(state, here, recipe, run.tools, processes)
            if run.drift is not None and state.step % recipe.drift_every == 0:
                drift = run.drift.measure(drawn_tiles(run.loader, state.step - 1), on_event)
                logs |= {f"drift/{key}": cosine for key, cosine in drift.items()}
            now = time.perf_counter()
            log.add(state.step - 1, logs, now - started, waited, _crops(recipe))
            stop = processes.any(bool(stopped), run.device)
            last = state.step == recipe.total_steps
            if every and (state.step % every == 0 or last):
                log.flush()
                validate(run, state, on_event)
            if stop or last or state.stopped or state.step % recipe.checkpoint_every == 0:
                log.flush()  # raises for a loss that is not finite, and so does the next line for weights
                require_finite(state)
                if processes.first:
                    save_checkpoint(run.folder, run.identity, state)
                processes.wait()  # who leaves earlier has torchrun stop the one that writes
            if state.stopped:
                on_event(Warned(_early(recipe, state.best, state.step)))
                break
            if stop and not last:
                name = stopped[0] if stopped else "a signal to another process"
                raise Interrupted(
                    f"{name} after step {state.step} of {recipe.total_steps}; the checkpoint is in "
                    f"{run.folder.last}, the same command continues"
                )
            started = time.perf_counter()  # what was done between two steps is no part of the next one


def _crops(recipe: Recipe) -> int:
    return recipe.batch.labeled + (recipe.batch.unlabeled if recipe.method != "supervised" else 0)


def _early(recipe: Recipe, best: Best, step: int) -> str:
    return (
        f"stopped after step {step} of {recipe.total_steps}: {best.since} scores on {recipe.validation.split} without "
        f"a better one than mean IoU {100 * best.miou:.2f} at step {best.step} (validation.patience)"
    )


def _validation_steps(run: Run) -> int:
    """Return after how many steps the validation split is scored; 0 for never."""
    every = run.recipe.validation.every
    if every != "epoch":
        return every
    sizes = run.recipe.batch
    size = sizes.labeled if run.recipe.method == "supervised" else sizes.unlabeled
    return max(1, run.loader.tiles_per_epoch // size)


def _silence(event: object) -> None:
    """Say nothing: the first process speaks for all."""


def _shown(address: Path | str | None) -> str:
    if address is None:
        return "not given"
    from rsmtdf_cache.share.address import redact

    return redact(str(address))


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect the names of SIGINT and SIGTERM instead of dying; one that comes later acts as before.

    Several at once are one wish: batch systems signal every process, and launchers pass on what they got.
    """
    caught: list[str] = []
    first = math.inf
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        nonlocal first
        first = min(first, time.monotonic())
        if not caught:
            caught.append(signal.Signals(number).name)
        elif time.monotonic() - first > SAME_WISH_S:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
