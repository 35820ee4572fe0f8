"""How a build scales with workers, and what a unit costs beside its work: a teacher whose calls take a fixed time.

``python bench/workers.py OUT.json [--tiles 192] [--call-ms 50] [--workers 1,2,4] [--rounds 3] [--keep FOLDER]``

The teacher sleeps: it needs no core, so that efficiency shows what the way of working costs, also where there are few
cores. It is a plug-in of its own (an entry point), which is how any teacher of yours comes to workers. Rates are those
between the first and the last tiles that the build is told of while all workers are there, so that the start of
processes does not count. Efficiency is the rate by that of as many sleeping teachers alone; the overhead of a unit is
what each worker takes for it beyond the teacher's time. Rounds alternate, medians count; the stores must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: The plug-in: features are mean colours of cells; a call takes as long as the environment says.
PLUGIN = """
import os, time
import torch
from torch.nn import functional
from rsmtdf_cache.specs import LayerSpec, PixelSpec, TeacherSpec
from rsmtdf_cache.teachers.base import Teacher

class Sleeper(Teacher):
    default_layers = layer_names = ("cells",)
    channels = int(os.environ.get("RSMTDF_BENCH_CHANNELS", "3"))

    def __init__(self, request, device):
        self.device = torch.device("cpu")
        self.spec = TeacherSpec(
            name="sleeper", family="timm", architecture="sleeper", weights="0" * 64, weights_origin="none", patch_px=16,
            native_px=4096, prefix_tokens=0, norm=False, pixel=PixelSpec(mean=(0, 0, 0), std=(1, 1, 1)))

    def layer_specs(self, layers, size_px):
        return [LayerSpec(name=n, channels=self.channels, stride_px=16, offset_px=8.0) for n in layers]

    def grid(self, layer, size_px):
        return size_px // 16, size_px // 16

    def encode(self, tiles, size_px, layers, precision="float32"):
        time.sleep(float(os.environ["RSMTDF_BENCH_CALL_S"]))
        pixels = tiles.permute(0, 3, 1, 2).float()[:, [i % 3 for i in range(self.channels)]]
        return {n: functional.avg_pool2d(pixels, 16).permute(0, 2, 3, 1).contiguous() for n in layers}
"""


def install_teacher(folder: Path, call_ms: float) -> None:
    """Make the plug-in known to this process and to all that it starts."""
    facts = folder / "rsmtdf_bench_sleeper-0.dist-info"
    facts.mkdir(parents=True)
    (folder / "rsmtdf_bench_sleeper.py").write_text(PLUGIN)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: rsmtdf-bench-sleeper\nVersion: 0\n")
    (facts / "entry_points.txt").write_text("[rsmtdf.teachers]\nsleeper = rsmtdf_bench_sleeper:Sleeper\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["RSMTDF_BENCH_CALL_S"] = str(call_ms / 1000)
    os.environ["RSMTDF_HOME"] = str(folder / "home")


def write_tiles(root: Path, tiles: int, tile_px: int = 64) -> None:
    """Write a dataset of noise."""
    import numpy as np
    import yaml
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("images", "masks", "splits"):
        (root / name).mkdir(parents=True)
    for i in range(tiles):
        Image.fromarray(rng.integers(0, 256, (tile_px, tile_px, 3), np.uint8)).save(root / f"images/t{i:05}.png")
        Image.fromarray(rng.integers(0, 2, (tile_px, tile_px), np.uint8)).save(root / f"masks/t{i:05}.png")
    (root / "splits/train.txt").write_text("".join(f"t{i:05}\n" for i in range(tiles)))
    classes = [{"name": n, "color": [9 * i, 0, 0]} for i, n in enumerate("ab")]
    header = {"name": "noise", "tile_px": tile_px, "ignore_index": 255, "masks": "complete", "attribution": "none"}
    (root / "dataset.yaml").write_text(yaml.safe_dump({**header, "classes": classes}))


def build(data: Path, out: Path, workers: int, group_rows: int, scheduler: str | None = None) -> dict[str, Any]:
    """Build with so many worker processes (0: in process) or those of ``scheduler``; return what it did, and how fast.

    The rate is that between the first and the last tiles that the build was told of while all workers were there.
    """
    from rsmtdf_cache.build import build_store
    from rsmtdf_cache.cluster import ClusterAsked, executor_of
    from rsmtdf_cache.events import Event, Progress, ProgressEnd
    from rsmtdf_cache.request import BuildRequest

    told = [(0.0, 0)]  # when, and tiles until then
    all_there = [float("inf") if workers or scheduler else 0.0]

    def on_event(event: Event) -> None:
        if isinstance(event, ProgressEnd) and event.task == "workers":
            all_there[0] = time.perf_counter()
        elif isinstance(event, Progress) and event.task == "sleeper":
            told.append((time.perf_counter(), told[-1][1] + event.advance))

    request = BuildRequest.of({
        "data": data, "out": out, "teachers": ["sleeper"], "scales": [1.0], "group_rows": group_rows, "micro_batch": 1,
        "threads": 1, "device": "cpu",
    })  # fmt: skip
    report = build_store(request, on_event, executor=executor_of(ClusterAsked(workers or None, scheduler=scheduler)))
    (first, before), (last, after) = next((m for m in told if m[0] > all_there[0]), told[-1]), told[-1]
    rate = (after - before) / (last - first) if last > first else float("nan")  # over before all workers were there
    return {"rate": rate, "units": report.units, "snapshot": report.snapshot}


def measure(
    folder: Path, tiles: int, call_ms: float, counts: list[int], rounds: int, group_rows: int
) -> dict[str, Any]:
    """Return seconds, efficiency and overhead for each number of workers."""
    write_tiles(folder / "data", tiles)
    found: dict[int, list[float]] = {n: [] for n in (0, *counts)}
    snapshots, units = set(), 0
    for number in range(rounds):
        for workers in found if number % 2 == 0 else reversed(found):
            out = folder / f"store-{workers}"
            done = build(folder / "data", out, workers, group_rows)
            shutil.rmtree(out)
            found[workers].append(done["rate"])
            snapshots.add(done["snapshot"])
            units = done["units"]
            print(f"round {number + 1}, {workers or 'no'} workers: {done['rate']:.2f} tiles/s", file=sys.stderr)
    if len(snapshots) != 1:
        raise SystemExit("the stores differ")
    rows = []
    for workers, rates in found.items():
        median, many = statistics.median(rates), max(1, workers)
        rows.append({
            "workers": workers, "tiles_per_second": [round(r, 3) for r in rates], "median": round(median, 3),
            "efficiency": round(median * call_ms / 1000 / many, 3),
            "overhead_ms_per_unit": round((1000 * many / median - call_ms) * group_rows, 2),
        })  # fmt: skip
    unit_s = call_ms * group_rows / 1000
    return {"tiles": tiles, "units": units, "call_ms": call_ms, "unit_s": unit_s, "rows": rows}


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiles", type=int, default=384)
    parser.add_argument("--call-ms", type=float, default=50)
    parser.add_argument("--group-rows", type=int, default=8)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for data and stores (default: a temporary one)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.keep) as name:
        folder = Path(name)
        install_teacher(folder / "plugin", asked.call_ms)
        counts = [int(n) for n in asked.workers.split(",")]
        found = measure(folder, asked.tiles, asked.call_ms, counts, asked.rounds, asked.group_rows)
    from rsmtdf_cli.machine import context

    where = {k: v for k, v in context().items() if k != "command"}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({**where, **found}, indent=1) + "\n")
    print(f"{found['units']} units of {found['unit_s']:.2f} s; load average {os.getloadavg()[0]:.1f}")
    for row in found["rows"]:
        print(
            f"{row['workers'] or 'in process':>10}  {row['median']:8.1f} tiles/s  efficiency "
            f"{row['efficiency']:.2f}  {row['overhead_ms_per_unit']:7.1f} ms a unit beside its work"
        )


if __name__ == "__main__":
    main()
