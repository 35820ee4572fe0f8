"""Readers of every kind, while a builder appends: each sees one consistent snapshot, and only right bytes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.events import Progress
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.store import FeatureStore
from tests.datasets import make_tile, write_dataset
from tests.teachers import load_mean_teacher

PX, TILES = 32, 24


def build(data: Path, out: Path, splits: tuple[str, ...], on_event: object = None) -> None:
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 2, "threads": 1, "scales": [1.0],
              "splits": splits}  # fmt: skip
    sink = {} if on_event is None else {"on_event": on_event}
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher, **sink)  # type: ignore[arg-type]


def expected(tile_id: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    image, _ = make_tile(int(tile_id[1:]), PX)
    return np.asarray(image.reshape(4, 8, 4, 8, 3).mean((1, 3)), np.float16)


def wrong_tiles(store: FeatureStore) -> list[str]:
    """Return the committed tiles of every array with an 8-px cell whose bytes are not those of their pixels."""
    key = next(k for k in store.keys() if k.layer == "mean8")
    rows = [int(r) for r in np.flatnonzero(store.committed(key))]
    found = store.read(key, rows)
    return [store.tiles.ids[r] for r, v in zip(rows, found.values, strict=True)
            if not np.allclose(v, expected(store.tiles.ids[r]), atol=0.07)]  # fmt: skip


def look_again(path: str, stop: str, results: str) -> None:
    """A reader process: open, read everything, check that nothing changes under it; until told to stop."""
    seen = set()
    while not os.path.exists(stop):
        store = FeatureStore.open(path)
        before, again = store.snapshot, store.committed(store.keys()[0]).sum()
        bad = wrong_tiles(store)
        same = store.snapshot == before and store.committed(store.keys()[0]).sum() == again
        seen.add((before, bool(bad), same))
        Path(f"{results}.count").write_text(str(len(seen)))
    Path(results).write_bytes(pickle.dumps(seen))


@pytest.fixture
def grown(tmp_path: Path) -> tuple[Path, Path]:
    splits = {"train": range(8), "val": range(8, 16), "test": range(16, TILES)}
    data = write_dataset(tmp_path / "data", tiles=TILES, tile_px=PX, splits=splits)
    build(data, tmp_path / "s", ("train",))
    return data, tmp_path / "s"


def test_processes_that_read_while_a_builder_appends_see_consistent_snapshots_and_right_bytes(
    grown: tuple[Path, Path], tmp_path: Path
) -> None:
    data, store = grown
    stop = tmp_path / "stop"
    context = multiprocessing.get_context("spawn")
    readers = [
        context.Process(target=look_again, args=(str(store), str(stop), str(tmp_path / f"seen{i}"))) for i in range(2)
    ]
    for reader in readers:
        reader.start()

    def wait_until_each_has_seen(contents: int) -> None:
        counts = [tmp_path / f"seen{i}.count" for i in range(2)]
        while not all(c.is_file() and int(c.read_text() or 0) >= contents for c in counts):
            assert all(reader.is_alive() for reader in readers)
            time.sleep(0.05)

    wait_until_each_has_seen(1)
    slowly = lambda event: time.sleep(0.01)  # noqa: E731
    for splits in (("train", "val"), ("train", "val", "test")):
        build(data, store, splits, slowly)
        Ledger.load(StorePaths(store)).compact(tail_max=0)
        write_head(StorePaths(store), load_manifest(StorePaths(store)), Ledger.load(StorePaths(store)))
    wait_until_each_has_seen(2)
    stop.touch()
    for i, reader in enumerate(readers):
        reader.join(60)
        assert reader.exitcode == 0
        seen = pickle.loads((tmp_path / f"seen{i}").read_bytes())
        assert len(seen) > 1 and all(not bad and same for _, bad, same in seen)


def test_an_open_store_shows_its_snapshot_while_units_are_committed_beside_it(grown: tuple[Path, Path]) -> None:
    data, path = grown
    store = FeatureStore.open(path)
    key = store.keys()[0]
    snapshot, committed, tiles = store.snapshot, store.committed(key), len(store.tiles)
    fresh: set[str] = set()

    def look(event: object) -> None:
        if isinstance(event, Progress) and event.task == "mean":
            fresh.add(FeatureStore.open(path).snapshot)
            assert store.snapshot == snapshot and len(store.tiles) == tiles
            assert np.array_equal(store.committed(key), committed)

    build(data, path, ("train", "val", "test"), look)
    assert len(fresh) > 2  # other readers did see it grow
    assert not wrong_tiles(store) and not wrong_tiles(FeatureStore.open(path))
    then = FeatureStore.open(f"{path}@{snapshot[:10]}")
    assert then.snapshot == snapshot and len(then.tiles) == tiles


def test_threads_share_a_store_and_each_read_is_right(grown: tuple[Path, Path]) -> None:
    store = FeatureStore.open(grown[1])
    key = next(k for k in store.keys() if k.layer == "mean8")
    rows = [int(r) for r in np.random.default_rng(0).integers(0, 8, 400)]

    def right(row: int) -> bool:
        return bool(np.allclose(store.read(key, [row]).values[0], expected(store.tiles.ids[row]), atol=0.07))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, rows))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_reaches_another_process_with_its_snapshot(grown: tuple[Path, Path], method: str) -> None:
    data, path = grown
    store = FeatureStore.open(path)
    build(data, path, ("train", "val"))  # the copy must not see this
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.apply(describe, (store,)) == (store.snapshot, len(store.tiles), [])
    assert FeatureStore.open(path).snapshot != store.snapshot


def describe(store: FeatureStore) -> tuple[str, int, list[str]]:
    return store.snapshot, len(store.tiles), wrong_tiles(store)


def test_a_fork_while_another_thread_reads_does_not_hang_the_child(grown: tuple[Path, Path]) -> None:
    store = FeatureStore.open(grown[1])
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store._shards.lock:  # what a thread that opens a shard holds
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    child = multiprocessing.get_context("fork").Process(target=wrong_tiles, args=(store,))
    child.start()
    child.join(30)
    hung = child.is_alive()
    child.kill()
    leave.set()
    thread.join()
    assert not hung and child.exitcode == 0
