"""The order is a function of seed and position: nothing else can change a sample."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.sampler import LABELED, UNLABELED, Geometry, Stream
from rsmtdf_train.sections import AugmentConfig

GEOMETRY = Geometry(tile_px=256, crop_px=128)


def stream(count: int = 12, seed: int = 0, kind: int = UNLABELED, **changes: object) -> Stream:
    augment = AugmentConfig.model_validate(changes)
    return Stream([f"t{i:03}" for i in range(count)], kind, seed, GEOMETRY, augment)


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_tile_comes_once_per_epoch(count: int, seed: int, epoch: int) -> None:
    one = stream(count, seed)
    places = [one.place(epoch * count + i) for i in range(count)]
    assert {e for e, _ in places} == {epoch}
    assert Counter(tile_id for _, tile_id in places) == Counter(one.tile_ids)


def test_epochs_streams_and_seeds_have_different_orders_and_crops() -> None:
    one, n = stream(30), 30
    first = [one.draw(i) for i in range(n)]
    for other in (
        [one.draw(n + i) for i in range(n)],
        [stream(30, seed=1).draw(i) for i in range(n)],
        [stream(30, kind=LABELED).draw(i) for i in range(n)],
    ):
        assert [d.tile_id for d in other] != [d.tile_id for d in first]
        crops = {d.tile_id: (d.orientation, d.box) for d in first}
        assert sum(crops[d.tile_id] == (d.orientation, d.box) for d in other) < n // 2


@given(st.integers(0, 2**40), st.permutations(range(40)))
@settings(max_examples=25, deadline=None)
def test_draws_do_not_depend_on_the_order_in_which_they_are_asked_for(seed: int, order: list[int]) -> None:
    one, other = stream(9, seed), stream(9, seed)
    ahead = {position: one.draw(position) for position in order}
    assert [ahead[i] for i in range(40)] == [other.draw(i) for i in range(40)]


def test_the_order_of_the_split_file_does_not_matter() -> None:
    ids = [f"t{i}" for i in range(20)]
    shuffled = random.Random(0).sample(ids, len(ids))
    a, b = (Stream(x, LABELED, 3, GEOMETRY, AugmentConfig()) for x in (ids, shuffled))
    assert a.draws(4, 8) == b.draws(4, 8)


def test_batches_are_consecutive_positions() -> None:
    one = stream()
    assert [d for s in range(5) for d in one.draws(s, 7)] == [one.draw(i) for i in range(35)]


def test_arms_that_differ_in_photometry_or_cutmix_share_everything_else() -> None:
    one, other = stream(), stream(jitter=0.0, blur_p=0.0, gray_p=0.0, cutmix_p=0.0)
    for position in range(40):
        a, b = one.draw(position), other.draw(position)
        assert (a.tile_id, a.epoch, a.orientation, a.box) == (b.tile_id, b.epoch, b.orientation, b.box)
    assert all(other.draw(i).cutmix_box == (0, 0, 0, 0) for i in range(40))
    assert any(one.draw(i).cutmix_box != (0, 0, 0, 0) for i in range(40))


def test_without_turning_only_the_orientation_changes() -> None:
    one, other = stream(), stream(orientations=False)
    for position in range(40):
        assert one.draw(position).box == other.draw(position).box
        assert other.draw(position).orientation == 0


def test_all_orientations_and_all_lattice_positions_are_drawn_and_no_others() -> None:
    one = stream(50)
    draws = [one.draw(i) for i in range(1500)]
    assert {d.orientation for d in draws} == set(range(8))
    assert {(d.box.y, d.box.x) for d in draws} == {(y, x) for y in range(0, 129, 32) for x in range(0, 129, 32)}
    assert {(d.box.height, d.box.width) for d in draws} == {(128, 128)}


@given(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_only_stored_orientations_are_drawn(orientations: set[int], seed: int) -> None:
    geometry = Geometry(256, 128, 64, tuple(sorted(orientations)))
    one = Stream(["a", "b"], UNLABELED, seed, geometry, AugmentConfig())
    assert {one.draw(i).orientation for i in range(30)} <= orientations


@pytest.mark.parametrize(("crop_px", "named"), [(100, "96 or 128"), (512, "larger"), (16, "32")])
def test_a_crop_off_the_lattice_or_larger_than_a_tile_is_refused_with_what_would_do(crop_px: int, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Geometry(256, crop_px)


def test_a_geometry_without_a_shared_orientation_is_refused() -> None:
    with pytest.raises(UsageError, match="orientation"):
        Geometry(256, 128, 32, ())
