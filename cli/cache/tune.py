"""``rsmtdf cache tune``: what to store, for a number of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.asked import asks_for_build
from rsmtdf_cli.cache.plan import new_store, seconds_text
from rsmtdf_cli.cache.show import plain, png_file, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

if TYPE_CHECKING:
    from rsmtdf_cache.request import BuildRequest
    from rsmtdf_cache.tune.choice import Interval
    from rsmtdf_cache.tune.sweep import TuneReport

__all__ = ["tune"]


@command
@asks_for_build("cache tune", default_out=new_store)
def tune(
    request: BuildRequest,
    budget: Annotated[
        str | None, typer.Option(help="Size the store may have: 20GB, 500MB, 1e9 (default: any).", metavar="SIZE")
    ] = None,
    tiles: Annotated[int, typer.Option(min=4, help="Labelled tiles to look at, a quarter of them held out.")] = 200,
    labels: Annotated[
        str, typer.Option(help="Whose labels may be used: train, or a labelled subset of it such as 10.")
    ] = "train",
    codecs: Annotated[
        str | None, typer.Option(help="Codecs to try, e.g. float16,int8,pca64-int8 (default: with 1/2, 1/4, 1/8).")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Points of mIoU; take the smallest store for which a larger loss is ruled out (default: the "
            "smallest that cannot be told from the best).",
        ),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also probe the same networks with random weights.")
    ] = False,
    config_out: Annotated[
        Path | None, typer.Option(help="Write the recommendation here, for `cache build --config`.", metavar="YAML")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw mIoU against bytes here.", metavar="PNG", parser=png_file)
    ] = None,
    all_rows: Annotated[bool, typer.Option("--all", help="Show every candidate, not the front alone.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Say which layers, scales and codec are worth their bytes, by a linear probe on labelled tiles of DATA.

    Each teacher encodes the tiles once a view; nothing is stored. --teacher, --scales, --orientations and the like
    say what may be chosen from; --out names the store in the file that --config-out writes.
    """
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.tune.budget import parse_nbytes
    from rsmtdf_cache.tune.candidates import write_configuration
    from rsmtdf_cache.tune.picture import draw_tuning
    from rsmtdf_cache.tune.sweep import tune_build
    from rsmtdf_cli.machine import context

    most = parse_nbytes(budget) if budget is not None else None
    with progress(quiet) as on_event:
        report = tune_build(
            request, most, tiles, labels, codecs.split(",") if codecs else None, control,
            max_loss / 100 if max_loss is not None else None, on_event,
        )  # fmt: skip
    if plot is not None:
        draw_tuning(plot, report)
    if config_out is not None and report.configuration is not None:
        write_configuration(config_out, report.configuration, _summary(report))
    if json:
        emit_json({**report.to_json(), "context": context()})
    elif not quiet:
        _show(report, all_rows, config_out)
    if report.recommended is None:
        least = report.rows[0]
        raise UsageError(
            f"--budget {budget}: the smallest of {len(report.rows)} configurations takes {size(least.nbytes)} for "
            f"{report.tiles} tiles ({least.candidate.name}); allow more, or offer less: coarser --scales, fewer "
            "--orientations, other layers, --codecs pca8-int8"
        )


def _show(report: TuneReport, all_rows: bool, config_out: Path | None) -> None:
    from rich.table import Column, Table

    assert report.rows
    table = Table(
        Column("configuration", overflow="fold"), Column("size", justify="right"), Column("cosine", justify="right"),
        Column("worst 1 %", justify="right"), Column("mIoU, 95 %", justify="right"),
        Column("to best", justify="right"), "",
    )  # fmt: skip
    kept = {report.best, report.recommended}
    for n, row in enumerate(report.rows):
        if not (all_rows or row.pareto or n in kept):
            continue
        marks = [w for w, there in (("front", row.pareto), ("over budget", not row.fits)) if there]
        table.add_row(
            plain(row.candidate.name.replace(" | ", "\n")), size(row.nbytes), f"{row.cosine:.4f}",
            f"{row.cosine_worst:.4f}", _percent(row.miou), _points(row.difference), ", ".join([row.verdict, *marks]),
            style="bold" if n == report.recommended else None,
        )  # fmt: skip
    screen = console()
    screen.print(table)
    shown = table.row_count
    if shown < len(report.rows):
        screen.print(f"{shown} of {len(report.rows)} configurations; --all shows them all")
    about = "" if report.exact else "at most "
    screen.print(
        f"sizes: {about}all {report.tiles} tiles of the build; probe: {report.train_tiles} labelled tiles, judged on "
        f"{report.held_tiles} others ({plain(report.held_from)}); intervals are over those tiles, in points of mIoU"
    )
    for control in report.controls:
        gain = f"; the recommended one has {_points(control.gain)} more" if control.gain else ""
        screen.print(f"{control.name}: {_percent(control.miou)}{gain}")
    if report.recommended is not None:
        for line in _summary(report):
            screen.print(plain(line))
        _show_orientations(report)
        if config_out is not None:
            screen.print(f"wrote {plain(str(config_out))}: `rsmtdf cache build --config {plain(str(config_out))}`")
        else:
            screen.print("--config-out FILE writes it for `rsmtdf cache build --config`")
    screen.print(f"took {seconds_text(sum(report.seconds.values()))}")


def _summary(report: TuneReport) -> list[str]:
    """Return what is recommended and how sure that is, a line each."""
    assert report.recommended is not None and report.best is not None
    row, best = report.rows[report.recommended], report.rows[report.best]
    lines = [f"recommended: {row.candidate.name}, {size(row.nbytes)}"]
    if row is not best:
        shown = f"{_points(row.difference)} against the best, {best.candidate.name} ({size(best.nbytes)})"
        sure = "" if row.verdict == "equal" else f"; up to {-100 * row.difference.low:.1f} points may be lost"
        lines.append(f"{row.verdict}: {shown}{sure}")
        if row.verdict == "inconclusive" and report.max_loss is None:
            lines.append("more labelled --tiles narrow that; --max-loss 1 asks for what is proved within a point")
    if len(row.candidate.parts) < report.teachers:
        lines.append("all teachers together do not fit the budget; this leaves some out")
    better = [
        r for r in report.rows if r.fits and r.nbytes <= row.nbytes and r.miou.mean > row.miou.mean
        and len(r.candidate.parts) < len(row.candidate.parts)
    ]  # fmt: skip
    if better:
        first = max(better, key=lambda r: r.miou.mean)
        lines.append(
            f"by this probe fewer teachers do better with fewer bytes: {first.candidate.name}, {size(first.nbytes)}, "
            f"{_points(first.difference)} against the best; leave out a --teacher to have that"
        )
    for control in report.controls:
        if control.gain is not None and control.gain.low <= 0:
            lines.append(f"these tiles do not show that it is better than {control.name}")
    return lines


def _show_orientations(report: TuneReport) -> None:
    for item in report.orientations:
        if item.cosine is not None:
            room = "" if item.fits or report.budget is None else " (over budget)"
            console().print(
                f"{item.count} orientations: {size(item.nbytes)}{room}; not stored, what stands for them "
                f"has cosine {item.cosine:.3f}"
            )


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f} ({100 * value.low:.1f}–{100 * value.high:.1f})"


def _points(value: Interval) -> str:
    if value.low == value.high == value.mean == 0:
        return "0"
    return f"{100 * value.mean:+.1f} ({100 * value.low:+.1f} to {100 * value.high:+.1f})"
