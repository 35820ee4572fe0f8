"""How long a build takes, what limits it, and after how many epochs it pays: arithmetic over what was measured.

A build's stages follow one another: tiles are looked at once, teachers loaded, then for each unit the teacher runs (the
next tiles are decoded, and the maps before encoded and hashed, meanwhile) and its shards are synced. So

    seconds = look + load + sum over (teacher, scale) of batches x seconds per batch + bytes / write rate

where a unit's last micro-batch counts in full, as it is padded. Views in windows go tile by tile: a batch is one tile.
Orientations of one scale cost the same.
"""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.calibrate import Calibrator
from rsmtdf_cache.errors import FindingsError, UsageError
from rsmtdf_cache.files import read_json, replace_json
from rsmtdf_cache.home import cache_home
from rsmtdf_cache.layout import ArraySet, unit_nbytes
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.plan import rows_of_group
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile, TeacherSpec, ViewSpec, digest_of

__all__ = [
    "Forecast",
    "Measured",
    "Rate",
    "TeacherWork",
    "batch_tiles",
    "break_even_epochs",
    "compared",
    "find_measured",
    "forecast",
    "keep_measured",
    "read_measured",
    "teacher_work",
    "tiles_sampled",
]

#: Tiles that the canary encodes again of every array set of a teacher before the store grows (decision 9).
_CANARY_TILES = 4


@dataclass(frozen=True)
class TeacherWork:
    """What one teacher still has to do at one scale.

    ``maps``: tiles times views; ``batches`` of ``batch_tiles``: for them; ``extra_batches``: those whose maps are not
    stored (canary, trial, calibration, held-out sample); ``views``: orientations, or fixed views; ``nbytes``: of all
    shards.
    """

    teacher: str
    weights: str
    scale: str
    size_px: int
    batch_tiles: int
    maps: int
    batches: int
    extra_batches: int
    views: int
    nbytes: int

    @property
    def tiles(self) -> float:
        """Tiles to encode, each counted once whatever the number of views."""
        return self.maps / self.views if self.views else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rate:
    """How long a batch of one teacher takes at one scale in the build's pipeline, seen on ``tiles`` tiles."""

    teacher: str
    weights: str
    scale: str
    size_px: int
    batch_tiles: int
    seconds_per_batch: float
    tiles: int
    device: str

    @property
    def tiles_per_s(self) -> float:
        return self.batch_tiles / self.seconds_per_batch

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tiles_per_s": round(self.tiles_per_s, 3)}


@dataclass(frozen=True)
class Measured:
    """What a plan measured: rates of the teachers, of the disk (bytes/s), and the seconds before the first batch."""

    rates: tuple[Rate, ...]
    write_nbytes_per_s: float
    read_nbytes_per_s: float
    look_seconds: float
    load_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rates": [rate.to_json() for rate in self.rates]}

    def seconds_per_batch(self, work: TeacherWork) -> float | None:
        """Return the seconds of a batch of ``work``; by the area of another scale when only that was measured."""
        known = [r for r in self.rates if (r.teacher, r.weights) == (work.teacher, work.weights)]
        if not known:
            return None
        near = min(known, key=lambda r: (r.scale != work.scale, abs(math.log(r.size_px / work.size_px))))
        alike = near.scale == work.scale
        area = 1.0 if alike else (work.size_px / near.size_px) ** 2
        return near.seconds_per_batch * work.batch_tiles / near.batch_tiles * area


@dataclass(frozen=True)
class Forecast:
    """Seconds of a build by stage. ``online``, ``read``: seconds an epoch takes teachers, or the disk, for targets."""

    look: float
    load: float
    teachers: Mapping[str, float]
    disk: float
    online: float
    read: float

    @property
    def seconds(self) -> float:
        return self.look + self.load + sum(self.teachers.values()) + self.disk

    @property
    def bottleneck(self) -> str:
        """Return the longest stage: ``teachers``, ``disk`` or ``tiles`` (looking at them); ``nothing`` to do."""
        stages = {"teachers": sum(self.teachers.values()), "disk": self.disk, "tiles": self.look}
        name = max(stages, key=lambda stage: stages[stage])
        return name if stages["teachers"] > 0 else "nothing"

    @property
    def break_even_epochs(self) -> float | None:
        return break_even_epochs(self.seconds, self.online, self.read)

    def to_json(self) -> dict[str, Any]:
        """Return seconds by stage and in all, what is longest, and the break-even (None: never)."""
        epochs = self.break_even_epochs
        return {
            "seconds": self.seconds, "look_seconds": self.look, "load_seconds": self.load,
            "teacher_seconds": dict(self.teachers), "disk_seconds": self.disk, "bottleneck": self.bottleneck,
            "online_seconds_per_epoch": self.online, "read_seconds_per_epoch": self.read,
            "break_even_epochs": epochs,
        }  # fmt: skip


def break_even_epochs(build: float, online: float, read: float) -> float | None:
    """Return the epochs after which building and reading has cost no more seconds than running the teachers.

    ``build + n * read = n * online``. None = never: an epoch's reading is not quicker than its teachers.
    """
    return build / (online - read) if online > read else None


def forecast(work: Sequence[TeacherWork], measured: Measured, pixel_nbytes: int = 0) -> Forecast | None:
    """Return the seconds of ``work``, or None when a teacher in it was not measured.

    ``pixel_nbytes``: what is written of pixels besides.

    An epoch online is one pass of every teacher over every tile at each of its scales, in one orientation; reading is
    the same maps from the disk. So targets are equal, and what the store already has counts on neither side.
    """
    teachers: dict[str, float] = {}
    online = read = 0.0
    for item in work:
        seconds = measured.seconds_per_batch(item)
        if seconds is None:
            return None
        teachers[item.teacher] = teachers.get(item.teacher, 0.0) + (item.batches + item.extra_batches) * seconds
        online += item.tiles * seconds / item.batch_tiles
        read += item.nbytes / max(item.views, 1) / measured.read_nbytes_per_s
    disk = (sum(item.nbytes for item in work) + pixel_nbytes) / measured.write_nbytes_per_s
    return Forecast(measured.look_seconds, measured.load_seconds, teachers, disk, online, read)


def teacher_work(
    teacher: TeacherSpec, sets: Iterable[ArraySet], groups: Sequence[int], ledger: Ledger, group_rows: int,
    sampled: Mapping[str, int],
) -> list[TeacherWork]:  # fmt: skip
    """Return what is pending of ``sets`` (all registered in ``ledger``) in the row ``groups``, by scale.

    ``sampled``: sets that are new → tiles encoded before their first shard (``tiles_sampled``).
    """
    found: dict[str, TeacherWork] = {}
    tried: set[tuple[object, ...]] = set()
    for arrays in sets:
        view, record = arrays.specs[0].view, ledger.sets[arrays.id]
        rows = [len(rows_of_group(ledger.table, g, group_rows)) for g in groups if g not in ledger.commits[arrays.id]]
        if not rows:
            continue
        size, specs = batch_tiles(view, record.profile), ledger.live(arrays.id)
        # One micro-batch tells whether bits depend on the place in it (``steady.py``), for all views of a size.
        question = (view.size_px, specs[0].shown_px, *(s.layer.name for s in specs))
        trial = int(arrays.id in sampled and size > 1 and question not in tried)
        tried.add(question)
        found[view.scale] = _plus(
            found.get(view.scale) or _nothing(teacher, view, size),
            maps=sum(rows),
            batches=sum(math.ceil(n / size) for n in rows),
            extra_batches=trial + math.ceil(sampled.get(arrays.id, 0) / size),
            views=1,
            nbytes=sum(unit_nbytes(s, group_rows, n) for s in specs for n in rows),
        )
    if found:
        for view, size, batches in _extra(teacher, ledger):
            found[view.scale] = _plus(found.get(view.scale) or _nothing(teacher, view, size), extra_batches=batches)
    return list(found.values())


def tiles_sampled(calibrator: Calibrator, new: Iterable[ArraySet]) -> dict[str, int]:
    """Return for each new set the tiles that are encoded for its calibration and its held-out sample.

    Sets that differ in orientation alone share them: the first one has the number, the others 0.
    """
    found: dict[str, int] = {}
    shared: set[tuple[object, ...]] = set()
    for arrays in new:
        first = arrays.specs[0]
        view = first.view.model_copy(update={"orientation": 0}) if first.view.is_whole else first.view
        name = (first.teacher.name, view, first.encoding, *(s.layer.name for s in arrays.specs))
        found[arrays.id] = 0 if name in shared else calibrator.tiles(arrays)
        shared.add(name)
    return found


def batch_tiles(view: ViewSpec, profile: NumericsProfile) -> int:
    """Return how many tiles a build encodes at once."""
    return 1 if view.windows else profile.micro_batch


def _extra(teacher: TeacherSpec, ledger: Ledger) -> Iterator[tuple[ViewSpec, int, int]]:
    """Yield (view, tiles a batch, batches) of the canary: one for each set of the teacher that has shards."""
    for name, record in ledger.sets.items():
        specs = ledger.live(name)
        if specs and specs[0].teacher.name == teacher.name and ledger.commits[name]:
            size = batch_tiles(specs[0].view, record.profile)
            yield specs[0].view, size, math.ceil(_CANARY_TILES / size)


def _nothing(teacher: TeacherSpec, view: ViewSpec, size: int) -> TeacherWork:
    return TeacherWork(teacher.name, teacher.weights, view.scale, view.size_px, size, 0, 0, 0, 0, 0)


def _plus(work: TeacherWork, **more: int) -> TeacherWork:
    return TeacherWork(**{**asdict(work), **{name: getattr(work, name) + n for name, n in more.items()}})


def read_measured(plan: object, where: str) -> Measured | None:
    """Return what the JSON of ``cache plan`` says was measured, None when it was made with ``--no-measure``.

    Raises ``UsageError`` about ``where`` when it is no such JSON.
    """
    try:
        found = plan["plan"]  # type: ignore[index]
        if found["measured"] is None:
            return None
        data = dict(found["measured"])
        names = list(Rate.__dataclass_fields__)
        rates = tuple(Rate(**{name: rate[name] for name in names}) for rate in data["rates"])
        numbers = [float(data[n]) for n in list(Measured.__dataclass_fields__)[1:]]
        usable = all(math.isfinite(n) and n >= 0 for n in numbers) and min(numbers[:2]) > 0
        if not usable or not all(r.seconds_per_batch > 0 and r.batch_tiles > 0 and r.size_px > 0 for r in rates):
            raise ValueError("a rate of 0")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{where}: not what `rsmtdf cache plan … --json` writes ({type(error).__name__}: {error}); make it again"
        ) from None
    return Measured(rates, *numbers)


def compared(planned_nbytes: int, planned_seconds: float | None, nbytes: int, seconds: float) -> dict[str, Any]:
    """Return ``planned``, ``actual`` and their ``ratio`` (actual / planned; None where nothing was planned)."""
    ratios = [
        round(a / p, 4) if p else None for a, p in ((nbytes, planned_nbytes), (seconds, planned_seconds))
    ]  # fmt: skip
    return {
        "planned": {"nbytes": planned_nbytes, "seconds": round(planned_seconds, 3) if planned_seconds else None},
        "actual": {"nbytes": nbytes, "seconds": round(seconds, 3)},
        "ratio": dict(zip(("nbytes", "seconds"), ratios, strict=True)),
    }


def keep_measured(request: BuildRequest, specs: Sequence[FeatureSpec], plan: Mapping[str, Any]) -> None:
    """Remember the JSON of a plan for the build that follows; silent when the folder cannot be written to."""
    with contextlib.suppress(OSError):
        replace_json(_memo(request, specs), {"plan": plan["plan"]})


def find_measured(request: BuildRequest, specs: Sequence[FeatureSpec]) -> Measured | None:
    """Return what the latest plan measured for the same arrays, dataset and store on this machine, None without one."""
    with contextlib.suppress(OSError, FindingsError, UsageError):
        return read_measured(read_json(_memo(request, specs)), "a plan of before")
    return None


def _memo(request: BuildRequest, specs: Sequence[FeatureSpec]) -> Path:
    out = str(request.out.resolve()) if isinstance(request.out, Path) else request.out
    asked = [str(request.data.resolve()), out, platform.node(), request.device or ""]
    numerics = [request.precision or "", request.micro_batch or 0, request.threads or 0]
    name = digest_of([asked, numerics, sorted(s.digest() for s in specs)])[:16]
    return cache_home() / "plans" / f"{name}.json"
