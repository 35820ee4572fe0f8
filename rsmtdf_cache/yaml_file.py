"""Reading what a user wrote in YAML: recipes and build configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rsmtdf_cache.errors import UsageError

__all__ = ["read_yaml"]


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the keys and values of the YAML file ``path``; ``what`` names it in errors. Raises ``UsageError``."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{what} {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {path}: not YAML ({error})") from None
    if not isinstance(data, dict):
        raise UsageError(f"{what} {path}: expected keys and values, found {type(data).__name__}")
    return data
