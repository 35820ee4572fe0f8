"""``rsmtdf cache list``, ``register`` and ``forget``: the stores this user registered."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from rsmtdf_cli.cache.show import plain, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

__all__ = ["forget", "list_", "register"]


@command
def list_(json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the stores that were built or pulled here: content, size, the runs that used them."""
    from rsmtdf_cache.home import data_home
    from rsmtdf_cache.share.catalogue import describe_stores

    with progress(quiet) as on_event:
        stores = describe_stores(on_event)
    if json:
        emit_json({"home": data_home(), "stores": stores})
    elif quiet:
        return
    elif stores:
        _show(stores)
    else:
        message(
            f"no store is registered in {data_home()}; `rsmtdf cache build` and `pull` register what they make, "
            "`rsmtdf cache register STORE` one that is there",
            kind="note",
        )


@command
def register(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder or URL of the store.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Dataset the store was built from, for `verify --repair`.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Put a store into the catalogue as it is: one that was moved, copied, or is read at its URL."""
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.share.address import Address
    from rsmtdf_cache.share.catalogue import enter_store
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.store import FeatureStore

    if (snapshot := Address.parse(path).snapshot) is not None:
        raise UsageError(f"cache register: the catalogue names stores, not snapshots; leave @{snapshot} away")
    store = FeatureStore.open(path, verify_reads="never")
    if data is not None:
        source = open_source(data)
        if source.tile_px != store.tile_px:
            raise UsageError(
                f"--data {data}: has tiles of {source.tile_px} px, {store.shown} of {store.tile_px} px; give the "
                "dataset it was built from"
            )
    entry = enter_store(path, data, store.manifest.dataset)
    if not quiet:
        message(f"{entry.path} is in the catalogue", kind="note")


@command
def forget(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder or URL of the store.", show_default=False)],
    quiet: QuietOption = False,
) -> None:
    """Take a store out of the catalogue; the store itself stays as it is."""
    from rsmtdf_cache.errors import UsageError, did_you_mean
    from rsmtdf_cache.share.catalogue import forget_store, registered_stores, same_place

    if not forget_store(path):
        known = [entry.path for entry in registered_stores()]
        raise UsageError(
            f"cache forget: {same_place(path)} is not registered.{did_you_mean(same_place(path), known)} "
            "`rsmtdf cache list` shows what is"
        )
    if not quiet:
        message(f"{same_place(path)} is no longer in the catalogue; its files are untouched", kind="note")


def _show(stores: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    table = Table("dataset", "teachers", "views", "tiles", "size", "snapshot", "runs", Column("path", overflow="fold"))
    for s in stores:
        runs, path = plain(_runs(s["runs"])), plain(s["path"])
        if s["status"] == "ok":
            table.add_row(
                plain(s["dataset"]), plain(", ".join(s["teachers"])), plain(", ".join(s["views"])),
                f"{s['complete']} of {s['tiles']}", size(s["nbytes"]), s["snapshot"][:12], runs, path,
            )  # fmt: skip
        else:
            table.add_row(plain(s["dataset"]), f"[red]{s['status']}[/]", "", "", "", "", runs, path)
    console().print(table)
    for s in stores:
        if s["status"] == "missing":
            message(
                f"{s['path']}: {s['reason']}; `rsmtdf cache forget {quote(s['path'])}` takes it out; if it was moved, "
                "`rsmtdf cache register NEW-PATH` enters it there",
                kind="missing",
            )
        elif s["status"] == "unreadable":
            message(f"{s['path']}: {s['reason']}", kind="unreadable")


def _runs(runs: list[dict[str, Any]]) -> str:
    return f"{len(runs)}, last {Path(runs[0]['run']).name}" if runs else ""
