"""Find a plug-in by name: a module in the kind's own folder, or what another package registered.

A kind is a folder of this package (``teachers``, ``sources``, ``codecs``). Another package joins one by an entry point
in the group ``rsmtdf.<kind>``. Only a name that a user wrote is ever looked up; a manifest never triggers an import.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from importlib.metadata import entry_points
from typing import Any

from rsmtdf_cache.errors import UsageError, did_you_mean

__all__ = ["find", "plugin_names"]

_MODULE = re.compile(r"^[a-z][a-z0-9_]*$")


def plugin_names(kind: str) -> list[str]:
    """Return the sorted names of every plug-in of ``kind``; imports none of them."""
    return sorted({*_own(kind), *(point.name for point in entry_points(group=f"rsmtdf.{kind}"))})


def find(kind: str, name: str) -> Any:
    """Return the module ``rsmtdf_cache.<kind>.<name>``, or the object the entry point ``name`` names.

    Own modules win over entry points. Raises ``UsageError`` for an unknown name, with the known ones.
    """
    if name in _own(kind):
        return importlib.import_module(f"rsmtdf_cache.{kind}.{name}")
    for point in entry_points(group=f"rsmtdf.{kind}"):
        if point.name == name:
            return point.load()
    known = plugin_names(kind)
    raise UsageError(f"no plug-in {name!r} among the {kind}.{did_you_mean(name, known)} Known: {', '.join(known)}")


def _own(kind: str) -> list[str]:
    folder = importlib.util.find_spec(f"rsmtdf_cache.{kind}") if _MODULE.match(kind) else None
    if folder is None or folder.submodule_search_locations is None:
        return []
    return [
        module.name
        for module in pkgutil.iter_modules(folder.submodule_search_locations)
        if _MODULE.match(module.name) and module.name != "base"
    ]
