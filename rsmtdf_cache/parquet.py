"""Parquet files of a store: plain columns only, so that a file cannot unfold into more than its own size.

Compression, dictionaries and nulls are refused on reading: with them a few bytes can ask for terabytes of memory.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import FindingsError

__all__ = ["count_rows", "read_batches", "read_columns", "read_plain", "write_plain"]

_PLAIN = {"PLAIN", "RLE", "BIT_PACKED"}  # the latter two hold levels (of lists) only


def write_plain(columns: dict[str, Any]) -> bytes:
    """Return a Parquet file of ``columns`` (name → ``pyarrow.Array``), uncompressed and without dictionaries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, use_dictionary=False, compression="none", write_statistics=False)
    return bytes(sink.getvalue().to_pybytes())


def read_plain(
    path: Path, columns: tuple[str, ...], row_nbytes: int, data: bytes | None = None
) -> dict[str, list[Any]]:
    """Return ``columns`` of the file at ``path`` (or of ``data``, its bytes) as lists: see ``read_columns``."""
    found = read_columns(path, columns, row_nbytes, data)
    try:
        return {name: column.to_pylist() for name, column in found.items()}
    except UnicodeError as error:
        raise _damaged(path, error) from None


def read_columns(path: Path, columns: tuple[str, ...], row_nbytes: int, data: bytes | None = None) -> dict[str, Any]:
    """Return ``columns`` of the file at ``path`` (or of ``data``, its bytes) as ``pyarrow.Array``, each of one piece.

    Nothing else of the file is read. ``row_nbytes``: what every row takes at least. Raises ``FindingsError`` for a
    damaged file, a missing column, or one that would unfold.
    """
    import pyarrow as pa

    with _open(path, row_nbytes, data) as file:
        _refuse_missing(path, file, columns)
        try:
            table = file.read(columns=list(columns), use_threads=False)
            table.validate(full=True)  # texts are UTF-8, lists lie within their values
            return {name: _whole(table.column(name)) for name in columns}
        except (pa.ArrowException, KeyError, ValueError, OSError, UnicodeError) as error:
            raise _damaged(path, error) from None


def read_batches(path: Path, columns: tuple[str, ...], row_nbytes: int, rows: int) -> Iterator[dict[str, Any]]:
    """Yield ``columns`` of the file at ``path``, ``rows`` rows at a time, as ``pyarrow.Array``.

    Raises what ``read_columns`` raises.
    """
    import pyarrow as pa

    with _open(path, row_nbytes) as file:
        _refuse_missing(path, file, columns)
        try:
            for batch in file.iter_batches(rows, columns=list(columns), use_threads=False):
                batch.validate(full=True)
                yield {name: batch.column(name) for name in columns}
        except (pa.ArrowException, KeyError, ValueError, OSError, UnicodeError) as error:
            raise _damaged(path, error) from None


def count_rows(path: Path, row_nbytes: int) -> int:
    """Return the rows of the file at ``path``; no column is read. Raises what ``read_columns`` raises."""
    with _open(path, row_nbytes) as file:
        return int(file.metadata.num_rows)


@contextlib.contextmanager
def _open(path: Path, row_nbytes: int, data: bytes | None = None) -> Iterator[Any]:
    """Yield the ``pyarrow.parquet.ParquetFile`` after a look at what it would unfold to."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    nbytes = path.stat().st_size if data is None else len(data)
    # Not mapped into memory: the pages of a file would count as this process's.
    with pa.OSFile(str(path)) if data is None else io.BytesIO(data) as source:
        try:
            file = pq.ParquetFile(source, pre_buffer=False)
            _refuse_unfolding(path, file.metadata, nbytes, row_nbytes)
        except (pa.ArrowException, KeyError, ValueError, OSError, UnicodeError) as error:
            raise _damaged(path, error) from None
        yield file


def _refuse_missing(path: Path, file: Any, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise FindingsError(f"{path}: lacks the column {missing[0]!r}")


def _whole(column: Any) -> Any:
    """Return a chunked column as one array; small columns come so."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _damaged(path: Path, error: Exception) -> FindingsError:
    return FindingsError(f"{path}: damaged, not the Parquet file it should be ({error})")


def _refuse_unfolding(path: Path, metadata: Any, nbytes: int, row_nbytes: int) -> None:
    if metadata.num_rows * row_nbytes > nbytes:
        raise FindingsError(f"{path}: {nbytes} bytes cannot hold {metadata.num_rows} rows")
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if (
                column.compression != "UNCOMPRESSED"
                or not set(column.encodings) <= _PLAIN
                or column.num_values > nbytes
            ):
                raise FindingsError(f"{path}: column {column.path_in_schema!r} is not stored plainly; it is refused")
