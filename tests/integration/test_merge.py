"""A merge is a union: every feature of A and B, bit for bit, without a teacher; all conflicts told, nothing half."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.upkeep.diff import diff_stores
from rsmtdf_cache.upkeep.gc import collect, drop_arrays
from rsmtdf_cache.upkeep.merge import merge_stores
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset, write_split
from tests.teachers import load_mean_teacher

ROOT = Path(__file__).parents[2]

#: Merges in a process of its own, and dies by SIGKILL after that many operations on the file system.
SCRIPT = """
import os, signal, sys
from rsmtdf_cache import files
from rsmtdf_cache.upkeep.merge import merge_stores

left = int(sys.argv[1])
def observe(operation, *paths):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
files.observe = observe
merge_stores(sys.argv[2], sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
print(left)
"""

Features = dict[tuple[str, str], bytes]


def build(data: Path, out: Path, teachers: Sequence[str] = ("mean",), group_rows: int = 2, **more: object) -> Path:
    values = {"data": data, "out": out, "teachers": list(teachers), "group_rows": group_rows, "threads": 1}
    request = BuildRequest.of({**values, "micro_batch": 2, "scales": [1.0], **more})
    build_store(request, load_teacher=load_mean_teacher)
    return out


def dataset(root: Path, numbers: Sequence[int], seed: int = 0) -> Path:
    """Return a dataset of twelve tiles, the given ones in the train split and the others in val."""
    others = [i for i in range(12) if i not in numbers]
    splits = {"train": numbers, "val": others} if others else {"train": numbers}
    return write_dataset(root, tiles=12, tile_px=32, seed=seed, splits=splits, labeled={})


def features(path: Path) -> Features:
    """Return the stored bytes of every committed (tile id, key)."""
    store = FeatureStore.open(path)
    found = {}
    for key in store.ledger.specs():
        for row in store.committed(key).nonzero()[0]:
            codes = store.stored(key, int(row))
            assert codes is not None
            found[store.tiles.ids[row], str(key)] = codes.tobytes()
    return found


def files(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Stores of tiles 0-6, of tiles 5-11 (other group size), and of all twelve."""
    folder = tmp_path_factory.mktemp("halves")
    left = build(dataset(folder / "left", range(7)), folder / "a")
    right = build(dataset(folder / "right", range(5, 12)), folder / "b", group_rows=3)
    whole = build(dataset(folder / "data", range(12)), folder / "whole")
    return left, right, whole


def test_independent_builds_of_two_halves_merge_to_the_values_of_one_whole_build(
    halves: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    a, b, whole = halves
    before = files(a), files(b)
    report = merge_stores(a, b, tmp_path / "c")
    assert features(tmp_path / "c") == features(whole)
    assert report.tiles == 12 and report.tiles_new == 5 and report.units_linked == 4 and not report.pending
    assert verify_store(tmp_path / "c", deep=True) == []
    assert (files(a), files(b)) == before, "the sources were changed"
    shard = "zarr/mean/s32o0/mean8/features/c/0/0/0/0"
    assert (tmp_path / "c" / shard).samefile(a / shard), "A's shards are linked, not copied"


def test_a_merge_into_a_is_the_same_store_as_a_merge_into_a_new_one(
    halves: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    a, b, whole = halves
    merge_stores(a, b, tmp_path / "c")
    target = Path(shutil.copytree(a, tmp_path / "a"))
    report = merge_stores(target, b)
    assert report.snapshot == FeatureStore.open(tmp_path / "c").snapshot == FeatureStore.open(target).snapshot
    assert features(target) == features(whole) and verify_store(target, deep=True) == []
    again = merge_stores(target, b)
    assert again.snapshot == report.snapshot and not again.units_copied and not again.tiles_new


def test_a_merge_of_a_store_with_itself_is_the_store(halves: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a = halves[0]
    snapshot = FeatureStore.open(a).snapshot
    assert merge_stores(a, a, tmp_path / "c").snapshot == snapshot
    target = Path(shutil.copytree(a, tmp_path / "a"))
    assert merge_stores(target, target).snapshot == snapshot
    assert files(target) == files(a)
    assert diff_stores(a, tmp_path / "c", deep=True).same and verify_store(tmp_path / "c", deep=True) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_merge_has_every_feature_of_both_bit_for_bit_or_says_which_it_left(tmp_path: Path, seed: int) -> None:
    """Random subsets of tiles and arrays, built in one or two steps, with random row groups."""
    rng = random.Random(seed)
    choices = ["mean", "mean,layers=mean8", "mean,layers=mean16", "other", "other,layers=mean16", "third,layers=mean8"]
    stores = []
    for name in ("a", "b"):
        numbers = sorted(rng.sample(range(12), rng.randint(2, 8)))
        rows = rng.randint(1, 4)
        first, *more = rng.sample(choices, rng.randint(1, 3))
        data = dataset(tmp_path / f"data-{name}", numbers)
        store = build(data, tmp_path / name, [first], rows)
        for teacher in more:  # sometimes over more tiles than the teachers before
            splits = ["train", "val"] if rng.random() < 0.3 else ["train"]
            build(data, store, [teacher], rows, splits=splits)
        if rng.random() < 0.3 and len(FeatureStore.open(store).keys()) > 1:
            drop_arrays(store, [str(FeatureStore.open(store).keys()[0])])
        stores.append(store)
    a, b = stores
    have = features(a), features(b)
    report = merge_stores(a, b, tmp_path / "c")
    merged = features(tmp_path / "c")
    assert merged.items() >= have[0].items()
    assert all(merged[place] == value for place, value in have[1].items() if place in merged)
    lost: dict[str, int] = {}
    for _, key in sorted(set(have[1]) - set(merged)):
        lost[key] = lost.get(key, 0) + 1
    assert lost == report.left_behind
    assert bool(lost) <= bool(report.pending)
    assert set(merged) <= set(have[0]) | set(have[1]), "no feature comes from nowhere"
    assert verify_store(tmp_path / "c", deep=True) == []


def test_pending_units_are_reported_and_a_build_completes_them(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", range(12))
    a = build(dataset(tmp_path / "left", range(6)), tmp_path / "a")
    b = build(dataset(tmp_path / "right", range(6, 12)), tmp_path / "b", ["mean,layers=mean8", "other"])
    report = merge_stores(a, b, tmp_path / "c")
    assert {str(p.arrays) for p in report.pending if p.group > 2} == {str(["mean/s32o0/mean8", "mean/s32o0/mean16"])}
    assert report.left_behind == {"mean/s32o0/mean8": 6}
    build(data, tmp_path / "c", ["mean", "other"])
    assert features(tmp_path / "c") == features(build(data, tmp_path / "whole", ["mean", "other"]))


def test_a_tile_under_another_id_gets_its_row_and_takes_its_features_from_the_store_that_has_them(
    tmp_path: Path,
) -> None:
    a = build(dataset(tmp_path / "left", range(4)), tmp_path / "a")
    data = write_dataset(tmp_path / "right", tiles=12, tile_px=32, splits={"train": [7]}, labeled={})
    for folder in ("images", "masks"):
        shutil.copy(data / folder / "t002.png", data / folder / "copy.png")
    write_split(data, "train", ["t007", "copy"])
    b = build(data, tmp_path / "b", ["other"])
    merge_stores(a, b, tmp_path / "c")
    store = FeatureStore.open(tmp_path / "c")
    assert "copy" in store.tiles and store.tiles.row_of("copy") != store.tiles.row_of("t002")
    merged = features(tmp_path / "c")
    assert merged["copy", "mean/s32o0/mean8"] == features(a)["t002", "mean/s32o0/mean8"]
    assert merged["copy", "other/s32o0/mean8"] == features(b)["copy", "other/s32o0/mean8"]
    assert ("t007", "mean/s32o0/mean8") not in merged


def test_every_conflict_is_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    a = build(dataset(tmp_path / "left", range(4)), tmp_path / "a", ["mean", "other"])
    b = build(
        dataset(tmp_path / "right", range(2, 6), seed=1), tmp_path / "b",
        ["mean,seed=3,pretrained=none", "other,seed=4,pretrained=none"],
    )  # fmt: skip
    before = files(a), files(b)
    with pytest.raises(MismatchError) as caught:
        merge_stores(a, b, tmp_path / "c")
    text = str(caught.value)
    for word in ("'t002'", "'t003'", "mean/s32o0/mean8", "mean/s32o0/mean16", "other/s32o0/mean8", "teacher.weights"):
        assert word in text, text
    assert caught.value.exit_code == 4 and not (tmp_path / "c").exists()
    with pytest.raises(MismatchError):
        merge_stores(a, b)
    assert (files(a), files(b)) == before
    larger = build(write_dataset(tmp_path / "large", tiles=4, tile_px=64), tmp_path / "d", ["third"])
    with pytest.raises(MismatchError, match="tile_px: 32"):
        merge_stores(a, larger, dry_run=True)


def test_other_numerics_in_an_array_set_need_allow_mixed(tmp_path: Path) -> None:
    a = build(dataset(tmp_path / "left", range(4)), tmp_path / "a")
    b = build(dataset(tmp_path / "right", range(4, 8)), tmp_path / "b", micro_batch=4)
    with pytest.raises(MismatchError, match=r"micro_batch: 2 .* 4"):
        merge_stores(a, b, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    merge_stores(a, b, tmp_path / "c", allow_mixed=True)
    commits = FeatureStore.open(tmp_path / "c").ledger.commits.popitem()[1]
    assert {c.profile.micro_batch for g, c in commits.items() if g < 2} == {2}
    assert {c.profile.micro_batch for g, c in commits.items() if g >= 2} == {4}
    assert features(tmp_path / "c") == features(a) | features(b)


@pytest.mark.parametrize("damaged", ["a", "b"])
def test_a_damaged_source_shard_stops_the_merge_before_its_unit_is_written(
    halves: tuple[Path, Path, Path], tmp_path: Path, damaged: str
) -> None:
    a, b = (Path(shutil.copytree(s, tmp_path / n)) for s, n in zip(halves[:2], "ab", strict=True))
    store = {"a": a, "b": b}[damaged]
    shard = store / "zarr" / "mean" / "s32o0" / "mean16" / "features" / "c" / "2" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 4
    shard.write_bytes(data)
    with pytest.raises(FindingsError, match=r"sha256 differs.*nothing of this unit"):
        merge_stores(a, b, tmp_path / "c")
    good = features(halves[2])
    assert all(good[place] == value for place, value in features(tmp_path / "c").items())
    data[5] ^= 4
    shard.write_bytes(data)
    merge_stores(a, b, tmp_path / "c")
    assert features(tmp_path / "c") == good and verify_store(tmp_path / "c", deep=True) == []


def test_a_dry_run_says_what_a_merge_does_and_writes_nothing(halves: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, _ = halves
    before = files(a), files(b)
    planned = merge_stores(a, b, tmp_path / "c", dry_run=True)
    assert not (tmp_path / "c").exists() and (files(a), files(b)) == before
    done = merge_stores(a, b, tmp_path / "c")
    assert (planned.tiles, planned.tiles_new, planned.units_linked, planned.units_copied) == (
        done.tiles, done.tiles_new, done.units_linked, done.units_copied,
    )  # fmt: skip


def test_a_merge_into_what_is_something_else_is_refused(halves: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, whole = halves
    with pytest.raises(UsageError, match="one of the stores"):
        merge_stores(a, b, b)
    target = Path(shutil.copytree(whole, tmp_path / "c"))
    before = files(target)
    with pytest.raises(MismatchError, match="other tiles"):
        merge_stores(a, b, target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(MismatchError, match="letter"):
        merge_stores(a, b, tmp_path / "mine")
    assert files(target) == before and [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_an_array_dropped_from_a_comes_back_from_b_after_gc(halves: tuple[Path, Path, Path], tmp_path: Path) -> None:
    key = FeatureKey.parse("mean/s32o0/mean8")
    a = Path(shutil.copytree(halves[2], tmp_path / "a"))
    drop_arrays(a, [str(key)])
    with pytest.raises(MismatchError, match="gc"):
        merge_stores(a, halves[2])
    collect(a)
    merge_stores(a, halves[2])
    assert features(a) == features(halves[2]) and verify_store(a, deep=True) == []


def start(left: int, *stores: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(left), *map(str, stores)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("into_a", [True, False])
def test_a_merge_killed_at_any_operation_is_finished_by_the_same_command(
    halves: tuple[Path, Path, Path], tmp_path: Path, into_a: bool
) -> None:
    a, b, whole = halves

    def stores(name: str) -> list[Path]:
        return [Path(shutil.copytree(a, tmp_path / name)), b] if into_a else [a, b, tmp_path / name]

    process = start(10**9, *stores("whole"))
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    total, snapshot = 10**9 - int(out), FeatureStore.open(tmp_path / "whole").snapshot
    rng = random.Random(int(into_a))
    for count in sorted(rng.sample(range(1, total + 1), 4)):
        given = stores(f"killed{count}")
        process = start(count, *given)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, (count, total, errors)
        merge_stores(given[0], given[1], None if into_a else given[2])
        assert FeatureStore.open(tmp_path / f"killed{count}").snapshot == snapshot, count
        assert features(tmp_path / f"killed{count}") == features(whole)
        assert verify_store(tmp_path / f"killed{count}", deep=True) == [], count
