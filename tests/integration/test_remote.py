"""Reading a store where it is: the same values as on disk, shards fetched once, and a cache that stays in its bound."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, MismatchError, ResourceError, UsageError
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.push import push_store
from rsmtdf_cache.share.remote import remote_home
from rsmtdf_cache.store import FeatureStore
from tests.datasets import write_dataset, write_split
from tests.servers import WebFolder, make_bucket, s3_server, web_folder
from tests.teachers import load_mean_teacher

pytestmark = pytest.mark.usefixtures("quick_and_at_home")

ROOT = Path(__file__).parents[2]


def build(data: Path, out: Path) -> None:
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 2, "threads": 1, "micro_batch": 2}
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": range(8), "val": [10], "test": [11]}
    return write_dataset(tmp_path_factory.mktemp("remote") / "data", tiles=12, splits=splits)


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("remote") / "store"
    build(data, out)
    return out


@pytest.fixture
def served(store: Path, tmp_path: Path) -> Iterator[WebFolder]:
    """A copy of the store, so that a test may change it."""
    shutil.copytree(store, tmp_path / "served")
    with web_folder(tmp_path / "served") as web:
        yield web


def shard_requests(web: WebFolder) -> Counter[str]:
    return Counter(path for path, _, _ in web.requests if "features/c/" in path)


def values(store: FeatureStore) -> list[np.ndarray]:
    return [store.read(key, range(len(store.tiles))).values for key in store.keys()]


def same(store: FeatureStore, other: FeatureStore) -> bool:
    pairs = zip(values(store), values(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def test_a_remote_store_reads_like_the_local_one(store: Path, served: WebFolder) -> None:
    remote = FeatureStore.open(served.url)
    assert remote.snapshot == FeatureStore.open(store).snapshot
    assert same(remote, FeatureStore.open(store))


def test_describing_a_remote_store_fetches_no_shard(store: Path, served: WebFolder) -> None:
    found = FeatureStore.open(served.url, verify_reads="never").describe()
    assert found["arrays"] == FeatureStore.open(store).describe()["arrays"]
    assert not shard_requests(served)


def test_a_shard_is_fetched_at_first_touch_and_never_again(served: WebFolder) -> None:
    store = FeatureStore.open(served.url)
    key = store.keys()[0]
    store.read(key, [0])
    assert sum(shard_requests(served).values()) == 1
    store.read(key, [1])
    values(FeatureStore.open(served.url))
    assert set(shard_requests(served).values()) == {1}


def test_a_store_in_a_bucket_reads_like_the_local_one(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch) as endpoint:
        make_bucket(endpoint, "bucket")
        pushed = push_store(store, "s3://bucket/store")
        remote = FeatureStore.open("s3://bucket/store")
        assert remote.snapshot == pushed.snapshot
        assert same(remote, FeatureStore.open(store))


def test_the_next_open_sees_a_changed_remote_and_an_open_store_does_not(data: Path, tmp_path: Path) -> None:
    more, out = tmp_path / "data", tmp_path / "store"
    shutil.copytree(data, more)
    write_split(more, "train", [f"t{i:03}" for i in range(4)])
    for path in (more / "splits" / "labeled").glob("*.txt"):
        path.unlink()
    build(more, out)
    with web_folder(out) as web:
        before = FeatureStore.open(web.url)
        write_split(more, "train", [f"t{i:03}" for i in range(8)])
        build(more, out)
        after = FeatureStore.open(web.url)
        assert (len(before.tiles), len(after.tiles)) == (4, 8)
        assert all(np.isfinite(v).all() for v in values(before))
        assert before.snapshot != after.snapshot
        then = FeatureStore.open(f"{web.url}@{before.snapshot[:10]}")
        assert then.snapshot == before.snapshot and same(then, before)
        with pytest.raises(MismatchError, match="no such snapshot"):
            FeatureStore.open(f"{web.url}@{'0' * 12}")


def test_the_cache_stays_in_its_bound_and_the_values_stay_right(
    store: Path, served: WebFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [p.stat().st_size for p in store.glob("zarr/*/*/*/features/c/*/0/0/0")]
    limit = max(sizes) * 3
    monkeypatch.setenv("RSMTDF_REMOTE_CACHE_GB", repr(limit / 1e9))
    remote, local = FeatureStore.open(served.url), FeatureStore.open(store)
    for key in remote.keys():
        for row in range(len(remote.tiles)):
            assert np.array_equal(remote.read(key, [row]).values, local.read(key, [row]).values)
            assert sum(p.stat().st_size for p in (remote_home() / "shards").iterdir()) <= limit
    assert sum(sizes) > limit
    assert not list((remote_home() / "drafts").iterdir())


def test_the_least_recently_used_shard_makes_room(
    served: WebFolder, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = next(k for k in FeatureStore.open(store).keys() if str(k) == "mean/s64o0/mean8")
    size = (store / "zarr" / str(key) / "features/c/0/0/0/0").stat().st_size
    monkeypatch.setenv("RSMTDF_REMOTE_CACHE_GB", repr(2.5 * size / 1e9))
    for row in (0, 2, 0, 4, 0):  # groups 0, 1, 0, 2, 0; each by a store that has nothing open
        FeatureStore.open(served.url).read(key, [row])
    assert sorted(shard_requests(served).values()) == [1, 1, 1]
    FeatureStore.open(served.url).read(key, [2])
    assert max(shard_requests(served).values()) == 2


def test_a_shard_larger_than_the_cache_is_an_error_that_says_so(
    served: WebFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSMTDF_REMOTE_CACHE_GB", "1e-8")
    store = FeatureStore.open(served.url)
    with pytest.raises(ResourceError, match="RSMTDF_REMOTE_CACHE_GB"):
        store.read(store.keys()[0], [0])
    monkeypatch.setenv("RSMTDF_REMOTE_CACHE_GB", "much")
    with pytest.raises(UsageError, match="much"):
        store.read(store.keys()[0], [0])


def test_threads_that_touch_a_shard_together_fetch_it_once(store: Path, served: WebFolder) -> None:
    remotes = [FeatureStore.open(served.url) for _ in range(4)]
    served.requests.clear()
    found: list[list[np.ndarray]] = []
    threads = [threading.Thread(target=lambda s=s: found.append(values(s))) for s in remotes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    local = values(FeatureStore.open(store))
    assert len(found) == 4
    assert all(np.array_equal(a, b) for one in found for a, b in zip(one, local, strict=True))
    assert set(shard_requests(served).values()) == {1}


READ = """
import sys, hashlib
from rsmtdf_cache.store import FeatureStore
store = FeatureStore.open(sys.argv[1])
rows = range(len(store.tiles))
print(hashlib.sha256(b"".join(store.read(k, rows).values.tobytes() for k in store.keys())).hexdigest())
"""


def test_processes_that_touch_a_shard_together_fetch_it_once(served: WebFolder) -> None:
    command = [sys.executable, "-c", READ, served.url]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=120)[0] for process in running}
    assert len(answers) == 1 and len(answers.pop().strip()) == 64
    assert set(shard_requests(served).values()) == {1}


def _read_in_child(store: FeatureStore, queue: multiprocessing.Queue[float]) -> None:
    queue.put(float(sum(v.astype(np.float64).sum() for v in values(store))))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_remote_store_goes_to_other_processes(store: Path, served: WebFolder, method: str) -> None:
    remote = FeatureStore.open(served.url)
    remote.read(remote.keys()[0], [0])
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(remote, queue))
    child.start()
    total = queue.get(timeout=120)
    child.join()
    assert total == float(sum(v.astype(np.float64).sum() for v in values(FeatureStore.open(store))))


def test_a_pickled_remote_store_keeps_its_snapshot_without_the_network(served: WebFolder) -> None:
    remote = FeatureStore.open(served.url)
    read = values(remote)
    served.requests.clear()
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.snapshot == remote.snapshot
    assert all(np.array_equal(a, b) for a, b in zip(values(copy), read, strict=True))
    assert not served.requests


def test_a_cut_fetch_continues(store: Path, served: WebFolder) -> None:
    served.cut_on, served.cut_after, served.cuts_left = "features/c/", 100, 5
    assert same(FeatureStore.open(served.url), FeatureStore.open(store))
    assert served.cuts_left == 0


def test_a_flipped_bit_in_the_remote_is_refused_and_not_kept(served: WebFolder) -> None:
    store = FeatureStore.open(served.url)
    place = served.root / "zarr" / str(store.keys()[0]) / "features/c/0/0/0/0"
    data = bytearray(place.read_bytes())
    data[3] ^= 16
    place.write_bytes(data)
    with pytest.raises(FindingsError, match=r"sha256 differs.*remote store is damaged"):
        store.read(store.keys()[0], [0])
    assert not list((remote_home() / "shards").iterdir())


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_shard_damaged_in_the_cache_is_fetched_again(store: Path, served: WebFolder, damage: str) -> None:
    values(FeatureStore.open(served.url))
    for path in (remote_home() / "shards").iterdir():
        data = bytearray(path.read_bytes())
        data[3] ^= 16
        path.chmod(0o644)
        path.write_bytes(bytes({"flipped": data, "cut": data[:-5], "emptied": data[:0]}[damage]))
    served.requests.clear()
    assert same(FeatureStore.open(served.url), FeatureStore.open(store))
    assert set(shard_requests(served).values()) == {1}


@pytest.mark.parametrize("pattern", ["manifest.json", "ledger/tiles/*.parquet", "ledger/commits/*/*.json"])
@pytest.mark.parametrize("damage", ["flipped", "deleted"])
def test_a_record_damaged_in_the_mirror_is_fetched_again(
    store: Path, served: WebFolder, pattern: str, damage: str
) -> None:
    mirror = FeatureStore.open(served.url).path
    record = sorted(mirror.glob(pattern))[0]
    data = bytearray(record.read_bytes())
    data[len(data) // 2] ^= 1
    record.unlink() if damage == "deleted" else record.write_bytes(data)
    assert same(FeatureStore.open(served.url), FeatureStore.open(store))


def test_an_unknown_snapshot_is_told_of_with_the_url(served: WebFolder) -> None:
    with pytest.raises(MismatchError) as caught:
        FeatureStore.open(f"{served.url}@{'a' * 8}")
    assert f"{served.url}@aaaaaaaa" in str(caught.value) and str(remote_home()) not in str(caught.value)


def test_a_web_page_for_everything_is_no_store(served: WebFolder) -> None:
    served.page = b"<!DOCTYPE html><title>log in</title>"
    with pytest.raises(MismatchError, match=r"no feature store is there .*web page"):
        FeatureStore.open(served.url)


def test_a_missing_bucket_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch), pytest.raises(MismatchError, match="the bucket does not exist"):
        FeatureStore.open("s3://not-there/store")


def test_the_draft_of_a_killed_process_does_not_hold_the_cache(
    store: Path, served: WebFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = max(p.stat().st_size for p in store.glob("zarr/*/*/*/features/c/*/0/0/0"))
    monkeypatch.setenv("RSMTDF_REMOTE_CACHE_GB", repr(limit / 1e9))
    (remote_home() / "drafts").mkdir(parents=True)
    (remote_home() / "drafts" / f"{'f' * 64}.{limit}").touch()
    assert same(FeatureStore.open(served.url), FeatureStore.open(store))


def test_no_store_there_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with web_folder(tmp_path / "empty") as web, pytest.raises(MismatchError, match="no feature store is there"):
        FeatureStore.open(web.url)
