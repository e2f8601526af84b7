# SPDX-License-Identifier: Apache-2.0
"""Sparse visual contrastive decoding as a `LogitsProcessor` of transformers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .scores import contrast

#: Rows of the prior that are kept, the least recently used go first. Text repeats its frequent tokens.
CACHED_ROWS = 256


class SparseContrast(LogitsProcessor):
    """Contrast the model with its own prior: what it would say next without having looked at anything but one token.

    The prior is the head applied to the input embedding of the last token ("early exit at layer 0"), so it depends on
    the id of that token alone and is computed once per id. One host sync per step (the ids); `generate` has one too.

    Parameters
    ----------
    model
        The model with its head.
    alpha, plausibility
        See `vtprune.decoding.vasparse`.

    Notes
    -----
    VASparse's paper masks half of the visual tokens in the contrasted branch. At layer 0 each position is by itself, so
    that mask cannot change the last position, and there is none here.
    """

    def __init__(self, model: Any, alpha: float, plausibility: float) -> None:
        self.alpha, self.plausibility = alpha, plausibility
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.rows: OrderedDict[int, Tensor] = OrderedDict()
        self.fired = False

    @torch.no_grad()
    def prior(self, ids: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the prior after the tokens `ids` (``[B]`` int64)."""
        names = ids.tolist()
        known = {name: self.rows.get(name) for name in names}  # other threads may let go of rows meanwhile
        missing = sorted(name for name, row in known.items() if row is None)
        if missing:
            made = self.head(self.embed(torch.tensor(missing, device=self.embed.weight.device)))
            known.update(zip(missing, made, strict=True))
        rows = [row for name in names if (row := known[name]) is not None]
        for name, row in zip(names, rows, strict=True):
            self.rows.pop(name, None)
            self.rows[name] = row
        while len(self.rows) > CACHED_ROWS:
            self.rows.popitem(last=False)
        return torch.stack(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities ``[B, V]`` from `scores` ``[B, V]`` (logits, or log-probabilities of beams)."""
        self.fired = True
        return contrast(scores, self.prior(input_ids[:, -1]).to(scores.device), self.alpha, self.plausibility)
