# SPDX-License-Identifier: Apache-2.0
"""Packing kept rows: the kernel moves the very bits that PyTorch moves. The interpreter on a CPU, in full on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels import pack as op

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
full = pytest.mark.gpu


def kept(lens: Sequence[int], length: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=g)[:n].sort().values for n in lens]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows]).to(DEVICE)


def numbers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x.view(-1)[::7] = math.nan  # moved like any other number
    return x.to(dtype).to(DEVICE)


def same(a: op.Packed, b: op.Packed) -> None:
    pairs = [(a.hidden, b.hidden), (a.mask, b.mask), *zip(a.features, b.features, strict=True)]
    if a.positions is not None or b.positions is not None:
        assert a.positions is not None and b.positions is not None
        pairs.append((a.positions, b.positions))
    for x, y in pairs:
        assert x.dtype == y.dtype and x.shape == y.shape
        assert torch.equal(x.contiguous().view(torch.int8), y.contiguous().view(torch.int8))


def check(lens: Sequence[int], hidden: Tensor, positions: Tensor | None, features: Sequence[Tensor] = ()) -> op.Packed:
    index = kept(lens, hidden.shape[1])
    got = op.pack(index, lens, hidden, positions, features, backend="triton")
    same(got, op.pack(index, lens, hidden, positions, features, backend="torch"))
    width = max(lens, default=0)
    assert got.hidden.shape == (len(lens), width, hidden.shape[2])
    assert got.mask.sum(1).tolist() == list(lens) and (got.mask[:, 1:] >= got.mask[:, :-1]).all()
    padded = torch.full((len(lens), width), -1, device=index.device)
    padded[got.mask] = index
    same(op.gather_rows(padded, hidden, positions, features, backend="triton"), got)
    return got


def test_by_hand(poison: None) -> None:
    hidden = torch.arange(12.0, device=DEVICE).view(2, 3, 2)
    got = op.pack(
        torch.tensor([0, 2, 1], device=DEVICE), (2, 1), hidden, torch.tensor([[7, 8, 9], [4, 5, 6]], device=DEVICE),
        backend="triton",
    )  # fmt: skip
    assert got.hidden.tolist() == [[[0, 1], [4, 5]], [[0, 0], [8, 9]]]
    assert got.positions is not None and got.positions.tolist() == [[7, 9], [0, 5]]
    assert got.mask.tolist() == [[True, True], [False, True]]


def test_ragged_samples_three_planes_and_features(poison: None) -> None:
    positions = torch.arange(3 * 3 * 4, device=DEVICE).view(3, 3, 4)
    features = [numbers(3, 4, 5, dtype=torch.float32), *(numbers(3, 4, 9) for _ in range(5))]  # two launches
    check((1, 0, 2), numbers(3, 4, 7), positions, features)


def test_strided_views_and_no_positions(poison: None) -> None:
    check((3, 2), numbers(6, 2, 5).permute(1, 2, 0), None, [numbers(2, 5, 8)[..., ::2]])
    one = torch.arange(5, device=DEVICE).expand(2, 5)  # stride 0
    check((3, 2), numbers(2, 10, 6)[:, ::2], one)


def test_wider_than_the_longest_and_nothing_kept() -> None:
    hidden = numbers(2, 5, 4)
    got = op.pack(kept((2, 1), 5), (2, 1), hidden, width=4, backend="triton")
    assert got.hidden.shape == (2, 4, 4) and got.mask.sum(1).tolist() == [2, 1] and got.positions is None
    empty = op.pack(kept((0, 0), 5), (0, 0), hidden, width=2, backend="triton")
    assert not empty.mask.any() and not empty.hidden.any()
    assert op.pack(kept((0, 0), 5), (0, 0), hidden, backend="triton").hidden.shape == (2, 0, 4)


def test_what_does_not_fit() -> None:
    hidden = numbers(2, 5, 4)
    with pytest.raises(InputError, match="keep 3 rows"):
        op.pack(kept((2, 2), 5), (2, 1), hidden)
    with pytest.raises(InputError, match="positions"):
        op.pack(kept((2, 2), 5), (2, 2), hidden, torch.zeros(3, 3))
    with pytest.raises(InputError, match="index"):
        op.gather_rows(torch.zeros(3, 2), hidden)


# -- in full, on a GPU -------------------------------------------------------------------------------------------------


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [1, 127, 577, 4096, 5001])
def test_odd_sizes(dim: int, dtype: torch.dtype, poison: None) -> None:
    positions = torch.arange(6 * 600, device="cuda").view(6, 600)
    check(
        (1, 2, 127, 131, 577, 0), numbers(6, 600, dim, dtype=dtype), positions, [numbers(6, 600, 77, dtype=dtype)] * 3
    )


@full
def test_beyond_two_to_the_31() -> None:
    hidden = torch.zeros(2, (1 << 18) + 40, 4096, dtype=torch.bfloat16, device="cuda")
    hidden[1, -40:] = numbers(40, 4096, dtype=torch.bfloat16)
    rows = torch.arange(hidden.shape[1] - 40, hidden.shape[1], device="cuda")
    got = op.pack(rows, (0, 40), hidden).hidden
    assert torch.equal(got[1].view(torch.int16), hidden[1, -40:].view(torch.int16)) and not got[0].any()
    every = torch.arange(hidden.shape[1], device="cuda").expand(2, -1)
    assert torch.equal(op.gather_rows(every, hidden).hidden.view(torch.int16), hidden.view(torch.int16))


@full
def test_no_op_waits_and_a_graph_replays() -> None:
    lens, positions = (7, 0, 3), torch.arange(30, device="cuda").view(3, 10)
    hidden, index = numbers(3, 10, 64), kept((7, 0, 3), 10)
    op.pack(index, lens, hidden, positions)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.pack(index, lens, hidden, positions)
        op.pack(index, (4, 3, 3), hidden, positions)  # lengths not seen before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.pack(index, lens, hidden, positions)
    index.copy_(kept(lens, 10, seed=3))
    graph.replay()
    same(captured, op.pack(index, lens, hidden, positions))


@full
def test_a_pruned_prompt_is_packed_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.engine import prefill

    ran: list[int] = []
    real = prefill.gather_rows
    monkeypatch.setattr(prefill, "gather_rows", lambda *a: ran.append(1) or real(*a))
    keep = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    counts = keep.sum(1).tolist()
    plan = prefill.pack(keep.cuda(), counts)
    embeds, positions = torch.randn(3, 50, 32, device="cuda"), torch.arange(450, device="cuda").view(3, 3, 50)
    hidden, moved = prefill.packed(plan, embeds, positions)
    assert ran and torch.equal(hidden[plan.valid], embeds[keep.cuda()])
    assert torch.equal(moved[:, plan.valid], positions[:, keep.cuda()])
    assert not hidden[~plan.valid].any()
    trained = embeds.requires_grad_()
    assert prefill.packed(plan, trained, positions)[0].requires_grad


def slots(
    lens: Sequence[int], length: int, keep: int, seed: int, first_is_text: bool = True
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Samples with `lens` visual tokens, in no order, of which each keeps as many as leaves all equally many rows."""
    g = torch.Generator().manual_seed(seed)
    others = torch.ones(len(lens), length, dtype=torch.bool)
    position, chosen = [], []
    for sample, n in enumerate(lens):
        at = torch.randperm(length - first_is_text, generator=g)[:n] + int(first_is_text)
        others[sample, at] = False
        start = sum(lens[:sample])
        chosen.append(start + torch.randperm(n, generator=g)[: keep - (length - n)].sort().values)
        position.append(sample * length + at)
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *chosen])
    flat = torch.cat([torch.empty(0, dtype=torch.int64), *position])
    return rows.to(DEVICE), flat.to(DEVICE), others.to(DEVICE), keep


SLOTS = [((), 5, 0), ((3,), 4, 1), ((3,), 4, 4), ((5, 7), 11, 8), ((30, 20, 25), 40, 21), ((576,), 640, 130)]


@pytest.mark.parametrize(("lens", "length", "keep"), SLOTS)
@pytest.mark.parametrize("first_is_text", [True, False])
def test_kept_slots_by_hand(poison: None, lens: tuple[int, ...], length: int, keep: int, first_is_text: bool) -> None:
    chosen, position, others, width = slots(lens, length, keep, seed=sum(lens), first_is_text=first_is_text)
    index, slot_of = op.kept_slots(chosen, position, others, width, backend="triton")
    stays = others.clone().view(-1)
    stays[position[chosen]] = True
    assert index.shape == (len(lens), width) and slot_of.shape == others.shape
    for row, mine, places in zip(stays.view(others.shape), index, slot_of, strict=True):
        assert mine.tolist() == row.nonzero().flatten().tolist()
        assert places.tolist() == [int(row[: i + 1].sum()) - 1 for i in range(length)]
    reference = op.kept_slots(chosen, position, others, width, backend="torch")
    assert torch.equal(index, reference[0]) and torch.equal(slot_of, reference[1])


@pytest.mark.parametrize("length", [127, 128, 1025, pytest.param(3000, marks=full), pytest.param(40000, marks=full)])
def test_kept_slots_of_long_prompts(poison: None, length: int) -> None:
    given = slots((length - 20, length - 9), length, length // 3, seed=length)
    found = op.kept_slots(*given, backend="triton")
    expected = op.kept_slots(*given, backend="torch")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    # From another address, in other memory: what was remembered of the first launch must fit this one too.
    moved = torch.cat([given[0].new_zeros(1), given[0]])[1:]
    for chosen in (moved, given[0].int()):
        again = op.kept_slots(chosen, *given[1:], backend="triton")
        assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])


def test_kept_slots_refuse_what_is_no_mask() -> None:
    chosen, position, others, width = slots((3,), 4, 2, 0)
    with pytest.raises(InputError, match="others"):
        op.kept_slots(chosen, position, others.long(), width)
