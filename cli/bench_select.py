"""``rsmtdf bench select``: chosen tiles against random ones, judged by a linear probe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.cache.show import AnyStoreArgument, plain
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

if TYPE_CHECKING:
    from rsmtdf_cache.choose.trial import Trial

__all__ = ["bench_select"]


@command
def bench_select(
    store: AnyStoreArgument,
    data: Annotated[Path, typer.Argument(help="Folder of the dataset, with masks.", show_default=False)],
    budget: Annotated[list[str] | None, typer.Option(metavar="N|P%", help="Budget to try; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds, each with other tiles to choose from.")] = 20,
    array: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Arrays to go by and to probe.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the rounds.")] = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """How much more a linear probe learns from tiles that `rsmtdf select` chooses than from random ones.

    In each round all arms choose from the same four fifths of the train tiles and are judged on the same tiles, those
    that none chose. Default budgets: 5 % and 10 %.
    """
    from rsmtdf_cache.choose.selection import Budget
    from rsmtdf_cache.choose.trial import try_choices
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.store import FeatureStore
    from rsmtdf_cli.machine import context

    asked = [Budget.parse(text) for text in budget or ("5%", "10%")]
    with progress(quiet or json) as on_event:
        trials = try_choices(FeatureStore.open(store), open_source(data), asked, rounds, array or (), seed, on_event)
    if json:
        emit_json({"context": context(), "trials": [{**t.to_json(), "rows": _rows(t)} for t in trials]})
    elif not quiet:
        for trial in trials:
            _show(trial)


def _rows(trial: Trial) -> list[dict[str, Any]]:
    """Return mean, deviation and paired difference to random of each arm, in shares of 1."""
    import statistics

    from rsmtdf_train.experiment.compare import paired_difference

    found = []
    for arm, values in trial.miou.items():
        difference = paired_difference(values, trial.miou["random"])
        found.append({
            "arm": arm, "mean": statistics.fmean(values), "sd": statistics.stdev(values), "worst": min(values),
            "seen": statistics.fmean(trial.seen[arm]),
            "difference": None if arm == "random" else {
                "mean": difference.mean, "low": difference.low, "high": difference.high,
                "won": sum(a > b for a, b in zip(values, trial.miou["random"], strict=True)),
            },
        })  # fmt: skip
    return found


def _show(trial: Trial) -> None:
    from rich.table import Column, Table

    title = f"{trial.budget} of {trial.tiles} tiles, {trial.rounds} rounds: mIoU of a linear probe, percent"
    table = Table(
        "arm", Column("mIoU", justify="right"), Column("worst round", justify="right"),
        Column(f"classes seen of {trial.classes}", justify="right"), Column("paired difference", justify="right"),
        Column("rounds won", justify="right"), title=title, title_justify="left",
    )  # fmt: skip
    for row in _rows(trial):
        gap = row["difference"]
        table.add_row(
            plain(row["arm"]), f"{100 * row['mean']:.1f} ± {100 * row['sd']:.1f}", f"{100 * row['worst']:.1f}",
            f"{row['seen']:.1f}",
            "" if gap is None else f"{100 * gap['mean']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})",
            "" if gap is None else f"{gap['won']} of {trial.rounds}",
        )  # fmt: skip
    console().print(table)
    console().print("±: deviation over rounds; ( ): 95 % t-interval over rounds, which share tiles", soft_wrap=True)
