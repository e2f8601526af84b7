# SPDX-License-Identifier: Apache-2.0
"""`vidcom2`: frames unlike their clip keep more, and in each frame the tokens unlike clip and frame stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..budget import Budget, allocation, fill
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens
from . import common
from .evs import segment_means

#: Widths of the Gaussian kernels, and the temperature of the softmax over frames.
ALPHAS = tuple(2.0**power for power in range(-3, 2))
TEMPERATURE = 0.01


@register("vidcom2")
@dataclass
class VidCom2Pruner(Pruner):
    r"""VidCom2: the clip commands its frames.

    With rows x of length 1, the mean g of the clip and the mean f of the frame, and
    ``k(x, c) = sum over a of exp(-||x - c||^2 / 2a)``, a in 1/8 ... 2::

        u_t     = -mean of k(x, g) over frame t             how unlike the clip a frame is
        r_t     = keep * (1 + softmax(u / 0.01)_t - 1 / n)  what it keeps, at most all
        score_i = -k(x_i, g) - k(x_i, f)                    what it keeps first

    The r_t are an allocation that any method can have (``allocation="vidcom2"``).

    Paper: arXiv 2505.14454. Departures:

    - All channels count. The authors' code takes the half of them that varies least.
    - Shares are rounded so that the clip's budget is met.
    - Views of an AnyRes picture are treated as frames are; a picture of one view keeps what is unlike its mean.
    """

    paper = "arXiv:2505.14454"
    modality = ("image", "video")
    mechanism = ("similarity",)
    query_aware = False
    training_free = True
    adaptive = False
    allocation = "vidcom2"

    def score(self, tokens: VisualTokens) -> Tensor:
        with common.exact(tokens):
            scores = tokens.features.new_zeros(tokens.features.shape[0], dtype=torch.float32)
            for rows, unit, sound, lens in _images(tokens):
                frame, first = torch.empty_like(unit), 0
                for n in lens:  # frame by frame: rounded alike alone and in a batch
                    part = slice(first, first + n)
                    frame[part] = _mean(unit[part], sound[part])
                    first += n
                near = kernel(unit, _mean(unit, sound)) + kernel(unit, frame)
                scores[rows] = (-near).masked_fill(~sound, -torch.inf)
            return scores

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        return common.top(self.score(tokens), tokens, budget)


def _images(tokens: VisualTokens) -> Iterator[tuple[slice, Tensor, Tensor, list[int]]]:
    """Of each image: its flat rows, these at length 1, which of them are sound, and the lengths of its segments."""
    start = 0
    for image, n in enumerate(tokens.image_lens):
        rows = slice(start, start + n)
        start += n
        x = tokens.features[rows].detach().to(torch.float32, copy=True)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        sound = length.squeeze(1).isfinite()
        lens = [m for m, i in zip(tokens.seqlens, tokens.seg_image, strict=True) if i == image]
        yield rows, (x / length.clamp(min=1e-12)).masked_fill(~sound[:, None], 0.0), sound, lens


def _mean(unit: Tensor, sound: Tensor) -> Tensor:
    """Mean row ``[1, D]`` of those that are sound."""
    return unit.sum(0, keepdim=True) / sound.sum().clamp_min(1)


def kernel(rows: Tensor, centre: Tensor) -> Tensor:
    """Likeness of each row to its centre, ``[n]``: a sum of Gaussians of several widths."""
    distance = (rows - centre).square().sum(1)
    return torch.stack([torch.exp(-distance / (2 * a)) for a in ALPHAS]).sum(0)


@allocation("vidcom2")
def split(tokens: VisualTokens, keep: float | int, counts: Sequence[int]) -> tuple[int, ...]:
    """What each frame keeps; see `VidCom2Pruner`. Waits for the device, once per batch of tokens."""
    features, alike = tokens.ctx.get("vidcom2", (None, []))
    if features is not tokens.features:
        with common.exact(tokens):
            likeness = tokens.features.new_zeros(tokens.features.shape[0], dtype=torch.float32)
            for rows, unit, sound, _ in _images(tokens):
                likeness[rows] = kernel(unit, _mean(unit, sound)).masked_fill(~sound, torch.nan)
            alike = segment_means(likeness, tokens.seqlens)
        tokens.ctx["vidcom2"] = (tokens.features, alike)
    found: list[int] = []
    for image, most in enumerate(counts):
        mine = [s for s, i in enumerate(tokens.seg_image) if i == image]
        lens = [tokens.seqlens[s] for s in mine]
        u = -np.asarray([alike[s] for s in mine], np.float64) / TEMPERATURE
        weights = np.exp(u - u.max(initial=-np.inf))
        shares = 1 + weights / max(weights.sum(), 1e-30) - 1 / max(len(mine), 1)
        found += fill(most, [n * share for n, share in zip(lens, shares.tolist(), strict=True)], lens)
    return tuple(found)
