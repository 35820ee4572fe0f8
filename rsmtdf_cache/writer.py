"""The only code that writes features. One unit = one row group of one array set = one commit.

The numbered steps are those of ``FORMAT.md``; tests kill the process after each.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs import load_codec
from rsmtdf_cache.errors import DataError, MismatchError
from rsmtdf_cache.files import fsync_folder, link_file, make_folders, no_step, rename_file, sha256_file
from rsmtdf_cache.layout import ArraySet, StorePaths, shard_layout
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.shard import ShardWriter
from rsmtdf_cache.specs import NumericsProfile
from rsmtdf_cache.stats import ChannelStats

__all__ = ["UnitWriter", "clear_drafts"]


#: Called after each numbered step of a commit. Tests replace it to stop the process right there.
after_step: Callable[[int], None] = no_step


def clear_drafts(paths: StorePaths, transfers: bool = False) -> None:
    """Remove what killed builders left. Only the holder of the build lock may call this.

    ``transfers``: also what a stopped pull brought of shards, and would continue.
    """
    for draft in paths.tmp.glob("*"):
        if draft.name == "pull" and not transfers:
            continue
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        paths.tmp.rmdir()
    for folder in (paths.ledger, paths.ledger / "tiles", paths.segments):
        for draft in folder.glob(".*.tmp"):  # of an atomic replace; those below zarr/ go with the stray metadata
            draft.unlink(missing_ok=True)


class UnitWriter:
    """Collects the maps of one unit and commits them. Leaving the block without ``commit()`` leaves no trace."""

    def __init__(self, ledger: Ledger, arrays: ArraySet, group: int, group_rows: int, profile: NumericsProfile) -> None:
        self._ledger, self._arrays, self._group, self._profile = ledger, arrays, group, profile
        self._first_row = group * group_rows
        self._folder = ledger.paths.tmp / f"{arrays.id}-{group}.{uuid.uuid4().hex}"
        self._committed = False
        make_folders(self._folder)
        self._specs = [s for s in arrays.specs if (arrays.id, s.layer.name) not in ledger.dropped]
        self._codecs = {s.layer.name: load_codec(s.encoding) for s in self._specs}
        self._shards = {
            s.layer.name: ShardWriter(self._folder / s.layer.name, shard_layout(s, group_rows)) for s in self._specs
        }
        self._stats = {s.layer.name: ChannelStats.empty(s.layer.channels) for s in self._specs}

    def add(self, row: int, tile_id: str, features: Mapping[str, NDArray[np.float32]]) -> int:
        """Add the maps ``{layer: [h, w, D]}`` of ``row`` and return the bytes they take.

        Raises ``DataError`` when a value is not finite, or not in the stored type.
        """
        nbytes = 0
        for layer, values in features.items():
            stored = self._codecs[layer].encode(values)
            nbytes += self._add(layer, row, tile_id, values, stored)
        return nbytes

    def add_stored(self, row: int, tile_id: str, codes: Mapping[str, NDArray[Any]]) -> int:
        """Add what another store holds, ``{layer: codes [h, w, D]}``, as it is: nothing is encoded again."""
        return sum(self._add(layer, row, tile_id, stored, stored) for layer, stored in codes.items())

    def _add(self, layer: str, row: int, tile_id: str, values: NDArray[Any], stored: NDArray[Any]) -> int:
        decoded = self._codecs[layer].decode(stored)
        self._refuse_non_finite(layer, tile_id, values, decoded)
        self._stats[layer].add(decoded)
        self._shards[layer].add(row - self._first_row, stored)
        return int(stored.nbytes)

    def commit(self, stop: int) -> Commit:
        """Make the unit durable and known: rows up to ``stop``. Returns the record that counts."""
        after_step(1)
        digests = {layer: shard.close() for layer, shard in self._shards.items()}
        after_step(2)
        places = {s.layer.name: self._ledger.paths.shard(s.key, self._group) for s in self._specs}
        for layer, place in places.items():
            self._publish(self._folder / layer, place)
        after_step(3)
        for place in places.values():
            fsync_folder(place.parent)
        after_step(4)
        shards = tuple(
            ShardRecord(
                layer,
                self._ledger.paths.relative(place),
                self._shards[layer].nbytes,
                digests[layer],
                self._stats[layer],
            )
            for layer, place in sorted(places.items())
        )
        commit = Commit(self._arrays.id, self._group, self._first_row, stop, self._profile, shards)
        commit = self._ledger.add_commit(commit, after_step)
        self._committed = True
        return commit

    def _publish(self, draft: Path, place: Path) -> None:
        make_folders(place.parent)
        if link_file(draft, place):
            return
        name = self._ledger.paths.relative(place)
        named = [(c, s) for units in self._ledger.generations.values() for c in units.values()
                 for s in c.shards if s.path == name]  # fmt: skip
        owner = next((c for c, s in named if place.stat().st_size == s.nbytes and sha256_file(place) == s.sha256), None)
        if owner is not None:
            raise MismatchError(
                f"{place}: another array set has this shard ({owner.set_id}, dropped or of an older build); "
                "run `rsmtdf cache gc` on the store, then the same command again"
            )
        # These bytes are in no record: a kill left them before their record was published, and nobody has read them.
        rename_file(draft, place)

    def _refuse_non_finite(self, layer: str, tile_id: str, values: NDArray[np.float32], decoded: NDArray[Any]) -> None:
        bad = int(np.count_nonzero(~np.isfinite(decoded)))
        if not bad:
            return
        here = f"{self._arrays.label}/{layer}, tile {tile_id!r}: {bad} of {decoded.size} values"
        if np.isfinite(values).all():
            worst = float(np.abs(values).max())
            raise DataError(
                f"{here} do not fit {decoded.dtype} (largest magnitude {worst:.4g}); nothing of this shard was kept"
            )
        raise DataError(f"{here} are not finite; try --precision float32, or check the weights")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._shards.values():
            shard.__exit__(kind, error, trace)
        shutil.rmtree(self._folder, ignore_errors=True)
        if kind is None and self._committed:
            after_step(8)
