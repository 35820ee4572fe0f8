"""The only code that reads features: rows and boxes in, arrays out. A store is what its ledger says, nothing more."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs import Codec, Codes, codec_name
from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError, MismatchError, ResourceError, UsageError, did_you_mean
from rsmtdf_cache.files import read_json
from rsmtdf_cache.head import find_snapshot, load_whole, recorded_snapshot
from rsmtdf_cache.layout import Part, StorePaths, contradiction, parts_of, shard_layout
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.readcheck import is_checked, mark_checked
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.specs import FeatureKey, FeatureSpec
from rsmtdf_cache.tiles import TileTable
from rsmtdf_cache.views import Box, CropBox, token_box

if TYPE_CHECKING:
    import xarray

    from rsmtdf_cache.crops import TokenGrid
    from rsmtdf_cache.share.remote import RemoteMirror

__all__ = ["FeatureStore", "Features"]

VerifyReads = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Features:
    """Features of some tiles or crops, in the frame of one oriented view.

    ``values`` ``[n, h, w, D]`` float16 in the teacher's own scale; ``valid`` ``[n, h, w]``: False where the tile has no
    committed features. Token ``(i, j)`` of crop ``k`` is centred at ``offset_px + stride_px * (i, j)`` in tile pixels,
    counted from the crop's own corner in the frame ``orientation``. ``exact``: valid tokens are stored ones, bit for
    bit; otherwise they were read between tokens, or stem from another orientation (see ``crops.py``).
    """

    values: NDArray[np.float16]
    valid: NDArray[np.bool_]
    stride_px: float
    offset_px: float
    orientation: int
    exact: bool = True


class FeatureStore:
    """A store, opened at one moment: later commits do not change what it shows.

    Safe among threads. It can be pickled and survives a fork: the copy shows the same snapshot.
    """

    def __init__(
        self,
        root: Path,
        snapshot: str | Content | None = None,
        verify_reads: VerifyReads = "first",
        mirror: RemoteMirror | None = None,
    ) -> None:
        """Open the folder ``root``; callers use ``open``. ``mirror`` fetches the shards of a remote store."""
        if verify_reads not in ("first", "always", "never"):
            raise UsageError(f"verify_reads {verify_reads!r}: choose first, always or never")
        self.path = Path(root)
        self.verify_reads = verify_reads
        self.paths = StorePaths(self.path)
        self.manifest = load_manifest(self.paths)
        self._mirror = mirror
        ledger = load_whole(self.paths) if mirror is None else Ledger.load(self.paths)
        if isinstance(snapshot, Content):
            ledger = ledger.at(snapshot)
        elif snapshot is not None:
            ledger = find_snapshot(self.paths, ledger, snapshot)
        self.ledger = ledger
        self._specs = self.ledger.specs()
        for key, spec in self._specs.items():
            if wrong := contradiction(spec, self.manifest.tile_px):
                raise FindingsError(f"{self.path}: {key}: {wrong}; the record is damaged or hostile")
        # Read at every crop, so looked up once: which shards of a key are committed, by row group.
        self._records = {(k, p): self.ledger.shards(k, p) for k, spec in self._specs.items() for p in parts_of(spec)}
        self._shards: dict[tuple[FeatureKey, int, Part], ShardReader] = {}
        self._codecs: dict[FeatureKey, Codec] = {}
        self._lock = threading.Lock()
        _OPEN.add(self)

    @classmethod
    def open(cls, path: Path | str, snapshot: str | None = None, verify_reads: VerifyReads = "first") -> FeatureStore:
        """Return the store at ``path``: a folder, or a URL (``s3://…``), either with ``@SNAPSHOT`` at its end.

        ``snapshot``: the root hash (or its first 8 or more digits) of the content to show; default: what is there now.
        ``verify_reads``: compare a shard with its recorded sha256 when it is first touched on this node, at every
        read, or never. Raises ``UsageError`` (no such folder), ``MismatchError`` (no store, newer format, no such
        snapshot), ``FindingsError`` (damage), ``ResourceError`` (network).
        """
        if "@" not in str(path) and ":" not in str(path):  # a plain folder needs none of the rest
            return cls(Path(path), snapshot, verify_reads)
        from rsmtdf_cache.share.address import Address

        address = Address.parse(str(path))
        if snapshot is not None and address.snapshot not in (None, snapshot):
            raise UsageError(f"{address.shown}: names a snapshot, and {snapshot} was asked for; give one of them")
        if address.is_remote:
            from rsmtdf_cache.share.remote import open_remote

            root, mirror = open_remote(address)
            return cls(root, snapshot or address.snapshot, verify_reads, mirror)
        return cls(Path(address.path), snapshot or address.snapshot, verify_reads)

    def __reduce__(self) -> tuple[Any, ...]:
        return (FeatureStore, (self.path, self.ledger.content(), self.verify_reads, self._mirror))

    @property
    def shown(self) -> str:
        """Where the store is, for people: its folder, or its URL without secrets."""
        return str(self.path) if self._mirror is None else self._mirror.address.shown

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
        if not isinstance(key, FeatureKey):
            raise UsageError(f"{key!r} is no FeatureKey; write FeatureKey.parse({str(key)!r}), or take one of keys()")
        if key not in self._specs:
            names = [str(k) for k in self.keys()]
            raise UsageError(
                f"{self.shown} has no array {key}.{did_you_mean(str(key), names)} It holds: {', '.join(names)}"
            )
        return self._specs[key]

    def codec(self, key: FeatureKey) -> Codec:
        """Return what turns stored codes of ``key`` into features. Raises ``FindingsError`` without its calibration."""
        if key not in self._codecs:
            self._codecs[key] = self.ledger.codec(self.spec(key))
        return self._codecs[key]

    def stored(self, key: FeatureKey, row: int) -> Codes | None:
        """Return the codes of one tile's map as they are stored, None when they are not committed."""
        codes, present = self._read(key, [row], None)
        return codes[0] if present[0] else None

    def stats(self, key: FeatureKey) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and standard deviation per channel ``[D]`` over all committed tokens of ``key``."""
        self.spec(key)
        stats = self.ledger.stats(key)
        return stats.mean, stats.std

    def committed(self, key: FeatureKey) -> NDArray[np.bool_]:
        """Return for every row whether ``key`` has its features."""
        self.spec(key)
        mask = np.zeros(len(self.tiles), np.bool_)
        commits = self._commits(key)
        for group in self._records[key, "features"]:
            mask[commits[group].start : commits[group].stop] = True
        return mask & self.tiles.filled

    def read(
        self,
        key: FeatureKey,
        rows: Sequence[int],
        boxes: Sequence[Box | CropBox] | None = None,
        out: NDArray[np.float16] | None = None,
    ) -> Features:
        """Return the features of ``rows``: whole maps, or one ``Box`` each (tile pixels of the oriented frame).

        Boxes lie on the array's lattice and are of one size; such a crop is an exact copy. ``out`` ``[n, h, w, D]``
        float16 receives the values when given. Raises ``UsageError`` for an unknown key, row or box off the lattice,
        ``FindingsError`` for a damaged shard.
        """
        spec, codec = self.spec(key), self.codec(key)
        codes, present = self._read(key, rows, boxes)
        shape = (*codes.values.shape[:-1], spec.layer.channels)
        if out is not None and (out.shape != shape or out.dtype != np.float16):
            raise UsageError(f"{key}: out is {out.dtype}{out.shape}, needed is float16{shape}")
        values = codec.decode(codes)
        if out is not None:
            out[...] = values
            values = out
        valid = np.broadcast_to(present[:, None, None], shape[:-1]).copy()
        return Features(values, valid, spec.stride_tile_px, spec.offset_tile_px, spec.view.orientation)

    def read_codes(self, key: FeatureKey, rows: Sequence[int], boxes: Sequence[Box | CropBox] | None = None) -> Codes:
        """Return what ``read`` returns as it is stored: ``values [n, h, w, C]``, of some codecs ``scale [n, h, w]``.

        Smaller to move than features; ``codecs.device.DeviceDecoder`` turns them into features on a device. Tokens that
        are not committed have NaN as value or scale. Raises what ``read`` raises.
        """
        return self._read(key, rows, boxes)[0]

    def _read(
        self, key: FeatureKey, rows: Sequence[int], boxes: Sequence[Box | CropBox] | None
    ) -> tuple[Codes, NDArray[np.bool_]]:
        """Return the codes, and for each row whether its shard is committed and holds it."""
        spec = self.spec(key)
        rows = [int(row) if isinstance(row, np.integer) else row for row in rows]  # narrow types overflow
        crops = [token_box(spec, b) for b in boxes] if boxes is not None else [Box(0, 0, *spec.grid)] * len(rows)
        sizes = {(c.height, c.width) for c in crops}
        if len(crops) != len(rows) or len(sizes) > 1:
            raise UsageError(f"{key}: give one box for each of the {len(rows)} rows, all of one size")
        height, width = sizes.pop() if sizes else spec.grid
        found: dict[Part, NDArray[Any]] = {}
        present = np.zeros(len(rows), np.bool_)
        for part in parts_of(spec):
            layout = shard_layout(spec, self.manifest.group_rows, part)
            found[part] = np.empty((len(rows), height, width, layout.channels), layout.dtype)
            shards: dict[int, ShardReader | None] = {}
            for n, (row, crop) in enumerate(zip(rows, crops, strict=True)):
                self._check_row(key, row)
                group, offset = divmod(row, self.manifest.group_rows)
                if group not in shards:
                    shards[group] = self._shard(key, group, part)
                shard = shards[group]
                if shard is None:
                    found[part][n] = layout.fill
                else:
                    shard.read(offset, crop.y, crop.x, found[part][n])
                    present[n] = present[n] or (part == "features" and bool(shard.present[offset]))
        return Codes(found["features"], found["scale"][..., 0] if "scale" in found else None), present

    def crop(
        self,
        key: FeatureKey | str,
        rows: Sequence[int],
        boxes: Sequence[Box | CropBox] | None = None,
        grid: TokenGrid | None = None,
        orientation: int | None = None,
        approximate: bool = False,
    ) -> Features:
        """Return ``rows`` cut by any ``boxes``, read on any ``grid``, in any orientation: ``crops.read_crops``."""
        from rsmtdf_cache.crops import read_crops

        return read_crops(self, key, rows, boxes, grid, orientation, approximate)

    def to_xarray(self) -> xarray.DataTree:
        """Return the store as an ``xarray.DataTree`` of lazily read, labelled arrays."""
        if self._mirror is not None:
            raise UsageError(
                f"{self.shown}: a remote store is read shard by shard; bring it here with `rsmtdf cache pull` to open "
                "it with xarray"
            )
        import xarray

        return xarray.open_datatree(self.paths.zarr, engine="zarr")

    def describe(self) -> dict[str, Any]:
        """Return what ``cache info`` shows, as JSON data."""
        arrays = []
        for key in self.keys():
            spec, shards = self._specs[key], self.ledger.all_shards(key)
            record = self.ledger.sets[self.ledger.set_of(key)]
            quality = record.quality.get(key.layer)
            arrays.append({
                "key": str(key), "digest": spec.digest(), "grid": list(spec.grid), "channels": spec.layer.channels,
                "stride_tile_px": spec.stride_tile_px, "offset_tile_px": spec.offset_tile_px,
                "view": spec.view.to_json(),
                "codec": codec_name(spec.encoding), "tiles": int(self.committed(key).sum()),
                "shards": len(shards), "nbytes": sum(s.nbytes for s in shards),
                "calibration": record.calibrations.get(key.layer, ""),
                "quality": quality.to_json() if quality is not None else None,
            })  # fmt: skip
        teachers = {s.teacher.name: s.teacher for s in self._specs.values()}
        return {
            "path": self.shown, "format_version": self.manifest.version, "dataset": self.manifest.dataset,
            "attribution": self.manifest.attribution, "tile_px": self.tile_px, "group_rows": self.manifest.group_rows,
            "tiles": sum(self.tiles.splits.values()), "quarantined": self.quarantined, "splits": self.tiles.splits,
            "snapshot": recorded_snapshot(self.paths, self.ledger),
            "nbytes": sum(a["nbytes"] for a in arrays),
            "teachers": [t.to_json() for _, t in sorted(teachers.items())],
            "profiles": [dict(p) for p in sorted({tuple(sorted(self._profile(k).items())) for k in self.keys()})],
            "arrays": arrays,
        }  # fmt: skip

    def _check_row(self, key: FeatureKey, row: int) -> None:
        if not isinstance(row, (int, np.integer)) or not 0 <= row < len(self.tiles):
            raise UsageError(
                f"{key}: there is no row {row!r}, the store has {len(self.tiles)} (tiles.row_of gives rows)"
            )

    def _profile(self, key: FeatureKey) -> dict[str, Any]:
        return self.ledger.sets[self.ledger.set_of(key)].profile.to_json()

    def _commits(self, key: FeatureKey) -> dict[int, Commit]:
        return self.ledger.commits[self.ledger.set_of(key)]

    def _shard(self, key: FeatureKey, group: int, part: Part = "features") -> ShardReader | None:
        record = self._records[key, part].get(group)
        if record is None:
            return None
        with self._lock:
            shard = self._shards.get((key, group, part))
            if shard is None:
                shard = self._shards[key, group, part] = self._open_shard(key, group, part, record)
            elif self.verify_reads == "always":
                _compare(shard, record)
        return shard

    def _open_shard(self, key: FeatureKey, group: int, part: Part, record: ShardRecord) -> ShardReader:
        place = self.paths.shard(key, group, part)
        if record.path != self.paths.relative(place):
            raise MismatchError(
                f"{self.shown}: the ledger names {record.path} for {key}, expected {self.paths.relative(place)}"
            )
        try:
            return self._checked(place, key, record)
        except FindingsError:
            if self._mirror is None:
                raise
        self._mirror.discard(record, place)  # damaged in the cache of this machine: fetched once more
        return self._checked(place, key, record)

    def _checked(self, place: Path, key: FeatureKey, record: ShardRecord) -> ShardReader:
        shard = self._map(place, key, record)
        if self.verify_reads == "always" or (self.verify_reads == "first" and not is_checked(place, record.sha256)):
            _compare(shard, record)
            mark_checked(place, record.sha256)
        return shard

    def _map(self, place: Path, key: FeatureKey, record: ShardRecord) -> ShardReader:
        layout = shard_layout(self._specs[key], self.manifest.group_rows, record.part)
        if self._mirror is None:
            try:
                return ShardReader(place, layout)
            except FileNotFoundError:
                raise FindingsError(
                    f"{place}: a committed shard is missing; run `rsmtdf cache verify`, or open the store again if "
                    "`rsmtdf cache gc` ran meanwhile"
                ) from None
        # What was evicted stays on the disk as long as it is mapped here, beyond the bound of the cache.
        self._shards = {k: s for k, s in self._shards.items() if s.path.exists()}
        for _ in range(10):  # another process may evict the shard before it is mapped
            self._mirror.ensure(record, place)
            with contextlib.suppress(FileNotFoundError):
                return ShardReader(place, layout)
        raise ResourceError(
            f"{self.shown}: the cache of remote shards is too small for the processes that read from it; raise "
            "RSMTDF_REMOTE_CACHE_GB, or copy the store with `rsmtdf cache pull`"
        )


def _compare(shard: ShardReader, record: ShardRecord) -> None:
    if shard.sha256() != record.sha256:
        raise FindingsError(
            f"{shard.path}: its bytes are not those committed (sha256 differs); run `rsmtdf cache verify --deep`"
        )


#: Stores of this process. A fork copies locks as they are, held or not, so the child gets new ones.
_OPEN: weakref.WeakSet[FeatureStore] = weakref.WeakSet()


def _renew_locks() -> None:
    for store in _OPEN:
        store._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)
