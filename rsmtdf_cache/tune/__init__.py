"""``cache tune``: which layers, scales and codec of which teachers are worth their bytes, on labelled tiles.

labelled tiles (``labelled.py``) → maps of every view, encoded once (``maps.py``) → candidates and their exact sizes
(``candidates.py``) → a linear probe for each (``probe.py``) → paired intervals and a choice (``choice.py``), all led by
``sweep.py``; ``picture.py`` draws it. No store is written.
"""
