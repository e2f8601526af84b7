# SPDX-License-Identifier: Apache-2.0
"""Skipped sublayers and injected tokens: to the bit where nothing changes, else against layers called by hand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import ATTENTIONS, assert_close, hooks, manual_decode, reference
from conformance.reference import Prompt, Reference
from torch import Tensor, nn

import vtprune
from vtprune import engine
from vtprune.errors import ConfigError, InputError, VTPruneWarning
from vtprune.lens import Calibration, inject, skip

STEPS = 16


def injected(ref: Reference, prompt: Prompt, layer: int, tail: Sequence[int] = ()) -> Tensor:
    """Logits of all rows where pictures enter before `layer`: no cache, no hook, one decoder layer after the other."""
    extra = torch.tensor(list(tail), dtype=torch.long)
    axes = prompt.positions.shape[0]
    follow = torch.arange(len(extra)) + int(prompt.positions[:, -1].max()) + 1
    positions = torch.cat([prompt.positions, follow[None].expand(axes, -1)], 1)
    whole = torch.cat([prompt.embeds, ref.twin.get_input_embeddings()(extra)])
    text = torch.cat([~prompt.placeholder, torch.ones(len(extra), dtype=torch.bool)])
    with ref._plain_attention():
        hidden, place = (whole[text], positions[:, text]) if layer else (whole, positions)
        for i, block in enumerate(ref.decoder.layers):
            if layer and i == layer:
                merged = whole.clone()
                merged[text] = hidden
                hidden, place = merged, positions
            n = len(hidden)
            rope = ref.decoder.rotary_emb(hidden[None], place[:, None] if axes == 3 else place)
            mask = torch.full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]
            out = block(hidden[None], attention_mask=mask, position_embeddings=rope, use_cache=False)
            hidden = (out[0] if isinstance(out, tuple) else out)[0]
    return ref.twin.lm_head(ref.decoder.norm(hidden))


@pytest.mark.parametrize("attention, layer", [("sdpa", 3), *((a, 1) for a in ATTENTIONS if a != "sdpa")])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_injection_is_a_loop_over_layers(family: str, attention: str, layer: int) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    model(**batch)  # transformers puts hooks of its own on at the first forward
    clean = hooks(model)
    with inject(model, layer):
        logits = model(**batch).logits
        steps = STEPS if attention == "sdpa" else 2
        tokens, decoded = manual_decode(model, batch, steps)
    assert hooks(model) == clean
    width = batch["input_ids"].shape[1]
    for b, sample in enumerate(samples):
        prompt = ref.prompt(sample)
        length = len(prompt.ids)
        assert_close(logits[b, width - length :], injected(ref, prompt, layer), 1e-4, f"prompt {b}")
        if b in (0, 3):
            expected = injected(ref, prompt, layer, tokens[b].tolist()[:-1])[length - 1 :]
            assert_close(decoded[b], expected, 2e-4, f"decoding {b}")


@torch.no_grad()
def test_injection_generates_and_caches_by_layer() -> None:
    model, ref = tiny.build("llava"), reference("llava")
    sample = tiny.prompt(model, 2)
    with inject(model, 2):
        out = model.generate(**sample, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    prompt = ref.prompt(sample)
    text = int((~prompt.placeholder).sum())
    lengths = [out.past_key_values.get_seq_length(i) for i in range(tiny.LAYERS)]
    assert lengths == [text + STEPS - 1] * 2 + [len(prompt.ids) + STEPS - 1] * 3
    written: list[int] = []
    for _ in range(STEPS):
        written.append(int(injected(ref, prompt, 2, written)[-1].argmax()))
    assert out.sequences[0, len(prompt.ids) :].tolist() == written


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_nothing_to_do_changes_no_bit(family: str, invented: Calibration) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    dense = model(**batch).logits
    written = model.generate(**batch, max_new_tokens=4, do_sample=False)
    nothing = [
        inject(model, 0),
        skip(model, []),
        skip(model, [0, 0.5, 3], tokens=lambda t: torch.zeros_like(t.source, dtype=torch.bool)),
    ]
    for block in nothing:
        with block:
            assert torch.equal(model(**batch).logits, dense)
            assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), written)
    assert torch.equal(model(**batch).logits, dense)
    with inject(model, 2):
        assert not torch.equal(model(**batch).logits, dense)
        text = tiny.text_only(tiny.prompt(model, 1))
        without = model(**text).logits
    assert torch.equal(model(**text).logits, without)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_skipping_every_sublayer_leaves_a_token_as_it_came(family: str, pruned: bool) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    tokens = vtprune.encode(model, batch)
    every = [half / 2 for half in range(2 * tiny.LAYERS)]
    last = model.model.language_model.layers[-1]
    kept: list[Tensor] = []
    handle = last.register_forward_hook(lambda _m, _a, o: kept.append(o[0] if isinstance(o, tuple) else o))
    odd = lambda t: t.source % 2 == 1  # noqa: E731
    with vtprune.using(model, "norm" if pruned else None, keep=0.5), skip(model, every, tokens=odd):
        model(**batch)
    handle.remove()
    flat = kept[0].reshape(-1, kept[0].shape[-1])
    left = vtprune.select(tokens, "norm", keep=0.5).index if pruned else torch.arange(len(tokens.source))
    for row in left.tolist():
        unchanged = bool((flat == tokens.features[row]).all(1).any())
        assert unchanged == bool(tokens.source[row] % 2), row


@torch.no_grad()
def test_skipping_one_sublayer_is_that_sublayer_silenced() -> None:
    """Attention of layer 1 and the MLP of layer 3, for the tokens of one picture of two, done by hand."""
    model, ref = tiny.build("llava"), reference("llava")
    sample = tiny.prompt(model, 2)
    prompt = ref.prompt(sample)
    first = prompt.placeholder & (prompt.placeholder.cumsum(0) <= 16)
    hidden = prompt.embeds[None]
    n = hidden.shape[1]
    mask = torch.full((n, n), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    rope = ref.decoder.rotary_emb(hidden, prompt.positions)
    with ref._plain_attention():
        for i, block in enumerate(ref.decoder.layers):
            out = block.self_attn(block.input_layernorm(hidden), attention_mask=mask, position_embeddings=rope)[0]
            hidden = hidden + (out.masked_fill(first[None, :, None], 0) if i == 1 else out)
            out = block.mlp(block.post_attention_layernorm(hidden))
            hidden = hidden + (out.masked_fill(first[None, :, None], 0) if i == 3 else out)
    expected = ref.twin.lm_head(ref.decoder.norm(hidden))[0]
    with skip(model, [1, 3.5], tokens=lambda t: t.source < 16):
        assert_close(model(**sample).logits[0], expected, 2e-5, "skip")


@torch.no_grad()
def test_classes_are_told_by_the_projected_rows(invented: Calibration) -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    seen = vtprune.lens(model, sample, layers=0, calibration=invented).categories()
    for name in ("dead", "sink", "alive", "all"):
        chosen = torch.from_numpy(seen.mask(name))
        with skip(model, [0.5, 2], tokens=name, calibration=invented):
            mine = model(**sample).logits
        with skip(model, [0.5, 2], tokens=lambda t, chosen=chosen: chosen):
            assert torch.equal(model(**sample).logits, mine), name
    assert 0 < seen.mask("dead").sum() < 32


def test_what_is_refused(invented: Calibration) -> None:
    model: Any = tiny.build("llava")
    model(**tiny.prompt(model, 1))
    clean = hooks(model)

    def entering(block: Any) -> None:
        with block:
            pass

    for number in (-1, 0.25, tiny.LAYERS, True, "1"):
        with pytest.raises(ConfigError, match="is not there"):
            entering(skip(model, [number]))  # type: ignore[list-item]
    for layer in (-1, tiny.LAYERS, 1.5, True):
        with pytest.raises(ConfigError, match="is not there"):
            entering(inject(model, layer))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no calibration"):
        entering(skip(model, [1], tokens="dead"))
    with pytest.raises(ConfigError, match="no class"):
        entering(skip(model, [1], tokens="ded"))
    with vtprune.apply(model, "norm", keep=0.5) as handle:
        with pytest.raises(ConfigError, match="while they are pruned"):
            entering(inject(model, 1))
        handle._engine.fired = True
    with (
        inject(model, 1),
        vtprune.using(model, "norm", keep=0.5),
        pytest.raises(ConfigError, match="while they are pr"),
    ):
        model(**tiny.prompt(model, 1))
    with skip(model, [1], tokens=lambda t: t.source), pytest.raises(InputError, match="expected bool"):
        model(**tiny.prompt(model, 1))
    assert hooks(model) == clean


def test_a_layer_without_the_sublayer_leaves_no_hook_behind() -> None:
    model: Any = tiny.build("llava")
    model(**tiny.prompt(model, 1))
    del model.model.language_model.layers[3]._modules["mlp"]
    clean = hooks(model)
    with pytest.raises(AttributeError, match="mlp"), skip(model, [1, 3.5]):
        pass
    assert hooks(model) == clean


@torch.no_grad()
def test_what_never_sees_a_picture_says_so() -> None:
    """An answer without the intervention must not pass for one with it."""
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    embeds = model.get_input_embeddings()(sample["input_ids"])
    for block in (inject(model, 2), skip(model, [1])):
        with pytest.warns(VTPruneWarning, match="changed nothing: the inputs were embeddings without pixels"), block:
            model(inputs_embeds=embeds, attention_mask=sample["attention_mask"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in (inject(model, 2), skip(model, [1]), skip(model, []), inject(model, 0)):
            with block:
                model(**sample)
        with skip(model, []), inject(model, 0):
            model(inputs_embeds=embeds, attention_mask=sample["attention_mask"])


@torch.no_grad()
def test_pictures_without_text_cannot_be_injected() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    visual = torch.isin(sample["input_ids"], torch.tensor(tiny.placeholders(model)))[0]
    bare = {key: value if key == "pixel_values" else value[:, visual] for key, value in sample.items()}
    for batch, which in ((bare, 0), (tiny.collate([sample, bare]), 1)):
        with inject(model, 2), pytest.raises(InputError, match=f"sample {which} has pictures and no text"):
            model(**batch)


def test_force_pack_is_not_needed_for_injection() -> None:
    model: nn.Module = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    with torch.no_grad(), inject(model, 2):
        plain = model(**sample).logits
        with engine.force_pack():
            assert torch.equal(model(**sample).logits, plain)
