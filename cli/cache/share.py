"""``rsmtdf cache push`` and ``pull``: copy stores, or parts of them, to and from URLs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.show import local_folder, plain, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

if TYPE_CHECKING:
    from rsmtdf_cache.share.pull import CopyReport
    from rsmtdf_cache.share.select import Selection

__all__ = ["pull", "push"]

UrlArgument = Annotated[str, typer.Argument(help="Folder, s3://bucket/path, https://host/path …", show_default=False)]
TeacherOption = Annotated[list[str] | None, typer.Option(help="Only these teachers; patterns (dino*); repeatable.")]
LayerOption = Annotated[list[str] | None, typer.Option(help="Only these layers; patterns; repeatable.")]
ViewOption = Annotated[list[str] | None, typer.Option(help="Only these views, e.g. s448o0; patterns; repeatable.")]
TilesOption = Annotated[str | None, typer.Option(help="Only the row groups of a split, or of a file of tile ids.")]
WorkersOption = Annotated[int, typer.Option(help="Transfers at once.", min=1, max=64)]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would travel, write nothing.")]
DeepOption = Annotated[
    bool, typer.Option("--deep", help="Also compare the bytes that the target has already; replace what differs.")
]


PixelsOption = Annotated[
    bool, typer.Option("--pixels", help="Also the tiles' pixels, where the store has them: images leave with them.")
]
NoPixelsOption = Annotated[
    bool | None,
    typer.Option(
        "--pixels/--no-pixels", help="Bring the tiles' pixels, where there are; default: unless a part is asked for."
    ),
]


@command
def push(
    store: Annotated[str, typer.Argument(help="Folder of the store, or FOLDER@SNAPSHOT.", show_default=False)],
    url: UrlArgument,
    teacher: TeacherOption = None,
    layer: LayerOption = None,
    view: ViewOption = None,
    tiles: TilesOption = None,
    pixels: PixelsOption = False,
    workers: WorkersOption = 4,
    dry_run: DryRunOption = False,
    deep: DeepOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish STORE at URL; a second push continues, or adds what is new. Images travel with --pixels alone."""
    from rsmtdf_cache.share.push import push_store

    chosen = _selection(teacher, layer, view, tiles, pixels)
    with progress(quiet) as on_event:
        report = push_store(store, url, chosen, on_event, workers, dry_run, deep)
    _show(report, json, quiet)


@command
def pull(
    url: UrlArgument,
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder to copy to; an earlier copy is continued.",
            show_default=False,
            parser=local_folder,
            metavar="FOLDER",
        ),
    ],
    teacher: TeacherOption = None,
    layer: LayerOption = None,
    view: ViewOption = None,
    tiles: TilesOption = None,
    pixels: NoPixelsOption = None,
    workers: WorkersOption = 4,
    dry_run: DryRunOption = False,
    deep: DeepOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy the store at URL (or URL@SNAPSHOT), or a part of it, into FOLDER; a stopped pull continues."""
    from rsmtdf_cache.share.catalogue import register_store
    from rsmtdf_cache.share.pull import pull_store

    chosen = _selection(teacher, layer, view, tiles, not (teacher or layer or view) if pixels is None else pixels)
    with progress(quiet) as on_event:
        report = pull_store(url, folder, chosen, on_event, workers, dry_run, deep)
        if not dry_run:
            register_store(folder, on_event=on_event)
    _show(report, json, quiet)


def _selection(
    teacher: list[str] | None, layer: list[str] | None, view: list[str] | None, tiles: str | None, pixels: bool
) -> Selection:
    from rsmtdf_cache.share.select import Selection

    return Selection(tuple(teacher or ()), tuple(layer or ()), tuple(view or ()), tiles, pixels)


def _show(report: CopyReport, json: bool, quiet: bool) -> None:
    if json:
        emit_json(report.to_json())
        return
    if quiet:
        return
    plan = report.plan
    along = f" (and {plan.tiles_along} that share their row groups)" if plan.tiles_along else ""
    console().print(
        f"{plain(report.source)} → {plain(report.target)}: {_count(plan.tiles, 'tile')}{along}, "
        f"{_count(len(plan.arrays), 'array set')}, {_count(plan.units_before, 'unit')} there already"
    )
    replaced = f" ({plan.replaced} of them to replace missing or damaged ones)" if plan.replaced else ""
    if report.dry_run:
        console().print(f"would copy {_count(plan.shards, 'shard')}{replaced}, {size(plan.nbytes)}")
        return
    if plan.shards:
        moved = (
            f"copied {_count(plan.shards, 'shard')}{replaced}, {size(report.nbytes_moved)} in {report.seconds:.1f} s"
        )
    else:
        moved = "nothing to copy"
    console().print(f"{moved}; snapshot {report.snapshot[:16]}")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
