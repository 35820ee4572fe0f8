"""``rsmtdf data``: build the sample dataset, prepare published benchmarks, describe and check a dataset."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, new_app, progress
from rsmtdf_cli.prepare import prepare
from rsmtdf_cli.tile import tile

if TYPE_CHECKING:
    from rich.table import Table

    from rsmtdf_cache.sources import TileSource
    from rsmtdf_cache.sources.survey import Survey

__all__ = ["app", "info", "sample"]

_PAIRS = 5  # how many duplicates are shown

app = new_app("Make and check datasets.")


@app.callback()
def _data() -> None:
    """Make and check datasets."""


@app.command("sample")
@command
def sample(
    out: Annotated[Path, typer.Option("--out", help="Folder to make; new or empty.")],
    scenes: Annotated[
        bool, typer.Option("--scenes", help="Instead of tiles: GeoTIFF scenes with labels, to try `data tile` on.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Build the land-cover sample: 225 tiles of 256 px, 8 classes, from two NASA rasters inside the package.

    Nothing is downloaded. The folder appears complete or not at all; running again on it changes nothing.
    """
    if scenes:
        _sample_scenes(out, as_json, quiet)
        return
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.sources.landcover import build_sample
    from rsmtdf_cache.sources.survey import survey

    with progress(quiet) as on_event:
        built = build_sample(out, on_event)
        if quiet and not as_json:
            return
        source = open_source(out)
        found = survey(source, on_event)
    if as_json:
        emit_json({"built": built, **_as_data(source, found)})
        return
    if not built:
        message(f"{out} holds this sample already, complete and unchanged", kind="note")
    _show(source, found)


def _sample_scenes(out: Path, as_json: bool, quiet: bool) -> None:
    from rsmtdf_cache.sources.landcover_scenes import REGIONS, build_scenes

    with progress(quiet) as on_event:
        built = build_scenes(out, on_event)
    if as_json:
        emit_json({"built": built, "path": out, "scenes": sorted(REGIONS)})
    elif not quiet:
        if not built:
            message(f"{out} holds these scenes already", kind="note")
        console().print(
            f"{len(REGIONS)} scenes in {out}/images, their labels in {out}/labels, classes in {out}/classes.yaml, one "
            f"more scene in {out}/new",
            markup=False,
            soft_wrap=True,
        )


app.command("prepare")(prepare)
app.command("tile")(tile)


@app.command("info")
@command
def info(
    folder: Annotated[Path, typer.Argument(help="Folder of a dataset, with a dataset.yaml in it.", metavar="DIR")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Describe a dataset: classes with share and colour, tiles per split, labelled subsets, leakage, faults.

    Images that are in two splits and scenes with tiles in several are warned of. Ends with 3 when the dataset as a
    whole is at fault; single unusable tiles are listed, a build leaves them out.
    """
    from rsmtdf_cache.errors import DataError
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.sources.survey import survey

    with progress(quiet) as on_event:
        source = open_source(folder)
        found = survey(source, on_event)
    if as_json:
        emit_json(_as_data(source, found))
    else:
        _show(source, found)
    if found.dataset_fault is not None:
        raise DataError(found.dataset_fault)


def _as_data(source: TileSource, found: Survey) -> dict[str, Any]:
    dataset = [{"level": "dataset", "tile": None, "text": found.dataset_fault}] if found.dataset_fault else []
    names = [c.name for c in source.classes]
    return {
        "path": source.root,
        "name": source.name,
        "tile_px": source.tile_px,
        "ignore_index": source.ignore_index,
        "attribution": source.attribution,
        "classes": [{"name": c.name, "color": c.color} for c in source.classes],
        "splits": {
            name: {
                "tiles": split.tiles,
                "shares": dict(zip(names, split.class_shares, strict=True)) if split.class_shares else None,
                "ignored": split.ignored_share,
            }
            for name, split in found.splits.items()
        },
        "duplicates": [list(astuple(pair)) for pair in found.duplicates],
        "shared_scenes": found.shared_scenes,
        "faults": dataset + [{"level": "tile", "tile": f.tile_id, "text": f.reason} for f in found.tile_faults],
    }


def _show(source: TileSource, found: Survey) -> None:
    from rich.markup import escape

    screen = console()
    size = f"tiles of {source.tile_px} px, {len(source.classes)} classes"
    screen.print(f"[bold]{escape(source.name)}[/]  {escape(str(source.root))}  {size}", soft_wrap=True)
    screen.print(_table(source, found))
    if source.attribution:
        screen.print(f"[dim]{escape(source.attribution)}[/]", soft_wrap=True)
    for fault in found.tile_faults:
        message(f"{fault}; a build leaves this tile out", kind="warning")
    for text in _leaks(found):
        message(text, kind="warning")


def _leaks(found: Survey) -> list[str]:
    """Return one sentence on images that are in two splits, one on scenes that are."""
    texts = []
    if found.duplicates:
        shown = ", ".join(f"{d.id} ({d.split}) = {d.other_id} ({d.other_split})" for d in found.duplicates[:_PAIRS])
        more = f", … (--json lists all {len(found.duplicates)})" if len(found.duplicates) > _PAIRS else ""
        texts.append(f"{len(found.duplicates)} images are in two splits, pixel by pixel: {shown}{more}")
    if found.shared_scenes:
        scene, splits = next(iter(found.shared_scenes.items()))
        texts.append(
            f"{len(found.shared_scenes)} scenes have tiles in several splits (first {scene}: {', '.join(splits)}); "
            "scores on val and test say less of unseen scenes"
        )
    return texts


def _table(source: TileSource, found: Survey) -> Table:
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("share of pixels")
    for name in found.splits:
        table.add_column(escape(name), justify="right")
    table.add_row("tiles", *(str(split.tiles) for split in found.splits.values()), style="bold", end_section=True)
    for number, entry in enumerate(source.classes):
        label = Text("██ ", style="#{:02x}{:02x}{:02x}".format(*entry.color)) + Text(f"{number} {entry.name}")
        shares = [s.class_shares[number] if s.class_shares else None for s in found.splits.values()]
        table.add_row(label, *map(_percent, shares))
    table.add_row("   ignored", *(_percent(split.ignored_share) for split in found.splits.values()), style="dim")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
