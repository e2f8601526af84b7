# SPDX-License-Identifier: Apache-2.0
"""`sparsevlm`: words of the question that speak of the picture rate its tokens; the best of the rest are merged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..budget import Budget, SteppedBudget
from ..kernels import reference
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common, layers

#: Nearest neighbours from which the density of a row is told.
NEIGHBOURS = 5


@register("sparsevlm")
@dataclass
class SparseVLMPruner(Pruner):
    """SparseVLM: words that match the picture rate its tokens by their attention; dropped tokens are recycled.

    Before the language model, each visual token spreads a softmax over the words of the question (products of
    embeddings). Words that get at least the mean are raters. At each stage a token's score is the mean attention of the
    raters to it. The best stay. Of the others, the best `recycle` are gathered into clusters (density peaks), one for
    every ``1 / merge`` of them, each of which stays as one token: the mean of its members, at the place of its centre.
    Recycled tokens are part of the budget, which is what is left after the last stage; stages keep equal shares.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025,
    https://arxiv.org/abs/2410.04417. Written from the paper. Deviations:

    - The paper tells from the rank of the attention of each layer how many tokens go; here the budget does, as in the
      paper's own comparisons at 192, 128 and 64 tokens.
    - The paper sums the members of a cluster. A sum has the length of many hidden states, so here it is their mean.
    - Without a word in the question, the last token of the prompt rates.

    Parameters
    ----------
    layers
        Decoder layers, from 0, after which tokens are dropped; None: 1, 5 and 14 of 32, and the like of another depth.
    recycle
        Share of the dropped tokens that is recycled; 0: none.
    merge
        Clusters per recycled token.
    """

    paper = "arXiv:2410.04417"
    modality = ("image", "video")
    mechanism = ("query", "transformation")
    query_aware = True
    training_free = True
    adaptive = False
    ordered = False
    allocation = "pooled"

    layers: tuple[int, ...] | None = None
    recycle: float = 0.3
    merge: float = 0.1

    def __post_init__(self) -> None:
        self.layers = layers.checked("layers", self.layers)
        common.share("recycle", self.recycle)
        common.share("merge", self.merge)

    def fit(self, depth: int) -> SparseVLMPruner:
        return self if self.layers is not None else replace(self, layers=layers.scaled(self.at, depth))

    @property
    def at(self) -> tuple[int, ...]:
        return (1, 5, 14) if self.layers is None else self.layers

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset(Probe(name, layer) for name in ("text_rows", "last_query_row") for layer in self.at)

    def stages(self) -> tuple[Stage, ...]:
        # Raters are told by embeddings; nothing is dropped there.
        return (PROJECTOR, *(Stage(layer) for layer in self.at))

    def stage_budget(self, budget: Budget, stage: Stage) -> Budget:
        if stage == PROJECTOR:
            return replace(budget, keep=1.0)
        return SteppedBudget.towards(budget, self.stages().index(stage) / len(self.at))

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        with common.exact(tokens):
            if stage == PROJECTOR:
                tokens.ctx["raters"] = raters(tokens)
                return common.unordered(torch.arange(len(tokens.source), device=tokens.device), tokens)
            scores = self._scores(tokens, layers.of(stage))
            return self._recycled(tokens, scores, *budget.pools(tokens))

    def _scores(self, tokens: VisualTokens, layer: int) -> Tensor:
        rows, last = tokens.probes[Probe("text_rows", layer)], tokens.probes[Probe("last_query_row", layer)]
        lens = tokens.sample_lens(tokens.num_samples)
        sample = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens, dtype=torch.int64))
        sample = sample.to(tokens.device, non_blocking=True)
        rating = tokens.ctx["raters"][sample].float()
        number = rating.sum(1)
        return torch.where(number > 0, (rows * rating).sum(1) / number.clamp(min=1), last)

    def _recycled(
        self, tokens: VisualTokens, scores: Tensor, lens: tuple[int, ...], counts: tuple[int, ...]
    ) -> Selection:
        pools = reference.pools_of(tokens.features, lens, counts)
        if not pools.counts:
            return common.unordered(tokens.source.new_empty(0), tokens)
        order = reference.topk(scores, lens, lens)  # every row of every pool, best first
        ends = list(accumulate(lens))
        into = torch.arange(len(tokens.source), device=tokens.device)
        kept = []
        for end, n, k in zip(ends, lens, counts, strict=True):
            ranked = order[end - n : end]
            clusters = min(max(k - 1, 0), math.ceil(self.recycle * self.merge * (n - k) - 1e-9))
            kept.append(ranked[: k - clusters])
            if clusters:
                members = max(clusters, math.ceil(self.recycle * (n - k + clusters) - 1e-9))
                rows = ranked[k - clusters : k - clusters + members]
                centres, cluster = density_peaks(tokens.features[rows].float(), clusters)
                kept.append(rows[centres])
                into[rows] = rows[centres][cluster]
        selection = common.unordered(torch.cat(kept), tokens)
        if not self.recycle or not self.merge:
            return selection
        return replace(selection, features=common.merged(tokens, selection.index, into))


def raters(tokens: VisualTokens) -> Tensor:
    """Which words of the question rate the picture, ``[samples, max(text_lens)]`` bool."""
    assert tokens.text is not None and tokens.text_lens is not None
    found = torch.zeros(len(tokens.text_lens), max((1, *tokens.text_lens)), dtype=torch.bool, device=tokens.device)
    for b, (rows, words) in enumerate(_samples(tokens)):
        if rows.shape[0] and words.shape[0]:
            spread = (rows.float() @ words.float().T).softmax(1).mean(0)
            found[b, : len(words)] = spread >= spread.mean()
    return found


def _samples(tokens: VisualTokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Visual rows and words of each sample."""
    assert tokens.text is not None and tokens.text_lens is not None
    lens = tokens.sample_lens(len(tokens.text_lens))
    yield from zip(tokens.features.split(lens), tokens.text.split(tokens.text_lens), strict=True)


def density_peaks(rows: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster by density peaks: centres are dense and far from what is denser; others join the nearest centre.

    Parameters
    ----------
    rows : Tensor
        ``[n, D]`` fp32, ``n >= clusters``.

    Returns
    -------
    centres, cluster : Tensor
        ``[clusters]`` rows, ascending, and the cluster of each row, ``[n]``; centres are in their own.
    """
    n = rows.shape[0]
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[1] ** 0.5
    near = distance.topk(min(NEIGHBOURS, n), largest=False).values
    density = -near.square().mean(1)  # of exp(density): the same order, and no underflow
    place = torch.empty(n, dtype=torch.int64, device=rows.device)
    place[density.sort(descending=True, stable=True).indices] = torch.arange(n, device=rows.device)
    denser = place[None] < place[:, None]
    gap = torch.where(denser, distance, torch.inf).amin(1)
    gap = torch.where(gap.isinf(), distance.max(), gap)
    peak = (density.exp() * gap).nan_to_num(nan=-1.0)
    centres = peak.sort(descending=True, stable=True).indices[:clusters].sort().values
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = torch.arange(clusters, device=rows.device)
    return centres, cluster
