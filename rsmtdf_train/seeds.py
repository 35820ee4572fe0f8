"""Seeds from names: what is random about a part of a run depends on the run's seed and on the part's own name."""

from __future__ import annotations

import hashlib

__all__ = ["seed_of", "step_seed"]

_STEP_PRIME = 1_000_003


def seed_of(seed: int, name: str) -> int:
    """Return a seed below 2**56 for the part called ``name`` of a run with ``seed``."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the seed of the random numbers inside the networks at ``step``: a function of position, not of history."""
    return (seed * _STEP_PRIME + step + rank * 2**40) % 2**63
