"""What a log and a terminal show of a long task, and of the workers it runs on."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rsmtdf_cache.events import Event, Progress, ProgressEnd, ProgressStart
from rsmtdf_cli.progress import bars, lines

COMING: list[Event] = [
    ProgressStart("workers", "cluster", 2, unit="workers"),
    Progress("workers", 1),
    Progress("workers", 1),
]
TILES: list[Event] = [ProgressStart("vit", "vit", 40, 10), Progress("vit", 6, 600), Progress("vit", 0)]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_says_how_far_a_long_task_is_and_on_how_many_workers(capsys: pytest.CaptureFixture[str]) -> None:
    sink = lines(every_s=0)
    for event in [*COMING, ProgressEnd("workers"), *TILES]:
        sink(event)
    start, ready, begin, first, _ = said(capsys)
    assert (start, begin) == ("start: cluster: 2 workers", "start: vit: 40 tiles, 10 there already")
    assert re.fullmatch(r"done: cluster: 2 of 2 workers in \d+\.\d s", ready)
    form = r"now: vit: 16 of 40 tiles \([\d.]+ tiles/s  [\d.]+ MB/s\), .+ left, 2 workers"
    assert re.fullmatch(form, first)
    sink(Progress("workers", -1))  # one is lost, after all had come
    sink(Progress("vit", -3, -300))  # and with it what it had done
    [line] = said(capsys)
    assert line.startswith("now: vit: 13 of 40 tiles") and line.endswith(", 1 worker")


def test_a_log_of_a_short_task_has_a_line_at_start_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    sink = lines()
    for event in [*TILES, ProgressEnd("vit")]:
        sink(event)
    assert [line.split(":")[0] for line in said(capsys)] == ["start", "done"]


def test_a_terminal_shows_how_many_workers_there_are_without_a_rate() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with bars(screen) as sink:
        for event in [*COMING, ProgressEnd("workers"), Progress("workers", 1)]:
            sink(event)
    assert isinstance(screen.file, io.StringIO)
    last = [line for line in screen.file.getvalue().splitlines() if "cluster" in line][-1]
    assert "3 workers" in last and "workers/s" not in last
