# SPDX-License-Identifier: Apache-2.0
"""VASparse's formulas: optimality of delta, the sink factors, the contrast, clusters around density peaks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import NoHostSync
from hypothesis import given
from hypothesis import strategies as st

from vtprune.decoding import scores
from vtprune.decoding.rows import attention_rows, chunks, logit_rows


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(value: torch.Tensor, count: int) -> list[int]:
    return scores.top(value, torch.tensor(count)).nonzero()[:, 0].tolist()


# -- delta -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.floats(0, 50))
def test_the_largest_deltas_minimise_the_objective(seed: int, lam: float) -> None:
    """Specification 4.9.1: L = 8, S = 5, against all 56 choices, with P and q K as they are."""
    query, keys = torch.randn(6, generator=rng(seed)), torch.randn(8, 6, generator=rng(seed + 1))
    mass = torch.rand(8, generator=rng(seed + 2))
    among = torch.ones(8, dtype=torch.bool)
    share = mass.softmax(0)

    def objective(mask: torch.Tensor) -> float:
        return float(((keys @ query - (mask[:, None] * keys) @ query) ** 2).sum() - lam * (share * mask).sum())

    chosen = kept(scores.key_values((keys @ query) ** 2, mass, among, lam), 5)
    assert len(chosen) == 5
    mine = objective(torch.zeros(8).index_fill(0, torch.tensor(chosen), 1))
    best = min(objective(torch.zeros(8).index_fill(0, torch.tensor(c), 1)) for c in itertools.combinations(range(8), 5))
    assert mine == pytest.approx(best, rel=1e-4, abs=1e-4)


def test_lambda_goes_from_the_score_alone_to_the_image_alone() -> None:
    products = torch.tensor([3.0, -4.0, 1.0, 2.0])
    mass = torch.tensor([0.1, 0.2, 0.9, 0.5])
    among = torch.ones(4, dtype=torch.bool)
    for sign in (1, -1):  # squares do not care for the sign of the query
        assert kept(scores.key_values((sign * products) ** 2, mass, among, 0.0), 2) == [0, 1]
    assert kept(scores.key_values(products**2, mass, among, 1e6), 2) == [2, 3]


def test_only_candidates_are_kept_in_full_number_whatever_their_values() -> None:
    squares = torch.tensor([9.0, 1.0, math.nan, 1.0, 1.0, 9.0])
    among = torch.tensor([False, True, True, True, True, False])
    value = scores.key_values(squares, torch.zeros(6), among, 0.1)
    assert kept(value, 3) == [1, 3, 4]  # ties to the lowest index, NaN last
    assert kept(value, 2) == [1, 3]
    assert kept(value, 4) == [1, 2, 3, 4]
    share = scores.key_values(torch.zeros(6), torch.rand(6), among, 1.0)
    assert float(share[among].sum()) == pytest.approx(1)  # P sums to one over the candidates


def test_rows_of_a_batch_have_counts_of_their_own() -> None:
    value = torch.tensor([[1.0, 3.0, 2.0], [3.0, 2.0, 1.0]])[:, None].expand(-1, 2, -1)
    mask = scores.top(value, torch.tensor([[1, 2], [3, 0]]))
    assert mask.sum(-1).tolist() == [[1, 2], [3, 0]]
    assert mask[0, 0].tolist() == [False, True, False]


# -- sink --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 100), st.floats(0, 3))
def test_sink_factors_lie_between_one_and_one_plus_beta(seed: int, beta: float) -> None:
    columns = torch.rand(2, 3, 7, generator=rng(seed)) * 20
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :3] = False
    factors = scores.sink_factors(columns, valid, beta)
    assert bool((factors >= 1 - 1e-5).all() and (factors <= 1 + beta + 1e-5).all())
    weights = 1 + beta - factors if beta == 0 else (1 + beta - factors) / beta
    if beta > 0.01:
        assert torch.allclose(weights.sum(-1), torch.ones(2, 3), atol=1e-3)
        assert bool((weights[1, :, :3].abs() < 1e-3).all())


def test_the_sink_is_the_key_whose_logit_grows_least() -> None:
    factors = scores.sink_factors(torch.tensor([[[12.0, 0.5, 0.1]]]), torch.ones(1, 3, dtype=torch.bool), 0.1)
    assert factors[0, 0, 0] == pytest.approx(1.0, abs=1e-4)
    assert factors[0, 0, 1:].tolist() == pytest.approx([1.1, 1.1], abs=1e-4)


# -- contrast ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 100), st.floats(-50, 50), st.floats(-50, 50), st.floats(0.01, 2))
def test_constants_cancel_and_the_best_token_stays(seed: int, a: float, b: float, alpha: float) -> None:
    full, prior = torch.randn(3, 11, generator=rng(seed)), torch.randn(3, 11, generator=rng(seed + 1)) * 3
    out = scores.contrast(full, prior, alpha, 0.1)
    assert torch.allclose(scores.contrast(full + a, prior + b, alpha, 0.1).exp(), out.exp(), atol=1e-4)
    assert torch.allclose(out.exp().sum(-1), torch.ones(3), atol=1e-5)
    best = full.argmax(-1, keepdim=True)
    assert bool(out.gather(1, best).isfinite().all())
    # Row by row: what is plausible in one row says nothing about another.
    for row in range(3):
        assert torch.allclose(scores.contrast(full[row : row + 1], prior[row : row + 1], alpha, 0.1)[0], out[row])
        probability = full[row].softmax(0)
        assert torch.equal(out[row].isfinite(), probability >= 0.1 * probability.max())


def test_a_contrast_by_hand() -> None:
    full, prior = torch.tensor([[2.0, 1.9, -9.0]]), torch.tensor([[3.0, 0.0, -9.0]])
    out = scores.contrast(full, prior, 0.5, 0.1)
    # 1.5 * 2 - 0.5 * 3 = 1.5 against 1.5 * 1.9 = 2.85: what the prior would say anyway loses.
    assert out.argmax(-1).tolist() == [1]
    assert float(out[0, 1] - out[0, 0]) == pytest.approx(1.35)
    assert out[0, 2] == -math.inf
    assert scores.contrast(full, prior, 0.5, 0.0).isfinite().all()
    assert scores.contrast(full, prior, 0.5, 1.0).isfinite().tolist() == [[True, False, False]]


# -- clusters ----------------------------------------------------------------------------------------------------------


def test_two_clouds_have_two_peaks_in_their_middles() -> None:
    clouds = torch.tensor([[0.0, 0.1, -0.1, 0.2, 10.0, 10.1, 9.9, 10.3]])[..., None]
    home = scores.density_peaks(clouds, torch.ones(1, 8, dtype=torch.bool), torch.tensor([2]), neighbours=2)
    assert home[0].tolist() == [0] * 4 + [4] * 4
    left_out = torch.tensor([[True] * 3 + [False] + [True] * 4])
    assert scores.density_peaks(clouds, left_out, torch.tensor([2]), 2)[0].tolist() == [0, 0, 0, 3, 4, 4, 4, 4]


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 9))
def test_as_many_peaks_as_asked_for_and_every_key_at_its_nearest(seed: int, count: int, clusters: int) -> None:
    keys = torch.randn(2, 9, 4, generator=rng(seed))
    among = torch.rand(2, 9, generator=rng(seed + 1)).argsort(-1) < count
    clusters = min(clusters, count)
    home = scores.density_peaks(keys, among, torch.tensor([clusters, clusters]))
    for row in range(2):
        peaks = [i for i in range(9) if among[row, i] and home[row, i] == i]
        assert len(peaks) == clusters
        for i in range(9):
            if not among[row, i]:
                assert home[row, i] == i
            elif i not in peaks:
                far = torch.cdist(keys[row], keys[row])[i]
                assert int(home[row, i]) in peaks and far[home[row, i]] <= far[peaks].min() + 1e-4


def test_equal_keys_go_to_the_lowest_index() -> None:
    home = scores.density_peaks(torch.ones(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]))
    assert home[0].tolist() == [0, 1, 0, 0, 0]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_attention_rows_are_those_of_a_full_attention() -> None:
    query, keys = torch.randn(2, 4, 3, 8, generator=rng(0)), torch.randn(2, 2, 7, 8, generator=rng(1))
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :5] = False
    rows = attention_rows(query, keys, torch.tensor([4, 5, 6]), valid, 0.3)
    wide = keys.repeat_interleave(2, 1)
    mask = (torch.arange(7) <= torch.tensor([4, 5, 6])[:, None]) & valid[:, None, None]
    expected = (query @ wide.mT * 0.3).masked_fill(~mask, -math.inf).softmax(-1)
    assert torch.allclose(rows.flatten(1, 2), expected.nan_to_num(), atol=1e-6)
    assert float(rows[1, :, :, 0].abs().sum()) == 0  # a query of padding attends to nothing, and is no NaN
    assert torch.allclose(logit_rows(query, keys).flatten(1, 2), query @ wide.mT, atol=1e-5)


def test_chunks_cover_every_query_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.decoding import rows

    monkeypatch.setattr(rows, "CHUNK", 100)
    query = torch.zeros(2, 4, 9, 8)
    parts = chunks(query, 5)
    assert len(parts) == 5 and [i for part in parts for i in range(9)[part]] == list(range(9))


def test_no_formula_waits_for_the_device() -> None:
    with NoHostSync():
        value = scores.key_values(torch.rand(2, 9), torch.rand(2, 9), torch.ones(2, 9, dtype=torch.bool), 0.1)
        scores.top(value, torch.tensor([3, 4]))
        scores.sink_factors(torch.rand(1, 2, 9), torch.ones(1, 9, dtype=torch.bool), 0.1)
        scores.contrast(torch.rand(2, 9), torch.rand(2, 9), 0.1, 0.1)
        scores.density_peaks(torch.rand(2, 9, 4), torch.ones(2, 9, dtype=torch.bool), torch.tensor([2, 3]))
