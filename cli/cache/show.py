"""How arrays, sizes and text of a store are shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rsmtdf_cache.units import size
from rsmtdf_cli.console import console

__all__ = [
    "AnyStoreArgument",
    "StoreArgument",
    "build_place",
    "local_folder",
    "plain",
    "png_file",
    "show_arrays",
    "size",
]


def _folder(text: str) -> Path:
    return _local(text, "this command works on folders: `rsmtdf cache pull URL DIR` brings it here")


def local_folder(text: str) -> Path:
    """Return the folder that ``text``, a path or a ``file://`` URL, names: what an option's ``parser`` does.

    Raises ``typer.BadParameter`` for another URL.
    """
    return _local(text, "write to a folder; `rsmtdf cache push FOLDER URL` publishes a store")


def build_place(text: str) -> Path | str:
    """Return the folder, or the URL as it stands, that ``--out TEXT`` of a build names: an option's ``parser``.

    Raises ``typer.BadParameter`` for what is left of a URL that went through a path.
    """
    scheme, found, _ = text.partition("://")
    if found and scheme.lower() not in ("file", "local"):
        return text
    return _local(text, "write it with two slashes, e.g. s3://bucket/store")


def _local(text: str, instead: str) -> Path:
    scheme, found, _ = text.partition("://")
    if found and scheme.lower() in ("file", "local"):
        from rsmtdf_cache.share.address import Address

        return Address.parse(text).path
    # One slash is what is left of a URL that went through a path.
    if found or re.match(r"(?:s3a?|gs|gcs|hf|https?|abfss?|ftp|sftp|ssh):/", text):
        from rsmtdf_cache.share.address import redact_typed

        raise typer.BadParameter(
            f"{redact_typed(text) if found else text.partition(':')[0] + ':/…'} is remote; {instead}"
        )
    return Path(text)


#: A store on this machine; for what changes it or needs all of its files.
StoreArgument = Annotated[
    Path, typer.Argument(help="Folder of the feature store.", show_default=False, parser=_folder, metavar="STORE")
]
#: A store anywhere: a folder or a URL, with @SNAPSHOT at its end or without.
AnyStoreArgument = Annotated[
    str, typer.Argument(help="Feature store: folder or URL[@SNAPSHOT].", show_default=False, metavar="STORE")
]


def show_arrays(arrays: list[dict[str, Any]]) -> None:
    """Print a table of the arrays of a store, then what its fixed views and windows are."""
    from rich.table import Column, Table

    names = ("tiles", "tokens", "channels", "stride px", "codec (cosine, standardised)", "size")
    table = Table(Column("array", no_wrap=True), *names)
    for a in arrays:
        table.add_row(
            plain(a["key"]), str(a["tiles"]), "x".join(map(str, a["grid"])), str(a["channels"]),
            f"{a['stride_tile_px']:g}", _codec(a), size(a["nbytes"]),
        )  # fmt: skip
    console().print(table)
    for name, text in _special_views(arrays).items():
        console().print(f"{plain(name)}: {plain(text)}")


def _codec(array: dict[str, Any]) -> str:
    """Return the codec and, where it loses more than rounding, the mean cosines of features and standardised ones."""
    quality = array.get("quality")
    if quality is None or array["codec"].startswith("float16"):
        return plain(array["codec"])
    seen = "" if quality["held_out"] else ", seen tiles"
    return plain(f"{array['codec']} ({quality['cosine']:.5f}, {quality['standardised']:.4f}{seen})")


def _special_views(arrays: list[dict[str, Any]]) -> dict[str, str]:
    """Return what stands in the names of fixed views and views in windows, by view, for people."""
    from rsmtdf_cache.fixed_views import describe_view
    from rsmtdf_cache.specs import ViewSpec

    views = dict.fromkeys(ViewSpec.from_json(a["view"]) for a in arrays)
    return {v.name: describe_view(v) for v in views if not v.is_whole or v.windows is not None}


def plain(text: str) -> str:
    """Return ``text`` so that rich prints it as it is, without characters that would command the terminal."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def png_file(text: str) -> Path:
    """Return the path of a picture to write: what an option's ``parser`` does. Raises ``typer.BadParameter``."""
    if Path(text).suffix.lower() != ".png":
        raise typer.BadParameter(f"{text!r}: pictures are PNG files; give a name that ends in .png")
    return Path(text)
