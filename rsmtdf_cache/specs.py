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
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

__all__ = [
    "CropSpec",
    "EncodingSpec",
    "FeatureKey",
    "FeatureSpec",
    "LayerSpec",
    "NumericsProfile",
    "PhotometrySpec",
    "PixelSpec",
    "TeacherSpec",
    "ViewSpec",
    "WindowSpec",
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
            # A member at its default is not written (``_Spec.LATER``).
            shown = [repr(v[name]) if name in v else "its default" for v in (old, new)]
            lines.append(f"{prefix}{name}: {shown[0]} (store) != {shown[1]} (asked)")
    return lines


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Members that came after the first stores. At their default they are not written, so digests stay what they were.
    LATER: ClassVar[frozenset[str]] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data.

        Plain Python: pydantic's serialisers wrap a Ctrl-C that comes while they call back, and it is lost.
        """
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in fields}
        return {k: _json(v) for k, v in values.items() if k not in self.LATER or v != fields[k].default}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the validated value of ``data``; raises ``pydantic.ValidationError``."""
        return cls.model_validate(data)


def _json(value: Any) -> Any:
    if isinstance(value, _Spec):
        return value.to_json()
    if isinstance(value, tuple):
        return [_json(v) for v in value]
    return dict(value) if isinstance(value, dict) else value


class PixelSpec(_Spec):
    """How uint8 RGB becomes a teacher's input: resize rule, then ``(x / 255 - mean) / std``.

    ``align_corners``: the corner pixels of tile and view coincide, as in the released code of RS-MTDF; centres shift.
    """

    LATER = frozenset({"align_corners"})

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["bilinear", "bicubic"] = "bicubic"
    antialias: bool = True
    align_corners: bool = False


class LayerSpec(_Spec):
    """One layer (or stage) of a teacher.

    ``stride_px`` and ``offset_px`` are in pixels of the view; for a convolutional net the offset can depend on the
    parity of the view's side (TF-style padding is asymmetric), so it belongs to the size it was computed for.
    """

    name: str
    channels: int = Field(gt=0, le=2**20)
    stride_px: int = Field(gt=0, le=2**16)
    offset_px: float = Field(ge=-(2**16), le=2**16, allow_inf_nan=False)


class TeacherSpec(_Spec):
    """Which network, with which weights, reads pixels how. ``weights`` is the digest of the state dict."""

    LATER = frozenset({"positions"})

    name: str
    family: str
    architecture: str
    weights: str
    weights_origin: str = Field(description="where the weights came from, for people: 'timm hub', 'file', 'seed 0' …")
    patch_px: int = Field(gt=0, description="view sides must be multiples of this")
    native_px: int = Field(gt=0, description="side the network was trained at")
    prefix_tokens: int = Field(ge=0, description="class and register tokens, dropped")
    positions: Literal["antialiased", "released"] = Field(
        default="antialiased", description="how a trained position embedding is resampled for views of another size"
    )
    norm: bool = Field(description="whether stored tokens went through the final norm")
    pixel: PixelSpec
    license: str = ""


_Side = Annotated[int, Field(gt=0, le=2**16)]


class CropSpec(_Spec):
    """A square of tile pixels, in the frame of the oriented tile: rows ``[y, y + side_px)``, columns alike."""

    y: int = Field(ge=0, le=2**16)
    x: int = Field(ge=0, le=2**16)
    side_px: _Side


class PhotometrySpec(_Spec):
    """A fixed change of colours, in this order: brightness, contrast, saturation, hue, grey, blur.

    Factors of 1, a hue shift of 0 turns and a blur of 0 px change nothing. See ``photometry.py``.
    """

    brightness: float = Field(default=1.0, ge=0, le=4)
    contrast: float = Field(default=1.0, ge=0, le=4)
    saturation: float = Field(default=1.0, ge=0, le=4)
    hue: float = Field(default=0.0, ge=-0.5, le=0.5)
    grey: bool = False
    blur_px: float = Field(default=0.0, ge=0, le=64)


class WindowSpec(_Spec):
    """The teacher sees windows of ``side_px`` (view pixels) that overlap by ``overlap_px``; seams are blended."""

    side_px: _Side
    overlap_px: int = Field(ge=0, le=2**16)

    @model_validator(mode="after")
    def _steps_forward(self) -> Self:
        if self.overlap_px >= self.side_px:
            raise ValueError(f"windows of {self.side_px} px cannot overlap by {self.overlap_px} px")
        return self


class ViewSpec(_Spec):
    """A tile at one scale and in one of the eight orientations of D4 (see ``views.orient``).

    ``size_px``: side of the square that is shown; the teacher sees it at once, or in ``windows``. ``crop``: the part of
    the oriented tile that is shown, None = all of it. ``photometry``: a change of its colours, None = as it is.
    """

    LATER = frozenset({"crop", "photometry", "windows"})

    size_px: int = Field(gt=0, le=2**16, description="side of the square view, in view pixels")
    orientation: int = Field(ge=0, le=7)
    crop: CropSpec | None = None
    photometry: PhotometrySpec | None = None
    windows: WindowSpec | None = None

    @property
    def scale(self) -> str:
        """Name of the view without its orientation: ``s448``, or ``s5250w518v126`` in windows."""
        windows = f"w{self.windows.side_px}v{self.windows.overlap_px}" if self.windows else ""
        return f"s{self.size_px}{windows}"

    @property
    def is_whole(self) -> bool:
        """Whether it shows all of the tile in its own colours; others are fixed views with stored parameters."""
        return self.crop is None and self.photometry is None

    @property
    def name(self) -> str:
        """Folder name: scale and orientation, for fixed views also 8 digits of the digest of their parameters."""
        fixed = "" if self.is_whole else "-" + digest_of(self.to_json())[:8]
        return f"{self.scale}o{self.orientation}{fixed}"


class EncodingSpec(_Spec):
    """How a float feature becomes stored bytes: a codec with its parameters, then perhaps a byte compressor."""

    LATER = frozenset({"compressor"})

    codec: str = "float16"
    parameters: dict[str, float | int | str] = Field(default_factory=dict)
    compressor: str = "none"

    def __hash__(self) -> int:
        return hash((self.codec, tuple(sorted(self.parameters.items())), self.compressor))


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

    @model_validator(mode="after")
    def _shows_the_tile(self) -> Self:
        (y, x), side = self.origin_tile_px, self.shown_px
        if max(y, x) + side > self.tile_px:
            raise ValueError(f"a crop of {side} px at ({y}, {x}) leaves the tile of {self.tile_px} px")
        return self

    @property
    def key(self) -> FeatureKey:
        return FeatureKey(teacher=self.teacher.name, view=self.view.name, layer=self.layer.name)

    @property
    def shown_px(self) -> int:
        """Side of the part of the tile that the view shows, in tile pixels."""
        return self.view.crop.side_px if self.view.crop else self.tile_px

    @property
    def origin_tile_px(self) -> tuple[int, int]:
        """Corner (y, x) of what the view shows, in tile pixels of the oriented frame; ``(0, 0)`` for whole tiles."""
        return (self.view.crop.y, self.view.crop.x) if self.view.crop else (0, 0)

    @property
    def stride_tile_px(self) -> float:
        """Distance of neighbouring token centres in tile pixels."""
        if self.teacher.pixel.align_corners and self.view.size_px != self.shown_px:
            return self.layer.stride_px * (self.shown_px - 1) / (self.view.size_px - 1)
        return self.layer.stride_px * self.shown_px / self.view.size_px

    @property
    def offset_tile_px(self) -> float:
        """Centre of token 0 in tile pixels, counted from ``origin_tile_px``, in the frame of the (oriented) view."""
        if self.teacher.pixel.align_corners and self.view.size_px != self.shown_px:
            return (self.layer.offset_px - 0.5) * (self.shown_px - 1) / (self.view.size_px - 1) + 0.5
        return self.layer.offset_px * self.shown_px / self.view.size_px

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
