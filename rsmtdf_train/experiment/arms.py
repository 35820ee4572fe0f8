"""The arms of an experiment: recipes that differ from one another in what is named, and in nothing else.

An arm is a few settings laid over one recipe. Data, split, geometry, steps, seeds and student are the recipe's in all
of them (decision 17). Titles are words for tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.recipe import Recipe

__all__ = ["ARMS", "Arm", "arm_recipe"]


@dataclass(frozen=True)
class Arm:
    """``settings`` replace keys of the recipe, whole sections where a section is named; None of them: as it is.

    ``control``: it ought not to win. ``random_teachers``: it reads a store of the same teachers with random weights.
    """

    title: str
    settings: Mapping[str, Any]
    control: bool = False
    random_teachers: bool = False

    @property
    def teaches(self) -> bool:
        """Whether any teacher is in it."""
        return self.settings.get("distill", True) is not None


_NO_TEACHER: Mapping[str, Any] = {"distill": None, "fuse": None, "privileged": None, "probe": None, "targets": "none"}
_PLAIN: Mapping[str, Any] = {"privileged": None, "probe": None}

#: By name, from the plainest on.
ARMS: dict[str, Arm] = {
    "supervised": Arm("supervised only", {**_NO_TEACHER, "method": "supervised"}),
    "fixmatch": Arm("FixMatch", _NO_TEACHER),
    "unimatch": Arm("two strong views, complementary dropout", {**_NO_TEACHER, "method": "unimatch"}),
    "online": Arm("FixMatch + online teachers, distilled", {**_PLAIN, "fuse": None, "targets": "online"}),
    "distilled": Arm("FixMatch + cached teachers, distilled", {**_PLAIN, "fuse": None}),
    "cached": Arm("FixMatch + cached teachers, distilled and fused", _PLAIN),
    "privileged": Arm("… and privileged pseudo-labels", {"probe": None, "privileged": {}}),
    "preset": Arm("the preset", {}),
    "random": Arm("control: the preset, teachers with random weights", {}, control=True, random_teachers=True),
    "shuffled": Arm("control: the preset, features of other tiles", {"distill.control": "shuffled"}, control=True),
}


def arm_recipe(recipe: Recipe, name: str) -> Recipe:
    """Return ``recipe`` as the arm called ``name`` trains it; all else is equal. Raises ``UsageError``."""
    if name not in ARMS:
        raise UsageError(f"arm {name!r}: choose from {', '.join(ARMS)}")
    arm = ARMS[name]
    if arm.teaches and recipe.distill is None:
        raise UsageError(f"recipe {recipe.name!r} has distill: false; the arm {name!r} needs it on")
    data = recipe.model_dump(mode="json")
    for key, value in arm.settings.items():
        section, _, leaf = key.partition(".")
        if leaf:
            data[section] = {**data[section], leaf: value}
        elif value == {}:
            data[section] = data[section] or {}  # on: as the recipe has it, or with its defaults
        else:
            data[section] = value
    return Recipe.model_validate(data)
