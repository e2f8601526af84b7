# SPDX-License-Identifier: Apache-2.0
"""`spatten`: the attention that a token has received in all layers so far decides whether it goes on to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..budget import Budget, SteppedBudget
from ..errors import ConfigError
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common, layers

QUERIES = {"all": "column_sums", "text": "text_rows"}


@register("spatten")
@dataclass
class SpAttenPruner(Pruner):
    """SpAtten's cascade token pruning: the importance of a token is the attention that it has received so far.

    With ``p[l, h, q, t]`` the attention of query q to token t in head h of layer l, after the softmax, the importance
    of t after layer L is ``s[t] = sum over l <= L, h, q of p[l, h, q, t]``. The sum never starts anew: a token that was
    looked at early keeps what it earned. After each of `layers` the tokens with the smallest s go, and are gone for all
    layers above (the cascade): they receive nothing and, as queries, give nothing any more.

    Paper: "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning", HPCA 2021,
    https://arxiv.org/abs/2012.09852. Written from what the paper says of token pruning. In: importance accumulated over
    queries, heads and layers; top-k at each layer; pruned for good. Left out: cascade *head* pruning, local pruning of
    values, progressive quantisation, pruning on while decoding, and the hardware that all of it is for. Deviations:

    - Only visual tokens are pruned; the paper prunes words.
    - Heads are averaged, which ranks as their sum does.
    - The budget is what is left in the end: each stage keeps the same share of what it sees. The paper gives layers
      ratios of their own.
    - The attention is recomputed, some rows at a time, for the paper's hardware has it at hand: half of the attention
      products once more. ``queries="text"`` is much cheaper.

    Under a causal mask early tokens are seen by more queries, and the sum favours them; the paper's classifiers look
    both ways. ``queries="text"`` (ours) counts the question alone, which sees every token.

    On the pocket models it lies far behind pruning in front of the language model, at more FLOPs
    (``docs/neighbours.md``). It may pay in deep models, whose later layers then see few tokens, and where attention
    maps are at hand anyway.

    Example, two layers, one head, a picture of three tokens a, b, c and one word w, causal. Layer 0 (rows are queries)
    a: [1], b: [.5 .5], c: [.2 .2 .6], w: [.1 .5 .1 .3]; s = [1.8, 1.2, .7]; of two that may stay after it c goes.
    Layer 1, without c, a: [1], b: [.1 .9], w: [.1 .6 .3]; s = [1.8 + 1.2, 1.2 + 1.5] = [3, 2.7]; of one that may stay
    b goes. By the question alone s = [.1, .5, .1] and then, without c, [.2, 1.1]: a goes.

    Parameters
    ----------
    layers
        Decoder layers, from 0, after which tokens go; None: every layer from a sixth of the depth on, but the last.
    queries
        Whose attention counts: ``"all"`` rows of the prompt (the paper), or those of the question, ``"text"``.
    """

    paper = "arXiv:2012.09852"
    modality = ("image", "video")
    mechanism = ("query",)
    query_aware = True
    training_free = True
    adaptive = False
    ordered = False
    allocation = "pooled"

    layers: tuple[int, ...] | None = None
    queries: str = "all"

    def __post_init__(self) -> None:
        self.layers = layers.checked("layers", self.layers)
        if self.queries not in QUERIES:
            raise ConfigError(f"queries={self.queries!r} is unknown; use one of {', '.join(map(repr, QUERIES))}")

    def fit(self, depth: int) -> SpAttenPruner:
        return self if self.layers is not None else replace(self, layers=_after_the_first(depth))

    @property
    def at(self) -> tuple[int, ...]:
        return _after_the_first(layers.USUAL_DEPTH) if self.layers is None else self.layers

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset(Probe(QUERIES[self.queries], layer) for layer in range(max(self.at) + 1))

    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer) for layer in self.at)

    def stage_budget(self, budget: Budget, stage: Stage) -> Budget:
        return SteppedBudget.towards(budget, (self.stages().index(stage) + 1) / len(self.at))

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        # Probes of layers below were cut down together with the tokens at every stage before this one.
        given = [tokens.probes[Probe(QUERIES[self.queries], layer)] for layer in range(layers.of(stage) + 1)]
        received = torch.stack([rows if rows.ndim == 1 else rows.sum(1) for rows in given])
        return common.top(received.sum(0), tokens, budget)


def _after_the_first(depth: int) -> tuple[int, ...]:
    return tuple(range(max(1, round(depth / 6)), max(2, depth - 1)))
