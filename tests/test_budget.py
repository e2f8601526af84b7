# SPDX-License-Identifier: Apache-2.0
"""How many tokens stay: what a budget may be, how it is rounded, how it is spread."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_tokens
from hypothesis import given
from hypothesis import strategies as st

from vtprune import budget as budgets
from vtprune.budget import Budget, FixedBudget, Pools, check_keep, fill, largest_remainder, parse_keep
from vtprune.errors import ConfigError
from vtprune.tokens import Selection

# -- what a budget may be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep,expected",
    [
        (0.25, 0.25),
        (1.0, 1.0),
        (1, 1),
        (128, 128),
        (10**9, 10**9),
        (1e-9, 1e-9),
        (Fraction(1, 4), 0.25),
        (np.float32(0.25), 0.25),
        (np.int64(7), 7),
    ],
    ids=repr,
)
def test_good_budgets(keep: Any, expected: float | int) -> None:
    checked = check_keep(keep)
    assert checked == expected and type(checked) is type(expected)
    assert Budget(keep).keep == expected


BAD_KEEP = [0, -1, 0.0, -0.5, 1.5, 128.0, 1 + 1e-9, math.nan, math.inf, -math.inf]
WRONG_TYPES = [True, False, np.True_, "0.5", "128t", None, [0.5], {}, 1j, torch.tensor(0.5)]


@pytest.mark.parametrize("keep", BAD_KEEP + WRONG_TYPES, ids=repr)
def test_bad_budgets_name_the_value_and_the_cure(keep: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget(keep)
    message = str(caught.value)
    assert message.startswith("keep=") and str(keep) in message and "\n" not in message
    assert "give a fraction kept in (0, 1], such as 0.25, or a whole number" in message


def test_a_whole_float_suggests_the_count() -> None:
    with pytest.raises(ConfigError, match=r"did you mean the count keep=128\?"):
        check_keep(128.0)
    with pytest.raises(ConfigError) as caught:
        check_keep(1.5)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "option,value", [("scope", "image"), ("scope", None), ("allocation", "even"), ("allocation", 1)]
)
def test_bad_scope_and_allocation(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{option}={value!r} is unknown; choose one of "):
        Budget(0.5, **{option: value})


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,expected",
    [
        ("0.25", 0.25),
        (".5", 0.5),
        ("1.0", 1.0),
        ("1e-2", 0.01),
        ("1/9", 1 / 9),
        (" 1 / 9 ", 1 / 9),
        ("1/1", 1.0),
        ("25%", 0.25),
        ("12.5%", 0.125),
        ("100%", 1.0),
        ("128t", 128),
        ("1T", 1),
        (" 64 t", 64),
    ],
)
def test_parse_keep(text: str, expected: float | int) -> None:
    parsed = parse_keep(text)
    assert parsed == expected and type(parsed) is type(expected)


@pytest.mark.parametrize(
    "text,cure",
    [
        ("1", "write 1t for 1 tokens or 1.0 for all"),
        ("128", "write 128t"),
        ("+3", "could be a fraction or a count"),
        ("0", "keeps no token"),
        ("-5", "keeps no token"),
        ("0t", "keeps no token"),
        ("-5t", "keeps no token"),
        ("1.5t", "is not a budget"),
        ("0%", "outside"),
        ("101%", "outside"),
        ("-25%", "outside"),
        ("1.5", "outside"),
        ("9/1", "outside"),
        ("-1/9", "outside"),
        ("0/9", "outside"),
        ("1/0", "is not a budget"),
        ("1/2/3", "is not a budget"),
        ("0.5/2", "is not a budget"),
        ("9" * 400 + "/1", "is not a budget"),
        ("nan", "outside"),
        ("nan%", "outside"),
        ("inf", "outside"),
        ("1e999", "outside"),
        ("", "is not a budget"),
        ("t", "is not a budget"),
        ("%", "is not a budget"),
        ("/", "is not a budget"),
        ("half", "is not a budget"),
        ("0,25", "is not a budget"),
        ("25 percent", "is not a budget"),
        ("128 tokens", "is not a budget"),
    ],
)
def test_parse_keep_refuses(text: str, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keep(text)
    assert cure in str(caught.value) and "\n" not in str(caught.value)


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n,keep,expected",
    [
        (576, 0.25, 144),
        (576, 1 / 9, 64),
        (2880, 1 / 9, 320),
        (576, 0.1112, 64),
        (576, 0.2223, 128),
        (576, 0.3334, 192),
        (576, 0.1111, 63),  # floor, not round: 63.99
        (10, 0.3, 3),  # 0.3 * 10 falls short of 3 in binary
        (10, 0.7, 7),
        (100, 0.29, 29),
        (3, 0.1, 1),  # at least one
        (1, 1e-9, 1),
        (7, 1.0, 7),
        (0, 0.5, 0),
        (576, 128, 128),
        (100, 128, 100),  # never more than there are
        (0, 5, 0),
        (576, 1, 1),
    ],
)
def test_count_of_an_image(n: int, keep: float | int, expected: int) -> None:
    assert Budget(keep).image_count(n) == expected


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_fraction_of_whole_numbers_gives_the_whole_number(n: int, k: int) -> None:
    k = min(k, n)
    assert Budget(k / n).image_count(n) == k


@pytest.mark.parametrize(
    "total,weights,expected",
    [
        (10, (5, 5, 5), (4, 3, 3)),  # ties go to the lowest index
        (1, (1, 1, 1), (1, 0, 0)),
        (2, (3, 3, 3, 3), (1, 1, 0, 0)),
        (5, (1, 9), (1, 4)),  # 0.5 and 4.5: a tie again
        (7, (2, 3, 5), (1, 2, 4)),  # 1.4, 2.1, 3.5
        (10, (2, 3, 5), (2, 3, 5)),
        (0, (4, 4), (0, 0)),
        (3, (0, 6, 0), (0, 3, 0)),
        (0, (0, 0), (0, 0)),
        (0, (), ()),
    ],
)
def test_largest_remainder_by_hand(total: int, weights: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert largest_remainder(total, weights) == expected


@given(st.lists(st.integers(0, 3000), max_size=12), st.floats(0, 1))
def test_largest_remainder_spends_all_and_overdraws_none(weights: list[int], fraction: float) -> None:
    full = sum(weights)
    total = int(full * fraction)
    shares = largest_remainder(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert 0 <= share <= weight
        assert full == 0 or abs(Fraction(share) - Fraction(total * weight, full)) < 1


# -- where tokens compete ---------------------------------------------------------------------------------------------

# Two images (36; 20 + 21 in two views), no image, and one image in three views (36 + 4 + 15).
SAMPLES = [[[(6, 6)], [(4, 5), (3, 7)]], [], [[(6, 6), (2, 2), (5, 3)]]]


@pytest.mark.parametrize(
    "budget,lens,counts",
    [
        # 9 of 36; 10 of 41 as 4.9 and 5.1; 13 of 55 as 8.51, 0.95 and 3.55.
        (Budget(0.25), (36, 20, 21, 36, 4, 15), (9, 5, 5, 8, 1, 4)),
        (Budget(0.25, allocation="pooled"), (36, 41, 55), (9, 10, 13)),
        (Budget(0.25, scope="joint"), (77, 0, 55), (19, 0, 13)),
        (Budget(0.25, scope="joint", allocation="pooled"), (77, 0, 55), (19, 0, 13)),
        (Budget(40), (36, 20, 21, 36, 4, 15), (36, 20, 20, 26, 3, 11)),
        (Budget(40, scope="joint"), (77, 0, 55), (76, 0, 40)),
        (Budget(40, allocation="proportional"), (36, 20, 21, 36, 4, 15), (35, 20, 21, 26, 3, 11)),
        (Budget(0.25, allocation="proportional"), (36, 20, 21, 36, 4, 15), (9, 5, 5, 8, 1, 4)),
        (Budget(0.25, scope="joint", allocation="proportional"), (77, 0, 55), (19, 0, 13)),
        (Budget(1.0), (36, 20, 21, 36, 4, 15), (36, 20, 21, 36, 4, 15)),
        (Budget(1e-6), (36, 20, 21, 36, 4, 15), (1, 0, 1, 1, 0, 0)),
    ],
    ids=str,
)
def test_pools_by_hand(budget: Budget, lens: tuple[int, ...], counts: tuple[int, ...]) -> None:
    assert budget.pools(make_tokens(SAMPLES)) == (lens, counts)


@pytest.mark.parametrize("scope", ["per_image", "joint"])
@pytest.mark.parametrize("allocation", ["equal", "pooled"])
@pytest.mark.parametrize("keep", [0.01, 0.25, 1 / 3, 0.99, 1, 13, 500])
def test_pools_spend_exactly_the_budget_of_each_image(keep: float | int, allocation: str, scope: str) -> None:
    tokens = make_tokens(SAMPLES)
    pools = Budget(keep, scope, allocation).pools(tokens)
    assert sum(pools.lens) == len(tokens.features)
    assert sum(pools.counts) == sum(Budget(keep).image_count(n) for n in (36, 41, 55))
    assert all(0 <= k <= n for n, k in zip(pools.lens, pools.counts, strict=True))


def test_a_video_is_one_image() -> None:
    tokens = make_tokens([[[(4, 4)] * 6]], kind="frame")
    assert Budget(0.25).pools(tokens).counts == (4,) * 6
    assert Budget(15).pools(tokens).counts == (3, 3, 3, 2, 2, 2)


def test_a_later_stage_counts_from_what_the_image_came_with() -> None:
    tokens = make_tokens([[[(2, 5), (2, 5)], [(2, 2)]]])  # 20 and 4 left
    later = replace(tokens, ctx={"image_lens": (80, 16)})
    assert Budget(0.125).pools(later).counts == (5, 5, 2)
    assert Budget(0.5).pools(later).counts == (10, 10, 4)  # 40 and 8 are more than what is left
    assert Budget(0.125, scope="joint").pools(later).counts == (12,)


def test_no_images() -> None:
    assert Budget(0.5).pools(make_tokens([])) == ((), ())
    assert Budget(0.5, scope="joint").pools(make_tokens([[], []])) == ((), ())


def test_proportional_images_share_what_the_sample_may_keep() -> None:
    tokens = make_tokens([[[(10, 10)], [(2, 5)]], [[(3, 4), (3, 4)]]])
    assert Budget(10).pools(tokens).counts == (10, 10, 5, 5)
    assert Budget(10, allocation="proportional").pools(tokens).counts == (18, 2, 5, 5), "20 in all: 10 to 1"
    later = replace(tokens, ctx={"image_lens": (400, 40, 96)})
    assert Budget(0.25, allocation="proportional").pools(later).counts == (100, 10, 12, 12), "never more than is left"
    assert Budget(0.125, allocation="proportional").pools(later).counts == (50, 5, 6, 6)


# -- allocations of methods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total,weights,caps,expected",
    [
        (10, [1, 1], [9, 9], (5, 5)),
        (7, [1, 1, 1], [9, 9, 9], (3, 2, 2)),
        (10, [100, 1, 1], [4, 5, 6], (4, 3, 3)),
        (12, [100, 1, 1], [4, 3, 6], (4, 3, 5)),
        (15, [3, 2, 1], [4, 5, 6], (4, 5, 6)),
        (3, [0, 0, 0], [2, 2, 2], (1, 1, 1)),
        (3, [1, 0, 0], [1, 1, 3], (1, 1, 1)),
        (0, [1, 2], [3, 3], (0, 0)),
        (0, [], [], ()),
    ],
)
def test_filling_by_weight(total: int, weights: list[float], caps: list[int], expected: tuple[int, ...]) -> None:
    assert fill(total, weights, caps) == expected


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 50)), min_size=1, max_size=8), st.floats(0, 1, allow_nan=False)
)
def test_filling_spends_exactly_the_total(parts: list[tuple[float, int]], part: float) -> None:
    weights, caps = [w for w, _ in parts], [c for _, c in parts]
    total = int(part * sum(caps))
    counts = fill(total, weights, caps)
    assert sum(counts) == total and all(0 <= k <= c for k, c in zip(counts, caps, strict=True))


def test_an_allocation_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "_POLICIES", dict(budgets._POLICIES))

    @budgets.allocation("first")
    def first(tokens: Any, keep: float | int, counts: Any) -> tuple[int, ...]:
        assert keep == 0.25
        return tuple(
            k if s == tokens.seg_image.index(i) else 0 for s, i in enumerate(tokens.seg_image) for k in [counts[i]]
        )

    tokens = make_tokens([[[(6, 6), (2, 2)]], [[(4, 4)]]])
    assert Budget(0.25, allocation="first").pools(tokens) == ((36, 4, 16), (10, 0, 4))
    assert "first" in budgets.allocations()
    with pytest.raises(
        ConfigError, match="choose one of equal, proportional, pooled, change, first, globalcom2, vidcom2"
    ):
        Budget(0.25, allocation="second")


def test_a_fixed_budget_says_what_it_was_given() -> None:
    assert FixedBudget(3, given=Pools((4,), (2,))).pools(make_tokens([[[(2, 2)]]])) == ((4,), (2,))


def test_one_token_is_not_one_whole() -> None:
    """1 and 1.0 are equal to Python, and pools are remembered."""
    tokens = make_tokens([[[(2, 3)], [(1, 3)]]])
    for _ in range(2):
        assert Budget(1.0).pools(tokens).counts == (6, 3)
        assert Budget(1).pools(tokens).counts == (1, 1)


@pytest.mark.parametrize("scope", ["per_image", "joint"])
@pytest.mark.parametrize("allocation", ["equal", "proportional", "pooled"])
def test_borders_from_the_host_are_those_of_the_rows(scope: str, allocation: str) -> None:
    """Where pools are segments the host knows where the kept rows of each end; elsewhere they are searched for."""
    tokens = make_tokens(SAMPLES)
    pools = Budget(0.3, scope, allocation).pools(tokens)
    starts = [sum(pools.lens[:i]) for i in range(len(pools.lens))]
    rows = [torch.randperm(n)[:k] + start for n, k, start in zip(*pools, starts, strict=True)]
    order = torch.cat(rows)
    known, searched = Selection.from_order(order, tokens, pools), Selection.from_order(order, tokens)
    assert torch.equal(known.cu_seqlens, searched.cu_seqlens) and torch.equal(known.index, searched.index)
