# SPDX-License-Identifier: Apache-2.0
"""The FlashAttention-2 contract as an attention function, with its traps, for machines without the package.

It does what `transformers.modeling_flash_attention_utils._flash_attention_forward` does around the kernel. It accepts a
2-D padding mask or None and nothing else. With a mask it unpads and runs one sequence per row. With batch 1, no mask
and positions that are not consecutive it takes the row for several packed sequences, and then cuts the *keys* where it
cuts the *queries*, which is wrong as soon as the cache is not empty. The decision and the cuts are transformers' own.

The kernel itself is plain matrix algebra on a CPU, and PyTorch's own flash kernel on a GPU in half precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "flash_contract"

#: Which way each call went: "mask", "packed" or "dense". Tests clear it and look.
calls: list[str] = []


def _cumulated(lengths: Tensor) -> Tensor:
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _kernel_cpu(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool) -> Tensor:
    group = q.shape[1] // k.shape[1]
    out = torch.full_like(q, math.nan)  # the real kernel leaves rows of no sequence uninitialised
    for i in range(len(cu_q) - 1):
        a, b, c, d = (int(x) for x in (cu_q[i], cu_q[i + 1], cu_k[i], cu_k[i + 1]))
        keys = k[c:d].repeat_interleave(group, 1)
        values = v[c:d].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        if causal:  # aligned at the bottom right, as since FlashAttention 2.1
            seen = torch.arange(d - c)[None] <= torch.arange(b - a)[:, None] + (d - c) - (b - a)
            scores = scores.masked_fill(~seen, -math.inf)
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0.0), values)
    return out


def _kernel_cuda(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    most_q, most_k = int(cu_q.diff().max()), int(cu_k.diff().max())
    out = torch.ops.aten._flash_attention_forward(
        q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, most_q, most_k, 0.0, causal, False, scale=scale
    )
    return out[0]


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool = True) -> Tensor:
    """Attention of several sequences that lie one after the other: ``[rows, heads, width]``."""
    on_gpu = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if not on_gpu:
        cu_q, cu_k = cu_q.cpu(), cu_k.cpu()
    return (_kernel_cuda if on_gpu else _kernel_cpu)(q, k, v, cu_q, cu_k, scale, causal)


def flash_contract(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for `ALL_ATTENTION_FUNCTIONS`; tensors are ``[batch, heads, rows, width]``."""
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"FlashAttention takes a 2-D mask or None, got shape {tuple(attention_mask.shape)}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    batch, rows, heads, width = query.shape
    device = query.device

    if attention_mask is not None:
        calls.append("mask")
        mask = attention_mask.bool()
        if key.shape[1] > mask.shape[1]:
            key, value = key[:, : mask.shape[1]], value[:, : mask.shape[1]]
        columns = key.shape[1]
        used_k = mask.flatten().nonzero().flatten()
        cu_k = _cumulated(mask.sum(1))
        k, v = key.flatten(0, 1)[used_k], value.flatten(0, 1)[used_k]
        if rows == columns:
            used_q, cu_q = used_k, cu_k
        elif rows == 1:
            used_q = torch.arange(batch, device=device)
            cu_q = torch.arange(batch + 1, dtype=torch.int32, device=device)
        else:
            tail = mask[:, -rows:]
            used_q, cu_q = tail.flatten().nonzero().flatten(), _cumulated(tail.sum(1))
        packed = varlen(query.flatten(0, 1)[used_q], k, v, cu_q, cu_k, scale, causal)
        out = torch.zeros(batch * rows, heads, width, dtype=query.dtype, device=device).index_put((used_q,), packed)
        return out.view(batch, rows, heads, width), None

    q, k, v = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    if _is_packed_sequence(position_ids, batch):
        calls.append("packed")
        cu_q, cu_k = prepare_fa_kwargs_from_position_ids(position_ids)[0]
    else:
        calls.append("dense")
        cu_q = torch.arange(batch + 1, dtype=torch.int32, device=device) * rows
        cu_k = torch.arange(batch + 1, dtype=torch.int32, device=device) * key.shape[1]
    out = varlen(q, k, v, cu_q, cu_k, scale, causal)
    return out.view(batch, rows, heads, width), None


ALL_ATTENTION_FUNCTIONS.register(NAME, flash_contract)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
