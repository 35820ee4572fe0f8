"""What a user asks a build for, as one validated value. A YAML file (``--config``) has the same keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rsmtdf_cache.codecs import codec_class, parse_codec
from rsmtdf_cache.codecs.compressors import canonical
from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.pixels import PIXELS
from rsmtdf_cache.specs import EncodingSpec

__all__ = ["BuildRequest", "TeacherAsked", "parse_teacher"]


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TeacherAsked(_Asked):
    """One teacher of a build; what is None falls back to the build's own value or the teacher's default."""

    name: str
    weights: Path | None = Field(default=None, description="weights file, for machines without a hub")
    pretrained: Literal["none"] | None = Field(default=None, description="none = seeded random weights")
    seed: int = 0
    layers: tuple[str, ...] | None = None
    scales: tuple[float, ...] | None = None
    orientations: int | None = None
    fixed_views: int | None = None
    window_px: int | None = Field(default=None, ge=0)
    positions: Literal["antialiased", "released"] | None = None
    codec: str | None = Field(default=None, description="float16, int8 or pcaK-int8; default: the build's")

    @model_validator(mode="after")
    def _one_kind_of_weights(self) -> Self:
        if self.weights is not None and self.pretrained is not None:
            raise ValueError("give weights or pretrained=none, not both")
        return self


class BuildRequest(_Asked):
    """``cache build`` as a value. ``None`` means: decided at build time (device, precision, batch, group size)."""

    data: Path
    out: Path | str = Field(description="a folder, or the URL of an object store")
    teachers: tuple[TeacherAsked, ...] = ()
    pixels: bool = Field(default=False, description="store the tiles' decoded pixels too; then no teacher is needed")
    splits: tuple[str, ...] = Field(default=("train",), min_length=1)
    scales: tuple[float, ...] = Field(default=(1.0, 0.5), min_length=1)
    orientations: int = 1
    fixed_views: int = Field(default=0, ge=0, description="views with random crop, orientation, colours; drawn once")
    view_seed: int = Field(default=0, description="which fixed views: their parameters are a function of it alone")
    window_px: int | None = Field(default=None, ge=0, description="windows of large views; 0 = never, None = see docs")
    overlap: float = Field(default=0.25, ge=0, le=0.75, description="part of a window that its neighbour sees too")
    codec: str = Field(default="float16", description="float16, int8, or pcaK-int8 with K components")
    compressor: str = Field(default="none", description="of bytes, after the codec: none, zstd:3, blosc:lz4, …")
    calibration: tuple[Path, ...] = Field(default=(), description="calibrations to reuse: files or stores")
    group_rows: int | None = Field(default=None, gt=0, le=2**24)
    device: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    micro_batch: int | None = Field(default=None, gt=0)
    threads: int | None = Field(default=None, gt=0)
    decoders: int = Field(
        default_factory=lambda: min(32, max(4, os.cpu_count() or 4)), gt=0, le=1024,
        description="tiles decoded at once, by default one a core; changes no byte",
    )  # fmt: skip
    strict: bool = False
    allow_mixed: bool = False

    @field_validator("out", mode="before")
    @classmethod
    def _folder_or_url(cls, value: object) -> object:
        """A URL stays text: a path would lose one of its slashes. Raises ``UsageError`` for one to read from only."""
        if not isinstance(value, str) or "://" not in value:
            return Path(value) if isinstance(value, str) else value
        from rsmtdf_cache.share.address import Address

        address = Address.parse(value)
        if address.snapshot is not None:
            raise UsageError(f"{address.shown}: a build goes to a place, not to a snapshot; write it without @SNAPSHOT")
        if address.is_http:
            raise UsageError(
                f"{address.shown}: can only be read; build into a folder or an object store (s3://bucket/store)"
            )
        return address.path if address.is_local else value

    @field_validator("teachers", mode="before")
    @classmethod
    def _teachers_by_name(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        return tuple(parse_teacher(v) if isinstance(v, str) else v for v in value)

    @model_validator(mode="after")
    def _teachers_once(self) -> Self:
        names = [t.name for t in self.teachers]
        if not names and not self.pixels:
            raise ValueError("teachers: name one at least, or ask for pixels")
        if PIXELS in names:
            raise ValueError(f"{PIXELS!r} is no teacher; --pixels (in a file: pixels: true) stores pixels")
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(
                f"teachers: {', '.join(twice)} twice; a store holds one of each name, whatever its weights or seed: "
                "build a store for each"
            )
        return self

    @property
    def shown(self) -> str:
        """Where the store is to be, for people: a URL without its secrets."""
        if isinstance(self.out, Path):
            return str(self.out)
        from rsmtdf_cache.share.address import Address

        return Address.parse(self.out).shown

    def encoding(self, teacher: TeacherAsked) -> EncodingSpec:
        """Return how the features of one teacher become bytes. Raises ``UsageError`` for an unknown codec."""
        compressor = canonical(self.compressor)
        encoding = parse_codec(teacher.codec or self.codec).model_copy(update={"compressor": compressor})
        codec_class(encoding)
        return encoding

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the request of plain data. Raises ``UsageError`` naming each wrong key."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UsageError("cache build: " + "; ".join(_explain(error))) from None


def parse_teacher(text: str) -> TeacherAsked:
    """Return the teacher written as ``NAME[,key=value...]``.

    Keys: ``weights=FILE``, ``pretrained=none``, ``seed=N``, ``layers=a+b``, ``scales=1+0.5``, ``orientations=N``,
    ``fixed_views=K``, ``window_px=N``, ``positions=released``, ``codec=int8``. Raises ``UsageError``.
    """
    name, *options = text.split(",")
    values: dict[str, Any] = {"name": name}
    for option in options:
        key, sign, value = option.partition("=")
        if key not in TeacherAsked.model_fields or key == "name" or not sign:
            known = [k for k in TeacherAsked.model_fields if k != "name"]
            raise UsageError(
                f"--teacher {text}: {option!r} is no option.{did_you_mean(key, known)} "
                f"Write NAME[,key=value...] with {', '.join(known)}"
            )
        values[key] = value.split("+") if key in ("layers", "scales") else value
    try:
        return TeacherAsked.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"--teacher {text}: " + "; ".join(_explain(error))) from None


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        where = ".".join(str(p) for p in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = TeacherAsked.model_fields if fault["loc"][0] == "teachers" else BuildRequest.model_fields
            lines.append(f"unknown key {where!r}.{did_you_mean(str(fault['loc'][-1]), known)}")
        else:
            said = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {said}" if where else said)
    return lines
