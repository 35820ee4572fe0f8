"""Several training runs at once, one process and one CPU thread each.

One thread per run, whatever the number of runs side by side: the thread count changes bits, so a run must not depend
on how many others there are. A process that is stopped leaves a run that continues.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from rsmtdf_cache.errors import DataError, ResourceError, RsmtdfError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.share.address import Address
from rsmtdf_train.recipe import Recipe, load_recipe
from rsmtdf_train.run_store import names_recorded, open_run_store, read_run_store

__all__ = ["TrainingJob", "run_jobs"]

_REPORT_EVERY_S = 0.5
_PATIENCE_S = 30.0  # for a step and a checkpoint after SIGTERM


@dataclass(frozen=True)
class TrainingJob:
    """One run: what ``rsmtdf_train.loop.train`` needs, and a title for its progress bar.

    ``store``: folder or URL, with ``@SNAPSHOT`` or without.
    """

    title: str
    recipe: Recipe
    out: Path
    store: Path | str | None = None
    device: str | None = None


@dataclass(frozen=True)
class _Steps:
    """``done`` steps of the run are finished."""

    done: int


@dataclass(frozen=True)
class _Failed:
    error: Exception


@dataclass
class _Running:
    job: TrainingJob
    process: BaseProcess
    done: int = 0
    finished: bool = False


def run_jobs(jobs: Sequence[TrainingJob], at_once: int = 1, on_event: EventSink = ignore_events) -> None:
    """Train all ``jobs``, ``at_once`` side by side; a progress task each. Complete runs cost one look.

    Raises the first error of a run (a library's error as ``RuntimeError`` with its traceback) and stops the others;
    ``ResourceError`` for a process that was killed. The same call continues.
    """
    if at_once < 1:
        raise UsageError(f"jobs {at_once}: at least one run at a time")
    if len({job.out for job in jobs}) != len(jobs):
        raise UsageError("two runs share a folder; give each its own")
    context = multiprocessing.get_context("spawn")  # fork would copy torch's thread pools
    waiting: list[TrainingJob] = []
    if not all(_complete(job) for job in jobs):  # complete runs need no store
        waiting = [_counted(job) for job in _on_one_snapshot(jobs) if not _complete(job)]
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_train, args=(job, theirs), daemon=True)
                process.start()
                theirs.close()
                running[mine] = _Running(job, process)
                on_event(ProgressStart(str(job.out), job.title, job.recipe.total_steps, unit="steps"))
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                _receive(connection, running, on_event)
    finally:
        _stop([r.process for r in running.values()])


def _on_one_snapshot(jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
    """Return ``jobs`` with the snapshot in the address of each store: arms stay paired while somebody appends to it.

    It is the one that the first run which is there recorded, else what the store holds now.
    """
    addresses: dict[Path | str, str] = {}
    for job in sorted(jobs, key=lambda job: not (job.out / "store.json").is_file()):
        if job.store is not None and job.store not in addresses:
            text = str(job.store)
            named = Address.parse(text).snapshot is not None
            addresses[job.store] = text if named else f"{text}@{open_run_store(text, job.out).snapshot}"
    return [job if job.store is None else replace(job, store=addresses[job.store]) for job in jobs]


def _counted(job: TrainingJob) -> TrainingJob:
    """Return ``job`` with the number of its steps, where its recipe counts in epochs."""
    if job.recipe.steps is not None:
        return job
    from rsmtdf_cache.sources import open_source
    from rsmtdf_train.run import count_steps

    return replace(job, recipe=count_steps(job.recipe, open_source(job.recipe.data)))


def _complete(job: TrainingJob) -> bool:
    """Whether exactly this run is finished. Anything else is for ``train`` to judge: it continues or refuses."""
    try:
        metrics = json.loads((job.out / "metrics.json").read_text())
        there = load_recipe(job.out / "recipe.yaml")
        ended = metrics["step"] == there.steps or metrics.get("stopped_early")
        return bool(job.recipe.is_met_by(there) and ended and _reads(job, metrics["store"]))
    except (OSError, ValueError, KeyError, TypeError, UsageError, DataError):
        return False


def _reads(job: TrainingJob, snapshot: str | None) -> bool:
    """Whether ``snapshot``, which the run in the job's folder read, is what the job is to read."""
    if job.store is None or snapshot is None:
        return job.store is None and snapshot is None
    named = Address.parse(job.store).snapshot
    if named is not None:
        return snapshot.startswith(named)
    recorded = read_run_store(job.out)
    return recorded is not None and recorded.snapshot == snapshot and names_recorded(job.store, recorded)


def _receive(connection: Connection, running: dict[Connection, _Running], on_event: EventSink) -> None:
    run = running[connection]
    try:
        note = connection.recv()
    except EOFError:
        run.process.join()
        connection.close()
        del running[connection]
        if not run.finished:
            raise ResourceError(
                f"run {run.job.out}: its process ended with {run.process.exitcode} and no message; "
                "-9 is mostly too little memory. Use fewer runs at once; the same command continues"
            ) from None
        on_event(ProgressEnd(str(run.job.out)))
        return
    if isinstance(note, _Failed):
        raise note.error
    if isinstance(note, Warned):
        on_event(note)
    elif isinstance(note, _Steps):
        on_event(Progress(str(run.job.out), note.done - run.done))
        run.done = note.done
        run.finished = note.done == run.job.recipe.total_steps


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    until = time.monotonic() + _PATIENCE_S
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _train(job: TrainingJob, notes: Connection) -> None:
    """Run in the child: train, tell about it, end."""
    import torch

    from rsmtdf_train.logs import StepLogged
    from rsmtdf_train.loop import train

    torch.set_num_threads(1)
    last = 0.0

    def tell(event: object) -> None:
        nonlocal last
        if isinstance(event, Warned):
            notes.send(event)
        elif isinstance(event, StepLogged):
            now = time.monotonic()
            if now - last >= _REPORT_EVERY_S and event.step + 1 < event.steps:
                last = now
                notes.send(_Steps(event.step + 1))

    try:
        train(job.recipe, job.out, job.store, device=job.device, on_event=tell, tensorboard=False)
        notes.send(_Steps(job.recipe.total_steps))
    except KeyboardInterrupt:
        return  # the parent got it too, and says so
    except (RsmtdfError, OSError) as error:
        with suppress(BrokenPipeError):  # the parent is gone: nobody to tell
            notes.send(_Failed(error))
    except Exception:
        with suppress(BrokenPipeError):
            notes.send(_Failed(RuntimeError(f"run {job.out}:\n{traceback.format_exc()}")))
