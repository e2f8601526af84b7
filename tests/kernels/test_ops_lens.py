# SPDX-License-Identifier: Apache-2.0
"""Lens top-k and rank: kernels against PyTorch. The interpreter on a CPU, in full on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels import lens_topk as op

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
full = pytest.mark.gpu


def problem(n: int, v: int, d: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small whole numbers, whose products are exact: all forms find the same, ties included."""
    g = torch.Generator().manual_seed(seed)
    x, table = (torch.randint(-3, 4, (rows, d), generator=g).to(dtype).to(DEVICE) for rows in (n, v))
    return x, table


def check(x: Tensor, table: Tensor, k: int, inverse: Tensor | None = None, exact: bool = True) -> None:
    values, ids = op.lens_topk(x, table, k, inverse=inverse, backend="triton")
    expected, wanted = op.lens_topk(x, table, k, inverse=inverse, backend="torch")
    assert values.dtype == torch.float32 and ids.dtype == torch.int64 and values.shape == ids.shape == (len(x), k)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)
    if exact:
        assert torch.equal(ids, wanted)
    else:
        assert (ids == wanted).float().mean() > 0.99
    # Ids belong to their values, are taken once, and ties ascend.
    sound = ids >= 0
    assert torch.equal(sound, values > -math.inf)
    assert ((values[:, 1:] < values[:, :-1]) | ~sound[:, 1:] | (ids[:, 1:] > ids[:, :-1])).all()


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that small problems have many."""
    if not ON_GPU:
        monkeypatch.setattr(op, "_HALF", (16, 32, 16, 4, 2))
        monkeypatch.setattr(op, "_FULL", (16, 16, 16, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_topk_finds_what_pytorch_finds(dtype: torch.dtype, tiles: None, poison: None) -> None:
    x, table = problem(18, 70, 20, dtype)
    table[50:] = table[:20]
    check(x, table, 3)


def test_the_analytic_vectors() -> None:
    """Specification 3.8: the four cosines of (10, 1), any length of it, and a word that finds itself."""
    table = torch.zeros(4, 16)
    table[:, :2] = torch.tensor([(1, 0), (0, 1), (-1, 0), (0.6, 0.8)])
    h = torch.zeros(3, 16)
    h[:, :2] = torch.tensor([(10.0, 1), (1e-3, 1e-4), (1e6, 1e5)])
    h, table = h.to(DEVICE), table.to(DEVICE)
    for backend in ("torch", "triton"):
        values, ids = op.lens_topk(h, table, 4, backend=backend)
        assert ids.tolist() == [[0, 3, 1, 2]] * 3
        expected = torch.tensor([0.99504, 0.67663, 0.09950, -0.99504], device=DEVICE).expand(3, 4)
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-5)
        _, words = problem(7, 20, 16)
        words[13] = words[4]  # copies tie to the lowest
        own = op.lens_topk(3.7 * words, words, 1, backend=backend)[1].flatten()
        assert own.tolist() == [4 if i == 13 else i for i in range(20)]


def test_more_than_there_are(tiles: None) -> None:
    x, table = problem(3, 7, 16)
    inverse = op.inverse_norms(table, torch.tensor([1, 1, 0, 1, 1, 1, 0], device=DEVICE).bool())
    check(x, table, 9, inverse)
    assert op.lens_topk(x, table, 9, inverse=inverse, backend="triton")[1][:, 5:].eq(-1).all()


def test_broken_states_rows_and_zeros(tiles: None) -> None:
    x, table = problem(4, 34, 16)
    x[1], x[2, 0], x[3] = math.nan, math.inf, 0
    table[5], table[6, 2], table[7] = 0, math.nan, math.inf
    check(x, table, 4)
    values, ids = op.lens_topk(x, table, 4, backend="triton")
    assert ids[[1, 2]].eq(-1).all() and values[3].eq(0).all() and ids[3].tolist() == [0, 1, 2, 3]
    assert not {5, 6, 7} & set(ids.flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rank_counts_what_comes_before(dtype: torch.dtype, tiles: None, poison: None) -> None:
    x, table = problem(5, 70, 16, dtype)
    table[60:] = table[:10]
    x[4], table[9] = math.nan, 0
    anchors = torch.tensor([0, 60, 33, 9], device=DEVICE)
    got = op.lens_rank(x, table, anchors, backend="triton")
    assert torch.equal(got, op.lens_rank(x, table, anchors, backend="torch"))
    ids = op.lens_topk(x, table, 5, backend="torch")[1]
    assert torch.equal(got < 5, (ids[:, :, None] == anchors).any(1))


def test_shapes_and_what_does_not_fit() -> None:
    x, table = problem(6, 9, 16)
    values, ids = op.lens_topk(x.view(2, 3, 16), table, 2, backend="triton")
    assert values.shape == ids.shape == (2, 3, 2)
    assert op.lens_topk(x[:0], table, 2, backend="triton")[0].shape == (0, 2)
    assert op.lens_rank(x[:0], table, ids[0, 0], backend="triton").shape == (0, 2)
    with pytest.raises(InputError, match="k=0"):
        op.lens_topk(x, table, 0)
    with pytest.raises(InputError, match="do not fit"):
        op.lens_topk(x[:, :4], table, 1)
    with pytest.raises(InputError, match="inverse"):
        op.lens_topk(x, table, 1, inverse=torch.ones(3))


# -- in full, on a GPU -------------------------------------------------------------------------------------------------


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 127, 131, 577])
@pytest.mark.parametrize(("v", "d"), [(1, 64), (5000, 200), (32003, 577)])
def test_odd_sizes(n: int, v: int, d: int, dtype: torch.dtype, poison: None) -> None:
    check(*problem(n, v, d, dtype), 3)


@full
@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_list_lengths(k: int) -> None:
    check(*problem(300, 20000, 128, torch.bfloat16), k)


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_random_states_strided_and_sliced(dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(200, 520, device="cuda", generator=g).to(dtype)
    table = torch.randn(9001, 520, device="cuda", generator=g).to(dtype)
    check(x[::2, 3:515], table[:, 3:515], 3, exact=False)  # rows that start anywhere
    check(x[:, ::2], table[::3, ::2], 3, exact=False)
    check(x[:, :512].T.contiguous().T, table[:, :512], 3, exact=False)


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("anchors", [1, 3, 20])
def test_ranks(dtype: torch.dtype, anchors: int) -> None:
    x, table = problem(577, 10007, 130, dtype)
    ids = torch.randperm(10007, device="cuda")[:anchors]
    got = op.lens_rank(x, table, ids, backend="triton")
    assert torch.equal(got, op.lens_rank(x, table, ids, backend="torch"))


@full
def test_chance_does_not_show_in_the_result() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(700, 512, device="cuda", generator=g).bfloat16()
    table = torch.randn(50000, 512, device="cuda", generator=g).bfloat16()
    values, ids = op.lens_topk(x, table, 3)
    for _ in range(20):
        again = op.lens_topk(x, table, 3)
        assert torch.equal(again[0], values) and torch.equal(again[1], ids)


@full
def test_memory_waits_and_graphs() -> None:
    x, table = problem(1296, 60000, 256, torch.bfloat16)
    inverse = op.inverse_norms(table)
    anchors = torch.tensor([5, 7, 9], device="cuda")

    def both() -> tuple[Tensor, ...]:
        ranks = op.lens_rank(x, table, anchors, inverse=inverse)
        return (*op.lens_topk(x, table, 3, inverse=inverse), ranks)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 32 << 20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(problem(1296, 1, 256, torch.bfloat16, seed=1)[0])
    graph.replay()
    for a, b in zip(captured, both(), strict=True):
        assert torch.equal(a, b)


@full
def test_a_table_beyond_two_to_the_31() -> None:
    x, small = problem(130, 3000, 4096, torch.bfloat16)
    table = torch.zeros((1 << 19) + 3000, 4096, dtype=torch.bfloat16, device="cuda")
    table[-3000:] = small
    inverse = op.inverse_norms(small)
    long = torch.cat([inverse.new_zeros(1 << 19), inverse])
    values, ids = op.lens_topk(x, table, 3, inverse=long)
    expected, wanted = op.lens_topk(x, small, 3, inverse=inverse)
    assert torch.equal(values, expected) and torch.equal(ids, wanted + (1 << 19))
    anchors = wanted[0]
    assert torch.equal(
        op.lens_rank(x, table, anchors + (1 << 19), inverse=long), op.lens_rank(x, small, anchors, inverse=inverse)
    )
