# SPDX-License-Identifier: Apache-2.0
"""A smaller model drafts what a larger one keeps: its attention ranks the visual tokens of the same prompt.

>>> small, _ = vtprune.load("small-vlm")
>>> with vtprune.using(model, "idpruner", keep=64, importance="draft"), drafting(model, small, inputs):
...     model.generate(**inputs)

SpecPC's idea (Draft-based Approximate Inference for LLMs, arXiv:2506.08373) for the visual half of a prompt. In: the
attention that the last row of the prompt pays in a small model decides what the large one is given. Left out: the
draft's look-ahead tokens, the window of several queries with its weights, the pooling of neighbours, and the dropping
of text. Deviations: attention is averaged over heads and layers, where the paper takes the largest; the last layer is
never read (a draft stops as soon as it has seen what it was asked for, so ``layers=(0, 1)`` costs two layers), and
what is ranked is then picked by the method, so that ``mmr_lambda=1`` is the paper's top-k.

It pays where ``F_draft(n) < F(n) - F(k)``: what a draft costs over n rows must be less than what the target saves by
running k of them (`break_even`). A draft that has a vision tower of its own pays for that, too. A narrow draft of
`pocket-llava` costs a tenth of what it saves, and ranks no better than methods that need none
(``docs/neighbours-learned.md``). It may pay where the target is many times larger and a small model of its grid runs
anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .api import using
from .budget import Budget
from .config import PruneConfig
from .engine.attach import engine_of, force_pack, watching
from .engine.call import Call
from .engine.report import prefill_flops
from .errors import ConfigError, InputError
from .models import find_family
from .pruners.importance import DRAFT
from .registry import Pruner
from .tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens


class _Seen(Exception):
    """Stops the draft once it has seen what it was asked for."""

    def __init__(self, tokens: VisualTokens) -> None:
        self.tokens = tokens


@dataclass
class _Look(Pruner):
    """Reads the last row's attention of some layers, and stops the forward after the last of them."""

    layers: tuple[int, ...]

    modality = ("image", "video")
    mechanism = ("query",)
    query_aware = True
    training_free = True
    adaptive = False

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset(Probe("last_query_row", layer) for layer in self.layers)

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(max(self.layers)),)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        raise _Seen(tokens)


@dataclass(frozen=True)
class _Plan(PruneConfig):
    layers: tuple[int, ...] = ()

    def pruner(self) -> Pruner:
        return _Look(self.layers)


@torch.no_grad()
def draft_row(draft: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int] | None = None) -> VisualTokens:
    """Run a draft over a prompt, as far as it must.

    Parameters
    ----------
    draft
        A model of a supported family; whatever is applied to it is not used.
    inputs
        What the processor returned.
    layers
        Decoder layers whose attention is averaged; default all but the last. None after the largest is run.

    Returns
    -------
    VisualTokens
        Of the draft, with how much the last token of the prompt attends to each of them, mean over heads and `layers`,
        as the probe ``draft_row``, ``[T]`` fp32.

    Raises
    ------
    ConfigError
        A layer that is not there, or the last one.
    InputError
        There are no pictures in the inputs.
    """
    family = find_family(draft)
    last = len(family.lm.layers) - 1
    chosen = tuple(sorted(set(range(last) if layers is None else layers)))
    if not chosen or not all(isinstance(layer, int) and 0 <= layer < last for layer in chosen):
        raise ConfigError(f"layers={layers!r} cannot be read; give some of 0 to {last - 1}")
    with using(draft, _Plan("draft", keep=1, layers=chosen)), force_pack():
        engine = engine_of(family)
        assert engine is not None
        given = {k: v for k, v in inputs.items() if k in engine.signature and k != "past_key_values"}
        try:
            family.inner(**given, use_cache=False)
        except _Seen as done:
            rows = torch.stack([done.tokens.probes[Probe("last_query_row", layer)].float() for layer in chosen])
            return replace(done.tokens, probes={DRAFT: rows.mean(0)})
        finally:
            engine._leave()
    raise InputError("the inputs have no pictures, so there is nothing to draft; pass what the processor returned")


@contextmanager
def drafting(
    model: nn.Module, draft: nn.Module | VisualTokens, inputs: Mapping[str, Any], layers: Sequence[int] | None = None
) -> Iterator[VisualTokens]:
    """Within this block and thread, ``importance="draft"`` means what `draft` attends to in this prompt.

    Parameters
    ----------
    model
        The target, pruned by a method with ``importance="draft"``.
    draft
        The draft, which is run at once, or what `draft_row` returned of it.
    inputs
        The prompt, which the block then runs on the target; both models must make the same tokens of its pictures.
    layers
        As in `draft_row`.

    Yields
    ------
    VisualTokens
        Those of the draft.

    Raises
    ------
    InputError
        In the block, where the target's tokens are not those of the draft.
    """
    seen = draft if isinstance(draft, VisualTokens) else draft_row(draft, inputs, layers)

    def note(call: Call) -> None:
        assert call.tokens is not None
        if call.tokens.seqlens != seen.seqlens:
            raise InputError(
                f"the draft made {sum(seen.seqlens)} tokens ({len(seen.seqlens)} views) of a prompt of which the "
                f"target makes {sum(call.tokens.seqlens)} ({len(call.tokens.seqlens)}); both must have the same grid, "
                "and see the same prompts (no beams)"
            )
        call.tokens = call.tokens.with_probes({DRAFT: seen.probes[DRAFT].to(call.tokens.device)})

    with watching(find_family(model), note):
        yield seen


def break_even(target: Any, draft: Any, rows: int, kept: int, layers: int | None = None) -> tuple[int, int]:
    """FLOPs that a draft costs, and FLOPs that it saves; it pays where the first is smaller.

    Parameters
    ----------
    target, draft
        Configurations of the language models; vision towers are not counted.
    rows, kept
        Rows of the whole prompt, and of the pruned one.
    layers
        That the draft runs; default all.
    """
    depth = target.num_hidden_layers
    cost = (draft.num_hidden_layers if layers is None else layers) * prefill_flops(rows, draft)
    return cost, depth * (prefill_flops(rows, target) - prefill_flops(kept, target))
