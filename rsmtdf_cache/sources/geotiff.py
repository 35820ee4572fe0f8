"""A dataset whose tiles are windows of scenes of any size: they are cut when they are read, nothing is copied.

::

    DIR/dataset.yaml      kind: scenes; pixels: bands and range; labels: what stands in them
    DIR/rasters.csv       scene,image,width,height,labels,crs,a,b,c,d,e,f
    DIR/scenes.csv        id,scene,row,column,labeled: which window of which scene a tile is
    DIR/splits/           as in a folder of tiles

``rsmtdf data tile`` writes such a folder. The tile table says where in a file to read; what is read decides a tile's
identity, so a scene that was changed in place is found by its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, TileError, did_you_mean
from rsmtdf_cache.sources.base import Georeference, Tile
from rsmtdf_cache.sources.header import DatasetHeader
from rsmtdf_cache.sources.listed import LABELED, ListedSource, is_tile_id
from rsmtdf_cache.sources.raster_files import RasterFiles, gdal_version
from rsmtdf_cache.sources.rasters import RASTERS, Raster, read_rasters
from rsmtdf_cache.sources.scenes import SCENES, SceneCell, read_scenes

__all__ = ["GeotiffSource"]


class GeotiffSource(ListedSource):
    """The dataset of scenes in the folder ``root``, described by ``header``. Tables are read once, at first use."""

    def __init__(self, root: str | Path, header: DatasetHeader) -> None:
        super().__init__(Path(root), header)
        self._files = RasterFiles(header)
        self.pixels = self._files.rule

    @property
    def decoder(self) -> str:
        """Return GDAL's version and the rule by which values become pixels."""
        return f"{gdal_version()}, {self.pixels.to_json() if self.pixels else None}"

    @property
    def may_lack_data(self) -> bool:
        """Return True: tiles reach beyond scenes, and scenes can have holes."""
        return True

    @cached_property
    def rasters(self) -> Mapping[str, Raster]:
        """The scenes by name. Raises ``DataError`` for a table that cannot be read."""
        return read_rasters(self.root)

    @cached_property
    def cells(self) -> Mapping[str, SceneCell]:
        """The window of each tile id. Raises ``DataError`` for a table that cannot be read."""
        return read_scenes(self.root)

    def tile(self, tile_id: str, split: str) -> Tile:
        """Return the tile that ``split`` names. Raises ``DataError`` for one that no table has."""
        cell = self.cells.get(tile_id)
        if cell is None:
            raise DataError(
                f"{self._split_files[split]}: id {tile_id!r} is not in {self.root / SCENES};"
                f"{did_you_mean(tile_id, self.cells)} add its window or take the id out"
            )
        scene = self.rasters.get(cell.scene)
        if scene is None:
            raise DataError(
                f"{self.root / SCENES}: tile {tile_id!r} is of scene {cell.scene!r}, which {RASTERS} does not have."
                f"{did_you_mean(cell.scene, self.rasters)}"
            )
        has_label = scene.labels is not None and cell.labeled != 0
        return Tile(
            id=tile_id,
            split="train" if split.startswith(LABELED) else split,
            image=scene.image,
            mask=scene.labels if has_label else None,
            georeference=_placed(scene, cell),
            origin_px=(cell.row_px, cell.column_px),
        )

    def check(self, splits: Sequence[str] | None = None) -> None:
        """Raise ``DataError`` for the first fault of the dataset as a whole.

        Tables and lists are checked throughout, and that every scene in use has the size it was laid out with and its
        labels lie on its pixels; labels are read for the asked ``splits`` alone (default: all). What is damaged in a
        scene costs the tiles that show it: ``read_image`` says so.
        """
        self._check_tables()
        self._check_splits(None if splits is None else self._asked(splits))
        tiles = self.tiles(splits)
        firsts = {self.cells[tile.id].scene: tile for tile in tiles if tile.mask is not None or not self._is_away(tile)}
        self._each(self._check_scene, list(firsts.values()))
        self._each(self._check_mask, tiles)

    def _is_away(self, tile: Tile) -> bool:
        return self.is_held(tile.id) and not tile.image.exists()

    def _check_tables(self) -> None:
        for tile_id, cell in self.cells.items():
            if not is_tile_id(tile_id):
                raise DataError(
                    f"{self.root / SCENES}: {tile_id!r} cannot be a tile id; use letters, digits, '_', '.' and '-'"
                )
            scene = self.rasters.get(cell.scene)
            if scene is not None and not (0 <= cell.row_px < scene.height and 0 <= cell.column_px < scene.width):
                raise DataError(
                    f"{self.root / SCENES}: tile {tile_id!r} begins at row {cell.row_px}, column {cell.column_px}, "
                    f"outside of scene {cell.scene!r} ({scene.width} x {scene.height} px)"
                )

    def _check_scene(self, tile: Tile) -> None:
        scene = self.rasters[self.cells[tile.id].scene]
        if not scene.image.is_file():
            raise DataError(f"scene {scene.image} of {self.root / RASTERS}: there is no such file")
        try:
            with self._files.described(scene.image) as found:
                size = found.width, found.height
        except DataError:
            return  # its tiles are put aside one by one
        if size != (scene.width, scene.height):
            raise DataError(
                f"scene {scene.image} is {size[0]} x {size[1]} px, {self.root / RASTERS} says "
                f"{scene.width} x {scene.height}; lay the dataset out again with `rsmtdf data tile`"
            )
        if scene.labels is not None:
            self._files.check_labels(scene.image, scene.labels)

    def _check_mask(self, tile: Tile) -> None:
        labels = self.rasters[self.cells[tile.id].scene].labels
        if labels is None:
            return
        try:
            with self._files.described(tile.image):
                pass
        except DataError:
            return  # what cannot be shown is left out, whatever its labels say
        mask = self._files.mask(tile.image, labels, tile.origin_px or (0, 0))
        if tile.mask is None and (mask != self.ignore_index).any():
            raise DataError(
                f"labels {labels}: tile {tile.id!r} had none when the dataset was laid out and has some now; "
                "lay it out again with `rsmtdf data tile`"
            )

    def read_image(self, tile: Tile) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px, 3]`` uint8 RGB; beyond the scene and without data black. Raises ``TileError``."""
        return self.read_valid(tile)[0]

    def read_valid(self, tile: Tile) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Return the image, and where it holds data: all of it is None. Raises ``TileError``."""
        try:
            return self._files.image(tile.image, tile.origin_px or (0, 0))
        except DataError as error:
            raise TileError(tile.id, str(error)) from None

    def read_mask(self, tile: Tile) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px]`` uint8 class numbers or ``ignore_index``, which is where there is no data too.

        Raises ``DataError`` for labels that cannot be used or hold what is no class, and when the tile has none.
        """
        if tile.mask is None:
            raise DataError(f"tile {tile.id!r} of {self.root} has no labels; it can only be used without")
        return self._files.mask(tile.image, tile.mask, tile.origin_px or (0, 0))


def _placed(scene: Raster, cell: SceneCell) -> Georeference | None:
    if scene.affine is None or scene.crs is None:
        return None
    a, b, c, d, e, f = scene.affine
    x, y = cell.column_px, cell.row_px
    return Georeference(scene.crs, (a, b, a * x + b * y + c, d, e, d * x + e * y + f))
