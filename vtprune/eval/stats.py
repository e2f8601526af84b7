# SPDX-License-Identifier: Apache-2.0
"""Accuracy with intervals: a paired bootstrap over questions, drawn anew within each kind.

Kinds have fixed numbers of questions, so questions are drawn with replacement within their kind; the mean is taken over
kinds. All methods see the same draws, so a difference between two methods is taken question by question, and what is
hard for both cancels out. An interval of a share of exactly 0 or 1 has no width: nothing else was seen to draw from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
BLOCK = 500  # draws at a time: bounds the memory


class Interval(NamedTuple):
    """A value and the interval around it."""

    value: float
    low: float
    high: float


def per_kind(correct: np.ndarray, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Accuracy of each kind, in the order in which they first appear.

    Parameters
    ----------
    correct
        ``[E, ...]`` bool or numbers in [0, 1], one row per question.
    kinds
        Kind of each question.
    """
    names = np.asarray(kinds)
    return {kind: np.asarray(correct, float)[names == kind].mean(0) for kind in dict.fromkeys(kinds)}


def macro(correct: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Mean over kinds of the accuracy of each, shape ``correct.shape[1:]``."""
    return np.mean(list(per_kind(correct, kinds).values()), 0)


def bootstrap(correct: np.ndarray, kinds: Sequence[str], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means over kinds of questions drawn with replacement.

    Parameters
    ----------
    correct
        ``[E, M]`` bool or numbers, a column for each method; rows are the same questions for all.
    kinds
        Kind of each question.
    draws, seed
        How many draws, and the seed of the generator.

    Returns
    -------
    np.ndarray
        ``[draws, M]`` float64. Column m of one call and of another agree if `kinds`, `draws` and `seed` do.
    """
    correct = np.asarray(correct, float)
    if correct.ndim != 2 or len(correct) != len(kinds) or not len(kinds):
        raise ValueError(f"correct has shape {correct.shape}; expected one row for each of the {len(kinds)} kinds")
    rng = np.random.default_rng(seed)
    names = np.asarray(kinds)
    groups = [correct[names == kind] for kind in dict.fromkeys(kinds)]
    out = np.zeros((draws, correct.shape[1]))
    for start in range(0, draws, BLOCK):
        block = out[start : start + BLOCK]
        for rows in groups:
            # How often each question was drawn: one matrix product then serves all methods.
            drawn = rng.integers(len(rows), size=(len(block), len(rows)))
            drawn += len(rows) * np.arange(len(block))[:, None]
            times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
            block += times @ rows / len(rows)
    return out / len(groups)


def interval(value: float, drawn: np.ndarray, level: float = LEVEL) -> Interval:
    """The middle `level` of what was drawn (``[draws]``), around a value."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def accuracy(
    correct: np.ndarray, kinds: Sequence[str], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> list[Interval]:
    """Mean over kinds with its interval, of each method.

    Parameters
    ----------
    correct : np.ndarray
        ``[E, M]`` scores from 0 to 1 of M methods on the same E questions.
    kinds
        Kind of each question.
    level, draws, seed
        Of the interval, as in `bootstrap`.
    """
    drawn = bootstrap(correct, kinds, draws, seed)
    return [interval(value, drawn[:, m], level) for m, value in enumerate(macro(correct, kinds))]


def difference(
    first: np.ndarray,
    second: np.ndarray,
    kinds: Sequence[str],
    *,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """How much more of the same questions one method answers than another, mean over kinds.

    Parameters
    ----------
    first, second : np.ndarray
        ``[E]`` scores from 0 to 1 of each.
    kinds
        Kind of each question.
    level, draws, seed
        Of the interval, as in `bootstrap`.
    """
    gain = (np.asarray(first, float) - np.asarray(second, float))[:, None]
    return accuracy(gain, kinds, level=level, draws=draws, seed=seed)[0]
