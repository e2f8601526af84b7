# SPDX-License-Identifier: Apache-2.0
"""`catp`: for prompts with demonstrations. Pictures are thinned out before the language model and twice inside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..budget import Budget, Pools, SteppedBudget
from ..errors import ConfigError
from ..kernels.facility import facility
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common, layers


@dataclass(frozen=True)
class Halfway(SteppedBudget):
    """Half of what goes in the end is gone: of N tokens that K will be left of, ``floor((N + K) / 2)``.

    All of it is gone from a sample that has no demonstrations.

    Parameters
    ----------
    query_images
        As in `Contextual`.
    """

    query_images: int = 1

    def image_count(self, n: int) -> int:
        if not n:
            return 0
        share = min(self.keep, n) / n if isinstance(self.keep, int) else self.keep
        return max(super().image_count(n), math.floor((n + n * share**self.power) / 2 + 1e-6))

    def pools(self, tokens: VisualTokens) -> Pools:
        half = super().pools(tokens)
        whole = SteppedBudget(self.keep, self.scope, self.allocation, self.power).pools(tokens)
        of_images = tokens.image_sample
        of_pools: Sequence[int] = of_images if self.allocation == "pooled" else [of_images[i] for i in tokens.seg_image]
        if self.scope == "joint":
            of_pools = range(tokens.num_samples)
        alone = [of_images.count(sample) <= self.query_images for sample in of_pools]
        counts = tuple(w if a else h for a, w, h in zip(alone, whole.counts, half.counts, strict=True))
        return Pools(half.lens, counts)


@dataclass(frozen=True)
class Contextual(SteppedBudget):
    """Demonstrations of a sample share one pool; pictures of the query have theirs.

    Parameters
    ----------
    query_images
        Pictures at the end of each sample that belong to the query.
    query
        Whether it is the query's turn to lose tokens, or that of the demonstrations; the others keep theirs.
    """

    query_images: int = 1
    query: bool = False

    def pools(self, tokens: VisualTokens) -> Pools:
        lens, counts = [], []
        now, before = tokens.image_lens, tokens.ctx.get("image_lens", tokens.image_lens)
        for shown, asked in samples(tokens, self.query_images):
            if shown:
                left = sum(now[i] for i in shown)
                total = sum(before[i] for i in shown)
                kept = [self.image_count(before[i]) for i in shown]
                share = self.keep**self.power
                wanted = sum(kept) if isinstance(self.keep, int) else max(1, math.floor(total * share + 1e-6))
                lens.append(left)
                counts.append(left if self.query else min(left, wanted))
            for i in asked:
                lens.append(now[i])
                counts.append(min(now[i], self.image_count(before[i])) if self.query else now[i])
        return Pools(tuple(lens), tuple(counts))


def samples(tokens: VisualTokens, query_images: int) -> list[tuple[list[int], list[int]]]:
    """Of each sample with pictures, those of its demonstrations and those of its query."""
    own: dict[int, list[int]] = {}
    for image, sample in enumerate(tokens.image_sample):
        own.setdefault(sample, []).append(image)
    return [(images[:-query_images], images[-query_images:]) for images in own.values()]


@register("catp")
@dataclass
class CATPPruner(Pruner):
    """CATP: contextually adaptive pruning for in-context learning, in three steps.

    Of the tokens that go in the end, half go before the language model: each picture keeps those that cover it best and
    fit the text paired with it, by greedy facility location with a bonus (`kernels.facility`). After layer K the
    demonstrations of a sample lose theirs together: a token is worth how much more the last token of the prompt attends
    to it in layer K than in layer K - 1, plus `context_weight` times its cosine to the mean of the query (picture and
    question). After layer K + 1 the query's pictures lose theirs: a token is worth its cosine to the mean of what is
    left of the demonstrations.

    Paper: "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning", AAAI
    2026, https://arxiv.org/abs/2508.07871. Written from the paper. Its ratio R is what is removed: ``R = 1 - keep``.
    What it leaves open is done so:

    - Layers count from 0 and hidden states are a layer's output. The text paired with a picture is what stands between
      it and the next one; where there is none, coverage alone counts. The last picture is the query's.
    - Stage 1 maps cosines to [0, 1] by ``(1 + cos) / 2``; stage 2 takes them as they are, and the attention raw.
    - Views of one picture compete (``allocation="pooled"``). Counts round down.
    - Without demonstrations there is nothing to adapt to: the first step then takes all that goes, and the others
      nothing. (To let the mean of the question stand for the missing demonstrations, as one might, keeps the tokens
      that are most like words, and loses to chance by far.)

    Parameters
    ----------
    layer
        K, from 1; None: 6, from 40 layers on 10, and 6 of 32 in models of fewer than 28 layers.
    text_weight
        Weight of the fit to the paired text, the paper's lambda_1.
    context_weight
        Weight of the cosine to the query, the paper's lambda_2.
    query_images
        Pictures at the end of a sample that belong to the query.
    """

    paper = "arXiv:2508.07871"
    modality = ("image", "video")
    mechanism = ("query", "similarity")
    query_aware = True
    training_free = True
    adaptive = False
    ordered = False
    allocation = "pooled"

    layer: int | None = None
    text_weight: float = 0.7
    context_weight: float = 0.6
    query_images: int = 1

    def __post_init__(self) -> None:
        if self.layer is not None:
            common.count("layer", self.layer)
        for name in ("text_weight", "context_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value!r} is no weight; give a number from 0 on")
        common.count("query_images", self.query_images)

    def fit(self, depth: int) -> CATPPruner:
        if self.layer is not None:
            return self
        return replace(self, layer=10 if depth >= 40 else 6 if depth >= 28 else max(1, *layers.scaled((6,), depth)))

    @property
    def after(self) -> int:
        return 6 if self.layer is None else self.layer

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset(Probe("last_query_row", layer) for layer in (self.after - 1, self.after))

    def stages(self) -> tuple[Stage, ...]:
        return (PROJECTOR, Stage(self.after), Stage(self.after + 1))

    def stage_budget(self, budget: Budget, stage: Stage) -> Budget:
        last = SteppedBudget.towards(budget, 1.0)
        given = (last.keep, last.scope, last.allocation, last.power)
        if stage == PROJECTOR:
            return Halfway(*given, self.query_images)
        return Contextual(*given, self.query_images, stage.layer != self.after)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        with common.exact(tokens):
            if stage == PROJECTOR:
                return self._covering(tokens, *budget.pools(tokens))
            demonstrations = stage.layer == self.after
            scores = self._attended(tokens) if demonstrations else self._like_the_context(tokens)
            return replace(common.top(scores, tokens, budget), order=None)

    def _covering(self, tokens: VisualTokens, lens: tuple[int, ...], counts: tuple[int, ...]) -> Selection:
        bonus = torch.zeros(len(tokens.source), device=tokens.device)
        if tokens.pair_text is not None:
            for (start, end), text in zip(_spans(tokens), tokens.pair_text, strict=True):
                said = text.any()
                fit = (1 + _cosine(tokens.features[start:end], text)) / 2
                bonus[start:end] = torch.where(said, self.text_weight * fit, 0.0)
        order = facility(tokens.features, bonus, lens, counts)
        assert isinstance(order, Tensor)
        return Selection.from_order(order, tokens)

    def _attended(self, tokens: VisualTokens) -> Tensor:
        now, before = (tokens.probes[Probe("last_query_row", layer)] for layer in (self.after, self.after - 1))
        scores = (now - before).clamp(min=0)
        for (shown, asked), words in zip(samples(tokens, self.query_images), _words(tokens), strict=True):
            if shown:
                start, end = _span(tokens, shown)
                query = torch.cat([tokens.features[slice(*_span(tokens, asked))], words]).float().mean(0)
                scores[start:end] += self.context_weight * _cosine(tokens.features[start:end], query)
        return scores

    def _like_the_context(self, tokens: VisualTokens) -> Tensor:
        scores = torch.zeros(len(tokens.source), device=tokens.device)
        for shown, asked in samples(tokens, self.query_images):
            if shown and (context := tokens.features[slice(*_span(tokens, shown))]).shape[0]:
                start, end = _span(tokens, asked)
                scores[start:end] = _cosine(tokens.features[start:end], context.float().mean(0))
        return scores


def _spans(tokens: VisualTokens) -> list[tuple[int, int]]:
    """First flat row of each image, and the one after its last."""
    ends = [0, *accumulate(tokens.image_lens)]
    return list(pairwise(ends))


def _span(tokens: VisualTokens, images: list[int]) -> tuple[int, int]:
    """The same of consecutive images."""
    spans = _spans(tokens)
    return spans[images[0]][0], spans[images[-1]][1]


def _words(tokens: VisualTokens) -> list[Tensor]:
    """The question of each sample that has pictures."""
    assert tokens.text is not None and tokens.text_lens is not None
    parts = tokens.text.split(tokens.text_lens)
    return [parts[sample] for sample in dict.fromkeys(tokens.image_sample)]


def _cosine(rows: Tensor, to: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(rows.float(), to.float()[None], dim=1)
