"""``BlockPool``: memory is lent again only when nothing can read the earlier batch any more, and it stays bounded."""

from __future__ import annotations

import gc
import math
import os
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rsmtdf_cache.allocate import BlockPool, page_empty

DTYPES = [np.dtype(name) for name in ("uint8", "int8", "bool", "float16")]
SHAPES = [(4, 10, 10, 256), (3, 20, 20, 384), (16, 128, 128), (2, 5), (70_000,)]

#: What may refer to a batch: a part, a turned view, other numbers, a buffer, a tensor, a part of a tensor, its array.
VIEWS: list[Callable[[Any], Any]] = [
    lambda a: a[len(a) // 2 :],
    lambda a: a.T,
    lambda a: a.reshape(-1)[::3],
    lambda a: a.view(np.uint8),
    memoryview,
    torch.from_numpy,
    lambda a: torch.from_numpy(a)[1:],
    lambda a: torch.from_numpy(a).reshape(-1)[5:].numpy(),
    lambda a: torch.from_numpy(a).view(torch.uint8).detach(),
]


def span(array: NDArray[Any]) -> tuple[int, int]:
    return array.ctypes.data, array.ctypes.data + array.nbytes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([math.inf, 300_000]))
def test_no_memory_is_lent_while_anything_refers_to_it_and_what_is_held_is_bounded(seed: int, keep: float) -> None:
    rng, pool = random.Random(seed), BlockPool(keep)
    held: list[tuple[Any, tuple[int, int]]] = []  # what refers to a batch, and where the batch lies
    most = 0
    for _ in range(60):
        if held and rng.random() < 0.5:
            held.pop(rng.randrange(len(held)))
        else:
            array = pool.empty(rng.choice(SHAPES), rng.choice(DTYPES))
            assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
            here = span(array)
            assert array.nbytes < 64 * 1024 or here[0] % 4096 == 0
            assert all(here[1] <= low or high <= here[0] for _, (low, high) in held), "lent twice"
            held.append((rng.choice(VIEWS)(array), here))
            if rng.random() < 0.3:  # a second one, which may outlive the first
                held.append((rng.choice(VIEWS)(array), here))
            del array
        lent = sum(-(-(b - a) // 4096) * 4096 for a, b in {here for _, here in held} if b - a >= 64 * 1024)
        most = max(most, lent)
        assert pool.lent == lent
        assert pool.kept <= keep
        assert pool.lent + pool.kept <= pool.most_lent
        assert pool.most_lent <= most + 2**20  # a batch that is made lives with those that were there
    held.clear()
    assert pool.lent == 0


def test_a_batch_of_the_same_size_comes_from_the_memory_of_the_last() -> None:
    pool = BlockPool()
    first = pool.empty((16, 100, 100), np.dtype(np.int8))
    where = span(first)
    tensor = torch.from_numpy(first)
    del first
    second = pool.empty((16, 100, 100), np.dtype(np.int8))
    assert span(second)[0] != where[0], "a tensor still has it"
    del tensor
    third = pool.empty((2, 80_000), np.dtype(np.bool_))  # other shape and dtype, the same bytes
    assert span(third) == where


def test_sizes_that_are_not_asked_for_any_more_make_room() -> None:
    pool = BlockPool()
    for rows in range(20, 60):
        array = pool.empty((rows, 10_000), np.dtype(np.uint8))
        array[...] = 1
        del array
        assert pool.kept <= 600_000 + 4096, "blocks of all sizes are kept"


def test_threads_never_see_each_other_s_numbers() -> None:
    pool, wrong = BlockPool(), []

    def work(number: int) -> None:
        rng, mine = random.Random(number), []
        for turn in range(150):
            tag = (number * 31 + turn) % 251
            array = pool.empty((rng.choice((2, 3)), 50_000), np.dtype(np.uint8))
            array[...] = tag
            mine.append((torch.from_numpy(array)[1:], tag))
            del array
            while len(mine) > rng.randrange(4):
                tensor, known = mine.pop(rng.randrange(len(mine)))
                if not (tensor == known).all():
                    wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.lent == 0


def test_what_was_lent_outlives_the_pool_and_keeps_nothing_of_it() -> None:
    pool = BlockPool()
    kept, dropped = (pool.empty((5, 40_000), np.dtype(np.uint8)) for _ in range(2))
    kept[...] = 7
    del dropped
    gone = weakref.ref(pool)
    del pool
    assert gone() is None, "the batch holds the pool, or there is a cycle"
    gc.collect()
    other = [page_empty((5, 40_000), np.dtype(np.uint8)) for _ in range(8)]
    for array in other:
        array[...] = 1
    assert (kept == 7).all()
    del kept  # nothing to come back to


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_that_forks_while_a_thread_holds_the_lock_can_lend() -> None:
    pool = BlockPool()
    kept = pool.empty((5, 40_000), np.dtype(np.uint8))
    kept[...] = 3
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.lock:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        array = pool.empty((5, 40_000), np.dtype(np.uint8))
        array[...] = 9
        os._exit(0 if (kept == 3).all() else 1)
    done.set()
    thread.join()
    for _ in range(200):  # a child that waits for the lock would wait for ever
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        threading.Event().wait(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock that a thread of its parent held")
    assert os.waitstatus_to_exitcode(status) == 0
    assert (kept == 3).all(), "the child wrote into its parent's memory"
