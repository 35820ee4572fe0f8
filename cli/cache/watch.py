"""``rsmtdf cache watch``: how far a build is that runs elsewhere."""

from __future__ import annotations

import json as json_module
import time
from typing import TYPE_CHECKING, Annotated

import typer

from rsmtdf_cli.cache.plan import seconds_text
from rsmtdf_cli.cache.show import StoreArgument, plain
from rsmtdf_cli.console import JsonOption, QuietOption, command, console

if TYPE_CHECKING:
    from rsmtdf_cache.watch import Standing

__all__ = ["watch"]


@command
def watch(
    store: StoreArgument,
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, do not wait for the end.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Follow a build until it ends, from any machine that sees its store: units, rate, time left, who builds."""
    from rsmtdf_cache.errors import Interrupted, UsageError
    from rsmtdf_cache.watch import Watch

    if every <= 0:
        raise UsageError(f"--every {every:g}: seconds, more than 0")
    look, last = Watch(store), None
    while True:
        found = look.look()
        told = found.to_json()
        if json:
            typer.echo(json_module.dumps({"time": round(time.time(), 3), **told}))
        elif not quiet and told["units"] != last:
            console().print(_line(found))
            last = told["units"]
        if once:
            return
        if not found.builds:
            break
        time.sleep(every)
    if found.builder is not None and not found.whole:
        raise Interrupted(
            f"the build of {store} ended with {found.units} of {found.builder.units} units; "
            "the same `rsmtdf cache build` continues it"
        )


def _line(found: Standing) -> str:
    builder = found.builder
    if builder is None:
        state = "a command holds its lock" if found.builds else "no build works on it"
        return f"{state}; {found.units} units are committed"
    percent = f" ({100 * found.tiles / builder.tiles:.1f} %)" if builder.tiles else ""
    text = f"{found.units} of {builder.units} units, {found.tiles} of {builder.tiles} tiles{percent}"
    if not found.builds:
        return f"{text}; the build has ended"
    rate = f", {found.rate:.3g} tiles/s" if found.rate else ""
    left = f", {seconds_text(found.seconds_left)} left" if found.seconds_left is not None else ""
    return f"{text}{rate}{left}; built by process {builder.pid} on {plain(builder.host)}"
