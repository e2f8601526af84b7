# SPDX-License-Identifier: Apache-2.0
"""`embedlens`: drop the tokens that say nothing, as their nearest words tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..budget import Budget
from ..errors import ConfigError
from ..kernels import reference
from ..lens.calibration import Calibration, class_names
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens

MODES = ("rank", "drop", "control", "random", "only")


@register("embedlens")
@dataclass
class EmbedLensPruner(Pruner):
    """Drop dead and sink tokens, told by the words that their projected rows are nearest to.

    Paper: EmbedLens, arXiv 2603.00510 (see `vtprune.lens`). A checkpoint needs a calibration; without one the method is
    refused. Deviations: the paper has no budget (that is ``mode="drop"``), ranking by likeness to the anchors is ours;
    an image that would lose every token keeps the one that is least like an anchor; the control is seeded, and one
    with nothing to match drops nothing (the paper's code then drops everything).

    Parameters
    ----------
    mode
        ``"rank"``: meet the budget; dropped first are tokens of `classes`, those most like an anchor first, then the
        others by the same likeness. ``"drop"``: drop tokens of `classes` and no others, whatever the budget (but for
        ``keep=1.0``, which drops nothing). ``"control"``: as many tokens as that of each image, but at random from all
        others (all of these, where the class has most of the image). ``"random"``: as many as that of each image, at
        random from all of its tokens, which is matched whatever the class's share. ``"only"``: drop all the others.
    classes
        One or several of ``"dead"``, ``"vit_sink"``, ``"llm_sink"`` and ``"sink"`` (both): a list, or with commas.
    seed
        Of ``"control"`` and ``"random"``; not negative.
    calibration
        Path or contents of a calibration; None: the one that belongs to the checkpoint.
    """

    paper = "arXiv:2603.00510"
    modality = ("image", "video")
    mechanism = ("similarity",)
    query_aware = False
    training_free = True
    adaptive = False

    mode: str = "rank"
    classes: str | Sequence[str] = "dead,sink"
    seed: int = 0
    calibration: Any = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        self.names = class_names(self.classes)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} cannot seed a generator; give a whole number from 0 on")
        self._made: tuple[Any, Calibration, Tensor] | None = None
        if self.mode != "rank":
            self.__dict__.update(
                adaptive=True, ordered=False
            )  # what the class says about itself, an instance says here

    def check_checkpoint(self, checkpoint: str, vocabulary: Tensor) -> None:
        self._rule(checkpoint, vocabulary)

    def _rule(self, checkpoint: str, table: Tensor) -> tuple[Calibration, Tensor]:
        """The calibration, and reciprocal norms of the words; made once per table."""
        key = (checkpoint, table.data_ptr(), table.shape, table.device)
        if self._made is None or self._made[0] != key:
            rule = Calibration.of(self.calibration, checkpoint)
            if not any(name in rule.classes for name in self.names):
                raise ConfigError(
                    f"the calibration of {rule.checkpoint} knows nothing of {', '.join(self.names)}, only of "
                    f"{', '.join(rule.classes) or 'no class'}; name other classes"
                )
            self._made = (key, rule, rule.inverse(table))
        return self._made[1], self._made[2]

    def member(self, tokens: VisualTokens) -> Tensor:
        """Tokens of `classes`, ``[T]`` bool."""
        table = self._table(tokens)
        rule, inverse = self._rule(tokens.checkpoint, table)
        columns = [i for i, name in enumerate(rule.classes) if name in self.names]
        classes = rule.classify(tokens.features, table, inverse)
        return classes.index_select(1, reference.ints(columns, classes.device)).any(1)

    def score(self, tokens: VisualTokens) -> Tensor:
        return self._score(tokens, self.member(tokens))

    def _score(self, tokens: VisualTokens, member: Tensor) -> Tensor:
        table = self._table(tokens)
        rule, inverse = self._rule(tokens.checkpoint, table)
        like = rule.similarity(tokens.features, table, self.names, inverse)
        return -like - 4.0 * member  # cosines lie within [-1, 1]

    @staticmethod
    def _table(tokens: VisualTokens) -> Tensor:
        if tokens.vocabulary is None:
            raise ConfigError("embedlens needs the embeddings of the language model, which these tokens came without")
        return tokens.vocabulary

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        if self.mode == "rank":
            return super().select(tokens, budget, stage)
        member = self.member(tokens)
        drop = ~member if self.mode == "only" else member
        if self.mode in ("control", "random"):
            drop = self._matched(tokens, member)
        # No image goes blind: its best token stays.
        best = reference.topk(self._score(tokens, drop), tokens.image_lens, [min(1, n) for n in tokens.image_lens])
        return Selection.from_mask((~drop).index_fill(0, best, True), tokens, mode=self.mode)

    def _matched(self, tokens: VisualTokens, member: Tensor) -> Tensor:
        """As many tokens of each image as `member` has there, at random: from the others, as far as there are so many,
        or (``"random"``) from all."""
        own = member.cpu().numpy()
        drop = np.zeros(len(own), bool)
        start = 0
        for n, rank in zip(tokens.image_lens, tokens.image_rank, strict=True):
            others = start + np.flatnonzero(~own[start : start + n] | (self.mode == "random"))
            count = min(int(own[start : start + n].sum()), len(others))
            drop[np.random.default_rng((self.seed, rank)).permutation(others)[:count]] = True
            start += n
        return torch.from_numpy(drop).to(member.device)
