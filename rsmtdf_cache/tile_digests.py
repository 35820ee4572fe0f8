"""Digests of tiles that were decoded before, so that a build of a million tiles is continued without decoding them.

An entry is trusted when size, mtime and inode of the image are the recorded ones, or else when the sha256 of the file
is; it belongs to one decoder version (decision 14). It is a short cut: a build compares the pixels it encodes with the
digest again, and a cache that is missing, damaged or not writable is as good as none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.files import replace_file, sha256_file
from rsmtdf_cache.home import cache_home
from rsmtdf_cache.parquet import read_plain, write_plain
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_cache.specs import digest_of

__all__ = ["TileDigests"]

#: A file written this short a time ago can be written again without its mtime showing it.
_SETTLED_NS = 2_000_000_000
#: A scene is not hashed for each of its tiles: without size, mtime and inode its tiles are decoded again.
_OF_A_SCENE = bytes(32)
_COLUMNS = ("path", "nbytes", "mtime_ns", "inode", "sha256", "digest")


@dataclass(frozen=True)
class _Entry:
    nbytes: int
    mtime_ns: int
    inode: int
    sha256: bytes
    digest: bytes


class TileDigests:
    """Pixel digests of the tiles of ``source``. Safe among threads."""

    def __init__(self, source: TileSource) -> None:
        name = digest_of([str(source.root.resolve()), source.tile_px, source.decoder])[:16]
        self.path = cache_home() / "tiles" / f"{name}.parquet"
        self._known: Mapping[str, _Entry] = _read(self.path)
        self._seen: dict[str, _Entry] = {}

    def find(self, tile: Tile) -> bytes | None:
        """Return the pixel digest of ``tile`` when it was decoded before and the file is the same, else None."""
        entry = self._known.get(tile.place)
        if entry is None:
            return None
        try:
            found = tile.image.stat()
            same = (found.st_size, found.st_mtime_ns, found.st_ino) == (entry.nbytes, entry.mtime_ns, entry.inode)
            if not same and not self._same_bytes(tile, found.st_size, entry):
                return None
        except OSError:
            return None
        self._seen[tile.place] = _Entry(found.st_size, found.st_mtime_ns, found.st_ino, entry.sha256, entry.digest)
        return entry.digest

    def keep(self, tile: Tile, digest: bytes) -> None:
        """Note the digest of the pixels that ``tile`` was just decoded to."""
        with contextlib.suppress(OSError):
            if tile.image.suffix.lower() == ".vrt":  # its sources may change while it does not
                return
            found = tile.image.stat()
            if time.time_ns() - found.st_mtime_ns > _SETTLED_NS:
                sha256 = _OF_A_SCENE if tile.origin_px is not None else bytes.fromhex(sha256_file(tile.image))
                self._seen[tile.place] = _Entry(found.st_size, found.st_mtime_ns, found.st_ino, sha256, digest)

    @staticmethod
    def _same_bytes(tile: Tile, nbytes: int, entry: _Entry) -> bool:
        if tile.origin_px is not None or nbytes != entry.nbytes:
            return False
        return sha256_file(tile.image) == entry.sha256.hex()

    def save(self) -> None:
        """Write down what is known by now; silent when the folder cannot be written to."""
        import pyarrow as pa

        entries = sorted({**self._known, **self._seen}.items())
        if dict(entries) == self._known:
            return
        data = write_plain(
            {
                "path": pa.array([name for name, _ in entries], pa.string()),
                "nbytes": pa.array([e.nbytes for _, e in entries], pa.int64()),
                "mtime_ns": pa.array([e.mtime_ns for _, e in entries], pa.int64()),
                "inode": pa.array([e.inode for _, e in entries], pa.uint64()),
                "sha256": pa.array([e.sha256 for _, e in entries], pa.binary(32)),
                "digest": pa.array([e.digest for _, e in entries], pa.binary(32)),
            }
        )
        with contextlib.suppress(OSError):
            replace_file(self.path, data)


def _read(path: Path) -> dict[str, _Entry]:
    try:
        columns = read_plain(path, _COLUMNS, row_nbytes=64)
    except (OSError, FindingsError):
        return {}
    return {name: _Entry(*facts) for name, *facts in zip(*columns.values(), strict=True)}
