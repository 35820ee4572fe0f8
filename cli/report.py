"""``rsmtdf report``: runs as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress
from rsmtdf_cli.scores import difference_text, mean_text

if TYPE_CHECKING:
    from rsmtdf_train.report import Report

__all__ = ["report"]


@command
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of runs.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; default: report.html in the folder of runs that is given, else in the working directory.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ARM|RUN", help="What differences are to; default: FixMatch without teachers.", show_default=False
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Score on this split what was scored on another; default: the runs'.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Dataset folder of the pictures; default: the recipe's.", show_default=False)
    ] = None,
    tiles: Annotated[int, typer.Option(min=0, help="Tiles in the pictures.")] = 6,
    no_pictures: Annotated[
        bool, typer.Option("--no-pictures", help="Leave the pictures out; reads no dataset.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU when there is one.")] = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Write one HTML page on runs: table with paired differences, IoU by class, curves, confusion, pictures, speed.

    Runs that differ in the seed alone are one arm. Runs that are not complete are shown as far as they are.
    """
    from rsmtdf_cli.machine import context
    from rsmtdf_train.report import write_report

    with progress(quiet) as sink:
        found = write_report(
            runs, out, data=data, split=split, tiles=0 if no_pictures else tiles, baseline=baseline, device=device,
            context=context(), on_event=sink,
        )  # fmt: skip
    if json:
        emit_json(found.to_json())
    elif not quiet:
        _show(found)


def _show(found: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    numbers = found.numbers
    table = Table(title=f"{numbers.split} tiles, {numbers.checkpoint} weights, percent", title_justify="left")
    for name in ("arm", "seeds", "mIoU", f"difference to {escape(numbers.baseline.name)}", "verdict"):
        table.add_column(name)
    for a in numbers.arms:
        mean, change = a.miou.get(numbers.checkpoint), a.differences.get(numbers.checkpoint)
        score = "–" if mean is None else mean_text(mean.mean, mean.sd, digits=2)
        verdict = "baseline" if a.arm is numbers.baseline else "–" if change is None else change.verdict
        seeds = f"{len(a.arm.complete)} of {len(a.arm.runs)} complete"
        table.add_row(escape(a.arm.name), seeds, score, difference_text(change, digits=2), verdict)
    console().print(table)
    console().print(f"{found.path}: {found.nbytes / 1e6:.2f} MB", markup=False, soft_wrap=True)
