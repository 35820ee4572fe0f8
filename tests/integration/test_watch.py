"""``cache watch`` follows builds of other processes by what they leave in the store's folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import MismatchError
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.watch import Watch
from tests.clusters import until
from tests.commands import Command, start
from tests.datasets import write_dataset

UNITS = 40


def begun(folder: Path) -> tuple[Command, Path]:
    """Return a build of 20 tiles at two scales, a unit each, held (SIGSTOP) after its first commit, and its store."""
    data, out = write_dataset(folder / "data", tiles=20, splits={"train": range(20)}), folder / "s"
    words = ["cache", "build", data, "--out", out, "--teacher", "timm:test_vit,pretrained=none", "--group-rows", 1]
    build = start([*words, "--threads", 1, "--micro-batch", 1], folder, "build")
    until(lambda: any(out.glob("ledger/commits/*/*.json")), build.stderr.read_text)
    os.kill(build.pid, signal.SIGSTOP)
    assert build.runs
    return build, out


def test_a_build_is_followed_to_its_end(tmp_path: Path) -> None:
    build, out = begun(tmp_path)
    eyes = Watch(out)
    first = eyes.look()
    committed = len(list(out.glob("ledger/commits/*/*.json")))
    assert first.builds and first.builder is not None and not first.whole
    assert (first.builder.pid, first.builder.units, first.builder.tiles) == (build.pid, UNITS, UNITS)
    assert first.units == first.tiles == committed < UNITS
    assert first.rate is not None and first.seconds_left is not None
    assert first.seconds_left == pytest.approx((UNITS - committed) / first.rate)
    follower = start(["cache", "watch", out, "--every", 0.05, "--json"], tmp_path, "watch")
    until(lambda: follower.stdout.exists() and follower.stdout.read_text() != "", follower.stderr.read_text)
    os.kill(build.pid, signal.SIGCONT)
    assert build.end() == 0 == follower.end(), follower.stderr.read_text()
    lines = [json.loads(line) for line in follower.stdout.read_text().splitlines()]
    counts = [line["units"] for line in lines]
    assert counts == sorted(counts) and counts[-1] == UNITS and not lines[-1]["builds"]
    assert lines[0]["units_planned"] == UNITS and lines[0]["builder"]["pid"] == build.pid
    last = eyes.look()
    assert last.whole and not last.builds and last.units == UNITS
    Ledger.load(StorePaths(out)).compact(tail_max=0)
    assert eyes.look().units == Watch(out).look().units == UNITS, "records that were folded count, and once"


def test_the_end_of_a_build_that_is_killed_is_no_success(tmp_path: Path) -> None:
    build, out = begun(tmp_path)
    committed = len(list(out.glob("ledger/commits/*/*.json")))
    follower = start(["cache", "watch", out, "--every", 0.05], tmp_path, "watch")
    until(lambda: follower.stdout.exists() and "built by process" in follower.stdout.read_text())
    os.kill(build.pid, signal.SIGKILL)
    assert build.end() == -signal.SIGKILL
    assert follower.end() == 5
    assert f"ended with {committed} of {UNITS} units; the same `rsmtdf cache build`" in follower.stderr.read_text()
    once = start(["cache", "watch", out, "--once"], tmp_path, "once")
    assert once.end() == 0 and "the build has ended" in once.stdout.read_text(), once.stderr.read_text()


def test_a_store_that_nobody_builds_is_said_to_be_so(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", tiles=2, splits={"train": range(2)})
    values = {"data": data, "out": tmp_path / "s", "teachers": ["timm:test_vit,pretrained=none"], "scales": [1.0]}
    build_store(BuildRequest.of({**values, "device": "cpu"}))
    found = Watch(tmp_path / "s").look()
    assert not found.builds and found.builder is None and found.whole and found.units == 1
    with pytest.raises(MismatchError):
        Watch(data)
