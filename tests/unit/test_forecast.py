"""The arithmetic of plans: what limits a build, when it pays, and what of a plan's JSON is believed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.forecast import Forecast, Measured, Rate, TeacherWork, break_even_epochs, forecast, read_measured
from rsmtdf_cli.cache.plan import seconds_text

WORK = TeacherWork("a", "w", "s448", 448, 8, maps=400, batches=52, extra_batches=2, views=4, nbytes=4_000_000)
RATE = Rate("a", "w", "s448", 448, 8, seconds_per_batch=0.5, tiles=24, device="cpu")
MEASURED = Measured((RATE,), 1e6, 4e6, look_seconds=3.0, load_seconds=2.0)


def test_break_even_is_the_first_epoch_at_which_a_simulated_cache_is_no_dearer() -> None:
    rng = random.Random(0)
    for _ in range(300):
        build, online, read = rng.uniform(0, 50), rng.uniform(0.1, 5), rng.uniform(0, 5)
        found = break_even_epochs(build, online, read)
        cached, live, epochs = build, 0.0, 0
        while cached > live and epochs < 20_000:
            cached, live, epochs = cached + read, live + online, epochs + 1
        if found is None:
            assert online <= read and epochs == 20_000
        else:
            assert epochs == 20_000 < found or epochs - 1 < found + 1e-6 <= epochs + 2e-6


def test_a_build_costs_its_stages_one_after_the_other() -> None:
    ahead = forecast([WORK], MEASURED)
    assert ahead is not None
    assert ahead.teachers == {"a": 54 * 0.5} and ahead.disk == 4.0
    assert ahead.seconds == 3 + 2 + 27 + 4
    # An epoch sees each of the 100 tiles once, in one of the four orientations, and reads a quarter of the bytes.
    assert ahead.online == 100 / 8 * 0.5 and ahead.read == 0.25
    assert ahead.break_even_epochs == 36 / 6.0


@pytest.mark.parametrize(
    ("change", "limit"),
    [({}, "teachers"), ({"write_nbytes_per_s": 1e5}, "disk"), ({"look_seconds": 28.0}, "tiles")],
)
def test_the_bottleneck_is_the_longest_stage(change: dict[str, Any], limit: str) -> None:
    ahead = forecast([WORK], replace(MEASURED, **change))
    assert ahead is not None and ahead.bottleneck == limit


def test_with_nothing_to_do_nothing_limits_and_reading_slower_than_teachers_never_pays() -> None:
    nothing = forecast([], MEASURED)
    assert nothing is not None and nothing.bottleneck == "nothing" and nothing.break_even_epochs is None
    slow = forecast([WORK], replace(MEASURED, read_nbytes_per_s=1e5))
    assert slow is not None and slow.read > slow.online and slow.break_even_epochs is None


def test_another_scale_is_told_by_its_area_another_batch_by_its_tiles_and_other_weights_not_at_all() -> None:
    assert MEASURED.seconds_per_batch(replace(WORK, scale="s224", size_px=224)) == 0.125
    assert MEASURED.seconds_per_batch(replace(WORK, batch_tiles=16)) == 1.0
    other = replace(WORK, weights="v")
    assert MEASURED.seconds_per_batch(other) is None and forecast([WORK, other], MEASURED) is None
    near = replace(MEASURED, rates=(RATE, replace(RATE, scale="s224", size_px=224, seconds_per_batch=0.2)))
    assert near.seconds_per_batch(replace(WORK, scale="s224", size_px=224)) == 0.2


def _plan(change: Callable[[dict[str, Any]], object]) -> object:
    data: dict[str, Any] = json.loads(json.dumps({"plan": {"measured": MEASURED.to_json()}}))
    change(data["plan"])
    return data


def test_what_was_measured_comes_back_from_json_and_a_plan_of_sizes_has_none() -> None:
    assert read_measured(_plan(lambda p: None), "x") == MEASURED
    assert read_measured({"plan": {"measured": None}}, "x") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("measured"),
        lambda p: p["measured"].pop("rates"),
        lambda p: p["measured"]["rates"][0].pop("size_px"),
        lambda p: p["measured"]["rates"][0].update(seconds_per_batch=0),
        lambda p: p["measured"].update(write_nbytes_per_s=0),
        lambda p: p["measured"].update(look_seconds="soon"),
        lambda p: p["measured"].update(load_seconds=float("nan")),
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_name(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(UsageError, match=r"--plan p\.json"):
        read_measured(_plan(change), "--plan p.json")
    with pytest.raises(UsageError):
        read_measured([], "x")


def test_a_forecast_as_json_has_its_bottleneck_and_never_is_null() -> None:
    never = Forecast(0.0, 0.0, {"a": 1.0}, 0.0, online=1.0, read=2.0).to_json()
    assert never["break_even_epochs"] is None and never["bottleneck"] == "teachers" and never["seconds"] == 1.0


def test_durations_are_written_for_people() -> None:
    texts = [seconds_text(s) for s in (0.042, 9.96, 59.4, 59.6, 200, 3569, 3570, 18_600)]
    assert texts == ["0.042 s", "10 s", "59 s", "1 min", "3 min 20 s", "59 min 29 s", "1 h", "5 h 10 min"]
