"""A part of the tile table as columns: a million tiles are a few arrays, not a million objects, read when asked for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.parquet import count_rows, read_columns

__all__ = [
    "TileColumns",
    "TileRecord",
    "affines_of",
    "all_differ",
    "contents_of",
    "ids_of",
    "parts_of_ids",
    "splits_of",
    "texts_of",
]

COLUMNS = ("id", "digest", "split", "source", "crs", "affine")
#: A row takes its digest at least.
_ROW_NBYTES = 32
#: Rows that become objects together when somebody goes over all of them.
_STRIDE = 4096


@dataclass(frozen=True, slots=True)
class TileRecord:
    """One row of the table. ``affine`` is empty when the place of the tile is not known."""

    id: str
    digest: bytes
    split: str
    source: str
    crs: str = ""
    affine: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "digest": self.digest.hex(), "split": self.split, "source": self.source,
            "crs": self.crs, "affine": list(self.affine),
        }  # fmt: skip


class TileColumns(Sequence[TileRecord]):
    """The tiles of one Parquet file, as a sequence of records. A column is read when it is first asked for.

    The file's sha256 was compared by who made this object; a file that is whole and holds something else all the same
    raises ``FindingsError`` at the first look at its rows, and at once in ``check``. Safe among threads.
    """

    def __init__(self, path: Path, rows: int | None = None, splits: Mapping[str, int] | None = None) -> None:
        """``rows``, ``splits``: tiles, in all and by split, where recorded: then the file is not looked into here.

        Raises ``FindingsError`` for a file that is not plain Parquet, or too small for its rows.
        """
        if rows is not None and not 0 <= rows * _ROW_NBYTES <= path.stat().st_size:
            raise FindingsError(f"{path}: {path.stat().st_size} bytes, the record says {rows} rows")
        self._path = path
        self._rows = count_rows(path, _ROW_NBYTES) if rows is None else rows
        self._splits = None if splits is None else dict(splits)
        self._columns: dict[str, Any] = {}
        self._lists: dict[str, list[Any]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of tiles."""
        return self._rows

    def __iter__(self) -> Iterator[TileRecord]:
        for first in range(0, self._rows, _STRIDE):
            yield from self._records(first, min(self._rows, first + _STRIDE))

    @overload
    def __getitem__(self, index: int) -> TileRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[TileRecord]: ...

    def __getitem__(self, index: int | slice) -> TileRecord | list[TileRecord]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self._rows))]
        row = index + self._rows if index < 0 else index
        if not 0 <= row < self._rows:
            raise IndexError(index)
        return self._records(row, row + 1)[0]

    def texts(self, name: str) -> list[str]:
        """Return the column ``id``, ``split``, ``source`` or ``crs``."""
        found = self._lists.get(name)
        if found is None:
            found = self.column(name).to_pylist()
            if name == "id":  # the one that is asked for again and again
                self._lists[name] = found
        return found

    @property
    def contents(self) -> NDArray[np.uint8]:
        """Content digests ``[rows, 32]`` uint8; do not write to it."""
        column = self.column("digest")
        nbytes = np.frombuffer(column.buffers()[1], np.uint8) if len(column) else np.zeros(0, np.uint8)
        return nbytes[32 * column.offset : 32 * (column.offset + len(column))].reshape(-1, 32)

    @property
    def affines(self) -> NDArray[np.float64]:
        """Affine coefficients ``[rows, 6]``, NaN where not known. Raises ``FindingsError`` for another number."""
        column = self.column("affine")
        lengths = np.asarray(column.value_lengths())
        if not np.isin(lengths, (0, 6)).all():
            raise FindingsError(f"{self._path}: the tile table is damaged (an affine transform has 6 coefficients)")
        found = np.full((len(column), 6), np.nan)
        found[lengths == 6] = np.asarray(column.flatten()).reshape(-1, 6)
        return found

    @property
    def splits(self) -> dict[str, int]:
        """Number of tiles per split, as recorded."""
        return _counted(self.column("split")) if self._splits is None else dict(self._splits)

    def check(self) -> None:
        """Raise ``FindingsError`` unless every column can be read and the recorded splits are those of the rows."""
        for name in COLUMNS:
            column = self.column(name)
            if name == "split" and self.splits != _counted(column):
                raise FindingsError(f"{self._path}: its splits are not those that are recorded of it")
            if name not in ("id", "digest"):  # what the table's identity is made of is read again
                with self._lock:
                    self._columns.pop(name, None)

    def parts(self, name: str, stride: int) -> Iterator[list[Any]]:
        """Yield the values of a column, ``stride`` at a time: no more of them are objects at once."""
        column = self.column(name)
        for first in range(0, len(column), stride):
            yield column.slice(first, stride).to_pylist()

    def column(self, name: str) -> Any:
        """Return a column as ``pyarrow.Array`` without nulls. Raises ``FindingsError``."""
        with self._lock:
            if name not in self._columns:
                self._columns[name] = self._read(name)
            return self._columns[name]

    def _read(self, name: str) -> Any:
        import pyarrow as pa

        wanted = {"digest": pa.binary(32), "affine": pa.list_(pa.float64())}.get(name, pa.string())
        try:
            column = read_columns(self._path, (name,), _ROW_NBYTES)[name]
            if column.type != wanted:
                column = column.cast(wanted)
        except FileNotFoundError:
            raise FindingsError(f"{self._path}: the tile table is missing; it was there when it was opened") from None
        except (pa.ArrowException, ValueError) as error:
            raise FindingsError(f"{self._path}: the tile table is damaged ({error})") from None
        if len(column) != self._rows:
            raise FindingsError(f"{self._path}: {len(column)} rows, the record says {self._rows}")
        if column.null_count or (name == "affine" and column.values.null_count):
            raise FindingsError(f"{self._path}: the tile table is damaged (the column {name!r} lacks values)")
        return column

    def _records(self, first: int, stop: int) -> list[TileRecord]:
        parts = [self.column(name).slice(first, stop - first).to_pylist() for name in COLUMNS]
        return [TileRecord(i, d, s, o, c, tuple(a)) for i, d, s, o, c, a in zip(*parts, strict=True)]


def _counted(column: Any) -> dict[str, int]:
    """Return how often each text occurs."""
    import pyarrow.compute as pc

    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


def all_differ(parts: Sequence[Sequence[TileRecord]]) -> bool:
    """Return whether no tile id stands twice in all ``parts`` together; compared in Arrow, without a Python text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [p.column("id") if isinstance(p, TileColumns) else pa.array(ids_of(p), pa.string()) for p in parts]
    return bool(pc.count_distinct(pa.chunked_array(columns, pa.string())).as_py() == sum(map(len, columns)))


def parts_of_ids(records: Sequence[TileRecord], stride: int) -> Iterator[list[str]]:
    """Yield the ids of ``records``, ``stride`` at a time."""
    if isinstance(records, TileColumns):
        yield from records.parts("id", stride)
    else:
        for first in range(0, len(records), stride):
            yield [r.id for r in records[first : first + stride]]


def ids_of(records: Sequence[TileRecord]) -> list[str]:
    """Return the ids of ``records``."""
    return texts_of(records, "id")


def texts_of(records: Sequence[TileRecord], name: str) -> list[str]:
    """Return the column ``id``, ``split``, ``source`` or ``crs`` of ``records``."""
    return records.texts(name) if isinstance(records, TileColumns) else [getattr(r, name) for r in records]


def contents_of(records: Sequence[TileRecord]) -> NDArray[np.uint8]:
    """Return the content digests ``[n, 32]`` uint8 of ``records``."""
    if isinstance(records, TileColumns):
        return records.contents
    return np.frombuffer(b"".join(r.digest for r in records), np.uint8).reshape(-1, 32)


def affines_of(records: Sequence[TileRecord]) -> NDArray[np.float64]:
    """Return the affine coefficients ``[n, 6]`` of ``records``, NaN where not known."""
    if isinstance(records, TileColumns):
        return records.affines
    return np.asarray([r.affine or (np.nan,) * 6 for r in records], np.float64).reshape(-1, 6)


def splits_of(records: Sequence[TileRecord]) -> dict[str, int]:
    """Return the number of ``records`` per split."""
    return records.splits if isinstance(records, TileColumns) else dict(Counter(r.split for r in records))
