"""``dataset.yaml``: name, classes, side of the tiles; how values of files become pixels and class numbers.

::

    kind: tiles | scenes       a file a tile, or windows of scenes
    pixels: {bands: [4, 3, 2], scale: [[0, 3000], [0, 3000], [0, 3000]], dtype: uint16}
    labels: {kind: values | colors | polygons, ignore: [...], unknown: error | ignore, field: CLASS, outside: NAME}
    classes: [{name: water, color: [38, 102, 178], values: [1, 2]}]

``values`` of a class: what stands in masks for it (numbers; colours; values of the polygons' class field). Without
``values``, class numbers are what stands there; in colour masks the classes' colours, for polygons their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from rsmtdf_cache.errors import DataError, did_you_mean
from rsmtdf_cache.rasters.scaling import EIGHT_BIT, PixelRule

__all__ = [
    "ClassHeader",
    "DatasetHeader",
    "LabelsHeader",
    "PixelsHeader",
    "label_numbers",
    "parse_header",
    "read_header",
]

_Level = Annotated[int, Field(ge=0, le=255)]
_Color = tuple[_Level, _Level, _Level]
_Value = StrictInt | StrictStr | _Color
_Range = tuple[float, float]
_Band = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassHeader(_Part):
    """One class: its position in the list is its number."""

    name: str = Field(min_length=1)
    color: _Color
    values: tuple[_Value, ...] | None = Field(default=None, min_length=1)


class PixelsHeader(_Part):
    """How values of rasters become 8-bit RGB; see ``rasters/scaling.py``. ``dtype``: the type the range is for."""

    bands: tuple[_Band, _Band, _Band] | None = None
    scale: tuple[_Range, _Range, _Range] | None = None
    dtype: str = "uint8"

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for low, high in self.scale or ():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"scale: [{low:g}, {high:g}] is no range; the lower value comes first")
        if self.scale is None and self.dtype != "uint8":
            raise ValueError(f"scale: values of type {self.dtype} need one, a pair of values for each of three bands")
        return self

    @property
    def rule(self) -> PixelRule:
        """The same as a value for readers."""
        return PixelRule(self.bands, self.scale or EIGHT_BIT, self.dtype)


class LabelsHeader(_Part):
    """What stands in masks. ``outside``: the class of what no polygon covers; ``unknown``: of what no class knows."""

    kind: Literal["values", "colors", "polygons"] = "values"
    ignore: tuple[_Value, ...] = ()
    unknown: Literal["error", "ignore"] = "error"
    field: str | None = None
    layer: str | None = None
    outside: str | None = None


class DatasetHeader(_Part):
    """The keys of ``dataset.yaml``."""

    name: str = Field(min_length=1)
    kind: Literal["tiles", "scenes"] = "tiles"
    tile_px: int = Field(gt=0)
    ignore_index: _Level = 255
    masks: Literal["complete", "partial"] = "complete"
    attribution: str = ""
    pixels: PixelsHeader | None = None
    labels: LabelsHeader | None = None
    classes: tuple[ClassHeader, ...] = Field(min_length=1, max_length=255)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [c.name for c in self.classes]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"classes: the name {twice[0]!r} stands twice")
        if self.ignore_index < len(names):
            raise ValueError(
                f"ignore_index {self.ignore_index} is also the number of class {names[self.ignore_index]!r}; use 255"
            )
        if self.kind == "tiles" and self.labels is not None and self.labels.kind == "polygons":
            raise ValueError("labels.kind: polygons are laid over scenes; for a file a tile give values or colors")
        label_numbers(self.classes, self.labels or LabelsHeader(), self.ignore_index)
        return self


def label_numbers(
    classes: Sequence[ClassHeader], labels: LabelsHeader, ignore_index: int
) -> dict[int | str | tuple[int, int, int], int]:
    """Return the class number, or ``ignore_index``, of everything that may stand in a mask.

    Raises ``ValueError`` for a value of two classes or of the wrong kind, for an unknown class of what is outside.
    """
    wanted: tuple[type, ...] = {"values": (int,), "colors": (tuple,), "polygons": (int, str)}[labels.kind]
    shown = {"values": "a number", "colors": "a colour [r, g, b]", "polygons": "a number or a text"}[labels.kind]
    bare = [c.name for c in classes if c.values is None]
    if labels.kind == "values" and bare and len(bare) < len(classes):
        raise ValueError(f"classes: {bare[0]!r} has no values and others have; give them to all classes, or to none")
    found: dict[int | str | tuple[int, int, int], int] = {}
    if labels.kind == "values":
        found[ignore_index] = ignore_index
    for value in labels.ignore:
        if not isinstance(value, wanted):
            raise ValueError(f"labels.ignore: {value!r} is not {shown}, as labels of kind {labels.kind} have")
        found[value] = ignore_index
    home: dict[object, str] = dict.fromkeys(labels.ignore, "ignore")
    for number, entry in enumerate(classes):
        usual: dict[str, int | str | tuple[int, int, int]]
        usual = {"values": number, "colors": entry.color, "polygons": entry.name}
        for value in entry.values or (usual[labels.kind],):
            if not isinstance(value, wanted):
                raise ValueError(
                    f"classes: {value!r} of {entry.name!r} is not {shown}, as labels of kind {labels.kind} have"
                )
            if home.setdefault(value, entry.name) != entry.name:
                raise ValueError(f"classes: {value!r} means {home[value]!r} and {entry.name!r}; it can be one of them")
            found[value] = number
    if labels.outside is not None and labels.outside not in [c.name for c in classes]:
        raise ValueError(f"labels.outside: there is no class {labels.outside!r}")
    return found


def parse_header(data: object, path: Path) -> DatasetHeader:
    """Return plain data as the header it is. Raises ``DataError`` naming ``path``, one line per fault."""
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected keys and values (name, tile_px, classes), found {type(data).__name__}")
    try:
        return DatasetHeader.model_validate(data)
    except ValidationError as error:
        raise DataError(f"{path}:\n" + "\n".join(f"  {line}" for line in _explain(error))) from None


def read_header(root: Path) -> DatasetHeader:
    """Return the validated ``dataset.yaml`` of the folder ``root``. Raises ``DataError``, one line per fault."""
    path = root / "dataset.yaml"
    if not root.is_dir():
        found = "not a folder" if root.exists() else "no such folder"
        raise DataError(f"dataset {root}: {found}; give the folder of a dataset, with a dataset.yaml in it")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"dataset {root}: no dataset.yaml in it; it has to name the classes and the tile side"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML ({error})") from None
    return parse_header(data, path)


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        where = [str(part) for part in fault["loc"]]
        if fault["type"] == "extra_forbidden":
            parts: dict[str, type[BaseModel]] = {"classes": ClassHeader, "pixels": PixelsHeader, "labels": LabelsHeader}
            known = (parts.get(where[0], DatasetHeader) if len(where) > 1 else DatasetHeader).model_fields
            yield f"{'.'.join(where)}: unknown key.{did_you_mean(where[-1], known)} Known: {', '.join(known)}"
        elif fault["type"] == "missing":
            yield f"{'.'.join(where)}: missing"
        elif not where or fault["type"] == "value_error":
            yield fault["msg"].removeprefix("Value error, ")
        else:
            yield f"{'.'.join(where)}: {fault['msg']} (found {fault['input']!r})"
