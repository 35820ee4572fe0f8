"""``rsmtdf bench accuracy``: what each part of the method is worth, on two real datasets, paired over seeds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, progress
from rsmtdf_cli.scores import difference_text, mean_text

if TYPE_CHECKING:
    from rsmtdf_train.experiment.accuracy import AccuracySet, Scored

__all__ = ["accuracy"]

_BEGIN, _END = "<!-- tables: written by `rsmtdf bench accuracy --page` -->", "<!-- end of tables -->"


@command
def accuracy(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data, stores and runs.")] = Path(
        "bench-out/accuracy"
    ),
    trees: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Dataset of bench/tree_crowns.py, which gets lists of tiles; without it, one set."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds of the core arms.")] = 5,
    more_seeds: Annotated[int, typer.Option(min=0, help="Seeds of parts, controls, selection; 0: leave out.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="All labelled subsets: 5, 10, 25 % and 10, 25 %.")] = False,
    only: Annotated[str | None, typer.Option(metavar="SET", help="land-cover or tree-crowns.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key in all arms.")
    ] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Markdown page to write the tables into.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once (default: CPU cores, 1 with a GPU).")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Paired arms over seeds on real tiles with really pretrained teachers: tables of test mIoU with intervals.

    Everything lies in DIR; what is complete there is kept, so the same command continues. Writes DIR/accuracy.json.
    """
    import json as text

    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.files import replace_file
    from rsmtdf_cli.bench import default_jobs
    from rsmtdf_cli.machine import context
    from rsmtdf_train.experiment.accuracy import measure_accuracy

    if only not in (None, "land-cover", "tree-crowns") or (only == "tree-crowns" and trees is None):
        raise UsageError(f"--only {only}: choose land-cover, or tree-crowns with --trees DIR")
    started = time.perf_counter()
    found: list[Scored] = []
    with progress(quiet or json) as on_event:
        for chosen in _sets(out, trees, full, set_ or [], on_event):
            if only is None or chosen.name == only:
                found += measure_accuracy(
                    chosen,
                    out / chosen.name,
                    seeds=seeds,
                    more_seeds=more_seeds,
                    jobs=jobs or default_jobs(),
                    on_event=on_event,
                )
    document = {
        "context": context(),
        "seconds": round(time.perf_counter() - started, 1),
        "recipes": {s.set: _recipe_of(s) for s in found},
        "comparisons": [s.to_json() for s in found],
    }
    replace_file(out / "accuracy.json", (text.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    if page is not None:
        _write_page(page, found, document)
    if json:
        emit_json(document)
        return
    for scored in found:
        _show(scored)
    if not quiet:
        message(str(out / "accuracy.json"), kind="numbers")


def _sets(out: Path, trees: Path | None, full: bool, settings: list[str], on_event: Any) -> list[AccuracySet]:
    from rsmtdf_cache.sources.landcover import build_sample
    from rsmtdf_cache.yaml_file import read_yaml
    from rsmtdf_cli.bundled import bundled_recipe
    from rsmtdf_train.experiment.accuracy import AccuracySet
    from rsmtdf_train.recipe import load_recipe

    config = read_yaml(bundled_recipe("sample-store"), "--config")
    data = out / "land-cover" / "data"
    build_sample(data, on_event)
    land = load_recipe(bundled_recipe("sample"), [f"data={data}", *settings])
    sets = [AccuracySet("land-cover", land, config, ("5", "10", "25") if full else ("5",), ("snow_ice",))]
    if trees is not None:
        crowns = load_recipe(bundled_recipe("tree-crowns"), [f"data={trees}", *settings])
        sets.append(AccuracySet("tree-crowns", crowns, config, ("10", "25") if full else ("10",)))
    return sets


def _recipe_of(scored: Scored) -> dict[str, Any]:
    from rsmtdf_train.recipe import load_recipe

    recipe = load_recipe(scored.comparison.rows[-1].runs[0] / "recipe.yaml").model_dump(mode="json")
    return {k: v for k, v in recipe.items() if k not in ("data", "seed", "name")}


def _title(scored: Scored) -> str:
    c = scored.comparison
    what = {"core": "core arms", "more": "parts and controls", "select": "which tiles to label"}[scored.kind]
    labels = f"{scored.labeled} tiles labelled" if scored.kind == "select" else f"{scored.labeled} % labelled"
    return f"{scored.set}, {labels}: {what}; mIoU on {c.split}, {len(c.seeds)} seeds"


def _columns(scored: Scored) -> list[str]:
    c = scored.comparison
    base = next(r.title for r in c.rows if r.arm == c.baseline)
    without = [f"without {', '.join(c.without)}", "difference"] if c.without else []
    return ["arm", "mIoU %", f"paired difference to {base}, 95 %", "", *without]


def _rows(scored: Scored) -> list[tuple[str, ...]]:
    rows = []
    for row in scored.comparison.rows:
        d = row.difference
        cells = (row.title, mean_text(row.mean, row.sd), difference_text(d), "" if d is None else d.verdict)
        reduced = (mean_text(row.mean_without, row.sd_without), difference_text(row.difference_without))
        rows.append((*cells, *(reduced if scored.comparison.without else ())))
    return rows


def _show(scored: Scored) -> None:
    from rich.table import Table

    table = Table(title=_title(scored), title_justify="left")
    for name in _columns(scored):
        table.add_column(name, justify="left" if name in ("arm", "") else "right")
    for cells in _rows(scored):
        table.add_row(*cells)
    console().print(table)


def _write_page(page: Path, found: list[Scored], document: dict[str, Any]) -> None:
    from rsmtdf_cache.files import replace_file

    lines = [_BEGIN]
    for scored in found:
        columns = _columns(scored)
        lines += ["", f"**{_title(scored)}**", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in _rows(scored)]
    machine = document["context"]["machine"]
    lines += [
        "",
        f"`{document['context']['command']}`, {document['context']['date']}, {machine['processor']}, "
        f"{machine['cores']} cores, GPU: {machine['gpu'] or 'none'}.",
        _END,
    ]
    before, after = "# Accuracy\n\n", "\n"
    if page.is_file() and _BEGIN in (there := page.read_text()) and _END in there:
        before, _, rest = there.partition(_BEGIN)
        after = rest.partition(_END)[2]
    replace_file(page, (before + "\n".join(lines) + after).encode())
