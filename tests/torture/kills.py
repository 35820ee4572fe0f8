"""SIGKILL at random instants: what is committed stays, and the same command ends in an undisturbed build's bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.processes import ChildFailed, in_child, kill_child
from tests.torture.scene import Scene, audit, build, difference

__all__ = ["torture_kills"]

#: Rest after each step of a commit: none, or enough that kills meet the steps and not what lies between.
_PAUSES = (0.0, 0.0, 0.002, 0.01)
_STEPS = 24 * 5


def torture_kills(
    scene: Scene, folder: Path, count: int, rng: random.Random, tell: Callable[[], None]
) -> dict[str, Any]:
    """Kill ``count`` builds and return what was seen.

    A store is killed and continued until it is complete, or until chance has it finished and compared earlier.
    """
    seen: dict[str, Any] = {
        "kills": 0, "finished": 0, "units_checked": 0, "before_manifest": 0, "losses": [], "silent": [], "errors": [],
    }  # fmt: skip
    number, out, known = 0, folder / "k0", frozenset[str]()
    for _ in range(count * 10):
        if seen["kills"] == count:
            break
        pause = rng.choice(_PAUSES)
        after = rng.uniform(0, scene.seconds + pause * _STEPS)
        done = False
        try:
            done = not kill_child(lambda: build(scene.data, out, pause=pause), after)  # noqa: B023 - called at once
            seen["kills"] += not done
            there = audit(out, scene)
        except ChildFailed as error:
            seen["errors"].append(f"after kill {seen['kills']}: {error}")
            shutil.rmtree(out, ignore_errors=True)
            number, known = number + 1, frozenset()
            out = folder / f"k{number}"
            continue
        seen["units_checked"] += len(there.units)
        seen["before_manifest"] += not done and not (out / "manifest.json").is_file()
        lost = known - there.units
        seen["losses"] += [f"kill {seen['kills']}: unit {unit} was committed and is gone" for unit in sorted(lost)]
        seen["silent"] += [f"kill {seen['kills']}: {fault}" for fault in there.faults]
        known = there.units
        if not done:
            tell()
        if done or rng.random() < 0.1 or seen["kills"] == count:
            _finish(scene, out, seen)
            shutil.rmtree(out)
            number, known = number + 1, frozenset()
            out = folder / f"k{number}"
    return seen


def _finish(scene: Scene, out: Path, seen: dict[str, Any]) -> None:
    try:
        in_child(lambda: build(scene.data, out))
        unequal = difference(out, scene)
    except ChildFailed as error:
        seen["errors"].append(f"after kill {seen['kills']}: {error}")
        return
    seen["finished"] += 1
    if unequal:
        seen["silent"].append(f"after kill {seen['kills']}, finished: {unequal}")
