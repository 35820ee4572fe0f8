"""One shard file of Zarr v3's ``sharding_indexed`` codec: written tile by tile, read through mmap.

Layout: the inner chunks one after another, then the index: for each inner chunk, in C order of the shard's chunk grid,
two little-endian uint64 (offset, length; both 2**64 - 1 = absent), then the crc32c of the index (4 bytes).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache import files
from rsmtdf_cache.codecs.compressors import compress, decompress
from rsmtdf_cache.errors import FindingsError

__all__ = ["RowRead", "ShardLayout", "ShardReader", "ShardWriter"]

#: One crop: its place in the batch, the row of the shard, its first token (y, x). A plain tuple: there are many.
RowRead = tuple[int, int, int, int]

_ABSENT = np.uint64(2**64 - 1)
_COPIED_AT_ONCE = 2**24

#: Advice to read ahead is cut short by the system at what a device reads at once, which is seldom less than this.
_ADVICE = 128 * 1024
_WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)  # None: no such system


@dataclass(frozen=True)
class ShardLayout:
    """Shape of one shard: ``rows`` tiles of ``[height, width, channels]``, cut into chunks of at most ``side`` tokens.

    Chunks of one map are of equal size (37 tokens = 19 + 19, not 32 + 32), so that little is padded.
    """

    rows: int
    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    fill: float
    compressor: str = "none"
    side: int = 32

    @property
    def chunk(self) -> tuple[int, int, int, int]:
        """Inner chunk shape (tile, y, x, channel)."""
        return (1, _balanced(self.height, self.side), _balanced(self.width, self.side), self.channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Chunks per map (y, x)."""
        return (math.ceil(self.height / self.chunk[1]), math.ceil(self.width / self.chunk[2]))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shard shape in elements, chunk padding included."""
        return (self.rows, self.grid[0] * self.chunk[1], self.grid[1] * self.chunk[2], self.channels)

    @property
    def chunk_nbytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def row_nbytes(self) -> int:
        """Bytes of one tile's map on disk, without its index entries and before any compressor."""
        return self.grid[0] * self.grid[1] * self.chunk_nbytes

    @property
    def index_nbytes(self) -> int:
        return self.rows * self.grid[0] * self.grid[1] * 16 + 4

    def nbytes(self, rows: int) -> int:
        """Bytes of a shard file that holds ``rows`` tiles; with a compressor it becomes about that or smaller."""
        return rows * self.row_nbytes + self.index_nbytes


def _balanced(tokens: int, most: int) -> int:
    return math.ceil(tokens / math.ceil(tokens / most))


class ShardWriter:
    """Writes one shard file; memory does not grow with its size. ``close()`` adds the index and syncs to disk."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path, self.layout = path, layout
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._index = np.full((layout.rows, *layout.grid, 2), _ABSENT, "<u8")
        self.nbytes = 0

    def add(self, row: int, stored: NDArray[Any]) -> None:
        """Append the map ``[height, width, channels]`` of the shard's row ``row``."""
        layout = self.layout
        if stored.shape != (layout.height, layout.width, layout.channels):
            raise ValueError(f"shard row {row}: got {stored.dtype}{stored.shape}, the shard holds {layout}")
        self.add_rows(row, 0, stored)

    def add_rows(self, row: int, y: int, stored: NDArray[Any]) -> None:
        """Append rows of tokens ``[n, width, channels]`` of the map, in order; ``y``, the first, is on a chunk's edge.

        ``n`` is a multiple of the chunk's height, but for the last rows of the map.
        """
        layout = self.layout
        _, height, width, _ = layout.chunk
        last = y + len(stored) == layout.height
        if stored.shape[1:] != (layout.width, layout.channels) or stored.dtype != layout.dtype:
            raise ValueError(f"shard row {row}: got {stored.dtype}{stored.shape}, the shard holds {layout}")
        if y % height or (len(stored) % height and not last):
            raise ValueError(f"shard row {row}: rows {y} to {y + len(stored)} are no whole chunks of {height}")
        for i in range(math.ceil(len(stored) / height)):
            for j in range(layout.grid[1]):
                part = stored[i * height : (i + 1) * height, j * width : (j + 1) * width]
                if part.shape[:2] != (height, width):
                    full = np.full((height, width, layout.channels), layout.fill, layout.dtype)
                    full[: part.shape[0], : part.shape[1]] = part
                    part = full
                data = compress(layout.compressor, np.ascontiguousarray(part))
                self._index[row, y // height + i, j] = (self.nbytes, len(data))
                self._put(data)

    def close(self) -> str:
        """Write the index, sync the file, and return the sha256 of the whole file."""
        index = self._index.tobytes()
        self._put(index + google_crc32c.value(index).to_bytes(4, "little"))
        files.fsync_file(self._file, self.path)
        self._file.close()
        return self._hash.hexdigest()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.nbytes += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@lru_cache(maxsize=64)
def _order_of_tokens(height: int, width: int, ch: int, cw: int) -> NDArray[np.intp]:
    """Return where each token of a map comes, ``[height, width]``, counted over the chunks as they come."""
    ys, xs = np.arange(height)[:, None], np.arange(width)
    order: NDArray[np.intp] = ((ys // ch * math.ceil(width / cw) + xs // cw) * ch + ys % ch) * cw + xs % cw
    return order


class ShardReader:
    """A shard file mapped into memory. Every index entry is checked against the file before it is used."""

    def __init__(self, path: Path, layout: ShardLayout, held: mmap.mmap | None = None) -> None:
        """``held``: all of the file's bytes in memory, which are then read instead of it (``copied``)."""
        self.path, self.layout = path, layout
        self.in_memory = held is not None
        if held is None:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < layout.index_nbytes:
                    raise FindingsError(
                        f"{path}: {size} bytes are too few for its index; run `rsmtdf cache verify --deep`"
                    )
                held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map, size = held, len(held)
        index = self._map[size - layout.index_nbytes :]
        if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
            raise FindingsError(f"{path}: the shard index is damaged; run `rsmtdf cache verify --deep`")
        table = np.frombuffer(index[:-4], "<u8").reshape(layout.rows, *layout.grid, 2)
        self.present = (table != _ABSENT).all(axis=(1, 2, 3))
        used = table[self.present]
        end = size - layout.index_nbytes
        offsets, lengths = used[..., 0], used[..., 1]
        # Compared so that nothing overflows: an offset can be any number below 2**64.
        inside = (lengths <= np.uint64(end)) & (offsets <= np.uint64(end) - np.minimum(lengths, np.uint64(end)))
        if layout.compressor == "none":
            inside &= lengths == layout.chunk_nbytes
        if not inside.all():
            raise FindingsError(f"{path}: the shard index points outside the file; run `rsmtdf cache verify --deep`")
        self._offsets, self._lengths = table[..., 0], table[..., 1]
        # What every read needs, looked up once.
        self._here: list[bool] = self.present.tolist()
        self._single = layout.grid == (1, 1)
        # Tokens of many small chunks are gathered; of few large ones (pixels), parts of chunks are copied.
        gathered = not self._single and layout.side <= 32
        self._tokens = _order_of_tokens(layout.height, layout.width, *layout.chunk[1:3]) if gathered else None
        self._maps, self._places = self._in_order(end) if self._single or gathered else (None, [])
        # Which rows the system was told of. Smaller ones come with their neighbours, without being asked for.
        self._advises = not self.in_memory and _WILLNEED is not None and layout.row_nbytes >= _ADVICE // 2
        self.left_memory()

    def _in_order(self, end: int) -> tuple[NDArray[Any] | None, list[int]]:
        """Return the maps as they lie in the file, and each row's place among them.

        ``[place, y, x, channels]``, or ``[place, token of all chunks, channels]`` if a map has several chunks. None
        when chunks are compressed, or do not follow one another as the writer of this module has them, which the format
        allows.
        """
        layout = self.layout
        if layout.compressor != "none" or not self.present.any():
            return None, []
        chunks = layout.grid[0] * layout.grid[1]
        first = self._offsets[:, :1, :1]
        steps = np.arange(chunks, dtype=np.uint64).reshape(layout.grid) * np.uint64(layout.chunk_nbytes)
        regular = (self._offsets == first + steps) & (first % np.uint64(layout.row_nbytes) == 0)
        if not regular[self.present].all():
            return None, []
        count = end // layout.row_nbytes
        shape = (
            (count, *layout.chunk[1:])
            if self._single
            else (count, chunks * math.prod(layout.chunk[1:3]), layout.channels)
        )
        maps = np.frombuffer(self._map, layout.dtype, math.prod(shape)).reshape(shape)
        return maps, (first[:, 0, 0] // np.uint64(layout.row_nbytes)).tolist()

    def has(self, row: int) -> bool:
        """Return whether the shard holds the map of ``row``."""
        return self._here[row]

    def will_read(self, rows: Iterable[int]) -> int:
        """Let the system fetch the maps of ``rows`` from the disk meanwhile: each of them once, so that it costs
        nothing when they lie in memory. Return how many were new.
        """
        asked, new = self._asked, 0
        for row in rows:
            if not asked[row]:
                asked[row], new = 1, new + 1
                if self._here[row]:
                    self._advise(row)
        return new

    def left_memory(self) -> None:
        """Forget which rows were asked for, because their pages were taken for something else."""
        self._asked = bytearray(b"\0" if self._advises else b"\1") * self.layout.rows

    def _advise(self, row: int) -> None:
        start = int(self._offsets[row].min()) // mmap.PAGESIZE * mmap.PAGESIZE
        end = int((self._offsets[row] + self._lengths[row]).max())
        if _WILLNEED is None or end - start > 2 * self.layout.row_nbytes + mmap.PAGESIZE:  # its chunks lie far apart
            return
        for place in range(start, end, _ADVICE):
            with contextlib.suppress(OSError):  # it is advice: a file system may not take it
                self._map.madvise(_WILLNEED, place, min(_ADVICE, end - place))

    def read(self, row: int, y: int, x: int, out: NDArray[Any]) -> None:
        """Fill ``out`` ``[h, w, channels]`` with the map of ``row`` from token ``(y, x)`` on; absent = fill value."""
        self.read_rows([(0, row, y, x)], out[None])

    def read_rows(self, reads: Sequence[RowRead], out: NDArray[Any]) -> None:
        """Fill the places of ``reads`` in ``out`` ``[n, h, w, channels]``, C-contiguous; absent = fill value.

        Of raw chunks every token is copied once, from the mapping to ``out``, by one call of numpy for a crop: a call
        takes as long as the copy of a small crop.
        """
        maps, places, here = self._maps, self._places, self._here
        height, width = out.shape[1:3]
        if maps is None or not all([here[row] for _, row, _, _ in reads]):
            for place, row, y, x in reads:
                if here[row]:
                    self._read_chunks(row, y, x, out[place])
                else:
                    out[place] = self.layout.fill
        elif self._single:
            for place, row, y, x in reads:
                out[place] = maps[places[row], y : y + height, x : x + width]
        else:
            tokens = self._tokens
            assert tokens is not None
            for place, row, y, x in reads:
                # mode: with "raise" numpy fills a copy of out first.
                maps[places[row]].take(tokens[y : y + height, x : x + width], 0, out[place], "clip")

    def _read_chunks(self, row: int, y: int, x: int, out: NDArray[Any]) -> None:
        """Fill ``out`` from chunks that are packed, or lie in any order."""
        height, width = out.shape[:2]
        ch, cw = self.layout.chunk[1:3]
        for i in range(y // ch, (y + height - 1) // ch + 1):
            for j in range(x // cw, (x + width - 1) // cw + 1):
                chunk = self._chunk(row, i, j).reshape(ch, cw, -1)
                y0, y1 = max(y, i * ch), min(y + height, (i + 1) * ch)
                x0, x1 = max(x, j * cw), min(x + width, (j + 1) * cw)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = chunk[y0 - i * ch : y1 - i * ch, x0 - j * cw : x1 - j * cw]

    def view(self, row: int) -> NDArray[Any] | None:
        """Return the map of ``row`` as it lies in the file, read-only; None if it is not here, or not in one piece."""
        if not self._here[row] or self._maps is None or not self._single:
            return None
        found: NDArray[Any] = self._maps[self._places[row]]
        found.flags.writeable = False
        return found

    def copied(self) -> ShardReader:
        """Return a reader of the same bytes in memory of this process, that nothing evicts; forks share them."""
        held = mmap.mmap(-1, len(self._map), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # fewer, larger pages where the system has them
            held.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, len(held), _COPIED_AT_ONCE):
            held[start : start + _COPIED_AT_ONCE] = self._map[start : start + _COPIED_AT_ONCE]
        return ShardReader(self.path, self.layout, held)

    def _chunk(self, row: int, i: int, j: int) -> NDArray[Any]:
        layout = self.layout
        offset, length = int(self._offsets[row, i, j]), int(self._lengths[row, i, j])
        count = layout.chunk_nbytes // layout.dtype.itemsize
        if layout.compressor == "none":
            return np.frombuffer(self._map, layout.dtype, count, offset)
        data = decompress(layout.compressor, self._map[offset : offset + length], layout.chunk_nbytes, str(self.path))
        return np.frombuffer(data, layout.dtype, count)

    def check_chunks(self) -> None:
        """Unfold every chunk. Raises ``FindingsError`` for one that does not hold what the array says."""
        for row in np.flatnonzero(self.present) if self.layout.compressor != "none" else ():
            for i, j in np.ndindex(self.layout.grid):
                self._chunk(int(row), i, j)

    def sha256(self) -> str:
        """Return the sha256 of the file as mapped."""
        return hashlib.sha256(self._map).hexdigest()
