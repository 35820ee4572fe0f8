"""``rsmtdf predict``: masks and overlays for image files, maps of georeferenced scenes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.bands import parse_bands
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from rsmtdf_train.predict import Prediction
    from rsmtdf_train.scenes.map_scene import MapReport
    from rsmtdf_train.scenes.request import MapPlan, MapRequest
    from rsmtdf_train.scenes.segmenter import WindowSegmenter

    _Student = tuple[WindowSegmenter, Callable[[Any], Any], torch.device | None]

__all__ = ["predict"]

_MAP_SUFFIXES = (".tif", ".tiff")
#: Endings that nobody gives a folder.
_NO_FOLDER = (".cog", ".gpkg", ".img", ".jp2", ".jpeg", ".jpg", ".png", ".vrt", ".webp")
#: Never opened as scenes: for these a place on earth is an exception.
_PLAIN = (".jpeg", ".jpg", ".png")


class _Choice(StrEnum):
    DEPLOYED = "deployed"
    BEST = "best"
    EMA = "ema"
    STUDENT = "student"


@command
def predict(
    run: Annotated[
        Path, typer.Argument(help="Run folder of `rsmtdf train`, or FILE.onnx of `rsmtdf export`.", show_default=False)
    ],
    images: Annotated[
        list[Path], typer.Argument(help="Images (8-bit RGB, any size) or georeferenced scenes.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|MAP.tif", help="Folder, or the map of one scene; default RUN/predictions, of a file beside it."
        ),
    ] = None,
    checkpoint: Annotated[
        _Choice, typer.Option(help="Which weights; deployed: the best where the run keeps it, else the last EMA.")
    ] = _Choice.DEPLOYED,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU when there is one.")] = None,
    bands: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B",
            help="Scenes: bands shown as red, green, blue; default: as the run's tiles, as the file says, 1,2,3.",
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Scenes: values that are black and white, or a pair a band; default: as the run's tiles.",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="PX", help="Scenes: side of windows; default: that of training crops.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(metavar="PX", help="Scenes: shared by neighbouring windows; default: a quarter.")
    ] = None,
    probabilities: Annotated[
        Path | None, typer.Option(metavar="P.tif", help="Scenes: also write one band of probabilities a class.")
    ] = None,
    confidence: Annotated[
        Path | None, typer.Option(metavar="C.tif", help="Scenes: also write the probability of the chosen class.")
    ] = None,
    tta: Annotated[bool, typer.Option("--tta", help="Scenes: mean over eight mirrorings and rotations.")] = False,
    cog: Annotated[bool, typer.Option("--cog", help="Scenes: cloud-optimised GeoTIFF, with overviews.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Scenes: say what a map takes (windows, memory, files); write nothing.")
    ] = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Segment images, or make maps of georeferenced scenes.

    An image gives STEM_mask.png, which holds class numbers (with the classes' palette), and STEM_overlay.png for eyes.

    A scene gives a GeoTIFF of class numbers with its place, colours and class names; any size, bounded memory; stopped,
    the same command continues. What makes a file a scene: --out ends in .tif, or the file has a CRS (its map is then
    DIR/STEM_map.tif); .png and .jpg are images unless --out ends in .tif.
    """
    from rsmtdf_cache.errors import UsageError

    exported = run.suffix.lower() == ".onnx" and not run.is_dir()
    if exported and checkpoint is not _Choice.DEPLOYED:
        raise UsageError(f"--checkpoint {checkpoint.value}: {run} holds one student; export another from its run")
    folder = out if out is not None else (run.parent if exported else run) / "predictions"
    maps, plain = _sorted_out(images, folder)
    asked = [bands, scale, window, overlap, probabilities, confidence, tta or None, cog or None, dry_run or None]
    if any(value is not None for value in asked) and (plain or not maps):
        raise UsageError(
            f"{(plain or images)[0]} is taken for an image (no CRS), and bands, scale, windows, further files, --tta, "
            "--cog and --dry-run belong to scenes; for a map of it write --out MAP.tif"
        )
    if (probabilities or confidence) and len(maps) > 1:
        raise UsageError(
            f"--probabilities and --confidence name one file each, found {len(maps)} scenes; run them one by one"
        )
    from rsmtdf_cache.rasters.scaling import parse_scale

    numbers = {"bands": parse_bands(bands), "scale": None if scale is None else parse_scale(scale)}
    segmenter, mask_of, chosen = _exported(run, device) if exported else _of_run(run, checkpoint, device)
    written: list[Any] = []
    if maps:
        from rsmtdf_train.scenes.map_scene import describe_map, map_scene
        from rsmtdf_train.scenes.request import MapRequest

        requests = [
            MapRequest(
                scene, place, window_px=window, overlap_px=overlap, probabilities=probabilities, confidence=confidence,
                tta=tta, cog=cog, **numbers,
            )
            for scene, place in maps.items()
        ]  # fmt: skip
        with progress(quiet) as sink:
            if dry_run:
                written = [(request, describe_map(segmenter, request, sink)) for request in requests]
            else:
                written = [map_scene(segmenter, request, chosen, sink) for request in requests]
    if plain:
        from rsmtdf_train.predict import predict_files

        with progress(quiet) as sink:
            written += predict_files(mask_of, segmenter.classes, plain, folder, sink)
    if json:
        emit_json([_plan_as_data(*entry) if dry_run else entry for entry in written])
    elif not quiet:
        for entry in written:
            _show_plan(*entry) if dry_run else _show(entry)


def _of_run(run: Path, checkpoint: _Choice, device: str | None) -> _Student:
    """Return a run's student, what it makes of an image, and where it lies."""
    from rsmtdf_cache.files import sha256_file
    from rsmtdf_train.checkpoint import RunFolder, load_deployed
    from rsmtdf_train.devices import pick_device
    from rsmtdf_train.predict import predict_mask
    from rsmtdf_train.scenes.segmenter import Segmenter

    chosen = pick_device(device)
    there = RunFolder(run)
    kind = there.deployed_kind() if checkpoint is _Choice.DEPLOYED else checkpoint.value
    model, identity = load_deployed(there, kind, chosen)
    segmenter = Segmenter(model, identity, sha256_file(there.deployed(kind)))
    return segmenter, lambda image: predict_mask(model, image, chosen), chosen


def _exported(file: Path, device: str | None) -> _Student:
    """Return the same of a file of ``rsmtdf export``; torch is not imported."""
    from rsmtdf_train.export.runtime import OnnxSegmenter

    segmenter = OnnxSegmenter(file, device)
    return segmenter, segmenter.mask, None


def _sorted_out(images: list[Path], out: Path) -> tuple[dict[Path, Path], list[Path]]:
    """Return the scenes with the places of their maps, and the images; all of them are there."""
    from rsmtdf_cache.errors import DataError, UsageError

    for path in images:
        if path.is_dir():
            raise DataError(f"{path} is a folder; name the images or the scene in it")
        if not path.is_file():
            inside = "/vsi" in str(path) or ".zip" in str(path)
            hint = "; files within archives are not read, unpack it first" if inside else ""
            raise DataError(f"{path}: there is no such file{hint}")
    if out.suffix.lower() in _NO_FOLDER:
        raise UsageError(
            f"--out {out}: maps are GeoTIFF, end the name of one scene's map in .tif; masks of images go into a folder"
        )
    if out.suffix.lower() in _MAP_SUFFIXES:
        if len(images) != 1:
            raise UsageError(
                f"--out {out} is the map of one scene, found {len(images)} files; give a folder for several"
            )
        return {images[0]: out}, []
    maps: dict[Path, Path] = {}
    plain: list[Path] = []
    for path in images:
        if path.suffix.lower() in _PLAIN or not path.is_file() or not _has_place(path):
            plain.append(path)
            continue
        place = out / f"{path.stem}_map.tif"
        if place in maps.values():
            raise UsageError(f"two scenes would both become {place}; run them into two --out")
        maps[path] = place
    return maps, plain


def _has_place(path: Path) -> bool:
    from rsmtdf_cache.rasters.gdal import has_place

    return has_place(path)


def _show(entry: Prediction | MapReport) -> None:
    from rsmtdf_train.predict import Prediction

    if isinstance(entry, Prediction):
        console().print(f"{entry.mask}  {entry.overlay}  {_largest(entry.shares)}", markup=False, soft_wrap=True)
        return
    files = "  ".join(str(path) for path in entry.files.values())
    if not entry.made:
        message(f"{files}: there already, as asked for", kind="note")
        return
    crs = (entry.crs or "no CRS").partition("[")[0]
    text = f"{files}  {entry.width} x {entry.height} px, {crs}, {_largest(entry.shares or {})}"
    if entry.nodata:
        text += f"; no data {100 * entry.nodata:.1f} %"
    console().print(text, markup=False, soft_wrap=True)


def _largest(shares: dict[str, float]) -> str:
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in largest if share > 0)


def _plan_as_data(request: MapRequest, plan: MapPlan) -> dict[str, Any]:
    return {
        "scene": request.scene,
        "files": {layer.kind: layer.out for layer in plan.layers},
        "width": plan.width,
        "height": plan.height,
        "window_px": [plan.grid.rows.side, plan.grid.columns.side],
        "overlap_px": plan.grid.overlap_px,
        "windows": plan.windows,
        "strips": plan.strips,
        "memory_nbytes": plan.memory_nbytes,
        "output_nbytes": plan.output_nbytes,
    }


def _show_plan(request: MapRequest, plan: MapPlan) -> None:
    from rsmtdf_cli.cache.show import size

    rows, columns = plan.grid.rows.side, plan.grid.columns.side
    lines = [
        f"{request.scene}: {plan.width} x {plan.height} px",
        f"windows: {plan.windows} of {columns} x {rows} px, {plan.grid.overlap_px} px shared, in {plan.strips} "
        f"strip{'s' * (plan.strips != 1)}; fewer where whole windows have no data",
        f"memory: {size(plan.memory_nbytes)} of buffers, beside the libraries and one forward pass",
        *(f"{layer.out}: {size(plan.output_nbytes[layer.kind])} before compression" for layer in plan.layers),
    ]
    console().print("\n".join(lines), markup=False, soft_wrap=True)
