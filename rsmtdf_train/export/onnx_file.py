"""A run's student as one ONNX file: load, convert, describe, compare, and only then a name."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from rsmtdf_cache.errors import RsmtdfError, UsageError
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.files import disk_errors, replace_file, sha256_file
from rsmtdf_cache.specs import digest_of
from rsmtdf_train.checkpoint import RunFolder, RunIdentity, load_deployed
from rsmtdf_train.export.agreement import Comparison, compare, sizes_to_compare
from rsmtdf_train.export.conversion import OPSETS, convert, described, require_packages
from rsmtdf_train.export.portable import least_px
from rsmtdf_train.export.record import StudentRecord
from rsmtdf_train.fused_student import FusedStudent

__all__ = ["ExportReport", "export_onnx"]


@dataclass(frozen=True)
class ExportReport:
    """What was written. ``made``: False when this very file was there already.

    ``comparisons``: differences to the student, the training crop first.
    """

    file: Path
    made: bool
    nbytes: int
    sha256: str
    opset: int
    record: StudentRecord
    comparisons: tuple[Comparison, ...]

    @property
    def largest_difference(self) -> float:
        return max(c.difference for c in self.comparisons)


def export_onnx(
    run: Path,
    checkpoint: str | None = None,
    out: Path | None = None,
    *,
    opset: int = OPSETS[0],
    fixed_px: int | None = None,
    force: bool = False,
    on_event: EventSink = ignore_events,
) -> ExportReport:
    """Write the deployed student of ``run`` to ``out``; the file has its name once it agrees with the student.

    ``checkpoint``: ema, student or best; None: what the run deploys. ``fixed_px``: a file for images of this side
    alone. ``force``: replace another file. Raises ``UsageError`` for what cannot be asked for or expressed,
    ``MismatchError`` when the file differs from the student, ``ResourceError`` without the packages or the room.
    """
    if opset not in OPSETS:
        raise UsageError(f"--opset {opset}: give one of {', '.join(map(str, sorted(OPSETS)))}")
    if out is not None and (out.suffix.lower() != ".onnx" or out.is_dir()):
        raise UsageError(f"--out {out}: give the name of a file that ends in .onnx")
    require_packages()
    folder = RunFolder(run)
    kind = checkpoint or folder.deployed_kind()
    model, identity = load_deployed(folder, kind, torch.device("cpu"))
    record = _record(folder, kind, model, identity, fixed_px)
    place = out or run / "export" / f"{_file_stem(identity)}-{kind}.onnx"
    content = described(convert(model, opset, fixed_px), len(record.classes), record.to_properties())
    there = place.is_file()
    made = not (there and place.read_bytes() == content)
    if there and made and not force:
        raise UsageError(f"{place}: another file is there; give another --out, or replace it with --force")
    sizes = sizes_to_compare(record.window_px, record.multiple_px, record.least_px, fixed_px)
    comparisons = compare(content, model, sizes, fixed_px is not None, on_event)
    if made:
        with disk_errors(place.parent):
            replace_file(place, content)
    digest = hashlib.sha256(content).hexdigest()
    return ExportReport(place, made, len(content), digest, opset, record, tuple(comparisons))


def _record(
    folder: RunFolder, kind: str, model: FusedStudent, identity: RunIdentity, fixed_px: int | None
) -> StudentRecord:
    recipe, student = identity.recipe, model.student
    multiple = student.multiple_px
    if fixed_px is not None and (fixed_px < multiple or fixed_px % multiple):
        near = max(multiple, int(fixed_px / multiple + 0.5) * multiple)
        raise UsageError(f"--fixed {fixed_px}: this student reads multiples of {multiple} px; give {near}")
    fused = model.fusion is not None and model.fusion.fused
    return StudentRecord(
        run=recipe.name,
        student=f"{recipe.student.encoder} {recipe.student.decoder}" + " with fusion" * fused,
        checkpoint=kind,
        checkpoint_sha256=sha256_file(folder.deployed(kind)),
        recipe_sha256=digest_of(recipe.model_dump(mode="json")),
        classes=identity.classes,
        ignore_index=identity.ignore_index,
        mean=_decimals(student.mean),
        std=_decimals(student.std),
        window_px=fixed_px or -(-recipe.crop_px // multiple) * multiple,
        multiple_px=multiple,
        least_px=least_px(model),
        fixed_px=fixed_px,
        square=fixed_px is not None or model.sees_squares,
        pixels=identity.pixels,
        attribution=_attribution(recipe.data),
        version=version("rsmtdf"),
        exporter=f"torch {torch.__version__}",
    )


def _decimals(values: Tensor) -> tuple[float, ...]:
    """Return float32 numbers as a person wrote them: 0.485, not 0.48500001430511475."""
    return tuple(float(f"{v:.7g}") for v in values.flatten().tolist())


def _attribution(data: Path) -> str:
    """Return whom the dataset credits, nothing where it is no longer at hand."""
    from rsmtdf_cache.sources import open_source

    try:
        return open_source(data).attribution
    except (RsmtdfError, OSError):
        return ""


def _file_stem(identity: RunIdentity) -> str:
    student = identity.recipe.student
    name = f"{student.encoder.removeprefix('timm:')}-{student.decoder}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
