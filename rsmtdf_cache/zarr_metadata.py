"""What plain zarr and xarray see: group and array metadata, coordinates, statistics. All of it is derived from the
ledger, written by atomic replace, and can be made again at any time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rsmtdf_cache.codecs import Codec
from rsmtdf_cache.codecs.compressors import zarr_compressor
from rsmtdf_cache.files import remove_file, replace_file
from rsmtdf_cache.layout import PARTS, StorePaths, parts_of, shard_layout
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest
from rsmtdf_cache.pixels import RGB, is_pixels
from rsmtdf_cache.specs import FeatureSpec

__all__ = ["derived_files", "stray_metadata", "write_metadata"]

AXES = ("tile", "y", "x", "channel")


def write_metadata(paths: StorePaths, manifest: Manifest, ledger: Ledger) -> list[str]:
    """Bring the derived files up to date, the root's consolidated metadata last; return their names below ``zarr/``.

    What an earlier state left (metadata of dropped arrays) is removed; shards are not touched.
    """
    files = derived_files(manifest, ledger)
    root = files.pop("zarr.json")
    for name, data in [*sorted(files.items()), ("zarr.json", root)]:
        path = paths.zarr / name
        if not path.is_file() or path.read_bytes() != data:
            replace_file(path, data)
    for name in stray_metadata(paths, {*files, "zarr.json"}):
        remove_file(paths.zarr / name)
    return sorted({*files, "zarr.json"})


def stray_metadata(paths: StorePaths, derived: set[str]) -> list[str]:
    """Return the files below ``zarr/`` that are neither shards of features nor in ``derived``."""
    found = []
    for folder, folders, names in os.walk(paths.zarr):
        if Path(folder).name in PARTS:
            folders[:] = [f for f in folders if f != "c"]
        found += [(Path(folder) / name).relative_to(paths.zarr).as_posix() for name in names]
    return sorted(set(found) - derived)


def derived_files(manifest: Manifest, ledger: Ledger) -> dict[str, bytes]:
    """Return ``{path below zarr/: bytes}`` of everything that is not a feature shard."""
    import zarr
    from zarr.storage import MemoryStore

    contents: dict[str, Any] = {}
    memory = MemoryStore(contents)
    root = zarr.create_group(memory, zarr_format=3, attributes=manifest.model_dump(mode="json"))
    table = ledger.table
    _column(root, "tile", table.ids, "tile id; '' marks a row without a tile")
    tiles = root.create_group("tiles")
    _column(tiles, "split", table.texts("split"), "split of the dataset")
    _column(tiles, "source", table.texts("source"), "image file below the dataset's folder")
    _column(tiles, "crs", table.texts("crs"), "coordinate reference system; '' = not known")
    _array(tiles, "affine", table.affines, ("tile", "coefficient"),
           "x = a*column + b*row + c, y = d*column + e*row + f")  # fmt: skip
    _array(tiles, "content", table.digests, ("tile", "byte"), "sha256 of the decoded pixels")
    for key, spec in sorted(ledger.specs().items(), key=lambda item: str(item[0])):
        _feature_group(root, spec, manifest, ledger, str(key))
    with warnings.catch_warnings():
        # The Zarr community is still specifying consolidated metadata for v3; readers that do not know it ignore it.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(memory)
    return {name: value.to_bytes() for name, value in contents.items()}


def _feature_group(root: Any, spec: FeatureSpec, manifest: Manifest, ledger: Ledger, path: str) -> None:
    shard = shard_layout(spec, manifest.group_rows)
    codec = ledger.codec(spec)
    projected = codec.affine.gain is not None and codec.affine.gain.ndim == 2
    last = "band" if is_pixels(spec) else "component" if projected else AXES[3]
    group = root.require_group(path)
    named = {
        "teacher": spec.teacher.name, "layer": spec.layer.name, "view": spec.view.name,
        "orientation": spec.view.orientation, "stride_tile_px": spec.stride_tile_px,
        "offset_tile_px": spec.offset_tile_px, "codec": spec.encoding.codec,
    }  # fmt: skip
    if spec.view.crop is not None:
        named["origin_tile_px"] = list(spec.origin_tile_px)
    long_name = f"{spec.teacher.name} {spec.layer.name}, view {spec.view.name}"
    more = ledger.sets[ledger.set_of(spec.key)].facts(spec.layer.name)
    group.create_array(
        "features",
        shape=(len(ledger.table), *spec.grid, shard.channels),
        chunks=shard.chunk,
        shards=shard.shape,
        dtype=shard.dtype,
        fill_value=shard.fill,
        compressors=zarr_compressor(spec.encoding.compressor, shard.dtype.itemsize),
        filters=None,
        dimension_names=(*AXES[:3], last),
        attributes={**named, "long_name": long_name, "digest": spec.digest(), "spec": spec.to_json(), **more},
    )
    if "scale" in parts_of(spec):
        _add_decoding(group, spec, manifest, ledger, codec, named)
    for axis, name in enumerate("yx"):
        centres = spec.origin_tile_px[axis] + spec.offset_tile_px + spec.stride_tile_px * np.arange(spec.grid[axis])
        _array(group, name, centres, (name,),
               "token centre in tile pixels, in the frame of the oriented view", named)  # fmt: skip
    if is_pixels(spec):
        _add_pixel_labels(group, spec, ledger, named)
        return
    stats = ledger.stats(spec.key)
    _array(group, "channel_mean", stats.mean, ("channel",), "mean over all committed tokens", named)
    _array(group, "channel_std", stats.std, ("channel",), "standard deviation over all committed tokens", named)


def _add_pixel_labels(group: Any, spec: FeatureSpec, ledger: Ledger, named: Mapping[str, Any]) -> None:
    """Add what bands are, and of which tiles there are pixels: bytes have no NaN that would say so."""
    rgb = spec.layer.name == RGB
    text = "8-bit RGB as decoded" if rgb else "1 where the tile holds data, 0 elsewhere"
    _column(group, "band", ["red", "green", "blue"] if rgb else [spec.layer.name], text, "band")
    committed = np.zeros(len(ledger.table), np.bool_)
    for commit in ledger.commits[ledger.set_of(spec.key)].values():
        committed[commit.start : commit.stop] = True
    held = committed & ledger.table.filled
    _array(group, "committed", held, ("tile",), "whether the tile is stored; the others read as 0", named)


def _add_decoding(
    group: Any, spec: FeatureSpec, manifest: Manifest, ledger: Ledger, codec: Codec, named: Mapping[str, Any]
) -> None:
    """Add what turns codes into features: the scale of each token, and the gain and offset of channels."""
    scale = shard_layout(spec, manifest.group_rows, "scale")
    group.create_array(
        "scale",
        shape=(len(ledger.table), *spec.grid),
        chunks=scale.chunk[:3],
        shards=scale.shape[:3],
        dtype=scale.dtype,
        fill_value=scale.fill,
        compressors=None,
        filters=None,
        dimension_names=AXES[:3],
        attributes={**named, "long_name": "scale of each token; NaN where there is none"},
    )
    gain, offset = codec.affine.gain, codec.affine.offset
    if gain is not None:
        axes = ("channel",) if gain.ndim == 1 else ("component", "channel")
        _array(group, "gain", gain, axes, "features = (features * scale) times this, plus offset", named)
    if offset is not None:
        _array(group, "offset", offset, ("channel",), "what is added last", named)


def _column(group: Any, name: str, values: list[str], text: str, axis: str = "tile") -> None:
    array = group.create_array(
        name,
        shape=(len(values),),
        chunks=(max(len(values), 1),),
        dtype=str,
        compressors=None,
        dimension_names=(axis,),
        attributes={"long_name": text},
    )
    array[:] = np.array(values, dtype=object)


def _array(
    group: Any, name: str, values: Any, axes: tuple[str, ...], text: str, named: Mapping[str, Any] | None = None
) -> None:
    chunks = tuple(max(n, 1) for n in values.shape)
    array = group.create_array(
        name, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=None, dimension_names=axes,
        attributes={**(named or {}), "long_name": text},
    )  # fmt: skip
    array[...] = values
