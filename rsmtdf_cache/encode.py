"""One unit of work: read a row group's tiles, render the view, run the teacher, hand the maps to the writer.

Everything that wants what a teacher says of tiles in a view (build, canary, repair, calibration) calls
``encode_batch``, so that there is one answer.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, MismatchError, TileError
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import NumericsProfile, ViewSpec
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.tiles import TileTable, pixel_digest
from rsmtdf_cache.views import render
from rsmtdf_cache.windows import Band, encode_bands, map_layers
from rsmtdf_cache.writer import Publisher, UnitWriter

__all__ = ["TileReader", "encode_batch", "encode_shown", "encode_unit", "shown_bands"]


class TileReader:
    """Reads tiles by row and keeps the latest ones decoded, since every view of a group reads the same tiles."""

    def __init__(self, source: TileSource, table: TileTable, budget_nbytes: int = 2**30) -> None:
        self._source, self._table = source, table
        self._tiles = {t.id: t for t in source.tiles()}
        self._kept: OrderedDict[int, tuple[NDArray[np.uint8], NDArray[np.bool_] | None]] = OrderedDict()
        self._room = max(1, budget_nbytes // (source.tile_px * source.tile_px * (4 if source.may_lack_data else 3)))
        self._lock = threading.Lock()

    def read(self, row: int) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px, 3]`` uint8. Raises ``DataError`` when it is not the indexed tile any more."""
        return self.read_valid(row)[0]

    def read_valid(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Return the tile and where it holds data, as ``TileSource.read_valid`` does. Raises as ``read`` does."""
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
            found = self._source.read_valid(tile)
        except TileError as error:
            raise DataError(f"{error}; it was readable when this build began") from None
        if pixel_digest(found[0]) != record.digest:
            raise DataError(f"tile {record.id!r} changed while it was being built; run the same command again")
        with self._lock:
            self._kept[row] = found
            while len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return found


def encode_batch(
    teacher: Teacher, view: ViewSpec, layers: Sequence[str], tiles: Sequence[NDArray[np.uint8]],
    profile: NumericsProfile,
) -> dict[str, NDArray[np.float32]]:  # fmt: skip
    """Return what ``teacher`` says of ``tiles`` in ``view``: ``{layer: [n, h, w, D] float32}``, as a build stores it.

    ``tiles``: whole tiles as they are read, ``[tile_px, tile_px, 3]`` uint8 each, at most a micro-batch of the profile.
    The micro-batch is filled by repeating the last tile; a view in windows has micro-batches of its own for each tile.
    """
    return encode_shown(teacher, view, layers, [render(t, view) for t in tiles], profile)


def encode_shown(
    teacher: Teacher, view: ViewSpec, layers: Sequence[str], images: Sequence[NDArray[np.uint8]],
    profile: NumericsProfile,
) -> dict[str, NDArray[np.float32]]:  # fmt: skip
    """Return the same as ``encode_batch`` for tiles that are rendered already (``views.render``)."""
    if not 0 < len(images) <= profile.micro_batch:
        raise ValueError(f"{len(images)} tiles do not make a micro-batch of {profile.micro_batch}")
    if view.windows is not None:
        shapes = {spec.name: (len(images), *grid, spec.channels) for spec, grid in map_layers(teacher, layers, view)}
        whole = {layer: np.empty(shape, np.float32) for layer, shape in shapes.items()}
        for n, image in enumerate(images):
            for band in shown_bands(teacher, view, layers, image, profile):
                whole[band.layer][n, band.y0 : band.y0 + len(band.rows)] = band.rows
        return whole
    return _begin(teacher, view, layers, images, profile)()


def _begin(
    teacher: Teacher, view: ViewSpec, layers: Sequence[str], images: Sequence[NDArray[np.uint8]],
    profile: NumericsProfile,
) -> Callable[[], dict[str, NDArray[np.float32]]]:  # fmt: skip
    """Have the teacher look at one micro-batch, and return what fetches its maps to the host, in any thread.

    A GPU works on meanwhile: maps leave it on a stream of their own, after the work that makes them and not after what
    is asked of it next. They are as many bytes as a forward pass has time for on a fast device.
    """
    count = len(images)
    batch = torch.from_numpy(np.stack([*images, *[images[-1]] * (profile.micro_batch - count)]))
    cuda = teacher.device.type == "cuda"
    with _threads(profile.threads):
        maps = teacher.encode(batch.pin_memory() if cuda else batch, view.size_px, layers, profile.precision)
    if not cuda:
        return lambda: {layer: values.cpu().numpy()[:count] for layer, values in maps.items()}
    made = torch.cuda.Event()  # type: ignore[no-untyped-call]
    made.record(torch.cuda.current_stream(teacher.device))

    def fetch() -> dict[str, NDArray[np.float32]]:
        aside = torch.cuda.Stream(teacher.device)  # type: ignore[no-untyped-call]
        aside.wait_event(made)
        with torch.cuda.stream(aside):  # waits for the copies, so that the maps are not freed before
            return {layer: values.cpu().numpy()[:count] for layer, values in maps.items()}

    return fetch


def encode_unit(
    teacher: Teacher, arrays: ArraySet, group: int, rows: Sequence[int], profile: NumericsProfile,
    ledger: Ledger, group_rows: int, reader: TileReader, decoders: int = 4, folder: Path | None = None,
    publish: Publisher | None = None,
) -> Generator[int, None, None]:  # fmt: skip
    """Encode and commit one unit; yield the bytes of each tile as it is written.

    ``decoders``: tiles decoded at once. ``folder``: what permits it where another process holds the build lock
    (``writer.grant``); once it is gone this ends with ``ResourceError`` at the next tile. ``publish``: what takes the
    finished shards where the store is no folder.

    Micro-batches are the same however often the unit is begun, and the last one is padded by repeating its last tile,
    so a tile's bits do not depend on when or with how many others the build ran (decision 3). The next batch is
    decoded and rendered, and the one before written, while the teacher works. In windows, a batch is one tile, and its
    map leaves in bands.
    """
    view = arrays.specs[0].view
    layers = [s.layer.name for s in ledger.live(arrays.id)]
    size = 1 if view.windows is not None else profile.micro_batch
    batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    with (
        ThreadPoolExecutor(decoders, "decode") as readers,
        ThreadPoolExecutor(1, "write") as behind,
        UnitWriter(ledger, arrays, group, group_rows, profile, folder, publish) as writer,
    ):

        def show(row: int) -> NDArray[np.uint8]:
            return render(reader.read(row), view)

        def fetch(batch: list[int]) -> list[Future[NDArray[np.uint8]]]:
            return [readers.submit(show, row) for row in batch]

        def store(batch: list[int], fetch: Callable[[], dict[str, NDArray[np.float32]]]) -> list[int]:
            features = fetch()
            return [
                writer.add(row, ledger.table.record(row).id, {layer: maps[i] for layer, maps in features.items()})
                for i, row in enumerate(batch)
            ]

        def stream(row: int, image: NDArray[np.uint8]) -> int:
            tile_id, nbytes = ledger.table.record(row).id, 0
            waiting: Future[int] | None = None
            for band in shown_bands(teacher, view, layers, image, profile):
                nbytes += waiting.result() if waiting is not None else 0
                waiting = behind.submit(writer.add_rows, row, tile_id, *band)
            return nbytes + (waiting.result() if waiting is not None else 0)

        written: Future[list[int]] | None = None
        coming = fetch(batches[0])
        for number, batch in enumerate(batches):
            images = [future.result() for future in coming]
            coming = fetch(batches[number + 1]) if number + 1 < len(batches) else []
            if view.windows is not None:
                yield stream(batch[0], images[0])
                continue
            fetch_maps = _begin(teacher, view, layers, images, profile)
            if written is not None:
                yield from written.result()
            written = behind.submit(store, batch, fetch_maps)
        if written is not None:
            yield from written.result()
        writer.commit(rows[-1] + 1)


def shown_bands(
    teacher: Teacher, view: ViewSpec, layers: Sequence[str], image: NDArray[np.uint8], profile: NumericsProfile
) -> Iterator[Band]:
    """Yield the map of one rendered tile of a view in windows, band by band: ``encode_shown`` for maps of any size.

    Torch has the threads of the profile while the teacher works, and the caller's between bands.
    """
    bands = encode_bands(teacher, view, layers, image, profile)
    while True:
        with _threads(profile.threads):
            band = next(bands, None)
        if band is None:
            return
        yield band


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run torch with ``count`` threads, as many as before afterwards."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
