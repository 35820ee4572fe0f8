"""``rsmtdf train``: a recipe in, a run folder out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from rsmtdf_cli.cache.show import local_folder
from rsmtdf_cli.console import JsonOption, QuietOption, command, emit_json, message, new_app

if TYPE_CHECKING:
    from rsmtdf_cache.events import Event
    from rsmtdf_train.recipe import Recipe
    from rsmtdf_train.run import TrainSink

__all__ = ["app", "train"]

#: The value of ``--use-cache`` that means: find the store in the catalogue. A folder of that name is ``./auto``.
AUTO = "auto"

#: Where the words of a command are kept: several processes are started with the same ones.
_WORDS = "rsmtdf.train.words"


class _OptionalStore(TyperCommand):
    """``--use-cache`` at the end or before another option means ``--use-cache auto``.

    The words are rewritten before anything parses them: an option with an optional value is spelled differently in
    each version of typer and click.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        end = words.index("--") if "--" in words else len(words)
        for i, word in enumerate(words[:end]):
            last = i + 1 == end
            if word == "--use-cache" and (last or words[i + 1].startswith("-")):
                words[i] = f"--use-cache={AUTO}"
        ctx.meta[_WORDS] = tuple(words)
        return super().parse_args(ctx, words)


app = new_app("Train a student from a recipe, with or without cached features.")


@app.command("train", cls=_OptionalStore)
@command
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)],
    use_cache: Annotated[
        str | None,
        typer.Option(
            "--use-cache",
            metavar="[STORE[@SNAPSHOT]]",
            help="Store of cached teacher features: folder or URL. Without a value (or auto): the one of `cache list` "
            "that fits the recipe.",
        ),
    ] = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep what this run reads from being removed by `cache gc`.")
    ] = False,
    pixels: Annotated[
        str, typer.Option(help="Train tiles from the store, from the source's images, or auto: what the store has.")
    ] = "auto",
    residency: Annotated[
        str,
        typer.Option(
            help="Read the store as mapped files (stream), or first copy what is read to ram, or to the device."
        ),
    ] = "stream",
    no_distill: Annotated[
        bool, typer.Option("--no-distill", help="The paired baseline: the same recipe without teachers.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", parser=local_folder, help="Run folder; default runs/NAME-sSEED.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. optim.lr=0.001.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU when there is one.")] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="N|all|IDS",
            help="Processes that share each batch, one on each GPU: their number, all, or ids as 0,2. Without a GPU: N "
            "processes on the CPU.",
        ),
    ] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard scalars too.")] = True,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Train a student and score it on the held-out split. A run that is there already continues where it stopped.

    With --no-distill, --use-cache still decides which crops are drawn, so that both arms see the same ones. A run that
    continues reads the snapshot it began with, also when the store has grown since.
    """
    from rsmtdf_train.launcher import follow_launcher

    follow_launcher()
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cli.score_tables import show_metrics
    from rsmtdf_cli.training import one_voice, run_on_devices, training_progress
    from rsmtdf_train.recipe import load_recipe

    asked = load_recipe(recipe, set_ or [])
    chosen = asked.without_distillation() if no_distill else asked
    if chosen.targets not in ("none", "online") and use_cache is None:
        raise UsageError(_store_missing(recipe, chosen))
    if pin and use_cache is None:
        raise UsageError("--pin keeps the store of --use-cache; give both")
    if devices is not None and run_on_devices("train", context.meta[_WORDS], chosen, devices, device):
        return
    folder = out if out is not None else Path("runs") / f"{chosen.name}-s{chosen.seed}"
    with one_voice() as speaks, training_progress(quiet or not speaks) as shown:
        sink: TrainSink = shown if speaks else lambda event: None
        store = use_cache
        if use_cache == AUTO:  # by the recipe with its teachers: both arms find one store
            store = _found(asked, folder, sink, quiet or not speaks)
        from rsmtdf_train.loop import train as run_training
        from rsmtdf_train.pixel_source import pixel_source
        from rsmtdf_train.residency import residency_of

        result = run_training(
            chosen,
            folder,
            store,
            pin=pin,
            device=device,
            on_event=sink,
            tensorboard=tensorboard,
            pixels=pixel_source(pixels),
            residency=residency_of(residency),
        )
    if not speaks:
        return
    if not quiet and result.resumed_at == result.steps:
        message(f"{folder} is complete already ({result.steps} steps)", kind="note")
    if json:
        emit_json({"run": folder, "resumed_at": result.resumed_at, **result.metrics})
    elif not quiet:
        show_metrics(result.metrics)


def _found(recipe: Recipe, run: Path, on_event: Callable[[Event], None], quiet: bool) -> str:
    """Return the store that the run began with, else the registered one that fits; say which unless ``quiet``."""
    from rsmtdf_train.find_store import find_store
    from rsmtdf_train.run_store import read_run_store

    def note(text: str) -> None:
        if not quiet:
            message(f"--use-cache: {text}", kind="note")

    begun = read_run_store(run)
    if begun is not None:
        note(f"{begun.store}, the store this run began with")
        return begun.store
    found = find_store(recipe, on_event)
    newest = f", registered last of {found.others + 1} that fit" if found.others else ""
    note(f"{found.path} (snapshot {found.snapshot[:12]}{newest})")
    for unsure in found.notes:
        note(unsure)
    return found.path


def _store_missing(file: Path, recipe: Recipe) -> str:
    from rsmtdf_cache.sources import open_source
    from rsmtdf_train.find_store import how_to_build

    return (
        f"recipe {file} distils from cached teacher features, and no store was given. Pass --use-cache STORE (without "
        "STORE: the one of `rsmtdf cache list` that fits), or train the baseline with --no-distill. "
        f"{how_to_build(recipe, open_source(recipe.data))}"
    )
