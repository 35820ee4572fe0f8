"""Work in forked children of a warm parent: a fork costs milliseconds, starting Python with torch costs seconds.

The parent imports everything and never starts a thread, so that a fork copies a sound process. All that starts threads
(builds, reads, checks) happens in children.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

__all__ = ["ChildFailed", "background", "in_child", "kill_child"]


class ChildFailed(Exception):
    """A child ended in an error that the work did not expect; the text is its traceback."""


def in_child(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a forked child and return what it returned, through JSON. Raises ``ChildFailed``."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run(lambda: _answer(work, writing))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        raise ChildFailed(f"a child ended with status {status} and said nothing")
    answer = json.loads(data)
    if "error" in answer:
        raise ChildFailed(answer["error"])
    return answer["value"]


def kill_child(work: Callable[[], Any], after_s: float) -> bool:
    """Run ``work`` in a forked child and SIGKILL it after so many seconds; return whether that is what ended it.

    Raises ``ChildFailed`` when the work ended in an error before.
    """
    pid = os.fork()
    if pid == 0:
        _run(work)
    until = time.monotonic() + after_s
    while (left := until - time.monotonic()) > 0:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return _judge(status)
        time.sleep(min(left, 0.002))
    os.kill(pid, signal.SIGKILL)
    return _judge(os.waitpid(pid, 0)[1])


@contextmanager
def background(service: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """Run ``service`` in a forked child for as long as the block lasts; yield what it yields.

    The child ends with this process, however that ends: its end of a pipe closes.
    """
    reading, writing = os.pipe()
    stop_reading, stop_writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.close(stop_writing)
        _run(lambda: _serve(service, writing, stop_reading))
    os.close(writing)
    os.close(stop_reading)
    try:
        with os.fdopen(reading) as pipe:
            said = pipe.readline().strip()
        if not said:
            raise ChildFailed("a service did not start; its traceback stands above")
        yield said
    finally:
        os.close(stop_writing)
        os.waitpid(pid, 0)


def _serve(service: Callable[[], AbstractContextManager[str]], writing: int, stop: int) -> None:
    with service() as said:
        with os.fdopen(writing, "w") as pipe:
            pipe.write(f"{said}\n")
        os.read(stop, 1)


def _judge(status: int) -> bool:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise ChildFailed(f"a child ended with status {status}; its traceback stands above")
    return False


def _run(work: Callable[[], Any]) -> None:
    """Do ``work`` in the child and end it without the parent's cleaning up."""
    code = 1
    try:
        gc.freeze()  # objects of the parent: collecting them would only copy their pages
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _answer(work: Callable[[], Any], writing: int) -> None:
    try:
        text = json.dumps({"value": work()})
    except BaseException:
        text = json.dumps({"error": traceback.format_exc()})
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(text.encode())
