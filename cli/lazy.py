"""Groups whose help is a static table; a command's module is imported when the command is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from rsmtdf_cli.console import new_app

__all__ = ["Entry", "lazy_group", "load"]


class Entry(NamedTuple):
    """Where a command lives, ``rsmtdf_cli.MODULE`` and its name there, and its line in the help of its group."""

    module: str
    attribute: str
    help: str


def load(name: str, entry: Entry) -> Any:
    """Return the command called ``name``, ready to run; imports its module."""
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


def lazy_group(entries: Mapping[str, Entry]) -> type[TyperGroup]:
    """Return the class of a group that lists stubs of ``entries`` and resolves a name to the real command."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            for name, entry in entries.items():
                self.add_command(TyperCommand(name, help=entry.help, callback=None), name)

        def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
            if args and args[0] in entries:
                return args[0], load(args[0], entries[args[0]]), args[1:]
            return super().resolve_command(ctx, args)

    return LazyGroup
