# SPDX-License-Identifier: Apache-2.0
"""How important is each visual token? Sources that methods share; each gives fp32 scores and the name of what was used.

A new source is one more entry in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import reference
from ..tokens import CLS_LOGITS, CLS_ROW, PRE_PROJECTOR, Probe, VisualTokens
from .zoo import ZooPruner

#: What `vtprune.draft.drafting` puts beside the tokens, ``[T]`` fp32; no encoder has it.
DRAFT = Probe("draft_row")


def _per_image(tokens: VisualTokens) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each image, copied to fp64: what is summed then rounds to the same fp32 on every device, and
    reductions have the same shape in any batch."""
    start = 0
    for n in tokens.image_lens:
        rows = slice(start, start + n)
        yield rows, tokens.features[rows].detach().to(reference.wide(tokens.features), copy=True)
        start += n


def _empty(tokens: VisualTokens) -> Tensor:
    return tokens.features.new_empty(tokens.features.shape[0], dtype=torch.float32)


def cls(tokens: VisualTokens) -> tuple[Tensor, str]:
    """Attention that the CLS token of the vision encoder pays to each token, after the softmax."""
    return _probe(tokens, CLS_ROW, "cls")


def cls_logits(tokens: VisualTokens) -> tuple[Tensor, str]:
    """The same before the softmax: a few tokens that take most of the attention do not squeeze all others together."""
    return _probe(tokens, CLS_LOGITS, "cls_logits")


def _probe(tokens: VisualTokens, probe: Probe, name: str) -> tuple[Tensor, str]:
    if probe not in tokens.probes:
        raise ConfigError(f"importance={name!r} needs a vision encoder with a CLS token, this one has none; use 'auto'")
    return tokens.probes[probe].detach().float(), name


def norm(tokens: VisualTokens) -> tuple[Tensor, str]:
    """L2 norm of each token."""
    # Image by image, as reductions have the same shape in any batch then; summed in fp64, without a copy.
    wide = reference.wide(tokens.features)
    images = tokens.features.detach().split(tokens.image_lens)
    scores = [torch.linalg.vector_norm(rows, dim=1, dtype=wide).float() for rows in images]
    return torch.cat(scores) if len(scores) > 1 else scores[0] if scores else _empty(tokens), "norm"


def minus_cosine_to_mean(tokens: VisualTokens) -> tuple[Tensor, str]:
    """How unlike the mean of its image each token is: what is everywhere, such as background, scores low."""
    scores = _empty(tokens)
    for rows, features in _per_image(tokens):
        length = torch.linalg.vector_norm(features, dim=1)
        # The cosine does not see the length of the mean, so the sum will do; broken rows must not spoil the others.
        mean = features.masked_fill(~length.isfinite()[:, None], 0.0).sum(0)
        mean /= torch.linalg.vector_norm(mean).clamp(min=1e-8)
        scores[rows] = -(features * mean).sum(1) / length.clamp(min=1e-8)
    return scores, "minus_cosine_to_mean"


def zoo(tokens: VisualTokens) -> tuple[Tensor, str]:
    """Sensitivity of the projector to small steps of the token, as ZOO-Prune estimates it by default."""
    return ZooPruner().score(tokens), "zoo"


def draft(tokens: VisualTokens) -> tuple[Tensor, str]:
    """What the last token of the prompt attends to in a draft model (see `vtprune.draft`)."""
    if DRAFT not in tokens.probes:
        raise ConfigError(
            "importance='draft' needs a draft: run the prompt in a block `with vtprune.draft.drafting(model, draft, "
            "inputs):`"
        )
    return tokens.probes[DRAFT], "draft"


def auto(tokens: VisualTokens) -> tuple[Tensor, str]:
    """`cls_logits` where the encoder has a CLS token, else `minus_cosine_to_mean`."""
    return cls_logits(tokens) if CLS_LOGITS in tokens.probes else minus_cosine_to_mean(tokens)


#: Sources by the name under which a method's option knows them.
SOURCES: dict[str, Callable[[VisualTokens], tuple[Tensor, str]]] = {
    "auto": auto,
    "cls_logits": cls_logits,
    "cls": cls,
    "norm": norm,
    "zoo": zoo,
    "draft": draft,
}
#: Probes without which a source cannot work, and those that it uses where they exist.
NEEDS: dict[str, frozenset[Probe]] = {
    "cls": frozenset({CLS_ROW}),
    "cls_logits": frozenset({CLS_LOGITS}),
    "zoo": frozenset({PRE_PROJECTOR}),
}
WANTS: dict[str, frozenset[Probe]] = {"auto": frozenset({CLS_LOGITS})}
