# SPDX-License-Identifier: Apache-2.0
"""Attention rows recomputed from a layer's own queries and cached keys, so that any attention backend will do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Most attention weights that are held at once while a prompt's rows are summed up (fp32, 64 MiB).
CHUNK = 1 << 24


def rotated_queries(attention: Any, projected: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Queries as the attention sees them, ``[B, H, q, d]``, from the output of its ``q_proj`` ``[B, q, H * d]``."""
    batch, length, _ = projected.shape
    query = projected.view(batch, length, -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        query = attention.q_norm(query)
    query = query.transpose(1, 2)
    cos, sin = (x.to(query.device) for x in position_embeddings)
    if cos.ndim == 4:  # older transformers (5.0, 4.57): one table per M-RoPE axis, put together by sections
        rope = getattr(attention, "rope_scaling", None) or attention.rope_parameters
        sections = list(rope["mrope_section"]) * 2
        cos, sin = (torch.cat([m[i % 3] for i, m in enumerate(x.split(sections, -1))], -1) for x in (cos, sin))
    cos, sin = cos[:, None], sin[:, None]
    width = cos.shape[-1]
    turning, rest = query[..., :width], query[..., width:]
    first, second = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def logit_rows(query: Tensor, keys: Tensor) -> Tensor:
    """Products ``[B, Hkv, group, q, kv]`` fp32 of ``query [B, H, q, d]`` with ``keys [B, Hkv, kv, d]``, not scaled."""
    batch, heads, length, width = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * length, width).float()
    return (grouped @ keys.float().mT).view(batch, kv_heads, heads // kv_heads, length, keys.shape[2])


def attention_rows(query: Tensor, keys: Tensor, slots: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Attention weights ``[B, Hkv, group, q, kv]`` fp32.

    Parameters
    ----------
    query, keys
        As for `logit_rows`.
    slots : Tensor
        ``[q]`` or ``[B, q]`` int64, slot of each query in the cache; it sees no later one.
    valid : Tensor
        ``[B, kv]`` bool, slots that hold tokens.
    """
    slots = slots.expand(len(query), -1)
    allowed = torch.arange(keys.shape[2], device=keys.device) <= slots[..., None]
    allowed = allowed & valid[:, None]
    logits = logit_rows(query, keys) * scaling
    return logits.masked_fill(~allowed[:, None, None], -math.inf).softmax(-1).nan_to_num()  # padding attends to nothing


def chunks(query: Tensor, kv: int) -> list[slice]:
    """Cut the queries ``[B, H, q, d]`` so that their rows over `kv` keys stay within `CHUNK` weights."""
    step = max(1, CHUNK // max(1, query.shape[0] * query.shape[1] * kv))
    return [slice(start, start + step) for start in range(0, query.shape[2], step)]
