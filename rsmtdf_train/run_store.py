"""Which content of a store a run reads. It is written into the run's folder when training begins, and stays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import DataError, FindingsError, MismatchError, UsageError
from rsmtdf_cache.files import read_json, replace_json
from rsmtdf_cache.share.address import Address
from rsmtdf_cache.share.catalogue import same_place
from rsmtdf_cache.store import FeatureStore

__all__ = ["RunStore", "names_recorded", "open_run_store", "read_run_store", "store_place", "write_run_store"]

_FILE = "store.json"


@dataclass(frozen=True)
class RunStore:
    """What a run recorded of its store: the place without secrets, the snapshot, and what that snapshot holds.

    The content makes a run continue that began while a build was writing: such a moment's snapshot has no record in
    the store, but what it consists of stays.
    """

    store: str
    snapshot: str
    content: Content


def read_run_store(run: Path) -> RunStore | None:
    """Return what the run in folder ``run`` recorded, None when there is nothing. Raises ``DataError`` for damage."""
    path = run / _FILE
    if not path.is_file():
        return None
    try:
        body: dict[str, Any] = read_json(path)
        return RunStore(str(body["store"]), str(body["snapshot"]), Content.from_json(body["content"]))
    except (FindingsError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}); restore it from a copy, or delete {run} and train again"
        ) from None


def write_run_store(run: Path, place: str, store: FeatureStore) -> None:
    """Record the content that ``store`` shows as that of the run in folder ``run``, unless it is recorded already."""
    recorded = read_run_store(run)
    if recorded is None or recorded.snapshot != store.snapshot:
        body = {"store": place, "snapshot": store.snapshot, "content": store.ledger.content().to_json()}
        replace_json(run / _FILE, body)


def store_place(address: Path | str) -> str:
    """Return the store's folder or URL for records: absolute, without secrets, without the snapshot."""
    parsed = Address.parse(address)
    return same_place(parsed.path if parsed.is_local else parsed.shown.removesuffix(f"@{parsed.snapshot}"))


def open_run_store(address: Path | str, run: Path) -> FeatureStore:
    """Return the store at ``address`` with the content that the run in folder ``run`` reads.

    That is the snapshot which the address names, else the one the run recorded, also when the store has grown since,
    else what the store holds now. Raises ``MismatchError`` when the store does not hold the recorded snapshot any
    more, and what ``FeatureStore.open`` raises.
    """
    parsed = Address.parse(address)
    store = FeatureStore.open(address)
    recorded = read_run_store(run)
    if recorded is None or parsed.snapshot is not None or store.snapshot == recorded.snapshot:
        return store
    try:
        if parsed.is_local:
            then = FeatureStore(parsed.path, recorded.content)
        else:
            then = FeatureStore.open(address, snapshot=recorded.snapshot)
    except (MismatchError, UsageError) as error:
        raise _lost(run, recorded, parsed, store, str(error)) from None
    if then.snapshot != recorded.snapshot:
        raise _lost(run, recorded, parsed, store, "shards or tiles of it were replaced")
    return then


def names_recorded(address: Path | str, recorded: RunStore) -> bool:
    """Return whether ``address`` names what ``recorded`` says: the same place, and no other snapshot."""
    snapshot = Address.parse(address).snapshot
    return store_place(address) == recorded.store and (snapshot is None or recorded.snapshot.startswith(snapshot))


def _lost(run: Path, recorded: RunStore, address: Address, now: FeatureStore, why: str) -> MismatchError:
    place = store_place(address.shown)
    lines = [f"  store: {recorded.snapshot!r} (run) != {now.snapshot!r} (asked)"]
    if place != recorded.store:
        lines.append(f"  place: {recorded.store!r} (run) != {place!r} (asked)")
    return MismatchError(
        f"{run} reads a snapshot that {address.shown} does not hold ({why}). Give the store it was begun with, or "
        "choose another --out; --pin keeps a store from losing a run's snapshot. They differ in:\n" + "\n".join(lines)
    )
