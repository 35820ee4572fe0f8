"""Every error a user can cause, and the exit code the command line ends with.

::

    RsmtdfError            1  a bug, when it reaches the user as such
    ├── UsageError         2  usage or recipe
    ├── DataError          3  bad input data (the whole dataset is at fault)
    │   └── TileError      3  one tile is at fault: quarantined unless ``--strict``
    ├── MismatchError      4  the store and the request do not match
    ├── Interrupted        5  SIGINT or SIGTERM; the state on disk can be resumed
    ├── ResourceError      6  disk, network, missing weights
    └── FindingsError      7  ``verify`` found damage

A message says what was asked, what was found and what to do, in that order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "FindingsError",
    "Interrupted",
    "MismatchError",
    "ResourceError",
    "RsmtdfError",
    "TileError",
    "UsageError",
    "did_you_mean",
]


class RsmtdfError(Exception):
    """Root of the tree: a clear sentence for the user and an exit code."""

    exit_code = 1


class UsageError(RsmtdfError):
    """The command or the recipe cannot be carried out as written."""

    exit_code = 2


class DataError(RsmtdfError):
    """The dataset as a whole is at fault; nothing was written."""

    exit_code = 3


class TileError(DataError):
    """One tile cannot be used. A build quarantines it and goes on."""

    def __init__(self, tile_id: str, reason: str) -> None:
        super().__init__(f"tile {tile_id!r}: {reason}")
        self.tile_id = tile_id
        self.reason = reason

    def __reduce__(self) -> tuple[type[TileError], tuple[str, str]]:
        return (TileError, (self.tile_id, self.reason))


class MismatchError(RsmtdfError):
    """A store, run or checkpoint holds something else than what was asked for."""

    exit_code = 4


class Interrupted(RsmtdfError):
    """Stopped by a signal; running the same command again continues."""

    exit_code = 5


class ResourceError(RsmtdfError):
    """A disk, a network or a weights file is missing, full or out of reach."""

    exit_code = 6


class FindingsError(RsmtdfError):
    """``verify`` found at least one fault."""

    exit_code = 7


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"``, or an empty string when nothing known is close to ``word``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
