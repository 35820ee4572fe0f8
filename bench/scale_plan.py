"""What a build on many GPUs takes, by arithmetic: bytes, units, ledger, messages, requests, hours, dollars.

``python bench/scale_plan.py [--tiles 10000000] [--gpus 64] [--codec float16] …`` prints a table, with ``--json`` JSON.
Sizes come from the functions that a build itself uses; what was counted or measured, and what is assumed, are options
with defaults, and docs/scale.md says where each comes from. Nothing of it was run on such a cluster: it says what to
look at before one is rented.

``python bench/scale_plan.py --count OUT.json`` counts what a unit costs a scheduler in messages, and scheduler and
command in processor time: builds with a teacher that sleeps, on 1, 2 and 4 workers, of so many units and such lengths
that what units, workers, seconds and the start cost can be told apart by least squares.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # workers.py, when this is imported

#: Teacher → layer, channels, view side, tokens a side, stride: those of ``bench/scale.py``.
GRIDS = {"dinov2_vitb14": ("block11", 768, 448, 32, 14), "clip_vitl14": ("block23", 1024, 224, 16, 14)}
TILE_PX = 512


def specs_of(codec: str) -> list[Any]:
    """Return the arrays of both teachers: last layers, one view each."""
    from rsmtdf_cache.codecs import parse_codec
    from rsmtdf_cache.specs import FeatureSpec, LayerSpec, PixelSpec, TeacherSpec, ViewSpec

    pixel = PixelSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return [
        FeatureSpec(
            teacher=TeacherSpec(
                name=name, family=name.split("_")[0], architecture=name, weights="0" * 64, weights_origin="made up",
                patch_px=stride, native_px=size, prefix_tokens=1, norm=True, pixel=pixel,
            ),
            layer=LayerSpec(name=layer, channels=channels, stride_px=stride, offset_px=stride / 2),
            view=ViewSpec(size_px=size, orientation=0), encoding=parse_codec(codec), tile_px=TILE_PX, grid=(side, side),
        )
        for name, (layer, channels, size, side, stride) in GRIDS.items()
    ]  # fmt: skip


def sizes(tiles: int, specs: list[Any], group_rows: int = 0) -> dict[str, Any]:
    """Return bytes, row groups, units and shard files of ``tiles``, as a build would make them.

    ``group_rows``: tiles of a shard; 0: what a build chooses by itself.
    """
    from rsmtdf_cache.layout import choose_group_rows, parts_of, unit_nbytes

    rows = group_rows or choose_group_rows(specs)
    full, rest = divmod(tiles, rows)
    nbytes = sum(full * unit_nbytes(s, rows, rows) + (unit_nbytes(s, rows, rest) if rest else 0) for s in specs)
    groups = full + bool(rest)
    return {
        "group_rows": rows, "groups": groups, "units": groups * len(specs), "nbytes": nbytes,
        "shards": groups * sum(len(parts_of(s)) for s in specs),
        "largest_shard_nbytes": max(unit_nbytes(s, rows, rows) for s in specs),
    }  # fmt: skip


def plan(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what the build takes; every figure is a sum or product of the options and ``sizes``."""
    found = sizes(asked.tiles, specs_of(asked.codec), asked.group_rows)
    tiles, gpus, units = asked.tiles, asked.gpus, found["units"]
    stages = {
        "teachers": tiles / (asked.teacher_tiles_s * gpus) + asked.overhead_ms / 1000 * units / gpus,
        "storage": found["nbytes"] / (asked.write_gb_s * 1e9),
        "decoding": tiles / (asked.decode_tiles_s * asked.cores_per_gpu * gpus),
        "command": units * asked.client_ms / 1000,
    }
    slowest = max(stages, key=lambda name: stages[name])
    seconds = stages[slowest]  # stages overlap; what is not the slowest hides behind it
    messages = units * asked.messages_unit + seconds * (gpus * asked.messages_worker_s + asked.messages_s)
    look_s = tiles / (asked.decode_tiles_s * asked.look_cores)
    hours = (asked.load_s + seconds + asked.end_s_per_million * tiles / 1e6) / 3600
    dollars = hours * gpus * asked.gpu_dollars_h
    requests = {"PUT": found["shards"] + units, "HEAD": found["shards"]}  # as counted against a server: docs/scale.md
    parts = math.ceil(found["largest_shard_nbytes"] / asked.part_mb / 1e6)
    paid = sum(requests.values()) + units * (parts + 1)
    return {
        **found, "tiles": tiles, "gpus": gpus, "nbytes_per_tile": found["nbytes"] / tiles,
        "ledger_nbytes": asked.ledger_nbytes * tiles,
        "segments_max": 16 + math.ceil(asked.ledger_nbytes * tiles / 2**26),
        "stage_seconds": stages, "bottleneck": slowest, "seconds": seconds, "hours": hours,
        "look_hours": look_s / 3600, "client_gb": asked.client_nbytes * tiles / 1e9,
        "tiles_per_second": tiles / seconds, "units_per_second": units / seconds,
        "messages_per_second": messages / seconds, "requests": requests, "requests_with_parts": paid,
        "tasks_held": 2 * gpus, "dollars": dollars, "dollars_per_million_tiles": dollars / tiles * 1e6,
        "storage_dollars_month": found["nbytes"] / 1e9 * asked.storage_dollars_gb_month,
        "request_dollars": paid / 1000 * asked.put_dollars_thousand,
    }  # fmt: skip


def count(out: Path, rounds: int) -> dict[str, float]:
    """Count messages through a scheduler, and processor seconds of it and of the command; write them to ``out``."""
    import numpy as np
    import workers
    from distributed import Client

    os.environ["RSMTDF_BENCH_CHANNELS"] = "768"  # records are as large as those of DINOv2-B
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        workers.install_teacher(folder / "plugin", 0)
        _start(stack, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", folder / "scheduler.json")
        while not (folder / "scheduler.json").exists():
            time.sleep(0.1)
        client = stack.enter_context(Client(scheduler_file=folder / "scheduler.json", set_as_default=False))
        client.run_on_scheduler(_count_messages)
        started = 0
        for number in (1, 2, 4):
            while started < number:
                _start(stack, "worker", client.scheduler.address, "--nthreads", "1", "--no-nanny")
                started += 1
            client.wait_for_workers(number, timeout=120)
            for _, (units, call_s) in itertools.product(range(rounds), ((24, 0.1), (192, 0.1), (24, 1.0))):
                data, store = folder / f"data-{units}", folder / f"store-{len(rows)}"
                if not data.exists():
                    workers.write_tiles(data, units)
                if not rows:  # imports of all processes
                    workers.build(data, folder / "warm", 0, 1, client.scheduler.address)
                _sleep_for(call_s)
                client.run(_sleep_for, call_s)
                before, cpu, begun = client.run_on_scheduler(_counted), time.process_time(), time.perf_counter()
                workers.build(data, store, 0, 1, client.scheduler.address)
                after = client.run_on_scheduler(_counted)
                rows.append({
                    "workers": number, "units": units, "worker_s": units * call_s,
                    "clock_s": time.perf_counter() - begun, **{n: after[n] - before[n] for n in after},
                    "command_cpu_s": time.process_time() - cpu,
                })  # fmt: skip
                print(rows[-1], file=sys.stderr)
    known = np.array([[r["units"], r["worker_s"], r["clock_s"], 1.0] for r in rows])
    found: dict[str, float] = {}
    for what in ("messages", "nbytes", "scheduler_cpu_s", "command_cpu_s"):
        unit, worker, clock, _ = np.linalg.lstsq(known, np.array([r[what] for r in rows]), rcond=None)[0].tolist()
        found |= {f"{what}_per_unit": round(unit, 5), f"{what}_per_worker_second": round(worker, 5)}
        found[f"{what}_per_second"] = round(clock, 5)
    from rsmtdf_cli.machine import context

    where = {k: v for k, v in context().items() if k != "command"}
    out.write_text(json.dumps({**where, "builds": rows, **found}, indent=1) + "\n")
    return found


def _sleep_for(call_s: float) -> None:
    """Set how long the teacher of this process sleeps."""
    import os

    os.environ["RSMTDF_BENCH_CALL_S"] = str(call_s)


def _start(stack: contextlib.ExitStack, *words: object) -> None:
    process = subprocess.Popen([sys.executable, "-m", "dask", *map(str, words)], stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)


def _count_messages(dask_scheduler: Any) -> None:
    """Run in the scheduler: count what it reads and writes from now on; a batch is one message."""
    from collections import Counter

    from distributed.comm.tcp import TCP

    seen: Counter[str] = Counter()
    dask_scheduler.rsmtdf_seen = seen
    read, write = TCP.read, TCP.write

    async def reading(self: Any, *told: Any, **more: Any) -> Any:
        found = await read(self, *told, **more)
        seen["messages"] += 1
        return found

    async def writing(self: Any, *told: Any, **more: Any) -> Any:
        nbytes = await write(self, *told, **more)
        seen["messages"] += 1
        seen["nbytes"] += nbytes or 0
        return nbytes

    TCP.read, TCP.write = reading, writing  # type: ignore[method-assign]


def _counted(dask_scheduler: Any) -> dict[str, float]:
    import time

    seen = dask_scheduler.rsmtdf_seen
    return {"messages": seen["messages"], "nbytes": seen["nbytes"], "scheduler_cpu_s": time.process_time()}


def main() -> None:
    """Print the plan, or count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("tiles", 10_000_000, "tiles of 512 px"),
        ("group-rows", 0, "tiles of a shard; 0: what a build chooses"),
        ("gpus", 64, "worker processes, one for each GPU"),
        ("teacher-tiles-s", 200.0, "ASSUMED: tiles a second and GPU through all teachers"),
        ("write-gb-s", 10.0, "ASSUMED: what the shared storage takes from all workers together"),
        ("cores-per-gpu", 8, "ASSUMED: as in docs/cluster.md's Slurm job"),
        ("gpu-dollars-h", 3.0, "ASSUMED: a GPU for an hour, with its share of the machine"),
        ("storage-dollars-gb-month", 0.023, "ASSUMED: object storage"),
        ("put-dollars-thousand", 0.005, "ASSUMED: a thousand writing requests"),
        ("part-mb", 50.0, "parts of an upload of a large object"),
        ("load-s", 60.0, "ASSUMED: start of workers, weights, comparison of fingerprints"),
        ("overhead-ms", 18.0, "of a unit beside its work (bench/workers.py)"),
        ("client-ms", 10.7, "processor time of the command for a unit (--count)"),
        ("messages-unit", 13.7, "messages for a unit (--count)"),
        ("messages-s", 0.0, "messages for a second of the build (--count)"),
        ("messages-worker-s", 15.6, "messages for a second of a worker (--count)"),
        ("ledger-nbytes", 495.0, "records of a tile (bench/scale.py)"),
        ("look-cores", 32, "ASSUMED: cores of the command's machine; it looks at each tile once, before the GPUs"),
        ("client-nbytes", 1200.0, "memory of the command for a tile (docs/scale.md)"),
        ("decode-tiles-s", 112.0, "PNG tiles that a core decodes (bench/pixels.py)"),
        ("end-s-per-million", 10.0, "end of a build, processor time (bench/scale.py)"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} ({default:g})")
    parser.add_argument("--codec", default="float16")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=Path, metavar="OUT.json")
    parser.add_argument("--rounds", type=int, default=2, help="of --count")
    asked = parser.parse_args()
    if asked.count:
        print(json.dumps(count(asked.count, asked.rounds), indent=1))
        return
    found = plan(asked)
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    for line in table(found):
        print(line)


def table(found: dict[str, Any]) -> list[str]:
    """Return the plan as lines for people."""
    stages = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in found["stage_seconds"].items())
    largest, ledger = found["largest_shard_nbytes"] / 1e6, found["ledger_nbytes"] / 1e9
    return [
        f"{found['tiles']:,} tiles: {found['nbytes_per_tile'] / 1e6:.3f} MB each, {found['nbytes'] / 1e12:.2f} TB in "
        f"{found['shards']:,} shards of {found['group_rows']} tiles, {largest:.0f} MB at most",
        f"{found['units']:,} units; ledger {ledger:.2f} GB, at most {found['segments_max']} segments",
        f"before: {found['look_hours']:.2f} h to look at all tiles, in {found['client_gb']:.0f} GB of memory",
        f"stages, side by side: {stages}",
        f"in all {found['hours']:.2f} h, bound by {found['bottleneck']}: {found['tiles_per_second']:,.0f} tiles/s, "
        f"{found['units_per_second']:.1f} units/s, {found['messages_per_second']:.0f} messages/s, "
        f"{found['tasks_held']} tasks at the scheduler",
        f"object store: {', '.join(f'{n:,} {kind}' for kind, n in found['requests'].items())}; with parts of uploads "
        f"{found['requests_with_parts']:,} requests, ${found['request_dollars']:,.0f}",
        f"${found['dollars']:,.0f} of GPUs, ${found['dollars_per_million_tiles']:,.2f} a million tiles; storage "
        f"${found['storage_dollars_month']:,.0f} a month",
    ]


if __name__ == "__main__":
    main()
