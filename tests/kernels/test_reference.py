# SPDX-License-Identifier: Apache-2.0
"""The reference ops against vectors computed by hand, independent slow implementations, and their invariances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NoHostSync
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtprune.kernels import reference
from vtprune.kernels.reference import max_min, minmax, mmr, topk

NAN, INF = math.nan, math.inf

# Ragged pools as (lens, counts): empty pools, pools that keep nothing, all, or one of one row.
RAGGED = (
    ((5,), (3,)),
    ((7, 1, 0, 12, 4), (4, 1, 0, 12, 0)),
    ((0, 3, 9), (0, 0, 5)),
    ((2, 31, 8, 8), (2, 9, 7, 8)),
)


# -- independent implementations: plain loops over Python numbers in double precision ----------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def slow_mmr(x: np.ndarray, w: Sequence[float], k: int, lam: float, parallel_k: int = 1) -> list[int]:
    low, high = min(w), max(w)
    importance = [(v - low) / (high - low + 1e-6) for v in w]
    picked: list[int] = []
    while len(picked) < k:
        scores = {}
        for i in range(len(w)):
            if i in picked:
                continue
            if picked:
                scores[i] = lam * importance[i] - (1 - lam) * max(cosine(x[i], x[j]) for j in picked)
            else:
                scores[i] = importance[i]
        picked += sorted(scores, key=lambda i: (-scores[i], i))[: min(parallel_k, k - len(picked))]
    return picked


def slow_max_min(x: np.ndarray, k: int, seed: int | None = None) -> list[int]:
    n = len(x)
    distance = [[1 - cosine(x[i], x[j]) for j in range(n)] for i in range(n)]
    if seed is None:
        lonely = [min((distance[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)]
        seed = lonely.index(max(lonely))
    picked = [seed][:k]
    while len(picked) < k:
        scores = {i: min(distance[i][j] for j in picked) for i in range(n) if i not in picked}
        picked.append(min(scores, key=lambda i: (-scores[i], i)))
    return picked


def slow_topk(w: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(w)), key=lambda i: (-(-INF if math.isnan(w[i]) else w[i]), i))[:k]


def pool_by_pool(pick: Callable[[slice, int], list[int]], lens: Sequence[int], counts: Sequence[int]) -> list[int]:
    ends = accumulate(lens)
    pools = [(slice(end - n, end), k) for end, n, k in zip(ends, lens, counts, strict=True) if k]
    return [rows.start + i for rows, k in pools for i in pick(rows, k)]


def random_rows(rows: int, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator), torch.randn(rows, generator=generator)


def run_mmr(
    x: Tensor, w: Tensor, lens: Sequence[int], counts: Sequence[int], lam: float = 0.5, p: int = 1
) -> list[int]:
    return mmr(x, minmax(w, lens), lens, counts, lam, p).tolist()


# -- topk -------------------------------------------------------------------------------------------------------------


def test_topk_breaks_ties_by_index_and_takes_nan_for_minus_infinity() -> None:
    scores = torch.tensor([1.0, NAN, 3.0, 3.0, -INF, INF, -0.0, 0.0])
    assert topk(scores, (8,), (8,)).tolist() == [5, 2, 3, 0, 6, 7, 1, 4]


def test_topk_orders_pool_after_pool() -> None:
    scores = torch.tensor([1.0, 5.0, 9.0, 2.0, 4.0, 4.0])
    assert topk(scores, (2, 0, 1, 3), (2, 0, 1, 2)).tolist() == [1, 0, 2, 4, 5]


def test_topk_prefers_rows_of_minus_infinity_to_padding() -> None:
    scores = torch.tensor([-INF, NAN, 1.0, 2.0, 3.0, 4.0])
    assert topk(scores, (2, 4), (2, 1)).tolist() == [0, 1, 5]


@pytest.mark.parametrize("lens,counts", RAGGED)
def test_topk_equals_a_sort_of_each_pool(lens: tuple[int, ...], counts: tuple[int, ...]) -> None:
    scores = torch.randint(0, 4, (sum(lens),)).float()  # few values: many ties
    scores[:: max(1, sum(lens) // 3)] = NAN
    expected = pool_by_pool(lambda rows, k: slow_topk(scores[rows].tolist(), k), lens, counts)
    assert topk(scores, lens, counts).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_topk_takes_any_dtype(dtype: torch.dtype) -> None:
    assert topk(torch.tensor([1, 3, 2]).to(dtype), (3,), (2,)).tolist() == [1, 2]


# -- minmax -----------------------------------------------------------------------------------------------------------


def test_minmax_maps_each_pool_to_zero_to_one() -> None:
    values = torch.tensor([2.0, 4.0, 3.0, 7.0, 7.0])
    out = minmax(values, (3, 0, 2))
    torch.testing.assert_close(out, torch.tensor([0.0, 2 / (2 + 1e-6), 1 / (2 + 1e-6), 0.0, 0.0]), rtol=0, atol=1e-7)


def test_minmax_looks_past_values_that_are_not_finite() -> None:
    out = minmax(torch.tensor([NAN, 0.0, 1.0, INF, -INF]), (5,))
    assert out[0].isnan() and out[3] == INF and out[4] == -INF
    torch.testing.assert_close(out[1:3], torch.tensor([0.0, 1.0]))


def test_minmax_computes_in_fp32() -> None:
    values = torch.tensor([1.0, 1.0 + 2**-7, 2.0], dtype=torch.bfloat16)
    assert minmax(values, (3,))[1].item() == pytest.approx(2**-7, rel=1e-4)


# -- MMR --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lam,expected", [(1.0, [0, 1, 2]), (0.9, [0, 1, 2]), (0.5, [0, 2, 1]), (0.0, [0, 2, 1])], ids=str
)
def test_mmr_vector_t1(lam: float, expected: list[int]) -> None:
    x = torch.tensor([(1, 0), (0.8, 0.6), (0, 1), (0.6, 0.8)])
    assert run_mmr(x, torch.tensor([1, 0.9, 0.5, 0]), (4,), (3,), lam) == expected


@pytest.mark.parametrize("lam,second", [(0.0, 2), (0.5, 2), (0.66, 2), (0.67, 1), (1.0, 1)])
def test_mmr_vector_t2_duplicate(lam: float, second: int) -> None:
    x = torch.tensor([(1.0, 0), (1, 0), (0, 1)])
    assert run_mmr(x, torch.tensor([3.0, 2, 1]), (3,), (2,), lam) == [0, second]


def test_mmr_rewards_rows_that_point_away() -> None:
    # A negative cosine is a bonus: -1 against 0 decides against the larger importance.
    x = torch.tensor([(1.0, 0), (0, 1), (-1, 0)])
    assert run_mmr(x, torch.tensor([1.0, 0.5, 0.0]), (3,), (2,), 0.5) == [0, 2]


def test_mmr_vector_t3() -> None:
    for case in range(200):
        x, w = random_rows(3 + case % 18, seed=case)
        n = len(w)
        k = 1 + case % n
        assert run_mmr(x, w, (n,), (k,), 1.0) == slow_topk(w.tolist(), k)
        assert run_mmr(x, w, (n,), (k,), 0.0) == slow_max_min(x.double().numpy(), k, seed=int(w.argmax()))


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("parallel_k", [1, 2, 5])
@pytest.mark.parametrize("lens,counts", RAGGED)
def test_mmr_equals_the_slow_one(lens: tuple[int, ...], counts: tuple[int, ...], parallel_k: int, lam: float) -> None:
    x, w = random_rows(sum(lens))
    xs = x.double().numpy()
    expected = pool_by_pool(lambda r, k: slow_mmr(xs[r], w[r].tolist(), k, lam, parallel_k), lens, counts)
    assert run_mmr(x, w, lens, counts, lam, parallel_k) == expected


def test_mmr_in_one_round_is_topk() -> None:
    x, w = random_rows(20)
    assert run_mmr(x, w, (20,), (9,), 0.1, 9) == slow_topk(w.tolist(), 9)
    assert run_mmr(x, w, (20,), (9,), 0.1, 1) != slow_topk(w.tolist(), 9)


def test_mmr_ties_go_to_the_lowest_index() -> None:
    x = torch.eye(6)[[0, 1, 1, 2, 3, 0]]
    assert run_mmr(x, torch.ones(6), (6,), (6,)) == [0, 1, 3, 4, 2, 5]


# -- max-min ----------------------------------------------------------------------------------------------------------


def test_max_min_by_hand() -> None:
    # Nearest neighbours are 10, 10, 10 and 80 degrees away, so 100 comes first; then 0 (100 away), 20 (20 away), 10.
    degrees = torch.tensor([0.0, 10, 20, 100]).deg2rad()
    x = torch.stack([degrees.cos(), degrees.sin()], 1)
    assert max_min(x, (4,), (4,)).tolist() == [3, 0, 2, 1]


def test_max_min_works_with_one_row_and_with_two() -> None:
    assert max_min(torch.ones(4, 3), (1, 2, 1), (1, 2, 1)).tolist() == [0, 1, 2, 3]


def test_max_min_ties_go_to_the_lowest_index() -> None:
    x = torch.eye(5)[[1, 1, 0, 2, 3]]
    assert max_min(x, (5,), (5,)).tolist() == [2, 0, 3, 4, 1]


def test_a_broken_row_is_nobodys_neighbour() -> None:
    # 100, 120 and 140 degrees apart: the last has the farthest neighbour. A zero row would be 90 away from them all.
    degrees = torch.tensor([0.0, 100, 220, NAN]).deg2rad()
    x = torch.stack([degrees.cos(), degrees.sin()], 1)
    assert max_min(x, (4,), (4,)).tolist() == [2, 0, 1, 3]


def test_mutual_nearest_neighbours_tie_even_if_the_two_halves_round_differently() -> None:
    x, _ = random_rows(2)
    cosines = reference.Cosines(x, reference.pools_of(x, (2,), (1,)))
    assert cosines.grams[0] is not None
    cosines.grams[0][0, 1] += 1e-6
    nearest = cosines.nearest()[0]
    assert nearest[0] == nearest[1]


@pytest.mark.parametrize("lens,counts", RAGGED)
@pytest.mark.parametrize("seed", range(3))
def test_max_min_equals_the_slow_one(lens: tuple[int, ...], counts: tuple[int, ...], seed: int) -> None:
    x, _ = random_rows(sum(lens), seed=seed)
    xs = x.double().numpy()
    expected = pool_by_pool(lambda rows, k: slow_max_min(xs[rows], k), lens, counts)
    assert max_min(x, lens, counts).tolist() == expected


# -- all greedy ops ---------------------------------------------------------------------------------------------------

Op = Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], list[int]]

OPS: dict[str, Op] = {
    "topk": lambda x, w, lens, counts: topk(w, lens, counts).tolist(),
    "mmr": run_mmr,
    "mmr-3": lambda x, w, lens, counts: run_mmr(x, w, lens, counts, 0.5, 3),
    "max_min": lambda x, w, lens, counts: max_min(x, lens, counts).tolist(),
}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
each_greedy = pytest.mark.parametrize(
    "op", [OPS[n] for n in ("mmr", "mmr-3", "max_min")], ids=["mmr", "mmr-3", "max_min"]
)


@each_op
def test_a_selection_is_a_prefix_of_the_larger_one(op: Op) -> None:
    x, w = random_rows(25)
    orders = [op(x, w, (25,), (k,)) for k in range(26)]
    assert all(longer[:-1] == shorter for shorter, longer in pairwise(orders))
    assert sorted(orders[-1]) == list(range(25))


@each_op
@pytest.mark.parametrize("dim", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pools_pick_the_same_alone_as_together(op: Op, dim: int, dtype: torch.dtype) -> None:
    lens, counts = (17, 1, 40, 0, 23, 40), (9, 1, 40, 0, 11, 3)
    x, w = random_rows(sum(lens), dim)
    x[17 + 1 : 17 + 1 + 20] = x[17 + 1 + 20 : 17 + 1 + 40]  # duplicates: exact ties, which rounding would break
    x = x.to(dtype)
    one_by_one = pool_by_pool(lambda r, k: op(x[r].clone(), w[r].clone(), (r.stop - r.start,), (k,)), lens, counts)
    assert op(x, w, lens, counts) == one_by_one


@each_op
@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), order=st.permutations(range(15)), k=st.integers(1, 15))
def test_a_permutation_of_the_rows_permutes_the_picks(op: Op, seed: int, order: list[int], k: int) -> None:
    x, w = random_rows(15, seed=seed)
    permuted = op(x[order], w[order], (15,), (k,))
    if op is OPS["max_min"]:
        # Two rows are each other's nearest neighbours, so the seed is often a tie that the index breaks.
        seeds = {slow_max_min(x.double().numpy(), 1)[0], order[permuted[0]]}
        assert [order[i] for i in permuted] in [slow_max_min(x.double().numpy(), k, seed=s) for s in seeds]
        lonely = [max(cosine(x[s].numpy(), x[j].numpy()) for j in range(15) if j != s) for s in seeds]
        assert max(lonely) - min(lonely) < 1e-5
    else:
        assert [order[i] for i in permuted] == op(x, w, (15,), (k,))


@each_greedy
@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), exponents=st.lists(st.integers(-20, 20), min_size=15, max_size=15))
def test_the_length_of_a_row_does_not_matter(op: Op, seed: int, exponents: list[int]) -> None:
    x, w = random_rows(15, seed=seed)
    x[7] = x[3]  # a tie; powers of two do not round
    assert op(x * 2.0 ** torch.tensor(exponents)[:, None], w, (15,), (8,)) == op(x, w, (15,), (8,))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_scale_and_shift_of_the_importance_do_not_matter(seed: int, scale: float, shift: float) -> None:
    x, w = random_rows(15, seed=seed)
    w = w.sort().values[torch.randperm(15)].mul(8).round()  # ties, and whole numbers that survive the shift
    moved = (w.double() * scale + shift).float()
    assert run_mmr(x, moved, (15,), (8,)) == run_mmr(x, w, (15,), (8,))


@each_greedy
@pytest.mark.parametrize("gram_rows", [0, 20, 40])
def test_columns_on_demand_pick_the_same(op: Op, gram_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lens, counts = (40, 3, 21, 0, 60), (20, 2, 21, 0, 7)
    x, w = random_rows(sum(lens), 12)
    expected = op(x, w, lens, counts)
    monkeypatch.setattr(reference, "GRAM_ROWS", gram_rows)
    monkeypatch.setattr(reference, "BLOCK_ROWS", 7)
    assert op(x, w, lens, counts) == expected


def test_a_large_pool_makes_no_square_matrix() -> None:
    n = reference.GRAM_ROWS + 4
    x, w = random_rows(n + 5)
    largest = 0

    class Watch(NoHostSync):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = super().__torch_dispatch__(func, types, args, kwargs)
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch():
        order, importance = max_min(x, (n, 5), (6, 2)), minmax(w, (n, 5))
        mmr(x, importance, (n, 5), (6, 2), 0.5)
    assert largest <= n * reference.BLOCK_ROWS

    unit = (x[:n] / x[:n].norm(dim=1, keepdim=True)).double()
    gram = unit @ unit.T
    picks = [int(gram.clone().fill_diagonal_(-2).amax(1).argmin())]
    while len(picks) < 6:
        picks.append(int(gram[picks].amax(0).argmin()))
    assert order[:6].tolist() == picks


@each_greedy
@pytest.mark.parametrize("gram_rows", [0, 4096])
def test_broken_rows_come_last(op: Op, gram_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GRAM_ROWS", gram_rows)
    x, w = random_rows(12)
    expected = op(x, w, (12,), (12,))
    at = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14]  # where the good rows go
    y, v = torch.empty(15, 6), torch.full((15,), 100.0)
    y[at], v[at] = x, w
    y[2], y[12], y[13] = NAN, torch.tensor([1, INF, 0, 0, 0, 0]), -INF
    v[[2, 12, 13]] = w.mean()
    assert op(y, v, (15,), (15,)) == [at[i] for i in expected] + [2, 12, 13]


def test_rows_without_importance_come_last() -> None:
    x, w = random_rows(8)
    for lam in (0.0, 0.5, 1.0):
        v = torch.cat([torch.tensor([NAN, -INF]), w])
        y = torch.cat([x[:2], x])
        assert run_mmr(y, v, (10,), (10,), lam) == [i + 2 for i in run_mmr(x, w, (8,), (8,), lam)] + [0, 1]


@each_greedy
@pytest.mark.parametrize("fill", [0.0, NAN])
def test_rows_that_are_all_alike_are_taken_in_order(op: Op, fill: float) -> None:
    assert op(torch.full((5, 3), fill), torch.full((5,), fill), (5,), (5,)) == [0, 1, 2, 3, 4]


@each_greedy
def test_autocast_does_not_change_the_picks(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = random_rows(200, 16)
    x = x + 4  # cosines close together
    expected = op(x, w, (200,), (100,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(x, w, (200,), (100,)) == expected
        # fp64 is never lowered, fp32 outside of a guard would be.
        monkeypatch.setattr(reference, "products", lambda one, other: one.float() @ other.float().T)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        assert op(x, w, (200,), (100,)) != expected, "the data is too easy to show a loss of precision"


@each_op
def test_no_gradient_flows_and_inference_mode_works(op: Op) -> None:
    x, w = random_rows(10)
    expected = op(x, w, (10,), (6,))
    assert op(x.clone().requires_grad_(), w.clone().requires_grad_(), (10,), (6,)) == expected
    with torch.inference_mode():
        assert op(x.clone(), w.clone(), (10,), (6,)) == expected


@each_op
def test_strided_rows_do(op: Op) -> None:
    x, w = random_rows(20, 12)
    expected = op(x[::2, ::3].contiguous(), w[::2].contiguous(), (10,), (6,))
    assert op(x[::2, ::3], w[::2], (10,), (6,)) == expected


def test_inputs_are_left_alone() -> None:
    x, w = random_rows(10)
    before = x.clone(), w.clone()
    for op in OPS.values():
        op(x, w, (4, 6), (2, 5))
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


def test_no_op_waits_for_the_device() -> None:
    lens, counts = (7, 0, 12), (3, 0, 12)
    x, w = random_rows(19)
    with NoHostSync():
        topk(w, lens, counts)
        mmr(x, minmax(w, lens), lens, counts, 0.5, 2)
        max_min(x, lens, counts)
        with pytest.raises(AssertionError, match="waits"):
            w.max().item()


@each_op
@pytest.mark.parametrize("lens,counts", [((3,), (4,)), ((3,), (-1,)), ((2,), (1,)), ((1, 2), (1,)), ((3, 1), (1, 1))])
def test_counts_and_lens_must_fit(op: Op, lens: tuple[int, ...], counts: tuple[int, ...]) -> None:
    x, w = random_rows(3)
    with pytest.raises(ValueError):
        op(x, w, lens, counts)


def test_importance_must_fit() -> None:
    x, w = random_rows(3)
    with pytest.raises(ValueError, match="importance"):
        mmr(x, w[:2], (3,), (1,), 0.5)


@each_op
@pytest.mark.parametrize("lens", [(), (0,), (0, 0), (4, 2)])
def test_nothing_to_pick(op: Op, lens: tuple[int, ...]) -> None:
    x, w = random_rows(sum(lens))
    assert op(x, w, lens, (0,) * len(lens)) == []


@pytest.mark.gpu
@each_op
def test_a_gpu_picks_the_same_without_waiting(op: Op) -> None:
    lens, counts = (576, 1, 0, 144, 576), (64, 1, 0, 144, 200)
    x, w = random_rows(sum(lens), 128)
    expected = op(x, w, lens, counts)
    assert op(x.cuda(), w.cuda(), lens, counts) == expected
    x, w = x.cuda(), w.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk(w, lens, counts)
        mmr(x, minmax(w, lens), lens, counts, 0.5)
        max_min(x, lens, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_topk_of_one_pool_is_that_of_a_pool_among_others() -> None:
    scores = torch.tensor([3.0, -0.0, 0.0, math.nan, 3.0, -math.inf, 7.0])
    alone = reference.topk(scores, (7,), (6,))
    assert alone.tolist() == [6, 0, 4, 1, 2, 3]
    assert reference.topk(torch.cat([scores, scores[:2]]), (7, 2), (6, 1)).tolist() == [*alone.tolist(), 7]
