# SPDX-License-Identifier: Apache-2.0
"""Tokens that sit out the attention of some layers, against a layer loop written by hand.

In the loop every layer is taken apart: the rows that take part go through its attention by themselves, what comes out
is added to them alone, and the FFN sees everybody. There is no cache and no hook in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import vtprune
from vtprune import lens
from vtprune.errors import ConfigError, InputError
from vtprune.tokens import Probe

from .helpers import (
    ATTENTIONS,
    COUNTS_THE_CACHE,
    FLASH,
    FP64,
    LOOSE,
    NEVER,
    assert_close,
    cache_lengths,
    first_call,
    forward_error,
    generate,
    generation_error,
    hooks,
    kept_of,
    manual_decode,
    most_images_for_beams,
    placeholder_mask,
    same,
    spy,
    twin,
)
from .reference import Kept, Prompt, Reference, Run

FAMILIES = ("llava", "qwen2_5_vl")
#: The tiny models have five layers. By default one is sparse; layers that follow each other share no dense one between.
CASES: dict[str, dict[str, Any]] = {"default": {}, "in a row": {"layers": [1, 2, 4]}}
KEEP = 0.35


class Sitting(Reference):
    """``kept[K]`` are the slots of the prompt that take part in the attention of layer K + 1; tails always do."""

    def run(
        self,
        prompt: Prompt,
        kept: Kept,
        tail: Sequence[int] = (),
        positions: str = "original",
        next_position: int | None = None,
        merged: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> Run:
        extra = torch.tensor(list(tail), dtype=torch.long)
        start = int(prompt.positions[:, -1].max()) + 1
        follow = (torch.arange(len(extra)) + start)[None].expand(prompt.positions.shape[0], -1)
        all_positions = torch.cat([prompt.positions, follow], 1)
        x = torch.cat([prompt.embeds, self.twin.get_input_embeddings()(extra)])
        states: dict[int, Any] = {}
        self.rows: dict[int, Tensor] = {}
        with self._plain_attention():
            ids = all_positions[:, None] if all_positions.shape[0] == 3 else all_positions
            cos, sin = self.decoder.rotary_emb(x[None], ids)
            for i, layer in enumerate(self.decoder.layers):
                part = torch.ones(len(x), dtype=torch.bool)
                if i - 1 in kept:
                    part[: len(prompt.ids)] = kept[i - 1]
                normed = layer.input_layernorm(x[None])
                if not len(extra) and self.decoder.config._attn_implementation == "eager":
                    mask = causal(len(x), x.dtype)
                    everyone = layer.self_attn(
                        hidden_states=normed, position_embeddings=(cos, sin), attention_mask=mask
                    )
                    self.rows[i] = everyone[1][0].mean(0)[-1]  # of the last row, had all taken part
                rotary = tuple(e[..., part, :] for e in (cos, sin))
                mask = causal(int(part.sum()), x.dtype)
                out = layer.self_attn(hidden_states=normed[:, part], position_embeddings=rotary, attention_mask=mask)[0]
                x = x.clone()
                x[part] += out[0]
                x = x + layer.mlp(layer.post_attention_layernorm(x[None]))[0]
                states[i] = (torch.arange(len(x)), x)
        return Run(torch.arange(len(x)), self.twin.lm_head(self.decoder.norm(x)), states)


def causal(n: int, dtype: torch.dtype) -> Tensor:
    return torch.full((n, n), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]


def by_hand(family: str, dtype: torch.dtype = torch.float32) -> Sitting:
    return Sitting(twin(family, dtype))


@contextmanager
def applied(model: nn.Module, case: str = "in a row", **settings: Any) -> Iterator[Any]:
    with vtprune.apply(model, "tokensparse", **{"keep": KEEP, **settings}, **CASES[case]) as handle:
        yield handle


@pytest.mark.parametrize(
    "family, case, attention",
    [*(("llava", "in a row", a) for a in ATTENTIONS), ("llava", "default", "sdpa"), ("qwen2_5_vl", "in a row", "sdpa")],
)
def test_forward_equals_the_layer_loop(family: str, case: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), by_hand(family)
    samples = tiny.mixed(model)
    with applied(model, case):
        assert forward_error(model, ref, [samples[3]], samples[3], "tokensparse", use_cache=False) <= LOOSE
        side = "left" if attention == "eager" else "right"
        assert forward_error(model, ref, samples, tiny.collate(samples, side), "tokensparse") <= LOOSE


@pytest.mark.parametrize("case, family", [("in a row", "llava"), ("in a row", "qwen2_5_vl"), ("default", "llava")])
def test_sixteen_steps_in_double_precision(family: str, case: str) -> None:
    model, ref = tiny.build(family, dtype=torch.float64), by_hand(family, torch.float64)
    sample = tiny.prompt(model, 3, seed=2)
    with applied(model, case):
        assert forward_error(model, ref, [sample], sample, "tokensparse") <= FP64
        with spy("tokensparse") as records:
            tokens, logits = manual_decode(model, sample, 16)
    expected, expected_logits = ref.greedy(ref.prompt(sample), kept_of(model, sample, records)[0], 16)
    assert tokens[0].tolist() == expected
    assert_close(logits[0], expected_logits, FP64)


@pytest.mark.parametrize("family, attention", [("llava", "sdpa"), ("qwen2_5_vl", FLASH)])
def test_a_padded_batch_generates_as_recomputation_does(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), by_hand(family)
    samples = tiny.mixed(model)
    with applied(model):
        assert generation_error(model, ref, samples, tiny.collate(samples), "tokensparse", steps=16) <= LOOSE


@torch.no_grad()
def test_who_sits_out_is_back_and_is_ranked_with_the_others() -> None:
    """What the pruner is shown at each layer: hidden states of all tokens, and the row of an attention of all."""
    model, ref = tiny.build("qwen2_5_vl", "eager"), by_hand("qwen2_5_vl")
    sample = tiny.prompt(model, 3, seed=1)
    with applied(model), spy("tokensparse") as records:
        model(**sample)
    found = first_call(records)
    run = ref.run(ref.prompt(sample), kept_of(model, sample, records)[0])
    slots = placeholder_mask(model, sample["input_ids"][0]).nonzero().flatten()
    chosen = []
    for layer in (0, 1, 3):
        tokens = found[layer].tokens
        assert len(tokens.source) == len(slots)
        assert_close(tokens.features, run.states[layer][1][slots], LOOSE)
        assert_close(tokens.probes[Probe("last_query_row", layer)], ref.rows[layer][slots], LOOSE)
        chosen.append(set(found[layer].kept_source.tolist()))
    assert chosen[2] - chosen[0] and chosen[0] - chosen[2], "the same tokens everywhere prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_cache_who_took_part_and_run_once(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    model(**batch)  # transformers puts hooks of its own on
    clean, runs = hooks(model), []
    handles = [
        layer.self_attn.register_forward_hook(lambda _m, _a, _o, i=i: runs.append(i))
        for i, layer in enumerate(model.model.language_model.layers)
    ]
    with applied(model) as handle, spy("tokensparse") as records:
        cache = model(**batch, use_cache=True).past_key_values
        report = handle.report()
        widest = [max(int(kept[layer].sum()) for kept in kept_of(model, batch, records)) for layer in (0, 1, 3)]
        full = batch["input_ids"].shape[1]
        assert cache_lengths(cache) == [full, widest[0], widest[1], full, widest[2]] and max(widest) < full
        model(input_ids=torch.full((len(batch["input_ids"]), 1), 9), past_key_values=cache)
        assert cache_lengths(cache) == [full + 1, widest[0] + 1, widest[1] + 1, full + 1, widest[2] + 1]
    assert runs == [*range(tiny.LAYERS)] * 2
    assert report.stages == tuple(f"attention of layer {i}" for i in (1, 2, 4))
    assert 0 < report.tokens_out < report.tokens_in
    for hook in handles:
        hook.remove()
    assert hooks(model) == clean


@torch.no_grad()
def test_flops_are_those_of_who_took_part() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    with applied(model) as handle:
        model(**sample)
        report = handle.report()
    n, k = sample["input_ids"].shape[1], report.tokens_in - report.tokens_out
    d, heads, kv, dh, m = 32, 4, 2, 8, 64  # of `tiny`

    def attention(rows: int) -> int:
        return 2 * rows * d * dh * (2 * heads + 2 * kv) + 4 * rows * rows * heads * dh

    assert report.flops_before == 5 * (attention(n) + 6 * n * d * m)
    assert report.flops_after == 2 * attention(n) + 3 * attention(n - k) + 5 * 6 * n * d * m


def test_beams() -> None:
    model, ref = tiny.build("llava"), by_hand("llava")
    sample = tiny.prompt(model, most_images_for_beams("llava"), 3)
    with applied(model), spy("tokensparse") as records:
        out = model.generate(**sample, max_new_tokens=4, num_beams=3, do_sample=False)
    expanded = {k: sample[k].repeat_interleave(3, 0) for k in ("input_ids", "attention_mask")}
    kept = kept_of(model, expanded, records)[0]
    assert out[0, -4:].tolist() == ref.beam(ref.prompt(sample), kept, 4, 3)[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_more_text_on_the_cache_and_prompt_lookup(family: str) -> None:
    model, ref = tiny.build(family), by_hand(family)
    sample, more = tiny.prompt(model, 2, seed=2), [7, 9, 11, 8]
    with applied(model), spy("tokensparse") as records:
        cache = model(**sample, use_cache=True).past_key_values
        logits = model(input_ids=torch.tensor([more]), past_key_values=cache).logits[0]
        run = ref.run(ref.prompt(sample), kept_of(model, sample, records)[0], more)
        assert_close(logits, run.logits[-len(more) :], LOOSE)
        greedy, _ = generate(model, sample, 14)
        options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": NEVER}
        try:
            assert same(generate(model, sample, 14, **options)[0], greedy)
        except InputError as refused:
            assert COUNTS_THE_CACHE or "candidates of assisted" in str(refused)


@torch.no_grad()
def test_a_second_picture_on_the_cache() -> None:
    """One turn after the other is one prompt in which the first turn's choice stands, but for what its text saw."""
    model = tiny.build("llava")
    first, second = tiny.prompt(model, 1, seed=1), tiny.prompt(model, 2, seed=2)
    with applied(model), spy("tokensparse") as records:
        cache = model(**first, use_cache=True).past_key_values
        before = cache_lengths(cache)
        mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.long)
        logits = model(**{**second, "attention_mask": mask}, past_key_values=cache).logits
        grown = [now - then for now, then in zip(cache_lengths(cache), before, strict=True)]
    n = second["input_ids"].shape[1]
    sat = [len(r.tokens.source) - len(r.selection) for r in records[3:]]
    assert bool(logits.isfinite().all()) and grown == [n, n - sat[0], n - sat[1], n, n - sat[2]] and min(sat) > 0


@torch.no_grad()
def test_after_a_method_before_the_language_model() -> None:
    model, ref = tiny.build("llava"), by_hand("llava")
    sample = tiny.prompt(model, 2, seed=3)
    names = ["divprune", "tokensparse"]
    with vtprune.apply(model, names, keep=[0.5, 0.5], layers=[1, 3]), spy("tokensparse") as records:
        logits = model(**sample).logits
    found = first_call(records)
    prompt = ref.prompt(sample)
    slots = prompt.visual.nonzero().flatten()
    left = torch.ones_like(prompt.visual)
    left[slots] = False
    left[slots[found[0].tokens.source]] = True
    kept = {}
    for layer, record in found.items():
        kept[layer] = left.clone()
        kept[layer][slots] = False
        kept[layer][slots[record.kept_source]] = True
        kept[layer] = kept[layer][left]
    short = Prompt(
        prompt.ids[left], prompt.embeds[left], prompt.positions[:, left], prompt.placeholder[left], prompt.newline[left]
    )
    assert_close(logits[0][left], ref.run(short, kept).logits, LOOSE)
    with pytest.raises(ConfigError, match="no other can drop them inside"):
        vtprune.apply(model, ["fastv", "tokensparse"], keep=0.5, layers=[3])


@torch.no_grad()
def test_the_lens_skips_sublayers_under_it() -> None:
    """An attention that puts out nothing for any visual token: whether they take part matters to text alone."""
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2, seed=3)
    for first in (True, False):
        with ExitStack() as stack:
            for block in (lambda: lens.skip(model, [1.0, 2.0]), lambda: applied(model))[:: 1 if first else -1]:
                stack.enter_context(block())
            states = model(**sample, output_hidden_states=True).hidden_states
        rows = states[3][0, placeholder_mask(model, sample["input_ids"][0])]
        with lens.skip(model, [1.0, 2.0]):
            plain = model(**sample, output_hidden_states=True).hidden_states
        assert_close(rows, plain[3][0, placeholder_mask(model, sample["input_ids"][0])], LOOSE)


def test_gradients_flow_and_are_those_of_the_loop() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, seed=5)
    with applied(model), spy("tokensparse") as records:
        model(**sample).logits[0, -1].sum().backward()
    kept = kept_of(model, sample, records)[0]
    plain = tiny.build("llava")
    Sitting(plain).run(Sitting(plain).prompt(sample), kept).logits[-1].sum().backward()
    for name in ("q_proj", "v_proj"):
        a, b = (getattr(m.model.language_model.layers[2].self_attn, name).weight.grad for m in (model, plain))
        assert a is not None and b is not None
        assert_close(a, b, LOOSE * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize(
    "layers, message",
    [([0, 2], "begin at 1"), ([2, 9], "the model has layers 0 to 4"), ([3, 2], "is no list of layers")],
)
def test_layers_that_cannot_be_are_refused(layers: list[int], message: str) -> None:
    model = tiny.build("llava")
    clean = hooks(model)
    with pytest.raises(ConfigError, match=message):
        vtprune.apply(model, "tokensparse", layers=layers)
    assert hooks(model) == clean
