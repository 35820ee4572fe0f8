"""What an exported file says of itself: its metadata, as text under keys that begin with ``rsmtdf.``.

Neither torch nor ONNX is needed to read it. ``docs/deploy.md`` explains each key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from rsmtdf_cache.rasters.scaling import PixelRule
from rsmtdf_cache.sources.base import ClassInfo

__all__ = ["INPUT", "OUTPUT", "StudentRecord"]

#: Names of the graph's one input and one output.
INPUT = "image"
OUTPUT = "probabilities"
_FORMAT = "1"
_PREFIX = "rsmtdf."
_INPUT = {"name": INPUT, "dtype": "float32", "layout": "NCHW", "channels": "RGB", "range": [0, 1]}
_OUTPUT = {"name": OUTPUT, "dtype": "float32", "layout": "NCHW", "sum_over_channels": 1}
_SIDES = 2**20


@dataclass(frozen=True)
class StudentRecord:
    """Where a file comes from and how it is used.

    ``mean``, ``std``: of the normalisation, which is inside the graph. ``window_px``: the side it was trained on, the
    default of windows. ``multiple_px``: its stride; other sides are padded or resized inside. ``least_px``: the least
    side it reads. ``fixed_px``: the only side it reads, None for any. ``square``: trained on squares alone, because it
    sees the image a second time in a fixed size. ``pixels``: how values of scenes became what it learned from, None for
    8-bit RGB as it is. Digests are sha256 in hex.
    """

    run: str
    student: str
    checkpoint: str
    checkpoint_sha256: str
    recipe_sha256: str
    classes: tuple[ClassInfo, ...]
    ignore_index: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    window_px: int
    multiple_px: int
    least_px: int
    fixed_px: int | None
    square: bool
    attribution: str
    version: str
    exporter: str
    pixels: PixelRule | None = None

    def to_properties(self) -> dict[str, str]:
        """Return the metadata of the file: text by key, what is structured as JSON."""
        found = {
            "format": _FORMAT,
            "version": self.version,
            "exporter": self.exporter,
            "run": self.run,
            "student": self.student,
            "checkpoint": self.checkpoint,
            "checkpoint_sha256": self.checkpoint_sha256,
            "recipe_sha256": self.recipe_sha256,
            "classes": _text([{"name": c.name, "color": list(c.color)} for c in self.classes]),
            "ignore_index": str(self.ignore_index),
            "input": _text(_INPUT),
            "output": _text(_OUTPUT),
            "normalisation": _text({"inside": True, "mean": list(self.mean), "std": list(self.std)}),
            "window_px": str(self.window_px),
            "multiple_px": str(self.multiple_px),
            "least_px": str(self.least_px),
            "fixed_px": "" if self.fixed_px is None else str(self.fixed_px),
            "square": _text(self.square),
            "attribution": self.attribution,
            "pixels": "" if self.pixels is None else _text(self.pixels.to_json()),
        }
        return {_PREFIX + key: value for key, value in found.items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> StudentRecord:
        """Return the value of ``to_properties``; raises ``KeyError``, ``TypeError`` or ``ValueError`` for all else."""
        found = {key.removeprefix(_PREFIX): value for key, value in properties.items() if key.startswith(_PREFIX)}
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']} is not {_FORMAT}; use the version of rsmtdf that wrote it")
        pixels = json.loads(found["normalisation"])
        return cls(
            run=found["run"],
            student=found["student"],
            checkpoint=found["checkpoint"],
            checkpoint_sha256=found["checkpoint_sha256"],
            recipe_sha256=found["recipe_sha256"],
            classes=tuple(_class(entry) for entry in json.loads(found["classes"])),
            ignore_index=int(found["ignore_index"]),
            mean=tuple(float(v) for v in pixels["mean"]),
            std=tuple(float(v) for v in pixels["std"]),
            window_px=_side(found["window_px"]),
            multiple_px=_side(found["multiple_px"]),
            least_px=_side(found["least_px"]),
            fixed_px=_side(found["fixed_px"]) if found["fixed_px"] else None,
            square=bool(json.loads(found["square"])),
            attribution=found["attribution"],
            version=found["version"],
            exporter=found["exporter"],
            pixels=PixelRule.from_json(json.loads(found["pixels"])) if found.get("pixels") else None,
        )


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _class(entry: Mapping[str, object]) -> ClassInfo:
    name, color = entry["name"], entry["color"]
    if not (isinstance(name, str) and isinstance(color, list) and len(color) == 3):
        raise ValueError("classes need a name and three numbers of colour")
    if not all(isinstance(v, int) and 0 <= v <= 255 for v in color):
        raise ValueError("colours are numbers from 0 to 255")
    return ClassInfo(name, (color[0], color[1], color[2]))


def _side(text: str) -> int:
    side = int(text)
    if not 0 < side <= _SIDES:
        raise ValueError(f"{side} px is no side of an image")
    return side
