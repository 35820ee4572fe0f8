"""``rsmtdf cache build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.asked import asks_for_build
from rsmtdf_cli.cache.detach import announcing, detach_build
from rsmtdf_cli.cache.plan import make_plan, seconds_text
from rsmtdf_cli.cache.show import plain, show_arrays, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

if TYPE_CHECKING:
    from rsmtdf_cache.build import BuildReport
    from rsmtdf_cache.request import BuildRequest

__all__ = ["build"]


@command
@asks_for_build("cache build")
def build(
    request: BuildRequest,
    plan: Annotated[
        Path | None, typer.Option(help="JSON of `cache plan` to compare with (default: the latest of this build).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do what `cache plan` does, write nothing.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="With --dry-run: measure times, or sizes alone.")
    ] = True,
    workers: Annotated[
        int | None, typer.Option(help="Processes of this machine to encode in (default: this process alone).")
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="all, or ids as 0,1: a process for each GPU.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="tcp://HOST:PORT or tls://…: a running dask.distributed cluster.")
    ] = None,
    patience: Annotated[float, typer.Option(help="Seconds without a sign after which a worker is given up.")] = 1800.0,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="With --workers or --gpus: dask's page on 127.0.0.1:8787.")
    ] = False,
    performance_report: Annotated[
        Path | None, typer.Option(help="HTML file for dask's report on workers and tasks.", metavar="FILE")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when the work begins; it goes on, and writes to STORE.log.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run frozen teachers over every tile of DATA and store their features; a stopped build continues."""
    from rsmtdf_cache.build import build_store
    from rsmtdf_cache.cluster import ClusterAsked, executor_of
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.forecast import read_measured

    if dry_run and detach:
        raise UsageError("--detach: goes with a build; --dry-run writes nothing")
    if dry_run:
        make_plan(request, measure, json, quiet)
        return
    if not measure:
        raise UsageError("--no-measure: goes with --dry-run; a build measures nothing beforehand")
    measured = read_measured(_read_plan(plan), f"--plan {plan}") if plan else None
    if plan and measured is None:
        raise UsageError(f"--plan {plan}: made with --no-measure, there is no time to compare with; leave it out")
    if detach:
        detach_build(request.out, json, quiet)
        return
    asked = ClusterAsked(workers, gpus, scheduler, dashboard, patience, performance_report)
    executor = executor_of(asked, request.device)
    with progress(quiet) as on_event:
        report = build_store(request, announcing(on_event), measured=measured, executor=executor)
    if json:
        emit_json(report.to_json())
    elif not quiet:
        _show_report(report)


def _read_plan(path: Path) -> object:
    import json

    from rsmtdf_cache.errors import UsageError

    try:
        found: object = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--plan {path}: cannot be read ({error}); make it with `rsmtdf cache plan … --json`"
        ) from None
    return found


def _show_report(report: BuildReport) -> None:
    show_arrays(report.arrays)
    console().print(
        f"{plain(str(report.store))} holds {size(sum(a['nbytes'] for a in report.arrays))} "
        f"for {max((a['tiles'] for a in report.arrays), default=0)} tiles in {len(report.arrays)} arrays"
    )
    rates = ", ".join(f"{name} {rate:.1f} tiles/s" for name, rate in report.rates.items())
    written = f"wrote {size(report.nbytes_shards)}" if report.units else "nothing left to do"
    console().print(
        f"{written} in {report.seconds:.1f} s{f' ({rates})' if rates else ''}; snapshot {report.snapshot[:16]}"
    )
    if report.units and report.planned_seconds:
        console().print(
            f"planned: {size(report.planned_nbytes)} in {seconds_text(report.planned_seconds)}; this took "
            f"{report.nbytes_shards / report.planned_nbytes:.3g} of the bytes and "
            f"{report.seconds / report.planned_seconds:.2f} of the time"
        )
    if len(report.workers) > 1:
        shown = [f"{plain(t.name)} {t.units} units at {t.rate:.3g} tiles/s" for t in report.workers[:8]]
        more = " …" if len(report.workers) > 8 else ""
        console().print(f"{len(report.workers)} workers: {', '.join(shown)}{more}")
    if report.quarantined:
        console().print(f"{len(report.quarantined)} tiles left out, see ledger/quarantine.json")
