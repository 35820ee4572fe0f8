"""What could be stored: layers, scales and a codec of each teacher, with the exact size of the store they make."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rsmtdf_cache.codecs import codec_class, parse_codec
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.files import replace_file
from rsmtdf_cache.layout import choose_group_rows
from rsmtdf_cache.plan import TeacherJob, TeacherLoader, plan_teacher, planned_array
from rsmtdf_cache.request import BuildRequest, TeacherAsked
from rsmtdf_cache.specs import FeatureSpec
from rsmtdf_cache.tiles import TileRecord
from rsmtdf_cache.tune.maps import upright
from rsmtdf_cache.views import ORIENTATION_SETS, fitting_scales

__all__ = [
    "Candidate",
    "Part",
    "TunedTeacher",
    "configuration",
    "joined",
    "parts_of_teacher",
    "plan_tuned",
    "store_nbytes",
    "write_configuration",
]

#: Components of pcaK-int8 that are tried, as parts of the narrowest layer's channels.
_PCA_PARTS = (2, 4, 8)


@dataclass(frozen=True)
class Part:
    """One teacher's arrays in a candidate."""

    teacher: str
    layers: tuple[str, ...]
    scales: tuple[float, ...]
    codec: str

    @property
    def name(self) -> str:
        return f"{self.teacher} {'+'.join(self.layers)} @{'+'.join(f'{s:g}' for s in self.scales)} {self.codec}"


@dataclass(frozen=True)
class Candidate:
    """Parts of one or more teachers that make one store."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return " | ".join(p.name for p in self.parts)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the parts as plain data."""
        return [{**asdict(p), "layers": list(p.layers), "scales": list(p.scales)} for p in self.parts]


@dataclass(frozen=True)
class TunedTeacher:
    """A teacher with all arrays that may be chosen. ``scales``: scale name (``s448``) by scale."""

    asked: TeacherAsked
    job: TeacherJob
    layers: tuple[str, ...]
    scales: Mapping[float, str]
    orientations: int

    def keys(self, part: Part) -> list[tuple[str, str, str]]:
        """Return (teacher, scale name, layer) of the upright arrays of ``part``."""
        return [(part.teacher, self.scales[s], layer) for s in part.scales for layer in part.layers]

    def specs(self, part: Part, orientations: int | None = None) -> list[FeatureSpec]:
        """Return every array a build of ``part`` makes: all orientations (default: as asked), fixed views too."""
        scales = {self.scales[s] for s in part.scales}
        encoding = parse_codec(part.codec).model_copy(update={"compressor": self.job.specs[0].encoding.compressor})
        turns = ORIENTATION_SETS[orientations or self.orientations]
        made = [
            s.model_copy(update={"view": s.view.model_copy(update={"orientation": o})})
            for s in upright(self.job)
            for o in turns
            if s.view.scale in scales
        ]
        made += [s for s in self.job.specs if not s.view.is_whole]
        return [s.model_copy(update={"encoding": encoding}) for s in made if s.layer.name in part.layers]


def plan_tuned(
    asked: TeacherAsked, request: BuildRequest, tile_px: int, load: TeacherLoader | None = None
) -> TunedTeacher:
    """Load a teacher with everything that it may contribute: its layers (default: the teacher's own), its scales."""
    plain = request.model_copy(update={"codec": "float16"})
    job = plan_teacher(asked.model_copy(update={"codec": None}), plain, tile_px, load)
    scales = asked.scales or request.scales
    if asked.scales is None and "scales" not in request.model_fields_set:
        scales = fitting_scales(job.teacher.spec, tile_px, scales)
    views = list(dict.fromkeys(s.view for s in upright(job)))
    layers = asked.layers or job.teacher.default_layers
    names = {scale: view.scale for scale, view in zip(scales, views, strict=True)}
    return TunedTeacher(asked, job, tuple(layers), names, asked.orientations or request.orientations)


def parts_of_teacher(tuned: TunedTeacher, request: BuildRequest, codecs: Sequence[str] | None = None) -> list[Part]:
    """Return what is tried of one teacher: each layer and all together, each scale and all together, every codec.

    ``codecs``: None = float16, int8 and int8 of 1/2, 1/4 and 1/8 of the narrowest layer's channels; a codec that the
    teacher or the build was asked for with is the only one. A pcaK with more components than channels is passed over.
    """
    name = tuned.job.teacher.spec.name
    fixed = tuned.asked.codec or (request.codec if "codec" in request.model_fields_set else None)
    channels = {s.layer.name: s.layer.channels for s in upright(tuned.job)}
    found = []
    for layers in _alone_and_together(tuned.layers):
        narrowest = min(channels[layer] for layer in layers)
        if fixed is not None:
            tried = [fixed]
        elif codecs is not None:
            tried = [c for c in codecs if _fits(c, narrowest)]
        else:
            pca = dict.fromkeys(f"pca{max(1, narrowest // part)}-int8" for part in _PCA_PARTS)
            tried = ["float16", "int8", *pca]
        for scales in _alone_and_together(tuple(tuned.scales)):
            found += [Part(name, layers, scales, codec) for codec in tried]
    if not found:
        raise UsageError(f"--codecs {','.join(codecs or ())}: no layer of {name} is wide enough for any of them")
    return found


def joined(fronts: Sequence[Sequence[Part]], at_most: int = 25) -> list[Candidate]:
    """Return combinations with one part of every front (smallest part first), near ``at_most`` of them.

    Long fronts are thinned out evenly; their ends stay.
    """
    each = max(2, int(at_most ** (1 / len(fronts)) + 1e-9))
    thin = []
    for front in fronts:
        last, most = len(front) - 1, min(each, len(front))
        thin.append([front[round(i * last / max(1, most - 1))] for i in range(most)])
    return [Candidate(parts) for parts in itertools.product(*thin)]


def store_nbytes(
    candidate: Candidate, teachers: Mapping[str, TunedTeacher], request: BuildRequest, tiles: int,
    orientations: int | None = None,
) -> int:  # fmt: skip
    """Return the bytes of the features of ``tiles`` tiles in a new store: what ``cache plan`` says (at most, with a
    byte compressor).
    """
    specs = _specs(candidate, teachers, orientations)
    rows = _group_rows(specs, request, tiles)
    stand_ins = [TileRecord("", b"", "train", "")] * tiles
    return sum(int(planned_array(s, stand_ins, rows)["nbytes"]) for s in specs)


def _specs(
    candidate: Candidate, teachers: Mapping[str, TunedTeacher], orientations: int | None = None
) -> list[FeatureSpec]:
    return [s for part in candidate.parts for s in teachers[part.teacher].specs(part, orientations)]


def _group_rows(specs: Sequence[FeatureSpec], request: BuildRequest, tiles: int) -> int:
    """Return tiles per shard: as a build chooses, but no more than there are. An index has 16 bytes for each, used or
    not; where maps are small that would be more than the features.
    """
    return request.group_rows or min(choose_group_rows(specs), max(1, tiles))


def configuration(
    candidate: Candidate, teachers: Mapping[str, TunedTeacher], request: BuildRequest, tiles: int
) -> dict[str, Any]:
    """Return the keys and values of a file for ``cache build --config`` that builds ``candidate``.

    What the request set stays; data, store and splits stand in any case.
    """
    values = request.model_dump(
        mode="json", exclude_unset=True, exclude={"teachers", "scales", "orientations", "codec"}
    )
    values |= {"data": str(request.data), "out": str(request.out), "splits": list(request.splits)}
    values["group_rows"] = _group_rows(_specs(candidate, teachers), request, tiles)
    values["teachers"] = [
        {
            **teachers[p.teacher].asked.model_dump(mode="json", exclude_defaults=True),
            "layers": list(p.layers), "scales": list(p.scales),
            "orientations": teachers[p.teacher].orientations, "codec": p.codec,
        }
        for p in candidate.parts
    ]  # fmt: skip
    return values


def write_configuration(path: Path, values: Mapping[str, Any], comments: Sequence[str] = ()) -> None:
    """Write ``values`` as YAML, ``comments`` above it. Raises ``UsageError`` when a build would not take it."""
    BuildRequest.of(values)
    header = "".join(f"# {line}\n" for text in comments for line in text.splitlines())
    text = header + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def _alone_and_together(items: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [*((item,) for item in items), *([tuple(items)] if len(items) > 1 else [])]


def _fits(codec: str, channels: int) -> bool:
    encoding = parse_codec(codec)
    try:
        codec_class(encoding).stored_channels(encoding, channels)
    except UsageError:
        return False
    return True
