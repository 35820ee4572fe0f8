"""Write ``docs/cli.md`` from the commands, and check that every relative link of the pages leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rsmtdf_cli.app import COMMANDS
from rsmtdf_cli.lazy import load

ROOT = Path(__file__).parents[1]
CLI_PAGE = ROOT / "docs" / "cli.md"
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")


def cli_reference() -> str:
    """Return the page: the help of the program and of each command, as the terminal shows it."""
    commands: list[list[str]] = [[]]
    for name in COMMANDS:
        commands.append([name])
        commands += [[name, sub] for sub in getattr(load(name, COMMANDS[name]), "commands", {})]
    parts = ["# Command line\n\nWritten by `make docs` from the commands; do not edit.\n"]
    for words in commands:
        asked = [sys.executable, "-m", "rsmtdf_cli", *words, "--help"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "110"})
        parts.append(f"\n## `{' '.join(['rsmtdf', *words])}`\n\n```text\n{shown.stdout.strip()}\n```\n")
    return "".join(parts)


def broken_links() -> Iterator[str]:
    """Yield ``page: link`` for each relative link of README, CONTRIBUTING, CHANGELOG and docs/ without a target."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "rsmtdf_cache" / "FORMAT.md"]:
        if not page.is_file():
            continue
        for target, _ in LINK.findall(page.read_text()):
            if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
                yield f"{page.relative_to(ROOT)}: {target}"


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_reference())
    broken = list(broken_links())
    print(f"wrote {CLI_PAGE.relative_to(ROOT)}")
    if broken:
        sys.exit("links that lead nowhere:\n  " + "\n  ".join(broken))
