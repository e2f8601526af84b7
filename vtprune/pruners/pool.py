# SPDX-License-Identifier: Apache-2.0
"""`pool`: average pooling over an even grid of cells."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import Budget
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens, cu_seqlens_of
from . import common, grid


@register("pool")
@dataclass
class PoolPruner(Pruner):
    """Average pooling: each segment is cut into as many cells as it may keep tokens, each cell becomes its mean. A
    baseline: a blurred, coarser grid.

    The cells are those around the tokens of `grid`: R rows of cells, R chosen so that cells are as square as can be,
    each with the count divided by R, rounded up in some rows and down in others. A mean stands where `grid` keeps a
    token, in the middle of its cell. A quarter of 24 x 24 is plain 2 x 2 pooling. Rows with NaN or infinite values do
    not count. Merged rows carry no gradient.
    """

    paper = "baseline"
    modality = ("image", "video")
    mechanism = ("transformation",)
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        counts = grid.per_segment(tokens, budget)
        index, into = cells(tokens, counts)
        with common.exact(tokens):
            features = common.merged(tokens, index, into)
        return replace(Selection(index, cu_seqlens_of(counts, tokens.device)), features=features)


def cells(tokens: VisualTokens, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Flat rows of the middles of the cells ``[K]``, ascending, and for each token the middle of its cell ``[T]``; -1
    in segments that keep none. In whole numbers, so that every device finds the same ones."""
    index = grid._lattice(tokens, counts)
    total = tokens.features.shape[0]
    if not index.shape[0]:
        return index, torch.full_like(tokens.source, -1)
    cu, cu_k = tokens.cu_seqlens, cu_seqlens_of(counts, tokens.device)
    segment = torch.repeat_interleave(cu.diff(), output_size=total)
    # Width, height and rows of cells as in `grid`, here for each token.
    width = grid._widths(tokens).clamp(min=1)
    height = (cu.diff() // width).clamp(min=1)
    k = cu_k.diff()
    trial = torch.arange(1, max(counts) + 1, device=tokens.device)
    rows = 1 + (trial * (trial + 1) * width[:, None] < (k * height)[:, None]).sum(1)
    rows = torch.minimum(rows, k).clamp(min=1)

    t = torch.arange(total, device=tokens.device) - cu[segment]
    first, some = cu_k[segment], (k > 0)[segment]
    k, width, height, rows = k[segment], width[segment], height[segment], rows[segment]
    # A token goes to the cell that its centre lies in; so do the tokens of the lattice, each to its own.
    line = (2 * (t // width) + 1) * rows // (2 * height)
    begin, end = ((2 * k * at + rows - 1) // (2 * rows) for at in (line, line + 1))
    cell = begin + (2 * (t % width) + 1) * (end - begin) // (2 * width)
    into = index[(first + cell).clamp(max=index.shape[0] - 1)]
    return index, into.where(some, -1)
