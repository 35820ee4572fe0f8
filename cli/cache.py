"""``rsmtdf cache``: build, describe, verify and picture stores of teacher features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, new_app, progress

if TYPE_CHECKING:
    from rsmtdf_cache.build import BuildReport

__all__ = ["app", "build", "info", "preview", "verify"]

app = new_app("Build, describe and verify stores of teacher features.")

StoreArgument = Annotated[Path, typer.Argument(help="Folder of the feature store.", show_default=False)]


@app.command()
@command
def build(
    data: Annotated[Path | None, typer.Argument(help="Folder of the dataset.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the store; an existing store is continued.")] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="NAME[,weights=FILE][,pretrained=none,seed=N][,layers=a+b][,scales=1+0.5]; repeatable."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same keys and more; options win.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Splits to encode; repeatable (default: train).")] = None,
    scales: Annotated[str | None, typer.Option(help="Scales of the views, e.g. 1,0.5 (the default).")] = None,
    orientations: Annotated[int | None, typer.Option(help="1, 2, 4 or 8 stored orientations (default 1).")] = None,
    group_rows: Annotated[int | None, typer.Option(help="Tiles per shard (default: shards near 128 MB).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: cuda if there is one).")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 arithmetic.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Tiles per forward pass.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a forward pass.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop when a tile cannot be used.")] = False,
    allow_mixed: Annotated[bool, typer.Option("--allow-mixed", help="Continue with other numerics.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show arrays and sizes, write nothing.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run frozen teachers over every tile of DATA and store their features; a stopped build continues."""
    from rsmtdf_cache.build import build_store
    from rsmtdf_cache.request import BuildRequest
    from rsmtdf_cache.yaml_file import read_yaml

    values: dict[str, Any] = read_yaml(config, "--config") if config else {}
    given = {
        "data": data, "out": out, "teachers": teacher, "splits": split, "orientations": orientations,
        "scales": _numbers(scales) if scales is not None else None, "group_rows": group_rows, "device": device,
        "precision": precision, "micro_batch": micro_batch, "threads": threads,
    }  # fmt: skip
    values |= {name: value for name, value in given.items() if value is not None}
    values |= {name: True for name, flag in (("strict", strict), ("allow_mixed", allow_mixed)) if flag}
    _demand(values)
    request = BuildRequest.of(values)
    with progress(quiet) as on_event:
        report = build_store(request, on_event, dry_run=dry_run)
    if json:
        emit_json(report.to_json())
    elif not quiet:
        _show_report(report)


@app.command()
@command
def info(store: StoreArgument, json: JsonOption = False) -> None:
    """Describe a store: dataset, teachers, arrays, sizes, snapshot."""
    from rsmtdf_cache.store import FeatureStore

    found = FeatureStore.open(store, verify_reads="never").describe()
    if json:
        emit_json(found)
        return
    splits = ", ".join(f"{name} {count}" for name, count in found["splits"].items())
    screen = console()
    screen.print(f"[bold]{_plain(found['path'])}[/]  {_plain(found['dataset'])}, {found['tile_px']}-px tiles: {splits}")
    screen.print(f"snapshot {found['snapshot'][:16]}, {_size(found['nbytes'])}, {found['group_rows']} tiles per shard")
    if found["quarantined"]:
        names = ", ".join(sorted(found["quarantined"])[:5])
        screen.print(f"{len(found['quarantined'])} tiles left out: {_plain(names)}")
    for item in found["teachers"]:
        weights = f"{item['weights_origin']}, sha256 {item['weights'][:12]}"
        screen.print(f"teacher {_plain(item['name'])}: {_plain(item['architecture'])}, weights {_plain(weights)}")
    for profile in found["profiles"]:
        screen.print("numerics " + ", ".join(f"{k} {_plain(str(v))}" for k, v in profile.items()))
    _show_arrays(found["arrays"])


@app.command()
@command
def verify(
    store: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Also compare every byte with its sha256.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a store against its ledger; ends with 7 when something is wrong."""
    from rsmtdf_cache.errors import FindingsError
    from rsmtdf_cache.verify import verify_store

    with progress(quiet) as on_event:
        findings = verify_store(store, deep=deep, on_event=on_event)
    if json:
        emit_json({"store": str(store), "deep": deep, "findings": findings})
    if findings:
        lines = "\n".join(f"  {f.path}: {f.fault}" for f in findings)
        raise FindingsError(f"{store}: {len(findings)} findings\n{lines}")
    if not quiet and not json:
        console().print(f"{_plain(str(store))}: no findings{'' if deep else ' (--deep also compares every byte)'}")


@app.command()
@command
def preview(
    store: StoreArgument,
    data: Annotated[Path, typer.Argument(help="Folder of the dataset the store was built from.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    tiles: Annotated[int, typer.Option(help="Number of tiles to show.")] = 6,
    quiet: QuietOption = False,
) -> None:
    """Draw each array as PCA colours beside the tiles (one basis per array, so that colours compare)."""
    from rsmtdf_cache.preview import pca_picture
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.store import FeatureStore

    path = pca_picture(FeatureStore.open(store), open_source(data), out, tiles=tiles)
    if not quiet:
        message(str(path), kind="wrote")


def _demand(values: dict[str, Any]) -> None:
    from rsmtdf_cache.errors import UsageError

    missing = [
        text
        for name, text in (("data", "DATA"), ("out", "--out STORE"), ("teachers", "--teacher NAME"))
        if not values.get(name)
    ]
    if missing:
        raise UsageError(
            f"cache build: {', '.join(missing)} missing; e.g. "
            "`rsmtdf cache build DATA --out STORE --teacher dinov2_vitb14 --teacher clip_vitl14`"
        )


def _numbers(text: str) -> list[float]:
    from rsmtdf_cache.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--scales {text!r}: write numbers with commas between, e.g. 1,0.5") from None


def _show_report(report: BuildReport) -> None:
    verb = "would write" if report.dry_run else "holds"
    _show_arrays(report.arrays)
    console().print(
        f"{_plain(str(report.store))} {verb} {_size(sum(a['nbytes'] for a in report.arrays))} "
        f"for {report.tiles} tiles in {len(report.arrays)} arrays"
    )
    if report.dry_run:
        return
    rates = ", ".join(f"{name} {rate:.1f} tiles/s" for name, rate in report.rates.items())
    written = f"wrote {_size(report.nbytes_written)}" if report.nbytes_written else "nothing left to do"
    console().print(
        f"{written} in {report.seconds:.1f} s{f' ({rates})' if rates else ''}; snapshot {report.snapshot[:16]}"
    )
    if report.quarantined:
        console().print(f"{len(report.quarantined)} tiles left out, see ledger/quarantine.json")


def _show_arrays(arrays: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    table = Table(Column("array", no_wrap=True), "tiles", "tokens", "channels", "stride px", "codec", "size")
    for a in arrays:
        table.add_row(
            _plain(a["key"]), str(a["tiles"]), "x".join(map(str, a["grid"])), str(a["channels"]),
            f"{a['stride_tile_px']:g}", a["codec"], _size(a["nbytes"]),
        )  # fmt: skip
    console().print(table)


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
