# SPDX-License-Identifier: Apache-2.0
"""Attention rows: kernels against whole attention maps in fp64. The interpreter on a CPU, in full on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels import _jit
from vtprune.kernels import attention_rows as op
from vtprune.kernels.attention_rows import attention_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of NaN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
full = pytest.mark.gpu


def qk(
    b: int, hq: int, hk: int, r: int, length: int, d: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(b, h, n, d, generator=g).to(dtype).to(DEVICE) for h, n in ((hq, r), (hk, length))
    )


def by_hand(query: Tensor, key: Tensor, softmax: bool, mask: Tensor | None, slots: Tensor | None, mean: bool) -> Tensor:
    """The whole map, one head after the other."""
    q, k = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    seen = torch.ones_like(logits[:, 0], dtype=torch.bool)
    if mask is not None:
        seen = seen & mask[:, None]
    if slots is not None:
        seen = seen & (torch.arange(seen.shape[-1], device=seen.device) <= slots[..., None])
    if softmax:
        weights = logits.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0.0).mean(1)
        if mean:
            real = torch.ones(seen.shape[:2], device=seen.device) if slots is None else (slots >= 0).double()
            return weights.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return weights
    rows = logits.mean(1).masked_fill(~seen, -math.inf)
    if not mean:
        return rows
    total, count = rows.masked_fill(~seen, 0).sum(1), seen.sum(1)
    return (total / count.clamp(min=1)).masked_fill(count == 0, -math.inf)


def check(query: Tensor, key: Tensor, softmax: bool = True, within: float = 2e-6, **options: Any) -> None:
    mask, slots, mean = options.get("mask"), options.get("slots"), options.get("mean", False)
    got = attention_rows(query, key, softmax=softmax, backend="triton", **options)
    expected = by_hand(query, key, softmax, mask, slots, mean)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(
        got.double(), expected, rtol=1e-3 if softmax and query.dtype != torch.float32 else 1e-4, atol=within
    )


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_one_row(heads: tuple[int, int], softmax: bool, poison: None) -> None:
    check(*qk(2, *heads, 1, 13, 24), softmax)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cls_row_whose_heads_lie_side_by_side(dtype: torch.dtype, poison: None) -> None:
    query, key = qk(3, 2, 2, 1, 13, 24, dtype)
    rows, keys = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))  # as projections put them out
    for mean in (False, True):
        check(rows, keys, False, mean=mean)
    together = attention_rows(rows, keys, softmax=False, backend="triton")
    alone = [attention_rows(rows[i : i + 1], keys[i : i + 1], softmax=False, backend="triton") for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    check(rows[:, :, :, :7], keys[:, :, :, :7], False)  # parts of heads, which do not


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("mean", [True, False])
def test_text_rows_with_padding_and_causality(mean: bool, softmax: bool, poison: None) -> None:
    query, key = qk(2, 4, 2, 3, 11, 16)
    mask = torch.ones(2, 11, dtype=torch.bool, device=DEVICE)
    mask[0, :2] = False
    slots = torch.tensor([[8, 9, 10], [-1, 1, 10]], device=DEVICE)
    check(query, key, softmax, mask=mask, slots=slots, mean=mean)
    check(query, key, softmax, mean=mean)


@pytest.mark.parametrize(
    ("heads", "dim", "dtype"), [(4, 128, torch.float32), (2, 256, torch.float32), (8, 64, torch.half)]
)
@pytest.mark.parametrize("mean", [True, False])
def test_tiles_fit_where_shared_memory_is_small(
    heads: int, dim: int, dtype: torch.dtype, mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = qk(1, heads, 1, 12, 150, dim, dtype)
    before = op._tile(query, 12, heads, dim)
    monkeypatch.setattr(_jit, "_shared_memory", lambda device: 99 << 10)  # a GPU of compute capability 8.6 or 8.9
    _, tall, keys, wide, _ = tile = op._tile(query, 12, heads, dim)
    assert (tall + keys) * wide * query.element_size() <= 97 << 10
    assert (tile != before) == (dim == 256)
    slots = torch.arange(138, 150, device=DEVICE)[None]
    check(query, key, slots=slots, mean=mean)


def test_ragged_samples(poison: None) -> None:
    (query, key), rows, keys = qk(1, 4, 2, 5, 14, 16), (2, 0, 3, 0), (9, 0, 4, 1)
    query, key = query[0].transpose(0, 1), key[0].transpose(0, 1)
    slots = torch.tensor([3, 8, 0, -1, 3], device=DEVICE)
    for mean in (False, True):
        options: dict[str, Any] = dict(slots=slots, mean=mean, query_lens=rows, key_lens=keys)
        got = attention_rows(query, key, backend="triton", **options)
        torch.testing.assert_close(got, attention_rows(query, key, backend="torch", **options), rtol=1e-3, atol=1e-6)


def test_nobody_sees_anything_and_nothing_is_there(poison: None) -> None:
    query, key = qk(1, 2, 2, 2, 5, 16)
    assert not attention_rows(query, key, mask=torch.zeros(1, 5, device=DEVICE).bool(), backend="triton").any()
    assert attention_rows(query, key[:, :, :0], backend="triton").shape == (1, 2, 0)
    assert attention_rows(query[:, :, :0], key, backend="triton").shape == (1, 0, 5)


def test_a_broken_key_spoils_only_its_sample() -> None:
    query, key = qk(2, 2, 2, 1, 6, 16)
    sound = attention_rows(query, key, backend="triton")
    key[0, 0, 2, 3] = math.nan
    assert torch.equal(attention_rows(query, key, backend="triton")[1], sound[1])


def test_what_does_not_fit() -> None:
    query, key = qk(2, 4, 2, 1, 6, 16)
    with pytest.raises(InputError, match="do not fit keys"):
        attention_rows(query[:, :3], key)
    with pytest.raises(InputError, match="mask has shape"):
        attention_rows(query, key, mask=torch.ones(2, 5, device=DEVICE).bool())
    with pytest.raises(InputError, match="query_lens"):
        attention_rows(query[:, :, 0], key[:, :, 0], query_lens=(1,), key_lens=(2,))


# -- in full, on a GPU -------------------------------------------------------------------------------------------------


@full
@pytest.mark.parametrize("length", [1, 2, 127, 131, 577, 2941])
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((16, 16, 64), torch.bfloat16),
        ((28, 4, 128), torch.bfloat16),
        ((28, 4, 128), torch.float16),
        ((6, 3, 80), torch.float32),
    ],
)
def test_odd_sizes(heads: tuple[int, int, int], dtype: torch.dtype, length: int, poison: None) -> None:
    query, key = qk(3, *heads[:2], 1, length, heads[2], dtype)
    for softmax in (True, False):
        check(query, key, softmax, 1e-5)


@full
@pytest.mark.parametrize("rows", [1, 40, 130])
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)])
@pytest.mark.parametrize("softmax", [True, False])
def test_text_rows(rows: int, heads: tuple[int, int], softmax: bool) -> None:
    query, key = qk(2, *heads, rows, 1500, 128, torch.bfloat16)
    slots = torch.arange(1500 - rows, 1500, device="cuda").repeat(2, 1)
    slots[1, : rows // 2] = -1
    mask = torch.ones(2, 1500, dtype=torch.bool, device="cuda")
    mask[0, :100] = False
    for mean in (True, False):
        check(query, key, softmax, 1e-5, mask=mask, slots=slots, mean=mean)


@full
def test_strided_keys_and_the_same_alone() -> None:
    query, key = qk(4, 16, 16, 1, 577, 64, torch.bfloat16)
    got = attention_rows(query, key)
    apart = key.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attention_rows(query, apart), got)
    assert torch.equal(attention_rows(query[2:3], key[2:3]), got[2:3])
    check(query, key.transpose(2, 3).contiguous().transpose(2, 3))


@full
def test_keys_beyond_two_to_the_31() -> None:
    query, few = qk(1, 8, 8, 1, 300, 128, torch.bfloat16)
    length = 1 << 21
    key = torch.zeros(1, 8, length + 300, 128, dtype=torch.bfloat16, device="cuda")
    key[:, :, -300:] = few
    got = attention_rows(query, key, softmax=False)
    torch.testing.assert_close(got[..., -300:], attention_rows(query, few, softmax=False), rtol=1e-5, atol=1e-6)
    assert not got[..., :-300].any()


@full
def test_no_op_waits_and_a_graph_replays() -> None:
    query, key = qk(2, 8, 4, 3, 200, 64, torch.bfloat16)
    slots = torch.arange(197, 200, device="cuda").repeat(2, 1)
    flat_q, flat_k = query[0].transpose(0, 1), key[0].transpose(0, 1)

    def both() -> tuple[Tensor, ...]:
        ragged = attention_rows(flat_q, flat_k, mean=True, query_lens=(1, 2), key_lens=(50, 150))
        return ragged, attention_rows(query, key, slots=slots), attention_rows(query, key, softmax=False, mean=True)

    both()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    query.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, both(), strict=True):
        assert torch.equal(a, b)


@full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cls_row_of_a_tower(dtype: torch.dtype) -> None:
    from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionConfig

    from vtprune.models.base import cls_row

    attention = CLIPAttention(CLIPVisionConfig(hidden_size=256, num_attention_heads=4)).to("cuda", dtype)
    hidden = torch.randn(3, 145, 256, device="cuda").to(dtype)
    for softmax in (True, False):
        got = cls_row(attention, hidden, softmax)
        expected = cls_row(attention.double(), hidden.double(), softmax)
        torch.testing.assert_close(got.double(), expected.double(), rtol=2e-2, atol=1e-2 if not softmax else 1e-3)
        attention.to(dtype)
