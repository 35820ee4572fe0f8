"""The ``rsmtdf cache build`` command that continues what a store holds: for error messages that say what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rsmtdf_cache.codecs import codec_name
from rsmtdf_cache.fixed_views import FixedView, draw_fixed_view
from rsmtdf_cache.views import base_size_px

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = ["asked_as", "rebuild_command"]


def asked_as(teacher: str) -> str:
    """Return what ``--teacher`` calls the stored ``teacher``: ``timm-a`` is asked for as ``timm:a``."""
    return f"timm:{teacher[5:]}" if teacher.startswith("timm-") else teacher


def rebuild_command(store: FeatureStore, teachers: Iterable[str], data: Path) -> str:
    """Return the ``rsmtdf cache build`` command that makes for new tiles all that ``store`` holds of ``teachers``.

    All, not only what a run reads: the arrays of a view are built together.
    """
    asked, ends = [], {}
    for name in sorted(set(teachers)):
        specs = [spec for key in store.keys() if (spec := store.spec(key)).teacher.name == name]
        origin, encoding = specs[0].teacher.weights_origin, specs[0].encoding
        text = asked_as(name) + (",weights=FILE" if origin.startswith("file ") else "")
        if origin.startswith("seed "):
            text += f",pretrained=none,seed={origin.removeprefix('seed ')}"
        if (codec := codec_name(encoding.model_copy(update={"compressor": "none"}))) != "float16":
            text += f",codec={codec}"
        text += f",layers={'+'.join(dict.fromkeys(spec.layer.name for spec in specs))}"
        if whole := [spec.view for spec in specs if spec.view.is_whole]:
            base = base_size_px(specs[0].teacher, store.tile_px)
            scales = sorted({view.size_px / base for view in whole}, reverse=True)
            turns = len({view.orientation for view in whole})
            text += f",scales={'+'.join(f'{s:g}' for s in scales)},orientations={turns}"
        if views := {shown for spec in specs if (shown := FixedView.of(spec.view)) is not None}:
            text += f",fixed_views={len(views)}"
            ends["--seed"] = _seed_of(views, store.tile_px)
        if encoding.compressor != "none":
            ends["--compressor"] = encoding.compressor
        asked.append(f"--teacher {text}")
    more = [f"{option} {value}" for option, value in ends.items()]
    return " ".join(["rsmtdf cache build", str(data), "--out", store.shown, *asked, *more])


def _seed_of(views: Collection[FixedView], tile_px: int) -> str:
    """Return the seed that draws ``views``, when it is a small one: a store keeps the numbers, not their seed."""
    for seed in range(100):
        if all(draw_fixed_view(seed, k, tile_px) in views for k in range(len(views))):
            return str(seed)
    return "SEED"
