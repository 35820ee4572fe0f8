"""What a snapshot holds, as a value: which tile segments, which units of which array sets, which of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Content"]


@dataclass(frozen=True)
class Content:
    """A selection of a ledger's records. The root hash over what it selects is the snapshot.

    ``tiles``: first rows of the tile segments. ``units``: set id → row group → generation. ``layers``: set id → the
    layers that are there (others of the set were dropped, or never pulled).
    """

    tiles: tuple[int, ...]
    units: Mapping[str, Mapping[int, int]]
    layers: Mapping[str, tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; runs of row groups are written as ``[first, last, generation]``."""
        return {
            "tiles": list(self.tiles),
            "units": {name: _runs(sorted(units.items())) for name, units in sorted(self.units.items())},
            "layers": {name: sorted(layers) for name, layers in sorted(self.layers.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Content:
        """Return the value of plain JSON data. Raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        units: dict[str, dict[int, int]] = {}
        for name, runs in data["units"].items():
            units[str(name)] = {}
            for first, last, generation in runs:
                if not 0 <= first <= last < first + 2**24:
                    raise ValueError(f"row groups {first} to {last}")
                units[str(name)] |= dict.fromkeys(range(first, last + 1), int(generation))
        layers = {str(name): tuple(str(v) for v in values) for name, values in data["layers"].items()}
        return cls(tuple(int(v) for v in data["tiles"]), units, layers)


def _runs(units: Sequence[tuple[int, int]]) -> list[list[int]]:
    runs: list[list[int]] = []
    for group, generation in units:
        if runs and runs[-1][1:] == [group - 1, generation]:
            runs[-1][1] = group
        else:
            runs.append([group, group, generation])
    return runs
