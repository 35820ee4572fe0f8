"""The only code that reads features: rows and boxes in, arrays out. A store is what its ledger says, nothing more."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs import load_codec
from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError, did_you_mean
from rsmtdf_cache.files import read_json
from rsmtdf_cache.layout import StorePaths, shard_layout
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.specs import FeatureKey, FeatureSpec
from rsmtdf_cache.tiles import TileTable
from rsmtdf_cache.views import Box, token_box

if TYPE_CHECKING:
    import xarray

__all__ = ["FeatureStore", "Features"]


@dataclass(frozen=True)
class Features:
    """Features of some tiles or crops, in the frame of one oriented view.

    ``values`` ``[n, h, w, D]`` float16 in the teacher's own scale; ``valid`` ``[n, h, w]``: False where the tile has no
    committed features. Token ``(i, j)`` of crop ``k`` is centred at ``offset_px + stride_px * (i, j)`` in tile pixels,
    counted from the crop's own corner in the frame ``orientation``.
    """

    values: NDArray[np.float16]
    valid: NDArray[np.bool_]
    stride_px: float
    offset_px: float
    orientation: int


class FeatureStore:
    """A store, opened at one moment: later commits do not change what it shows. Thread-safe; picklable by path."""

    def __init__(self, path: Path, verify_reads: Literal["first", "always", "never"] = "first") -> None:
        self.path = Path(path)
        self.verify_reads = verify_reads
        self.paths = StorePaths(self.path)
        self.manifest = load_manifest(self.paths)
        self.ledger = Ledger.load(self.paths)
        self._specs = self.ledger.specs()
        # Read at every crop, so looked up once: which shards of a key are committed, by row group.
        self._records: dict[FeatureKey, dict[int, ShardRecord]] = {
            spec.key: {
                group: shard
                for group, commit in self.ledger.commits[name].items()
                for shard in commit.shards
                if shard.layer == spec.layer.name
            }
            for name, record in self.ledger.sets.items()
            for spec in record.arrays.specs
        }
        self._shards: dict[tuple[FeatureKey, int], ShardReader] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, verify_reads: Literal["first", "always", "never"] = "first") -> FeatureStore:
        """Return the store at ``path``.

        ``verify_reads``: compare a shard with its recorded sha256 when it is first touched, at every read, or never.
        Raises ``UsageError`` (no such folder), ``MismatchError`` (no store, newer format), ``FindingsError`` (damage).
        """
        return cls(Path(path), verify_reads)

    def __reduce__(self) -> tuple[Any, ...]:
        return (FeatureStore, (self.path, self.verify_reads))

    @property
    def tile_px(self) -> int:
        """Side of every tile in pixels."""
        return self.manifest.tile_px

    @property
    def tiles(self) -> TileTable:
        """Which tile has which row."""
        return self.ledger.table

    @property
    def quarantined(self) -> dict[str, str]:
        """Tiles that the last build left out, and why. A tile that has a row by now is not among them."""
        if not self.paths.quarantine.is_file():
            return {}
        tiles = read_json(self.paths.quarantine)["tiles"]
        return {name: reason for name, reason in tiles.items() if name not in self.tiles}

    @property
    def snapshot(self) -> str:
        """Identity of the content that this object shows (64 hex digits)."""
        return self.ledger.snapshot()

    def keys(self) -> list[FeatureKey]:
        """Return the arrays there are, sorted by name."""
        return sorted(self._specs, key=str)

    def spec(self, key: FeatureKey) -> FeatureSpec:
        """Return what the array holds. Raises ``UsageError`` for a key that is not in the store."""
        if key not in self._specs:
            names = [str(k) for k in self.keys()]
            raise UsageError(
                f"{self.path} has no array {key}.{did_you_mean(str(key), names)} It holds: {', '.join(names)}"
            )
        return self._specs[key]

    def stats(self, key: FeatureKey) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and standard deviation per channel ``[D]`` over all committed tokens of ``key``."""
        self.spec(key)
        stats = self.ledger.stats(key)
        return stats.mean, stats.std

    def committed(self, key: FeatureKey) -> NDArray[np.bool_]:
        """Return for every row whether ``key`` has its features."""
        self.spec(key)
        mask = np.zeros(len(self.tiles), np.bool_)
        for commit in self._commits(key).values():
            mask[commit.start : commit.stop] = True
        return mask & np.array([r is not None for r in self.tiles.records], np.bool_)

    def read(
        self,
        key: FeatureKey,
        rows: Sequence[int],
        boxes: Sequence[Box] | None = None,
        out: NDArray[np.float16] | None = None,
    ) -> Features:
        """Return the features of ``rows``: whole maps, or one ``Box`` each (tile pixels of the oriented frame).

        Boxes lie on the array's lattice and are of one size; such a crop is an exact copy. ``out`` ``[n, h, w, D]``
        float16 receives the values when given. Raises ``UsageError`` for an unknown key, row or box off the lattice,
        ``FindingsError`` for a damaged shard.
        """
        spec = self.spec(key)
        codec = load_codec(spec.encoding)
        crops = [token_box(spec, b) for b in boxes] if boxes is not None else [Box(0, 0, *spec.grid)] * len(rows)
        sizes = {(c.height, c.width) for c in crops}
        if len(crops) != len(rows) or len(sizes) > 1:
            raise UsageError(f"{key}: give one box for each of the {len(rows)} rows, all of one size")
        height, width = sizes.pop() if sizes else spec.grid
        stored = np.empty((len(rows), height, width, spec.layer.channels), codec.dtype)
        valid = np.zeros((len(rows), height, width), np.bool_)
        shards: dict[int, ShardReader | None] = {}
        for n, (row, crop) in enumerate(zip(rows, crops, strict=True)):
            if not 0 <= row < len(self.tiles):
                raise UsageError(f"{key}: there is no row {row}, the store has {len(self.tiles)}")
            group, offset = divmod(row, self.manifest.group_rows)
            if group not in shards:
                shards[group] = self._shard(key, group)
            shard = shards[group]
            if shard is None or not shard.present[offset]:
                stored[n] = codec.fill
                continue
            shard.read(offset, crop.y, crop.x, stored[n])
            valid[n] = True
        values = codec.decode(stored)
        if out is not None:
            out[...] = values
            values = out
        return Features(values, valid, spec.stride_tile_px, spec.offset_tile_px, spec.view.orientation)

    def to_xarray(self) -> xarray.DataTree:
        """Return the store as an ``xarray.DataTree`` of lazily read, labelled arrays."""
        import xarray

        return xarray.open_datatree(self.paths.zarr, engine="zarr")

    def describe(self) -> dict[str, Any]:
        """Return what ``cache info`` shows, as JSON data."""
        arrays = []
        for key in self.keys():
            spec, commits = self._specs[key], self._commits(key)
            shards = [s for c in commits.values() for s in c.shards if s.layer == key.layer]
            arrays.append({
                "key": str(key), "digest": spec.digest(), "grid": list(spec.grid), "channels": spec.layer.channels,
                "stride_tile_px": spec.stride_tile_px, "offset_tile_px": spec.offset_tile_px,
                "codec": spec.encoding.codec, "tiles": int(self.committed(key).sum()),
                "shards": len(shards), "nbytes": sum(s.nbytes for s in shards),
            })  # fmt: skip
        teachers = {s.teacher.name: s.teacher for s in self._specs.values()}
        return {
            "path": str(self.path), "format_version": self.manifest.version, "dataset": self.manifest.dataset,
            "attribution": self.manifest.attribution, "tile_px": self.tile_px, "group_rows": self.manifest.group_rows,
            "tiles": sum(self.tiles.splits.values()), "quarantined": self.quarantined, "splits": self.tiles.splits,
            "snapshot": self.snapshot,
            "nbytes": sum(a["nbytes"] for a in arrays),
            "teachers": [t.to_json() for _, t in sorted(teachers.items())],
            "profiles": [dict(p) for p in sorted({tuple(sorted(self._profile(k).items())) for k in self.keys()})],
            "arrays": arrays,
        }  # fmt: skip

    def _profile(self, key: FeatureKey) -> dict[str, Any]:
        return self.ledger.sets[self.ledger.set_of(key)].profile.to_json()

    def _commits(self, key: FeatureKey) -> dict[int, Commit]:
        return self.ledger.commits[self.ledger.set_of(key)]

    def _shard(self, key: FeatureKey, group: int) -> ShardReader | None:
        record = self._records[key].get(group)
        if record is None:
            return None
        with self._lock:
            shard = self._shards.get((key, group))
            if shard is None:
                shard = self._shards[key, group] = self._open_shard(key, group, record)
            elif self.verify_reads == "always":
                _compare(shard, record)
        return shard

    def _open_shard(self, key: FeatureKey, group: int, record: ShardRecord) -> ShardReader:
        place = self.paths.shard(key, group)
        if record.path != self.paths.relative(place):
            raise MismatchError(
                f"{self.path}: the ledger names {record.path} for {key}, expected {self.paths.relative(place)}"
            )
        try:
            shard = ShardReader(place, shard_layout(self._specs[key], self.manifest.group_rows))
        except FileNotFoundError:
            raise FindingsError(f"{place}: a committed shard is missing; run `rsmtdf cache verify`") from None
        if self.verify_reads != "never":
            _compare(shard, record)
        return shard


def _compare(shard: ShardReader, record: ShardRecord) -> None:
    if shard.sha256() != record.sha256:
        raise FindingsError(
            f"{shard.path}: its bytes are not those committed (sha256 differs); run `rsmtdf cache verify --deep`"
        )
