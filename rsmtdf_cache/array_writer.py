"""The draft of one array's shards for one row group: codes in, one shard file for each part, their records out."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs import Codec, Codes
from rsmtdf_cache.errors import DataError
from rsmtdf_cache.layout import Part, StorePaths, parts_of, shard_layout
from rsmtdf_cache.records import ShardRecord
from rsmtdf_cache.shard import ShardWriter
from rsmtdf_cache.specs import FeatureSpec
from rsmtdf_cache.stats import ChannelStats

__all__ = ["ArrayWriter"]


class ArrayWriter:
    """Writes the maps of one array, whole or in bands of token rows; memory does not grow with the shard."""

    def __init__(self, folder: Path, spec: FeatureSpec, codec: Codec, group_rows: int) -> None:
        self.spec, self.codec, self._folder = spec, codec, folder
        self.stats = ChannelStats.empty(spec.layer.channels)
        self._shards = {
            part: ShardWriter(self.draft(part), shard_layout(spec, group_rows, part)) for part in parts_of(spec)
        }
        self._digests: dict[Part, str] = {}
        self._waiting: list[Codes] = []  # token rows that do not fill a chunk yet
        self._next = (0, 0)  # the row of the group that is being written, and its first token row that is not

    def draft(self, part: Part) -> Path:
        """Return the file that a part is written to."""
        return self._folder / f"{self.spec.layer.name}.{part}"

    def add(self, row: int, tile_id: str, features: NDArray[np.float32]) -> int:
        """Encode and append the map ``[h, w, D]`` of the group's row ``row``; return its bytes.

        Raises ``DataError`` when a value is not finite, or the codec cannot hold it.
        """
        return self.add_rows(row, tile_id, 0, features)

    def add_rows(self, row: int, tile_id: str, y: int, features: NDArray[np.float32]) -> int:
        """Encode and append rows ``[n, w, D]`` of a map from token row ``y`` on; bands of a map come in order."""
        return self._add(row, tile_id, y, features, self.codec.encode(features))

    def add_stored(self, row: int, tile_id: str, codes: Codes) -> int:
        """Append what another store holds, as it is: nothing is encoded again."""
        return self._add(row, tile_id, 0, None, codes)

    def _add(self, row: int, tile_id: str, y: int, features: NDArray[np.float32] | None, codes: Codes) -> int:
        decoded = None
        if self.codec.counted:
            decoded = self.codec.decode(codes)
            self._refuse_non_finite(tile_id, features, decoded)
        if y == 0 and self._waiting:
            raise ValueError(f"{self.spec.key}: the map of row {self._next[0]} was not finished")
        if y != (self._next[1] if y else 0) or (y and row != self._next[0]):
            raise ValueError(f"{self.spec.key}: rows {y} on of row {row} came, {self._next} was expected")
        if decoded is not None:
            self.stats.add(decoded)
        self._next = (row, y + len(codes.values))
        self._waiting.append(codes)
        self._flush(row, last=y + len(codes.values) == self.spec.grid[0])
        return codes.nbytes

    def _flush(self, row: int, last: bool) -> None:
        """Write the waiting rows that fill chunks, all of them when they end the map."""
        height = self._shards["features"].layout.chunk[1]
        count = sum(len(c.values) for c in self._waiting)
        ready = count if last else count // height * height
        if not ready:
            return
        y = self._next[1] - count
        held = Codes(
            np.concatenate([c.values for c in self._waiting]),
            None if self._waiting[0].scale is None else np.concatenate([c.scale for c in self._waiting]),
        )
        self._shards["features"].add_rows(row, y, held.values[:ready])
        if held.scale is not None:
            self._shards["scale"].add_rows(row, y, held.scale[:ready, :, None])
        self._waiting = [] if ready == count else [held[ready:]]

    def close(self) -> None:
        """Finish the drafts and sync them to disk."""
        if self._waiting:
            raise ValueError(f"{self.spec.key}: the map of row {self._next[0]} was not finished")
        self._digests = {part: shard.close() for part, shard in self._shards.items()}

    def places(self, paths: StorePaths, group: int) -> dict[Path, Path]:
        """Return ``{draft: where it belongs}``."""
        return {self.draft(part): paths.shard(self.spec.key, group, part) for part in self._shards}

    def records(self, paths: StorePaths, group: int) -> list[ShardRecord]:
        """Return the records of the shards, once ``close`` has finished them."""
        found = []
        for part, shard in self._shards.items():
            place = paths.relative(paths.shard(self.spec.key, group, part))
            stats = self.stats if part == "features" else ChannelStats.empty(0)
            found.append(ShardRecord(self.spec.layer.name, place, shard.nbytes, self._digests[part], stats))
        return found

    def _refuse_non_finite(
        self, tile_id: str, features: NDArray[np.float32] | None, decoded: NDArray[np.float16]
    ) -> None:
        bad = int(np.count_nonzero(~np.isfinite(decoded)))
        if not bad:
            return
        here = f"{self.spec.key}, tile {tile_id!r}"
        if features is not None and np.isfinite(features).all():
            worst = float(np.abs(features).max())
            raise DataError(
                f"{here}: {bad} of {decoded.size} values do not fit {self.codec.encoding.codec} (largest magnitude "
                f"{worst:.4g}); nothing of this shard was kept"
            )
        # An int8 token with one such value is lost as a whole, so the teacher's own values are counted.
        values: NDArray[Any] = decoded if features is None else features
        count = int(np.count_nonzero(~np.isfinite(values)))
        raise DataError(
            f"{here}: {count} of {values.size} values are not finite; try --precision float32, or check the weights"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._shards.values():
            shard.__exit__(kind, error, trace)
