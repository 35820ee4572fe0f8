"""What a worker is told once before its first unit, as plain data; and the bench it sets up from that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rsmtdf_cache.cluster.fingerprint import fingerprint_of, unlike
from rsmtdf_cache.encode import TileReader
from rsmtdf_cache.errors import MismatchError, ResourceError, RsmtdfError
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.plan import load_asked
from rsmtdf_cache.request import BuildRequest, TeacherAsked
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import NumericsProfile
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.work import Bench
from rsmtdf_cache.writer import Publisher

__all__ = ["set_up", "site_of"]


def site_of(bench: Bench, mark: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return what a worker needs to set up the same bench. ``mark``: what it knows the store by (``open_site``)."""
    return {
        "request": _with_whole_paths(bench.request).model_dump(mode="json", exclude_unset=True),
        "group_rows": bench.group_rows,
        "mark": mark,
        "sets": {
            name: {"asked": _whole(bench.asked[name]).model_dump(mode="json"), "profile": profile.to_json()}
            for name, profile in bench.profiles.items()
        },
        "fingerprint": fingerprint,
    }


def set_up(site: dict[str, Any]) -> Bench:
    """Return the bench of ``site`` in this process, after it has shown that it gives the client's bits.

    Nothing is written. Raises ``ResourceError`` when store, dataset or weights are out of reach here, ``MismatchError``
    with the lines that differ.
    """
    request = BuildRequest.of(site["request"])
    ledger, publish = _open_store(request.out, site["mark"])
    try:
        source = open_source(request.data)
    except (RsmtdfError, OSError) as error:
        raise ResourceError(f"does not see the dataset {request.data}, or another one ({error})") from None
    teachers: dict[TeacherAsked, Teacher] = {}
    by_set, profiles, asked_of = {}, {}, {}
    for name, told in site["sets"].items():
        asked = asked_of[name] = TeacherAsked.model_validate(told["asked"])
        if asked not in teachers:
            teachers[asked] = load_asked(asked, request)
        by_set[name], profiles[name] = teachers[asked], NumericsProfile.from_json(told["profile"])
    reader = TileReader(source, ledger.table)
    bench = Bench(request, source, ledger, site["group_rows"], asked_of, by_set, profiles, reader, publish)
    lines = unlike(site["fingerprint"], fingerprint_of(bench))
    if lines:
        raise MismatchError("would not write the same bytes:\n  " + "\n  ".join(lines))
    return bench


def _open_store(out: Path | str, mark: str) -> tuple[Ledger, Publisher | None]:
    if isinstance(out, str):
        from rsmtdf_cache.bucket.destination import open_for_worker

        return open_for_worker(out, mark)
    paths = StorePaths(out)
    if not (paths.tmp / mark).is_file():
        raise ResourceError(f"does not see the store {out}, which all workers must share under this path")
    return Ledger.load(paths), None


def _with_whole_paths(request: BuildRequest) -> BuildRequest:
    out = _absolute(request.out) if isinstance(request.out, Path) else request.out
    return request.model_copy(update={"data": _absolute(request.data), "out": out})


def _whole(asked: TeacherAsked) -> TeacherAsked:
    return asked.model_copy(update={"weights": _absolute(asked.weights)}) if asked.weights is not None else asked


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # links stay: where they lead may differ between machines
