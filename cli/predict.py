"""``rsmtdf predict``: masks and overlays for image files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

__all__ = ["predict"]


class _Choice(StrEnum):
    DEPLOYED = "deployed"
    BEST = "best"
    EMA = "ema"
    STUDENT = "student"


@command
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder of `rsmtdf train`.", show_default=False)],
    images: Annotated[list[Path], typer.Argument(help="Image files: 8-bit RGB, any size.", show_default=False)],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder; default RUN/predictions.")] = None,
    checkpoint: Annotated[
        _Choice, typer.Option(help="Which weights; deployed: the best where the run keeps it, else the last EMA.")
    ] = _Choice.DEPLOYED,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU when there is one.")] = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Segment images: STEM_mask.png holds class numbers (with the classes' palette), STEM_overlay.png is for eyes."""
    from rsmtdf_train.checkpoint import RunFolder, load_deployed
    from rsmtdf_train.devices import pick_device
    from rsmtdf_train.predict import predict_files

    chosen = pick_device(device)
    there = RunFolder(run)
    kind = there.deployed_kind() if checkpoint is _Choice.DEPLOYED else checkpoint.value
    model, identity = load_deployed(there, kind, chosen)
    folder = out if out is not None else run / "predictions"
    with progress(quiet) as sink:
        written = predict_files(model, identity.classes, images, folder, chosen, sink)
    if json:
        emit_json(written)
    elif not quiet:
        for prediction in written:
            largest = sorted(prediction.shares.items(), key=lambda item: -item[1])[:3]
            shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in largest if share > 0)
            console().print(f"{prediction.mask}  {prediction.overlay}  {shares}", markup=False, soft_wrap=True)
