# SPDX-License-Identifier: Apache-2.0
"""Which vocabulary rows a hidden state is nearest to by cosine, without a matrix of states times vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .dispatch import resolve

#: Most vocabulary rows, states, and numbers of the table that the PyTorch form has in fp32 at a time: whatever the
#: sizes, it needs some 20 MiB beyond its inputs and results.
BLOCK_ROWS, BLOCK_STATES, BLOCK_NUMBERS = 4096, 256, 1 << 20
#: Rows of the table shorter than this were never trained: padding and reserved ids.
UNTRAINED = 1e-6


@torch.no_grad()
def inverse_norms(table: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 / norm`` of each vocabulary row, ``[V]`` fp32; 0 where a row takes no part.

    Make it once per checkpoint.

    Parameters
    ----------
    table : Tensor
        ``[V, D]`` input embeddings.
    mask : Tensor, optional
        ``[V]`` bool, False at rows to leave out. Rows with a norm of at most `UNTRAINED`, NaN or infinity are always
        left out.
    """
    if table.ndim != 2:
        raise InputError(f"the embedding table has shape {tuple(table.shape)}; give [vocabulary, width]")
    blocks = table.detach().split(_block(table))
    norm = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for rows in blocks])
    sound = norm.isfinite() & (norm > UNTRAINED)
    if mask is not None:
        if mask.shape != norm.shape or mask.dtype != torch.bool:
            raise InputError(f"mask is {tuple(mask.shape)} {mask.dtype}; give {tuple(norm.shape)} torch.bool")
        sound &= mask.to(sound.device)
    return norm.reciprocal().masked_fill_(~sound, 0.0)


@torch.no_grad()
def lens_topk(
    hidden: Tensor, table: Tensor, k: int, *, inverse: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The `k` vocabulary rows with the largest cosine to each hidden state.

    EmbedLens, ``TopK_v cos(h, E_v)`` with the input embeddings E.

    Parameters
    ----------
    hidden : Tensor
        ``[..., D]``: flat ragged rows, or a batch; each row is on its own.
    table : Tensor
        ``[V, D]``.
    k
        At least 1.
    inverse : Tensor, optional
        ``[V]`` fp32 from `inverse_norms`, which is called if it is not given.
    backend
        ``"auto"``, ``"triton"`` or ``"torch"``. Triton multiplies half-precision rows in tensor cores and sums in
        fp32, as does PyTorch on a GPU; fp32 rows it multiplies in fp32.

    Returns
    -------
    values, ids : Tensor
        ``[..., k]`` fp32 cosines, descending, and int64 ids; equal cosines by ascending id. Where there is no k-th
        row, and for states with NaN or infinity: -inf and -1. A state of zeros has cosine 0 to all.
    """
    flat, inverse = _check(hidden, table, inverse)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r} counts no vocabulary rows; give a whole number from 1 on")
    run = _topk_triton if resolve(backend, flat) == "triton" else reference_topk
    values, ids = run(flat, table.detach(), k, inverse)
    return values.view(*hidden.shape[:-1], k), ids.view(*hidden.shape[:-1], k)


@torch.no_grad()
def lens_rank(
    hidden: Tensor, table: Tensor, ids: Tensor, *, inverse: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """How many vocabulary rows come before given ones: the counting form of `lens_topk`.

    ``ids[a]`` is among the top k of a state exactly if its rank is below k. That is all a classification by anchors
    asks, and it needs no running list: one comparison per product and anchor.

    Parameters
    ----------
    hidden, table, inverse, backend
        As in `lens_topk`.
    ids : Tensor
        ``[A]`` int64 vocabulary ids (the anchors) on the device of `hidden`.

    Returns
    -------
    Tensor
        ``[..., A]`` int32. Broken states, and anchors that take no part, have rank V.
    """
    flat, inverse = _check(hidden, table, inverse)
    if ids.ndim != 1 or ids.is_floating_point():
        raise InputError(f"anchor ids are {tuple(ids.shape)} {ids.dtype}; give a vector of vocabulary ids")
    run = _rank_triton if resolve(backend, flat) == "triton" else reference_rank
    return run(flat, table.detach(), ids, inverse).view(*hidden.shape[:-1], len(ids))


def _check(hidden: Tensor, table: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    if table.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != table.shape[1]:
        raise InputError(
            f"hidden states {tuple(hidden.shape)} do not fit an embedding table {tuple(table.shape)}; "
            "give [..., D] and [V, D]"
        )
    if inverse is None:
        inverse = inverse_norms(table)
    if inverse.shape != table.shape[:1]:
        raise InputError(f"inverse has shape {tuple(inverse.shape)}; give [{table.shape[0]}], from inverse_norms()")
    return hidden.detach().reshape(-1, hidden.shape[-1]), inverse


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def _inverse_lengths(flat: Tensor) -> Tensor:
    """``[T]`` fp32 1 / norm of the states; NaN for broken ones."""
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
    return norm.clamp(min=1e-12).reciprocal().masked_fill_(~norm.isfinite(), torch.nan)


def _block(table: Tensor) -> int:
    """How many vocabulary rows are scored at a time."""
    return max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // max(1, table.shape[1])))


def _cosines(flat: Tensor, lengths: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """``[T, rows]`` fp32; -inf where a row or a state takes no part."""
    with torch.autocast(flat.device.type, enabled=False):
        cosines = flat.float() @ table.float().T
    cosines = cosines * lengths[:, None] * inverse
    return cosines.masked_fill_((inverse == 0) | cosines.isnan(), -torch.inf)


def reference_topk(flat: Tensor, table: Tensor, k: int, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """`lens_topk` in plain PyTorch, block by block with a running list."""
    if flat.shape[0] > BLOCK_STATES:
        parts = [reference_topk(part, table, k, inverse) for part in flat.split(BLOCK_STATES)]
        return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])
    lengths = _inverse_lengths(flat)
    values = lengths.new_full((flat.shape[0], k), -torch.inf)
    ids = torch.full_like(values, -1, dtype=torch.int64)
    for low in range(0, table.shape[0], _block(table)):
        rows = slice(low, low + _block(table))
        block = _cosines(flat, lengths, table[rows], inverse[rows])
        # What is in the list has lower ids and stands in front: a stable sort keeps equal cosines in order.
        both = torch.cat([values, block], 1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :k]
        values = both.gather(1, order)
        ids = torch.where(order < k, ids.gather(1, order.clamp(max=k - 1)), order - k + low)
    return values, ids.masked_fill_(values == -torch.inf, -1)


def reference_rank(flat: Tensor, table: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    """`lens_rank` in plain PyTorch."""
    if flat.shape[0] > BLOCK_STATES:
        return torch.cat([reference_rank(part, table, ids, inverse) for part in flat.split(BLOCK_STATES)])
    lengths = _inverse_lengths(flat)
    size = table.shape[0]
    # The anchors' cosines are picked from the same products that they are compared with: others might round elsewhere.
    mine = lengths.new_full((flat.shape[0], len(ids)), -torch.inf)
    for low in range(0, size, _block(table)):
        rows = slice(low, low + _block(table))
        block = _cosines(flat, lengths, table[rows], inverse[rows])
        inside = (ids >= low) & (ids < low + block.shape[1])
        mine = torch.where(inside, block[:, (ids - low).clamp(0, block.shape[1] - 1)], mine)
    rank = torch.zeros_like(mine, dtype=torch.int32)
    for low in range(0, size, _block(table)):
        rows = slice(low, low + _block(table))
        block = _cosines(flat, lengths, table[rows], inverse[rows])
        index = torch.arange(low, low + block.shape[1], device=flat.device)
        for a in range(len(ids)):
            before = (block > mine[:, a, None]) | ((block == mine[:, a, None]) & (index < ids[a]))
            rank[:, a] += before.sum(1, dtype=torch.int32)
    return rank.masked_fill_(mine == -torch.inf, size)
