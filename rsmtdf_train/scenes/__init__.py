"""Maps of georeferenced scenes: windows through the student, blended, written as GeoTIFF in bounded memory."""
