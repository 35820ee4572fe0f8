"""``eval`` and ``predict`` on a real small run, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.sources import open_source
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.evaluate import evaluate
from rsmtdf_train.loop import train
from rsmtdf_train.predict import read_rgb
from rsmtdf_train.recipe import Recipe
from tests.command_line import call, call_json
from tests.datasets import write_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluate")
    write_dataset(root / "data", tiles=12, tile_px=64)
    recipe = Recipe.model_validate({
        "name": "tiny", "data": str(root / "data"), "steps": 12, "crop_px": 64, "labeled": "25", "method": "supervised",
        "batch": {"labeled": 4}, "optim": {"lr": 1e-2}, "distill": False, "fuse": False, "targets": "none",
        "student": {"encoder": "timm:mobilenetv3_small_050", "channels": 16},
    })  # fmt: skip
    train(recipe, root / "run", device="cpu", tensorboard=False)
    return root


def test_eval_repeats_the_scores_of_the_run_and_adds_the_boundaries(root: Path) -> None:
    found = call_json("eval", root / "run")
    bounds = [scores.pop("boundary") for scores in found["scores"].values()]
    assert found == json.loads((root / "run" / "metrics.json").read_text())
    assert [b["tolerance_px"] for b in bounds] == [3, 3]


def test_scores_are_those_of_the_predicted_masks(root: Path) -> None:
    source = open_source(root / "data")
    tiles = source.tiles(["test"])
    written = call_json("predict", root / "run", *[t.image for t in tiles], "--out", root / "p")
    labels = np.stack([source.read_mask(t) for t in tiles])
    masks = np.stack([np.array(Image.open(w["mask"])) for w in written])
    ious = [
        ((labels == c) & (masks == c)).sum() / ((labels == c) | (masks == c)).sum() for c in range(len(source.classes))
    ]
    scores = call_json("eval", root / "run", "--checkpoint", "ema")["scores"]
    assert list(scores) == ["ema"]
    assert [c["iou"] for c in scores["ema"]["classes"]] == pytest.approx(ious)
    assert scores["ema"]["pixel_accuracy"] == pytest.approx((labels == masks).mean())


def test_the_number_of_tiles_at_once_changes_no_score(root: Path) -> None:
    model, _ = load_deployed(RunFolder(root / "run"), "student", CPU)
    source = open_source(root / "data")
    one, many = (evaluate({"m": model}, source, "train", CPU, tiles_at_once=n)["m"] for n in (1, 5))
    assert one.miou == pytest.approx(many.miou, abs=1e-3)
    assert sum(c.pixels for c in one.classes) == sum(c.pixels for c in many.classes) == 8 * 64 * 64


def test_eval_without_a_class_adds_the_mean_of_the_others(root: Path) -> None:
    scores = call_json("eval", root / "run", "--without", "class1")["scores"]["student"]
    kept = [c["iou"] for c in scores["classes"] if c["name"] != "class1"]
    assert scores["miou_without"] == pytest.approx(sum(kept) / len(kept))
    assert scores["miou"] == pytest.approx(sum(c["iou"] for c in scores["classes"]) / 3)


def test_eval_prints_a_table_with_every_class_and_the_means(root: Path) -> None:
    code, out, err = call("eval", root / "run", "-q", "--device", "cpu", "--without", "class2")
    assert code == 0, err
    for text in ("class0", "class1", "class2", "mean", "mean IoU without class2: ema", "all pixels"):
        assert text in out
    scores = json.loads((root / "run" / "metrics.json").read_text())["scores"]
    assert f"{100 * scores['ema']['miou']:.2f}" in out and f"{100 * scores['student']['miou']:.2f}" in out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["eval", "absent"], 2, "not a run folder"),
        (["eval", "run", "--without", "clas1"], 2, "Did you mean 'class1'"),
        (["eval", "run", "--split", "tset"], 3, "tset"),
        (["eval", "run", "--device", "cuda:99"], 2, "--device cuda:99"),
        (["predict", "run", "absent.png"], 3, "there is no such file"),
        (["train", "absent.yaml"], 2, "absent.yaml"),
    ],
)
def test_what_cannot_be_done_ends_with_its_exit_code_and_says_why(
    root: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, text: str
) -> None:
    monkeypatch.chdir(root)
    found, _, err = call(*arguments)
    assert (found, text in err) == (code, True), err


def test_distilling_without_a_store_names_both_ways_out(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {root / 'data'}\nstudent: timm:mobilenetv3_small_050\n")
    code, _, err = call("train", recipe, "--out", tmp_path / "run")
    assert code == 2 and "--use-cache STORE" in err and "--no-distill" in err
    assert not (tmp_path / "run").exists()


def test_train_by_command_with_overrides_and_eval_on_another_split(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {root / 'data'}\nstudent: timm:mobilenetv3_small_050\n")
    sets = ["steps=2", "crop_px=64", "batch.labeled=2", "batch.unlabeled=2", "labeled=10", "eval_split=val", "seed=4"]
    found = call_json(
        "train", recipe, "--no-distill", "--out", tmp_path / "run", *[x for s in sets for x in ("--set", s)]
    )
    assert (found["split"], found["seed"], found["labeled"], found["store"]) == ("val", 4, "10", None)
    assert found["targets"] == {"mode": "none", "keys": []}


def test_an_unfinished_run_cannot_be_scored_and_says_how_to_finish(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(root / "run" / "recipe.yaml", tmp_path / "run")
    code, _, err = call("eval", tmp_path / "run")
    assert code == 2 and "not complete" in err


def test_classes_of_another_dataset_are_refused(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "four", tiles=6, tile_px=64, classes=4)
    code, _, err = call("eval", root / "run", "--data", tmp_path / "four", "--device", "cpu")
    assert code == 4 and "class3" in err


def test_predict_writes_palette_mask_and_overlay_of_the_images_own_size(root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (45, 71, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "scene.png")
    (written,) = call_json("predict", root / "run", tmp_path / "scene.png", "--out", tmp_path / "p")
    mask, overlay = Image.open(written["mask"]), Image.open(written["overlay"])
    assert mask.mode == "P" and mask.size == overlay.size == (71, 45)
    classes = open_source(root / "data").classes
    numbers = np.array(mask)
    colors = np.array([c.color for c in classes])
    assert (np.array(mask.convert("RGB")) == colors[numbers]).all()
    assert np.abs(np.array(overlay).astype(float) - (image / 2 + colors[numbers] / 2)).max() <= 0.5
    counts = np.bincount(numbers.ravel(), minlength=3) / numbers.size
    assert list(written["shares"].values()) == pytest.approx(counts)


def test_two_images_of_one_name_are_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / folder / "x.png")
    code, _, err = call("predict", root / "run", tmp_path / "a/x.png", tmp_path / "b/x.png", "--out", tmp_path / "p")
    assert code == 2 and "x_mask.png" in err and not (tmp_path / "p").exists()


def test_an_image_that_is_no_rgb_is_refused(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "alpha.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    for name in ("grey", "alpha", "deep"):
        with pytest.raises(DataError, match="expected 8-bit RGB"):
            read_rgb(tmp_path / f"{name}.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read_rgb(tmp_path / "cut.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="not an image"):
        read_rgb(tmp_path / "text.png")


def test_predict_writes_over_what_it_wrote_and_over_nothing_else(root: Path, tmp_path: Path) -> None:
    image = root / "data" / "images" / "t000.png"
    arguments = ["predict", root / "run", image, "--out", tmp_path, "--device", "cpu", "-q"]
    assert call(*arguments)[0] == 0
    first = (tmp_path / "t000_mask.png").read_bytes()
    assert call(*arguments)[0] == 0 and (tmp_path / "t000_mask.png").read_bytes() == first
    label = (root / "data" / "masks" / "t000.png").read_bytes()
    (tmp_path / "t000_mask.png").write_bytes(label)
    code, _, err = call(*arguments)
    assert code == 2 and "t000_mask.png is there and was not written by `rsmtdf predict`" in err
    assert (tmp_path / "t000_mask.png").read_bytes() == label


def test_predict_never_writes_over_an_image_it_was_given(root: Path, tmp_path: Path) -> None:
    for name in ("a", "a_mask"):
        shutil.copy(root / "data" / "images" / "t000.png", tmp_path / f"{name}.png")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, _, err = call(
        "predict", root / "run", *sorted(tmp_path.iterdir()), "--out", tmp_path, "--device", "cpu", "-q"
    )
    assert code == 2 and "is one of the images, and would be written over" in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_eval_refuses_a_dataset_at_fault_and_names_the_one_it_scored(root: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(root / "data", tmp_path / "data"))
    found = call_json("eval", root / "run", "--data", data, "--checkpoint", "student")
    assert found["data"] == str(data) and found["checkpoint"] == "student"
    assert found["miou"] == found["scores"]["student"]["miou"] is not None
    (held,) = open_source(data).split("test")[:1]
    (data / "masks" / f"{held}.png").unlink()
    code, _, err = call("eval", root / "run", "--data", data, "--device", "cpu")
    assert code == 3 and f"has no mask masks/{held}.png" in err


def test_masks_without_any_label_are_nothing_to_score(root: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(root / "data", tmp_path / "data"))
    for tile_id in open_source(data).split("test"):
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(data / "masks" / f"{tile_id}.png")
    code, _, err = call("eval", root / "run", "--data", data, "--device", "cpu")
    assert code == 3 and "hold no label at all" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(root: Path, tmp_path: Path, value: float) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    run = Path(shutil.copytree(root / "run", tmp_path / "run"))
    path = RunFolder(run).deployed("ema")
    with safe_open(path, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    name = next(n for n in tensors if n.endswith("weight"))
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, header)
    image = root / "data" / "images" / "t000.png"
    for words in (["eval", run], ["predict", run, image, "--out", tmp_path / "p"], ["export", run]):
        code, _, err = call(*words, *(["--device", "cpu"] if words[0] != "export" else []))
        assert code == 3 and f"not finite (NaN or infinity in {name})" in err, err


def test_best_weights_of_a_run_that_keeps_none_are_told_as_that(root: Path) -> None:
    code, _, err = call("eval", root / "run", "--checkpoint", "best", "--device", "cpu")
    assert code == 2 and "keeps no best weights" in err
