"""However many processes share a batch: together they have its crops, each once, in one order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sampler import Draw
from rsmtdf_train.sections import BatchConfig
from rsmtdf_train.shares import check_shares, labeled_places, unlabeled_places
from tests.datasets import write_dataset

WORLDS = st.integers(1, 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TileSource:
    root = tmp_path_factory.mktemp("shares") / "data"
    write_dataset(root, tiles=11, splits={"train": range(11)}, labeled={"some": range(5)})
    return open_source(root)


def open_loader(source: TileSource, seed: int, labeled: int, unlabeled: int, method: str = "fixmatch") -> BatchLoader:
    recipe = Recipe.model_validate({
        "data": source.root, "labeled": "some", "crop_px": 32, "seed": seed, "targets": "none", "distill": False,
        "batch": {"labeled": labeled, "unlabeled": unlabeled}, "method": method,
    })  # fmt: skip
    return BatchLoader.open(source, recipe)


def shared(loader: BatchLoader, step: int, world: int, accumulate: int) -> list[list[tuple[list[Draw], list[Draw]]]]:
    """Return what each process gets at ``step``, part by part."""
    of = world * accumulate
    return [[loader.draws(step, rank * accumulate + i, of) for i in range(accumulate)] for rank in range(world)]


@given(st.integers(0, 2**40), st.integers(0, 500), WORLDS, st.integers(1, 3), st.integers(0, 6), st.integers(0, 11))
@settings(max_examples=80, deadline=None)
def test_what_processes_get_is_the_batch_of_one(
    source: TileSource, seed: int, step: int, world: int, accumulate: int, more: int, many: int
) -> None:
    shares = world * accumulate
    loader = open_loader(source, seed, shares + more, 2 * shares - 1 + many)
    labeled, unlabeled = loader.draws(step)
    again = open_loader(source, seed, shares + more, 2 * shares - 1 + many)
    assert again.draws(step) == (labeled, unlabeled), "a function of seed and step"
    parts = [part for rank in shared(loader, step, world, accumulate) for part in rank]
    assert [draw for part, _ in parts for draw in part] == labeled
    left = list(unlabeled)
    for _, part in parts:
        for draw in part:
            left.remove(draw)
    assert not left, "each crop in one share"
    for mine, part in parts:
        assert mine and part
        partners = [unlabeled[len(unlabeled) - 1 - unlabeled.index(draw)] for draw in part]
        assert partners == part[::-1], "mirrored, as CutMix looks for them"


@given(st.integers(0, 2**40), st.lists(WORLDS, min_size=1, max_size=12), st.integers(3, 9), st.integers(5, 12))
@settings(max_examples=60, deadline=None)
def test_a_run_that_restarts_with_other_numbers_of_processes_sees_each_tile_once_an_epoch(
    source: TileSource, seed: int, worlds: Sequence[int], labeled: int, unlabeled: int
) -> None:
    """``worlds``: how many processes each step has, as if the run had been stopped before every one of them."""
    loader = open_loader(source, seed, labeled, unlabeled)
    seen: Counter[tuple[int, str]] = Counter()
    for step, world in enumerate(worlds):
        whole = Counter((d.epoch, d.tile_id) for d in loader.draws(step)[1])
        got = Counter((d.epoch, d.tile_id) for rank in shared(loader, step, world, 1) for d in rank[0][1])
        assert got == whole
        seen += got
    tiles = loader.dataset.tile_ids
    complete, rest = divmod(len(worlds) * unlabeled, len(tiles))
    assert set(seen.values()) == {1}, "no tile twice"
    assert {(epoch, tile) for epoch in range(complete) for tile in tiles} <= set(seen), "no tile lost"
    assert sum(epoch == complete for epoch, _ in seen) == rest


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 24))
@settings(max_examples=300, deadline=None)
def test_shares_are_as_even_as_pairs_allow_and_a_batch_is_refused_when_one_would_be_empty(
    labeled: int, unlabeled: int, shares: int
) -> None:
    mine = [len(labeled_places(labeled, i, shares)) for i in range(shares)]
    pairs = [len(unlabeled_places(unlabeled, i, shares)) for i in range(shares)]
    assert (sum(mine), sum(pairs)) == (labeled, unlabeled)
    assert max(mine) - min(mine) <= 1 and max(pairs) - min(pairs) <= 3
    batch = BatchConfig(labeled=labeled, unlabeled=unlabeled)
    if min(*mine, *pairs) > 0:
        check_shares(batch, shares)
        fair = -(-labeled // shares) + 2 * -(-((unlabeled + 1) // 2) // shares)
        assert max(a + b for a, b in zip(mine, pairs, strict=True)) <= fair
    else:
        with pytest.raises(UsageError, match=r"batch\.(labeled|unlabeled) \d+ cannot be shared by .* or more"):
            check_shares(batch, shares)
    if min(mine) > 0:
        check_shares(batch, shares, labeled_only=True)


def test_the_number_that_is_named_is_the_smallest_that_will_do() -> None:
    for name, given_, needed in (("labeled", 2, 3), ("unlabeled", 4, 5)):
        sizes = {"labeled": 3, "unlabeled": 5}
        with pytest.raises(UsageError, match=rf"batch.{name} {given_} .* set batch.{name} to {needed} or more"):
            check_shares(BatchConfig(**(sizes | {name: given_})), 3)
        check_shares(BatchConfig(**(sizes | {name: needed})), 3)
