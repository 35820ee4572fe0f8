"""What decides a process's bits, as plain data: two processes whose fingerprints are equal write the same bytes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rsmtdf_cache
from rsmtdf_cache.encode import encode_shown
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.specs import NumericsProfile, ViewSpec, digest_of
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.upkeep.canary import profile_here
from rsmtdf_cache.work import Bench

__all__ = ["fingerprint_of", "settled", "unlike"]

#: Packages that compute, or turn files into networks and pixels into arrays.
_PACKAGES = ("rsmtdf", "torch", "torchvision", "timm", "open_clip_torch", "safetensors", "numpy")


def fingerprint_of(bench: Bench) -> dict[str, Any]:
    """Return versions, decoder, teachers, numerics, and what the teachers say of a made-up tile, as JSON data.

    A hash of bits is None where this process itself does not give the same bits twice (``settled``).
    """
    teachers = {t.spec.name: t for t in bench.teachers.values()}
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "source": _source_digest(),
        "decoder": bench.source.decoder,
        "teachers": {n: _told_apart(t) for n, t in sorted(teachers.items())},
        "numerics": {n: _numerics(profile, bench.teachers[n]) for n, profile in sorted(bench.profiles.items())},
        "bits": _bits(bench),
    }


def settled(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint that was taken twice in one process, without the bits that were not the same twice."""
    again = second["bits"]
    return {**first, "bits": {name: bits if again[name] == bits else None for name, bits in first["bits"].items()}}


def unlike(expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line for each leaf that differs: ``"versions.torch: '2.4.0' on the worker, '2.5.0' here"``."""
    lines: list[str] = []
    for name in sorted({*expected, *found}):
        mine, theirs = expected.get(name), found.get(name)
        if mine == theirs or (prefix == "bits." and mine is None):
            continue
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            lines += unlike(mine, theirs, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: {_short(theirs)} on the worker, {_short(mine)} here")
    return lines


def _short(value: object) -> str:
    return repr(value[:16] + "…") if isinstance(value, str) and len(value) == 64 else repr(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _source_digest() -> str:
    """Return a digest of this package's own source: between two releases its version says nothing."""
    root = Path(rsmtdf_cache.__file__).parent
    files = sorted(p for p in root.rglob("*.py"))
    return digest_of([[p.relative_to(root).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()] for p in files])


def _told_apart(teacher: Teacher) -> dict[str, Any]:
    told = teacher.spec.to_json()
    del told["weights_origin"], told["license"]  # for people; the digest of the weights counts
    return told


def _numerics(profile: NumericsProfile, teacher: Teacher) -> dict[str, Any]:
    """Return the profile as this process gives it: its device, its torch, the threads it really gets."""
    before = torch.get_num_threads()
    torch.set_num_threads(profile.threads)
    try:
        here = profile_here(profile, teacher)
        return here.model_copy(update={"threads": torch.get_num_threads()}).to_json()
    finally:
        torch.set_num_threads(before)


def _bits(bench: Bench) -> dict[str, str]:
    """Return ``{question: sha256}`` of a made-up tile's maps: one for each teacher, size, layers and numerics."""
    found: dict[str, str] = {}
    for name, profile in sorted(bench.profiles.items()):
        arrays, teacher = bench.ledger.sets[name].arrays, bench.teachers[name]
        view, shown, question = _asked(arrays, profile)
        if question not in found:
            layers = [s.layer.name for s in arrays.specs]
            raw = np.random.PCG64(0).random_raw(shown**2 * 3)
            tile = (raw >> np.uint64(56)).astype(np.uint8).reshape(shown, shown, 3)
            maps = encode_shown(teacher, view, layers, [tile], profile)
            found[question] = digest_of({n: hashlib.sha256(m.tobytes()).hexdigest() for n, m in maps.items()})
    return found


def _asked(arrays: ArraySet, profile: NumericsProfile) -> tuple[ViewSpec, int, str]:
    """Return the view to ask about (of a view in windows: one window), the side that it shows, the question's name."""
    spec = arrays.specs[0]
    side = spec.view.windows.side_px if spec.view.windows else spec.view.size_px
    shown = side if spec.view.windows else spec.shown_px
    layers = "+".join(s.layer.name for s in arrays.specs)
    numerics = f"{profile.precision}/{profile.threads}x{profile.micro_batch}"
    return ViewSpec(size_px=side, orientation=0), shown, f"{spec.teacher.name}/{shown}to{side}/{layers}/{numerics}"
