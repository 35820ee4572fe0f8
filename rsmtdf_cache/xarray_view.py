"""A store as xarray sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs import Codec, Codes
from rsmtdf_cache.layout import PARTS

if TYPE_CHECKING:
    import xarray

__all__ = ["decoded", "open_tree"]


def open_tree(zarr: Path, rows: int | None = None) -> xarray.DataTree:
    """Return the arrays below ``zarr``, read when they are asked for.

    ``rows``: of a shard; then features and scales are dask arrays, one chunk a shard. None: not dask.
    """
    import xarray

    tree = xarray.open_datatree(zarr.absolute(), engine="zarr")  # workers may stand elsewhere
    if rows is None:
        return tree

    def by_shard(group: xarray.Dataset) -> xarray.Dataset:
        parts = [group[part] for part in PARTS if part in group]
        return group.assign({p.name: p.chunk({d: rows if d == "tile" else -1 for d in p.dims}) for p in parts})

    return tree.map_over_datasets(by_shard)


def decoded(group: xarray.Dataset, codec: Codec, channels: int) -> xarray.DataArray:
    """Return the features of a group of ``open_tree(…, rows)`` in the teacher's own scale, decoded chunk by chunk."""
    import xarray
    from dask.array import map_blocks
    from dask.delayed import delayed

    stored = group["features"]
    if codec.dtype == np.float16:
        return stored
    codes, scale = stored.data, group["scale"].data[..., None]
    values = map_blocks(  # type: ignore[no-untyped-call]
        _decode, codes, scale, codec=delayed(codec, traverse=False),  # one copy for all chunks, not one in each
        chunks=(*codes.chunks[:-1], (channels,)), dtype=np.float16, meta=np.empty((0, 0, 0, 0), np.float16),
    )  # fmt: skip
    coords = {name: values for name, values in stored.coords.items() if "component" not in values.dims}
    return xarray.DataArray(values, coords, (*stored.dims[:-1], "channel"), "features", stored.attrs)


def _decode(values: NDArray[Any], scale: NDArray[np.float16], codec: Codec) -> NDArray[np.float16]:
    return codec.decode(Codes(values, scale[..., 0]))
