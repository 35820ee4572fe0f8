"""The digest of a weights file that was read before, for whoever compares teachers without reading one."""

from __future__ import annotations

from pathlib import Path

from rsmtdf_cache.errors import RsmtdfError

__all__ = ["known_digest"]


def known_digest(teacher: str, file: Path) -> str | None:
    """Return the digest that ``file`` gave as the weights of ``teacher``, or None when this machine never computed it.

    The file is not read: its digest is looked up by path, size and time of change. The network is made with random
    weights, because the digest belongs to the file in this very network.
    """
    from rsmtdf_cache.teachers import load
    from rsmtdf_cache.teachers._digests import cache_file, find_digest, stamp_of
    from rsmtdf_cache.teachers.base import TeacherRequest

    if not (cache_file().is_file() and file.is_file()):
        return None
    try:
        network = getattr(load(TeacherRequest(teacher, "none")), "network", None)
        return None if network is None else find_digest(stamp_of(file), network, teacher)
    except (RsmtdfError, OSError, MemoryError):
        return None
