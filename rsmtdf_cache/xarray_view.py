"""A store as xarray sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rsmtdf_cache.layout import PARTS

if TYPE_CHECKING:
    import xarray

__all__ = ["open_tree"]


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
