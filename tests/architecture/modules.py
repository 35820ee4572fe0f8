"""The project's modules as syntax trees, for the tests of this folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"rsmtdf_cache": ROOT / "rsmtdf_cache", "rsmtdf_train": ROOT / "rsmtdf_train", "rsmtdf_cli": ROOT / "cli"}


@dataclass(frozen=True)
class Module:
    """One file of a package."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def imports(self) -> Iterator[tuple[str, int]]:
        """Yield (absolute module name, line) of every import, also those inside functions."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: relative import; write the absolute name"
                yield node.module or "", node.lineno


@cache
def modules() -> tuple[Module, ...]:
    """Return every module of the three packages."""
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(p for p in parts if p != "__init__")))
            text = path.read_text()
            found.append(Module(name, path, text, ast.parse(text)))
    return tuple(found)
