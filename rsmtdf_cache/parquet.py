"""Parquet files of a store: plain columns only, so that a file cannot unfold into more than its own size.

Compression, dictionaries and nulls are refused on reading: with them a few bytes can ask for terabytes of memory.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import FindingsError

__all__ = ["read_plain", "write_plain"]

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
    """Return ``columns`` of the file at ``path`` (or of ``data``, its bytes) as lists.

    ``row_nbytes``: what every row takes at least. Raises ``FindingsError`` for a damaged file, a missing column, or one
    that would unfold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = path.read_bytes() if data is None else data
    try:
        file = pq.ParquetFile(io.BytesIO(raw))
        _refuse_unfolding(path, file.metadata, len(raw), row_nbytes)
        found: dict[str, list[Any]] = file.read(columns=list(columns), use_threads=False).to_pydict()
    except (pa.ArrowException, KeyError, ValueError, OSError, UnicodeError) as error:
        raise FindingsError(f"{path}: damaged, not the Parquet file it should be ({error})") from None
    missing = [name for name in columns if name not in found]
    if missing:
        raise FindingsError(f"{path}: lacks the column {missing[0]!r}")
    return {name: found[name] for name in columns}


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
