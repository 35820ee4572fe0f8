"""What ``cache build`` and ``cache plan`` are asked for: the same options, spelled once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from rsmtdf_cli.cache.show import build_place

if TYPE_CHECKING:
    from rsmtdf_cache.request import BuildRequest

__all__ = ["asks_for_build", "build_request"]


def build_request(
    data: Annotated[Path | None, typer.Argument(help="Folder of the dataset.", show_default=False)] = None,
    out: Annotated[
        Any,
        typer.Option(
            help="Folder or URL (s3://bucket/store) of the store; an existing store is continued.",
            parser=build_place,
            metavar="STORE",
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="NAME[,weights=FILE][,pretrained=none,seed=N][,layers=a+b][,scales=1+0.5]; repeatable."),
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Store the tiles' decoded pixels too: training decodes no image.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same keys and more; options win.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Splits to encode; repeatable (default: train).")] = None,
    scales: Annotated[str | None, typer.Option(help="Scales of the views, e.g. 1,0.5 (the default).")] = None,
    orientations: Annotated[int | None, typer.Option(help="1, 2, 4 or 8 stored orientations (default 1).")] = None,
    fixed_views: Annotated[
        int | None, typer.Option(help="Fixed random views per teacher: crop, orientation, colours (default 0).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Which fixed views; their parameters are stored (default 0).")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Windows for views larger than this; 0 = never (default: for twice the training side)."),
    ] = None,
    overlap: Annotated[float | None, typer.Option(help="Part of a window that the next one repeats (0.25).")] = None,
    codec: Annotated[str | None, typer.Option(help="float16 (default), int8, or pcaK-int8: K components.")] = None,
    compressor: Annotated[
        str | None, typer.Option(help="Of bytes: none (default), zstd:3, blosc:lz4:5:bitshuffle.")
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Reuse the calibrations of a file or store; repeatable.")
    ] = None,
    group_rows: Annotated[int | None, typer.Option(help="Tiles per shard (default: shards near 128 MB).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: cuda if there is one).")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 arithmetic.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Tiles per forward pass.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a forward pass.")] = None,
    decoders: Annotated[
        int | None, typer.Option(help="Tiles decoded at once (default: one a core, 4 to 32); changes no byte.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop when a tile cannot be used.")] = False,
    allow_mixed: Annotated[bool, typer.Option("--allow-mixed", help="Continue with other numerics.")] = False,
    *,
    words: str,
    default_out: Path | None,
) -> BuildRequest:
    """Return the request; ``words`` is the command asked, ``default_out`` the store when none is named.

    Raises ``UsageError`` for what is missing or wrong.
    """
    from rsmtdf_cache.errors import UsageError
    from rsmtdf_cache.request import BuildRequest
    from rsmtdf_cache.yaml_file import read_yaml

    values: dict[str, Any] = read_yaml(config, "--config") if config else {}
    given = {
        "data": data, "out": out, "teachers": teacher, "splits": split, "orientations": orientations,
        "scales": _numbers(scales) if scales is not None else None, "fixed_views": fixed_views,
        "view_seed": seed, "window_px": window, "overlap": overlap, "codec": codec,
        "compressor": compressor, "calibration": calibration, "group_rows": group_rows, "device": device,
        "precision": precision, "micro_batch": micro_batch, "threads": threads, "decoders": decoders,
    }  # fmt: skip
    values |= {name: value for name, value in given.items() if value is not None}
    if isinstance(values.get("out"), str):  # of --config
        values["out"] = build_place(values["out"])
    values |= {
        name: True for name, flag in (("strict", strict), ("allow_mixed", allow_mixed), ("pixels", pixels)) if flag
    }
    if default_out is not None and not values.get("out"):
        values["out"] = default_out
    asked = (("data", "DATA"), ("out", "--out STORE"), ("teachers", "--teacher NAME"))
    missing = [text for name, text in asked if not values.get(name)]
    if values.get("pixels") is True and "--teacher NAME" in missing:
        missing.remove("--teacher NAME")
    if missing:
        raise UsageError(
            f"{words}: {', '.join(missing)} missing; e.g. "
            f"`rsmtdf {words} DATA --out STORE --teacher dinov2_vitb14 --teacher clip_vitl14`"
        )
    return BuildRequest.of(values)


def asks_for_build(
    words: str, default_out: Callable[[], Path] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command the options of ``build_request`` before its own.

    The command gets the request as its first argument.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shared = [p for p in _parameters(build_request) if p.name not in ("words", "default_out")]
        own = _parameters(function)[1:]

        @functools.wraps(function)
        def command(**given: Any) -> None:
            asked = {p.name: given.pop(p.name) for p in shared}
            folder = default_out() if default_out is not None else None
            function(build_request(**asked, words=words, default_out=folder), **given)

        # What typer reads: parameters by keyword, with their annotations resolved in the module they come from.
        both = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shared + own]
        command.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in both}
        return command

    return decorate


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    names = {"BuildRequest": Any}
    hints = get_type_hints(function, localns=names, include_extras=True)
    return [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]


def _numbers(text: str) -> list[float]:
    from rsmtdf_cache.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--scales {text!r}: write numbers with commas between, e.g. 1,0.5") from None
