"""Which files a store may have, by name. A name that came from elsewhere is checked here before it becomes a path."""

from __future__ import annotations

import re
from pathlib import Path

from rsmtdf_cache.errors import FindingsError

__all__ = [
    "DROPPED",
    "HEAD",
    "LEASE",
    "MANIFEST",
    "QUARANTINE",
    "checked_name",
    "is_metadata",
    "is_replaced",
    "is_shard",
    "safe_place",
]

HEAD = "ledger/head.json"
LEASE = "ledger/lease.json"
MANIFEST = "manifest.json"
DROPPED = "ledger/dropped.json"
QUARANTINE = "ledger/quarantine.json"

_PART = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}"
_GROUP = r"(?:0|[1-9]\d{0,9})"
_SHARD = re.compile(rf"zarr/{_PART}/{_PART}/{_PART}/(?:features/c/{_GROUP}/0/0/0|scale/c/{_GROUP}/0/0)")
_METADATA = re.compile(rf"zarr/(?:{_PART}/){{0,5}}(?:zarr\.json|c(?:/\d{{1,10}}){{1,4}})")
_RECORD = re.compile(
    r"""manifest\.json
    | ledger/(?: (?:head|lease|quarantine|dropped)\.json
        | tiles/\d{10}\.(?:json|parquet)
        | sets/[0-9a-f]{16}\.json
        | commits/[0-9a-f]{16}/\d{8}(?:-\d{1,8})?\.json
        | segments/[0-9a-f]{64}\.parquet
        | calibrations/[0-9a-f]{64}\.safetensors
        | snapshots/[0-9a-f]{64}\.json )""",
    re.VERBOSE,
)


def checked_name(name: object) -> str:
    """Return ``name`` when a store may have such a file; raise ``FindingsError`` for anything else.

    What passes is relative, has no ``..``, no empty part, no backslash, no NUL and no part that begins with a dot.
    """
    if isinstance(name, str) and len(name) <= 800:
        for pattern in (_RECORD, _SHARD, _METADATA):
            if pattern.fullmatch(name):
                return name
    shown = repr(name)
    raise FindingsError(
        f"the store names a file that no store has: {shown[:80]}{'…' if len(shown) > 80 else ''}; "
        "it is damaged or hostile, nothing of it was used"
    )


def is_shard(name: str) -> bool:
    """Whether ``name`` is a shard, of features or of scales."""
    return _SHARD.fullmatch(name) is not None


def is_replaced(name: str) -> bool:
    """Whether ``name`` changes in place: zarr metadata, dropped arrays, tiles left out. All else is put once."""
    return is_metadata(name) or name in (DROPPED, QUARANTINE)


def is_metadata(name: str) -> bool:
    """Whether ``name`` is Zarr metadata or a derived array (not a shard)."""
    return not is_shard(name) and _METADATA.fullmatch(name) is not None


def safe_place(root: Path, name: str) -> Path:
    """Return the path of the file ``name`` below ``root``. Raises ``FindingsError`` for a name that no store has, and
    when a link below ``root`` would lead out of it.
    """
    place = root
    for part in checked_name(name).split("/"):
        place = place / part
        if place.is_symlink():
            raise FindingsError(f"{place}: a symbolic link lies where a store has a file or folder; remove it")
    return place
