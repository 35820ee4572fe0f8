"""``rsmtdf cache plan``: what a build will take, before it takes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.asked import asks_for_build
from rsmtdf_cli.cache.show import plain, show_arrays, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

if TYPE_CHECKING:
    from rsmtdf_cache.estimate import BuildPlan
    from rsmtdf_cache.forecast import Forecast, Measured
    from rsmtdf_cache.request import BuildRequest

__all__ = ["make_plan", "new_store", "plan", "seconds_text", "show_plan"]


def new_store() -> Path:
    """Return a folder in this one that is not there yet: where a build without a name for its store would go."""
    names = (Path("store" if n == 1 else f"store-{n}") for n in range(1, 10**6))
    return next(path for path in names if not path.exists())


@command
@asks_for_build("cache plan", default_out=new_store)
def plan(
    request: BuildRequest,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure times, or plan sizes alone at once.")
    ] = True,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what `cache build` with the same options would take: tiles, bytes, time, what limits it, when it pays.

    Teachers and disk are measured with real tiles for some seconds each; nothing is written into the store. Without
    --out: a new store in this folder.
    """
    make_plan(request, measure, json, quiet)


def make_plan(request: BuildRequest, measure: bool, json: bool, quiet: bool) -> None:
    """Plan a build and report it: what `cache plan` and `cache build --dry-run` do."""
    from rsmtdf_cache.estimate import plan_build

    with progress(quiet) as on_event:
        found = plan_build(request, on_event, measure)
    if json:
        emit_json(found.to_json())
    elif not quiet:
        show_plan(found)


def show_plan(plan: BuildPlan) -> None:
    """Print the arrays, then what limits the build and when it pays."""
    screen = console()
    show_arrays(plan.arrays)
    about = "" if plan.exact else "at most about "
    disk = "its disk" if isinstance(plan.store, Path) else "this disk, where drafts of two units lie at most"
    screen.print(
        f"{plain(str(plan.store))}: {about}{size(plan.nbytes)} for {plan.tiles} tiles in {len(plan.arrays)} arrays; "
        f"{size(plan.free_nbytes)} free on {disk} ({plain(plan.file_system)})" + ("" if plan.fits else ", too little")
    )
    if plan.unread:
        screen.print(f"pixels of {plan.unread} tiles were not looked at; those that cannot be used are left out later")
    if not plan.nbytes and not any(item.batches for item in plan.work):
        screen.print("nothing left to do")
    elif plan.forecast and plan.measured:
        _show_times(plan, plan.measured, plan.forecast)


def _show_times(plan: BuildPlan, measured: Measured, ahead: Forecast) -> None:
    screen = console()
    for rate in measured.rates:
        work = next(w for w in plan.work if (w.teacher, w.scale) == (rate.teacher, rate.scale))
        seconds = (work.batches + work.extra_batches) * rate.seconds_per_batch
        views = f" in {work.views} views" if work.views > 1 else ""
        screen.print(
            f"{plain(rate.teacher)} at {rate.scale}: {seconds_text(seconds)} for {work.tiles:g} tiles{views} "
            f"({rate.tiles_per_s:.3g} tiles/s on {plain(rate.device)}, measured on {rate.tiles} tiles)"
        )
    disk = plan.disk
    if disk is not None:
        kind = "memory, not a disk" if disk.in_memory else f"measured on {size(disk.probed_nbytes)}, synced"
        screen.print(
            f"disk: {seconds_text(ahead.disk)} for {size(plan.nbytes)} ({size(disk.write_nbytes_per_s)}/s, {kind})"
        )
    if ahead.look + ahead.load >= 1:
        screen.print(f"before: {seconds_text(ahead.look)} to check tiles, {seconds_text(ahead.load)} to load teachers")
    limit = {"teachers": "the teachers are", "disk": "the disk is", "tiles": "looking at the tiles is"}
    screen.print(f"in all {seconds_text(ahead.seconds)}; {limit.get(ahead.bottleneck, 'nothing is')} the bottleneck")
    if not plan.work:
        return
    epochs = ahead.break_even_epochs
    if epochs is None:
        pays = "it never pays in time: reading is no quicker than the teachers"
    else:
        pays = f"it pays after {epochs:.1f} epochs, from the {math.floor(epochs) + 1}. on"
    screen.print(
        f"an epoch of these tiles takes the teachers {seconds_text(ahead.online)} (every scale once, one orientation) "
        f"and reading {seconds_text(ahead.read)}: {pays}"
    )


def seconds_text(seconds: float) -> str:
    """Return a duration for people: ``"0.4 s"``, ``"12 s"``, ``"3 min 20 s"``, ``"5 h 10 min"``."""
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 3570:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"
