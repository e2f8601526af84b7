# SPDX-License-Identifier: Apache-2.0
"""`cdpruner`: diverse tokens, weighed by how much they have to do with the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budget
from ..errors import ConfigError
from ..kernels import reference, select
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens
from . import common


@register("cdpruner")
@dataclass
class CDPruner(Pruner):
    """CDPruner: the greedy MAP of a determinantal point process that is conditioned on the question.

    With the relevance r_i of token i to the question and the cosine of tokens, the kernel is
    ``L_ij = r_i cos(x_i, x_j) r_j``; each pick is the token that makes the determinant of the picks largest.

    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025,
    https://arxiv.org/abs/2506.10967. Written from the paper. Deviations:

    - In the paper relevance is the cosine between CLIP's image and text embeddings. No checkpoint that transformers
      serves as a vision-language model ships CLIP's text tower, so for every family it is the mean cosine between a
      token's projected row and the language model's input embeddings of the question. Nothing has trained these two
      to agree, so it is a weaker signal than CLIP's.
    - The cosine counts as it is. The authors' code takes the negative of CLIP's (`relevance="negative"`).
    - A sample without a question, or whose tokens are all as relevant, is pruned for diversity alone.
    - Min-max of the relevance over each pool, not over the picture, where the budget has several pools per picture.

    Parameters
    ----------
    relevance
        ``"positive"``, ``"negative"``, or ``"none"``: diversity alone, which does not see the question.
    """

    paper = "arXiv:2506.10967"
    modality = ("image", "video")
    mechanism = ("similarity", "query")
    query_aware = True
    training_free = True
    adaptive = False

    relevance: str = "positive"

    def __post_init__(self) -> None:
        if self.relevance not in ("positive", "negative", "none"):
            raise ConfigError(f"relevance={self.relevance!r} is unknown; choose one of positive, negative, none")

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, counts = budget.pools(tokens)
        with common.exact(tokens):
            raw, source = self._relevance(tokens)
            scaled = reference.minmax(raw, lens) if sum(lens) else raw
            # The authors' code adds 1e-6 as well, so that no token is out of the question.
            quality = torch.where(_flat(raw, lens), 1.0, scaled + 1e-6)
            return Selection.from_picks(select.dpp(tokens.features, quality, lens, counts), tokens, relevance=source)

    def _relevance(self, tokens: VisualTokens) -> tuple[Tensor, str]:
        """``[T]`` fp32; 0 where there is no question."""
        scores = tokens.features.new_zeros(tokens.features.shape[0], dtype=torch.float32)
        if self.relevance == "none":
            return scores, "none"
        if tokens.text is None or tokens.text_lens is None or not any(tokens.text_lens):
            return scores, "none (no question)"
        start = first = 0
        for n, words in zip(tokens.sample_lens(len(tokens.text_lens)), tokens.text_lens, strict=True):
            if n and words:
                unit, sound = reference.unit_rows(tokens.features, start, n)
                # The mean over words of the cosine is the cosine sum with one mean vector.
                mean = reference.unit_rows(tokens.text, first, words)[0].mean(0)
                scores[start : start + n] = (unit * mean).sum(1).masked_fill(~sound, torch.nan)
            start, first = start + n, first + words
        return (-scores if self.relevance == "negative" else scores), "question embeddings"


def _flat(values: Tensor, lens: tuple[int, ...]) -> Tensor:
    """Which values belong to a pool whose finite values are all equal, up to rounding."""
    pools = reference.pools_of(values, lens, lens)
    if not pools.counts:
        return torch.zeros_like(values, dtype=torch.bool)
    padded = reference.pad(values, pools, torch.nan)
    sound = padded.isfinite()
    spread = padded.where(sound, -torch.inf).amax(1) - padded.where(sound, torch.inf).amin(1)
    return values.isfinite() & (spread <= 1e-6)[torch.repeat_interleave(pools.size, output_size=values.shape[0])]
