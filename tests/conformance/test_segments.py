# SPDX-License-Identifier: Apache-2.0
"""Every registered method, at every stage, on segments of no token and of one: alone, beside others, and in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from helpers import make_tokens
from torch import nn

from vtprune.budget import Budget
from vtprune.registry import build
from vtprune.tokens import Selection, VisualTokens

from .test_methods import BUILT_IN

DIM, RAW, NEURONS, DEPTH = 32, 6, 10, 6  # DIM: the width of the tiny models' calibration

#: Samples of images of segments, and how many words each sample has.
BATCHES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "no sample": ([], ()),
    "no picture": ([[], []], (2, 0)),
    "no token": ([[[(0, 0)]]], (2,)),
    "one token": ([[[(1, 1)]]], (1,)),
    "one token without words": ([[[(1, 1)]]], (0,)),
    "one token each": ([[[(1, 1), (1, 1)], [(1, 1)]], [[(1, 1)]]], (3, 2)),
    "a view without tokens": ([[[(3, 3), (0, 4), (1, 1)], [(1, 1)]], [], [[(0, 0)], [(1, 1)], [(2, 3)]]], (2, 1, 0)),
}
BUDGETS = (Budget(0.3), Budget(1), Budget(2, allocation="pooled"), Budget(0.5, scope="joint"), Budget(1.0))


def dressed(tokens: VisualTokens, pruner: Any, words: tuple[int, ...]) -> VisualTokens:
    """With everything that the method may ask for."""
    torch.manual_seed(0)
    total, samples = len(tokens.source), len(words)
    own = tokens.sample_lens(samples)
    starts = np.cumsum([0, *(n + w for n, w in zip(own, words, strict=True))])[:samples]
    rows = [torch.arange(n) + int(at) + w // 2 for n, w, at in zip(own, words, starts, strict=True)]
    lens = tuple(n + w for n, w in zip(own, words, strict=True))
    shapes = {
        "pre_projector": (total, RAW),
        "hidden": (total, DIM),
        "text_rows": (total, max(words, default=0)),
        "ffn_act": (sum(lens), NEURONS),
    }
    probes = {p: torch.randn(shapes.get(p.name, (total,))) for p in pruner.needs | pruner.wants}
    return replace(
        tokens,
        text=torch.randn(sum(words), DIM),
        text_lens=words,
        pair_text=torch.randn(tokens.num_images, DIM),
        prompt_rows=torch.cat([torch.zeros(0, dtype=torch.int64), *rows]),
        prompt_lens=lens,
        probes=probes,
        projector=nn.Sequential(nn.Linear(RAW, 8), nn.GELU(), nn.Linear(8, DIM)),
        vocabulary=torch.randn(tiny.VOCABULARY, DIM),
    )


def check(tokens: VisualTokens, selection: Selection, counts: tuple[int, ...], lens: tuple[int, ...] | None) -> None:
    """A sound selection; `lens` None: of any count."""
    index = selection.index
    assert index.dtype == torch.int64 and bool((index.diff() > 0).all())
    assert torch.equal(selection.cu_seqlens, torch.searchsorted(index, tokens.cu_seqlens))
    if lens is not None:
        pool = np.repeat(np.arange(len(lens)), lens)
        assert np.bincount(pool[index.numpy()], minlength=len(lens)).tolist() == list(counts)
    if selection.order is not None:
        assert torch.equal(selection.order.sort().values, index)
    if selection.features is not None:
        assert selection.features.shape == (len(index), DIM) and selection.features.dtype == tokens.features.dtype
        assert bool(selection.features.isfinite().all())


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("method", BUILT_IN)
def test_segments_of_no_token_and_of_one(method: str, name: str) -> None:
    samples, words = BATCHES[name]
    for budget in BUDGETS:
        pruner = build(method, {}).fit(DEPTH)
        tokens = make_tokens(samples, dim=DIM)
        ctx: dict[str, Any] = {"image_lens": tokens.image_lens}
        for stage in pruner.stages():
            tokens = replace(dressed(tokens, pruner, words), ctx=ctx)
            mine = pruner.stage_budget(budget, stage)
            lens, counts = mine.pools(tokens)
            selection = pruner.select(tokens, mine, stage)
            check(tokens, selection, counts, None if pruner.adaptive else lens)
            if (
                isinstance(budget.keep, float) and budget.keep == 1 and not pruner.adaptive
            ):  # where the engine asks nobody
                assert len(selection) == len(tokens.source)
            elif method != "visual-exit" and budget.scope == "per_image":
                images = np.repeat(np.arange(tokens.num_images), tokens.image_lens)
                assert set(images[selection.index.numpy()]) == set(images), "no image goes blind"
            tokens = tokens.subset(selection.index, selection.cu_seqlens)
