"""Kill a real build anywhere: the same command finishes it, and its content is an uninterrupted build's bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import Interrupted
from rsmtdf_cache.events import Progress
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

ROOT = Path(__file__).parents[2]

#: Builds in a process of its own, and dies by SIGKILL right after the count-th time that a step of a commit is done.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from rsmtdf_cache import writer
from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from tests.teachers import load_mean_teacher

data, out = Path(sys.argv[1]), Path(sys.argv[2])
step, count, pause = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
seen = 0
def after(number):
    global seen
    time.sleep(pause)
    if number == step:
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
writer.after_step = after
print("ready", flush=True)
build_store(
    BuildRequest.of({"data": data, "out": out, "teachers": ["mean"], "group_rows": 2, "threads": 1, "micro_batch": 2}),
    load_teacher=load_mean_teacher,
)
"""


def start(data: Path, out: Path, step: int = 0, count: int = 0, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(data), str(out), str(step), str(count), str(pause)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(data: Path, out: Path) -> None:
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 2, "threads": 1, "micro_batch": 2}
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)


def content(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted((out / "zarr").rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("kill") / "data", tiles=12, tile_px=64)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kill") / "whole"
    finish(data, out)
    return out


@pytest.mark.parametrize(("step", "count"), [(1, 1), (2, 2), (3, 1), (4, 3), (5, 2), (6, 2), (7, 4), (8, 1)])
def test_sigkill_after_each_numbered_step_loses_nothing(
    data: Path, whole: Path, tmp_path: Path, step: int, count: int
) -> None:
    process = start(data, tmp_path / "s", step, count)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    done = count if step >= 6 else count - 1
    store = FeatureStore.open(tmp_path / "s")
    assert sum(len(units) for units in store.ledger.commits.values()) == done
    finish(data, tmp_path / "s")
    assert content(tmp_path / "s") == content(whole)
    assert FeatureStore.open(tmp_path / "s").snapshot == FeatureStore.open(whole).snapshot
    assert verify_store(tmp_path / "s", deep=True) == []


def test_sigkill_at_random_instants_loses_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(20260301)
    out = tmp_path / "s"
    killed = 0
    for _ in range(3):
        process = start(data, out, pause=0.01)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.5))
        process.kill()
        process.communicate(timeout=120)
        killed += process.returncode == -signal.SIGKILL
    assert killed > 0
    finish(data, out)
    assert content(out) == content(whole)
    assert verify_store(out, deep=True) == []


def test_two_builders_on_one_store_write_one_store(data: Path, whole: Path, tmp_path: Path) -> None:
    builders = [start(data, tmp_path / "s", pause=0.01) for _ in range(2)]
    for builder in builders:
        _, errors = builder.communicate(timeout=120)
        assert builder.returncode == 0, errors
    assert content(tmp_path / "s") == content(whole)
    assert verify_store(tmp_path / "s", deep=True) == []


def test_ctrl_c_between_tiles_keeps_committed_units_and_says_how_to_go_on(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    seen = 0

    def stop_at_the_fifth_tile(event: object) -> None:
        nonlocal seen
        seen += isinstance(event, Progress) and event.task == "mean"
        if seen == 5:
            raise KeyboardInterrupt

    values = {"data": data, "out": tmp_path / "s", "teachers": ["mean"], "group_rows": 2, "threads": 1}
    values["micro_batch"] = 2
    with pytest.raises(Interrupted, match=r"2 shard groups .* safe"):
        build_store(BuildRequest.of(values), on_event=stop_at_the_fifth_tile, load_teacher=load_mean_teacher)
    finish(data, tmp_path / "s")
    assert content(tmp_path / "s") == content(whole)
