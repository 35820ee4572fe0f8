"""The contract of target modes: what a dataset asks of them, and what a target is.

A *target* is a feature map without its orientation: its key is ``teacher/s{size}/layer`` (for example
``dinov2_vits14/s448/block11``), and the orientation of each sample picks the stored array (``fixed.py``: its view).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.allocate import Allocator, page_empty
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.views import Box

if TYPE_CHECKING:
    from rsmtdf_train.targets.live import LiveTeachers

__all__ = ["TargetMode", "TargetRequest", "TargetSpec", "match_keys", "silence_constant"]


@dataclass(frozen=True)
class TargetSpec:
    """One target. ``stride_px`` and ``offset_px`` are pixels of the student's crop, in its frame: token 0 is centred at
    ``offset_px``. ``mean`` and ``std`` (``[D]`` float32) are those of the store; ``std`` is infinite for a channel that
    never changes, so that it standardises to 0. ``decoder`` makes standardised features of what ``TargetMode.read``
    returns. Without standardising, ``mean`` is 0 and ``std`` 1.
    """

    key: str
    channels: int
    stride_px: float
    offset_px: float
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    decoder: DeviceDecoder


class TargetRequest(NamedTuple):
    """The targets of one crop: a row of the store, an orientation and a box in its frame; or one of its fixed views."""

    row: int
    orientation: int
    box: Box
    view: int | None = None


class TargetMode(ABC):
    """What the dataset asks for targets. A mode that computes them from the batch's images reads nothing here."""

    #: Targets by key, in a fixed order; the model builds one translator for each.
    specs: Mapping[str, TargetSpec]

    #: Orientations whose targets are turned maps of others, by key: approximations that the recipe asked for.
    approximated: Mapping[str, tuple[int, ...]] = {}

    #: Teachers that the step itself asks, in online and mixed modes; see ``is_online``.
    live: LiveTeachers | None = None

    @property
    def remote(self) -> bool:
        """Whether what is read may have to be fetched from another machine first."""
        return False

    def is_online(self, step: int) -> bool:
        """Return whether ``live`` makes the targets of ``step``; then nothing is read for it."""
        return False

    @abstractmethod
    def row_of(self, tile_id: str) -> int:
        """Return the row of a tile. Raises ``KeyError``."""

    @abstractmethod
    def check_tiles(self, tile_ids: Iterable[str], data: Path) -> None:
        """Raise ``MismatchError`` unless every tile has targets. ``data`` is the dataset, for the message."""

    @abstractmethod
    def check_pixels(self, tile_id: str, image: NDArray[np.uint8]) -> None:
        """Raise ``MismatchError`` when the targets were made from other pixels than ``image``."""

    @abstractmethod
    def read(self, requests: Sequence[TargetRequest], empty: Allocator = page_empty) -> dict[str, Codes]:
        """Return ``{key: codes [n, h, w]}`` of the requests, in their order; NaN in tokens that are not valid.

        ``empty`` makes the arrays that are returned. Nothing for a mode, or of no requests, that has nothing to read.
        """

    def will_read(self, requests: Sequence[TargetRequest]) -> None:
        """Hear that ``requests`` are read soon. A mode that reads from a disk lets the system fetch them meanwhile."""
        return

    def left_memory(self) -> None:
        """Hear that what was read before had to be read from the disk again: more is stored than memory holds."""
        return


def match_keys(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return those of ``known`` that match any glob pattern (all when there is none), in the order of ``known``.

    Raises ``UsageError`` for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in known):
            raise UsageError(
                f"distill.keys {pattern!r} matches no features of the store.{did_you_mean(pattern, known)} "
                f"Stored: {', '.join(known) or 'none'}"
            )
    return [key for key in known if not patterns or any(fnmatchcase(key, p) for p in patterns)]


def silence_constant(mean_D: NDArray[np.float32], std_D: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``std`` with infinity for a channel that never changes: it becomes 0 instead of amplified rounding."""
    return np.where(std_D > 1e-6 * np.maximum(1, np.abs(mean_D)), std_D, np.float32(np.inf))
