"""Which registered store fits a recipe; and if none does, why, and the command that builds one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from rsmtdf_cache.codecs import codec_name
from rsmtdf_cache.crops import nearest_orientation
from rsmtdf_cache.errors import MismatchError, RsmtdfError, UsageError, did_you_mean
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.request import TeacherAsked, parse_teacher
from rsmtdf_cache.share.catalogue import check_catalogue, registered_stores
from rsmtdf_cache.sources import TileSource, open_source
from rsmtdf_cache.sources.base import Tile
from rsmtdf_cache.tiles import pixel_digest
from rsmtdf_cache.views import ORIENTATION_SETS, base_size_px
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.same_weights import compare_weights, is_teacher, weights_text
from rsmtdf_train.sections import DistillConfig
from rsmtdf_train.targets.base import match_keys
from rsmtdf_train.targets.fixed import FixedViewTargets, fixed_view_geometry, fixed_view_specs
from rsmtdf_train.targets.rebuild import asked_as
from rsmtdf_train.targets.stored import CachedTargets, check_pins, store_geometry, target_specs

if TYPE_CHECKING:
    from rsmtdf_cache.specs import FeatureSpec
    from rsmtdf_cache.store import FeatureStore

__all__ = ["FoundStore", "build_command", "find_store", "how_to_build"]

#: Tiles whose pixels are compared with the store before it is offered; training compares every tile it reads.
_COMPARED_TILES = 32

#: Fixed views that a build is advised to make for a recipe that trains on some.
_FIXED_VIEWS = 8


@dataclass(frozen=True)
class FoundStore:
    """The store that was chosen, and how many others fit as well. ``notes``: what could not be compared."""

    path: str
    snapshot: str
    others: int
    notes: tuple[str, ...] = ()


class _Misfit(Exception):
    """Why a store does not fit. ``appendable``: it is of this dataset, and a build could add what it lacks."""

    def __init__(self, reason: str, appendable: bool = False) -> None:
        super().__init__(reason)
        self.appendable = appendable


def find_store(recipe: Recipe, on_event: EventSink = ignore_events) -> FoundStore:
    """Return the registered store that fits ``recipe``, of several the one registered last.

    A store fits when it was built from the recipe's dataset (tile side, ids of the train split, pixels of some of its
    tiles), holds the teachers, weights, layers and scales of ``recipe.teachers`` and features for every pattern of
    ``distill.keys``, has them committed for all train tiles but the quarantined ones, and agrees with ``distill.pins``.
    Raises ``UsageError`` with each store's reason and the command that builds a fitting one, ``ResourceError`` when
    the catalogue cannot be read.
    """
    check_catalogue()
    source = open_source(recipe.data)
    fitting: list[FoundStore] = []
    misfits: list[str] = []
    append_to: str | None = None
    for entry in registered_stores(on_event):
        try:
            store = _open(entry.path)  # raises a misfit that is not appendable
            notes = _judge(store, recipe, source)
            fitting.append(FoundStore(entry.path, store.snapshot, 0, notes))
        except _Misfit as misfit:
            misfits.append(f"{entry.path}: {misfit}")
            if misfit.appendable and append_to is None and "://" not in entry.path and _takes(store, recipe):
                append_to = entry.path
        except (RsmtdfError, OSError, ImportError) as error:
            misfits.append(f"{entry.path}: {str(error).partition(chr(10))[0]}")
    if fitting:
        return replace(fitting[0], others=len(fitting) - 1)
    why = "no store is registered, so none could be found (`rsmtdf cache register STORE` enters one that is there)"
    if misfits:
        count = "the registered store does not fit" if len(misfits) == 1 else (
            f"none of the {len(misfits)} registered stores fits"
        )  # fmt: skip
        why = f"{count} the recipe {recipe.name!r} (see `rsmtdf cache list`):" + "".join(f"\n  {m}" for m in misfits)
    raise UsageError(f"--use-cache: {why}\n{how_to_build(recipe, source, append_to)}")


def how_to_build(recipe: Recipe, source: TileSource, append_to: str | None = None) -> str:
    """Return a sentence with the command that builds what ``recipe`` reads, or why there is no such command."""
    if unknown := _unknown_teachers(recipe):
        return "No store can be built for it: " + "; ".join(unknown)
    command = build_command(recipe, source, append_to)
    if not _asked(recipe):
        command += " --teacher NAME"
        return (
            "The recipe does not say which teachers it wants. Name them in its section `teachers`, and build a store "
            f"with them:\n  {command}"
        )
    return f"Build one, then run this command again:\n  {command}"


def build_command(recipe: Recipe, source: TileSource, append_to: str | None = None) -> str:
    """Return the ``rsmtdf cache build`` command of a store for ``recipe``.

    Teachers are those of ``recipe.teachers``, else those that ``distill.keys`` and ``distill.pins`` name in full. What
    their texts leave open is taken from the patterns: layers and scales, where all patterns of a teacher name them.
    """
    out = append_to or _new_folder(recipe.data)
    teachers = [f"--teacher {shlex.quote(_completed(text, recipe, source))}" for text in _asked(recipe)]
    if _wants_fixed_views(recipe) and not any(parse_teacher(text).fixed_views for text in _asked(recipe)):
        teachers.append(f"--fixed-views {_FIXED_VIEWS}")
    return " ".join(["rsmtdf cache build", shlex.quote(str(recipe.data)), "--out", shlex.quote(out), *teachers])


def _open(path: str) -> FeatureStore:
    from rsmtdf_cache.store import FeatureStore

    if "://" not in path and not Path(path).is_dir():
        raise _Misfit(
            f"the folder does not exist; `rsmtdf cache forget {shlex.quote(path)}` takes it out of the list, "
            "`rsmtdf cache register STORE` enters the place it was moved to"
        )
    return FeatureStore.open(path)


def _judge(store: FeatureStore, recipe: Recipe, source: TileSource) -> tuple[str, ...]:
    """Return what could not be compared. Raises ``_Misfit``, or what the trainer would raise, unless ``store`` fits."""
    if store.tile_px != source.tile_px:
        raise _Misfit(f"holds tiles of {store.tile_px} px, {source.root} has {source.tile_px} px")
    train = [tile for tile in source.tiles(["train"]) if tile.id not in store.quarantined]
    known = [tile for tile in train if tile.id in store.tiles]
    if not known:
        raise _Misfit(f"was built from another dataset: it has none of the train tiles of {source.root}")
    for tile in known[:: -(-len(known) // _COMPARED_TILES)]:
        if pixel_digest(source.read_image(tile)) != store.tiles.record(store.tiles.row_of(tile.id)).digest:
            raise _Misfit(f"was built from another dataset: its tile {tile.id!r} has other pixels")
    stored = target_specs(store)
    specs = [spec for by in stored.values() for spec in by.values()]
    notes = _judge_weights(recipe, specs)  # before all that a build could add: it adds nothing beside other weights
    if len(known) < len(train):
        absent = [tile.id for tile in train if tile.id not in store.tiles]
        raise _Misfit(f"lacks {len(absent)} of {len(train)} train tiles ({_few(absent)})", appendable=True)
    if not stored:
        raise _Misfit("holds no arrays", appendable=True)
    for text in recipe.teachers:
        _judge_teacher(parse_teacher(text), specs)
    distill = recipe.distill or DistillConfig()
    known_keys = list(fixed_view_specs(store) if _wants_fixed_views(recipe) else stored)
    if not known_keys:
        raise _Misfit("holds no fixed views", appendable=True)
    for pattern in distill.keys:
        if not any(fnmatchcase(key, pattern) for key in known_keys):
            raise _Misfit(f"holds no features that match {pattern!r} (it has {_few(known_keys)})", appendable=True)
    if recipe.distill is not None:
        try:
            check_pins(store, recipe.distill.pins)
        except MismatchError as error:
            raise _Misfit("; ".join(line.strip() for line in str(error).splitlines()[1:-1])) from None
    if _wants_fixed_views(recipe):
        views = FixedViewTargets(store, distill.keys, fixed_view_geometry(store, recipe.crop_px))
        for spec in views.arrays():
            _judge_committed(store, spec, train)
        return notes
    approximate = recipe.augment.approximate_orientations
    geometry = store_geometry(store, recipe.crop_px, approximate=approximate)
    for key in match_keys(distill.keys, list(stored)):
        frames = set(geometry.orientations)
        if approximate:
            frames = {nearest_orientation(frame, stored[key]) for frame in frames}
        for orientation in sorted(frames):
            if orientation not in stored[key]:
                raise _Misfit(f"{key} is not stored in orientation {orientation}, other features are", appendable=True)
            _judge_committed(store, stored[key][orientation], train)
    CachedTargets(store, distill.keys, geometry, approximate)
    return notes


def _judge_committed(store: FeatureStore, spec: FeatureSpec, train: Sequence[Tile]) -> None:
    rows = store.committed(spec.key)
    absent = [tile.id for tile in train if not rows[store.tiles.row_of(tile.id)]]
    if absent:
        raise _Misfit(f"{spec.key} lacks {len(absent)} of {len(train)} train tiles ({_few(absent)})", appendable=True)


def _wants_fixed_views(recipe: Recipe) -> bool:
    return recipe.augment.geometry == "fixed-views"


def _judge_weights(recipe: Recipe, specs: Sequence[FeatureSpec]) -> tuple[str, ...]:
    """Return a line for each teacher of ``recipe.teachers`` whose weights cannot be compared.

    Raises ``_Misfit`` for other weights.
    """
    notes: list[str] = []
    for asked in map(parse_teacher, recipe.teachers):
        for teacher in {spec.teacher: None for spec in specs if is_teacher(asked.name, spec.teacher.name)}:
            verdict = compare_weights(asked, teacher)
            has = f"its teacher {teacher.name} has the weights {teacher.weights_origin!r}"
            if verdict == "other":
                raise _Misfit(f"{has}, the recipe asks for {weights_text(asked)}")
            if verdict == "unknown":
                notes.append(
                    f"{has}; whether they are {weights_text(asked)}, as the recipe asks, is not recorded: "
                    "distill.pins holds a store to exact digests"
                )
    return tuple(notes)


def _takes(store: FeatureStore, recipe: Recipe) -> bool:
    """Whether a build of the recipe's teachers could add to ``store``: none is there with other weights."""
    there = [store.spec(key).teacher for key in store.keys()]
    asked = [parse_teacher(text) for text in _asked(recipe)]
    return not any(is_teacher(a.name, t.name) and compare_weights(a, t) == "other" for a in asked for t in there)


def _judge_teacher(asked: TeacherAsked, specs: Sequence[FeatureSpec]) -> None:
    mine = [spec for spec in specs if is_teacher(asked.name, spec.teacher.name)]
    if not mine:
        names = sorted({spec.teacher.name for spec in specs})
        raise _Misfit(f"holds no features of teacher {asked.name} (it has {_few(names)})", appendable=True)
    rules = {spec.teacher.positions for spec in mine}
    if asked.positions is not None and rules != {asked.positions}:
        raise _Misfit(f"has {asked.name} with positions={_few(sorted(rules))}, not {asked.positions}")
    codecs = {codec_name(spec.encoding.model_copy(update={"compressor": "none"})) for spec in mine}
    if asked.codec is not None and codecs != {asked.codec}:
        raise _Misfit(f"has {asked.name} as {_few(sorted(codecs))}, not {asked.codec}")
    layers = {spec.layer.name for spec in mine}
    if missing := sorted(set(asked.layers or ()) - layers):
        raise _Misfit(f"lacks {_few(missing)} of teacher {asked.name}", appendable=True)
    scales = {spec.view.size_px / base_size_px(spec.teacher, spec.tile_px) for spec in mine}
    if missing := [f"scale {scale:g}" for scale in asked.scales or () if scale not in scales]:
        raise _Misfit(f"lacks {_few(missing)} of teacher {asked.name}", appendable=True)
    turns = {spec.view.orientation for spec in mine}
    if not set(ORIENTATION_SETS.get(asked.orientations or 1, ())) <= turns:
        raise _Misfit(
            f"has {len(turns)} orientations of teacher {asked.name}, not {asked.orientations}", appendable=True
        )


def _asked(recipe: Recipe) -> list[str]:
    """Return the teachers of the recipe as ``--teacher`` texts."""
    if recipe.teachers:
        return list(recipe.teachers)
    named = [key.split("/")[0] for key in _patterns(recipe)]
    return list(dict.fromkeys(asked_as(name) for name in named if name and not _is_glob(name)))


def _unknown_teachers(recipe: Recipe) -> list[str]:
    """Return a sentence for each teacher of the recipe that no package here provides."""
    from rsmtdf_cache.teachers import names

    known, lines = names(), []
    for asked in map(parse_teacher, _asked(recipe)):
        if asked.name.startswith("timm:"):
            import timm

            architecture = asked.name[5:].split(".")[0]
            if not timm.is_model(architecture):
                close = did_you_mean(asked.name, [f"timm:{name}" for name in timm.list_models()])
                lines.append(f"the recipe names the unknown teacher {asked.name!r}.{close}")
        elif asked.name not in known:
            lines.append(
                f"the recipe names the unknown teacher {asked.name!r}.{did_you_mean(asked.name, known)} "
                f"Known: {', '.join(known)}, and timm:NAME for any timm encoder"
            )
    return lines


def _patterns(recipe: Recipe) -> list[str]:
    return [] if recipe.distill is None else [*recipe.distill.keys, *recipe.distill.pins]


def _completed(text: str, recipe: Recipe, source: TileSource) -> str:
    """Return the ``--teacher`` text with the layers and scales that the recipe's patterns name for it."""
    asked = parse_teacher(text)
    stored_as = asked.name.replace("timm:", "timm-", 1)
    mine = [p.split("/") for p in _patterns(recipe) if fnmatchcase(stored_as, p.split("/")[0])]
    if not mine or any(len(parts) != 3 for parts in mine):
        return text
    layers = list(dict.fromkeys(parts[2] for parts in mine))
    if asked.layers is None and not any(_is_glob(layer) for layer in layers):
        text += f",layers={'+'.join(layers)}"
    sizes = {parts[1].partition("o")[0].removeprefix("s") for parts in mine}
    if asked.scales is None and all(size.isdecimal() for size in sizes):
        base = _base_px(asked, source.tile_px)
        if base is not None:
            text += f",scales={'+'.join(f'{int(size) / base:g}' for size in sorted(sizes, key=int, reverse=True))}"
    return text


def _base_px(asked: TeacherAsked, tile_px: int) -> int | None:
    """Return the side of the teacher's view at scale 1, or None when the teacher cannot be asked here.

    The network is made with random weights: its geometry is wanted, and nothing is downloaded.
    """
    from rsmtdf_cache.teachers import load
    from rsmtdf_cache.teachers.base import TeacherRequest

    try:
        return base_size_px(load(TeacherRequest(asked.name, "none", layers=asked.layers)).spec, tile_px)
    except (RsmtdfError, MemoryError):
        return None


def _new_folder(data: Path) -> str:
    folder, number = f"{data}.store", 1
    while Path(folder).exists():
        number += 1
        folder = f"{data}-{number}.store"
    return folder


def _is_glob(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
