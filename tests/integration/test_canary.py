"""A store does not grow by features of another function, even when every name and digest says it is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from rsmtdf_cache.build import build_store
from rsmtdf_cache.encode import TileReader
from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.events import Warned
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.upkeep.canary import check_canary, compare_maps
from rsmtdf_cache.verify import verify_store
from tests.datasets import make_tile, write_dataset, write_split
from tests.teachers import MeanTeacher, load_mean_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


class ChangedTeacher(MeanTeacher):
    """The same spec, to the last digit of its digest; another function."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        return {n: self.change(m) for n, m in super().encode(tiles_BHW3, size_px, layers, precision).items()}


def swapped(features: Tensor) -> Tensor:
    return features.flip(-1)


def build(data: Path, out: Path, teacher: Teacher | None = None, on_event: Any = None, **values: Any) -> Any:
    asked = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 3, "threads": 1, "micro_batch": 2, **values}

    def load(request: TeacherRequest, device: str = "cpu") -> Teacher:
        return teacher or load_mean_teacher(request, device)

    return build_store(BuildRequest.of(asked), on_event or (lambda event: None), load_teacher=load)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", tiles=12, tile_px=64)


@pytest.fixture
def store(data: Path, tmp_path: Path) -> Path:
    build(data, tmp_path / "s")
    return tmp_path / "s"


def files(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def more_tiles(data: Path) -> None:
    for index in (12, 13):
        Image.fromarray(make_tile(index)[0]).save(data / "images" / f"t{index:03}.png")
        Image.fromarray(make_tile(index)[1]).save(data / "masks" / f"t{index:03}.png")
    write_split(data, "train", [f"t{i:03}" for i in (*range(8), 12, 13)])


@pytest.mark.parametrize("growth", ["tiles", "layers", "views"])
@pytest.mark.parametrize("change", [swapped, lambda m: m * 1.1, lambda m: m * float("nan")],
                         ids=["swapped", "scaled", "nan"])  # fmt: skip
def test_a_teacher_that_changed_without_a_name_is_refused_and_nothing_is_written(
    data: Path, tmp_path: Path, growth: str, change: Callable[[Tensor], Tensor]
) -> None:
    store = tmp_path / "s"
    build(data, store, teachers=["mean,layers=mean8"], scales=[1.0])
    wanted: dict[str, Any] = {"teachers": ["mean,layers=mean8"], "scales": [1.0]}
    if growth == "tiles":
        more_tiles(data)
    elif growth == "layers":
        wanted["teachers"] = ["mean"]
    else:
        wanted["scales"] = [1.0, 0.5]
    before = files(store)
    with pytest.raises(MismatchError, match=r"mean/s64o0/mean8, tile 't0\d\d'.*(?s:.*)new folder") as caught:
        build(data, store, ChangedTeacher(change), **wanted)
    assert caught.value.exit_code == 4
    assert files(store) == before
    build(data, store, **wanted)
    assert verify_store(store, deep=True) == []


def test_a_build_that_was_stopped_goes_on_only_with_the_same_function(data: Path, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if getattr(event, "task", "") == "mean" and type(event).__name__ == "Progress":
            stop.seen += 1  # type: ignore[attr-defined]
            if stop.seen == 8:  # type: ignore[attr-defined]
                raise RuntimeError("cut")

    stop.seen = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="cut"):
        build(data, tmp_path / "s", on_event=stop)
    with pytest.raises(MismatchError, match="does not give the features any more"):
        build(data, tmp_path / "s", ChangedTeacher(swapped))
    build(data, tmp_path / "s")


def test_without_anything_to_compute_nothing_is_encoded(data: Path, store: Path) -> None:
    teacher = ChangedTeacher(swapped)
    build(data, store, teacher)
    assert teacher.calls == 0


def test_another_teacher_is_no_business_of_the_canary(data: Path, store: Path) -> None:
    other = MeanTeacher("other")
    build(data, store, other, teachers=["other"])
    assert verify_store(store, deep=True) == []


def test_the_same_four_tiles_are_taken_whatever_the_order_of_rows(data: Path, store: Path) -> None:
    ledger = FeatureStore.open(store).ledger
    source = open_source(data)
    result = check_canary(MeanTeacher(), ledger, TileReader(source, ledger.table), 3)
    assert (result.tiles, result.teacher) == (4, "mean") and result.cosine > 0.9999
    smallest = sorted(r.digest for r in ledger.table.records if r)[:4]
    assert ledger.table.record(ledger.table.row_of(result.tile)).digest in smallest


def test_tiles_that_are_not_at_hand_are_passed_over_and_none_at_all_is_a_warning(
    data: Path, store: Path, tmp_path: Path
) -> None:
    ledger = FeatureStore.open(store).ledger
    ids = sorted((r.digest, r.id) for r in ledger.table.records if r)
    gone = [name for _, name in ids[:7]]
    for name in gone[:5]:
        (data / "images" / f"{name}.png").unlink()
    for name in gone[5:]:
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(data / "images" / f"{name}.png")
    kept = [r.id for r in ledger.table.records if r and r.id not in gone[:5]]
    write_split(data, "train", kept)
    for part in ("5", "10", "25"):
        write_split(data, f"labeled/{part}", kept[:1])
    reader = TileReader(open_source(data), ledger.table)
    assert check_canary(MeanTeacher(), ledger, reader, 3).tiles == 1
    with pytest.raises(MismatchError):
        check_canary(ChangedTeacher(swapped), ledger, reader, 3)
    other = write_dataset(tmp_path / "other", tiles=4, tile_px=64, seed=5)
    events: list[Any] = []
    reader = TileReader(open_source(other), ledger.table)
    result = check_canary(ChangedTeacher(swapped), ledger, reader, 3, on_event=events.append)
    assert result.tiles == 0
    assert [type(e) for e in events] == [Warned] and "not checked" in events[0].text


def test_a_damaged_shard_is_named_and_not_taken_for_a_changed_teacher(data: Path, store: Path) -> None:
    for shard in store.rglob("mean16/features/c/*/0/0/0"):
        raw = bytearray(shard.read_bytes())
        raw[10] ^= 1
        shard.write_bytes(raw)
    more_tiles(data)
    with pytest.raises(FindingsError, match=r"mean16/features/c/\d/0/0/0: missing or damaged; .*--repair"):
        build(data, store)
    ledger = Ledger.load(FeatureStore.open(store).paths)
    assert len(ledger.table) == 8


def test_zero_vectors_are_alike_and_a_zero_beside_a_value_is_not() -> None:
    spec = MeanTeacher().spec
    assert spec.name == "mean"
    from rsmtdf_cache.codecs import Codes, load_codec, parse_codec

    codec = load_codec(parse_codec("float16"), 3)
    zeros, ones = np.zeros((2, 2, 3), np.float32), np.ones((2, 2, 3), np.float32)
    assert compare_maps(zeros, Codes(zeros.astype(np.float16)), codec).alike
    assert not compare_maps(ones, Codes(zeros.astype(np.float16)), codec).alike
    assert not compare_maps(zeros, Codes(ones.astype(np.float16)), codec).alike
