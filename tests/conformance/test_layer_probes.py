# SPDX-License-Identifier: Apache-2.0
"""Probes inside the language model against the attention maps and activations of an untouched model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
import transformers
from helpers import Declared
from torch import Tensor, nn

import vtprune
from vtprune import registry
from vtprune.errors import ConfigError, UnsupportedModelError
from vtprune.models import find_family
from vtprune.tokens import Probe, Stage, VisualTokens

from .helpers import ATTENTIONS, placeholder_mask, spy, twin

LAYERS = (0, 1, 2)
PROBES = [
    Probe(name, layer)
    for name in ("last_query_row", "text_rows", "column_sums", "hidden", "ffn_act")
    for layer in LAYERS
]


@pytest.fixture(autouse=True)
def _probing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_METHODS", dict(vtprune.methods()))

    @registry.register("test-probing")
    @dataclass
    class Probing(Declared):
        """Asks for everything, prunes after layer 2 by the norm."""

        paper = "test"
        mechanism = ("query",)
        query_aware = True
        layer: int = 2

        @property
        def needs(self) -> frozenset[Probe]:
            return frozenset(PROBES)

        def stages(self) -> tuple[Stage, ...]:
            return (Stage(self.layer),)

        def score(self, tokens: VisualTokens) -> Tensor:
            return tokens.features.float().norm(dim=1)

    yield


@torch.no_grad()
def expected(model: Any, sample: tiny.Inputs) -> dict[Probe, Tensor]:
    """The same from a model without hooks that gives its attention maps, one prompt at a time."""
    ids = sample["input_ids"][0]
    slots, last = placeholder_mask(model, ids).nonzero().flatten(), -1
    if len(slots):
        last = int(slots.max())
        slots = slots[vtprune.encode(model, sample).source]  # separators left out, views in order
    special = torch.tensor(sorted(find_family(model).special_ids))
    text = torch.tensor([i for i in range(last + 1, len(ids)) if ids[i] not in special])
    acts: list[Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: acts.append(args[0]))
        for layer in model.model.language_model.layers
    ]
    out = model(**sample, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    found = {}
    for layer in LAYERS:
        mean = out.attentions[layer][0].mean(0)
        found[Probe("last_query_row", layer)] = mean[-1, slots]
        found[Probe("text_rows", layer)] = mean[text][:, slots].T
        found[Probe("column_sums", layer)] = mean.sum(0)[slots]
        found[Probe("hidden", layer)] = out.hidden_states[layer + 1][0, slots]
        found[Probe("ffn_act", layer)] = acts[layer][0]
    return found


@pytest.mark.parametrize("side, cache", [("left", True), ("right", False)])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_probes_are_what_the_model_computes(family: str, side: str, attention: str, cache: bool) -> None:
    model, plain = tiny.build(family, attention), twin(family, attention="eager")
    samples = tiny.mixed(model)
    with vtprune.apply(model, "test-probing", keep=0.5), spy("test-probing") as records:
        model(**tiny.collate(samples, side), use_cache=cache)
    tokens = records[0].tokens
    assert tokens.text_lens is not None and tokens.prompt_rows is not None and tokens.prompt_lens
    start, lens = 0, tokens.sample_lens(len(samples))
    for b, sample in enumerate(samples):
        rows = slice(start, start + lens[b])
        start += lens[b]
        for probe, value in expected(plain, sample).items():
            found = tokens.probes[probe]
            if probe.name == "ffn_act":
                first = sum(tokens.prompt_lens[:b])
                found = found[first : first + tokens.prompt_lens[b]]
                slots = placeholder_mask(model, sample["input_ids"][0]).nonzero().flatten()
                mine = tokens.prompt_rows[rows] - first
                assert not len(mine) or torch.equal(mine, slots[vtprune.encode(model, sample).source])
            else:
                found = found[rows]
            if probe.name == "text_rows":
                assert not found[:, tokens.text_lens[b] :].any()
                found = found[:, : tokens.text_lens[b]]
            assert found.shape == value.shape, probe
            assert torch.allclose(found, value, rtol=1e-4, atol=2e-5), (probe, (found - value).abs().max())
    hidden = tokens.probes[Probe("hidden", 2)]
    assert torch.allclose(hidden, tokens.features, atol=0), "features after layer 2 are its hidden states"


@torch.no_grad()
def test_a_second_picture_on_a_filled_cache_attends_to_what_the_cache_holds() -> None:
    """The keys of the first turn lie before those of the second, in every row that is recomputed."""
    model, plain = tiny.build("llava"), twin("llava", attention="eager")
    first, second = tiny.prompt(model, 1, seed=1), tiny.prompt(model, 1, seed=2)
    both = {k: torch.cat([first[k], second[k]], 0 if k == "pixel_values" else 1) for k in first}
    cache = model(**first, use_cache=True).past_key_values
    with vtprune.apply(model, "test-probing", keep=0.5), spy("test-probing") as records:
        model(**{**second, "attention_mask": both["attention_mask"]}, past_key_values=cache)
    tokens, n = records[0].tokens, first["input_ids"].shape[1]
    out = plain(**both, output_attentions=True)
    slots = n + (second["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    for layer in LAYERS:
        found = tokens.probes[Probe("last_query_row", layer)]
        assert torch.allclose(found, out.attentions[layer][0].mean(0)[-1, slots], atol=2e-5)


@torch.no_grad()
def test_the_text_after_each_picture_is_averaged() -> None:
    model = tiny.build("qwen2_5_vl")
    a, b = tiny.pictures(model, 2)
    sample = tiny.sample(model, [3, a, 4, b, 5])
    apart = tiny.sample(model, [a, b, 2], seed=5)
    batch = tiny.collate([sample, apart])
    with vtprune.apply(model, "test-probing", keep=0.5), spy("test-probing") as records:
        model(**batch)
    table = model.get_input_embeddings()
    for prompt, rows in ((sample, slice(0, 2)), (apart, slice(2, 4))):
        ids = prompt["input_ids"][0].tolist()
        means, current = [], None
        for token in ids:
            if token == tiny.IMAGE:
                if current is None or current:
                    means.append([])
                current = []
            elif tiny.FIRST_WORD <= token < tiny.IMAGE and current is not None:
                current.append(token)
                means[-1].append(token)
        if prompt is apart:  # two pictures with no word between them: the first has no text
            means = [[], means[-1]]
        wanted = torch.stack([table(torch.tensor(m)).mean(0) if m else torch.zeros(32) for m in means])
        assert torch.allclose(records[0].tokens.pair_text[rows], wanted, atol=1e-6)


def test_what_a_model_lacks_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    monkeypatch.delattr(model.model.language_model.layers[1].self_attn, "scaling")
    with pytest.raises(UnsupportedModelError, match=r"decoder layer 1") as error:
        vtprune.apply(model, "fastv", layer=1)
    assert "\n" not in str(error.value)


def on(text: Any) -> nn.Module:
    """A LLaVA whose language model is of another family."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=tiny.build("llava").config.vision_config,
        text_config=text,
        image_token_index=tiny.IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


TEXT = dict(
    vocab_size=tiny.VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@torch.no_grad()
def test_partial_rotary_turns_the_first_dimensions_of_a_head() -> None:
    """Phi turns half of each head; the row is that of its own attention map."""
    model = on(transformers.PhiConfig(**TEXT, partial_rotary_factor=0.5))
    assert find_family(model).lm.layers[1].self_attn.head_dim == 16
    sample = tiny.prompt(tiny.build("llava"), 2)
    with vtprune.apply(model, "fastv", layer=1, keep=0.5), spy("fastv") as records:
        model(**sample)
    model.set_attn_implementation("eager")
    maps = model(**sample, output_attentions=True).attentions
    slots = placeholder_mask(model, sample["input_ids"][0]).nonzero().flatten()
    found = records[0].tokens.probes[Probe("last_query_row", 1)]
    torch.testing.assert_close(found, maps[1][0].mean(0)[-1, slots], rtol=1e-4, atol=2e-5)


def test_heads_that_are_turned_or_normalised_in_another_way_are_refused_in_one_line() -> None:
    glm = transformers.GlmConfig(**TEXT, head_dim=16)
    for text in (glm, transformers.PhiConfig(**TEXT, qk_layernorm=True)):
        with pytest.raises(UnsupportedModelError, match=r"'last_query_row' of decoder layer 1") as error:
            vtprune.apply(on(text), "fastv", layer=1)
        assert "\n" not in str(error.value)


def test_layers_below_deepstack_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    monkeypatch.setattr(model.config.vision_config, "deepstack_visual_indexes", [0, 1, 2], raising=False)
    with pytest.raises(ConfigError, match="DeepStack"):
        vtprune.apply(model, "fastv", layer=1)
    vtprune.apply(model, "fastv", layer=2)


@torch.no_grad()
def test_positions_that_are_not_put_together_yet_turn_rows_alike() -> None:
    """Older transformers hand the attention one cosine and sine per axis; newer ones put the axes together before."""
    model = tiny.build("qwen2_5_vl")
    family = find_family(model)
    attention, rotary = family.lm.layers[1].self_attn, family.lm.rotary_emb
    hidden = torch.randn(2, 6, 32)
    positions = torch.randint(0, 50, (3, 2, 6))
    together = rotary(hidden, positions)
    axes = [rotary(hidden, axis.expand(3, -1, -1)) for axis in positions]
    apart = tuple(torch.stack([axis[i] for axis in axes]) for i in range(2))
    if together[0].ndim == 4:  # such a version: each axis holds three equal ones
        apart = tuple(torch.stack([axis[i][0] for axis in axes]) for i in range(2))
        axes = [tuple(e[0] for e in axis) for axis in axes]
    for heads in (family.query_heads, family.key_heads):
        found, expected = heads(attention, hidden, apart), heads(attention, hidden, together)
        assert found.shape[1] in (2, 4) and torch.allclose(found, expected, atol=1e-6)
        assert not torch.allclose(found, heads(attention, hidden, axes[0]), atol=1e-2)
