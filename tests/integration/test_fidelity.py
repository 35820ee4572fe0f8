"""``cache fidelity``: 1 where reading is as good as the teacher, less where it is not, and planted faults show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rsmtdf_cache.build import build_store
from rsmtdf_cache.calibrate import sample_rows
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import Event, Progress, ProgressStart, Warned
from rsmtdf_cache.fidelity import FidelityReport, measure_fidelity, summary
from rsmtdf_cache.fidelity.boxes import cutmix_tokens
from rsmtdf_cache.fidelity.questions import CASES
from rsmtdf_cache.fidelity.report import Row
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.catalogue import register_store
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cli.app import app
from rsmtdf_train.augment import cutmix_targets
from rsmtdf_train.sample import Targets
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher, load_mean_teacher

TEACHER = "timm:test_resnet,pretrained=none,layers=stage2+stage3"
CONTROLS = {"other-tile", "mean-vector"}

pytestmark = pytest.mark.usefixtures("one_thread")


def rsmtdf(*args: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        app([str(a) for a in args], prog_name="rsmtdf")
    return int(end.value.code or 0)


class PlaceTeacher(MeanTeacher):
    """The same, but what a token says depends on where in the view it stands, as with a position embedding."""

    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        maps = super().encode(tiles_BHW3, size_px, layers, precision)
        for values in maps.values():
            values += 90 * torch.linspace(0, 1, values.shape[1])[None, :, None, None] * torch.tensor([1.0, -1.0, 0.5])
        return maps


class ShiftedTeacher(MeanTeacher):
    """Says what the other one says, a token further right: a library whose padding changed."""

    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        return {k: v.roll(1, 2) for k, v in super().encode(tiles_BHW3, size_px, layers, precision).items()}


def load_place(request: TeacherRequest, device: str = "cpu") -> Teacher:
    return PlaceTeacher(request.name)


def load_shifted(request: TeacherRequest, device: str = "cpu") -> Teacher:
    return ShiftedTeacher(request.name, f"{request.seed:064d}")


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles whose colours change linearly, each in a direction of its own: interpolating them is no approximation."""
    data = write_dataset(tmp_path_factory.mktemp("fidelity") / "data", tiles=9, tile_px=64)
    y, x = np.mgrid[0:64, 0:64]
    for index in range(9):
        a, b = index % 3, 2 - index // 3
        channels = (20 + a * y + b * x, 230 - b * y - a * x // 2 * 2, 30 + 15 * index + y)
        tile = np.stack(channels, -1).clip(0, 255).astype(np.uint8)
        Image.fromarray(tile).save(data / "images" / f"t{index:03}.png")
    return data


@pytest.fixture(scope="module")
def store(ramps: Path) -> FeatureStore:
    out = ramps.parent / "store"
    request = BuildRequest.of({
        "data": ramps, "out": out, "teachers": ["mean"], "orientations": 2, "fixed_views": 2, "micro_batch": 4,
    })  # fmt: skip
    build_store(request, load_teacher=load_mean_teacher)
    return FeatureStore.open(out)


@pytest.fixture(scope="module")
def report(store: FeatureStore, ramps: Path) -> FidelityReport:
    return measure_fidelity([store], open_source(ramps), 6, load_teacher=load_mean_teacher)


def rows_of(report: FidelityReport, *cases: str) -> list[Row]:
    found = [row for row in report.rows if row.case in cases]
    assert found, f"no row of {cases}"
    return found


def test_a_local_teacher_on_ramps_is_read_as_well_as_it_is_asked(report: FidelityReport) -> None:
    assert {row.case for row in report.rows} == set(CASES) and not report.skipped
    exact = ("identity", "codec-alone", "orientation-stored", "orientation-turned", "crop-aligned", "crop-shifted",
             "cutmix", "fixed-stored")  # fmt: skip
    for row in rows_of(report, *exact):
        found = row.agreement
        assert found.standardised > 0.9999 and found.standardised_worst > 0.999, row
        assert found.error is not None and found.error < 0.01, row
        assert found.cka is not None and found.cka > 0.9999, row
    for row in rows_of(report, "crop-resized", "scale"):  # a coarser triangle loses its outer half at the border
        assert row.agreement.standardised > 0.95 and (row.agreement.cka or 0) > 0.9, row


def test_controls_are_far_from_it(report: FidelityReport) -> None:
    assert all(row.agreement.standardised < 0.7 for row in rows_of(report, "other-tile"))
    assert all(abs(row.agreement.standardised) < 1e-6 for row in rows_of(report, "mean-vector"))


def test_rows_say_which_tokens_were_stored_ones(report: FidelityReport) -> None:
    for row in report.rows:
        stored = row.case in ("identity", "orientation-stored", "crop-aligned", "cutmix", "fixed-stored", "other-tile")
        assert row.exact is (None if row.case in ("codec-alone", "mean-vector") else stored), row
        assert row.tiles == 6
    turned = [r.orientation for r in rows_of(report, "orientation-turned") if r.array == "mean/s64/mean8"]
    assert turned == list(range(1, 8))
    assert {r.orientation for r in rows_of(report, "orientation-stored")} == {4}
    assert {(r.array, r.source) for r in rows_of(report, "scale")} >= {("mean/s64/mean8", "s32")}


def test_crops_are_split_in_interior_and_edge(report: FidelityReport) -> None:
    aligned = next(r for r in rows_of(report, "crop-aligned") if r.array == "mean/s64/mean8").agreement
    assert aligned.interior is not None and aligned.edge is not None
    assert (aligned.interior.tokens, aligned.edge.tokens) == (6 * 4, 6 * 12)  # 4 x 4 tokens in a crop of half the tile
    assert all(r.agreement.interior is None for r in rows_of(report, "identity", "scale"))


def test_a_teacher_that_knows_places_is_not_read_as_well(store: FeatureStore, ramps: Path, tmp_path: Path) -> None:
    request = BuildRequest(data=ramps, out=tmp_path / "s", teachers=("mean",), scales=(1.0,), orientations=8)
    build_store(request, load_teacher=load_place)
    told: list[Event] = []
    found = measure_fidelity(
        [FeatureStore.open(tmp_path / "s")], open_source(ramps), 6, load_teacher=load_place, on_event=told.append
    )
    assert not [e for e in told if isinstance(e, Warned)]
    for row in rows_of(found, "identity", "orientation-stored"):
        assert row.agreement.standardised > 0.9999
    for row in rows_of(found, "crop-aligned", "crop-shifted", "crop-resized"):  # a resized one is nearly the tile
        assert row.agreement.standardised < (0.995 if row.case == "crop-resized" else 0.95), row
    for row in rows_of(found, "orientation-turned"):  # a mirror keeps the rows where they are
        assert (row.agreement.standardised > 0.9999) is (row.orientation == 4), row
    told_images = sum(e.advance for e in told if isinstance(e, Progress))
    assert told_images == sum(e.total for e in told if isinstance(e, ProgressStart)) == 6 * 12


def test_maps_stored_in_a_wrong_frame_are_seen(store: FeatureStore, ramps: Path, tmp_path: Path) -> None:
    """The shards of two orientations are exchanged: intact files, valid records, and wrong features."""
    broken = Path(shutil.copytree(store.path, tmp_path / "s"))
    for layer in ("mean8", "mean16"):
        a, b = (next((broken / "zarr" / "mean" / f"s64o{o}" / layer).rglob("c/0/*/*/*")) for o in (0, 4))
        one, other = a.read_bytes(), b.read_bytes()
        a.write_bytes(other)
        b.write_bytes(one)
    told: list[Event] = []
    opened = FeatureStore.open(broken, verify_reads="never")
    found = measure_fidelity([opened], open_source(ramps), 6, load_teacher=load_mean_teacher, on_event=told.append)
    hit = [r for r in rows_of(found, "identity", "orientation-stored", "crop-aligned", "cutmix") if "/s64/" in r.array]
    assert len(hit) == 2 * 4 and all(r.agreement.standardised < 0.9 for r in hit)
    assert all(r.agreement.standardised > 0.9999 for r in rows_of(found, "identity") if "/s32/" in r.array)
    warned = [e.text for e in told if isinstance(e, Warned)]
    assert len(warned) == 4 and all("mean/s64/" in w and "verify" in w for w in warned)


def test_a_teacher_that_moved_by_a_token_is_seen(store: FeatureStore, ramps: Path) -> None:
    told: list[Event] = []
    found = measure_fidelity([store], open_source(ramps), 6, load_teacher=load_shifted, on_event=told.append)
    for row in rows_of(found, "identity", "orientation-stored", "crop-aligned", "cutmix"):
        assert row.agreement.standardised < 0.98 or row.array == "mean/s32/mean16", row  # whose crops are one token
    assert any("is not what the teacher gives" in e.text for e in told if isinstance(e, Warned))


def test_pasted_tokens_count_as_they_do_in_training(store: FeatureStore) -> None:
    rng = np.random.default_rng(0)
    specs = [store.spec(FeatureKey.parse(f"mean/{name}")) for name in ("s64o0/mean8", "s32o0/mean8")]
    moved = specs[0].model_copy(update={"layer": specs[0].layer.model_copy(update={"offset_px": 5.5})})
    crossed = 0
    for spec in (*specs, moved):
        for _ in range(50):
            y, x = np.sort(rng.choice(65, (2, 2)), axis=1)
            box = (int(y[0]), int(y[1]) + 1, int(x[0]), int(x[1]) + 1)
            inside, outside = cutmix_tokens(spec, box)
            maps = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, *spec.grid, 1)
            pair = Targets({"k": maps}, {"k": torch.ones(2, *spec.grid)})
            edges = torch.tensor([[box[0], box[2], box[1], box[3]]] * 2)
            mixed = cutmix_targets(pair, edges, 64, {"k": spec.offset_tile_px})
            weight = mixed.weights["k"][0].numpy().astype(bool)
            np.testing.assert_array_equal(inside | outside, weight)
            np.testing.assert_array_equal(inside[weight], mixed.features["k"][0, ..., 0].numpy()[weight] == 1)
            crossed += int((~weight).sum())
    assert crossed > 100


def test_the_tiles_are_those_that_codecs_were_not_calibrated_with(report: FidelityReport, store: FeatureStore) -> None:
    rows = [row for row, record in enumerate(store.tiles.records) if record is not None]
    held_out = [store.tiles.record(row).id for row in sample_rows(store.tiles, rows)[1]]
    assert list(report.tiles[: len(held_out)]) == held_out
    assert len(set(report.tiles)) == 6


def test_views_in_windows_and_a_single_tile(ramps: Path, tmp_path: Path) -> None:
    asked = {"data": ramps, "out": tmp_path / "s", "teachers": ["mean"], "scales": [1], "window_px": 32}
    build_store(BuildRequest.of(asked), load_teacher=load_mean_teacher)
    found = measure_fidelity([FeatureStore.open(tmp_path / "s")], open_source(ramps), 1, load_teacher=load_mean_teacher)
    assert {r.array for r in found.rows} == {"mean/s64w32v16/mean8", "mean/s64w32v16/mean16"}
    for row in rows_of(found, "identity", "crop-aligned", "crop-shifted", "orientation-turned"):
        assert row.agreement.cosine > 0.9999, row
    assert {(case, "one tile" in why) for _, case, why in found.skipped} == {("cutmix", True), ("other-tile", True)}


def test_what_cannot_be_compared_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", tiles=3, tile_px=64, seed=9)
    with pytest.raises(UsageError, match="3 of that name have other pixels"):
        measure_fidelity([store], open_source(other), 2, load_teacher=load_mean_teacher)
    with pytest.raises(UsageError, match="--tiles 0"):
        measure_fidelity([store], open_source(other), 0, load_teacher=load_mean_teacher)


def test_the_command_compares_stores_and_writes_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", tiles=8, tile_px=64)
    for codec in ("float16", "int8"):
        asked = {"data": data, "out": tmp_path / codec, "teachers": [TEACHER], "scales": [1], "codec": codec}
        build_store(BuildRequest.of(asked))
    a, b, png = tmp_path / "float16", tmp_path / "int8", tmp_path / "p.png"
    assert rsmtdf("cache", "fidelity", a, b, data, "--tiles", 2, "--json", "--out", png, "-q") == 0
    done = json.loads(capsys.readouterr().out)
    assert Image.open(png).width > 300 and done["png"] == str(png)
    assert [a["codec"] for a in done["arrays"]] == ["float16", "float16", "int8", "int8"]
    assert len(done["tiles"]) == 2 and len(done["stores"]) == 2 and done["data"] == str(data)
    names = {"store", "array", "case", "orientation", "source", "exact", "tiles", "tokens", "cosine", "cosine_worst",
             "standardised", "standardised_worst", "error", "cka", "interior", "edge"}  # fmt: skip
    assert all(set(row) == names for row in done["rows"])
    assert {row["case"] for row in done["rows"]} == set(CASES) - {"orientation-stored", "scale", "fixed-stored",
                                                                    "fixed-cut"}  # fmt: skip
    errors = {(r["store"], r["array"], r["case"]): r["error"] for r in done["rows"]}
    for array in {r["array"] for r in done["rows"]}:
        assert 0 < errors[0, array, "identity"] < errors[1, array, "identity"] < 0.1
        for number in (0, 1):  # the same machine, the same bits: what is lost is the codec's
            assert errors[number, array, "identity"] == errors[number, array, "codec-alone"]
            assert errors[number, array, "crop-aligned"] > 2 * errors[number, array, "identity"]  # it saw surroundings

    assert rsmtdf("cache", "forget", a, "-q") == 0  # builds are remembered
    assert rsmtdf("cache", "fidelity", a, "--tiles", 2) == 2
    assert "name its folder" in capsys.readouterr().err
    register_store(a, data)
    assert rsmtdf("cache", "fidelity", a, "--tiles", 2, "--json", "-q") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == [row for row in done["rows"] if row["store"] == 0]
    assert rsmtdf("cache", "fidelity", a, data, "--tiles", 2) == 0
    shown = capsys.readouterr().out
    assert "whole tile, as stored" in shown and "control: another tile" in shown
    assert rsmtdf("cache", "fidelity", a, data, "--tiles", 0) == 2
    other = "timm:test_resnet,pretrained=none,seed=5"
    assert rsmtdf("cache", "fidelity", a, data, "--teacher", other) == 4
    assert "is not the one that the store records" in capsys.readouterr().err


def test_summary_puts_turns_together_and_keeps_the_worst(report: FidelityReport) -> None:
    array = next(a for a in report.arrays if a.array == "mean/s64/mean8")
    lines = {line.label: line for line in summary(report, array)}
    assert list(lines)[:3] == ["whole tile, as stored", "codec alone", "mirrored, stored"]
    quarter = [
        r for r in rows_of(report, "orientation-turned") if r.array == array.array and r.orientation in (1, 3, 5, 7)
    ]
    line = lines["quarter turn, map turned"]
    assert line.tokens == sum(r.agreement.tokens for r in quarter) == 4 * 6 * 64
    assert line.cosine_worst == min(r.agreement.cosine_worst for r in quarter)
