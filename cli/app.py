"""The command ``rsmtdf``."""

from __future__ import annotations

import os
import warnings
from typing import Any

import typer

from rsmtdf_cli.console import guard
from rsmtdf_cli.lazy import Entry, lazy_group

__all__ = ["COMMANDS", "app", "main"]


#: Name of each command → where it lives and its line in the help.
COMMANDS: dict[str, Entry] = {
    "data": Entry("data", "app", "Make and check datasets; `data sample` builds the land-cover set."),
    "cache": Entry("cache", "app", "Build, describe and verify stores of teacher features."),
    "select": Entry("select", "select", "Choose the tiles worth labelling from stored features."),
    "train": Entry("train", "app", "Train a student from a recipe, with or without cached features."),
    "eval": Entry("evaluate", "evaluate", "Score a run on held-out tiles."),
    "predict": Entry("predict", "predict", "Segment images, or make maps of scenes, with a run."),
    "export": Entry("export", "export", "Write a run's student as an ONNX file that runs without the trainer."),
    "report": Entry("report", "report", "Write one HTML page on runs: scores, differences, curves, pictures."),
    "bench": Entry("bench", "app", "Reproduce the tables of the README; measure reading and building."),
    "version": Entry("version", "version", "Print the versions of rsmtdf and of what it stands on."),
}


class _Root(lazy_group(COMMANDS)):  # type: ignore[misc]
    """Loads a command, and runs it, under the rules for errors."""

    def invoke(self, ctx: Any) -> Any:
        with guard():
            return super().invoke(ctx)


_HELP = """Cache features of foundation models once, train segmentation students on them many times.

\b
Exit codes: 0 done, 1 a bug, 2 usage or recipe, 3 bad input data, 4 store and request
do not match, 5 interrupted (run again to continue), 6 disk, network or weights missing,
7 verify found damage."""

app = typer.Typer(
    cls=_Root,
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
