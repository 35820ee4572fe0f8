"""``rsmtdf bench``: reproduce the tables of the README on this machine, measure building and reading."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsmtdf_cli.accuracy import accuracy
from rsmtdf_cli.bench_select import bench_select
from rsmtdf_cli.console import JsonOption, QuietOption, command, console, emit_json, message, new_app, progress
from rsmtdf_cli.scores import difference_text, mean_text

if TYPE_CHECKING:
    from rsmtdf_cache.sources import TileSource
    from rsmtdf_train.experiment.compare import Comparison

__all__ = ["app", "default_jobs", "sample", "store"]

app = new_app("Reproduce the tables of the README; measure building and reading.")
app.command("accuracy")(accuracy)
app.command("select")(bench_select)

#: On 4 test tiles only, so its IoU is mostly chance; the table gives the mean with and without it.
_RARE = ("snow_ice",)


@app.command("sample")
@command
def sample(
    seeds: Annotated[int, typer.Option(min=1, help="Number of paired seeds.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data, store, runs, pictures.")] = Path("demo"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once (default: CPU cores, 1 with a GPU).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key in all arms.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Land-cover tiles, two pretrained teachers, three paired arms: a table of test mIoU and pictures.

    Everything lies in DIR; what is there already is kept, so the same command continues and costs little when done.
    """
    from rsmtdf_cache.build import build_store
    from rsmtdf_cache.request import BuildRequest
    from rsmtdf_cache.sources import open_source
    from rsmtdf_cache.sources.landcover import build_sample
    from rsmtdf_cache.yaml_file import read_yaml
    from rsmtdf_cli.bundled import bundled_recipe
    from rsmtdf_cli.machine import context
    from rsmtdf_train.experiment.compare import compare_arms
    from rsmtdf_train.recipe import load_recipe

    started = time.perf_counter()
    data, features = out / "data", out / "store"
    recipe = load_recipe(bundled_recipe("sample"), [f"data={data}", *(set_ or [])])
    seconds: dict[str, float] = {}
    with progress(quiet or json) as on_event:
        build_sample(data, on_event)
        seconds["data"] = time.perf_counter() - started
        asked = read_yaml(bundled_recipe("sample-store"), "--config") | {"data": data, "out": features}
        built = build_store(BuildRequest.of(asked), on_event)
        seconds["store"] = time.perf_counter() - started - seconds["data"]
        comparison = compare_arms(
            recipe,
            out,
            features,
            seeds=range(seeds),
            jobs=jobs or default_jobs(),
            without=_RARE,
            context=context(),
            on_event=on_event,
        )
        seconds["runs"] = time.perf_counter() - started - seconds["data"] - seconds["store"]
        pictures = _pictures(comparison, open_source(data), features, out / "pictures")
    seconds["total"] = time.perf_counter() - started
    if json:
        emit_json({
            "context": context(),
            "comparison": comparison.to_json(),
            "store": built.to_json(),
            "pictures": pictures,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        })  # fmt: skip
        return
    _show(comparison, seconds)
    if not quiet:
        for picture in pictures:
            message(str(picture), kind="picture")
        message(str(out / "comparison.json"), kind="numbers")


@app.command("store")
@command
def store(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data and store.")] = Path("bench-out/store"),
    teacher: Annotated[str, typer.Option(help="Teacher to build and read.")] = "efficientnet_lite0",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """How fast a store is built, against the bare teacher, and read, against a numpy memory map of the same values."""
    from json import dumps

    from rsmtdf_cli.machine import context
    from rsmtdf_cli.measure import measure_store

    with progress(quiet or json) as on_event:
        found = measure_store(out, teacher, on_event)
    document = {"context": context(), **found}
    (out / "bench.json").write_text(dumps(document, indent=1) + "\n")
    if json:
        emit_json(document)
        return
    from rich.table import Table

    table = Table(
        "what", "this project", "bare", "ratio", title=f"{teacher}, {found['tiles']} tiles", title_justify="left"
    )
    for name, ours, bare, unit in (
        ("build against the teacher alone", found["build_tiles_per_s"], found["teacher_tiles_per_s"], "tiles/s"),
        ("read against a memory map", found["read_crops_per_s"], found["memmap_crops_per_s"], "crops/s"),
    ):
        table.add_row(name, f"{ours:,.1f} {unit}", f"{bare:,.1f} {unit}", f"{ours / bare:.2f}")
    console().print(table)


def default_jobs() -> int:
    """Return how many runs to train side by side: one for each CPU core, one with a GPU."""
    import torch

    from rsmtdf_cache.cores import usable_cores

    if torch.cuda.is_available():
        return 1
    return usable_cores()


def _pictures(comparison: Comparison, source: TileSource, features: Path, folder: Path) -> list[Path]:
    from rsmtdf_cache.preview import pca_picture
    from rsmtdf_cache.store import FeatureStore
    from rsmtdf_train.showcase import picture_arms

    opened = FeatureStore.open(features)
    teachers = sorted({key.teacher for key in opened.keys()})
    pca = [pca_picture(opened, source, folder / f"features-{name}.png", 5, name) for name in teachers]
    return [*picture_arms(comparison, source, folder), *pca]


def _show(comparison: Comparison, seconds: dict[str, float]) -> None:
    from rich.table import Table

    many = len(comparison.seeds) > 1
    title = f"mIoU on {comparison.split} tiles, percent, {len(comparison.seeds)} seed{'s' if many else ''}"
    table = Table(title=title, title_justify="left")
    base = next(row.title for row in comparison.rows if row.arm == comparison.baseline)
    for name in ("arm", "mIoU", f"without {', '.join(comparison.without)}", f"paired difference to {base}", ""):
        table.add_column(name, justify="right" if name not in ("arm", "") else "left", no_wrap=True)
    for row in comparison.rows:
        difference: Any = row.difference
        table.add_row(
            row.title,
            mean_text(row.mean, row.sd),
            mean_text(row.mean_without, row.sd_without),
            difference_text(difference),
            "" if difference is None or not many else difference.verdict,
        )
    console().print(table)
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    note = "±: standard deviation over seeds; [ ]: 95 % t-interval. " if many else "One seed shows no spread. "
    console().print(f"{note}{spent}", soft_wrap=True)
