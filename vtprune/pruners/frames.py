# SPDX-License-Identifier: Apache-2.0
"""`frames`: keep fewer frames, whole."""

from __future__ import annotations

from dataclasses import dataclass

from ..budget import Budget, largest_remainder, segments_of
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens, cu_seqlens_of
from . import grid


@register("frames")
@dataclass
class FramesPruner(Pruner):
    """Keep whole frames, spread evenly over the clip: what a lower frame rate would show. A baseline.

    As many frames are kept as the budget pays for, each in the middle of its part of the clip. What is left over pays
    for an even lattice in the frame that lies farthest from those. A picture keeps an even lattice, as under `grid`;
    so does every frame under an allocation that gives each its own budget.
    """

    paper = "baseline"
    modality = ("image", "video")
    mechanism = ()
    query_aware = False
    training_free = True
    adaptive = False
    ordered = False
    allocation = "pooled"

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        counts: list[int] = []
        pools = budget.pools(tokens)
        for span, count in zip(segments_of(tokens, pools.lens), pools.counts, strict=True):
            clip = set(tokens.seg_kind[span]) == {"frame"}
            counts += (spread if clip else largest_remainder)(count, tokens.seqlens[span])
        return Selection(grid._lattice(tokens, tuple(counts)), cu_seqlens_of(counts, tokens.device))


def spread(count: int, lens: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that each frame of a clip keeps (host numbers): all or nothing, but for one."""
    total = len(lens)
    for number in range(total, -1, -1):
        chosen = [(2 * i + 1) * total // (2 * number) for i in range(number)]
        if sum(lens[at] for at in chosen) <= count:
            break
    kept = [0] * total
    for at in chosen:
        kept[at] = lens[at]
    left = count - sum(kept)
    while left:  # ties go to the first frame
        free = [at for at in range(total) if at not in chosen and lens[at]]
        middle = total // 2
        at = max(free, key=lambda at: (min((abs(at - c) for c in chosen), default=-abs(at - middle)), -at))
        kept[at] = min(left, lens[at])
        left -= kept[at]
        chosen.append(at)
    return tuple(kept)
