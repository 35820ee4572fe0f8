"""The command: torture as many times as asked, a table on stdout, all numbers in a JSON file, exit 1 for any loss."""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = ("kills", "flips", "cuts", "full")


def main() -> int:
    """Run the parts that were asked for and return the exit code."""
    options = _options()
    # Before anything heavy is imported: no thread pools, which a fork would not copy.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory(prefix="rsmtdf-torture-", dir=options.tmp) as name:
        # The user's own catalogue, and the marks of checked shards, stay out of it.
        os.environ["RSMTDF_HOME"], os.environ["TMPDIR"] = f"{name}/home", name
        tempfile.tempdir = None
        return _run(options, Path(name))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    for part, what in zip(PARTS, ("SIGKILLs", "flipped bits", "cut transfers", "full disks"), strict=True):
        parser.add_argument(f"--{part}", type=int, default=0, metavar="N", help=f"{what} (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="what decides every random choice (default 0)")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--tmp", type=Path, help="folder to work in (default: the system's)")
    return parser.parse_args()


def _run(options: argparse.Namespace, folder: Path) -> int:
    # The parent of all children imports here whatever they need; see processes.py.
    from tests.torture.cuts import torture_cuts
    from tests.torture.flips import torture_flips
    from tests.torture.full import torture_full
    from tests.torture.kills import torture_kills
    from tests.torture.scene import make_scene

    parts = {"kills": torture_kills, "flips": torture_flips, "cuts": torture_cuts, "full": torture_full}
    scene = make_scene(folder)
    started = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for part, torture in parts.items():
        count: int = getattr(options, part)
        if count:
            since = time.perf_counter()
            rng = random.Random(f"{options.seed} {part}")  # a part is the same alone or with others
            seen = torture(scene, folder / part, count, rng, _ticker(part, count))
            results[part] = {"asked": count, **seen, "seconds": round(time.perf_counter() - since, 1)}
    totals = {name: sum(len(r[name]) for r in results.values()) for name in ("losses", "silent", "errors")}
    from rsmtdf_cli.machine import context

    found = context() | {"command": shlex.join(["python", "-m", "tests.torture", *sys.argv[1:]])}
    document = {
        "seed": options.seed, "context": found, "seconds": round(time.perf_counter() - started, 1), "totals": totals,
        "parts": results,
    }  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    _show(results, document)
    return 1 if any(totals.values()) else 0


def _ticker(part: str, count: int) -> Callable[[], None]:
    """Return what is called after each act: it writes a line to stderr ten times a part."""
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if done % max(1, count // 10) == 0:
            print(f"{part}: {done}", file=sys.stderr, flush=True)

    return tell


def _show(results: dict[str, dict[str, Any]], document: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table("torture", "times", "losses", "silent errors", "other errors", "seconds", "seen")
    for part, seen in results.items():
        rest = {k: v for k, v in seen.items() if k not in ("asked", "losses", "silent", "errors", "seconds")}
        counts = [str(len(seen[name])) for name in ("losses", "silent", "errors")]
        said = ", ".join(f"{k} {v}" for k, v in rest.items())
        table.add_row(part, str(seen["asked"]), *counts, str(seen["seconds"]), said)
    console.print(table)
    for part, seen in results.items():
        for name in ("losses", "silent", "errors"):
            for line in seen[name][:20]:
                console.print(f"{part}, {name}: {line}", markup=False, soft_wrap=True)
    machine = document["context"]["machine"]
    console.print(
        f"seed {document['seed']}, {document['seconds']} s on {machine['cores']} cores ({machine['processor']}), "
        f"{document['context']['date']}", markup=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
