"""What a stopped map run keeps: finished blocks of rows, each one file, in a hidden folder beside the map.

::

    .MAP.tif.partial/state.json        what the pieces are of
    .MAP.tif.partial/s000r0007.zlib    block row 7 of strip 0: ``[planes, rows, columns]`` uint8
    .MAP.tif.partial/classes.tif       the map while it is put together

A GeoTIFF that was being written when the power failed has an index nobody can trust, so the map itself is written in
one go when all pieces are there. Pieces appear durably and by rename: each is there in whole or not at all.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, FindingsError, MismatchError
from rsmtdf_cache.files import disk_errors, make_folders, read_json, replace_file, replace_json
from rsmtdf_cache.specs import differing_fields
from rsmtdf_train.scenes.windows import BLOCK_PX, Strip

__all__ = ["Pieces", "workroom"]

_STATE = "state.json"


def workroom(out: Path) -> Path:
    """Return the hidden folder in which ``out`` is made."""
    return out.with_name(f".{out.name}.partial")


@dataclass(frozen=True)
class Pieces:
    """The finished blocks of one map of ``height`` rows, with ``planes`` bytes a pixel."""

    folder: Path
    planes: int
    height: int

    def begin(self, state: Mapping[str, Any]) -> None:
        """Make the folder, or continue in it. Raises ``MismatchError`` when it holds pieces of another map."""
        path = self.folder / _STATE
        try:
            there = read_json(path)
        except FileNotFoundError:
            there = None
        except FindingsError:
            there = {}
        if there is None or (there != dict(state) and not any(self.folder.glob("*.zlib"))):
            with disk_errors(self.folder):
                replace_json(path, state)
        elif there != dict(state):
            lines = differing_fields(there, dict(state)) or ["its record is damaged"]
            raise MismatchError(
                f"{self.folder} holds an unfinished map of another student, scene or setting. Give another --out, run "
                "the command that began it again, or delete that folder. They differ in:\n"
                + "\n".join("  " + line.replace(" (store) != ", " (there) != ") for line in lines)
            )

    def rows(self, block: int) -> int:
        """Return the rows of block row ``block``."""
        return min(BLOCK_PX, self.height - block * BLOCK_PX)

    @property
    def blocks(self) -> int:
        """Block rows of the map."""
        return -(-self.height // BLOCK_PX)

    def first_missing(self, strip: Strip) -> int:
        """Return the first block row of ``strip`` that is not there, ``blocks`` when all are."""
        return next((b for b in range(self.blocks) if not self._path(strip, b).is_file()), self.blocks)

    def write(self, strip: Strip, block: int, planes_PHW: NDArray[np.uint8]) -> None:
        """Keep a finished block, durably."""
        make_folders(self.folder)
        with disk_errors(self.folder):
            replace_file(self._path(strip, block), zlib.compress(np.ascontiguousarray(planes_PHW).data, 1))

    def read(self, strip: Strip, block: int) -> NDArray[np.uint8]:
        """Return what was written: ``[planes, rows, columns]`` uint8.

        Raises ``DataError`` for a damaged piece, which is then gone: the same command makes it again.
        """
        path = self._path(strip, block)
        shape = (self.planes, self.rows(block), strip.width)
        try:
            values = np.frombuffer(zlib.decompress(path.read_bytes()), np.uint8).reshape(shape)
        except (zlib.error, ValueError):
            path.unlink(missing_ok=True)
            raise DataError(
                f"{path}: this piece of the map was damaged and has been removed; run the same command again, it is "
                "made again"
            ) from None
        return values

    def remove(self) -> None:
        """Remove the folder with all pieces."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, strip: Strip, block: int) -> Path:
        return self.folder / f"s{strip.number:03}r{block:04}.zlib"
