"""Segment image files: a mask of class numbers with the classes' palette, and the mask laid over the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.files import replace_file
from rsmtdf_cache.sources.base import ClassInfo

if TYPE_CHECKING:  # an exported file needs no torch
    import torch

    from rsmtdf_train.fused_student import FusedStudent

__all__ = ["Prediction", "overlay", "palette_image", "predict_files", "predict_mask", "read_rgb"]

_OPACITY = 0.5
_KINDS = ("mask", "overlay")
_SIGNED = ("Software", "rsmtdf predict")


@dataclass(frozen=True)
class Prediction:
    """What was written for one image, and the share of pixels of each class."""

    image: Path
    mask: Path
    overlay: Path
    shares: dict[str, float]


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Return ``[H, W, 3]`` uint8 RGB. Raises ``DataError`` for anything but a whole 8-bit RGB image; no conversion."""
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise DataError(
                    f"image {path}: expected 8-bit RGB, found mode {image.mode!r}; convert it to three 8-bit bands"
                )
            pixels: NDArray[np.uint8] = np.array(image)
    except FileNotFoundError:
        raise DataError(f"image {path}: there is no such file") from None
    except UnidentifiedImageError:
        raise DataError(f"image {path}: not an image that can be read; give PNG, JPEG or 8-bit TIFF") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path}: cannot be read ({error})") from None
    return pixels


def predict_mask(model: FusedStudent, image_HW3: NDArray[np.uint8], device: torch.device) -> NDArray[np.uint8]:
    """Return ``[H, W]`` uint8 class numbers for uint8 RGB of any size, in one pass."""
    import torch

    with torch.inference_mode():
        image = torch.from_numpy(image_HW3).to(device).permute(2, 0, 1)[None].float().div_(255)
        mask: NDArray[np.uint8] = model.predict(image).argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
    return mask


def palette_image(mask_HW: NDArray[np.uint8], classes: Sequence[ClassInfo]) -> Image.Image:
    """Return an 8-bit palette image whose values are the class numbers; any viewer shows the classes' colours."""
    image = Image.fromarray(mask_HW)
    image.putpalette(bytes(v for c in classes for v in c.color))  # turns mode L into P
    return image


def overlay(
    image_HW3: NDArray[np.uint8], mask_HW: NDArray[np.uint8], classes: Sequence[ClassInfo]
) -> NDArray[np.uint8]:
    """Return the image with the colours of the mask at half opacity: ``[H, W, 3]`` uint8."""
    colors = np.array([c.color for c in classes], np.float32)[mask_HW]
    mixed: NDArray[np.uint8] = ((1 - _OPACITY) * image_HW3 + _OPACITY * colors).round().astype(np.uint8)
    return mixed


def _write(image: Image.Image, path: Path) -> None:
    """Write a PNG file that says who wrote it, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    said, data = PngInfo(), BytesIO()
    said.add_text(*_SIGNED)
    image.save(data, "PNG", pnginfo=said)
    replace_file(path, data.getvalue())


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get(_SIGNED[0]) == _SIGNED[1]
    except (OSError, SyntaxError, ValueError):
        return False


def predict_files(
    mask_of: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    classes: Sequence[ClassInfo],
    images: Sequence[Path],
    out: Path,
    on_event: EventSink = ignore_events,
) -> list[Prediction]:
    """Write ``out/STEM_mask.png`` and ``out/STEM_overlay.png`` for each image and return what was written.

    What an earlier call wrote is replaced, any other file is not.
    ``mask_of``: uint8 RGB ``[H, W, 3]`` to class numbers ``[H, W]``, such as ``predict_mask`` of a model.
    Every image is checked to exist, and their stems to differ, before anything is written. Raises ``UsageError`` for
    two images of one stem and a file in the way, ``DataError`` for an image that cannot be used.
    """
    stems: dict[str, Path] = {}
    for path in images:
        if not path.is_file():
            raise DataError(f"image {path}: there is no such file")
        if path.stem in stems:
            raise UsageError(
                f"{stems[path.stem]} and {path} would both be written as {path.stem}_mask.png; run them into two --out"
            )
        stems[path.stem] = path
    inputs = {path.resolve() for path in images}
    for place in (out / f"{stem}_{kind}.png" for stem in stems for kind in _KINDS):
        if place.resolve() in inputs:
            raise UsageError(f"{place} is one of the images, and would be written over; give another --out")
        if place.exists() and not _is_ours(place):
            raise UsageError(
                f"{place} is there and was not written by `rsmtdf predict`; it may be a label: give another --out, or "
                "move it away"
            )
    out.mkdir(parents=True, exist_ok=True)
    on_event(ProgressStart("predict", "predict", len(images), unit="images"))
    results = []
    for stem, path in stems.items():
        pixels = read_rgb(path)
        mask = mask_of(pixels)
        paths = out / f"{stem}_{_KINDS[0]}.png", out / f"{stem}_{_KINDS[1]}.png"
        _write(palette_image(mask, classes), paths[0])
        _write(Image.fromarray(overlay(pixels, mask, classes)), paths[1])
        counts = np.bincount(mask.ravel(), minlength=len(classes)) / mask.size
        shares = {c.name: float(v) for c, v in zip(classes, counts, strict=True)}
        results.append(Prediction(path, paths[0], paths[1], shares))
        on_event(Progress("predict", 1))
    on_event(ProgressEnd("predict"))
    return results
