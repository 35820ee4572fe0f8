"""Previews as one HTML page that needs nothing else: pictures, packed tokens and a small script, all inside.

The page works without scripts as a still picture. Names come from a store that may be hostile: whatever is not a number
made here is escaped, and a content security policy allows no other script than ours and no address outside.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.preview.maps import Maps
from rsmtdf_cache.preview.norms import ramp
from rsmtdf_cache.preview.selection import Selection, ShownArray, ShownTile

__all__ = ["PAGE_NBYTES", "write_page"]

#: Bound of the packed tokens of a page before base64, which adds a third; exceeded only by more tokens than that.
PAGE_NBYTES = 6_000_000

_IMAGE_PX = 512  # larger tiles are shown reduced
_KINDS = ("pca", "norm", "cosine")


def write_page(path: Path, selection: Selection, maps: Sequence[Maps]) -> Path:
    """Write the page and return ``path``. ``maps`` hold packed tokens. The same features give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(selection, maps), encoding="utf-8")
    return path


def _page(selection: Selection, maps: Sequence[Maps]) -> str:
    store = selection.store
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    names = {m.array.key.teacher: m.array.spec.teacher for m in maps}
    found = store.manifest
    size = sum(m.packed.codes.nbytes for m in maps if m.packed)
    return Template(_asset("page.html")).substitute(
        script_hash=f"'sha256-{digest}'",
        css=_asset("page.css"),
        script=script,
        dataset=escape(found.dataset),
        facts=f"{len(selection.tiles)} of {sum(store.tiles.splits.values())} tiles of {store.tile_px} px, {len(maps)} "
        f"arrays of {len(names)} teachers, snapshot <code>{escape(store.snapshot[:16])}</code>",
        rows="\n".join(_row(n, m) for n, m in enumerate(maps)),
        tiles="\n".join(_section(selection, n, tile, maps) for n, tile in enumerate(selection.tiles)),
        embedded=f"This page holds {size / 1e6:.2f} MB of tokens for the cosines: the directions of the tokens, "
        "projected on their leading axes and rounded to 8 bits. What that costs stands in the table of arrays: the "
        f"difference from cosines of the stored features, over up to 64 patches of each array against all; at most "
        f"{max(m.packed.error_max for m in maps if m.packed):.4f}. PCA colours, norms and the pictures without scripts "
        "are of the stored features themselves.",
        attribution=escape(found.attribution or "The store records no attribution."),
        teachers="\n".join(
            f"<li>{escape(name)}: {escape(t.architecture)}, weights {escape(t.weights_origin)} "
            f"(<code>{escape(t.weights[:12])}</code>); licence: {escape(t.license or 'not recorded')}</li>"
            for name, t in sorted(names.items())
        ),
        snapshot=escape(store.snapshot),
        data=_json(_data(selection, maps)),
    )


def _data(selection: Selection, maps: Sequence[Maps]) -> dict[str, object]:
    return {
        "tile_px": selection.store.tile_px,
        "tiles": [t.id for t in selection.tiles],
        "patch": [selection.patch_tile, *selection.patch[1:]],
        "magma": _base64(ramp(np.linspace(0, 1, 256), 0, 1, "magma").tobytes()),
        "arrays": [
            {
                "key": str(m.array.key), "first": list(m.array.first_px), "stride": m.array.stride_px,
                "grid": list(m.array.grid), "dimensions": m.packed.codes.shape[1],
                "codes": _base64(m.packed.codes.tobytes()),
                "norms": _base64(m.norms.values.astype("<f4").tobytes()),
            }
            for m in maps
            if m.packed is not None
        ],
    }  # fmt: skip


def _row(number: int, maps: Maps) -> str:
    array, packed = maps.array, maps.packed
    height, width = array.spec.grid
    every = f" (every {array.step}th shown)" if array.step > 1 else ""
    cells = [
        f"{height} × {width} × {array.spec.layer.channels}{every}",
        f"{array.spec.stride_tile_px:g} px",
        f"{100 * maps.pca_share:.0f} %",
        f"{maps.norms.low:.3g} – {maps.norms.high:.3g}",
        f"{maps.norms.outliers} above {maps.norms.limit:.3g}" if maps.norms.outliers else "none",
    ]
    if packed is not None:
        cells += [f"{packed.codes.shape[1]} × 8 bit"]
        cells += [f"{e:.4f}" for e in (packed.error_mean, packed.error_worst1, packed.error_max)]
    box = f'<input type="checkbox" checked data-array="{number}" class="js"> '
    name = f'<th scope="row"><label>{box}{escape(str(array.key))}</label></th>'
    return f"<tr>{name}{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def _section(selection: Selection, number: int, tile: ShownTile, maps: Sequence[Maps]) -> str:
    side, own = selection.store.tile_px, number == selection.patch_tile
    name = escape(tile.id)
    picture = '<span class="none">no image</span>'
    if tile.image is not None:
        picture = f'<img alt="image of tile {name}" src="{_jpeg(tile.image)}">'
    finest = min(m.array.stride_px for m in maps)
    mark = _mark(*selection.patch[1:], finest, side, own)
    cards = "\n".join(_card(selection, number, n, m) for n, m in enumerate(maps))
    return (
        f'<section aria-label="tile {name}">\n<div class="tile"><h2>{name} <small>{escape(tile.split)}</small></h2>'
        f'<div class="pic" data-tile="{number}" role="group" aria-label="tile {name}: arrow keys move the patch">'
        f'{picture}{mark}</div></div>\n<div class="cards">\n{cards}\n</div>\n</section>'
    )


def _card(selection: Selection, tile: int, number: int, maps: Maps) -> str:
    array, side, own = maps.array, selection.store.tile_px, tile == selection.patch_tile
    teacher, view, layer = escape(array.key.teacher), escape(array.key.view), escape(array.key.layer)
    name, style = escape(selection.tiles[tile].id), _place(array, side)
    (i, j), (y, x) = maps.patch, array.first_px
    mark = _mark(y + i * array.stride_px, x + j * array.stride_px, array.stride_px, side, own)
    colors = {
        "pca": maps.pca[tile],
        "norm": maps.norms.colors()[tile],
        "cosine": ramp(maps.cosine[tile], maps.cosine_low, 1.0, "magma"),
    }
    pics = "".join(
        f'<div class="pic" data-kind="{kind}"><img alt="{kind} of {teacher} {view} {layer}, tile {name}" '
        f'style="{style}" src="{_png(colors[kind])}">{mark}</div>'
        for kind in _KINDS
    )
    return (
        f'<figure class="card" data-tile="{tile}" data-array="{number}"><figcaption><span class="key">{teacher}<br>'
        f'<b>{layer}</b> {view}</span><output class="value" aria-live="off"></output></figcaption>'
        f'<div class="pics" role="group" aria-label="{teacher} {view} {layer} of tile {name}: arrow keys move the '
        f'patch">{pics}</div><div class="pics names" aria-hidden="true"><span>PCA</span><span>norm</span>'
        "<span>cosine</span></div></figure>"
    )


def _place(array: ShownArray, side: int) -> str:
    """Return where the map lies in the tile, as CSS: its squares stand around their tokens' centres."""
    (y, x), stride, (height, width) = array.first_px, array.stride_px, array.grid
    left, top = (100 * (p - stride / 2) / side for p in (x, y))
    return (
        f"left:{left:.4f}%;top:{top:.4f}%;width:{100 * stride * width / side:.4f}%;"
        f"height:{100 * stride * height / side:.4f}%"
    )


def _mark(y: float, x: float, stride: float, side: int, shown: bool) -> str:
    place = "".join(
        f"{n}:{100 * v / side:.4f}%;" for n, v in (("top", y), ("left", x), ("width", stride), ("height", stride))
    )
    return f'<i class="mark" style="{place}"{"" if shown else " hidden"}></i>'


def _json(value: object) -> str:
    """Return JSON that is safe inside a script element: no tag can begin or end in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _png(colors: NDArray[np.uint8]) -> str:
    memory = io.BytesIO()
    Image.fromarray(colors).save(memory, "PNG", optimize=True)
    return f"data:image/png;base64,{_base64(memory.getvalue())}"


def _jpeg(image: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_IMAGE_PX, _IMAGE_PX))
    memory = io.BytesIO()
    picture.save(memory, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{_base64(memory.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _asset(name: str) -> str:
    return (files("rsmtdf_cache.preview") / name).read_text(encoding="utf-8")
