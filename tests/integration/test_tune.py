"""``cache tune``: what it promises about sizes and files is what a build then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.estimate import plan_build
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.tune.candidates import write_configuration
from rsmtdf_cache.tune.picture import draw_tuning
from rsmtdf_cache.tune.sweep import TuneReport, tune_build
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher, load_mean_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("tune") / "data", tiles=18, tile_px=64)


def tuned(data: Path, out: Path, budget: int | None = None, **more: Any) -> TuneReport:
    asked = BuildRequest.of({
        "data": data, "out": out, "teachers": more.pop("teachers", ["mean"]), "threads": 1, "micro_batch": 4,
        **more.pop("request", {}),
    })  # fmt: skip
    more.setdefault("codecs", ["float16", "int8"])
    return tune_build(asked, budget, load_teacher=load_mean_teacher, **more)


def test_the_file_builds_what_was_recommended_in_the_bytes_that_were_said(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    asked = {"orientations": 2, "splits": ("train", "val")}
    teachers = ["mean,scales=1", "other,layers=mean16"]
    free = tuned(data, out, teachers=teachers, request=asked)
    pairs = [r.nbytes for r in free.rows if len(r.candidate.parts) == 2]
    budget = pairs[len(pairs) // 2]
    report = tuned(data, out, budget, teachers=teachers, request=asked)
    assert report.recommended is not None and report.configuration is not None
    chosen = report.rows[report.recommended]
    assert chosen.nbytes <= budget and len(chosen.candidate.parts) == 2
    assert [o.nbytes for o in report.orientations if o.count == 2] == [chosen.nbytes]
    write_configuration(tmp_path / "tuned.yaml", report.configuration, ["a line", "two\nlines"])
    request = BuildRequest.of(yaml.safe_load((tmp_path / "tuned.yaml").read_text()))
    assert [(t.name, t.layers, t.scales, t.codec, t.orientations) for t in request.teachers] == [
        (p.teacher, p.layers, p.scales, p.codec, 2) for p in chosen.candidate.parts
    ]
    assert (request.splits, request.threads, request.micro_batch) == (("train", "val"), 1, 4)
    assert plan_build(request, measure=False, load_teacher=load_mean_teacher).nbytes == chosen.nbytes
    assert build_store(request, load_teacher=load_mean_teacher).nbytes_shards == chosen.nbytes


def test_every_candidate_takes_the_bytes_that_are_planned_for_it(data: Path, tmp_path: Path) -> None:
    report = tuned(data, tmp_path / "s", codecs=None)
    alone = {(p.layers, p.scales, p.codec): r.nbytes for r in report.rows for p in r.candidate.parts}
    for layers, scales, codec in alone:  # less is smaller, however small the maps: indexes do not outweigh them
        assert alone[layers, scales, codec] <= max(alone[layers, scales, kind] for kind in ("int8", "float16"))
        assert all(alone[layers, scales, codec] > alone[layers, (s,), codec] for s in scales if len(scales) > 1)
    assert len(report.rows) == len({r.candidate.name for r in report.rows}) > 8
    for row in report.rows[:: len(report.rows) // 6]:
        teachers = [
            {"name": p["teacher"], **{k: p[k] for k in ("layers", "scales", "codec")}}
            for p in row.to_json()["teachers"]
        ]
        request = BuildRequest.of({
            "data": data, "out": tmp_path / "s", "teachers": teachers, "group_rows": report.tiles
        })  # fmt: skip
        assert plan_build(request, measure=False, load_teacher=load_mean_teacher).nbytes == row.nbytes


def test_a_teacher_sees_each_tile_once_a_view(data: Path, tmp_path: Path) -> None:
    loaded: list[MeanTeacher] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        loaded.append(load_mean_teacher(*args, **kwargs))  # type: ignore[arg-type]
        return loaded[-1]

    asked = BuildRequest.of({
        "data": data, "out": tmp_path / "s", "teachers": ["mean"], "threads": 1, "micro_batch": 1, "scales": (1.0, 0.5)
    })  # fmt: skip
    report = tune_build(asked, codecs=["int8"], load_teacher=load)
    tiles = report.train_tiles + report.held_tiles
    views, turns, turned = 2, 3, min(8, report.held_tiles)
    assert report.recommended is not None
    scales = len(report.rows[report.recommended].candidate.parts[0].scales)
    assert loaded[0].calls == views * tiles + turns * turned * scales


def test_turned_means_are_exact_and_the_numbers_repeat(data: Path, tmp_path: Path) -> None:
    first, second = (tuned(data, tmp_path / "s", control=True, request={"scales": (1.0,)}) for _ in range(2))
    # The mean of a cell commutes with turning it, at a scale that needs no resize or a symmetric one.
    assert [o.cosine for o in first.orientations[1:]] == pytest.approx([1.0] * 3, abs=1e-6)
    a, b = ({**r.to_json(), "seconds": None} for r in (first, second))
    assert a == b
    assert [c.name for c in first.controls] == ["colours alone", "random weights"]
    # A teacher without weights is as good with random ones.
    gain = first.controls[1].gain
    assert gain is not None and gain.mean == gain.low == gain.high == 0


def test_what_may_be_chosen_can_be_narrowed(data: Path, tmp_path: Path) -> None:
    def parts(**more: Any) -> list[Any]:
        return [p for r in tuned(data, tmp_path / "s", **more).rows for p in r.candidate.parts]

    assert {p.codec for p in parts(request={"codec": "int8"})} == {"int8"}
    assert {p.codec for p in parts(codecs=["float16", "pca2-int8", "pca99-int8"])} == {"float16", "pca2-int8"}
    found = parts(teachers=["mean,layers=mean8,scales=0.5"], codecs=["int8"])
    assert [(p.layers, p.scales) for p in found] == [(("mean8",), (0.5,))]
    with pytest.raises(UsageError, match="pca99"):
        parts(codecs=["pca99-int8"])


def test_a_teacher_is_left_out_only_when_all_together_do_not_fit(data: Path, tmp_path: Path) -> None:
    teachers = ["mean,scales=1", "other,scales=1"]
    free = tuned(data, tmp_path / "s", teachers=teachers)
    both = min(r.nbytes for r in free.rows if len(r.candidate.parts) == 2)
    for budget, count in ((both, 2), (both - 1, 1)):
        report = tuned(data, tmp_path / "s", budget, teachers=teachers)
        assert report.recommended is not None
        row = report.rows[report.recommended]
        assert len(row.candidate.parts) == count and row.nbytes <= budget
    none = tuned(data, tmp_path / "s", free.rows[0].nbytes - 1, teachers=teachers)
    assert (none.recommended, none.best, none.configuration, none.orientations) == (None, None, None, [])


def test_tune_refuses_a_store_that_is_there(data: Path, tmp_path: Path) -> None:
    request = {"data": data, "out": tmp_path / "s", "teachers": ["mean"], "threads": 1}
    build_store(BuildRequest.of(request), load_teacher=load_mean_teacher)
    with pytest.raises(UsageError, match="--out"):
        tuned(data, tmp_path / "s")


def test_the_command_writes_file_and_picture_and_says_when_nothing_fits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    words = ["cache", "tune", str(data), "--teacher", "timm:test_resnet,pretrained=none", "--threads", "1"]
    words += ["--scales", "1", "--codecs", "float16,int8"]
    files = ["--config-out", "new/tuned.yaml", "--plot", "new/tuned.png"]
    done = CliRunner().invoke(app, [*words, "--budget", "1GB", *files, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["budget"] == 10**9 and len(told["rows"]) == 8 and told["context"]["command"]
    recommended = next(r for r in told["rows"] if r["name"] == told["recommended"])
    picture = np.asarray(Image.open("new/tuned.png").convert("L"))
    assert picture.std() > 10
    dry = CliRunner().invoke(
        app, ["cache", "build", "--config", "new/tuned.yaml", "--dry-run", "--no-measure", "--json"]
    )
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["planned"]["nbytes"] == recommended["nbytes"]
    poor = CliRunner().invoke(app, [*words, "--budget", "1kB", "--config-out", "none.yaml"])
    assert poor.exit_code == 2 and not Path("none.yaml").exists()
    assert "over budget" in poor.stdout and "--budget 1kB" in poor.stderr


def test_the_picture_shows_a_report_without_a_recommendation(data: Path, tmp_path: Path) -> None:
    report = tuned(data, tmp_path / "s", 1, codecs=["int8"])
    assert draw_tuning(tmp_path / "p.png", report, "$ title").stat().st_size > 1000
