"""The sections of a recipe, each one value with its own rules. ``recipe.py`` puts them together and reads files.

Every default leaves a run as it was before the option came, so old recipes mean what they meant.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

__all__ = [
    "AugmentConfig",
    "BatchConfig",
    "DistillConfig",
    "EmaConfig",
    "FuseConfig",
    "OptimConfig",
    "PrivilegedConfig",
    "ProbeConfig",
    "SECTIONS",
    "Section",
    "StudentConfig",
    "SupervisedConfig",
    "ValidationConfig",
]

_Patterns = TypeVar("_Patterns", tuple[str, ...], dict[str, float], dict[str, int])


class Section(BaseModel):
    """Frozen, without unknown keys, and without numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StudentConfig(Section):
    """``encoder``: any timm encoder (``timm:NAME`` or ``NAME``), or ``dinov2_vits14``.

    Decoders: ``fpn``, ``dpt``, and ``smp:NAME`` for those of segmentation_models_pytorch (extra ``smp``).
    """

    encoder: str = "timm:mobilenetv3_small_050"
    decoder: str = Field(default="fpn", pattern=r"^(fpn|dpt|smp:[a-z0-9+]+)$")
    channels: int = Field(default=64, gt=0, description="width of the decoder")
    pretrained: bool = Field(default=False, description="start from the encoder's published weights")
    weights: Path | None = Field(default=None, description="encoder weights file, for machines without a hub")
    positions: Literal["antialiased", "released"] = Field(
        default="antialiased", description="how a ViT's position embedding is resampled for other sizes"
    )
    odd_sizes: Literal["pad", "resize"] = Field(
        default="pad",
        description="images whose sides are no multiple of the student's stride: repeat their edges, or resize them to "
        "the nearest multiple and the logits back (RS-MTDF)",
    )


class BatchConfig(Section):
    """Crops per step, over all processes and parts: neither changes which crops a step sees."""

    labeled: int = Field(default=8, gt=0)
    unlabeled: int = Field(default=8, ge=0)
    accumulate: int = Field(default=1, gt=0, description="parts in which a process computes its share of a step")


class OptimConfig(Section):
    """AdamW with polynomial or cosine decay after a linear warm-up; learning rates per parameter group."""

    lr: float = Field(default=1e-3, gt=0)
    encoder_lr: float | None = Field(default=None, gt=0, description="default: lr")
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup_steps: int = Field(default=0, ge=0)
    schedule_lag: int = Field(
        default=0, ge=0, description="steps the decay runs behind; RS-MTDF sets the rate after a step: 1"
    )
    clip_norm: float | None = Field(default=None, gt=0)


class EmaConfig(Section):
    """EMA teacher of FixMatch: decay ``min(1 - 1 / (step + 1), decay)``."""

    decay: float = Field(default=0.996, ge=0, lt=1)


class AugmentConfig(Section):
    """Photometric changes touch the student's strong view only; geometry is shared with label and features.

    ``lattice``: crops on the token lattice, in orientations whose features are stored. ``native``: the tile scaled by
    ``scale``, padded to the right and below, cropped anywhere, mirrored with probability 0.5 (RS-MTDF): no stored
    feature fits such a crop, so it goes with online targets or none. ``fixed-views``: turn and crop of one of the
    store's fixed views; of ``targets: fixed-views``, and of its paired baseline.
    """

    geometry: Literal["lattice", "native", "fixed-views"] = "lattice"
    scale: tuple[float, float] = Field(default=(0.5, 2.0), description="of native geometry: least and largest zoom")
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
        if self.approximate_orientations and self.geometry != "lattice":
            raise ValueError(f"approximate_orientations is of geometry lattice; {self.geometry} has no use for it")
        if self.geometry == "fixed-views" and not self.orientations:
            raise ValueError("fixed views come in the orientations they were stored in; orientations cannot be false")
        if self.geometry != "native" and self.scale != (0.5, 2.0):
            raise ValueError(f"scale is of geometry native; {self.geometry} zooms nothing")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: write two numbers above 0, the smaller one first")
        return self


class SupervisedConfig(Section):
    """The loss on labelled crops. OHEM keeps the pixels the student gets wrong or is unsure of (Shrivastava 2016)."""

    loss: Literal["ce", "ohem", "dice", "ce+dice"] = "ce"
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = Field(
        default="none", description="balanced: by the inverse square root of each class's share of labelled pixels"
    )
    ohem_threshold: float = Field(default=0.7, gt=0, le=1, description="probability of the label below which it counts")
    ohem_least: float = Field(default=1 / 16, gt=0, le=1, description="share of the labelled pixels kept at least")


class DistillConfig(Section):
    """Distillation of standardised cached features into translated student features.

    ``view: strong`` (RS-MTDF): labelled and strong, CutMixed crops. ``weak``: labelled and weak crops, photometrically
    what the teachers saw; one more pass of the student's encoder.
    """

    weight: float = Field(default=1.0, ge=0)
    loss: Literal["mse", "cosine_smooth_l1"] = "cosine_smooth_l1"
    standardize: bool = Field(default=True, description="by the mean and deviation of each channel; false: as they are")
    space: Literal["channels", "stored"] = Field(
        default="channels",
        description="stored: pcaK-int8 features are distilled in their K components, at a cost that no teacher's width "
        "changes",
    )
    padding: bool = Field(default=False, description="distil padded tokens too, as RS-MTDF does")
    view: Literal["strong", "weak"] = Field(
        default="strong",
        description="unlabelled view that is distilled: the student's own input, or what the teacher saw",
    )
    keys: tuple[str, ...] = Field(
        default=(), description="glob patterns of teacher/size/layer; empty = all in the store"
    )
    weights: dict[str, NonNegativeFloat] = Field(default_factory=dict, description="per glob pattern; default 1 each")
    hidden: int = Field(default=256, gt=0, description="width of a translator's hidden layer")
    translator: Literal["linear", "mlp", "conv"] = "mlp"
    activation: Literal["gelu", "relu"] = "gelu"
    passes: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="per pattern: side in pixels of a second pass of the student, whose last map is translated "
        "(RS-MTDF: 224 for CLIP)",
    )
    control: Literal["none", "shuffled"] = Field(
        default="none", description="shuffled: every tile is given the features of another one, for controls"
    )
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

    @field_validator("keys", "weights", "passes")
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

    @model_validator(mode="after")
    def _components_are_of_standardised_channels(self) -> Self:
        if self.space == "stored" and not self.standardize:
            raise ValueError(
                "space stored distils principal components of standardised channels; it does not go with "
                "standardize: false"
            )
        return self

    @field_validator("pins")
    @classmethod
    def _pins_name_digests(cls, pins: dict[str, str]) -> dict[str, str]:
        for key, digest in pins.items():
            if key.count("/") != 2:
                raise ValueError(f"{key!r}: write teacher/view/layer or teacher/size/layer")
            if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
                raise ValueError(f"{key}: {digest!r} is no digest; write 8 to 64 of its hex digits, in quotes")
        return pins


class FuseConfig(Section):
    """Translations, projected back, join decoder inputs: ``(1 - share) s + share * mean(projections)``."""

    share: float = Field(default=0.2, ge=0, le=1)
    gate: Literal["fixed", "learned"] = Field(
        default="fixed",
        description="learned: each teacher's part is a number of its own, at first share / teachers",
    )
    at: tuple[int, ...] = Field(
        default=(-1,), min_length=1, description="inputs of the decoder: 0 the shallowest, -1 the last"
    )
    drop: float = Field(
        default=0.0, ge=0, lt=1, description="probability that a teacher is left out of a crop's fusion in training"
    )

    @field_validator("at", mode="before")
    @classmethod
    def _one_input_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value


class PrivilegedConfig(Section):
    """The labeller sees what the teachers really said of the weak view, where the student fuses its translations.

    The deployed student never does. ``aux_weight``: weight of a second supervised loss of the labelled crops, with true
    features in place of translations, so that decoder and projections know both.
    """

    aux_weight: float = Field(default=0.5, ge=0)


class ProbeConfig(Section):
    """A head on cached features of the labelled tiles, trained in seconds, labels unlabelled crops at first.

    Its probabilities alone count up to ``hold`` (share of the steps), then they blend linearly into the EMA's up to
    ``until``.
    """

    hold: float = Field(default=0.2, ge=0, le=1)
    until: float = Field(default=0.6, gt=0, le=1)
    inputs: Literal["auto", "features", "color", "both"] = Field(
        default="both",
        description="what it sees: stored features, local colour (means and deviations at several sizes), both; auto: "
        "what predicts labelled tiles best that it was not fitted to",
    )
    keys: tuple[str, ...] = Field(default=(), description="patterns of the targets it reads; empty = all")
    hidden: int = Field(default=0, ge=0, le=4096, description="width of a hidden layer; 0: linear")
    steps: int = Field(default=40, gt=0, le=10_000, description="iterations of LBFGS")
    weight_decay: float = Field(default=0.001, ge=0, description="L2 penalty of a weight on a map's mean channel")

    @model_validator(mode="after")
    def _holds_before_it_ends(self) -> Self:
        if self.hold > self.until:
            raise ValueError(f"hold {self.hold:g} is after until {self.until:g}; both are shares of the steps")
        return self


class ValidationConfig(Section):
    """Scores on ``split`` while training. ``keep: best`` deploys the weights that scored best ``by`` mean IoU."""

    split: str = "val"
    every: int | Literal["epoch"] = Field(default=0, description="steps between two scores; 0: never")
    by: Literal["ema", "student"] = "ema"
    keep: Literal["last", "best"] = "last"
    patience: int | None = Field(default=None, gt=0, description="stop after this many scores without a better one")

    @model_validator(mode="after")
    def _looks_before_it_chooses(self) -> Self:
        if self.every == 0 and (self.keep == "best" or self.patience is not None):
            raise ValueError("keep: best and patience need scores; set validation.every to a number of steps, or epoch")
        if isinstance(self.every, int) and self.every < 0:
            raise ValueError(f"every {self.every}: choose a number of steps, 0 or epoch")
        return self


#: Section of a recipe by its key.
SECTIONS: dict[str, type[Section]] = {
    "student": StudentConfig,
    "batch": BatchConfig,
    "optim": OptimConfig,
    "ema": EmaConfig,
    "augment": AugmentConfig,
    "supervised": SupervisedConfig,
    "distill": DistillConfig,
    "fuse": FuseConfig,
    "privileged": PrivilegedConfig,
    "probe": ProbeConfig,
    "validation": ValidationConfig,
}
