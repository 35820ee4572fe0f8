"""``rsmtdf eval``: scores of a run on a split."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, emit_json, progress

__all__ = ["evaluate"]


class _Choice(StrEnum):
    EMA = "ema"
    STUDENT = "student"
    BEST = "best"
    ALL = "all"


@command
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of `rsmtdf train`.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Split to score on; default: the recipe's eval_split.")] = None,
    checkpoint: Annotated[_Choice, typer.Option(help="Which weights.")] = _Choice.ALL,
    without: Annotated[
        list[str] | None, typer.Option(metavar="CLASS", help="Also give the mean IoU without this class; repeatable.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Dataset folder; default: the recipe's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU when there is one.")] = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Score a run: per-class IoU, F1 and accuracy, their means, and the share of right pixels."""
    from rsmtdf_cache.errors import MismatchError, UsageError, did_you_mean
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cli.training import show_metrics
    from rsmtdf_train.checkpoint import RunFolder, load_deployed
    from rsmtdf_train.devices import pick_device
    from rsmtdf_train.evaluate import evaluate as score
    from rsmtdf_train.results import scores_to_json

    chosen = pick_device(device)
    there = RunFolder(run)
    kinds = there.kinds() if checkpoint is _Choice.ALL else (checkpoint.value,)
    loaded = {kind: load_deployed(there, kind, chosen) for kind in kinds}
    identity = next(iter(loaded.values()))[1]
    dropped = list(without or [])
    names = [c.name for c in identity.classes]
    for name in dropped:
        if name not in names:
            near = did_you_mean(name, names)
            raise UsageError(f"--without {name!r}: no such class.{near} Classes: {', '.join(names)}")
    source = open_source(data if data is not None else identity.recipe.data)
    if [c.name for c in source.classes] != names:
        raise MismatchError(
            f"{source.root} has the classes {', '.join(c.name for c in source.classes)}; the run {run} knows "
            f"{', '.join(names)}; give the dataset it was trained for with --data"
        )
    asked = split if split is not None else identity.recipe.eval_split
    with progress(quiet) as sink:
        scores = score({kind: model for kind, (model, _) in loaded.items()}, source, asked, chosen, sink)
    metrics = scores_to_json(identity, asked, scores, identity.recipe.total_steps)
    if dropped:
        for kind, found in scores.items():
            metrics["scores"][kind] |= {"without": dropped, "miou_without": found.miou_without(dropped)}
    if json:
        emit_json(metrics)
    else:
        show_metrics(metrics, dropped)
