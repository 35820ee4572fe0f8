"""What a build will do: which arrays in which sets, how large, in which numerics; and what it refuses to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rsmtdf_cache.codecs import codec_class, codec_name
from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_cache.fixed_views import fixed_views
from rsmtdf_cache.layout import ArraySet, StorePaths, choose_group_rows, unit_nbytes
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest, load_manifest
from rsmtdf_cache.request import BuildRequest, TeacherAsked
from rsmtdf_cache.sources import TileSource
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile, ViewSpec, differing_fields
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.tiles import TileRecord, TileTable
from rsmtdf_cache.views import fitting_scales, view_specs
from rsmtdf_cache.windows import map_layers, with_windows

__all__ = [
    "TeacherJob",
    "TeacherLoader",
    "array_sets",
    "decide_group_rows",
    "decide_profile",
    "largest_unit_nbytes",
    "load_asked",
    "pending_nbytes",
    "plan_teacher",
    "planned_array",
    "refuse_other_content",
    "revivable",
    "revive",
    "rows_of_group",
    "settle_profile",
]


class TeacherLoader(Protocol):
    """Returns a frozen teacher on ``device``."""

    def __call__(self, request: TeacherRequest, device: str = "cpu") -> Teacher: ...


@dataclass
class TeacherJob:
    """One teacher's part of a build: the arrays asked for."""

    teacher: Teacher
    specs: list[FeatureSpec]


def load_asked(asked: TeacherAsked, request: BuildRequest, load: TeacherLoader | None = None) -> Teacher:
    """Load a teacher as the request says, on its device."""
    if load is None:
        from rsmtdf_cache.teachers import load as load_by_name

        load = load_by_name
    weights: str | Path | None = "none" if asked.pretrained == "none" else asked.weights
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load(TeacherRequest(asked.name, weights, asked.seed, asked.layers, asked.positions), device=device)


def plan_teacher(
    asked: TeacherAsked, request: BuildRequest, tile_px: int, load: TeacherLoader | None = None
) -> TeacherJob:
    """Load a teacher and decide its arrays: layers by views, whole tiles first, then fixed views."""
    teacher = load_asked(asked, request, load)
    layers = asked.layers or teacher.default_layers
    if len(set(layers)) != len(layers):
        raise UsageError(f"{asked.name}: a layer stands twice in {', '.join(layers)}")
    encoding = request.encoding(asked)
    specs = [
        FeatureSpec(
            teacher=teacher.spec,
            layer=layer,
            view=view,
            encoding=encoding,
            tile_px=tile_px,
            grid=grid,
        )
        for view in _views(teacher, layers, asked, request, tile_px)
        for layer, grid in map_layers(teacher, layers, view)
    ]
    for spec in specs:
        codec_class(encoding).stored_channels(encoding, spec.layer.channels)
    return TeacherJob(teacher, specs)


def _views(
    teacher: Teacher, layers: tuple[str, ...], asked: TeacherAsked, request: BuildRequest, tile_px: int
) -> list[ViewSpec]:
    """Return the views of one teacher: whole tiles, then fixed views; large ones in windows."""
    scales = asked.scales or request.scales
    if asked.scales is None and "scales" not in request.model_fields_set:
        scales = fitting_scales(teacher.spec, tile_px, scales)
    views = view_specs(teacher.spec, tile_px, scales, asked.orientations or request.orientations)
    count = request.fixed_views if asked.fixed_views is None else asked.fixed_views
    views += fixed_views(teacher.spec, tile_px, count, request.view_seed)
    window_px = request.window_px if asked.window_px is None else asked.window_px
    return [with_windows(teacher, layers, v, window_px, request.overlap) for v in views]


def array_sets(specs: list[FeatureSpec], ledger: Ledger) -> list[ArraySet]:
    """Return the sets whose units hold ``specs``: an array that the store has keeps its set, new ones form one a view.

    The caller holds the build lock: an array must never come to be in two sets.
    """
    known = ledger.specs()
    sets: list[ArraySet] = []
    for view in dict.fromkeys(s.view for s in specs):
        here = [s for s in specs if s.view == view]
        names = dict.fromkeys(ledger.set_of(s.key) for s in here if s.key in known)
        sets += [ledger.sets[name].arrays for name in names]
        new = tuple(s for s in here if s.key not in known)
        if new:
            sets.append(ArraySet(new))
    return sets


def refuse_other_content(
    manifest: Manifest, ledger: Ledger, specs: list[FeatureSpec], source: TileSource, request: BuildRequest
) -> None:
    """Raise ``MismatchError`` when the store cannot take ``specs``: same key, another digest; another tile side."""
    root = ledger.paths.root
    if manifest.tile_px != source.tile_px:
        raise MismatchError(f"{root} holds tiles of {manifest.tile_px} px, {request.data} has {source.tile_px} px")
    if request.group_rows not in (None, manifest.group_rows):
        raise MismatchError(
            f"{root} has row groups of {manifest.group_rows}, asked for {request.group_rows}; "
            "leave --group-rows out, or build into a new folder"
        )
    known = ledger.specs()
    for spec in specs:
        if spec.key not in known:
            _refuse_occupied(ledger, spec)
        old = known.get(spec.key)
        if old is not None and old.digest() != spec.digest():
            fields = "\n  ".join(differing_fields(old.to_json(), spec.to_json()))
            raise MismatchError(
                f"{root} holds another {spec.key}:\n  {fields}\nbuild into a new folder, or ask for what it has"
            )


def revive(ledger: Ledger, specs: list[FeatureSpec]) -> None:
    """Take dropped arrays back that are asked for again and whose every shard is still there. Under the build lock."""
    back = revivable(ledger, specs)
    if back:
        ledger.undrop(back)


def revivable(ledger: Ledger, specs: list[FeatureSpec]) -> list[tuple[str, str]]:
    """Return the dropped (set, layer) that ``revive`` takes back."""
    known = ledger.specs()
    gone = [spec for spec in specs if spec.key not in known]
    return [place for spec in gone for place in _dropped_places(ledger, spec) if _revivable(ledger, spec, place)]


def _dropped_places(ledger: Ledger, spec: FeatureSpec) -> list[tuple[str, str]]:
    """Return the (set, layer) that were dropped and had the key of ``spec``."""
    return [
        (name, layer)
        for name, layer in sorted(ledger.dropped)
        if name in ledger.sets
        and any(s.key == spec.key for s in ledger.sets[name].arrays.specs if s.layer.name == layer)
    ]


def _revivable(ledger: Ledger, spec: FeatureSpec, place: tuple[str, str]) -> bool:
    name, layer = place
    same = any(s.digest() == spec.digest() for s in ledger.sets[name].arrays.specs)
    shards = [c.shard(layer) for c in ledger.commits[name].values()]
    return same and all(s is not None and (ledger.paths.root / s.path).is_file() for s in shards)


def _refuse_occupied(ledger: Ledger, spec: FeatureSpec) -> None:
    """Raise ``MismatchError`` when shards of a dropped array still lie where those of ``spec`` would."""
    for name, layer in _dropped_places(ledger, spec):
        if _revivable(ledger, spec, (name, layer)):
            continue
        shards = [c.shard(layer) for c in ledger.commits[name].values()]
        here = any(s is not None and (ledger.paths.root / s.path).is_file() for s in shards)
        if here or len(ledger.sets[name].arrays.specs) == 1:  # a set's name is taken as long as its record is there
            raise MismatchError(
                f"{ledger.paths.root}: {spec.key} was dropped and not collected yet; run "
                f"`rsmtdf cache gc {ledger.paths.root}` (it says which pins hold them), then the same command again"
            )


def decide_group_rows(request: BuildRequest, paths: StorePaths, specs: list[FeatureSpec]) -> int:
    """Return the rows per group: the store's own, else what was asked for, else a size that suits the arrays."""
    if paths.manifest.is_file():
        return load_manifest(paths).group_rows
    return request.group_rows or choose_group_rows(specs)


def planned_array(
    spec: FeatureSpec, records: Sequence[TileRecord], group_rows: int, ledger: Ledger | None = None
) -> dict[str, Any]:
    """Return what a build of ``records`` would add to the array: tiles, shards and bytes; sizes are exact.

    ``ledger``: of the store that is there. Its tiles come in their row groups, new ones in groups of their own.
    """
    rows = [ledger.table.row_of(r.id) for r in records if r.id in ledger.table] if ledger is not None else []
    there = set(ledger.shards(spec.key)) if ledger is not None and spec.key in ledger.specs() else set()
    pending = sorted({row // group_rows for row in rows} - there)
    sizes = [len(rows_of_group(ledger.table, g, group_rows)) for g in pending] if ledger is not None else []
    full, rest = divmod(len(records) - len(rows), group_rows)
    sizes += [group_rows] * full + ([rest] if rest else [])
    return {
        "key": str(spec.key), "digest": spec.digest(), "grid": list(spec.grid), "channels": spec.layer.channels,
        "stride_tile_px": spec.stride_tile_px, "codec": codec_name(spec.encoding), "view": spec.view.to_json(),
        "tiles": sum(sizes), "shards": len(sizes), "nbytes": sum(unit_nbytes(spec, group_rows, n) for n in sizes),
    }  # fmt: skip


def pending_nbytes(ledger: Ledger, sets: list[ArraySet], groups: list[int], group_rows: int) -> int:
    """Return the bytes of the units of ``sets`` in ``groups`` that are not committed; compressed ones count in full."""
    nbytes = 0
    for arrays in sets:
        for group in groups:
            if group not in ledger.commits.get(arrays.id, ()):
                rows = len(rows_of_group(ledger.table, group, group_rows))
                nbytes += sum(unit_nbytes(s, group_rows, rows) for s in arrays.specs)
    return nbytes


def largest_unit_nbytes(sets: Sequence[ArraySet], group_rows: int) -> int:
    """Return the bytes of the largest unit that ``sets`` can have, 0 when there are none."""
    return max((sum(unit_nbytes(s, group_rows, group_rows) for s in a.specs) for a in sets), default=0)


def rows_of_group(table: TileTable, group: int, group_rows: int) -> list[int]:
    """Return the rows of a group that have a tile."""
    return table.rows_between(group * group_rows, (group + 1) * group_rows)


def decide_profile(request: BuildRequest, teacher: Teacher, threads: int | None = None) -> NumericsProfile:
    """Return the numerics of a new array set on this machine. ``threads``: of a forward pass if none are asked for."""
    cuda = teacher.device.type == "cuda"
    return NumericsProfile(
        device=torch.cuda.get_device_name(teacher.device) if cuda else teacher.device.type,
        precision=request.precision or ("bfloat16" if cuda else "float32"),
        torch=torch.__version__,
        threads=request.threads or threads or torch.get_num_threads(),
        micro_batch=request.micro_batch or (32 if cuda else 8),
    )


def settle_profile(request: BuildRequest, teacher: Teacher, recorded: NumericsProfile) -> NumericsProfile:
    """Return the profile to encode in: the recorded one, where this machine can give it."""
    here = decide_profile(request, teacher)
    wanted = recorded.model_copy(update={
        "device": here.device, "torch": here.torch,
        "precision": request.precision or recorded.precision,
        "threads": request.threads or recorded.threads,
        "micro_batch": request.micro_batch or recorded.micro_batch,
    })  # fmt: skip
    if wanted != recorded and not request.allow_mixed:
        fields = "\n  ".join(differing_fields(recorded.to_json(), wanted.to_json()))
        raise MismatchError(
            f"{request.shown}: this machine encodes with other numerics than the store's:\n  {fields}\n"
            "its bits would differ; continue where the store was begun, or accept it with --allow-mixed"
        )
    return wanted
