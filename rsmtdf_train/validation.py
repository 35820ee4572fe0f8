"""Scores on the validation split while a run goes on: a line in ``validation.jsonl``, the best weights, early stop."""

from __future__ import annotations

import json

from rsmtdf_cache.files import replace_file
from rsmtdf_train.checkpoint import CHECKPOINT_KINDS, save_deployed
from rsmtdf_train.evaluate import evaluate
from rsmtdf_train.fused_student import FusedStudent
from rsmtdf_train.run import Run, TrainSink
from rsmtdf_train.state import TrainState

__all__ = ["validate"]


def validate(run: Run, state: TrainState, on_event: TrainSink) -> None:
    """Score student and EMA on ``validation.split``, note it, and keep the weights that are best ``validation.by``.

    A score counts as better only when it is higher. With ``patience`` that many scores without a better one set
    ``state.stopped``. The student's mode is as before afterwards.
    """
    config = run.recipe.validation
    models: dict[str, FusedStudent] = {"ema": state.ema, "student": state.student.eval()}
    try:
        scores = evaluate(models, run.source, config.split, run.device, on_event, processes=run.processes)
    finally:
        state.student.train()
    miou = scores[config.by].miou or 0.0
    better = miou > state.best.miou
    if better:
        state.best.miou, state.best.step, state.best.since = miou, state.step, 0
    else:
        state.best.since += 1
    early = state.step < run.recipe.total_steps
    state.stopped = early and config.patience is not None and state.best.since >= config.patience
    if not run.processes.first:
        return
    if better and config.keep == "best":
        save_deployed(run.folder.deployed("best"), models[config.by], run.identity, config.by, state.step)
    line = {
        "step": state.step,
        "split": config.split,
        "scores": {
            kind: {"miou": scores[kind].miou, "iou": {c.name: c.iou for c in scores[kind].classes}}
            for kind in CHECKPOINT_KINDS
        },
    }
    _append(run, state.step, line)


def _append(run: Run, step: int, line: dict[str, object]) -> None:
    """Write ``line`` behind those of earlier steps: a run that repeats steps repeats their scores."""
    path = run.folder.validation
    kept = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            if json.loads(text)["step"] < step:
                kept.append(text)
        except (ValueError, KeyError, TypeError):
            break  # the line that a kill cut off
    replace_file(path, "".join(f"{text}\n" for text in [*kept, json.dumps(line)]).encode())
