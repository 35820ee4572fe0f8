"""How arrays, sizes and text of a store are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rsmtdf_cli.console import console

__all__ = ["AnyStoreArgument", "StoreArgument", "plain", "show_arrays", "size"]


def _folder(text: str) -> Path:
    if "://" in text and not text.startswith("file://"):
        from rsmtdf_cache.share.address import redact

        raise typer.BadParameter(
            f"{redact(text)} is remote; this command works on folders: `rsmtdf cache pull URL DIR` brings it here"
        )
    return Path(text.removeprefix("file://"))


#: A store on this machine; for what changes it or needs all of its files.
StoreArgument = Annotated[
    Path, typer.Argument(help="Folder of the feature store.", show_default=False, parser=_folder, metavar="STORE")
]
#: A store anywhere: a folder or a URL, with @SNAPSHOT at its end or without.
AnyStoreArgument = Annotated[
    str, typer.Argument(help="Feature store: folder or URL[@SNAPSHOT].", show_default=False, metavar="STORE")
]


def show_arrays(arrays: list[dict[str, Any]]) -> None:
    """Print a table of the arrays of a store."""
    from rich.table import Column, Table

    table = Table(Column("array", no_wrap=True), "tiles", "tokens", "channels", "stride px", "codec", "size")
    for a in arrays:
        table.add_row(
            plain(a["key"]), str(a["tiles"]), "x".join(map(str, a["grid"])), str(a["channels"]),
            f"{a['stride_tile_px']:g}", a["codec"], size(a["nbytes"]),
        )  # fmt: skip
    console().print(table)


def size(nbytes: float) -> str:
    """Return ``nbytes`` for people: ``"1.2 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def plain(text: str) -> str:
    """Return ``text`` so that rich prints it as it is."""
    from rich.markup import escape

    return escape(text)
