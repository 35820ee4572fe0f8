"""The torture of ``make torture``, a tenth of it: nothing is lost, and nothing is wrong without an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

#: What is done here, by part. The issue that made these promises asks for 20 kills in the suite.
TIMES = {"kills": 20, "flips": 26, "cuts": 4, "full": 2}


def torture(out: Path, part: str, times: int, seed: int) -> dict[str, Any]:
    """Run one part in a process of its own (this one has threads, which a fork would not copy); return its numbers."""
    command = [sys.executable, "-m", "tests.torture", f"--{part}", str(times), "--seed", str(seed), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1) and out.is_file(), done.stderr
    found: dict[str, Any] = json.loads(out.read_text())["parts"][part]
    assert done.returncode == bool(found["losses"] or found["silent"] or found["errors"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", TIMES)
def test_torture_finds_no_loss_and_no_silent_error(tmp_path: Path, part: str) -> None:
    found = torture(tmp_path / "t.json", part, TIMES[part], seed=3)
    assert (found["losses"], found["silent"], found["errors"]) == ([], [], [])
    done = {"kills": "kills", "flips": "flips", "cuts": "cuts", "full": "points"}[part]
    assert found[done] == TIMES[part]


def test_the_harness_sees_a_loss_a_silent_error_and_a_fault(tmp_path: Path) -> None:
    """Guards the tests above: a harness that finds nothing anywhere would pass them."""
    script = """
import shutil, sys
from pathlib import Path
from tests.torture.scene import audit, difference, make_scene
from rsmtdf_cache.layout import StorePaths
folder = Path(sys.argv[1])
scene = make_scene(folder, tiles=6)
copy = Path(shutil.copytree(scene.whole, folder / "copy"))
assert audit(copy, scene).faults == () and difference(copy, scene) == ""
before = audit(copy, scene).units
shard = sorted(copy.glob("zarr/mean/*/*/features/c/0/0/0/0"))[0]
data = bytearray(shard.read_bytes())
data[3] ^= 4
shard.write_bytes(data)
print("refused", any("a reader is refused" in f and "sha256 differs" in f for f in audit(copy, scene).faults))
print(difference(copy, scene))
sorted(copy.glob("ledger/commits/*/*.json"))[0].unlink()
shard.write_bytes(scene.whole.joinpath(shard.relative_to(copy)).read_bytes())
after = audit(copy, scene)
print("lost", len(before - after.units), any("the ledger has lost" in f for f in after.faults))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == "refused True" and second.startswith("1 files differ, first zarr/mean/") and third == "lost 1 True"
