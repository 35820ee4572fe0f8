"""Open rasters that are shared: never by two threads, never by two processes, never after the file has changed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.rasters.pool import FilePool
from rsmtdf_cache.rasters.scene import Scene, open_scene
from tests.scenes import blobs, write_scene


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "scene.tif", blobs(200, 240), tiled=True, blockxsize=64, blockysize=64)


def test_many_threads_read_what_one_reads(scene: Path) -> None:
    pool = FilePool(open_scene)
    boxes = [(y, x) for y in range(0, 160, 20) for x in range(0, 200, 20)] * 3

    def read(corner: tuple[int, int]) -> bytes:
        with pool.borrow(scene) as opened:
            return opened.read_inside(*corner, 40, 40)[0].tobytes()

    with gdal_settings(), open_scene(scene) as alone:
        wanted = [alone.read_inside(*corner, 40, 40)[0].tobytes() for corner in boxes]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, boxes)) == wanted
    pool.close()


def test_a_handle_serves_one_thread_at_a_time_and_few_stay_open(tmp_path: Path) -> None:
    opened, users = [], []
    lock = threading.Lock()

    @contextmanager
    def opening(path: Path) -> Iterator[list[str]]:
        handle = [path.name]
        opened.append(handle)
        yield handle
        handle.append("closed")

    pool = FilePool(opening, limit=2)
    paths = [tmp_path / f"{n}" for n in range(5)]
    for path in paths:
        path.touch()

    def use(n: int) -> None:
        with pool.borrow(paths[n % 5]) as handle:
            with lock:
                assert id(handle) not in users and "closed" not in handle
                users.append(id(handle))
            with lock:
                users.remove(id(handle))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(200)))
    assert sum("closed" not in handle for handle in opened) <= 2
    pool.close()
    assert all("closed" in handle for handle in opened)


def test_a_file_that_was_replaced_is_opened_again(scene: Path) -> None:
    pool = FilePool(open_scene)
    with pool.borrow(scene) as opened:
        before = opened.read_inside(0, 0, 8, 8)[0]
    other = write_scene(scene.with_name("other.tif"), 255 - blobs(200, 240))
    os.replace(other, scene)
    with pool.borrow(scene) as opened:
        assert np.array_equal(opened.read_inside(0, 0, 8, 8)[0], 255 - before)


def test_what_failed_is_not_used_again(scene: Path) -> None:
    pool = FilePool(open_scene)
    seen: list[Scene] = []
    with pytest.raises(RuntimeError, match="mine"), pool.borrow(scene) as opened:
        seen.append(opened)
        raise RuntimeError("mine")
    with pool.borrow(scene) as opened:
        assert opened is not seen[0]


@contextmanager
def _opened_by(path: Path) -> Iterator[tuple[int, Scene]]:
    with open_scene(path) as scene:
        yield os.getpid(), scene


def _child(pool: FilePool[tuple[int, Scene]], path: Path, answers: multiprocessing.SimpleQueue[object]) -> None:
    with pool.borrow(path) as (opener, scene):
        answers.put((opener == os.getpid(), scene.read_inside(8, 16, 32, 32)[0].tobytes()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_opens_the_file_for_itself(scene: Path, method: str) -> None:
    pool = FilePool(_opened_by)
    with pool.borrow(scene) as (opener, opened):
        wanted = opened.read_inside(8, 16, 32, 32)[0].tobytes()
    context: Any = multiprocessing.get_context(method)
    answers: multiprocessing.SimpleQueue[object] = context.SimpleQueue()
    child = context.Process(target=_child, args=(pool, scene, answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and answers.get() == (True, wanted)
    assert opener == os.getpid()
    with pool.borrow(scene) as (_, again):
        assert again is opened and again.read_inside(8, 16, 32, 32)[0].tobytes() == wanted
