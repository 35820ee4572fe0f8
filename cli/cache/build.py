"""``rsmtdf cache build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.cache.show import local_folder, plain, show_arrays, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

if TYPE_CHECKING:
    from rsmtdf_cache.build import BuildReport

__all__ = ["build"]


@command
def build(
    data: Annotated[Path | None, typer.Argument(help="Folder of the dataset.", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the store; an existing store is continued.", parser=local_folder, metavar="DIR"),
    ] = None,
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
    if isinstance(values.get("out"), str):  # of --config
        values["out"] = local_folder(values["out"])
    values |= {name: True for name, flag in (("strict", strict), ("allow_mixed", allow_mixed)) if flag}
    _demand(values)
    request = BuildRequest.of(values)
    with progress(quiet) as on_event:
        report = build_store(request, on_event, dry_run=dry_run)
    if json:
        emit_json(report.to_json())
    elif not quiet:
        _show_report(report)


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
    show_arrays(report.arrays)
    console().print(
        f"{plain(str(report.store))} {verb} {size(sum(a['nbytes'] for a in report.arrays))} "
        f"for {report.tiles} tiles in {len(report.arrays)} arrays"
    )
    if report.dry_run:
        return
    rates = ", ".join(f"{name} {rate:.1f} tiles/s" for name, rate in report.rates.items())
    written = f"wrote {size(report.nbytes_written)}" if report.nbytes_written else "nothing left to do"
    console().print(
        f"{written} in {report.seconds:.1f} s{f' ({rates})' if rates else ''}; snapshot {report.snapshot[:16]}"
    )
    if report.quarantined:
        console().print(f"{len(report.quarantined)} tiles left out, see ledger/quarantine.json")
