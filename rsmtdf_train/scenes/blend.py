"""From windows to finished rows of probabilities: the forward pass, and a buffer one window high that adds them up.

Probabilities are blended, not logits: those of two windows have no common scale, and turned windows (``tta``) are
averaged in the same way. Windows are added in a fixed order, so a pixel has the same bits however the work was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a map by an exported file needs no torch
    import torch
    from torch import Tensor

    from rsmtdf_train.fused_student import FusedStudent

__all__ = ["BandBuffer", "window_probabilities", "windows_at_once"]

#: Rows that leave the buffer at once: what is made of them is small.
_ROWS = 64
#: Pixels of a batch of windows: what keeps a GPU busy, and what stays in the caches of a CPU.
_BATCH_PIXELS = {"cuda": 2**22, "cpu": 2**18}


def windows_at_once(device: torch.device | None, window_px: int) -> int:
    """Return how many windows a forward pass sees; ``device`` None: on the CPU."""
    kind = "cpu" if device is None else device.type
    return max(1, _BATCH_PIXELS.get(kind, 2**20) // window_px**2)


def window_probabilities(
    model: FusedStudent, windows: Sequence[NDArray[np.uint8]], device: torch.device, *, count: int, tta: bool
) -> NDArray[np.float32]:
    """Return ``[windows, C, H, W]`` probabilities of uint8 RGB windows ``[3, H, W]``.

    The batch is filled up to ``count`` by its last window, so that all batches have one shape. ``tta``: the mean over
    the window's eight mirrorings and rotations.
    """
    import torch

    filled = [*windows, *([windows[-1]] * (count - len(windows)))]
    with torch.inference_mode():
        images = torch.from_numpy(np.stack(filled)).to(device).float().div_(255)
        total: Tensor | None = None
        for turns in range(4 if tta else 1):
            for mirrored in (False, True) if tta else (False,):
                seen = torch.rot90(images, turns, (2, 3))
                seen = seen.flip(3) if mirrored else seen
                made = model.predict(seen.contiguous()).float().softmax(dim=1)
                made = made.flip(3) if mirrored else made
                made = torch.rot90(made, -turns, (2, 3))
                total = made if total is None else total + made
        assert total is not None
        mean = total / 8 if tta else total
        probabilities: NDArray[np.float32] = mean[: len(windows)].cpu().numpy()
    return probabilities


class BandBuffer:
    """Sums of weighted probabilities, ``[C, side, width]`` float32: the rows that are not finished.

    It has the height of a window, whatever the height of the scene. Row 0 is row ``y0`` of the scene, column 0 its
    column ``x0``.
    """

    def __init__(self, classes: int, side: int, x0: int, width: int) -> None:
        self._sums = np.zeros((classes, side, width), np.float32)
        self._x0, self._y0 = x0, 0

    def begin(self, y0: int) -> None:
        """Start at row ``y0`` of the scene: of the first row of windows."""
        self._y0 = y0

    def add(
        self, x: int, window_CHW: NDArray[np.float32], rows: NDArray[np.float32], columns: NDArray[np.float32]
    ) -> None:
        """Add a window whose first column is column ``x`` of the scene; ``rows`` and ``columns`` are its weights."""
        first = max(self._x0 - x, 0)
        stop = min(len(columns), self._x0 + self._sums.shape[2] - x)
        here = slice(x + first - self._x0, x + stop - self._x0)
        weights = rows[:, None] * columns[None, first:stop]
        self._sums[:, :, here] += weights * window_CHW[:, :, first:stop]

    def finished(self, next_y: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield ``(y, [C, n, width])`` for the rows before ``next_y``, views of a few rows each; then move on to it."""
        side = self._sums.shape[1]
        count = min(next_y - self._y0, side)
        for row in range(0, count, _ROWS):
            yield self._y0 + row, self._sums[:, row : min(row + _ROWS, count)]
        for sums in self._sums:  # class by class: a copy of one at most
            sums[: side - count] = sums[count:]
            sums[side - count :] = 0
        self._y0 += count
