"""A Parquet file of a store cannot unfold into more than its own size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.parquet import read_plain, write_plain

ROWS = 5


def columns(rows: int = ROWS) -> dict[str, Any]:
    digests = pa.array([bytes([i % 256] * 32) for i in range(rows)], pa.binary(32))
    return {
        "digest": digests,
        "name": pa.array([f"é{i}" for i in range(rows)]),
        "v": pa.array([[0.5] * i for i in range(rows)]),
    }


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(write_plain(columns()))
    found = read_plain(tmp_path / "a", ("name", "v"), 32)
    assert found == {"name": [f"é{i}" for i in range(ROWS)], "v": [[0.5] * i for i in range(ROWS)]}


def test_the_same_columns_make_the_same_bytes() -> None:
    assert write_plain(columns()) == write_plain(columns())


@pytest.mark.parametrize("how", [{"compression": "zstd"}, {"use_dictionary": True}])
def test_a_bomb_of_a_few_bytes_is_refused_before_it_is_decoded(tmp_path: Path, how: dict[str, Any]) -> None:
    rows = 2_000_000  # 64 MB of digests in a small file
    bomb = pa.table(
        {"digest": pa.array([bytes(32)], pa.binary(32)).take(pa.array([0] * rows)), "name": pa.array(["x"] * rows)}
    )
    pq.write_table(bomb, tmp_path / "bomb", **({"use_dictionary": False, "compression": "none"} | how))
    if "use_dictionary" in how:
        assert (tmp_path / "bomb").stat().st_size < 10**6
    with pytest.raises(FindingsError, match=r"cannot hold|not stored plainly"):
        read_plain(tmp_path / "bomb", ("digest", "name"), 32)


def test_nulls_that_take_no_room_are_refused(tmp_path: Path) -> None:
    table = pa.table({"digest": pa.nulls(10**6, pa.binary(32)), "name": pa.nulls(10**6, pa.string())})
    pq.write_table(table, tmp_path / "nulls", use_dictionary=False, compression="none")
    with pytest.raises(FindingsError, match="cannot hold"):
        read_plain(tmp_path / "nulls", ("digest", "name"), 32)


@pytest.mark.parametrize("cut", [0, 3, 40])
def test_a_damaged_file_or_a_missing_column_is_a_finding(tmp_path: Path, cut: int) -> None:
    data = write_plain(columns())
    (tmp_path / "a").write_bytes(data[: len(data) - cut])
    with pytest.raises(FindingsError):
        read_plain(tmp_path / "a", ("name", "absent"), 32)
