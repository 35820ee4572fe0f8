"""Pictures: what is drawn has the right colours in the right places, and bad input is one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.preview import draw_pca, pca_colors
from rsmtdf_cache.sources.base import ClassInfo
from rsmtdf_train.pictures import PanelRow, colorize, draw_curves, draw_panel, read_log

CLASSES = (ClassInfo("water", (10, 20, 200)), ClassInfo("forest", (20, 120, 30)))


def test_a_mask_is_painted_in_the_class_colours_and_white_where_unlabelled() -> None:
    colors = colorize(np.array([[0, 1, 255]], np.uint8), CLASSES)
    assert colors.tolist() == [[[10, 20, 200], [20, 120, 30], [255, 255, 255]]]


def test_equal_tokens_get_equal_colours_in_all_tiles_and_different_ones_do_not() -> None:
    random = np.random.default_rng(0)
    kinds = random.integers(0, 3, (2, 4, 4))
    features = random.normal(size=(3, 16))[kinds].astype(np.float16)
    colors = pca_colors(features)
    assert colors.shape == (2, 4, 4, 3) and colors.dtype == np.uint8
    palette = [np.unique(colors[kinds == k], axis=0) for k in range(3)]
    assert [len(p) for p in palette] == [1, 1, 1]
    assert len({tuple(p[0]) for p in palette}) == 3


def test_tokens_without_value_are_grey_and_do_not_disturb_the_others() -> None:
    features = np.random.default_rng(1).normal(size=(1, 3, 3, 8)).astype(np.float32)
    whole = pca_colors(np.concatenate([features, features]))
    holed = pca_colors(np.concatenate([features, np.full_like(features, np.nan)]))
    assert (holed[1] == 128).all()
    assert holed[0].std() > 10
    assert whole.shape == holed.shape


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_few_channels_or_constant_features_still_give_a_picture(channels: int) -> None:
    assert pca_colors(np.ones((1, 2, 2, channels), np.float32)).shape == (1, 2, 2, 3)


def test_the_pca_picture_grows_with_tiles_and_arrays(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    images = random.integers(0, 255, (2, 16, 16, 3), np.uint8)
    array = random.normal(size=(2, 4, 4, 5))
    small = Image.open(draw_pca(tmp_path / "a.png", images[:1], {"t/s16o0/l": array[:1]}))
    large = Image.open(draw_pca(tmp_path / "b.png", images, {"t/s16o0/l": array, "t/s16o0/m": array}, ["x", "y"]))
    assert large.width > small.width and large.height > small.height


def test_a_picture_of_nothing_or_of_unequal_counts_is_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(UsageError, match="0 arrays"):
        draw_pca(tmp_path / "a.png", images, {})
    with pytest.raises(UsageError, match=r"expected features \[2, h, w, D\]"):
        draw_pca(tmp_path / "a.png", images, {"t/s/l": np.zeros((1, 2, 2, 3))})
    with pytest.raises(UsageError, match="without tiles"):
        draw_panel(tmp_path / "a.png", [], CLASSES)
    assert not list(tmp_path.iterdir())


def test_the_panel_shows_image_label_and_every_arm(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    row = PanelRow("t", np.full((8, 8, 3), (200, 100, 50), np.uint8), mask, {"a": mask, "b": np.ones_like(mask)})
    path = draw_panel(tmp_path / "deep" / "panel.png", [row], CLASSES, "title")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    share = {color: float((pixels == color).all(1).mean()) for color in ((200, 100, 50), (10, 20, 200), (20, 120, 30))}
    assert share[10, 20, 200] > 1.8 * share[200, 100, 50] > 0  # label and arm a against the image alone
    assert share[20, 120, 30] > 0.8 * share[200, 100, 50]


def test_rows_with_different_arms_are_refused(tmp_path: Path) -> None:
    mask = np.zeros((2, 2), np.uint8)
    image = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(UsageError, match="same arms"):
        draw_panel(
            tmp_path / "p.png", [PanelRow("1", image, mask, {"a": mask}), PanelRow("2", image, mask, {})], CLASSES
        )


def _log(path: Path, entries: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def test_a_log_is_read_by_step_and_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    entries: list[dict[str, object]] = [
        {"step": 0, "loss": 3.0, "loss_distill": None},
        {"step": 1, "loss": 9.0},
        {"step": 1, "loss": 2.0, "loss_distill": 0.5},
    ]
    log = read_log(_log(tmp_path / "log.jsonl", entries))
    assert log["step"].tolist() == [0, 1]
    assert log["loss"].tolist() == [3.0, 2.0]
    assert np.isnan(log["loss_distill"][0]) and log["loss_distill"][1] == 0.5


@pytest.mark.parametrize("text", ["", "not json\n", '{"loss": 1}\n', "[1]\n"])
def test_a_broken_log_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"log\.jsonl"):
        read_log(path)


def test_curves_are_drawn_for_arms_of_unequal_length_and_terms(tmp_path: Path) -> None:
    plain = _log(tmp_path / "a.jsonl", [{"step": i, "loss": 1.0, "loss_labeled": 1 / (i + 1)} for i in range(50)])
    rich: list[dict[str, object]] = [{"step": i, "loss_labeled": 1.0, "loss_distill": 1.0} for i in range(30)]
    both = _log(tmp_path / "b.jsonl", rich)
    one = Image.open(draw_curves(tmp_path / "one.png", {"supervised": [plain]}))
    two = Image.open(draw_curves(tmp_path / "two.png", {"supervised": [plain, plain], "cached": [both]}))
    assert two.width > one.width
    with pytest.raises(UsageError, match="without runs"):
        draw_curves(tmp_path / "none.png", {"supervised": []})
