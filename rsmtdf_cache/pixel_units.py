"""Units of pixels: written from a dataset, read from it again, and compared with the digests of the tile table."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.pixels import PIXEL_PROFILE, RGB, VALID
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.tiles import TileTable, pixel_digest
from rsmtdf_cache.writer import Publisher, UnitWriter

if TYPE_CHECKING:
    from rsmtdf_cache.encode import TileReader

__all__ = ["changed_tile", "read_codes", "store_unit"]


def store_unit(
    arrays: ArraySet, group: int, rows: Sequence[int], ledger: Ledger, group_rows: int, reader: TileReader,
    workers: int = 4, publish: Publisher | None = None,
) -> Iterator[int]:  # fmt: skip
    """Write and commit the pixels of one row group; yield the bytes of each tile as it is written.

    ``publish``: what takes the finished shards where the store is no folder.
    Raises ``DataError`` for a tile whose pixels are not those of the tile table any more; nothing is kept then.
    """
    layers = [s.layer.name for s in ledger.live(arrays.id)]
    with UnitWriter(ledger, arrays, group, group_rows, PIXEL_PROFILE, publish=publish) as writer:
        for row, codes in read_codes(layers, rows, reader, workers):
            yield writer.add_stored(row, ledger.table.record(row).id, codes)
        writer.commit(rows[-1] + 1)


def read_codes(
    layers: Sequence[str], rows: Sequence[int], reader: TileReader, workers: int = 4
) -> Iterator[tuple[int, Mapping[str, Codes]]]:
    """Yield ``(row, {layer: codes})`` of the dataset's tiles in order, a few tiles decoded ahead.

    ``rgb`` ``[tile_px, tile_px, 3]``, ``valid`` ``[tile_px, tile_px, 1]``, both uint8. Raises as ``TileReader`` does.
    """

    def read(row: int) -> Mapping[str, Codes]:
        image, valid = reader.read_valid(row)
        whole = np.ones(image.shape[:2], np.bool_) if valid is None else valid
        values: dict[str, NDArray[np.uint8]] = {RGB: image, VALID: whole[..., None].astype(np.uint8)}
        return {layer: Codes(values[layer]) for layer in layers}

    waiting: deque[tuple[int, Future[Mapping[str, Codes]]]] = deque()
    with ThreadPoolExecutor(workers, "decode") as readers:
        try:
            for row in rows:
                waiting.append((row, readers.submit(read, row)))
                if len(waiting) > 2 * workers:
                    first, found = waiting.popleft()
                    yield first, found.result()
            while waiting:
                first, found = waiting.popleft()
                yield first, found.result()
        finally:
            readers.shutdown(wait=True, cancel_futures=True)


def changed_tile(shard: ShardReader, start: int, table: TileTable) -> str | None:
    """Return the first tile of a shard of ``rgb`` whose pixels do not have the digest of the tile table, None for none.

    ``start``: the row of the table that the shard begins with. No image is needed: a tile is named by its pixels.
    """
    layout = shard.layout
    out = np.empty((layout.height, layout.width, layout.channels), np.uint8)
    for row in np.flatnonzero(shard.present).tolist():
        record = table.records[start + row] if start + row < len(table) else None
        if record is None:
            continue
        held = shard.view(row)
        if held is None:
            shard.read(row, 0, 0, out)
            held = out
        if pixel_digest(held) != record.digest:
            return record.id
    return None
