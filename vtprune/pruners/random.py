# SPDX-License-Identifier: Apache-2.0
"""`random`: keep a random subset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import Pruner, register
from ..tokens import Stage, VisualTokens
from . import common


@register("random")
@dataclass
class RandomPruner(Pruner):
    """Keep a uniformly random subset. The baseline that every method has to beat.

    Each image has its own generator, seeded with its place in its sample, so that the choice does not depend on what
    else is in the batch, nor on the device; the global generators are not touched.

    Parameters
    ----------
    seed
        Not negative. Another seed, another subset.
    layer
        Prune after this decoder layer, from 0; None: before the language model.
    """

    paper = "baseline"
    modality = ("image", "video")
    mechanism = ()
    query_aware = False
    training_free = True
    adaptive = False

    seed: int = 0
    layer: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} cannot seed a generator; give a whole number from 0 on")

        if self.layer is not None:
            common.count("layer", self.layer, 0)

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer),)

    def score(self, tokens: VisualTokens) -> Tensor:
        scores = np.empty(tokens.features.shape[0], dtype=np.float32)
        start = 0
        for n, rank in zip(tokens.image_lens, tokens.image_rank, strict=True):
            scores[start : start + n] = np.random.default_rng((self.seed, rank)).random(n, dtype=np.float32)
            start += n
        return torch.from_numpy(scores).to(tokens.device, non_blocking=True)
