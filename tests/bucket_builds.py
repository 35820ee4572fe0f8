"""Builds into an object store in processes of their own, that die or wait after a numbered operation."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.clusters import until
from tests.commands import CONTEXT

__all__ = ["Builder", "asked", "build", "encoded", "environment", "start_build"]

_NAMES = (
    "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED",
    "NO_PROXY",
)  # fmt: skip


@dataclass
class Builder:
    """A build that runs, or has ended: ``said`` is the error that it ended with."""

    process: BaseProcess
    folder: Path
    words: Mapping[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether it waits at its operation."""
        return (self.folder / "held").exists()

    @property
    def said(self) -> str:
        place = self.folder / "said"
        return place.read_text() if place.exists() else ""

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def release(self) -> None:
        """Let it go on."""
        (self.folder / "go").touch()

    def end(self) -> int | None:
        """Wait for it and return its exit code, ``-n`` for signal n."""
        self.process.join(120)
        return self.process.exitcode


def environment(home: Path) -> dict[str, str]:
    """Return what a process of another machine has in its environment to reach the same object store."""
    return {name: os.environ[name] for name in _NAMES} | {"RSMTDF_HOME": str(home)}


def asked(data: Path, out: Path | str, **more: object) -> dict[str, Any]:
    """Return a request: 4 units of two layers for 8 tiles."""
    values = {
        "data": data, "out": out, "teachers": ["mean"], "scales": [1.0], "group_rows": 2, "threads": 1,
        "micro_batch": 2, "device": "cpu",
    }  # fmt: skip
    return {**values, **more}


def build(data: Path, out: Path | str, **more: object) -> Any:
    """Build in this process; return the report."""
    from rsmtdf_cache.build import build_store
    from rsmtdf_cache.request import BuildRequest
    from tests.teachers import load_mean_teacher

    return build_store(BuildRequest.of(asked(data, out, **more)), load_teacher=load_mean_teacher)


def start_build(
    folder: Path, values: Mapping[str, Any], home: Path, step: int, count: int = 1, hold: bool = False,
    lease_s: float = 120.0,
) -> Builder:  # fmt: skip
    """Start a build that dies (``hold``: waits) after the ``count``-th time that it did the numbered operation."""
    folder.mkdir()
    told = (folder, dict(values), environment(home), step, count, hold, lease_s)
    process = CONTEXT.Process(target=_run, args=told)
    process.start()
    return Builder(process, folder)


def encoded(folder: Path) -> int:
    """Return how many units the process has encoded."""
    log = folder / "encoded"
    return log.read_text().count("\n") if log.exists() else 0


def _run(
    folder: Path, values: dict[str, Any], environment: dict[str, str], step: int, count: int, hold: bool, lease_s: float
) -> None:
    import torch

    from rsmtdf_cache import writer
    from rsmtdf_cache.bucket import lease, steps
    from rsmtdf_cache.build import build_store
    from rsmtdf_cache.errors import RsmtdfError
    from rsmtdf_cache.request import BuildRequest
    from tests.teachers import load_mean_teacher

    os.environ.update(environment)
    torch.set_num_threads(1)
    lease.LEASE_S = lease_s
    seen = 0

    def after(number: int) -> None:
        nonlocal seen
        seen += number == step
        if number != step or seen != count:
            return
        if not hold:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "held").touch()
        until((folder / "go").exists)

    def note(number: int) -> None:
        if number == 1:
            with (folder / "encoded").open("a") as log:
                log.write("unit\n")

    writer.after_step, steps.after_step = note, after
    try:
        build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)
    except RsmtdfError as error:
        (folder / "said").write_text(str(error))
        raise SystemExit(error.exit_code) from None
