# SPDX-License-Identifier: Apache-2.0
"""The text model gets no mask where it would hide nothing, and one wherever it might."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import vtprune


def masks_of(model: nn.Module) -> tuple[list[Tensor | None], Any]:
    """What the text model is given, from now on."""
    given: list[Tensor | None] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(kwargs["attention_mask"])

    return given, tiny.decoder(model).register_forward_pre_hook(see, with_kwargs=True)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_prompts_without_padding_need_none(family: str) -> None:
    model = tiny.build(family)
    single, batch = tiny.prompt(model, 1), tiny.collate(tiny.mixed(model))
    with vtprune.apply(model, "norm", keep=0.4):
        given, hook = masks_of(model)
        cache = model(**single, use_cache=True).past_key_values
        assert given == [None]
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert given == [None, None]
        model(**single, use_cache=False)  # else it would look for borders in the positions
        model(**batch)
        assert given[2] is not None and given[2].all() and given[3] is not None and not given[3].all()
        hook.remove()


@pytest.mark.parametrize("method", ["norm", "fastv", "visual-exit"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_token_that_is_masked_while_decoding_stays_masked(family: str, method: str) -> None:
    """A loop over a batch masks what it appends to a row that is done."""
    model = tiny.build(family)
    inputs = tiny.prompt(model, 1)
    inputs = {k: torch.cat([v, v]) if k != "pixel_values" or v.ndim > 2 else v.repeat(2, 1) for k, v in inputs.items()}
    length = inputs["input_ids"].shape[1]

    def last(word: int) -> Tensor:
        out = model(**inputs)
        mask = torch.ones(2, length, dtype=torch.long)
        for token, seen in (((3, 3), (1, 1)), ((4, word), (1, 0)), ((6, 6), (1, 1))):
            mask = torch.cat([mask, torch.tensor(seen)[:, None]], 1)
            ids = torch.tensor(token)[:, None]
            out = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
        return out.logits

    with vtprune.apply(model, method, **({} if method == "visual-exit" else {"keep": 0.4})):
        assert torch.equal(last(7), last(11))
