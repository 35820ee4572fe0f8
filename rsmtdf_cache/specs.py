"""What is stored, as values: frozen, hashable, JSON-able. Everything that changes a byte stands here.

Pure data: no torch, no zarr, so that ``cache info`` and the trainer can compare digests cheaply.

Coordinates are continuous: pixel ``i`` covers ``[i, i + 1)``, its centre is ``i + 0.5``. The centre of token ``i``
of a map lies at ``offset_px + i * stride_px`` in the pixels of the *view* the teacher saw.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

__all__ = [
    "EncodingSpec",
    "FeatureKey",
    "FeatureSpec",
    "LayerSpec",
    "NumericsProfile",
    "PixelSpec",
    "TeacherSpec",
    "ViewSpec",
    "canonical_json",
    "differing_fields",
    "digest_of",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")

#: A part of a key becomes a folder of a store: nothing in it leads elsewhere.
_Name = Annotated[str, StringConstraints(pattern=f"^{_NAME.pattern}$")]


def canonical_json(value: object) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, floats as ``repr``; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest_of(value: object) -> str:
    """Return the sha256 (64 hex digits) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line per leaf that differs: ``"teacher.weights: 'a' (store) != 'b' (asked)"``."""
    lines: list[str] = []
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: {a!r} (store) != {b!r} (asked)")
    return lines


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the validated value of ``data``; raises ``pydantic.ValidationError``."""
        return cls.model_validate(data)


class PixelSpec(_Spec):
    """How uint8 RGB becomes a teacher's input: resize rule, then ``(x / 255 - mean) / std``."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["bilinear", "bicubic"] = "bicubic"
    antialias: bool = True


class LayerSpec(_Spec):
    """One layer (or stage) of a teacher.

    ``stride_px`` and ``offset_px`` are in pixels of the view; for a convolutional net the offset can depend on the
    parity of the view's side (TF-style padding is asymmetric), so it belongs to the size it was computed for.
    """

    name: str
    channels: int = Field(gt=0, le=2**20)
    stride_px: int = Field(gt=0, le=2**16)
    offset_px: float


class TeacherSpec(_Spec):
    """Which network, with which weights, reads pixels how. ``weights`` is the digest of the state dict."""

    name: str
    family: str
    architecture: str
    weights: str
    weights_origin: str = Field(description="where the weights came from, for people: 'timm hub', 'file', 'seed 0' …")
    patch_px: int = Field(gt=0, description="view sides must be multiples of this")
    native_px: int = Field(gt=0, description="side the network was trained at")
    prefix_tokens: int = Field(ge=0, description="class and register tokens, dropped")
    norm: bool = Field(description="whether stored tokens went through the final norm")
    pixel: PixelSpec
    license: str = ""


class ViewSpec(_Spec):
    """A whole tile at one scale and one of the eight orientations of D4 (see ``views.orient``)."""

    size_px: int = Field(gt=0, le=2**16, description="side of the square the teacher sees")
    orientation: int = Field(ge=0, le=7)

    @property
    def name(self) -> str:
        return f"s{self.size_px}o{self.orientation}"

    @classmethod
    def parse(cls, name: str) -> ViewSpec:
        """Return the view called ``name``, e.g. ``"s448o0"``; raises ``ValueError``."""
        found = re.fullmatch(r"s(\d+)o([0-7])", name)
        if not found:
            raise ValueError(f"not a view name: {name!r}")
        return cls(size_px=int(found[1]), orientation=int(found[2]))


class EncodingSpec(_Spec):
    """How a float feature becomes stored bytes."""

    codec: str = "float16"
    parameters: dict[str, float | int | str] = Field(default_factory=dict)


class FeatureKey(_Spec):
    """Name of one array: ``teacher/view/layer``."""

    teacher: _Name
    view: _Name
    layer: _Name

    def __str__(self) -> str:
        return f"{self.teacher}/{self.view}/{self.layer}"

    @classmethod
    def parse(cls, text: str) -> FeatureKey:
        """Return the key written as ``teacher/view/layer``; raises ``ValueError``."""
        parts = text.split("/")
        if len(parts) != 3 or not all(_NAME.fullmatch(p) for p in parts):
            raise ValueError(f"not a feature key (teacher/view/layer): {text!r}")
        return cls(teacher=parts[0], view=parts[1], layer=parts[2])


_Tokens = Annotated[int, Field(gt=0, le=2**16)]


class FeatureSpec(_Spec):
    """Everything that decides the content of one array, given the tiles. Its digest names the array."""

    teacher: TeacherSpec
    layer: LayerSpec
    view: ViewSpec
    encoding: EncodingSpec
    tile_px: int = Field(gt=0, le=2**16)
    grid: tuple[_Tokens, _Tokens] = Field(description="tokens (height, width) of one tile's map")

    @property
    def key(self) -> FeatureKey:
        return FeatureKey(teacher=self.teacher.name, view=self.view.name, layer=self.layer.name)

    @property
    def stride_tile_px(self) -> float:
        """Distance of neighbouring token centres in tile pixels."""
        return self.layer.stride_px * self.tile_px / self.view.size_px

    @property
    def offset_tile_px(self) -> float:
        """Centre of token 0 in tile pixels, in the frame of the (oriented) view."""
        return self.layer.offset_px * self.tile_px / self.view.size_px

    def digest(self) -> str:
        """Return the identity of the array (decision 1). Where the weights came from does not count, the bytes do."""
        data = self.to_json()
        del data["teacher"]["weights_origin"], data["teacher"]["license"]
        return digest_of(data)


class NumericsProfile(_Spec):
    """What changes bits without changing meaning (decision 3); recorded, and constant within an array."""

    device: str
    precision: Literal["float32", "bfloat16", "float16"]
    torch: str
    threads: int = Field(gt=0)
    micro_batch: int = Field(gt=0)
