"""Teachers by name. Importing this package imports no network library; ``load`` imports the one family it needs."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.plugins import find

if TYPE_CHECKING:
    import torch

    from rsmtdf_cache.teachers.base import Teacher, TeacherRequest

__all__ = ["load", "names"]

#: Name -> module of its family. Names live here, so that listing them imports nothing.
_FAMILIES: dict[str, str] = {
    **{f"dinov2_{size}{reg}": "dinov2" for size in ("vits14", "vitb14", "vitl14", "vitg14") for reg in ("", "_reg")},
    **{f"dinov2_{size}_paper": "dinov2" for size in ("vits14", "vitb14", "vitl14", "vitg14")},
    **{f"clip_{size}": "clip" for size in ("vitb16", "vitb32", "vitl14", "vitl14_336", "vitl14_paper")},
    **{f"clip_{size}_laion": "clip" for size in ("vitb16", "vitb32", "vitl14", "vith14", "vitg14", "vitbigg14")},
    **{f"efficientnet_{size}": "sample_weights" for size in ("lite0", "lite2")},
}


def names() -> list[str]:
    """Return the sorted names of all teachers, those of other packages included; ``timm:NAME`` comes on top."""
    return sorted({*_FAMILIES, *(point.name for point in entry_points(group="rsmtdf.teachers"))})


def load(request: TeacherRequest, device: str | torch.device = "cpu") -> Teacher:
    """Return the frozen teacher ``request`` asks for, on ``device``.

    A teacher of another package is an entry point of the group ``rsmtdf.teachers``: a callable
    ``(request, device) -> Teacher``. The global random state stays as it was. Raises ``UsageError`` for an unknown
    name or layer, ``ResourceError`` for weights or a device that cannot be had, ``MismatchError`` for weights that do
    not fit.
    """
    name = request.name
    family = "timm_any" if name.startswith("timm:") else _FAMILIES.get(name)
    if family is None and name not in names():
        raise UsageError(
            f"unknown teacher {name!r}.{did_you_mean(name, names())} "
            f"Known: {', '.join(names())}, and timm:NAME for any timm encoder"
        )
    from rsmtdf_cache.teachers._weights import usable_device

    plugin = find("teachers", family or name)
    teacher: Teacher = (plugin.load if family else plugin)(request, usable_device(device))
    return teacher
