"""Photometry of the strong view, for a whole batch at once, on the device of its images.

Parameters are drawn apart from being applied, so that they are values: a function of seed and position
(``sampler.py``), the same in every arm of an experiment. The formulas are those of torchvision's ``adjust_*`` and
``gaussian_blur`` (a test compares them image by image); torchvision takes one factor for all images, these one each.

Shape legend: B batch, N rows (of a batch) that a change touches, H W crop in pixels, K taps of a blur.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rsmtdf_train.sections import AugmentConfig

__all__ = [
    "NO_PHOTOMETRY",
    "PhotometricParameters",
    "Photometry",
    "draw_photometric",
]

_SIGMA_PX = (0.1, 2.0)

#: Grey of a colour, as torchvision weighs it.
_GREY = (0.2989, 0.587, 0.114)

#: Operations beside those that ``PhotometricParameters.order`` numbers; see ``_CHANGES``.
_HUE, _GRAY, _BLUR = 3, 4, 5


@dataclass(frozen=True)
class PhotometricParameters:
    """One strong view. Factors of 1, a hue shift of 0, no grey and a blur of 0 px leave the image as it is."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # in turns of the colour circle, -0.5..0.5
    order: tuple[int, int, int, int] = (0, 1, 2, 3)  # brightness, contrast, saturation, hue
    gray: bool = False
    blur_sigma_px: float = 0.0


NO_PHOTOMETRY = PhotometricParameters()


def draw_photometric(rng: np.random.Generator, config: AugmentConfig) -> PhotometricParameters:
    """Return the parameters of one strong view, drawn from ``rng``.

    Colour jitter with factors ``1 ± jitter`` and hue ``± jitter / 2`` in a drawn order, grey, Gaussian blur with sigma
    0.1 to 2 px: the strong view of FixMatch for segmentation (RS-MTDF, augmentation). The number of draws does not
    depend on ``config``, so two recipes that differ in one probability share all other draws.
    """
    jitter_u, gray_u, blur_u, sigma_u = rng.random(4)
    brightness, contrast, saturation, hue = rng.uniform(-1.0, 1.0, 4) * config.jitter
    a, b, c, d = (int(k) for k in rng.permutation(4))
    jittered = jitter_u < config.jitter_p and config.jitter > 0
    return PhotometricParameters(
        brightness=float(1 + brightness) if jittered else 1.0,
        contrast=float(1 + contrast) if jittered else 1.0,
        saturation=float(1 + saturation) if jittered else 1.0,
        hue=float(hue / 2) if jittered else 0.0,
        order=(a, b, c, d),
        gray=bool(gray_u < config.gray_p),
        blur_sigma_px=float(_SIGMA_PX[0] + sigma_u * (_SIGMA_PX[1] - _SIGMA_PX[0])) if blur_u < config.blur_p else 0.0,
    )


@dataclass(frozen=True)
class _Entry:
    """A change of an image. ``slot``: when it comes; ``amount``: factor, turns or sigma; ``reach``: taps each way."""

    slot: int
    operation: int
    row: int
    amount: float = 0.0
    reach: int = 0


class Photometry:
    """The parameters of a batch: one entry per change of an image, as tensors. A batch is changed by few kernels.

    Which rows an operation touches is known on the host, so a GPU is never asked for a value and nothing waits.
    """

    def __init__(self, parameters: Sequence[PhotometricParameters]) -> None:
        self.parameters = tuple(parameters)
        self._entries = sorted(
            (entry for row, one in enumerate(self.parameters) for entry in _entries(row, one)),
            key=lambda entry: (entry.slot, entry.operation, entry.row),
        )
        self._rows = torch.tensor([entry.row for entry in self._entries], dtype=torch.int64)
        self._amounts = torch.tensor([(entry.amount, entry.reach) for entry in self._entries]).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.parameters)

    def to(self, device: torch.device | str) -> Photometry:
        """Return the same parameters with their tensors on ``device``."""
        moved = copy(self)
        moved._rows = self._rows.to(device, non_blocking=True)
        moved._amounts = self._amounts.to(device, non_blocking=True)
        return moved

    def apply(self, image_B3HW: Tensor, together: bool | None = None) -> Tensor:
        """Return the strong views of ``image_B3HW`` (float32 in 0..1): a new, contiguous tensor. No pixel moves.

        Each row depends on its own image and parameters alone. ``together``: all rows that share an operation at once,
        as an accelerator likes it; not: one row after the other, which a processor's cache likes (half the time at 512
        px). Default: by the device of the images, where the parameters must be too. The values are the same up to
        rounding. Raises ``ValueError`` when there are not as many images as parameters.
        """
        if len(image_B3HW) != len(self):
            raise ValueError(f"{len(image_B3HW)} images and parameters of {len(self)}")
        strong_B3HW = image_B3HW.clone(memory_format=torch.contiguous_format)
        if together is None:
            together = image_B3HW.device.type != "cpu"
        for start, stop in self._groups() if together else self._singles():
            first, amounts = self._entries[start], self._amounts[start:stop, :, None, None, None]
            change = _CHANGES[first.operation]
            reach = max(entry.reach for entry in self._entries[start:stop])
            if stop - start == 1:
                change(strong_B3HW[first.row : first.row + 1], amounts, reach)
            else:
                rows = self._rows[start:stop]
                part_N3HW = strong_B3HW.index_select(0, rows)
                change(part_N3HW, amounts, reach)
                strong_B3HW.index_copy_(0, rows, part_N3HW)
        return strong_B3HW

    def _groups(self) -> Iterator[tuple[int, int]]:
        start = 0
        for _, group in groupby(self._entries, key=lambda entry: (entry.slot, entry.operation)):
            stop = start + len(list(group))
            yield start, stop
            start = stop

    def _singles(self) -> Iterator[tuple[int, int]]:
        for place in sorted(range(len(self._entries)), key=lambda place: self._entries[place].row):
            yield place, place + 1


def _entries(row: int, parameters: PhotometricParameters) -> Iterator[_Entry]:
    amounts = (parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue)
    for slot, operation in enumerate(parameters.order):
        if amounts[operation] != (0 if operation == _HUE else 1):
            yield _Entry(slot, operation, row, amounts[operation])
    if parameters.gray:
        yield _Entry(4, _GRAY, row)
    if parameters.blur_sigma_px > 0:
        yield _Entry(5, _BLUR, row, parameters.blur_sigma_px, math.ceil(3 * parameters.blur_sigma_px))


def _gray(image_N3HW: Tensor) -> Tensor:
    red, green, blue = _GREY
    gray = image_N3HW[:, 0:1] * red
    return gray.add_(image_N3HW[:, 1:2], alpha=green).add_(image_N3HW[:, 2:3], alpha=blue)


# Each change works in place on ``[N, 3, H, W]``; ``amounts``: ``[N, 2, 1, 1, 1]``, the entries' amount and reach.


def _change_brightness(image_N3HW: Tensor, amounts: Tensor, _: int) -> None:
    image_N3HW.mul_(amounts[:, 0]).clamp_(0, 1)


def _change_contrast(image_N3HW: Tensor, amounts: Tensor, _: int) -> None:
    factor = amounts[:, 0]
    mean_gray = _gray(image_N3HW.mean((2, 3), keepdim=True))
    image_N3HW.mul_(factor).add_(mean_gray * (1 - factor)).clamp_(0, 1)


def _change_saturation(image_N3HW: Tensor, amounts: Tensor, _: int) -> None:
    factor = amounts[:, 0]
    gray_N1HW = _gray(image_N3HW).mul_(1 - factor)
    image_N3HW.mul_(factor).add_(gray_N1HW).clamp_(0, 1)


def _shift_hue(image_N3HW: Tensor, amounts: Tensor, _: int) -> None:
    """Move the hue by ``amounts`` turns of the colour circle: as torchvision's ``adjust_hue``, in a third of the time.

    Channel ``n`` of a colour with value V, chroma C and hue h (in sixths) is ``V - C * clip(min(k, 4 - k), 0, 1)``
    with ``k = (n + h) mod 6`` and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = image_N3HW.unbind(1)
    value = image_N3HW.amax(1)
    chroma = value - image_N3HW.amin(1)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue += 6 * amounts[:, 0, 0]
    for channel, n in enumerate((5, 3, 1)):
        k = (hue + n).remainder_(6)
        part = torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma)
        torch.sub(value, part, out=image_N3HW[:, channel])


def _turn_gray(image_N3HW: Tensor, amounts: Tensor, _: int) -> None:
    image_N3HW.copy_(_gray(image_N3HW))


def _blur(image_N3HW: Tensor, amounts: Tensor, reach: int) -> None:
    """Blur columns, then rows; ``reach`` is the longest of all rows.

    Sums of shifted images and not a convolution: on a GPU that would run in TF32, and on a processor it is slower.
    """
    height, width = image_N3HW.shape[-2:]
    # Reflection cannot be wider than the image.
    reach = min(reach, height - 1, width - 1)
    steps_K = torch.arange(-reach, reach + 1, device=image_N3HW.device, dtype=torch.float32)
    sigma, reaches = amounts[:, 0, 0, 0], amounts[:, 1, 0, 0]
    taps_NK = torch.exp(-0.5 * (steps_K / sigma) ** 2) * (steps_K.abs() <= reaches)
    taps = (taps_NK / taps_NK.sum(1, keepdim=True))[:, :, None, None, None]
    padded = F.pad(image_N3HW, [reach] * 4, mode="reflect")
    columns = padded[:, :, :height] * taps[:, 0]
    for k in range(1, 2 * reach + 1):
        columns.addcmul_(padded[:, :, k : k + height], taps[:, k])
    torch.mul(columns[..., :width], taps[:, 0], out=image_N3HW)
    for k in range(1, 2 * reach + 1):
        image_N3HW.addcmul_(columns[..., k : k + width], taps[:, k])
    image_N3HW.clamp_(0, 1)


_CHANGES = (_change_brightness, _change_contrast, _change_saturation, _shift_hue, _turn_gray, _blur)
