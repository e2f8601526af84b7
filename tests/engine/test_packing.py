# SPDX-License-Identifier: Apache-2.0
"""Packing and single-layer masks against brute force."""

from __future__ import annotations

import pytest
import torch
from conformance.flash_contract import NAME as FLASH
from conformance.flash_contract import varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtprune.engine.layers import layer_mask
from vtprune.engine.prefill import gather, pack, unpack


@st.composite
def masks(draw: st.DrawFn) -> list[list[bool]]:
    length = draw(st.integers(1, 9))
    return draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4))


@settings(max_examples=200)
@given(masks())
def test_packing_moves_kept_rows_to_the_right_in_order_and_back(rows: list[list[bool]]) -> None:
    keep = torch.tensor(rows)
    counts = keep.sum(1).tolist()
    if max(counts) == 0:
        return
    x = torch.arange(keep.numel()).view(*keep.shape, 1).float() + 1
    plan = pack(keep, counts)
    packed = gather(x, plan.index, 1)
    assert packed.shape[1] == max(counts)
    assert plan.full == (min(counts) == max(counts)) == bool(plan.valid.all())
    back = unpack(packed, plan.slot_of)
    assert back.shape == x.shape
    for b, count in enumerate(counts):
        assert plan.valid[b].tolist() == [False] * (max(counts) - count) + [True] * count
        assert torch.equal(packed[b][plan.valid[b]], x[b][keep[b]])
        last = 0.0
        for slot in range(keep.shape[1]):
            last = float(x[b, slot, 0]) if keep[b, slot] else last
            assert float(back[b, slot, 0]) == last


def allowed(mask: Tensor, queries: int) -> Tensor:
    """``[B, q, kv]`` by the definition of causal attention with padding."""
    batch, slots = mask.shape
    out = torch.zeros(batch, queries, slots, dtype=torch.bool)
    for b in range(batch):
        for q in range(queries):
            for k in range(slots):
                out[b, q, k] = bool(mask[b, k]) and k <= slots - queries + q
    return out


@pytest.mark.parametrize("queries", [1, 3, 7])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layer_masks_allow_exactly_what_is_causal_and_not_padding(implementation: str, queries: int) -> None:
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :2] = False
    mask[1, 3] = False
    got = layer_mask(implementation, mask, False, queries, torch.float32)
    assert got is not None and got.shape == (3, 1, queries, 7)
    seen = got[:, 0] if got.dtype == torch.bool else got[:, 0] == 0
    want = allowed(mask, queries)
    real = mask[:, -queries:]
    assert torch.equal(seen[real], want[real])
    assert bool(seen.any(-1).all()), "a row without any key gives NaN"
    if got.dtype != torch.bool:
        assert set(got.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}


def test_layer_masks_are_none_only_where_the_backend_is_causal_by_itself() -> None:
    full = torch.ones(2, 7, dtype=torch.bool)
    assert layer_mask("sdpa", full, True, 7, torch.float32) is None
    assert layer_mask("sdpa", full, True, 1, torch.float32) is None
    several = layer_mask("sdpa", full, True, 3, torch.float32)  # sdpa would align the triangle at the top left
    assert several is not None and torch.equal(several[:, 0], allowed(full, 3))
    assert layer_mask(FLASH, full, True, 3, torch.float32) is None
    part = full.clone()
    part[0, 0] = False
    assert torch.equal(layer_mask(FLASH, part, False, 3, torch.float32), part)


@pytest.mark.parametrize("rows", [(4, 4), (1, 6), (3, 5)])
def test_the_flash_stand_in_computes_attention(rows: tuple[int, int]) -> None:
    """Against PyTorch, sequence by sequence, grouped heads included."""
    queries, keys = rows
    q, k, v = torch.randn(2 * queries, 4, 8), torch.randn(2 * keys, 2, 8), torch.randn(2 * keys, 2, 8)
    cu_q = torch.tensor([0, queries, 2 * queries], dtype=torch.int32)
    cu_k = torch.tensor([0, keys, 2 * keys], dtype=torch.int32)
    got = varlen(q, k, v, cu_q, cu_k, 0.3)
    for i in range(2):
        one_q = q[i * queries : (i + 1) * queries].transpose(0, 1)
        one_k, one_v = (x[i * keys : (i + 1) * keys].transpose(0, 1).repeat_interleave(2, 0) for x in (k, v))
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        want = torch.nn.functional.scaled_dot_product_attention(one_q, one_k, one_v, causal, scale=0.3)
        torch.testing.assert_close(got[i * queries : (i + 1) * queries], want.transpose(0, 1), atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [(64, 64), (1, 65), (3, 65)])
def test_the_flash_kernel_of_pytorch_does_the_same_on_a_gpu(rows: tuple[int, int], dtype: torch.dtype) -> None:
    queries, keys = rows
    q, k, v = torch.randn(2 * queries, 4, 32), torch.randn(2 * keys, 2, 32), torch.randn(2 * keys, 2, 32)
    cu_q = torch.tensor([0, queries, 2 * queries], dtype=torch.int32)
    cu_k = torch.tensor([0, keys, 2 * keys], dtype=torch.int32)
    want = varlen(*(x.to(dtype).float() for x in (q, k, v)), cu_q, cu_k, 0.3)
    got = varlen(*(x.to(dtype).cuda() for x in (q, k, v)), cu_q.cuda(), cu_k.cuda(), 0.3)
    torch.testing.assert_close(got.float().cpu(), want, atol=2e-2, rtol=2e-2)
