"""dask schedulers and workers in processes of their own, forked from a warm server, that can be stopped anywhere.

What stops them are signals and files: a worker holds at a numbered step of a commit until a file is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.commands import CONTEXT, PRELOAD

__all__ = ["Cluster", "Temper", "cluster", "until"]

CONTEXT.set_forkserver_preload(
    [*PRELOAD, "distributed", "rsmtdf_cache.build", "rsmtdf_cache.cluster.places", "rsmtdf_cache.teachers.timm_any",
     "rsmtdf_cli.cache.build", "rsmtdf_cache.bucket.destination", "s3fs"]
)  # fmt: skip

_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Temper:
    """What befalls a worker. ``step``: of a commit (FORMAT.md), in its ``unit``-th unit.

    ``kill``: it dies there, ``hold``: it waits there for ``Cluster.release`` (both: it waits, then dies). ``path``:
    goes before all else where modules and versions are looked for. ``file_nbytes``: no file of this process grows
    larger. ``environ``: of this process, before torch computes anything. ``hidden``: a folder that is empty for this
    process alone.
    """

    kill: bool = False
    hold: bool = False
    step: int = 1
    unit: int = 1
    nthreads: int = 1
    path: Path | None = None
    file_nbytes: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    hidden: Path | None = None


@dataclass
class Cluster:
    """A scheduler and its workers. ``folder`` holds their marks."""

    folder: Path
    address: str
    scheduler: BaseProcess
    workers: dict[str, BaseProcess] = field(default_factory=dict)

    def add(self, name: str, temper: Temper = Temper()) -> None:
        """Start a worker."""
        process = CONTEXT.Process(target=_work, args=(self.address, name, self.folder, temper))
        process.start()
        self.workers[name] = process

    def held(self, name: str) -> bool:
        """Whether the worker waits at its step."""
        return (self.folder / f"{name}.held").exists()

    def release(self, name: str = "") -> None:
        """Let one go on that is held, or all."""
        (self.folder / (f"{name}.go" if name else "go")).touch()

    def steps(self, step: int) -> dict[str, int]:
        """Return how often each worker did the numbered step."""
        found = {}
        for name in self.workers:
            log = self.folder / f"{name}.steps"
            found[name] = log.read_text().split().count(str(step)) if log.exists() else 0
        return found


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a scheduler on loopback; end it and its workers with the block."""
    folder.mkdir()
    scheduler = CONTEXT.Process(target=_schedule, args=(folder,))
    scheduler.start()
    place = folder / "address"
    until(place.exists)
    here = Cluster(folder, place.read_text(), scheduler)
    try:
        yield here
    finally:
        here.release()
        for process in [*here.workers.values(), scheduler]:
            process.kill()
            process.join()


def until(true: Callable[[], bool], why: Callable[[], str] = lambda: "", seconds: float = _PATIENCE_S) -> None:
    """Wait for something that other processes do. Raises ``TimeoutError``."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(why())
        time.sleep(0.005)


def _schedule(folder: Path) -> None:
    from distributed import Scheduler

    async def run() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
            (folder / "address.part").write_text(scheduler.address)
            (folder / "address.part").rename(folder / "address")
            await scheduler.finished()

    _silent()
    asyncio.run(run())


def _work(address: str, name: str, folder: Path, temper: Temper) -> None:
    import torch
    from distributed import Worker

    from rsmtdf_cache import writer
    from rsmtdf_cache.bucket import steps

    _silent()
    os.environ.update({"OMP_NUM_THREADS": "1"} | dict(temper.environ))
    torch.set_num_threads(1)
    # A folder's commit has steps 1 to 8 in the writer, an object store's 1 and 2 there and 4 and 5 here.
    writer.after_step = steps.after_step = _hook(name, folder, temper)
    if temper.path is not None:
        sys.path.insert(0, str(temper.path))
    if temper.file_nbytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (temper.file_nbytes, resource.RLIM_INFINITY))
    if temper.hidden is not None:
        _hide(temper.hidden)

    async def run() -> None:
        async with Worker(
            address, name=name, nthreads=temper.nthreads, host="127.0.0.1", memory_limit=0, dashboard=False,
            local_directory=str(folder / name),
        ) as worker:  # fmt: skip
            await worker.finished()

    asyncio.run(run())


def _hook(name: str, folder: Path, temper: Temper) -> Callable[[int], None]:
    units = 0

    def after(step: int) -> None:
        nonlocal units
        log = os.open(folder / f"{name}.steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{step}\n".encode())
        os.close(log)
        units += step == 1
        if step != temper.step or units != temper.unit:
            return
        if temper.hold:
            (folder / f"{name}.held").touch()
            until(lambda: (folder / "go").exists() or (folder / f"{name}.go").exists())
        if temper.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    return after


def _hide(folder: Path) -> None:
    """Mount an empty file system over ``folder``, for this process alone."""
    new_mounts = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)


def _silent() -> None:
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)
