"""What never changes in a store: format version, tile side, rows per group, the dataset's name and attribution."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError
from rsmtdf_cache.files import publish_json, read_json
from rsmtdf_cache.layout import StorePaths

__all__ = ["FORMAT_NAME", "FORMAT_VERSION", "Manifest", "create_manifest", "load_manifest", "refuse_foreign_content"]

FORMAT_NAME = "rsmtdf-feature-store"
FORMAT_VERSION = 1


class Manifest(BaseModel):
    """``manifest.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = FORMAT_NAME
    version: int = FORMAT_VERSION
    tile_px: int = Field(gt=0, le=65536)
    group_rows: int = Field(gt=0, le=2**24)
    dataset: str
    attribution: str = ""
    created_by: str = ""


def load_manifest(paths: StorePaths) -> Manifest:
    """Return the manifest. Raises ``UsageError`` when there is no store, ``MismatchError`` for a newer format."""
    if not paths.root.is_dir():
        name, at, _ = str(paths.root).rpartition("@")
        if at and Path(name).is_dir():
            raise UsageError(
                f"no folder {paths.root}. {name} is there: for a snapshot write 8 to 64 lower-case hex digits after "
                "the @ (`rsmtdf cache info` shows them), in commands that read; those that change a store take none"
            )
        raise UsageError(
            f"no feature store at {paths.root}: the folder does not exist; build one with `rsmtdf cache build`"
        )
    if not paths.manifest.is_file():
        raise MismatchError(f"{paths.root} is not a feature store: it has no manifest.json; check the path")
    data = read_json(paths.manifest)
    if data.get("format") != FORMAT_NAME:
        raise MismatchError(f"{paths.manifest}: format {data.get('format')!r}, expected {FORMAT_NAME!r}")
    if isinstance(data.get("version"), int) and data["version"] > FORMAT_VERSION:
        raise MismatchError(
            f"{paths.root}: the store has format version {data['version']}, this rsmtdf reads up to {FORMAT_VERSION}; "
            "install a newer rsmtdf"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise FindingsError(f"{paths.manifest}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None


def create_manifest(paths: StorePaths, manifest: Manifest) -> Manifest:
    """Publish ``manifest`` unless the store has one, and return the one that counts.

    The caller holds the build lock, and judges whether the manifest suits its request.
    """
    if not paths.manifest.exists():
        publish_json(paths.manifest, manifest.model_dump(mode="json"), paths.tmp)
    return load_manifest(paths)


def refuse_foreign_content(root: Path) -> None:
    """Raise ``MismatchError`` when ``root`` is neither a store, nor empty, nor what a killed builder left."""
    if (root / "manifest.json").is_file():
        return
    above = next((p for p in root.parents if p.exists()), root)
    if above.exists() and not above.is_dir():
        raise MismatchError(f"the folder {root}: {above} is a file; choose a new or empty folder")
    if root.exists() and not root.is_dir():
        raise MismatchError(f"the folder {root}: a file is there; choose a new or empty folder")
    own = {"ledger", "tmp"}  # what a builder makes before its manifest
    found = sorted(p.name for p in root.iterdir() if p.name not in own) if root.exists() else []
    if found:
        raise MismatchError(
            f"the folder {root} is not empty and is no feature store (found {', '.join(found[:3])}"
            f"{' …' if len(found) > 3 else ''}); choose a new or empty folder"
        )
