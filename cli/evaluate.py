"""``rsmtdf eval``: scores of a run on a split."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, emit_json, message, progress

if TYPE_CHECKING:
    from rsmtdf_cache.sources import TileSource
    from rsmtdf_train.metrics import Scores
    from rsmtdf_train.scoring.groups import Grouping

__all__ = ["evaluate"]


class _Choice(StrEnum):
    EMA = "ema"
    STUDENT = "student"
    BEST = "best"
    ALL = "all"


class _By(StrEnum):
    AUTO = "auto"
    DOMAIN = "domain"
    SCENE = "scene"
    TILE = "tile"
    NONE = "none"


@command
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of `rsmtdf train`.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Split to score on; default: the recipe's eval_split.")] = None,
    checkpoint: Annotated[_Choice, typer.Option(help="Which weights.")] = _Choice.ALL,
    without: Annotated[
        list[str] | None, typer.Option(metavar="CLASS", help="Also give the mean IoU without this class; repeatable.")
    ] = None,
    tolerance: Annotated[
        int, typer.Option(metavar="PX", min=0, max=100, help="A boundary this near counts as found, in boundary F1.")
    ] = 3,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Are the probabilities right? Expected calibration errors.")
    ] = False,
    confusion: Annotated[bool, typer.Option("--confusion", help="Print the confusion matrix.")] = False,
    by: Annotated[
        _By, typer.Option(help="Scores by domain, scene or tile, too; auto: by domain where the dataset has domains.")
    ] = _By.AUTO,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write confusion.png, reliability.png and scores.json there; scores calibration, too.",
            show_default=False,
        ),
    ] = None,
    whole_scenes: Annotated[
        bool,
        typer.Option(
            "--whole-scenes", help="Score the map of each whole scene at the pixels of the tiles, not tile by tile."
        ),
    ] = False,
    window: Annotated[
        int | None, typer.Option(metavar="PX", help="Whole scenes: side of windows; default: that of training crops.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(metavar="PX", help="Whole scenes: shared by neighbouring windows; default: a quarter.")
    ] = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Whole scenes: mean over eight mirrorings and rotations.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Dataset folder; default: the recipe's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU when there is one.")] = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Score a run: per-class IoU, F1, accuracy and boundary F1, their means, and the share of right pixels."""
    from rsmtdf_cache.errors import DataError, MismatchError, UsageError, did_you_mean
    from rsmtdf_cache.files import sha256_file
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cli.score_tables import show_calibration, show_confusion, show_groups, show_metrics
    from rsmtdf_train.checkpoint import RunFolder, load_deployed
    from rsmtdf_train.devices import pick_device
    from rsmtdf_train.evaluate import evaluate as score
    from rsmtdf_train.results import scores_to_json
    from rsmtdf_train.scenes.request import Segmenter
    from rsmtdf_train.scenes.score_scenes import SceneWindows, score_scenes
    from rsmtdf_train.scoring.tally import Measures

    if not whole_scenes and (window is not None or overlap is not None or tta):
        raise UsageError("--window, --overlap and --tta are of maps: add --whole-scenes, or leave them out")
    chosen = pick_device(device)
    if out is not None:
        _require_folder(out)
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
    source.check([asked])
    calibrated = calibration or out is not None
    measures = Measures(tolerance, calibrated, _grouping(source, asked, by))
    with progress(quiet) as sink:
        if whole_scenes:
            segmenters = {
                kind: Segmenter(model, identity, sha256_file(there.deployed(kind)))
                for kind, (model, identity) in loaded.items()
            }
            asked_windows = SceneWindows(window, overlap, tta)
            scores, windows = score_scenes(segmenters, source, asked, asked_windows, chosen, sink, measures)
        else:
            models = {kind: model for kind, (model, _) in loaded.items()}
            scores = score(models, source, asked, chosen, sink, measures=measures)
    metrics = scores_to_json(identity, asked, scores, identity.recipe.total_steps)
    if not any(found.pixel_accuracy is not None for found in scores.values()):
        raise DataError(f"{source.root}: the masks of split {asked!r} hold no label at all; there is nothing to score")
    shown = metrics["checkpoint"] if metrics["checkpoint"] in scores else next(iter(scores))
    metrics |= {"data": str(source.root), "checkpoint": shown, "miou": scores[shown].miou}
    if whole_scenes:
        metrics["whole_scenes"] = asdict(windows)
    if dropped:
        for kind, found in scores.items():
            metrics["scores"][kind] |= {"without": dropped, "miou_without": found.miou_without(dropped)}
    if out is not None:
        _write(out, metrics, scores)
    if json:
        emit_json(metrics)
        return
    show_metrics(metrics, dropped)
    if measures.groups is not None:
        show_groups(metrics, shown)
    if calibrated:
        show_calibration(metrics)
    if confusion:
        show_confusion(metrics, shown)
    if out is not None and not quiet:
        message(f"{out}: confusion.png, reliability.png, scores.json", kind="wrote")


def _grouping(source: TileSource, split: str, by: _By) -> Grouping | None:
    from rsmtdf_train.evaluate import labelled_tiles
    from rsmtdf_train.scoring.groups import By, group_tiles, has_domains

    if by is _By.NONE or (by is _By.AUTO and not has_domains(source)):
        return None
    return group_tiles(source, labelled_tiles(source, split), By.DOMAIN if by is _By.AUTO else By(by.value))


def _require_folder(out: Path) -> None:
    """Raise before the work for a folder that cannot be made or written to; nothing is made yet."""
    from rsmtdf_cache.errors import ResourceError, UsageError

    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"--out {out}: {there} is a file; give the name of a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ResourceError(f"--out {out}: {there} cannot be written to; choose a place that can")


def _write(out: Path, metrics: dict[str, Any], scores: Mapping[str, Scores]) -> None:
    """Write pictures and numbers, each whole or not at all."""
    from rsmtdf_cache.files import disk_errors, replace_file
    from rsmtdf_cli.console import json_text
    from rsmtdf_train.scoring.picture import draw_confusion, draw_reliability

    title = f"{metrics['name']}, {metrics['split']} tiles"
    with disk_errors(out):
        replace_file(out / "confusion.png", draw_confusion(scores, f"{title}: percent of each label's pixels"))
        replace_file(out / "reliability.png", draw_reliability(scores, f"{title}: reliability"))
        replace_file(out / "scores.json", f"{json_text(metrics)}\n".encode())
