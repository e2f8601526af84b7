# SPDX-License-Identifier: Apache-2.0
"""`corematching`: tokens that fire the neurons which the whole prompt fires most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budget
from ..errors import ConfigError
from ..kernels import neuron_match, reference
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import common

MODES = ("elbow", "top_k")


@register("corematching")
@dataclass
class CoreMatchingPruner(Pruner):
    """CoreMatching: after one layer, keep the tokens that share most active neurons with the prompt's core neurons.

    In the FFN of the layer, each token of the prompt (text and picture) votes for the `rho` share of its active neurons
    (a positive product of activated gate and up projection) that are most active. The `beta` share of all neurons with
    the most votes is the core. A visual token's score is how many core neurons are active in it. The number of tokens
    is found by the picture itself: scores are sorted, and all from the point on stay that lies farthest from the line
    between the largest and the smallest (the elbow). The budget then has no say, but for ``keep=1.0``.

    The other half of the paper, decoding on core neurons alone, is `vtprune.decoding.core_neurons`.

    Paper: "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive
    Acceleration of Vision-Language Models", ICML 2025, https://arxiv.org/abs/2505.19235. The formulas are known from
    its abstract, from summaries and from the authors' code of its predecessor CoreInfer; the code that was published
    with it does something else (it zeroes keys and values for decoding only). What was open is done so:

    - Layers count from 0: `layer=1` is the second. Each picture has an elbow of its own (``scope="joint"``: each
      sample). Where there is no elbow (equal scores, scores on a line, fewer than three tokens) all stay.
    - Tokens at the elbow stay, with all that tie with them (the paper's >=; ``strict=True`` is the release's >).

    Parameters
    ----------
    layer
        Decoder layer, from 0, whose neurons are matched and after which tokens are dropped.
    rho
        Share of a token's active neurons that it votes for, in (0, 1].
    beta
        Share of all neurons that is the core, in (0, 1].
    mode
        ``"elbow"``, or ``"top_k"``: the best within the budget, ties to the lowest index.
    strict
        Drop the tokens at the elbow as well.
    prune_early_kv
        Take the dropped tokens out of the caches of the layers up to `layer` too, after the prompt.
    """

    paper = "arXiv:2505.19235"
    modality = ("image", "video")
    mechanism = ("query",)
    query_aware = True
    training_free = True
    adaptive = True
    ordered = False
    allocation = "pooled"

    layer: int = 1
    rho: float = 0.2
    beta: float = 0.4
    mode: str = "elbow"
    strict: bool = False
    prune_early_kv: bool = False

    def __post_init__(self) -> None:
        common.count("layer", self.layer, 0)
        for name in ("rho", "beta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ConfigError(f"{name}={value!r} is no share; give a number in (0, 1]")
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        for name in ("strict", "prune_early_kv"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        # What the class says about itself, an instance with a budget says otherwise.
        self.__dict__["adaptive"] = self.mode == "elbow"

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset({Probe("ffn_act", self.layer)})

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer),)

    def score(self, tokens: VisualTokens) -> Tensor:
        assert tokens.prompt_rows is not None and tokens.prompt_lens is not None
        act = tokens.probes[Probe("ffn_act", self.layer)]
        votes = neuron_match.top_counts(act, tokens.prompt_lens, self.rho)
        _, core = neuron_match.core(votes, self.beta)
        lens = tokens.sample_lens(len(tokens.prompt_lens))
        return neuron_match.match(neuron_match.pack_bits(act[tokens.prompt_rows]), core, lens)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        with common.exact(tokens):
            scores = self.score(tokens)
            if self.mode == "top_k":
                return common.top(scores, tokens, budget)
            lens = budget.pools(tokens).lens
            return Selection.from_mask(elbow(scores, lens, self.strict), tokens)


def elbow(scores: Tensor, lens: tuple[int, ...], strict: bool = False) -> Tensor:
    """Which scores lie at or before the elbow of their pool, ``[T]`` bool.

    Of the scores ``d_0 >= d_1 >= ...`` of a pool of n, the elbow is the first i that maximises the distance of (i, d_i)
    to the line from (0, d_0) to (n - 1, d_{n-1}), which grows with ``|(n - 1)(d_0 - d_i) - i (d_0 - d_{n-1})|``:
    integers, so exact. Scores from d_i on stay (`strict`: above d_i); all do where no score is off the line.

    Parameters
    ----------
    scores : Tensor
        ``[T]`` whole numbers.
    lens
        Scores per pool.
    """
    pools = reference.pools_of(scores, lens, lens)
    if not pools.counts:
        return torch.ones_like(scores, dtype=torch.bool)
    ranked = reference.pad(scores, pools, -1.0).sort(dim=1, descending=True, stable=True).values.long()
    step = torch.arange(ranked.shape[1], device=scores.device)
    last = pools.size[:, None] - 1
    first, least = ranked[:, :1], ranked.gather(1, last)
    off = (last * (first - ranked) - step * (first - least)).abs().masked_fill(~pools.inside, -1)
    distance = off.amax(1, keepdim=True)
    at = (off == distance).int().argmax(1, keepdim=True)  # the first of equal ones
    threshold = ranked.gather(1, at)
    found = distance > 0
    if strict:  # where nothing lies above the elbow, there is none
        found &= threshold < first
        threshold = threshold + 1
    threshold = torch.where(found, threshold, torch.iinfo(torch.int64).min)
    pool = torch.repeat_interleave(pools.size, output_size=scores.shape[0])
    return scores >= threshold.squeeze(1)[pool]
