"""Whether a store's teacher has the weights that a recipe asks for, by what is recorded: no weights are read here."""

from __future__ import annotations

from typing import Literal

from rsmtdf_cache.request import TeacherAsked
from rsmtdf_cache.specs import TeacherSpec

__all__ = ["compare_weights", "is_teacher", "weights_text"]


def is_teacher(asked: str, stored: str) -> bool:
    """Return whether the teacher asked for as ``asked`` is stored as ``stored``: ``timm:a.b`` as ``timm-a.b``."""
    return asked == stored or (asked.startswith("timm:") and f"timm-{asked[5:]}" == stored)


def weights_text(asked: TeacherAsked) -> str:
    """Return which weights are asked for, in the words of ``--teacher``."""
    if asked.pretrained == "none":
        return f"pretrained=none,seed={asked.seed}"
    return "its published weights" if asked.weights is None else f"weights={asked.weights}"


def compare_weights(asked: TeacherAsked, stored: TeacherSpec) -> Literal["same", "other", "unknown"]:
    """Return whether ``stored`` has the weights of ``asked``.

    Seeded weights are known by their seed. A weights file is known by its name, and under another name by its digest,
    if this machine computed it before. Weights from any other source are the published ones of their teacher; a file
    in place of them, or they in place of a file, may hold the same or not: ``unknown``.
    """
    origin = stored.weights_origin
    if asked.pretrained == "none":
        return "same" if origin == f"seed {asked.seed}" else "other"
    if origin.startswith("seed "):
        return "other"
    if asked.weights is None:
        return "unknown" if origin.startswith("file ") else "same"
    if origin == f"file {asked.weights.name}":
        return "same"
    from rsmtdf_cache.known_weights import known_digest

    digest = known_digest(asked.name, asked.weights)
    if digest is None:
        return "unknown"
    return "same" if digest == stored.weights else "other"
