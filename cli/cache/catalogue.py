"""``rsmtdf cache list`` and ``forget``: the stores this user registered."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rsmtdf_cli.cache.show import plain, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

__all__ = ["forget", "list_"]


@command
def list_(json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the stores that were built or pulled here: content, size, the runs that used them."""
    from rsmtdf_cache.share.catalogue import catalogue_home, describe_stores

    with progress(quiet) as on_event:
        stores = describe_stores(on_event)
    if json:
        emit_json({"home": catalogue_home(), "stores": stores})
    elif stores:
        _show(stores)
    elif not quiet:
        message(
            f"no store is registered in {catalogue_home()}; `rsmtdf cache build` and `rsmtdf cache pull` register",
            kind="note",
        )


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
            f"cache forget {path}: {same_place(path)} is not registered.{did_you_mean(same_place(path), known)} "
            "`rsmtdf cache list` shows what is"
        )
    if not quiet:
        message(f"{same_place(path)} is no longer in the catalogue; its files are untouched", kind="note")


def _show(stores: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    table = Table("dataset", "teachers", "views", "tiles", "size", "snapshot", "runs", Column("path", overflow="fold"))
    for s in stores:
        path = plain(s["path"])
        if s["status"] == "ok":
            table.add_row(
                plain(s["dataset"]), plain(", ".join(s["teachers"])), plain(", ".join(s["views"])), str(s["tiles"]),
                size(s["nbytes"]), s["snapshot"][:12], _runs(s["runs"]), path,
            )  # fmt: skip
        else:
            what = plain(s["status"] if s["status"] == "missing" else f"unreadable: {s['reason']}")
            table.add_row(plain(s["dataset"]), f"[red]{what}[/]", "", "", "", "", _runs(s["runs"]), path)
    console().print(table)


def _runs(runs: list[dict[str, Any]]) -> str:
    names = [plain(r["recipe"]) for r in runs[:3]]
    return ", ".join(names) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
