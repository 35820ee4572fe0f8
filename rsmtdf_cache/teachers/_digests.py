"""Digests of weights that were computed before: a teacher that is loaded a second time is not hashed again.

An entry says: this very file (path, size, mtime, inode), read by this code into this network, gave this digest. It is a
short cut and nothing more: a cache that is missing, damaged or not writable is as good as none.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.files import read_json, replace_json
from rsmtdf_cache.home import cache_home
from rsmtdf_cache.specs import digest_of

__all__ = ["Stamp", "cache_file", "find_digest", "keep_digest", "stamp_of", "state_mark"]

_ENTRIES_MAX = 256
#: A file written this short a time ago can be written again without its mtime showing it.
_SETTLED_S = 2.0
#: Whose code turns a file into a network: layouts are converted by timm and by this package.
_READERS = ("rsmtdf", "torch", "timm", "open_clip_torch", "safetensors")


@dataclass(frozen=True)
class Stamp:
    """What tells one state of a file from another without reading it."""

    path: str
    nbytes: int
    mtime_ns: int
    inode: int

    @property
    def settled(self) -> bool:
        """Whether the file is old enough for its mtime to tell the next change."""
        return time.time() - self.mtime_ns / 1e9 > _SETTLED_S


def stamp_of(file: Path) -> Stamp:
    """Return the stamp of ``file``, links followed. Raises ``OSError``."""
    found = file.stat()
    return Stamp(str(file.resolve()), found.st_size, found.st_mtime_ns, found.st_ino)


def state_mark(network: nn.Module) -> tuple[Any, ...]:
    """Return a value that changes when a tensor of ``network`` is exchanged, moved or written in place."""
    return tuple((name, _place(t), t._version, t.dtype, tuple(t.shape)) for name, t in network.state_dict().items())


def _place(tensor: Tensor) -> int:
    return int(tensor.data_ptr())


def cache_file() -> Path:
    """Return where the digests are kept."""
    return cache_home() / "weights-digests.json"


def find_digest(stamp: Stamp, network: nn.Module, asked: str) -> str | None:
    """Return the digest that the file of ``stamp`` gave when it was last read into such a network, if it is known."""
    entry = _entries().get(_key(stamp, network, asked))
    return entry if isinstance(entry, str) and re.fullmatch(r"[0-9a-f]{64}", entry) else None


def keep_digest(stamp: Stamp, network: nn.Module, asked: str, digest: str) -> None:
    """Remember ``digest``. A file that changed a moment ago, or a cache that cannot be written, is passed over."""
    if not stamp.settled:
        return
    entries = _entries()
    entries.pop(key := _key(stamp, network, asked), None)
    entries[key] = digest
    newest = dict(list(entries.items())[-_ENTRIES_MAX:])
    with contextlib.suppress(OSError, RuntimeError):
        replace_json(cache_file(), {"order": list(newest), "digests": newest})


def _entries() -> dict[str, Any]:
    """Return the entries on disk, oldest first; none when the file is not there or not what was written."""
    try:
        body = read_json(cache_file())
        return {str(key): body["digests"][key] for key in body["order"]}
    except (OSError, FindingsError, KeyError, TypeError, RuntimeError):  # RuntimeError: no home folder
        return {}


def _key(stamp: Stamp, network: nn.Module, asked: str) -> str:
    shapes = [[n, str(t.dtype), list(t.shape)] for n, t in network.state_dict().items()]
    kind = f"{type(network).__module__}.{type(network).__qualname__}"
    parts = [
        stamp.path,
        stamp.nbytes,
        stamp.mtime_ns,
        stamp.inode,
        asked,
        kind,
        shapes,
        [_version(p) for p in _READERS],
    ]
    return digest_of(parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
