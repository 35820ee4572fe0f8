"""``rsmtdf select``: which tiles to label."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.show import AnyStoreArgument, plain, png_file, size
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress

if TYPE_CHECKING:
    from rsmtdf_cache.choose.selection import TileChoice
    from rsmtdf_cache.events import EventSink
    from rsmtdf_cache.sources import TileSource
    from rsmtdf_cache.store import FeatureStore

__all__ = ["select"]

_ROWS = 40  # of the table


class _Strategy(StrEnum):
    TYPICAL = "typical"
    K_CENTER = "k-center"
    UNCERTAIN = "uncertain"


@command
def select(
    store: AnyStoreArgument,
    budget: Annotated[
        str, typer.Option(metavar="N|P%", help="Tiles in the list, or share of the train tiles.", show_default=False)
    ],
    strategy: Annotated[
        _Strategy,
        typer.Option(
            help="typical: the densest tile of each cluster; k-center: always the farthest from the others; uncertain: "
            "the tile of each cluster that a probe, taught by the tiles of --have, is least certain of."
        ),
    ] = _Strategy.TYPICAL,
    have: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SUBSET",
            help="Labelled subset to start from: its tiles are kept, count as covered and are part of the budget. "
            "Repeatable.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name: the list is splits/labeled/NAME.txt. Default: such as typical-5p.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Dataset folder. Default: the one the catalogue remembers.", show_default=False),
    ] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Arrays to go by, such as 'dino*/*/block11' (default: all upright ones)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Where the clusters of `typical` and `uncertain` start.")] = 0,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the chosen tiles and a map of all tiles here.", parser=png_file, metavar="PNG"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write no list.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another list of this name.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose the tiles worth labelling from stored features and write their list.

    `rsmtdf train RECIPE --set labeled=NAME` trains with it. Labels are never read,
    but for those of --have with `--strategy uncertain`.
    """
    from rsmtdf_cache.choose.selection import Budget, choose_tiles, default_name, subset_path, write_subset
    from rsmtdf_cache.store import FeatureStore

    asked = Budget.parse(budget)
    title = name or default_name(strategy.value, asked, seed)
    with progress(quiet) as on_event:
        opened = FeatureStore.open(store)
        source = _source(opened, data, dry_run and not have, on_event)
        if source is not None:
            subset_path(source, title)  # a bad name is said before the work
        kept = _kept(source, have or ())
        choice = choose_tiles(opened, asked, strategy.value, source, kept, seed, array or (), on_event)
        ids = [tile.id for tile in choice.tiles]
        written = None if dry_run or source is None else write_subset(source, title, ids, force)
        if picture is not None:
            from rsmtdf_cache.choose.picture import draw_choice

            draw_choice(picture, choice, opened, source, on_event)
    unlabelled = _without_masks(source, ids)
    if json:
        emit_json({**choice.to_json(), "name": title, "list": written, "picture": picture, "without_mask": unlabelled})
        return
    if quiet:
        return
    _show(choice)
    if picture is not None:
        message(f"{picture} ({size(picture.stat().st_size)})", kind="wrote")
    if written is None:
        message("no list was written (--dry-run)", kind="note")
        return
    message(f"{written}: `rsmtdf train RECIPE --set labeled={title}`", kind="wrote")
    if unlabelled:
        message(
            f"{len(unlabelled)} of its tiles have no mask yet; draw masks/ID.png before training, "
            f"first {', '.join(unlabelled[:3])}",
            kind="note",
        )


def _source(store: FeatureStore, data: Path | None, optional: bool, on_event: EventSink) -> TileSource | None:
    """Return the dataset in ``data``, or the one the catalogue remembers; None if there is none and none is needed."""
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cli.cache.look import known_source

    known = data if data is not None else known_source(store, on_event)
    if known is not None:
        return open_source(known)
    if optional:
        return None
    raise UsageError(
        f"the list belongs into a dataset, and the catalogue knows none of {store.shown}; name its folder with --data, "
        "or look at the choice alone with --dry-run"
    )


def _kept(source: TileSource | None, subsets: list[str] | tuple[str, ...]) -> list[str]:
    """Return the ids of labelled subsets, each once."""
    from rsmtdf_cache.errors import UsageError

    if source is None or not subsets:
        return []
    train = set(source.split("train"))
    ids = [tile_id for subset in subsets for tile_id in source.split(subset)]
    foreign = [tile_id for tile_id in ids if tile_id not in train]
    if foreign:
        raise UsageError(
            f"--have {' '.join(subsets)}: {len(foreign)} tiles are not in the train split, such as {foreign[0]!r}; "
            "name labelled subsets of train"
        )
    return list(dict.fromkeys(ids))


def _without_masks(source: TileSource | None, ids: list[str]) -> list[str]:
    if source is None:
        return []
    there = {tile.id for tile in source.tiles(["train"]) if tile.mask is not None}
    return [tile_id for tile_id in ids if tile_id not in there]


def _show(choice: TileChoice) -> None:
    from rich.table import Column, Table

    group = "nearest to it" if choice.strategy == "k-center" else "in its cluster"
    probed = choice.strategy == "uncertain"
    table = Table(
        "", "tile", Column(f"tiles {group}", justify="right"), Column("distance to those before", justify="right"),
        Column("typicality", justify="right"), *([Column("uncertainty", justify="right")] if probed else []), "",
    )  # fmt: skip
    for n, tile in enumerate(choice.tiles[:_ROWS]):
        table.add_row(
            str(n + 1), plain(tile.id), "" if tile.group is None else str(tile.group),
            "" if tile.distance is None else f"{tile.distance:.2f}",
            "" if tile.typicality is None else f"{tile.typicality:.2f}",
            *(["" if tile.uncertainty is None else f"{tile.uncertainty:.2f}"] if probed else []),
            "labelled already" if tile.kept else "",
        )  # fmt: skip
    screen = console()
    screen.print(table)
    if len(choice.tiles) > _ROWS:
        screen.print(f"{_ROWS} of {len(choice.tiles)} tiles; --json has them all")
    reach = choice.coverage
    screen.print(
        f"{len(choice.tiles)} of {len(choice.ids)} train tiles, by {len(choice.arrays)} arrays; 1 is the usual "
        "distance of two tiles"
    )
    screen.print(
        f"a tile is {reach.mean:.2f} from the nearest one of the list (random lists: {reach.random_mean:.2f} ± "
        f"{reach.random_mean_sd:.2f}), at most {reach.largest:.2f} (random: {reach.random_largest:.2f})"
    )
