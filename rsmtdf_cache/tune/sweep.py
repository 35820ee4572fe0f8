"""``tune_build``: sweep, compare, recommend. See ``docs/tuning.md`` for what the numbers can and cannot say."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.plan import TeacherLoader, decide_profile
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.resampling import Grid
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.tune.candidates import (
    Candidate,
    TunedTeacher,
    configuration,
    joined,
    parts_of_teacher,
    plan_tuned,
    store_nbytes,
)
from rsmtdf_cache.tune.choice import Interval, TileBootstrap, pareto_front, recommend, verdict_of
from rsmtdf_cache.tune.labelled import LabelledSample, read_sample
from rsmtdf_cache.tune.maps import MapBank, encode_maps, grid_of, turned_cosines
from rsmtdf_cache.tune.probe import ProbeTask, cells_of
from rsmtdf_cache.views import ORIENTATION_SETS

__all__ = ["Control", "Orientation", "TuneReport", "TuneRow", "tune_build"]

_TURNED_TILES = 8
#: Stored orientations and one that each set adds to the set before it: mirror, half turn, quarter turn.
_TURNS = {2: 4, 4: 2, 8: 1}


@dataclass(frozen=True)
class TuneRow:
    """One candidate. ``difference``: of mIoU to ``best``, paired. Cosines: mean over its arrays; worst 1 % of any."""

    candidate: Candidate
    nbytes: int
    fits: bool
    cosine: float
    cosine_worst: float
    miou: Interval
    difference: Interval
    verdict: str
    pareto: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.candidate.name, "teachers": self.candidate.to_json(), "nbytes": self.nbytes, "fits": self.fits,
            "cosine": self.cosine, "cosine_worst": self.cosine_worst, "miou": self.miou.to_json(),
            "miou_per_gb": self.miou.mean / self.nbytes * 1e9, "difference_to_best": self.difference.to_json(),
            "verdict": self.verdict, "pareto": self.pareto,
        }  # fmt: skip


@dataclass(frozen=True)
class Control:
    """A probe that no teacher, or no trained one, helps. ``gain``: what the recommended candidate has over it."""

    name: str
    miou: Interval
    gain: Interval | None


@dataclass(frozen=True)
class Orientation:
    """Bytes of the recommended candidate with ``count`` stored orientations (fixed views left alone).

    ``cosine``: of features to those that training takes instead of the orientations that this set adds, when they are
    not stored; None for one orientation.
    """

    count: int
    nbytes: int
    fits: bool
    cosine: float | None


@dataclass(frozen=True)
class TuneReport:
    """Candidates by size, and which is recommended: positions in ``rows``, None when nothing fits the budget."""

    rows: list[TuneRow]
    best: int | None
    recommended: int | None
    budget: int | None
    exact: bool
    tiles: int
    train_tiles: int
    held_tiles: int
    held_from: str
    max_loss: float | None
    controls: list[Control] = field(default_factory=list)
    orientations: list[Orientation] = field(default_factory=list)
    configuration: dict[str, Any] | None = None
    teachers: int = 1
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON of ``cache tune``."""
        return {
            "budget": self.budget, "exact": self.exact, "tiles": self.tiles, "train_tiles": self.train_tiles,
            "held_tiles": self.held_tiles, "held_from": self.held_from, "max_loss": self.max_loss,
            "rows": [r.to_json() for r in self.rows],
            "best": self.rows[self.best].candidate.name if self.best is not None else None,
            "recommended": self.rows[self.recommended].candidate.name if self.recommended is not None else None,
            "controls": [
                {"name": c.name, "miou": c.miou.to_json(), "gain": c.gain.to_json() if c.gain else None}
                for c in self.controls
            ],
            "orientations": [vars(o) | {} for o in self.orientations], "configuration": self.configuration,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class _Probed:
    candidate: Candidate
    nbytes: int
    cosine: float
    cosine_worst: float
    confusions: Tensor
    miou: Interval


def tune_build(
    request: BuildRequest,
    budget: int | None = None,
    sample: int = 200,
    labels: str = "train",
    codecs: Sequence[str] | None = None,
    control: bool = False,
    max_loss: float | None = None,
    on_event: EventSink = ignore_events,
    load_teacher: TeacherLoader | None = None,
) -> TuneReport:
    """Return what each way to store features of ``request.teachers`` is worth, and which one fits ``budget`` bytes.

    ``sample``: labelled tiles at most, a quarter of them held out (``labelled.choose_tiles``); ``labels``: the split
    whose labels may be used. ``control``: also probe the same networks with random weights. Sizes are of all tiles of
    ``request.splits``, in a new store. Raises ``DataError`` without labels, ``UsageError`` for what cannot be tuned.
    """
    _refuse(request)
    clock = _Clock()
    source = open_source(request.data)
    found = read_sample(source, labels, sample, on_event)
    tiles = len(source.tiles(request.splits))
    task = ProbeTask(found.train_masks, found.held_masks, len(source.classes), source.ignore_index, _device(request))
    clock.lap("read")
    bank, teachers = MapBank(task), dict[str, TunedTeacher]()
    for asked in request.teachers:
        tuned = plan_tuned(asked, request, source.tile_px, load_teacher)
        teachers[tuned.job.teacher.spec.name] = tuned
        bank.add(_maps(tuned, found, request, on_event))
    clock.lap("encode")

    def fits(nbytes: int) -> bool:
        return budget is None or nbytes <= budget

    def nbytes_of(candidate: Candidate) -> int:
        return store_nbytes(candidate, teachers, request, tiles)

    measure = _Measure(bank, teachers, TileBootstrap(len(found.held)), nbytes_of)
    parts = {name: parts_of_teacher(t, request, codecs) for name, t in teachers.items()}
    probed = measure.all([Candidate((p,)) for several in parts.values() for p in several], "linear probes", on_event)
    if len(teachers) > 1:
        probed += measure.all(_joint(probed, teachers, budget), "linear probes, teachers together", on_event)
    probed.sort(key=lambda p: (p.nbytes, -p.miou.mean, p.candidate.name))
    clock.lap("probe")
    whole = [i for i, p in enumerate(probed) if fits(p.nbytes) and len(p.candidate.parts) == len(teachers)]
    eligible = whole or [i for i, p in enumerate(probed) if fits(p.nbytes)]
    # Differences are to the best that may be recommended; without one, to the best of all.
    best = max(eligible or range(len(probed)), key=lambda i: probed[i].miou.mean)
    differences = [measure.bootstrap.difference(p.confusions, probed[best].confusions) for p in probed]
    front = set(pareto_front([p.nbytes for p in probed], [p.miou.mean for p in probed]))
    rows = [
        TuneRow(
            p.candidate, p.nbytes, fits(p.nbytes), p.cosine, p.cosine_worst, p.miou, d,
            "best" if i == best else verdict_of(d), i in front,
        )
        for i, (p, d) in enumerate(zip(probed, differences, strict=True))
    ]  # fmt: skip
    chosen: int | None = None
    if eligible:
        chosen = eligible[recommend([probed[i].nbytes for i in eligible], [differences[i] for i in eligible], max_loss)]
    taken = probed[chosen] if chosen is not None else None
    controls = _controls(found, task, measure, request, control, taken, load_teacher, on_event)
    clock.lap("controls")
    turned: list[Orientation] = []
    if taken is not None:
        turned = _orientations(taken.candidate, measure, found, request, tiles, fits)
        clock.lap("orientations")
    return TuneReport(
        rows, best if eligible else None, chosen, budget, request.compressor == "none", tiles, len(found.train),
        len(found.held), found.held_from, max_loss, controls, turned,
        configuration(taken.candidate, teachers, request, tiles) if taken is not None else None, len(teachers),
        clock.laps,
    )  # fmt: skip


def _refuse(request: BuildRequest) -> None:
    if isinstance(request.out, Path) and StorePaths(request.out).manifest.is_file():
        raise UsageError(
            f"--out {request.out}: a store is there; tune plans a new one, name a folder that is not there"
        )
    if request.calibration:
        raise UsageError("--calibration: tune calibrates every codec it tries; leave it out, and give it to the build")


def _device(request: BuildRequest) -> str:
    import torch

    return request.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _maps(tuned: TunedTeacher, found: LabelledSample, request: BuildRequest, on_event: EventSink) -> Any:
    profile = decide_profile(request, tuned.job.teacher)
    return encode_maps(tuned.job, found.images, len(found.train), profile, on_event)


@dataclass
class _Measure:
    """Probes candidates and remembers how many bytes they take."""

    bank: MapBank
    teachers: Mapping[str, TunedTeacher]
    bootstrap: TileBootstrap
    nbytes: Callable[[Candidate], int]

    def all(self, candidates: Sequence[Candidate], label: str, on_event: EventSink) -> list[_Probed]:
        """Return the candidates with their scores."""
        on_event(ProgressStart(f"probe-{label}", label, len(candidates), unit="probes"))
        found = []
        for candidate in candidates:
            found.append(self.one(candidate))
            on_event(Progress(f"probe-{label}", 1))
        on_event(ProgressEnd(f"probe-{label}"))
        return found

    def one(self, candidate: Candidate, prefix: str = "") -> _Probed:
        """Return the score of ``candidate``; ``prefix`` of teachers' names: of other maps in the bank."""
        keys = [
            ((prefix + name, scale, layer), part.codec)
            for part in candidate.parts
            for name, scale, layer in self.teachers[part.teacher].keys(part)
        ]
        arrays = [self.bank.decoded(*key) for key in keys]
        task = self.bank.task
        probe = task.fit([a.points for a in arrays])
        grids = [grid_of(self.bank.arrays[key].spec) for key, _ in keys]
        confusions = task.confusions(probe, [a.held for a in arrays], grids)
        return _Probed(
            candidate, self.nbytes(candidate), float(np.mean([a.quality.cosine for a in arrays])),
            min(a.quality.cosine_worst for a in arrays), confusions, self.bootstrap.score(confusions),
        )  # fmt: skip


def _joint(probed: Sequence[_Probed], teachers: Mapping[str, TunedTeacher], budget: int | None) -> list[Candidate]:
    """Return candidates of all teachers together: what is on each one's front and leaves room for the others."""
    fronts, least = [], []
    for name in teachers:
        own = [p for p in probed if p.candidate.parts[0].teacher == name]
        fronts.append([own[i] for i in pareto_front([p.nbytes for p in own], [p.miou.mean for p in own])])
        least.append(fronts[-1][0].nbytes)
    room = [
        [p.candidate.parts[0] for p in front if budget is None or p.nbytes + sum(least) - least[i] <= budget]
        or [front[0].candidate.parts[0]]
        for i, front in enumerate(fronts)
    ]
    return joined(room)


def _controls(
    found: LabelledSample, task: ProbeTask, measure: _Measure, request: BuildRequest, random: bool,
    taken: _Probed | None, load: TeacherLoader | None, on_event: EventSink,
) -> list[Control]:  # fmt: skip
    """Return the probe on colours alone and, if asked, on random weights in the recommended configuration."""
    side = cells_of(task.tile_px)
    cell = task.tile_px // side
    colors = np.stack([i.reshape(side, cell, side, cell, 3).mean((1, 3), dtype=np.float32) for i in found.images])
    grid, cut = Grid(side, float(cell), cell / 2), len(found.train)
    scored = {"colours alone": task.confusions(task.fit([task.points(colors[:cut], grid)]), [colors[cut:]], [grid])}
    if random and taken is not None:
        for part in taken.candidate.parts:
            tuned = measure.teachers[part.teacher]
            asked = tuned.asked.model_copy(update={
                "weights": None, "pretrained": "none", "layers": part.layers, "scales": part.scales
            })  # fmt: skip
            control = plan_tuned(asked, request, task.tile_px, load)
            measure.bank.add(_maps(control, found, request, on_event), f"random {part.teacher}")
        scored["random weights"] = measure.one(taken.candidate, prefix="random ").confusions
    bootstrap = measure.bootstrap
    return [
        Control(name, bootstrap.score(c), bootstrap.difference(taken.confusions, c) if taken is not None else None)
        for name, c in scored.items()
    ]


def _orientations(
    candidate: Candidate, measure: _Measure, found: LabelledSample, request: BuildRequest, tiles: int,
    fits: Callable[[int], bool],
) -> list[Orientation]:  # fmt: skip
    """Return what more orientations of ``candidate`` cost, and how far features are off where they are not stored."""
    images = found.images[len(found.train) :][:_TURNED_TILES]
    sizes = {n: store_nbytes(candidate, measure.teachers, request, tiles, n) for n in ORIENTATION_SETS}
    result = [Orientation(1, sizes[1], fits(sizes[1]), None)]
    for count, turn in _TURNS.items():
        cosines = []
        for part in candidate.parts:
            tuned = measure.teachers[part.teacher]
            arrays = [measure.bank.arrays[key] for key in tuned.keys(part)]
            profile = decide_profile(request, tuned.job.teacher)
            cosines.append(turned_cosines(tuned.job, arrays, images, turn, profile))
        result.append(Orientation(count, sizes[count], fits(sizes[count]), float(np.mean(cosines))))
    return result


class _Clock:
    """Seconds by part of the work."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._since = now - self._since, now
