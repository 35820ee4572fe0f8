"""``rsmtdf cache fidelity``: how far a store is from its live teachers, crop by crop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.look import known_source
from rsmtdf_cli.cache.show import plain, png_file, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

if TYPE_CHECKING:
    from rsmtdf_cache.events import EventSink
    from rsmtdf_cache.fidelity import FidelityReport
    from rsmtdf_cache.sources import TileSource
    from rsmtdf_cache.store import FeatureStore

__all__ = ["fidelity"]


@command
def fidelity(
    places: Annotated[
        list[str],
        typer.Argument(
            help="One feature store or several to compare (folder or URL[@SNAPSHOT]), then the dataset's folder "
            "(default: the one the catalogue remembers).",
            show_default=False,
            metavar="STORE... [DATA]",
        ),
    ],
    tiles: Annotated[int, typer.Option(metavar="N", help="How many tiles to compare.")] = 16,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a teacher's weights are: NAME,weights=FILE or NAME,pretrained=none,seed=N; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="PNG file to draw the comparison into.", show_default=False, parser=png_file, metavar="PNG"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: cuda if there is one).")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare what a store returns with what its teachers give for the very same pixels: crops, turns, CutMix.

    Cosines, relative error and centred-kernel alignment for every array, beside the levels of chance. Several stores
    are compared on the same tiles.
    """
    from rsmtdf_cache.fidelity import measure_fidelity
    from rsmtdf_cache.request import parse_teacher
    from rsmtdf_cache.store import FeatureStore

    asked = [parse_teacher(text) for text in teacher or []]
    with progress(quiet) as on_event:
        named, data = _stores_and_data(places)
        stores = [FeatureStore.open(place) for place in named]
        report = measure_fidelity(stores, _source(stores, data, on_event), tiles, asked, on_event, device=device)
        if out is not None:
            from rsmtdf_cache.fidelity.picture import draw_fidelity

            draw_fidelity(out, report)
    if json:
        emit_json({**report.to_json(), "png": out})
    elif not quiet:
        _show(report)
        if out is not None:
            message(f"{out} ({size(out.stat().st_size)})", kind="wrote")


def _stores_and_data(places: list[str]) -> tuple[list[str], Path | None]:
    """Return which places are stores; the last one is the dataset when it is a dataset's folder."""
    last = Path(places[-1])
    if len(places) > 1 and last.is_dir() and not (last / "manifest.json").is_file():
        return places[:-1], last
    return places, None


def _source(stores: list[FeatureStore], data: Path | None, on_event: EventSink) -> TileSource:
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.sources import open_source

    if data is not None:
        return open_source(data)
    known = next((place for store in stores if (place := known_source(store, on_event)) is not None), None)
    if known is None:
        raise UsageError(
            f"the live teachers need the tiles, and the catalogue knows no dataset of {stores[0].shown}; name its "
            "folder after the store: rsmtdf cache fidelity STORE DATA"
        )
    return open_source(known)


def _show(report: FidelityReport) -> None:
    """Print a section per array, the cases as its rows."""
    from rich.table import Table

    from rsmtdf_cache.fidelity import summary

    table = Table("array / what is read", "tokens", "cosine", "worst 1%", "stand.", "worst 1%", "error", "CKA", "inner",
                  "edge")  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    several = len(report.stores) > 1
    for array in sorted(report.arrays, key=lambda a: (a.array.split("/")[0], report.arrays.index(a))):
        where = f"{report.stores[array.store][0]}: " if several else ""
        grid = "x".join(map(str, array.grid))
        facts = f"{array.codec}, {grid}x{array.channels}, {size(array.nbytes_per_tile)} a tile"
        table.add_section()
        table.add_row(f"[bold]{plain(where + array.array)}[/]\n{plain(facts)}")
        for line in summary(report, array):
            numbers = (line.cosine, line.cosine_worst, line.standardised, line.standardised_worst, line.error, line.cka,
                       line.interior, line.edge)  # fmt: skip
            table.add_row(f"  {line.label}", str(line.tokens), *("" if v is None else f"{v:.4f}" for v in numbers))
    screen = console()
    screen.print(table)
    screen.print(
        f"{len(report.tiles)} tiles of {plain(report.data)}. cosine: in the teacher's scale; stand.: standardised per "
        "channel, as training compares; inner, edge: stand. far from and near the edge of crop or box"
    )
    for arrays, case, reason in report.skipped:
        screen.print(f"{plain(arrays)}: no {case}: {plain(reason)}")
