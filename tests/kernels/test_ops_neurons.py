# SPDX-License-Identifier: Apache-2.0
"""Neuron bitmaps, counts, matches and the sparse FFN: kernels against PyTorch. Counts are exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels import neuron_match as op

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
full = pytest.mark.gpu


def acts(tokens: int, neurons: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Activations with ties, zeros and some that are not finite."""
    x = torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(0))
    x = (x * 8).round() / 8
    if tokens > 2 and neurons > 9:
        x[1, 3], x[1, 4], x[2, 9], x[0] = math.nan, math.inf, -math.inf, 0
    return x.to(dtype).to(DEVICE)


def check(x: Tensor, lens: tuple[int, ...], rho: float = 0.2) -> None:
    bits = op.pack_bits(x, backend="triton")
    assert torch.equal(bits, op.pack_bits(x, backend="torch"))
    for per_token in (True, False):
        counts = op.top_counts(x, lens, rho, per_token=per_token, backend="triton")
        assert torch.equal(counts, op.top_counts(x, lens, rho, per_token=per_token, backend="torch"))
    _, cores = op.core(counts)
    both = ((x > 0) & member(cores, x.shape[1])[op._samples(lens, x.device)]).sum(1)
    for given in (x, bits):
        assert torch.equal(op.match(given, cores, lens, backend="triton").long(), both)
        assert torch.equal(op.match(given, cores, lens, backend="torch").long(), both)


def member(cores: Tensor, neurons: int) -> Tensor:
    shifts = torch.arange(32, device=cores.device)
    return ((cores[..., None].long() >> shifts) & 1).flatten(1)[:, :neurons].bool()


def ffn(width: int, neurons: int, count: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    gate, up = ((torch.randn(neurons, width, generator=g) * width**-0.5).to(dtype).to(DEVICE) for _ in range(2))
    down = (torch.randn(width, neurons, generator=g) * neurons**-0.5).to(dtype).to(DEVICE)
    ids = torch.randperm(neurons, generator=g)[:count].sort().values.to(DEVICE)
    return torch.randn(rows, width, generator=g).to(dtype).to(DEVICE), gate, up, down, ids


def check_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, ids: Tensor, act: str = "silu") -> None:
    within = 1e-5 if x.dtype == torch.float32 else 2e-2
    expected = op.reference_ffn(x.double(), gate.double(), up.double(), down.double(), ids, act)
    for layout in (down, down.t().contiguous().t()):
        got = op.sparse_ffn(x, gate, up, layout, ids, act, backend="triton")
        assert got.dtype == x.dtype
        torch.testing.assert_close(got.double(), expected, rtol=within, atol=within * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_counts_and_matches(dtype: torch.dtype, poison: None) -> None:
    check(acts(4, 40, dtype), (3, 0, 1))


def test_by_hand(poison: None) -> None:
    x = torch.tensor([[3.0, 1, 2, -1], [1, 1, 1, 1], [-1, -1, -1, -1]], device=DEVICE)
    assert op.pack_bits(x, backend="triton").flatten().tolist() == [0b0111, 0b1111, 0]
    assert op.top_counts(x, (3,), 0.5, backend="triton").tolist() == [[2, 1, 0, 0]]
    assert op.match(x, torch.tensor([[0b1010]], dtype=torch.int32, device=DEVICE), (3,), backend="triton").tolist() == [
        1, 2, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("act", list(op.ACTIVATIONS))
def test_sparse_ffn(act: str, poison: None) -> None:
    x, gate, up, down, ids = ffn(12, 9, 4, 1, torch.float16)
    ids[-1] = -1
    check_ffn(x, gate, up, down, ids, act)


def test_nothing_there_and_what_does_not_fit() -> None:
    x = acts(3, 40)
    assert op.pack_bits(x[:0], backend="triton").shape == (0, 2)
    assert not op.top_counts(x[:0], (0, 0), backend="triton").any()
    row, gate, up, down, ids = ffn(16, 20, 4, 1, torch.float16)
    assert not op.sparse_ffn(row, gate, up, down, ids[:0], backend="triton").any()
    assert op.sparse_ffn(row[0], gate, up, down, ids, backend="triton").shape == (16,)
    with pytest.raises(InputError, match="rho=0"):
        op.top_counts(x, (3,), 0.0)
    with pytest.raises(InputError, match="samples"):
        op.top_counts(x, (2,))
    with pytest.raises(InputError, match="cores"):
        op.match(x, torch.zeros(1, 3, dtype=torch.int32, device=DEVICE), (3,))
    with pytest.raises(InputError, match="unknown"):
        op.sparse_ffn(row, gate, up, down, ids, "tanh")


# -- in full, on a GPU -------------------------------------------------------------------------------------------------


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("neurons", [1, 31, 577, 11008, 18944])
def test_odd_sizes(neurons: int, dtype: torch.dtype, poison: None) -> None:
    for lens in ((1,), (2, 0, 127), (131, 577)):
        check(acts(sum(lens), neurons, dtype), lens)


@full
def test_strided_activations() -> None:
    x = acts(200, 1001)
    check(x[::2, ::3], (60, 40))
    check(x.T.contiguous().T, (200,), 1.0)


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("width", "neurons", "count"), [(1, 3, 2), (577, 1001, 400), (4096, 11008, 4403), (5000, 64, 64)]
)
def test_sparse_ffn_sizes(width: int, neurons: int, count: int, dtype: torch.dtype, poison: None) -> None:
    check_ffn(*ffn(width, neurons, count, 1, dtype))
    check_ffn(*ffn(width, neurons, count, 3, dtype))


@full
def test_beyond_two_to_the_31() -> None:
    few = acts(50, 4096)
    x = torch.zeros((1 << 19) + 50, 4096, dtype=torch.float16, device="cuda")
    x[-50:] = few
    lens = (1 << 19, 50)
    assert torch.equal(op.pack_bits(x)[-50:], op.pack_bits(few))
    counts = op.top_counts(x, lens)
    assert torch.equal(counts[1:], op.top_counts(few, (50,))) and not counts[0].any()
    cores = op.core(counts)[1]
    assert torch.equal(op.match(x, cores, lens)[-50:], op.match(few, cores[1:], (50,)))


@full
def test_no_op_waits_and_a_graph_replays() -> None:
    x, lens = acts(40, 500), (30, 10)
    cores = op.core(op.top_counts(x, lens))[1]
    row, gate, up, down, ids = ffn(64, 200, 50, 1, torch.float16)

    def every() -> tuple[Tensor, ...]:
        counts = (op.top_counts(x, lens, per_token=per_token) for per_token in (True, False))
        return *counts, op.match(x, cores, lens), op.pack_bits(x), op.sparse_ffn(row, gate, up, down, ids)

    every()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every()
    x.copy_(acts(40, 500).flip(1))
    graph.replay()
    for a, b in zip(captured, every(), strict=True):
        assert torch.equal(a, b)
