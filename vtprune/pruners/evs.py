# SPDX-License-Identifier: Apache-2.0
"""`evs`: what repeats the frame before goes first; and `allocation="change"`: frames keep as much as they bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import allocation, fill
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import VisualTokens
from . import common

#: Steps of the R2 sequence: a threshold on ``(row * a + column * b) mod 1`` leaves an even spread, at any level.
_SPREAD = (0.7548776662466927, 0.5698402909980532)


@register("evs")
@dataclass
class EVSPruner(Pruner):
    """Efficient Video Sampling: keep the patches that changed most since the frame before.

    A patch scores 1 minus the cosine of its projected row with that at the same place in the frame before. Patches of
    the first frame have none before them and come first of all, and the whole clip competes (``allocation="pooled"``).

    Paper: arXiv 2510.14624. Departures:

    - The paper keeps the first frame whatever the budget. Here the budget is met: where it is smaller than that frame,
      an even spread of its patches is kept. So it is of a picture, which has no frame before it.
    - Where another method ran before, a patch whose place was dropped in the frame before counts as new.
    """

    paper = "arXiv:2510.14624"
    modality = ("image", "video")
    mechanism = ("similarity",)
    query_aware = False
    training_free = True
    adaptive = False
    allocation = "pooled"

    def score(self, tokens: VisualTokens) -> Tensor:
        with common.exact(tokens):
            change, known = changes(tokens)
            row, col = tokens.coords[:, 1:].to(reference.wide(tokens.coords)).unbind(1)
            spread = (row * _SPREAD[0] + col * _SPREAD[1]).frac().float()
            return torch.where(known | change.isnan(), change, 3.0 + spread)


def changes(tokens: VisualTokens) -> tuple[Tensor, Tensor]:
    """1 minus the cosine of each token with the one at its place in the frame before, ``[T]`` fp32 in [0, 2]; and
    whether there is one, ``[T]`` bool (the value is 1 where there is none, or it is broken; NaN for a broken row)."""
    total, device = tokens.features.shape[0], tokens.device
    if not total:
        return tokens.features.new_zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.bool, device=device)
    follows = [
        at > 0
        and tokens.seg_kind[at] == tokens.seg_kind[at - 1] == "frame"
        and tokens.seg_image[at] == tokens.seg_image[at - 1]
        for at in range(len(tokens.seqlens))
    ]
    cells = max((h * w for h, w in tokens.seg_grid), default=1)
    as_rows = [torch.tensor(x).to(device, non_blocking=True) for x in (tokens.seqlens, follows, _widths(tokens))]
    segment = torch.repeat_interleave(as_rows[0], output_size=total)
    place = (tokens.coords[:, 1].long() * as_rows[2][segment] + tokens.coords[:, 2].long()).clamp(0, cells - 1)
    table = torch.full((len(tokens.seqlens), cells), -1, device=device)
    table[segment, place] = torch.arange(total, device=device)
    before = table[(segment - 1).clamp_min(0), place]
    rows = tokens.features.detach().float()
    sound = rows.sum(1).isfinite()
    known = (before >= 0) & as_rows[1][segment] & sound[before.clamp_min(0)]
    other = rows[before.clamp_min(0)]
    length = torch.linalg.vector_norm(rows, dim=1) * torch.linalg.vector_norm(other, dim=1)
    change = 1.0 - (rows * other).sum(1) / length.clamp(min=1e-8)
    return torch.where(known, change, 1.0).masked_fill(~sound, torch.nan), known


def _widths(tokens: VisualTokens) -> list[int]:
    return [width for _, width in tokens.seg_grid]


@allocation("change")
def split(tokens: VisualTokens, keep: float | int, counts: Sequence[int]) -> tuple[int, ...]:
    """A frame keeps in proportion to its mean change since the frame before; the first counts as all new. Waits for the
    device, once per batch of tokens."""
    features, means = tokens.ctx.get("change", (None, []))
    if features is not tokens.features:
        with common.exact(tokens):
            means = segment_means(changes(tokens)[0], tokens.seqlens)
        tokens.ctx["change"] = (tokens.features, means)
    found: list[int] = []
    for image, most in enumerate(counts):
        mine = [s for s, i in enumerate(tokens.seg_image) if i == image]
        found += fill(most, [max(means[s], 0.0) for s in mine], [tokens.seqlens[s] for s in mine])
    return tuple(found)


def segment_means(values: Tensor, lens: Sequence[int]) -> list[float]:
    """Mean of ``values [T]`` in each segment, NaN left out, 0 where there is nothing; on the host."""
    if not lens:
        return []
    lengths = torch.tensor(lens).to(values.device, non_blocking=True)
    sound = values.isfinite()
    # Row after row in order: the same sum every time, alone and in a batch.
    sums = torch.stack(
        [
            torch.segment_reduce(x, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)
            for x in (values.masked_fill(~sound, 0.0), sound.to(values.dtype))
        ]
    )
    return (sums[0] / sums[1].clamp_min(1)).tolist()
