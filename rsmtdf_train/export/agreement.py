"""Does the file say what the student says? Both are asked the same images, of sizes that the exporter did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_train.export.runtime import run_session, session_of
from rsmtdf_train.fused_student import FusedStudent

__all__ = ["Comparison", "TOLERANCE", "compare", "sizes_to_compare"]

#: The largest difference of a probability that passes.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """``batch`` images of ``height`` x ``width`` px: the largest ``difference`` of a probability."""

    batch: int
    height: int
    width: int
    difference: float


def sizes_to_compare(
    window_px: int, multiple_px: int, least_px: int, fixed_px: int | None
) -> list[tuple[int, int, int]]:
    """Return ``(batch, height, width)``, the training crop first.

    Among them are grids of even and odd numbers of tokens on either side, smaller and larger ones than the crop, tall
    and wide ones, sides that are multiples of the stride and sides that are not, several images at once.
    """
    if fixed_px is not None:
        return [(1, fixed_px, fixed_px), (3, fixed_px, fixed_px)]
    c, m = window_px, multiple_px
    wanted = [
        (1, c, c),
        (1, c + m, c),
        (2, c - m, c + 2 * m),
        (3, c - m // 2 - 1, c + m // 3 + 1),
        (1, 2 * c + 1, c + m - 1),
    ]
    return [(batch, max(height, least_px), max(width, least_px)) for batch, height, width in wanted]


def compare(
    data: bytes,
    model: FusedStudent,
    sizes: Sequence[tuple[int, int, int]],
    fixed: bool,
    on_event: EventSink = ignore_events,
) -> list[Comparison]:
    """Return the differences between ONNX Runtime on the CPU and ``model`` on random images of ``sizes``.

    Raises ``UsageError`` for a file that does not run at one of them, ``MismatchError`` for one that gives something
    else than the student by more than ``TOLERANCE``.
    """
    way_out = "" if fixed else "; --fixed PX writes a file for images of one size"
    try:
        session = session_of(data, threads=torch.get_num_threads())
    except Exception as error:  # of ONNX Runtime's own kinds
        raise UsageError(f"ONNX Runtime cannot load this student ({_first_line(error)}){way_out}") from None
    made = torch.Generator().manual_seed(0)
    found = []
    on_event(ProgressStart("compare", "compare with the student", len(sizes), unit="sizes"))
    for batch, height, width in sizes:
        image = torch.rand(batch, 3, height, width, generator=made)
        with torch.inference_mode():
            expected = model.predict(image).softmax(dim=1).numpy()
        at = f"at {batch} x {height} x {width} px"
        try:
            given = run_session(session, image.numpy())
        except Exception as error:  # of ONNX Runtime's own kinds
            raise UsageError(f"ONNX Runtime cannot run this student {at} ({_first_line(error)}){way_out}") from None
        if given.shape != expected.shape:
            raise MismatchError(f"the ONNX file gives {given.shape} {at}, the student {expected.shape}{way_out}")
        difference = float(np.abs(given - expected).max())
        if not difference <= TOLERANCE:  # not a number is no agreement
            raise MismatchError(
                f"the ONNX file differs from the student {at}: by {difference:.2g}, {TOLERANCE:g} at most is exact "
                f"enough; nothing was written{way_out}"
            )
        found.append(Comparison(batch, height, width, difference))
        on_event(Progress("compare", 1))
    on_event(ProgressEnd("compare"))
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]
