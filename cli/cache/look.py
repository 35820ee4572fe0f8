"""``rsmtdf cache info`` and ``preview``: what is in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsmtdf_cli.cache.show import AnyStoreArgument, plain, show_arrays, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message

__all__ = ["info", "preview"]


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
    show_arrays(found["arrays"])


@command
def preview(
    store: AnyStoreArgument,
    data: Annotated[Path, typer.Argument(help="Folder of the dataset the store was built from.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    tiles: Annotated[int, typer.Option(help="Number of tiles to show.")] = 6,
    quiet: QuietOption = False,
) -> None:
    """Draw each array as PCA colours beside the tiles (one basis per array, so that colours compare)."""
    from rsmtdf_cache.preview import pca_picture
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.store import FeatureStore

    path = pca_picture(FeatureStore.open(store), open_source(data), out, tiles=tiles)
    if not quiet:
        message(str(path), kind="wrote")
