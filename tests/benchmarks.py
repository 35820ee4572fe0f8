"""Tiny benchmarks in their own on-disk formats, for tests of ``rsmtdf data prepare``: real PNG, JPEG and TIFF files."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "DEEPGLOBE_COLORS",
    "POTSDAM_COLORS",
    "as_tar",
    "as_zip",
    "scene_pixels",
    "write_deepglobe",
    "write_loveda",
    "write_potsdam",
]

POTSDAM_COLORS = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)]
DEEPGLOBE_COLORS = [
    (0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0),
]  # fmt: skip


def scene_pixels(seed: str, side: int, labels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return an image ``[side, side, 3]`` and labels 0..``labels``-1 ``[side, side]``, the same for the same seed."""
    rng = np.random.default_rng(list(seed.encode()))
    image = rng.integers(0, 256, (side, side, 3), np.uint8)
    return image, rng.integers(0, labels, (side, side), np.uint8)


def write_loveda(root: Path, side: int = 40, scenes: int = 3, test: int = 0) -> Path:
    """Write ``Train`` and ``Val``: ``scenes`` of each domain, bearing the same numbers everywhere; values 0 to 7."""
    for part in ("Train", "Val"):
        for domain in ("Rural", "Urban"):
            for number in range(scenes):
                image, labels = scene_pixels(f"{part}{domain}{number}", side, 8)
                _save(image, root / part / domain / "images_png" / f"{number}.png")
                _save(labels, root / part / domain / "masks_png" / f"{number}.png")
    for number in range(test):
        _save(scene_pixels(f"test{number}", side, 8)[0], root / "Test" / "Rural" / "images_png" / f"{number}.png")
    return root


def write_potsdam(root: Path, side: int = 50, scenes: int = 5) -> Path:
    """Write ``2_Ortho_RGB`` and ``5_Labels_all`` (TIFF, one packed with LZW, one not)."""
    colors = np.array(POTSDAM_COLORS, np.uint8)
    for number in range(scenes):
        name = f"top_potsdam_2_{10 + number}"
        image, labels = scene_pixels(name, side, 6)
        _save(image, root / "2_Ortho_RGB" / f"{name}_RGB.tif")
        (root / "2_Ortho_RGB" / f"{name}_RGB.tfw").write_text("0.05\n")
        _save(colors[labels], root / "5_Labels_all" / f"{name}_label.tif", compression="tiff_lzw")
    return root


def write_deepglobe(root: Path, side: int = 44, scenes: int = 6, bare: int = 0) -> Path:
    """Write ``train`` with ``ID_sat.jpg`` and ``ID_mask.png``; ``bare`` images without masks in ``valid``.

    Mask channels are off 0 and 255 by up to 90.
    """
    colors = np.array(DEEPGLOBE_COLORS, np.int16)
    for number in range(scenes):
        image, labels = scene_pixels(f"deepglobe{number}", side, 7)
        noise = np.random.default_rng(number).integers(0, 91, (side, side, 3))
        stored = np.where(colors[labels] > 0, 255 - noise, noise).astype(np.uint8)
        _save(image, root / "train" / f"{100 + number}_sat.jpg", quality=95)
        _save(stored, root / "train" / f"{100 + number}_mask.png")
    for number in range(bare):
        _save(scene_pixels(f"bare{number}", side, 7)[0], root / "valid" / f"{900 + number}_sat.jpg")
    return root


def _save(pixels: NDArray[np.uint8], path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def as_zip(files: Iterable[tuple[str, Path | bytes]], path: Path, packed: bool = True) -> Path:
    """Write the files (name in the archive, file or content) to a zip and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in files:
            archive.writestr(name, content if isinstance(content, bytes) else content.read_bytes())
    return path


def as_tar(files: Iterable[tuple[str, Path | bytes]], path: Path) -> Path:
    """Write the files to a tar, packed as the suffix of ``path`` says, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, kind) as archive:  # type: ignore[call-overload]  # the mode is one of its literals
        for name, content in files:
            data = content if isinstance(content, bytes) else content.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
