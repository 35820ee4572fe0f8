"""``rsmtdf export``: what the file says of itself, what is refused; ``rsmtdf predict FILE.onnx``: the same maps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
import torch
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.events import Event, Progress
from rsmtdf_cache.files import sha256_file
from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.rasters.scene import open_scene
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.export.onnx_file import export_onnx
from rsmtdf_train.export.record import StudentRecord
from rsmtdf_train.export.runtime import OnnxSegmenter
from rsmtdf_train.scenes.map_scene import blended_rows
from rsmtdf_train.scenes.request import MapRequest, plan_map
from rsmtdf_train.scenes.segmenter import Segmenter, WindowSegmenter
from tests.command_line import call, call_json
from tests.scenes import CLASSES, blobs, save_run, write_scene

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def exported(*arguments: object) -> Any:
    code, out, err = call("export", *arguments, "--json", "-q")
    assert code == 0 and err == "", err
    return json.loads(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    save_run(root / "run")
    exported(root / "run", "--out", root / "student.onnx")
    return root


def student_probabilities(run: Path, pixels_3HW: NDArray[np.uint8]) -> NDArray[np.float32]:
    model, _ = load_deployed(RunFolder(run), "ema", CPU)
    with torch.inference_mode():
        found: NDArray[np.float32] = model.predict(torch.from_numpy(pixels_3HW)[None].float() / 255).softmax(1).numpy()
    first: NDArray[np.float32] = found[0]
    return first


def clear(probabilities: NDArray[np.float32], gap: float = 1e-3) -> NDArray[np.bool_]:
    """Return which pixels have a class whose lead no difference of 1e-4 can turn."""
    second, first = np.sort(probabilities, axis=0)[-2:]
    return np.asarray(first - second > gap)


def blended(segmenter: WindowSegmenter, path: Path, tta: bool, device: torch.device | None) -> NDArray[np.float32]:
    """Return the probabilities ``[C, H, W]`` of a scene that is done in one strip, as maps are made of them."""
    with gdal_settings(), open_scene(path) as scene:
        plan = plan_map(segmenter, MapRequest(path, path.with_name("m.tif")), scene)
        (strip,) = plan.grid.strips()
        rows = [p.copy() for p, _ in blended_rows(segmenter, scene, plan.grid, strip, 0, tta, device)]
    return np.concatenate(rows, axis=1)


def class_numbers(path: Path) -> NDArray[np.uint8]:
    with rasterio.open(path) as file:
        found: NDArray[np.uint8] = file.read(1)
        return found


def test_the_file_needs_nothing_but_a_runtime_and_says_all_that_a_user_has_to_know(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", seed=3)
    report = exported(run)
    file = Path(report["file"])
    assert file == run / "export" / "mobilenetv3_small_050-fpn-ema.onnx" and report["made"]
    assert (report["nbytes"], report["sha256"]) == (file.stat().st_size, sha256_file(file))
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert len(report["comparisons"]) == 5 and report["comparisons"][0]["height"] == 64
    assert report["largest_difference"] == max(c["difference"] for c in report["comparisons"]) <= 1e-4

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])  # no file beside it
    about = session.get_modelmeta().custom_metadata_map
    assert about == report["metadata"]
    assert json.loads(about["rsmtdf.classes"]) == [{"name": c.name, "color": list(c.color)} for c in CLASSES]
    assert about["rsmtdf.checkpoint_sha256"] == sha256_file(run / "checkpoints" / "ema.safetensors")
    plain = {"run": "tiny", "checkpoint": "ema", "window_px": "64", "multiple_px": "32", "ignore_index": "255"}
    assert {key: about[f"rsmtdf.{key}"] for key in plain} == plain
    model, identity = load_deployed(RunFolder(run), "ema", CPU)
    pixels = json.loads(about["rsmtdf.normalisation"])
    assert pixels["mean"] == pytest.approx(model.student.mean.flatten().tolist()) and pixels["inside"] is True
    assert StudentRecord.from_properties(about).to_properties() == about
    graph = onnx.load(file)
    assert [e.version for e in graph.opset_import if e.domain in ("", "ai.onnx")] == [18] and not graph.functions
    assert not [t for t in graph.graph.initializer if t.external_data]
    assert not [trace for trace in (b"site-packages", b".py", str(ROOT).encode()) if trace in file.read_bytes()]
    assert session.get_outputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]

    image = blobs(70, 101, seed=5)
    found = session.run(["probabilities"], {"image": image[None].astype(np.float32) / 255})[0]
    assert found.shape == (1, len(identity.classes), 70, 101)
    assert np.abs(found[0] - student_probabilities(run, image)).max() <= 1e-4
    assert np.abs(found.sum(1) - 1).max() < 1e-5


def test_the_keys_of_the_metadata_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    documented = set(re.findall(r"^\| `(rsmtdf\.\w+)` \|", page, flags=re.MULTILINE))
    record = StudentRecord("r", "s", "ema", "", "", CLASSES, 255, (0.5,), (0.2,), 64, 32, 1, None, False, "", "1", "t")
    assert documented == set(record.to_properties())


def test_the_same_export_again_changes_nothing_and_another_file_stays_unless_forced(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    first = exported(root / "run", "--out", out)
    again = exported(root / "run", "--out", out)
    assert (first["made"], again["made"]) == (True, False) and again["sha256"] == first["sha256"]
    before = out.read_bytes()
    code, _, err = call("export", root / "run", "--out", out, "--opset", "17", "-q")
    assert code == 2 and "another file is there" in err and "--force" in err and out.read_bytes() == before
    assert exported(root / "run", "--out", out, "--opset", "17", "--force")["opset"] == 17
    assert out.read_bytes() != before and [p.name for p in tmp_path.iterdir()] == ["s.onnx"]


@pytest.mark.parametrize(("words", "code", "text"), [
    (["nowhere"], 2, "not a run folder"),
    (["run", "--checkpoint", "student"], 2, "the run is not complete"),
    (["run", "--out", "s.pt"], 2, "ends in .onnx"),
    (["run", "--opset", "11"], 2, "give one of 17, 18, 19, 20"),
    (["run", "--fixed", "100"], 2, "multiples of 32 px; give 96"),
    (["relpos"], 2, "--fixed PX writes a file for one side"),
])  # fmt: skip
def test_what_cannot_be_exported_is_one_clear_error_and_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    if words[0] == "relpos":
        save_run(tmp_path / "relpos", crop_px=160, encoder="timm:test_vit_relpos")
    before = sorted(tmp_path.rglob("*"))
    found, out, err = call("export", *words, "-q")
    assert (found, text in err, err.count("error:"), out) == (code, True, 1, ""), err
    assert "Traceback" not in err and sorted(tmp_path.rglob("*")) == before


def test_without_the_packages_the_message_says_what_to_install(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what import finds when it is not there
    for words in (["export", root / "run", "--out", tmp_path / "s.onnx"], ["predict", root / "student.onnx", __file__]):
        code, _, err = call(*words, "-q")
        assert code == 6 and "pip install 'rsmtdf[export]'" in err
    assert list(tmp_path.iterdir()) == []


def test_stopped_while_it_compares_nothing_is_there(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    before = sorted(run.rglob("*"))

    def stop(event: Event) -> None:
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_onnx(run, on_event=stop)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("tta", [[], ["--tta"]], ids=["plain", "tta"])
def test_the_map_of_the_file_is_the_map_of_the_run(root: Path, tmp_path: Path, tta: list[str]) -> None:
    scene = write_scene(tmp_path / "scene.tif", blobs(150, 230, seed=7))
    model, identity = load_deployed(RunFolder(root / "run"), "ema", CPU)
    expected = blended(Segmenter(model, identity, ""), scene, bool(tta), CPU)
    found = blended(OnnxSegmenter(root / "student.onnx"), scene, bool(tta), None)
    assert np.abs(found - expected).max() <= 1e-4  # a mean of windows is no farther off than they are
    lead = clear(expected, gap=2e-4)
    assert (found.argmax(0) == expected.argmax(0))[lead].all() and lead.mean() > 0.99
    for name, student in (("run", root / "run"), ("onnx", root / "student.onnx")):
        (report,) = call_json("predict", student, scene, "--out", tmp_path / f"{name}.tif", *tta)
        assert report["made"] and report["crs"] == "EPSG:32633"
        assert (class_numbers(tmp_path / f"{name}.tif") == expected.argmax(0))[lead].all()
    assert len(np.unique(expected.argmax(0))) > 1
    with rasterio.open(tmp_path / "onnx.tif") as file:
        assert file.tags()["RSMTDF_RUN"] == "tiny" and file.tags()["RSMTDF_STUDENT"] == sha256_file(
            root / "student.onnx"
        )
        assert [file.colormap(1)[n][:3] for n in range(3)] == [c.color for c in CLASSES]
        assert file.tags()["RSMTDF_WINDOW"] == "64"


def test_an_image_of_any_size_gives_the_mask_of_the_run(root: Path, tmp_path: Path) -> None:
    pixels = blobs(75, 130, seed=8)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "i.png")
    (found,) = call_json("predict", root / "student.onnx", tmp_path / "i.png", "--out", tmp_path / "p")
    expected = student_probabilities(root / "run", pixels)
    mask = np.array(Image.open(found["mask"]))
    assert (mask == expected.argmax(0))[clear(expected)].all() and clear(expected).mean() > 0.9


def test_predicting_from_a_file_imports_no_torch(root: Path, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", blobs(70, 70))
    Image.fromarray(blobs(40, 50).transpose(1, 2, 0)).save(tmp_path / "i.png")
    script = (
        "import sys\nsys.modules['torch'] = None\n"
        "from rsmtdf_cli.app import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    words = ["predict", root / "student.onnx", scene, tmp_path / "i.png", "--out", tmp_path / "out", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert made == ["i_mask.png", "i_overlay.png", "scene_map.tif", "scene_map.tif.aux.xml"]


def test_a_file_for_one_side_is_used_in_windows_of_that_side(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", crop_px=160, encoder="timm:test_vit_relpos")
    report = exported(run, "--fixed", "160", "--out", tmp_path / "f.onnx")
    assert report["metadata"]["rsmtdf.fixed_px"] == "160"
    scene = write_scene(tmp_path / "scene.tif", blobs(100, 250))
    call_json("predict", tmp_path / "f.onnx", scene, "--out", tmp_path / "onnx.tif")
    # the first window shows rows 0 to 99 and what repeats the last; left of the second window it decides alone
    repeated = np.pad(blobs(100, 250)[:, :, :160], ((0, 0), (0, 60), (0, 0)), mode="edge")
    expected = student_probabilities(run, repeated)[:, :100, :90]
    found = class_numbers(tmp_path / "onnx.tif")[:, :90]
    assert (found == expected.argmax(0))[clear(expected)].all() and clear(expected).mean() > 0.9
    with rasterio.open(tmp_path / "onnx.tif") as file:
        assert file.shape == (100, 250) and file.tags()["RSMTDF_WINDOW"] == "160"
    code, _, err = call("predict", tmp_path / "f.onnx", scene, "--out", tmp_path / "m.tif", "--window", "320", "-q")
    assert code == 2 and "exported for 160 px alone" in err
    Image.fromarray(blobs(40, 50).transpose(1, 2, 0)).save(tmp_path / "i.png")
    code, _, err = call("predict", tmp_path / "f.onnx", tmp_path / "i.png", "--out", tmp_path / "p", "-q")
    assert code == 2 and "reads images of 160 x 160 px alone, found 50 x 40" in err


def _foreign(path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)


def _relabelled(path: Path, source: Path, **changes: str) -> None:
    graph = onnx.load(source)
    kept = {e.key: e.value for e in graph.metadata_props}
    onnx.helper.set_model_props(graph, kept | {f"rsmtdf.{key}": value for key, value in changes.items()})
    onnx.save(graph, path)


@pytest.mark.parametrize(("case", "code", "text"), [
    ("missing", 3, "there is no such file"),
    ("damaged", 3, "ONNX Runtime cannot read it"),
    ("foreign", 3, "not from `rsmtdf export`"),
    ("a class less", 3, "inputs, outputs and classes"),
    ("hostile colour", 3, "colours are numbers"),
    ("later format", 3, "use the version of rsmtdf that wrote it"),
    ("checkpoint", 2, "holds one student"),
    ("device", 2, "--device tpu"),
])  # fmt: skip
def test_a_file_that_is_no_student_is_refused(root: Path, tmp_path: Path, case: str, code: int, text: str) -> None:
    scene, file = write_scene(tmp_path / "s.tif", blobs(40, 50)), tmp_path / "m.onnx"
    good = root / "student.onnx"
    options = {"checkpoint": ["--checkpoint", "ema"], "device": ["--device", "tpu"]}.get(case, [])
    if case == "damaged":
        file.write_bytes(good.read_bytes()[:-20000])
    elif case == "foreign":
        _foreign(file)
    elif case == "a class less":
        _relabelled(file, good, classes='[{"name": "a", "color": [1, 2, 3]}]')
    elif case == "hostile colour":
        _relabelled(file, good, classes='[{"name": "a", "color": [1, 2, "x"]}]')
    elif case == "later format":
        _relabelled(file, good, format="2")
    elif options:
        file = good
    before = sorted(tmp_path.iterdir())
    found, out, err = call("predict", file, scene, "--out", tmp_path / "map.tif", *options, "-q")
    assert (found, text in err, out) == (code, True, ""), err
    assert "Traceback" not in err and sorted(tmp_path.iterdir()) == before


def test_the_example_of_the_page_makes_the_map_of_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), flags=re.DOTALL)
    assert len(example.splitlines()) <= 20 and "torch" not in example and "rsmtdf_" not in example
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.onnx").write_bytes((root / "student.onnx").read_bytes())
    write_scene(tmp_path / "scene.tif", blobs(128, 192, seed=6), photometric="rgb", interleave="pixel")
    exec(compile(example, "deploy.md", "exec"), {})  # what a reader would run
    words = ["--overlap", "0", "--out", tmp_path / "expected.tif", "--confidence", tmp_path / "c.tif"]
    call_json("predict", root / "run", tmp_path / "scene.tif", *words)
    with rasterio.open(tmp_path / "map.tif") as found, rasterio.open(tmp_path / "expected.tif") as expected:
        assert (found.crs, found.transform, found.shape) == (expected.crs, expected.transform, expected.shape)
        assert found.nodata == 255 and found.colormap(1)[1] == expected.colormap(1)[1]
        same = found.read(1) == expected.read(1)
    assert same.mean() > 0.999
