"""Sources: datasets behind one interface. ``open_source(folder)`` is the way in."""

from __future__ import annotations

from pathlib import Path

from rsmtdf_cache.sources.base import ClassInfo, Georeference, Tile, TileSource

__all__ = ["ClassInfo", "Georeference", "Tile", "TileSource", "open_source"]


def open_source(path: str | Path) -> TileSource:
    """Return the dataset in the folder ``path``.

    ``kind`` in its ``dataset.yaml`` says which source reads it. Raises ``DataError`` when there is no such folder or
    that file is missing or malformed. Call ``check()`` on the result before building from it.
    """
    from rsmtdf_cache.sources.header import read_header

    root = Path(path)
    header = read_header(root)
    if header.kind == "scenes":
        from rsmtdf_cache.sources.geotiff import GeotiffSource

        return GeotiffSource(root, header)
    from rsmtdf_cache.sources.folder import FolderSource

    return FolderSource(root, header)
