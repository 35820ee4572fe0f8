"""A run as one validated value. A recipe is a YAML file; ``--set key=value`` overrides a (dotted) key of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.request import parse_teacher
from rsmtdf_cache.yaml_file import read_yaml

__all__ = [
    "AugmentConfig",
    "BatchConfig",
    "DistillConfig",
    "EmaConfig",
    "FuseConfig",
    "OptimConfig",
    "Recipe",
    "StudentConfig",
    "load_recipe",
]


_Patterns = TypeVar("_Patterns", tuple[str, ...], dict[str, float])


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudentConfig(_Config):
    """``encoder``: any timm encoder (``timm:NAME`` or ``NAME``), or ``dinov2_vits14``. Decoders: ``fpn``, ``dpt``."""

    encoder: str = "timm:mobilenetv3_small_050"
    decoder: Literal["fpn", "dpt"] = "fpn"
    channels: int = Field(default=64, gt=0, description="width of the decoder")
    pretrained: bool = Field(default=False, description="start from the encoder's published weights")
    weights: Path | None = Field(default=None, description="encoder weights file, for machines without a hub")
    positions: Literal["antialiased", "released"] = Field(
        default="antialiased", description="how a ViT's position embedding is resampled for other sizes"
    )


class BatchConfig(_Config):
    """Crops per step."""

    labeled: int = Field(default=8, gt=0)
    unlabeled: int = Field(default=8, ge=0)


class OptimConfig(_Config):
    """AdamW with polynomial or cosine decay after a linear warm-up; learning rates per parameter group."""

    lr: float = Field(default=1e-3, gt=0)
    encoder_lr: float | None = Field(default=None, gt=0, description="default: lr")
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup_steps: int = Field(default=0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)


class EmaConfig(_Config):
    """EMA teacher of FixMatch: decay ``min(1 - 1 / (step + 1), decay)``."""

    decay: float = Field(default=0.996, ge=0, lt=1)


class AugmentConfig(_Config):
    """Photometric changes touch the student's strong view only; geometry is shared with label and features."""

    orientations: bool = Field(default=True, description="draw one of the orientations the store holds (or all of D4)")
    approximate_orientations: bool = Field(
        default=False, description="draw all eight; features of those not stored are turned maps of stored ones"
    )
    jitter: float = Field(default=0.5, ge=0, le=1, description="brightness, contrast, saturation; hue is half of it")
    jitter_p: float = Field(default=0.8, ge=0, le=1)
    gray_p: float = Field(default=0.2, ge=0, le=1)
    blur_p: float = Field(default=0.5, ge=0, le=1)
    cutmix_p: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _approximates_what_it_draws(self) -> Self:
        if self.approximate_orientations and not self.orientations:
            raise ValueError("approximate_orientations draws all orientations, and orientations is false; set one")
        return self


class DistillConfig(_Config):
    """Distillation of standardised cached features into translated student features.

    ``view: strong`` (RS-MTDF): labelled and strong, CutMixed crops. ``weak``: labelled and weak crops, photometrically
    what the teachers saw; one more pass of the student's encoder.
    """

    weight: float = Field(default=1.0, ge=0)
    loss: Literal["mse", "cosine_smooth_l1"] = "cosine_smooth_l1"
    view: Literal["strong", "weak"] = Field(
        default="strong",
        description="unlabelled view that is distilled: the student's own input, or what the teacher saw",
    )
    keys: tuple[str, ...] = Field(
        default=(), description="glob patterns of teacher/size/layer; empty = all in the store"
    )
    weights: dict[str, float] = Field(default_factory=dict, description="per glob pattern; default 1 each")
    hidden: int = Field(default=256, gt=0, description="width of a translator's hidden layer")
    decay_to: float = Field(default=1.0, ge=0, description="factor of the weight at the last step, linear in between")
    only_steps: int = Field(default=0, ge=0, description="first steps with distillation alone, before any segmentation")
    pins: dict[str, str] = Field(
        default_factory=dict,
        description="digest (8 or more hex digits) the store must have, by teacher/view/layer or teacher/size/layer",
    )

    @field_validator("keys", mode="before")
    @classmethod
    def _one_pattern_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("keys", "weights")
    @classmethod
    def _patterns_name_targets(cls, patterns: _Patterns) -> _Patterns:
        for pattern in patterns:
            view = pattern.split("/")[1] if pattern.count("/") == 2 else ""
            if turned := re.fullmatch(r"(s[^o]*)o[^o]*", view):  # no teacher/size/layer has an o there
                teacher, _, layer = pattern.split("/")
                raise ValueError(
                    f"{pattern!r} names an orientation, which training draws itself: "
                    f"write '{teacher}/{turned[1]}/{layer}'"
                )
        return patterns

    @field_validator("pins")
    @classmethod
    def _pins_name_digests(cls, pins: dict[str, str]) -> dict[str, str]:
        for key, digest in pins.items():
            if key.count("/") != 2:
                raise ValueError(f"{key!r}: write teacher/view/layer or teacher/size/layer")
            if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
                raise ValueError(f"{key}: {digest!r} is no digest; write 8 to 64 of its hex digits, in quotes")
        return pins


class FuseConfig(_Config):
    """Translations, projected back, join the last decoder input: ``(1 - share) s + share * mean(projections)``."""

    share: float = Field(default=0.2, ge=0, le=1)


class Recipe(_Config):
    """Everything that decides a run, given the data and the store."""

    name: str = "run"
    data: Path
    labeled: str = Field(default="5", description="labelled subset of the train split: 5 = splits/labeled/5.txt")
    eval_split: str = "test"
    steps: int = Field(default=400, gt=0)
    seed: int = Field(default=0, ge=0)
    method: Literal["supervised", "fixmatch"] = "fixmatch"
    targets: Literal["cached", "none"] = "cached"
    crop_px: int = Field(default=128, gt=0)
    batch: BatchConfig = BatchConfig()
    student: StudentConfig = StudentConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    augment: AugmentConfig = AugmentConfig()
    threshold: float = Field(default=0.95, ge=0, le=1, description="confidence above which a pseudo-label counts")
    unlabeled_weight: float = Field(default=1.0, ge=0)
    distill: DistillConfig | None = DistillConfig()
    fuse: FuseConfig | None = FuseConfig()
    teachers: tuple[str, ...] = Field(
        default=(), description="--teacher of `cache build`: what a store of this recipe holds; reads no teacher"
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = Field(default=200, gt=0)

    @field_validator("labeled", mode="before")
    @classmethod
    def _labeled_is_a_name(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value

    @field_validator("teachers", mode="before")
    @classmethod
    def _one_teacher_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("teachers")
    @classmethod
    def _teachers_can_be_asked_for(cls, teachers: tuple[str, ...]) -> tuple[str, ...]:
        for text in teachers:
            try:
                parse_teacher(text)
            except UsageError as error:
                raise ValueError(str(error)) from None
        return teachers

    @field_validator("student", mode="before")
    @classmethod
    def _student_by_name(cls, value: object) -> object:
        return {"encoder": value} if isinstance(value, str) else value

    @field_validator("distill", "fuse", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        if value is True:
            return {}
        return None if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _off_means_off(cls, data: object) -> object:
        """``targets: none`` turns distillation off, and without distillation there is nothing to fuse."""
        if isinstance(data, dict):
            data = dict(data)
            if data.get("targets") == "none":
                data["distill"] = None
            if "distill" in data and data["distill"] in (False, None):
                data["fuse"] = None
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "fixmatch" and self.batch.unlabeled == 0:
            raise ValueError("method fixmatch needs batch.unlabeled > 0")
        return self

    def without_distillation(self) -> Recipe:
        """Return the paired baseline: the same recipe with neither distillation nor fusion."""
        return self.model_copy(update={"distill": None, "fuse": None, "targets": "none"})

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML text that ``load_recipe`` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in ``path`` with ``overrides`` (``"optim.lr=0.001"``) applied.

    A relative ``data`` folder is relative to the working directory. Raises ``UsageError`` for a missing or malformed
    file, an unknown key (with "did you mean"), a value of the wrong type or range.
    """
    data = read_yaml(path, "recipe")
    for item in overrides:
        _override(data, item)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error))
        raise UsageError(f"recipe {path}:\n{lines}") from None


def _override(data: dict[str, Any], item: str) -> None:
    name, sign, text = item.partition("=")
    if not sign or not name:
        raise UsageError(f"--set {item!r}: write key=value, e.g. --set optim.lr=0.001")
    *parents, leaf = name.split(".")
    here = data
    for parent in parents:
        below = here.get(parent)
        if below is None or below is True:
            below = here[parent] = {}
        elif isinstance(below, str) and parent == "student":
            below = here[parent] = {"encoder": below}
        if not isinstance(below, dict):
            raise UsageError(f"--set {item!r}: {parent!r} is {below!r} in the recipe, it has no keys to set")
        here = below
    try:
        here[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {item!r}: the value is not YAML ({error})") from None


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        where = [str(part) for part in fault["loc"]]
        name = ".".join(where) or "recipe"
        if fault["type"] == "extra_forbidden":
            known = _keys_at(where[:-1])
            yield f"{name}: unknown key.{did_you_mean(where[-1], known)} Known: {', '.join(sorted(known))}"
        else:
            yield (
                f"{name}: {fault['msg']} (found {fault['input']!r})"
                if fault["type"] != "missing"
                else f"{name}: missing"
            )


def _keys_at(path: Sequence[str]) -> Mapping[str, Any]:
    sections: dict[str, type[BaseModel]] = {
        "student": StudentConfig, "batch": BatchConfig, "optim": OptimConfig, "ema": EmaConfig,
        "augment": AugmentConfig, "distill": DistillConfig, "fuse": FuseConfig,
    }  # fmt: skip
    section = sections.get(path[0]) if path else Recipe
    return section.model_fields if section is not None else {}
