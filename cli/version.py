"""``rsmtdf version``: what is installed, read from package metadata, so that nothing heavy is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, emit_json

__all__ = ["version", "versions"]

_PACKAGES = (
    "rsmtdf",
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "zarr",
    "xarray",
    "numpy",
    "pydantic",
    "pyarrow",
)


def versions() -> dict[str, str]:
    """Return name → version of Python, this package and the libraries that decide results; "-" = not installed."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = installed(package)
        except PackageNotFoundError:
            found[package] = "-"
    return found


@command
def version(json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Print the versions of rsmtdf and of what it stands on; with -q the version of rsmtdf alone."""
    found = versions()
    if json:
        emit_json(found)
    elif quiet:
        typer.echo(found["rsmtdf"])
    else:
        for name, text in found.items():
            typer.echo(f"{name:16} {text}")
