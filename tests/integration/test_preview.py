"""``cache preview`` on real stores: what the page and the picture claim, for friendly and for hostile names."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.preview import draw_preview
from rsmtdf_cache.preview.selection import select
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.catalogue import register_store
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cli.app import app
from tests.datasets import write_dataset, write_split
from tests.teachers import load_mean_teacher

HOSTILE = "<script>alert('1')</script>&\"$x{"


def rsmtdf(*args: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        app([str(a) for a in args], prog_name="rsmtdf")
    return int(end.value.code or 0)


class _Page(HTMLParser):
    """What a browser would find: elements, addresses, the embedded data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, Any] = {}
        self.text = ""
        self._open = self.raw = ""
        self.feed(text)
        self.arrays = {a["key"]: a for a in self.data["arrays"]}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            if data.lstrip().startswith("{"):
                self.raw, self.data = data, json.loads(data)
        elif self._open != "style":
            self.text += data

    def cosines(self, key: str, tile: int, i: int, j: int) -> NDArray[Any]:
        """Return ``[N, h, w]``, computed from the codes as the page's script does."""
        array = self.arrays[key]
        codes = np.frombuffer(base64.b64decode(array["codes"]), np.int8).astype(np.float64)
        codes = codes.reshape(-1, *array["grid"], array["dimensions"])
        lengths = np.linalg.norm(codes, axis=-1)
        found: NDArray[Any] = codes @ codes[tile, i, j] / (lengths * lengths[tile, i, j])
        return found

    def norms(self, key: str) -> NDArray[Any]:
        array = self.arrays[key]
        return np.frombuffer(base64.b64decode(array["norms"]), "<f4").reshape(-1, *array["grid"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("preview") / "data", tiles=6, tile_px=64)


@pytest.fixture(scope="module")
def store(data: Path) -> FeatureStore:
    """A store with two scales and two orientations of a teacher whose features are mean colours."""
    out = data.parent / "store"
    request = BuildRequest(data=data, out=out, teachers=("mean",), scales=(1.0, 0.5), orientations=2)
    build_store(request, load_teacher=load_mean_teacher)
    return FeatureStore.open(out)


@pytest.fixture(scope="module")
def page(store: FeatureStore, data: Path) -> _Page:
    path = data.parent / "page.html"
    draw_preview(store, open_source(data), html=path, tiles=3)
    return _Page(path.read_text())


def test_cosines_and_norms_of_the_page_are_those_of_the_stored_features(store: FeatureStore, data: Path) -> None:
    ids = ["t000", "t002", "t003"]
    path = data.parent / "named.html"
    done = draw_preview(store, open_source(data), html=path, tiles=ids)
    page = _Page(path.read_text())
    assert page.data["tiles"] == ids and len(done["arrays"]) == 4
    for array in done["arrays"]:
        key = FeatureKey.parse(array["key"])
        values = store.read(key, [store.tiles.row_of(i) for i in ids]).values.astype(np.float64)
        np.testing.assert_allclose(page.norms(array["key"]), np.linalg.norm(values, axis=-1), rtol=1e-5)
        units = values / np.linalg.norm(values, axis=-1, keepdims=True)
        found = page.cosines(array["key"], 1, 0, 1)
        assert found[1, 0, 1] == pytest.approx(1.0)
        assert np.abs(found - units @ units[1, 0, 1]).max() <= 1.5 * array["embedded"]["error_max"] + 1e-6
        assert f"{array['embedded']['error_mean']:.4f}" in page.text


def test_the_page_loads_nothing_and_runs_one_script(page: _Page, data: Path) -> None:
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "action", "srcset")]
    assert addresses and all(a is not None and a.startswith("data:image/") for a in addresses)
    text = re.sub(r"[A-Za-z0-9+/=]{80,}", "", (data.parent / "page.html").read_text())  # less what is embedded
    assert len(text) > 10_000
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|eval\(|innerHTML", text)
    assert [tag for tag, _ in page.tags].count("script") == 2
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "'sha256-" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_the_page_is_whole_without_scripts_and_says_what_it_holds(page: _Page, store: FeatureStore) -> None:
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) == 3 + 3 * 4 * 3 and all(a["alt"] for a in images)
    for word in (store.snapshot, "synthetic, made by the tests", "licence", "not recorded", *page.arrays):
        assert word in page.text


def test_the_same_store_gives_the_same_bytes(store: FeatureStore, data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_preview(store, open_source(data), tmp_path / f"{name}.png", tmp_path / f"{name}.html", tiles=2)
    for kind in ("png", "html"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_maps_lie_where_their_tokens_look(store: FeatureStore, data: Path) -> None:
    """Every token of this teacher is the mean of its cell: the image around its centre tells, also when mirrored."""
    selection = select(store, open_source(data), 2, arrays=("*/s64o?/mean8",))
    assert [a.spec.view.orientation for a in selection.arrays] == [0, 4]
    for array in selection.arrays:
        for tile in selection.tiles:
            assert tile.image is not None
            tokens, half = array.read(store, tile.row), array.stride_px / 2
            for i, j in ((0, 0), (2, 5), (7, 3)):
                y, x = (f + array.stride_px * n for f, n in zip(array.first_px, (i, j), strict=True))
                cell = tile.image[int(y - half) : int(y + half), int(x - half) : int(x + half)]
                np.testing.assert_allclose(tokens[i, j], cell.mean((0, 1)), atol=0.3)
                assert array.nearest(y + 1, x - 1) == (i, j)


def test_large_maps_are_thinned_out_and_keep_their_places(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsmtdf_cache.preview.selection._SIDE_TOKENS", 4)
    (array,) = select(store, None, 1, arrays=("*/s64o4/mean8",)).arrays
    whole = store.read(array.key, [0]).values[0][:, ::-1]
    assert array.step == 2 and array.grid == (4, 4) and array.stride_px == 16
    np.testing.assert_array_equal(array.read(store, 0), whole[1::2, 1::2])
    assert array.first_px == (12.0, 12.0)


def test_hostile_names_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets here have tame ids; a store that another program wrote need not."""
    monkeypatch.setattr("rsmtdf_cache.sources.listed._ID", re.compile(".+"))
    name = HOSTILE.replace("/", "")  # a tile is a file, too
    data = write_dataset(tmp_path / "data", tiles=4, tile_px=64)
    for folder in ("images", "masks"):
        (data / folder / "t000.png").rename(data / folder / f"{name}.png")
    for split in ("train", "labeled/5", "labeled/10", "labeled/25"):
        ids = (data / "splits" / f"{split}.txt").read_text().split()
        write_split(data, split, [name if i == "t000" else i for i in ids])
    header = yaml.safe_load((data / "dataset.yaml").read_text())
    (data / "dataset.yaml").write_text(yaml.safe_dump(header | {"name": HOSTILE, "attribution": HOSTILE}))
    build_store(BuildRequest(data=data, out=tmp_path / "store", teachers=("mean",)), load_teacher=load_mean_teacher)
    opened = FeatureStore.open(tmp_path / "store")
    draw_preview(opened, open_source(data), tmp_path / "p.png", tmp_path / "p.html", patch=(name, 3, 5))
    page = _Page((tmp_path / "p.html").read_text())
    assert page.data["tiles"][0] == name and "<" not in page.raw
    assert name in page.text and HOSTILE in page.text
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [attrs for _, attrs in page.tags if any(k.startswith("on") for k in attrs)]
    assert Image.open(tmp_path / "p.png").width > 100


def test_what_cannot_be_drawn_is_refused_by_name(store: FeatureStore, data: Path, tmp_path: Path) -> None:
    source = open_source(data)
    for asked, words in (
        ({"tiles": ["t0001"]}, "no tile 't0001'.*Did you mean"),
        ({"tiles": ["t005"]}, "no tile 't005'"),  # of the test split, which is not in the store
        ({"tiles": 0}, "0 tiles"),
        ({"tiles": []}, "0 tiles"),
        ({"arrays": ["meen/*/*"]}, "meen"),
        ({"patch": ("t001", 64, 0)}, "0 to 63"),
        ({"patch": ("x", 0, 0)}, "no tile 'x'"),
    ):
        with pytest.raises(UsageError, match=words):
            draw_preview(store, source, tmp_path / "p.png", **asked)
    other = write_dataset(tmp_path / "other", tiles=3, tile_px=64, splits={"train": [1, 2]})
    with pytest.raises(UsageError, match="none of the 1 tiles"):
        draw_preview(store, open_source(other), tmp_path / "p.png", tiles=["t000"])
    assert not (tmp_path / "p.png").exists()


def test_a_tile_whose_pixels_changed_is_drawn_without_them(store: FeatureStore, data: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(data, tmp_path / "data"))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(changed / "images" / "t000.png")
    told: list[Event] = []
    done = draw_preview(store, open_source(changed), tmp_path / "p.png", tiles=["t000", "t001"], on_event=told.append)
    assert [t["image"] for t in done["tiles"]] == [False, True]
    (warning,) = [e.text for e in told if isinstance(e, Warned)]
    assert "t000" in warning and "not those" in warning


def test_the_command_finds_the_dataset_that_the_store_was_built_from(
    store: FeatureStore, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = store.path
    register_store(out, data)  # as `cache build` does
    page, png = tmp_path / "p.html", tmp_path / "p.png"
    asked = ("--tiles", "t003,t001", "--array", "*/*o0/mean16", "--patch", "t001:10,20", "--json", "-q")
    assert rsmtdf("cache", "preview", out, "--html", page, "--out", png, *asked) == 0
    done = json.loads(capsys.readouterr().out)
    assert [(t["id"], t["image"]) for t in done["tiles"]] == [("t003", True), ("t001", True)]
    assert done["patch"] == {"tile": "t001", "y": 10.0, "x": 20.0} and done["data"] == str(data)
    assert {a["key"].rpartition("/")[2] for a in done["arrays"]} == {"mean16"}
    assert done["html_nbytes"] == page.stat().st_size and png.is_file()
    assert done["snapshot"] == store.snapshot
    assert rsmtdf("cache", "forget", out, "-q") == 0
    assert rsmtdf("cache", "preview", out, "--html", page, "--json") == 0
    told = capsys.readouterr()
    assert "features only" in told.err and json.loads(told.out)["png"] is None
    assert _Page(page.read_text()).text.count("no image") == len(json.loads(told.out)["tiles"])
    assert rsmtdf("cache", "preview", out, "--html", page, "--patch", "t001") == 2
    assert rsmtdf("cache", "preview", out, tmp_path / "nowhere", "--html", page) == 3


def test_a_snapshot_shows_what_it_holds(store: FeatureStore, data: Path, tmp_path: Path) -> None:
    place = f"{store.path}@{store.snapshot[:12]}"
    done = draw_preview(FeatureStore.open(place), open_source(data), tmp_path / "p.png", tiles=1)
    assert done["snapshot"] == store.snapshot and (tmp_path / "p.png").is_file()
