# SPDX-License-Identifier: Apache-2.0
"""The methods that act inside the language model, against a layer loop written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, QuantizedLayer

import vtprune
from vtprune.errors import ConfigError, InputError
from vtprune.pruners.corematching import CoreMatchingPruner

from .helpers import (
    ATTENTIONS,
    COUNTS_THE_CACHE,
    FLASH,
    FP32,
    FP64,
    LOOSE,
    NEVER,
    Record,
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
    reference,
    same,
    slot_masks,
    spy,
    twin,
)

FAMILIES = ("llava", "qwen2_5_vl")
#: Name of the case -> method and options. The tiny models have five layers.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fastv": ("fastv", {}),
    "random after 1": ("random", {"layer": 1}),
    "visual-exit": ("visual-exit", {"layer": 2}),
    "pyramiddrop": ("pyramiddrop", {}),
    "sparsevlm": ("sparsevlm", {"recycle": 0.0}),
    "spatten": ("spatten", {}),
    "catp": ("catp", {}),
    "corematching": ("corematching", {}),
    "corematching top-k": ("corematching", {"mode": "top_k"}),
}
KEEP = 0.35
LOOKS_AT_TEXT = ("fastv", "pyramiddrop", "sparsevlm", "spatten", "catp", "corematching", "corematching top-k")


@contextmanager
def applied(model: nn.Module, case: str, **settings: Any) -> Iterator[str]:
    method, options = METHODS[case]
    with vtprune.apply(model, method, **{"keep": KEEP, **settings}, **options):
        yield method


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_layer_loop(family: str, case: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    with applied(model, case) as method:
        assert forward_error(model, ref, [samples[3]], samples[3], method) <= FP32
        assert forward_error(model, ref, [samples[3]], samples[3], method, use_cache=False) <= FP32
        side = "left" if attention == "eager" else "right"
        assert forward_error(model, ref, samples, tiny.collate(samples, side), method) <= LOOSE


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_thirty_two_steps_in_double_precision(family: str, case: str) -> None:
    model, ref = tiny.build(family, dtype=torch.float64), reference(family, torch.float64)
    sample = tiny.prompt(model, 3, seed=2)
    with applied(model, case) as method:
        assert forward_error(model, ref, [sample], sample, method) <= FP64
        with spy(method) as records:  # generate() would round its logits to fp32
            tokens, logits = manual_decode(model, sample, 32)
    expected, expected_logits = ref.greedy(ref.prompt(sample), kept_of(model, sample, records)[0], 32)
    assert tokens[0].tolist() == expected
    assert_close(logits[0], expected_logits, FP64)


@pytest.mark.parametrize("of", ["fastv", "pyramiddrop", "sparsevlm", "spatten", "tokensparse", "catp"])
def test_worst_ends_inside_the_language_model(of: str) -> None:
    """What stays is what the method, shown the same, would drop first; counts are its own."""
    model, samples = tiny.build("llava"), tiny.mixed(tiny.build("llava"))
    batch = tiny.collate(samples)
    with vtprune.apply(model, of, keep=KEEP), spy(of) as own, torch.no_grad():
        model(**batch)
    with vtprune.apply(model, "worst", of=of, keep=KEEP), spy("worst") as records:
        if of != "tokensparse":  # what sits out is back above
            assert forward_error(model, reference("llava"), samples, batch, "worst") <= LOOSE
        else:
            with torch.no_grad():
                model(**batch)
    best, worst = first_call(own), first_call(records)
    assert best.keys() == worst.keys()
    assert [len(r.selection) for r in worst.values()] == [len(r.selection) for r in best.values()]
    layer, first = next((layer, r) for layer, r in worst.items() if len(r.selection) < len(r.tokens.source))
    assert torch.equal(first.tokens.source, best[layer].tokens.source)
    kept, lost = ({*r.kept_source.tolist()} for r in (best[layer], first))
    for rows in first.tokens.source.split(first.tokens.image_lens):
        image = {*rows.tolist()}
        assert len(kept & image) == len(lost & image)
        # As far apart as two choices of so many tokens can be.
        assert len(kept & lost & image) == max(0, 2 * len(kept & image) - len(image))


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_generates_as_recomputation_does(family: str, case: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    with applied(model, case) as method:
        assert generation_error(model, ref, samples, tiny.collate(samples), method, steps=6) <= LOOSE


@pytest.mark.parametrize("case", ["fastv", "catp", "corematching", "visual-exit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family: str, case: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, most_images_for_beams(family), 3)
    with applied(model, case) as method, spy(method) as records:
        out = model.generate(**sample, max_new_tokens=4, num_beams=3, do_sample=False)
    expanded = {k: sample[k].repeat_interleave(3, 0) for k in ("input_ids", "attention_mask")}
    kept = kept_of(model, expanded, records)[0]
    assert out[0, -4:].tolist() == ref.beam(ref.prompt(sample), kept, 4, 3)[0]


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_every_attention_backend_selects_the_same_tokens(family: str, case: str) -> None:
    found = []
    for attention in ATTENTIONS:
        model = tiny.build(family, attention)
        with applied(model, case) as method, spy(method) as records:
            model(**tiny.collate(tiny.mixed(model)))
        found.append({layer: record.kept_source.tolist() for layer, record in first_call(records).items()})
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_layer_runs_once_and_caches_what_it_saw(family: str, case: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    runs: list[tuple[int, str]] = []
    for i, layer in enumerate(model.model.language_model.layers):
        for part in ("self_attn", "mlp"):
            getattr(layer, part).register_forward_hook(lambda _m, _a, _o, it=(i, part): runs.append(it))
    with applied(model, case) as method, spy(method) as records:
        cache = model(**batch, use_cache=True).past_key_values
        assert runs == [(i, part) for i in range(tiny.LAYERS) for part in ("self_attn", "mlp")]
        alive = batch["attention_mask"].bool()
        masks, lengths = slot_masks(model, batch, records), []
        if None in masks:
            alive = alive & masks[None]
        for i in range(tiny.LAYERS):
            before = lengths[-1] if lengths and i - 1 not in masks else None
            # Text-only and padded rows: a layer is as wide as its longest row. Before any stage: as the prompt.
            width = int(alive.sum(1).max()) if masks.keys() & set(range(-1, i)) or None in masks else alive.shape[1]
            lengths.append(width if before is None else before)
            if i in masks:
                alive = alive & masks[i]
        assert cache_lengths(cache) == lengths
        model(input_ids=torch.full((len(alive), 1), 9), past_key_values=cache)
        assert cache_lengths(cache) == [n + 1 for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_tokens_go_on_in_the_place_of_their_centre(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 3, seed=5)
    options = {"layers": [1, 2], "recycle": 0.9, "merge": 0.4, "keep": 0.3}
    with vtprune.apply(model, "sparsevlm", **options), spy("sparsevlm") as records:
        logits = model(**sample).logits
    slots = placeholder_mask(model, sample["input_ids"][0]).nonzero().flatten()
    merged, changed = {}, 0
    for layer, record in first_call(records).items():
        if record.selection.features is not None:
            merged[layer] = (slots[record.kept_source], record.selection.features)
            changed += int((record.selection.features != record.tokens.features[record.selection.index]).any(1).sum())
    assert merged.keys() == {1, 2} and changed >= 3
    run = ref.run(ref.prompt(sample), kept_of(model, sample, records)[0], merged=merged)
    assert_close(logits[0][run.slots], run.logits, FP32)


@contextmanager
def spies(methods: list[str]) -> Iterator[dict[str, list[Record]]]:
    with ExitStack() as stack:
        yield {method: stack.enter_context(spy(method)) for method in methods}


@pytest.mark.parametrize("names", [["divprune", "fastv"], ["norm", "divprune", "pyramiddrop"], ["divprune", "catp"]])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_projector_stage_with_layer_stages(family: str, names: list[str]) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 3, seed=4)
    for keep in (0.25, [*[0.8] * (len(names) - 1), 0.5]):
        with vtprune.apply(model, names, keep=keep) as handle, spies(names) as records:
            logits = model(**sample).logits
            report = handle.report()
        placeholder = placeholder_mask(model, sample["input_ids"][0])
        kept: dict[int | None, Any] = {}
        for found in records.values():
            for layer, record in first_call(found).items():
                stays = torch.ones(int(placeholder.sum()), dtype=torch.bool)
                stays[record.tokens.source] = False
                stays[record.kept_source] = True
                mask = torch.ones_like(placeholder).masked_scatter(placeholder, stays)
                kept[layer] = mask & kept.get(layer, mask)
        run = ref.run(ref.prompt(sample), kept)
        assert_close(logits[0][run.slots], run.logits, FP32, str(keep))
        total = vtprune.Budget(0.25 if keep == 0.25 else 0.5 * 0.8 ** (len(names) - 1))
        expected = [total.image_count(i.tokens_in) for i in report.images]
        if names[-1] == "catp":  # demonstrations share what they keep
            shown = [i.tokens_in for i in report.images[:-1]]
            assert report.images[-1].tokens_out == expected[-1]
            assert sum(i.tokens_out for i in report.images[:-1]) == int(sum(shown) * total.keep + 1e-6)
        else:
            assert [i.tokens_out for i in report.images] == expected
    with pytest.raises(ConfigError, match="before the one before it is done"):
        vtprune.apply(model, names[::-1], keep=0.5)


@torch.no_grad()
def test_neurons_are_matched_after_another_method_at_the_same_layer() -> None:
    """The core is that of the whole prompt that the layer saw; what fastv left is ranked by it."""
    model = tiny.build("llava")
    batch = tiny.collate(tiny.mixed(model))
    with vtprune.apply(model, "corematching", keep=1 / 16, mode="top_k"), spies(["corematching"]) as records:
        model(**batch)
    alone = first_call(records["corematching"])[1]
    scores = alone.tokens.source.new_zeros(int(alone.tokens.source.max()) + 1)
    scores[alone.tokens.source] = CoreMatchingPruner().score(alone.tokens).long()
    names = ["fastv", "corematching"]
    with vtprune.apply(model, names, keep=[0.5, 0.5], mode="top_k"), spies(names) as records:
        assert bool(model(**batch).logits.isfinite().all())
    found = first_call(records["corematching"])[1]
    assert len(found.tokens.source) < len(alone.tokens.source)
    assert CoreMatchingPruner().score(found.tokens).tolist() == scores[found.tokens.source].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_early_caches_can_be_pruned_after_the_prompt(family: str, side: str) -> None:
    """By hand: the prompt runs as before, then what was dropped is cut out of every cache, then tokens follow."""
    model, plain, ref = tiny.build(family), twin(family), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples, side)
    options = {"prune_early_kv": True, "layer": 2, "mode": "top_k"}
    follow = torch.tensor([[7, 9, 11]]).expand(len(samples), -1)
    with vtprune.apply(model, "corematching", keep=KEEP, **options), spy("corematching") as records:
        cache = model(**batch, use_cache=True).past_key_values
        kept = kept_of(model, batch, records)
        widest = max(int(k[2].sum()) for k in kept)
        assert cache_lengths(cache) == [widest] * tiny.LAYERS
        steps = [model(input_ids=follow[:, t : t + 1], past_key_values=cache).logits[:, 0] for t in range(3)]
        assert cache_lengths(cache) == [widest + 3] * tiny.LAYERS
    for b, sample in enumerate(samples):
        prompt = ref.prompt(sample)
        states = ref.run(prompt, kept[b]).states
        keep = kept[b][2]
        embeds, positions = plain.get_input_embeddings()(follow[b]), prompt.positions
        start = int(positions[:, -1].max()) + 1
        later = (start + torch.arange(3))[None].expand(positions.shape[0], -1)
        # Inputs of each layer for kept rows of the prompt; then all tokens under a plain causal mask.
        hidden = embeds
        with ref._plain_attention():
            for i, layer in enumerate(plain.model.language_model.layers):
                slots, rows = states[i - 1] if i else (torch.arange(len(prompt.ids)), prompt.embeds)
                rows = rows[keep[slots]]
                ids = torch.cat([positions[:, keep], later], 1)
                ids = ids[:, None] if positions.shape[0] == 3 else ids
                whole = torch.cat([rows, hidden])[None]
                n = whole.shape[1]
                mask = torch.full((n, n), torch.finfo(whole.dtype).min).triu(1)[None, None]
                rope = plain.model.language_model.rotary_emb(whole, ids)
                out = layer(whole, attention_mask=mask, position_embeddings=rope, use_cache=False)
                hidden = (out[0] if isinstance(out, tuple) else out)[0, -3:]
        expected = plain.lm_head(plain.model.language_model.norm(hidden))
        assert_close(torch.stack([s[b] for s in steps]), expected, LOOSE, f"sample {b}")


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_pruned_early_caches(family: str) -> None:
    model = tiny.build(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "corematching", keep=KEEP, prune_early_kv=True):
        together, _ = generate(model, tiny.collate(samples), 5)
        for b, sample in enumerate(samples):
            assert same(generate(model, sample, 5)[0][0], together[b])
        greedy, _ = generate(model, samples[0], 14)
        options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": NEVER}
        try:
            assert same(generate(model, samples[0], 14, **options)[0], greedy)
        except InputError:
            assert COUNTS_THE_CACHE


@torch.no_grad()
def test_early_caches_of_a_second_prompt() -> None:
    """What the first turn left stays; of the second only what it drops goes, in every layer."""
    model = tiny.build("llava")
    first, second = tiny.prompt(model, 1, seed=1), tiny.prompt(model, 2, seed=2)
    mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.long)
    more = {**second, "attention_mask": mask}
    lengths, logits = [], []
    for early in (False, True):
        options = {"mode": "top_k", "layer": 2, "prune_early_kv": early}
        with vtprune.apply(model, "corematching", keep=KEEP, **options):
            cache = model(**first, use_cache=True).past_key_values
            before = cache_lengths(cache)
            keys = [layer.keys.clone() for layer in cache.layers]
            logits.append(model(**more, past_key_values=cache).logits)
            lengths.append((before, cache_lengths(cache)))
            for layer, old in zip(cache.layers, keys, strict=True):
                assert same(layer.keys[:, :, : old.shape[2]], old)
    (late_before, late), (early_before, now) = lengths
    assert early_before == [late_before[-1]] * tiny.LAYERS and now == [late[-1]] * tiny.LAYERS
    assert bool(logits[1].isfinite().all()) and not same(logits[0], logits[1])


@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_a_turn_in_which_a_sample_says_nothing(case: str) -> None:
    """Its row is all padding; the others go on as they do alone. (Qwen's own positions of such a row are an error.)"""
    model = tiny.build("llava")
    first, quiet, more = (tiny.prompt(model, 1, seed=s) for s in (1, 2, 3))
    batch = tiny.collate([first, quiet])

    def second(before: tiny.Inputs, rows: int) -> tiny.Inputs:
        ids, said = (torch.cat([more[k], torch.zeros_like(more[k])])[:rows] for k in ("input_ids", "attention_mask"))
        return {**more, "input_ids": ids, "attention_mask": torch.cat([before["attention_mask"], said], 1)}

    with applied(model, case):
        cache = model(**first, use_cache=True).past_key_values
        alone = model(**second(first, 1), past_key_values=cache).logits[0]
        cache = model(**batch, use_cache=True).past_key_values
        together = model(**second(batch, 2), past_key_values=cache).logits[0]
    assert_close(together, alone, LOOSE)


@pytest.mark.parametrize(
    "method,options",
    [
        ("fastv", {"layer": tiny.LAYERS - 1}),
        ("random", {"layer": 99}),
        ("visual-exit", {"layer": tiny.LAYERS}),
        ("pyramiddrop", {"layers": [1, 9]}),
        ("sparsevlm", {"layers": [9]}),
        ("spatten", {"layers": [1, 9]}),
        ("catp", {"layer": tiny.LAYERS - 2}),
        ("corematching", {"layer": 7}),
    ],
)
def test_a_layer_out_of_range_is_refused_in_one_line(method: str, options: dict[str, Any]) -> None:
    model = tiny.build("llava")
    clean = hooks(model)
    with pytest.raises(ConfigError, match=r"the model has layers 0 to 4; choose a layer in 0\.\.3") as error:
        vtprune.apply(model, method, **options)
    assert "\n" not in str(error.value) and hooks(model) == clean


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prompt_lookup_equals_greedy(family: str, case: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 1, seed=2)
    with applied(model, case):
        greedy, _ = generate(model, sample, 14)
        options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": NEVER}
        try:
            looked_up, _ = generate(model, sample, 14, **options)
        except InputError as error:
            assert COUNTS_THE_CACHE or ("candidates of assisted" in str(error) and case in LOOKS_AT_TEXT)
            return
    assert same(greedy, looked_up)


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_assisted_decoding_with_a_second_model_equals_greedy(family: str, case: str) -> None:
    model, draft = tiny.build(family), tiny.build(family, seed=0)
    for p in draft.parameters():  # nearly the same model: most candidates pass, some do not
        p.add_(torch.randn_like(p) * 0.01)
    sample = tiny.prompt(model, 1, seed=8)
    with applied(model, case):
        greedy, _ = generate(model, sample, 8)
        for pruned_draft in (False, True):
            with ExitStack() as stack:
                if pruned_draft:
                    stack.enter_context(applied(draft, case))
                try:
                    assisted, _ = generate(model, sample, 8, assistant_model=draft, eos_token_id=NEVER)
                except InputError as error:
                    # Candidates come along with the prompt, where a method would take them for the question.
                    assert COUNTS_THE_CACHE or ("candidates of assisted" in str(error) and case in LOOKS_AT_TEXT)
                    assert "\n" not in str(error)
                    continue
            assert same(assisted, greedy) and case not in LOOKS_AT_TEXT


@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_attention_maps_can_be_asked_for(case: str) -> None:
    model = tiny.build("llava", "eager")
    sample = tiny.prompt(model, 2)
    with applied(model, case):
        plain = model(**sample).logits
        out = model(**sample, output_attentions=True, output_hidden_states=True)
    assert same(out.logits, plain) and len(out.attentions) == tiny.LAYERS
    widths = [a.shape[-1] for a in out.attentions]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


@torch.no_grad()
def test_prompts_without_text() -> None:
    model = tiny.build("llava")
    bare = tiny.sample(model, tiny.pictures(model, 2))
    for case in METHODS:
        if case != "visual-exit":
            with applied(model, case):
                assert bool(model(**bare).logits.isfinite().all()), case
    batch = tiny.collate([tiny.prompt(model, 1), bare])
    with pytest.raises(InputError, match="sample 1 has pictures and no text") as error, applied(model, "visual-exit"):
        model(**batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_a_static_cache_is_refused_in_one_line(case: str) -> None:
    from transformers import StaticCache

    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    cache = StaticCache(config=model.config.text_config, max_cache_len=96)
    with pytest.raises(InputError, match="dynamic cache") as error, applied(model, case):
        model(**sample, past_key_values=cache, use_cache=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", METHODS)
def test_layers_below_deepstack_are_refused_in_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    monkeypatch.setattr(model.config.vision_config, "deepstack_visual_indexes", [0, 1, 2, 3], raising=False)
    clean = hooks(model)
    with pytest.raises(ConfigError, match=r"DeepStack\); choose a layer from 3 on") as error, applied(model, case):
        pass
    assert "\n" not in str(error.value) and hooks(model) == clean


class Exact(QuantizedLayer):
    """A quantised layer that loses nothing: it keeps keys and values where only it finds them."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.clone()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor


class Away(DynamicCache):
    """Keys and values leave the device as soon as a layer has read them, as those of an offloaded cache do."""

    def __init__(self) -> None:
        super().__init__()
        self.offloading, self.host = True, {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        self.offloading = False  # transformers' own needs a GPU
        if layer in self.host:
            self.layers[layer].keys = self.host[layer]
        out = super().update(keys, values, layer, *args, **kwargs)
        self.host[layer] = self.layers[layer].keys
        self.layers[layer].keys = self.layers[layer].keys.to("meta")
        self.offloading = True
        return out


def quantised() -> Cache:
    return Cache(layers=[Exact(residual_length=64) for _ in range(tiny.LAYERS)])


@pytest.mark.parametrize("make", [quantised, Away], ids=["quantised", "offloaded"])
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_caches_that_put_keys_away_serve_a_prompt_and_its_answer(family: str, case: str, make: Any) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    with applied(model, case):
        plain, expected = generate(model, batch, 6)
        found, logits = generate(model, batch, 6, past_key_values=make())
    assert same(found, plain) and same(logits, expected)


@pytest.mark.parametrize("make, word", [(quantised, "quantised"), (Away, "offloaded")], ids=["quantised", "offloaded"])
@torch.no_grad()
def test_a_second_prompt_on_such_a_cache_works_or_is_refused_in_one_line(make: Any, word: str) -> None:
    model = tiny.build("llava")
    first, second = tiny.prompt(model, 1), tiny.prompt(model, 2, seed=1)
    seen = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.int64)
    for case in METHODS:
        with applied(model, case):
            cache = model(**first, past_key_values=make(), use_cache=True).past_key_values
            then = {**second, "attention_mask": seen, "past_key_values": cache}
            if METHODS[case][0] in ("fastv", "pyramiddrop", "sparsevlm", "spatten", "tokensparse", "catp"):
                with pytest.raises(InputError, match=f"a cache that is {word}") as error:
                    model(**then)
                assert "\n" not in str(error.value)
                continue
            found = model(**then).logits
            plain = model(**first, use_cache=True).past_key_values
            assert same(found, model(**{**then, "past_key_values": plain}).logits), case
    with (
        vtprune.apply(model, "corematching", prune_early_kv=True),
        pytest.raises(InputError, match=f"one that is {word}; leave it off") as error,
    ):
        model(**first, past_key_values=make(), use_cache=True)
    assert "\n" not in str(error.value)
