"""A run as one validated value. A recipe is a YAML file; ``--set key=value`` overrides a (dotted) key of it.

``preset: NAME`` in a file (or ``--set preset=NAME``) starts from a recipe of ``rsmtdf_train/presets``; the file's own
keys are laid over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import Traversable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.request import parse_teacher
from rsmtdf_cache.yaml_file import read_yaml
from rsmtdf_train.sections import (
    SECTIONS,
    AugmentConfig,
    BatchConfig,
    DistillConfig,
    EmaConfig,
    FuseConfig,
    OptimConfig,
    PrivilegedConfig,
    ProbeConfig,
    Section,
    StudentConfig,
    SupervisedConfig,
    ValidationConfig,
)

__all__ = ["Recipe", "load_recipe", "preset_names"]

_STEPS = 400
#: More are a slip of the keyboard.
_STEPS_MAX = 10**9

_TARGETS = r"^(cached|fixed-views|online|none|mixed\((0(\.\d+)?|1(\.0+)?)\))$"


class Recipe(Section):
    """Everything that decides a run, given the data and the store.

    ``targets``: ``cached`` (stored views, crops on the lattice), ``fixed-views`` (stored random views), ``online`` (the
    teachers run on the student's own crops), ``mixed(p)`` (online with probability p, else cached), ``none``.
    """

    name: str = "run"
    data: Path
    labeled: str = Field(default="5", description="labelled subset of the train split: 5 = splits/labeled/5.txt")
    unlabeled: Literal["all", "rest"] = Field(
        default="all", description="unlabelled crops come from all train tiles, or from those that are not labelled"
    )
    eval_split: str = "test"
    steps: int | None = Field(
        default=None, gt=0, le=_STEPS_MAX, description="optimiser steps; default 400, or what epochs come to"
    )
    epochs: float | None = Field(
        default=None, gt=0, le=_STEPS_MAX, description="rounds over the unlabelled tiles, instead of steps"
    )
    seed: int = Field(default=0, ge=0)
    method: Literal["supervised", "fixmatch", "unimatch-v1", "unimatch"] = "fixmatch"
    targets: str = Field(default="cached", pattern=_TARGETS)
    crop_px: int = Field(default=128, gt=0)
    batch: BatchConfig = BatchConfig()
    student: StudentConfig = StudentConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    augment: AugmentConfig = AugmentConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    threshold: float = Field(default=0.95, ge=0, le=1, description="confidence above which a pseudo-label counts")
    unlabeled_weight: float = Field(default=1.0, ge=0)
    distill: DistillConfig | None = DistillConfig()
    fuse: FuseConfig | None = FuseConfig()
    privileged: PrivilegedConfig | None = None
    probe: ProbeConfig | None = None
    objective: Literal["sum", "mean"] = Field(
        default="sum", description="of the weighted terms: labelled, unlabelled, distillation (RS-MTDF: mean)"
    )
    teachers: tuple[str, ...] = Field(
        default=(), description="--teacher of `cache build`: what a store of this recipe holds; reads no teacher"
    )
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = Field(default=False, description="torch.compile of the student")
    channels_last: bool = Field(default=False, description="memory format of images and convolutions")
    checkpoint_every: int = Field(default=200, gt=0)
    validation: ValidationConfig = ValidationConfig()
    drift_every: int = Field(
        default=0, ge=0, description="steps between two comparisons of stored targets with the live teacher; 0: never"
    )

    @property
    def strong_views(self) -> int:
        """Strong views of each unlabelled crop."""
        return {"supervised": 0, "fixmatch": 1}.get(self.method, 2)

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

    @field_validator("distill", "fuse", "privileged", "probe", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        if value is True:
            return {}
        return None if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _off_means_off(cls, data: object) -> object:
        """``targets: none`` turns off all that reads features, and without distillation there is nothing to fuse."""
        if isinstance(data, dict):
            data = dict(data)
            if data.get("steps") is None and data.get("epochs") is None:
                data["steps"] = _STEPS
            if data.get("targets") == "fixed-views" and isinstance(augment := data.get("augment", {}), dict):
                data["augment"] = {"geometry": "fixed-views", **augment}  # stays when distillation goes
            if data.get("targets") == "none":
                data |= {"distill": None, "probe": None, "privileged": None}
            if "distill" in data and data["distill"] in (False, None):
                data["fuse"] = None
                if data.get("probe") in (False, None):
                    data["targets"] = "none"
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method != "supervised" and self.batch.unlabeled == 0:
            raise ValueError(f"method {self.method} needs batch.unlabeled > 0")
        fixed = self.augment.geometry == "fixed-views"
        if fixed != (self.targets == "fixed-views") and not (fixed and self.targets == "none"):
            raise ValueError(
                f"targets {self.targets} does not go with augment.geometry {self.augment.geometry}: the crops of fixed "
                "views are for targets fixed-views (which needs them) and for none, its baseline"
            )
        if self.augment.geometry == "native" and self.targets not in ("online", "none"):
            raise ValueError(
                f"augment.geometry native cuts crops that no stored feature fits; targets {self.targets} needs lattice"
            )
        if self.privileged is not None and (self.fuse is None or self.method == "supervised"):
            raise ValueError("privileged pseudo-labels need fuse, and a method with pseudo-labels")
        if self.probe is not None and self.method == "supervised":
            raise ValueError("probe labels unlabelled crops; method supervised has none")
        if self.online_share > 0 and self.distill is None:
            raise ValueError(f"targets {self.targets} runs teachers for distillation, and distill is off")
        if self.distill is not None and self.distill.space == "stored" and self.online_share > 0:
            raise ValueError(
                f"distill.space stored reads components from a store; the teachers of targets {self.targets} speak in "
                "channels"
            )
        for name in ("privileged", "probe"):
            if getattr(self, name) is not None and self.targets in ("online", "none"):
                raise ValueError(f"{name} reads stored features; targets {self.targets} has none")
        return self

    @property
    def online_share(self) -> float:
        """Return the probability that a step's targets come from live teachers."""
        if self.targets.startswith("mixed"):
            return float(self.targets[len("mixed(") : -1])
        return 1.0 if self.targets == "online" else 0.0

    @property
    def total_steps(self) -> int:
        """Return the number of optimiser steps. Raises ``ValueError`` for epochs that ``resolved`` has not counted."""
        if self.steps is None:
            raise ValueError("epochs are not counted yet; call resolved(tiles)")
        return self.steps

    def resolved(self, unlabeled_tiles: int) -> Recipe:
        """Return the recipe with its number of steps: an epoch is one round over the unlabelled tiles (whole batches).

        Supervised training counts rounds over the labelled tiles; the caller gives their number. Raises ``UsageError``
        when the recipe says another number of steps.
        """
        if self.epochs is None:
            return self
        size = self.batch.labeled if self.method == "supervised" else self.batch.unlabeled
        steps = max(1, round(self.epochs * max(1, unlabeled_tiles // size)))
        if self.steps not in (None, steps):
            raise UsageError(
                f"recipe {self.name}: epochs {self.epochs:g} of {unlabeled_tiles} tiles are {steps} steps, and steps "
                f"says {self.steps}; write one of them"
            )
        return self.model_copy(update={"steps": steps})

    def is_met_by(self, run: Recipe) -> bool:
        """Return whether ``run``, a recipe whose steps are counted, is this one."""
        return run == (self if self.steps is not None else self.model_copy(update={"steps": run.steps}))

    def without_distillation(self) -> Recipe:
        """Return the paired baseline: the same recipe with no teacher in any form."""
        off = {"distill": None, "fuse": None, "privileged": None, "probe": None}
        return self.model_copy(update={**off, "targets": "none"})

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
    data = _over_preset(data, f"recipe {path}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error))
        raise UsageError(f"recipe {path}:\n{lines}") from None


def preset_names() -> list[str]:
    """Return the names of the bundled presets."""
    return sorted(f.name.removesuffix(".yaml") for f in _presets().iterdir() if f.name.endswith(".yaml"))


def _presets() -> Traversable:
    return files("rsmtdf_train").joinpath("presets")


def _over_preset(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return ``data`` laid over the preset it names, key by key in its sections; presets may name one themselves."""
    name = data.pop("preset", None)
    if name is None:
        return data
    if name not in preset_names():
        raise UsageError(
            f"{where}: preset {name!r} is unknown.{did_you_mean(str(name), preset_names())} "
            f"Known: {', '.join(preset_names())}"
        )
    below = yaml.safe_load(_presets().joinpath(f"{name}.yaml").read_text())
    return _merged(_over_preset(below, f"preset {name}"), data)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        there = result.get(key)
        if isinstance(there, dict) and value is True:
            continue  # on: as the preset has it
        if isinstance(there, dict) and key == "student" and isinstance(value, str):
            value = {"encoder": value}
        # patterns of keys belong together: a recipe's own weights replace the preset's, they do not join them
        result[key] = {**there, **value} if isinstance(there, dict) and isinstance(value, dict) else value
    return result


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
        here[leaf] = text.strip("\"' ") if name == "labeled" else yaml.safe_load(text)  # 010 is a name, not 8
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
                f"{name}: {fault['msg']}" + ("" if isinstance(fault["input"], dict) else f" (found {fault['input']!r})")
                if fault["type"] != "missing"
                else f"{name}: missing"
            )


def _keys_at(path: Sequence[str]) -> Mapping[str, Any]:
    section = SECTIONS.get(path[0]) if path else Recipe
    return section.model_fields if section is not None else {}
