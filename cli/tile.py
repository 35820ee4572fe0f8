"""``rsmtdf data tile``: scenes of any size to a dataset whose tiles are cut when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.bands import parse_bands
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

if TYPE_CHECKING:
    from rsmtdf_cache.tiling.write import TilePlan

__all__ = ["tile"]


@command
def tile(
    scenes: Annotated[
        list[Path], typer.Argument(help="Rasters of any size that GDAL reads, or folders of them.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; new or empty.")],
    labels: Annotated[
        Path | None,
        typer.Option(help="Folder with labels of the scenes' names, or one file: a raster, or polygons for all."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with the classes; may hold other keys of dataset.yaml: labels, name …"),
    ] = None,
    label_name: Annotated[
        str, typer.Option(metavar="PATTERN", help="What the labels of {scene} are called, without suffix.")
    ] = "{scene}",
    tile_px: Annotated[int, typer.Option("--tile", help="Side of the tiles in px.")] = 512,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share.")] = 0,
    bands: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Bands shown as red, green, blue; default: as the file says, else 1,2,3."),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Values that are black and white, or a pair a band; 2%,98% measures percentiles. 8 bits need none.",
        ),
    ] = None,
    val: Annotated[
        str, typer.Option(metavar="SHARE|NAMES", help="Held out for validation: 20%, or scenes: 'north_*'.")
    ] = "20%",
    test: Annotated[str, typer.Option(metavar="SHARE|NAMES", help="Held out for the test, likewise.")] = "20%",
    split_by: Annotated[
        str | None,
        typer.Option(
            metavar="scene|block", help="What is dealt whole; default: scenes from five on, else blocks of tiles."
        ),
    ] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Side of a block in tiles; default: 8, 4, 2 or 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which scene or block goes to which split.")] = 0,
    labeled: Annotated[
        str, typer.Option(help="Labelled subsets, in percent of train's tiles with labels; nested.")
    ] = "1,5,10,100",
    name: Annotated[str | None, typer.Option(help="Name of the dataset; default: that of the folder.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A scene that cannot be read is an error.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read scenes and labels, say tiles and splits; write nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a dataset of scenes of any size, band count and type: its tiles are cut when they are read.

    Nothing is copied: the folder holds tables, lists and how values become 8-bit RGB. Labels lie on the scenes' pixels
    or are polygons. Tiles without any data are left out; a scene that cannot be read is left out and named.
    """
    from rsmtdf_cache.prepare.cutting import Cut
    from rsmtdf_cache.prepare.splitting import parse_percents
    from rsmtdf_cache.rasters.scaling import parse_scale
    from rsmtdf_cache.tiling.request import TileRequest, parse_held, parse_percentiles
    from rsmtdf_cache.tiling.write import plan_tiles
    from rsmtdf_cache.tiling.write import tile as run

    limits = None if scale is None else parse_percentiles(scale) or parse_scale(scale)
    request = TileRequest(
        tuple(scenes), out, labels, classes, label_name, Cut(tile_px, overlap), parse_bands(bands), limits,
        parse_held(val, "--val"), parse_held(test, "--test"), split_by, block, seed,
        tuple(parse_percents(labeled)), name, strict,
    )  # fmt: skip
    with progress(quiet) as on_event:
        plan, written = (plan_tiles(request, on_event), False) if dry_run else run(request, on_event)
    if as_json:
        emit_json({"path": out, "written": written, **_as_data(plan)})
    elif not quiet:
        _show(plan, out)
        if dry_run:
            message("nothing was written", kind="note")
        elif not written:
            message(f"{out} holds this dataset already", kind="note")


def _as_data(plan: TilePlan) -> dict[str, Any]:
    return {
        "name": plan.header.name,
        "tile_px": plan.header.tile_px,
        "pixels": plan.header.pixels.rule.to_json() if plan.header.pixels is not None else None,
        "scenes": len(plan.layout.rasters),
        "tiles": len(plan.layout.windows),
        "empty_tiles": plan.layout.empty,
        "split_by": plan.dealt.by,
        "block": plan.dealt.block,
        "splits": {name: len(windows) for name, windows in plan.dealt.splits.items()},
        "labeled": {name: len(ids) for name, ids in plan.labeled.items()},
        "left_out": [{"scene": name, "reason": reason} for name, reason in plan.layout.left_out],
    }


def _show(plan: TilePlan, out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    header, layout, dealt = plan.header, plan.layout, plan.dealt
    assert header.pixels is not None
    size = f"{len(layout.rasters)} scenes, {len(layout.windows)} tiles of {header.tile_px} px"
    console().print(f"[bold]{escape(header.name)}[/]  {escape(str(out))}  {size}", soft_wrap=True)
    rule = header.pixels.rule
    ranges = "; ".join(f"{low:g} to {high:g}" for low, high in dict.fromkeys(rule.scale))
    whole = "scenes" if dealt.by == "scene" else f"blocks of {dealt.block} x {dealt.block} tiles"
    console().print(f"{rule.dtype}, bands {rule.bands}, {ranges}; dealt in whole {whole}", markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("", "scenes", "tiles", "with labels"):
        table.add_column(column, justify="right" if column else "left")
    for split, windows in dealt.splits.items():
        scenes = len({w.scene for w in windows})
        table.add_row(split, str(scenes), str(len(windows)), str(sum(w.labeled > 0 for w in windows)))
    for percent, ids in plan.labeled.items():
        table.add_row(f"labeled/{percent}", "", str(len(ids)), str(len(ids)))
    console().print(table)
    total = int(layout.pixels.sum())
    if total:
        shares = [f"{c.name} {100 * int(n) / total:.1f} %" for c, n in zip(header.classes, layout.pixels, strict=False)]
        shares.append(f"no label {100 * int(layout.pixels[-1]) / total:.1f} %")
        console().print(", ".join(shares), markup=False, soft_wrap=True)
    if layout.empty:
        message(f"{layout.empty} tiles without any data are left out", kind="note")
