"""``rsmtdf export``: a run's student as one file that runs without the trainer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

if TYPE_CHECKING:
    from rsmtdf_train.export.onnx_file import ExportReport

__all__ = ["export"]


class _Choice(StrEnum):
    DEPLOYED = "deployed"
    BEST = "best"
    EMA = "ema"
    STUDENT = "student"


class _Format(StrEnum):
    ONNX = "onnx"


@command
def export(
    run: Annotated[Path, typer.Argument(help="Run folder of `rsmtdf train`.", show_default=False)],
    format: Annotated[_Format, typer.Option(help="What to write.")] = _Format.ONNX,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File to write; default RUN/export/ENCODER-DECODER-CHECKPOINT.onnx."),
    ] = None,
    checkpoint: Annotated[
        _Choice, typer.Option(help="Which weights; deployed: the best where the run keeps it, else the last EMA.")
    ] = _Choice.DEPLOYED,
    opset: Annotated[int, typer.Option(metavar="N", help="Version of ONNX's operators, 17 to 20.")] = 18,
    fixed: Annotated[
        int | None,
        typer.Option(metavar="PX", help="For square images of this side alone, where any size is not possible."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another file of this name.")] = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Write a run's student as one ONNX file: images of any size in, probabilities out.

    Normalisation, padding and fusion are inside; classes, colours, sizes and origin are the file's metadata. The file
    gets its name after ONNX Runtime gave what the student gives, within 1e-4, at five sizes.
    """
    from rsmtdf_train.export.onnx_file import export_onnx

    with progress(quiet) as sink:
        report = export_onnx(
            run, None if checkpoint is _Choice.DEPLOYED else checkpoint.value, out,
            opset=opset, fixed_px=fixed, force=force, on_event=sink,
        )  # fmt: skip
    if json:
        emit_json(_as_data(report))
    elif not quiet:
        _show(report)


def _as_data(report: ExportReport) -> dict[str, Any]:
    return {
        "file": report.file,
        "made": report.made,
        "nbytes": report.nbytes,
        "sha256": report.sha256,
        "opset": report.opset,
        "largest_difference": report.largest_difference,
        "comparisons": [vars(c) for c in report.comparisons],
        "metadata": report.record.to_properties(),
    }


def _show(report: ExportReport) -> None:
    from rsmtdf_cli.cache.show import size

    if not report.made:
        message(f"{report.file}: there already, unchanged", kind="note")
    record = report.record
    sides = f"{record.fixed_px} x {record.fixed_px} px" if record.fixed_px else "any size"
    text = f"{report.file}  {size(report.nbytes)}, {record.student}, {len(record.classes)} classes, {sides}; largest "
    text += f"difference to the student {report.largest_difference:.1g} at {len(report.comparisons)} sizes"
    console().print(text, markup=False, soft_wrap=True)
