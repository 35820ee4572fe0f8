"""``rsmtdf data prepare``: a published benchmark as distributed to a dataset folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

if TYPE_CHECKING:
    from rsmtdf_cache.prepare.plan import Plan

__all__ = ["prepare"]


@command
def prepare(
    benchmark: Annotated[str, typer.Argument(help="loveda, potsdam or deepglobe.", metavar="BENCHMARK")],
    sources: Annotated[
        list[Path],
        typer.Argument(help="Its folder, or its zip, tar or tar.gz files, as downloaded.", metavar="SRC..."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; new or empty.")],
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="by-image (default): all tiles of a scene in one split. by-tile: as published, for comparison; scenes "
            "of val and test then have tiles in train.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Decides which scene or tile goes to which split; default 0."),
    ] = None,
    labeled: Annotated[
        str | None,
        typer.Option(
            "--labeled", help="Labelled subsets of train, in percent; each holds the smaller ones. Default 1,5,10."
        ),
    ] = None,
    lists: Annotated[
        list[Path] | None,
        typer.Option("--lists", help="Published split lists (a folder, or files) in place of a protocol; repeatable."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option("--tile", help="Side of the tiles in px, instead of the published 512.")
    ] = None,
    overlap: Annotated[int, typer.Option("--overlap", help="Pixels that neighbouring tiles share.")] = 0,
    keep_clutter: Annotated[
        bool, typer.Option("--keep-clutter", help="Potsdam: clutter is class 5; otherwise it is ignored.")
    ] = False,
    unknown_labels: Annotated[
        str,
        typer.Option("--unknown-labels", help="error, or ignore: pixels whose value or colour is no label."),
    ] = "error",
    strict: Annotated[bool, typer.Option("--strict", help="Counts that are not the published ones are an error.")] = (
        False
    ),
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Scenes at once; by default one a core, as memory allows.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say counts, splits and bytes; write nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a dataset folder from LoveDA, Potsdam or DeepGlobe as distributed: tiles, class numbers, splits.

    Archives are read where they lie, also zips within zips. The folder appears complete or not at all; stopped, the
    same command begins again. Protocol and seed are in the dataset's name, so that every result says them.
    """
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.events import Warned
    from rsmtdf_cache.prepare.cutting import Cut
    from rsmtdf_cache.prepare.plan import Request
    from rsmtdf_cache.prepare.splitting import parse_percents
    from rsmtdf_cache.prepare.write import estimate
    from rsmtdf_cache.prepare.write import prepare as run

    if lists and not (protocol is seed is labeled is None):
        raise UsageError(
            "--lists says which tile is in which split and labelled subset; leave out --protocol, --seed and --labeled"
        )
    cut = Cut(512 if tile is None else tile, overlap) if tile is not None or overlap else None
    request = Request(
        benchmark, tuple(sources), out, protocol or "by-image", seed or 0, tuple(parse_percents(labeled or "1,5,10")),
        cut, tuple(lists or ()), keep_clutter, unknown_labels, strict, workers,
    )  # fmt: skip
    with progress(quiet) as on_event:
        if dry_run:
            plan, nbytes = estimate(request)
            done: dict[str, Any] = {"written": False, "estimated_nbytes": nbytes}
            for text in plan.warnings:
                on_event(Warned(text))
        else:
            prepared = run(request, on_event)
            plan, nbytes = prepared.plan, prepared.nbytes
            done = {"written": prepared.written, "nbytes": nbytes, "unknown_pixels": prepared.unknown or {}}
    if as_json:
        emit_json({"path": out, **plan.record, **done})
    elif not quiet:
        _show(plan, out)
        if dry_run:
            message(f"about {nbytes / 1e6:,.1f} MB; nothing was written", kind="note")
        elif not done["written"]:
            message(f"{out} holds this preparation already", kind="note")
        for note in plan.notes:
            message(note, kind="note")


def _show(plan: Plan, out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    size = f"{plan.record['scenes']} scenes, tiles of {plan.cut.tile_px} px, {len(plan.benchmark.classes)} classes"
    console().print(f"[bold]{escape(plan.name)}[/]  {escape(str(out))}  {size}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("", "scenes", "tiles", "published"):
        table.add_column(column, justify="right" if column else "left")
    published = plan.record["published"]
    comparable = plan.record["asked"]["protocol"] != "by-image" and published is not None
    for split, cells in plan.splits.items():
        scenes = len({cell.scene.id for cell in cells})
        table.add_row(split, str(scenes), str(len(cells)), str(published["tiles"][split]) if comparable else "-")
    for percent, ids in plan.labeled.items():
        table.add_row(
            f"labeled/{percent}", "", str(len(ids)), str(published["labeled"].get(percent, "-")) if comparable else "-"
        )
    console().print(table)
