"""Which micro-batch a machine can take: one that fits its memory, and in which a tile's bits have no place.

Asked of the machine, before the first shard.

A tile has the same features wherever it stands in a dataset only if it has them at every place of a micro-batch. Most
kernels promise that, some do not: with two threads, MKL multiplies matrices of 5 to 11 rows by other code near the end
than at the beginning, so that a small transformer's features differed in the seventh digit by place.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from rsmtdf_cache.encode import encode_shown
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.specs import NumericsProfile
from rsmtdf_cache.teachers.base import Teacher

__all__ = ["bits_depend_on_place", "steady_profile"]

#: What was found for a teacher, by all that the answer depends on: eight orientations are one question.
_known: weakref.WeakKeyDictionary[Teacher, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()


def steady_profile(
    profile: NumericsProfile, teacher: Teacher, arrays: ArraySet, fixed: bool, on_event: EventSink = ignore_events
) -> NumericsProfile:
    """Return the numerics for a new array set: ``profile``, tile by tile where its micro-batch is not steady.

    A micro-batch that does not fit the device's memory is halved until it does. ``fixed``: the user chose the
    micro-batch, so it stays, with a warning, or raises torch's ``OutOfMemoryError``.
    """
    while True:
        try:
            if not bits_depend_on_place(profile, teacher, arrays):
                return profile
            break
        except torch.cuda.OutOfMemoryError:
            if fixed or profile.micro_batch == 1:
                raise
            half = profile.micro_batch // 2
        torch.cuda.empty_cache()  # nothing where there is no GPU
        on_event(Warned(
            f"{arrays.label}: a micro-batch of {profile.micro_batch} tiles does not fit on {profile.device}; "
            f"{half} are tried"
        ))  # fmt: skip
        profile = profile.model_copy(update={"micro_batch": half})
    found = (
        f"{arrays.label}: on this machine the bits of a tile depend on its place in a micro-batch of "
        f"{profile.micro_batch} with {profile.threads} threads"
    )
    if fixed:
        on_event(Warned(f"{found}; leave --micro-batch out, or set it to 1, to make them a function of the tile alone"))
        return profile
    on_event(Warned(f"{found}; tiles are encoded one by one"))
    return profile.model_copy(update={"micro_batch": 1})


def bits_depend_on_place(profile: NumericsProfile, teacher: Teacher, arrays: ArraySet) -> bool:
    """Encode one made-up tile at every place of a micro-batch and tell whether any map differs.

    A view in windows is spared: its micro-batches hold one tile's windows, always at the same places.
    """
    spec = arrays.specs[0]
    if profile.micro_batch == 1 or spec.view.windows is not None:
        return False
    layers = [s.layer.name for s in arrays.specs]
    known, question = _known.setdefault(teacher, {}), (spec.view.size_px, spec.shown_px, tuple(layers), profile)
    if question not in known:
        known[question] = _differs(profile, teacher, arrays, layers)
    return known[question]


def _differs(profile: NumericsProfile, teacher: Teacher, arrays: ArraySet, layers: list[str]) -> bool:
    spec = arrays.specs[0]
    raw = np.random.PCG64(0).random_raw(spec.shown_px**2 * 3)
    tile = (raw >> np.uint64(56)).astype(np.uint8).reshape(spec.shown_px, spec.shown_px, 3)
    maps = encode_shown(teacher, spec.view, layers, [tile] * profile.micro_batch, profile)
    return any(place.tobytes() != m[0].tobytes() for m in maps.values() for place in m[1:])
