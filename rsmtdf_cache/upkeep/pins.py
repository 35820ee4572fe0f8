"""Pins: records inside the store that keep a snapshot's data from collection. Only a pin protects (decision 7).

A pin is published once and never changes: pinning again with another date makes a second pin. So a reader pins
without the build lock, and a collection that runs at the same moment either sees the pin or is seen by the reader
(``docs/decisions/0010-growth.md``).
"""

from __future__ import annotations

import datetime
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError, did_you_mean
from rsmtdf_cache.files import fsync_folder, is_locked, publish_json, read_json, remove_file
from rsmtdf_cache.head import find_snapshot, load_whole
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.specs import digest_of

__all__ = [
    "Pin",
    "doomed_record",
    "list_pins",
    "named_shards",
    "pin_snapshot",
    "unpin",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
_TEXT_LENGTH = 1000


@dataclass(frozen=True)
class Pin:
    """Somebody needs a snapshot: who, until when (the last day, UTC; None = until removed) and why."""

    name: str
    snapshot: str
    owner: str
    expires: str | None
    note: str
    created: str

    def expired(self, today: datetime.date | None = None) -> bool:
        """Whether the last day is over."""
        if self.expires is None:
            return False
        return (today or _today()) > datetime.date.fromisoformat(self.expires)


def pin_snapshot(
    root: Path | str, snapshot: str | None = None, owner: str = "", expires: str | None = None, note: str = ""
) -> Pin:
    """Pin a snapshot of the store at ``root`` (None: what it holds now) and return the pin. Needs no build lock.

    ``snapshot`` may be shortened to its first 8 or more digits. ``expires``: the last day as ``YYYY-MM-DD``.
    Raises ``UsageError`` (no owner, a date that is over), ``MismatchError`` (the store has no such snapshot, or its
    data is being or has been collected).
    """
    paths = StorePaths(Path(root))
    load_manifest(paths)
    _check_words(owner, expires, note)
    ledger = load_whole(paths)
    current = ledger.snapshot()
    wanted = current if snapshot is None else find_snapshot(paths, ledger, snapshot).snapshot()
    # Drafts lie among the pins: a builder may clear the store's tmp/ at any moment.
    if wanted == current:
        publish_json(paths.snapshot(wanted), {"snapshot": wanted, **ledger.content().to_json()}, paths.pins)
    value = {"snapshot": wanted, "owner": owner, "expires": expires, "note": note}
    slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", owner).strip("-.+_")[:48] or "pin"
    name = f"{slug}-{wanted[:12]}-{digest_of(value)[:8]}"
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fresh = publish_json(paths.pin(name), {**value, "created": created}, paths.pins)
    try:
        _refuse_collected(paths, wanted)
    except MismatchError:
        if fresh:
            remove_file(paths.pin(name))
        raise
    return _read_pin(paths.pin(name))


def unpin(root: Path | str, name: str, snapshot: str | None = None) -> list[Pin]:
    """Remove the pin called ``name``, or all pins of the owner ``name`` (of one snapshot, when given); return them.

    Raises ``UsageError`` when there is none.
    """
    paths = StorePaths(Path(root))
    load_manifest(paths)
    if _NAME.fullmatch(name) and snapshot is None and paths.pin(name).is_file():
        try:
            chosen = [_read_pin(paths.pin(name))]
        except FindingsError:  # a damaged pin can be given up by its name; nothing else says what it meant
            chosen = [Pin(name, "", "unknown, the pin was damaged", None, "", "")]
        remove_file(paths.pin(name))
        fsync_folder(paths.pins)
        return chosen
    pins = list_pins(root)
    chosen = [p for p in pins if name in (p.name, p.owner) and p.snapshot.startswith(snapshot or "")]
    if not chosen:
        names = [p.name for p in pins] + [p.owner for p in pins]
        held = ", ".join(f"{p.name} (owner {p.owner!r})" for p in pins) or "none"
        hint = "" if name in names else did_you_mean(name, names)
        of = f" of a snapshot {snapshot}" if snapshot else ""
        raise UsageError(f"{root}: no pin or owner {name!r}{of}.{hint} Pins: {held}")
    for pin in chosen:
        remove_file(paths.pin(pin.name))
    fsync_folder(paths.pins)
    return chosen


def list_pins(root: Path | str) -> list[Pin]:
    """Return the store's pins by name, the expired ones too. Raises ``FindingsError`` when one is damaged."""
    pins = []
    for path in sorted(StorePaths(Path(root)).pins.glob("*.json")):
        try:
            pins.append(_read_pin(path))
        except FileNotFoundError:  # given up this moment
            continue
    return pins


def named_shards(ledger: Ledger) -> dict[str, int]:
    """Return ``{path below the store: bytes}`` of every shard that ``ledger`` shows."""
    return {shard.path: shard.nbytes for key in ledger.specs() for shard in ledger.all_shards(key)}


def doomed_record(paths: StorePaths) -> Path:
    """Return the place where a running collection says which files it is about to delete."""
    return paths.tmp / "collecting.json"


def _refuse_collected(paths: StorePaths, snapshot: str) -> None:
    """Raise ``MismatchError`` when data of the snapshot, pinned a moment ago, is going or gone.

    A collection writes down what it will delete before it looks for pins a last time; this side pins before it looks
    for that list. One of the two sees the other.
    """
    ledger = Ledger.load(paths)
    if ledger.snapshot() == snapshot:
        return  # what the store shows is never collected
    needed = {paths.relative(paths.snapshot(snapshot))}
    try:
        needed |= set(named_shards(find_snapshot(paths, ledger, snapshot)))
    except (FindingsError, MismatchError) as error:
        raise MismatchError(f"{paths.root}: snapshot {snapshot[:16]} cannot be pinned any more: {error}") from None
    lost = needed & _doomed(paths) or {path for path in needed if not (paths.root / path).is_file()}
    if lost:
        raise MismatchError(
            f"{paths.root}: snapshot {snapshot[:16]} cannot be pinned: {len(lost)} of its {len(needed)} files have "
            f"been collected (first: {min(lost)}); pin what the store holds now, or build the arrays again"
        )


def _doomed(paths: StorePaths) -> set[str]:
    """Return what a collection that runs now is about to delete."""
    if not is_locked(paths.lock):
        return set()
    try:
        return set(read_json(doomed_record(paths))["files"])
    except FileNotFoundError:
        return set()


def _check_words(owner: str, expires: str | None, note: str) -> None:
    if not owner.strip() or len(owner) > _TEXT_LENGTH or len(note) > _TEXT_LENGTH:
        raise UsageError(f"a pin needs an owner, and at most {_TEXT_LENGTH} characters each of owner and note")
    if expires is not None:
        try:
            last = datetime.date.fromisoformat(expires)
        except ValueError:
            raise UsageError(f"expires {expires!r}: write the last day as YYYY-MM-DD") from None
        if last.isoformat() != expires or last < _today():
            raise UsageError(f"expires {expires!r}: write a day that is not over yet as YYYY-MM-DD")


def _read_pin(path: Path) -> Pin:
    try:
        body: dict[str, Any] = read_json(path)
    except FindingsError:
        raise FindingsError(f"{path}: the pin is damaged; {_hint(path)}") from None
    try:
        pin = Pin(path.stem, **body)
        text = all(isinstance(v, str) for k, v in asdict(pin).items() if k != "expires" or v is not None)
        if not text or not re.fullmatch(r"[0-9a-f]{64}", pin.snapshot) or not _NAME.fullmatch(pin.name):
            raise ValueError("a field has the wrong form")
        if pin.expires is not None:
            datetime.date.fromisoformat(pin.expires)
    except (TypeError, ValueError) as error:
        raise FindingsError(f"{path}: not a pin ({error}); {_hint(path)}") from None
    return pin


def _hint(path: Path) -> str:
    return (
        "while it lies there nothing is collected: ask its owner, then give it up with "
        f"`rsmtdf cache unpin {path.parent.parent} {path.stem}` and pin again"
    )


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()
