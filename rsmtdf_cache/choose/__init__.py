"""``rsmtdf select``: which tiles are worth labelling, told from stored features before any label exists, or from few.

stored maps → one short vector a tile (``descriptors.py``) → an order of tiles (``strategies.py``, ``clusters.py``), for
``uncertain`` also by what a probe of the labelled tiles doubts (``uncertainty.py``) → the list with what it stands for
(``selection.py``) → a picture (``picture.py``). ``trial.py`` asks, where labels exist, whether a linear probe learns
more from such tiles than from random ones.
"""
