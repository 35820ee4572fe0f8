"""Three ways to show events: bars on a terminal, lines in a log, warnings only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from rsmtdf_cache.events import Event, EventSink, Progress, ProgressEnd, ProgressStart, Warned
from rsmtdf_cli.console import message

__all__ = ["bars", "lines", "warnings_only"]


class _RateColumn(ProgressColumn):
    """``12.3 tiles/s  4.5 MB/s`` of this run; what was there before does not count."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed or 0.0
        done = task.completed - task.fields["before"]
        return Text(_rates(done, task.fields["nbytes"], seconds, task.fields["unit"]), style="cyan")


def _rates(done: float, nbytes: int, seconds: float, unit: str) -> str:
    if unit == "bytes":  # what travelled; the rest was there
        return f"{_size(nbytes / seconds)}/s" if seconds > 0 and nbytes > 0 else ""
    if unit == "pixels":
        return f"{_megapixels(done / seconds)}/s" if seconds > 0 and done > 0 else ""
    if seconds <= 0 or done <= 0 or unit == "workers":
        return ""
    text = f"{done / seconds:.1f} {unit}/s"
    return f"{text}  {nbytes / seconds / 1e6:.1f} MB/s" if nbytes else text


def _done_of(done: int, start: ProgressStart) -> str:
    if start.unit == "bytes":
        return f"{_size(done)} of {_size(start.total)}"
    if start.unit == "pixels":
        return f"{_megapixels(done)} of {_megapixels(start.total)}"
    return f"{done} of {start.total} {start.unit}"


def _amount(number: int, unit: str) -> str:
    if unit == "pixels":
        return _megapixels(number)
    return _size(number) if unit == "bytes" else f"{number} {unit}"


def _megapixels(pixels: float) -> str:
    return f"{pixels / 1e6:.3g} MP" if pixels < 1e8 else f"{pixels / 1e6:.0f} MP"


def _size(nbytes: float) -> str:
    from rsmtdf_cli.cache.show import size

    return size(nbytes)


class _CountColumn(ProgressColumn):
    """``12/34 tiles``, or ``1.2 MB of 3 GB``."""

    def render(self, task: Task) -> Text:
        done, total, unit = task.completed, task.total or 0, task.fields["unit"]
        if unit == "bytes":
            return Text(f"{_size(done)} of {_size(total)}")
        if unit == "pixels":
            return Text(f"{_megapixels(done)} of {_megapixels(total)}")
        if unit == "workers" and done >= total:  # some may join later
            return Text(f"{int(done)} workers")
        return Text(f"{int(done)}/{int(total)} {unit}")


def warnings_only(event: Event) -> None:
    """Show warnings, drop the rest."""
    if isinstance(event, Warned):
        message(event.text, kind="warning")


@contextmanager
def bars(console: Console) -> Iterator[EventSink]:
    """Yield a sink that draws one bar per task on ``console``: count, rates, time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _CountColumn(),
        _RateColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    ids: dict[str, TaskID] = {}
    nbytes: dict[str, int] = {}
    with Bars(*columns, console=console) as shown:

        def sink(event: Event) -> None:
            if isinstance(event, ProgressStart):
                nbytes[event.task] = 0
                ids[event.task] = shown.add_task(
                    escape(event.label),
                    total=event.total,
                    completed=event.done,
                    before=event.done,
                    unit=event.unit,
                    nbytes=0,
                )
            elif isinstance(event, Progress) and event.task in ids:
                nbytes[event.task] += event.nbytes
                shown.update(ids[event.task], advance=event.advance, nbytes=nbytes[event.task])
            elif isinstance(event, ProgressEnd) and event.task in ids:
                shown.stop_task(ids[event.task])
            elif isinstance(event, Warned):
                shown.console.print(f"[bold yellow]warning:[/] {escape(event.text)}", soft_wrap=True)

        yield sink


#: A task that runs longer says so often, in seconds, how far it is: a log of a batch job is all that people see of it.
LINE_S = 60.0


@dataclass
class _Counted:
    start: ProgressStart
    done: int = 0
    nbytes: int = 0
    since: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)


def lines(every_s: float = LINE_S) -> EventSink:
    """Return a sink that writes one line to stderr when a task starts, one when it ends, and some between.

    Those between come ``every_s`` seconds at most: how far it is, how fast, how long it will take, on how many workers.
    """
    tasks: dict[str, _Counted] = {}
    workers: dict[str, int] = {}  # their task goes on after its end: they come and go

    def sink(event: Event) -> None:
        if isinstance(event, ProgressStart):
            tasks[event.task] = _Counted(event)
            if event.unit == "workers":
                workers[event.task] = event.done
            amount = _amount(event.done, event.unit) if event.unit in ("bytes", "pixels") else event.done
            there = f", {amount} there already" if event.done else ""
            message(f"{event.label}: {_amount(event.total, event.unit)}{there}", kind="start")
        elif isinstance(event, Progress) and event.task in workers:
            workers[event.task] += event.advance
        elif isinstance(event, Progress) and event.task in tasks:
            task = tasks[event.task]
            task.done += event.advance
            task.nbytes += event.nbytes
            now = time.monotonic()
            if now - task.told >= every_s:
                task.told = now
                message(
                    ", ".join([_far(task, now), *(f"{n} worker{'s' * (n != 1)}" for n in workers.values())]), kind="now"
                )
        elif isinstance(event, ProgressEnd) and event.task in tasks:
            task = tasks.pop(event.task)
            seconds = time.monotonic() - task.since
            rates = _rates(task.done, task.nbytes, seconds, task.start.unit)
            total = task.start.done + workers.get(event.task, task.done)
            message(
                f"{task.start.label}: {_done_of(total, task.start)} in {seconds:.1f} s"
                + (f" ({rates})" if rates else ""),
                kind="done",
            )
        else:
            warnings_only(event)

    return sink


def _far(task: _Counted, now: float) -> str:
    """Return ``NAME: 12 of 34 tiles (5.6 tiles/s), 4 s left``."""
    seconds, total = now - task.since, task.start.done + task.done
    rates = _rates(task.done, task.nbytes, seconds, task.start.unit)
    left = f", {_clock((task.start.total - total) * seconds / task.done)} left" if task.done > 0 else ""
    return f"{task.start.label}: {_done_of(total, task.start)}{f' ({rates})' if rates else ''}{left}"


def _clock(seconds: float) -> str:
    from rsmtdf_cli.cache.plan import seconds_text

    return seconds_text(seconds)
