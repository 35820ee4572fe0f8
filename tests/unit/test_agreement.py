"""The numbers of fidelity against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rsmtdf_cache.fidelity.agreement import Tally, linear_cka

RNG_SEED = 3
DIM = 5


def features(n: int = 40, seed: int = RNG_SEED) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, DIM)) * np.arange(1, DIM + 1) + 3).astype(np.float32)


def tally(live: NDArray[np.float32], read: NDArray[np.float32], parts: int = 1) -> Tally:
    found = Tally(live.mean(0), live.std(0))
    for a, b in zip(np.split(live, parts), np.split(read, parts), strict=True):
        found.add(a[None], b[None], np.ones((1, len(a)), np.bool_))
    return found


def hsic(k: NDArray[np.float64], m: NDArray[np.float64]) -> float:
    """Return the (biased) Hilbert-Schmidt independence criterion of two Gram matrices, as Kornblith et al. write it."""
    n = len(k)
    centring = np.eye(n) - np.full((n, n), 1 / n)
    return float(np.trace(k @ centring @ m @ centring)) / (n - 1) ** 2


def test_cka_is_the_normalised_hsic_of_linear_kernels() -> None:
    x, y = (
        features().astype(np.float64),
        features(seed=8).astype(np.float64)[:, :3] + features().astype(np.float64)[:, :3],
    )
    k, m = x @ x.T, y @ y.T
    assert linear_cka(x, y) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), rel=1e-9)


def test_cka_ignores_turning_and_scale_and_no_more() -> None:
    x = features().astype(np.float64)
    turn = np.linalg.qr(features(DIM, seed=1).astype(np.float64))[0]
    assert linear_cka(x, 7 * x @ turn + 2) == pytest.approx(1)
    assert linear_cka(x, x * [0, 1, 1, 1, 0]) != pytest.approx(1, abs=0.05)
    shuffled = linear_cka(x, np.roll(x, 7, axis=0))
    assert shuffled is not None and shuffled < 0.3
    assert linear_cka(x, np.ones_like(x)) is None


def test_a_tally_of_parts_is_the_formula_over_all_tokens() -> None:
    x, y = features(), features() + features(seed=5) / np.float32(4)
    whole, parts = tally(x, y).result(), tally(x, y, parts=8).result()
    assert whole is not None and parts is not None
    assert whole.to_json() == pytest.approx(parts.to_json(), nan_ok=True)
    a, b = x.astype(np.float64), y.astype(np.float64)
    cosines = np.sort((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    assert whole.tokens == 40
    assert whole.cosine == pytest.approx(cosines.mean()) and whole.cosine_worst == pytest.approx(cosines[0])
    assert whole.error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a - a.mean(0)))
    assert whole.cka == pytest.approx(linear_cka(x, y))
    scaled = [(v - x.mean(0)) / x.std(0) for v in (x, y)]
    lengths = [np.linalg.norm(v, axis=1) for v in scaled]
    assert whole.standardised == pytest.approx(
        ((scaled[0] * scaled[1]).sum(1) / lengths[0] / lengths[1]).mean(), rel=1e-5
    )


def test_the_mean_as_a_guess_is_as_wrong_as_the_spread_and_says_nothing() -> None:
    x = features()
    found = tally(x, np.broadcast_to(x.mean(0), x.shape)).result()
    assert found is not None and found.cosine > 0.5  # a common offset alone gives that much
    assert found.error == pytest.approx(1, rel=1e-5) and found.standardised == pytest.approx(0) and found.cka is None


def test_channels_that_never_change_and_tokens_that_do_not_count_have_no_say() -> None:
    x = features()
    y = x + features(seed=4)
    x[:, 2], y[:, 2] = 100, 100.5
    expected, found = tally(np.delete(x, 2, 1), np.delete(y, 2, 1)), tally(x, y)
    bad = np.full((1, 3, DIM), np.nan, np.float32)
    found.add(x[None, :3], bad, np.ones((1, 3), np.bool_))
    found.add(bad, bad, np.ones((1, 3), np.bool_))
    found.add(x[None, :3], -x[None, :3], np.zeros((1, 3), np.bool_))
    a, b = expected.result(), found.result()
    assert a is not None and b is not None
    assert b.tokens == a.tokens and b.standardised == pytest.approx(a.standardised)
    empty = Tally(x.mean(0), x.std(0))
    empty.add(x[None], x[None], np.zeros((1, len(x)), np.bool_))
    assert empty.result() is None


def test_interior_and_edge_share_the_tokens_among_them() -> None:
    x, y = features(), features() + features(seed=5)
    found, near = Tally(x.mean(0), x.std(0)), np.arange(40)[None] < 10
    found.add(x[None], y[None], np.ones((1, 40), np.bool_), near)
    whole, inner, edge = found.result(), tally(x[10:], y[10:]).result(), tally(x[:10], y[:10]).result()
    assert whole is not None and inner is not None and edge is not None
    assert whole.interior is not None and whole.edge is not None
    assert (whole.interior.tokens, whole.edge.tokens) == (30, 10)
    assert whole.interior.cosine == pytest.approx(inner.cosine) and whole.edge.cosine == pytest.approx(edge.cosine)
