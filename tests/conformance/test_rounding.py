# SPDX-License-Identifier: Apache-2.0
"""How sums round, which differs from device to device, decides nothing: not even among the near ties of plain areas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import make_tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune.kernels import reference
from vtprune.tokens import CLS_LOGITS, CLS_ROW, LAST_CLS_LOGITS, PRE_PROJECTOR, VisualTokens

from .test_methods import PROJECTOR

SIDE, RAW, HIDDEN, DIM, WORDS = 24, 48, 96, 32, 120  # width and words of the tiny models' calibration


def plain_areas(seed: int) -> Tensor:
    """Encoder rows of a picture with plain areas: six values, most of their rows copies, the others nearly so."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, RAW, generator=generator)
    block = torch.arange(SIDE) // 4
    rows = values[((block[:, None] + block) % 6).flatten()]
    noise = 1e-3 * torch.randn(len(rows), RAW, generator=generator)
    return rows + noise * (torch.rand(len(rows), 1, generator=generator) < 0.3)


def tokens_of(raw: Tensor, hidden: Tensor, order: Tensor) -> VisualTokens:
    """Tokens of these rows, with the hidden units and the columns of the projector in this order."""
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(RAW, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))
    attention = torch.rand(6, generator=torch.Generator().manual_seed(3))[(raw[:, 0] * 100).long() % 6]
    text = torch.randn(9, DIM, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = projector.double()(raw.double()).float()  # copies stay copies
        projector.float()
        first, second = projector[0], projector[2]
        first.weight.data, first.bias.data = first.weight[hidden].clone(), first.bias[hidden].clone()
        second.weight.data, second.bias.data = second.weight[order][:, hidden].clone(), second.bias[order].clone()
    return replace(
        make_tokens([[[(SIDE, SIDE)]]], features=features[:, order].contiguous()),
        probes={CLS_ROW: attention, CLS_LOGITS: attention, LAST_CLS_LOGITS: attention, PRE_PROJECTOR: raw},
        projector=projector,
        text=text[:, order].contiguous(),
        text_lens=(9,),
        pair_text=text[:, order].mean(0, keepdim=True),
        vocabulary=torch.randn(WORDS, DIM, generator=torch.Generator().manual_seed(4))[:, order].contiguous(),
    )


@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no cls"])
@pytest.mark.parametrize("keep", [0.5, 1 / 9], ids=["half", "ninth"])
@pytest.mark.parametrize("method", [name for name in PROJECTOR if name != "selector"])  # whose weights know the columns
def test_another_order_of_summation_changes_no_pick(method: str, keep: float, cls: bool) -> None:
    """Another order of the columns changes no cosine and no length but for the last bits, as another device does."""
    generator = torch.Generator().manual_seed(1)
    for seed in range(3):
        raw = plain_areas(seed)
        same = torch.arange(HIDDEN), torch.arange(DIM)
        other = torch.randperm(HIDDEN, generator=generator), torch.randperm(DIM, generator=generator)
        found = []
        for hidden, order in (same, other):
            tokens = tokens_of(raw, hidden, order)
            if not cls:
                tokens = replace(tokens, probes={PRE_PROJECTOR: raw})
            found.append(vtprune.select(tokens, method, keep=keep).index)
        assert torch.equal(*found)


class NoDouble(TorchDispatchMode):
    """Stands for a device that has no fp64."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            assert not isinstance(x, Tensor) or x.dtype != torch.float64, op
        return out


@pytest.mark.parametrize("method", PROJECTOR)
def test_no_fp64_where_a_device_has_none(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple GPUs; counts that come out of host numbers aside, since these are made there."""
    raw = plain_areas(0)
    tokens = tokens_of(raw, torch.arange(HIDDEN), torch.arange(DIM))
    monkeypatch.setattr(reference, "NO_FP64", {"cpu"})
    with NoDouble():
        assert len(vtprune.select(tokens, method, keep=1 / 4)) == SIDE * SIDE // 4
