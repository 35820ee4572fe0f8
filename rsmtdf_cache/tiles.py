"""The tile table: which tile has which row. A row number is the only join key of the project."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.parquet import write_plain
from rsmtdf_cache.tile_columns import (
    TileColumns,
    TileRecord,
    affines_of,
    all_differ,
    contents_of,
    ids_of,
    parts_of_ids,
    splits_of,
    texts_of,
)

__all__ = ["TileColumns", "TileRecord", "TileTable", "pixel_digest", "read_segment", "segment_bytes"]


#: A hole is shorter than a row group, whose rows ``manifest.py`` bounds.
_HOLE_ROWS_MAX = 2**24
#: Rows that are written as text at a time.
_STRIDE = 8192
#: The splits that people expect first, in this order.
_USUAL = ("train", "val", "test")


def pixel_digest(image: NDArray[np.uint8]) -> bytes:
    """Return the identity of a tile's content: sha256 (32 bytes) of shape and decoded pixels ``[H, W, 3]`` uint8."""
    total = hashlib.sha256(f"{image.dtype.str}{image.shape}".encode())
    total.update(np.ascontiguousarray(image).data)  # no copy: tiles can be large
    return total.digest()


class _Rows(Sequence[TileRecord | None]):
    """The records by row; None for holes. Records of files are made when they are looked at."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[TileRecord]]], rows: int) -> None:
        self._segments, self._rows = segments, rows
        self._firsts = [first for first, _ in segments]

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[TileRecord | None]:
        row = 0
        for first, records in self._segments:
            for _ in range(row, first):
                yield None
            yield from records
            row = first + len(records)

    @overload
    def __getitem__(self, index: int) -> TileRecord | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[TileRecord | None]: ...

    def __getitem__(self, index: int | slice) -> TileRecord | list[TileRecord | None] | None:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self._rows))]
        row = index + self._rows if index < 0 else index
        if not 0 <= row < self._rows:
            raise IndexError(index)
        first, records = self._segments[bisect_right(self._firsts, row) - 1]
        return records[row - first] if 0 <= row - first < len(records) else None


class TileTable:
    """Tiles by row. Rows come in segments; between two segments there can be holes (row groups never change)."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[TileRecord]]] = ()) -> None:
        """Raise ``FindingsError`` for segments that overlap. That no id stands twice is seen when ids are looked at."""
        self._segments = sorted(((first, r) for first, r in segments if len(r)), key=lambda s: s[0])
        rows = 0
        for first_row, records in self._segments:
            if first_row < rows:
                raise FindingsError(f"tile table: the segment at row {first_row} overlaps the one before it")
            if first_row - rows > _HOLE_ROWS_MAX:
                raise FindingsError(f"tile table: {first_row - rows} empty rows before row {first_row}")
            rows = first_row + len(records)
        self.records: Sequence[TileRecord | None] = _Rows(self._segments, rows)

    def __len__(self) -> int:
        """Return the number of rows, holes included."""
        return len(self.records)

    def __contains__(self, tile_id: object) -> bool:
        return tile_id in self._row_by_id

    @cached_property
    def ids(self) -> list[str]:
        """Tile ids by row, empty texts for holes."""
        return self.texts("id")

    @cached_property
    def _row_by_id(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for first, records in self._segments:
            rows.update(zip(ids_of(records), range(first, first + len(records)), strict=True))
        if len(rows) != sum(len(records) for _, records in self._segments):
            raise FindingsError("tile table: a tile id stands twice")
        return rows

    def row_of(self, tile_id: str) -> int:
        """Return the row of a tile. Raises ``KeyError``."""
        return self._row_by_id[tile_id]

    def record(self, row: int) -> TileRecord:
        """Return the tile of ``row``. Raises ``KeyError`` for a hole."""
        found = self.records[row]
        if found is None:
            raise KeyError(row)
        return found

    def check(self) -> None:
        """Raise ``FindingsError`` when a segment cannot be read, or a tile id stands twice."""
        for _, records in self._segments:
            if isinstance(records, TileColumns):
                records.check()
        if not all_differ([records for _, records in self._segments]):
            raise FindingsError("tile table: a tile id stands twice")

    def texts(self, name: str) -> list[str]:
        """Return the column ``id``, ``split``, ``source`` or ``crs`` by row, empty texts for holes."""
        found: list[str] = []
        for first, records in self._segments:
            found += [""] * (first - len(found))
            found += texts_of(records, name)
        return found

    @property
    def filled(self) -> NDArray[np.bool_]:
        """Whether a row has a tile ``[rows]``."""
        mask = np.zeros(len(self), np.bool_)
        for first, records in self._segments:
            mask[first : first + len(records)] = True
        return mask

    def rows_between(self, start: int, stop: int) -> list[int]:
        """Return the rows from ``start`` to before ``stop`` that have a tile."""
        rows: list[int] = []
        for first, records in self._segments:
            rows += range(max(start, first), min(stop, first + len(records)))
        return rows

    @property
    def digests(self) -> NDArray[np.uint8]:
        """Content digests ``[rows, 32]`` uint8, zeros for holes."""
        found = np.zeros((len(self), 32), np.uint8)
        for first, records in self._segments:
            found[first : first + len(records)] = contents_of(records)
        return found

    @property
    def affines(self) -> NDArray[np.float64]:
        """Affine coefficients ``[rows, 6]`` of the tiles' places, NaN where not known."""
        found = np.full((len(self), 6), np.nan)
        for first, records in self._segments:
            found[first : first + len(records)] = affines_of(records)
        return found

    @property
    def splits(self) -> dict[str, int]:
        """Number of tiles per split."""
        total: Counter[str] = Counter()
        for _, records in self._segments:
            total.update(splits_of(records))
        return {name: total[name] for name in (*_USUAL, *sorted(set(total) - set(_USUAL))) if name in total}

    def digest(self) -> str:
        """Return the identity of the table: ids, contents and rows; not splits, paths or places."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Sha256 of the canonical JSON of ``[[id, digest], …]``, null for a hole, written piece by piece."""
        total = hashlib.sha256(b"[")
        comma = b""
        for part in self._json_parts():
            total.update(comma + part.encode())
            comma = b","
        total.update(b"]")
        return total.hexdigest()

    def _json_parts(self) -> Iterator[str]:
        row = 0
        for first, records in self._segments:
            for start in range(row, first, _STRIDE):
                yield ",".join(["null"] * (min(first, start + _STRIDE) - start))
            contents = contents_of(records)
            for n, ids in enumerate(parts_of_ids(records, _STRIDE)):
                start = n * _STRIDE
                names = json.dumps(ids, ensure_ascii=False, separators=("\n", ":"))[1:-1]
                digests = contents[start : start + _STRIDE].tobytes().hex("\n", -32)
                pairs = zip(names.split("\n"), digests.split("\n"), strict=True)
                yield ",".join([f'[{name},"{digest}"]' for name, digest in pairs])
            row = first + len(records)


def segment_bytes(records: Iterable[TileRecord]) -> bytes:
    """Return one table segment as Parquet bytes."""
    import pyarrow as pa

    rows = list(records)
    return write_plain(
        {
            "id": pa.array([r.id for r in rows], pa.string()),
            "digest": pa.array([r.digest for r in rows], pa.binary(32)),
            "split": pa.array([r.split for r in rows], pa.string()),
            "source": pa.array([r.source for r in rows], pa.string()),
            "crs": pa.array([r.crs for r in rows], pa.string()),
            "affine": pa.array([list(r.affine) for r in rows], pa.list_(pa.float64())),
        }
    )


def read_segment(path: Path, rows: int | None = None, splits: object = None) -> TileColumns:
    """Return the tiles of a segment file, read when they are looked at.

    ``rows``, ``splits``: tiles, in all and by split, as its record says. Raises ``FindingsError`` when the file is
    too small for them or, without them, no plain Parquet file; ``check`` of what is returned reads all of it.
    """
    known = splits if isinstance(splits, dict) and all(isinstance(n, int) for n in splits.values()) else None
    return TileColumns(path, rows, known)
