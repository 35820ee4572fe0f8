"""What ``train`` shows while it runs, a live table of losses; and one command as several processes."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from rsmtdf_cache.errors import Interrupted, RsmtdfError, UsageError
from rsmtdf_cli.console import console, message, progress

if TYPE_CHECKING:
    from rich.table import Table

    from rsmtdf_cache.events import Event
    from rsmtdf_train.logs import StepLogged
    from rsmtdf_train.recipe import Recipe

__all__ = ["one_voice", "run_on_devices", "training_progress"]

#: Smoothing of the numbers that are shown; the log holds them as they are.
_MEMORY = 0.9

_SHOWN = ("loss", "loss_labeled", "loss_unlabeled", "loss_distill", "mask_ratio", "lr")


def run_on_devices(name: str, words: Sequence[str], recipe: Recipe, devices: str, device: str | None) -> bool:
    """Run the command ``name`` with its ``words`` as one process for each of ``devices``; return False for one alone.

    In those processes themselves, too. Ends with the exit code of the run unless that is 0. Raises ``UsageError`` for
    devices that are not there, and for more than share a batch of ``recipe``, before any process is started.
    """
    from rsmtdf_train.launcher import is_launched, launch, place_of
    from rsmtdf_train.shares import check_shares

    if is_launched():
        return False
    if "WORLD_SIZE" in os.environ:
        raise UsageError(f"--devices {devices}: torchrun has started the processes already; leave --devices out")
    place = place_of(devices, device, os.environ, 0 if device == "cpu" else _gpus())
    if place.count == 1:
        return False
    check_shares(recipe.batch, place.count * recipe.batch.accumulate, labeled_only=recipe.method == "supervised")
    here = {"", os.getcwd()} & set(sys.path)  # else the working folder is no place for modules there either
    ended = launch([sys.executable, *([] if here else ["-P"]), "-m", "rsmtdf_cli", name, *words], place)
    for text in ended.said:
        typer.echo(text, err=True)
    if ended.code:
        raise SystemExit(ended.code)
    return True


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextmanager
def one_voice() -> Iterator[bool]:
    """Yield whether this process speaks: of several that were started together the first one does.

    Another one ends silently where all of them stop, and says which one it is where an error may be its own alone. One
    that ends because another one did leaves it to ``launch`` to say so, where that has started them.
    """
    from rsmtdf_train.launcher import PEER_GONE, PeerGone, is_launched

    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    speaks = not (rank.isdecimal() and count.isdecimal()) or int(rank) == 0
    try:
        yield speaks
    except Interrupted as error:
        if speaks:
            raise
        raise SystemExit(error.exit_code) from None
    except RsmtdfError as error:
        if isinstance(error, PeerGone) and is_launched():
            if not speaks:  # the launcher reads it when nobody else knows what happened
                sys.stderr.write(f"{error}\n")
            raise SystemExit(PEER_GONE) from None
        if not speaks:
            error.args = (f"process {rank} (of 0 to {int(count) - 1}): {error}",)
        raise


@contextmanager
def training_progress(quiet: bool) -> Iterator[Callable[[Event | StepLogged], None]]:
    """Yield a sink for ``loop.train``: a live table on a terminal, ten lines elsewhere, nothing when quiet."""
    from rsmtdf_train.logs import StepLogged

    view = _LiveLosses(quiet)
    with progress(quiet) as others:

        def sink(event: Event | StepLogged) -> None:
            if isinstance(event, StepLogged):
                view.step(event)
            else:
                view.stop()  # evaluation begins, with a bar of its own
                others(event)

        try:
            yield sink
        finally:
            view.stop()


class _LiveLosses:
    """Smoothed losses and the time left."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = console(stderr=True).is_terminal
        self.live: Any = None
        self.smooth: dict[str, float] = {}
        self.first: tuple[float, int] | None = None

    def step(self, event: StepLogged) -> None:
        """Show ``event``."""
        if self.quiet:
            return
        for name, value in event.values.items():
            before = self.smooth.get(name, math.nan)
            known = math.isfinite(before) and math.isfinite(value)
            self.smooth[name] = _MEMORY * before + (1 - _MEMORY) * value if known else value
        self.smooth["lr"] = event.values["lr"]
        if self.first is None:
            self.first = (time.monotonic() - event.values["seconds"], event.step)
        if self.terminal:
            if self.live is None:
                from rich.live import Live

                self.live = Live(console=console(stderr=True), refresh_per_second=4)
                self.live.start()
            self.live.update(self._table(event))
        elif (event.step + 1) % max(1, event.steps // 10) == 0 or event.step + 1 == event.steps:
            numbers = "  ".join(f"{k} {self.smooth[k]:.4g}" for k in _SHOWN if k in self.smooth)
            message(f"step {event.step + 1}/{event.steps}  {numbers}  {self._left(event)}", kind="train")

    def stop(self) -> None:
        """Leave the last table on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _left(self, event: StepLogged) -> str:
        if self.first is None:
            return ""
        since, first = self.first
        pace = (time.monotonic() - since) / (event.step + 1 - first)
        seconds = round(pace * (event.steps - event.step - 1))
        return f"{pace:.3f} s/step, {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def _table(self, event: StepLogged) -> Table:
        from rich.table import Table

        table = Table(title=f"step {event.step + 1} of {event.steps}   {self._left(event)}", title_justify="left")
        table.add_column("term")
        table.add_column("now", justify="right")
        table.add_column("smoothed", justify="right")
        for name, value in event.values.items():
            if name != "seconds":
                table.add_row(name, f"{value:.4g}", f"{self.smooth[name]:.4g}")
        return table
