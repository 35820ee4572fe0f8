"""Cutting, labels, splits and lists of ``data prepare``: each as a rule over all inputs, and the published counts."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.prepare.benchmark import Scene
from rsmtdf_cache.prepare.cutting import Cut, cut_tile
from rsmtdf_cache.prepare.deepglobe import DEEPGLOBE
from rsmtdf_cache.prepare.labels import IGNORE, ColorLabels, Labels
from rsmtdf_cache.prepare.lists import read_lists
from rsmtdf_cache.prepare.loveda import LOVEDA
from rsmtdf_cache.prepare.member import Member
from rsmtdf_cache.prepare.pixels import image_side, read_colors, read_rgb, read_values
from rsmtdf_cache.prepare.plan import get_benchmark
from rsmtdf_cache.prepare.potsdam import POTSDAM, with_clutter
from rsmtdf_cache.prepare.splitting import Cell, deal, labeled_subsets, parse_percents, scenes_in_several
from rsmtdf_cache.rasters.png import decode_png, encode_png
from rsmtdf_cache.sources.landcover import RASTER_FOLDER
from tests.benchmarks import DEEPGLOBE_COLORS, POTSDAM_COLORS

NOWHERE = Member("x", "x", Path("x"), 0, 0, 0)


def cells_of(scenes: int, tiles: int, part: str = "", domain: str = "", prefix: str = "s") -> list[Cell]:
    found = []
    for number in range(scenes):
        name = f"{part}_{domain}_{number}" if part else f"{prefix}{number}"
        scene = Scene(name, NOWHERE, NOWHERE, (str(number), f"{name}_sat"), part, domain)
        found += [Cell(scene, k, 0, 0) for k in range(1, tiles + 1)]
    return found


def loveda_cells() -> list[Cell]:
    """Return the cells of the whole benchmark: its folders hold 1366 and 1156, 992 and 677 images."""
    sizes = {("train", "rural"): 1366, ("train", "urban"): 1156, ("val", "rural"): 992, ("val", "urban"): 677}
    return [cell for (part, domain), count in sizes.items() for cell in cells_of(count, 4, part, domain)]


# --- cutting


@given(
    height=st.integers(1, 70), width=st.integers(1, 70), tile=st.integers(1, 40), share=st.floats(0, 0.99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_tiles_cover_every_pixel_and_say_where_it_was(height: int, width: int, tile: int, share: float) -> None:
    cut = Cut(tile, int(share * tile))
    image = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3).astype(np.uint8)
    mask = (np.arange(height * width).reshape(height, width) % 7).astype(np.uint8)
    seen = np.zeros((height, width), bool)
    places = cut.places(height, width)
    for top, left in places:
        assert 0 <= top < height
        assert 0 <= left < width
        pixels, labels = cut_tile(image, mask, (top, left), tile)
        assert pixels.shape == (tile, tile, 3)
        rows, columns = min(tile, height - top), min(tile, width - left)
        np.testing.assert_array_equal(pixels[:rows, :columns], image[top : top + rows, left : left + columns])
        np.testing.assert_array_equal(labels[:rows, :columns], mask[top : top + rows, left : left + columns])
        outside = np.ones((tile, tile), bool)
        outside[:rows, :columns] = False
        assert (pixels[outside] == 0).all()
        assert (labels[outside] == IGNORE).all()
        seen[top : top + rows, left : left + columns] = True
    assert seen.all()
    assert places == sorted(places)


def test_the_published_cut_makes_the_published_numbers_of_tiles() -> None:
    for benchmark in (LOVEDA, POTSDAM, DEEPGLOBE):
        tiles = len(Cut().places(benchmark.side_px, benchmark.side_px))
        assert tiles * sum(benchmark.published.scenes.values()) == sum(benchmark.published.tiles.values())
    assert Cut().places(1024, 1024) == [(0, 0), (0, 512), (512, 0), (512, 512)]  # upper left, upper right, lower left


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (-1, 0), (8, 8), (8, -1)])
def test_cuts_that_cannot_be_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="cannot be cut"):
        Cut(tile, overlap)


# --- files


@given(
    npst.arrays(np.uint8, npst.array_shapes(min_dims=2, max_dims=2, max_side=20)),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_png_file_holds_the_pixels_it_was_made_of(pixels: NDArray[np.uint8], color: bool) -> None:
    if color:
        pixels = np.stack([pixels, pixels[::-1], pixels ^ 255], -1)
    np.testing.assert_array_equal(decode_png(encode_png(pixels)), pixels)


def test_a_photo_takes_little_more_bytes_than_pillow_makes_of_it() -> None:
    with Image.open(RASTER_FOLDER / "blue_marble_5400x2700.jpg") as photo:
        pixels = np.asarray(photo.crop((2400, 400, 2656, 656)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert len(encode_png(pixels)) < 1.2 * len(buffer.getvalue())


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RGB = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 9, 3), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_images_are_read_as_they_are(kind: str) -> None:
    data = file_of(RGB, kind)
    np.testing.assert_array_equal(read_rgb(data, "x"), np.asarray(RGB))
    assert image_side(io.BytesIO(data), "x") == (6, 9)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (file_of(RGB.convert("L")), "8-bit grey"),
        (file_of(RGB.convert("RGBA")), "with alpha"),
        (file_of(RGB.convert("P")), "palette"),
        (file_of(RGB.convert("1")), "1-bit grey"),
        (file_of(RGB.convert("CMYK"), "JPEG"), "mode CMYK"),
        (file_of(RGB.convert("RGBA"), "TIFF"), "mode RGBA"),
        (file_of(Image.new("I;16", (9, 6)), "TIFF"), "mode I;16"),
        (b"", "no PNG, JPEG or TIFF"),
        (b"GIF89a", "no PNG, JPEG or TIFF"),
        (file_of(RGB)[:80], "truncated"),
        (file_of(RGB, "JPEG")[:-90], "truncated or damaged|or damaged"),
        (file_of(RGB, "TIFF", compression="tiff_lzw")[:150], "or damaged"),
    ],
)
def test_images_of_another_kind_are_refused_by_name(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=rf"^scene\.x: .*({said})"):
        read_rgb(data, "scene.x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_an_image_that_declares_too_many_pixels_is_not_decoded(kind: str) -> None:
    data = file_of(RGB, kind)
    with pytest.raises(DataError, match="declares 9 x 6 px, more than 53 pixels; it was not decoded"):
        read_rgb(data, "x", max_pixels=53)
    assert read_rgb(data, "x", max_pixels=54).shape == (6, 9, 3)


def test_a_palette_is_indices_where_labels_are_values_and_colours_where_they_are_colours() -> None:
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 6
    image = Image.fromarray(indices, mode="P")
    image.putpalette([v for color in POTSDAM_COLORS for v in color])
    np.testing.assert_array_equal(read_values(file_of(image), "x"), indices)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(read_colors(file_of(image, kind), "x"), np.array(POTSDAM_COLORS)[indices])


@pytest.mark.parametrize("mode", ["1", "I;16", "RGB", "LA"])
def test_labels_of_another_kind_than_values_are_refused(mode: str) -> None:
    image = Image.new("I;16", (9, 6)) if mode == "I;16" else RGB.convert(mode)
    with pytest.raises(DataError, match=r"m\.png: found (1|8|16)-bit .*8-bit with one band"):
        read_values(file_of(image), "m.png")


@pytest.mark.parametrize("mode", ["1", "L", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_labels_without_colours_are_refused_where_colours_are_due(mode: str, kind: str) -> None:
    with pytest.raises(DataError, match="8-bit RGB colours, or a palette of them"):
        read_colors(file_of(RGB.convert(mode), kind), "m")


# --- labels


def test_values_and_colours_become_the_classes_of_the_published_tables() -> None:
    value_names = ["background", "building", "road", "water", "barren", "forest", "agriculture"]
    stored = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.uint8)
    mask, _ = LOVEDA.labels.convert(stored, "x")
    assert [LOVEDA.classes[i].name if i != IGNORE else "" for i in mask.ravel()] == ["", *value_names]
    color_names = ["impervious", "building", "low_vegetation", "tree", "car", ""]
    for benchmark, names in ((POTSDAM, color_names), (with_clutter(), [*color_names[:5], "clutter"])):
        mask, _ = benchmark.labels.convert(np.array([POTSDAM_COLORS], np.uint8), "x")
        assert [benchmark.classes[i].name if i != IGNORE else "" for i in mask.ravel()] == names
    mask, _ = DEEPGLOBE.labels.convert(np.array([DEEPGLOBE_COLORS], np.uint8), "x")
    found = [DEEPGLOBE.classes[i].name if i != IGNORE else "" for i in mask.ravel()]
    assert found == ["urban", "agriculture", "rangeland", "forest", "water", "barren", ""]


@pytest.mark.parametrize(
    ("labels", "pixels", "stranger", "said"),
    [
        (LOVEDA.labels, np.ones((1030, 7), np.uint8), 8, "value 8 at row 1025, column 3"),
        (POTSDAM.labels, np.full((1030, 7, 3), 255, np.uint8), (255, 0, 254), r"colour \(255, 0, 254\) at row 1025, c"),
        (DEEPGLOBE.labels, np.zeros((1030, 7, 3), np.uint8), (128, 127, 0), r"colour \(255, 0, 0\) at row 1025, c"),
    ],
)
def test_an_unknown_label_is_named_with_file_and_pixel_or_ignored_and_counted(
    labels: Labels, pixels: NDArray[np.uint8], stranger: Any, said: str
) -> None:
    pixels[1025, 3] = pixels[1029, 0] = stranger
    with pytest.raises(DataError, match=rf"^mask\.png: {said}.* known: "):
        labels.convert(pixels, "mask.png")
    mask, count = labels.convert(pixels, "mask.png", unknown="ignore")
    assert count == 2
    assert mask[1025, 3] == mask[1029, 0] == IGNORE


@given(npst.arrays(np.uint8, (5, 6, 3)))
@settings(max_examples=80, deadline=None)
def test_colours_count_as_full_or_empty_from_128_on(pixels: NDArray[np.uint8]) -> None:
    mask, strangers = DEEPGLOBE.labels.convert(pixels, "x", unknown="ignore")
    reds = 0
    for row, column in np.ndindex(mask.shape):
        color = tuple(255 if int(v) >= 128 else 0 for v in pixels[row, column])
        reds += color == (255, 0, 0)
        known = [*DEEPGLOBE_COLORS[:6]]
        assert mask[row, column] == (known.index(color) if color in known else IGNORE)
    assert strangers == reds


def test_without_a_threshold_a_colour_is_met_exactly() -> None:
    labels = ColorLabels({(10, 20, 30): 0, (30, 20, 10): 1})
    pixels = np.array([[(10, 20, 30), (30, 20, 10), (10, 20, 31)]], np.uint8)
    mask, strangers = labels.convert(pixels, "x", unknown="ignore")
    assert (mask.tolist(), strangers) == ([[0, 1, IGNORE]], 1)


# --- splits


def whole(name: str) -> list[Cell]:
    if name == "loveda":
        return loveda_cells()
    return cells_of(*{"potsdam": (38, 144), "deepglobe": (803, 25)}[name])


@pytest.mark.parametrize("name", ["loveda", "potsdam", "deepglobe"])
def test_by_tile_makes_the_published_counts(name: str) -> None:
    benchmark = get_benchmark(name)
    splits = deal(whole(name), "by-tile", 3, name, benchmark.official_val)
    assert {split: len(cells) for split, cells in splits.items()} == benchmark.published.tiles
    labeled = labeled_subsets(splits["train"], ["1", "5", "10"], 3, name)
    assert {percent: len(ids) for percent, ids in labeled.items()} == benchmark.published.labeled
    assert scenes_in_several(splits) > 0


@pytest.mark.parametrize("name", ["loveda", "potsdam", "deepglobe"])
def test_by_image_keeps_every_scene_in_one_split(name: str) -> None:
    cells = whole(name)
    splits = deal(cells, "by-image", 0, name, get_benchmark(name).official_val)
    assert sorted(c.id for part in splits.values() for c in part) == sorted(c.id for c in cells)
    assert scenes_in_several(splits) == 0
    shares = [len(part) / len(cells) for part in splits.values()]
    assert all(share > 0.1 for share in shares)
    if name == "loveda":
        assert {c.scene.part for c in splits["train"]} == {"train"}
        assert {c.scene.part for c in splits["val"] + splits["test"]} == {"val"}


@pytest.mark.parametrize("protocol", ["by-image", "by-tile"])
def test_splits_depend_on_the_seed_and_on_nothing_else(protocol: str) -> None:
    cells = cells_of(10, 5)

    def ids(seed: int, given: list[Cell]) -> dict[str, set[str]]:
        return {name: {c.id for c in part} for name, part in deal(given, protocol, seed, "x", False).items()}

    assert ids(0, cells) == ids(0, cells[::-1])
    assert len({str(sorted(ids(seed, cells)["test"])) for seed in range(5)}) > 1


@given(scenes=st.integers(3, 40), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_no_split_is_ever_empty(scenes: int, seed: int) -> None:
    splits = deal(cells_of(scenes, 2), "by-image", seed, "x", False)
    assert all(splits.values())
    assert sum(map(len, splits.values())) == 2 * scenes


@pytest.mark.parametrize(("cells", "official"), [(cells_of(2, 9), False), (cells_of(1, 9, "val"), True)])
def test_too_few_scenes_for_three_splits_are_an_error(cells: list[Cell], official: bool) -> None:
    with pytest.raises(DataError, match="at least"):
        deal(cells, "by-image", 0, "x", official)


def test_labelled_subsets_are_nested_and_take_the_same_share_of_every_domain() -> None:
    train = [c for c in loveda_cells() if c.scene.part == "train"]
    domain = {c.id: c.scene.domain for c in train}
    percents = ["0.5", "1", "5", "10", "25", "100"]
    subsets = labeled_subsets(train, percents, 0, "loveda")
    for smaller, larger in pairwise(percents):
        assert subsets[larger][: len(subsets[smaller])] == subsets[smaller]
        assert len(subsets[larger]) == len(set(subsets[larger]))
    for percent in percents:
        for name, total in (("rural", 5464), ("urban", 4624)):
            count = sum(domain[i] == name for i in subsets[percent])
            assert 0 <= total * float(percent) / 100 - count < 1
    assert labeled_subsets(train[::-1], percents, 0, "loveda") == subsets
    assert set(labeled_subsets(train, ["1"], 1, "loveda")["1"]) != set(subsets["1"])
    assert len(labeled_subsets(train[:6], ["1"], 0, "x")["1"]) == 1


def test_shares_are_read_in_any_order_and_form() -> None:
    assert parse_percents("10, 1%,0.50,5.0,1") == ["0.5", "1", "5", "10"]
    for text in ("0", "101", "x", "-1", "1/2", "nan"):
        with pytest.raises(UsageError, match="expected percent above 0"):
            parse_percents(text)


def test_an_unknown_benchmark_is_met_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'potsdam'"):
        get_benchmark("potsdm")
    with pytest.raises(UsageError, match="clutter"):
        get_benchmark("loveda", keep_clutter=True)


# --- published lists


def write(root: Path, **lists: str) -> Path:
    for name, text in lists.items():
        path = root / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_lists_are_read_in_all_their_forms(tmp_path: Path) -> None:
    root = write(
        tmp_path / "lists",
        train="0_1.png\ntrain/urban/0_2.png\n",
        val="images/0_3.png masks/0_3.png\n\n",
        test="val_rural_0_4\n",
        labeled_1="train_rural_0_1\n",
    )
    (root / "5%").mkdir()
    (root / "5%" / "labeled.txt").write_text("Train/Rural/images_png/0_1.png, Train/Rural/masks_png/0_1.png\n")
    with pytest.raises(DataError, match=r"train\.txt, line 1: '0_1\.png' may be .*train_rural_0_1 or train_urban_0_1"):
        read_lists([root], loveda_cells())
    write(root, train="Train/Rural/images_png/0_1.png\ntrain/urban/0_2.png\n", val="Val/Urban/images_png/0_3.png\n")
    lists = read_lists([root], loveda_cells())
    assert {name: [c.id for c in cells] for name, cells in lists.splits.items()} == {
        "train": ["train_rural_0_1", "train_urban_0_2"],
        "val": ["val_urban_0_3"],
        "test": ["val_rural_0_4"],
    }
    assert lists.labeled == {"1": ["train_rural_0_1"], "5": ["train_rural_0_1"]}


def test_a_bare_name_is_enough_where_it_is_unique(tmp_path: Path) -> None:
    root = write(tmp_path, train="s1_2\n1_3.png\nimages/s1_sat_4.jpg masks/s1_sat_4.png\n")
    lists = read_lists([root / "train.txt"], cells_of(3, 5))
    assert [c.id for c in lists.splits["train"]] == ["s1_2", "s1_3", "s1_4"]


def test_train_is_what_labelled_and_unlabelled_lists_name(tmp_path: Path) -> None:
    write(tmp_path, **{"1__labeled": "s0_1", "1__unlabeled": "s0_2\ns0_3", "10__labeled": "s0_2\ns0_1"})
    write(tmp_path, **{"10__unlabeled": "s0_3", "1__val": "s1_1", "10__val": "s1_1"})
    lists = read_lists([tmp_path], cells_of(3, 5))
    assert {c.id for c in lists.splits["train"]} == {"s0_1", "s0_2", "s0_3"}
    assert lists.labeled == {"1": ["s0_1"], "10": ["s0_2", "s0_1"]}
    assert "test" not in lists.splits


FAULTY_LISTS: dict[str, tuple[dict[str, str], str]] = {
    "unknown": ({"train": "s0_1\ns0_9"}, r"train\.txt, line 2: 's0_9' is no tile of this preparation\. Did you mean"),
    "zero-based": ({"train": "s0_0"}, "line 1: 's0_0' is no tile"),
    "twice": ({"train": "s0_1\n0_1"}, r"line 2: tile 's0_1' stands twice"),
    "two splits": ({"train": "s0_1", "val": "s0_1"}, "'s0_1' in train and in val"),
    "not a pair": ({"train": "s0_1 s0_2"}, "not image and mask of one tile"),
    "labelled elsewhere": ({"train": "s0_1", "labeled_5": "s0_2"}, "labelled list 5: tile 's0_2' is not in train"),
    "empty": ({"train": "\n \n"}, "it is empty"),
    "no train": ({"val": "s0_1"}, "name no tile of train"),
    "differ": ({"a__val": "s0_1", "b__val": "s0_2", "train": "s0_3"}, "both say val and differ"),
}


@pytest.mark.parametrize("fault", FAULTY_LISTS)
def test_a_faulty_list_is_named(tmp_path: Path, fault: str) -> None:
    lists, said = FAULTY_LISTS[fault]
    with pytest.raises(DataError, match=said):
        read_lists([write(tmp_path, **lists)], cells_of(2, 4))


def test_a_list_whose_name_says_no_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trian\.txt: its name says no split"):
        read_lists([write(tmp_path, trian="s0_1")], cells_of(2, 4))
    with pytest.raises(DataError, match="no such file or folder"):
        read_lists([tmp_path / "nowhere"], cells_of(2, 4))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"no \.txt file in it"):
        read_lists([tmp_path / "bare"], cells_of(2, 4))
