"""Damage is undone where the store says a thing twice or the images are at hand, and named where neither holds."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_cache.head import read_head, write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.upkeep.pins import pin_snapshot
from rsmtdf_cache.upkeep.recompute import recompute_sample
from rsmtdf_cache.upkeep.repair import RepairReport, UnrepairedError, repair_store
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher, load_mean_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("repair") / "data", tiles=12, tile_px=64, georeference=True)


@pytest.fixture(scope="module")
def sound(data: Path) -> Path:
    out = data.parent / "sound"
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 3, "threads": 1, "micro_batch": 2}
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)
    values["splits"] = ["train", "val"]  # an append: a second segment, and a hole in the table
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)
    return out


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s"))


def repair(store: Path, data: Path | None = None, load: Any = load_mean_teacher) -> RepairReport:
    return repair_store(store, data, load_teacher=load)


def content(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def flip(path: Path, position: int = 40) -> None:
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= 1
    path.write_bytes(raw)


def actions(report: RepairReport) -> dict[str, str]:
    return {r.path: r.action for r in report.done}


def files(store: Path, pattern: str) -> list[Path]:
    return sorted(p for p in store.glob(pattern) if p.is_file() and p.stat().st_size)


def one_of_each_kind(content: dict[str, bytes], rng: random.Random) -> list[str]:
    """Return one file of every kind: names that differ in digits, hashes, views and layers only are of one kind."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(n for n, raw in content.items() if raw):
        kinds.setdefault(re.sub(r"[0-9a-f]{16,}|mean\d+|s\d+o\d|\d+", "#", name), []).append(name)
    assert len(kinds) > 20
    return [rng.choice(names) for names in kinds.values()]


def test_a_sound_store_is_left_as_it_is(store: Path, data: Path) -> None:
    before = content(store)
    assert repair(store).done == [] and repair(store, data).done == []
    assert content(store) == before


def test_a_flipped_bit_in_any_file_is_undone_to_the_last_byte(store: Path, data: Path) -> None:
    rng = random.Random(11)
    before = content(store)
    for name in one_of_each_kind(before, rng):
        flip(store / name, rng.randrange(2**20))
        report = repair(store, data)
        assert name in actions(report) or name.startswith("ledger/tiles"), (name, report)
        assert content(store) == before, name
    assert verify_store(store, deep=True) == []


def test_a_missing_file_comes_back_to_the_last_byte(store: Path, data: Path) -> None:
    before = content(store)
    for name in one_of_each_kind(before, random.Random(12)):
        (store / name).unlink()
        assert name in actions(repair(store, data)) or name == "ledger/head.json"
        assert content(store) == before, name
    assert verify_store(store, deep=True) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "index"])
def test_only_damaged_shards_are_encoded_again_and_come_out_as_recorded(store: Path, data: Path, damage: str) -> None:
    before = content(store)
    shard = store / "zarr/mean/s64o0/mean8/features/c/1/0/0/0"
    if damage == "remove":
        shutil.rmtree(shard.parents[2])
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-7])
    else:
        flip(shard, -3 if damage == "index" else 5)
    teacher = MeanTeacher()
    report = repair(store, data, lambda request, device="cpu": teacher)
    assert actions(report) == {
        shard.relative_to(store).as_posix(): "reproduced: encoded again, with the recorded sha256"
    }
    assert content(store) == before
    # 2 sets times 2 batches of the canary's four tiles, and the unit's two micro-batches.
    assert teacher.calls == 2 * 2 + 2


def test_damaged_shards_without_images_are_a_usage_error_that_names_them(store: Path) -> None:
    flip(store / "zarr/mean/s64o0/mean8/features/c/1/0/0/0")
    with pytest.raises(UsageError, match=r"zarr/mean/s64o0/mean8/features/c/1/0/0/0.*--data"):
        repair(store)


def test_damage_without_shards_needs_neither_images_nor_a_teacher(store: Path) -> None:
    before = content(store)
    for pattern in (
        "zarr/zarr.json",
        "zarr/mean/s64o0/mean8/y/c/0",
        "ledger/head.json",
        "ledger/commits/*/00000001.json",
    ):
        flip(files(store, pattern)[0])
        assert repair(store).done
        assert content(store) == before


class OtherBits(MeanTeacher):
    """Stands for another machine: the same function, some last bits differ."""

    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        maps = super().encode(tiles_BHW3, size_px, layers, precision)
        return {n: m * 1.0004 for n, m in maps.items()}


def test_other_bits_become_a_new_generation_and_the_report_says_so(store: Path, data: Path) -> None:
    old = FeatureStore.open(store).snapshot
    shard = store / "zarr/mean/s64o0/mean8/features/c/1/0/0/0"
    beside = store / "zarr/mean/s64o0/mean16/features/c/1/0/0/0"
    untouched = beside.read_bytes()
    flip(shard)
    report = repair(store, data, lambda request, device="cpu": OtherBits())
    assert "generation 1" in actions(report)[shard.relative_to(store).as_posix()]
    assert report.snapshot == FeatureStore.open(store).snapshot != old
    assert beside.read_bytes() == untouched
    assert verify_store(store, deep=True) == []
    opened = FeatureStore.open(store)
    assert opened.read(opened.keys()[0], [3, 4, 5]).valid.all()
    flip(shard)  # and the new generation is what the next repair reproduces
    assert "reproduced" in str(actions(repair(store, data, lambda request, device="cpu": OtherBits())))
    assert repair(store).done == []


class Swapped(MeanTeacher):
    """Another function under the same names."""

    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        return {n: m.flip(-1) for n, m in super().encode(tiles_BHW3, size_px, layers, precision).items()}


def test_a_teacher_that_changed_repairs_nothing_and_the_shard_is_named(store: Path, data: Path) -> None:
    shard = store / "zarr/mean/s64o0/mean8/features/c/1/0/0/0"
    flip(shard)
    damaged = shard.read_bytes()
    with pytest.raises(UnrepairedError, match=r"c/1/0/0/0: not encoded again: .*any more") as caught:
        repair(store, data, lambda request, device="cpu": Swapped())
    assert caught.value.exit_code == 7 and len(caught.value.report.left) == 1
    assert shard.read_bytes() == damaged


def test_another_teachers_weights_are_refused_with_the_way_to_give_them(store: Path, data: Path) -> None:
    flip(store / "zarr/mean/s64o0/mean8/features/c/1/0/0/0")
    with pytest.raises(UnrepairedError, match=r"(?s)weights: '000.*--teacher mean,weights=FILE"):
        repair(store, data, lambda request, device="cpu": MeanTeacher("mean", "1" * 64))


def compacted(store: Path) -> None:
    paths = StorePaths(store)
    ledger = Ledger.load(paths)
    ledger.compact(tail_max=0)
    write_head(paths, load_manifest(paths), ledger)
    assert not files(store, "ledger/commits/*/*.json") and len(files(store, "ledger/segments/*.parquet")) == 1


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_segment_is_rebuilt_from_the_shards_and_the_root_proves_it(store: Path, damage: str) -> None:
    before = Ledger.load(StorePaths(store))
    squares = {key: before.stats(key).squares for key in before.specs()}
    compacted(store)
    segment = files(store, "ledger/segments/*.parquet")[0]
    segment.unlink() if damage == "remove" else flip(segment)
    report = repair(store)
    assert any("snapshot" in a and "proves it" in a for a in actions(report).values())
    after = Ledger.load(StorePaths(store))
    assert after.snapshot() == before.snapshot()
    for key, sums in squares.items():
        assert np.array_equal(after.stats(key).squares, sums)
    assert verify_store(store, deep=True) == []


@pytest.mark.parametrize("form", ["record", "segment"])
def test_a_lost_record_beside_a_damaged_shard_is_encoded_again(store: Path, data: Path, form: str) -> None:
    snapshot = FeatureStore.open(store).snapshot
    if form == "segment":
        compacted(store)
    name = sorted(Ledger.load(StorePaths(store)).sets)[0]
    record = files(store, "ledger/segments/*.parquet")[0] if form == "segment" else (
        StorePaths(store).commit(name, 1))  # fmt: skip
    flip(record)
    flip(next(iter(files(store, "zarr/mean/*/mean8/features/c/1/0/0/0"))))
    flip(next(iter(files(store, "zarr/mean/*32*/mean8/features/c/1/0/0/0"))), 9)
    with pytest.raises(UsageError, match="--data"):
        repair(store)
    report = repair(store, data)
    assert any("encoded" in a for a in actions(report).values())
    assert FeatureStore.open(store).snapshot == snapshot
    assert verify_store(store, deep=True) == []


def test_head_and_a_commit_and_the_current_snapshot_damaged_at_once_come_back(store: Path, data: Path) -> None:
    before = content(store)
    root = read_head(StorePaths(store)).snapshot
    flip(files(store, "ledger/commits/*/00000002.json")[0])
    flip(StorePaths(store).snapshot(root))
    repair(store, data)
    assert content(store) == before
    flip(files(store, "ledger/commits/*/00000002.json")[1])
    flip(StorePaths(store).head)
    repair(store, data)
    assert content(store) == before


def test_what_nothing_repeats_is_left_and_named(store: Path, data: Path) -> None:
    pin = pin_snapshot(store, owner="a run")
    flip(StorePaths(store).pin(pin.name))
    flip(files(store, "zarr/mean/s64o0/mean8/features/c/1/0/0/0")[0])
    with pytest.raises(UnrepairedError, match=f"pins/{pin.name}.json") as caught:
        repair(store, data)
    assert len(caught.value.report.done) == 1 and "1 files were repaired, 1 findings are left" in str(caught.value)
    (store / "zarr" / "link").symlink_to("/")
    StorePaths(store).pin(pin.name).unlink()
    with pytest.raises(UnrepairedError, match="zarr/link: a link"):
        repair(store)


def test_leftovers_of_a_killed_build_are_removed(store: Path) -> None:
    before = content(store)
    stray = store / "zarr/mean/s64o0/mean8/features/c/9/0/0/0"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half a shard")
    (store / "ledger" / f".head.json.{'0' * 32}.tmp").write_bytes(b"half a head")
    assert len(verify_store(store)) == 2
    assert actions(repair(store))[stray.relative_to(store).as_posix()].startswith("removed: left by")
    assert content(store) == before


# -- recompute


def recompute(store: Path, data: Path, count: int, load: Any = load_mean_teacher) -> Any:
    return recompute_sample(store, data, count, load_teacher=load)


def test_recompute_finds_equal_bytes_in_every_array(store: Path, data: Path) -> None:
    results, faults = recompute(store, data, 6)
    assert faults == []
    assert [r.key for r in results] == sorted(str(k) for k in FeatureStore.open(store).keys())
    assert all(r.equal and r.same_numerics and r.cosine > 0.9999 for r in results)
    # One of each unit first: 4 groups in 2 sets.
    assert sum(r.tiles for r in results) == 6 * 2
    assert recompute(store, data, 6) == (results, faults)
    everything, _ = recompute(store, data, 10**6)
    assert {r.tiles for r in everything} == {10}


@pytest.mark.parametrize(("teacher", "found"), [(Swapped, True), (OtherBits, False)])
def test_recompute_tells_another_function_from_other_bits(
    store: Path, data: Path, teacher: Callable[[], Teacher], found: bool
) -> None:
    results, faults = recompute(store, data, 3, lambda request, device="cpu": teacher())
    assert bool(faults) is found and not any(r.equal for r in results)
    assert not faults or "cosine" in faults[0].fault


def test_recompute_understands_seeds_and_timm_names_and_refuses_other_weights(data: Path, tmp_path: Path) -> None:
    name = "timm:test_resnet"
    values = {"data": data, "out": tmp_path / "t", "teachers": [f"{name},pretrained=none,seed=3,layers=stage2"],
              "scales": [1.0], "threads": 1, "micro_batch": 2, "precision": "float32", "device": "cpu"}  # fmt: skip
    build_store(BuildRequest.of(values))
    results, faults = recompute_sample(tmp_path / "t", data, 2, device="cpu")
    assert faults == [] and [r.equal for r in results] == [True]
    asked = BuildRequest.of({**values, "teachers": [f"{name},pretrained=none,seed=4"]}).teachers
    with pytest.raises(MismatchError, match=r"(?s)weights: .*--teacher timm-test_resnet,weights=FILE"):
        recompute_sample(tmp_path / "t", data, 2, asked, device="cpu")
    with pytest.raises(UsageError, match="the store has timm-test_resnet"):
        recompute_sample(tmp_path / "t", data, 2, BuildRequest.of({**values, "teachers": ["mean"]}).teachers)


def test_a_damaged_shard_is_named_by_recompute(store: Path, data: Path) -> None:
    for shard in store.glob("zarr/mean/s64o0/mean8/features/c/*/0/0/0"):
        flip(shard)
    _, faults = recompute(store, data, 8)
    assert {f.path.rpartition("/features")[0] for f in faults} == {"zarr/mean/s64o0/mean8"}
