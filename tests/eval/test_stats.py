# SPDX-License-Identifier: Apache-2.0
"""Intervals against closed forms, known coverage and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vtprune.eval import stats


def coin(rate: float, questions: int, seed: int = 0) -> np.ndarray:
    """Exactly that share of right answers, shuffled."""
    right = np.arange(questions) < round(rate * questions)
    return np.random.default_rng(seed).permutation(right).astype(float)


def test_mean_over_kinds_by_hand() -> None:
    correct = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], float)
    kinds = ["a", "a", "a", "b"]
    assert stats.macro(correct, kinds).tolist() == pytest.approx([(2 / 3 + 1) / 2, (1 / 3 + 1) / 2])
    assert {k: v.tolist() for k, v in stats.per_kind(correct, kinds).items()} == {
        "a": pytest.approx([2 / 3, 1 / 3]),
        "b": [1.0, 1.0],
    }


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_width_follows_the_normal_interval(rate: float) -> None:
    questions = 400
    (found,) = stats.accuracy(coin(rate, questions)[:, None], ["k"] * questions)
    half = 1.96 * (rate * (1 - rate) / questions) ** 0.5
    assert found.value == rate
    assert found.low == pytest.approx(rate - half, abs=0.06 * half + 0.5 / questions)
    assert found.high == pytest.approx(rate + half, abs=0.06 * half + 0.5 / questions)


def test_variance_over_kinds_of_different_size() -> None:
    correct = np.concatenate([coin(0.5, 40), coin(0.9, 200)])
    drawn = stats.bootstrap(correct[:, None], ["a"] * 40 + ["b"] * 200, draws=20_000)[:, 0]
    expected = (0.5 * 0.5 / 40 + 0.9 * 0.1 / 200) / 4  # of the mean of two independent shares
    assert drawn.var() == pytest.approx(expected, rel=0.05)
    assert drawn.mean() == pytest.approx(0.7, abs=0.002)


def test_coverage() -> None:
    """The interval holds the true rate about as often as it says."""
    rng = np.random.default_rng(5)
    samples = (rng.random((120, 300)) < 0.7).astype(float)
    kinds = ["a", "b"] * 60
    held = [found.low <= 0.7 <= found.high for found in stats.accuracy(samples, kinds, draws=2000)]
    assert 0.90 <= np.mean(held) <= 0.98


def test_pairs_cancel_what_both_find_hard() -> None:
    rng = np.random.default_rng(1)
    first = (rng.random(500) < 0.6).astype(float)
    second = first.copy()
    second[np.flatnonzero(first)[:20]] = 0  # the same, but for 20 questions
    kinds = ["k"] * 500
    gain = stats.difference(first, second, kinds)
    assert gain.value == pytest.approx(0.04)
    assert 0 < gain.low < gain.high < 0.06
    apart = stats.accuracy(np.stack([first, second], 1), kinds)
    assert apart[0].low < apart[1].high, "intervals overlap although the difference is certain"
    assert stats.difference(first, first, kinds) == (0.0, 0.0, 0.0)


def test_a_difference_is_that_of_the_same_draws() -> None:
    correct = np.stack([coin(0.6, 90, 1), coin(0.5, 90, 2)], 1)
    kinds = ["a", "b", "c"] * 30
    drawn = stats.bootstrap(correct, kinds, draws=1000, seed=3)
    gain = stats.difference(correct[:, 0], correct[:, 1], kinds, draws=1000, seed=3)
    assert gain == pytest.approx(stats.interval(gain.value, drawn[:, 0] - drawn[:, 1]))


def test_seeded() -> None:
    correct = coin(0.5, 60)[:, None]
    runs = [stats.bootstrap(correct, ["k"] * 60, draws=1200, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="one row for each of the 2 kinds"):
        stats.bootstrap(np.zeros((3, 1)), ["a", "b"])
