# SPDX-License-Identifier: Apache-2.0
"""A draft model ranks the tokens of a larger one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from conformance.helpers import spy
from torch import nn

import vtprune
from vtprune.draft import break_even, draft_row, drafting
from vtprune.errors import ConfigError, InputError
from vtprune.pruners.importance import DRAFT


def plain_row(model: nn.Module, sample: tiny.Inputs, layers: tuple[int, ...]) -> torch.Tensor:
    """Attention of the last row to the visual rows, from the stock model's own maps."""
    eager = tiny.build(tiny.family_of(model), "eager")
    with torch.no_grad():
        maps = eager(**sample, output_attentions=True).attentions
    visual = torch.isin(sample["input_ids"][0], torch.tensor(tiny.placeholders(model)))
    return torch.stack([maps[layer][0, :, -1].mean(0) for layer in layers]).mean(0)[visual]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_the_row_is_that_of_the_stock_model(family: str, layers: tuple[int, ...] | None) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    found = draft_row(model, sample, layers)
    want = plain_row(model, sample, layers or tuple(range(tiny.LAYERS - 1)))
    torch.testing.assert_close(found.probes[DRAFT], want[found.source], atol=1e-5, rtol=1e-4)


def test_a_draft_runs_no_layer_after_the_last_that_is_read() -> None:
    model = tiny.build("llava")
    ran: list[int] = []
    for i, layer in enumerate(tiny.decoder(model).layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    draft_row(model, tiny.prompt(model, 1), (1,))
    assert ran == [0, 1]
    ran.clear()
    with torch.no_grad():
        model(**tiny.prompt(model, 1))  # and nothing is left behind
    assert ran == list(range(tiny.LAYERS))


@torch.no_grad()
def test_the_target_keeps_what_the_draft_attends_to_most() -> None:
    model, small = tiny.build("llava"), tiny.build("llava", layers=3)
    sample = tiny.prompt(model, 2)
    row = draft_row(small, sample).probes[DRAFT]
    with vtprune.using(model, "idpruner", keep=3, importance="draft", mmr_lambda=1.0):
        with drafting(model, small, sample), spy("idpruner") as records:
            model(**sample)
        assert vtprune.report(model).info == {"importance": "draft"}
        want = torch.cat([part.topk(3).indices.sort().values + 16 * i for i, part in enumerate(row.split(16))])
        assert torch.equal(records[0].selection.index, want)
        with pytest.raises(ConfigError, match="needs a draft"):
            model(**sample)
        with drafting(model, small, tiny.prompt(model, 1)), pytest.raises(InputError, match="same grid"):
            model(**sample)
    for bad in ((), (2,), (-1,)):
        with pytest.raises(ConfigError, match="give some of 0 to 1"):
            draft_row(small, sample, bad)
    with pytest.raises(InputError, match="no pictures"):
        draft_row(small, tiny.prompt(model, 0))


def test_break_even_by_hand() -> None:
    """d = 2, one head of 2, m = 1: a row costs 2 [2 * 2 * 4 + 3 * 2 * 1] = 44, and n rows 8 n^2 for attention.

    Target of 3 layers, 10 rows of which 4 stay: 3 [(440 + 800) - (176 + 128)] = 2808. A draft of one such layer: 1240.
    """
    text = {"hidden_size": 2, "num_attention_heads": 1, "intermediate_size": 1}
    target, draft = (SimpleNamespace(num_hidden_layers=n, **text) for n in (3, 1))
    assert break_even(target, draft, 10, 4) == (1240, 2808)
    assert break_even(target, target, 10, 4)[0] > 2808 > break_even(target, target, 10, 4, layers=2)[0]
