"""``rsmtdf cache verify``: is a store what its ledger says? And ``--repair``: make it so again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.cache.show import StoreArgument, plain
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, progress

if TYPE_CHECKING:
    from rsmtdf_cache.events import EventSink
    from rsmtdf_cache.request import TeacherAsked
    from rsmtdf_cache.upkeep.recompute import Recomputed
    from rsmtdf_cache.upkeep.repair import RepairReport
    from rsmtdf_cache.verify import Finding

__all__ = ["verify"]


@command
def verify(
    store: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Also compare every byte with its sha256.")] = False,
    recompute: Annotated[int | None, typer.Option(help="Encode so many tiles again and compare.", metavar="K")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild damaged records, encode damaged shards again (implies --deep).")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Dataset for --recompute and --repair (default: what the store was built from).")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a teacher's weights are: NAME,weights=FILE or NAME,pretrained=none,seed=N; repeatable."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: cuda if there is one).")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a store against its ledger; ends with 7 when something is wrong."""
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.verify import verify_store

    asked = _check_options(recompute, repair, data, teacher)
    if data is None and (recompute is not None or repair):
        data = _remembered(store)
    result: dict[str, Any] = {"store": str(store), "deep": deep or repair}
    repaired: RepairReport | None = None
    recomputed: list[Recomputed] = []
    findings: list[Finding] = []
    with progress(quiet) as on_event:
        if repair:
            repaired = _repair(store, data, asked, device, on_event)
            result["repaired"], findings = repaired.done, list(repaired.left)
        else:
            findings = verify_store(store, deep=deep, on_event=on_event)
        if recompute is not None and not findings:
            from rsmtdf_cache.upkeep.recompute import recompute_sample

            if data is None:
                raise UsageError(
                    "--recompute encodes tiles again and needs the images: give --data DIR (the catalogue does not "
                    f"know what {store} was built from)"
                )
            recomputed, findings = recompute_sample(store, data, recompute, asked, on_event, device=device)
            result["recomputed"] = recomputed
    if json:
        emit_json({**result, "findings": findings})
    if not quiet and not json:
        _show(store, deep or repair, repaired, recomputed, bool(findings))
    _refuse(store, findings)


def _check_options(
    recompute: int | None, repair: bool, data: Path | None, teacher: list[str] | None
) -> list[TeacherAsked]:
    """Return the teachers as asked for. Raises ``UsageError`` for options that do not go together."""
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.request import parse_teacher

    if recompute is not None and recompute < 1:
        raise UsageError(f"--recompute {recompute}: ask for one tile at least")
    for name, given in (("--data", data), ("--teacher", teacher)):
        if given and recompute is None and not repair:
            raise UsageError(
                f"{name} is for --recompute K and --repair; a plain verify needs neither images nor teacher"
            )
    return [parse_teacher(text) for text in teacher or []]


def _remembered(store: Path) -> Path | None:
    """Return the dataset folder that the store was built from, when the catalogue knows it and it is still there."""
    from rsmtdf_cache.share.catalogue import registered_stores, same_place

    place = same_place(store)
    found = next((Path(s.data) for s in registered_stores() if s.path == place and s.data), None)
    return found if found is not None and found.is_dir() else None


def _repair(
    store: Path, data: Path | None, asked: list[TeacherAsked], device: str | None, on_event: EventSink
) -> RepairReport:
    from rsmtdf_cache.upkeep.repair import UnrepairedError, repair_store

    try:
        return repair_store(store, data, asked, on_event, device=device)
    except UnrepairedError as error:
        return error.report  # shown first; then the command ends with its findings


def _show(
    store: Path, deep: bool, repaired: RepairReport | None, recomputed: list[Recomputed], is_faulty: bool
) -> None:
    for item in repaired.done if repaired else []:
        console().print(plain(f"{item.path}: {item.action}"), soft_wrap=True)
    for array in recomputed:
        bits = "all bytes equal" if array.equal else "other bytes"
        where = "" if array.same_numerics else ", on another device or torch than recorded"
        console().print(
            plain(f"{array.key}: {array.tiles} tiles, lowest cosine {array.cosine:.6f}, {bits}{where}"), soft_wrap=True
        )
    if is_faulty:
        return
    text = "no findings"
    if repaired is not None:
        text = f"repaired, now at snapshot {repaired.snapshot}" if repaired.done else "nothing to repair"
    hint = "" if deep else " (--deep also compares every byte)"
    console().print(f"{plain(str(store))}: {text}{hint}", soft_wrap=True)


def _refuse(store: Path, findings: list[Finding]) -> None:
    from rsmtdf_cache.errors import FindingsError

    if findings:
        lines = "\n".join(f"  {f.path}: {f.fault}" for f in findings)
        raise FindingsError(f"{store}: {len(findings)} findings\n{lines}")
