"""A build that is stopped leaves a store in which ``verify`` finds nothing, wherever it was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rsmtdf_cache import files
from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import Interrupted
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher


def test_a_build_stopped_after_any_file_system_operation_leaves_nothing_to_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or SIGTERM raise in the main thread: here after every operation that gives a file its name, and every
    eleventh of the others: of pixels, of two units, of all that comes before and after. Then the same command makes the
    store of a build that nobody stopped.
    """
    data = write_dataset(tmp_path / "data", tiles=3, splits={"train": range(3)})

    def build(out: Path) -> str:
        values = {"data": data, "out": out, "teachers": ["mean"], "pixels": True, "codec": "int8", "threads": 1}
        request = BuildRequest.of({**values, "scales": [1.0], "group_rows": 2, "micro_batch": 2, "device": "cpu"})
        return build_store(request, load_teacher=load_mean_teacher).snapshot

    done: list[str] = []
    stop = -1

    def count(operation: str, *paths: Path) -> None:
        if paths[0].is_relative_to(tmp_path / "s"):
            done.append(operation)
            if len(done) == stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(files, "observe", count)
    whole = build(tmp_path / "s")
    operations, checked = list(done), 0
    assert operations.count("link") > 12
    for stop, operation in enumerate(operations, start=1):
        if operation != "link" and stop % 11:
            continue
        shutil.rmtree(tmp_path / "s")
        done.clear()
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            build(tmp_path / "s")
        paths = StorePaths(tmp_path / "s")
        if not any((paths.ledger / "sets").glob("*.json")):
            continue  # nothing that could be called a store: `verify` says so
        found = verify_store(paths.root, deep=True)
        assert found == [], f"stopped after operation {stop} of {len(operations)}, {operation}"
        assert not paths.tmp.exists()
        if checked % 8 == 0:
            assert build(paths.root) == whole
            assert verify_store(paths.root, deep=True) == []
        checked += 1
    assert checked > 12
