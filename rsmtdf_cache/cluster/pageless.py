"""dask's scheduler and worker without the HTTP server that each of them starts, whatever its options say.

Without a dashboard it still serves facts about tasks and machines, to every user of the machine and without TLS. There
is no option against it, so the one method that opens the port does nothing here. Nothing else of dask needs the server.
"""

from __future__ import annotations

from typing import Any

from distributed import Scheduler, Worker

__all__ = ["PagelessScheduler", "PagelessWorker"]


class PagelessScheduler(Scheduler):
    """A scheduler that listens for workers and clients alone."""

    def start_http_server(self, *told: Any, **more: Any) -> None:
        """Open no port."""


class PagelessWorker(Worker):
    """A worker that listens for the scheduler and other workers alone."""

    def start_http_server(self, *told: Any, **more: Any) -> None:
        """Open no port."""
