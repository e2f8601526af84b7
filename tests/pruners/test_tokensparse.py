# SPDX-License-Identifier: Apache-2.0
"""Token Sparse Attention on rows made by hand; the engine around it is in `conformance/test_reversible.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_tokens
from torch import Tensor, nn

from vtprune.budget import Budget
from vtprune.engine import reversible
from vtprune.pruners.tokensparse import TokenSparsePruner
from vtprune.tokens import Probe


class Attention(nn.Module):
    """``Attn(norm(x[S])) = [10, 20]``, and says what it was given."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        self.given = hidden_states.flatten().tolist()
        return torch.tensor([[[10.0], [20.0]]]), None


def test_the_example_of_the_docstring() -> None:
    pruner = TokenSparsePruner(layers=(1,))
    (stage,) = pruner.stages()
    assert stage.reversible and stage.layer == 0, "who takes part in layer 1 is asked for after layer 0"
    tokens = make_tokens([[[(1, 2)]]]).with_probes({Probe("last_query_row", 0): torch.tensor([0.1, 0.3])})
    chosen = pruner.select(tokens, Budget(1), stage).index
    assert chosen.tolist() == [1]

    into = torch.cat([chosen, torch.tensor([2])])  # the word always takes part
    back = torch.full((3,), -1).index_copy(0, into, torch.arange(2))
    part = reversible.Attending(into[None], back[None], {}, ())
    call: Any = SimpleNamespace(attending={1: part})
    attention, x = Attention(), torch.tensor([[[1.0], [2.0], [3.0]]])
    reversible.hook(attention, 1, lambda: call)
    x = x + attention(hidden_states=x)[0]
    assert attention.given == [2.0, 3.0], "keys and values of two rows alone can be cached"
    assert x.flatten().tolist() == [1.0, 12.0, 23.0]


@pytest.mark.parametrize("depth, at", [(32, tuple(range(3, 32, 2))), (6, (3, 5)), (3, (2,)), (2, (1,))])
def test_every_other_layer_from_the_fourth_on(depth: int, at: tuple[int, ...]) -> None:
    assert [stage.layer for stage in TokenSparsePruner().fit(depth).stages()] == [layer - 1 for layer in at]
