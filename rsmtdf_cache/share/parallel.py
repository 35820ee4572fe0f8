"""Several transfers at once, told of in the thread that asked for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

__all__ = ["Counter", "run_jobs"]

_K = TypeVar("_K")
#: Told how many bytes are done, and how many of them travelled for it.
Counter = Callable[[int, int], None]


class _Stopped(Exception):
    """Another transfer failed, or the user stopped: this one ends at its next block."""


def run_jobs(jobs: Iterable[tuple[_K, Callable[[Counter], None]]], workers: int, on_bytes: Counter) -> Iterator[_K]:
    """Run ``jobs`` (key, function of a byte counter) in ``workers`` threads and yield the key of each as it ends.

    Keys are yielded and ``on_bytes`` is called in the caller's thread, so neither needs a lock. The first failure, or
    leaving the loop, stops the other jobs at their next block; the failure is raised.
    """
    counts: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    stop = threading.Event()

    def count(nbytes: int, moved: int) -> None:
        if stop.is_set():
            raise _Stopped
        counts.put((nbytes, moved))

    def drain() -> None:
        while not counts.empty():
            on_bytes(*counts.get())

    waiting = iter(jobs)
    running: dict[Future[None], _K] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            while True:
                # A few more than run, so that no worker waits; not all, for there can be millions.
                while len(running) < 2 * max(1, workers) and (job := next(waiting, None)) is not None:
                    running[pool.submit(job[1], count)] = job[0]
                if not running:
                    drain()
                    return
                done, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                drain()
                for future in done:
                    key = running.pop(future)
                    future.result()
                    yield key
        finally:
            stop.set()
            for future in running:
                future.cancel()
