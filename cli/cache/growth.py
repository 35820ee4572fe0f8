"""``rsmtdf cache drop``, ``gc``, ``pin``, ``unpin``, ``merge`` and ``diff``: how a store grows and shrinks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.show import StoreArgument, local_folder, plain, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

if TYPE_CHECKING:
    from rsmtdf_cache.upkeep.diff import Diff
    from rsmtdf_cache.upkeep.gc_plan import GcPlan, PinHold
    from rsmtdf_cache.upkeep.merge import MergeReport
    from rsmtdf_cache.upkeep.pins import Pin

__all__ = ["diff", "drop", "gc", "merge", "pin", "unpin"]

#: Tables for people list that many names of tiles; ``--json`` lists all.
_SHOWN = 10


@command
def drop(
    store: StoreArgument,
    keys: Annotated[
        list[str],
        typer.Argument(metavar="KEY...", help="TEACHER/VIEW/LAYER; * ? [ab] in any part.", show_default=False),
    ],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let arrays count no more; `cache gc` frees their bytes, pinned snapshots keep them."""
    from rsmtdf_cache.upkeep.gc import drop_arrays

    with progress(quiet) as on_event:
        report = drop_arrays(store, keys, on_event)
    if json:
        emit_json(report)
    elif not quiet:
        screen = console()
        screen.print(f"dropped {plain(', '.join(report.keys))} ({size(report.nbytes)})")
        _show_holds(report.holds)
        screen.print(f"`rsmtdf cache gc {plain(str(store))}` would free {size(report.free)} in all")


@command
def gc(
    store: StoreArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what and how much, delete nothing.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Delete what neither the store's present content nor a pin needs."""
    from rsmtdf_cache.upkeep.gc import collect
    from rsmtdf_cache.upkeep.gc_plan import plan_gc

    with progress(quiet) as on_event:
        plan = plan_gc(store) if dry_run else collect(store, on_event)
    runs = _runs_that_lose(store, plan)
    if json:
        emit_json({"dry_run": dry_run, **plan.to_json(), "runs": runs})
    elif not quiet:
        _show_plan(plan, dry_run)
        for run, snapshot in runs.items():
            hint = f"; `rsmtdf cache pin {store} --snapshot {snapshot[:12]}` keeps it" if dry_run else ""
            console().print(plain(f"run {run} read snapshot {snapshot[:12]}, which goes{hint}"))


@command
def pin(
    store: StoreArgument,
    snapshot: Annotated[
        str | None, typer.Option(help="Its first 8 or more digits (default: what is there now).")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Who needs it (default: your user name).")] = None,
    expires: Annotated[str | None, typer.Option(help="Last day, YYYY-MM-DD (default: until unpinned).")] = None,
    note: Annotated[str, typer.Option(help="Why.")] = "",
    show: Annotated[bool, typer.Option("--list", help="List the pins, make none.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Keep a snapshot's data from `cache gc`."""
    from rsmtdf_cache.upkeep.pins import list_pins, pin_snapshot

    pins = list_pins(store) if show else [pin_snapshot(store, snapshot, owner or _user(), expires, note)]
    if json:
        emit_json(pins if show else pins[0])
    elif not quiet:
        _show_pins(pins)


@command
def unpin(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(help="Name of a pin, or an owner: all pins of theirs.", show_default=False)],
    snapshot: Annotated[str | None, typer.Option(help="Only pins of this snapshot.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give pins up; `cache gc` may then free what they kept."""
    from rsmtdf_cache.upkeep.pins import unpin as remove

    pins = remove(store, name, snapshot)
    if json:
        emit_json(pins)
    elif not quiet:
        console().print(f"removed {plain(', '.join(p.name for p in pins))}")


@command
def merge(
    store: StoreArgument,
    other: Annotated[
        Path,
        typer.Argument(
            help="Folder of the store to take in.", show_default=False, parser=local_folder, metavar="OTHER"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of a new store (default: merge into STORE).", parser=local_folder, metavar="DIR"),
    ] = None,
    allow_mixed: Annotated[bool, typer.Option("--allow-mixed", help="Accept units of other numerics.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, write nothing.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Unite two stores by tile and array without running a teacher; a stopped merge continues."""
    from rsmtdf_cache.upkeep.merge import merge_stores

    with progress(quiet) as on_event:
        report = merge_stores(store, other, out, on_event, allow_mixed, dry_run)
    if json:
        emit_json(report.to_json())
    elif not quiet:
        _show_merge(report)


@command
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder, URL or STORE@SNAPSHOT.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same of the other store.", show_default=False)],
    deep: Annotated[bool, typer.Option("--deep", help="Also compare the bits of every feature of both.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what two stores differ in: tiles, arrays, features; ends with 0 either way."""
    from rsmtdf_cache.upkeep.diff import diff_stores

    with progress(quiet) as on_event:
        found = diff_stores(a, b, deep, on_event)
    if json:
        emit_json(found.to_json())
    elif not quiet:
        _show_diff(found)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        from rsmtdf_cache.errors import UsageError

        raise UsageError("cache pin: this machine does not know your user name; give --owner NAME") from None


def _runs_that_lose(store: Path, plan: GcPlan) -> dict[str, str]:
    """Return the registered runs of the store whose snapshot is collected; only a pin would keep it."""
    from rsmtdf_cache.share.catalogue import registered_runs, same_place

    place, gone = same_place(store), {f.path for f in plan.files}
    return {
        r.run: r.snapshot
        for r in registered_runs()
        if r.store == place and r.snapshot and f"ledger/snapshots/{r.snapshot}.json" in gone
    }


def _show_plan(plan: GcPlan, dry_run: bool) -> None:
    from rich.table import Table

    screen = console()
    _show_holds(plan.holds)
    if not plan.files:
        screen.print(f"{plain(plan.store)}: nothing to collect")
        return
    table = Table("reason", "files", "size")
    for reason, found in plan.reasons().items():
        table.add_row(reason, str(found["files"]), size(found["nbytes"]))
    screen.print(table)
    screen.print(f"{plain(plan.store)}: {'would free' if dry_run else 'freed'} {size(plan.nbytes)}")


def _show_holds(holds: list[PinHold]) -> None:
    for hold in holds:
        until = f" until {hold.expires}" if hold.expires else ""
        console().print(
            f"pin {plain(hold.name)} ({plain(hold.owner)}{until}) keeps snapshot {hold.snapshot[:12]}: {hold.shards} "
            f"shards, {size(hold.nbytes)}, that the store itself needs no more"
        )


def _show_pins(pins: list[Pin]) -> None:
    from rich.table import Column, Table

    table = Table(Column("pin", overflow="fold"), "snapshot", "owner", "last day", "note")
    for p in pins:
        last = f"{p.expires} (over)" if p.expired() else p.expires or "-"
        table.add_row(plain(p.name), p.snapshot[:12], plain(p.owner), last, plain(p.note))
    console().print(table)


def _show_merge(report: MergeReport) -> None:
    screen, verb = console(), "would have" if report.dry_run else "has"
    new = f", {len(report.arrays_new)} new arrays ({plain(', '.join(report.arrays_new))})" if report.arrays_new else ""
    screen.print(f"{plain(report.store)} {verb} {report.tiles} tiles, {report.tiles_new} of them new{new}")
    screen.print(
        f"{report.units_linked} shard groups taken over as they are, {report.units_copied} written from both "
        f"({size(report.nbytes)}), {report.units_before} there before"
    )
    for unit in report.pending[:_SHOWN]:
        screen.print(f"pending: {plain(', '.join(unit.arrays))}, row group {unit.group}: {plain(unit.reason)}")
    if len(report.pending) > _SHOWN:
        screen.print(f"and {len(report.pending) - _SHOWN} more (--json lists them)")
    for key, tiles in report.left_behind.items():
        screen.print(f"not carried over: {plain(key)} of {tiles} tiles of B")
    if report.pending:
        screen.print("`rsmtdf cache build` computes what is pending")
    if report.snapshot:
        screen.print(f"snapshot {report.snapshot[:16]}")


def _show_diff(found: Diff) -> None:
    from rich.table import Table

    screen = console()
    screen.print(
        f"A {plain(found.a)}  snapshot {found.snapshot_a[:16]}\nB {plain(found.b)}  snapshot {found.snapshot_b[:16]}"
    )
    if found.same:
        screen.print("the same tiles, rows and features")
    for line in found.settings:
        screen.print(plain(line))
    screen.print(f"{found.tiles_both} tiles in both")
    for what, names in (
        ("tiles only in A", found.tiles_only_a), ("tiles only in B", found.tiles_only_b),
        ("tiles with other pixels", found.tiles_other_pixels),
        ("arrays only in A", found.arrays_only_a), ("arrays only in B", found.arrays_only_b),
    ):  # fmt: skip
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            screen.print(f"{len(names)} {what}: {plain(', '.join(names[:_SHOWN]))}{more}")
    for key, lines in found.arrays_other_spec.items():
        screen.print(f"{plain(key)} is another array in B:\n  {plain(chr(10).join(lines))}")
    if found.arrays:
        table = Table("array of both", "tiles in A", "tiles in B", "in both", "other bits", "numerics")
        for array in found.arrays:
            bits = "not compared" if array.different is None else str(array.different)
            numerics = "differ" if array.profiles_only_a or array.profiles_only_b else "same"
            counts = (str(array.tiles_a), str(array.tiles_b), str(array.both))
            table.add_row(plain(array.key), *counts, bits, numerics)
        screen.print(table)
