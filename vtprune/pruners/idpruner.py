# SPDX-License-Identifier: Apache-2.0
"""`idpruner`: importance and diversity in one greedy score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget
from ..errors import ConfigError
from ..kernels import select
from ..registry import Pruner, register
from ..tokens import PRE_PROJECTOR, PROJECTOR, Probe, Selection, Stage, VisualTokens
from . import importance
from . import scorer as trained
from .clip_text import ClipText
from .zoo import ZooPruner

NORMS = ("raw_minmax", "soft_topk_minmax")


@register("idpruner")
@dataclass
class IDPruner(Pruner):
    """IDPruner: greedy maximal marginal relevance over the projected tokens.

    The first token kept is the most important one; each further token is the one with the largest
    ``lambda * importance - (1 - lambda) * (largest cosine to a kept token)``.

    Paper: arXiv:2602.13315. Deviations:

    - The paper takes importance from a trained scorer (``importance="scorer"``). The default is training-free: what the
      vision encoder's CLS token attends to, or, without one, how unlike the mean of its image a token is. CLS attention
      is taken before the softmax, because the min-max below would let its few largest values squeeze all others
      together.
    - The paper scores, normalises importance and selects over all visual tokens of the prompt. Here all three happen in
      each pool of the budget: per image by default (per view and frame with ``allocation="equal"``), over the prompt
      with ``scope="joint"``.
    - Importance is mapped to [0, 1] from its raw values, as in the authors' code, but in fp32, because bf16 makes ties.
      The paper's text passes it through a soft top-k first: ``importance_norm="soft_topk_minmax"``. Ties go to the
      lowest index.
    - The authors keep ``round(N * keep)`` tokens; here the budget's own rounding applies.

    Parameters
    ----------
    importance
        ``"cls_logits"`` and ``"cls"`` (CLS attention before and after the softmax), ``"norm"`` (L2), ``"zoo"`` (see
        `ZooPruner`), ``"scorer"`` (trained, see `Scorer`), ``"draft"`` (what a smaller model attends to, see
        `vtprune.draft`), ``"clip-text"`` (the question, see `ClipText`), or ``"auto"``: ``"cls_logits"`` where the
        encoder has a CLS token, else minus the cosine to the image's mean.
    mmr_lambda
        In [0, 1]; 1 is importance alone, 0 is diversity alone.
    parallel_k
        Tokens per greedy round; more is faster and less diverse.
    importance_norm
        ``"raw_minmax"``, or ``"soft_topk_minmax"``: the soft top-k of a fifth of the tokens first.
    scorer
        For ``importance="scorer"``: the safetensors file of its weights, a folder with one, or the name of a model that
        ships with one. A scorer is trained for one model.
    clip
        For ``importance="clip-text"``: a `ClipText`.
    """

    paper = "arXiv:2602.13315"
    modality = ("image", "video")
    mechanism = ("attention", "similarity")
    query_aware = False
    training_free = True
    adaptive = False

    importance: str = "auto"
    mmr_lambda: float = 0.5
    parallel_k: int = 1
    importance_norm: str = "raw_minmax"
    scorer: str | None = None
    clip: ClipText | None = None

    def __post_init__(self) -> None:
        sources = (*importance.SOURCES, "scorer", "clip-text")
        if self.importance not in sources:
            raise ConfigError(f"importance={self.importance!r} is unknown; choose one of {', '.join(sources)}")
        if self.importance_norm not in NORMS:
            raise ConfigError(f"importance_norm={self.importance_norm!r} is unknown; choose one of {', '.join(NORMS)}")
        if (self.importance == "scorer") != (self.scorer is not None):
            raise ConfigError(
                f'importance={self.importance!r} and scorer={self.scorer!r} do not go together: importance="scorer" '
                "needs the path of its weights, and nothing else does"
            )
        if self.scorer is not None:
            if not isinstance(self.scorer, str):
                raise ConfigError(f"scorer={self.scorer!r} is a {type(self.scorer).__name__}; give its path as text")
            self.training_free = False  # type: ignore[misc]  # of this one, not of the method
            self.network = trained.load(self.scorer)
        if (self.importance == "clip-text") != isinstance(self.clip, ClipText):
            raise ConfigError(
                f"importance={self.importance!r} and clip={self.clip!r} do not go together: "
                'importance="clip-text" needs a vtprune.pruners.ClipText, and nothing else does'
            )
        if self.clip is not None:  # of this one, not of the method
            self.__dict__.update(query_aware=True, mechanism=("query", "similarity"))
        if self.importance == "draft":
            self.query_aware = True  # type: ignore[misc]
        lam = self.mmr_lambda
        if isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam) or not 0 <= lam <= 1:
            raise ConfigError(f"mmr_lambda={lam!r} is no weight; give a number from 0 (diversity) to 1 (importance)")
        if isinstance(self.parallel_k, bool) or not isinstance(self.parallel_k, int) or self.parallel_k < 1:
            raise ConfigError(f"parallel_k={self.parallel_k!r} is no count; give a whole number from 1 on")

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return self.importance in ("auto", "cls_logits", "cls", "norm") and self.importance_norm == "raw_minmax"

    @property
    def needs(self) -> frozenset[Probe]:
        return importance.NEEDS.get(self.importance, frozenset() if self.clip is None else frozenset({PRE_PROJECTOR}))

    @property
    def wants(self) -> frozenset[Probe]:
        return importance.WANTS.get(self.importance, frozenset())

    def check_model(self, width: int, projector: Any) -> None:
        if self.scorer is not None:
            self._check_width(width)
        if self.importance == "zoo":
            ZooPruner().check_model(width, projector)
        if self.clip is not None:
            self.clip.check(projector)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        pools = budget.pools(tokens)
        scores, source = self._importance(tokens, pools.lens)
        if self.importance_norm == "soft_topk_minmax":
            scores = trained.soften(scores, pools.lens)
        picks = select.mmr(
            tokens.features, scores, pools.lens, pools.counts, self.mmr_lambda, self.parallel_k, minmax=True
        )
        return Selection.from_picks(picks, tokens, pools, importance=source)

    def _importance(self, tokens: VisualTokens, lens: Sequence[int]) -> tuple[Tensor, str]:
        if self.clip is not None:
            return self.clip.score(tokens), "clip-text"
        if self.scorer is None:
            return importance.SOURCES[self.importance](tokens)
        self._check_width(tokens.features.shape[1])
        scorer = self.network.to(tokens.device)
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            return scorer(tokens.features, lens), "scorer"

    def _check_width(self, width: int) -> None:
        if self.network.query.in_features != width:
            raise ConfigError(
                f"the scorer {self.scorer} is for tokens of width {self.network.query.in_features}, this model's have "
                f"{width}; give one that was trained for this model"
            )
