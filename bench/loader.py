"""How fast shuffled batches of cached features arrive, against a memory map and other formats of the same bytes.

    python bench/loader.py OUT.json [--tiles 600] [--rounds 7] [--forms 37:int8,…] [--cold] [--work FOLDER]

One store is written by this package's own writer, and the same codes once more in each of the other formats. All
readers that can are given the same random order of tiles and the same boxes; each delivers batches of 16 as one torch
tensor that owns its memory. Only "memory map, one batch" overwrites one batch for ever, which then stays in the
processor's caches: no trainer may do so, and a copy costs no less. Those marked "stream" choose their own order. Runs
alternate: every round goes once through all readers, and a ratio is the median over rounds of ours, or theirs, against
the memory maps of the same round. Ratios of processor time (all threads) stand beside those of the clock: other jobs on
a machine disturb them less.

Beside the codes this package reads the scale of each token (int8), which the others are not given. What is not
installed is left out and named: ``pip install 'rsmtdf[bench]'`` brings all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_cache.allocate import BlockPool
from rsmtdf_cache.codecs import Calibration, Codes
from rsmtdf_cache.layout import ArraySet, StorePaths, choose_group_rows
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest, create_manifest
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, LayerSpec, NumericsProfile, PixelSpec, TeacherSpec, ViewSpec
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tiles import TileRecord
from rsmtdf_cache.views import Box
from rsmtdf_cache.writer import UnitWriter
from rsmtdf_cli.machine import context
from rsmtdf_train.geometry import Geometry
from rsmtdf_train.targets.base import TargetRequest
from rsmtdf_train.targets.stored import CachedTargets

__all__ = ["main"]

BATCH = 16
CHANNELS, STRIDE = 768, 14  # DINOv2-B
_MOST_SECONDS = 0.5  # of one reader in one round
_MiB = 2**20


@dataclass(frozen=True)
class Form:
    """What is stored: ``tiles`` maps of ``side`` x ``side`` tokens in ``codec``; crops are of half the side."""

    tiles: int
    side: int
    codec: str

    @property
    def crop(self) -> int:
        return self.side // 2

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int8 if self.codec == "int8" else np.float16)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.side, self.side, CHANNELS)

    @property
    def nbytes(self) -> int:
        """Bytes of one tile's codes."""
        return self.side * self.side * CHANNELS * self.dtype.itemsize


@dataclass(frozen=True)
class Wanted:
    """One batch: rows, and of each the corner of a square of ``side`` tokens; ``boxes``: the same in pixels."""

    rows: list[int]
    corners: list[tuple[int, int]]
    side: int
    boxes: list[Box]


_REUSED = "memory map, one batch"
_Read = Callable[[Wanted], Tensor]
_Stream = Callable[[int], Iterator[Tensor]]


@dataclass
class Reader:
    """``read`` delivers what is asked for; ``stream`` batches of its own choice. ``files`` are what it reads."""

    name: str
    how: str
    files: list[Path]
    open: Callable[[], _Read | _Stream]
    streams: bool = False


def _batches(form: Form, side: int, seed: int) -> list[Wanted]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(form.tiles)
    found = []
    for start in range(0, form.tiles - BATCH + 1, BATCH):
        corners = rng.integers(0, form.side - side + 1, (BATCH, 2)).tolist()
        boxes = [Box(y * STRIDE, x * STRIDE, STRIDE * side, STRIDE * side) for y, x in corners]
        found.append(Wanted(order[start : start + BATCH].tolist(), [(y, x) for y, x in corners], side, boxes))
    return found


# --- the bytes, and the store that holds them ------------------------------------------------------------------------


def _codes(row: int, form: Form) -> Codes:
    rng = np.random.default_rng(row)
    if form.codec == "int8":
        scale = rng.uniform(0.01, 0.02, form.shape[:2]).astype(np.float16)
        return Codes(rng.integers(-127, 128, form.shape, np.int8), scale)
    return Codes(rng.standard_normal(form.shape, np.float32).astype(np.float16))


def _values(row: int, form: Form) -> NDArray[Any]:
    return _codes(row, form).values


def _write_store(out: Path, form: Form) -> None:
    tile_px, tiles = STRIDE * form.side, form.tiles
    pixel = PixelSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    spec = FeatureSpec(
        teacher=TeacherSpec(
            name="random", family="timm", architecture="random", weights="0" * 64, weights_origin="random numbers",
            patch_px=STRIDE, native_px=tile_px, prefix_tokens=0, norm=False, pixel=pixel,
        ),
        layer=LayerSpec(name="last", channels=CHANNELS, stride_px=STRIDE, offset_px=STRIDE / 2),
        view=ViewSpec(size_px=tile_px, orientation=0),
        encoding=EncodingSpec(codec=form.codec),
        tile_px=tile_px,
        grid=(form.side, form.side),
    )  # fmt: skip
    group_rows, arrays = choose_group_rows([spec]), ArraySet((spec,))
    paths = StorePaths(out)
    create_manifest(paths, Manifest(tile_px=tile_px, group_rows=group_rows, dataset="random numbers"))
    ledger = Ledger(paths)
    records = [TileRecord(f"t{n:06}", n.to_bytes(32), "train", f"images/t{n:06}.png") for n in range(form.tiles)]
    for start in range(0, tiles, group_rows):
        ledger.add_tiles(start, records[start : start + group_rows])
    profile = NumericsProfile(device="cpu", precision="float32", torch="none", threads=1, micro_batch=1)
    calibrations = {}
    if form.codec == "int8":
        neutral = Calibration(np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32))
        calibrations["last"] = ledger.add_calibration(neutral)
    ledger.add_set(arrays, profile, calibrations)
    for group, start in enumerate(range(0, tiles, group_rows)):
        rows = range(start, min(start + group_rows, tiles))
        with UnitWriter(ledger, arrays, group, group_rows, profile) as unit:
            for row in rows:
                unit.add_stored(row, records[row].id, {"last": _codes(row, form)})
            unit.commit(rows.stop)
    store = FeatureStore.open(out)
    for start in range(0, tiles, BATCH):  # every shard is compared with its sha256 once, as in the first epoch
        store.read_codes(store.keys()[0], range(start, min(start + BATCH, tiles)))


# --- readers ---------------------------------------------------------------------------------------------------------


def _ours(root: Path, form: Form) -> list[Reader]:
    files = sorted(p for p in (root / "zarr").rglob("*") if p.is_file() and p.stat().st_size > _MiB)

    def store() -> _Read:
        opened = FeatureStore.open(root)
        (key,) = opened.keys()
        return lambda wanted: torch.from_numpy(opened.read_codes(key, wanted.rows, wanted.boxes).values)

    return [
        Reader(
            "rsmtdf, training", "CachedTargets, as the loader of a run calls it", files, lambda: _Training(root, form)
        ),
        Reader("rsmtdf, store", "FeatureStore.read_codes into new batches", files, store),
    ]


class _Training:
    """What the loader of a run does for the features of a batch: hears of the next one, reads this one."""

    def __init__(self, root: Path, form: Form) -> None:
        px = STRIDE * form.side
        self._targets = CachedTargets(FeatureStore.open(root), (), Geometry(px, px, STRIDE, (0,)))
        (self._name,) = self._targets.specs
        self._pool = BlockPool()

    def _requests(self, wanted: Wanted) -> list[TargetRequest]:
        return [TargetRequest(row, 0, box) for row, box in zip(wanted.rows, wanted.boxes, strict=True)]

    def will_read(self, wanted: Wanted) -> None:
        self._targets.will_read(self._requests(wanted))

    def __call__(self, wanted: Wanted) -> Tensor:
        return torch.from_numpy(self._targets.read(self._requests(wanted), self._pool.empty)[self._name].values)


def _filled(wanted: Wanted, form: Form, tile: Callable[[int], Any]) -> Tensor:
    """Return a new batch; ``tile`` gives a map to cut from."""
    side = wanted.side
    values = np.empty((len(wanted.rows), side, side, CHANNELS), form.dtype)
    for n, (row, (y, x)) in enumerate(zip(wanted.rows, wanted.corners, strict=True)):
        values[n] = tile(row)[y : y + side, x : x + side]
    return torch.from_numpy(values)


def _memmap(work: Path, form: Form) -> list[Reader]:
    path = work / "flat.npy"
    flat = np.lib.format.open_memmap(path, "w+", form.dtype, (form.tiles, *form.shape))
    for row in range(form.tiles):
        flat[row] = _values(row, form)
    flat.flush()

    def opened() -> _Read:
        mapped = np.load(path, mmap_mode="r").view(np.ndarray)  # slices of the subclass np.memmap are slower
        return lambda wanted: _filled(wanted, form, mapped.__getitem__)

    def reused() -> _Read:
        mapped = np.load(path, mmap_mode="r").view(np.ndarray)
        kept: dict[int, NDArray[Any]] = {}

        def read(wanted: Wanted) -> Tensor:
            side = wanted.side
            values = kept.setdefault(side, np.empty((BATCH, side, side, CHANNELS), form.dtype))
            for n, (row, (y, x)) in enumerate(zip(wanted.rows, wanted.corners, strict=True)):
                values[n] = mapped[row, y : y + side, x : x + side]
            return torch.from_numpy(values)

        return read

    return [
        Reader("memory map", "np.load(mmap_mode='r'), one copy into a new batch", [path], opened),
        Reader(_REUSED, "the same into one batch that is overwritten: what a trainer may not do", [path], reused),
    ]


def _npy(work: Path, form: Form) -> list[Reader]:
    (work / "npy").mkdir()
    paths = [work / "npy" / f"{row:06}.npy" for row in range(form.tiles)]
    for row, path in enumerate(paths):
        np.save(path, _values(row, form))

    def read() -> _Read:
        return lambda wanted: _filled(wanted, form, lambda row: np.load(paths[row]))

    def mapped() -> _Read:
        return lambda wanted: _filled(wanted, form, lambda row: np.load(paths[row], mmap_mode="r"))

    return [
        Reader(".npy per tile", "np.load", paths, read),
        Reader(".npy per tile, mapped", "np.load(mmap_mode='r')", paths, mapped),
    ]


def _pt(work: Path, form: Form) -> list[Reader]:
    (work / "pt").mkdir()
    paths = [work / "pt" / f"{row:06}.pt" for row in range(form.tiles)]
    for row, path in enumerate(paths):
        torch.save(torch.from_numpy(_values(row, form)), path)

    def read(mmap: bool) -> Callable[[], _Read]:
        def tile(row: int) -> Any:
            return torch.load(paths[row], mmap=mmap, weights_only=True).numpy()

        return lambda: lambda wanted: _filled(wanted, form, tile)

    return [
        Reader(".pt per tile", "torch.load", paths, read(False)),
        Reader(".pt per tile, mapped", "torch.load(mmap=True)", paths, read(True)),
    ]


def _hdf5(work: Path, form: Form) -> list[Reader]:
    import h5py

    path = work / "flat.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("x", (form.tiles, *form.shape), form.dtype)
        for row in range(form.tiles):
            data[row] = _values(row, form)

    def opened() -> _Read:
        data = h5py.File(path, "r")["x"]

        def read(wanted: Wanted) -> Tensor:
            side = wanted.side
            values = np.empty((len(wanted.rows), side, side, CHANNELS), form.dtype)
            for n, (row, (y, x)) in enumerate(zip(wanted.rows, wanted.corners, strict=True)):
                data.read_direct(values, np.s_[row, y : y + side, x : x + side], np.s_[n])
            return torch.from_numpy(values)

        return read

    return [Reader("HDF5 (h5py)", "one contiguous dataset, read_direct into the batch", [path], opened)]


def _zarr(work: Path, form: Form) -> list[Reader]:
    import zarr

    folder = work / "flat.zarr"
    shape, chunk = (form.tiles, *form.shape), (1, *form.shape)
    data = zarr.create_array(folder, shape=shape, chunks=chunk, dtype=form.dtype, compressors=None, filters=None)
    for row in range(form.tiles):
        data[row] = _values(row, form)

    def opened() -> _Read:
        array: Any = zarr.open_array(folder, mode="r")

        def read(wanted: Wanted) -> Tensor:
            side = wanted.side
            values = np.empty((len(wanted.rows), side, side, CHANNELS), form.dtype)
            for n, (row, (y, x)) in enumerate(zip(wanted.rows, wanted.corners, strict=True)):
                values[n] = array[row, y : y + side, x : x + side]
            return torch.from_numpy(values)

        return read

    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [
        Reader("zarr-python", "raw chunks of one tile, basic indexing (its fancy indexing is slower)", files, opened)
    ]


def _tensorstore(work: Path, form: Form) -> list[Reader]:
    import tensorstore

    folder = work / "shards.zarr"
    shape, chunk = [form.tiles, *form.shape], [1, *form.shape]
    spec = {
        "driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": shape, "data_type": form.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [60, *chunk[1:]]}},
            "codecs": [{"name": "sharding_indexed", "configuration": {
                "chunk_shape": chunk, "codecs": [{"name": "bytes"}],
                "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
            }}],
        },
    }  # fmt: skip
    array = tensorstore.open(spec, create=True).result()
    for start in range(0, form.tiles, 60):
        rows = range(start, min(start + 60, form.tiles))
        array[rows.start : rows.stop].write(np.stack([_values(row, form) for row in rows])).result()

    def opened() -> _Read:
        array = tensorstore.open(spec, open=True).result()

        def read(wanted: Wanted) -> Tensor:
            side = wanted.side
            if side == form.side:
                return torch.from_numpy(array[wanted.rows].read().result())
            values = np.empty((len(wanted.rows), side, side, CHANNELS), form.dtype)
            with tensorstore.Batch() as batch:
                asked = [
                    array[row, y : y + side, x : x + side].read(batch=batch)
                    for row, (y, x) in zip(wanted.rows, wanted.corners, strict=True)
                ]
            for n, future in enumerate(asked):
                values[n] = future.result()
            return torch.from_numpy(values)

        return read

    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    how = "zarr3, raw shards of 60 tiles; whole: one batch index, crops: futures in a Batch; its own threads"
    return [Reader("TensorStore", how, files, opened)]


def _lance(work: Path, form: Form) -> list[Reader]:
    import lance
    import pyarrow

    folder = work / "tiles.lance"
    width = form.nbytes
    schema = pyarrow.schema([pyarrow.field("x", pyarrow.binary(width))])

    def parts() -> Iterator[pyarrow.RecordBatch]:
        for start in range(0, form.tiles, 60):
            rows = [_values(row, form).tobytes() for row in range(start, min(start + 60, form.tiles))]
            yield pyarrow.record_batch([pyarrow.array(rows, pyarrow.binary(width))], schema=schema)

    lance.write_dataset(parts(), folder, schema=schema)

    def opened() -> _Read:
        data = lance.dataset(folder)

        def read(wanted: Wanted) -> Tensor:
            column = data.take(wanted.rows, columns=["x"]).column("x").combine_chunks()
            flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
            maps = flat.view(form.dtype).reshape(len(column), *form.shape)
            if wanted.side == form.side and maps.flags.writeable:
                return torch.from_numpy(maps)
            values = np.empty((len(column), wanted.side, wanted.side, CHANNELS), form.dtype)
            for n, (y, x) in enumerate(wanted.corners):
                values[n] = maps[n, y : y + wanted.side, x : x + wanted.side]
            return torch.from_numpy(values)

        return read

    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [Reader("Lance", "fixed-size binary of one tile, take(); its own threads", files, opened)]


def _crop_at_random(maps: NDArray[Any], rng: np.random.Generator, side: int, into: NDArray[Any]) -> None:
    y, x = rng.integers(0, len(maps) - side + 1, 2)
    into[...] = maps[y : y + side, x : x + side]


def _webdataset(work: Path, form: Form) -> list[Reader]:
    import webdataset

    (work / "tar").mkdir()
    with webdataset.ShardWriter(str(work / "tar" / "%04d.tar"), maxcount=60, verbose=0) as sink:
        for row in range(form.tiles):
            sink.write({"__key__": f"{row:06}", "x": _values(row, form).tobytes()})
    files = sorted((work / "tar").glob("*.tar"))

    def opened() -> _Stream:
        def stream(side: int) -> Iterator[Tensor]:
            rng = np.random.default_rng(0)
            # Shards and a buffer of four batches are shuffled; decoding is a view of the bytes of the file.
            data = webdataset.WebDataset([str(f) for f in files], shardshuffle=len(files), empty_check=False)
            values, n = np.empty((BATCH, side, side, CHANNELS), form.dtype), 0
            for sample in data.shuffle(4 * BATCH):
                maps = np.frombuffer(sample["x"], form.dtype).reshape(form.shape)
                _crop_at_random(maps, rng, side, values[n])
                n += 1
                if n == BATCH:
                    yield torch.from_numpy(values)
                    values, n = np.empty((BATCH, side, side, CHANNELS), form.dtype), 0

        return stream

    return [
        Reader("WebDataset", "raw bytes in tars of 60 tiles, shuffle of shards and of 64 tiles", files, opened, True)
    ]


def _litdata(work: Path, form: Form) -> list[Reader]:
    import litdata
    from litdata.streaming import Cache

    folder = work / "litdata"
    cache = Cache(str(folder), chunk_bytes=60 * form.nbytes)
    for row in range(form.tiles):
        cache[row] = _values(row, form)
    cache.done()
    cache.merge()
    files = [p for p in sorted(folder.rglob("*.bin")) if p.is_file()]

    def opened() -> _Stream:
        def stream(side: int) -> Iterator[Tensor]:
            rng = np.random.default_rng(0)
            data = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False)
            values, n = np.empty((BATCH, side, side, CHANNELS), form.dtype), 0
            for maps in data:
                _crop_at_random(np.asarray(maps), rng, side, values[n])
                n += 1
                if n == BATCH:
                    yield torch.from_numpy(values)
                    values, n = np.empty((BATCH, side, side, CHANNELS), form.dtype), 0

        return stream

    def random_access() -> _Read:
        data = litdata.StreamingDataset(str(folder))
        return lambda wanted: _filled(wanted, form, lambda row: np.asarray(data[row]))

    return [
        Reader("LitData", "StreamingDataset(shuffle=True), no workers", files, opened, True),
        Reader("LitData, by index", "StreamingDataset[i]", files, random_access),
    ]


_PEERS: dict[str, tuple[str, Callable[[Path, Form], list[Reader]]]] = {
    "npy": ("numpy", _npy), "pt": ("torch", _pt), "HDF5": ("h5py", _hdf5), "zarr-python": ("zarr", _zarr),
    "TensorStore": ("tensorstore", _tensorstore), "Lance": ("pylance", _lance),
    "WebDataset": ("webdataset", _webdataset), "LitData": ("litdata", _litdata),
}  # fmt: skip


# --- rounds ----------------------------------------------------------------------------------------------------------


def _in_order(reader: _Read, batches: list[Wanted]) -> Iterator[Tensor]:
    for n, wanted in enumerate(batches):
        if isinstance(reader, _Training) and n + 1 < len(batches):
            reader.will_read(batches[n + 1])
        yield reader(wanted)


def _pass(
    reader: _Read | _Stream, streams: bool, batches: list[Wanted], most_s: float = _MOST_SECONDS
) -> tuple[float, float]:
    """Return tiles a second, and microseconds of all processors for a tile, of a pass over ``batches``.

    Or over as many of them as fit into ``most_s``.
    """
    count, begun, used = 0, time.perf_counter(), time.process_time()
    found: Iterator[Tensor] = reader(batches[0].side) if streams else _in_order(reader, batches)  # type: ignore
    for batch in found:
        count += len(batch)
        assert batch.shape[1] == batches[0].side
        if time.perf_counter() - begun > most_s or count >= BATCH * len(batches):
            break
    return count / (time.perf_counter() - begun), (time.process_time() - used) / count * 1e6


def _warm(readers: list[Reader], form: Form, rounds: int, side: int) -> dict[str, Any]:
    opened = [(r, r.open()) for r in readers]
    found: dict[str, list[tuple[float, float]]] = {r.name: [] for r in readers}
    for number in range(rounds + 2):
        batches = _batches(form, side, number)
        for reader, read in opened:
            passed = _pass(read, reader.streams, batches)
            if number > 1:  # the first rounds warm caches
                found[reader.name].append(passed)
    summary = {}
    for reader in readers:
        (rates, work), (of_reused, work_of_reused) = (
            (
                [mine / map_ for (mine, _), (map_, _) in zip(found[reader.name], found[base], strict=True)],
                [map_ / mine for (_, mine), (_, map_) in zip(found[reader.name], found[base], strict=True)],
            )
            for base in ("memory map", _REUSED)
        )
        summary[reader.name] = {
            "per_s": round(statistics.median(rate for rate, _ in found[reader.name]), 1),
            "of_memory_map": round(statistics.median(rates), 3),
            "lowest": round(min(rates), 3),
            "highest": round(max(rates), 3),
            "processor_us": round(statistics.median(us for _, us in found[reader.name]), 1),
            "of_memory_map_processor": round(statistics.median(work), 3),
            "of_one_batch": round(statistics.median(of_reused), 3),
            "of_one_batch_processor": round(statistics.median(work_of_reused), 3),
            "stream": reader.streams,
            "how": reader.how,
        }
    return summary


def _drop(files: list[Path]) -> float:
    """Ask the system to forget the files; return the share of looked-at pages that are still in memory."""
    gc.collect()  # what is mapped is not dropped
    held = looked = 0
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    page = bytearray(1)
    for path in files[:: max(1, len(files) // 64)]:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for offset in range(0, size, max(4096, size * len(files) // 64)):
                looked += 1
                with contextlib.suppress(BlockingIOError):
                    held += os.preadv(file.fileno(), [page], offset, os.RWF_NOWAIT)
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return held / max(looked, 1)


def _sequential(files: list[Path]) -> float:
    """Return bytes a second of reading the files one after another, 4 MiB at a time, into one buffer."""
    buffer, count, begun = bytearray(4 * _MiB), 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                count += got
    return count / (time.perf_counter() - begun)


def _cold(readers: list[Reader], form: Form, rounds: int) -> dict[str, Any]:
    """Return MB/s of whole tiles from files that the system was told to forget, against reading ours in sequence."""
    ours = next(r for r in readers if r.name.startswith("rsmtdf"))
    rates: dict[str, list[float]] = {"in sequence": []} | {r.name: [] for r in readers}
    held: dict[str, list[float]] = {name: [] for name in rates}
    for number in range(rounds):
        batches = _batches(form, form.side, number)
        held["in sequence"].append(_drop(ours.files))
        rates["in sequence"].append(_sequential(ours.files))
        for reader in readers:
            held[reader.name].append(_drop(reader.files))
            read = reader.open()
            rates[reader.name].append(_pass(read, reader.streams, batches, 10.0)[0] * form.nbytes)
            del read
    base = rates["in sequence"]
    return {
        name: {
            "mb_per_s": round(statistics.median(found) / 1e6, 1),
            "of_sequence": round(statistics.median(a / b for a, b in zip(found, base, strict=True)), 3),
            "still_in_memory": round(statistics.median(held[name]), 3),
        }
        for name, found in rates.items()
    }


def _check(readers: list[Reader], form: Form) -> None:
    """Stop unless every reader that takes an order delivers the very codes that were written."""
    for side in (form.side, form.crop):
        wanted = _batches(form, side, 99)[0]
        expected = _filled(wanted, form, lambda row: _values(row, form))
        for reader in readers:
            if not reader.streams and not torch.equal(reader.open()(wanted), expected):  # type: ignore
                raise SystemExit(f"{reader.name}: other codes than were written")


def _measured(form: Form, rounds: int, cold: bool, work: Path, only: list[str]) -> dict[str, Any]:
    _write_store(work / "store", form)
    readers = [*_memmap(work, form), *_ours(work / "store", form)]
    absent = []
    for name, (package, made) in _PEERS.items():
        if only and name not in only:
            continue
        try:
            version(package)
        except PackageNotFoundError:
            absent.append(name)
            continue
        readers += made(work, form)
    os.sync()
    _check(readers, form)
    found: dict[str, Any] = {"form": vars(form), "tile_mb": form.nbytes / 1e6, "absent": absent}
    found["whole"] = _warm(readers, form, rounds, form.side)
    found["crops"] = _warm(readers, form, rounds, form.crop)
    if cold:
        found["cold"] = _cold(readers, form, max(3, rounds // 2))
    return found


def _show(found: dict[str, Any]) -> None:
    form = found["form"]
    print(f"\n{form['tiles']} tiles of {form['side']}x{form['side']}x{CHANNELS} {form['codec']}")
    print("tiles or crops a second; share of the memory map, of the one that overwrites one batch, each once more in")
    print("processor time; cold: MB/s, of in sequence")
    print(f"{'':26}{'whole tiles':>34}{'crops of half the side':>36}" + ("  cold" if "cold" in found else ""))
    for name, whole in found["whole"].items():
        line = f"{name + (' (stream)' if whole['stream'] else ''):26}"
        for part in (whole, found["crops"][name]):
            line += f"{part['per_s']:9.0f}{part['of_memory_map']:6.2f}{part['of_one_batch']:6.2f}  "
            line += f"{part['of_memory_map_processor']:6.2f}{part['of_one_batch_processor']:6.2f}  "
        if "cold" in found:
            line += f"{found['cold'][name]['mb_per_s']:8.0f}{found['cold'][name]['of_sequence']:6.2f}"
        print(line)
    if "cold" in found:
        print(f"{'reading in sequence, cold':97}{found['cold']['in sequence']['mb_per_s']:8.0f}")
    if found["absent"]:
        print(f"left out, not installed: {', '.join(found['absent'])}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiles", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forms", default="37:int8,32:int8,37:float16", help="SIDE:CODEC, comma separated")
    parser.add_argument("--peers", default="", help="some of them, comma separated; default: all that are installed")
    parser.add_argument("--cold", action="store_true", help="whole tiles from files that the system forgot, too")
    parser.add_argument("--work", type=Path, help="folder on the disk that is measured; default: the temporary one")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {**context(), "rounds": asked.rounds, "batch": BATCH, "channels": CHANNELS, "threads": 1}
    result["load_before"] = os.getloadavg()
    result["measured"] = []
    result["peers"] = {}
    for name, (package, _) in _PEERS.items():
        with contextlib.suppress(PackageNotFoundError):
            result["peers"][name] = f"{package} {version(package)}"
    for text in asked.forms.split(","):
        side, _, codec = text.partition(":")
        form = Form(asked.tiles, int(side), codec)
        with tempfile.TemporaryDirectory(dir=asked.work) as folder:
            only = [p for p in asked.peers.split(",") if p]
            result["measured"].append(_measured(form, asked.rounds, asked.cold, Path(folder), only))
        _show(result["measured"][-1])
    result["load_after"] = os.getloadavg()
    result["command"] = shlex.join(["python", "bench/loader.py", *(arguments or sys.argv[1:])[1:]])
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
