"""Where a user wants units to be computed, as one validated value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rsmtdf_cache.cluster.performance import NO_BOKEH, require_place
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.work import Executor, InProcess

__all__ = ["ClusterAsked", "executor_of", "gpu_ids"]

#: A worker that shows no sign of life for so long is given up: longer than loading the largest teacher takes.
PATIENCE_S = 1800.0


@dataclass(frozen=True)
class ClusterAsked:
    """``workers``: processes of this machine. ``gpus``: one process for each, ``all`` or ids as ``0,1``.

    ``scheduler``: address of a running dask.distributed scheduler. None of them: in process. ``patience_s``: a worker
    that shows no sign of life for so long gets no more work. ``report``: a file for dask's performance report.
    """

    workers: int | None = None
    gpus: str | None = None
    scheduler: str | None = None
    dashboard: bool = False
    patience_s: float = PATIENCE_S
    report: Path | None = None

    def check(self) -> None:
        """Raise ``UsageError`` for options that contradict each other, or that this installation cannot serve."""
        asked = [
            f"--{n}" for n, v in (("scheduler", self.scheduler), ("gpus", self.gpus), ("workers", self.workers))
            if v is not None
        ]  # fmt: skip
        if len(asked) > 1:
            reason = "--gpus decides how many" if self.scheduler is None else "a running cluster has its own workers"
            raise UsageError(f"{' and '.join(asked)}: {reason}; leave one out")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least 1; leave it out to build in this process")
        if self.patience_s <= 0:
            raise UsageError(f"--patience {self.patience_s:g}: seconds, more than 0")
        if self.dashboard and not (self.workers or self.gpus):
            raise UsageError("--dashboard: goes with --workers or --gpus; a running scheduler has its own")
        if asked and find_spec("distributed") is None:
            raise UsageError(f"{asked[0]}: needs dask.distributed; run: pip install 'rsmtdf[cluster]'")
        if self.report is not None:
            if not asked:
                raise UsageError("--performance-report: goes with --workers, --gpus or --scheduler")
            require_place(self.report)
        drawn = "--dashboard" if self.dashboard else "--performance-report" if self.report is not None else None
        if drawn and self.scheduler is None and find_spec("bokeh") is None:
            raise UsageError(f"{drawn}: {NO_BOKEH}")


def executor_of(asked: ClusterAsked, device: str | None = None) -> Executor:
    """Return what computes units where ``asked`` says. ``device``: of the build. Raises ``UsageError``."""
    asked.check()
    if asked.scheduler is not None:
        from rsmtdf_cache.cluster.places import RunningCluster

        return RunningCluster(asked.scheduler, asked.patience_s, asked.report)
    if asked.gpus is None and asked.workers is None:
        return InProcess()
    from rsmtdf_cache.cluster.places import OwnProcesses

    if asked.gpus is None:
        return OwnProcesses([{}] * (asked.workers or 1), asked.patience_s, asked.dashboard, asked.report)
    if device not in (None, "cuda"):
        raise UsageError(f"--gpus {asked.gpus} --device {device}: each process has one GPU, which it calls cuda")
    ids = gpu_ids(asked.gpus, os.environ, _gpu_count())
    environments = [{"CUDA_VISIBLE_DEVICES": one} for one in ids]
    return OwnProcesses(environments, asked.patience_s, asked.dashboard, asked.report)


def gpu_ids(text: str, environ: Mapping[str, str], count: int) -> list[str]:
    """Return what ``CUDA_VISIBLE_DEVICES`` is for each process of ``--gpus TEXT``. ``count``: GPUs that torch sees.

    ``all`` keeps to the GPUs that the environment leaves visible, as batch systems say it; they have the names that it
    gives them, else numbers. Raises ``UsageError`` for a GPU that is not there: its process would build on the CPU.
    """
    visible = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    there = (visible or [str(i) for i in range(count)])[:count]
    asked = there if text == "all" else [part.strip() for part in text.split(",")]
    if not there:
        raise UsageError(f"--gpus {text}: torch sees no GPU here; use --workers N for processes on the CPU")
    if not all(asked) or len(set(asked)) != len(asked):
        raise UsageError(f"--gpus {text}: write all, or ids with commas between, each once, e.g. {','.join(there)}")
    missing = [one for one in asked if one not in there]
    if missing:
        limit = f" (CUDA_VISIBLE_DEVICES={','.join(visible)})" if visible else ""
        raise UsageError(f"--gpus {text}: there is no GPU {', '.join(missing)}; torch sees {', '.join(there)}{limit}")
    return asked


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
