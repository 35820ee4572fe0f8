"""A report on real runs: its pictures are what the networks say, its scores those of ``eval``."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsmtdf_cache.errors import MismatchError
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.sources import open_source
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.evaluate import evaluate
from rsmtdf_train.loop import train
from rsmtdf_train.predict import predict_mask
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.report import write_report
from tests.datasets import write_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("report")
    write_dataset(root / "data", tiles=12, tile_px=64)
    for method in ("supervised", "fixmatch"):
        recipe = Recipe.model_validate({
            "name": method, "data": str(root / "data"), "steps": 3, "crop_px": 64, "method": method, "targets": "none",
            "batch": {"labeled": 2, "unlabeled": 2}, "optim": {"lr": 1e-2}, "threshold": 0.4,
            "student": {"encoder": "timm:test_resnet", "channels": 8},
        })  # fmt: skip
        train(recipe, root / "runs" / method, device="cpu", tensorboard=False)
    return root


def test_the_pictures_hold_what_each_network_says_of_the_tiles(root: Path, tmp_path: Path) -> None:
    found = write_report([root / "runs"], tmp_path / "r.html", tiles=2, device="cpu")
    page = found.path.read_text()
    source = open_source(root / "data")
    tiles = {tile.id: tile for tile in source.tiles(["test"])}
    colors = np.array([c.color for c in source.classes])
    assert len(found.tiles) == 2 and set(found.tiles) <= set(tiles)
    for method in ("supervised", "fixmatch"):
        model, _ = load_deployed(RunFolder(root / "runs" / method), "ema", CPU)
        for tile in found.tiles:
            mask = predict_mask(model, source.read_image(tiles[tile]), CPU)
            (cell,) = re.findall(rf'<img alt="{method} on {tile}" src="data:image/png;base64,([^"]+)">([^<]*)', page)
            shown = np.array(Image.open(io.BytesIO(base64.b64decode(cell[0]))).convert("RGB"))
            assert (shown == colors[mask]).all()
            assert cell[1] == f"{(mask == source.read_mask(tiles[tile])).mean():.0%} of pixels right"


def test_the_numbers_are_those_of_the_runs_and_of_another_split_when_asked(root: Path, tmp_path: Path) -> None:
    test, val = (
        write_report([root / "runs"], tmp_path / "r.html", tiles=0, split=split, device="cpu").to_json()
        for split in (None, "val")
    )
    assert [a["name"] for a in test["arms"]] == ["fixmatch", "supervised"]
    assert test["baseline"] == "fixmatch" and (test["split"], val["split"]) == ("test", "val")
    for now, then in zip(test["arms"], val["arms"], strict=True):
        folder = root / "runs" / now["name"]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert now["miou"]["ema"]["mean"] == pytest.approx(metrics["scores"]["ema"]["miou"])
        model, _ = load_deployed(RunFolder(folder), "ema", CPU)
        scores = evaluate({"ema": model}, open_source(root / "data"), "val", CPU)["ema"]
        assert then["miou"]["ema"]["mean"] == pytest.approx(scores.miou)
        assert np.array(now["confusion"]).sum() == sum(c["pixels"] for c in metrics["scores"]["ema"]["classes"])


def test_weights_that_are_gone_cost_one_column_and_another_dataset_is_refused(root: Path, tmp_path: Path) -> None:
    weights = root / "runs" / "supervised" / "checkpoints" / "ema.safetensors"
    weights.rename(tmp_path / "away")
    events: list[Event] = []
    found = write_report([root / "runs"], tmp_path / "r.html", tiles=1, device="cpu", on_event=events.append)
    (tmp_path / "away").rename(weights)
    assert found.tiles and "fixmatch on" in found.path.read_text() and "supervised on" not in found.path.read_text()
    assert any(isinstance(e, Warned) and "supervised: no pictures" in e.text for e in events)
    write_dataset(tmp_path / "four", tiles=6, tile_px=64, classes=4)
    with pytest.raises(MismatchError, match="class3"):
        write_report([root / "runs"], tmp_path / "r.html", data=tmp_path / "four", device="cpu")
