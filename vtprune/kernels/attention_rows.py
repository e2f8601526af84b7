# SPDX-License-Identifier: Apache-2.0
"""A few rows of an attention map (CLS, last query, text), from queries and keys alone; never queries times keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError


@torch.no_grad()
def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    softmax: bool = True,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    mean: bool = False,
    query_lens: Sequence[int] | None = None,
    key_lens: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much a few queries attend to each key, averaged over heads.

    Grouped-query attention: query head h reads key head ``h // (Hq / Hk)``.

    Parameters
    ----------
    query : Tensor
        ``[B, Hq, R, d]``: only the rows that are asked for (CLS: R = 1). Ragged: ``[sum(query_lens), Hq, d]``.
        Strided views do.
    key : Tensor
        ``[B, Hk, L, d]``; Hk divides Hq. Ragged: ``[sum(key_lens), Hk, d]``.
    scale
        Factor of the logits; ``d ** -0.5`` if not given.
    softmax
        Weights after (True) or logits before (False) the softmax over the keys.
    mask : Tensor, optional
        ``[B, L]`` bool (ragged: ``[sum(key_lens)]``), False at keys that nobody may see.
    slots : Tensor, optional
        ``[B, R]`` int64 (ragged: ``[sum(query_lens)]``): the key slot of each query in its sample. A query then sees
        the keys up to its own slot (causal). Without it, all. A query with a negative slot is padding: its weights are
        0, and `mean` does not count it.
    mean
        Average over the queries: a column mean of the attention map.
    query_lens, key_lens
        Rows per sample where both are ragged; host numbers. A sample may have none of either.

    Returns
    -------
    Tensor
        fp32. ``[B, R, L]``, or ``[B, L]`` with `mean`. Ragged: ``[sum(q * k)]``, the samples' ``[q, k]`` one after the
        other, or ``[sum(key_lens)]`` with `mean`. Keys that a query does not see get 0 after the softmax and -inf
        before it; the logits' mean over queries is over those that see the key, -inf where none does.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lens = _check(query, key, mask, slots, query_lens, key_lens)
    if lens is None:
        return reference_rows(query, key, scale, softmax, mask, slots, mean)
    return reference_ragged(query, key, scale, softmax, mask, slots, mean, *lens)


Lens = tuple[Sequence[int], Sequence[int]]


def _check(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
    query_lens: Sequence[int] | None,
    key_lens: Sequence[int] | None,
) -> Lens | None:
    ragged = query_lens is not None or key_lens is not None
    ok = query.ndim == key.ndim == (3 if ragged else 4) and query.shape[-1] == key.shape[-1]
    if not ok or not key.shape[1] or query.shape[1] % key.shape[1] or (not ragged and query.shape[0] != key.shape[0]):
        raise InputError(
            f"queries {tuple(query.shape)} do not fit keys {tuple(key.shape)}; give [B, Hq, R, d] and [B, Hk, L, d] "
            "(ragged: [rows, Hq, d] and [rows, Hk, d]) with Hq a multiple of Hk"
        )
    where = (0,) if ragged else (0, 2)
    for name, given, to in (("mask", mask, key), ("slots", slots, query)):
        shape = tuple(to.shape[i] for i in where)
        if given is not None and tuple(given.shape) != shape:
            raise InputError(f"{name} has shape {tuple(given.shape)}; give {shape}")
    if not ragged:
        return None
    lens = (query_lens or (), key_lens or ())
    if len(lens[0]) != len(lens[1]) or sum(lens[0]) != query.shape[0] or sum(lens[1]) != key.shape[0]:
        raise InputError(
            f"query_lens={query_lens} and key_lens={key_lens} do not fit {query.shape[0]} queries and "
            f"{key.shape[0]} keys; give the rows of each sample, one number per sample"
        )
    return lens


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def reference_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    softmax: bool,
    mask: Tensor | None,
    slots: Tensor | None,
    mean: bool,
) -> Tensor:
    """`attention_rows` of a batch in plain PyTorch."""
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.detach().float().reshape(batch, key.shape[1], groups * rows, dim)
        logits = (grouped @ key.detach().float().transpose(-1, -2)).view(batch, heads, rows, -1) * scale
    length = key.shape[2]
    seen = torch.ones(batch, rows, length, dtype=torch.bool, device=query.device)
    if mask is not None:
        seen &= mask.bool()[:, None]
    if slots is not None:
        seen &= torch.arange(length, device=query.device) <= slots[..., None]
    if softmax:
        out = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1)
        out = out.masked_fill(~seen, 0.0)  # a query that sees nothing
        if not mean:
            return out
        real = torch.ones(batch, rows, device=query.device) if slots is None else (slots >= 0).float()
        return out.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    out = logits.mean(1)
    if not mean:
        return out.masked_fill(~seen, -torch.inf)
    count = seen.sum(1)
    return (out.masked_fill(~seen, 0.0).sum(1) / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)


def reference_ragged(
    query: Tensor,
    key: Tensor,
    scale: float,
    softmax: bool,
    mask: Tensor | None,
    slots: Tensor | None,
    mean: bool,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
) -> Tensor:
    """`attention_rows` of ragged rows in plain PyTorch: sample by sample."""
    out, q, k = [query.new_empty(0, dtype=torch.float32)], 0, 0
    for rows, keys in zip(query_lens, key_lens, strict=True):
        these, those = slice(q, q + rows), slice(k, k + keys)
        q, k = q + rows, k + keys
        found = reference_rows(
            query[these].transpose(0, 1)[None],
            key[those].transpose(0, 1)[None],
            scale,
            softmax,
            None if mask is None else mask[None, those],
            None if slots is None else slots[None, these],
            mean,
        )
        out.append(found.flatten())
    return torch.cat(out)
