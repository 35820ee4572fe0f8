"""Reports on run folders as training writes them: arms, pairs, curves, and a page that is whole, safe and small."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rsmtdf_cache.errors import DataError, MismatchError, UsageError
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cli.app import app
from rsmtdf_train.experiment.compare import paired_difference
from rsmtdf_train.metrics import ConfusionMatrix
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.report import default_path, write_report
from rsmtdf_train.report.arms import choose_baseline, group_runs
from rsmtdf_train.report.curves import (
    PAGE_POINTS,
    POINTS,
    Group,
    Line,
    Plot,
    downsample,
    draw_svg,
    plot_groups,
    points_per_line,
    ticks,
)
from rsmtdf_train.report.numbers import collect
from rsmtdf_train.report.runs import find_runs

CLASSES = ("water", "<script>alert(1)</script>", 'rare & "odd"')


def write_run(
    folder: Path,
    seed: int = 0,
    *,
    right: float = 0.7,
    steps: int = 20,
    done: int | None = None,
    store: str | None = None,
    classes: Sequence[str] = CLASSES,
    columns: Mapping[str, float] | None = None,
    tiles: int = 0,
    **recipe: Any,
) -> Path:
    """Write a run as training leaves it: ``right`` of its pixels are right; not complete when ``done`` is less.

    ``tiles`` says on which labels it was scored.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    value = Recipe.model_validate({"data": "tiles", "steps": steps, "seed": seed, **recipe})
    (folder / "recipe.yaml").write_text(value.to_yaml())
    columns = columns or {"loss": 1.0, "loss_labeled": 1.0, "loss_distill": 0.0, "lr": 1e-3, "seconds": 0.5}
    lines = [{"step": i, **{k: v * (1 + i / steps) for k, v in columns.items()}} for i in range(done or steps)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done is not None:
        return folder
    matrix = ConfusionMatrix(classes, 255)
    label = torch.randint(len(classes), (1, 64, 64), generator=torch.Generator().manual_seed(tiles))
    matrix.add(torch.where(torch.rand(label.shape) < right, label, (label + 1) % len(classes)), label)
    scores = matrix.scores().to_json()
    metrics = {
        "name": value.name, "split": "test", "seed": seed, "step": steps, "store": store, "checkpoint": "ema",
        "classes": list(classes), "scores": {"ema": scores, "student": scores},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def miou(folder: Path) -> float:
    return float(json.loads((folder / "metrics.json").read_text())["scores"]["ema"]["miou"])


def report(root: Path, **options: Any) -> tuple[dict[str, Any], str]:
    found = write_report([root], root / "r.html", tiles=0, **options)
    return found.to_json(), found.path.read_text()


OFF: dict[str, Any] = {"distill": False}


def test_seeds_are_one_arm_and_its_name_says_what_is_different(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed, distill={"weight": 0.5})
        write_run(tmp_path / f"b{seed}", seed, distill={"weight": 2.0})
        write_run(tmp_path / f"c{seed}", seed, **OFF)
    arms = group_runs(find_runs([tmp_path]))
    assert [[r.label for r in arm.runs] for arm in arms] == [["a0", "a1"], ["b0", "b1"], ["c0", "c1"]]
    assert arms[0].says == {"targets": "cached", "distill": "on", "distill.weight": "0.5", "fuse": "on"}
    assert arms[2].says == {"targets": "none", "distill": "off", "distill.weight": "–", "fuse": "off"}
    assert [arm.name for arm in arms] == ["distill.weight 0.5", "distill.weight 2", "distill.weight –"]
    assert choose_baseline(arms, None) is arms[2]
    assert choose_baseline(arms, "distill.weight 2") is choose_baseline(arms, str(tmp_path / "b1")) is arms[1]


def test_names_of_recipes_name_the_arms_when_each_has_its_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed, name="warm", threshold=0.5)
        write_run(tmp_path / f"b{seed}", seed, name="cold", threshold=0.9)
    assert [arm.name for arm in group_runs(find_runs([tmp_path]))] == ["warm", "cold"]


def test_another_store_is_another_arm_and_a_repeated_seed_too(tmp_path: Path) -> None:
    write_run(tmp_path / "a", store="1" * 64)
    write_run(tmp_path / "b", store="2" * 64)
    write_run(tmp_path / "c", store="2" * 64)
    arms = group_runs(find_runs([tmp_path]))
    assert [len(arm.runs) for arm in arms] == [1, 1, 1]
    assert arms[0].says["store snapshot"] == "1" * 12
    assert len({arm.name for arm in arms}) == 3


def test_differences_are_paired_over_the_seeds_that_both_arms_have(tmp_path: Path) -> None:
    for seed, (base, other) in {0: (0.5, 0.62), 1: (0.7, 0.79), 2: (0.6, 0.7)}.items():
        write_run(tmp_path / f"base{seed}", seed, right=base, **OFF)
        write_run(tmp_path / f"other{seed}", seed, right=other)
    write_run(tmp_path / "other7", 7, right=0.1)
    data, page = report(tmp_path)
    other = next(a for a in data["arms"] if a["name"] != data["baseline"])
    pairs = [[miou(tmp_path / f"{arm}{s}") for s in range(3)] for arm in ("other", "base")]
    expected = paired_difference(*pairs)
    assert other["differences"]["ema"]["pairs"] == 3 and other["differences"]["ema"]["verdict"] == "better"
    assert other["differences"]["ema"]["low"] == pytest.approx(expected.low)
    assert other["miou"]["ema"]["count"] == 4
    assert other["miou"]["ema"]["mean"] == pytest.approx((sum(pairs[0]) + miou(tmp_path / "other7")) / 4)
    assert f"{100 * expected.mean:+.1f}" in page
    assert data["arms"][0]["differences"] == {} or data["arms"][1]["differences"] == {}


def test_arms_without_a_seed_in_common_have_no_difference_and_one_pair_is_inconclusive(tmp_path: Path) -> None:
    write_run(tmp_path / "base", 0, right=0.3, **OFF)
    write_run(tmp_path / "far", 1, right=0.9, threshold=0.5)
    write_run(tmp_path / "one", 0, right=0.9, threshold=0.6)
    data, page = report(tmp_path)
    by_seed = {tuple(r["seed"] for r in a["runs"]): a for a in data["arms"] if a["keys"]["threshold"] != "0.95"}
    assert by_seed[1,]["differences"] == {} and "no seed in common" in page
    assert by_seed[0,]["differences"]["ema"]["verdict"] == "inconclusive" and "no interval" in page


def test_a_class_is_best_only_where_the_interval_against_every_other_arm_says_so(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"low{seed}", seed, right=0.3, threshold=0.1)
        write_run(tmp_path / f"top{seed}", seed, right=0.9, threshold=0.2)
        write_run(tmp_path / f"near{seed}", seed, right=0.905 - 0.01 * (seed == 1), threshold=0.3)
    arms = group_runs(find_runs([tmp_path]))
    clear, _, _ = arms
    all_three = {a.arm.name: a.best for a in collect(arms, clear, None).arms}
    without_near = {a.arm.name: a.best for a in collect([a for a in arms if "0.3" not in a.name], clear, None).arms}
    assert not any(all_three.values())
    assert without_near["threshold 0.2"] == set(CLASSES) and not without_near["threshold 0.1"]


def test_confusion_sums_the_seeds_and_rows_are_shares(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed)
    data, page = report(tmp_path)
    counts = np.array(data["arms"][0]["confusion"])
    assert counts.sum() == 2 * 64 * 64
    assert f"{counts[0, 1]:,} of {counts[0].sum():,} pixels" in page
    assert f">{100 * counts[0, 1] / counts[0].sum():.0f}</td>" in page


class _Tags(HTMLParser):
    """Collects start tags and what is left open or closed wrongly."""

    VOID = frozenset({"meta", "img", "input", "br", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


def test_the_page_is_whole_escapes_every_name_and_asks_for_nothing_outside(tmp_path: Path) -> None:
    hostile = '<img src="http://x/" onerror=1>&'
    write_run(tmp_path / "<b>run", 0, name=hostile, columns={"loss": 1.0, f"cosine/{hostile}/s1/l": 0.5, hostile: 1.0})
    write_run(tmp_path / "b", 0, name="plain", done=5, labeled=hostile)
    _, page = report(tmp_path, context={"command": hostile})
    tags = _Tags(page)
    assert not tags.open
    assert {name for name, _ in tags.tags} & {"img", "b", "link", "iframe"} <= {"b"}
    assert sum(name == "script" for name, _ in tags.tags) == 1
    assert not [a for _, a in tags.tags if any(key.startswith("on") or key in ("src", "href") for key in a)]
    policy = next(a["content"] for n, a in tags.tags if n == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "'sha256-" in policy
    assert page.count("<b>run") == 0 and "&lt;b&gt;run" in page


def test_ids_in_the_page_are_unique_and_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed)
    _, page = report(tmp_path)
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids and len(ids) == len(set(ids))
    assert report(tmp_path)[1] == page


def test_a_run_that_is_not_complete_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "a0", 0)
    write_run(tmp_path / "a1", 1, done=7)
    with (tmp_path / "a1" / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')  # killed while it wrote
    data, page = report(tmp_path)
    (arm,) = data["arms"]
    assert [(r["complete"], r["step"]) for r in arm["runs"]] == [(True, 20), (False, 7)]
    assert arm["miou"]["ema"] == {"mean": pytest.approx(miou(tmp_path / "a0")), "sd": None, "count": 1}
    assert "Not complete" in page and "a1 (step 7 of 20)" in page


def test_runs_that_have_only_begun_make_a_page_too(tmp_path: Path) -> None:
    write_run(tmp_path / "a", done=3)
    (tmp_path / "a" / "log.jsonl").unlink()
    data, page = report(tmp_path)
    assert data["arms"][0]["miou"] == {} and "Summary" in page


def test_a_damaged_log_or_validation_is_left_out_with_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "a" / "log.jsonl").write_text("no json\n")
    (tmp_path / "a" / "validation.jsonl").write_text('{"step": 1}\n')
    events: list[Event] = []
    report(tmp_path, on_event=events.append)
    assert len([e for e in events if isinstance(e, Warned) and "left out" in e.text]) == 2


def test_validation_scores_become_curves_by_kind(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    lines = [{"step": s, "split": "val", "scores": {"ema": {"miou": s / 100, "iou": {}}, "student": {"miou": None}}}
             for s in (10, 20)]  # fmt: skip
    (tmp_path / "a" / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = {g.title: g for g in plot_groups(group_runs(find_runs([tmp_path])))}
    plots = {p.title: p for p in groups["Validation"].plots}
    assert plots["mean IoU on val, ema"].lines[-1].y.tolist() == [0.1, 0.2]
    assert len(draw_svg(plots["mean IoU on val, student"], ["a"])) > 0  # nothing to draw is no error


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda root: (root / "x").mkdir(), UsageError, "holds no run"),
        (lambda root: write_run(root / "a").joinpath("metrics.json").write_text("{}"), DataError, "metrics.json"),
        (lambda root: (write_run(root / "a"), write_run(root / "b", 1, classes=["one", "two"])), MismatchError, "one"),
        (
            lambda root: (write_run(root / "a"), write_run(root / "b", 1, tiles=1)),
            MismatchError,
            "other pixels of split",
        ),
    ],
)
def test_what_cannot_be_reported_is_one_clear_error(tmp_path: Path, make: Any, error: type, text: str) -> None:
    make(tmp_path)
    with pytest.raises(error, match=text):
        report(tmp_path)


def test_runs_scored_on_several_splits_ask_for_one(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    metrics = write_run(tmp_path / "b", 1) / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"split": "test"', '"split": "val"'))
    with pytest.raises(UsageError, match="test, val; choose one with --split"):
        report(tmp_path)


def test_lines_of_a_plot_read_back_as_what_was_drawn() -> None:
    x = np.arange(0.0, 100)
    y = 3 + np.sin(x / 10)
    y[40:45] = np.nan
    svg = draw_svg(Plot("p", (Line(0, True, x, y),), scale=100, unit=" %"), ["arm"])
    x0, x1, y0, y1, left, right, top, bottom = (
        float(v)
        for v in re.search(r'data-frame="([^"]+)"', svg)[1].split()  # type: ignore[index]
    )
    first, _, steps = re.search(r'class="mean a0" d="M([^"]+)"', svg)[1].partition("l")  # type: ignore[index]
    points = np.cumsum([[int(v) for v in p.split(",")] for p in [first, *steps.split(" ")]], axis=0)
    steps_back = x0 + (points[:, 0] - left) / (right - left) * (x1 - x0)
    values_back = y0 + (bottom - points[:, 1]) / (bottom - top) * (y1 - y0)
    known = np.isfinite(y)
    assert np.allclose(steps_back, x[known], atol=0.51 / (right - left) * (x1 - x0))
    assert np.allclose(values_back, 100 * y[known], atol=0.51 / (bottom - top) * (y1 - y0))


def test_a_long_line_becomes_means_of_its_stretches() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(12_000.0), rng.normal(size=12_000)
    y[::3] = np.nan
    few_x, few_y = downsample(x, y, 200)
    assert len(few_x) == len(few_y) == 200 and (np.diff(few_x) > 0).all()
    assert few_y.mean() == pytest.approx(np.nanmean(y))
    assert few_x.mean() == pytest.approx(x[np.isfinite(y)].mean())
    same_x, same_y = downsample(x[:50], np.arange(50.0), 50)
    assert same_x.tolist() == same_y.tolist() == list(range(50))


@given(st.floats(-1000, 1000), st.floats(1e-6, 1e6))
def test_ticks_are_round_numbers_within_the_range(begin: float, span: float) -> None:
    low = begin * span
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 6 and low - 1e-6 * span <= found[0] and found[-1] <= low + span * (1 + 1e-6)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step * (1 + 1e-6)))
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


def test_a_term_that_is_off_has_no_line_and_unknown_numbers_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "a", columns={"loss": 1.0, "loss_distill": 0.0, "loss_new": 2.0, "strange": 3.0})
    titles = [p.title for g in plot_groups(group_runs(find_runs([tmp_path]))) for p in g.plots]
    assert titles == ["total loss", "loss_new", "strange"]


def test_many_lines_share_the_points_of_a_page() -> None:
    line = Line(0, True, np.arange(2.0), np.arange(2.0))
    for count in (1, 2000, 6000):
        points = points_per_line([Group("g", (Plot("p", (line,) * count),))])
        assert points * count <= PAGE_POINTS and points <= POINTS
    assert points_per_line([]) == POINTS


def test_ten_runs_with_many_targets_stay_below_five_megabytes(tmp_path: Path) -> None:
    keys = {f"cosine/teacher{t}/s448/block{n}": 0.1 for t in range(3) for n in range(4)}
    columns = {"loss": 1.0, "loss_labeled": 1.0, "lr": 1.0, "mask_ratio": 0.5, "seconds": 1.0, **keys}
    for n in range(10):
        write_run(tmp_path / f"r{n}", 0, threshold=n / 10, steps=320, columns=columns)
        path = tmp_path / f"r{n}" / "log.jsonl"
        rng = np.random.default_rng(n)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        noisy = [{k: v + rng.normal() * (k != "step") for k, v in line.items()} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in noisy))
    data, page = report(tmp_path)
    assert len(data["arms"]) == 10
    assert 200_000 < len(page.encode()) < 5_000_000


def test_the_command_writes_the_page_next_to_the_runs_and_prints_the_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", name="cold")
    write_run(tmp_path / "runs" / "b", name="warm", threshold=0.5)
    call = CliRunner().invoke(app, ["report", str(tmp_path / "runs"), "--no-pictures", "--json", "-q"])
    assert call.exit_code == 0, call.stderr
    data = json.loads(call.stdout)
    assert Path(data["out"]) == tmp_path / "runs" / "report.html" and Path(data["out"]).is_file()
    assert [a["name"] for a in data["arms"]] == ["cold", "warm"]
    wrong = CliRunner().invoke(app, ["report", str(tmp_path / "runs"), "--no-pictures", "--baseline", "wram"])
    assert wrong.exit_code == 2 and "Did you mean 'warm'" in wrong.stderr
    none = CliRunner().invoke(app, ["report", str(tmp_path), str(tmp_path / "absent")])
    assert none.exit_code == 2 and "is no folder" in none.stderr
    assert default_path([tmp_path / "runs" / "a"]) == Path("report.html")


def test_pictures_without_a_dataset_are_left_out_with_a_warning_unless_it_was_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", data=str(tmp_path / "gone"))
    events: list[Event] = []
    found = write_report([tmp_path], tmp_path / "r.html", on_event=events.append)
    assert found.tiles == () and any(isinstance(e, Warned) and "--data" in e.text for e in events)
    with pytest.raises(DataError, match="other"):
        write_report([tmp_path], tmp_path / "r.html", data=tmp_path / "other")
