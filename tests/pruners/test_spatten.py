# SPDX-License-Identifier: Apache-2.0
"""SpAtten's cascade on attention maps made by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers import make_tokens
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.engine import layer_probes
from vtprune.errors import ConfigError
from vtprune.pruners.spatten import SpAttenPruner
from vtprune.tokens import Probe, Stage, VisualTokens

# Rows are queries a, b, c (the picture) and w (a word), columns keys; layer 1 runs without c.
FIRST = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.2, 0.6, 0], [0.1, 0.5, 0.1, 0.3]])
SECOND = torch.tensor([[1, 0, 0], [0.1, 0.9, 0], [0.1, 0.6, 0.3]])


def cascade(queries: str) -> list[list[int]]:
    """Tokens that stay after layers 0 and 1, of which 2 and then 1 may."""
    name = {"all": "column_sums", "text": "text_rows"}[queries]

    def received(attention: Tensor, visual: int) -> Tensor:
        return attention[:, :visual].sum(0) if queries == "all" else attention[-1:, :visual].T

    tokens: VisualTokens = make_tokens([[[(1, 3)]]]).with_probes({Probe(name, 0): received(FIRST, 3)})
    pruner = SpAttenPruner(layers=(0, 1), queries=queries)
    first = pruner.select(tokens, Budget(2), Stage(0))
    left = tokens.subset(first.index, first.cu_seqlens).with_probes({Probe(name, 1): received(SECOND, 2)})
    return [first.index.tolist(), left.source[pruner.select(left, Budget(1), Stage(1)).index].tolist()]


def test_what_was_received_adds_up_from_layer_to_layer() -> None:
    assert cascade("all") == [[0, 1], [0]]  # s = [1.8, 1.2, .7], then [3.0, 2.7]
    assert cascade("text") == [[0, 1], [1]]  # s = [.1, .5, .1], a tie; then [.2, 1.1]


@pytest.mark.parametrize("depth, at", [(32, tuple(range(5, 31))), (6, (1, 2, 3, 4)), (3, (1,)), (2, (1,))])
def test_it_spares_the_first_layers_and_the_last(depth: int, at: tuple[int, ...]) -> None:
    assert SpAttenPruner().fit(depth).stages() == tuple(map(Stage, at))
    assert {probe.layer for probe in SpAttenPruner().fit(depth).needs} == set(range(at[-1] + 1))


def test_each_stage_keeps_the_same_share() -> None:
    pruner = SpAttenPruner(layers=(1, 2, 3))
    tokens = make_tokens([[[(8, 8)]]])
    counts = [pruner.stage_budget(Budget(1 / 8), stage).pools(tokens).counts for stage in pruner.stages()]
    assert counts == [(32,), (16,), (8,)]


@pytest.mark.parametrize("option", [{"queries": "some"}, {"layers": [2, 1]}])
def test_options_are_checked(option: dict) -> None:
    with pytest.raises(ConfigError, match=r"queries='some'|layers="):
        SpAttenPruner(**option)


@torch.no_grad()
def test_sums_do_not_depend_on_how_many_rows_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("qwen2_5_vl")
    batch, found = tiny.collate([tiny.prompt(model, 1), tiny.prompt(model, 1, seed=1, end=9)]), []
    for chunk in (layer_probes.CHUNK, 1000):
        monkeypatch.setattr(layer_probes, "CHUNK", chunk)
        with vtprune.apply(model, "spatten", keep=0.3):
            found.append(model(**batch).logits)
    assert torch.allclose(*found, atol=1e-5)
