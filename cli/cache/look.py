"""``rsmtdf cache info`` and ``preview``: what is in a store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.show import AnyStoreArgument, plain, png_file, show_arrays, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

if TYPE_CHECKING:
    from rsmtdf_cache.events import EventSink
    from rsmtdf_cache.sources import TileSource
    from rsmtdf_cache.store import FeatureStore

__all__ = ["info", "known_source", "preview"]


@command
def info(store: AnyStoreArgument, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Describe a store: dataset, teachers, arrays, sizes, snapshot."""
    from rsmtdf_cache.store import FeatureStore

    found = FeatureStore.open(store, verify_reads="never").describe()
    if json:
        emit_json(found)
        return
    if quiet:
        return
    splits = ", ".join(f"{name} {count}" for name, count in found["splits"].items())
    screen = console()
    screen.print(f"[bold]{plain(found['path'])}[/]  {plain(found['dataset'])}, {found['tile_px']}-px tiles: {splits}")
    screen.print(f"snapshot {found['snapshot'][:16]}, {size(found['nbytes'])}, {found['group_rows']} tiles per shard")
    if found["quarantined"]:
        names = ", ".join(sorted(found["quarantined"])[:5])
        screen.print(f"{len(found['quarantined'])} tiles left out: {plain(names)}")
    for item in found["teachers"]:
        weights = f"{item['weights_origin']}, sha256 {item['weights'][:12]}"
        screen.print(f"teacher {plain(item['name'])}: {plain(item['architecture'])}, weights {plain(weights)}")
    for profile in found["profiles"]:
        screen.print("numerics " + ", ".join(f"{k} {plain(str(v))}" for k, v in profile.items()))
    show_arrays(found["arrays"] + found["pixels"])


@command
def preview(
    store: AnyStoreArgument,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of the dataset the store was built from. Default: the one the catalogue remembers; without "
            "one, features only.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to write. Default: preview.png, none when --html is given.",
            show_default=False,
            parser=png_file,
            metavar="PNG",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Page to write: one file to click in, with everything inside.")
    ] = None,
    tiles: Annotated[
        str, typer.Option(metavar="N|ID,ID", help="How many tiles to show, or which ('12,' is the tile named 12).")
    ] = "6",
    array: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Arrays to show, such as 'dino*/*/block11'. Repeatable.")
    ] = None,
    patch: Annotated[
        str | None,
        typer.Option(
            metavar="TILE:Y,X",
            help="Patch that cosines are taken to, in tile pixels. Default: the centre of the first tile.",
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw what the teachers see: PCA colours, norms and similarity of each array, beside the tiles."""
    from rsmtdf_cache.preview import draw_preview
    from rsmtdf_cache.store import FeatureStore

    with progress(quiet) as on_event:
        opened = FeatureStore.open(store)
        done = draw_preview(
            opened, _source(opened, data, on_event), out if out or html else Path("preview.png"), html,
            _tiles(tiles, opened), array or (), None if patch is None else _patch(patch), on_event,
        )  # fmt: skip
    if json:
        emit_json(done)
        return
    if quiet:
        return
    for path in (done["png"], done["html"]):
        if path is not None:
            message(f"{path} ({size(path.stat().st_size)})", kind="wrote")
    if html is not None:
        worst = max(done["arrays"], key=lambda a: a["embedded"]["error_max"])
        message(
            f"cosines in the page differ by up to {worst['embedded']['error_max']:.4f} ({worst['key']})", kind="note"
        )


def _source(store: FeatureStore, data: Path | None, on_event: EventSink) -> TileSource | None:
    """Return the dataset in ``data``, or the one the catalogue remembers, if it is still there."""
    from rsmtdf_cache.errors import DataError
    from rsmtdf_cache.events import Warned
    from rsmtdf_cache.sources import open_source

    if data is not None:
        return open_source(data)
    known = known_source(store, on_event)
    if known is None:
        on_event(
            Warned("features only: the catalogue knows no dataset of this store; name its folder to see the tiles")
        )
        return None
    try:
        return open_source(known)
    except DataError as error:
        on_event(Warned(f"features only: {error}"))
        return None


def known_source(store: FeatureStore, on_event: EventSink) -> str | None:
    """Return the folder of the dataset that the catalogue remembers for ``store``, whether it is there or not."""
    from rsmtdf_cache.share.catalogue import registered_stores, same_place

    place = same_place(re.sub(r"(?<=.)@[0-9a-f]{8,64}$", "", store.shown) if "://" in store.shown else store.shown)
    return next((entry.data for entry in registered_stores(on_event) if entry.path == place), None)


def _tiles(text: str, store: FeatureStore) -> int | list[str]:
    """Return how many tiles, or the ids of ``text``. A number is a count, even where a tile has that name."""
    if text.strip().isdecimal():
        return int(text)
    if text in store.tiles:
        return [text]  # whatever its name holds
    return [part.strip() for part in text.split(",") if part.strip()]


def _patch(text: str) -> tuple[str, float, float]:
    tile, _, point = text.rpartition(":")
    try:
        y, x = (float(part) for part in point.split(","))
    except ValueError:
        raise typer.BadParameter(f"--patch {text!r}: write TILE:Y,X, such as t003:128,64 (tile pixels)") from None
    return tile, y, x
