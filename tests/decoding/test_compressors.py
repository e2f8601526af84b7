# SPDX-License-Identifier: Apache-2.0
"""vtprune under a KV-cache compressor that works as kvpress does: a hook after each attention that edits its layer.

The compressor here is written by hand: kvpress is no dependency. What it does to `DynamicCache` layers is the same:
``layer.keys`` and ``layer.values`` are replaced by what it kept, per KV head, during the prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import ATTENTIONS, cache_lengths, twin
from torch import Tensor, nn

import vtprune
from vtprune.decoding import vasparse
from vtprune.errors import InputError

FAMILIES = ("llava", "qwen2_5_vl")
METHODS: dict[str, dict[str, Any]] = {
    "projector": dict(method="norm", keep=0.5),
    "layer": dict(method="dart", keep=0.5, layer=1),
    "nothing": {},
}


@contextmanager
def compressor(
    model: nn.Module, ratio: Callable[[int], float] = lambda layer: 0.5, decoding: int = 0, rotary: bool = False
) -> Iterator[None]:
    """Keep the ``1 - ratio(layer)`` keys of smallest norm in each KV head.

    Parameters
    ----------
    decoding
        Compress again to so many slots whenever there are more; 0: only during the prefill.
    rotary
        Ask the model's rotary embedding for positions of its own, as presses do that expect future queries.
    """
    decoder = model.model.language_model

    def hook(module: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        layer, rows = kwargs["past_key_values"].layers[module.layer_idx], kwargs["hidden_states"].shape[1]
        length = layer.keys.shape[2]
        if rotary:
            ahead = torch.arange(length, length + 5)[None]
            asked = ahead.expand(3, 1, -1) if tiny.family_of(model) in tiny.QWEN else ahead
            cos, _ = decoder.rotary_emb(layer.values, asked)
            assert cos.shape[-2] == 5 and not torch.equal(cos[..., 0, :], cos[..., 4, :])
        if rows == length:
            kept = max(1, int(length * (1 - ratio(module.layer_idx))))
        elif decoding and length > decoding:
            kept = decoding
        else:
            return
        index = layer.keys.norm(dim=-1).topk(kept, largest=False).indices.sort().values[..., None]
        layer.keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[-1]))
        layer.values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[-1]))

    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def applied(model: nn.Module, name: str) -> Iterator[None]:
    if not METHODS[name]:
        yield
        return
    with vtprune.apply(model, **METHODS[name]):
        yield


@torch.no_grad()
def by_hand(model: nn.Module, sample: tiny.Inputs, cache: Any, tokens: list[int]) -> Tensor:
    """Logits ``[len(tokens), V]`` of an untouched twin whose decoder goes on with this cache, positions by hand."""
    ref = twin(tiny.family_of(model))
    decoder = ref.model.language_model
    inner = {k: v for k, v in sample.items() if k in ("input_ids", "image_grid_thw", "mm_token_type_ids")}
    if tiny.family_of(model) in tiny.QWEN:
        start = int(ref.model.get_rope_index(**inner)[0].max()) + 1
    else:
        start = sample["input_ids"].shape[1]
    out = []
    for step, token in enumerate(tokens):
        hidden = ref.get_input_embeddings()(torch.tensor([[token]]))
        position = torch.full((1, 1), start + step)
        rope = decoder.rotary_emb(hidden, position.expand(3, 1, 1) if tiny.family_of(model) in tiny.QWEN else position)
        for layer in decoder.layers:
            done = layer(hidden, position_embeddings=rope, past_key_values=cache, attention_mask=None, use_cache=True)
            hidden = done[0] if isinstance(done, tuple) else done
        out.append(ref.lm_head(decoder.norm(hidden))[0, 0])
    return torch.stack(out)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["projector", "layer"])
@pytest.mark.parametrize("ratio", [lambda layer: 0.5, lambda layer: 0.2 + 0.1 * layer], ids=["even", "pyramid"])
def test_a_pruned_prompt_can_be_compressed_further(family: str, method: str, attention: str, ratio: Callable) -> None:
    """Decoding goes on from the right positions, under masks that fit each layer."""
    model = tiny.build(family, attention)
    sample = tiny.prompt(model, 2, seed=3)
    with applied(model, method), torch.no_grad():
        pruned = cache_lengths(model(**sample).past_key_values)
        with compressor(model, ratio):
            out = model.generate(
                **sample, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            first = model(**sample)
    expected = [max(1, int(n * (1 - ratio(i)))) for i, n in enumerate(pruned)]
    assert cache_lengths(first.past_key_values) == expected
    assert cache_lengths(out.past_key_values) == [n + 7 for n in expected]
    tokens = out.sequences[0, -8:].tolist()
    logits = by_hand(model, sample, _plain(first.past_key_values), tokens[:-1])
    assert float((logits - torch.cat(out.logits[1:])).abs().max()) < 1e-4


def _plain(cache: Any) -> Any:
    """The same keys and values in a cache that vtprune knows nothing of."""
    from transformers import DynamicCache

    fresh = DynamicCache()
    for i, layer in enumerate(cache.layers):
        fresh.update(layer.keys, layer.values, i)
    return fresh


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["projector", "layer"])
def test_compression_while_decoding(family: str, method: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2, seed=3)
    with applied(model, method), compressor(model, decoding=14):
        out = model.generate(**sample, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert cache_lengths(out.past_key_values) == [14] * tiny.LAYERS
    assert out.sequences.shape[1] == sample["input_ids"].shape[1] + 20


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressor_may_ask_for_positions_of_its_own(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2, seed=3)
    with applied(model, "projector"), compressor(model, rotary=True):
        asking = model.generate(**sample, max_new_tokens=6, do_sample=False)
    with applied(model, "projector"), compressor(model):
        assert torch.equal(asking, model.generate(**sample, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_even_batches_work_and_padded_ones_are_refused(family: str) -> None:
    model = tiny.build(family)
    samples = [tiny.prompt(model, 2, seed=s) for s in (3, 4)]
    with applied(model, "projector"), compressor(model):
        together = model.generate(**tiny.collate(samples), max_new_tokens=6, do_sample=False)
        for row, sample in enumerate(samples):
            assert torch.equal(model.generate(**sample, max_new_tokens=6, do_sample=False)[0], together[row])
        with pytest.raises(InputError, match="padded batch"):
            model.generate(**tiny.collate(tiny.mixed(model)), max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_was_changed_between_forwards_is_still_refused(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2, seed=3)
    with applied(model, "projector"), torch.no_grad():
        cache = model(**sample).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 12:], layer.values[:, :, 12:]
        with pytest.raises(InputError, match="changed outside of the model"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)


@pytest.mark.parametrize("method", METHODS)
def test_vasparse_and_a_compressor_do_not_share_a_cache(method: str) -> None:
    """What vasparse remembers of each slot would belong to another one."""
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2, seed=3)
    with applied(model, method), vasparse(model, alpha=0, merge=None) as none:
        assert not none
        with compressor(model), pytest.raises(InputError, match="compressor"):
            model.generate(**sample, max_new_tokens=6, do_sample=False)
