"""Processes of one node that train from a server: each shard once a node, ahead of need, within the cache's bound."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from operator import contains
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.records import ShardRecord
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.ahead import FETCHES, FetchAhead
from rsmtdf_cache.share.remote import remote_home
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.residency import Residency, hold_run, small_cache
from tests.clusters import until
from tests.commands import start_ranks
from tests.datasets import write_dataset
from tests.servers import WebFolder, web_folder
from tests.teachers import load_mean_teacher

pytestmark = pytest.mark.usefixtures("quick_and_at_home")

ROOT = Path(__file__).parents[2]
TILES = 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of many small shards: two layers, two tiles a shard."""
    root = tmp_path_factory.mktemp("ahead")
    splits = {"train": range(TILES), "val": [TILES], "test": [TILES + 1]}
    write_dataset(root / "data", tiles=TILES + 2, splits=splits, labeled={"some": range(6)})
    values = {"data": root / "data", "out": root / "store", "teachers": ["mean"], "scales": [1.0], "group_rows": 2}
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)
    return root


@pytest.fixture
def served(root: Path, tmp_path: Path) -> Iterator[WebFolder]:
    shutil.copytree(root / "store", tmp_path / "served")
    with web_folder(tmp_path / "served") as web:
        yield web


def shard_requests(web: WebFolder) -> Counter[str]:
    return Counter(path for path, _, _ in web.requests if "features/c/" in path)


def shard_sizes(root: Path) -> list[int]:
    return [p.stat().st_size for p in (root / "store").glob("zarr/*/*/*/features/c/*/0/0/0")]


# --- ahead of need


def test_shards_that_will_be_read_come_together_and_once(root: Path, served: WebFolder) -> None:
    store, local = FeatureStore.open(served.url), FeatureStore.open(root / "store")
    rows = range(0, TILES, 2)
    served.pause_s = 4  # one after the other, so many would take longer than is waited for
    assert sum(store.will_read(key, rows) for key in store.keys()) == TILES
    assert sum(store.will_read(key, rows) for key in store.keys()) == 0, "asked for already"
    until(lambda: sum(shard_requests(served).values()) >= FETCHES, seconds=4 * (FETCHES - 1))
    served.pause_s = 0
    for key in store.keys():
        assert np.array_equal(store.read(key, rows).values, local.read(key, rows).values)
    assert len(shard_requests(served)) == TILES and set(shard_requests(served).values()) == {1}
    assert sum(store.will_read(key, rows) for key in store.keys()) <= TILES, "open ones: the system is told of rows"
    time.sleep(0.05)
    assert set(shard_requests(served).values()) == {1}
    assert all(t.daemon for t in threading.enumerate() if t.name == "rsmtdf-fetch"), "nobody waits for them at the end"


def test_a_loader_has_pixels_and_features_of_later_steps_fetched(root: Path, tmp_path: Path) -> None:
    """After one batch all is on its way that the next ones read, though nobody has asked for these yet."""
    values = {"data": root / "data", "out": tmp_path / "store", "teachers": ["mean"], "scales": [1.0], "group_rows": 2}
    build_store(BuildRequest.of(values | {"pixels": True}), load_teacher=load_mean_teacher)
    recipe = Recipe.model_validate({
        "data": root / "data", "labeled": "some", "crop_px": 64, "batch": {"labeled": 1, "unlabeled": 1},
    })  # fmt: skip
    with web_folder(tmp_path / "store") as web:
        loader = BatchLoader.open(open_source(root / "data"), recipe, FeatureStore.open(web.url), pixels="store")
        batches = loader.iterate(0, TILES)
        next(batches)
        until(lambda: len(shard_requests(web)) == 3 * TILES // 2)  # two layers and the pixels
        for _ in batches:
            pass
    assert len(shard_requests(web)) == 3 * TILES // 2 and set(shard_requests(web).values()) == {1}


@pytest.mark.parametrize("residency", ["ram", "device"])
def test_a_run_that_holds_a_remote_store_in_memory_fetches_each_shard_once(
    root: Path, served: WebFolder, monkeypatch: pytest.MonkeyPatch, residency: Residency
) -> None:
    """In a cache that holds four of its shards."""
    monkeypatch.setenv("RSMTDF_REMOTE_CACHE_GB", repr(4 * max(shard_sizes(root)) / 1e9))
    recipe = Recipe.model_validate({
        "data": root / "data", "labeled": "some", "crop_px": 64, "batch": {"labeled": 2, "unlabeled": 4},
    })  # fmt: skip
    source = open_source(root / "data")
    held, local = (BatchLoader.open(source, recipe, FeatureStore.open(at)) for at in (served.url, root / "store"))
    assert small_cache(held.dataset) is not None and small_cache(local.dataset) is None
    hold_run(held.dataset, residency)
    assert small_cache(held.dataset) is None, "memory is no cache"
    for step in range(3):
        mine, expected = (one.batch(step).labeled.targets.decoded(CPU).features for one in (held, local))
        assert mine.keys() == expected.keys() and all(torch.equal(mine[key], expected[key]) for key in mine)
    assert len(shard_requests(served)) == TILES and set(shard_requests(served).values()) == {1}


def test_a_local_store_fetches_nothing(root: Path) -> None:
    store = FeatureStore.open(root / "store")
    assert not store.remote and store.will_read(store.keys()[0], range(TILES)) == 0


def test_an_error_ahead_of_need_comes_when_the_shard_is_read(served: WebFolder) -> None:
    store = FeatureStore.open(served.url)
    key = store.keys()[0]
    place = served.root / "zarr" / str(key) / "features/c/1/0/0/0"
    place.write_bytes(place.read_bytes()[::-1])
    store.will_read(key, range(6))
    until(lambda: len(list((remote_home() / "shards").glob("*"))) == 2)
    assert np.isfinite(store.read(key, [0, 1, 4]).values).all()
    with pytest.raises(FindingsError, match="sha256 differs"):
        store.read(key, [2])


def record(number: int, nbytes: int) -> ShardRecord:
    return ShardRecord("layer", f"zarr/x/{number}", nbytes, f"{number:064x}")


@pytest.mark.parametrize("seed", range(3))
def test_what_is_fetched_and_not_read_stays_below_the_bound(seed: int) -> None:
    """Random sizes, readers that take what comes, some of it before it was fetched; one shard larger than the bound."""
    rng = random.Random(seed)
    records = [record(i, rng.choice([1, 5, 30, 60, 150])) for i in range(60)]
    unread: dict[str, int] = {}
    read: set[str] = set()
    most, order, lock = [], [], threading.Lock()

    def fetch(one: ShardRecord, place: Path) -> None:
        time.sleep(rng.random() * 0.002)  # a thread that has its shard and was not let run yet
        with lock:
            order.append(one.sha256)
            if one.sha256 in read:
                return  # whoever read it has brought it: nothing comes that nobody has read
            unread[one.sha256] = one.nbytes
            most.append((sum(unread.values()), len(unread)))
        time.sleep(rng.random() * 0.002)
        if one.nbytes == 5:
            with lock:
                unread.pop(one.sha256, None)
            raise OSError("the line is cut")

    ahead = FetchAhead(fetch, lambda: 100)
    for one in records:
        assert ahead.ask(one, Path(), lambda: True)
        assert not ahead.ask(one, Path(), lambda: True) or one.nbytes == 5
    assert not ahead.ask(record(99, 1), Path(), lambda: False), "opened meanwhile"
    for one in records:
        if rng.random() < 0.7:
            until(partial(contains, order, one.sha256), seconds=5)
        with lock:
            unread.pop(one.sha256, None)
            read.add(one.sha256)
        ahead.taken(one.sha256)
    assert all(total <= 100 or count == 1 for total, count in most)
    fetched = Counter(order)
    assert len(fetched) >= 30
    assert all(fetched[one.sha256] <= 1 for one in records if one.nbytes != 5), "a line that is not cut is used once"


# --- several processes of a node

READ = """
import sys, hashlib, time
from pathlib import Path
from rsmtdf_cache.store import FeatureStore
store = FeatureStore.open(sys.argv[1])
rows = range(len(store.tiles))
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists(): time.sleep(0.005)
for key in store.keys(): store.will_read(key, rows)
print(hashlib.sha256(b"".join(store.read(k, rows).values.tobytes() for k in store.keys())).hexdigest())
"""


def readers(url: str, folder: Path, count: int) -> list[subprocess.Popen[str]]:
    """Start processes that read all of the store at one moment."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", READ, url, str(folder / f"ready{i}"), str(folder / "go")],
            env=env, stdout=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    until(lambda: len(list(folder.glob("ready*"))) == count)
    (folder / "go").touch()
    return running


def test_processes_that_start_at_one_moment_fetch_each_shard_once(served: WebFolder, tmp_path: Path) -> None:
    served.pause_s = 0.02
    running = readers(served.url, tmp_path, 3)
    answers = {process.communicate(timeout=120)[0] for process in running}
    assert len(answers) == 1 and len(answers.pop().strip()) == 64
    assert len(shard_requests(served)) == TILES and set(shard_requests(served).values()) == {1}


def test_a_process_that_is_killed_while_it_fetches_holds_nobody_up(served: WebFolder, tmp_path: Path) -> None:
    served.pause_s = 0.25
    running = readers(served.url, tmp_path, 2)
    until(lambda: len(shard_requests(served)) >= 3)
    os.kill(running[0].pid, signal.SIGKILL)
    served.pause_s = 0
    running[0].communicate(timeout=60)
    answer, _ = running[1].communicate(timeout=60)
    assert len(answer.strip()) == 64
    asked = shard_requests(served)
    assert len(asked) == TILES and max(asked.values()) <= 2
    twice = sum(count == 2 for count in asked.values())
    assert twice <= FETCHES, "what the killed process had on its way is asked for again, and nothing else"
    assert not list((remote_home() / "drafts").iterdir())


def on_disk() -> dict[int, int]:
    """Return inode → bytes of what the cache holds; a draft that just became a shard is one file with two names."""
    found = {}
    for name in ("shards", "drafts"):
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(remote_home() / name):
                with contextlib.suppress(FileNotFoundError):
                    found[entry.inode()] = entry.stat().st_size
    return found


CHURN = """
import sys, random
from rsmtdf_cache.store import FeatureStore
rng = random.Random(sys.argv[2])
for _ in range(12):
    store = FeatureStore.open(sys.argv[1])
    for row in rng.sample(range(len(store.tiles)), 12):
        for key in store.keys():
            store.read(key, [row])
"""


def test_processes_that_push_out_each_others_shards_read_all_the_same(
    root: Path, served: WebFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard may be gone as soon as it is mapped: what is mapped counts."""
    monkeypatch.setenv("RSMTDF_REMOTE_CACHE_GB", repr(6 * max(shard_sizes(root)) / 1e9))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CHURN, served.url, str(seed)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )
        for seed in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert max(shard_requests(served).values()) > 3, "they did push out each other's shards"


def words(root: Path, tmp_path: Path, store: str, *more: object) -> list[object]:
    recipe = Recipe.model_validate({
        "data": str(root / "data"), "labeled": "some", "steps": 8, "crop_px": 64,
        "batch": {"labeled": 2, "unlabeled": 6}, "student": {"encoder": "timm:test_vit", "channels": 8},
        "distill": {"hidden": 8},
    })  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    return [
        "train", tmp_path / "recipe.yaml", "--use-cache", store, "--device", "cpu", "--no-tensorboard", "-q", *more
    ]  # fmt: skip


def test_training_processes_of_a_node_fetch_each_shard_once_and_warn_once_of_a_small_cache(
    root: Path, served: WebFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = {"NO_PROXY": "127.0.0.1"}
    ranks = start_ranks(words(root, tmp_path, served.url, "--out", tmp_path / "run"), tmp_path, 2, home)
    assert [c.end() for c in ranks] == [0, 0], [c.stderr.read_text() for c in ranks]
    assert len(shard_requests(served)) == TILES and set(shard_requests(served).values()) == {1}
    assert "RSMTDF_REMOTE_CACHE_GB" not in ranks[0].stderr.read_text()

    shutil.rmtree(remote_home())
    limit = 6 * max(shard_sizes(root))
    sizes: list[int] = []
    small = {**home, "RSMTDF_REMOTE_CACHE_GB": repr(limit / 1e9)}
    ranks = start_ranks(words(root, tmp_path, served.url, "--out", tmp_path / "small"), tmp_path, 2, small)
    while any(c.runs for c in ranks):
        before, after = on_disk(), on_disk()
        if before.keys() == after.keys():  # all of them were there between the two looks
            sizes.append(sum(before.values()))
        time.sleep(0.01)
    assert [c.end() for c in ranks] == [0, 0], [c.stderr.read_text() for c in ranks]
    # one shard for each process may be on its way while it makes room
    assert max(sizes) > limit / 2 and max(sizes) <= limit + 2 * max(shard_sizes(root))
    said = [c.stderr.read_text() for c in ranks]
    assert said[0].count("RSMTDF_REMOTE_CACHE_GB") == 1 and said[1] == ""
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("run", "small")]
    assert [line.split('"seconds"')[0] for line in logs[0].splitlines()] == [
        line.split('"seconds"')[0] for line in logs[1].splitlines()
    ]
