"""dask's performance report of a build: one HTML file with the task stream, profiles, and transfers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import EventSink, Warned
from rsmtdf_cache.files import replace_file

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["NO_BOKEH", "performance_report", "require_place", "require_renderer"]

NO_BOKEH = "needs bokeh; run: pip install 'rsmtdf[dashboard]'"


def require_place(file: Path) -> None:
    """Raise ``UsageError`` where no report could be written: hours later would be too late."""
    folder = file.parent
    if file.is_dir():
        raise UsageError(f"--performance-report {file}: a folder; name a file, e.g. {file / 'report.html'}")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        found = "cannot be written to" if folder.is_dir() else "is not there"
        raise UsageError(f"--performance-report {file}: the folder {folder} {found}")


def require_renderer(client: Client) -> None:
    """Raise ``UsageError`` when the scheduler, which draws the report, cannot."""
    if not client.run_on_scheduler(lambda: __import__("importlib.util").util.find_spec("bokeh") is not None):
        raise UsageError(f"--performance-report: the scheduler {NO_BOKEH} there, and start it again")


@contextlib.contextmanager
def performance_report(client: Client, file: Path | None, on_event: EventSink) -> Generator[None, None, None]:
    """Write dask's report on what the block did to ``file`` (None: no report), also when the build ends with an error.

    The file shows without a network. That it could not be made is a warning: a build is worth more than its report.
    """
    if file is None:
        yield
        return
    since, count = time.time(), client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.monitor.count)
    client.get_task_stream(start=0, stop=0)  # from here on the scheduler keeps it
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            _write(client, file, since, count)
        raise
    try:
        _write(client, file, since, count)
    except Exception as error:
        on_event(Warned(f"--performance-report {file}: not written ({type(error).__name__}: {error})"))


def _write(client: Client, file: Path, since: float, count: int) -> None:
    scheduler = client.scheduler
    if scheduler is None:
        raise OSError("the connection to the scheduler was lost")
    told = {"start": since, "last_count": count, "code": "rsmtdf cache build", "mode": "inline"}
    page = client.sync(scheduler.performance_report, **told, callback_timeout=60)
    replace_file(file, page.encode())
