"""The measurement: the live teacher is asked once per question, and every reading of every store is held against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsmtdf_cache.encode import encode_shown
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.fidelity.agreement import Tally
from rsmtdf_cache.fidelity.questions import Question, Reading, ask, batches, live_specs
from rsmtdf_cache.fidelity.report import FidelityReport, Row, describe_array
from rsmtdf_cache.fidelity.sample import Family, Sample, Target, choose_tiles, find_families
from rsmtdf_cache.plan import TeacherLoader
from rsmtdf_cache.request import TeacherAsked
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import NumericsProfile
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.upkeep.canary import profile_here
from rsmtdf_cache.upkeep.recompute import TeacherShelf

__all__ = ["TILES", "measure_fidelity"]

#: Tiles that are compared unless another number is asked for: as many as calibration keeps apart.
TILES = 16

#: A stored map whose standardised cosine is lower than what its codec explains, by this much, is not the teacher's.
_SLACK = 0.02


def measure_fidelity(
    stores: Sequence[FeatureStore],
    source: TileSource,
    tiles: int = TILES,
    teachers: Sequence[TeacherAsked] = (),
    on_event: EventSink = ignore_events,
    load_teacher: TeacherLoader | None = None,
    device: str | None = None,
) -> FidelityReport:
    """Compare what ``stores`` return with what their teachers give now, on ``tiles`` tiles of ``source``.

    ``teachers``: where the weights of those are whose published ones are not at hand. Nothing is drawn at random: the
    same stores and tiles give the same report. A stored map that is not what the teacher gives is warned of.

    Memory: one batch of maps, and three matrices ``[D, D]`` float64 per array and reading of one question. Raises
    ``UsageError`` (no arrays, no tiles), ``ResourceError`` (weights not at hand), ``MismatchError`` (another teacher
    than the recorded one), ``FindingsError`` (damage).
    """
    families = find_families(stores)
    shelf = TeacherShelf(teachers, load_teacher, device)
    shelf.refuse_unknown({f.teacher.name for f in families})
    sample = choose_tiles(stores, source, tiles)
    if len(sample) < tiles:
        on_event(Warned(f"{len(sample)} tiles of {source.root} are in all arrays; {tiles} were asked for"))
    rows: list[Row] = []
    skipped: list[tuple[str, str, str]] = []
    numerics: list[NumericsProfile] = []
    for family in families:
        teacher = shelf.teacher(family.teacher)
        profile = profile_here(family.recorded, teacher)
        numerics.append(profile)
        name = f"{family.teacher.name}/{family.view.scale}"
        questions, missing = ask(family, teacher, sample)
        skipped += [(name, s.case, s.reason) for s in missing]
        task = f"fidelity-{name}"
        on_event(ProgressStart(task, f"asking {name}", sum(len(q.asked) for q in questions), unit="images"))
        found = [row for q in questions for row in _answer(q, family, teacher, profile, sample, task, on_event)]
        on_event(ProgressEnd(task))
        _warn_of_strangers(found, stores, on_event)
        rows += found
    facts = [describe_array(t) for family in families for t in family.targets]
    return FidelityReport(
        tuple((s.shown, s.snapshot) for s in stores), str(source.root), sample.ids,
        tuple(p.to_json() for p in dict.fromkeys(numerics)), tuple(facts), tuple(rows), tuple(skipped),
    )  # fmt: skip


def _answer(
    question: Question, family: Family, teacher: Teacher, profile: NumericsProfile, sample: Sample, task: str,
    on_event: EventSink,
) -> list[Row]:  # fmt: skip
    tallies: dict[tuple[Target, Reading], Tally] = {}
    exact: dict[tuple[Target, Reading], bool] = {}
    seen: dict[tuple[Target, Reading], set[int]] = {}
    for batch in batches(question, sample, profile.micro_batch):
        view = batch[0][0].view
        # Whole tiles are encoded as a build does, so that their bits can come out equal; crops need no padded batches.
        whole = view.is_whole or view.windows is not None
        numerics = profile if whole else profile.model_copy(update={"micro_batch": len(batch)})
        maps = encode_shown(teacher, view, family.layers, [image for _, image in batch], numerics)
        for i, (asked, _) in enumerate(batch):
            specs = live_specs(teacher, family, asked.view, sample.tile_px)
            for target in family.targets:
                layer = target.spec.layer.name
                for reading in question.readings:
                    read = reading.read(target, sample, asked, specs[layer], maps[layer][i])
                    if read is None:
                        continue
                    pair = (target, reading)
                    if pair not in tallies:
                        tallies[pair], exact[pair], seen[pair] = Tally(target.mean, target.std), True, set()
                    tallies[pair].add(maps[layer][i], np.asarray(read.values), read.counts, read.edge)
                    exact[pair] &= read.exact
                    seen[pair].add(asked.n)
        on_event(Progress(task, len(batch)))
    rows = []
    for (target, reading), tally in tallies.items():
        agreement = tally.result()
        if agreement is not None:
            bits = None if reading.case in ("codec-alone", "mean-vector") else exact[target, reading]
            rows.append(Row(
                target.store, target.key, reading.case, reading.orientation, reading.source, bits,
                len(seen[target, reading]), agreement,
            ))  # fmt: skip
    return rows


def _warn_of_strangers(rows: Sequence[Row], stores: Sequence[FeatureStore], on_event: EventSink) -> None:
    """Warn of stored maps that are farther from the live teacher's than their codec explains."""
    codec = {(r.store, r.array): r.agreement.standardised for r in rows if r.case == "codec-alone"}
    for row in rows:
        if row.case not in ("identity", "orientation-stored") or (row.store, row.array) not in codec:
            continue
        expected, cosine = codec[row.store, row.array], row.agreement.standardised
        if not cosine >= expected - _SLACK:
            on_event(Warned(
                f"{stores[row.store].shown}: {row.array}, orientation {row.orientation}, is not what the teacher gives "
                f"for these tiles: standardised cosine {cosine:.4f}, its codec explains {expected:.4f}; run "
                "`rsmtdf cache verify --deep --recompute 8`"
            ))  # fmt: skip
