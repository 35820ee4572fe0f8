"""Rasters through GDAL: scenes as 8-bit RGB, labels as class numbers, windows of both. ``scene.py`` is the way in."""
