"""What a run tells while it runs: one JSON line per step, TensorBoard scalars, events. One device sync per flush."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from torch import Tensor

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.files import replace_file
from rsmtdf_train.checkpoint import RunFolder
from rsmtdf_train.watch import Watch

__all__ = ["LogWriter", "StepLogged"]

#: Steps whose numbers wait on a GPU for one transfer; on a CPU there is nothing to wait for.
_WAIT = 20


@dataclass(frozen=True)
class StepLogged:
    """The numbers of one step (0-based) of ``steps``, as in ``log.jsonl``."""

    step: int
    steps: int
    values: dict[str, float]


class LogWriter:
    """Appends to ``log.jsonl`` from ``first_step`` on; lines of steps that a resumed run repeats are dropped."""

    def __init__(
        self,
        folder: RunFolder,
        steps: int,
        first_step: int,
        device: torch.device,
        on_event: Callable[[Event | StepLogged], None],
        tensorboard: bool,
        writes: bool = True,
        watch: Watch | None = None,
    ) -> None:
        """``writes`` False: look at the numbers, write nothing, for all processes but the first."""
        self.steps = steps
        self.on_event = on_event
        self._wait = 1 if device.type == "cpu" else _WAIT
        self._device = device
        self._watch = watch
        self._pending: list[tuple[int, dict[str, Tensor | float], dict[str, float]]] = []
        self._file: TextIO | None = None
        self._board: Any = None
        if not writes:
            return
        _truncate(folder.log, first_step)
        self._file = folder.log.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder.tensorboard), purge_step=first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            if self._file is not None:
                self._file.close()
            if self._board is not None:
                self._board.close()

    def add(
        self, step: int, logs: Mapping[str, Tensor | float], seconds: float, waited: float = 0.0, crops: int = 0
    ) -> None:
        """Note the numbers of ``step``; written with the next flush, at once on a CPU.

        ``seconds`` the step took, ``waited`` of them for its batch; ``crops`` of all processes.
        """
        long = max(seconds, 1e-9)
        times = {"seconds": seconds, "data_wait": waited / long, "samples_per_s": crops / long}
        if self._device.type == "cuda":
            times["gpu_memory_mb"] = torch.cuda.max_memory_allocated(self._device) / 1e6
        self._pending.append((step, dict(logs), times))
        if len(self._pending) >= self._wait:
            self.flush()

    def flush(self) -> None:
        """Write what waits. Raises ``UsageError`` when a loss is not finite, after writing the lines up to it."""
        if not self._pending:
            return
        tensors = [v for _, logs, _ in self._pending for v in logs.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack([v.float().reshape(()) for v in tensors]).tolist())  # the one sync
        pending, self._pending = self._pending, []
        for step, logs, times in pending:
            values = {k: next(numbers) if isinstance(v, Tensor) else float(v) for k, v in logs.items()}
            self._write(step, values | times)
        if self._file is not None:
            self._file.flush()

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        if self._file is not None:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if not math.isfinite(value):
                    continue
                self._board.add_scalar(name, value, step)
        self.on_event(StepLogged(step, self.steps, values))
        if self._watch is not None and (sign := self._watch.see(step, values)) is not None:
            self.on_event(Warned(sign))
        wrong = [k for k, v in values.items() if k.startswith("loss") and not math.isfinite(v)]
        if wrong:
            if self._file is not None:
                self._file.flush()
            raise UsageError(
                f"step {step}: {', '.join(wrong)} is not a finite number; the last checkpoint is kept. Lower optim.lr "
                f"(now {values['lr']:.3g}), set optim.clip_norm=1 or precision=float32; if loss_distill is the one, "
                "run `rsmtdf cache verify` on the store"
            )


def _truncate(path: Path, first_step: int) -> None:
    """Keep the whole lines of steps before ``first_step``."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break  # the line that a kill cut off
        if step >= first_step:
            break
        kept.append(line + "\n")
    replace_file(path, "".join(kept).encode())
