"""Open files that are kept for the next window of the same scene: opening one costs more than reading a tile.

A handle serves one thread at a time. It is never used in another process than the one that opened it (after a fork two
processes would share one position in the file), and not any more once the file has changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rsmtdf_cache.rasters.gdal import GDAL_CACHE_MB, gdal_settings

__all__ = ["FilePool"]

T = TypeVar("T")

_OPENING = threading.Lock()  # filters of warnings belong to the process, not to a thread


@dataclass(frozen=True)
class _Idle(Generic[T]):
    path: Path
    version: tuple[int, int, int]
    value: T
    stack: ExitStack


class FilePool(Generic[T]):
    """Files that ``open_file`` opens; up to ``limit`` stay open while nobody uses them. Threads may share it."""

    def __init__(self, open_file: Callable[[Path], AbstractContextManager[T]], limit: int = 32) -> None:
        self._open = open_file
        self._limit = limit
        self._idle: list[_Idle[T]] = []
        self._process = os.getpid()
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, path: Path) -> Iterator[T]:
        """Yield ``path``, open, for this thread alone. Raises what ``open_file`` raises."""
        import rasterio

        item = self._take(path)
        if item is None:
            with _OPENING, gdal_settings(), ExitStack() as stack:
                version = _version(path)
                value = stack.enter_context(self._open(path))
                item = _Idle(path, version, value, stack.pop_all())
        try:
            with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_MB):
                yield item.value
        except BaseException:
            item.stack.close()
            raise
        self._give(item)

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for item in idle:
            item.stack.close()

    def _take(self, path: Path) -> _Idle[T] | None:
        with self._lock:
            if self._process != os.getpid():
                self._idle, self._process = [], os.getpid()
            found = next((n for n in range(len(self._idle) - 1, -1, -1) if self._idle[n].path == path), None)
            item = None if found is None else self._idle.pop(found)
        if item is not None and item.version != _version(path):
            item.stack.close()
            return None
        return item

    def _give(self, item: _Idle[T]) -> None:
        with self._lock:
            self._idle.append(item)
            surplus = self._idle.pop(0) if len(self._idle) > self._limit else None
        if surplus is not None:
            surplus.stack.close()

    def __getstate__(self) -> dict[str, object]:
        """Return what another process gets: how files are opened, none that is open."""
        return {"open_file": self._open, "limit": self._limit}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _version(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (-1, -1, -1)
    return found.st_size, found.st_mtime_ns, found.st_ino
