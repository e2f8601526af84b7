# SPDX-License-Identifier: Apache-2.0
"""A few rows of an attention map (CLS, last query, text), from queries and keys alone; never queries times keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import InputError
from ._jit import device_of, fits, jit, launch, multipliable, on_device, tl, triton
from .dispatch import forgiving, half, resolve


@forgiving
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
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)  # 1 and 1.0 are arguments of different variants
    lens = _check(query, key, mask, slots, query_lens, key_lens)
    if resolve(backend, query) == "triton":
        return _rows_triton(query.detach(), key.detach(), scale, softmax, mask, slots, mean, lens)
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
    groups, length = heads // key.shape[1], key.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.detach().float().reshape(batch, key.shape[1], groups * rows, dim)
        logits = (grouped @ key.detach().float().transpose(-1, -2)).view(batch, heads, rows, length) * scale
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
    out = logits.mean(1).masked_fill(~seen, -torch.inf)
    return _mean_of_seen(out, seen) if mean else out


def _mean_of_seen(logits: Tensor, seen: Tensor) -> Tensor:
    """``[..., R, L]`` to ``[..., L]``: the mean over the queries that see a key, -inf where none does."""
    count = seen.sum(-2)
    total = logits.masked_fill(~seen, 0.0).sum(-2)
    return (total / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)


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


# -- Triton -----------------------------------------------------------------------------------------------------------


@jit(volatile=("rows", "keys", "first", "eighths", "blocks", "mask_b", "slot_b"))
def _logits_kernel(  # type: ignore[no-untyped-def]
    query, key, mask, slots, out, tops, sums, query_cu, key_cu, scale, rows, keys, first, kv_heads, dim, eighths,
    blocks, query_b, query_h, query_r, key_b, key_h, key_l, mask_b, mask_l, slot_b, slot_r,
    RC: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
    RAGGED: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Logits of RC queries (G heads each) to a block of keys of one key head, or SOFTMAX: their exponentials below the
    block's largest, that one, and their sum."""
    pitch = eighths * 8  # so that Triton knows that it divides by 8
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    if RAGGED:
        query_first = tl.load(query_cu + sample)
        rows = tl.load(query_cu + sample + 1) - query_first
        key_first = tl.load(key_cu + sample)
        keys = tl.load(key_cu + sample + 1) - key_first
    else:
        query_first = sample * 0
        key_first = sample * 0
    i = tl.arange(0, BM)
    group = i // RC
    row = first + i % RC
    real = (group < G) & (row < rows)
    lane = block * BL + tl.arange(0, BL)
    d = tl.arange(0, BD)
    q = tl.load(
        query + sample * query_b + (query_first + row)[:, None] * query_r + (head * G + group)[:, None] * query_h
        + d[None, :],
        mask=real[:, None] & (d < dim)[None, :], other=0.0,
    )  # fmt: skip
    k = tl.load(
        key + sample * key_b + (key_first + lane)[:, None] * key_l + head * key_h + d[None, :],
        mask=(lane < keys)[:, None] & (d < dim)[None, :], other=0.0,
    )  # fmt: skip
    value = tl.dot(q, k.T, input_precision="ieee") * scale
    seen = real[:, None] & (lane < keys)[None, :]
    if MASK:
        shown = tl.load(mask + sample * mask_b + (key_first + lane) * mask_l, mask=lane < keys, other=0)
        seen = seen & (shown != 0)[None, :]
    if CAUSAL:
        slot = tl.load(slots + sample * slot_b + (query_first + row) * slot_r, mask=real, other=-1)
        seen = seen & (lane[None, :] <= slot[:, None])
    value = tl.where(seen, value, float("-inf"))
    place = (sample * kv_heads * G + head * G + group) * RC + i % RC
    if SOFTMAX:
        top = tl.max(value, 1)
        value = tl.exp(value - tl.where(top == float("-inf"), 0.0, top)[:, None])
        tl.store(tops + place * blocks + block, top, mask=group < G)
        tl.store(sums + place * blocks + block, tl.sum(value, 1), mask=group < G)
    to = out + place[:, None] * pitch + lane[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=(group < G)[:, None] & (lane < pitch)[None, :])


@jit(volatile=("places", "blocks"))
def _shares_kernel(tops, sums, places, blocks, PB: tl.constexpr, NB: tl.constexpr):  # type: ignore[no-untyped-def]
    """What an exponential of each block is worth in the softmax of its whole row; takes the place of `sums`."""
    place = tl.program_id(0) * PB + tl.arange(0, PB)
    n = tl.arange(0, NB)
    at = place.to(tl.int64)[:, None] * blocks + n[None, :]
    here = (place < places)[:, None] & (n < blocks)[None, :]
    top = tl.load(tops + at, mask=here, other=float("-inf"))
    highest = tl.max(top, 1)
    top = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    total = tl.sum(tl.load(sums + at, mask=here, other=0.0) * top, 1)
    tl.store(sums + at, top / tl.where(highest == float("-inf"), 1.0, total)[:, None], mask=here)


@jit(volatile=("rows", "keys", "first", "eighths", "blocks"))
def _average_kernel(  # type: ignore[no-untyped-def]
    given, shares, out, base, query_cu, key_cu, rows, keys, first, heads, factor, eighths, blocks,
    RC: tl.constexpr, HB: tl.constexpr, BL: tl.constexpr, SPAN: tl.constexpr,
    RAGGED: tl.constexpr, SOFTMAX: tl.constexpr, MEAN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Mean over heads (MEAN: and over queries) of the weights or logits of a block of keys; `given` is what
    `_logits_kernel` made, in blocks of SPAN keys."""
    pitch = eighths * 8  # so that Triton knows that it divides by 8
    lane = tl.program_id(0) * BL + tl.arange(0, BL)
    row = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    if RAGGED:
        rows = tl.load(query_cu + sample + 1) - tl.load(query_cu + sample)
        start = tl.load(key_cu + sample)
        keys = tl.load(key_cu + sample + 1) - start
    else:
        start = sample * keys
    acc = tl.zeros([BL], dtype=tl.float32)
    count = heads * RC if MEAN else heads
    for low in range(0, count, HB):
        j = low + tl.arange(0, HB)
        here = j < count
        place = sample * heads * RC + (j if MEAN else j * RC + row)
        value = tl.load(
            given + place[:, None] * pitch + lane[None, :],
            mask=here[:, None] & (lane < keys)[None, :],
            other=0.0,
        ).to(tl.float32)
        if SOFTMAX:
            value *= tl.load(shares + place * blocks + tl.program_id(0) * BL // SPAN, mask=here, other=0.0)[:, None]
        acc += tl.sum(value, 0)
    acc *= factor
    if MEAN:
        to = out + start + lane
        if ADD:
            acc += tl.load(to, mask=lane < keys, other=0.0)
        tl.store(to, acc, mask=lane < keys)
    else:
        if RAGGED:
            to = tl.load(base + sample) + (first + row).to(tl.int64) * keys
        else:
            to = (sample * rows + first + row) * keys
        tl.store(out + to + lane, acc, mask=(lane < keys) & (first + row < rows))


@jit(volatile=("keys",))
def _products_kernel(  # type: ignore[no-untyped-def]
    query, key, out, factor, keys, width, query_b, key_b, key_l, BL: tl.constexpr, BD: tl.constexpr
):
    """A row of queries by a block of rows of keys, all heads as one."""
    sample = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * BL + tl.arange(0, BL)
    total = tl.zeros([BL, BD], tl.float32)
    for at in range(0, width, BD):
        d = at + tl.arange(0, BD)
        q = tl.load(query + sample * query_b + d, mask=d < width, other=0.0).to(tl.float32)
        place = key + sample * key_b + lane.to(tl.int64)[:, None] * key_l + d[None, :]
        k = tl.load(place, mask=(lane < keys)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        total += k * q[None, :]
    tl.store(out + sample * keys + lane, tl.sum(total, 1) * factor, mask=lane < keys)


#: Keys of a program of it, and how much of their width at once.
_PRODUCTS = (8, 512)


def _one_row(query: Tensor, key: Tensor, scale: float, mean: bool) -> Tensor:
    """The mean over heads of one query's logits. Where each head of queries has keys of its own and all lie side by
    side, that is one product of whole rows: one launch instead of two, since a vision tower waits for launches."""
    samples, heads, _, dim = query.shape
    keys, width = key.shape[2], heads * dim
    out = torch.empty((samples, keys) if mean else (samples, 1, keys), dtype=torch.float32, device=query.device)
    if out.numel():
        lanes, deep = _PRODUCTS
        deep = min(deep, triton.next_power_of_2(width))
        shape = (
            query.shape, query.stride(), query.data_ptr() % 16, key.shape, key.stride(), key.data_ptr() % 16,
            query.dtype, query.device, scale,
        )  # fmt: skip
        with device_of(query):
            launch(
                shape, _products_kernel, (-(-keys // lanes), samples),
                (query, key, out, scale / heads, keys, width, query.stride(0), key.stride(0), key.stride(2)),
                (lanes, deep), 4,
            )  # fmt: skip
    return out


#: Rows of a tile of logits at most, keys of a tile, warps, in half precision and in fp32, whose products are long to
#: compile (12 s for 256 keys); keys of a block of averages, warps.
_LOGITS = ((64, 256, 4), (64, 128, 8))
_AVERAGE = (64, 4)


def _tile(query: Tensor, rows: int, groups: int, dim: int) -> tuple[int, int, int, int, int]:
    """Queries of a launch, rows and keys of a tile, their width, and warps; smaller ones where shared memory, in which
    both factors lie, is small: heads of 256 in fp32, for example."""
    most, keys, warps = _LOGITS[not half(query)]
    # A power of two: questions of all lengths share a few variants.
    chunk, wide = min(triton.next_power_of_2(rows), max(1, most // groups)), max(16, triton.next_power_of_2(dim))
    while True:
        tall = max(16, triton.next_power_of_2(groups * chunk))
        if fits(query, (tall + keys) * wide * query.element_size()) or (keys == _AVERAGE[0] and chunk == 1):
            return chunk, tall, keys, wide, warps
        # Averages are made of whole blocks of keys.
        keys, chunk = (keys // 2, chunk) if keys > _AVERAGE[0] else (keys, chunk // 2)


def _rows_triton(
    query: Tensor,
    key: Tensor,
    scale: float,
    softmax: bool,
    mask: Tensor | None,
    slots: Tensor | None,
    mean: bool,
    lens: Lens | None,
) -> Tensor:
    device = query.device
    if lens is None and not softmax and mask is None and slots is None and query.shape[2] == 1:
        side_by_side = query.stride()[1::2] == key.stride()[1::2] == (query.shape[3], 1)
        if side_by_side and query.shape[1] == key.shape[1] and query.dtype == key.dtype:
            return _one_row(query, key, scale, mean)
    if key.dtype != query.dtype:
        query, key = query.float(), key.float()
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (multipliable(query), multipliable(key)))
    ragged = lens is not None
    sizes: tuple[int, ...]
    if lens is not None:
        counts, lengths = lens
        samples, rows, keys = len(counts), max(counts, default=0), max(lengths, default=0)
        (heads, dim), kv_heads = query.shape[1:], key.shape[1]
        products = [q * k for q, k in zip(*lens, strict=True)]
        total = sum(products)
        query_cu, key_cu, base = (on_device((0, *accumulate(x)), device) for x in (counts, lengths, products))
        query_at, key_at = (0, query.stride(1), query.stride(0)), (0, key.stride(1), key.stride(0))
        sizes = (key.shape[0],) if mean else (total,)
    else:
        samples, heads, rows, dim = query.shape
        kv_heads, keys = key.shape[1:3]
        query_cu = key_cu = base = key
        query_at, key_at = query.stride()[:3], key.stride()[:3]  # type: ignore[assignment]
        sizes = (samples, keys) if mean else (samples, rows, keys)
    if mean and not softmax:
        # Each key counts the queries that see it: the rows are few, so they are made first.
        every = _rows_triton(query, key, scale, False, mask, slots, False, lens)
        if lens is None:
            return _mean_of_seen(every, every != -torch.inf)
        parts = every.split([q * k for q, k in zip(*lens, strict=True)])
        shaped = [part.view(q, k) for part, q, k in zip(parts, *lens, strict=True)]
        return torch.cat([every.new_empty(0), *(_mean_of_seen(x, x != -torch.inf) for x in shaped)])
    if mean or ragged or not rows:
        out = torch.zeros(sizes, dtype=torch.float32, device=device)
    else:  # written whole
        out = torch.empty(sizes, dtype=torch.float32, device=device)
    if not out.numel() or not rows:
        return out
    groups = heads // kv_heads
    chunk, bm, bl, bd, warps = _tile(query, rows, groups, dim)
    blocks = -(-keys // bl)
    pitch = -(-keys // 8) * 8
    # Between 0 and 1, so that half precision costs no weight more than 1/2000 of it; logits have no such bounds.
    kept = torch.float16 if softmax and half(query) else torch.float32
    between = torch.empty(samples * heads * chunk, pitch, dtype=kept, device=device)
    tops = sums = out  # which nobody writes to as such
    if softmax:
        tops = torch.empty(samples * heads * chunk, blocks, dtype=torch.float32, device=device)
        sums = torch.empty_like(tops)
    length, average_warps = _AVERAGE
    places, nb = tops.shape[0], triton.next_power_of_2(blocks)
    hb, pb = min(triton.next_power_of_2(heads * (chunk if mean else 1)), 64), max(1, min(16, 2048 // nb))
    mask_at, slot_at = ((0, 0) if x is None else (0, x.stride(0)) if ragged else x.stride() for x in (mask, slots))
    factor = 1.0 / heads
    if mean and slots is None and not ragged:
        factor /= rows
    # The CLS row of a vision tower comes with every picture, and always in this shape.
    shape = None
    if not ragged and mask is None and slots is None:
        shape = (
            query.shape, query.stride(), query.data_ptr() % 16, key.shape, key.stride(), key.data_ptr() % 16,
            query.dtype, device, scale, softmax, mean,
        )  # fmt: skip
    with device_of(query):
        for first in range(0, rows, chunk):
            launch(
                shape, _logits_kernel, (blocks, kv_heads, samples),
                (query, key, key if mask is None else mask.view(torch.int8), key if slots is None else slots, between,
                 tops, sums, query_cu, key_cu, scale, rows, keys, first, kv_heads, dim, pitch // 8, blocks, *query_at,
                 *key_at, *mask_at, *slot_at),
                (chunk, groups, bm, bl, bd, ragged, mask is not None, slots is not None, softmax), warps,
            )  # fmt: skip
            if softmax:
                grid = (-(-places // pb),)
                launch(shape, _shares_kernel, grid, (tops, sums, places, blocks), (pb, nb), 4)
            launch(
                shape, _average_kernel, (-(-keys // length), 1 if mean else min(chunk, rows - first), samples),
                (between, sums, out, base, query_cu, key_cu, rows, keys, first, heads, factor, pitch // 8, blocks),
                (chunk, hb, length, bl, ragged, softmax, mean, first > 0), average_warps,
            )  # fmt: skip
    if mean and (slots is not None or ragged):
        return out / _real(slots, lens, device)
    return out


def _real(slots: Tensor | None, lens: Lens | None, device: torch.device) -> Tensor:
    """Queries that are no padding: of each sample ``[B, 1]``, or of each ragged key's sample."""
    if lens is None:
        assert slots is not None
        return (slots >= 0).sum(1, keepdim=True).clamp(min=1)
    owner = on_device(lens[0], device, repeat=True)
    ones = torch.ones(sum(lens[0]), device=device) if slots is None else (slots >= 0).float()
    count = torch.zeros(len(lens[0]), device=device).index_add_(0, owner, ones)
    return torch.repeat_interleave(count, on_device(lens[1], device), output_size=sum(lens[1])).clamp(min=1)
