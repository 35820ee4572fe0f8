"""Who gets which tiles, for any scenes: each tile has one home, what is dealt whole stays whole, equal every time."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.tiling.dealing import Window, deal_windows, labeled_lists
from rsmtdf_cache.tiling.request import Held

SHARES = st.sampled_from([Fraction(0), Fraction(1, 10), Fraction(1, 5), Fraction(2, 5)])


@st.composite
def windows(draw: st.DrawFn) -> list[Window]:
    found = []
    for scene in range(draw(st.integers(1, 9))):
        rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        labelled = draw(st.sampled_from([0.0, 0.3, 1.0]))
        for row in range(rows):
            for column in range(columns):
                name = f"s{scene}_{row}_{column}"
                found.append(Window(name, f"s{scene}", row, column, row * 8, column * 8, labelled))
    return found


@given(windows(), SHARES, SHARES, st.sampled_from([None, "scene", "block"]), st.integers(0, 5))
def test_every_tile_has_one_home_and_what_is_dealt_whole_stays_whole(
    tiles: list[Window], val: Fraction, test: Fraction, by: str | None, seed: int
) -> None:
    assume(val + test < 1)
    try:
        dealt = deal_windows(tiles, Held(val), Held(test), by, None, seed, overlap=False)
    except DataError:
        assert val or test  # too few units for what was asked
        return
    assert sorted(w.id for some in dealt.splits.values() for w in some) == sorted(w.id for w in tiles)
    assert set(dealt.splits) == {"train", *(n for n, s in (("val", val), ("test", test)) if s)}
    homes: dict[tuple[str, int, int], set[str]] = {}
    for split, some in dealt.splits.items():
        for w in some:
            side = dealt.block
            unit = (w.scene, w.row // side, w.column // side) if dealt.by == "block" and side else (w.scene, 0, 0)
            homes.setdefault(unit, set()).add(split)
    assert all(len(h) == 1 for h in homes.values())
    if any(w.labeled for w in tiles):
        assert all(w.labeled for name in ("val", "test") for w in dealt.splits.get(name, []))
    again = deal_windows(tiles, Held(val), Held(test), by, None, seed, overlap=False)
    assert again == dealt


@given(windows(), st.integers(0, 5))
def test_labelled_subsets_are_nested_parts_of_what_has_labels(tiles: list[Window], seed: int) -> None:
    lists = labeled_lists(tiles, ["1", "5", "10", "100"], seed)
    with_labels = {w.id for w in tiles if w.labeled > 0}
    assert bool(lists) == bool(with_labels)
    if lists:
        small, *_, whole = lists.values()
        assert small and set(whole) == with_labels and whole[: len(small)] == small
        assert lists == labeled_lists(list(reversed(tiles)), ["1", "5", "10", "100"], seed)


def test_a_share_is_met_as_far_as_whole_units_allow() -> None:
    tiles = [Window(f"s{n}_{k}", f"s{n}", 0, k, 0, 8 * k, 1.0) for n in range(50) for k in range(10)]
    dealt = deal_windows(tiles, Held(Fraction(1, 5)), Held(Fraction(1, 10)), None, None, 0, overlap=False)
    assert dealt.by == "scene" and {n: len(s) for n, s in dealt.splits.items()} == {
        "train": 350,
        "val": 100,
        "test": 50,
    }


def test_one_scene_is_dealt_in_blocks_and_several_by_scene() -> None:
    one = [Window(f"a_{r}_{c}", "a", r, c, 8 * r, 8 * c, 1.0) for r in range(20) for c in range(20)]
    dealt = deal_windows(one, Held(Fraction(1, 5)), Held(Fraction(1, 5)), None, None, 0, overlap=False)
    assert (dealt.by, dealt.block) == ("block", 4)
    with pytest.raises(DataError, match="1 scenes with labels cannot be dealt"):
        deal_windows(one, Held(Fraction(1, 5)), Held(Fraction(1, 5)), None, None, 0, overlap=True)
