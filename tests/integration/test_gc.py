"""``drop`` hides, pins protect, ``gc`` frees: and killed anywhere it harms nothing that somebody still needs."""

from __future__ import annotations

import datetime
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from rsmtdf_cache import files
from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError
from rsmtdf_cache.files import read_json, replace_json
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.upkeep.gc import collect, drop_arrays
from rsmtdf_cache.upkeep.gc_plan import plan_gc
from rsmtdf_cache.upkeep.pins import doomed_record, list_pins, pin_snapshot, unpin
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher

ROOT = Path(__file__).parents[2]
KEY8, KEY16 = FeatureKey.parse("mean/s64o0/mean8"), FeatureKey.parse("mean/s64o0/mean16")

#: Collects in a process of its own, and dies by SIGKILL after that many operations on the file system.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from rsmtdf_cache import files
from rsmtdf_cache.upkeep.gc import collect

left = int(sys.argv[2])
def observe(operation, *paths):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
files.observe = observe
collect(Path(sys.argv[1]))
print(-left)
"""


class ScaledTeacher(MeanTeacher):
    """A teacher whose layer ``mean8`` depends on its weights."""

    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        maps = super().encode(tiles_BHW3, size_px, layers, precision)
        return {n: values * (1 + int(self.spec.weights)) if n == "mean8" else values for n, values in maps.items()}


def load_scaled_teacher(request: TeacherRequest, device: str = "cpu") -> Teacher:
    return ScaledTeacher(request.name, f"{request.seed:064d}")


def build(data: Path, out: Path, teacher: str = "mean", **more: object) -> None:
    values = {"data": data, "out": out, "teachers": [teacher], "group_rows": 2, "threads": 1, "micro_batch": 2}
    build_store(BuildRequest.of({**values, "scales": [1.0], **more}), load_teacher=load_scaled_teacher)


def read_all(store: FeatureStore) -> dict[str, bytes]:
    return {str(k): store.read(k, range(len(store.tiles))).values.tobytes() for k in store.ledger.specs()}


def shards(store: Path, key: FeatureKey) -> list[Path]:
    return sorted(p for p in (store / "zarr" / str(key) / "features" / "c").rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("gc") / "data", tiles=9, tile_px=64)


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one set of two layers (mean8, mean16) and a set of one layer of another teacher."""
    out = tmp_path_factory.mktemp("gc") / "s"
    build(data, out)
    build(data, out, "other,layers=mean8")
    return out


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "s"))


def test_a_dropped_array_is_gone_from_the_store_and_still_there_for_the_pinned_snapshot(store: Path) -> None:
    before = FeatureStore.open(store)
    values = read_all(before)
    pin_snapshot(store, owner="run 1")
    report = drop_arrays(store, ["mean/*/mean8"])
    assert report.keys == [str(KEY8)] and report.snapshot != before.snapshot
    assert KEY8 not in FeatureStore.open(store).ledger.specs()
    assert report.free == 0 and report.holds[0].shards == len(shards(store, KEY8)) > 0
    collect(store)
    assert read_all(FeatureStore.open(store, snapshot=before.snapshot)) == values
    assert verify_store(store, deep=True) == []


def test_gc_frees_what_the_plan_says_and_leaves_a_sound_store_with_the_other_arrays_as_they_were(store: Path) -> None:
    values = read_all(FeatureStore.open(store))
    report = drop_arrays(store, ["mean/s64o0/mean8"])
    plan = plan_gc(store)
    size = sum(p.stat().st_size for p in shards(store, KEY8))
    assert report.nbytes == size and report.free == plan.nbytes >= size
    assert shards(store, KEY8), "a plan deletes nothing"
    assert collect(store).to_json()["files"] == plan.to_json()["files"]
    assert not shards(store, KEY8)
    del values[str(KEY8)]
    assert read_all(FeatureStore.open(store)) == values
    assert verify_store(store, deep=True) == []
    assert plan_gc(store).files == []


def test_a_wholly_dropped_set_loses_its_records_and_a_partly_dropped_one_keeps_them(store: Path) -> None:
    paths = StorePaths(store)
    drop_arrays(store, ["mean/*/mean8"])
    collect(store)
    ledger = Ledger.load(paths)
    assert len(ledger.sets) == 2 and len(ledger.dropped) == 1
    drop_arrays(store, ["mean/*/mean16"])
    collect(store)
    ledger = Ledger.load(paths)
    assert [r.arrays.specs[0].teacher.name for r in ledger.sets.values()] == ["other"] and not ledger.dropped
    assert len(list((store / "ledger" / "commits").iterdir())) == 1
    assert verify_store(store, deep=True) == []


@pytest.mark.parametrize("patterns", [["mean/*/*"], ["mean/*/mean8"]])
def test_after_gc_the_same_key_can_be_built_with_other_weights(store: Path, data: Path, patterns: list[str]) -> None:
    digest, values = FeatureStore.open(store).spec(KEY8).digest(), read_all(FeatureStore.open(store))
    drop_arrays(store, patterns)
    with pytest.raises(MismatchError, match="gc"):
        build(data, store, "mean,seed=5,pretrained=none,layers=mean8")
    collect(store)
    build(data, store, "mean,seed=5,pretrained=none,layers=mean8")
    again = FeatureStore.open(store)
    assert again.spec(KEY8).digest() != digest and again.committed(KEY8).sum() == len(again.tiles)
    assert read_all(again)[str(KEY8)] != values[str(KEY8)]
    assert verify_store(store, deep=True) == []
    assert plan_gc(store).files == []


def test_compacted_segments_that_name_a_removed_set_are_written_again(store: Path) -> None:
    paths = StorePaths(store)
    values = read_all(FeatureStore.open(store))
    Ledger.load(paths).compact(tail_max=0)
    stats = Ledger.load(paths).stats(KEY8)
    (old,) = paths.segments.glob("*.parquet")
    drop_arrays(store, ["other/*/*"])
    collect(store)
    (new,) = paths.segments.glob("*.parquet")
    assert new != old
    after = FeatureStore.open(store)
    assert read_all(after) == {k: v for k, v in values.items() if not k.startswith("other")}
    assert np.array_equal(after.ledger.stats(KEY8).sums, stats.sums)
    assert verify_store(store, deep=True) == []


def test_files_of_killed_builds_are_collected_and_named_as_such(store: Path) -> None:
    snapshot = FeatureStore.open(store).snapshot
    stray = store / "zarr" / str(KEY8) / "features" / "c" / "77" / "0" / "0" / "0"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half a shard")
    draft = store / "ledger" / f".head.json.{'a' * 32}.tmp"
    draft.write_bytes(b"{")
    (store / "tmp" / "unit").mkdir(parents=True)
    (store / "tmp" / "unit" / "mean8").write_bytes(b"x" * 100)
    plan = collect(store)
    assert {(f.path, f.reason) for f in plan.files} == {
        (stray.relative_to(store).as_posix(), "left by a killed build"),
        (draft.relative_to(store).as_posix(), "draft"),
        ("tmp/unit/mean8", "draft"),
    }
    assert not stray.exists() and not draft.exists() and not (store / "tmp").exists()
    assert FeatureStore.open(store).snapshot == snapshot and verify_store(store, deep=True) == []


def test_an_expired_pin_protects_nothing_and_goes(store: Path) -> None:
    snapshot = FeatureStore.open(store).snapshot
    today = datetime.datetime.now(datetime.UTC).date()
    pin = pin_snapshot(store, owner="run", expires=today.isoformat())
    drop_arrays(store, ["mean/*/mean8"])
    assert all("zarr/" not in f.path for f in plan_gc(store).files)
    place = StorePaths(store).pin(pin.name)
    replace_json(place, {**read_json(place), "expires": (today - datetime.timedelta(1)).isoformat()})
    collect(store)
    assert list_pins(store) == [] and not shards(store, KEY8)
    with pytest.raises(MismatchError):
        FeatureStore.open(store, snapshot=snapshot)
    assert verify_store(store, deep=True) == []


def test_a_damaged_pin_or_a_pin_without_its_record_stops_gc_before_it_deletes(store: Path) -> None:
    pin = pin_snapshot(store, owner="run")
    drop_arrays(store, ["mean/*/mean8"])
    there = sorted(p for p in store.rglob("*") if p.is_file())
    place = StorePaths(store).pin(pin.name)
    text = place.read_text()
    place.write_text(text.replace(pin.snapshot[:4], "0000"))
    with pytest.raises(FindingsError, match=r"the pin is damaged.*unpin"):
        collect(store)
    place.write_text(text)
    record = StorePaths(store).snapshot(pin.snapshot)
    body = record.read_bytes()
    record.unlink()
    with pytest.raises(FindingsError, match=r"nothing is deleted.*unpin"):
        collect(store)
    record.write_bytes(body)
    assert sorted(p for p in store.rglob("*") if p.is_file()) == there


def test_pins_are_named_safely_and_found_again_by_owner(store: Path) -> None:
    snapshot = FeatureStore.open(store).snapshot
    hostile = pin_snapshot(store, owner="../../etc/passwd\n", note="n")
    other = pin_snapshot(store, snapshot[:8], owner="übung 7", expires="2999-12-31")
    assert pin_snapshot(store, owner="../../etc/passwd\n", note="n") == hostile, "the same pin again is the same pin"
    assert sorted(p.parent for p in store.rglob("*passwd*")) == [store / "pins"]
    assert {p.name for p in list_pins(store)} == {hostile.name, other.name}
    assert other.snapshot == snapshot and other.created and other.expires == "2999-12-31"
    assert unpin(store, "übung 7") == [other] and unpin(store, hostile.name) == [hostile]
    assert list_pins(store) == []


def test_what_cannot_be_pinned_or_dropped_is_said_in_one_sentence(store: Path) -> None:
    with pytest.raises(UsageError, match="owner"):
        pin_snapshot(store, owner=" ")
    with pytest.raises(UsageError, match="YYYY-MM-DD"):
        pin_snapshot(store, owner="run", expires="2020-01-01")
    with pytest.raises(MismatchError, match="no such snapshot"):
        pin_snapshot(store, "0" * 64, owner="run")
    with pytest.raises(UsageError, match="no pin or owner 'rum'"):
        unpin(store, "rum")
    with pytest.raises(UsageError, match=r"Did you mean 'mean/s64o0/mean8'"):
        drop_arrays(store, ["mean/s64o0/mean9"])
    assert list_pins(store) == [] and len(FeatureStore.open(store).keys()) == 3


def test_a_collected_snapshot_cannot_be_pinned_any_more(store: Path) -> None:
    before = FeatureStore.open(store).snapshot
    drop_arrays(store, ["mean/*/mean8"])
    record = StorePaths(store).snapshot(before)
    body = record.read_bytes()
    collect(store)
    record.write_bytes(body)  # as a reader's copy of the record would come back
    with pytest.raises(MismatchError, match="cannot be pinned"):
        pin_snapshot(store, before, owner="late")
    assert list_pins(store) == []


@pytest.mark.parametrize(("moment", "outcome"), [("fsync", "pinned"), ("rename", "refused")])
def test_a_pin_that_comes_while_gc_decides_is_seen_by_gc_or_refused(store: Path, moment: str, outcome: str) -> None:
    """Both orders of the race: right before and right after gc has said what it is about to delete."""
    before = FeatureStore.open(store)
    values = read_all(before)
    drop_arrays(store, ["mean/*/mean8"])
    outcomes = []

    def observe(operation: str, *paths: Path) -> None:
        if operation == moment and doomed_record(StorePaths(store)).name in paths[-1].name:
            files.observe = lambda *_: None
            try:
                pin_snapshot(store, before.snapshot, owner="late")
                outcomes.append("pinned")
            except MismatchError:
                outcomes.append("refused")

    files.observe = observe
    try:
        collect(store)
    finally:
        files.observe = lambda *_: None
    assert outcomes == [outcome]
    if outcome == "pinned":
        assert read_all(FeatureStore.open(store, snapshot=before.snapshot)) == values
    else:
        assert list_pins(store) == [] and not shards(store, KEY8)
    assert verify_store(store, deep=True) == []


def test_gc_leaves_older_snapshots_whose_data_is_all_there(data: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    build(data, store)
    first = FeatureStore.open(store)
    build(data, store, splits=["train", "val"])
    assert collect(store).files == []
    assert read_all(FeatureStore.open(store, snapshot=first.snapshot)) == read_all(first)


def names(top: Path) -> list[str]:
    return sorted(p.relative_to(top).as_posix() for p in top.rglob("*"))


def start(store: Path, operations: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(store), str(operations)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_gc_killed_at_any_operation_harms_nothing_and_the_next_one_finishes(store: Path, tmp_path: Path) -> None:
    paths = StorePaths(store)
    Ledger.load(paths).compact(tail_max=4)
    pinned = FeatureStore.open(store)
    pin_snapshot(store, owner="run")
    drop_arrays(store, ["other/*/*"])
    unpinned_values = read_all(pinned)
    drop_arrays(store, ["mean/*/mean8"])
    unpin(store, "run")
    keeper = FeatureStore.open(store)
    pin_snapshot(store, owner="keeper")
    kept = read_all(keeper)
    assert set(kept) < set(unpinned_values)
    whole = Path(shutil.copytree(store, tmp_path / "whole"))
    process = start(whole, 10**9)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    total = 10**9 + int(out)
    assert verify_store(whole, deep=True) == []
    rng = random.Random(20260311)
    for count in sorted(rng.sample(range(1, total + 1), 7)):
        copy = Path(shutil.copytree(store, tmp_path / f"killed{count}"))
        process = start(copy, count)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, (count, total, errors)
        assert read_all(FeatureStore.open(copy)) == kept, count
        assert read_all(FeatureStore.open(copy, snapshot=keeper.snapshot)) == kept
        collect(copy)
        assert read_all(FeatureStore.open(copy)) == kept
        assert verify_store(copy, deep=True) == [], count
        assert plan_gc(copy).files == []
        assert names(copy) == names(whole)


def test_a_gc_killed_at_a_random_instant_harms_nothing(store: Path) -> None:
    drop_arrays(store, ["mean/*/mean8"])
    kept = read_all(FeatureStore.open(store))
    rng = random.Random(5)
    for _ in range(2):
        process = start(store, 10**9)
        time.sleep(rng.uniform(0.3, 1.5))
        process.kill()
        process.communicate(timeout=120)
        assert read_all(FeatureStore.open(store)) == kept
    collect(store)
    assert verify_store(store, deep=True) == [] and read_all(FeatureStore.open(store)) == kept
