"""One unit of work: read a row group's tiles, turn them, run the teacher, hand the maps to the writer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, MismatchError, TileError
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import NumericsProfile
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.tiles import TileTable, pixel_digest
from rsmtdf_cache.views import orient
from rsmtdf_cache.writer import UnitWriter

__all__ = ["TileReader", "encode_unit"]


class TileReader:
    """Reads tiles by row and keeps the latest ones decoded, since every view of a group reads the same tiles."""

    def __init__(self, source: TileSource, table: TileTable, budget_nbytes: int = 2**30) -> None:
        self._source, self._table = source, table
        self._tiles = {t.id: t for t in source.tiles()}
        self._kept: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._room = max(1, budget_nbytes // (source.tile_px * source.tile_px * 3))
        self._lock = threading.Lock()

    def read(self, row: int) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px, 3]`` uint8. Raises ``DataError`` when it is not the indexed tile any more."""
        with self._lock:
            if row in self._kept:
                self._kept.move_to_end(row)
                return self._kept[row]
        record = self._table.record(row)
        tile = self._tiles.get(record.id)
        if tile is None:
            raise MismatchError(
                f"the store has a tile {record.id!r} that {self._source.root} lacks; give the dataset it was built from"
            )
        try:
            image = self._source.read_image(tile)
        except TileError as error:
            raise DataError(f"{error}; it was readable when this build began") from None
        if pixel_digest(image) != record.digest:
            raise DataError(f"tile {record.id!r} changed while it was being built; run the same command again")
        with self._lock:
            self._kept[row] = image
            while len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return image


def encode_unit(
    teacher: Teacher, arrays: ArraySet, group: int, rows: Sequence[int], profile: NumericsProfile,
    ledger: Ledger, group_rows: int, reader: TileReader,
) -> Iterator[int]:  # fmt: skip
    """Encode and commit one unit; yield the bytes of each tile as it is written.

    Micro-batches are the same however often the unit is begun, and the last one is padded by repeating its last tile,
    so a tile's bits do not depend on when or with how many others the build ran (decision 3). The next batch is
    decoded, and the one before written, while the teacher works.
    """
    view = arrays.specs[0].view
    layers = [s.layer.name for s in ledger.live(arrays.id)]
    size = profile.micro_batch
    batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    with (
        ThreadPoolExecutor(4, "decode") as readers,
        ThreadPoolExecutor(1, "write") as behind,
        UnitWriter(ledger, arrays, group, group_rows, profile) as writer,
    ):

        def fetch(batch: list[int]) -> list[Future[NDArray[np.uint8]]]:
            return [readers.submit(reader.read, row) for row in batch]

        def store(batch: list[int], features: dict[str, NDArray[np.float32]]) -> list[int]:
            return [
                writer.add(row, ledger.table.record(row).id, {layer: maps[i] for layer, maps in features.items()})
                for i, row in enumerate(batch)
            ]

        written: Future[list[int]] | None = None
        coming = fetch(batches[0])
        for number, batch in enumerate(batches):
            tiles = [future.result() for future in coming]
            coming = fetch(batches[number + 1]) if number + 1 < len(batches) else []
            tiles += [tiles[-1]] * (size - len(tiles))
            images = torch.from_numpy(np.stack([orient(t, view.orientation) for t in tiles]))
            maps = teacher.encode(images, view.size_px, layers, profile.precision)
            features = {layer: values.cpu().numpy() for layer, values in maps.items()}
            if written is not None:
                yield from written.result()
            written = behind.submit(store, batch, features)
        if written is not None:
            yield from written.result()
        writer.commit(rows[-1] + 1)
