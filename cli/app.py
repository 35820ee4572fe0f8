"""The command ``rsmtdf``. Help is a static table; a command's module is imported when the command is used."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from rsmtdf_cli.console import guard, new_app

__all__ = ["COMMANDS", "app", "load", "main"]


class _Entry(NamedTuple):
    module: str
    attribute: str
    help: str


#: Name of each command → where it lives and its line in the help.
COMMANDS: dict[str, _Entry] = {
    "data": _Entry("data", "app", "Make and check datasets; `data sample` builds the land-cover set."),
    "cache": _Entry("cache", "app", "Build, describe and verify stores of teacher features."),
    "select": _Entry("select", "select", "Choose the tiles worth labelling from stored features."),
    "train": _Entry("train", "app", "Train a student from a recipe, with or without cached features."),
    "eval": _Entry("evaluate", "evaluate", "Score a run on held-out tiles."),
    "predict": _Entry("predict", "predict", "Segment images, or make maps of scenes, with a run."),
    "export": _Entry("export", "export", "Write a run's student as an ONNX file that runs without the trainer."),
    "report": _Entry("report", "report", "Write one HTML page on runs: scores, differences, curves, pictures."),
    "bench": _Entry("bench", "app", "Reproduce the tables of the README; measure reading and building."),
    "version": _Entry("version", "version", "Print the versions of rsmtdf and of what it stands on."),
}


def load(name: str) -> Any:
    """Return the command called ``name``, ready to run; imports its module."""
    entry = COMMANDS[name]
    target: typer.Typer | Callable[..., Any] = getattr(
        importlib.import_module(f"rsmtdf_cli.{entry.module}"), entry.attribute
    )
    if not isinstance(target, typer.Typer):
        alone = new_app(entry.help)
        alone.command(name)(target)
        target = alone
    built = typer.main.get_command(target)
    built.name = name
    return built


class _LazyGroup(TyperGroup):
    """Lists stubs; resolves a name to the real command."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.help, callback=None), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] in COMMANDS:
            return args[0], load(args[0]), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with guard():
            return super().invoke(ctx)


_HELP = """Cache features of foundation models once, train segmentation students on them many times.

\b
Exit codes: 0 done, 1 a bug, 2 usage or recipe, 3 bad input data, 4 store and request
do not match, 5 interrupted (run again to continue), 6 disk, network or weights missing,
7 verify found damage."""

app = typer.Typer(
    cls=_LazyGroup,
    help=_HELP,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def _root() -> None:
    """Make the group a group even when typer is handed a single command."""


def main() -> None:
    """Run the command line; ends the process with an exit code."""
    # rasterio says this of its own rasters in memory while polygons are burnt; what lacks a place we say ourselves
    warnings.filterwarnings("ignore", message="Dataset has no geotransform")
    # Looking for plugins of pydantic reads the metadata of every installed package, at each start.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    app(prog_name="rsmtdf")
