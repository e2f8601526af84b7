# SPDX-License-Identifier: Apache-2.0
"""The best rows of pools: the kernel against the reference. The interpreter on a CPU, in full on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vtprune.kernels import reference, select

pytest.importorskip("triton")
from vtprune.kernels import topk as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf


def check(scores: Tensor, lens: Sequence[int], counts: Sequence[int]) -> None:
    got = select.topk(scores, lens, counts, "triton")
    order = reference.topk(scores, lens, counts)
    assert got.order.dtype == got.index.dtype == torch.int64
    assert got.order.tolist() == order.tolist()
    assert got.index.tolist() == order.sort().values.tolist()


def drawn(n: int, dtype: torch.dtype = torch.float32, steps: int = 12) -> Tensor:
    """Few distinct values, of both signs: many ties."""
    g = torch.Generator().manual_seed(n)
    return (torch.randint(-steps, steps, (n,), generator=g) / 4).to(dtype).to(DEVICE)


def test_ties_zeros_and_what_is_no_number(poison: None) -> None:
    scores = torch.tensor([0.0, NAN, -0.0, INF, 2.0, -INF, NAN, 2.0, -3.0, -1e-40, 1e-40, INF], device=DEVICE)
    for k in range(len(scores) + 1):
        check(scores, (12,), (k,))
    check(torch.full((5,), NAN, device=DEVICE), (5,), (3,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_ragged_pools(dtype: torch.dtype, poison: None) -> None:
    check(drawn(160, dtype), (7, 0, 130, 1, 20, 2), (3, 0, 41, 1, 0, 2))
    check(drawn(64, dtype)[::2], (16, 16), (5, 16))
    check(drawn(0, dtype), (), ())
    check(drawn(0, dtype), (0, 0), (0, 0))


@pytest.mark.parametrize("most", [1024, 64])
def test_pools_longer_than_one_program(most: int, poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_WHOLE", most)
    monkeypatch.setattr(op, "_STEP", 128)
    check(drawn(300), (40, 150, 0, 110), (11, 150, 0, 1))


@pytest.mark.parametrize(("name", "most"), [("MOST_POOLS", 1), ("MOST_PAIRS", 15 * 15 + 16 * 16 - 1)])
def test_more_and_longer_ones_are_sorted(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[int] = []
    own = op.topk
    monkeypatch.setattr(op, "topk", lambda *given: reached.append(1) or own(*given))
    check(drawn(31), (15, 16), (4, 5))
    monkeypatch.setattr(op, name, most)
    check(drawn(31), (15, 16), (4, 5))
    assert len(reached) == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError):
        select.topk(drawn(8), (4, 3), (1, 1), "triton")
    with pytest.raises(ValueError):
        select.topk(drawn(8), (4, 4), (1, 5), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [576, 1024, 1025, 2880, 4096, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_size(n: int, dtype: torch.dtype) -> None:
    for steps in (12, 1 << 20):
        for k in (1, n // 9, n):
            check(drawn(n, dtype, steps), (n,), (k,))
            check(drawn(3 * n + 5, dtype, steps), (n, 5, n, n), (k, 2, 0, k))


@pytest.mark.gpu
def test_a_captured_choice_is_replayed_on_other_scores() -> None:
    scores = torch.randn(2880, device="cuda")
    select.topk(scores, (2880,), (160,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picks = select.topk(scores, (2880,), (160,))
    for seed in range(3):
        scores.copy_(torch.randn(2880, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert picks.order.tolist() == reference.topk(scores, (2880,), (160,)).tolist()
        assert picks.index.tolist() == picks.order.sort().values.tolist()
