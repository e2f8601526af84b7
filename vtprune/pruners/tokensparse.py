# SPDX-License-Identifier: Apache-2.0
"""`tokensparse`: tokens sit out the attention of some layers, and may take part again later."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..budget import Budget
from ..errors import ConfigError
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common, layers


@register("tokensparse")
@dataclass
class TokenSparsePruner(Pruner):
    """Token Sparse Attention: per layer a few tokens enter the attention, and no token is ever lost.

    With x the rows of all tokens, S the selected ones and all text, the attention half of a layer, ``x <- x +
    Attn(norm(x))`` in the model, becomes ``x[S] <- x[S] + Attn(norm(x[S]))``; the others keep their x. The FFN runs for
    every row. At the next such layer S is chosen anew, and a token that sat out may be back. The layer caches keys and
    values of S alone, which is what later text attends to.

    Paper: "Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection", 2026,
    https://arxiv.org/abs/2602.03216. Written from its abstract and what its authors say of it, not from their code. In:
    the selection of a token set per layer, attention on the gathered set with whatever attention the model has, the
    output scattered back, hidden states at full length. Left out: a set for *each head*, how many tokens a layer needs
    by the attention that they cover, and the search for layers by how much representations drift. Deviations:

    - One set for all heads of a layer. It is gathered before the projections, which the paper runs for every token: so
      projections are saved as well, and the cache is shorter.
    - Only visual tokens sit out.
    - Tokens are ranked by how much the last token of the prompt attends to them in the layer *before*, which is known
      by then. Where some sat that one out, by how much it would have, had all taken part: their keys cost a projection.
    - The budget says how many take part; the same number at each of `layers`.

    The FFN, most of a layer's work, is not saved: at equal FLOPs, pruning for good may keep more tokens, and on the
    pocket models it is better by that (``docs/neighbours.md``). It may pay for prompts so long that attention is most
    of the work.

    Example, one layer, x = [1, 2, 3] for two visual tokens and a word, budget 1, attention of the word to them in the
    layer before .1 and .3: S holds the second token and the word, and with Attn(norm(x[S])) = [10, 20] x becomes
    [1, 12, 23]; the cache of the layer holds two rows.

    Parameters
    ----------
    layers
        Decoder layers, from 1, whose attention tokens sit out; None: every other one from the fourth on.
    """

    paper = "arXiv:2602.03216"
    modality = ("image", "video")
    mechanism = ("query",)
    query_aware = True
    training_free = True
    adaptive = False
    ordered = False
    allocation = "pooled"

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.layers = layers.checked("layers", self.layers)
        if self.layers is not None and not self.layers[0]:
            raise ConfigError("layers: the attention of layer 0 has none before it to rank tokens by; begin at 1")

    def fit(self, depth: int) -> TokenSparsePruner:
        return self if self.layers is not None else replace(self, layers=_every_other(depth))

    @property
    def at(self) -> tuple[int, ...]:
        return _every_other(layers.USUAL_DEPTH) if self.layers is None else self.layers

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset(Probe("last_query_row", layer - 1) for layer in self.at)

    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer - 1, reversible=True) for layer in self.at)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        return common.top(tokens.probes[Probe("last_query_row", layers.of(stage))], tokens, budget)


def _every_other(depth: int) -> tuple[int, ...]:
    return tuple(range(min(3, depth - 1), depth, 2))
