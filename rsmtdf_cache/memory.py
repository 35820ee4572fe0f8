"""How much memory this machine has, and the refusal of work that would not fit into it."""

from __future__ import annotations

import os

from rsmtdf_cache.errors import ResourceError

__all__ = ["memory_nbytes", "require_memory"]


def memory_nbytes() -> int:
    """Return the bytes of memory of this machine, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def require_memory(need: int, what: str, advice: str) -> None:
    """Raise ``ResourceError`` when ``need`` bytes are more than half of the memory.

    ``what`` with its verb (``features of 3 tiles take``) begins the message, ``advice`` ends it.
    """
    memory = memory_nbytes()
    if memory and need > memory / 2:
        raise ResourceError(f"{what} {need / 1e9:.1f} GB of memory, this machine has {memory / 1e9:.1f} GB; {advice}")
