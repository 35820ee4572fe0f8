"""The only code that reads features: rows and boxes in, arrays out. A store is what its ledger says, nothing more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.allocate import Allocator, page_empty
from rsmtdf_cache.codecs import Codec, Codes
from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError, UsageError, did_you_mean
from rsmtdf_cache.files import read_json
from rsmtdf_cache.head import find_snapshot, load_whole
from rsmtdf_cache.layout import StorePaths, contradiction, parts_of, shard_layout
from rsmtdf_cache.ledger import Commit, Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.open_shards import OpenShards, VerifyReads
from rsmtdf_cache.pixels import is_pixels
from rsmtdf_cache.read_plan import Lattice, ReadPlan
from rsmtdf_cache.specs import FeatureKey, FeatureSpec
from rsmtdf_cache.tiles import TileTable
from rsmtdf_cache.views import Box, CropBox

if TYPE_CHECKING:
    import xarray

    from rsmtdf_cache.crops import TokenGrid
    from rsmtdf_cache.share.remote import RemoteMirror

__all__ = ["FeatureStore", "Features"]


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


class _Array:
    """What every read of an array needs, looked up once."""

    def __init__(self, spec: FeatureSpec, lattice: Lattice, shards: OpenShards) -> None:
        self.key, self.spec, self.lattice = spec.key, spec, lattice
        self.layouts = {part: shard_layout(spec, 1, part) for part in parts_of(spec)}
        self.shards = {part: shards.of(spec.key, part) for part in self.layouts}


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
        self._shards = OpenShards(self.paths, ledger, self._specs, self.manifest.group_rows, verify_reads, mirror)
        self._codecs: dict[FeatureKey, Codec] = {}
        lattices: dict[tuple[object, ...], Lattice] = {}
        self._arrays: dict[FeatureKey, _Array] = {}
        for key, spec in self._specs.items():
            if (kind := Lattice.key_of(spec)) not in lattices:
                lattices[kind] = Lattice(spec, self.manifest.group_rows)
            self._arrays[key] = _Array(spec, lattices[kind], self._shards)

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
    def remote(self) -> bool:
        """Whether shards are fetched from another machine when they are first read."""
        return self._mirror is not None

    @property
    def shards(self) -> OpenShards:
        """Its mapped shards, for readers that need no copy (``StoredPixels``) or another place (``residency``)."""
        return self._shards

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
        """Return the arrays of features there are, sorted by name; those of pixels: ``pixel_keys``."""
        return sorted((key for key in self._specs if not is_pixels(key)), key=str)

    def pixel_keys(self) -> list[FeatureKey]:
        """Return the arrays of pixels there are, sorted by name; ``StoredPixels`` reads them."""
        return sorted((key for key in self._specs if is_pixels(key)), key=str)

    def spec(self, key: FeatureKey) -> FeatureSpec:
        """Return what the array holds. Raises ``UsageError`` for a key that is not in the store."""
        return self._array(key).spec

    def _array(self, key: FeatureKey) -> _Array:
        if not isinstance(key, FeatureKey):
            raise UsageError(f"{key!r} is no FeatureKey; write FeatureKey.parse({str(key)!r}), or take one of keys()")
        if key not in self._arrays:
            names = [str(k) for k in self.keys()]
            raise UsageError(
                f"{self.shown} has no array {key}.{did_you_mean(str(key), names)} It holds: {', '.join(names)}"
            )
        return self._arrays[key]

    def codec(self, key: FeatureKey) -> Codec:
        """Return what turns stored codes of ``key`` into features. Raises ``FindingsError`` without its calibration."""
        if key not in self._codecs:
            self._codecs[key] = self.ledger.codec(self.spec(key))
        return self._codecs[key]

    def stored(self, key: FeatureKey, row: int) -> Codes | None:
        """Return the codes of one tile's map as they are stored, None when they are not committed."""
        codes = self.read_codes(key, [row])
        return codes[0] if self._present(key, [row])[0] else None

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
        for group in self._shards.of(key).records:
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
        codes, present = self.read_codes(key, rows, boxes), self._present(key, rows)
        shape = (*codes.values.shape[:-1], spec.layer.channels)
        if out is not None and (out.shape != shape or out.dtype != np.float16):
            raise UsageError(f"{key}: out is {out.dtype}{out.shape}, needed is float16{shape}")
        values = codec.decode(codes)
        if out is not None:
            out[...] = values
            values = out
        valid = np.broadcast_to(present[:, None, None], shape[:-1]).copy()
        return Features(values, valid, spec.stride_tile_px, spec.offset_tile_px, spec.view.orientation)

    def read_codes(
        self,
        key: FeatureKey,
        rows: Sequence[int],
        boxes: Sequence[Box | CropBox] | None = None,
        out: Codes | None = None,
        at: Sequence[int] | None = None,
    ) -> Codes:
        """Return what ``read`` returns as it is stored: ``values [n, h, w, C]``, of some codecs ``scale [n, h, w]``.

        Smaller to move than features; ``codecs.device.DeviceDecoder`` turns them into features on a device. Tokens that
        are not committed have NaN as value or scale. ``out``, of ``empty_codes``, is filled at the places ``at``
        (default: all, in order) and returned: every token is copied once. Raises what ``read`` raises.
        """
        plan = self.plan(key, rows, boxes, at if out is not None else None)
        if out is None:
            out = self.empty_codes(key, len(rows), plan.size)
        self.read_planned(key, plan, out)
        return out

    def lattice(self, key: FeatureKey) -> Lattice:
        """Return where the tokens of ``key`` lie: arrays with the same lattice are read by one plan."""
        return self._array(key).lattice

    def plan(
        self,
        key: FeatureKey,
        rows: Sequence[int],
        boxes: Sequence[Box | CropBox] | None = None,
        at: Sequence[int] | None = None,
    ) -> ReadPlan:
        """Return what ``read_codes`` works out before it copies; one plan does for all arrays of a ``lattice``.

        Raises ``UsageError`` as ``read`` does.
        """
        array = self._array(key)
        return array.lattice.plan(array.spec, self._rows(key, rows), boxes, at)

    def read_planned(self, key: FeatureKey, plan: ReadPlan, out: Codes) -> None:
        """Fill the planned places of ``out`` (of ``empty_codes``, of the plan's size) with the codes of ``key``.

        Raises what ``read`` raises, ``UsageError`` for a plan of another lattice.
        """
        array = self._array(key)
        if plan.lattice is not array.lattice:
            raise UsageError(f"{key}: this plan is of arrays whose tokens lie elsewhere; make one with plan({key}, …)")
        for part, shards in array.shards.items():
            into = out.values if part == "features" else out.scale[..., None]  # type: ignore[index]
            for group, reads in plan.groups.items():
                shard = shards.get(group)
                if shard is not None:
                    shard.will_read([row for _, row, _, _ in reads])
                    shard.read_rows(reads, into)
                    continue
                for place, _, _, _ in reads:
                    into[place] = array.layouts[part].fill

    def will_read(self, key: FeatureKey, rows: Iterable[int]) -> int:
        """Let the system fetch the maps of ``rows`` from the disk meanwhile, each once, or their shards from a server.

        Advice: it opens no shard, changes nothing that is read, and costs little when all of it lies in memory.
        ``rows`` are rows of the store. Return how many maps (of codes or scales) and remote shards were asked for.
        """
        group_rows, new = self.manifest.group_rows, 0
        parts = [(shards, shards.opened) for shards in self._array(key).shards.values()]
        for row in rows:
            group, offset = divmod(row, group_rows)
            for shards, opened in parts:
                if (shard := opened.get(group)) is not None:
                    new += shard.will_read((offset,))
                elif self.remote:
                    new += shards.fetch_soon(group)
        return new

    def left_memory(self) -> None:
        """Forget which rows were asked for: more is stored than memory holds, so they have to be fetched again."""
        for array in self._arrays.values():
            for shards in array.shards.values():
                for shard in list(shards.opened.values()):
                    shard.left_memory()

    def _present(self, key: FeatureKey, rows: Sequence[int]) -> NDArray[np.bool_]:
        """Return for each row whether its shard is committed and holds it."""
        found = []
        for row in self._rows(key, rows):
            group, offset = divmod(row, self.manifest.group_rows)
            shard = self._shards.of(key).get(group)
            found.append(shard is not None and shard.has(offset))
        return np.array(found, np.bool_)

    def empty_codes(
        self, key: FeatureKey, count: int, grid: tuple[int, int] | None = None, empty: Allocator = page_empty
    ) -> Codes:
        """Return room for ``count`` crops of ``grid`` tokens (default: whole maps); ``empty`` makes the arrays."""
        array = self._array(key)
        made = {
            part: empty(
                (count, *(grid or array.spec.grid), *((layout.channels,) if part == "features" else ())), layout.dtype
            )
            for part, layout in array.layouts.items()
        }
        return Codes(made["features"], made.get("scale"))

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

    def to_xarray(self, chunks: Literal["shard"] | None = None) -> xarray.DataTree:
        """Return the store as an ``xarray.DataTree`` of lazily read arrays; ``chunks="shard"``: dask arrays, so cut."""
        if self._mirror is not None:
            raise UsageError(
                f"{self.shown}: a remote store is read shard by shard; bring it here with `rsmtdf cache pull` to open "
                "it with xarray"
            )
        from rsmtdf_cache.xarray_view import open_tree

        return open_tree(self.paths.zarr, self.manifest.group_rows if chunks == "shard" else None)

    def to_dataarray(self, key: FeatureKey) -> xarray.DataArray:
        """Return ``key`` as ``read`` does, lazily: ``(tile, y, x, channel)`` float16, one dask chunk for each shard.

        In the teacher's own scale; NaN where nothing is committed. Shards are not compared with their checksums.
        Raises ``UsageError`` for a key that is not there, and as ``to_xarray`` does.
        """
        from rsmtdf_cache.xarray_view import decoded

        spec = self.spec(key)  # a key that is not there is told of
        return decoded(self.to_xarray(chunks="shard")[str(key)].to_dataset(), self.codec(key), spec.layer.channels)

    def describe(self) -> dict[str, Any]:
        """Return what ``cache info`` shows, as JSON data: ``describe.describe_store``."""
        from rsmtdf_cache.describe import describe_store

        return describe_store(self)

    def _rows(self, key: FeatureKey, rows: Sequence[int]) -> list[int]:
        """Return ``rows`` as numbers that do not overflow. Raises ``UsageError`` for one that the store lacks."""
        count = len(self.tiles)
        if isinstance(rows, list) and rows and set(map(type, rows)) == {int} and min(rows) >= 0 and max(rows) < count:
            return rows
        for row in rows:
            if not isinstance(row, (int, np.integer)) or not 0 <= row < count:
                raise UsageError(f"{key}: there is no row {row!r}, the store has {count} (tiles.row_of gives rows)")
        return [int(row) for row in rows]

    def _commits(self, key: FeatureKey) -> dict[int, Commit]:
        return self.ledger.commits[self.ledger.set_of(key)]
