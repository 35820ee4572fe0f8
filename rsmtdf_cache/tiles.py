"""The tile table: which tile has which row. A row number is the only join key of the project."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.parquet import read_plain, write_plain
from rsmtdf_cache.specs import digest_of

__all__ = ["TileRecord", "TileTable", "pixel_digest", "read_segment", "segment_bytes"]


#: A hole is shorter than a row group, whose rows ``manifest.py`` bounds.
_HOLE_ROWS_MAX = 2**24


def pixel_digest(image: NDArray[np.uint8]) -> bytes:
    """Return the identity of a tile's content: sha256 (32 bytes) of shape and decoded pixels ``[H, W, 3]`` uint8."""
    total = hashlib.sha256(f"{image.dtype.str}{image.shape}".encode())
    total.update(np.ascontiguousarray(image).data)  # no copy: tiles can be large
    return total.digest()


@dataclass(frozen=True)
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


class TileTable:
    """Tiles by row. Rows come in segments; between two segments there can be holes (row groups never change)."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[TileRecord]]] = ()) -> None:
        self.records: list[TileRecord | None] = []
        for first_row, records in sorted(segments, key=lambda s: s[0]):
            if first_row < len(self.records):
                raise FindingsError(f"tile table: the segment at row {first_row} overlaps the one before it")
            if first_row - len(self.records) > _HOLE_ROWS_MAX:
                raise FindingsError(f"tile table: {first_row - len(self.records)} empty rows before row {first_row}")
            self.records += [None] * (first_row - len(self.records))
            self.records += records
        self.ids = [r.id if r else "" for r in self.records]
        self._rows = {r.id: row for row, r in enumerate(self.records) if r}
        if len(self._rows) != sum(1 for r in self.records if r):
            raise FindingsError("tile table: a tile id stands twice")

    def __len__(self) -> int:
        """Return the number of rows, holes included."""
        return len(self.records)

    def __contains__(self, tile_id: object) -> bool:
        return tile_id in self._rows

    def row_of(self, tile_id: str) -> int:
        """Return the row of a tile. Raises ``KeyError``."""
        return self._rows[tile_id]

    def record(self, row: int) -> TileRecord:
        """Return the tile of ``row``. Raises ``KeyError`` for a hole."""
        found = self.records[row]
        if found is None:
            raise KeyError(row)
        return found

    @property
    def digests(self) -> NDArray[np.uint8]:
        """Content digests ``[rows, 32]`` uint8, zeros for holes."""
        joined = b"".join(r.digest if r else bytes(32) for r in self.records)
        return np.frombuffer(joined, np.uint8).reshape(-1, 32)

    @property
    def splits(self) -> dict[str, int]:
        """Number of tiles per split."""
        return dict(Counter(r.split for r in self.records if r))

    def digest(self) -> str:
        """Return the identity of the table: ids, contents and rows; not splits, paths or places."""
        return digest_of([[r.id, r.digest.hex()] if r else None for r in self.records])


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


def read_segment(path: Path) -> list[TileRecord]:
    """Return the records of a segment file. Raises ``FindingsError`` when it is damaged."""
    columns = read_plain(path, ("id", "digest", "split", "source", "crs", "affine"), row_nbytes=32)
    try:
        return [TileRecord(i, d, s, o, c, tuple(a)) for i, d, s, o, c, a in zip(*columns.values(), strict=True)]
    except (TypeError, ValueError) as error:
        raise FindingsError(f"{path}: the tile table is damaged ({error})") from None
