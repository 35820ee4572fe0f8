"""Recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

from rsmtdf_cache.errors import UsageError

__all__ = ["bundled_recipe"]

_HERE = Path(__file__).parent


def bundled_recipe(name: str) -> Path:
    """Return the file of the recipe called ``name``, from an installed package or a checkout. Raises ``UsageError``."""
    places = (_HERE / "recipes", _HERE.parent / "recipes")
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    known = sorted({file.stem for place in places for file in place.glob("*.yaml")})
    raise UsageError(f"recipe {name!r} does not come with rsmtdf; these do: {', '.join(known) or 'none'}")
