"""``rsmtdf train``: a recipe in, a run folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsmtdf_cli.console import JsonOption, QuietOption, command, emit_json, message

__all__ = ["train"]


@command
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)],
    use_cache: Annotated[
        Path | None, typer.Option("--use-cache", metavar="STORE", help="Store of cached teacher features.")
    ] = None,
    no_distill: Annotated[
        bool, typer.Option("--no-distill", help="The paired baseline: the same recipe without teachers.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="Run folder; default runs/NAME-sSEED.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. optim.lr=0.001.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU when there is one.")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard scalars too.")] = True,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Train a student and score it on the held-out split. A run that is there already continues where it stopped.

    With --no-distill, --use-cache still decides which crops are drawn, so that both arms see the same ones.
    """
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cli.training import show_metrics, training_progress
    from rsmtdf_train.recipe import load_recipe

    chosen = load_recipe(recipe, set_ or [])
    if no_distill:
        chosen = chosen.without_distillation()
    if chosen.distill is not None and use_cache is None:
        raise UsageError(
            f"recipe {recipe} distils from cached teacher features, and no store was given. Either build one with "
            f"`rsmtdf cache build {chosen.data} --out STORE --teacher NAME` and pass --use-cache STORE, or train the "
            "baseline with --no-distill"
        )
    folder = out if out is not None else Path("runs") / f"{chosen.name}-s{chosen.seed}"

    from rsmtdf_train.loop import train as run_training

    with training_progress(quiet) as sink:
        result = run_training(chosen, folder, use_cache, device=device, on_event=sink, tensorboard=tensorboard)
    if not quiet and result.resumed_at == result.steps:
        message(f"{folder} is complete already ({result.steps} steps)", kind="note")
    if json:
        emit_json({"run": folder, "resumed_at": result.resumed_at, **result.metrics})
    elif not quiet:
        show_metrics(result.metrics)
