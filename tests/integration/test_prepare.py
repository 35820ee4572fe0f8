"""``rsmtdf data prepare`` end to end: benchmarks as distributed in, sound datasets out, or one error and nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from rsmtdf_cache.errors import DataError, Interrupted, MismatchError
from rsmtdf_cache.events import Event, Progress, ProgressStart, Warned
from rsmtdf_cache.prepare.cutting import Cut
from rsmtdf_cache.prepare.member import Limits
from rsmtdf_cache.prepare.plan import Request
from rsmtdf_cache.prepare.write import estimate, prepare
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.scenes import read_domains, read_scenes
from rsmtdf_cache.sources.survey import survey
from rsmtdf_cli.app import app
from tests.benchmarks import (
    as_tar,
    as_zip,
    scene_pixels,
    write_deepglobe,
    write_loveda,
    write_potsdam,
)

TILE = 16
WRITERS: dict[str, Callable[[Path], Path]] = {
    "loveda": write_loveda, "potsdam": write_potsdam, "deepglobe": write_deepglobe,
}  # fmt: skip
FIRST_IMAGE = {
    "loveda": "Train/Rural/images_png/0.png",
    "potsdam": "2_Ortho_RGB/top_potsdam_2_10_RGB.tif",
    "deepglobe": "train/100_sat.jpg",
}
FIRST_LABEL = {
    "loveda": "Train/Rural/masks_png/0.png",
    "potsdam": "5_Labels_all/top_potsdam_2_10_label.tif",
    "deepglobe": "train/100_mask.png",
}


def request(benchmark: str, source: Path, out: Path, **changes: object) -> Request:
    return replace(Request(benchmark, (source,), out, percents=("10", "50"), cut=Cut(TILE)), **changes)  # type: ignore[arg-type]


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def pairs(root: Path) -> list[tuple[str, Path | bytes]]:
    return [(p.relative_to(root).as_posix(), p) for p in sorted(root.rglob("*")) if p.is_file()]


def expected_scene(benchmark: str, scene: str, source: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and classes of a scene as the fixture drew them, not as the code under test reads them."""
    if benchmark == "loveda":
        part, domain, number = scene.split("_")
        image, labels = scene_pixels(f"{part.title()}{domain.title()}{number}", 40, 8)
        return image, np.where(labels == 0, 255, labels.astype(int) - 1).astype(np.uint8)
    if benchmark == "potsdam":
        image, labels = scene_pixels(scene, 50, 6)
        return image, np.where(labels == 5, 255, labels).astype(np.uint8)
    _, labels = scene_pixels(f"deepglobe{int(scene) - 100}", 44, 7)
    with Image.open(source / "train" / f"{scene}_sat.jpg") as jpeg:  # what a JPEG decodes to is its decoder's matter
        return np.array(jpeg), np.where(labels == 6, 255, labels).astype(np.uint8)


@pytest.mark.parametrize("overlap", [0, 5])
@pytest.mark.parametrize("benchmark", WRITERS)
def test_every_tile_holds_the_pixels_and_classes_of_its_place_in_its_scene(
    tmp_path: Path, benchmark: str, overlap: int
) -> None:
    src, out = WRITERS[benchmark](tmp_path / "src"), tmp_path / "out"
    prepared = prepare(request(benchmark, src, out, cut=Cut(TILE, overlap)))
    assert prepared.written
    source = open_source(out)
    source.check()
    cells = read_scenes(out)
    assert sorted(p.stem for p in (out / "images").iterdir()) == sorted(cells) == sorted(t.id for t in source.tiles())
    for tile in source.tiles():
        image, mask = expected_scene(benchmark, cells[tile.id].scene, src)
        rows = slice(cells[tile.id].row_px, cells[tile.id].row_px + TILE)
        columns = slice(cells[tile.id].column_px, cells[tile.id].column_px + TILE)
        piece = image[rows, columns]
        whole, classes = np.zeros((TILE, TILE, 3), np.uint8), np.full((TILE, TILE), 255, np.uint8)
        whole[: piece.shape[0], : piece.shape[1]] = piece
        classes[: piece.shape[0], : piece.shape[1]] = mask[rows, columns]
        np.testing.assert_array_equal(source.read_image(tile), whole)
        np.testing.assert_array_equal(source.read_mask(tile), classes)


def archived(benchmark: str, form: str, src: Path, root: Path) -> Path:
    """Pack the benchmark ``src`` as it may come: one archive a top folder side by side, or all in one, nested."""
    if form == "one tar.gz":
        return as_tar(pairs(src), root / f"{benchmark}.tar.gz")
    if form == "one zip":
        return as_zip(pairs(src), root / f"{benchmark}.zip")
    tops = sorted(p for p in src.iterdir())
    inner = {
        top.name: as_zip([(f"{top.name}/{n}", p) for n, p in pairs(top)], root / "side" / f"{top.name}.zip")
        for top in tops
    }
    if form == "zips side by side":
        return root / "side"
    return as_zip([(f"{name}.zip", path) for name, path in inner.items()], root / f"{benchmark}.zip", form == "packed")


@pytest.mark.parametrize("form", ["one zip", "one tar.gz", "zips side by side", "zips in a zip", "packed"])
@pytest.mark.parametrize("benchmark", WRITERS)
def test_the_dataset_is_the_same_from_a_folder_and_from_archives(tmp_path: Path, benchmark: str, form: str) -> None:
    src = WRITERS[benchmark](tmp_path / "src")
    packed = archived(benchmark, form, src, tmp_path / "packed")
    prepare(request(benchmark, src, tmp_path / "a"))
    prepare(request(benchmark, packed, tmp_path / "b", workers=3))
    one, two = files(tmp_path / "a"), files(tmp_path / "b")
    records = [json.loads(f.pop("prepare.json")) for f in (one, two)]
    for record in records:
        record["asked"].pop("sources")
    assert one == two
    assert records[0] == records[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "packed", "src"]


def test_loveda_as_published_has_its_four_tiles_its_domains_and_its_test_part_left_out(tmp_path: Path) -> None:
    src = write_loveda(tmp_path / "src", side=1024, scenes=1, test=1)
    events: list[Event] = []
    prepared = prepare(request("loveda", src, tmp_path / "out", cut=None), events.append)
    warnings = [e.text for e in events if isinstance(e, Warned)]
    assert warnings == ["2 scenes in Train, published are 2522", "2 scenes in Val, published are 1669"]
    assert any("Test is left out: 1 image" in note for note in prepared.plan.notes)
    places = {i: (c.row_px, c.column_px) for i, c in read_scenes(tmp_path / "out").items()}
    assert [places[f"train_rural_0_{k}"] for k in (1, 2, 3, 4)] == [(0, 0), (0, 512), (512, 0), (512, 512)]
    assert {i: i.split("_")[1] for i in places} == read_domains(tmp_path / "out")
    source = open_source(tmp_path / "out")
    assert (source.tile_px, source.name) == (512, "loveda-by-image-seed0")
    assert all(i.startswith("train_") for i in source.split("train"))
    assert sorted(source.split("val") + source.split("test")) == sorted(i for i in places if i.startswith("val_"))
    with pytest.raises(DataError, match="not as published: 2 scenes in Train"):
        prepare(request("loveda", src, tmp_path / "other", cut=None, strict=True))
    assert not (tmp_path / "other").exists()


def test_a_scene_of_another_side_is_refused_unless_a_cut_is_given(tmp_path: Path) -> None:
    src = write_loveda(tmp_path / "src")
    with pytest.raises(DataError, match=r"0\.png is 40 x 40 px, scenes of loveda are 1024 x 1024; give --tile"):
        prepare(request("loveda", src, tmp_path / "out", cut=None))
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_by_tile_and_by_image_are_told_apart_by_name_record_and_survey(tmp_path: Path) -> None:
    src = write_potsdam(tmp_path / "src")
    for protocol in ("by-image", "by-tile"):
        prepare(request("potsdam", src, tmp_path / protocol, protocol=protocol, seed=7))
        source = open_source(tmp_path / protocol)
        assert source.name == f"potsdam-{protocol}-seed7-16px-overlap0"
        record = json.loads((tmp_path / protocol / "prepare.json").read_text())
        assert (record["asked"]["protocol"], record["asked"]["seed"]) == (protocol, 7)
        assert record["tiles"] == {name: len(source.split(name)) for name in ("train", "val", "test")}
        assert record["labeled"] == {p: len(source.split(p)) for p in ("10", "50")}
        found = survey(source)
        assert bool(found.shared_scenes) == (protocol == "by-tile")
        assert found.duplicates == ()


def test_clutter_is_ignored_or_a_class(tmp_path: Path) -> None:
    src = write_potsdam(tmp_path / "src", scenes=3)
    prepare(request("potsdam", src, tmp_path / "out", keep_clutter=True, cut=Cut(50)))
    source = open_source(tmp_path / "out")
    source.check()
    assert [c.name for c in source.classes][5] == "clutter"
    for tile in source.tiles():
        np.testing.assert_array_equal(source.read_mask(tile), scene_pixels(tile.id.removesuffix("_1"), 50, 6)[1])


def test_published_lists_take_the_place_of_a_protocol(tmp_path: Path) -> None:
    src = write_deepglobe(tmp_path / "src")
    lists = tmp_path / "lists"
    (lists / "5%").mkdir(parents=True)
    (lists / "train.txt").write_text("images/100_sat_1.jpg masks/100_mask_1.png\n101_3\n")
    (lists / "val.txt").write_text("102_sat_9.png\n")
    (lists / "5%" / "labeled.txt").write_text("101_3\n")
    prepared = prepare(request("deepglobe", src, tmp_path / "out", lists=(lists,)))
    source = open_source(tmp_path / "out")
    source.check()
    assert {s: source.split(s) for s in source.split_names()} == {
        "train": ["100_1", "101_3"], "val": ["102_9"], "labeled/5": ["101_3"],
    }  # fmt: skip
    assert source.name.startswith("deepglobe-lists")
    assert sorted(p.stem for p in (tmp_path / "out" / "images").iterdir()) == ["100_1", "101_3", "102_9"]
    assert any("51 tiles are in no list" in note for note in prepared.plan.notes)


def test_other_products_beside_potsdam_are_not_opened(tmp_path: Path) -> None:
    src = write_potsdam(tmp_path / "src", scenes=3)
    (src / "1_DSM.zip").write_bytes(b"not even a zip")
    for name in ("5_Labels_all_noBoundary", "5_Labels_for_participants"):
        label = src / FIRST_LABEL["potsdam"]
        as_zip([(label.name, label)], src / f"{name}.zip")
    shutil.copytree(src / "2_Ortho_RGB", src / "3_Ortho_IRRG")
    prepare(request("potsdam", src, tmp_path / "out"))


def test_an_archive_left_beside_its_unpacked_files_is_not_read_twice(tmp_path: Path) -> None:
    src = write_potsdam(tmp_path / "src", scenes=3)
    as_zip([(f"2_Ortho_RGB/{n}", p) for n, p in pairs(src / "2_Ortho_RGB")], src / "2_Ortho_RGB.zip")
    prepared = prepare(request("potsdam", src, tmp_path / "out"))
    assert sum("is used" in note for note in prepared.plan.notes) == 3
    shutil.copytree(src / "2_Ortho_RGB", src / "copy" / "2_Ortho_RGB")
    with pytest.raises(DataError, match=r"stands twice: .*; give one of them alone"):
        prepare(request("potsdam", src, tmp_path / "other"))


def test_images_without_masks_in_their_folder_are_left_out(tmp_path: Path) -> None:
    src = write_deepglobe(tmp_path / "src", bare=2)
    prepared = prepare(request("deepglobe", src, tmp_path / "out"))
    assert prepared.plan.notes[0] == "2 images in folders without masks are left out"


# --- what is wrong


def reworked(path: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    with Image.open(path) as image:
        image.load()
        new = change(image)
    new.save(path)


def painted(path: Path, color: object) -> None:
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[7, 5] = color
    Image.fromarray(pixels).save(path)


STRANGER = {"loveda": 9, "potsdam": (10, 20, 30), "deepglobe": (200, 20, 30)}
SHOWN = {"loveda": "value 9", "potsdam": r"colour \(10, 20, 30\)", "deepglobe": r"colour \(255, 0, 0\)"}


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


Fault = Callable[[Path, str], object]
FAULTS: dict[str, tuple[Fault, str]] = {
    "unknown label": (lambda r, b: painted(r / FIRST_LABEL[b], STRANGER[b]), "SHOWN at row 7, column 5 is no label"),
    "label missing": (lambda r, b: (r / FIRST_LABEL[b]).unlink(), "image .* has no label file"),
    "image missing": (lambda r, b: (r / FIRST_IMAGE[b]).unlink(), "label file .* has no image"),
    "sizes differ": (
        lambda r, b: reworked(r / FIRST_LABEL[b], lambda i: i.crop((0, 0, 20, 30))),
        "is 20 x 30 px, its image .* px; they have to be the same",
    ),
    "1-bit label": (lambda r, b: reworked(r / FIRST_LABEL[b], lambda i: i.convert("1")), "found .*(1-bit|mode 1)"),
    "image cut short": (lambda r, b: cut_short(r / FIRST_IMAGE[b]), "truncated|damaged"),
    "label cut short": (lambda r, b: cut_short(r / FIRST_LABEL[b]), "truncated|damaged"),
    "image empty": (lambda r, b: (r / FIRST_IMAGE[b]).write_bytes(b""), "no PNG, JPEG or TIFF"),
    "image grey": (lambda r, b: reworked(r / FIRST_IMAGE[b], lambda i: i.convert("L")), "images are 8-bit RGB"),
    "nothing of it": (lambda r, b: emptied(r), "expected"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("benchmark", WRITERS)
def test_a_fault_is_one_error_that_names_the_file_and_leaves_nothing(
    tmp_path: Path, benchmark: str, fault: str
) -> None:
    src = WRITERS[benchmark](tmp_path / "src")
    damage, said = FAULTS[fault]
    damage(src, benchmark)
    with pytest.raises(DataError, match=said.replace("SHOWN", SHOWN[benchmark])) as caught:
        prepare(request(benchmark, src, tmp_path / "deep" / "out"))
    assert "\n" not in str(caught.value)
    assert fault == "nothing of it" or Path(FIRST_IMAGE[benchmark]).stem[:3] in str(caught.value)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("benchmark", WRITERS)
def test_unknown_labels_can_be_ignored_and_are_counted_then(tmp_path: Path, benchmark: str) -> None:
    src = WRITERS[benchmark](tmp_path / "src")
    painted(src / FIRST_LABEL[benchmark], STRANGER[benchmark])
    events: list[Event] = []
    prepared = prepare(request(benchmark, src, tmp_path / "out", unknown_labels="ignore"), events.append)
    assert prepared.unknown is not None
    assert list(prepared.unknown.values()) == [1]
    assert any(isinstance(e, Warned) and "1 pixels of 1 scenes had no known label" in e.text for e in events)
    (scene,) = prepared.unknown
    with Image.open(tmp_path / "out" / "masks" / f"{scene}_1.png") as mask:
        assert np.array(mask)[7, 5] == 255


def test_an_archive_that_is_cut_short_or_hostile_leaves_nothing(tmp_path: Path) -> None:
    src = write_potsdam(tmp_path / "src")
    whole = archived("potsdam", "packed", src, tmp_path / "packed")
    data = whole.read_bytes()
    for end in (0, 100, len(data) // 2, len(data) - 30):
        whole.write_bytes(data[:end])
        with pytest.raises(DataError, match=r"potsdam\.zip.*truncated"):
            prepare(request("potsdam", whole, tmp_path / "out"))
    whole.write_bytes(data)
    for limits in (Limits(archive_nbytes=500), Limits(member_nbytes=500)):
        with pytest.raises(DataError, match=r"more than 500|at most 500"):
            prepare(request("potsdam", whole, tmp_path / "out", limits=limits))
    slip = as_zip([*pairs(src), ("../../evil.png", b"x")], tmp_path / "packed" / "slip.zip")
    with pytest.raises(DataError, match="leads out of the archive"):
        prepare(request("potsdam", slip, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "src"]


# --- stopping, going on, not overwriting


def test_stopped_at_any_tile_it_leaves_nothing_and_begins_again(tmp_path: Path) -> None:
    src = write_deepglobe(tmp_path / "src")
    total = 0

    def stop_at(limit: int) -> Callable[[Event], None]:
        seen = 0

        def sink(event: Event) -> None:
            nonlocal seen, total
            if isinstance(event, ProgressStart):
                total = event.total
            seen += isinstance(event, Progress)
            if seen == limit:
                raise KeyboardInterrupt

        return sink

    for limit in (1, 20, 60):
        with pytest.raises(Interrupted, match="nothing is kept"):
            prepare(request("deepglobe", src, tmp_path / "out", workers=2), stop_at(limit))
        assert [p.name for p in tmp_path.iterdir()] == ["src"]
    assert prepare(request("deepglobe", src, tmp_path / "out")).written
    assert total == len(list((tmp_path / "out" / "images").iterdir()))


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    src = write_deepglobe(tmp_path / "src")
    left = [tmp_path / ".out.0123.partial", tmp_path / ".other.0123.partial", tmp_path / ".out.notes"]
    for folder in left:
        (folder / "images").mkdir(parents=True)
    prepare(request("deepglobe", src, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.0123.partial", ".out.notes", "out", "src"]


def test_a_dataset_that_is_there_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    src, out = write_deepglobe(tmp_path / "src"), tmp_path / "out"
    assert prepare(request("deepglobe", src, out)).written
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert not prepare(request("deepglobe", src, out)).written
    with pytest.raises(MismatchError, match=r"another preparation \(differs in seed, splits\)"):
        prepare(request("deepglobe", src, out, seed=1))
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(MismatchError, match="holds something else"):
        prepare(request("deepglobe", src, tmp_path / "mine"))
    with pytest.raises(MismatchError, match="is a file"):
        prepare(request("deepglobe", src, tmp_path / "mine" / "thesis.txt"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_an_estimate_writes_nothing_and_is_near(tmp_path: Path) -> None:
    src = write_deepglobe(tmp_path / "src")
    before = files(tmp_path)
    plan, nbytes = estimate(request("deepglobe", src, tmp_path / "deep" / "out"))
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
    prepared = prepare(request("deepglobe", src, tmp_path / "out"))
    assert prepared.plan.record == plan.record
    on_disk = sum(p.stat().st_size for folder in ("images", "masks") for p in (tmp_path / "out" / folder).iterdir())
    assert prepared.nbytes == on_disk
    assert 0.8 < nbytes / on_disk < 1.25


# --- the command


def test_the_command_says_what_it_did_and_the_survey_agrees(tmp_path: Path) -> None:
    src, out = write_loveda(tmp_path / "src", test=2), tmp_path / "out"
    words = ["data", "prepare", "loveda", str(src), "--out", str(out), "--tile", "16", "--labeled", "5,25"]
    dry = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.stderr
    assert not out.exists()
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    promised, made = json.loads(dry.stdout), json.loads(done.stdout)
    assert promised["tiles"] == made["tiles"]
    assert made["written"]
    info = json.loads(CliRunner().invoke(app, ["data", "info", str(out), "--json"]).stdout)
    assert {s: v["tiles"] for s, v in info["splits"].items()} == {
        **made["tiles"], **{f"labeled/{p}": n for p, n in made["labeled"].items()},
    }  # fmt: skip
    assert (info["faults"], info["duplicates"], info["shared_scenes"]) == ([], [], {})
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert "holds this preparation already" in again.stderr
    assert "Test is left out: 2 images" in again.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["lovedb"], 2, "Did you mean 'loveda'"),
        (["loveda", "--protocol", "by-magic"], 2, "there are by-image and by-tile"),
        (["loveda", "--labeled", "5,x"], 2, "labelled share 'x'"),
        (["loveda", "--tile", "16", "--overlap", "16"], 2, "cannot be cut"),
        (["loveda", "--tile", "0"], 2, "cannot be cut"),
        (["loveda", "--tile", "16", "--strict"], 2, "leave out --tile and --overlap, or --strict"),
        (["loveda", "--lists", "src", "--seed", "3"], 2, "leave out --protocol, --seed and --labeled"),
        (["loveda", "--unknown-labels", "no"], 2, "an error or ignored"),
        (["loveda", "--keep-clutter"], 2, "clutter is a class of Potsdam"),
        (["potsdam"], 3, "Potsdam: no scenes"),
    ],
)
def test_what_cannot_be_asked_ends_with_its_code_and_one_sentence(
    tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    src = write_loveda(tmp_path / "src", scenes=1)
    asked = ["data", "prepare", words[0], str(src), "--out", str(tmp_path / "out"), *words[1:]]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == code
    assert said in shown.stderr
    assert "Traceback" not in shown.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("benchmark", "folders", "old", "new"),
    [
        ("loveda", ["Train/Rural/images_png", "Train/Rural/masks_png"], "0.png", "a b.png"),
        ("loveda", ["Train/Rural/images_png"], "0.png", "ü.png"),
        ("deepglobe", ["train"], "100_", "a,b_"),
    ],
)
def test_no_scene_is_left_out_for_its_name(
    tmp_path: Path, benchmark: str, folders: list[str], old: str, new: str
) -> None:
    write = write_loveda if benchmark == "loveda" else write_deepglobe
    src = write(tmp_path / "src")
    renamed = [p for p in src.rglob("*") if p.name.startswith(old) and (benchmark != "loveda" or any(
        p.parent.as_posix().endswith(f) for f in folders))]  # fmt: skip
    assert renamed
    for path in renamed:
        path.rename(path.with_name(path.name.replace(old, new, 1)))
    with pytest.raises(DataError, match=r"tiles cannot be called '(a b|ü|a,b)'; rename image and label"):
        prepare(request(benchmark, src, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_files_that_look_like_scenes_of_potsdam_are_said_to_be_left_out(tmp_path: Path) -> None:
    src = write_potsdam(tmp_path / "src")
    shutil.copy(src / "2_Ortho_RGB/top_potsdam_2_10_RGB.tif", src / "2_Ortho_RGB/my scene_RGB.tif")
    notes = prepare(request("potsdam", src, tmp_path / "out")).plan.notes
    assert any("1 files are left out" in note and "my scene_RGB.tif" in note for note in notes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_5_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    src = write_deepglobe(tmp_path / "src", side=300, scenes=8)
    words = ["data", "prepare", "deepglobe", src, "--out", tmp_path / "out", "--tile", "8", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rsmtdf_cli", *map(str, words)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    while not list(tmp_path.glob(".out.*.partial/masks/*.png")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    stderr = process.communicate(timeout=250)[1]
    assert process.returncode == 5, stderr
    assert "nothing is kept" in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


# --- leakage


def test_equal_images_in_two_splits_are_listed_but_not_plain_ones(tmp_path: Path) -> None:
    src, out = write_deepglobe(tmp_path / "src"), tmp_path / "out"
    prepare(request("deepglobe", src, out))
    source = open_source(out)
    train, val, test = (source.split(name) for name in ("train", "val", "test"))
    shutil.copy(out / "images" / f"{train[0]}.png", out / "images" / f"{val[0]}.png")
    shutil.copy(out / "images" / f"{train[0]}.png", out / "images" / f"{train[1]}.png")  # in one split: no leak
    with Image.open(out / "images" / f"{train[0]}.png") as image:  # other bytes, the same pixels
        image.save(out / "images" / f"{test[3]}.png", compress_level=1)
    for tile_id in (train[4], test[4]):
        Image.new("RGB", (TILE, TILE), (3, 4, 5)).save(out / "images" / f"{tile_id}.png")
    found = survey(open_source(out))
    assert found.dataset_fault is None
    told = {(d.id, d.split, d.other_id, d.other_split) for d in found.duplicates}
    first = min(train[:2])
    assert told == {(first, "train", val[0], "val"), (first, "train", test[3], "test")}
    shown = CliRunner().invoke(app, ["data", "info", str(out)])
    assert shown.exit_code == 0
    assert "2 images are in two splits" in shown.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,scene,row\n", "no column column"),
        ("id,scene,row,column\na,s,0,x\n", "line 2: row and column have to be whole pixels"),
        ("id,scene,row,column\na,s,0,0\na,s,0,1\n", "line 3: id 'a' stands twice"),
        ("id,scene,row,column\na,,0,0\n", "line 2: a value is missing"),
    ],
)
def test_a_faulty_scene_table_is_a_fault_of_the_dataset(tmp_path: Path, text: str, said: str) -> None:
    prepare(request("deepglobe", write_deepglobe(tmp_path / "src"), tmp_path / "out"))
    (tmp_path / "out" / "scenes.csv").write_text(text)
    found = survey(open_source(tmp_path / "out"))
    assert found.dataset_fault is not None
    assert said in found.dataset_fault
    assert CliRunner().invoke(app, ["data", "info", str(tmp_path / "out")]).exit_code == 3


def test_the_tables_beside_a_dataset_are_plain_csv(tmp_path: Path) -> None:
    prepare(request("loveda", write_loveda(tmp_path / "src"), tmp_path / "out"))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "scenes.csv").read_text())))
    assert rows[0] == {"id": "train_rural_0_1", "scene": "train_rural_0", "row": "0", "column": "0"}
