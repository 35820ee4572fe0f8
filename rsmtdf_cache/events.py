"""What a long operation tells its caller. Libraries emit events, shells print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["EventSink", "Progress", "ProgressEnd", "ProgressStart", "Warned", "ignore_events"]


@dataclass(frozen=True)
class ProgressStart:
    """A counted task begins. ``task`` names it uniquely; ``done`` of ``total`` are there already."""

    task: str
    label: str
    total: int
    done: int = 0
    unit: str = "tiles"


@dataclass(frozen=True)
class Progress:
    """``advance`` more units are done; ``nbytes`` were written for them."""

    task: str
    advance: int
    nbytes: int = 0


@dataclass(frozen=True)
class ProgressEnd:
    """The task is over."""

    task: str


@dataclass(frozen=True)
class Warned:
    """Something a person should read; the operation goes on."""

    text: str


Event = ProgressStart | Progress | ProgressEnd | Warned
EventSink = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """Drop ``event``: the default sink."""
