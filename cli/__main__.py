"""``python -m rsmtdf_cli`` is ``rsmtdf``."""

from __future__ import annotations

from rsmtdf_cli.app import main

if __name__ == "__main__":
    main()
