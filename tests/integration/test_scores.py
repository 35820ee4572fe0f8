"""What ``eval`` says beside the IoU, on a real small student: boundaries, calibration, groups, pictures, processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.scenes import SceneCell, write_domains, write_scenes
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.evaluate import evaluate, labelled_tiles
from rsmtdf_train.loop import train
from rsmtdf_train.processes import Processes
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.scoring.groups import By, group_tiles
from rsmtdf_train.scoring.tally import Measures
from tests.boundary import slow_boundary_f1
from tests.command_line import call, call_json
from tests.datasets import write_dataset, write_split

CPU = torch.device("cpu")
TEST = [f"t{i:03}" for i in range(6, 13)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student after 12 steps; 7 test tiles, 3 of them rural, from 3 scenes; a part of some labels is ignored."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("scores")
    data = write_dataset(root / "data", tiles=13, tile_px=64, splits={"train": range(6), "test": range(6, 13)})
    for name in TEST[::2]:
        mask = np.array(Image.open(data / "masks" / f"{name}.png"))
        mask[10:30, 20:50] = 255
        Image.fromarray(mask).save(data / "masks" / f"{name}.png")
    everything = [f"t{i:03}" for i in range(13)]
    write_domains(data, {t: "rural" if t in TEST[:3] else "urban" for t in everything})
    write_scenes(data, {t: SceneCell(f"scene{n % 3}", 0, 64 * n) for n, t in enumerate(everything)})
    recipe = Recipe.model_validate({
        "name": "tiny", "data": str(data), "steps": 12, "crop_px": 64, "labeled": "25", "method": "supervised",
        "batch": {"labeled": 4}, "optim": {"lr": 1e-2}, "distill": False, "fuse": False, "targets": "none",
        "student": {"encoder": "timm:test_vit", "decoder": "dpt", "channels": 8},
    })  # fmt: skip
    train(recipe, root / "run", device="cpu", tensorboard=False)
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    """What ``eval --json`` says of the EMA with everything asked for."""
    scores: dict[str, Any] = call_json("eval", root / "run", "--checkpoint", "ema", "--calibration")["scores"]["ema"]
    return scores


def outputs(root: Path) -> tuple[torch.Tensor, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return probabilities ``[7, C, 64, 64]`` and labels of the test tiles."""
    source = open_source(root / "data")
    tiles = source.tiles(["test"])
    model, _ = load_deployed(RunFolder(root / "run"), "ema", CPU)
    images = torch.from_numpy(np.stack([source.read_image(t) for t in tiles])).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        logits: torch.Tensor = model.predict(images)
    return logits.softmax(1), np.stack([source.read_mask(t) for t in tiles])


def test_boundaries_are_those_of_the_predicted_masks(root: Path, found: dict[str, Any]) -> None:
    p, labels = outputs(root)
    wanted = slow_boundary_f1(p.argmax(1).numpy(), labels, 3, 255, 3)
    assert [c["f1"] for c in found["boundary"]["classes"]] == pytest.approx(wanted)
    assert found["boundary"]["mf1"] == pytest.approx(np.mean([v for v in wanted if v is not None]))
    nearer = call_json("eval", root / "run", "--checkpoint", "ema", "--tolerance", "1")["scores"]["ema"]["boundary"]
    assert [c["f1"] for c in nearer["classes"]] == pytest.approx(
        slow_boundary_f1(p.argmax(1).numpy(), labels, 3, 255, 1)
    )
    assert nearer["mf1"] < found["boundary"]["mf1"]


def test_calibration_is_that_of_the_students_probabilities(root: Path, found: dict[str, Any]) -> None:
    p, labels = outputs(root)
    sure, predicted = (v.numpy()[labels != 255] for v in p.max(1))
    right = predicted == labels[labels != 255]
    bins = np.minimum((sure.astype(np.float64) * 15).astype(int), 14)
    parts = [(bins == b) for b in range(15) if (bins == b).any()]
    ece = sum(m.mean() * abs(right[m].mean() - sure[m].mean()) for m in parts)
    calibration = found["calibration"]
    assert calibration["ece"] == pytest.approx(ece, abs=1e-3)  # a pixel on the edge of a bin may fall on either side
    assert calibration["overconfidence"] == pytest.approx(sure.mean() - right.mean(), abs=1e-4)
    assert sum(calibration["reliability"]["pixels"]) == len(sure) == int(np.sum(found["confusion"]))


def test_groups_add_up_to_the_split_and_are_scored_as_splits_of_their_own(
    root: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    groups = {g["name"]: g for g in found["groups"]["groups"]}
    assert found["groups"]["by"] == "domain"
    assert {n: g["tiles"] for n, g in groups.items()} == {"rural": 3, "urban": 4}
    assert np.array_equal(sum(np.array(g["confusion"]) for g in groups.values()), found["confusion"])
    shutil.copytree(root / "data", tmp_path / "rural")
    write_split(tmp_path / "rural", "test", TEST[:3])
    alone = call_json("eval", root / "run", "--checkpoint", "ema", "--data", tmp_path / "rural")["scores"]["ema"]
    assert groups["rural"]["classes"] == alone["classes"] and groups["rural"]["miou"] == alone["miou"]


def test_scenes_and_tiles_come_with_the_fewest_right_pixels_first(root: Path, found: dict[str, Any]) -> None:
    for by, names in (("scene", {"scene0", "scene1", "scene2"}), ("tile", set(TEST))):
        groups = call_json("eval", root / "run", "--checkpoint", "ema", "--by", by)["scores"]["ema"]["groups"]
        right = [g["pixel_accuracy"] for g in groups["groups"]]
        assert groups["by"] == by and {g["name"] for g in groups["groups"]} == names
        assert right == sorted(right) and right[0] < right[-1]
        total = sum(np.array(g["confusion"]) for g in groups["groups"])
        assert np.array_equal(total, found["confusion"])


def test_without_groups_nothing_of_the_rest_changes(root: Path, found: dict[str, Any]) -> None:
    plain = call_json("eval", root / "run", "--checkpoint", "ema", "--by", "none")["scores"]["ema"]
    assert plain == {k: v for k, v in found.items() if k not in ("groups", "calibration")}


@pytest.mark.parametrize(
    ("spoil", "options", "text"),
    [
        ("line", [], "no line for tile 't008' (1 such tiles of 7)"),
        ("line", ["--by", "domain"], "(--by none)"),
        ("file", ["--by", "domain"], "has no domains.csv"),
        ("file", ["--by", "scene"], "has no scenes.csv"),
        ("twice", [], "stands twice"),
    ],
)
def test_groups_that_are_not_known_end_with_what_to_do(
    root: Path, tmp_path: Path, spoil: str, options: list[str], text: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(root / "data", data)
    lines = (data / "domains.csv").read_text().splitlines()
    if spoil == "line":
        (data / "domains.csv").write_text("\n".join(line for line in lines if not line.startswith("t008")))
    elif spoil == "twice":
        (data / "domains.csv").write_text("\n".join([*lines, lines[-1]]))
    else:
        (data / "domains.csv").unlink()
        (data / "scenes.csv").unlink()
    code, out, err = call("eval", root / "run", "--data", data, "--device", "cpu", *options)
    assert (code, out) == (3, "") and text in err
    if spoil != "file":
        assert call("eval", root / "run", "--data", data, "--device", "cpu", "--by", "none")[0] == 0


def test_out_has_pictures_and_every_number(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores"
    shown = call_json("eval", root / "run", "--out", out)
    assert sorted(p.name for p in out.iterdir()) == ["confusion.png", "reliability.png", "scores.json"]
    assert json.loads((out / "scores.json").read_text()) == shown
    assert "calibration" in shown["scores"]["student"]
    for name in ("confusion", "reliability"):
        with Image.open(out / f"{name}.png") as picture:
            pixels = np.array(picture.convert("RGB"))
            assert picture.format == "PNG" and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    again = call_json("eval", root / "run", "--out", out, "--checkpoint", "ema")
    assert json.loads((out / "scores.json").read_text()) == again != shown, "replaced"


def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_scored(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = call("eval", root / "run", "--out", out, "--device", "cpu")
        assert code == 2 and "is a file" in err and "evaluate on" not in err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_terminal_has_every_table(root: Path, found: dict[str, Any]) -> None:
    code, out, err = call("eval", root / "run", "--checkpoint", "ema", "-q", "--device", "cpu", "--calibration",
                          "--confusion")  # fmt: skip
    assert code == 0, err
    for number in (found["miou"], found["boundary"]["mf1"], found["calibration"]["ece"]):
        assert f"{100 * number:.2f}" in out
    for group in found["groups"]["groups"]:
        assert group["name"] in out and f"{100 * group['miou']:.2f}" in out
    matrix = out[out.index("confusion, ema") :]
    for n, row in enumerate(found["confusion"]):
        line = next(line for line in matrix.splitlines() if f"{n + 1} class{n} " in line)
        shares = [100 * v / sum(row) for v in row]
        cells = [cell.strip() for cell in line.split("│")[2:5]]
        assert cells == ["" if v == 0 else "·" if v < 0.5 else f"{v:.0f}" for v in shares]


def test_many_groups_are_a_list_with_the_worst_first(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(root / "data", data)
    write_split(data, "test", [f"t{i:03}" for i in range(13)])
    (data / "splits" / "train.txt").unlink()
    shutil.rmtree(data / "splits" / "labeled")  # labelled subsets are parts of train
    options = ("--data", data, "--checkpoint", "ema", "--by", "tile")
    groups = call_json("eval", root / "run", *options)["scores"]["ema"]["groups"]["groups"]
    _, out, _ = call("eval", root / "run", *options, "-q", "--device", "cpu")
    assert len(groups) == 13
    places = [out.index(f"│ {g['name']} ") for g in groups]
    assert places == sorted(places)
    worst = next(line for line in out.splitlines() if f"│ {groups[0]['name']} " in line)
    off = np.array(groups[0]["confusion"]) * (1 - np.eye(3, dtype=int))
    label, predicted = np.unravel_index(off.argmax(), off.shape)
    assert f"class{label} as class{predicted}" in worst


def _rank(rank: int, port: int, root: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    world = Processes.join("cpu")
    (root / f"rank{rank}.json").write_text(json.dumps(_scored(root, world)))
    world.leave()


def _scored(root: Path, world: Processes | None = None) -> dict[str, Any]:
    source = open_source(root / "data")
    model, _ = load_deployed(RunFolder(root / "run"), "ema", CPU)
    measures = Measures(2, True, group_tiles(source, labelled_tiles(source, "test"), By.SCENE))
    scores = evaluate({"ema": model}, source, "test", CPU, tiles_at_once=1, processes=world, measures=measures)
    return scores["ema"].to_json()


def test_two_processes_say_what_one_says(root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rsmtdf_train.evaluate", "rsmtdf_train.students.timm_encoder"])
    both = [context.Process(target=_rank, args=(rank, port, root)) for rank in range(2)]
    for process in both:
        process.start()
    alone = json.loads(json.dumps(_scored(root)))
    for process in both:
        process.join(200)
        assert process.exitcode == 0
    assert [json.loads((root / f"rank{n}.json").read_text()) for n in range(2)] == [alone, alone]
