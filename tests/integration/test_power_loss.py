"""Power fails after any file-system operation of a build: nothing committed is wrong, the same command finishes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import RsmtdfError
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.pull import pull_store
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.upkeep.gc import collect, drop_arrays
from rsmtdf_cache.upkeep.pins import pin_snapshot
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.power import PowerRecorder, State, write_state
from tests.teachers import load_mean_teacher


def build(
    data: Path, out: Path, splits: tuple[str, ...] = ("train",), layers: tuple[str, ...] = ("mean8", "mean16")
) -> None:
    values = {
        "data": data, "out": out, "teachers": [{"name": "mean", "layers": layers}], "splits": splits, "scales": (1.0,),
        "group_rows": 2, "threads": 1, "micro_batch": 2,
    }  # fmt: skip
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)


def content(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted((out / "zarr").rglob("*")) if p.is_file()}


def committed_values(out: Path, snapshot: str | None = None) -> dict[str, bytes]:
    store = FeatureStore.open(out, snapshot=snapshot, verify_reads="always")
    found = {}
    for key in store.keys():
        for row in np.flatnonzero(store.committed(key)):
            found[f"{key} {store.tiles.ids[row]}"] = store.read(key, [int(row)]).values.tobytes()
    return found


def different(states: list[tuple[str, State]]) -> list[tuple[str, State]]:
    seen: dict[str, tuple[str, State]] = {}
    for label, state in states:
        # Drafts have random names and count for nothing; of states that differ in them, the one seen last is taken.
        facts = sorted((p, c) for p, c in state.items() if not p.startswith("tmp/") and not p.endswith(".tmp"))
        seen[hashlib.sha256(repr(facts).encode()).hexdigest()] = (label, state)
    return list(seen.values())


@pytest.mark.parametrize("append", [False, True], ids=["first build", "append of tiles"])
def test_power_loss_after_any_operation_loses_no_commit_and_the_same_command_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append: bool
) -> None:
    data = write_dataset(tmp_path / "data", tiles=6, tile_px=32)
    out = tmp_path / "out"
    out.mkdir()
    recorder = PowerRecorder(out)
    with recorder.recording(monkeypatch):
        layers = ("mean8", "mean16") if append else ("mean8",)
        build(data, out, layers=layers)
        first = len(recorder.states)
        if append:
            build(data, out, ("train", "val", "test"))
    splits = ("train", "val", "test") if append else ("train",)
    states = different(recorder.states[first if append else 0 :])
    assert len(states) > 15
    whole, values = content(out), committed_values(out)
    partly = 0
    for label, state in states:
        crashed = tmp_path / "crashed"
        write_state(state, crashed)
        try:
            before = committed_values(crashed)
        except RsmtdfError as error:
            assert not (crashed / "manifest.json").is_file(), f"{label}: {error}"
            before = {}
        assert before.items() <= values.items(), label
        partly += 0 < len(before) < len(values)
        build(data, crashed, splits, layers)
        assert content(crashed) == whole, label
        assert verify_store(crashed, deep=True) == [], label
        shutil.rmtree(crashed)
    assert partly  # the crash did hit builds with some units committed and others not


def test_power_loss_while_the_ledger_is_compacted_loses_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "data", tiles=6, tile_px=32)
    out = tmp_path / "out"
    out.mkdir()
    recorder = PowerRecorder(out)
    with recorder.recording(monkeypatch):
        build(data, out)
        first, values = len(recorder.states), committed_values(out)
        Ledger.load(StorePaths(out)).compact(tail_max=0)
    assert committed_values(out) == values and not list((out / "ledger" / "commits").rglob("*.json"))
    for label, state in different(recorder.states[first:]):
        write_state(state, tmp_path / "crashed")
        assert committed_values(tmp_path / "crashed") == values, label
        shutil.rmtree(tmp_path / "crashed")


def test_power_loss_while_garbage_is_collected_harms_neither_the_store_nor_a_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "data", tiles=6, tile_px=32)
    out = tmp_path / "out"
    out.mkdir()
    recorder = PowerRecorder(out)
    with recorder.recording(monkeypatch):
        build(data, out)
        pin = pin_snapshot(out, None, "a run")
        build(data, out, ("train", "val"))
        drop_arrays(out, ["mean/*/mean8"])
        first = len(recorder.states)
        collect(out)
    values, pinned = committed_values(out), committed_values(out, pin.snapshot)
    assert values and pinned and not pinned.keys() <= values.keys()
    for label, state in different(recorder.states[first:]):
        crashed = tmp_path / "crashed"
        write_state(state, crashed)
        for _ in range(2):  # as the crash left it, and when the next collection has finished
            assert committed_values(crashed) == values, label
            assert committed_values(crashed, pin.snapshot) == pinned, label
            collect(crashed)
        assert content(crashed) == content(out), label
        assert verify_store(crashed, deep=True) == [], label
        shutil.rmtree(crashed)


def test_power_loss_during_a_pull_leaves_what_the_same_pull_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    build(write_dataset(tmp_path / "data", tiles=6, tile_px=32), source)
    out.mkdir()
    recorder = PowerRecorder(out)
    with recorder.recording(monkeypatch):
        pull_store(str(source), out, workers=1)
    values = committed_values(source)
    assert content(out) == content(source)
    for label, state in different(recorder.states):
        crashed = tmp_path / "crashed"
        write_state(state, crashed)
        if (crashed / "manifest.json").is_file():
            assert committed_values(crashed).items() <= values.items(), label
        pull_store(str(source), crashed, workers=1)
        assert content(crashed) == content(source), label
        assert verify_store(crashed, deep=True) == [], label
        shutil.rmtree(crashed)
