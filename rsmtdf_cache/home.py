"""Where this user's things lie: ``RSMTDF_HOME``, by default the folders that the platform names for data and caches."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_home", "data_home"]


def data_home() -> Path:
    """Return the folder of what is worth keeping (the catalogue); it need not exist."""
    asked = os.environ.get("RSMTDF_HOME")
    if asked:
        return Path(asked).expanduser()
    from platformdirs import user_data_dir

    return Path(user_data_dir("rsmtdf"))


def cache_home() -> Path:
    """Return the folder of what can be made again (digests, fetched shards); it need not exist."""
    if os.environ.get("RSMTDF_HOME"):
        return data_home() / "cache"
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("rsmtdf"))
