"""The catalogue: which stores this user registered, and which runs used them. See ``docs/decisions/0012-catalogue.md``.

One small file per store and per run below ``RSMTDF_HOME`` (default: the user's data folder)::

    stores/<16 hex>.json     path, dataset, the data folder it was built from, date
    runs/<16 hex>.json       run folder, store, snapshot, recipe, date

A file is replaced atomically and belongs to one path, so any number of processes write without a lock. The
catalogue is a convenience: nothing is lost with it, and what cannot be written or read there is a warning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rsmtdf_cache.errors import FindingsError, ResourceError, RsmtdfError
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.files import read_json, replace_json
from rsmtdf_cache.home import data_home
from rsmtdf_cache.specs import digest_of

__all__ = [
    "RunEntry",
    "StoreEntry",
    "check_catalogue",
    "describe_stores",
    "enter_store",
    "forget_store",
    "register_run",
    "register_store",
    "registered_runs",
    "registered_stores",
    "same_place",
]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may say more

    date: str = ""


class StoreEntry(_Entry):
    """A registered store. ``path``: its absolute folder or redacted URL; ``data``: the dataset it was built from."""

    path: str = Field(min_length=1)
    dataset: str = ""
    data: str | None = None


class RunEntry(_Entry):
    """A training run and the content it reads."""

    run: str = Field(min_length=1)
    store: str = Field(min_length=1)
    snapshot: str | None = None
    recipe: str = ""


_AnyEntry = TypeVar("_AnyEntry", bound=_Entry)


def same_place(path: Path | str) -> str:
    """Return the name of a place: the resolved folder, or the URL without user, password and query."""
    text = str(path).removeprefix("file://")
    if "://" not in text:
        return str(Path(text).expanduser().resolve())
    from rsmtdf_cache.share.address import redact

    return redact(text).rstrip("/")


def check_catalogue() -> None:
    """Raise ``ResourceError`` when the catalogue is there and cannot be read, for those who live from it."""
    for kind in ("stores", "runs"):
        try:
            _files(kind)
        except OSError as error:
            raise _unusable(error, "read") from None


def register_store(
    path: Path | str, data: Path | None = None, dataset: str | None = None, on_event: EventSink = ignore_events
) -> None:
    """Put the store at ``path`` into the catalogue, or bring its entry up to date; never fails, but warns.

    ``data``: the dataset folder it was built from (kept from the entry before when None). ``dataset``: its name;
    default: what the store's manifest says.
    """
    try:
        enter_store(path, data, dataset)
    except (OSError, RsmtdfError) as error:
        on_event(Warned(f"{same_place(path)} is not registered: {_reason(error)}"))


def enter_store(path: Path | str, data: Path | None = None, dataset: str | None = None) -> StoreEntry:
    """Register like ``register_store`` and return the entry; what is in the way is an error.

    Raises ``ResourceError`` for a catalogue that cannot be written, and what reading the store's manifest raises.
    """
    from rsmtdf_cache.layout import StorePaths
    from rsmtdf_cache.manifest import load_manifest

    place = same_place(path)
    before = next((entry for entry in registered_stores() if entry.path == place), None)
    if dataset is None:
        dataset = "" if "://" in place else load_manifest(StorePaths(Path(place))).dataset
    known = before.data if before is not None else None
    entry = StoreEntry(path=place, dataset=dataset, data=same_place(data) if data is not None else known, date=_now())
    try:
        _write("stores", place, entry)
    except OSError as error:
        raise _unusable(error, "written") from None
    return entry


def register_run(
    run: Path, store: Path | str, snapshot: str | None, recipe: str, on_event: EventSink = ignore_events
) -> None:
    """Note that the training run in folder ``run`` reads ``snapshot`` of ``store``; never fails, but warns."""
    place = same_place(run)
    try:
        entry = RunEntry(run=place, store=same_place(store), snapshot=snapshot, recipe=recipe, date=_now())
        _write("runs", place, entry)
    except OSError as error:
        on_event(Warned(f"{place} is not registered: {_unusable(error, 'written')}"))


def registered_stores(on_event: EventSink = ignore_events) -> list[StoreEntry]:
    """Return the registered stores, the latest first; what cannot be read is left out with a warning."""
    return _read("stores", StoreEntry, on_event)


def registered_runs(on_event: EventSink = ignore_events) -> list[RunEntry]:
    """Return the registered runs, the latest first; what cannot be read is left out with a warning.

    A run whose folder is gone is still listed: what is deleted is for the caller to judge.
    """
    return _read("runs", RunEntry, on_event)


def forget_store(path: Path | str) -> bool:
    """Take the store at ``path`` out of the catalogue and return whether it was in; the store itself stays.

    The entries of its runs stay as well: when the store is registered again, they are known again. Raises
    ``ResourceError`` for a catalogue that cannot be written.
    """
    file = _file("stores", same_place(path))
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unusable(error, "written") from None
    return True


def describe_stores(on_event: EventSink = ignore_events) -> list[dict[str, Any]]:
    """Return what ``cache list`` shows, as JSON data, the latest store first.

    ``status`` is ``ok``, ``missing`` (no such folder) or ``unreadable`` (``reason`` says why). ``complete`` counts the
    tiles that have the features of all arrays (pixels where a store has no features), of ``tiles`` in the store.
    Raises ``ResourceError`` when the catalogue cannot be read.
    """
    check_catalogue()
    runs = registered_runs(on_event)
    return [_describe(entry, [r for r in runs if r.store == entry.path]) for entry in registered_stores(on_event)]


def _describe(entry: StoreEntry, runs: list[RunEntry]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": entry.path, "dataset": entry.dataset, "data": entry.data, "date": entry.date, "status": "ok",
        "reason": "", "teachers": [], "views": [], "tiles": None, "complete": None, "nbytes": None,
        "snapshot": None,
        "runs": [r.model_dump(mode="json") for r in runs],
    }  # fmt: skip
    if "://" not in entry.path and not Path(entry.path).is_dir():
        return row | {"status": "missing", "reason": "the folder does not exist"}
    from rsmtdf_cache.store import FeatureStore

    try:
        store = FeatureStore.open(entry.path, verify_reads="never")
        found, committed = store.describe(), [store.committed(key) for key in store.keys() or store.pixel_keys()]
    except (RsmtdfError, OSError, ImportError) as error:
        return row | {"status": "unreadable", "reason": _reason(error)}
    return row | {
        "dataset": found["dataset"], "teachers": [t["name"] for t in found["teachers"]],
        "views": sorted({a["key"].split("/")[1] for a in found["arrays"]}),
        "tiles": found["tiles"], "complete": sum(map(all, zip(*committed, strict=True))),
        "nbytes": found["nbytes"], "snapshot": found["snapshot"],
    }  # fmt: skip


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _file(kind: str, place: str) -> Path:
    return data_home() / kind / f"{digest_of(place)[:16]}.json"


def _write(kind: str, place: str, entry: _Entry) -> None:
    replace_json(_file(kind, place), entry.model_dump(mode="json"))


def _read(kind: str, of: type[_AnyEntry], on_event: EventSink) -> list[_AnyEntry]:
    return sorted(_each(kind, of, on_event), key=lambda entry: entry.date, reverse=True)


def _files(kind: str) -> list[Path]:
    """Return the files of a kind's entries; none when nothing was ever registered. Raises ``OSError``."""
    try:
        return sorted(file for file in (data_home() / kind).iterdir() if file.suffix == ".json")
    except FileNotFoundError:
        return []


def _each(kind: str, of: type[_AnyEntry], on_event: EventSink) -> Iterator[_AnyEntry]:
    try:
        files = _files(kind)
    except OSError as error:
        on_event(Warned(str(_unusable(error, "read"))))
        return
    for file in files:
        try:
            yield of.model_validate(read_json(file))
        except FileNotFoundError:
            continue  # another process forgot it just now
        except (FindingsError, ValidationError, OSError) as error:
            what = "is damaged" if not isinstance(error, OSError) else f"cannot be read ({_reason(error)})"
            again = "`rsmtdf cache register STORE` enters a store again" if kind == "stores" else "it named a run"
            on_event(Warned(f"catalogue entry {file} {what} and is skipped; delete it; {again}"))


def _unusable(error: OSError, verb: str) -> ResourceError:
    asked = os.environ.get("RSMTDF_HOME")
    where = f"RSMTDF_HOME is {asked!r}" if asked else "RSMTDF_HOME is not set, so it is the user's data folder"
    return ResourceError(
        f"the catalogue {data_home()} cannot be {verb} ({_reason(error)}; {where}); set RSMTDF_HOME to a folder "
        "that you can write"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__
