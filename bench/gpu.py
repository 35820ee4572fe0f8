"""What a training step, a build and the loader cost, cached against online: one script for a lone machine.

``python bench/gpu.py OUT.json [--size tiny|small|true] [--rounds 5] [--device cuda] [--only step,growth,...]``

Nothing is downloaded: tiles are drawn, and every network has seeded random weights at its true size, which cost what
trained ones cost. ``true`` (default with CUDA): the student and teachers of RS-MTDF at 518 px, 8 + 8 crops, bfloat16,
and a light student at 512 px. ``small`` (default without): the same networks at 224 px, 1 + 1 crops, float32, and the
light student with 2 + 2. ``tiny``: does the script run at all.

Steps are those of ``rsmtdf train``: its recipes, stores that its builder built, its loader, ``train_step``. Every arm
is a process of its own, so that its peak memory is its own; arms take turns in rounds, a round is a few steps between
two synchronisations, and the median round counts. Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

PAPER = ("dinov2_vitb14_paper,layers=block11", "clip_vitl14_paper,layers=block23")


@dataclass(frozen=True)
class Size:
    """One set of sizes. ``paper``, ``light``: tile side, teachers. ``growth``: teachers small and large."""

    precision: str
    crops: int
    steps: int  # in a round
    tiles: int
    paper: tuple[int, tuple[str, ...]]
    paper_student: dict[str, Any]
    paper_pass_px: int
    light: tuple[int, tuple[str, ...]]
    light_student: dict[str, Any]
    light_crops: int
    growth: tuple[tuple[str, ...], tuple[str, ...]]
    codec: str
    builds: tuple[int, str]  # tiles of a timed build, its teacher


_VITS = {"encoder": "dinov2_vits14", "decoder": "dpt", "channels": 64, "positions": "released", "odd_sizes": "resize"}
_LIGHT = {"encoder": "timm:mobilenetv3_small_050", "decoder": "fpn", "channels": 64}
SIZES = {
    "true": Size(
        "bfloat16", 8, 10, 32, (518, PAPER), _VITS, 224,
        (512, ("dinov2_vitb14,layers=block11", "clip_vitl14,layers=block23")), _LIGHT, 8,
        (("dinov2_vits14,layers=block11", "clip_vitb16,layers=block11"),
         ("dinov2_vitg14,layers=block39", "clip_vitbigg14_laion,layers=block47")),
        "pca256-int8", (512, "dinov2_vitb14,layers=block11"),
    ),
    "small": Size(
        "float32", 1, 1, 8, (224, ("dinov2_vitb14,layers=block11", "clip_vitl14,layers=block23")), _VITS, 112,
        (224, ("dinov2_vitb14,layers=block11", "clip_vitl14,layers=block23")), _LIGHT, 2,
        (("dinov2_vits14,layers=block11", "clip_vitb16,layers=block11"),
         ("dinov2_vitb14,layers=block11", "clip_vitl14,layers=block23")),
        "pca64-int8", (16, "dinov2_vits14,layers=block11"),
    ),
    "tiny": Size(
        "float32", 2, 1, 6, (64, ("timm:test_vit,layers=block5", "timm:test_resnet,layers=stage5")),
        {"encoder": "timm:test_vit", "decoder": "dpt", "channels": 16}, 32,
        (64, ("timm:test_vit,layers=block5", "timm:test_resnet,layers=stage5")),
        {"encoder": "timm:test_resnet", "decoder": "fpn", "channels": 16}, 2,
        (("timm:test_vit,layers=block3",), ("timm:test_vit,layers=block5",)), "pca8-int8",
        (6, "timm:test_vit,layers=block5"),
    ),
}  # fmt: skip


def untrained(teacher: str) -> str:
    """Return the teacher with seeded random weights."""
    return f"{teacher},pretrained=none,seed=1"


def write_tiles(root: Path, tiles: int, tile_px: int) -> Path:
    """Write a dataset folder of ``tiles`` train tiles and one each for val and test, and return it."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks", "splits/labeled"):
        (root / folder).mkdir(parents=True)
    names = [f"t{n:05}" for n in range(tiles + 2)]
    for name in names:
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((tile_px, tile_px), Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(image + rng.integers(-20, 21, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "images" / f"{name}.png")
        Image.fromarray((noisy[..., 0] // 86).astype(np.uint8)).save(root / "masks" / f"{name}.png")
    for split, ids in {"train": names[:-2], "val": names[-2:-1], "test": names[-1:]}.items():
        (root / "splits" / f"{split}.txt").write_text("".join(f"{n}\n" for n in ids))
    (root / "splits" / "labeled" / "all.txt").write_text("".join(f"{n}\n" for n in names[: max(2, tiles // 2)]))
    classes = [{"name": f"c{n}", "color": [80 * n, 0, 0]} for n in range(3)]
    about = {"name": "drawn", "tile_px": tile_px, "ignore_index": 255, "masks": "complete", "classes": classes}
    (root / "dataset.yaml").write_text(yaml.safe_dump(about))
    return root


@dataclass(frozen=True)
class Arm:
    """What one process trains. ``store``: None for arms that read none; ``teachers``: of the online ones."""

    name: str
    data: Path
    student: dict[str, Any]
    crop_px: int
    crops: int
    precision: str
    store: Path | None = None
    teachers: tuple[str, ...] = ()
    distil: bool = True
    passes: dict[str, int] = field(default_factory=dict)
    space: str = "channels"  # what is distilled: the teacher's channels, or stored components
    released: bool = False  # translators, loss and weights of RS-MTDF's released code, else the project's defaults

    def recipe(self) -> dict[str, Any]:
        """Return the recipe: FixMatch as RS-MTDF trains it, targets as this arm says."""
        paper = {"loss": "mse", "standardize": False, "padding": True, "hidden": 1024, "activation": "relu"}
        distill = {"view": "strong", "passes": self.passes, "space": self.space, **(paper if self.released else {})}
        own = {"distill": distill, "fuse": True}
        return {
            "name": self.name.replace(" ", "-"), "data": self.data, "labeled": "all", "steps": 10**6,
            "crop_px": self.crop_px, "batch": {"labeled": self.crops, "unlabeled": self.crops},
            "student": self.student, "precision": self.precision, "objective": "mean",
            "targets": "none" if not self.distil else "online" if self.teachers else "cached",
            "teachers": [untrained(t) for t in self.teachers], **(own if self.distil else {"distill": False}),
        }  # fmt: skip


def _sync(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _peak_nbytes(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import torch

    return int(torch.cuda.max_memory_allocated())


def serve_steps(pipe: Connection, arm: Arm, device: str, out: Path, threads: int) -> None:
    """Run steps of ``arm`` when asked: ``("step", n)`` on batches at hand, ``("loader", n)`` on those of the loader."""
    from rsmtdf_train.prepare import part_to
    from rsmtdf_train.processes import Processes
    from rsmtdf_train.recipe import Recipe
    from rsmtdf_train.run import open_run
    from rsmtdf_train.state import build_state
    from rsmtdf_train.step import train_step

    recipe = Recipe.model_validate(arm.recipe())
    run = open_run(recipe, out, arm.store, device, threads, Processes(), lambda event: None)
    state = build_state(run.recipe, len(run.identity.classes), run.identity.targets, run.device)
    state.student.train()
    ready = [run.loader.batch(n) for n in range(4)]

    def steps(count: int) -> dict[str, float]:
        _sync(device)
        started = time.perf_counter()
        for _ in range(count):
            batch = replace(ready[state.step % len(ready)], step=state.step)
            train_step(state, [part_to(batch, run.device)], run.recipe, run.tools)
        _sync(device)
        return {"seconds": (time.perf_counter() - started) / count}

    def loaded(count: int) -> dict[str, float]:
        waited = 0.0
        batches = run.loader.iterate(state.step, state.step + count + 2)
        for number, (batch,) in enumerate(batches):
            if number == 2:  # the loader has begun to work ahead
                _sync(device)
                began, waited = time.perf_counter(), 0.0
            train_step(state, [part_to(batch, run.device)], run.recipe, run.tools)
            _sync(device)  # so that waiting is waiting for data, not for the device
            asked = time.perf_counter()
            if number < count + 1:
                continue
            total = asked - began
        batches.close()
        return {"seconds": total / count, "waited": waited / count}

    trained = sum(p.numel() for p in state.student.student.parameters())
    pipe.send({"parameters": trained})
    work = {"step": steps, "loader": loaded}
    while (asked := pipe.recv()) is not None:
        kind, count = asked
        pipe.send({**work[kind](count), "peak_nbytes": _peak_nbytes(device)})


class Worker:
    """An arm in a process of its own."""

    def __init__(self, arm: Arm, device: str, folder: Path, threads: int) -> None:
        self.arm = arm
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve_steps, args=(theirs, arm, device, folder / "run", threads), daemon=True
        )
        self.process.start()
        theirs.close()
        try:
            self.about: dict[str, float] = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"the arm {arm.name!r} ended early; its message is above") from None

    def ask(self, kind: str, count: int) -> dict[str, float]:
        self.pipe.send((kind, count))
        answer: dict[str, float] = self.pipe.recv()
        return answer

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join(60)


def measure_arms(arms: list[Arm], device: str, size: Size, rounds: int, folder: Path, threads: int) -> dict[str, Any]:
    """Return by arm the median seconds of a step, peak memory and parameters; arms take turns."""
    workers = [Worker(arm, device, folder / f"arm{n}", threads) for n, arm in enumerate(arms)]
    found: dict[str, list[float]] = {arm.name: [] for arm in arms}
    peaks: dict[str, int] = {}
    for number in range(rounds + 1):
        for worker in workers:
            one = worker.ask("step", max(2, size.steps) if number == 0 else size.steps)  # the first round warms up
            if number:
                found[worker.arm.name].append(one["seconds"])
            peaks[worker.arm.name] = int(one["peak_nbytes"])
    about = {w.arm.name: w.about for w in workers}
    for worker in workers:
        worker.end()
    return {
        name: {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times),
               "peak_nbytes": peaks[name],
               **about[name]}
        for name, times in found.items()
    }  # fmt: skip


def build(data: Path, out: Path, teachers: tuple[str, ...], device: str, precision: str, codec: str = "float16") -> Any:
    """Build a store of the train tiles and return the builder's report."""
    from rsmtdf_cache.build import build_store
    from rsmtdf_cache.request import BuildRequest

    asked = {"data": data, "out": out, "teachers": [untrained(t) for t in teachers], "scales": [1.0], "codec": codec,
             "precision": precision, "device": device, "splits": ["train"]}  # fmt: skip
    return build_store(BuildRequest.of(asked))


def _in_process(work: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, *arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit("a measurement ended early; its message is above") from None
    finally:
        process.join()


def serve_store(
    pipe: Connection, data: Path, out: Path, teachers: tuple[str, ...], device: str, precision: str, codec: str
) -> None:
    """Build a store and say the peak memory."""
    build(data, out, teachers, device, precision, codec)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def serve_rates(
    pipe: Connection, data: Path, work: Path, teacher: str, device: str, precision: str, rounds: int
) -> None:
    """Say tiles per second of the builder and of the teacher's bare forward on resident batches, round by round."""
    import torch

    from rsmtdf_cache.request import parse_teacher
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.store import FeatureStore
    from rsmtdf_cache.teachers import load
    from rsmtdf_cache.teachers.base import TeacherRequest

    asked = parse_teacher(untrained(teacher))
    source = open_source(data)
    network = load(TeacherRequest(asked.name, "none", asked.seed, asked.layers), device=device)
    images = np.stack([source.read_image(tile) for tile in source.tiles(["train"])])
    rates: dict[str, list[float]] = {"build": [], "forward": []}
    for number in range(rounds + 1):
        out = work / f"timed{number}"
        report = build(data, out, (teacher,), device, precision)
        store = FeatureStore.open(out)
        (key,) = store.keys()
        batch = store.describe()["profiles"][0]
        before = torch.get_num_threads()
        torch.set_num_threads(batch["threads"])
        size = batch["micro_batch"]
        pieces = [torch.from_numpy(images[i : i + size]).to(device) for i in range(0, len(images) // size * size, size)]
        pieces = pieces or [torch.from_numpy(images).to(device)]
        network.encode(pieces[0], store.spec(key).view.size_px, [key.layer], precision)
        _sync(device)
        started = time.perf_counter()
        for piece in pieces:
            network.encode(piece, store.spec(key).view.size_px, [key.layer], precision)
        _sync(device)
        seconds = time.perf_counter() - started
        torch.set_num_threads(before)
        if number:
            rates["forward"].append(sum(map(len, pieces)) / seconds)
            rates["build"].append(next(iter(report.rates.values())))
    pipe.send({name: statistics.median(found) for name, found in rates.items()})


class Bench:
    """Datasets and stores of one size, and the measurements on them."""

    def __init__(self, size: Size, device: str, rounds: int, threads: int, work: Path) -> None:
        self.size, self.device, self.rounds, self.threads, self.work = size, device, rounds, threads, work
        self._stores = 0

    def _data(self, tile_px: int, tiles: int | None = None) -> Path:
        count = tiles or self.size.tiles
        place = self.work / f"data{tile_px}-{count}"
        return place if place.is_dir() else write_tiles(place, count, tile_px)

    def _store(self, data: Path, teachers: tuple[str, ...], codec: str = "float16") -> Path:
        self._stores += 1
        place = self.work / f"store{self._stores}"
        _in_process(serve_store, data, place, teachers, self.device, self.size.precision, codec)
        return place

    def _arms(self, arms: list[Arm]) -> dict[str, Any]:
        folder = self.work / f"arms{len(list(self.work.glob('arms*')))}"
        return measure_arms(arms, self.device, self.size, self.rounds, folder, self.threads)

    def step(self) -> dict[str, Any]:
        """Step of the paper's student and teachers, with two student passes and with one."""
        size, (px, teachers) = self.size, self.size.paper
        data = self._data(px)
        store = self._store(data, teachers)
        whole = Arm("cached", data, size.paper_student, px, size.crops, size.precision, store, released=True)
        second = {f"{teachers[-1].partition(',')[0].replace(':', '-')}/*/*": size.paper_pass_px}
        two = replace(whole, name="cached, two passes", passes=second)
        found = self._arms([
            replace(two, name="online, two passes", store=None, teachers=teachers), two,
            replace(whole, name="cached, one pass"),
            replace(whole, name="no distillation", store=None, distil=False),
        ])  # fmt: skip
        return {"arms": found, "rows": [
            _row("cached / online, identical student passes", found, "cached, two passes", "online, two passes", 0.50),
            _row("cached with one pass / online with two", found, "cached, one pass", "online, two passes", 0.45),
            _row("cached distillation + fusion / no distillation", found, "cached, one pass", "no distillation", 1.10),
            _row("the same with the second pass", found, "cached, two passes", "no distillation", None),
            _row("peak memory, cached / online", found, "cached, two passes", "online, two passes", 0.50,
                 "peak_nbytes"),
        ]}  # fmt: skip

    def light(self) -> dict[str, Any]:
        """Step of a student of at most 6 million parameters."""
        size, (px, teachers) = self.size, self.size.light
        data = self._data(px)
        cached = Arm(
            "cached", data, size.light_student, px, size.light_crops, size.precision, self._store(data, teachers)
        )
        components = replace(
            cached, name="cached, components", store=self._store(data, teachers, size.codec), space="stored"
        )
        found = self._arms([
            cached, components, replace(cached, name="online", store=None, teachers=teachers),
            replace(cached, name="no distillation", store=None, distil=False),
        ])  # fmt: skip
        return {"arms": found, "codec": size.codec, "rows": [
            _row("light student: cached / online", found, "cached", "online", 0.10),
            _row("light student: cached components / online", found, "cached, components", "online", 0.10),
            _row("light student: cached / no distillation", found, "cached", "no distillation", 1.10),
            _row("light student: cached components / no distillation", found, "cached, components", "no distillation",
                 1.10),
            _row("light student: peak memory, cached / online", found, "cached", "online", 0.50, "peak_nbytes"),
        ]}  # fmt: skip

    def growth(self) -> dict[str, Any]:
        """Cached step with small and with large teachers, stored in equally many channels."""
        size, px = self.size, self.size.light[0]
        data = self._data(px)
        arms_of_growth = ("large teachers", "small teachers")
        arms = [
            Arm(
                name,
                data,
                size.light_student,
                px,
                size.light_crops,
                size.precision,
                self._store(data, asked, size.codec),
                space="stored",
            )
            for name, asked in zip(reversed(arms_of_growth), size.growth, strict=True)
        ]
        found = self._arms(arms)
        return {"arms": found, "teachers": size.growth, "codec": size.codec,
                "rows": [_row("step, large / small teachers", found, *arms_of_growth, 1.02)]}  # fmt: skip

    def loader(self) -> dict[str, Any]:
        """Share of a cached light step that waits for the loader."""
        size, (px, teachers) = self.size, self.size.light
        data = self._data(px)
        arm = Arm("cached", data, size.light_student, px, size.light_crops, size.precision, self._store(data, teachers))
        worker = Worker(arm, self.device, self.work / "loader", self.threads)
        times: dict[str, list[float]] = {"step": [], "loader": []}
        for number in range(self.rounds + 1):
            for kind in times:
                seconds = worker.ask(kind, max(4, size.steps))["seconds"]
                times[kind] += [seconds] if number else []
        worker.end()
        found = {kind: {"seconds": statistics.median(one)} for kind, one in times.items()}
        return {
            "arms": found,
            "rows": [_row("step fed by the loader / on batches at hand", found, "loader", "step", 1.03)],
        }

    def building(self) -> dict[str, Any]:
        """Tiles per second of a build against the teacher alone; peak memory of ten times as many tiles."""
        tiles, teacher = self.size.builds
        px = self.size.light[0]
        few, many = self._data(px, tiles), self._data(px, 10 * tiles)
        rates = _in_process(serve_rates, few, self.work, teacher, self.device, self.size.precision, self.rounds)
        small = "timm:test_resnet,layers=stage5"  # what grows with tiles is no network
        peaks = {
            name: {"peak_nbytes": _in_process(
                serve_store, data, self.work / f"peak{name}", (small,), "cpu", "float32", "float16"
            )}
            for name, data in (("n", few), ("10 n", many))
        }  # fmt: skip
        return {"tiles_per_s": rates, "tiles": tiles, "teacher": teacher, "peaks": peaks, "rows": [
            {"what": "build / bare forward, tiles/s", "ratio": rates["build"] / rates["forward"], "goal": ">= 0.9"},
            _row("build memory, 10 n / n tiles", peaks, "10 n", "n", 1.05, "peak_nbytes"),
        ]}  # fmt: skip


def _row(what: str, found: dict[str, Any], a: str, b: str, goal: float | None, key: str = "seconds") -> dict[str, Any]:
    text = "" if goal is None else f"<= {goal:.2f}"
    return {"what": what, "ratio": found[a][key] / found[b][key], "goal": text}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES))
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=4, help="of the loader")
    parser.add_argument("--only", default="step,light,growth,loader,building", help="parts, with commas")
    asked = parser.parse_args(arguments)
    device = asked.device or _device()
    name = asked.size or ("true" if device != "cpu" else "small")
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SIZES[name], device, asked.rounds, asked.threads, Path(folder))
        for part in asked.only.split(","):
            parts[part] = getattr(bench, part)()
            for row in parts[part]["rows"]:
                print(f"{row['what']:52}{row['ratio']:8.3f}   {row['goal']}", flush=True)
    from rsmtdf_cli.machine import context

    command = f"python bench/gpu.py OUT --size {name} --rounds {asked.rounds} --device {device}"
    result = {**context(), "command": command, "size": name, "device": device, "parts": parts}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
