"""How much memory this machine has, and the refusal of work that would not fit into it."""

from __future__ import annotations

import os
from pathlib import Path

from rsmtdf_cache.errors import ResourceError

__all__ = ["available_nbytes", "memory_nbytes", "require_memory"]

#: Files of Linux that say what this process may use: of the machine, and of its control group (a container, a job).
_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def memory_nbytes() -> int:
    """Return the bytes of memory of this machine, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def available_nbytes() -> int | None:
    """Return the bytes that can be had without pushing others out: of this machine, or of this process's group.

    What files left in memory counts as free, for it goes first. None where the system does not say.
    """
    found: list[int] = []
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        limit, used = ((_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        facts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        files = int(facts.get("active_file", 0)) + int(facts.get("inactive_file", 0))
        if limit != "max":
            found.append(int(limit) - int(used) + files)
    except (OSError, ValueError):
        pass
    return max(0, min(found)) if found else None


def require_memory(need: int, what: str, advice: str) -> None:
    """Raise ``ResourceError`` when ``need`` bytes are more than half of the memory.

    ``what`` with its verb (``features of 3 tiles take``) begins the message, ``advice`` ends it.
    """
    memory = memory_nbytes()
    if memory and need > memory / 2:
        raise ResourceError(f"{what} {need / 1e9:.1f} GB of memory, this machine has {memory / 1e9:.1f} GB; {advice}")
