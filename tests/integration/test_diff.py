"""``diff`` tells tiles, arrays, features and bits apart; the growth commands speak JSON and end with agreed codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rsmtdf_cache.build import build_store
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.upkeep.diff import diff_stores
from rsmtdf_cache.upkeep.gc import drop_arrays
from rsmtdf_cache.writer import UnitWriter
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

KEY = "mean/s32o0/mean8"


def build(data: Path, out: Path, *teachers: str, **more: object) -> Path:
    values = {"data": data, "out": out, "teachers": list(teachers), "group_rows": 2, "threads": 1, "micro_batch": 2}
    build_store(BuildRequest.of({**values, "scales": [1.0], **more}), load_teacher=load_mean_teacher)
    return out


def dataset(root: Path, numbers: range, seed: int = 0) -> Path:
    return write_dataset(root, tiles=8, tile_px=32, seed=seed, splits={"train": numbers}, labeled={})


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A holds tiles 0-4 of teachers mean and other, B tiles 3-7 of mean and another teacher called other."""
    folder = tmp_path_factory.mktemp("diff")
    a = build(dataset(folder / "left", range(5)), folder / "a", "mean", "other,layers=mean8")
    b = build(
        dataset(folder / "right", range(3, 8)), folder / "b",
        "mean,layers=mean8", "other,seed=2,pretrained=none,layers=mean8",
    )  # fmt: skip
    return a, b


def run(*arguments: object) -> tuple[int, Any, str]:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    start = done.stdout.find("{") if "--json" in arguments else -1
    return done.exit_code, json.loads(done.stdout[start:]) if start >= 0 else None, done.stdout + done.stderr


def test_tiles_arrays_and_committed_features_are_told_apart(stores: tuple[Path, Path]) -> None:
    found = diff_stores(*stores, deep=True)
    assert not found.same and found.settings == []
    assert found.tiles_only_a == ["t000", "t001", "t002"] and found.tiles_only_b == ["t005", "t006", "t007"]
    assert found.tiles_both == 2 and found.tiles_other_pixels == []
    assert found.arrays_only_a == ["mean/s32o0/mean16"] and found.arrays_only_b == []
    (lines,) = found.arrays_other_spec.values()
    assert [line.split(":")[0] for line in lines] == ["teacher.weights"] and lines[0].endswith("(B)")
    (array,) = found.arrays
    assert (array.key, array.tiles_a, array.tiles_b, array.both, array.different) == (KEY, 5, 5, 2, 0)


def test_a_store_and_its_copy_are_the_same_and_other_pixels_are_named(
    stores: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(stores[0], tmp_path / "copy"))
    found = diff_stores(stores[0], copy, deep=True)
    assert found.same and {a.different for a in found.arrays} == {0}
    other = build(dataset(tmp_path / "data", range(2), seed=9), tmp_path / "s", "mean")
    assert diff_stores(stores[0], other).tiles_other_pixels == ["t000", "t001"]


def test_deep_counts_the_tiles_whose_bits_differ(stores: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    source = FeatureStore.open(stores[0])
    build(dataset(tmp_path / "data", range(5)), copy, "mean,layers=mean8")
    key = FeatureKey.parse(KEY)
    paths = StorePaths(copy)
    ledger = Ledger.load(paths)
    name = ledger.set_of(key)
    record = paths.commit(name, 0)
    record.unlink()
    paths.shard(key, 0).unlink()
    ledger = Ledger.load(paths)
    with UnitWriter(ledger, ledger.sets[name].arrays, 0, 2, ledger.sets[name].profile) as writer:
        for row in range(2):
            stored = source.stored(key, row)
            assert stored is not None
            codes = Codes(stored.values.copy())
            codes.values[0, 0, 0] += np.float16(row)  # row 0 as it was, row 1 with one other value
            writer.add_stored(row, f"t{row:03}", {"mean8": codes})
        writer.commit(2)
    found = diff_stores(stores[0], copy, deep=True)
    assert [a.different for a in found.arrays] == [1] and not found.same
    assert [a.different for a in diff_stores(stores[0], copy).arrays] == [None]


def test_diff_of_two_snapshots_of_one_store_shows_what_was_dropped(stores: tuple[Path, Path], tmp_path: Path) -> None:
    store = Path(shutil.copytree(stores[0], tmp_path / "s"))
    before = FeatureStore.open(store).snapshot
    drop_arrays(store, [KEY])
    found = diff_stores(f"{store}@{before}", store)
    assert found.arrays_only_a == [KEY] and not found.arrays_only_b


def test_the_commands_print_json_and_people_text_and_end_with_the_agreed_codes(
    stores: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = stores
    code, found, _ = run("cache", "diff", a, b, "--deep", "--json", "-q")
    assert code == 0 and found["tiles_both"] == 2 and found["same"] is False
    assert run("cache", "diff", a, b)[0] == 0
    code, _, text = run("cache", "merge", a, b, "--out", tmp_path / "c")
    assert code == 4 and "teacher.weights" in text and "other/s32o0/mean8" in text
    store = Path(shutil.copytree(a, tmp_path / "s"))
    assert run("cache", "drop", store, "other/*/*")[0] == 0
    code, report, _ = run("cache", "merge", store, b, "--out", tmp_path / "c", "--dry-run", "--json", "-q")
    assert code == 4 or report["dry_run"]
    code, pin, _ = run("cache", "pin", store, "--owner", "run 7", "--json")
    assert code == 0 and pin["owner"] == "run 7"
    assert run("cache", "pin", store, "--list")[0] == 0
    code, report, _ = run("cache", "drop", store, "mean/*/mean16", "--json")
    assert code == 0 and report["keys"] == ["mean/s32o0/mean16"] and report["holds"][0]["nbytes"] == report["nbytes"]
    code, plan, _ = run("cache", "gc", store, "--dry-run", "--json")
    assert code == 0 and plan["dry_run"] and plan["pins"][0]["owner"] == "run 7" and plan["nbytes"] > 0
    code, _, text = run("cache", "gc", store, "-q")
    assert code == 0, text
    assert run("cache", "unpin", store, "run 7")[0] == 0
    code, _, text = run("cache", "gc", store)
    assert code == 0 and "freed" in text
    assert run("cache", "merge", store, b, "--out", tmp_path / "d", "-q")[0] == 0
    code, report, _ = run("cache", "merge", tmp_path / "d", b, "--json")
    assert code == 0 and report["tiles_new"] == 0
    code, _, text = run("cache", "drop", store, "mean/s32o0/mean9")
    assert code == 2 and "Did you mean" in text
    assert run("cache", "gc", tmp_path / "nowhere")[0] == 2
