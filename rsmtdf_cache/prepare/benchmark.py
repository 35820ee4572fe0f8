"""What every benchmark is to the rest: its scenes, its classes, how labels are stored, what was published of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.prepare.labels import Labels
from rsmtdf_cache.prepare.member import Member
from rsmtdf_cache.sources.base import ClassInfo

__all__ = ["Benchmark", "Found", "Published", "Scene", "pair", "require_name", "single"]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,179}")


@dataclass(frozen=True)
class Scene:
    """One image with its labels. ``id`` is unique, ``names`` are those under which published lists know it.

    ``part`` is the official part (``Train``, ``Val``), where there is one; ``domain`` what subsets are stratified by.
    """

    id: str
    image: Member
    label: Member
    names: tuple[str, ...]
    part: str = ""
    domain: str = ""


@dataclass(frozen=True)
class Published:
    """Counts of the published protocol for 512-px tiles: scenes of each part, tiles by split, labelled tiles."""

    scenes: Mapping[str, int]
    tiles: Mapping[str, int]
    labeled: Mapping[str, int]


@dataclass(frozen=True)
class Found:
    """The scenes of a benchmark, sorted by id, and sentences on what was left out."""

    scenes: list[Scene]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. ``side_px`` is the side of its scenes; ``official_val``: its Val is not to be trained on.

    ``skip`` names inner archives that hold nothing of use; ``find`` picks the scenes out of all files and raises
    ``DataError`` when there are none or one lacks its partner.
    """

    name: str
    side_px: int
    classes: tuple[ClassInfo, ...]
    labels: Labels
    published: Published
    attribution: str
    skip: Callable[[str], bool]
    find: Callable[[Sequence[Member]], Found]
    official_val: bool = False


def require_name(name: str, member: Member) -> str:
    """Return ``name`` if tiles can be called by it. Raises ``DataError``: a scene is never left out for its name."""
    if _NAME.fullmatch(name) is None:
        raise DataError(
            f"{member.place}: tiles cannot be called {name!r}; rename image and label, with letters, digits, '_', '.' "
            "and '-' alone"
        )
    return name


def single(name: str, members: Sequence[Member], notes: list[str]) -> Member:
    """Return the file among ``members`` that lies in the fewest archives; what was unpacked beside them counts.

    Raises ``DataError`` when two lie equally deep, for nothing says which one is meant.
    """
    first, *others = sorted(members, key=lambda m: (m.depth, m.place))
    if others and others[0].depth == first.depth:
        raise DataError(f"{name} stands twice: {first.place} and {others[0].place}; give one of them alone")
    if others:
        notes.append(f"{first.name} is used, {others[0].name} is not: it is deeper in archives")
    return first


def pair(
    kind: str, images: Mapping[str, list[Member]], labels: Mapping[str, list[Member]], notes: list[str]
) -> dict[str, tuple[Member, Member]]:
    """Return image and label of each key, sorted by key. Raises ``DataError`` for one without the other."""
    bare, orphans = sorted(images.keys() - labels.keys()), sorted(labels.keys() - images.keys())
    if bare:
        place = images[bare[0]][0].place
        raise DataError(f"{kind}: image {place} has no label file ({len(bare)} such images); add it or take it away")
    if orphans:
        place = labels[orphans[0]][0].place
        raise DataError(f"{kind}: label file {place} has no image ({len(orphans)} such files); add it or take it away")
    return {
        key: (single(f"{kind} image {key}", images[key], notes), single(f"{kind} label {key}", labels[key], notes))
        for key in sorted(images)
    }
