"""The ledger stays the same ledger, however its records are packed, and whoever reads it meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rsmtdf_cache import ledger as ledger_module
from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.files import read_json, replace_json
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.push import push_store
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.upkeep.gc import collect, drop_arrays
from rsmtdf_cache.upkeep.gc_plan import plan_gc
from rsmtdf_cache.upkeep.merge import merge_stores
from rsmtdf_cache.upkeep.pins import pin_snapshot
from rsmtdf_cache.upkeep.repair import repair_store
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher


def build(data: Path, out: Path, **more: object) -> None:
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 1, "threads": 1, "scales": [1.0], **more}
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", tiles=12, tile_px=32)


@pytest.fixture
def paths(data: Path, tmp_path: Path) -> StorePaths:
    build(data, tmp_path / "s")
    return StorePaths(tmp_path / "s")


def facts(ledger: Ledger) -> list[object]:
    stats = [ledger.stats(key) for key in sorted(ledger.specs(), key=str)]
    return [
        ledger.snapshot(), ledger.content().to_json(), [c.to_json() for c in map(ledger.complete, _commits(ledger))],
        [(s.count, s.sums.tolist(), s.squares.tolist(), s.norm_sum, s.norm_max) for s in stats],
    ]  # fmt: skip


def _commits(ledger: Ledger) -> list[ledger_module.Commit]:
    return [c for name in sorted(ledger.commits) for _, c in sorted(ledger.commits[name].items())]


def test_compaction_changes_no_fact(paths: StorePaths) -> None:
    before = facts(Ledger.load(paths))
    ledger = Ledger.load(paths)
    ledger.compact(tail_max=0)
    assert not list((paths.ledger / "commits").rglob("*.json")) and len(list(paths.segments.iterdir())) == 1
    assert facts(ledger) == before == facts(Ledger.load(paths))
    write_head(paths, load_manifest(paths), Ledger.load(paths))
    assert verify_store(paths.root, deep=True) == []


def test_a_long_tail_is_folded_by_the_build_itself_and_appends_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger.compact, "__defaults__", (3,))
    monkeypatch.setattr(ledger_module, "SEGMENTS_MAX", 1)
    for splits in (["train"], ["train", "val"], ["train", "val", "test"]):
        build(data, tmp_path / "s", splits=splits)
        assert verify_store(tmp_path / "s", deep=True) == []
    build(data, tmp_path / "whole", splits=["train", "val", "test"])
    packed = StorePaths(tmp_path / "s")
    assert 1 <= len(list(packed.segments.iterdir())) <= 2
    # Groups are of one row here, so an append leaves no hole and both have the same rows.
    assert FeatureStore.open(tmp_path / "s").snapshot == FeatureStore.open(tmp_path / "whole").snapshot


def test_large_segments_are_left_alone_and_change_no_fact(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "SEGMENTS_MAX", 1)
    paths = StorePaths(tmp_path / "s")
    for splits in (["train"], ["train", "val"], ["train", "val", "test"]):
        build(data, paths.root, splits=splits)
        Ledger.load(paths).compact(tail_max=0)
        # From now on every segment is a large one: folding more would have to read it.
        monkeypatch.setattr(ledger_module, "SEGMENT_NBYTES_LARGE", 1)
        write_head(paths, load_manifest(paths), Ledger.load(paths))
    assert len(list(paths.segments.iterdir())) == 3 and verify_store(paths.root, deep=True) == []
    before = facts(Ledger.load(paths))
    monkeypatch.setattr(ledger_module, "SEGMENT_NBYTES_LARGE", 2**30)
    Ledger.load(paths).compact(tail_max=0)
    assert len(list(paths.segments.iterdir())) == 1 and facts(Ledger.load(paths)) == before


def test_statistics_follow_a_commit_that_comes_after_they_were_asked_for(data: Path, tmp_path: Path) -> None:
    paths = StorePaths(tmp_path / "s")
    build(data, paths.root)
    build(data, tmp_path / "more", splits=["train", "val"])
    ledger, other = Ledger.load(paths), Ledger.load(StorePaths(tmp_path / "more"))
    key = next(iter(ledger.specs()))
    before = ledger.stats(key).count
    name = ledger.set_of(key)
    new = [c for g, c in sorted(other.commits[name].items()) if g not in ledger.commits[name]]
    for commit in new:
        ledger.add_commit(other.complete(commit))
    assert new and before < ledger.stats(key).count == other.stats(key).count
    assert ledger.stats(key).sums.tolist() == other.stats(key).sums.tolist()


def test_a_reader_beside_compactions_always_sees_every_commit(paths: StorePaths, tmp_path: Path) -> None:
    whole = Ledger.load(paths).snapshot()
    records = [p.relative_to(paths.root) for p in (paths.ledger / "commits").rglob("*.json")]
    for record in records:
        (tmp_path / "kept" / record).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kept" / record).hardlink_to(paths.root / record)
    stop = threading.Event()

    def read() -> set[str]:
        seen = set()
        while not stop.is_set():
            seen.add(Ledger.load(paths).snapshot())
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for _ in range(15):
            Ledger.load(paths).compact(tail_max=0)
            for record in records:  # the same records come back, so that there is something to fold again
                (paths.root / record).hardlink_to(tmp_path / "kept" / record)
        stop.set()
        assert [r.result(60) for r in readers] == [{whole}] * 2


def test_an_old_snapshot_shows_its_content_and_an_impossible_one_is_refused(paths: StorePaths, data: Path) -> None:
    before = FeatureStore.open(paths.root)
    build(data, paths.root, splits=["train", "val"])
    now = FeatureStore.open(paths.root)
    then = FeatureStore.open(paths.root, snapshot=before.snapshot)
    assert then.snapshot == before.snapshot != now.snapshot
    assert len(then.tiles) == len(before.tiles) < len(now.tiles)
    key = then.keys()[0]
    assert np.array_equal(then.read(key, [0]).values, now.read(key, [0]).values)
    with pytest.raises(MismatchError, match="no such snapshot is recorded"):
        FeatureStore.open(f"{paths.root}@{'0' * 12}")
    record = paths.snapshot(before.snapshot)
    body = read_json(record)
    name = next(iter(body["units"]))
    replace_json(record, {**body, "units": {**body["units"], name: body["units"][name][:-1]}})
    with pytest.raises(MismatchError, match="no longer holds that content"):
        FeatureStore.open(paths.root, snapshot=before.snapshot)


@pytest.mark.parametrize(
    "change",
    [{"first_row": 2**60}, {"first_row": -1}, {"rows": 10**9}, {"file": "../../../etc/passwd"}, {"sha256": None}],
)
def test_a_tile_record_that_lies_is_refused(paths: StorePaths, change: dict[str, object]) -> None:
    record = paths.tile_segment(0)
    replace_json(record, {**read_json(record), **change})
    with pytest.raises(FindingsError):
        Ledger.load(paths)


def test_a_record_nested_without_end_is_refused(paths: StorePaths) -> None:
    paths.quarantine.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(FindingsError, match="not a readable record"):
        read_json(paths.quarantine)
    assert any("quarantine" in f.path for f in verify_store(paths.root))


@pytest.mark.parametrize("lost", ["tiles/*.json", "commits/*/00000002.json", "segments/*.parquet", "sets/*.json"])
@pytest.mark.parametrize("compacted", [False, True])
def test_a_store_that_lost_a_record_is_refused_by_all_who_would_read_or_change_it_and_repaired(
    paths: StorePaths, data: Path, tmp_path: Path, lost: str, compacted: bool
) -> None:
    before = FeatureStore.open(paths.root).snapshot
    if compacted:
        Ledger.load(paths).compact(tail_max=0)
        write_head(paths, load_manifest(paths), Ledger.load(paths))
    victims = list(paths.ledger.glob(lost))
    if not victims:
        pytest.skip("such a record is not there")
    for path in victims:
        path.unlink()
    left = {p: p.read_bytes() for p in sorted(paths.root.rglob("*")) if p.is_file()}
    other = tmp_path / "other"
    build(data, other, splits=["val"])
    for act in (
        lambda: FeatureStore.open(paths.root),
        lambda: build(data, paths.root, splits=["train", "val"]),
        lambda: collect(paths.root),
        lambda: plan_gc(paths.root),
        lambda: drop_arrays(paths.root, ["mean/*/mean8"]),
        lambda: pin_snapshot(paths.root, None, "me"),
        lambda: merge_stores(paths.root, other, tmp_path / "merged"),
        lambda: merge_stores(other, paths.root),
        lambda: push_store(paths.root, str(tmp_path / "pushed")),
    ):
        with pytest.raises(FindingsError, match=r"lost|missing|not here"):
            act()
    assert {p: p.read_bytes() for p in sorted(paths.root.rglob("*")) if p.is_file()} == left
    assert not any("cache gc" in f.fault for f in verify_store(paths.root))
    repair_store(paths.root, data, load_teacher=load_mean_teacher)
    assert verify_store(paths.root, deep=True) == [] and FeatureStore.open(paths.root).snapshot == before
