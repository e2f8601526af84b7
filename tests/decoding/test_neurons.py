# SPDX-License-Identifier: Apache-2.0
"""Decoding on core neurons against a dense model whose activations outside the core are set to zero by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import hooks, manual_decode
from torch import Tensor, nn

import vtprune
from vtprune.decoding import core_neurons
from vtprune.errors import ConfigError, UnsupportedModelError

FAMILIES = ("llava", "qwen2_5_vl")
RHO, BETA = 0.3, 0.4


def votes_of(act: Tensor) -> Tensor:
    """In how many rows ``[n, F]`` each neuron is among the `RHO` most active of its row's active ones, by loops."""
    votes = torch.zeros(act.shape[1], dtype=torch.long)
    for row in act.tolist():
        active = sorted((i for i, x in enumerate(row) if x > 0), key=lambda i: (-row[i], i))
        votes[active[: int(RHO * len(active) + 1e-6)]] += 1
    return votes


def core_of(votes: Tensor) -> Tensor:
    """The `BETA` neurons with most votes, ``[F]`` bool."""
    ranked = sorted(range(len(votes)), key=lambda i: (-int(votes[i]), i))[: int(BETA * len(votes) + 1e-6)]
    mask = torch.zeros(len(votes), dtype=torch.bool)
    mask[[i for i in ranked if votes[i] > 0]] = True
    return mask


@contextmanager
def masked_by_hand(model: nn.Module, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """Dense FFNs: many rows vote, and of a single row everything outside the core is set to zero."""
    votes: dict[int, Tensor] = {}

    def hook(layer: int, args: tuple[Tensor, ...]) -> Any:
        act = args[0]
        if act.shape[1] > 1:
            votes[layer] = votes.get(layer, 0) + votes_of(act[0])
            return None
        return (act * core_of(votes[layer]),)

    handles = [
        model.model.language_model.layers[i].mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: hook(i, args))
        for i in layers
    ]
    try:
        yield votes
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("pruned", [False, True], ids=["dense prompt", "core tokens"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_equals_a_dense_ffn_with_the_same_mask(family: str, pruned: bool) -> None:
    model = tiny.build(family, dtype=torch.float64)
    sample = tiny.prompt(model, 2, seed=1)
    layers = [0, 2, 3]
    if pruned:
        vtprune.apply(model, "corematching", mode="top_k", keep=0.4)
    with masked_by_hand(model, layers):
        tokens, logits = manual_decode(model, sample, 33)
    with core_neurons(model, rho=RHO, beta=BETA, layers=layers):
        sparse_tokens, sparse = manual_decode(model, sample, 33)
    assert torch.equal(tokens, sparse_tokens)
    assert float((sparse - logits).abs().max()) <= 1e-10
    dense = manual_decode(model, sample, 33, tokens=tokens)[1]
    assert torch.equal(dense[:, 0], sparse[:, 0]), "the prompt runs on all neurons"
    assert float((dense[:, 1:] - sparse[:, 1:]).abs().max()) > 1e-3, "a test that the dense model passes tests nothing"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_neurons_are_the_dense_model(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    tokens, logits = manual_decode(model, sample, 6)
    with core_neurons(model, rho=1.0, beta=1.0, layers=range(tiny.LAYERS)):
        again, sparse = manual_decode(model, sample, 6)
    assert torch.equal(tokens, again) and float((logits - sparse).abs().max()) <= 1e-5


@torch.no_grad()
def test_a_new_turn_votes_and_the_core_is_picked_again() -> None:
    model = tiny.build("llava", dtype=torch.float64)
    sample, more = tiny.prompt(model, 1), torch.tensor([[7, 8, 9, 10, 11]])

    def run() -> Tensor:
        cache = model(**sample, use_cache=True).past_key_values
        steps = [model(input_ids=torch.tensor([[t]]), past_key_values=cache).logits for t in (5, 6)]
        steps.append(model(input_ids=more, past_key_values=cache).logits)
        steps += [model(input_ids=torch.tensor([[t]]), past_key_values=cache).logits for t in (5, 6)]
        return torch.cat(steps, 1)

    with masked_by_hand(model, [1, 2]):
        expected = run()
    with core_neurons(model, rho=RHO, beta=BETA, layers=[1, 2]):
        assert float((run() - expected).abs().max()) <= 1e-10


@torch.no_grad()
def test_caches_do_not_mix_and_can_be_copied() -> None:
    model = tiny.build("llava")
    one, other = tiny.prompt(model, 1, seed=1), tiny.prompt(model, 1, seed=2)
    step = torch.tensor([[9]])
    with core_neurons(model, rho=RHO, beta=BETA):
        alone = model(input_ids=step, past_key_values=model(**one, use_cache=True).past_key_values).logits
        first = model(**one, use_cache=True).past_key_values
        twin = copy.deepcopy(first)
        model(**other, use_cache=True)
        assert torch.equal(model(input_ids=step, past_key_values=first).logits, alone)
        model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=first)  # votes here, not in the copy
        assert torch.equal(model(input_ids=step, past_key_values=twin).logits, alone)


@torch.no_grad()
def test_a_prompt_that_ran_outside_of_the_block_stays_dense() -> None:
    """Its tokens had no vote; a core of what comes after it would be a core of that alone."""
    model = tiny.build("llava")
    sample, more = tiny.prompt(model, 1, seed=1), [[[7]], [[8]], [[3, 4, 5]], [[9]]]

    def run(cache: Any) -> Tensor:
        return torch.cat([model(input_ids=torch.tensor(ids), past_key_values=cache).logits for ids in more], 1)

    cache = model(**sample, use_cache=True).past_key_values
    dense = run(copy.deepcopy(cache))
    with core_neurons(model, rho=RHO, beta=BETA, layers=range(tiny.LAYERS)):
        assert torch.equal(run(cache), dense)
        assert not torch.equal(run(model(**sample, use_cache=True).past_key_values), dense)


@torch.no_grad()
def test_batches_beams_and_forwards_without_a_cache_are_dense() -> None:
    model = tiny.build("qwen2_5_vl")
    batch = tiny.collate([tiny.prompt(model, 1, seed=1), tiny.prompt(model, 1, seed=2)])
    sample = tiny.prompt(model, 1, seed=1)
    options = {"max_new_tokens": 5, "do_sample": False}
    dense = [
        model.generate(**batch, **options),
        model.generate(**sample, **options, num_beams=2),
        model.generate(**sample, **options, use_cache=False),
    ]
    with core_neurons(model, rho=RHO, beta=0.1, layers=range(tiny.LAYERS)):
        assert torch.equal(model.generate(**batch, **options), dense[0])
        assert torch.equal(model.generate(**sample, **options, num_beams=2), dense[1])
        assert torch.equal(model.generate(**sample, **options, use_cache=False), dense[2])
        assert not torch.equal(model.generate(**sample, **options), dense[2])


@torch.no_grad()
def test_padding_does_not_vote() -> None:
    model = tiny.build("llava")
    short, long = tiny.prompt(model, 1, seed=1), tiny.prompt(model, 2, seed=2)
    padded = {k: v[:1] for k, v in tiny.collate([short, long]).items() if k != "pixel_values"}
    padded["pixel_values"] = short["pixel_values"]
    with core_neurons(model, rho=RHO, beta=BETA, layers=range(tiny.LAYERS)):
        alone = model.generate(**short, max_new_tokens=6, do_sample=False)[0, -6:]
        assert torch.equal(model.generate(**padded, max_new_tokens=6, do_sample=False)[0, -6:], alone)


def test_it_comes_off_without_a_trace() -> None:
    model = tiny.build("llava")
    clean = hooks(model)
    marker = lambda x: x  # noqa: E731
    model.model.language_model.layers[2].mlp.forward = marker  # as accelerate does
    handle = core_neurons(model)
    with pytest.raises(ConfigError, match="already"):
        core_neurons(model)
    handle.remove()
    handle.remove()
    assert model.model.language_model.layers[2].mlp.__dict__.pop("forward") is marker
    assert hooks(model) == clean and "_vtprune_neurons" not in vars(model.model.language_model)
    assert handle.layers == (1, 2, 3)


@pytest.mark.parametrize(
    "settings,message",
    [({"rho": 0}, "rho=0"), ({"beta": 1.5}, "beta=1.5"), ({"layers": [5]}, "layers 0 to 4"), ({"layers": [-1]}, "-1")],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    model = tiny.build("llava")
    clean = hooks(model)
    with pytest.raises(ConfigError) as error:
        core_neurons(model, **settings)
    assert message in str(error.value) and "\n" not in str(error.value) and hooks(model) == clean


def test_an_ffn_that_cannot_be_gathered_is_refused() -> None:
    model = tiny.build("llava")
    model.model.language_model.layers[2].mlp.up_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="layer 2") as error:
        core_neurons(model)
    assert "\n" not in str(error.value)
