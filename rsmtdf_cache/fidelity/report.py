"""What a measurement of fidelity found: a row per array and case, and the shorter summary that tables show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsmtdf_cache.codecs import codec_name
from rsmtdf_cache.crops import turn_between
from rsmtdf_cache.fidelity.agreement import Agreement, TokenMeans
from rsmtdf_cache.fidelity.questions import CASES
from rsmtdf_cache.fidelity.sample import Target
from rsmtdf_cache.layout import parts_of, shard_layout

__all__ = ["ArrayFacts", "FidelityReport", "Line", "Row", "describe_array", "summary"]

_LABELS = {
    "identity": "whole tile, as stored",
    "codec-alone": "codec alone",
    "scale": "from scale {source}",
    "crop-aligned": "crop on the lattice",
    "crop-shifted": "crop off the lattice",
    "crop-resized": "crop, another scale",
    "cutmix": "CutMix",
    "fixed-stored": "fixed views, stored",
    "fixed-cut": "fixed views, cut from whole",
    "other-tile": "control: another tile",
    "mean-vector": "control: mean of store",
}

#: Kinds of turns between the stored and the asked frame, from what image networks commute with best.
_TURNS = {4: "mirrored", 2: "half turn", 6: "half turn"}


@dataclass(frozen=True)
class ArrayFacts:
    """A target of a store: ``teacher/scale/layer``, and how it is stored.

    ``nbytes_per_tile``: codes of one tile in one orientation, before a compressor.
    """

    store: int
    array: str
    codec: str
    grid: tuple[int, int]
    channels: int
    stride_tile_px: float
    orientations: tuple[int, ...]
    fixed_views: int
    nbytes_per_tile: int


@dataclass(frozen=True)
class Row:
    """One case of one array. ``exact``: stored tokens were read bit for bit; None: nothing was read."""

    store: int
    array: str
    case: str
    orientation: int | None
    source: str | None
    exact: bool | None
    tiles: int
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, numbers rounded to 6 decimals."""
        names = ("store", "array", "case", "orientation", "source", "exact", "tiles")
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**data, **_rounded(self.agreement.to_json())}


@dataclass(frozen=True)
class FidelityReport:
    """What was compared and what was seen. ``skipped``: cases that cannot be had, ``(teacher/scale, case, reason)``."""

    stores: tuple[tuple[str, str], ...]
    data: str
    tiles: tuple[str, ...]
    numerics: tuple[dict[str, Any], ...]
    arrays: tuple[ArrayFacts, ...]
    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "stores": [{"path": path, "snapshot": snapshot} for path, snapshot in self.stores],
            "data": self.data, "tiles": list(self.tiles), "numerics": list(self.numerics),
            "arrays": [vars(a) | {"grid": list(a.grid), "orientations": list(a.orientations)} for a in self.arrays],
            "rows": [row.to_json() for row in self.rows],
            "skipped": [dict(zip(("arrays", "case", "reason"), s, strict=True)) for s in self.skipped],
        }  # fmt: skip

    def of(self, array: ArrayFacts) -> list[Row]:
        """Return the rows of one array, cases in the order of ``CASES``."""
        mine = [r for r in self.rows if (r.store, r.array) == (array.store, array.array)]
        return sorted(mine, key=lambda r: CASES.index(r.case))


@dataclass(frozen=True)
class Line:
    """A line of a table: a case, or several orientations together: means, and the lowest of their worst 1 %."""

    label: str
    case: str
    tokens: int
    cosine: float
    cosine_worst: float
    standardised: float
    standardised_worst: float
    error: float | None
    cka: float | None
    interior: float | None
    edge: float | None


def describe_array(target: Target) -> ArrayFacts:
    """Return what is known of a target without reading features."""
    spec = target.spec
    layouts = [shard_layout(spec, target.opened.manifest.group_rows, part) for part in parts_of(spec)]
    token = sum(layout.channels * layout.dtype.itemsize for layout in layouts)
    return ArrayFacts(
        target.store, target.key, codec_name(spec.encoding), spec.grid, spec.layer.channels, spec.stride_tile_px,
        tuple(target.whole), len(target.fixed), token * spec.grid[0] * spec.grid[1],
    )  # fmt: skip


def summary(report: FidelityReport, array: ArrayFacts) -> list[Line]:
    """Return the lines of one array's table. Orientations are put together by how far they are turned.

    ``interior`` and ``edge`` are standardised cosines.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    source = min(array.orientations, default=0)
    # What storing a frame buys stands side by side.
    rows = sorted(report.of(array), key=lambda r: (_place(r), _rank(r, source), CASES.index(r.case)))
    for row in rows:
        groups.setdefault((row.case, _label(row, source)), []).append(row)
    return [_line(label, case, rows) for (case, label), rows in groups.items()]


def _place(row: Row) -> int:
    return CASES.index("orientation-stored" if row.case == "orientation-turned" else row.case)


def _rank(row: Row, source: int) -> int:
    if not row.case.startswith("orientation"):
        return 0
    kind = _TURNS.get(turn_between(source, row.orientation or 0))
    return ("mirrored", "half turn", None).index(kind)


def _label(row: Row, source: int) -> str:
    if not row.case.startswith("orientation"):
        return _LABELS[row.case].format(source=row.source)
    turn = turn_between(source, row.orientation or 0)
    kind = _TURNS.get(turn, "quarter turn")
    return f"{kind}, {'stored' if row.case == 'orientation-stored' else 'map turned'}"


def _line(label: str, case: str, rows: Sequence[Row]) -> Line:
    found = [r.agreement for r in rows]

    def mean(values: Sequence[float | None]) -> float | None:
        there = [v for v in values if v is not None]
        return sum(there) / len(there) if there else None

    def part(parts: Sequence[TokenMeans | None]) -> float | None:
        return mean([p.standardised for p in parts if p is not None])

    return Line(
        label, case, sum(a.tokens for a in found), sum(a.cosine for a in found) / len(found),
        min(a.cosine_worst for a in found), sum(a.standardised for a in found) / len(found),
        min(a.standardised_worst for a in found), mean([a.error for a in found]), mean([a.cka for a in found]),
        part([a.interior for a in found]), part([a.edge for a in found]),
    )  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value
