"""What a store from elsewhere may claim, checked before anything is fetched or allocated for its sake.

Sizes follow from shapes and shapes are bounded, so that a hostile record ends in one error and not in a full disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError
from rsmtdf_cache.layout import parts_of, shard_layout
from rsmtdf_cache.ledger import Commit, Ledger
from rsmtdf_cache.manifest import Manifest
from rsmtdf_cache.specs import FeatureKey, FeatureSpec, differing_fields
from rsmtdf_cache.stats import ChannelStats

__all__ = ["check_ledger", "check_stats", "refuse_double", "refuse_other_store"]

#: Token centres and channel statistics of all arrays together: half a gigabyte of derived numbers.
DERIVED_VALUES_MAX = 2**26
_HEX64 = re.compile("[0-9a-f]{64}")
_TILES = re.compile(r"tile table|row \d+: (.+) \(store\) != (?!\1 )|dataset|group_rows")


def check_ledger(manifest: Manifest, ledger: Ledger, where: str) -> None:
    """Raise ``FindingsError`` unless every array and every shard of ``ledger`` is one that this format can have.

    ``where``: how messages call the store. Raises ``MismatchError`` for a codec that this version does not know.
    """
    ledger.table.check()
    seen: set[FeatureKey] = set()
    values = 0
    for name in ledger.sets:
        for spec in ledger.live(name):
            values += 2 * spec.layer.channels + sum(spec.grid)
            if spec.key in seen or spec.tile_px != manifest.tile_px or values > DERIVED_VALUES_MAX:
                raise _hostile(where, f"the array {spec.key} (twice, of another tile size, or too large)")
            if max(spec.grid) > spec.view.size_px:
                raise _hostile(where, f"the array {spec.key}: {spec.grid} tokens of {spec.view.size_px} px")
            seen.add(spec.key)
    for (name, group), generations in ledger.generations.items():
        specs = {s.layer.name: s for s in ledger.sets[name].arrays.specs}
        for commit in generations.values():
            _check_commit(manifest, ledger, specs, commit, where)
            if commit.group != group:
                raise _hostile(where, f"row group {group} of {name}")


def check_stats(ledger: Ledger, commit: Commit, where: str) -> Commit:
    """Return ``commit`` with statistics. Raises ``FindingsError`` when they do not fit the arrays."""
    complete = ledger.complete(commit)
    channels = {s.layer.name: s.layer.channels for s in ledger.sets[commit.set_id].arrays.specs}
    for shard in complete.shards:
        if not _sound(shard.stats, channels[shard.layer] if shard.part == "features" else 0):
            raise _hostile(where, f"the statistics of {shard.path}")
    return complete


def refuse_other_store(here: tuple[Manifest, Ledger], there: tuple[Manifest, Ledger], place: str) -> None:
    """Raise ``MismatchError`` unless the store at ``place`` (``there``) can hold what ``here`` holds.

    That is: the same tile side, row groups and dataset; the same tiles in the rows that both have; equal specs and
    numerics of arrays that both have. The message lists what differs.
    """
    same = {"tile_px", "group_rows", "dataset"}
    lines = differing_fields(there[0].model_dump(include=same), here[0].model_dump(include=same))
    ours, theirs = here[1], there[1]
    for row, (a, b) in enumerate(zip(ours.table.records, theirs.table.records, strict=False)):
        if (a.id, a.digest) != (b.id, b.digest) if a and b else a is not b:
            lines.append(f"row {row}: {b.id if b else 'no tile'!r} (store) != {a.id if a else 'no tile'!r} (asked)")
            break
    for first, records in ours.segments.items():
        old = theirs.segments.get(first)
        if len(records) != len(old) if old is not None else first < len(theirs.table):
            lines.append(f"tile table: the rows from {first} on came in other steps")
    specs = theirs.specs()
    for key, spec in ours.specs().items():
        if key not in specs:
            continue
        if specs[key].digest() != spec.digest():
            lines += [f"{key}: {line}" for line in differing_fields(specs[key].to_json(), spec.to_json())]
    for name in set(ours.sets) & set(theirs.sets):
        if ours.sets[name].calibrations != theirs.sets[name].calibrations:
            lines.append(f"calibration of {ours.sets[name].arrays.label}: another one was used for its codes")
        a_profile, b_profile = ours.sets[name].profile, theirs.sets[name].profile
        lines += [f"numerics: {line}" for line in differing_fields(b_profile.to_json(), a_profile.to_json())]
    if lines:
        text = "\n  ".join(lines[:12])
        # Arrays that differ in what they are cannot be united; tiles that came in other steps can.
        merge = ", or unite the two with `rsmtdf cache merge`" if all(_TILES.match(line) for line in lines) else ""
        raise MismatchError(f"{place} is another store:\n  {text}\nnothing was written; choose another place{merge}")


def refuse_double(arrays: Mapping[str, Sequence[str]], source: Ledger, target: Ledger, place: str) -> None:
    """Raise ``MismatchError`` when an array that comes (set → layers) is there already in a set of other layers."""
    for name, layers in arrays.items():
        keys = {s.key for s in source.live(name) if s.layer.name in layers}
        for other in target.sets:
            double = keys & {s.key for s in target.live(other)} if other != name else set()
            if double:
                raise MismatchError(
                    f"{place}: {min(map(str, double))} was built there together with other layers meanwhile; choose "
                    "another place, or unite the two with `rsmtdf cache merge`"
                )


def _check_commit(
    manifest: Manifest, ledger: Ledger, specs: dict[str, FeatureSpec], commit: Commit, where: str
) -> None:
    rows, unit = manifest.group_rows, f"{commit.set_id}/{commit.group}"
    first, stop = commit.group * rows, min((commit.group + 1) * rows, len(ledger.table))
    if commit.start != first or not first < commit.stop <= stop or not 0 <= commit.generation < 10**8:
        raise _hostile(where, f"rows {commit.start} to {commit.stop} of the unit {unit}")
    layers = {s.layer for s in commit.shards}
    if not layers or not layers <= set(specs):
        raise _hostile(where, f"the layers of the unit {unit}")
    try:
        parts = sorted((layer, part) for layer in layers for part in parts_of(specs[layer]))
    except UsageError as error:
        raise MismatchError(f"{where}: {error} A newer rsmtdf may know it") from None
    if sorted((s.layer, s.part) for s in commit.shards) != parts:
        raise _hostile(where, f"the shards of the unit {unit}")
    for shard in commit.shards:
        spec = specs[shard.layer]
        expected = ledger.paths.relative(ledger.paths.shard(spec.key, commit.group, shard.part))
        layout = shard_layout(spec, rows, shard.part)
        tiles, rest = divmod(shard.nbytes - layout.index_nbytes, layout.row_nbytes)
        if layout.compressor != "none":  # a compressor can make little of noise, and some more
            most = 2 * layout.row_nbytes * (commit.stop - commit.start)
            tiles, rest = 0, not 0 <= shard.nbytes - layout.index_nbytes <= most
        if shard.path != expected or not _HEX64.fullmatch(shard.sha256):
            raise _hostile(where, f"the shard {shard.path[:80]!r} of {spec.key}")
        if rest or not 0 <= tiles <= commit.stop - commit.start:
            raise _hostile(where, f"{shard.nbytes} bytes for the shard {shard.path}")


def _sound(stats: ChannelStats | None, channels: int) -> bool:
    return (
        stats is not None
        and stats.sums.shape == stats.squares.shape == (channels,)
        and bool(np.isfinite(stats.sums).all() and np.isfinite(stats.squares).all())
        and bool(np.isfinite([stats.norm_sum, stats.norm_max]).all())
        and stats.count >= 0
    )


def _hostile(where: str, what: str) -> FindingsError:
    return FindingsError(f"{where}: {what} cannot be: the store is damaged or hostile, nothing of it was used")
