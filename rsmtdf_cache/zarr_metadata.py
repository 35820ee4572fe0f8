"""What plain zarr and xarray see: group and array metadata, coordinates, statistics. All of it is derived from the
ledger, written by atomic replace, and can be made again at any time.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from rsmtdf_cache.files import replace_file, replace_json, sha256_file
from rsmtdf_cache.layout import StorePaths, shard_layout
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest
from rsmtdf_cache.specs import FeatureSpec

__all__ = ["derived_files", "write_derived"]

AXES = ("tile", "y", "x", "channel")


def write_derived(paths: StorePaths, manifest: Manifest, ledger: Ledger) -> None:
    """Bring the derived files up to date. The root's consolidated metadata comes last, the list of digests after it."""
    files = derived_files(manifest, ledger)
    root = files.pop("zarr.json")
    for name, data in [*sorted(files.items()), ("zarr.json", root)]:
        path = paths.zarr / name
        if not path.is_file() or path.read_bytes() != data:
            replace_file(path, data)
    names = [*files, "zarr.json"]
    listing = {paths.relative(paths.zarr / name): sha256_file(paths.zarr / name) for name in sorted(names)}
    replace_json(paths.derived, {"files": listing})


def derived_files(manifest: Manifest, ledger: Ledger) -> dict[str, bytes]:
    """Return ``{path below zarr/: bytes}`` of everything that is not a feature shard."""
    import zarr
    from zarr.storage import MemoryStore

    contents: dict[str, Any] = {}
    memory = MemoryStore(contents)
    root = zarr.create_group(memory, zarr_format=3)
    table = ledger.table
    root.attrs.update(manifest.model_dump(mode="json"))
    _column(root, "tile", table.ids, "tile id; '' marks a row without a tile")
    tiles = root.create_group("tiles")
    _column(tiles, "split", [r.split if r else "" for r in table.records], "split of the dataset")
    _column(tiles, "source", [r.source if r else "" for r in table.records], "image file below the dataset's folder")
    _column(tiles, "crs", [r.crs if r else "" for r in table.records], "coordinate reference system; '' = not known")
    affine = [r.affine if r and r.affine else (np.nan,) * 6 for r in table.records]
    _array(tiles, "affine", np.asarray(affine, np.float64).reshape(len(table), 6), ("tile", "coefficient"),
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
    group = root.require_group(path)
    features = group.create_array(
        "features",
        shape=(len(ledger.table), *spec.grid, spec.layer.channels),
        chunks=shard.chunk,
        shards=shard.shape,
        dtype=shard.dtype,
        fill_value=shard.fill,
        compressors=None,
        filters=None,
        dimension_names=AXES,
    )
    features.attrs.update({
        "long_name": f"{spec.teacher.name} {spec.layer.name}, view {spec.view.name}",
        "teacher": spec.teacher.name, "layer": spec.layer.name, "view": spec.view.name,
        "orientation": spec.view.orientation, "stride_tile_px": spec.stride_tile_px,
        "offset_tile_px": spec.offset_tile_px, "codec": spec.encoding.codec, "digest": spec.digest(),
        "spec": spec.to_json(),
    })  # fmt: skip
    stats = ledger.stats(spec.key)
    for name, axis, length in (("y", "y", spec.grid[0]), ("x", "x", spec.grid[1])):
        centres = spec.offset_tile_px + spec.stride_tile_px * np.arange(length)
        _array(group, name, centres, (axis,), "token centre in tile pixels, in the frame of the oriented view")
    _array(group, "channel_mean", stats.mean, ("channel",), "mean over all committed tokens")
    _array(group, "channel_std", stats.std, ("channel",), "standard deviation over all committed tokens")


def _column(group: Any, name: str, values: list[str], text: str) -> None:
    array = group.create_array(
        name,
        shape=(len(values),),
        chunks=(max(len(values), 1),),
        dtype=str,
        compressors=None,
        dimension_names=("tile",),
    )
    array[:] = np.array(values, dtype=object)
    array.attrs["long_name"] = text


def _array(group: Any, name: str, values: Any, axes: tuple[str, ...], text: str) -> None:
    chunks = tuple(max(n, 1) for n in values.shape)
    array = group.create_array(
        name, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=None, dimension_names=axes
    )
    array[...] = values
    array.attrs["long_name"] = text
