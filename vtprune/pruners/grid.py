# SPDX-License-Identifier: Apache-2.0
"""`grid`: keep an even lattice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..budget import Budget, largest_remainder, segments_of
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens, cu_seqlens_of


@register("grid")
@dataclass
class GridPruner(Pruner):
    """Keep a lattice of tokens, spread as evenly over each segment as the count allows. A baseline: what a coarser
    picture would keep.

    K tokens of an H x W segment lie in R rows, R chosen so that the steps down and across are as equal as can be. Each
    row holds K / R of them, rounded up in some rows and down in others, which alternate evenly. Rows, and tokens in
    rows, sit at the middles of equal parts. A quarter of 24 x 24 is the plain 12 x 12 lattice. Where several segments
    share a budget (``allocation="pooled"``, ``scope="joint"``), each keeps its proportional part.
    """

    paper = "baseline"
    modality = ("image", "video")
    mechanism = ()
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        counts = per_segment(tokens, budget)
        return Selection(_lattice(tokens, counts), cu_seqlens_of(counts, tokens.device))


def per_segment(tokens: VisualTokens, budget: Budget) -> tuple[int, ...]:
    """The count of each pool, split over the segments that it spans."""
    pools = budget.pools(tokens)
    spans = zip(segments_of(tokens, pools.lens), pools.counts, strict=True)
    return tuple(k for span, count in spans for k in largest_remainder(count, tokens.seqlens[span]))


def _lattice(tokens: VisualTokens, counts: tuple[int, ...]) -> Tensor:
    """Flat rows of all lattices, ascending."""
    device, lens = tokens.device, tokens.seqlens
    widths = tuple(width for _, width in tokens.seg_grid)
    if all(n == height * width for n, (height, width) in zip(lens, tokens.seg_grid, strict=True)):
        return _known(lens, widths, counts, device)
    return _rows(tokens.cu_seqlens, _widths(tokens), counts)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or it could not be used again where gradients flow
def _known(lens: tuple[int, ...], widths: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Where segments are whole, shapes say everything: nothing is launched for the next prompt like this one."""
    host = torch.device("cpu")
    return _rows(cu_seqlens_of(lens, host), torch.tensor(widths, dtype=torch.int64, device=host), counts).to(device)


def _widths(tokens: VisualTokens) -> Tensor:
    """Segments are read as full rectangles, as wide as their first row; an unpadded AnyRes view is narrower or lower
    than its seg_grid. What is no rectangle (left over by an earlier stage) is read as a single row."""
    cu = tokens.cu_seqlens
    n = cu.diff()
    segment = torch.repeat_interleave(n, output_size=tokens.features.shape[0])
    row = tokens.coords[:, 1]
    in_first_row = (row == row[cu[segment]]).cumsum(0)
    width = torch.cat([in_first_row.new_zeros(1), in_first_row])[cu].diff().clamp(min=1)
    return width.where(n % width == 0, n)


def _rows(cu: Tensor, width: Tensor, counts: tuple[int, ...]) -> Tensor:
    """In whole numbers, so that every device finds the same ones."""
    cu_k = cu_seqlens_of(counts, cu.device)
    n, k = cu.diff(), cu_k.diff()
    height = n // width.clamp(min=1)

    # R rows: the step down, height / R, is closest (as a ratio) to the step across, width * R / k, for the smallest R
    # with R (R + 1) >= k * height / width. As k <= height * width, that R is at most the height, and k / R, rounded up,
    # at most the width; but in a tall segment it may be more than k.
    trial = torch.arange(1, max(counts, default=0) + 1, device=cu.device)
    rows = 1 + (trial * (trial + 1) * width[:, None] < (k * height)[:, None]).sum(1)
    rows = torch.minimum(rows, k).clamp(min=1)

    # Token t of k has its middle at (t + 1/2) / k; it belongs to the row in which that falls.
    segment = torch.repeat_interleave(k, output_size=sum(counts))
    t = torch.arange(sum(counts), device=cu.device) - cu_k[segment]
    n_rows, k, height, width = rows[segment], k[segment], height[segment], width[segment]
    i = (2 * t + 1) * n_rows // (2 * k)
    begin, end = ((2 * k * line + n_rows - 1) // (2 * n_rows) for line in (i, i + 1))
    down = (2 * i + 1) * height // (2 * n_rows)
    across = (2 * (t - begin) + 1) * width // (2 * (end - begin))
    return cu[segment] + down * width + across
