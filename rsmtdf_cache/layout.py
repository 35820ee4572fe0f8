"""Where things lie in a store, and how large they will be, before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from rsmtdf_cache.codecs import codec_class
from rsmtdf_cache.shard import ShardLayout
from rsmtdf_cache.specs import FeatureKey, FeatureSpec, digest_of

__all__ = [
    "ArraySet",
    "PARTS",
    "Part",
    "StorePaths",
    "choose_group_rows",
    "contradiction",
    "parts_of",
    "set_id",
    "shard_layout",
    "unit_nbytes",
]

#: What an array consists of on disk: its codes, and for some codecs a scale per token. Each part has shards of its own.
Part = Literal["features", "scale"]
PARTS: tuple[Part, ...] = ("features", "scale")

#: A shard of the largest array comes close to this; decision 4 asks for 64 to 256 MB.
SHARD_GOAL_NBYTES = 128 * 2**20
#: Of small maps a shard holds no more: its index has room for all rows, and a unit of work should not be a day's.
GROUP_ROWS_MAX = 8192


@dataclass(frozen=True)
class StorePaths:
    """The places of a store. Nothing outside this class spells a path."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def zarr(self) -> Path:
        return self.root / "zarr"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def lock(self) -> Path:
        return self.ledger / "build.lock"

    @property
    def lease(self) -> Path:
        return self.ledger / "lease.json"

    @property
    def head(self) -> Path:
        return self.ledger / "head.json"

    @property
    def quarantine(self) -> Path:
        return self.ledger / "quarantine.json"

    @property
    def dropped(self) -> Path:
        return self.ledger / "dropped.json"

    @property
    def pins(self) -> Path:
        return self.root / "pins"

    @property
    def snapshots(self) -> Path:
        return self.ledger / "snapshots"

    @property
    def segments(self) -> Path:
        return self.ledger / "segments"

    def snapshot(self, root_hash: str) -> Path:
        return self.snapshots / f"{root_hash}.json"

    def segment(self, digest: str) -> Path:
        return self.segments / f"{digest}.parquet"

    def pin(self, name: str) -> Path:
        return self.pins / f"{name}.json"

    def tile_segment(self, first_row: int) -> Path:
        return self.ledger / "tiles" / f"{first_row:010d}.json"

    def array_set(self, set_id: str) -> Path:
        return self.ledger / "sets" / f"{set_id}.json"

    def commit(self, set_id: str, group: int, generation: int = 0) -> Path:
        suffix = f"-{generation}" if generation else ""
        return self.ledger / "commits" / set_id / f"{group:08d}{suffix}.json"

    def calibration(self, digest: str) -> Path:
        return self.ledger / "calibrations" / f"{digest}.safetensors"

    def shard(self, key: FeatureKey, group: int, part: Part = "features") -> Path:
        place = self.zarr / key.teacher / key.view / key.layer / part / "c" / str(group) / "0" / "0"
        return place / "0" if part == "features" else place  # an array of scales has no channels

    def relative(self, path: Path) -> str:
        """Return ``path`` as it stands in records: relative to the store, with forward slashes."""
        return path.relative_to(self.root).as_posix()


@dataclass(frozen=True)
class ArraySet:
    """The arrays that one unit of work fills: layers of one teacher and one view, asked for together."""

    specs: tuple[FeatureSpec, ...]

    @cached_property
    def id(self) -> str:  # asked for once a unit, and a digest of everything the set is
        return set_id(self.specs)

    @property
    def label(self) -> str:
        return f"{self.specs[0].teacher.name}/{self.specs[0].view.name}"


def contradiction(spec: FeatureSpec, tile_px: int) -> str:
    """Return what is wrong with the geometry of an array in a store of tiles of ``tile_px``, an empty text for nothing.

    A record can be whole and still lie about where tokens are; reading by it would be silently wrong.
    """
    if spec.tile_px != tile_px:
        return f"it is of tiles of {spec.tile_px} px, the store has tiles of {tile_px} px"
    stride, size = spec.layer.stride_px, spec.view.size_px
    # Padding can add a token; networks without padding lose a few at the border, never most of the view.
    if any(not size / 2 <= tokens * stride < size + 2 * stride for tokens in spec.grid):
        return f"{spec.grid[0]}x{spec.grid[1]} tokens of {stride} px do not cover a view of {size} px"
    return ""


def set_id(specs: Sequence[FeatureSpec]) -> str:
    """Return the name of an array set: the first 16 hex digits of the digest of its arrays' digests."""
    return digest_of(sorted(s.digest() for s in specs))[:16]


def parts_of(spec: FeatureSpec) -> tuple[Part, ...]:
    """Return the parts that the array consists of."""
    return PARTS if codec_class(spec.encoding).scaled else PARTS[:1]


def shard_layout(spec: FeatureSpec, group_rows: int, part: Part = "features") -> ShardLayout:
    """Return the layout of one shard of a part of the array; scales have one channel, which Zarr does not see."""
    codec, encoding = codec_class(spec.encoding), spec.encoding
    height, width = spec.grid
    if part == "scale":
        return ShardLayout(group_rows, height, width, 1, np.dtype("<f2"), float("nan"))
    channels = codec.stored_channels(encoding, spec.layer.channels)
    return ShardLayout(
        group_rows, height, width, channels, codec.dtype, codec.fill, encoding.compressor, codec.chunk_side
    )


def unit_nbytes(spec: FeatureSpec, group_rows: int, rows: int) -> int:
    """Return the bytes of the shards of one array for a row group with ``rows`` tiles, all parts together."""
    return sum(shard_layout(spec, group_rows, part).nbytes(rows) for part in parts_of(spec))


def choose_group_rows(specs: Sequence[FeatureSpec]) -> int:
    """Return rows per group such that a shard of the largest array is close to 128 MB (1 to 8192 rows)."""
    largest = max(shard_layout(s, 1).row_nbytes for s in specs)
    return min(max(1, SHARD_GOAL_NBYTES // largest), GROUP_ROWS_MAX)
