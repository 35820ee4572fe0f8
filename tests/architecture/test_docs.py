"""The page of commands has every command and every option there is; ``make docs`` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rsmtdf_cli.app import COMMANDS
from rsmtdf_cli.lazy import load

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def commands() -> Iterator[tuple[str, Any]]:
    for name in COMMANDS:
        found = load(name, COMMANDS[name])
        yield name, found
        for sub, command in getattr(found, "commands", {}).items():
            yield f"{name} {sub}", command


@pytest.mark.parametrize(("words", "command"), list(commands()), ids=lambda v: v if isinstance(v, str) else "")
def test_the_page_has_every_command_with_its_options(words: str, command: Any) -> None:
    title = f"\n## `rsmtdf {words}`\n"
    assert title in PAGE, "run `make docs`"
    section = PAGE.split(title)[1].split("\n## ")[0]
    for parameter in command.params:
        for option in getattr(parameter, "opts", ()):
            if option.startswith("--") and not getattr(parameter, "hidden", False):
                assert option in section, f"{option}: run `make docs`"
