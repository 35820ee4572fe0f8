"""What a store of a million tiles costs to open, to describe, to continue and to audit; no features are written.

``python bench/scale.py OUT.json [--tiles 1000000] [--keep FOLDER]``

The tile table, array sets, commits (compacted, with their statistics), zarr metadata, snapshot and head are written by
the project's own writers, as a build of two teachers (DINOv2-B at 448 px, CLIP-L at 224 px, float16) would leave them;
only the shards are missing, and their digests are made up. Every measurement is a process of its own, so that its peak
memory is its own; sizes alternate in rounds, and the median counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GRIDS = {"dinov2_vitb14": ("block11", 768, 14, 448, 32), "clip_vitl14": ("block23", 1024, 14, 224, 16)}
TILE_PX = 512
#: Commits in one file: what compaction leaves of a large build.
SEGMENT_COMMITS = 4096


def write_store(root: Path, tiles: int) -> None:
    """Write a store of ``tiles`` tiles without shards to ``root``."""
    import numpy as np

    from rsmtdf_cache.head import write_head
    from rsmtdf_cache.layout import ArraySet, StorePaths, choose_group_rows, unit_nbytes
    from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
    from rsmtdf_cache.manifest import Manifest, create_manifest
    from rsmtdf_cache.segment import write_segment
    from rsmtdf_cache.specs import (
        EncodingSpec,
        FeatureSpec,
        LayerSpec,
        NumericsProfile,
        PixelSpec,
        TeacherSpec,
        ViewSpec,
    )  # fmt: skip
    from rsmtdf_cache.stats import ChannelStats
    from rsmtdf_cache.tiles import TileRecord

    pixel = PixelSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    specs = [
        FeatureSpec(
            teacher=TeacherSpec(
                name=name, family=name.split("_")[0], architecture=name,
                weights=hashlib.sha256(name.encode()).hexdigest(),
                weights_origin="made up", patch_px=14, native_px=size, prefix_tokens=1, norm=True, pixel=pixel,
            ),
            layer=LayerSpec(name=layer, channels=channels, stride_px=stride, offset_px=stride / 2),
            view=ViewSpec(size_px=size, orientation=0), encoding=EncodingSpec(), tile_px=TILE_PX, grid=(grid, grid),
        )
        for name, (layer, channels, stride, size, grid) in GRIDS.items()
    ]  # fmt: skip
    rows = choose_group_rows(specs)
    paths = StorePaths(root)
    paths.ledger.mkdir(parents=True)
    manifest = create_manifest(paths, Manifest(tile_px=TILE_PX, group_rows=rows, dataset="a million tiles"))
    ledger = Ledger(paths)
    ledger.add_tiles(0, [
        TileRecord(
            f"scene{n // 4000:04d}_{n % 4000:04d}", hashlib.sha256(b"%d" % n).digest(), "train",
            f"images/scene{n // 4000:04d}_{n % 4000:04d}.png", "EPSG:32633",
            (10.0, 0.0, 300000.0 + 5120 * (n % 1000), 0.0, -10.0, 5000000.0 - 5120 * (n // 1000)),
        )
        for n in range(tiles)
    ])  # fmt: skip
    profile = NumericsProfile(device="cpu", precision="float32", torch="2", threads=1, micro_batch=8)
    rng = np.random.default_rng(0)

    def commits(name: str, spec: FeatureSpec) -> Iterator[Commit]:
        for group in range(-(-tiles // rows)):
            start, stop = group * rows, min(tiles, (group + 1) * rows)
            path = paths.relative(paths.shard(spec.key, group))
            sums = rng.normal(size=spec.layer.channels)
            stats = ChannelStats((stop - start) * spec.grid[0] ** 2, sums, sums**2, 1.0, 1.0)
            shard = ShardRecord(
                spec.layer.name, path, unit_nbytes(spec, rows, stop - start),
                hashlib.sha256(path.encode()).hexdigest(), stats,
            )  # fmt: skip
            yield Commit(name, group, start, stop, profile, (shard,))

    for spec in specs:
        arrays = ArraySet((spec,))
        ledger.add_set(arrays, profile)
        found = list(commits(arrays.id, spec))
        for first in range(0, len(found), SEGMENT_COMMITS):
            write_segment(paths.segments, found[first : first + SEGMENT_COMMITS])
    write_head(paths, manifest, Ledger.load(paths))


def _open(root: Path) -> Callable[[], object]:
    from rsmtdf_cache.store import FeatureStore

    return lambda: FeatureStore.open(root)


def _describe(root: Path) -> Callable[[], object]:
    from rsmtdf_cache.store import FeatureStore

    return lambda: FeatureStore.open(root, verify_reads="never").describe()


def _statistics(root: Path) -> Callable[[], object]:
    from rsmtdf_cache.store import FeatureStore

    def read() -> object:
        store = FeatureStore.open(root)
        return [store.stats(key) for key in store.keys()]

    return read


def _resume(root: Path) -> Callable[[], object]:
    """What a build does with its ledger between the list of its tiles and the first unit: which units are missing."""
    from rsmtdf_cache.forecast import teacher_work
    from rsmtdf_cache.head import load_whole
    from rsmtdf_cache.layout import StorePaths
    from rsmtdf_cache.manifest import load_manifest
    from rsmtdf_cache.plan import array_sets, check_space

    paths = StorePaths(root)

    def plan() -> object:
        manifest, ledger = load_manifest(paths), load_whole(paths)
        table, rows = ledger.table, manifest.group_rows
        groups = sorted({table.row_of(name) // rows for name in table.ids})
        for units in ledger.commits.values():
            del units[groups[-1]]  # as if the last one had not been reached
        sets = array_sets(list(ledger.specs().values()), ledger)
        check_space(root, ledger, sets, groups, rows)
        work = [w for a in sets for w in teacher_work(a.specs[0].teacher, [a], groups, ledger, rows, {})]
        assert sum(w.maps for w in work) > 0
        return work

    return plan


def _verify(root: Path) -> Callable[[], object]:
    """``cache verify`` without its look at each shard: there are none."""
    from rsmtdf_cache.layout import StorePaths
    from rsmtdf_cache.manifest import load_manifest
    from rsmtdf_cache.upkeep.survey import survey
    from rsmtdf_cache.verify import audit

    paths = StorePaths(root)

    def check() -> object:
        findings = audit(survey(paths), load_manifest(paths), builder=False)
        assert not findings, findings[:3]
        return findings

    return check


def _end_of_build(root: Path) -> Callable[[], object]:
    """What a build does at its end: zarr metadata, snapshot and head."""
    from rsmtdf_cache.head import load_whole, write_head
    from rsmtdf_cache.layout import StorePaths
    from rsmtdf_cache.manifest import load_manifest

    paths = StorePaths(root)
    return lambda: write_head(paths, load_manifest(paths), load_whole(paths))


def _first_open(root: Path) -> Callable[[], object]:
    """Open the store on a node that has not compared its tables with their sha256 yet."""
    os.environ["TMPDIR"] = tempfile.mkdtemp()  # where the marks of this node lie
    tempfile.tempdir = None
    return _open(root)


WORK: dict[str, Callable[[Path], Callable[[], object]]] = {
    "open, first on this node": _first_open,
    "open": _open,
    "open and describe": _describe,
    "read all statistics": _statistics,
    "resume: what is missing": _resume,
    "verify records and tables": _verify,
    "end of a build": _end_of_build,
}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _child(name: str, root: Path) -> None:
    run = WORK[name](root)
    import pyarrow.parquet  # noqa: F401  -- a process that opens stores needs it once; apart from what grows with the store

    before = _peak_mb()
    started, cpu = time.perf_counter(), time.process_time()
    kept = run()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "imports_mb": before, "peak_mb": _peak_mb()}))
    del kept


def _measure(arguments: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.stdout else {}


def _median(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}


def main() -> None:
    """Write the stores, measure in rounds, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiles", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for the stores; they stay, and are used again")
    parser.add_argument("--do", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.do == "write":
        write_store(asked.out, asked.tiles)
    elif asked.do:
        _child(asked.do, asked.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _run(asked, asked.keep or Path(folder))


def _run(asked: argparse.Namespace, folder: Path) -> None:
    sizes = {f"{n:,}": n for n in (asked.tiles // 10, asked.tiles)}
    stores = {name: folder / f"tiles-{n}" for name, n in sizes.items()}
    for name, n in sizes.items():
        if not (stores[name] / "ledger" / "head.json").is_file():
            _measure(["--do", "write", "--tiles", str(n), str(stores[name])])
    found: dict[str, dict[str, list[dict[str, float]]]] = {work: {name: [] for name in sizes} for work in WORK}
    for round_ in range(asked.rounds + 1):  # the first one warms the page cache, and is not counted
        for work in WORK:
            for name in sizes:
                one = _measure(["--do", work, str(stores[name])])
                if round_:
                    found[work][name].append(one)
    table: dict[str, Any] = {w: {n: _median(v) for n, v in by.items()} for w, by in found.items()}
    records = {n: sum(p.stat().st_size for p in (s / "ledger").rglob("*") if p.is_file()) for n, s in stores.items()}
    from rsmtdf_cli.machine import context

    result = {
        **context(), "command": "python bench/scale.py OUT", "rounds": asked.rounds, "records_nbytes": records,
        "work": table,
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':28}{'tiles':>12}{'seconds':>10}{'cpu s':>8}{'peak MB':>10}{'of which imports':>18}")
    for work, by in table.items():
        for name, one in by.items():
            print(f"{work:28}{name:>12}{one['seconds']:10.2f}{one['cpu_seconds']:8.2f}{one['peak_mb']:10.0f}"
                  f"{one['imports_mb']:18.0f}")  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
