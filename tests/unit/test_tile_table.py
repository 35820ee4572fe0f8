"""A tile table read from a file is the table of its records, whatever the ids; what a file can lie about is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.parquet import write_plain
from rsmtdf_cache.specs import digest_of
from rsmtdf_cache.tiles import TileColumns, TileRecord, TileTable, read_segment, segment_bytes

_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
_PLACES = st.sampled_from([(), (10.0, 0.0, 3e5, 0.0, -10.0, 5e6)])


@st.composite
def segments(draw: st.DrawFn) -> list[tuple[int, list[TileRecord]]]:
    ids = draw(st.lists(_TEXTS.filter(bool), unique=True, min_size=1, max_size=12))
    records = [
        TileRecord(name, draw(st.binary(min_size=32, max_size=32)), draw(st.sampled_from(["val", "train", "mine"])),
                   draw(_TEXTS), draw(_TEXTS), draw(_PLACES))
        for name in ids
    ]  # fmt: skip
    cut = draw(st.integers(0, len(records) - 1))
    return [
        (first, part) for first, part in ((0, records[:cut]), (cut + draw(st.integers(0, 3)), records[cut:])) if part
    ]


def _written(folder: Path, parts: list[tuple[int, list[TileRecord]]]) -> list[tuple[int, TileColumns]]:
    found = []
    for first, records in parts:
        file = folder / f"{first}.parquet"
        file.write_bytes(segment_bytes(records))
        found.append((first, read_segment(file, len(records))))
    return found


@given(parts=segments())
@settings(max_examples=60, deadline=None)
def test_a_table_of_columns_is_the_table_of_its_records(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, list[TileRecord]]]
) -> None:
    held = [(first, list(records)) for first, records in parts]
    read = _written(tmp_path_factory.mktemp("t"), parts)
    rows: list[TileRecord | None] = []
    for first, records in held:
        rows += [None] * (first - len(rows))
        rows += records
    for table in (TileTable(held), TileTable(read)):
        assert list(table.records) == rows == [table.records[n] for n in range(len(table))] and len(table) == len(rows)
        assert table.ids == [r.id if r else "" for r in rows]
        assert {r.id: table.row_of(r.id) for r in rows if r} == {r.id: n for n, r in enumerate(rows) if r}
        assert all(r.id in table for r in rows if r) and "no such" * 9 not in table
        # The identity is defined by the canonical JSON of the whole list (FORMAT.md, 16).
        assert table.digest() == digest_of([[r.id, r.digest.hex()] if r else None for r in rows])
        assert table.digests.tobytes() == b"".join(r.digest if r else bytes(32) for r in rows)
        assert table.filled.tolist() == [r is not None for r in rows]
        assert table.rows_between(1, len(rows) - 1) == [n for n in range(1, len(rows) - 1) if rows[n]]
        assert table.splits == {s: sum(r is not None and r.split == s for r in rows) for s in table.splits}
        assert sum(table.splits.values()) == sum(r is not None for r in rows)
        wanted = [r.affine if r and r.affine else (np.nan,) * 6 for r in rows]
        assert np.array_equal(table.affines, np.array(wanted), equal_nan=True)
        for name in ("split", "source", "crs"):
            assert table.texts(name) == [getattr(r, name) if r else "" for r in rows]
        table.check()
    for (_, records), (_, columns) in zip(held, read, strict=True):
        assert segment_bytes(columns) == segment_bytes(records)
        assert columns[-1] == records[-1] and columns[:2] == records[:2]


def _columns(**changed: object) -> dict[str, object]:
    return {
        "id": pa.array(["a", "b"]), "digest": pa.array([bytes(32), bytes([1]) * 32], pa.binary(32)),
        "split": pa.array(["train"] * 2), "source": pa.array(["a.png"] * 2), "crs": pa.array([""] * 2),
        "affine": pa.array([[], [1.0] * 6], pa.list_(pa.float64())), **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "rows", "splits", "fault"),
    [
        ({"id": pa.array(["a", "a"])}, 2, None, "stands twice"),
        ({"id": pa.array(["a", None])}, 2, None, "lacks values"),
        ({"digest": pa.array([bytes(32), None], pa.binary(32))}, 2, None, "lacks values"),
        ({"digest": pa.array([bytes(32), bytes(31)], pa.binary())}, 2, None, "damaged"),
        ({"split": pa.array([1, 2])}, 3, None, "rows, the record says 3"),
        ({"affine": pa.array([[], [None]], pa.list_(pa.float64()))}, 2, None, "lacks values"),
        ({}, 2, {"train": 3}, "splits are not those"),
        ({}, 10**9, None, "the record says 1000000000 rows"),
    ],
)
def test_what_a_file_or_its_record_can_lie_about_is_refused(
    tmp_path: Path, changed: dict[str, object], rows: int, splits: dict[str, int] | None, fault: str
) -> None:
    file = tmp_path / "0.parquet"
    file.write_bytes(write_plain(_columns(**changed)))
    with pytest.raises(FindingsError, match=fault):
        TileTable([(0, read_segment(file, rows, splits))]).check()


def test_segments_do_not_overlap() -> None:
    one = [TileRecord("a", bytes(32), "train", ""), TileRecord("b", bytes(32), "train", "")]
    with pytest.raises(FindingsError, match="overlaps"):
        TileTable([(0, one), (1, [TileRecord("c", bytes(32), "train", "")])])
    with pytest.raises(FindingsError, match="empty rows"):
        TileTable([(0, one), (2**25, [TileRecord("c", bytes(32), "train", "")])])
