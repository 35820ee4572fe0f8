"""``rsmtdf`` in processes of its own, for tests of signals and of several processes.

A fork server imports the trainer once; each command is a fork of it, and costs nothing before its first line.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["CONTEXT", "Command", "PRELOAD", "note_draws", "start", "start_ranks", "torchrun"]

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = (
    "rsmtdf_cli.app",
    "rsmtdf_cli.train",
    "rsmtdf_train.loop",
    "rsmtdf_train.targets.modes",
    "rsmtdf_train.probe",
    "rsmtdf_train.run_store",
    "rsmtdf_train.students.timm_encoder",
    "torch.distributed.launcher.api",
    "torchmetrics.functional.classification",
)
CONTEXT.set_forkserver_preload(list(PRELOAD))

_PATIENCE_S = 240.0


@dataclass(frozen=True)
class Command:
    """A running command. Its streams go to files."""

    process: BaseProcess
    stdout: Path
    stderr: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def runs(self) -> bool:
        return self.process.is_alive()

    def end(self) -> int:
        """Wait for the command and return its exit code, ``-n`` for signal n."""
        self.process.join(_PATIENCE_S)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"did not end; stderr:\n{self.stderr.read_text()}")
        return self.process.exitcode


def start(words: Sequence[object], folder: Path, name: str, environment: Mapping[str, str] = {}) -> Command:
    """Start ``rsmtdf WORDS`` with one torch thread; its streams go to ``folder/NAME.out`` and ``.err``."""
    whole = {"RSMTDF_HOME": os.environ["RSMTDF_HOME"], **environment}
    streams = folder / f"{name}.out", folder / f"{name}.err"
    process = CONTEXT.Process(target=_run, args=([str(w) for w in words], streams, whole))
    process.start()
    return Command(process, *streams)


def start_ranks(
    words: Sequence[object], folder: Path, count: int, environment: Mapping[str, str] = {}
) -> list[Command]:
    """Start ``rsmtdf WORDS`` as ``count`` processes of one run, with what ``torchrun`` tells each of its workers.

    ``environment`` may have ``NOTED_DRAWS``, a file for ``note_draws``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    return [
        start(words, folder, f"rank{rank}", {**place, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def note_draws(file: Path, rank: int, count: int) -> None:
    """Let every batch that a loader of this process makes be noted in ``file``: a line of JSON for each part."""
    from rsmtdf_train.loader import BatchLoader

    made = BatchLoader._made

    def noted(self: BatchLoader, drawn: Any) -> Any:
        crops = [[[d.epoch, d.tile_id, d.orientation] for d in some] for some in (drawn.labeled, drawn.unlabeled)]
        line = json.dumps({"rank": rank, "count": count, "step": drawn.step, "crops": crops})
        with file.open("a") as out:
            out.write(line + "\n")
        return made(self, drawn)

    BatchLoader._made = noted  # type: ignore[method-assign]


def torchrun(words: Sequence[object], folder: Path, count: int) -> list[tuple[str, str]]:
    """Run ``torchrun --standalone --nproc-per-node COUNT rsmtdf WORDS``; return stdout and stderr of each process.

    It is torchrun's own agent, here, with workers from the fork server. Raises its ``ChildFailedError``.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=folder.name, max_restarts=0,
        monitor_interval=0.1, start_method="forkserver",
    )  # fmt: skip
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        elastic_launch(config, _work)([str(w) for w in words], folder, {"RSMTDF_HOME": os.environ["RSMTDF_HOME"]})
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return [
        ((folder / f"worker{rank}.out").read_text(), (folder / f"worker{rank}.err").read_text())
        for rank in range(count)
    ]


def _work(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run in a worker: as ``_run``, but a worker that ends well returns."""
    rank = os.environ["RANK"]
    try:
        _run(words, (folder / f"worker{rank}.out", folder / f"worker{rank}.err"), environment)
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout.flush()


def _run(words: list[str], streams: tuple[Path, Path], environment: dict[str, str]) -> None:
    """Run in the process of a command: ``rsmtdf WORDS`` as a shell would start it."""
    import torch

    from rsmtdf_cli.app import main

    os.environ.update(environment)
    torch.set_num_threads(1)
    if noted := environment.get("NOTED_DRAWS"):
        note_draws(Path(noted), int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["rsmtdf", *words]
    main()
