"""A call on a worker, and what it returns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import concurrent.futures

    from distributed import Client, Future

__all__ = ["Task"]


class Task:
    """A call on a worker. What it returns is fetched as soon as it is there, by the client's own thread: a worker that
    dies before that stops nothing but this task, and one that dies after it takes nothing with it.
    """

    def __init__(self, client: Client, future: Future[Any], name: str, ended: Callable[[Task], None]) -> None:
        """``ended`` is called with the task, in another thread, when ``result`` has something to return or raise."""
        self.name = name
        self._future = future
        loop: Any = client.loop
        fetch = client.gather(future, asynchronous=True)
        self._found: concurrent.futures.Future[Any] = asyncio.run_coroutine_threadsafe(fetch, loop.asyncio_loop)
        self._found.add_done_callback(lambda _: ended(self))

    @property
    def arrived(self) -> bool:
        """Whether ``result`` returns."""
        return self._found.done() and not self._found.cancelled() and self._found.exception() is None

    def result(self) -> Any:
        """Return what was fetched, or raise why nothing was; once. Does not wait."""
        self._future.release()
        return self._found.result(timeout=0)

    def give_up(self) -> None:
        """Let go of the task, whatever its worker does with it.

        The fetch ends by itself. To cancel it would cancel those of other tasks: ``Client.gather`` shares a request
        among all that are ready at a time, and one that is cancelled while it queues is never replaced.
        """
        with contextlib.suppress(Exception):  # a scheduler that is gone
            self._future.cancel()
