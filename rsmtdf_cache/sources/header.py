"""``dataset.yaml`` of the folder source: what the dataset is called, its classes and the side of its tiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rsmtdf_cache.errors import DataError, did_you_mean

__all__ = ["FolderHeader", "read_header"]

_Level = Annotated[int, Field(ge=0, le=255)]


class _Class(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    color: tuple[_Level, _Level, _Level]


class FolderHeader(BaseModel):
    """The keys of ``dataset.yaml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    tile_px: int = Field(gt=0)
    ignore_index: _Level = 255
    masks: Literal["complete", "partial"] = "complete"
    attribution: str = ""
    classes: tuple[_Class, ...] = Field(min_length=1, max_length=255)

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
        return self


def read_header(root: Path) -> FolderHeader:
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
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected keys and values (name, tile_px, classes), found {type(data).__name__}")
    try:
        return FolderHeader.model_validate(data)
    except ValidationError as error:
        raise DataError(f"{path}:\n" + "\n".join(f"  {line}" for line in _explain(error))) from None


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        where = [str(part) for part in fault["loc"]]
        if fault["type"] == "extra_forbidden":
            known = (_Class if where[0] == "classes" and len(where) > 1 else FolderHeader).model_fields
            yield f"{'.'.join(where)}: unknown key.{did_you_mean(where[-1], known)} Known: {', '.join(known)}"
        elif fault["type"] == "missing":
            yield f"{'.'.join(where)}: missing"
        elif not where:
            yield fault["msg"].removeprefix("Value error, ")
        else:
            yield f"{'.'.join(where)}: {fault['msg']} (found {fault['input']!r})"
